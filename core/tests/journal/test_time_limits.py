"""The time limit of an attempt: what waits durably in the process takes nothing of it, work does.

The event loop's clock is set ahead here, so nothing takes long and nothing depends on how long it takes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.plan import ExecutionStatus, Plan
from framework.graph.time_limit import TimeLimit, waiting
from framework.runtime import Runtime
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import MinimalRuntime, edge, graph_of
from tests.journal.journal_kit import GOAL, Bench, Node, Quiet

Body = Callable[[NodeContext], Awaitable[Any]]
LIMITED = graph_of(NodeSpec(id="a", max_retries=1, timeout_seconds=50))


class Ahead:
    """The clock of the running event loop, to be set ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self.seconds)

    async def by(self, seconds: float) -> None:
        self.seconds += seconds
        for _ in range(3):  # what is due now is done
            await asyncio.sleep(0)


@pytest.fixture
async def ahead(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    return Ahead(monkeypatch)


async def until_still(limit: TimeLimit) -> None:
    """Return once the limit stands still."""
    for _ in range(10_000):
        before = limit.left()
        await asyncio.sleep(0.001)
        if limit.left() == before:
            return
    raise AssertionError("the limit does not stand still")


def limit_of(ctx: NodeContext) -> TimeLimit:
    assert ctx.journal is not None
    assert ctx.journal.limit is not None
    return ctx.journal.limit


async def run(body: Body, graph: GraphSpec = LIMITED, *, durable: bool = True) -> ExecutionResult:
    if durable:
        return await Bench(MemoryStorage(), sleep_in_process_seconds=10_000).run(body, graph=graph)
    return await GraphExecutor(MinimalRuntime(), node_registry={"a": Node(body)}).execute(graph, GOAL)


async def gives_up(ctx: NodeContext, seconds: float) -> None:
    with pytest.raises(TimeoutError, match="came in time"):
        await ctx.wait_for("go", timeout_seconds=seconds)


async def sleeps(ctx: NodeContext, seconds: float) -> None:
    await ctx.sleep(seconds)


@pytest.mark.parametrize("wait", [sleeps, gives_up])
async def test_a_wait_in_the_process_takes_nothing_of_the_limit(
    wait: Callable[[NodeContext, float], Coroutine[Any, Any, None]], ahead: Ahead
) -> None:
    async def body(ctx: NodeContext) -> str:
        task = asyncio.create_task(wait(ctx, 1000))
        await until_still(limit_of(ctx))
        await ahead.by(999)
        assert not task.done()
        await ahead.by(2)
        await task
        return "done"

    result = await run(body)
    assert result.success, result.error


async def test_without_checkpoints_a_sleep_takes_nothing_of_the_limit_either(ahead: Ahead) -> None:
    async def body(ctx: NodeContext) -> str:
        task = asyncio.create_task(ctx.sleep(1000))
        await asyncio.sleep(0)
        await ahead.by(999)
        assert not task.done()
        await ahead.by(2)
        await task
        return "done"

    result = await run(body, durable=False)
    assert result.success, result.error


@pytest.mark.parametrize(("more", "success"), [(24, True), (26, False)])
async def test_work_before_and_after_a_wait_takes_of_the_limit(more: float, success: bool, ahead: Ahead) -> None:
    async def body(ctx: NodeContext) -> str:
        await ahead.by(24)  # of 50; the rest is for a slow machine
        task = asyncio.create_task(ctx.sleep(1000))
        await until_still(limit_of(ctx))
        await ahead.by(1001)
        await task
        await ahead.by(more)
        return "done"

    result = await run(body, graph_of(NodeSpec(id="a", max_retries=1, timeout_seconds=50)))
    assert result.success is success, result.error
    assert success or "timed out after 50 s" in (result.error or "")


async def test_a_call_that_hangs_beside_a_task_that_sleeps_runs_into_the_limit(ahead: Ahead) -> None:
    begun = asyncio.Event()

    async def hangs() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def body(ctx: NodeContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.sleep(1000))
            await until_still(limit_of(ctx))
            group.create_task(ctx.call("hangs", hangs))
            await begun.wait()
            await ahead.by(51)

    result = await run(body)
    assert "timed out after 50 s" in (result.error or "")


async def test_the_limit_stands_still_again_when_the_calls_beside_a_wait_are_over(ahead: Ahead) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def works() -> str:
        begun.set()
        await go_on.wait()
        return "worked"

    async def body(ctx: NodeContext) -> str:
        limit = limit_of(ctx)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(ctx.sleep(seconds)) for seconds in (100, 1000)]
        await until_still(limit)
        tasks.append(asyncio.create_task(ctx.call("work", works)))
        await begun.wait()
        before = limit.left()
        assert before is not None
        await ahead.by(10)
        left = limit.left()
        assert left is not None
        assert left <= before - 10
        go_on.set()
        await tasks[2]
        await until_still(limit)
        await ahead.by(101)
        assert [task.done() for task in tasks] == [True, False, True]
        await until_still(limit)
        await ahead.by(1000)
        await asyncio.gather(*tasks)
        return "done"

    result = await run(body)
    assert result.success, result.error


async def test_a_wait_inside_a_call_is_no_work_of_that_call(ahead: Ahead) -> None:
    async def body(ctx: NodeContext) -> str:
        async def around() -> str:
            await ctx.sleep(1000)
            return "slept"

        task = asyncio.create_task(ctx.call("around", around))
        await until_still(limit_of(ctx))
        await ahead.by(1001)
        assert await task == "slept"
        return "done"

    result = await run(body)
    assert result.success, result.error


# --- limits around limits ---------------------------------------------------------------------------------------------


async def run_in_a_plan(graph: GraphSpec, **bodies: Any) -> ExecutionStatus:
    """A plan whose one step, with a limit of 50 s, runs the graph."""
    bench = Bench(MemoryStorage(), sleep_in_process_seconds=10_000)
    runtime = Runtime(MemoryStorage())
    inner = GraphExecutor(runtime, node_registry=bodies, checkpoint_manager=bench.manager)
    config = ExecutorConfig(timeout_seconds=50)
    executor = FlexibleGraphExecutor(runtime, config=config, checkpoint_manager=bench.manager, judge=HybridJudge())
    executor.register_graph("sub", graph, GOAL, inner)
    step = {"id": "s", "action": {"action_type": "sub_graph", "graph_id": "sub"}, "max_retries": 1}
    return (await executor.execute_plan(Plan.from_json({"steps": [step]}), GOAL, run_id="p")).status


def outer(ctx: NodeContext) -> TimeLimit:
    around = limit_of(ctx)._around
    assert around is not None
    return around


@pytest.mark.parametrize("seconds", [None, 50])
async def test_a_plans_step_waits_with_its_sub_graph(seconds: float | None, ahead: Ahead) -> None:
    async def body(ctx: NodeContext) -> str:
        task = asyncio.create_task(ctx.sleep(1000))
        await until_still(outer(ctx))
        await ahead.by(1001)
        await task
        return "done"

    graph = graph_of(NodeSpec(id="a", max_retries=1, timeout_seconds=seconds))
    assert await run_in_a_plan(graph, a=Node(body)) is ExecutionStatus.COMPLETED


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_plans_step_works_while_one_branch_of_its_sub_graph_does(hangs: bool, ahead: Ahead) -> None:
    asleep = asyncio.Event()

    class Sleeps:
        async def execute(self, ctx: NodeContext) -> Any:
            task = asyncio.create_task(ctx.sleep(1000))
            while not limit_of(ctx)._still:
                await asyncio.sleep(0.001)
            asleep.set()
            await task
            return await Quiet().execute(ctx)

    class Works:
        async def execute(self, ctx: NodeContext) -> Any:
            await asleep.wait()
            if hangs:
                await ahead.by(51)
                await asyncio.Event().wait()
            else:  # when it has ended the step only waits
                asyncio.get_running_loop().create_task(self.later(outer(ctx)))
            return await Quiet().execute(ctx)

        async def later(self, limit: TimeLimit) -> None:
            await until_still(limit)
            await ahead.by(1001)

    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        NodeSpec(id="b", max_retries=1),
        NodeSpec(id="c", max_retries=1),
        NodeSpec(id="d"),
        edges=[edge("a", "b"), edge("a", "c"), edge("b", "d"), edge("c", "d")],
    )
    status = await run_in_a_plan(graph, a=Quiet(), b=Sleeps(), c=Works(), d=Quiet())
    assert (status is ExecutionStatus.COMPLETED) is not hangs


# --- by itself --------------------------------------------------------------------------------------------------------


async def test_a_wait_in_another_thread_counts(ahead: Ahead) -> None:
    leave = threading.Event()

    def waits() -> None:
        with waiting():
            leave.wait(20)

    async with TimeLimit(50) as limit:
        task = asyncio.create_task(asyncio.to_thread(waits))
        await until_still(limit)
        await ahead.by(1000)
        leave.set()
        await task
    assert not limit.expired()


async def test_a_limit_that_is_over_takes_no_notice_of_waits(ahead: Ahead) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def waits() -> None:
        with waiting():
            entered.set()
            await leave.wait()

    async with TimeLimit(50) as limit:
        task = asyncio.create_task(waits())
        await entered.wait()
    left = limit.left()
    assert left is not None
    leave.set()
    await task
    with pytest.raises(TimeoutError):
        async with TimeLimit(50) as limit:
            await ahead.by(51)
    assert (limit.expired(), limit.left()) == (True, 0)
    with waiting(limit):
        pass


def test_a_coroutine_that_waits_may_be_closed_after_its_loop() -> None:
    async def waits() -> None:
        async with TimeLimit(50), TimeLimit(40):
            with waiting():
                await asyncio.Event().wait()

    async def begin() -> None:
        waiter.send(None)

    waiter, loop = waits(), asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    waiter.close()


async def test_without_a_limit_nothing_is_kept(ahead: Ahead) -> None:
    seen = []

    async def body(ctx: NodeContext) -> None:
        assert ctx.journal is not None
        seen.append(ctx.journal.limit)
        await ctx.sleep(0)

    assert (await run(body, graph_of(NodeSpec(id="a")))).success
    assert seen == [None]
    async with TimeLimit(None) as limit:
        assert limit.left() is None
        with waiting():
            await ahead.by(1000)
            assert limit.left() is None
