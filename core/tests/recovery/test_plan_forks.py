"""Forking and cancelling the runs of plans."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.errors import ApprovalError, UnstorableValue
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import (
    ActionSpec,
    ActionType,
    ApprovalDecision,
    ApprovalResult,
    ExecutionStatus,
    Judgment,
    JudgmentAction,
    Plan,
    PlanStep,
)
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.backend import Storage
from framework.storage.contract import snapshot
from framework.storage.memory import MemoryStorage

RUN_ID = "plan-run"
GOAL = Goal(id="goal", name="Goal", description="Reach the end.")


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.storage.heartbeat.LOOK_SECONDS", 0.02)


class AcceptAll:
    async def evaluate(self, step: PlanStep, result: Any, goal: Goal, context: Any = None) -> Judgment:
        return Judgment(action=JudgmentAction.ACCEPT, reasoning="fine")


def step(step_id: str, needs: list[str], **fields: Any) -> PlanStep:
    return PlanStep(
        id=step_id,
        description=step_id,
        action=ActionSpec(action_type=ActionType.FUNCTION, function_name=step_id),
        inputs={"base": "$base"},
        expected_outputs=[f"{step_id}_out"],
        dependencies=needs,
        **fields,
    )


def plan(*steps: PlanStep) -> Plan:
    return Plan(id="plan", goal_id="goal", description="three steps", steps=list(steps), context={})


def executor(storage: Storage, ran: list[str], **functions: Any) -> FlexibleGraphExecutor:
    def function(name: str) -> Any:
        def work(base: Any) -> list[Any]:
            ran.append(name)
            return [name, base]

        return work

    return FlexibleGraphExecutor(
        Runtime(MemoryStorage()),
        judge=AcceptAll(),
        functions={**{name: function(name) for name in ("a", "b", "c")}, **functions},
        checkpoint_manager=CheckpointManager(storage, CheckpointConfig(retention_strategy="all")),
    )


async def test_a_plan_is_forked_with_other_values(storage: Storage) -> None:
    steps = [step("a", []), step("b", ["a"]), step("c", ["b"])]
    ran: list[str] = []
    manager = CheckpointManager(storage)
    first = await executor(storage, ran).execute_plan(
        plan(*steps), GOAL, {"base": 1}, run_id=RUN_ID, metadata={"agent_name": "planner"}
    )
    assert first.status is ExecutionStatus.COMPLETED, first
    before = snapshot(storage, RUN_ID)
    for at in [row.sequence for row in storage.read_checkpoint_rows(RUN_ID)]:
        ran.clear()
        fork = manager.fork(RUN_ID, at=at, changes={"base": 2, "more": None})
        record = storage.find_run(fork)
        assert record is not None
        assert record.state is RunState.PAUSED
        assert codec.decode(record.header)["metadata"] == {"agent_name": "planner"}
        result = await executor(storage, ran).execute_plan(plan(*steps), GOAL, {"base": 1}, run_id=fork)
        assert result.status is ExecutionStatus.COMPLETED, result
        assert ran == list("abc")[3 - len(ran) :]
        for name in "abc":
            assert result.results[f"{name}_out"] == [name, 2 if name in ran else 1]
        assert (result.results["base"], result.results["more"]) == (2, None)
        plain = await executor(storage, ran).execute_plan(None, GOAL, run_id=manager.fork(RUN_ID, at=at))
        assert plain.results == first.results
    assert snapshot(storage, RUN_ID) == before
    with pytest.raises(UnstorableValue, match="NUL"):
        manager.fork(RUN_ID, changes={"plan\x00plan": {}})
    assert storage.verify().ok


async def test_a_fork_that_waits_for_an_approval_has_its_own(storage: Storage) -> None:
    steps = [step("a", []), step("b", ["a"], requires_approval=True), step("c", ["b"])]
    ran: list[str] = []
    waits = await executor(storage, ran).execute_plan(plan(*steps), GOAL, {"base": 1}, run_id=RUN_ID)
    assert waits.status is ExecutionStatus.AWAITING_APPROVAL
    fork = CheckpointManager(storage).fork(RUN_ID)
    there = executor(storage, ran)
    [request] = await there.pending_approvals(fork)
    assert (request.run_id, request.step_id) == (fork, "b")
    again = await there.execute_plan(None, GOAL, run_id=fork)
    assert again.status is ExecutionStatus.AWAITING_APPROVAL
    assert [each.run_id for each in again.pending_approvals] == [fork]
    await there.answer_approval(fork, "b", ApprovalResult(decision=ApprovalDecision.APPROVE), request.request_id)
    with pytest.raises(ApprovalError):
        await there.answer_approval(fork, "b", ApprovalResult(decision=ApprovalDecision.REJECT))
    ran.clear()
    done = await there.execute_plan(None, GOAL, run_id=fork)
    assert (done.status, ran) == (ExecutionStatus.COMPLETED, ["b", "c"])
    still = await there.pending_approvals(RUN_ID)
    assert [(each.run_id, each.request_id) for each in still] == [(RUN_ID, request.request_id)]
    changed = CheckpointManager(storage).fork(RUN_ID, changes={"base": 5})
    await there.execute_plan(None, GOAL, run_id=changed)
    [asked] = await there.pending_approvals(changed)
    assert asked.request_id != request.request_id, "what is asked now is something else"
    assert asked.context["base"] == 5


async def test_a_plan_is_cancelled_while_it_runs_and_goes_on_later(storage: Storage) -> None:
    begun = asyncio.Event()

    async def waits(base: Any) -> dict[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    steps = [step("a", []), step("b", ["a"]), step("c", ["b"])]
    ran: list[str] = []
    task = asyncio.create_task(
        executor(storage, ran, b=waits).execute_plan(plan(*steps), GOAL, {"base": 1}, run_id=RUN_ID)
    )
    await begun.wait()
    manager = CheckpointManager(storage)
    await asyncio.to_thread(manager.cancel, RUN_ID)
    result = await task
    assert result.status is not ExecutionStatus.COMPLETED
    assert "cancelled on request" in (result.feedback or "")
    record = storage.find_run(RUN_ID)
    assert record is not None
    assert (record.state, record.error, record.owner) == (RunState.CANCELLED, "cancelled on request", None)
    assert manager.cancel(RUN_ID) is True
    done = await executor(storage, ran).execute_plan(None, GOAL, run_id=RUN_ID)
    assert (done.status, ran) == (ExecutionStatus.COMPLETED, ["a", "b", "c"])


async def test_a_plan_that_waits_is_cancelled_at_once(storage: Storage) -> None:
    ran: list[str] = []
    held = plan(step("a", [], requires_approval=True))
    await executor(storage, ran).execute_plan(held, GOAL, {"base": 1}, run_id=RUN_ID)
    assert CheckpointManager(storage).cancel(RUN_ID) is True
    record = storage.find_run(RUN_ID)
    assert record is not None
    assert record.state is RunState.CANCELLED
    again = await executor(storage, ran).execute_plan(None, GOAL, run_id=RUN_ID)
    assert (again.status, ran) == (ExecutionStatus.AWAITING_APPROVAL, [])
