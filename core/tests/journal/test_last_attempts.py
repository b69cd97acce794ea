"""A last attempt that ends with an effect unknown is not the step's end: no edge, judge or replan goes past it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from framework.errors import ResumeError
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult
from framework.graph.journal_rows import Policy
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.plan import ExecutionStatus, Judgment, JudgmentAction, PlanExecutionResult
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from tests.journal.journal_kit import Bench, Node
from tests.plans.parts_kit import GOAL, House, plan_of


class Till:
    """Takes the money each time, and answers from the second time on."""

    def __init__(self) -> None:
        self.paid: list[str] = []
        self.hangs = False

    async def pay(self) -> str:
        self.paid.append("pay")
        if len(self.paid) == 1:
            if self.hangs:
                await asyncio.Event().wait()
            raise TimeoutError("no reply in time")
        return f"receipt {len(self.paid)}"

    async def otherwise(self, ctx: NodeContext) -> str:
        self.paid.append("another way")
        return "paid another way"


def handled(attempts: int, timeout: float | None = None) -> GraphSpec:
    """``a``, and ``b`` when it fails."""
    a = NodeSpec(id="a", max_retries=attempts, retry_delay_seconds=0, timeout_seconds=timeout)
    edge = EdgeSpec(id="e", source="a", target="b", condition=EdgeCondition.ON_FAILURE)
    return GraphSpec(id="g", goal_id="goal", entry_node="a", nodes=[a, NodeSpec(id="b", max_retries=1)], edges=[edge])


def of_run(bench: Bench) -> tuple[RunState, list[tuple[str, str]]]:
    record = bench.storage.find_run("run")
    assert record is not None
    return record.state, [(call.id, call.state) for call in bench.manager.journal("run")]


@pytest.mark.parametrize("fails_before", [0, 1, 2])
@pytest.mark.parametrize("how", ["raised", "stopped"])
@pytest.mark.parametrize("settled", ["done", "redo", "skip"])
async def test_an_effect_of_any_attempt_pauses_the_run_before_the_failure_is_handled(
    fails_before: int, how: str, settled: str
) -> None:
    till, bench, tries = Till(), Bench(MemoryStorage()), 0
    till.hangs = how == "stopped"

    async def body(ctx: NodeContext) -> Any:
        nonlocal tries
        tries += 1
        if tries <= fails_before:
            raise ValueError("not yet")
        return await ctx.call("pay", till.pay, policy="ask")

    graph = handled(3, 0.02 if till.hangs else None)
    result = await bench.run(body, Node(till.otherwise), graph=graph)
    state, [(call, unknown)] = of_run(bench)
    assert (state, unknown, result.paused_at, till.paid) == (RunState.PAUSED, "unknown", "a", ["pay"])
    bench.manager.settle("run", call, **({"done": "late"} if settled == "done" else {settled: True}))
    graph = handled(3)
    result = await bench.run(body, Node(till.otherwise), graph=graph)
    value = {"done": "late", "redo": "receipt 2", "skip": None}[settled]
    assert (result.success, result.output["value"], result.path) == (True, value, ["a"]), result.error
    assert len(till.paid) == (2 if settled == "redo" else 1)


async def test_a_failure_is_handled_once_its_effect_is_settled() -> None:
    """The attempt goes on from its records, and fails in the same way."""
    till, bench, asked = Till(), Bench(MemoryStorage()), list[int]()

    async def body(ctx: NodeContext) -> Any:
        await ctx.call("ask", asked.append, 1)
        with suppress(TimeoutError):
            await ctx.call("pay", till.pay, policy="ask")
        raise ValueError("of its own")

    result = await bench.run(body, Node(till.otherwise), graph=handled(1))
    [(call, _)] = [each for each in of_run(bench)[1] if each[1] == "unknown"]
    assert (result.paused_at, till.paid) == ("a", ["pay"])
    bench.manager.settle("run", call, done="late")
    result = await bench.run(body, Node(till.otherwise), graph=handled(1))
    assert (result.success, result.path, till.paid, asked) == (True, ["a", "b"], ["pay", "another way"], [1])
    assert of_run(bench) == (RunState.COMPLETED, [])


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("attempts", [1, 2])
async def test_with_the_policy_fail_the_run_ends_with_the_call_named_and_no_edge_is_followed(
    attempts: int, swallows: bool
) -> None:
    till, bench = Till(), Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        try:
            return await ctx.call("pay", till.pay, policy="fail")
        except Exception as error:
            if not swallows:
                raise
            raise ValueError("said in other words") from error

    async def run() -> ExecutionResult:
        return await bench.run(body, Node(till.otherwise), graph=handled(attempts))

    for _ in range(2):
        result = await run()
        assert (result.success, till.paid) == (False, ["pay"])
        assert "'a#1/1' (pay)" in str(result.error)
        assert ("said in other words" in str(result.error)) is swallows
        assert of_run(bench) == (RunState.FAILED, [("a#1/1", "unknown")])
    bench.manager.settle("run", "a#1/1", done="late")
    result = await run()
    assert (result.success, result.output["value"], till.paid) == (True, "late", ["pay"]), result.error


# --- in a plan --------------------------------------------------------------------------------------------------------


class Says:
    """A judge with one answer to everything, which it counts."""

    def __init__(self, action: JudgmentAction) -> None:
        self.action, self.asked = action, 0

    async def evaluate(self, *args: Any, **keywords: Any) -> Judgment:
        self.asked += 1
        return Judgment(action=self.action, reasoning="as always", feedback="as always")


def house(till: Till, judge: Any, **declared: Any) -> House:
    made = House(MemoryStorage())
    made.executor.judge = judge
    made.executor.register_function("pay", till.pay, **declared)
    return made


def paying(attempts: int) -> dict[str, Any]:
    return {"id": "pay", "action": {"action_type": "function", "function_name": "pay"}, "max_retries": attempts}


@pytest.mark.parametrize("action", JudgmentAction)
@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_plans_judge_is_not_asked_of_a_failure_whose_effect_is_unknown(
    attempts: int, action: JudgmentAction
) -> None:
    till, judge = Till(), Says(action)
    here = house(till, judge, effects=True)
    result = await here.run(plan_of(paying(attempts)))
    assert (result.status, judge.asked, till.paid) == (ExecutionStatus.AWAITING_APPROVAL, 0, ["pay"]), result
    assert "'pay#1/1'" in str(result.feedback)
    here.manager.settle("r", "pay#1/1", done="late")
    here.executor.judge = HybridJudge()
    result = await here.run()
    assert (result.status, result.results["result"], till.paid) == (ExecutionStatus.COMPLETED, "late", ["pay"])


@pytest.mark.parametrize("policy", ["ask", "fail"])
@pytest.mark.parametrize("step", ["pay", "again"], ids=["changed", "dropped"])
async def test_no_revision_of_the_plan_forgets_an_unknown_effect(step: str, policy: Policy) -> None:
    till = Till()
    here = house(till, HybridJudge(), policy=policy)
    await here.run(plan_of(paying(1)))
    here.executor.register_function("pay_otherwise", till.pay, policy=policy)
    action = {"action_type": "function", "function_name": "pay_otherwise" if step == "pay" else "pay"}
    revised = plan_of({**paying(1), "id": step, "action": action})
    for _ in range(2):
        with pytest.raises(ResumeError, match=r"'pay#1/1' \(function:pay\).* Settle them"):
            await here.executor.execute_plan(revised, GOAL, run_id="r", replan=True)
    assert till.paid == ["pay"]
    here.manager.settle("r", "pay#1/1", skip=True)
    result = await here.executor.execute_plan(revised, GOAL, run_id="r", replan=True)
    assert (result.status, result.results["result"]) == (ExecutionStatus.COMPLETED, "receipt 2"), result


async def test_with_the_policy_fail_a_plan_fails_with_the_call_named_and_is_not_to_be_replanned() -> None:
    till, judge = Till(), Says(JudgmentAction.REPLAN)
    here = house(till, judge, policy="fail")

    async def failing(*plans: Any) -> PlanExecutionResult:
        result = await here.run(*plans)
        assert (result.status, judge.asked, till.paid) == (ExecutionStatus.FAILED, 0, ["pay"]), result
        assert "'pay#1/1' (function:pay)" in str(result.feedback)
        assert result.error_type == "UnknownEffect"
        return result

    await failing(plan_of(paying(2)))
    await failing()
    here.manager.settle("r", "pay#1/1", done="late")
    here.executor.judge = HybridJudge()
    result = await here.run()
    assert (result.status, result.results["result"], till.paid) == (ExecutionStatus.COMPLETED, "late", ["pay"])
