"""One thread per store that makes commits durable, several at a time, and keeps its runs' leases alive.

Executors are asynchronous and storage is not; whatever touches the store goes through here, in the order it came.
Commits and journal writes that wait together share one call of ``Storage.commit``, so concurrent runs, and concurrent
calls inside a step, share a transaction and an fsync, while a lone one never waits for company. The thread also renews
leases, so a node that blocks the event loop does not lose its run. And while it holds leases it looks, about once a
second, whether a message was left for one of their runs: one query for all of them, and none for each commit.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from framework.errors import LeaseLost, RunNotFound, StorageError
from framework.storage.interface import Storage
from framework.storage.records import Commit, JournalWrite, Message, Write

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BATCH = 64
"""Writes in one transaction at most: bounds what a crash can take with it and how long readers wait."""

IDLE_SECONDS = 30.0
"""The thread ends after this long without work; the next call starts another."""


LOOK_SECONDS = 1.0
"""How often to look for messages to the runs whose leases are held."""

OnMessages = Callable[[Sequence[Message]], None]
"""Told, in the committer's thread, of all messages of a run whenever there are more of them."""


@dataclass(slots=True)
class _Held:
    """A lease to renew, ``due`` by the monotonic clock, and who is told of messages; ``told`` of how many already."""

    token: int
    seconds: float
    due: float
    on_messages: OnMessages | None = None
    told: int = 0


class Committer:
    """The thread and its queue. Get the one of a store with ``committer_of``."""

    def __init__(self, storage: Storage) -> None:
        # Weak, so that an idle store can be collected; a running thread holds it while there is work.
        self._storage = weakref.ref(storage)
        self.reset()

    def reset(self) -> None:
        """Forget the queue, the leases and the thread; for a forked child, where the thread does not exist."""
        self._queue: deque[tuple[Future[Any], Write | Callable[[Storage], Any]]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._leases: dict[str, _Held] = {}
        self._look_at = 0.0

    def commit(self, commit: Commit) -> Future[None]:
        """Queue a commit; the future is done when it is durable, or holds the error that refused it."""
        return self._put(commit)

    def journal(self, write: JournalWrite) -> Future[None]:
        """Queue journal rows, in order with the commits; the future as of ``commit``."""
        return self._put(write)

    def call(self, function: Callable[[Storage], T]) -> Future[T]:
        """Queue any call of the store, in order with the commits."""
        return self._put(function)

    def hold(self, run_id: str, token: int, seconds: float, on_messages: OnMessages | None = None) -> None:
        """Renew a lease, now current, every third of ``seconds`` until ``drop``.

        ``on_messages`` is told of the messages left for the run, those from before too, within about a second.
        """
        with self._wake:
            self._leases[run_id] = _Held(token, seconds, time.monotonic() + seconds / 3, on_messages)
            self._ensure_thread()
            self._wake.notify()

    def drop(self, run_id: str, token: int) -> None:
        """Stop renewing a lease. Does not release it."""
        with self._wake:
            held = self._leases.get(run_id)
            if held is not None and held.token == token:
                del self._leases[run_id]

    def _put(self, item: Write | Callable[[Storage], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            self._queue.append((future, item))
            self._ensure_thread()
            self._wake.notify()
        return future

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            storage = self._storage()
            if storage is None:
                raise StorageError("The store of this committer is gone.")
            self._thread = threading.Thread(target=self._run, args=(storage,), name="surefoot-committer", daemon=True)
            self._thread.start()

    def _run(self, storage: Storage) -> None:
        while True:
            with self._wake:
                if not self._queue and not self._wait():
                    self._thread = None
                    return
                work = self._take()
            self._renew_due(storage)
            if work:
                self._do(storage, work)
            self._look(storage)

    def _wait(self) -> bool:
        """Wait for work, for a lease to be due or for the next look; ``False`` when the thread may end."""
        now = time.monotonic()
        due = min((held.due for held in self._leases.values()), default=None)
        if any(held.on_messages is not None for held in self._leases.values()):
            due = self._look_at if due is None else min(due, self._look_at)
        timeout = IDLE_SECONDS if due is None else max(0.0, due - now)
        notified = self._wake.wait(timeout)
        return notified or due is not None or bool(self._queue)

    def _take(self) -> list[tuple[Future[Any], Write | Callable[[Storage], Any]]]:
        """The next writes that may share a transaction, or one call. Two of one run may: they keep their order."""
        work: list[tuple[Future[Any], Write | Callable[[Storage], Any]]] = []
        while self._queue and len(work) < MAX_BATCH:
            is_write = isinstance(self._queue[0][1], Commit | JournalWrite)
            if work and not is_write:
                break
            work.append(self._queue.popleft())
            if not is_write:
                break
        return work

    def _do(self, storage: Storage, work: list[tuple[Future[Any], Write | Callable[[Storage], Any]]]) -> None:
        live = [(future, item) for future, item in work if future.set_running_or_notify_cancel()]
        if not live:
            return
        first = live[0][1]
        if not isinstance(first, Commit | JournalWrite):
            future = live[0][0]
            try:
                result = first(storage)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)
            return
        try:
            outcomes: list[Exception | None] = storage.commit(
                [item for _, item in live if isinstance(item, Commit | JournalWrite)]
            )
        except Exception as error:
            outcomes = [error] * len(live)
        for (future, _), outcome in zip(live, outcomes, strict=True):
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)

    def _renew_due(self, storage: Storage) -> None:
        now = time.monotonic()
        with self._wake:
            if storage.closed:
                self._leases.clear()
            due = [(run_id, held) for run_id, held in self._leases.items() if held.due <= now]
        for run_id, held in due:
            held.due = now + held.seconds / 3
            try:
                storage.renew_lease(run_id, held.token, held.seconds)
            except (LeaseLost, RunNotFound) as error:
                # The run's next commit will be refused for the same reason; that is where its owner learns of it.
                logger.warning("Lease of run %r not renewed: %s", run_id, error)
                self.drop(run_id, held.token)
            except StorageError as error:
                logger.warning("Lease of run %r not renewed, will try again: %s", run_id, error)

    def _look(self, storage: Storage) -> None:
        """Look for new messages to the runs that are held, if it is time."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        with self._wake:
            watched = {run_id: held for run_id, held in self._leases.items() if held.on_messages is not None}
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
            logger.warning("Messages not looked for, will try again: %s", error)


_committers: weakref.WeakKeyDictionary[Storage, Committer] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _forget_parents() -> None:
    """In a forked child: its parent's committers, with their queues and leases, are the parent's business."""
    global _committers, _lock
    for committer in list(_committers.values()):
        committer.reset()
    _committers = weakref.WeakKeyDictionary()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)


def committer_of(storage: Storage) -> Committer:
    """The committer of a store; one per store object and process."""
    with _lock:
        found = _committers.get(storage)
        if found is None:
            found = _committers[storage] = Committer(storage)
        return found
