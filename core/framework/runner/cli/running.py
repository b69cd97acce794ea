"""Running an agent until it ends or somebody wants it to stop: the event loop, signals, and the lines around a run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Collection
from types import FrameType
from typing import Any, TypeVar

from framework.graph.cancelling import LET_GO
from framework.runner.cli.exits import CommandError, usage_error
from framework.runner.stopping import Watchdog, call_soon, grace_seconds

T = TypeVar("T")

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):
    _SIGNALS.append(signal.SIGHUP)
    _NAMES[signal.SIGHUP] = "a closed terminal"

ENDINGS = frozenset(_SIGNALS[1:])
"""Signals that end the process, as a deploy does, and mean no run: the next process is to go on with those."""
EVERY = frozenset(_SIGNALS)


class Stopped(Exception):
    """A signal stopped the work. ``code`` is the exit code that says so, ``by`` the signal in words, and ``let_go``
    whether the runs were left to the next process, rather than cancelled."""

    def __init__(self, number: int, *, let_go: bool = False) -> None:
        super().__init__(number)
        self.let_go = let_go
        self.code = 128 + number
        self.by = _NAMES[signal.Signals(number)]


class Loop:
    """An event loop for work that signals may stop. A context manager; ``run`` may be called any number of times."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        _finish(self._loop, wait_for_threads=not self._stopped)

    def run(
        self,
        work: Callable[[], Awaitable[T]],
        on_signal: Callable[[str], None] = lambda text: None,
        *,
        leaving: Collection[int] = ENDINGS,
    ) -> T:
        """Run ``work()`` and return what it returns.

        Ctrl-C (SIGINT), SIGTERM and SIGHUP cancel it, those in ``leaving`` with ``LET_GO``: what it is committing is
        committed and its lease released, then ``Stopped`` is raised. SIGTERM and SIGHUP in ``leaving`` first let runs
        go on to their next commits, within the grace of ``runner.stopping``, and end even a node that blocks.
        ``on_signal`` is told from within the signal's handler, so it must not write to a buffered stream: a step that
        is no coroutine may block the loop for long, and the user shall see something.
        A second signal ends the process where it stands, which is a crash: the finished steps are durable, and the
        next process takes over at once. When ``work`` has its result in spite of the signal, that is returned.
        """
        first: list[int] = []
        try:
            grace = grace_seconds()
        except ValueError as error:
            raise usage_error(str(error)) from None
        task = self._loop.create_task(_awaited(work))

        def stop(number: int, frame: FrameType | None) -> None:
            if first:
                _end_at_once(number)
            first.append(number)
            self._stopped = True
            name = _NAMES[signal.Signals(number)]
            if number not in leaving or number not in ENDINGS or watchdog is None:
                on_signal(f"Stopping after the commit under way ({name}); again to end at once.")
                self._loop.call_soon_threadsafe(task.cancel, LET_GO if number in leaving else None)
                return
            on_signal(f"Stopping at the next commit, within {grace:g} s ({name}); again to end at once.")
            watchdog.ask()

        before: dict[int, Any] = {}
        watchdog: Watchdog | None = None
        if threading.current_thread() is threading.main_thread():
            watchdog = Watchdog(
                grace,
                cut=lambda: call_soon(self._loop, lambda: task.cancel(LET_GO)),
                end=lambda: _end_at_once(first[0]),
            )
            before = {number: signal.signal(number, stop) for number in _SIGNALS if not _ignored(number)}
        try:
            return self._until_complete(task)
        except asyncio.CancelledError:
            if not first:
                raise
            raise Stopped(first[0], let_go=first[0] in leaving) from None
        except SystemExit as error:
            # What ran is recorded as cancelled. Its exit code is not ours: 0 would say that the run is done.
            raise CommandError(ended_by_agent(error)) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if watchdog is not None:
                watchdog.close()

    def _until_complete(self, task: asyncio.Task[T]) -> T:
        while True:
            try:
                return self._loop.run_until_complete(task)
            except SystemExit:
                # asyncio lets it leave the loop from whichever task it was raised in, a step among many for one. Who
                # waits for that task meets it as well, and can record what became of the run.
                if task.done():
                    raise


def run_to_end(
    work: Callable[[], Awaitable[T]],
    on_signal: Callable[[str], None] = lambda text: None,
    *,
    leaving: Collection[int] = ENDINGS,
) -> T:
    """Run ``work()`` in an event loop of its own: see ``Loop.run``."""
    with Loop() as loop:
        return loop.run(work, on_signal, leaving=leaving)


def ended_by_agent(error: SystemExit) -> str:
    """What is said of an agent whose code wants to end the process."""
    return f"The agent's own code ended the process: sys.exit({error.code!r})."


def _ignored(number: int) -> bool:
    # Started by `nohup`, or in the background by a shell without job control: then it is not for us.
    return signal.getsignal(number) == signal.SIG_IGN


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _finish(loop: asyncio.AbstractEventLoop, *, wait_for_threads: bool) -> None:
    """Close the loop as ``asyncio.run`` does, but without waiting for threads when somebody wants to stop: a thread
    in the middle of a model call cannot be ended, and may take minutes."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    if wait_for_threads:
        loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def _end_at_once(number: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # progress hides the cursor
    os._exit(128 + number)
