"""The journal of a plan's steps within one process: what retries, cancellations and approvals make of it."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.judge import HybridJudge
from framework.graph.plan import (
    ActionSpec,
    ApprovalDecision,
    ApprovalResult,
    EvaluationRule,
    ExecutionStatus,
    JudgmentAction,
    PlanStep,
)
from framework.graph.run_view import view_run
from framework.graph.worker_node import WorkerNode
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from tests.plans.plan_kit import GOAL, Places, plan

ACCEPT = "ACTION: accept\nCONFIDENCE: 1"
AGAIN = EvaluationRule(
    id="again", description="again", condition="step.attempts < 2", action=JudgmentAction.RETRY, feedback_template=""
)


def act(step_id: str, kind: str, **action: Any) -> PlanStep:
    fields = {name: action.pop(name) for name in ("dependencies", "requires_approval") if name in action}
    spec = ActionSpec.model_validate({"action_type": kind, **action})
    return PlanStep(id=step_id, description=step_id, action=spec, **fields)


class Desk:
    """A tool and a model whose calls are counted; the tool may wait until it is cancelled."""

    def __init__(self, places: Places, effects: bool = True) -> None:
        self.places = places
        self.uses: list[dict[str, Any]] = []
        self.hangs = False
        self.began = asyncio.Event()
        properties = {"x": {}, "idempotency_key": {"type": "string"}}
        self.tool = Tool("act", "Acts.", {"type": "object", "properties": properties}, effects=effects)

    async def run(self, use: ToolUse) -> ToolResult:
        self.uses.append(use.input)
        self.began.set()
        if self.hangs:
            await asyncio.Event().wait()
        return ToolResult(use.id, f"done {len(self.uses)}")

    def executor(self, llm: Any = None, judge: Any = None, **config: Any) -> FlexibleGraphExecutor:
        executor = self.places.process(config)
        executor.worker = WorkerNode(executor.runtime, llm=llm, tools=[self.tool], tool_executor=self.run)
        executor.judge = judge if judge is not None else HybridJudge()
        return executor

    def calls(self) -> list[Any]:
        return CheckpointManager(self.places.store).journal("r")


async def cancelled(executor: FlexibleGraphExecutor, desk: Desk, *steps: PlanStep) -> None:
    """Cancel the run while the tool works."""
    desk.hangs = True
    task = asyncio.create_task(executor.execute_plan(plan(*steps), GOAL, run_id="r"))
    await desk.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    desk.hangs = False


@pytest.mark.parametrize("keep", [False, True])
async def test_a_judged_retry_begins_with_an_empty_journal_unless_it_is_kept(places: Places, keep: bool) -> None:
    desk = Desk(places)
    executor = desk.executor(judge=HybridJudge(rules=[AGAIN]), keep_journal_on_retry=keep)
    step = act("a", "tool_use", tool_name="act", tool_args={"x": 1})
    result = await executor.execute_plan(plan(step), GOAL, run_id="r")
    assert (result.status, result.steps_executed) == (ExecutionStatus.COMPLETED, 2)
    assert len(desk.uses) == (1 if keep else 2)
    assert desk.uses[0] == desk.uses[-1], "the same key in each attempt"
    assert desk.uses[0]["idempotency_key"].startswith("r/a/tool:act#")
    assert desk.calls() == []


@pytest.mark.parametrize("approved", [False, True])
async def test_an_effect_that_was_cancelled_waits_with_its_approval(places: Places, approved: bool) -> None:
    desk = Desk(places)
    step = act("a", "tool_use", tool_name="act", requires_approval=approved)
    asked = []

    def approve(request: Any) -> ApprovalResult:
        asked.append(request.step_id)
        return ApprovalResult(decision=ApprovalDecision.APPROVE)

    executor = desk.executor()
    executor.set_approval_callback(approve)
    await cancelled(executor, desk, step)
    executor = desk.executor()
    executor.set_approval_callback(approve)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert "'a#1/1'" in str(result.feedback)
    assert result.pending_approvals == []
    run = places.store.find_run("r")
    assert run is not None
    assert run.state is RunState.PAUSED
    assert await executor.pending_approvals("r") == []
    CheckpointManager(places.store).settle("r", "a#1/1", done="it came")
    executor = desk.executor()
    executor.set_approval_callback(approve)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, result.results) == (ExecutionStatus.COMPLETED, {"result": "it came"})
    assert (len(desk.uses), asked) == (1, ["a"] if approved else [])


async def test_an_effect_that_ran_into_the_time_limit_waits(places: Places) -> None:
    """A judge that would say "again" is not asked: whether the tool acted is not known, so the attempt is not over."""
    desk = Desk(places)
    desk.hangs = True
    again = EvaluationRule(id="r", description="r", condition="success == false", action=JudgmentAction.RETRY)
    executor = desk.executor(judge=HybridJudge(rules=[again]))
    executor.config.timeout_seconds = 0.05
    result = await executor.execute_plan(plan(act("a", "tool_use", tool_name="act")), GOAL, run_id="r")
    assert (result.status, len(desk.uses), result.steps_executed) == (ExecutionStatus.AWAITING_APPROVAL, 1, 0)
    [waiting] = view_run(places.store, "r").resume.waiting
    assert (waiting.kind, waiting.step) == ("settle", "a#1")
    [call] = [each for each in desk.calls() if each.state == "unknown"]
    CheckpointManager(places.store).settle("r", call.id, done="late")
    result = await desk.executor().execute_plan(None, GOAL, run_id="r")
    assert (result.results, len(desk.uses), desk.calls()) == ({"result": "late"}, 1, [])


async def test_others_go_on_while_a_step_waits_to_be_settled(places: Places) -> None:
    desk = Desk(places)
    steps = (
        act("a", "tool_use", tool_name="act"),
        act("b", "function", function_name="work", function_args={"x": 2}),
        act("c", "function", function_name="work", function_args={"x": 3}, dependencies=["a"]),
    )
    executor = desk.executor()
    await cancelled(executor, desk, *steps)
    executor = desk.executor()
    executor.worker.register_function("work", places.work)
    executor.config.max_concurrency = 2
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, places.calls) == (ExecutionStatus.AWAITING_APPROVAL, [2])
    CheckpointManager(places.store).settle("r", "a#1/1", redo=True)
    executor = desk.executor()
    executor.worker.register_function("work", places.work)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, places.calls, len(desk.uses)) == (ExecutionStatus.COMPLETED, [2, 3], 2)
    assert desk.calls() == []


async def test_a_judge_keeps_its_state_while_its_model_is_journaled(places: Places) -> None:
    class Counting(HybridJudge):
        count = 0

        async def evaluate(self, *args: Any, **keywords: Any) -> Any:
            self.count += 1
            return await super().evaluate(*args, **keywords)

    judge = Counting(llm=ScriptedLLM([ACCEPT]))
    model = judge.llm
    result = (
        await Desk(places)
        .executor(judge=judge)
        .execute_plan(plan(act("a", "tool_use", tool_name="act")), GOAL, run_id="r")
    )
    assert (result.status, judge.count, judge.llm) == (ExecutionStatus.COMPLETED, 1, model)


async def test_a_tool_result_without_a_stored_form_is_not_recorded(places: Places) -> None:
    """Its step fails at the commit, with the reason, as it does for a function."""
    desk = Desk(places, effects=False)
    executor = desk.executor()
    executor.worker.register_function("act", lambda: {"odd": object()})
    result = await executor.execute_plan(plan(act("a", "tool_use", tool_name="act")), GOAL, run_id="r")
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "cannot be stored" in str(result.feedback)


async def test_without_a_manager_a_tool_gets_what_it_got() -> None:
    uses: list[ToolUse] = []

    def run(use: ToolUse) -> ToolResult:
        uses.append(use)
        return ToolResult(use.id, "ok")

    schema = {"type": "object", "properties": {"idempotency_key": {}}}
    executor = FlexibleGraphExecutor(
        MagicMock(spec=Runtime), tools=[Tool("act", "Acts.", schema, effects=True)], tool_executor=run
    )
    result = await executor.execute_plan(plan(act("a", "tool_use", tool_name="act")), GOAL)
    assert (result.status, uses[0].input) == (ExecutionStatus.COMPLETED, {})


async def test_a_budget_needs_no_manager() -> None:
    llm = ScriptedLLM([LLMResponse("said", "m", input_tokens=4)] * 3)
    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), llm=llm, config=ExecutorConfig(), judge=HybridJudge())
    steps = [act(name, "llm_call", prompt=name) for name in "abc"]
    result = await executor.execute_plan(plan(*steps), GOAL, budget=RunBudget(max_tokens=8))
    assert (result.status, result.error_type, llm.calls) == (ExecutionStatus.FAILED, "budget", 2)
    assert result.completed_steps == ["a", "b"]
    assert "max_tokens=8" in str(result.error)


async def test_a_judge_is_not_asked_beyond_the_budget(places: Places) -> None:
    """The work's question is kept: with a larger budget the judge alone is asked."""
    llm = ScriptedLLM([LLMResponse("said", "m", input_tokens=4)])
    judge = HybridJudge(llm=ScriptedLLM([LLMResponse(ACCEPT, "m", input_tokens=2)]))
    steps = plan(act("a", "llm_call", prompt="Say."))
    result = await Desk(places).executor(llm, judge).execute_plan(steps, GOAL, run_id="r", budget=RunBudget(4))
    assert (result.error_type, result.total_tokens, judge.llm.calls) == ("budget", 4, 0)
    assert result.steps_executed == 0
    result = await Desk(places).executor(llm, judge).execute_plan(None, GOAL, run_id="r", budget=RunBudget(7))
    assert (result.status, result.total_tokens, llm.calls) == (ExecutionStatus.COMPLETED, 6, 1)
