"""What the held steps of a run wait for, and how the run hears of it while it works on other things."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.graph.run_session import RunSession
from framework.graph.suspension import Waiting, wake_at
from framework.storage.records import Message

_LONGEST_SECONDS = 30.0
"""How long at most until the time is looked at again: due times are the clock's on the wall, which may be set."""


@dataclass(slots=True)
class Waits:
    """What held steps wait for, by step key; those that wait for a person's input only are not in it."""

    by_step: dict[str, tuple[Waiting, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a run's position."""
        return {step: [each.to_json() for each in waits] for step, waits in self.by_step.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Waits:
        """What ``to_json`` wrote."""
        return cls({step: tuple(map(Waiting.from_json, waits)) for step, waits in plain.items()})

    def over(self, messages: Container[str]) -> list[str]:
        """The steps that can go on, in order of their keys: something that they wait for is over. ``messages`` are the
        names of those left for the run."""
        now = time.time()
        return sorted(
            step for step, waits in self.by_step.items() if any(each.is_over(messages, now) for each in waits)
        )

    @staticmethod
    def is_due_soon(session: RunSession, due: float | None) -> bool:
        """Whether a run that is ``due`` then need not pause for it."""
        return due is not None and due - time.time() <= session.config.sleep_in_process_seconds

    def wake_at(self, held: Iterable[str]) -> float | None:
        """When a run that holds these steps is due: the earliest time of all that they wait for, ``None`` without any.

        Others of them may wait for a person; what is due goes on without."""
        return wake_at(each for step in held for each in self.by_step.get(step, ()))


class Watch:
    """Hears of the messages to a run from now on, those that were left before too. Made, and used, in its event loop.

    Without it a step that waits could go on only when nothing else of the run is in flight.
    """

    def __init__(self, session: RunSession) -> None:
        self.messages: set[str] = set()
        """The names of those heard of; a message is heard of within about a second."""
        self._session = session
        self._news: asyncio.Future[None] | None = None
        self._stop = session.on_message(self._hear)

    def _hear(self, message: Message) -> None:
        self.messages.add(message.name)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def look(self) -> None:
        """Look into the store, for what was left a moment ago. Raises ``StorageError``."""
        self.messages.update(message.name for message in await self._session.messages())

    async def wait(self, tasks: Collection[asyncio.Future[Any]], due: float | None) -> None:
        """Return when one of ``tasks`` is done, when a message is heard of, and when it is ``due``; maybe before."""
        self._news = asyncio.get_running_loop().create_future()
        seconds = None if due is None else min(max(0.0, due - time.time()), _LONGEST_SECONDS)
        try:
            await asyncio.wait({*tasks, self._news}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._news = None

    def stop(self) -> None:
        """Hear of nothing more."""
        self._stop()
