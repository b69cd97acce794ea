"""One thread per store that keeps the leases of this process's runs alive, and looks for messages to them.

It is not the thread that commits, and none of the event loop's: a node that blocks the loop keeps its run, and so does
one whose commit, or whose reading of a large state, takes long. All leases that are about due are renewed in one call
of ``Storage.renew_leases``, so a thousand runs cost a transaction every third of a lease, and one thread.

While it holds leases it looks, about once a second, whether a message was left for one of their runs: one query for all
of them, and none for each commit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from framework.errors import RunError, StorageError
from framework.storage.interface import Storage
from framework.storage.records import Message

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often to look for messages to the runs whose leases are held."""

IDLE_SECONDS = 30.0
"""The thread ends after this long without a lease; the next one starts another."""

_RETRY_PART = 12
"""A renewal that failed is tried again after this part of the lease: several times before it ends."""

OnMessages = Callable[[Sequence[Message]], None]
"""Told, in the heartbeat's thread, of all messages of a run whenever there are more of them."""

OnLost = Callable[[RunError], None]
"""Told, in the heartbeat's thread, that the lease is another's now, or that its run is gone."""


@dataclass(slots=True)
class Held:
    """A lease to renew when it is ``due``, and certain until ``assured``, both by the monotonic clock in seconds.

    ``assured`` counts from before the call that took or renewed the lease: by then the store had not begun to count.
    ``told`` is of how many messages ``on_messages`` knows.
    """

    token: int
    seconds: float
    due: float
    assured: float
    on_messages: OnMessages | None = None
    on_lost: OnLost | None = None
    told: int = 0


class Heartbeat:
    """The thread and the leases it renews. ``storage`` gives the store, or ``None`` once that is gone."""

    def __init__(self, storage: Callable[[], Storage | None]) -> None:
        self._storage = storage
        self.reset()

    def reset(self) -> None:
        """Forget the leases and the thread; for a forked child, where the thread does not exist."""
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self.held: dict[str, Held] = {}
        self._look_at = 0.0

    def hold(
        self,
        run_id: str,
        token: int,
        seconds: float,
        on_messages: OnMessages | None = None,
        on_lost: OnLost | None = None,
        *,
        since: float | None = None,
    ) -> None:
        """Renew a lease, now current, every third of ``seconds`` until ``drop``.

        ``since`` is when it was asked for, by the monotonic clock. ``on_messages`` is told of the messages left for the
        run, those from before too, within about a second; ``on_lost``, once, when the lease cannot be renewed any more.
        """
        taken = time.monotonic() if since is None else since
        with self._wake:
            held = Held(token, seconds, taken + seconds / 3, taken + seconds, on_messages, on_lost)
            self.held[run_id] = held
            if self._thread is None or not self._thread.is_alive():
                storage = self._storage()
                if storage is None:
                    raise StorageError("The store of this heartbeat is gone.")
                self._thread = threading.Thread(
                    target=self._run, args=(storage,), name="surefoot-heartbeat", daemon=True
                )
                self._thread.start()
            self._wake.notify()

    def drop(self, run_id: str, token: int) -> None:
        """Stop renewing a lease. Does not release it."""
        with self._wake:
            held = self.held.get(run_id)
            if held is not None and held.token == token:
                del self.held[run_id]

    def is_assured(self, run_id: str, token: int) -> bool:
        """Whether the lease cannot have ended: it was taken or renewed less than its time ago."""
        held = self.held.get(run_id)
        return held is not None and held.token == token and time.monotonic() < held.assured

    def _run(self, storage: Storage) -> None:
        while True:
            with self._wake:
                if not self._wait():
                    self._thread = None
                    return
            self._renew_due(storage)
            self._look(storage)

    def _wait(self) -> bool:
        """Wait until a lease is due or for the next look; ``False`` when the thread may end."""
        due = min((held.due for held in self.held.values()), default=None)
        if any(held.on_messages is not None for held in self.held.values()):
            due = self._look_at if due is None else min(due, self._look_at)
        notified = self._wake.wait(IDLE_SECONDS if due is None else max(0.0, due - time.monotonic()))
        return notified or due is not None or bool(self.held)

    def _renew_due(self, storage: Storage) -> None:
        now = time.monotonic()
        with self._wake:
            if storage.closed:
                self.held.clear()
            if all(held.due > now for held in self.held.values()):
                return
            # With those that are due soon, so that they come together from now on.
            groups: dict[float, list[tuple[str, Held]]] = {}
            for run_id, held in self.held.items():
                if held.due <= now + held.seconds / 6:
                    groups.setdefault(held.seconds, []).append((run_id, held))
        for seconds, group in groups.items():
            self._renew(storage, seconds, group)

    def _renew(self, storage: Storage, seconds: float, group: Sequence[tuple[str, Held]]) -> None:
        asked = time.monotonic()
        try:
            outcomes = storage.renew_leases([(run_id, held.token) for run_id, held in group], seconds)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the other leases must live
            if storage.closed:  # in the meantime; the next turn lets go of all of them
                return
            again = time.monotonic() + seconds / _RETRY_PART
            for _, held in group:
                held.due = again
            few = ", ".join(repr(run_id) for run_id, _ in group[:3])
            more = f" and {len(group) - 3} more" if len(group) > 3 else ""
            logger.warning("Leases of %s%s not renewed, will try again: %s", few, more, error)
            return
        for (run_id, held), refused in zip(group, outcomes, strict=True):
            if refused is None:
                held.due, held.assured = asked + seconds / 3, asked + seconds
                continue
            if isinstance(refused, StorageError):  # of this run only: another process holds it up
                held.due = time.monotonic() + seconds / _RETRY_PART
                logger.warning("Lease of run %r not renewed, will try again: %s", run_id, refused)
                continue
            with self._wake:
                if self.held.get(run_id) is not held:
                    continue  # given up while it was being renewed
                del self.held[run_id]
            logger.warning("Lease of run %r not renewed: %s", run_id, refused)
            if held.on_lost is not None:
                held.on_lost(refused)

    def _look(self, storage: Storage) -> None:
        """Look for new messages to the runs that are held, if it is time."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        with self._wake:
            watched = {run_id: held for run_id, held in self.held.items() if held.on_messages is not None}
        if not watched or storage.closed:
            return
        try:
            counts = storage.count_messages(list(watched))
            for run_id, count in counts.items():
                held = watched[run_id]
                if count > held.told and held.on_messages is not None:
                    held.on_messages(storage.read_messages(run_id))
                    held.told = count
        except StorageError as error:
            if not storage.closed:  # closed in the meantime, it has nobody who waits for messages
                logger.warning("Messages not looked for, will try again: %s", error)
