"""What waits for a store is bounded over all runs: commits are held back before they are encoded, and none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from framework.errors import StorageError
from framework.graph.executor import ExecutionResult
from framework.graph.node import NodeContext
from framework.graph.plan import ExecutionStatus
from framework.schemas.run import RunState
from framework.storage import back_pressure as module
from framework.storage.back_pressure import BackPressure
from framework.storage.committer import Committer, committer_of
from framework.storage.contract import commit, journal, new_run
from framework.storage.memory import MemoryStorage
from framework.storage.records import Write
from framework.storage.sqlite import SQLiteStorage
from tests.plans.plan_kit import Places, chain
from tests.recovery.conftest import GOAL, Agent

SOON = 20.0
"""Seconds to wait for what happens at once; only what is broken makes a test take that long."""

RUNS = 20
VALUE = 10_000
MOST = 50_000
"""Bytes of the value that each run writes, and those that may wait in these tests."""


class Blocked(MemoryStorage):
    """A store whose commits wait until ``gate`` is set, and fail when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.fail: Exception | None = None

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        assert self.gate.wait(SOON)
        if self.fail is not None:
            raise self.fail
        return super().commit(commits)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", MOST)
    with Blocked() as store:
        yield store


def pressure(store: MemoryStorage) -> BackPressure:
    return committer_of(store).back_pressure


def left_waiting(store: MemoryStorage) -> int:
    """Bytes that are counted once all that was handed over is done: who waits for it is told before."""
    committer_of(store).call(lambda storage: None).result(SOON)
    return pressure(store)._bytes


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not true():
            await asyncio.sleep(0)


async def in_line(held: BackPressure, number: int) -> None:
    await until(lambda: len(held._line) == number)


# --- the line -------------------------------------------------------------------------------------------------------


async def arrive(held: BackPressure, name: int, went: list[int], adds: int = 0) -> None:
    await held.room()
    held.add(adds)
    went.append(name)


async def test_who_is_held_back_goes_on_in_order_once_half_is_free() -> None:
    held = BackPressure(100)
    went: list[int] = []
    held.add(99)
    await arrive(held, 99, went)
    assert went.pop() == 99
    held.add(1)
    tasks = [asyncio.create_task(arrive(held, name, went)) for name in range(4)]
    await in_line(held, 4)
    held.remove(49)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert held.full
    assert went == []
    held.remove(1)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert went == [0, 2, 3], "one that was cancelled leaves no hole"


async def test_those_for_whom_there_is_no_room_any_more_keep_their_order() -> None:
    held = BackPressure(100)
    held.add(100)
    went: list[int] = []
    tasks = [asyncio.create_task(arrive(held, name, went, adds=60)) for name in range(5)]
    await in_line(held, 5)
    held.remove(100)
    await in_line(held, 3)
    assert went == [0, 1]
    held.remove(120)
    await in_line(held, 1)
    assert went == [0, 1, 2, 3]
    held.remove(120)
    await asyncio.gather(*tasks)
    assert went == [0, 1, 2, 3, 4]


async def test_one_that_is_larger_than_the_bound_goes_and_the_others_wait_for_it() -> None:
    held = BackPressure(100)
    went: list[int] = []
    await arrive(held, 0, went, adds=1_000)
    task = asyncio.create_task(arrive(held, 1, went))
    await in_line(held, 1)
    held.remove(1_000)
    await task
    assert went == [0, 1]


async def test_loops_of_other_threads_are_woken_and_closed_ones_hold_up_nobody() -> None:
    held = BackPressure(100)
    held.add(100)
    went: list[int] = []
    gone = asyncio.new_event_loop()
    held._line.append((gone, gone.create_future()))
    gone.close()
    other = asyncio.create_task(asyncio.to_thread(asyncio.run, arrive(held, 1, went)))
    await in_line(held, 2)
    mine = asyncio.create_task(arrive(held, 2, went))
    await in_line(held, 3)
    held.remove(100)
    await asyncio.gather(other, mine)
    assert sorted(went) == [1, 2]


# --- what the committer counts --------------------------------------------------------------------------------------


def test_whatever_waits_is_counted_until_it_is_done(store: Blocked) -> None:
    committer = committer_of(store)
    store.open_run(new_run(), "me", 60)
    first = commit(1, token=1)
    small = len(first.record) + len(first.checkpoint or b"")
    futures: list[Future[Any]] = [
        committer.commit(first),
        committer.journal(journal(("s", 1, b"12345"), token=1)),
        committer.call(lambda storage: None, size=1_000),
    ]
    cancelled = committer.journal(journal(("s", 2, b"1" * 100), token=1))
    assert committer.back_pressure._bytes == small + 5 + 1_000 + 100
    assert cancelled.cancel()
    store.gate.set()
    for future in futures:
        future.result(SOON)
    assert left_waiting(store) == 0


def test_a_lone_run_s_commit_is_not_even_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        store.open_run(new_run(), "me", 60)
        monkeypatch.delattr(BackPressure, "add")
        ticket = committer_of(store).hand_over(commit(1, token=1), alone=True)
        assert ticket.done()
        assert ticket.exception() is None


async def test_a_thread_that_ends_in_the_middle_lets_everybody_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(self: Committer, storage: object, work: object) -> None:
        raise SystemExit

    with MemoryStorage() as store:
        held = pressure(store)
        held.add(module.MAX_WAITING_BYTES)
        task = asyncio.create_task(held.room())
        await in_line(held, 1)
        ended = threading.Event()
        monkeypatch.setattr(threading, "excepthook", lambda given: ended.set())
        monkeypatch.setattr(Committer, "_do", end)
        committer_of(store).call(lambda storage: None)
        await asyncio.wait_for(task, SOON)
        assert await asyncio.to_thread(ended.wait, SOON)


# --- runs -----------------------------------------------------------------------------------------------------------


class Many:
    """Runs that all come to the end of their first step at the same moment, each with a value of its own."""

    def __init__(self, store: Blocked) -> None:
        self.agent = Agent(store)
        self.agent.config = {"lease_seconds": 60}
        self.agent.node("first", self._work)
        self.agent.node("second")
        self.agent.chain("first", "second")
        self.store = store
        self.begun = 0
        self._all = asyncio.Event()

    async def _work(self, ctx: NodeContext) -> dict[str, Any]:
        self.begun += 1
        if self.begun == RUNS:
            self._all.set()
        await self._all.wait()
        return {"value": f"{self.begun}" + "x" * VALUE}

    def start(self) -> list[asyncio.Task[ExecutionResult]]:
        executors = [self.agent.executor() for _ in range(RUNS)]
        return [
            asyncio.create_task(executor.execute(self.agent.graph, GOAL, {}, run_id=f"run-{number}"))
            for number, executor in enumerate(executors)
        ]


async def held_up(many: Many) -> list[asyncio.Task[ExecutionResult]]:
    """All runs, of which some wait for the store, and as few as the bound says; the others are held back."""
    held = pressure(many.store)
    tasks = many.start()
    await in_line(held, RUNS - MOST // VALUE)
    assert MOST <= held._bytes < MOST + 2 * VALUE
    return tasks


async def test_runs_are_held_back_together_and_all_complete(store: Blocked) -> None:
    many = Many(store)
    tasks = await held_up(many)
    store.gate.set()
    results = await asyncio.gather(*tasks)
    assert all(result.success for result in results)
    for number in range(RUNS):
        assert many.agent.record(f"run-{number}").state is RunState.COMPLETED
    assert left_waiting(store) == 0


async def test_runs_that_do_not_wait_for_their_commits_are_held_back_too(store: Blocked) -> None:
    """Each may be many commits ahead of the store: by itself, but not all of them together."""
    many = Many(store)
    many.agent.config = {"lease_seconds": 60, "durability": "async"}
    many.agent.edge("second", "first")
    many.agent.options = {"max_steps": 30}
    held = pressure(store)
    tasks = many.start()
    await in_line(held, RUNS)
    assert MOST <= held._bytes < MOST + 2 * VALUE
    store.gate.set()
    assert {result.steps_executed for result in await asyncio.gather(*tasks)} == {30}


async def test_a_run_that_is_cancelled_while_it_is_held_back_keeps_its_step(store: Blocked) -> None:
    many = Many(store)
    tasks = await held_up(many)
    held, last = pressure(store), RUNS - 2  # the last to begin was the first to go on
    before = held._bytes
    tasks[last].cancel()
    await until(lambda: held._bytes > before)
    assert not tasks[last].done(), "its commit is handed over, and waits for the store as any"
    store.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, asyncio.CancelledError)] == [last]
    result = await many.agent.run(run_id=f"run-{last}")
    assert result.success
    assert many.agent.ran == ["second#1"]


@pytest.mark.parametrize("how", ["an error", "closing"])
async def test_a_store_that_fails_or_closes_lets_everybody_go_on(how: str, store: Blocked) -> None:
    many = Many(store)
    tasks = await held_up(many)
    if how == "an error":
        store.fail = StorageError("disk full")
    else:
        store.close()
    store.gate.set()
    async with asyncio.timeout(SOON):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert not any(isinstance(outcome, ExecutionResult) and outcome.success for outcome in outcomes)
    assert left_waiting(store) == 0


async def test_a_run_begins_when_there_is_room(store: Blocked) -> None:
    store.gate.set()
    agent, held = Agent(store), pressure(store)
    agent.node("only")
    held.add(MOST)
    task = asyncio.create_task(agent.run())
    await in_line(held, 1)
    assert store.find_run("run-1") is None
    held.remove(MOST)
    assert (await task).success


async def test_a_step_of_a_plan_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", MOST)
    places = Places("memory://")
    executor = places.process()
    held = pressure(places.stores[0])  # type: ignore[arg-type]

    def work(x: Any = None) -> Any:
        if x == 3:
            held.add(MOST)
        return x

    executor.register_function("work", work)
    task = asyncio.create_task(executor.execute_plan(chain(), GOAL, run_id="r"))
    await in_line(held, 1)
    record = places.store.find_run("r")
    assert record is not None
    assert record.sequence == 2, "its third step is over, and not committed"
    held.remove(MOST)
    assert (await task).status is ExecutionStatus.COMPLETED
    places.store.close()
