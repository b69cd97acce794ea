"""PostgreSQL goes away in the middle: nothing is lost, nothing is done twice, and no answer claims what is not so."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from framework.errors import CommitConflict, LeaseLost, MessageRefused, RunBusy, RunExists, StorageError
from framework.schemas.run import RunState
from framework.storage import postgres_commits, postgres_database
from framework.storage.chunks import Chunk
from framework.storage.contract import accept, commit, journal, new_run, state_at
from framework.storage.postgres import PostgresStorage
from framework.storage.records import JournalRow, Retention, Write
from framework.storage.sqlite_schema import row_crc
from tests.postgres_proxy import PostgresProxy
from tests.postgres_server import PostgresServer, running_postgres

ONE = commit(1, token=1, chunks=[Chunk("a", "set", b"1")], log=b"[]")


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(postgres_url) as made:
        yield made


@pytest.fixture
def store(proxy: PostgresProxy) -> Iterator[PostgresStorage]:
    with PostgresStorage(proxy.url) as made:
        yield made


@pytest.fixture
def direct(postgres_url: str, store: PostgresStorage) -> Iterator[PostgresStorage]:
    """The same store, not through the proxy."""
    with PostgresStorage(postgres_url) as made:
        yield made


@pytest.fixture(scope="module")
def own() -> Iterator[PostgresServer]:
    """A server that tests may stop, which syncs to disk."""
    with running_postgres() as server:
        yield server


class Once:
    """Says yes the first time that ``matches`` does."""

    def __init__(self, matches: Callable[..., bool]) -> None:
        self.matches = matches
        self.done = False

    def __call__(self, *arguments: Any) -> bool:
        if self.done or not self.matches(*arguments):
            return False
        self.done = True
        return True


def asks_for(text: bytes) -> Once:
    return Once(lambda data: text in data)


def answer_after(proxy: PostgresProxy, text: bytes, number: int = 1) -> Once:
    """The ``number``-th end of an answer after a request with ``text``: what was asked is done, nobody is told."""
    seen = {"asked": False}
    left = number

    def request(data: bytes) -> bool:
        seen["asked"] |= text in data
        return False

    def answer(kind: bytes, payload: bytes) -> bool:
        nonlocal left
        left -= seen["asked"] and kind == b"Z"
        return left == 0

    proxy.cut_request = request
    return Once(answer)


# --- an answer is lost ----------------------------------------------------------------------------------------------


def test_a_commit_whose_answer_was_lost_is_known_again(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run(), "me", 600)
    proxy.cut_answer = answer_after(proxy, b"commit_run")
    assert store.commit([ONE]) == [None]
    assert proxy.cut_answer.done
    assert [row.sequence for row in store.read_log("run_1")] == [1]
    assert store.commit([replace(ONE)])[0].__class__ is CommitConflict, "another call is not taken for the same"


def test_a_commit_that_gave_the_lease_up_is_known_again(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run(), "me", 600)
    proxy.cut_answer = answer_after(proxy, b"commit_run")
    assert store.commit([replace(ONE, state=RunState.COMPLETED, release=True)]) == [None]
    assert proxy.cut_answer.done


def test_a_commit_that_never_arrived_is_made(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run(), "me", 600)
    proxy.cut_request = asks_for(b"commit_run")
    assert store.commit([ONE]) == [None]
    assert proxy.cut_request.done
    assert state_at(store, 1) == {"a": b"1"}


@pytest.mark.parametrize("arrives", [True, False])
def test_a_batch_that_broke_is_made_once(arrives: bool, store: PostgresStorage, proxy: PostgresProxy) -> None:
    runs = [f"run_{number}" for number in range(5)]
    for run_id in runs:
        store.open_run(new_run(run_id), "me", 600)
    batch: list[Write] = [*(commit(1, run_id, 1) for run_id in runs), commit(7, "run_3", 1), commit(1, "run_4", 9)]
    batch += [journal(("s", 1, b"j"), run_id="run_0", token=1), commit(2, "run_0", 1)]
    if arrives:
        proxy.cut_answer = answer_after(proxy, b"commit_run")
    else:
        proxy.cut_request = asks_for(b"commit_run")
    outcomes = store.commit(batch)
    kinds = [None if outcome is None else type(outcome) for outcome in outcomes]
    assert kinds == [None] * 5 + [CommitConflict, LeaseLost, None, None]
    assert [record.sequence for record in store.find_runs("")] == [2, 1, 1, 1, 1]
    assert store.verify().ok


def test_a_late_request_changes_nothing(store: PostgresStorage, proxy: PostgresProxy) -> None:
    """The network kept a commit back; by the time it arrives it was made again, and even the next one."""
    store.open_run(new_run(), "me", 600)
    proxy.hold_request = asks_for(b"commit_run")
    assert store.commit([ONE]) == [None]
    assert store.commit([commit(2, token=1, chunks=[Chunk("a", "append", b"2")])]) == [None]
    proxy.deliver()
    assert [row.sequence for row in store.read_log("run_1")] == [1, 2]
    assert [chunk.data for chunk in store.read_chunks("run_1", 2)] == [b"1", b"2"]


def test_a_late_request_that_comes_first_is_known(store: PostgresStorage, proxy: PostgresProxy) -> None:
    """It arrives between the lost connection and the next try, which waits for it at the run's row."""
    store.open_run(new_run(), "me", 600)
    proxy.hold_request = asks_for(b"commit_run")

    def deliver(data: bytes) -> bool:
        if b"commit_run" in data:
            proxy.deliver()
        return False

    proxy.cut_request = deliver
    assert store.commit([ONE]) == [None]
    assert [row.sequence for row in store.read_log("run_1")] == [1]


def test_journal_rows_whose_answer_was_lost(
    store: PostgresStorage, proxy: PostgresProxy, direct: PostgresStorage
) -> None:
    store.open_run(new_run(), "me", 600)
    write = journal(("s", 1, b"j"), ("t", 2, b"k"), token=1)
    proxy.cut_answer = answer_after(proxy, b"write_journal")
    assert store.commit([write]) == [None]
    assert len(store.read_journal("run_1")) == 2
    # The next try finds another owner: what was written while it was ours counts, what was not is refused.
    for rows, refused in (([JournalRow("s", 3, b"x")], LeaseLost), ([JournalRow("s", 1, b"j")], type(None))):
        token = direct.claim_run("run_1", "me", 600, lambda owner: False).token
        proxy.cut_answer = None

        def claim(data: bytes) -> bool:
            if b"write_journal" not in data:
                return False
            direct.claim_run("run_1", "other", 600, lambda owner: False)
            return True

        proxy.cut_request = Once(claim)
        outcome = store.commit([replace(write, token=token, rows=rows)])[0]
        assert isinstance(outcome, refused)
    assert isinstance(store.commit([replace(write, rows=[JournalRow("s", 1, b"j")])])[0], LeaseLost)


def test_a_run_whose_acceptance_was_not_heard_of_is_accepted_once(store: PostgresStorage, proxy: PostgresProxy) -> None:
    proxy.cut_answer = answer_after(proxy, b"accept_run")
    assert store.open_run(new_run(state={"a": 1}), "me", 600).owner == "me"
    assert proxy.cut_answer.done
    with pytest.raises(RunExists):
        store.open_run(new_run(), "me", 600)


@pytest.mark.parametrize("statement", [b"BEGIN", b"FOR UPDATE", b"claim_key = ", b"COMMIT\x00"])
@pytest.mark.parametrize("answered", [True, False])
def test_a_claim_that_broke_is_made_once(
    statement: bytes, answered: bool, store: PostgresStorage, proxy: PostgresProxy
) -> None:
    store.open_run(new_run(), "dead", 0)
    if answered:
        proxy.cut_answer = answer_after(proxy, statement)
    else:
        proxy.cut_request = asks_for(statement)
    claimed = store.claim_run("run_1", "me", 600)
    assert (claimed.state, claimed.token, claimed.recovery_attempts) == (RunState.CRASHED, 2, 1)
    found = store.find_run("run_1")
    assert found is not None
    assert (found.owner, found.token, found.recovery_attempts) == ("me", 2, 1)
    with pytest.raises(RunBusy):
        store.claim_run("run_1", "you", 600)


@pytest.mark.parametrize("answered", [True, False])
def test_a_fork_that_broke_is_made_once(answered: bool, store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run(), "me", 600)
    accept(store, ONE)
    if answered:
        proxy.cut_answer = answer_after(proxy, b"COMMIT\x00")
    else:
        proxy.cut_request = asks_for(b"COMMIT\x00")
    forked = store.fork_run("run_1", 1, b"{}", commit(2, "fork", state=RunState.PAUSED))
    assert (forked.sequence, forked.state) == (2, RunState.PAUSED)
    with pytest.raises(RunExists):
        store.fork_run("run_1", 1, b"{}", commit(2, "fork", state=RunState.PAUSED))
    assert store.verify().ok


def test_a_message_whose_answer_was_lost_is_left_once(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run())
    proxy.cut_answer = answer_after(proxy, b"leave_message")
    store.send("run_1", "answer", b"yes")
    assert proxy.cut_answer.done
    with pytest.raises(MessageRefused):
        store.send("run_1", "answer", b"yes")
    assert [message.body for message in store.read_messages("run_1")] == [b"yes"]


def test_what_was_removed_before_the_answer_was_lost_is_counted(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run())
    for sequence in range(1, 7):
        accept(store, commit(sequence, checkpoint_id=f"c{sequence}", checkpoint=b"{}"))
    proxy.cut_answer = answer_after(proxy, b"COMMIT\x00")
    assert store.prune("run_1", Retention(4)) == 2
    token = store.claim_run("run_1", "me", 600).token
    proxy.cut_answer = answer_after(proxy, b"COMMIT\x00")
    assert store.rewind("run_1", token, 5) == 1
    store.release_lease("run_1", token)
    proxy.cut_answer = answer_after(proxy, b"COMMIT\x00")
    assert store.delete_checkpoints("run_1") == 3
    proxy.cut_answer = answer_after(proxy, b"COMMIT\x00")
    assert store.delete_run("run_1")
    assert not store.delete_run("run_1")


# --- the server is away ---------------------------------------------------------------------------------------------


def test_idle_connections_that_broke_are_replaced(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run())
    before = proxy.connections
    proxy.cut_all()
    assert store.find_run("run_1") is not None
    assert proxy.connections == before + 1


@pytest.mark.parametrize("how", ["fast", "immediate", "kill"])
def test_a_restart_in_the_middle_loses_nothing(how: str, own: PostgresServer) -> None:
    with PostgresStorage(own.new_database()) as store:
        for number in range(4):
            store.open_run(new_run(f"run_{number}"), "me", 600)
        counts = [0] * 4
        stop = threading.Event()

        def work(number: int) -> None:
            while not stop.is_set():
                sequence = counts[number] + 1
                accept(store, commit(sequence, f"run_{number}", 1, chunks=[Chunk("n", "set", b"%d" % sequence)]))
                counts[number] = sequence

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, number) for number in range(4)]
            for _ in range(2):
                reached = [count + 5 for count in counts]
                while any(count < goal for count, goal in zip(counts, reached, strict=True)):
                    time.sleep(0.005)
                    assert not any(future.done() for future in futures)
                if how == "kill":
                    own.kill()
                else:
                    own.stop("fast" if how == "fast" else "immediate")
                own.start()
            reached = [count + 5 for count in counts]
            while any(count < goal for count, goal in zip(counts, reached, strict=True)):
                time.sleep(0.005)
                assert not any(future.done() for future in futures)
            stop.set()
            for future in futures:
                future.result()
        found = {record.run_id: record.sequence for record in store.list_runs()}
        assert found == {f"run_{number}": counts[number] for number in range(4)}
        for number in range(4):
            assert state_at(store, counts[number], f"run_{number}") == {"n": b"%d" % counts[number]}
        assert store.verify().ok


def test_when_the_limit_is_over_there_is_one_clear_error(own: PostgresServer) -> None:
    url = own.new_database() + "?patience_seconds=0.3"
    with PostgresStorage(url) as store:
        store.open_run(new_run(), "me", 600)
        own.stop()
        try:
            with pytest.raises(StorageError) as caught:
                store.commit([ONE])
            assert "cannot commit run 'run_1'" in str(caught.value)
            assert "Nothing of this call was written" in str(caught.value)
            with pytest.raises(StorageError):
                store.commit([ONE, commit(1, "other")])
            with pytest.raises(StorageError) as opening:
                PostgresStorage(url)
        finally:
            own.start()
        for error in (caught.value, opening.value):
            assert own.password not in f"{error}{error!r}{error.__cause__}"
            assert str(own.port) in str(error)
        assert store.commit([ONE]) == [None]


def test_a_commit_that_may_have_been_made_is_not_called_a_failure(store: PostgresStorage, proxy: PostgresProxy) -> None:
    store.open_run(new_run(), "me", 600)
    store._database._patience = 0.5
    inner = answer_after(proxy, b"commit_run")

    def cut_and_refuse(kind: bytes, payload: bytes) -> bool:
        if inner(kind, payload):
            proxy.refuse = True
            return True
        return False

    proxy.cut_answer = cut_and_refuse
    with pytest.raises(StorageError, match="whether it was done is not known"):
        store.commit([ONE])
    proxy.refuse = False
    assert [row.sequence for row in store.read_log("run_1")] == [1]


def test_a_server_that_does_not_answer_is_given_up(own: PostgresServer) -> None:
    with PostgresStorage(own.new_database() + "?patience_seconds=0.4") as store:
        store.open_run(new_run(), "me", 600)
        own.pause()
        try:
            started = time.monotonic()
            with pytest.raises(StorageError, match="not"):
                store.commit([ONE])
            assert time.monotonic() - started < 20
        finally:
            own.resume()
        store._database._patience = 30
        # It was asked to forget it, or did it, or still does it: the next one is the first or the second.
        outcomes = [store.commit([commit(number, token=1)])[0] for number in (1, 2)]
        assert outcomes[1] is None, outcomes
        assert store.verify().ok


def test_a_transaction_that_stands_still_loses_the_run(
    direct: PostgresStorage, store: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process stopped in the middle of a claim keeps nobody else from it, and comes back to an error or a refusal."""
    monkeypatch.setattr(postgres_database, "IDLE_TRANSACTION_SECONDS", 1)
    store.open_run(new_run(), "dead", 600)
    inside, go_on = threading.Event(), threading.Event()

    def stand_still(owner: str) -> bool:
        inside.set()
        go_on.wait(30)
        return False

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(store.claim_run, "run_1", "slow", 600, stand_still)
        assert inside.wait(10)
        claimed = direct.claim_run("run_1", "quick", 600, lambda owner: owner == "quick" or False)
        go_on.set()
        assert claimed.token == 2
        assert slow.result().token == 3, "which is_alive said is right"


@contextmanager
def blocked(server: PostgresServer, store: PostgresStorage, run_id: str) -> Iterator[Any]:
    """Another session that holds the lock on a run's row."""
    import psycopg

    with psycopg.connect(server.with_password(store.url).partition("?")[0]) as connection:
        schema = store._database.address.schema
        connection.execute(f"SELECT 1 FROM {schema}.runs WHERE run_id = %s FOR UPDATE".encode(), [run_id])
        yield connection
        connection.rollback()


def test_deadlocks_are_tried_again(postgres: PostgresServer, direct: PostgresStorage) -> None:
    for run_id in ("a", "b"):
        direct.open_run(new_run(run_id), "me", 600)
    schema = direct._database.address.schema
    with blocked(postgres, direct, "b") as other, ThreadPoolExecutor(1) as pool:
        other.execute("SET deadlock_timeout = '60s'")
        batch = pool.submit(direct.commit, [commit(1, "b", 1), commit(1, "a", 1)])
        while not postgres_waits(postgres):
            time.sleep(0.005)
        # The batch holds a and waits for b: now this waits for a. The server ends the batch, which comes again.
        other.execute(f"SELECT 1 FROM {schema}.runs WHERE run_id = 'a' FOR UPDATE".encode())
        other.rollback()
        assert batch.result() == [None, None]
    assert [record.sequence for record in direct.list_runs()] == [1, 1]


def postgres_waits(server: PostgresServer) -> bool:
    return bool(server.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


def test_one_write_that_the_server_cannot_take_touches_no_other(direct: PostgresStorage) -> None:
    for run_id in ("a", "b", "c"):
        direct.open_run(new_run(run_id), "me", 600)
    broken = commit(1, "b", 1)
    original = row_crc
    with pytest.MonkeyPatch.context() as patch:
        # A checksum beyond what the column takes, for one of them.
        patch.setattr(
            postgres_commits, "row_crc", lambda *values: 2**70 if values[1] == broken.record else original(*values)
        )
        outcomes = direct.commit([commit(1, "a", 1, record=b'{"a": 1}'), broken, commit(1, "c", 1, record=b'{"c": 1}')])
    assert [type(outcome) for outcome in outcomes] == [type(None), StorageError, type(None)]
    assert [record.sequence for record in direct.find_runs("")] == [1, 0, 1]


# --- threads and forks ----------------------------------------------------------------------------------------------


def test_connections_are_bounded(postgres_url: str) -> None:
    with PostgresProxy(postgres_url) as proxy, PostgresStorage(proxy.url + "&pool_size=2") as store:
        store.open_run(new_run(), "me", 600)
        with ThreadPoolExecutor(8) as pool:
            assert all(record is not None for record in pool.map(lambda _: store.find_run("run_1"), range(64)))
        assert proxy.connections <= 2


def test_a_forked_child_has_connections_of_its_own(postgres_url: str) -> None:
    with PostgresStorage(postgres_url) as store:
        store.open_run(new_run(), "me", 600)
        assert store.wait_for_work(5)
        accept(store, ONE)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            ok = 1
            try:
                ok = 0 if store.commit([commit(2, token=1)]) == [None] and store.wait_for_work(5) else 1
            finally:
                os.write(writing, b"%d" % ok)
                os._exit(ok)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            assert said.read() == b"0"
        os.waitpid(child, 0)
        # The child has ended; a connection that it shared would have been closed with it.
        accept(store, commit(3, token=1))
        assert [row.sequence for row in store.read_log("run_1")] == [1, 2, 3]


def test_a_store_that_is_closed_says_so(postgres_url: str) -> None:
    store = PostgresStorage(postgres_url)
    store.close()
    store.close()
    for call in (lambda: store.find_run("run_1"), lambda: store.commit([ONE]), lambda: store.send("a", "b", b"")):
        with pytest.raises(StorageError, match="is closed"):
            call()
    assert not store.wait_for_work(5)
