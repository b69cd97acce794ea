"""One thread per store that makes commits durable, several at a time. Leases are the ``heartbeat``'s.

Executors are asynchronous and storage is not; whatever touches the store goes through here, in the order it came.
Commits and journal writes that wait together share one call of ``Storage.commit``, so concurrent runs, and concurrent
calls inside a step, share a transaction and an fsync, while a lone one never waits for company.

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
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

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

    def finish(self, error: BaseException | None) -> Sequence[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]:
        """Set the outcome; who is to be woken. Only for the committer."""
        self._error = error
        self._finished = True
        # Who comes to wait from here on sees that it is done. Who came before is in the list.
        return self._waiters


def _wake_all(waiters: Sequence[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


_WRITES = (Commit, JournalWrite)
_Item: TypeAlias = "tuple[Future[Any] | Ticket, Write | Callable[[Storage], Any]]"


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
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._idle = True  # whether somebody has to be told of work: the thread waits for it, or there is none
        self._working = False
        self._seconds = 0.0
        self.heartbeat.reset()

    def commit(self, commit: Commit) -> Future[None]:
        """Queue a commit; the future is done when it is durable, or holds the error that refused it."""
        return self._put(commit)

    def hand_over(self, commit: Commit, *, alone: bool = False) -> Ticket:
        """Queue a commit, as ``commit`` does, for a coroutine to wait for.

        ``alone`` says that its run does nothing else meanwhile. When it is also the only run of this committer, nothing
        waits in the queue, and the store's commits have been taking less than ``AT_ONCE_SECONDS``, it is made in this
        very call; if for that the store would have to wait for anybody, it goes to the queue all the same.
        """
        ticket = Ticket()
        if not (alone and self._is_alone(commit) and self._commit_at_once(commit, ticket)):
            self._enqueue((ticket, commit))
        return ticket

    def _is_alone(self, commit: Commit) -> bool:
        if len(self.heartbeat.held) > 1 or self._seconds >= AT_ONCE_SECONDS or self._queue or self._working:
            return False
        return sum(len(chunk.data) for chunk in commit.chunks) < AT_ONCE_BYTES

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
                outcome = storage.commit(pack_writes(storage, [commit]))[0]
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
        return self._put(write)

    def call(self, function: Callable[[Storage], T]) -> Future[T]:
        """Queue any call of the store, in order with the commits."""
        return self._put(function)

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

    def _put(self, item: Write | Callable[[Storage], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._enqueue((future, item))
        return future

    def _enqueue(self, item: _Item) -> None:
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
                self._do(storage, self._take())
                self._working = False
        except BaseException:
            with self._wake:
                self._thread, self._idle, self._working = None, True, False
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

    def _take(self) -> list[_Item]:
        """The next writes that may share a transaction, or one call. Two of one run may: they keep their order."""
        work: list[_Item] = []
        size = 0
        while self._queue and len(work) < MAX_BATCH and size < MAX_BATCH_BYTES:
            item = self._queue[0][1]
            is_write = isinstance(item, _WRITES)
            if work and not is_write:
                break
            work.append(self._queue.popleft())
            if not is_write:
                break
            if isinstance(item, Commit):
                size += sum(len(chunk.data) for chunk in item.chunks)
        return work

    def _do(self, storage: Storage, work: list[_Item]) -> None:
        live = [
            (future, item)
            for future, item in work
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
            outcomes: list[Exception | None] = storage.commit(writes)
        except Exception as error:
            outcomes = [error] if len(writes) == 1 else self._each(storage, writes, error)
        self._took((time.perf_counter() - began) / max(1, len(writes) // 4))
        self._working = False  # who is told of it now may commit at once
        self._tell([future for future, _ in live], outcomes)

    def _each(self, storage: Storage, writes: Sequence[Write], failure: Exception) -> list[Exception | None]:
        """Write a group's members one by one, after the group failed as a whole: the fault may lie in one of them."""
        outcomes: list[Exception | None] = []
        until = time.monotonic() + _RETRY_SECONDS
        for write in writes:
            if storage.closed or time.monotonic() > until:
                outcomes.append(failure)
                continue
            try:
                refused = storage.commit([write])[0]
            except Exception as error:
                outcomes.append(error)
            else:
                # A refusal may mean that only the group's answer was lost, which its member finds out by itself.
                outcomes.append(None if refused is None else failure)
        return outcomes

    def _tell(self, futures: Sequence[Future[Any] | Ticket], outcomes: Sequence[Exception | None]) -> None:
        """Set the outcomes; each event loop is woken once for all of them."""
        waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for future, outcome in zip(futures, outcomes, strict=True):
            if isinstance(future, Ticket):
                for loop, waiter in future.finish(outcome):
                    waiters.setdefault(loop, []).append(waiter)
            elif outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)
        for loop, its_own in waiters.items():
            try:
                loop.call_soon_threadsafe(_wake_all, its_own)
            except RuntimeError:
                logger.debug("commits were done after the event loop that waited for them was closed")


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
