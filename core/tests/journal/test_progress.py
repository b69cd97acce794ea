"""A finished call is progress: a step of many calls may end its process once at each, but not at one for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.journal import CallSpec, request_hash
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.plan import ActionSpec, ActionType, ExecutionStatus, Judgment, JudgmentAction, PlanStep
from framework.storage.committer import committer_of
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from tests.graph.executor_kit import graph_of
from tests.journal.journal_kit import GOAL, Bench, Crash, Life, Node, Outside, Rows
from tests.plans.plan_kit import Places, plan

# --- which rows tell of progress ------------------------------------------------------------------------------------


async def lives(rows: Rows, body: Callable[[Life], Coroutine[Any, Any, Any]], *crash_at: int | None) -> list[int]:
    """How many writes of each process told of progress; each dies at so many calls that it really makes."""
    told = []
    for at in crash_at:
        outside, before = Outside(), rows.progress
        outside.crash_at = at
        try:
            await Life(rows, outside).run(body)
        except Crash:
            assert at is not None
        told.append(rows.progress - before)
    return told


async def test_each_outcome_that_no_process_before_had_is_progress() -> None:
    async def body(life: Life) -> None:
        for number in range(6):
            await life.call(f"call {number}", "ask" if number == 5 else "rerun")

    rows = Rows()
    assert await lives(rows, body, 3, 1, 1, 2, None) == [2, 0, 0, 1, 3]
    assert await lives(rows, body, None) == [0], "answers are none"


async def test_calls_that_are_made_anew_on_another_way_are_no_progress() -> None:
    """Each process asks something else before it dies, so it pays anew each time and gets no further."""
    turn = iter(range(100))

    async def body(life: Life) -> None:
        await life.call("first")
        await life.call(f"other {next(turn)}")
        await life.call("deadly")

    assert await lives(Rows(), body, 3, 2, 2, 2, 2) == [2, 0, 0, 0, 0]


async def test_a_longer_way_that_was_left_counts_as_long_as_it_was() -> None:
    way = iter(["a", "b", "a", "b", "b"])

    async def body(life: Life) -> None:
        await life.call("first")
        name = next(way)
        for number in range(3 if name == "a" else 2):
            await life.call(f"{name} {number}")
        await life.call("deadly")

    assert await lives(Rows(), body, 5, 3, 4, 3, None) == [4, 0, 0, 0, 0]


async def test_a_call_around_others_counts_with_those_inside_it() -> None:
    async def body(life: Life) -> None:
        async def around(key: str) -> str:
            return "".join([await life.call(f"inside {number}") for number in range(3)])

        await life.journal.call("around", request_hash("around", "what"), around, CallSpec())
        await life.call("last")
        await life.call("deadly")

    assert await lives(Rows(), body, 3, 2, 1, 2, None) == [2, 2, 0, 1, 1]


# --- runs -----------------------------------------------------------------------------------------------------------


@contextmanager
def vanished(store: Storage, *run_ids: str) -> Iterator[None]:
    """Leave runs as a process does that ends without a word: an owner that renews no more, and writes nothing."""
    for run_id in run_ids:
        token = found(store, run_id).token
        committer_of(store).heartbeat.drop(run_id, token)
        store.renew_lease(run_id, token, -1)
    with patch.object(store, "commit", lambda writes: [None] * len(writes)), patch.object(store, "release_lease"):
        yield


def found(store: Storage, run_id: str) -> RunRecord:
    record = store.find_run(run_id)
    assert record is not None
    return record


class Calls:
    """Calls of which one process makes no more than ``limit`` in all of its run; the next one hangs."""

    def __init__(self, limit: int = 0) -> None:
        self.made: list[int] = []
        self.limit = limit
        self.hangs = asyncio.Event()

    async def call(self, number: int) -> int:
        if number >= self.limit:
            self.hangs.set()
            await asyncio.Event().wait()
        self.made.append(number)
        return number

    async def body(self, ctx: NodeContext) -> list[int]:
        return [await ctx.call("call", self.call, number) for number in range(8)]

    async def die(self, work: Coroutine[Any, Any, Any], store: Storage, *run_ids: str) -> None:
        """``work`` is what a process does on these runs that ends once a call hangs."""
        self.hangs.clear()
        task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(self.hangs.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert not task.done(), task.result()
        with vanished(store, *run_ids):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_step_whose_process_dies_once_per_call_goes_on_to_its_end() -> None:
    bench, calls = Bench(MemoryStorage(), max_recovery_attempts=1), Calls()
    for limit in range(8):
        calls.limit = limit
        await calls.die(bench.run(calls.body), bench.storage, "run")
        assert found(bench.storage, "run").recovery_attempts == 0
    calls.limit = 8
    result = await bench.run(calls.body)
    assert (result.success, result.output["value"], calls.made) == (True, [*range(8)], [*range(8)])


async def test_a_step_whose_process_dies_at_the_same_call_is_given_up() -> None:
    bench, calls = Bench(MemoryStorage(), max_recovery_attempts=2), Calls(limit=3)
    for attempts in (0, 1, 2):
        await calls.die(bench.run(calls.body), bench.storage, "run")
        assert found(bench.storage, "run").recovery_attempts == attempts
    result = await bench.run(calls.body)
    assert (result.error_type, calls.made) == ("recovery", [0, 1, 2])
    assert "3 times in a row" in str(result.error)


class Judge(HybridJudge):
    """One of a program's own, which hangs."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    async def evaluate(self, *given: Any) -> Judgment:
        await self.calls.call(1)
        return Judgment(action=JudgmentAction.ACCEPT, reasoning="")


def executor_of(places: Places, calls: Calls, **settings: Any) -> FlexibleGraphExecutor:
    executor = places.process(**settings)
    executor.register_function("first", lambda: calls.call(0))
    executor.judge = Judge(calls)
    return executor


@pytest.mark.parametrize("gets_further", [True, False])
async def test_calls_of_a_plans_step_are_progress(gets_further: bool) -> None:
    places, calls = Places("memory://"), Calls()
    action = ActionSpec(action_type=ActionType.TOOL_USE, tool_name="first")
    work = plan(PlanStep(id="a", description="a", action=action))
    executor = executor_of(places, calls, max_recovery_attempts=1)
    for limit in (0, 1 if gets_further else 0):
        calls.limit = limit
        await calls.die(executor.execute_plan(work, GOAL, run_id="r"), places.store, "r")
    calls.limit = 2
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert result.status is (ExecutionStatus.COMPLETED if gets_further else ExecutionStatus.FAILED), result.error


@pytest.mark.parametrize("gets_further", [True, False])
async def test_calls_in_a_sub_graph_are_progress_of_the_plan_too(gets_further: bool) -> None:
    places, calls = Places("memory://"), Calls()
    work = plan(PlanStep(id="a", description="a", action=ActionSpec(action_type=ActionType.SUB_GRAPH, graph_id="g")))
    executor = places.process(max_recovery_attempts=1)
    child = GraphExecutor(
        executor.runtime, node_registry={"a": Node(calls.body)}, checkpoint_manager=CheckpointManager(places.store)
    )
    executor.register_graph("g", graph_of(NodeSpec(id="a")), GOAL, child)
    for limit in (0, 1 if gets_further else 0):
        calls.limit = limit
        await calls.die(executor.execute_plan(work, GOAL, run_id="r"), places.store, "r", "r/a#1")
    calls.limit = 8
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert result.status is (ExecutionStatus.COMPLETED if gets_further else ExecutionStatus.FAILED), result.error
