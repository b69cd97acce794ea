"""One thread per store that makes commits durable, several at a time. Leases are the ``heartbeat``'s.

Executors are asynchronous and storage is not; whatever touches the store goes through here, in the order it came.
Commits and journal writes that wait together share one call of ``Storage.commit``, so concurrent runs, and concurrent
calls inside a step, share a transaction and an fsync, while a lone one never waits for company. How many bytes may wait
is bounded over all runs: see ``back_pressure``.

A run that is alone in its store, on a disk that takes less than a millisecond for a commit, is spared the way to the
thread and back, which costs as much as the commit: see ``Committer.hand_over`` and docs/adr/0017.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from framework.errors import StorageError
from framework.storage.back_pressure import BackPressure, Waiter, wake
from framework.storage.compression import pack_writes
from framework.storage.heartbeat import Heartbeat
from framework.storage.interface import Storage, WouldWait
from framework.storage.records import Commit, JournalWrite, Write

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BATCH = 64
"""Writes in one transaction at most: bounds what a crash can take with it and how long readers wait."""

MAX_BATCH_BYTES = 4_000_000
"""Bytes of values after which a transaction takes no further commit, so small ones need not wait for large ones."""

AT_ONCE_SECONDS = 0.001
"""Commits that take longer than this, on average, are never made in the thread of an event loop."""

AT_ONCE_BYTES = 65_536
"""Nor are commits of values of more bytes than this, which take long to write, or to compress."""

_RETRY_SECONDS = 5.0
"""How long the commits of a group that failed as a whole are tried again one by one; the rest fail as the group did."""

IDLE_SECONDS = 30.0
"""The thread ends after this long without work; the next call starts another."""


class Ticket:
    """What a commit that was handed over comes to: a future without locks, waited for by coroutines."""

    __slots__ = ("_error", "_finished", "_waiters")

    def __init__(self) -> None:
        self._finished = False
        self._error: BaseException | None = None
        self._waiters: list[Waiter] = []

    def done(self) -> bool:
        """Whether it is durable, or refused."""
        return self._finished

    def exception(self) -> BaseException | None:
        """What refused it; of one that is done."""
        return self._error

    def result(self) -> None:
        """Raises what refused it; of one that is done."""
        if self._error is not None:
            raise self._error

    def wake(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        """Set ``waiter`` once this is done; the caller looks at ``done`` after this call, before it waits."""
        self._waiters.append((loop, waiter))

    def finish(self, error: BaseException | None) -> Sequence[Waiter]:
        """Set the outcome; who is to be woken. Only for the committer."""
        self._error = error
        self._finished = True
        # Who comes to wait from here on sees that it is done. Who came before is in the list.
        return self._waiters


_WRITES = (Commit, JournalWrite)
_Item: TypeAlias = "tuple[Future[Any] | Ticket, Write | Callable[[Storage], Any], int]"
"""Who waits for it, what is to be done, and its size in bytes."""


def _committed(storage: Storage, writes: Sequence[Write]) -> list[BaseException | None]:
    """The store's answer to each write. Raises what the store raises, and ``StorageError`` for answers that do not fit
    the writes, as of a backend of somebody's own."""
    outcomes: list[BaseException | None] = list(storage.commit(writes))
    if len(outcomes) != len(writes):
        raise StorageError(
            f"{type(storage).__name__}.commit answered {len(outcomes)} of {len(writes)} writes, so what became of them "
            "is not known. It has to give one answer for each, None for one that was made."
        )
    return outcomes


def _size_of(write: Write) -> int:
    """Bytes of what it writes, roughly: the parts that can be large."""
    if isinstance(write, JournalWrite):
        return sum(len(row.record) for row in write.rows)
    return len(write.record) + len(write.checkpoint or b"") + sum(len(chunk.data) for chunk in write.chunks)


class Committer:
    """The thread and its queue. Get the one of a store with ``committer_of``."""

    def __init__(self, storage: Storage) -> None:
        # Weak, so that an idle store can be collected; a running thread holds it while there is work.
        self._storage = weakref.ref(storage)
        self.heartbeat = Heartbeat(self._storage)
        self.reset()

    def reset(self) -> None:
        """Forget the queue, the leases and the threads; for a forked child, where the threads do not exist."""
        self._queue: deque[_Item] = deque()
        self.back_pressure = BackPressure()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._idle = True  # whether somebody has to be told of work: the thread waits for it, or there is none
        self._working = False
        self._seconds = 0.0
        self.heartbeat.reset()

    def commit(self, commit: Commit) -> Future[None]:
        """Queue a commit; the future is done when it is durable, or holds the error that refused it."""
        return self._put(commit, _size_of(commit))

    def hand_over(self, commit: Commit, *, alone: bool = False) -> Ticket:
        """Queue a commit, as ``commit`` does, for a coroutine to wait for.

        ``alone`` says that its run does nothing else meanwhile. When it is also the only run of this committer, nothing
        waits in the queue, and the store's commits have been taking less than ``AT_ONCE_SECONDS``, it is made in this
        very call; if for that the store would have to wait for anybody, it goes to the queue all the same.

        It is taken in any case. To be held back while too much waits, see to ``back_pressure`` before the commit is
        made.
        """
        ticket, size = Ticket(), _size_of(commit)
        if not (alone and size < AT_ONCE_BYTES and self._is_alone() and self._commit_at_once(commit, ticket)):
            self._enqueue((ticket, commit, size))
        return ticket

    def _is_alone(self) -> bool:
        if len(self.heartbeat.held) > 1 or self._seconds >= AT_ONCE_SECONDS:
            return False
        return not self._queue and not self._working

    def _commit_at_once(self, commit: Commit, ticket: Ticket) -> bool:
        storage = self._storage()
        if storage is None or not storage.try_hold():
            return False
        try:
            # Looked at again: the thread takes work, and with it the store, without asking.
            if self._queue or self._working:
                return False
            began = time.perf_counter()
            try:
                [outcome] = _committed(storage, pack_writes(storage, [commit]))
            except WouldWait:
                return False
            except Exception as error:  # as from the thread: handed to who waits for the commit
                outcome = error
            self._took(time.perf_counter() - began)
            ticket.finish(outcome)
        finally:
            storage.let_go()
        return True

    def _took(self, seconds: float) -> None:
        """Keep the average of the last commits, about eight of them; one that halts the disk counts as 50 ms."""
        self._seconds += (min(seconds, 0.05) - self._seconds) / 8

    def journal(self, write: JournalWrite) -> Future[None]:
        """Queue journal rows, in order with the commits; the future as of ``commit``."""
        return self._put(write, _size_of(write))

    def call(self, function: Callable[[Storage], T], size: int = 0) -> Future[T]:
        """Queue any call of the store, in order with the commits; ``size`` is the bytes it keeps until it is made."""
        return self._put(function, size)

    def release_leases(self) -> None:
        """Release what is held, past the queue, which may be stuck."""
        storage = self._storage()
        for run_id, held in list(self.heartbeat.held.items()):
            self.heartbeat.drop(run_id, held.token)
            try:
                if storage is not None:
                    storage.release_lease(run_id, held.token)
            except StorageError as error:
                logger.warning("The lease of run %r was not released; it ends by itself: %s", run_id, error)

    def _put(self, item: Write | Callable[[Storage], Any], size: int) -> Future[Any]:
        future: Future[Any] = Future()
        self._enqueue((future, item, size))
        return future

    def _enqueue(self, item: _Item) -> None:
        self.back_pressure.add(item[2])
        self._queue.append(item)
        # A thread that is at work looks at the queue before it waits, and says that it will before it looks.
        if self._idle:
            with self._wake:
                self._ensure_thread()
                self._wake.notify()
                self._idle = False

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            storage = self._storage()
            if storage is None:
                raise StorageError("The store of this committer is gone.")
            self._thread = threading.Thread(target=self._run, args=(storage,), name="surefoot-committer", daemon=True)
            self._thread.start()

    def _run(self, storage: Storage) -> None:
        try:
            while self._wait():
                self._working = True  # said before the queue gets shorter: see _commit_at_once
                work, size = self._take()
                try:
                    self._do(storage, work)
                finally:
                    self.back_pressure.remove(size)
                self._working = False
        except BaseException:
            with self._wake:
                self._thread, self._idle, self._working = None, True, False
            self.back_pressure.open()  # what is handed over next starts another thread
            raise

    def _wait(self) -> bool:
        """Wait for work; ``False`` when there was none for so long that the thread is to end."""
        if self._queue:
            return True
        with self._wake:
            self._idle = True
            if not self._queue:
                self._wake.wait(IDLE_SECONDS)
            self._idle = not self._queue
            if self._idle:
                self._thread = None  # who comes from here on starts another one
            return not self._idle

    def _take(self) -> tuple[list[_Item], int]:
        """The next writes that may share a transaction, or one call, and their size.

        Two of one run may: they keep their order.
        """
        work: list[_Item] = []
        size = 0
        while self._queue and len(work) < MAX_BATCH and size < MAX_BATCH_BYTES:
            is_write = isinstance(self._queue[0][1], _WRITES)
            if work and not is_write:
                break
            item = self._queue.popleft()
            work.append(item)
            size += item[2]
            if not is_write:
                break
        return work, size

    def _do(self, storage: Storage, work: list[_Item]) -> None:
        live = [
            (future, item)
            for future, item, _ in work
            if isinstance(future, Ticket) or future.set_running_or_notify_cancel()
        ]
        if not live:
            return
        future, first = live[0]
        if not isinstance(first, _WRITES):
            assert isinstance(future, Future)
            try:
                result = first(storage)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)
            return
        began = time.perf_counter()
        writes = [item for _, item in live if isinstance(item, _WRITES)]
        try:
            writes = pack_writes(storage, writes)
            outcomes = _committed(storage, writes)
        except Exception as error:
            outcomes = [error] if len(writes) == 1 else self._each(storage, writes, error)
        except BaseException as error:  # noqa: BLE001 - as above: they wait, and this thread is there for others too
            outcomes = [error] * len(writes)
        self._took((time.perf_counter() - began) / max(1, len(writes) // 4))
        self._working = False  # who is told of it now may commit at once
        self._tell([future for future, _ in live], outcomes)

    def _each(self, storage: Storage, writes: Sequence[Write], failure: Exception) -> list[BaseException | None]:
        """Write a group's members one by one, after the group failed as a whole: the fault may lie in one of them."""
        outcomes: list[BaseException | None] = []
        until = time.monotonic() + _RETRY_SECONDS
        for write in writes:
            if storage.closed or time.monotonic() > until:
                outcomes.append(failure)
                continue
            try:
                [refused] = _committed(storage, [write])
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                outcomes.append(error)
            else:
                # A refusal may mean that only the group's answer was lost, which its member finds out by itself.
                outcomes.append(None if refused is None else failure)
        return outcomes

    def _tell(self, futures: Sequence[Future[Any] | Ticket], outcomes: Sequence[BaseException | None]) -> None:
        """Set the outcomes; each event loop is woken once for all of them."""
        waiters: list[Waiter] = []
        for future, outcome in zip(futures, outcomes, strict=True):
            if isinstance(future, Ticket):
                waiters += future.finish(outcome)
            elif outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)
        wake(waiters)


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


def release_all(seconds: float) -> None:
    """Release every lease of this process, within ``seconds``: for one that ends and cannot end its runs.

    Whatever those still commit is refused. A store that does not answer in time keeps its leases until they end.
    """
    with _lock:
        committers = list(_committers.values())
    threads = [threading.Thread(target=each.release_leases, daemon=True) for each in committers]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
