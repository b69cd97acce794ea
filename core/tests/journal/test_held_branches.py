"""A branch that sleeps, waits or asks goes on as soon as it can, also while other branches of the run still work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from framework.graph.cancelling import LET_GO
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.storage import heartbeat
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of
from tests.journal.journal_kit import Bench, question_of

Body = Callable[[NodeContext], Awaitable[None]]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are looked for often, so that no test waits a second for one."""
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)


class Does:
    """A node that is one async function and puts nothing out."""

    def __init__(self, body: Body) -> None:
        self.body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await self.body(ctx)
        return NodeResult(True)


async def nothing(ctx: NodeContext) -> None:
    return None


def branches(*heads: str, chain: tuple[str, ...] = ()) -> GraphSpec:
    """``a`` starts a branch at each of ``heads``; the last of these goes on along ``chain``; they meet in ``z``."""
    nodes = [NodeSpec(id="a", fan_out=True), NodeSpec(id="z")]
    nodes += [NodeSpec(id=each, max_retries=1) for each in (*heads, *chain)]
    last = (heads[-1], *chain)
    edges = [edge("a", each) for each in heads] + [edge(each, "z") for each in heads[:-1]]
    edges += [edge(one, other) for one, other in zip(last, (*chain, "z"), strict=True)]
    return graph_of(*nodes, edges=edges)


async def run(bench: Bench, graph: GraphSpec, **bodies: Body) -> ExecutionResult:
    nodes = {"a": Does(nothing), "z": Does(nothing), **{name: Does(body) for name, body in bodies.items()}}
    executor = GraphExecutor(MinimalRuntime(), node_registry=nodes, checkpoint_manager=bench.manager)
    return await executor.execute(graph, GOAL, {}, run_id="run")


async def until_held(bench: Bench, step: str) -> None:
    """Return once the store says that the run holds the step, whose name begins with so much."""
    while True:
        checkpoint = bench.storage.load_latest_checkpoint("run")
        held = checkpoint.position.get("waits", {}) if checkpoint is not None else {}
        if any(f":{step}#" in key for key in held):
            return
        await asyncio.sleep(0.001)


async def until_done(bench: Bench, node_id: str) -> None:
    """Return once the store says that the node's step is done."""
    while node_id not in (getattr(bench.storage.load_latest_checkpoint("run"), "execution_path", None) or ()):
        await asyncio.sleep(0.001)


def answers(bench: Bench) -> None:
    bench.manager.send("run", question_of(bench), True)


def settles(bench: Bench) -> None:
    [unknown] = [call for call in bench.manager.journal("run") if call.state == "unknown"]
    bench.manager.settle("run", unknown.id, done="it was sent")


def waits_of(way: str) -> tuple[Body, Callable[[Bench], object]]:
    """What the branch does, and what ends its wait."""
    tries: list[str] = []

    async def send() -> None:
        tries.append("x")
        raise TimeoutError("no answer in time")

    async def waits(ctx: NodeContext) -> None:
        match way:
            case "sleep":
                await ctx.sleep(0.05)
            case "signal":
                assert await ctx.wait_for("go") == 1
            case "timeout":
                with pytest.raises(TimeoutError):
                    await ctx.wait_for("go", timeout_seconds=0.05)
            case "answer":
                assert await ctx.ask("Go?", bool)
            case _:
                try:
                    assert await ctx.call("send", send, policy="ask") == "it was sent"
                except TimeoutError:
                    await ctx.call("send", send, policy="ask")  # which is not made: the first one is unknown
                assert tries == ["x"]

    ends: dict[str, Callable[[Bench], object]] = {
        "signal": lambda bench: bench.manager.send("run", "go", 1),
        "answer": answers,
        "settlement": settles,
    }
    return waits, ends.get(way, lambda bench: None)


@pytest.mark.parametrize("chain", [(), ("d", "e")], ids=["in one step", "in a chain of steps"])
@pytest.mark.parametrize("way", ["sleep", "timeout", "signal", "answer", "settlement"])
async def test_a_held_branch_goes_on_while_its_sibling_works(way: str, chain: tuple[str, ...]) -> None:
    """The sibling works until it has: in one step that began with it, or in a later one, which is then alone."""
    bench, gone_on = Bench(MemoryStorage(), sleep_in_process_seconds=0), asyncio.Event()
    waits, end = waits_of(way)

    async def held(ctx: NodeContext) -> None:
        await waits(ctx)
        gone_on.set()

    async def works(ctx: NodeContext) -> None:
        if way not in ("sleep", "timeout"):  # which may be over before anybody sees that they began
            await until_held(bench, "b")
        if chain and ctx.node_id != "e":
            return
        end(bench)
        await gone_on.wait()

    graph = branches("b", "c", chain=chain)
    bodies: dict[str, Body] = dict.fromkeys(("c", *chain), works)
    async with asyncio.timeout(20):
        result = await run(bench, graph, b=held, **bodies)
    assert (result.success, result.paused_at) == (True, None), result.error
    assert sorted(result.path) == sorted(["a", "b", "c", *chain, "z"])


async def test_a_value_that_another_process_sends_ends_the_wait(tmp_path: Path) -> None:
    """It comes through the store, here by a connection of its own."""
    url, gone_on = f"sqlite:///{tmp_path}/runs.db", asyncio.Event()

    async def waits(ctx: NodeContext) -> None:
        assert await ctx.wait_for("go") == "come"
        gone_on.set()

    with open_storage(url) as storage, open_storage(url) as other:
        bench = Bench(storage)

        async def works(ctx: NodeContext) -> None:
            await until_held(bench, "b")
            Bench(other).manager.send("run", "go", "come")
            await gone_on.wait()

        async with asyncio.timeout(20):
            result = await run(bench, branches("b", "c"), b=waits, c=works)
    assert (result.success, result.paused_at) == (True, None), result.error


async def test_a_branch_that_an_earlier_process_held_goes_on_while_its_sibling_works_in_this_one() -> None:
    bench, held, gone_on = Bench(MemoryStorage()), asyncio.Event(), asyncio.Event()

    async def waits(ctx: NodeContext) -> None:
        await ctx.wait_for("go")
        gone_on.set()

    async def works(ctx: NodeContext) -> None:
        await until_held(bench, "b")
        held.set()
        await gone_on.wait()

    graph = branches("b", "c")
    task = asyncio.create_task(run(bench, graph, b=waits, c=works))
    await held.wait()
    task.cancel(LET_GO)
    with pytest.raises(asyncio.CancelledError):
        await task
    again = asyncio.create_task(run(bench, graph, b=waits, c=works))
    while not bench.storage.find_run("run"):
        await asyncio.sleep(0)
    bench.manager.send("run", "go", 1)
    async with asyncio.timeout(20):
        result = await again
    assert (result.success, result.paused_at) == (True, None), result.error


async def test_a_message_ends_a_wait_while_the_process_stays_for_another_ones_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, gone_on = [1_000_000.0], asyncio.Event()
    monkeypatch.setattr(time, "time", lambda: now[0])
    bench = Bench(MemoryStorage(), sleep_in_process_seconds=3000)

    async def waits(ctx: NodeContext) -> None:
        await ctx.wait_for("go")
        gone_on.set()

    async def sleeps(ctx: NodeContext) -> None:
        await ctx.sleep(3001)

    async def works(ctx: NodeContext) -> None:
        await until_held(bench, "b")
        await until_held(bench, "c")
        now[0] += 10  # now the other branch is due so soon that the run need not pause for it

    graph = branches("b", "c", "d")
    task = asyncio.create_task(run(bench, graph, b=waits, c=sleeps, d=works))
    await until_done(bench, "d")
    bench.manager.send("run", "other", 1)  # which is nobody's
    bench.manager.send("run", "go", 1)
    async with asyncio.timeout(20):
        await gone_on.wait()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_run_does_not_pause_while_what_a_branch_waits_for_is_there() -> None:
    """The branch that waits last would end the run, in the commit that tells of its wait."""
    bench, done = Bench(MemoryStorage()), list[str]()

    async def waits(ctx: NodeContext) -> None:
        done.append(await ctx.wait_for("go"))

    async def asks(ctx: NodeContext) -> None:
        if not done:
            await until_held(bench, "b")
            bench.manager.send("run", "go", "gone")
        done.append(await ctx.ask("And?", str))

    graph = branches("b", "c")
    result = await run(bench, graph, b=waits, c=asks)
    assert (result.paused_at, done) == ("c", ["gone"])
    assert result.session_state["next_node"] == "c"
    bench.manager.send("run", question_of(bench), "answered")
    result = await run(bench, graph, b=waits, c=asks)
    assert (result.success, result.paused_at, done) == (True, None, ["gone", "answered"])
