"""Ending a program in good order: its runs stop at their next commits and are left to the next process at once.

::

    async def main() -> None:
        async with graceful_stop(grace_seconds=20):
            result = await executor.execute(graph, goal, data, run_id="order-42")

On SIGTERM each run of the process goes on to its next commit, is released, and the program ends with exit code 143.
What takes longer than the grace is cut off where it stands, as by a crash: the run is released all the same, and the
step in flight runs again in the next process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Any

from framework.graph import stopping
from framework.graph.cancelling import LET_GO
from framework.storage.committer import release_all

GRACE_SECONDS = 5.0
"""How long runs may go on to their next commits. Well below the 10 s that a container has by default."""

GRACE_VARIABLE = "SUREFOOT_GRACE_SECONDS"
"""The variable that sets it for the command line."""

CUT_SECONDS = 2.0
"""How long a run that was cut off has to end by itself. A node that blocks the event loop does not."""


class Watchdog:
    """Sees to it that a program which was asked to stop does. A thread, as a node may block the event loop.

    ``ask`` may be called from a signal's handler. Then the runs of the process are stopped at their next commits; after
    ``grace_seconds``, or when there are none, ``cut`` is called; and if nothing has come of that, ``end``, after the
    leases have been released. ``close`` calls it off. Both are called in its own thread.
    """

    def __init__(self, grace_seconds: float, cut: Callable[[], None], end: Callable[[], None]) -> None:
        self._grace_seconds = grace_seconds
        self._cut = cut
        self._end = end
        self._done = threading.Event()
        # A pipe: a handler may have interrupted anything, and must take no lock.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="surefoot-watchdog", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """The program is to stop."""
        with suppress(BlockingIOError):
            os.write(self._write, b"s")

    def close(self) -> None:
        """The program has stopped, or goes on."""
        self._done.set()
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        stopping.go_on()

    def _watch(self) -> None:
        if not os.read(self._read, 1):
            return  # closed without having been asked
        runs = stopping.stop_at_commits()
        if runs and self._done.wait(self._grace_seconds):
            return
        self._cut()
        if self._done.wait(CUT_SECONDS):
            return
        release_all(CUT_SECONDS)
        self._end()


class Stop:
    """What ``graceful_stop`` tells: ``signal`` is the number of the signal that came, ``None`` while none has."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether the program is to stop."""
        return self.signal is not None


@asynccontextmanager
async def graceful_stop(
    grace_seconds: float = GRACE_SECONDS, signals: Collection[int] = (signal.SIGTERM,)
) -> AsyncIterator[Stop]:
    """A block of the main task of a program, which the signals end in good order.

    The first signal has every run of the process stop at its next commit, within ``grace_seconds``, and be released;
    the block is then cancelled and ``SystemExit`` raised with 128 plus the signal's number. When no run is going on, or
    the grace is over, that is at once. A block that ends by itself meanwhile is left as any. A second signal ends the
    process where it stands. A node that blocks the event loop, and does not end in time, is ended with the process,
    after its run has been released; one inside a call that lets no Python run is for the supervisor to kill.

    Must be entered in the main thread, as signals are handled there; raises ``RuntimeError`` elsewhere. Not to be
    nested: the inner block would hear of the signal alone.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("graceful_stop handles signals, so it is for the main thread of the program only.")
    task, loop, stop = asyncio.current_task(), asyncio.get_running_loop(), Stop()
    assert task is not None
    before_cancels = task.cancelling()
    watchdog = Watchdog(
        grace_seconds,
        cut=lambda: call_soon(loop, lambda: task.cancel(LET_GO)),
        end=lambda: os._exit(128 + (stop.signal or 0)),
    )

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            os._exit(128 + number)
        stop.signal = number
        watchdog.ask()

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in signals}
    try:
        yield stop
    except asyncio.CancelledError:
        if stop.signal is None or task.cancelling() > before_cancels + 1:
            raise  # somebody else wants this task to end
        task.uncancel()
        raise SystemExit(128 + stop.signal) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        watchdog.close()


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call ``function`` in the loop from any thread, unless it is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def grace_seconds() -> float:
    """The grace of the command line: that of the environment, else the default. Raises ``ValueError``."""
    given = os.environ.get(GRACE_VARIABLE, "").strip()
    if not given:
        return GRACE_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 86_400:
        raise ValueError(f"{GRACE_VARIABLE} is a number of seconds, 0 or more, not {given!r}.")
    return seconds
