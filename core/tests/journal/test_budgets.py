"""Budgets of runs: looked at before each step and question, over restarts, with what unfinished steps have spent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.errors import BudgetExceeded
from framework.graph.budget import RunBudget
from framework.graph.executor import GraphExecutor
from framework.graph.node import LLMNode, NodeContext, NodeSpec
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
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
