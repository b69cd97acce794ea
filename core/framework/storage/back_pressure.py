"""Coroutines that wait for the committer: woken by its thread, and held back while too much waits for the store."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TypeAlias

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256_000_000
"""Bytes that may wait for one store, over all runs of the process, before further commits are held back."""

Waiter: TypeAlias = "tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]"


def wake(waiters: Iterable[Waiter]) -> None:
    """Set these futures, from any thread and in their order; each event loop is woken once for all of its own."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, waiter in waiters:
        loops.setdefault(loop, []).append(waiter)
    for loop, its_own in loops.items():
        try:
            loop.call_soon_threadsafe(_set_all, its_own)
        except RuntimeError:
            logger.debug("what was waited for is done after the event loop that waited for it was closed")


def _set_all(waiters: Sequence[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


class BackPressure:
    """How many bytes wait for a store, and the line of those who wait until they are fewer.

    Who is about to make a commit asks ``full`` before it encodes anything: what is held back takes no memory yet. So
    its size is not known, and the bound is passed by one write, or by as many as are being made at that moment.
    """

    def __init__(self, most: int | None = None) -> None:
        self.full = False
        """Whether ``room`` waits. Read without the lock, so that whoever finds room pays for nothing else."""
        self._most = MAX_WAITING_BYTES if most is None else most
        self._bytes = 0
        self._line: list[Waiter] = []
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count what was handed over to wait for the store. Never refused: what is made has to go somewhere."""
        with self._lock:
            self._bytes += size
            if self._bytes >= self._most:
                self.full = True

    def remove(self, size: int) -> None:
        """Count what does not wait any more, whatever came of it; all in line go on once half of the bound is free.

        Not one by one: one that was let go and never came back, as its loop was stopped, would hold up the others.
        """
        with self._lock:
            self._bytes -= size
            if not self.full or self._bytes > self._most // 2:
                return
        self.open()

    def open(self) -> None:
        """Let everybody in line go on, whatever waits for the store."""
        with self._lock:
            self.full = False
            line, self._line = self._line, []
        wake(line)

    async def room(self) -> None:
        """Return at once, or in the order of arrival when there is room again. A cancellation is raised at once."""
        while (waiter := self._wait_in_line()) is not None:
            await waiter

    def _wait_in_line(self) -> asyncio.Future[None] | None:
        with self._lock:
            if not self.full:
                return None
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self._line.append((loop, waiter))
            return waiter
