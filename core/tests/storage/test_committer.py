"""The committer thread: commits share transactions, in order, each with its own outcome; leases are kept alive."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol

import pytest

from framework.errors import CommitConflict, LeaseLost, RunError, RunNotFound, StorageError
from framework.storage import committer as module
from framework.storage import heartbeat
from framework.storage.committer import MAX_BATCH, Committer, committer_of
from framework.storage.contract import commit, journal, new_run
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Message, Write

SOON = 20.0
"""Seconds to wait for what happens at once; only a broken committer makes a test take that long."""


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


class Watched(MemoryStorage):
    """A store that notes how commits come, and can be held up or broken."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[tuple[str, int]]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.renewed = threading.Semaphore(0)
        self.renewals: list[list[tuple[str, int]]] = []
        self.fail: BaseException | None = None
        self.answers: int | None = None

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self.entered.release()
        assert self.gate.wait(SOON)
        self.batches.append([(one.run_id, one.sequence if isinstance(one, Commit) else 0) for one in commits])
        if self.fail is not None:
            raise self.fail
        return super().commit(commits)[: self.answers]

    def renew_leases(self, leases: Sequence[tuple[str, int]], lease_seconds: float) -> list[RunError | None]:
        try:
            if self.fail is not None:
                raise self.fail
            self.renewals.append(list(leases))
            return super().renew_leases(leases, lease_seconds)
        finally:
            self.renewed.release()


@pytest.fixture
def store() -> Iterator[Watched]:
    with Watched() as store:
        for number in range(3):
            store.open_run(new_run(f"run_{number}"), "me", 60)
        yield store


def done(future: Future[Any]) -> Any:
    return future.result(SOON)


def hold_up(store: Watched, committer: Committer) -> Future[None]:
    """Have the committer's thread wait inside a first commit, so that others queue up."""
    store.gate.clear()
    first = committer.commit(commit(1, "run_0", 1))
    assert store.entered.acquire(timeout=SOON)
    return first


def test_a_lone_commit_does_not_wait_for_company(store: Watched) -> None:
    committer = committer_of(store)
    for sequence in (1, 2, 3):
        assert done(committer.commit(commit(sequence, "run_0", 1))) is None
    assert store.batches == [[("run_0", 1)], [("run_0", 2)], [("run_0", 3)]]


def test_commits_that_wait_share_a_transaction(store: Watched) -> None:
    committer = committer_of(store)
    first = hold_up(store, committer)
    waiting = [committer.commit(commit(sequence, f"run_{run}", 1)) for sequence in (1, 2) for run in (1, 2)]
    store.gate.set()
    assert [done(future) for future in (first, *waiting)] == [None] * 5
    assert store.batches == [[("run_0", 1)], [("run_1", 1), ("run_2", 1), ("run_1", 2), ("run_2", 2)]]


def test_journal_writes_share_transactions_in_order(store: Watched) -> None:
    committer = committer_of(store)
    first = hold_up(store, committer)
    stale = committer.journal(journal(("s", 1, b"stale"), run_id="run_1", token=7))
    waiting = [
        committer.journal(journal(("s", 1, b"intent"), ("t", 1, b"stays"), run_id="run_1", token=1)),
        committer.journal(journal(("s", 1, b"outcome"), run_id="run_1", token=1)),
        committer.commit(commit(1, "run_1", 1, journal_done=["s"])),
        committer.journal(journal(("s", 2, b"later"), run_id="run_1", token=1)),
        committer.journal(journal(("s", 1, b"other"), run_id="run_2", token=1)),
    ]
    store.gate.set()
    assert [done(future) for future in (first, *waiting)] == [None] * 6
    with pytest.raises(LeaseLost):
        done(stale)
    assert store.batches[1:] == [[*[("run_1", 0)] * 3, ("run_1", 1), ("run_1", 0), ("run_2", 0)]]
    left = [(row.step, row.number, row.record) for row in store.read_journal("run_1")]
    assert left == [("s", 2, b"later"), ("t", 1, b"stays")]


def test_a_journal_write_fails_with_the_store(store: Watched) -> None:
    committer = committer_of(store)
    store.fail = StorageError("disk full")
    with pytest.raises(StorageError, match="disk full"):
        done(committer.journal(journal(("s", 1, b""), run_id="run_1", token=1)))
    store.fail = None
    assert store.read_journal("run_1") == []
    done(committer.journal(journal(("s", 1, b""), run_id="run_1", token=1)))
    assert len(store.read_journal("run_1")) == 1


def test_a_batch_has_a_limit(store: Watched) -> None:
    committer = committer_of(store)
    hold_up(store, committer)
    waiting = [committer.commit(commit(sequence, "run_1", 1)) for sequence in range(1, MAX_BATCH + 10)]
    store.gate.set()
    for future in waiting:
        done(future)
    assert [len(batch) for batch in store.batches] == [1, MAX_BATCH, 9]


def test_calls_and_commits_keep_their_order(store: Watched) -> None:
    committer = committer_of(store)
    hold_up(store, committer)

    def sequence_of(run_id: str) -> Callable[[Any], int | None]:
        def read(storage: Any) -> int | None:
            record = storage.find_run(run_id)
            return None if record is None else int(record.sequence)

        return read

    futures: list[Future[Any]] = []
    for sequence in (1, 2, 3):
        futures.append(committer.call(sequence_of("run_1")))
        futures.append(committer.commit(commit(sequence, "run_1", 1)))
    store.gate.set()
    assert [done(future) for future in futures] == [0, None, 1, None, 2, None]


def test_an_error_is_only_its_own(store: Watched) -> None:
    committer = committer_of(store)
    hold_up(store, committer)
    good, stale, wrong, unknown, last = (
        committer.commit(one)
        for one in (
            commit(1, "run_1", 1),
            commit(1, "run_2", 9),
            commit(7, "run_1", 1),
            commit(1, "nobody", 1),
            commit(2, "run_1", 1),
        )
    )
    failing = committer.call(lambda storage: storage.claim_run("nobody", "me", 1))
    store.gate.set()
    assert done(good) is None
    assert done(last) is None
    for future, kind in ((stale, LeaseLost), (wrong, CommitConflict), (unknown, RunNotFound), (failing, RunNotFound)):
        with pytest.raises(kind):
            done(future)
    assert done(committer.commit(commit(1, "run_2", 1))) is None


def test_a_store_that_fails_fails_the_whole_batch_and_no_more(store: Watched) -> None:
    committer = committer_of(store)
    store.fail = StorageError("disk full")
    first = hold_up(store, committer)
    second = committer.commit(commit(1, "run_1", 1))
    store.gate.set()
    for future in (first, second):
        with pytest.raises(StorageError, match="disk full"):
            done(future)
    store.fail = None
    assert done(committer.commit(commit(1, "run_1", 1))) is None


class Ends(BaseException):
    """What is no ``Exception``, as of a backend that means to end its thread."""


def test_what_a_backend_does_wrong_is_told_and_leaves_nobody_waiting(store: Watched) -> None:
    committer = committer_of(store)
    store.fail = Ends("no more")
    with pytest.raises(Ends):
        done(committer.commit(commit(1, "run_1", 1)))
    first = hold_up(store, committer)
    group = [committer.commit(commit(1, f"run_{number}", 1)) for number in (1, 2)]
    store.gate.set()
    for future in (first, *group):
        with pytest.raises(Ends):
            done(future)
    store.fail, store.answers = None, 0
    with pytest.raises(StorageError, match=r"Watched.commit answered 0 of 1 writes.* not known"):
        done(committer.commit(commit(1, "run_1", 1)))
    store.answers = None
    assert done(committer.commit(commit(1, "run_2", 1))) is None


def test_a_cancelled_commit_is_not_made(store: Watched) -> None:
    committer = committer_of(store)
    hold_up(store, committer)
    cancelled = committer.commit(commit(1, "run_1", 1))
    alone = committer.call(lambda storage: 1 / 0)
    assert cancelled.cancel()
    assert alone.cancel()
    store.gate.set()
    assert done(committer.commit(commit(1, "run_1", 1))) is None
    with pytest.raises(CancelledError):
        done(cancelled)


async def test_the_event_loop_is_not_blocked(store: Watched) -> None:
    committer = committer_of(store)
    pending = asyncio.wrap_future(hold_up(store, committer))
    for _ in range(3):
        await asyncio.sleep(0)
        assert not pending.done()
    store.gate.set()
    await asyncio.wait_for(pending, SOON)
    assert store.batches


# --- leases ---------------------------------------------------------------------------------------------------------


def test_leases_are_renewed_until_dropped(store: Watched) -> None:
    committer = committer_of(store)
    before = store.find_run("run_0")
    committer.heartbeat.hold("run_0", 1, 0.03)
    for _ in range(4):
        assert store.renewed.acquire(timeout=SOON)
    assert before is not None
    after = done(committer.call(lambda storage: storage.find_run("run_0")))
    assert after.lease_until != before.lease_until
    committer.heartbeat.drop("run_0", 7)
    assert committer.heartbeat.held, "only its own token drops a lease"
    committer.heartbeat.drop("run_0", 1)
    committer.heartbeat.drop("run_0", 1)
    assert not committer.heartbeat.held


def test_leases_are_renewed_between_commits(store: Watched) -> None:
    committer = committer_of(store)
    committer.heartbeat.hold("run_0", 1, 0.003)
    sequence = 0
    while not store.renewed.acquire(blocking=False):
        sequence += 1
        done(committer.commit(commit(sequence, "run_1", 1)))


def test_a_lost_lease_is_given_up(store: Watched) -> None:
    committer = committer_of(store)
    lost: Future[RunError] = Future()
    store.release_lease("run_0", 1)
    store.claim_run("run_0", "other", 60)
    committer.heartbeat.hold("run_0", 1, 0.03, on_lost=lost.set_result)
    assert isinstance(done(lost), LeaseLost)
    assert not committer.heartbeat.held
    with pytest.raises(LeaseLost):
        done(committer.commit(commit(1, "run_0", 1)))


def test_a_closed_store_has_no_leases() -> None:
    store = Watched()
    store.open_run(new_run(), "me", 60)
    committer = committer_of(store)
    committer.heartbeat.hold("run_1", 1, 0.03)
    assert store.renewed.acquire(timeout=SOON)
    store.close()
    with pytest.raises(StorageError, match="closed"):
        done(committer.commit(commit(1, token=1)))
    deadline = time.monotonic() + SOON
    while committer.heartbeat.held:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_renewal_that_fails_is_tried_again(store: Watched) -> None:
    committer = committer_of(store)
    store.fail = StorageError("locked")
    committer.heartbeat.hold("run_0", 1, 0.03)
    assert store.renewed.acquire(timeout=SOON)
    store.fail = None
    for _ in range(2):
        assert store.renewed.acquire(timeout=SOON)
    assert committer.heartbeat.held


def test_a_thousand_leases_are_renewed_together_by_one_thread() -> None:
    with Watched() as store:
        run_ids = [f"many_{number}" for number in range(1000)]
        for run_id in run_ids:
            store.open_run(new_run(run_id), "me", 60)
        beat = committer_of(store).heartbeat
        before = set(threading.enumerate())
        past = time.monotonic() - 30
        for run_id in run_ids:
            beat.hold(run_id, 1, 60, since=past)
        assert len(set(threading.enumerate()) - before) == 1, "those of other tests may end meanwhile"
        seen: set[str] = set()
        while len(seen) < 1000:
            assert store.renewed.acquire(timeout=SOON)
            seen.update(run_id for renewal in store.renewals for run_id, _ in renewal)
        assert len(store.renewals) <= 200, "they come together; a few when they are held, as fast as they come"
        for run_id in run_ids:
            beat.drop(run_id, 1)


def test_a_lease_is_assured_from_before_it_was_asked_for_until_its_time(store: Watched) -> None:
    beat = committer_of(store).heartbeat
    store.fail = StorageError("away")
    beat.hold("run_0", 1, 60, since=time.monotonic() - 60)
    assert not beat.is_assured("run_0", 1)
    assert store.renewed.acquire(timeout=SOON)
    assert not beat.is_assured("run_0", 1), "a renewal that failed assures nothing"
    beat.hold("run_1", 1, 60)
    assert beat.is_assured("run_1", 1)
    assert not beat.is_assured("run_1", 2)
    assert not beat.is_assured("run_2", 1)


def test_renewals_do_not_wait_for_a_call_that_takes_long(store: Watched) -> None:
    committer = committer_of(store)
    gate = threading.Event()
    long = committer.call(lambda storage: gate.wait(SOON))
    committer.heartbeat.hold("run_0", 1, 0.03)
    for _ in range(3):
        assert store.renewed.acquire(timeout=SOON)
    assert not long.done()
    gate.set()
    assert done(long)


# --- the thread -----------------------------------------------------------------------------------------------------


def test_the_thread_ends_when_idle_and_starts_again(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    committer = committer_of(store)
    for sequence in (1, 2, 3):
        done(committer.commit(commit(sequence, "run_0", 1)))
        thread = committer._thread
        if thread is not None:
            thread.join(SOON)
            assert not thread.is_alive()
        assert committer._thread is None


def test_no_call_is_forgotten_by_a_thread_that_is_about_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0)
    with MemoryStorage() as storage:
        committer = committer_of(storage)

        def hand_over() -> None:
            for _ in range(100):
                committer.call(lambda store: None).result(SOON)

        threads = [threading.Thread(target=hand_over) for _ in range(3)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(SOON)
        finally:
            sys.setswitchinterval(before)
        assert not any(thread.is_alive() for thread in threads)


def test_each_store_has_one_committer(store: Watched) -> None:
    with MemoryStorage() as other:
        assert committer_of(store) is committer_of(store)
        assert committer_of(store) is not committer_of(other)


def test_an_idle_store_is_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    store = MemoryStorage()
    committer = committer_of(store)
    done(committer.call(lambda storage: storage.list_runs()))
    thread = committer._thread
    if thread is not None:
        thread.join(SOON)
    known = weakref.ref(store)
    store.close()
    del store
    gc.collect()
    assert known() is None
    with pytest.raises(StorageError, match="gone"):
        committer.call(lambda storage: None)


def test_a_forked_child_has_a_committer_of_its_own(python: Python) -> None:
    program = """
        import os, sys, tempfile, threading
        from pathlib import Path
        from framework.storage.committer import committer_of
        from framework.storage.contract import commit, new_run
        from framework.storage.sqlite import SQLiteStorage

        store = SQLiteStorage(Path(tempfile.mkdtemp(), "runs.db"))
        for run_id in ("parent", "child"):
            store.open_run(new_run(run_id), "me", 60)
        committer = committer_of(store)
        committer.heartbeat.hold("parent", 1, 60)
        started, gate = threading.Event(), threading.Event()
        committer.call(lambda storage: (started.set(), gate.wait()))
        started.wait()
        queued = committer.commit(commit(1, "parent", 1))
        child = os.fork()
        if not child:
            assert not committer._queue and not committer.heartbeat.held
            committer_of(store).commit(commit(1, "child", 1)).result(20)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        gate.set()
        queued.result(20)
        print(store.find_run("parent").sequence, store.find_run("child").sequence)
    """
    assert python(program) == "1 1\n"


# --- messages to held runs ------------------------------------------------------------------------------------------


class Told:
    """Hears of messages, and can fail to read them at first."""

    def __init__(self) -> None:
        self.heard: list[list[str]] = []
        self.once = threading.Semaphore(0)

    def __call__(self, messages: Sequence[Message]) -> None:
        self.heard.append([message.name for message in messages])
        self.once.release()


def test_messages_to_held_runs_are_told_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
    with MemoryStorage() as store:
        told, other = Told(), Told()
        for run_id, who in (("run_1", told), ("run_2", other)):
            record = store.open_run(new_run(run_id), "me", 60)
            committer_of(store).heartbeat.hold(run_id, record.token, 60, who)
        store.open_run(new_run("run_3"))
        store.send("run_3", "nobody holds it", b"")
        store.send("run_1", "first", b"")
        assert told.once.acquire(timeout=SOON)
        store.send("run_1", "second", b"")
        assert told.once.acquire(timeout=SOON)
        assert told.heard == [["first"], ["first", "second"]]
        committer_of(store).heartbeat.drop("run_1", 1)
        store.send("run_1", "third", b"")
        store.send("run_2", "last", b"")
        assert other.once.acquire(timeout=SOON)
        assert other.heard == [["last"]]
        assert len(told.heard) == 2


def test_a_look_that_fails_is_repeated(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)

    class Shaky(MemoryStorage):
        failures = 2

        def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
            if self.failures:
                self.failures -= 1
                raise StorageError("locked")
            return super().count_messages(run_ids)

    with Shaky() as store:
        told = Told()
        record = store.open_run(new_run(), "me", 60)
        store.send("run_1", "before it was held", b"")
        committer_of(store).heartbeat.hold("run_1", record.token, 60, told)
        assert told.once.acquire(timeout=SOON)
        assert told.heard == [["before it was held"]]
        assert "will try again" in caplog.text


def test_a_store_that_is_closed_during_a_look_or_a_renewal_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
    called: list[str] = []

    class Closing(MemoryStorage):
        """Closed by its owner when the heartbeat has begun to ask it."""

        def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
            self.close()
            called.append("look")
            return super().count_messages(run_ids)

        def renew_leases(self, leases: Sequence[tuple[str, int]], lease_seconds: float) -> list[RunError | None]:
            self.close()
            called.append("renewal")
            return super().renew_leases(leases, lease_seconds)

    for seconds in (60.0, 0.03):
        with Closing() as store:
            record = store.open_run(new_run(), "me", 60)
            beat = committer_of(store).heartbeat
            beat.hold("run_1", record.token, seconds, Told() if seconds == 60 else None)
            until = time.monotonic() + SOON
            while beat.held:
                assert time.monotonic() < until
                time.sleep(0.005)
    assert called == ["look", "renewal"]
    assert not caplog.text
