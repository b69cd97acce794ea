"""The time limit of a step's attempt: work takes of it, waiting durably does not.

``ctx.sleep``, ``ctx.wait_for`` and a run that stays in the process for what its steps wait for may as well let the
process go, and come back with the whole limit. So the limit stands still while they wait here, and how long a wait
is kept in the process says nothing about how long a step may work.

It stands still only while nothing but waits is known to be in flight. A task that sleeps again and again beside a call
that hangs would otherwise keep that call from ever timing out. What a node does without the journal, such as a request
of its own in another task, is not known of: beside a wait it takes no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from types import TracebackType

_current: ContextVar[TimeLimit | None] = ContextVar("surefoot_time_limit", default=None)


class TimeLimit:
    """``async with TimeLimit(seconds):`` as ``asyncio.timeout``, in the event loop's thread; ``None`` is no limit.

    Limits know those around them, as that of a plan's step around those of its sub-graph: the outer one stands still
    when all inner ones do.
    """

    def __init__(self, seconds: float | None) -> None:
        self.works: Callable[[], bool] | None = None
        """Whether calls are in flight that are no waits; of an attempt with a journal. Asked while a wait is open."""
        self._seconds = seconds
        self._around: TimeLimit | None = None
        self._timeout = asyncio.timeout(seconds)
        self._loop = asyncio.get_running_loop()
        self._token: Token[TimeLimit | None] | None = None
        self._waits = 0
        self._inner = 0
        self._inner_still = 0
        self._still = False
        self._left = 0.0

    async def __aenter__(self) -> TimeLimit:
        await self._timeout.__aenter__()
        self._around = _current.get()
        self._token = _current.set(self)
        if self._around is not None:
            self._around._count(inner=1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        still, self._still = self._still, False  # no timer any more: the loop may be closed
        if self._around is not None:
            self._around._count(inner=-1, still=-still)
        if self._token is not None:
            with suppress(ValueError):  # a coroutine that is closed from outside ends in another context
                _current.reset(self._token)
            self._token = None
        await self._timeout.__aexit__(kind, error, trace)

    def expired(self) -> bool:
        """Whether the time was up."""
        return self._timeout.expired()

    def left(self) -> float | None:
        """Seconds that are left, 0 when the time is up; ``None`` without a limit."""
        when = self._timeout.when()
        if self._seconds is None:
            return None
        return max(0.0, self._left if when is None else when - self._loop.time())

    def look(self) -> None:
        """What is in flight has changed. From any thread."""
        if self._waits or self._still:
            self._count()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits durably. In any thread."""
        self._count(waits=1)
        try:
            yield
        finally:
            self._count(waits=-1)

    def _count(self, *, waits: int = 0, inner: int = 0, still: int = 0) -> None:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._counted(waits, inner, still)
        else:
            with suppress(RuntimeError):  # the loop is closed, and the attempt over
                self._loop.call_soon_threadsafe(self._counted, waits, inner, still)

    def _counted(self, waits: int, inner: int, still: int) -> None:
        self._waits += waits
        self._inner += inner
        self._inner_still += still
        waits_only = self._inner_still == self._inner and (self._waits > 0 or self._inner > 0)
        stands = waits_only and self._token is not None and not (self.works is not None and self.works())
        if stands and not self._still:
            self._stand_still()
        elif self._still and not stands:
            self._go_on()

    def _stand_still(self) -> None:
        self._still = True
        if self._seconds is not None and not self.expired():
            self._left = (self._timeout.when() or 0.0) - self._loop.time()
            self._timeout.reschedule(None)
        if self._around is not None:
            self._around._count(still=1)

    def _go_on(self) -> None:
        self._still = False
        if self._seconds is not None and not self.expired():
            self._timeout.reschedule(self._loop.time() + self._left)
        if self._around is not None:
            self._around._count(still=-1)


def limit_for(seconds: float | None) -> TimeLimit | None:
    """The limit of an attempt that may work for so many seconds; ``None`` when there is none here nor around."""
    return TimeLimit(seconds) if seconds is not None or _current.get() is not None else None


@contextmanager
def waiting(limit: TimeLimit | None = None) -> Iterator[None]:
    """A block that waits durably, within ``limit`` or the one that this task works under, if any."""
    limit = limit if limit is not None else _current.get()
    if limit is None:
        yield
    else:
        with limit.waiting():
            yield
