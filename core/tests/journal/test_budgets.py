"""Budgets of runs: looked at before each step and question, over restarts, with what unfinished steps have spent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from framework.errors import BudgetExceeded, CostUnknown
from framework.graph.budget import BudgetGate, Room, RunBudget
from framework.graph.executor import GraphExecutor
from framework.graph.node import LLMNode, NodeContext, NodeResult, NodeSpec
from framework.graph.spending import NOTHING, Spent
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of
from tests.journal.journal_kit import Bench, Node

LOOK = Tool("look", "Looks.", {"properties": {}})


def reply(content: str = "x") -> LLMResponse:
    return LLMResponse(content, "m", 6, 4, "end_turn", cost=0.5)


async def ask_three(ctx: NodeContext) -> int:
    """A node of one's own that reports no tokens."""
    for number in range(3):
        await ctx.llm.acomplete(messages=[{"role": "user", "content": f"{ctx.node_id} {number}"}])
    return 3


def test_limits_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        RunBudget(max_tokens=-1)
    with pytest.raises(ValueError, match="max_cost"):
        RunBudget(max_cost=float("nan"))
    RunBudget().check("run", 10**9, 1e9)


@pytest.mark.parametrize(("budget", "asked"), [(RunBudget(max_tokens=40), 4), (RunBudget(max_cost=2.5), 5)])
async def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(budget: RunBudget, asked: int) -> None:
    llm = ScriptedLLM(lambda *given: reply())
    bench = Bench(MemoryStorage())
    result = await bench.run(ask_three, ask_three, llm=llm, budget=budget, attempts=3)
    assert (result.success, result.error_type) == (False, "budget")
    assert "RunBudget" in (result.error or "")
    assert llm.calls == asked
    assert result.total_tokens == 10 * asked
    record = bench.storage.find_run("run")
    assert record is not None
    assert record.state is RunState.FAILED
    # The budget is the run's own: without another one it goes no further.
    result = await bench.run(ask_three, ask_three, llm=llm, attempts=3)
    assert (result.error_type, llm.calls, result.total_tokens) == ("budget", asked, 10 * asked)
    result = await bench.run(ask_three, ask_three, llm=llm, budget=RunBudget(max_tokens=1000))
    assert result.success, result.error
    assert llm.calls == 6, "what was asked before is answered from the journal"
    assert result.total_tokens == 60
    assert result.total_cost == pytest.approx(3.0)


async def test_the_last_budget_given_counts_over_restarts() -> None:
    llm = ScriptedLLM(lambda *given: reply())
    bench = Bench(MemoryStorage())
    await bench.run(ask_three, ask_three, llm=llm, budget=RunBudget(max_tokens=20))
    await bench.run(ask_three, ask_three, llm=llm, budget=RunBudget(max_tokens=40))
    assert llm.calls == 4
    result = await bench.run(ask_three, ask_three, llm=llm)
    assert "max_tokens=40" in (result.error or "")


async def test_a_journal_that_is_kept_is_not_counted_again() -> None:
    llm = ScriptedLLM(lambda *given: reply())
    bench = Bench(MemoryStorage(), keep_journal=True)
    failures = [RuntimeError("no good")]

    async def second(ctx: NodeContext) -> int:
        if failures:
            raise failures.pop()
        return await ask_three(ctx)

    result = await bench.run(ask_three, second, llm=llm, budget=RunBudget(max_tokens=55))
    assert result.total_tokens == 30
    result = await bench.run(ask_three, second, llm=llm)
    assert (result.success, result.total_tokens) == (True, 60), result.error


async def test_questions_of_a_step_that_was_cut_off_count() -> None:
    llm = ScriptedLLM(lambda *given: reply())
    stop = [True]

    async def body(ctx: NodeContext) -> int:
        await ask_three(ctx)
        if stop.pop():
            raise asyncio.CancelledError
        return 0

    bench = Bench(MemoryStorage())
    budget = RunBudget(max_tokens=30)
    await bench.cancelled(body, llm=llm, budget=budget)
    result = await bench.run(body, llm=llm)
    assert (result.error_type, result.steps_executed, llm.calls) == ("budget", 0, 3), "looked at before the step"


async def test_a_failure_edge_does_not_catch_a_used_up_budget() -> None:
    llm = ScriptedLLM(lambda *given: reply())
    graph = graph_of(NodeSpec(id="a", max_retries=2), "b", edges=[edge("a", "b", "on_failure")])
    bench = Bench(MemoryStorage())

    async def handler(ctx: NodeContext) -> str:
        raise AssertionError("never")

    result = await bench.run(ask_three, handler, llm=llm, graph=graph, budget=RunBudget(max_tokens=15))
    assert (result.error_type, llm.calls, result.path) == ("budget", 2, ["a"])
    result = await bench.run(ask_three, handler, llm=llm, graph=graph, budget=RunBudget(max_tokens=100))
    assert (result.success, llm.calls, result.total_tokens) == (True, 3, 30), result.error


async def test_each_turn_of_a_conversation_with_tools_is_looked_at() -> None:
    def script(messages: Any, system: Any, tools: Any) -> Any:
        return reply() if len(messages) > 8 else ToolUse(str(len(messages)), "look", {})

    llm = ScriptedLLM(script)
    node = LLMNode(lambda use: ToolResult(use.id, "seen"))
    graph = graph_of(NodeSpec(id="a", tools=["look"], output_keys=["value"]))
    bench = Bench(MemoryStorage())
    result = await bench.run(node, llm=llm, tools=[LOOK], graph=graph, budget=RunBudget(max_tokens=1))
    assert (result.error_type, llm.calls) == ("budget", 1)


async def test_a_budget_counts_without_a_manager_too() -> None:
    llm = ScriptedLLM(lambda *given: reply())
    executor = GraphExecutor(MinimalRuntime(), llm, node_registry={"a": Node(ask_three)})
    graph = graph_of(NodeSpec(id="a", max_retries=1))
    result = await executor.execute(graph, GOAL, {}, budget=RunBudget(max_tokens=15))
    assert (result.error_type, llm.calls, result.total_tokens) == ("budget", 2, 20)


async def test_a_nodes_own_handling_of_exceptions_does_not_hide_the_next_check() -> None:
    llm = ScriptedLLM(lambda *given: reply())

    async def careless(ctx: NodeContext) -> str:
        for number in range(5):
            try:
                await ctx.llm.acomplete(messages=[{"role": "user", "content": str(number)}])
            except BudgetExceeded:
                return "stopped"
        return "all"

    result = await Bench(MemoryStorage()).run(careless, ask_three, llm=llm, budget=RunBudget(max_tokens=25))
    assert (result.output["value"], result.error_type, llm.calls) == ("stopped", "budget", 3)


# --- questions at the same time -------------------------------------------------------------------------------------


class Crowd(ScriptedLLM):
    """A model that takes its time, and knows how many ask it at once."""

    def __init__(self, cost: float | None = 0.5, tokens: int = 10) -> None:
        super().__init__(lambda *given: LLMResponse("x", "m", tokens - 4, 4, "end_turn", cost=cost))
        self.inside = self.most = 0

    async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
        self.inside += 1
        self.most = max(self.most, self.inside)
        for _ in range(5):
            await asyncio.sleep(0)
        self.inside -= 1
        return await super().acomplete(*args, **keywords)


def gathered(number: int, **wishes: Any) -> Any:
    async def body(ctx: NodeContext) -> int:
        messages = [[{"role": "user", "content": f"{each}"}] for each in range(number)]
        await asyncio.gather(*(ctx.llm.acomplete(messages=each, **wishes) for each in messages))
        return number

    return body


@pytest.mark.parametrize("budget", [RunBudget(max_tokens=95), RunBudget(max_cost=4.75)], ids=["tokens", "cost"])
async def test_questions_at_once_go_over_a_budget_by_one_at_most(budget: RunBudget) -> None:
    llm = Crowd()
    bench = Bench(MemoryStorage())
    result = await bench.run(gathered(50), llm=llm, budget=budget)
    assert (result.success, result.error_type) == (False, "budget")
    assert (llm.calls, result.total_tokens) == (10, 100), "9.5 questions fit"
    assert llm.most > 3, "those that fit go out at the same time"
    result = await bench.run(gathered(50), llm=llm, budget=RunBudget(max_tokens=500))
    assert (result.success, llm.calls, result.total_tokens) == (True, 50, 500), result.error


async def test_what_a_question_may_take_at_most_is_what_counts_where_it_says_so() -> None:
    llm = Crowd()
    bench = Bench(MemoryStorage())
    result = await bench.run(gathered(6, max_tokens=400), llm=llm, budget=RunBudget(max_tokens=1000))
    assert (result.success, llm.calls) == (True, 6), result.error
    assert llm.most == 2, "two of 400 tokens and their questions fit into 1000"


async def test_a_budget_that_holds_them_all_keeps_nobody_waiting() -> None:
    llm = Crowd()
    result = await Bench(MemoryStorage()).run(gathered(20), llm=llm, budget=RunBudget(max_tokens=10**6))
    assert result.success, result.error
    assert llm.most == 19, "all but the first, which tells what one takes"
    alone = Crowd()
    await Bench(MemoryStorage()).run(gathered(20), llm=alone)
    assert alone.most == 20


async def test_branches_share_the_budget() -> None:
    llm = Crowd()
    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        *(NodeSpec(id=each, max_retries=1, output_keys=[each]) for each in "bcd"),
        edges=[edge("a", each) for each in "bcd"],
    )

    async def start(ctx: NodeContext) -> None:
        return None

    bodies = [gathered(10) for _ in "bcd"]
    result = await Bench(MemoryStorage()).run(start, *bodies, llm=llm, graph=graph, budget=RunBudget(max_tokens=75))
    assert (result.error_type, llm.calls) == ("budget", 8)


class Held(MemoryStorage):
    """A store in which the commit of the step of node "b" lasts until a model was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.committing, self.asked = threading.Event(), threading.Event()

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        if any(isinstance(each, Commit) and each.record.startswith(b'["b",') for each in commits):
            self.committing.set()
            self.asked.wait(10)
        return super().commit(commits)


class Silent:
    """A node that is one async function and puts nothing out."""

    def __init__(self, body: Callable[[NodeContext], Awaitable[Any]]) -> None:
        self.body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await self.body(ctx)
        return NodeResult(True)


async def test_a_step_that_is_being_committed_counts_once() -> None:
    store = Held()

    class Model(Crowd):
        async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
            if store.committing.is_set():
                store.asked.set()
            return await super().acomplete(*args, **keywords)

    async def start(ctx: NodeContext) -> None:
        return None

    async def later(ctx: NodeContext) -> None:
        await asyncio.to_thread(store.committing.wait, 10)
        await gathered(1)(ctx)

    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        *(NodeSpec(id=each, max_retries=1) for each in "bc"),
        edges=[edge("a", each) for each in "bc"],
    )
    llm = Model()
    bodies = [Silent(start), Silent(gathered(1)), Silent(later)]
    result = await Bench(store).run(*bodies, llm=llm, graph=graph, budget=RunBudget(max_tokens=20))
    assert store.asked.is_set()
    assert (result.success, llm.calls, result.total_tokens) == (True, 2, 20), result.error


async def test_what_else_is_in_flight_when_the_budget_is_used_up_is_recorded() -> None:
    llm = Crowd()
    made: list[int] = []

    async def work(number: int) -> int:
        made.append(number)
        for _ in range(300):
            await asyncio.sleep(0)
        return number

    async def body(ctx: NodeContext) -> Any:
        return await asyncio.gather(ctx.call("work", work, 1, policy="ask"), gathered(5)(ctx))

    bench = Bench(MemoryStorage())
    result = await bench.run(body, llm=llm, budget=RunBudget(max_tokens=25))
    assert (result.error_type, llm.calls) == ("budget", 3)
    result = await bench.run(body, llm=llm, budget=RunBudget(max_tokens=1000))
    assert (result.success, result.paused_at, made, llm.calls) == (True, None, [1], 5), result.error


async def test_a_task_that_waits_for_room_can_be_cancelled() -> None:
    llm = Crowd()

    async def body(ctx: NodeContext) -> str:
        async def asks(content: str) -> None:
            await ctx.llm.acomplete(messages=[{"role": "user", "content": content}])

        first = asyncio.create_task(asks("first"))
        second = asyncio.create_task(asks("second"))
        while not llm.inside:
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await second
        assert llm.inside == 1, "the first one is still being asked"
        await first
        return "done"

    result = await Bench(MemoryStorage()).run(body, llm=llm, budget=RunBudget(max_tokens=1000))
    assert (result.success, llm.calls) == (True, 1), result.error


def test_a_conversation_in_flight_does_not_wait_for_itself() -> None:
    """Of a provider that does not give one turn at a time the conversation is one question; its tools may ask too."""
    gate = BudgetGate("run", RunBudget(max_tokens=100), lambda: NOTHING)
    over = _out(gate, inside=False)
    assert not isinstance(over, Room)
    inner = _out(gate, inside=True)
    assert not isinstance(inner, Room)
    assert isinstance(_out(gate, inside=False), Room)


def _out(gate: BudgetGate, *, inside: bool) -> Callable[[], None] | Future[None]:
    """What a question is let out with, or what it waits for."""
    work: Generator[Future[None], None, Callable[[], None]] = gate.enter(3, None, inside)
    try:
        return next(work)
    except StopIteration as done:
        over: Callable[[], None] = done.value
        return over


async def test_blocking_code_in_the_event_loop_is_told_that_it_cannot_wait() -> None:
    llm = Crowd()

    async def body(ctx: NodeContext) -> str:
        task = asyncio.create_task(ctx.llm.acomplete(messages=[{"role": "user", "content": "first"}]))
        while not llm.inside:
            await asyncio.sleep(0)
        with pytest.raises(BudgetExceeded, match="acomplete"):
            ctx.llm.complete(messages=[{"role": "user", "content": "second"}])
        await task
        ctx.llm.complete(messages=[{"role": "user", "content": "second"}])
        return "done"

    result = await Bench(MemoryStorage()).run(body, llm=llm, budget=RunBudget(max_tokens=1000))
    assert (result.success, llm.calls) == (True, 2), result.error


async def test_a_model_without_a_price_is_asked_no_more_under_a_budget_of_money() -> None:
    llm = Crowd(cost=None)
    bench = Bench(MemoryStorage())
    result = await bench.run(ask_three, llm=llm, budget=RunBudget(max_cost=5))
    assert (result.success, result.error_type, llm.calls) == (False, "budget", 1)
    assert "what model 'm' costs is not known" in (result.error or "")
    assert any("max_cost cannot be kept" in text for _, text in bench.runtime.problems)
    result = await bench.run(ask_three, llm=llm, budget=RunBudget(max_tokens=1000))
    assert (result.success, llm.calls) == (True, 3), result.error
    assert issubclass(CostUnknown, BudgetExceeded)


def test_estimates_follow_what_was_seen() -> None:
    gate = BudgetGate("run", RunBudget(max_tokens=100, max_cost=10), lambda: NOTHING)
    first = _out(gate, inside=False)
    assert isinstance(_out(gate, inside=False), Room), "nobody knows what the first one takes"
    gate.saw(Spent(30, 0, 10, 1.0), None)
    assert not isinstance(first, Future)
    first()
    for _ in range(3):
        assert not isinstance(_out(gate, inside=False), Room)
    assert isinstance(_out(gate, inside=False), Room), "a fourth of 30 would not fit into 100"
