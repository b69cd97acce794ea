"""What a model's provider says of a failure: refused for good, or to be asked again later."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from framework.errors import LLMError, LLMRateLimited, LLMRefused, LLMTimeout, LLMUnavailable
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.judge import HybridJudge, create_default_judge
from framework.graph.plan import (
    ActionSpec,
    EvaluationRule,
    ExecutionStatus,
    JudgmentAction,
    PlanStep,
    StepStatus,
)
from framework.graph.worker_actions import StepExecutionResult
from framework.llm.provider import LLMResponse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from tests.plans.plan_kit import GOAL, Places, plan, step

WRONG_KEY = "Anthropic answered 401: invalid x-api-key"


def ask(step_id: str = "a", **fields: Any) -> PlanStep:
    action = ActionSpec.model_validate({"action_type": "llm_call", "prompt": "Say."})
    return PlanStep(id=step_id, description=step_id, action=action, **fields)


def executor_for(*replies: Any, judge: Any = None, **config: Any) -> FlexibleGraphExecutor:
    llm = ScriptedLLM(list(replies))
    settings = ExecutorConfig(**{"retry_delay_seconds": 0.0, **config})
    return FlexibleGraphExecutor(
        MagicMock(spec=Runtime), llm=llm, judge=judge if judge is not None else create_default_judge(), config=settings
    )


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> AsyncMock:
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return sleep


def seconds(slept: AsyncMock) -> list[float]:
    return [call.args[0] for call in slept.await_args_list]


@pytest.mark.parametrize("asks_models", [False, True])
async def test_a_refusal_is_not_tried_again(asks_models: bool) -> None:
    """Nor is a model asked about it: the same one would be, which refuses that question as well."""
    asked = ScriptedLLM([])
    judge = create_default_judge(asked if asks_models else None)
    executor = executor_for(LLMRefused(WRONG_KEY, status=401), "never", judge=judge)
    work = plan(ask())
    result = await executor.execute_plan(work, GOAL)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert result.feedback == f"Step 'a' failed: Another attempt cannot help: {WRONG_KEY}"
    assert (result.steps_executed, work.steps[0].attempts, work.steps[0].status) == (1, 1, StepStatus.FAILED)
    assert result.feedback_context["failed_steps"][0]["error"] == f"Another attempt cannot help: {WRONG_KEY}"


async def test_a_refusal_inside_a_function_is_one_too() -> None:
    def work() -> None:
        raise LLMRefused("no such model")

    executor = executor_for()
    executor.register_function("work", work)
    result = await executor.execute_plan(plan(step("a")), GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.NEEDS_REPLAN, 1)


async def test_a_worker_that_raises_a_refusal() -> None:
    executor = executor_for()
    executor.worker = MagicMock()
    executor.worker.execute = AsyncMock(side_effect=LLMRefused("no such model"))
    result = await executor.execute_plan(plan(ask()), GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.NEEDS_REPLAN, 1)


async def test_other_failures_are_tried_again() -> None:
    executor = executor_for(ValueError("odd"), "said")
    result = await executor.execute_plan(plan(ask()), GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.COMPLETED, 2)


async def test_a_rule_goes_before() -> None:
    rule = EvaluationRule(
        id="person",
        description="a person looks at refusals",
        condition="result.error_type == 'llm_error' and result.transient == false",
        action=JudgmentAction.ESCALATE,
    )
    executor = executor_for(LLMRefused(WRONG_KEY), judge=HybridJudge(rules=[rule]))
    result = await executor.execute_plan(plan(ask()), GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.NEEDS_ESCALATION, 1)


async def test_a_refused_step_may_be_tried_when_the_run_goes_on(places: Places) -> None:
    """Somebody has set the key meanwhile."""

    def refuse() -> None:
        raise LLMRefused(WRONG_KEY)

    executor = places.process()
    executor.register_function("ask", refuse)
    work = plan(step("a", args={"x": 1}), step("b", "a", call="ask"))
    result = await executor.execute_plan(work, GOAL, run_id="r")
    assert (result.status, result.steps_executed) == (ExecutionStatus.NEEDS_REPLAN, 2)
    assert WRONG_KEY in str((await places.process().stored_steps("r"))["b"].error)
    executor = places.process()
    executor.register_function("ask", lambda: "said")
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, places.calls) == (ExecutionStatus.COMPLETED, [1])


# --- later ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "least"),
    [
        (LLMRateLimited("slow down", retry_after=12.5), 12.5),
        (LLMUnavailable("overloaded", retry_after=3), 3),
        (LLMTimeout("no reply", retry_after=0.5), 0.5),
        (LLMRateLimited("come back tomorrow", retry_after=86400), 300),
        (LLMRateLimited("soon"), 0),
        (LLMRateLimited("odd", retry_after=-5), 0),
        (LLMRateLimited("odd", retry_after=float("nan")), 0),
    ],
)
async def test_as_long_as_the_provider_asks(error: LLMError, least: float, slept: AsyncMock) -> None:
    executor = executor_for(error, "said", retry_delay_seconds=0.0)
    result = await executor.execute_plan(plan(ask()), GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.COMPLETED, 2)
    assert seconds(slept) == [least]


async def test_the_back_off_comes_on_top(slept: AsyncMock) -> None:
    executor = executor_for(LLMRateLimited("slow", retry_after=10), "said", retry_delay_seconds=4.0)
    await executor.execute_plan(plan(ask()), GOAL)
    [waited] = seconds(slept)
    assert 12 <= waited <= 14


async def test_a_result_that_was_not_good_enough_is_not_waited_for(slept: AsyncMock) -> None:
    """``retry_after`` is of failures; a worker of one's own may say anything."""
    again = EvaluationRule(id="again", description="", condition="step.attempts < 2", action=JudgmentAction.RETRY)
    executor = executor_for(judge=HybridJudge(rules=[again]))
    executor.worker = MagicMock()
    executor.worker.execute = AsyncMock(return_value=StepExecutionResult(True, retry_after=9.0))
    assert (await executor.execute_plan(plan(ask()), GOAL)).status is ExecutionStatus.COMPLETED
    assert seconds(slept) == [0.0]


async def test_a_run_that_ends_does_not_sit_out_the_wait() -> None:
    """One step is to wait for minutes when the other one fails for good."""
    executor = executor_for(max_concurrency=2)
    waits = asyncio.Event()
    executor.runtime.report_problem.side_effect = lambda **_: waits.set()

    def limited() -> None:
        raise LLMRateLimited("slow down", retry_after=200)

    async def fail() -> None:
        await waits.wait()
        raise LLMRefused("no")

    executor.register_function("limited", limited)
    executor.register_function("fail", fail)
    work = plan(step("a", call="limited"), step("b", call="fail"))
    result = await asyncio.wait_for(executor.execute_plan(work, GOAL), 20)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "'b' failed" in str(result.feedback)
    assert [each.status for each in work.steps] == [StepStatus.PENDING, StepStatus.FAILED]
    assert not executor_tasks()


async def test_a_cancellation_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_for(LLMRateLimited("slow down", retry_after=200), "said")
    waits, sleep = asyncio.Event(), asyncio.sleep

    async def wait(delay: float) -> None:
        waits.set()
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", wait)
    task = asyncio.create_task(executor.execute_plan(plan(ask()), GOAL))
    await asyncio.wait_for(waits.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert not executor_tasks()


def executor_tasks() -> set[asyncio.Task[Any]]:
    """Tasks that are left over."""
    mine = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not mine and not task.cancelling()}


async def test_a_model_that_refuses_to_answer_is_not_asked_again_and_a_cut_off_json_is() -> None:
    refused = LLMResponse("I cannot help with that.", "m", 10, 5, stop_reason="refusal")
    result = await executor_for(refused, "never").execute_plan(plan(ask()), GOAL)
    assert (result.status, result.steps_executed, result.total_tokens) == (ExecutionStatus.NEEDS_REPLAN, 1, 15)
    assert "refused to answer (refusal): I cannot help" in str(result.feedback)
    cut = LLMResponse('{"a": [1, 2', "m", 10, 5, stop_reason="length")
    work = plan(ask())
    whole = await executor_for(cut, '{"a": 1}').execute_plan(work, GOAL)
    assert (whole.status, work.steps[0].attempts, whole.results["result"]) == (ExecutionStatus.COMPLETED, 2, {"a": 1})
    text = LLMResponse("Once upon", "m", 1, 1, stop_reason="max_tokens")
    assert (await executor_for(text).execute_plan(plan(ask()), GOAL)).results["result"] == "Once upon"
