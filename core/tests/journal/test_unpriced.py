"""``max_cost`` and a model without a price: the run stops asking it, in whatever process it goes on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from framework.graph.budget import RunBudget
from framework.graph.executor import ExecutionResult
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.plan import ExecutionStatus
from framework.llm import prices
from framework.llm.provider import LLMResponse
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import edge, graph_of
from tests.journal.journal_kit import Bench, Node
from tests.plans.parts_kit import House, plan_of

BUDGET = RunBudget(max_cost=0.01)


@pytest.fixture(autouse=True)
def no_prices() -> Iterator[None]:
    before = dict(prices._registered)
    yield
    prices._registered.clear()
    prices._registered.update(before)


class Mystery:
    """A provider of an own kind that says no price; ``dies`` makes an answer the last thing of its process."""

    model = "mystery"

    def __init__(self) -> None:
        self.asked = 0

    async def acomplete(self, messages: Any, **more: Any) -> LLMResponse:
        self.asked += 1
        return LLMResponse("said", "mystery", input_tokens=6, output_tokens=4)

    complete = acomplete


async def ask(ctx: NodeContext, what: object) -> str:
    return str((await ctx.llm.acomplete([{"role": "user", "content": str(what)}], max_tokens=4)).content)


async def six(ctx: NodeContext) -> int:
    for number in range(6):
        await ask(ctx, number)
    return 6


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_run_that_goes_on_asks_no_further_question(attempts: int) -> None:
    bench, llm = Bench(MemoryStorage()), Mystery()

    async def run(**more: Any) -> ExecutionResult:
        return await bench.run(six, llm=llm, attempts=attempts, **more)

    for _ in range(3):
        result = await run(budget=BUDGET)
        assert (result.error_type, llm.asked) == ("budget", 1)
        assert "'mystery'" in str(result.error)
    prices.register_price("mystery", input=1.0, output=1.0)
    result = await run()
    assert (result.error_type, llm.asked) == (None, 6), result.error
    assert result.total_cost == pytest.approx(5 * 10 / 1e6), "from then on its provider need not say what it cost"


@pytest.mark.parametrize("how", ["finished", "failed attempt"])
async def test_the_runs_records_tell_of_it_when_the_journal_is_gone(how: str) -> None:
    bench, llm, tries = Bench(MemoryStorage()), Mystery(), itertools.count()

    async def first(ctx: NodeContext) -> str:
        said = await ask(ctx, "first")
        if how == "failed attempt" and not next(tries):
            raise ValueError("once")
        return said

    async def second(ctx: NodeContext) -> str:
        if await ctx.ask("Go on?", bool):
            await ask(ctx, "second")
        return "said"

    a, b = NodeSpec(id="a", max_retries=1, output_keys=["value"]), NodeSpec(id="b", max_retries=1)
    graph = graph_of(a, b, edges=[edge("a", "b", "on_success")])

    async def run() -> ExecutionResult:
        return await bench.run(Node(first), Node(second), llm=llm, graph=graph, budget=BUDGET)

    result = await run()
    if how == "failed attempt":
        assert (result.success, llm.asked) == (False, 1)
        result = await run()
        assert (result.error_type, llm.asked) == ("budget", 1)
        return
    assert (result.paused_at, llm.asked) == ("b", 1), result.error
    question = next(each for each in bench.manager.journal("run") if each.kind == "ask")
    bench.manager.send("run", str(question.answers_to), True)
    for _ in range(2):
        result = await run()
        assert (result.error_type, llm.asked) == ("budget", 1), result.error


async def test_a_branch_that_is_not_replayed_yet_asks_nothing_either() -> None:
    """The journal of the other branch tells of the model before that goes on."""
    bench, llm, asked = Bench(MemoryStorage()), Mystery(), asyncio.Event()
    stops = True

    async def one(ctx: NodeContext) -> str:
        if not stops:
            await asyncio.sleep(0.01)
        said = await ask(ctx, "one")
        if stops:
            asked.set()
            await asyncio.Event().wait()
        return said

    async def other(ctx: NodeContext) -> str:
        await (asked.wait() if stops else asyncio.sleep(0))
        if stops:
            await asyncio.Event().wait()
        return await ask(ctx, "other")

    async def top(ctx: NodeContext) -> str:
        return "on"

    nodes = [NodeSpec(id=name, max_retries=1, fan_out=name == "a", output_keys=[f"{name}_y"]) for name in "abc"]
    graph = graph_of(*nodes, edges=[edge("a", "b"), edge("a", "c")])

    def run() -> Any:
        return bench.run(Node(top), Node(one), Node(other), llm=llm, graph=graph, budget=BUDGET)

    task = asyncio.create_task(run())
    await asyncio.wait_for(asked.wait(), 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    stops = False
    result = await run()
    assert (result.error_type, llm.asked) == ("budget", 1), result.error


async def test_a_plan_hears_of_it_from_a_part_and_keeps_it() -> None:
    llm = Mystery()
    house = House(MemoryStorage(), llm=llm)

    async def one(ctx: NodeContext) -> str:
        return await ask(ctx, "one")

    async def waits(ctx: NodeContext) -> bool:
        return bool(await ctx.ask("Go on?", bool))

    house.graph("one", one)
    house.graph("waits", waits)
    house.graph("two", one)
    steps: list[dict[str, Any]] = [
        {"id": name, "action": {"action_type": "sub_graph", "graph_id": name}} for name in ("one", "waits", "two")
    ]
    for before, step in itertools.pairwise(steps):
        step["dependencies"] = [before["id"]]
    result = await house.run(plan_of(*steps), BUDGET)
    assert (result.status, llm.asked) == (ExecutionStatus.AWAITING_APPROVAL, 1), result
    [question] = house.manager.journal("r/waits#1")
    house.manager.send("r/waits#1", str(question.answers_to), True)
    result = await house.run()
    assert (result.error_type, llm.asked) == ("budget", 1), result
    assert result.completed_steps == ["one", "waits"]
