"""Time limits of a streamed reply that keep-alives do not hide: the longest silence, and the whole."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from framework.errors import LLMTimeout


class Silence:
    """Measures how long nothing of a reply came. Comments and pings arrive as bytes, and are no part of it.

    Both limits are looked at whenever bytes arrive; when none do, the client's read timeout ends the wait.
    """

    def __init__(
        self, who: str, longest: float, total: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._who, self._longest, self._total, self._clock = who, longest, total, clock
        self._began = self._heard = clock()

    def heard(self) -> None:
        """A part of the reply has come."""
        self._heard = self._clock()

    def check(self) -> None:
        """Raise LLMTimeout when it has been silent for too long, or takes too long as a whole."""
        now = self._clock()
        if now - self._heard > self._longest:
            raise LLMTimeout(
                f"{self._who} did not answer in time: it kept the connection alive, but sent nothing of its reply for "
                f"{now - self._heard:.3g} s (timeout_seconds is {self._longest:g})."
            )
        if self._total is not None and now - self._began > self._total:
            raise LLMTimeout(
                f"{self._who} did not answer in time: the reply was not whole after {now - self._began:.3g} s "
                f"(total_timeout_seconds is {self._total:g})."
            )

    def listen_to(self, response: Any) -> None:
        """Look at the limits whenever bytes of ``response`` arrive.

        ``response`` is of the HTTP library below a vendor's client, whose streams read it by these two methods; they
        tell their readers of nothing but whole events.
        """
        self.heard()
        blocking, waiting = response.iter_bytes, response.aiter_bytes

        def iter_bytes(*args: Any, **keywords: Any) -> Iterator[bytes]:
            for piece in blocking(*args, **keywords):
                self.check()
                yield piece

        async def aiter_bytes(*args: Any, **keywords: Any) -> AsyncIterator[bytes]:
            async for piece in waiting(*args, **keywords):
                self.check()
                yield piece

        response.iter_bytes, response.aiter_bytes = iter_bytes, aiter_bytes
