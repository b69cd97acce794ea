"""Stores and ``os.fork``: nothing is in the middle of a write when a process forks, and no connection crosses.

A child inherits locks as they are held and, worse, a database connection that is not its own (sqlite.org,
howtocorrupt.html, 2.6). So before a fork each open store finishes what it is doing and lets go of its connection;
afterwards parent and child each open their own when they next need one.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What takes part: an object that can stand still."""

    def before_fork(self) -> None:
        """Stand still until ``after_fork``, which the same thread calls in parent and child."""

    def after_fork(self, child: bool) -> None:
        """Go on."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()
_one_at_a_time = threading.RLock()
_still: list[Forkable] = []


def register(store: Forkable) -> None:
    """Have ``store`` stand still during forks, for as long as it lives."""
    _registered.add(store)


def _before() -> None:
    _one_at_a_time.acquire()
    for store in list(_registered):
        store.before_fork()
        _still.append(store)


def _after(child: bool) -> None:
    while _still:
        _still.pop().after_fork(child)
    _one_at_a_time.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=lambda: _after(child=False), after_in_child=lambda: _after(child=True)
    )
