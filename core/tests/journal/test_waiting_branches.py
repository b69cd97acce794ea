"""A run whose branches wait for different things: it is due at the earliest time, and only what is over goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest

from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.recovery import woken_runs
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import Message, RunRecord
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of
from tests.journal.journal_kit import Bench


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves, for the steps and for the store."""
    made = Clock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


class Body:
    """A node that is one async function and puts nothing out."""

    def __init__(self, body: Any) -> None:
        self.body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await self.body(ctx)
        return NodeResult(True)


def record_of(bench: Bench) -> RunRecord:
    record = bench.storage.find_run("run")
    assert record is not None
    return record


def branches(second: NodeSpec, *more: NodeSpec, **fields: Any) -> GraphSpec:
    """``a`` starts the branches ``b`` and ``second``, which meet in ``d``."""
    nodes = [NodeSpec(id="a", fan_out=True), NodeSpec(id="b", max_retries=1), second, NodeSpec(id="d"), *more]
    edges = [edge("a", "b"), edge("a", second.id), edge("b", "d"), edge(second.id, "d")]
    return graph_of(*nodes, edges=edges, **fields)


@pytest.fixture
def done() -> list[str]:
    return []


def nodes_of(done: list[str], seconds: float = 50) -> tuple[Body, Body]:
    async def note(ctx: NodeContext) -> None:
        done.append(ctx.node_id)

    async def sleeps(ctx: NodeContext) -> None:
        await ctx.sleep(seconds)
        done.append("slept")

    return Body(note), Body(sleeps)


@pytest.mark.parametrize("keys", [["answer"], []], ids=["an answer", "a word"])
async def test_a_sleeping_branch_is_due_while_another_waits_for_a_person(
    keys: list[str], clock: Clock, done: list[str]
) -> None:
    graph = branches(NodeSpec(id="ask", node_type="human_input", output_keys=keys))
    note, sleeps = nodes_of(done)
    bench = Bench(MemoryStorage())
    made: dict[str, Any] = {"a": note, "b": sleeps, "d": note}
    result = await _run(bench, made, graph)
    assert result.paused_at is not None
    assert record_of(bench).wake_at == clock.now + 50
    assert bench.storage.list_due(clock.now) == []
    clock.now += 60
    assert [run.run_id for run in bench.storage.list_due(clock.now)] == ["run"]
    result = await _run(bench, made, graph)
    assert (result.success, result.paused_at) == (True, "ask"), result.error
    assert done == ["a", "slept"], "nobody answered: the branch that asks waits on"
    record = record_of(bench)
    assert (record.state, record.wake_at) == (RunState.PAUSED, None)
    result = await _run(bench, made, graph, dict.fromkeys(keys, "yes"))
    assert (result.success, result.paused_at) == (True, None), result.error
    assert done == ["a", "slept", "d"]


async def test_a_person_may_answer_first_and_the_sleep_goes_on(clock: Clock, done: list[str]) -> None:
    graph = branches(NodeSpec(id="ask", node_type="human_input", output_keys=["answer"]))
    note, sleeps = nodes_of(done)
    bench = Bench(MemoryStorage())
    made: dict[str, Any] = {"a": note, "b": sleeps, "d": note}
    await _run(bench, made, graph)
    result = await _run(bench, made, graph, {"answer": "yes"})
    assert (result.success, result.paused_at) == (True, "b"), result.error
    assert record_of(bench).wake_at == 1_000_050.0
    clock.now += 60
    assert (await _run(bench, made, graph)).success
    assert done == ["a", "slept", "d"]


async def test_a_run_is_due_at_the_earliest_time_of_all_its_branches(clock: Clock, done: list[str]) -> None:
    async def waits(ctx: NodeContext) -> None:
        with pytest.raises(TimeoutError):
            await ctx.wait_for("go", timeout_seconds=80)
        done.append("gave up")

    graph = branches(NodeSpec(id="c", max_retries=1))
    note, sleeps = nodes_of(done)
    bench = Bench(MemoryStorage())
    made: dict[str, Any] = {"a": note, "b": sleeps, "c": Body(waits), "d": note}
    await _run(bench, made, graph)
    assert record_of(bench).wake_at == 1_000_050.0
    clock.now += 55
    assert (await _run(bench, made, graph)).paused_at == "c"
    assert (done, record_of(bench).wake_at) == (["a", "slept"], 1_000_080.0)
    clock.now += 30
    assert (await _run(bench, made, graph)).paused_at is None
    assert done == ["a", "slept", "gave up", "d"]


async def test_a_branch_that_stands_at_a_pause_node_is_not_woken_by_another_ones_sleep(
    clock: Clock, done: list[str]
) -> None:
    graph = branches(NodeSpec(id="c", max_retries=1), pause_nodes=["c"])
    note, sleeps = nodes_of(done)
    bench = Bench(MemoryStorage())
    made: dict[str, Any] = {"a": note, "b": sleeps, "c": note, "d": note}
    await _run(bench, made, graph)
    assert record_of(bench).wake_at == 1_000_050.0
    clock.now += 60
    result = await _run(bench, made, graph)
    assert (done, result.paused_at) == (["a", "c", "slept"], "c")
    assert (await _run(bench, made, graph)).paused_at is None
    assert done == ["a", "c", "slept", "d"]


async def _run(
    bench: Bench, nodes: dict[str, Any], graph: GraphSpec, input_data: dict[str, Any] | None = None
) -> ExecutionResult:
    executor = GraphExecutor(MinimalRuntime(), node_registry=nodes, checkpoint_manager=bench.manager)
    return await executor.execute(graph, GOAL, input_data or {}, run_id="run")


class Counted(MemoryStorage):
    """A store that counts whose messages are read."""

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[str] = []

    def read_messages(self, run_id: str, on_damage: Any = None) -> list[Message]:
        self.looked.append(run_id)
        return super().read_messages(run_id, on_damage)


async def test_a_look_for_runs_to_wake_costs_what_the_runs_with_messages_cost() -> None:
    store = Counted()
    bench = Bench(store)

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    for number in range(30):
        await bench.run(waits, run_id=f"run-{number:02}")
    bench.manager.send("run-07", "other", 1)
    bench.manager.send("run-23", "go", 1)
    store.looked.clear()
    assert [run.run_id for run in woken_runs(store)] == ["run-23"]
    assert sorted(store.looked) == ["run-07", "run-23"], "a run that only waits has no message of its own"


async def test_more_runs_with_messages_than_fit_in_a_page_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.graph.recovery._PAGE", 3)
    storage: Storage = MemoryStorage()
    bench = Bench(storage)

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    names = [f"run-{number}" for number in range(7)]
    for name in names:
        await bench.run(waits, run_id=name)
        bench.manager.send(name, "go", 1)
    assert sorted(run.run_id for run in woken_runs(storage)) == names
