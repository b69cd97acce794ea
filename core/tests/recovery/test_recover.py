"""``CheckpointManager.recover`` and ``Worker``: which runs are found, in what order, and what becomes of each."""

from __future__ import annotations

import asyncio
import random
import threading
from itertools import pairwise
from typing import Any

import pytest

from framework.errors import ResumeError, RunBusy
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.recovery import Recovered
from framework.graph.run_messages import cancel_name
from framework.runner.recovery import Worker
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from framework.storage.sqlite import SQLiteStorage
from tests.recovery.workers_kit import Fickle, crashed, ended, finishing


async def test_crashed_due_and_if_asked_failed_runs_are_found_in_this_order(storage: Storage) -> None:
    ended(storage, "failed", RunState.FAILED, "no network")
    ended(
        storage, "given-up", RunState.FAILED, "it ended its process 6 times in a row with nothing finished in between"
    )
    ended(storage, "due", RunState.PAUSED, wake_at=1.0)
    ended(storage, "later", RunState.PAUSED, wake_at=4e9)
    ended(storage, "paused", RunState.PAUSED)
    ended(storage, "cancelled", RunState.CANCELLED)
    ended(storage, "completed", RunState.COMPLETED)
    crashed(storage, "first", "second")
    crashed(storage, "part", parent="first")
    storage.open_run(new_run("alive"), "somebody", 3600)
    manager = CheckpointManager(storage)
    found = manager.recoverable()
    assert [(run.run_id, run.state.value) for run in found] == [
        ("first", "crashed"),
        ("second", "crashed"),
        ("due", "paused"),
    ]
    assert [run.run_id for run in manager.recoverable(failed=True)] == ["first", "second", "due", "failed"]
    assert [run.run_id for run in manager.recoverable(failed=True, limit=1)] == ["first"]
    done: list[str] = []
    outcomes = await manager.recover(finishing(storage, done), failed=True)
    assert outcomes == [Recovered(run_id, "resumed", "done") for run_id in ("first", "second", "due", "failed")]
    assert done == ["first", "second", "due", "failed"]
    assert await manager.recover(finishing(storage, done), failed=True) == []


async def test_what_becomes_of_each(storage: Storage) -> None:
    crashed(storage, "asked", "bad", "good", "lost", "taken")
    storage.send("asked", cancel_name(1), b"null")
    done: list[str] = []
    finish = finishing(storage, done)

    async def resume(run: RunRecord) -> str:
        if run.run_id == "bad":
            raise ResumeError("bad", "its checkpoint cannot be read")
        if run.run_id == "lost":
            raise RunBusy("lost", "another", 1.0)
        if run.run_id == "good":
            storage.claim_run("taken", "another", 60)
        return await finish(run)

    outcomes = await CheckpointManager(storage).recover(resume)
    assert [(each.run_id, each.outcome, each.error) for each in outcomes] == [
        ("asked", "cancelled", None),
        ("bad", "failed", "its checkpoint cannot be read"),
        ("good", "resumed", None),
        ("lost", "busy", None),
        ("taken", "busy", None),
    ]
    assert done == ["good"]


async def test_so_many_at_once_and_no_more() -> None:
    with MemoryStorage() as store:
        crashed(store, *(f"r{number}" for number in range(9)))
        inside, most, done = 0, 0, list[str]()
        finish, three = finishing(store, done), asyncio.Event()

        async def resume(run: RunRecord) -> str:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            if inside == 3:
                for _ in range(50):  # a fourth would come in meanwhile: what it asks the store takes one such turn
                    await asyncio.to_thread(lambda: None)
                three.set()
            await three.wait()
            inside -= 1
            return await finish(run)

        recovery = CheckpointManager(store).recover(resume, concurrency=3, limit=8)
        assert len(await asyncio.wait_for(recovery, 30)) == 8
        assert (most, len(done)) == (3, 8)
        with pytest.raises(ValueError, match="at least 1"):
            await CheckpointManager(store).recover(resume, concurrency=0)


async def test_an_error_that_is_not_the_librarys_comes_out_once_the_others_have_ended() -> None:
    with MemoryStorage() as store:
        crashed(store, "a", "b")
        done: list[str] = []
        finish = finishing(store, done)

        async def resume(run: RunRecord) -> str:
            if run.run_id == "a":
                raise ZeroDivisionError
            return await finish(run)

        with pytest.raises(ZeroDivisionError):
            await CheckpointManager(store).recover(resume)
        assert done == ["b"]


# --- the worker -----------------------------------------------------------------------------------------------------


async def test_a_worker_works_until_it_is_stopped_and_sees_what_comes_meanwhile() -> None:
    with Fickle() as store:
        crashed(store, "first")
        done: list[str] = []
        worker = Worker(store, finishing(store, done), interval=5, rng=random.Random(1))

        def on_wait(number: int) -> None:
            if number == 3:
                crashed(store, "second")
            if "second" in done:
                worker.stop()

        store.on_wait = on_wait
        await asyncio.wait_for(worker.run(), 20)
        assert done == ["first", "second"]
        assert all(3.75 <= each <= 5 for each in store.waited)
        assert any(each < 5 for each in store.waited), "by chance a little earlier"


async def test_a_long_run_does_not_keep_others_from_being_taken_up() -> None:
    with Fickle() as store:
        crashed(store, "long")
        done: list[str] = []
        finish, over = finishing(store, done), asyncio.Event()

        async def resume(run: RunRecord) -> str:
            if run.run_id == "long":
                crashed(store, "short")
                await over.wait()
            result = await finish(run)
            over.set()
            return result

        worker = Worker(store, resume, concurrency=2)
        store.on_wait = lambda number: worker.stop() if len(done) == 2 else None
        await asyncio.wait_for(worker.run(), 20)
        assert done == ["short", "long"]


async def test_a_store_that_is_away_is_asked_ever_less_often_and_told_of_once() -> None:
    with Fickle() as store:
        crashed(store, "r")
        store.away = True
        done, told = list[str](), list[str | None]()
        worker = Worker(store, finishing(store, done), interval=1, problem=told.append)

        def on_wait(number: int) -> None:
            if number == 9:
                store.away = False
            if done:
                worker.stop()

        store.on_wait = on_wait
        await asyncio.wait_for(worker.run(), 20)
        assert told == ["the database is away", None]
        for number, expected in enumerate((1, 2, 4, 8, 16, 32, 60, 60)):
            assert 0.75 * expected <= store.waited[number] <= expected


async def test_a_run_that_cannot_be_resumed_is_left_alone_for_ever_longer() -> None:
    now = [0.0]
    with Fickle() as store:
        crashed(store, "bad")
        tries: list[float] = []

        async def resume(run: RunRecord) -> str:
            tries.append(now[0])
            raise ResumeError("bad", "no")

        worker = Worker(store, resume, interval=10, clock=lambda: now[0])

        def on_wait(number: int) -> None:
            # Time stands still while the run is tried, however long its threads take: only waiting takes time.
            if not worker.active:
                now[0] += 1.0
            if now[0] > 1500:
                worker.stop()

        store.on_wait = on_wait
        await asyncio.wait_for(worker.run(), 50)
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        # A wait under way when the run is taken up may be one second more, at its start and at its end.
        for gap, expected in zip(gaps, (10, 20, 40, 80, 160, 300, 300, 300), strict=False):
            assert expected <= gap <= expected + 3
        assert len(gaps) >= 7


@pytest.mark.parametrize("after", [RunState.FAILED, RunState.CRASHED, None])
async def test_a_run_that_ends_as_it_was_found_is_not_taken_up_again_at_once(after: RunState | None) -> None:
    now = [0.0]
    with Fickle() as store:
        crashed(store, "bad")
        tries: list[float] = []

        async def resume(run: RunRecord) -> str:
            """It seems to go well; of ``None`` not even the claim is made."""
            tries.append(now[0])
            if after is RunState.CRASHED:
                store.claim_run(run.run_id, "me", 0)
            elif after is RunState.FAILED:
                claimed = store.claim_run(run.run_id, "me", 60)
                last = commit(claimed.sequence + 1, run.run_id, claimed.token, state=after, error="no", release=True)
                accept(store, last)
            return "done"

        worker = Worker(store, resume, interval=10, failed=True, clock=lambda: now[0])

        def on_wait(number: int) -> None:
            if not worker.active:
                now[0] += 1.0
            if now[0] > 200:
                worker.stop()

        store.on_wait = on_wait
        await asyncio.wait_for(worker.run(), 50)
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        for gap, expected in zip(gaps, (10, 20, 40, 80), strict=False):
            assert expected <= gap <= expected + 3
        assert len(gaps) == 4


async def test_a_long_backlog_is_not_looked_through_for_each_run_of_it() -> None:
    now, looks = [0.0], 0

    class Slow(Fickle):
        def list_runs(self, *arguments: Any, **named: Any) -> list[RunRecord]:
            nonlocal looks
            if RunState.CRASHED in arguments[0]:
                looks += 1
                now[0] += 1.0
            return super().list_runs(*arguments, **named)

    with Slow() as store:
        for number in range(200):
            crashed(store, f"r{number:03}")
        done: list[str] = []
        finish = finishing(store, done)

        async def resume(run: RunRecord) -> str:
            now[0] += 0.1
            return await finish(run)

        worker = Worker(store, resume, concurrency=4, interval=5, clock=lambda: now[0])
        store.on_wait = lambda number: worker.stop() if len(done) == 200 else None
        await asyncio.wait_for(worker.run(), 50)
        assert sorted(done) == [f"r{number:03}" for number in range(200)]
        # A look takes a second and a run a tenth of one; all 200 runs take 20 seconds.
        assert looks <= 5


async def test_a_worker_says_a_cancellation_on_to_its_runs() -> None:
    with Fickle() as store:
        crashed(store, "r")
        begun, heard = asyncio.Event(), list[tuple[Any, ...]]()

        async def resume(run: RunRecord) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                heard.append(error.args)
                raise

        task = asyncio.create_task(Worker(store, resume).run())
        await begun.wait()
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert heard == [("why",)]


async def test_a_worker_with_nothing_to_do_asks_a_handful_of_queries(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among runs that are over, paused for people, and running elsewhere."""

    class Quiet(SQLiteStorage):
        def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
            looks.append(len(statements))
            if len(looks) == 10:
                worker.stop()
            return False

    statements, looks = list[str](), list[int]()
    with Quiet(tmp_path / "runs.db") as store:
        for number in range(20):
            ended(store, f"over-{number}", RunState.COMPLETED)
            ended(store, f"asks-{number}", RunState.PAUSED)
        worker = Worker(store, finishing(store, []))
        store._db.set_trace_callback(statements.append)
        await asyncio.wait_for(worker.run(), 20)
    a_look = len(statements) / len(looks)
    with capsys.disabled():
        print(f"\nan idle worker: {a_look:g} queries a look, {a_look * 12:g} a minute")
    assert all(each.lstrip().upper().startswith("SELECT") for each in statements), "and writes nothing"
    # Crashed runs, running ones whose process is gone, those that are due, and those with messages.
    assert a_look <= 4


async def test_many_workers_share_the_runs_and_none_is_taken_twice() -> None:
    with MemoryStorage() as store:
        crashed(store, *(f"r{number:02}" for number in range(40)))
        done: list[str] = []
        workers = [Worker(store, finishing(store, done), interval=0.01, rng=random.Random(seed)) for seed in range(4)]
        tasks = [asyncio.create_task(worker.run()) for worker in workers]
        while len(done) < 40:
            await asyncio.sleep(0.001)
        for worker in workers:
            worker.stop()
        await asyncio.gather(*tasks)
        assert sorted(done) == [f"r{number:02}" for number in range(40)]
