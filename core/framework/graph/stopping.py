"""Stopping all runs of this process at their next commits, as before a deploy; see ``runner.stopping`` for programs."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class Stoppable(Protocol):
    """An open run of this process."""

    def stop_at_commit(self) -> None:
        """Let the run go after its next commit; from any thread."""


_lock = threading.Lock()
_open: weakref.WeakSet[Stoppable] = weakref.WeakSet()
_asked = False


def add(run: Stoppable) -> None:
    """A run is open now. Where the process is being stopped already, it is told at once."""
    with _lock:
        _open.add(run)
        asked = _asked
    if asked:
        run.stop_at_commit()


def discard(run: Stoppable) -> None:
    """A run is open no longer."""
    with _lock:
        _open.discard(run)


def stop_at_commits() -> int:
    """Have every run of this process let go at its next commit, and those that are opened from now on; how many.

    Not for a signal's handler, which may have interrupted one of these functions.
    """
    global _asked
    with _lock:
        _asked = True
        runs = list(_open)
    for run in runs:
        run.stop_at_commit()
    return len(runs)


def is_asked() -> bool:
    """Whether the process is being stopped."""
    return _asked


def go_on() -> None:
    """Runs that are opened from now on are not stopped; those that were asked to stop still are."""
    global _asked
    with _lock:
        _asked = False
