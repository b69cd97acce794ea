"""Approvals that outlive their process: stored, answered once from anywhere, bound to what was asked, used once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.errors import ApprovalError, ResumeError, RunNotFound
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import (
    ActionSpec,
    ApprovalDecision,
    ApprovalRequest,
    ApprovalResult,
    ExecutionStatus,
    Plan,
    PlanStep,
)
from framework.graph.plan_outcomes import progress_of
from framework.graph.plan_state import PlanState
from framework.graph.run_opening import Definition
from framework.runtime.core import Runtime
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage.backend import open_storage

GOAL = Goal(id="g", name="G", description="d")
NewProcess = Callable[[], FlexibleGraphExecutor]


def answer(decision: str, **fields: Any) -> ApprovalResult:
    return ApprovalResult(decision=ApprovalDecision(decision), **fields)


def step(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    args = fields.pop("args", {})
    action = ActionSpec.model_validate({"action_type": "function", "function_name": "work", "function_args": args})
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def plan(*steps: PlanStep, **fields: Any) -> Plan:
    return Plan(id="p", goal_id="g", description="d", steps=list(steps), **fields)


def gated() -> Plan:
    return plan(
        step("draft", args={"x": "text"}, expected_outputs=["draft"]),
        step("publish", "draft", args={"x": "$draft"}, requires_approval=True, approval_message="publish it?"),
        step("tell", "publish", args={"x": "told"}),
        step("archive", "draft", args={"x": "archived"}),
    )


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture(params=["sqlite", "file"])
def new_process(request: pytest.FixtureRequest, tmp_path: Path, calls: list[Any]) -> Iterator[NewProcess]:
    url = f"sqlite:///{tmp_path}/runs.db" if request.param == "sqlite" else f"file://{tmp_path}/store"
    stores = []

    def work(x: Any = None) -> Any:
        calls.append(x)
        if x == "bad":
            raise RuntimeError("no")
        return x

    def make() -> FlexibleGraphExecutor:
        stores.append(open_storage(url))
        executor = FlexibleGraphExecutor(
            MagicMock(spec=Runtime),
            config=ExecutorConfig(retry_delay_seconds=0, max_retries_per_step=1),
            checkpoint_manager=CheckpointManager(stores[-1]),
        )
        executor.register_function("work", work)
        return executor

    yield make
    for store in stores:
        store.close()


def state_of(executor: FlexibleGraphExecutor, run_id: str = "r") -> RunState:
    assert executor.checkpoint_manager is not None
    run = executor.checkpoint_manager.storage.find_run(run_id)
    assert run is not None
    return run.state


async def test_paused_here_approved_there_finished_elsewhere(new_process: NewProcess, calls: list[Any]) -> None:
    first = new_process()
    result = await first.execute_plan(gated(), GOAL, run_id="r")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert calls == ["text"], "with one step at a time nothing overtakes the one that waits"
    assert state_of(first) is RunState.PAUSED
    second = new_process()
    [request] = await second.pending_approvals("r")
    assert (request.step_id, request.approval_message, request.run_id) == ("publish", "publish it?", "r")
    assert request.action_details["function_args"] == {"x": "text"}
    assert request == result.pending_approvals[0]
    await second.answer_approval("r", "publish", answer("approve"), request.request_id)
    assert await new_process().pending_approvals("r") == []
    assert state_of(second) is RunState.PAUSED
    with pytest.raises(ApprovalError, match="answered already") as refused:
        await new_process().answer_approval("r", "publish", answer("reject"))
    assert (refused.value.run_id, refused.value.step_id) == ("r", "publish")
    final = await new_process().execute_plan(None, GOAL, run_id="r")
    assert final.status is ExecutionStatus.COMPLETED
    assert calls == ["text", "text", "told", "archived"]
    with pytest.raises(ApprovalError):
        await new_process().answer_approval("r", "publish", answer("approve"))


async def test_calling_again_without_an_answer_waits_on_the_same_request(
    new_process: NewProcess, calls: list[Any]
) -> None:
    first = await new_process().execute_plan(gated(), GOAL, run_id="r")
    again = await new_process().execute_plan(gated(), GOAL, run_id="r")
    assert again.status is ExecutionStatus.AWAITING_APPROVAL
    assert again.pending_approvals == first.pending_approvals
    assert calls == ["text"]


async def test_a_rejection_from_outside_skips_exactly_the_dependents(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    await new_process().answer_approval("r", "publish", answer("reject", reason="not yet"))
    work = gated()
    result = await new_process().execute_plan(work, GOAL, run_id="r")
    assert result.status is ExecutionStatus.REJECTED
    assert [each.status.value for each in work.steps] == ["completed", "rejected", "skipped", "completed"]
    assert "'publish'" in str(result.feedback)
    assert "'tell'" in str(result.feedback)
    assert calls == ["text", "archived"]
    executor = new_process()
    again = await executor.execute_plan(None, GOAL, run_id="r")
    assert (again.status, calls) == (ExecutionStatus.REJECTED, ["text", "archived"])
    assert state_of(executor) is RunState.FAILED


async def test_after_a_rejection_a_new_revision_may_ask_for_something_else(
    new_process: NewProcess, calls: list[Any]
) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    await new_process().answer_approval("r", "publish", answer("reject"))
    await new_process().execute_plan(None, GOAL, run_id="r")
    revised = gated()
    revised.steps[1].action.function_args = {"x": "shorter"}
    result = await new_process().execute_plan(revised, GOAL, run_id="r", replan=True)
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    await new_process().answer_approval("r", "publish", answer("approve"))
    assert (await new_process().execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert calls == ["text", "archived", "shorter", "told"]


async def test_a_rejection_is_of_the_arguments_as_well(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    await new_process().answer_approval("r", "publish", answer("reject"))
    await new_process().execute_plan(None, GOAL, run_id="r")
    unrelated = plan(*gated().steps, step("more", args={"x": "more"}))
    still = await new_process().execute_plan(unrelated, GOAL, run_id="r", replan=True)
    assert still.status is ExecutionStatus.REJECTED
    revised = plan(*gated().steps)
    revised.steps[0].action.function_args = {"x": "better text"}
    result = await new_process().execute_plan(revised, GOAL, run_id="r", replan=True)
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert result.pending_approvals[0].action_details["function_args"] == {"x": "better text"}
    assert calls == ["text", "archived", "more", "better text"]


async def test_modifications_from_outside(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    await new_process().answer_approval("r", "publish", answer("modify", modifications={"inputs": {"x": "edited"}}))
    result = await new_process().execute_plan(gated(), GOAL, run_id="r")
    assert result.status is ExecutionStatus.COMPLETED
    assert calls[1] == "edited"


async def test_an_abort_from_outside_and_asking_anew(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    [first] = await new_process().pending_approvals("r")
    await new_process().answer_approval("r", "publish", answer("abort", reason="wrong customer"))
    executor = new_process()
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, state_of(executor)) == (ExecutionStatus.ABORTED, RunState.CANCELLED)
    assert "wrong customer" in str(result.feedback)
    again = await new_process().execute_plan(None, GOAL, run_id="r")
    assert again.status is ExecutionStatus.AWAITING_APPROVAL, "the answer is used up"
    assert again.pending_approvals[0].request_id != first.request_id
    with pytest.raises(ApprovalError, match="changed since"):
        await new_process().answer_approval("r", "publish", answer("approve"), first.request_id)
    assert calls == ["text"]


async def test_an_answer_does_not_fit_a_changed_step(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    await new_process().answer_approval("r", "publish", answer("approve"))
    revised = gated()
    revised.steps[1].action.function_args = {"x": "everything"}
    result = await new_process().execute_plan(revised, GOAL, run_id="r", replan=True)
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert calls == ["text"]


async def test_an_answer_does_not_fit_changed_arguments(new_process: NewProcess, calls: list[Any]) -> None:
    def work() -> Plan:
        return plan(step("send", args={"x": "$amount"}, requires_approval=True))

    await new_process().execute_plan(work(), GOAL, {"amount": 10}, run_id="r")
    await new_process().answer_approval("r", "send", answer("approve"))
    result = await new_process().execute_plan(work(), GOAL, {"amount": 10_000}, run_id="r")
    assert (result.status, calls) == (ExecutionStatus.AWAITING_APPROVAL, [])
    await new_process().answer_approval("r", "send", answer("approve"), result.pending_approvals[0].request_id)
    result = await new_process().execute_plan(None, GOAL, run_id="r")
    assert (result.status, calls) == (ExecutionStatus.COMPLETED, [10_000])


async def test_code_is_bound_to_what_it_reads(new_process: NewProcess) -> None:
    action = ActionSpec.model_validate({"action_type": "code_execution", "code": "result = price * 2"})

    def work() -> Plan:
        return plan(PlanStep(id="c", description="", action=action, requires_approval=True))

    waiting = await new_process().execute_plan(work(), GOAL, {"price": 1, "other": 5}, run_id="r")
    assert waiting.pending_approvals[0].context == {"price": 1}
    await new_process().answer_approval("r", "c", answer("approve"))
    result = await new_process().execute_plan(work(), GOAL, {"price": 100}, run_id="r")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL


async def test_the_answer_of_a_callback_is_kept_for_a_crash(new_process: NewProcess, calls: list[Any]) -> None:
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    asked: list[ApprovalRequest] = []

    def ask(request: ApprovalRequest) -> ApprovalResult:
        asked.append(request)
        return answer("approve")

    work = plan(step("a", requires_approval=True, args={"x": 1}))
    work.steps[0].action.function_name = "hang"
    first = new_process()
    first.register_function("hang", lambda x: hang())
    first.set_approval_callback(ask)
    task = asyncio.create_task(first.execute_plan(work, GOAL, run_id="r"))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    second = new_process()
    second.register_function("hang", lambda x: calls.append(x))
    result = await second.execute_plan(None, GOAL, run_id="r")
    assert (result.status, calls, len(asked)) == (ExecutionStatus.COMPLETED, [1], 1)


async def test_a_step_that_failed_after_its_approval_asks_again(new_process: NewProcess, calls: list[Any]) -> None:
    await new_process().execute_plan(plan(step("a", requires_approval=True, args={"x": "bad"})), GOAL, run_id="r")
    await new_process().answer_approval("r", "a", answer("approve"))
    assert (await new_process().execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.NEEDS_REPLAN
    assert (await new_process().execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.AWAITING_APPROVAL
    assert calls == ["bad"]


async def test_an_answer_does_not_fit_arguments_that_change_between_attempts(new_process: NewProcess) -> None:
    """A step that runs at the same time changes what the approved one was going to use in its second attempt."""
    amounts: list[int] = []
    started, raised = asyncio.Event(), asyncio.Event()

    async def pay(amount: int) -> None:
        amounts.append(amount)
        started.set()
        await raised.wait()
        raise ConnectionError("no line")

    async def more() -> int:
        await started.wait()
        return 10_000

    async def tell() -> None:
        raised.set()

    pays = step("pay", requires_approval=True, args={"amount": "$amount"}, max_retries=3)
    pays.action.function_name = "pay"
    raises = step("more", expected_outputs=["amount"])
    raises.action.function_name = "more"
    told = step("told", "more")
    told.action.function_name = "told"
    executor = new_process()
    executor.config.max_concurrency = 2
    executor.register_function("pay", pay)
    executor.register_function("more", more)
    executor.register_function("told", tell)
    asked: list[dict[str, Any]] = []

    def ask(request: ApprovalRequest) -> ApprovalResult:
        asked.append(request.action_details["function_args"])
        return answer("approve" if len(asked) == 1 else "reject")

    executor.set_approval_callback(ask)
    result = await executor.execute_plan(plan(pays, raises, told), GOAL, {"amount": 10}, run_id="r")
    assert amounts == [10]
    assert asked == [{"amount": 10}, {"amount": 10_000}]
    assert result.status is ExecutionStatus.REJECTED


async def test_several_wait_at_once_when_several_may_run(new_process: NewProcess, calls: list[Any]) -> None:
    work = plan(*(step(f"s{n}", requires_approval=n < 2, args={"x": n}) for n in range(4)))
    executor = new_process()
    executor.config.max_concurrency = 3
    result = await executor.execute_plan(work, GOAL, run_id="r")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert [each.step_id for each in result.pending_approvals] == ["s0", "s1"]
    assert calls == [2, 3], "two wait and hold their places; the third place is used"
    for step_id in ("s1", "s0"):
        await new_process().answer_approval("r", step_id, answer("approve"))
    assert (await new_process().execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED


async def test_of_several_answers_at_the_same_time_one_is_stored(new_process: NewProcess) -> None:
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    outcomes = await asyncio.gather(
        *(new_process().answer_approval("r", "publish", answer(word)) for word in ("approve", "reject", "abort")),
        return_exceptions=True,
    )
    assert sum(outcome is None for outcome in outcomes) == 1, outcomes
    assert all(outcome is None or isinstance(outcome, ApprovalError) for outcome in outcomes), outcomes


async def test_answers_to_nothing_are_refused(new_process: NewProcess) -> None:
    executor = new_process()
    with pytest.raises(RunNotFound):
        await executor.answer_approval("nowhere", "a", answer("approve"))
    with pytest.raises(RunNotFound):
        await executor.pending_approvals("nowhere")
    await executor.execute_plan(gated(), GOAL, run_id="r")
    for step_id, message in (("nope", "no such step"), ("draft", "not asked")):
        with pytest.raises(ApprovalError, match=message):
            await executor.answer_approval("r", step_id, answer("approve"))
    with pytest.raises(ResumeError, match="no checkpoint manager"):
        await FlexibleGraphExecutor(MagicMock()).pending_approvals("r")


async def test_an_answer_that_an_earlier_version_stored_is_used(new_process: NewProcess, calls: list[Any]) -> None:
    """It is a part of the plan's state, and there is no message."""
    await new_process().execute_plan(gated(), GOAL, run_id="r")
    executor = new_process()
    manager = executor.checkpoint_manager
    assert manager is not None
    definition = Definition(
        id="",
        executor_type=ExecutorType.FLEXIBLE,
        goal_id="",
        fingerprint="",
        body={},
        describe=lambda old, new: [],
        accept=lambda found: None,
    )
    opened = await manager.open_session(
        definition, "r", initial={}, input_data={}, header={}, on_problem=lambda problem: None
    )
    assert opened.session is not None
    assert opened.restored is not None
    state = PlanState.restore(opened.restored.values, opened.restored.body, None)
    asked = state.standing("publish").approval
    assert asked is not None
    asked.answer = answer("modify", modifications={"inputs": {"x": "edited"}})
    state.keep_approval(state.plan.steps[1])
    progress = progress_of(state, state.plan.steps[1], "publish", RunState.PAUSED)
    await opened.session.note({"kind": "approval_answer"}, (), progress, state.scopes, state=RunState.PAUSED)
    assert await new_process().pending_approvals("r") == []
    with pytest.raises(ApprovalError, match="answered already"):
        await new_process().answer_approval("r", "publish", answer("approve"))
    result = await new_process().execute_plan(None, GOAL, run_id="r")
    assert (result.status, calls[1]) == (ExecutionStatus.COMPLETED, "edited")
