"""Commits that share a transaction: what goes wrong with one is its own, and a lone one is made at once."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import CommitConflict, LeaseLost, StorageError
from framework.graph.run_commits import wait_until_done
from framework.storage import committer as module
from framework.storage.chunks import Chunk
from framework.storage.committer import Committer, Ticket, committer_of
from framework.storage.contract import commit, new_run, state_at
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Retention, Write
from framework.storage.sqlite import SQLiteStorage

SOON = 20.0


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


# --- what a store remembers of its runs ---------------------------------------------------------------------------

KEYS = ["a", "b", "log"]
written = st.lists(
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["set", "append", "delete"]), st.integers(0, 9)),
    max_size=3,
    unique_by=lambda each: each[0],
)
history = st.lists(
    st.tuples(
        written,
        st.sampled_from([1, 1, 1, 1, 2, None]),  # how many checkpoints are kept
        st.sampled_from(["", "", "", "", "no checkpoint", "again", "claim", "prune", "other", "stale", "gap", "group"]),
    ),
    max_size=25,
)


def rows_of(store: SQLiteStorage) -> dict[str, list[tuple[Any, ...]]]:
    tables = {
        "steps": "run_pk, sequence, record, log, crc, sets",
        "checkpoints": "run_pk, sequence, checkpoint_id, body, crc",
        "chunks": "run_pk, key, sequence, op, data, checksum",
    }
    return {
        name: [tuple(row) for row in store._db.execute(f"SELECT {columns} FROM {name} ORDER BY {columns}")]
        for name, columns in tables.items()
    }


@given(history)
def test_what_is_remembered_of_a_run_changes_nothing_that_is_written(
    steps: list[tuple[list[tuple[str, Any, int]], int | None, str]],
) -> None:
    with MemoryStorage() as one, MemoryStorage() as other:
        stores = (one, other)
        for store in stores:
            store.open_run(new_run(state={"a": 1, "log": []}), "me", 60)
            store.open_run(new_run("run_2"), "me", 60)
        token, sequence, second = 1, 0, 0
        for writes, keep, special in steps:
            chunks = [Chunk(key, op, b"" if op == "delete" else b"%d" % number) for key, op, number in writes]
            fields: dict[str, Any] = {"chunks": chunks, "retention": Retention(keep), "token": token}
            if special == "no checkpoint":
                fields["checkpoint_id"] = None
            if special == "stale":
                fields["token"] = token + 1
            group: list[Write] = [commit(sequence + (7 if special == "gap" else 1), **fields)]
            if special == "group":
                group += [commit(second + 1, "run_2", token=1, chunks=chunks), commit(9, "run_2", token=1)]
                group += [commit(sequence + 2, **fields)]
            outcomes = []
            for store in stores:
                other._writer.forget()
                if special == "claim":
                    store.release_lease("run_1", token)
                    store.claim_run("run_1", "me", 60)
                if special == "prune":
                    store.prune("run_1", Retention(1))
                outcomes.append([type(outcome) for outcome in store.commit(group)])
            assert outcomes[0] == outcomes[1]
            if special == "claim":
                assert outcomes[0] == [LeaseLost]
                token += 1
            elif special == "stale":
                assert outcomes[0] == [LeaseLost]
            elif special == "gap":
                assert outcomes[0] == [CommitConflict]
            elif special == "group":
                assert outcomes[0] == [type(None), type(None), CommitConflict, type(None)]
                sequence, second = sequence + 2, second + 1
            else:
                assert outcomes[0] == [type(None)]
                sequence += 1
            assert rows_of(one) == rows_of(other)


def test_a_commit_by_another_process_is_not_overlooked(tmp_path: Path) -> None:
    """The first statement of a commit finds out that what is remembered of its run is not so any more."""
    with SQLiteStorage(tmp_path / "runs.db") as mine, SQLiteStorage(tmp_path / "runs.db") as theirs:
        mine.open_run(new_run(), "me", 0.0)  # a lease that expires at once: others may save without one
        assert mine.commit([commit(1, token=1)]) == [None]
        assert theirs.commit([commit(2)]) == [None]
        assert isinstance(mine.commit([commit(2, token=1)])[0], CommitConflict)
        assert mine.commit([commit(3, token=1)]) == [None]
        theirs.claim_run("run_1", "they", 60)
        assert isinstance(mine.commit([commit(4, token=1)])[0], LeaseLost)
        assert theirs.commit([commit(4, token=2)]) == [None]
        assert mine.verify().ok


def test_what_was_rolled_back_is_not_remembered(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        store.open_run(new_run(), "me", 60)
        assert store.commit([commit(1, token=1, retention=Retention(1))]) == [None]
        store._db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON chunks BEGIN SELECT RAISE(ROLLBACK, 'database or disk is full'); END"
        )
        with pytest.raises(StorageError, match="Free space"):
            store.commit([commit(2, token=1, chunks=[Chunk("a", "set", b"1")], retention=Retention(1))])
        store._db.execute("DROP TRIGGER full")
        assert store.commit([commit(2, token=1, chunks=[Chunk("a", "set", b"2")], retention=Retention(1))]) == [None]
        assert store.commit([commit(3, token=1, chunks=[Chunk("a", "set", b"3")], retention=Retention(1))]) == [None]
        assert state_at(store, 3) == {"a": b"3"}
        assert [row.sequence for row in store.read_checkpoint_rows("run_1")] == [3]
        assert store.verify().ok


# --- a group, one of whose members fails ----------------------------------------------------------------------------


def held_up(committer: Committer) -> threading.Event:
    """Have the committer's thread wait, so that what is handed over next forms a group; set the event to go on."""
    gate, inside = threading.Event(), threading.Event()

    def wait(storage: object) -> None:
        inside.set()
        assert gate.wait(SOON)

    committer.call(wait)
    assert inside.wait(SOON)
    return gate


async def outcome(ticket: Ticket) -> BaseException | None:
    await wait_until_done(ticket)
    return ticket.exception()


async def test_a_disk_that_is_full_for_one_is_not_for_the_others(tmp_path: Path) -> None:
    """The group as a whole finds no space; its members are then tried one by one."""
    with SQLiteStorage(tmp_path / "runs.db") as store:
        for number in range(6):
            store.open_run(new_run(f"run_{number}"), "me", 60)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 40}")
        small = Chunk("value", "set", b"1")
        large = small._replace(data=b"1" * 2_000_000)
        committer = committer_of(store)
        gate = held_up(committer)
        tickets = [
            committer.hand_over(commit(1, f"run_{number}", token=1, chunks=[large if number == 2 else small]))
            for number in range(6)
        ]
        stale = committer.hand_over(commit(1, "run_1", token=7))
        gate.set()
        outcomes = [await outcome(ticket) for ticket in tickets]
        assert [error is None for error in outcomes] == [True, True, False, True, True, True]
        assert "Free space" in str(outcomes[2])
        assert await outcome(stale) is not None
        records = [store.find_run(f"run_{number}") for number in range(6)]
        assert [record.sequence for record in records if record is not None] == [1, 1, 0, 1, 1, 1]
        assert store.verify().ok


async def test_a_lost_lease_in_a_group_is_its_run_s_alone(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        for number in range(5):
            store.open_run(new_run(f"run_{number}"), "me", 60)
            assert store.commit([commit(1, f"run_{number}", token=1, retention=Retention(1))]) == [None]
        store.release_lease("run_2", 1)
        store.claim_run("run_2", "other", 60)
        committer = committer_of(store)
        gate = held_up(committer)
        tickets = [
            committer.hand_over(commit(sequence, f"run_{number}", token=1, retention=Retention(1)))
            for sequence in (2, 3)
            for number in range(5)
        ]
        gate.set()
        outcomes = [type(await outcome(ticket)) for ticket in tickets]
        assert outcomes == [LeaseLost if number == 2 else type(None) for number in range(5)] * 2
        assert store.verify().ok


async def test_an_answer_that_was_lost_is_not_told_as_a_refusal() -> None:
    """Tried again, its members are refused because they are made; each has to find that out from the store."""

    class Forgetful(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            outcomes = super().commit(commits)
            if len(commits) > 1:
                raise StorageError("the connection was lost")
            return outcomes

    with Forgetful() as store:
        for number in range(3):
            store.open_run(new_run(f"run_{number}"), "me", 60)
        committer = committer_of(store)
        gate = held_up(committer)
        tickets = [committer.hand_over(commit(1, f"run_{number}", token=1)) for number in range(3)]
        gate.set()
        assert [str(await outcome(ticket)) for ticket in tickets] == ["the connection was lost"] * 3


async def test_large_commits_do_not_hold_up_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    class Noting(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            groups.append([each.run_id for each in commits])
            return super().commit(commits)

    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 1_000)
    with Noting() as store:
        for number in range(4):
            store.open_run(new_run(f"run_{number}"), "me", 60)
        committer = committer_of(store)
        gate = held_up(committer)
        sizes = [10, 2_000, 10, 10]
        tickets = [
            committer.hand_over(commit(1, f"run_{number}", token=1, chunks=[Chunk("a", "set", b"1" * size)]))
            for number, size in enumerate(sizes)
        ]
        gate.set()
        assert [await outcome(ticket) for ticket in tickets] == [None] * 4
        assert groups == [["run_0", "run_1"], ["run_2", "run_3"]]


async def test_one_wake_up_serves_a_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    woken = 0
    wake = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*args, **kwargs)

    with MemoryStorage() as store:
        for number in range(20):
            store.open_run(new_run(f"run_{number}"), "me", 60)
        committer = committer_of(store)
        gate = held_up(committer)
        tickets = [committer.hand_over(commit(1, f"run_{number}", token=1)) for number in range(20)]
        waiting = [asyncio.create_task(outcome(ticket)) for ticket in tickets]
        await asyncio.sleep(0)
        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        gate.set()
        assert await asyncio.gather(*waiting) == [None] * 20
        assert woken == 1


# --- alone ----------------------------------------------------------------------------------------------------------


def handed(store: SQLiteStorage, one: Commit, **fields: Any) -> Ticket:
    return committer_of(store).hand_over(one, alone=True, **fields)


def test_a_lone_run_s_commit_is_made_at_once(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        store.open_run(new_run(), "me", 60)
        ticket = handed(store, commit(1, token=1))
        assert ticket.done()
        assert ticket.exception() is None
        refused = handed(store, commit(7, token=1))
        assert refused.done()
        with pytest.raises(CommitConflict):
            refused.result()
        with SQLiteStorage(tmp_path / "runs.db") as other:
            record = other.find_run("run_1")
        assert record is not None
        assert record.sequence == 1


def test_a_store_s_failure_is_that_of_the_commit(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        store.open_run(new_run(), "me", 60)
        (tmp_path / "runs.db").unlink()
        ticket = handed(store, commit(1, token=1))
        assert ticket.done()
        assert "deleted or replaced" in str(ticket.exception())


async def test_nothing_is_made_at_once_that_would_have_to_wait(tmp_path: Path) -> None:
    """Another process writes: the commit goes to the thread, which waits for it, and the loop goes on."""
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        ticket = handed(store, commit(1, token=1))
        assert not ticket.done()
        other.execute("COMMIT")
        other.close()
        assert await outcome(ticket) is None
        assert store._db.execute("PRAGMA busy_timeout").fetchone()[0] == 30_000


async def test_nothing_is_made_at_once_while_somebody_uses_the_store(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        store.open_run(new_run(), "me", 60)
        gate = held_up(committer_of(store))
        ticket = handed(store, commit(1, token=1))
        assert not ticket.done()
        gate.set()
        assert await outcome(ticket) is None
        taken, gate = threading.Event(), threading.Event()

        def use() -> None:
            with store._lock:
                taken.set()
                assert gate.wait(SOON)

        user = threading.Thread(target=use)
        user.start()
        assert taken.wait(SOON)
        ticket = handed(store, commit(2, token=1))
        assert not ticket.done()
        gate.set()
        user.join()
        assert await outcome(ticket) is None


@pytest.mark.parametrize("why", ["another run", "a slow disk", "a large value", "not alone", "another commit"])
async def test_what_else_goes_to_the_thread(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cautious(SQLiteStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            return super().commit(commits)

    kind = Cautious if why == "another commit" else SQLiteStorage
    with kind(tmp_path / "runs.db") as store:
        committer = committer_of(store)
        for run_id in ("run_1", "run_2"):
            store.open_run(new_run(run_id), "me", 60)
            if run_id == "run_1" or why == "another run":
                committer.heartbeat.hold(run_id, 1, 60)
        threads: list[str] = []
        write = store._writer.write

        def noted(*given: Any) -> Any:
            threads.append(threading.current_thread().name)
            return write(*given)

        monkeypatch.setattr(store._writer, "write", noted)
        if why == "a slow disk":
            for _ in range(3):
                committer._took(0.03)
        committer._took = lambda seconds: None  # type: ignore[method-assign]  # however slow this machine's disk is
        size = 100_000 if why == "a large value" else 10
        one = commit(1, token=1, chunks=[Chunk("a", "set", b"1" * size)])
        assert await outcome(committer.hand_over(one, alone=why != "not alone")) is None
        assert threads == ["surefoot-committer"]
        committer.heartbeat.drop("run_2", 1)
        assert await outcome(committer.hand_over(commit(2, token=1), alone=True)) is None
        once = why in ("another run", "a large value", "not alone")
        assert (threads[1] == threading.current_thread().name) is once


def test_a_disk_that_is_fast_again_is_found_out(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        committer = committer_of(store)
        for _ in range(50):
            committer._took(10.0)
        assert committer._seconds > module.AT_ONCE_SECONDS
        for _ in range(50):
            committer._took(0.0001)
        assert committer._seconds < module.AT_ONCE_SECONDS
