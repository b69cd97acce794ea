"""Answers that come while the run goes on elsewhere, late, twice, or as something else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.errors import ApprovalError
from framework.graph.plan import (
    ActionSpec,
    ActionType,
    ApprovalRequest,
    ApprovalResult,
    ExecutionStatus,
    PlanExecutionResult,
    PlanStep,
)
from framework.storage.checkpoints import parse_log
from framework.storage.committer import committer_of
from tests.plans.gate_kit import GOAL, Bench, answer, plan, step


class Going:
    """A durable run of which one step hangs until ``go_on`` is set, beside one that waits for its approval."""

    def __init__(self, concurrency: int = 2) -> None:
        self.bench = Bench(durable=True, concurrency=concurrency).functions()
        self.started, self.go_on, self.paid = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.bench.executor.register_function("hang", self._hang)
        self.bench.executor.register_function("pay", self._pay)

    async def _hang(self) -> None:
        self.started.set()
        await self.go_on.wait()

    async def _pay(self, **given: Any) -> None:
        self.bench.calls.append(given)
        self.paid.set()

    def start(self) -> asyncio.Task[PlanExecutionResult]:
        hangs = PlanStep(
            id="hangs", description="", action=ActionSpec(action_type=ActionType.FUNCTION, function_name="hang")
        )
        pays = step("pay", {"amount": 1})
        pays.action.function_name = "pay"
        return asyncio.create_task(self.bench.executor.execute_plan(plan(hangs, pays), GOAL, run_id="r"))

    async def asked(self) -> ApprovalRequest:
        while True:
            if self.bench.executor.checkpoint_manager.storage.find_run("r") is not None:  # type: ignore[union-attr]
                for request in await self.bench.executor.pending_approvals("r"):
                    return request
            await asyncio.sleep(0)


async def test_an_approval_while_another_step_runs_lets_the_step_start() -> None:
    going = Going()
    run = going.start()
    request = await going.asked()
    await going.started.wait()
    await going.bench.executor.answer_approval("r", "pay", answer("approve"), request.request_id)
    assert await going.bench.executor.pending_approvals("r") == []
    with pytest.raises(ApprovalError, match="answered already"):
        await going.bench.executor.answer_approval("r", "pay", answer("reject"))
    await asyncio.wait_for(going.paid.wait(), 20)
    assert not run.done(), "it did not wait for the other step"
    going.go_on.set()
    result = await run
    assert (result.status, going.bench.calls) == (ExecutionStatus.COMPLETED, [{"amount": 1}])
    assert [record["kind"] for record in log_of(going.bench)].count("approval_answer") == 1


async def test_an_answer_that_comes_with_the_last_step_is_used_before_the_run_pauses() -> None:
    """Nobody has told the run of the answer yet when nothing else is left to do."""
    going = Going()
    run = going.start()
    request = await going.asked()
    await going.started.wait()
    manager = going.bench.executor.checkpoint_manager
    assert manager is not None
    committer_of(manager.storage).heartbeat._look_at = float("inf")
    await going.bench.executor.answer_approval("r", "pay", answer("reject"), request.request_id)
    going.go_on.set()
    result = await run
    assert (result.status, going.bench.calls) == (ExecutionStatus.REJECTED, [])


async def test_while_a_callback_thinks_somebody_else_may_answer() -> None:
    bench = Bench(durable=True).functions()
    thinking, thought = asyncio.Event(), asyncio.Event()

    async def callback(request: ApprovalRequest) -> ApprovalResult:
        thinking.set()
        await thought.wait()
        return answer("reject")

    bench.executor.set_approval_callback(callback)
    run = asyncio.create_task(bench.executor.execute_plan(plan(step("a", {"x": 1})), GOAL, run_id="r"))
    await thinking.wait()
    await bench.executor.answer_approval("r", "a", answer("modify", modifications={"inputs": {"x": 2}}))
    thought.set()
    assert (await run).status is ExecutionStatus.COMPLETED
    assert bench.calls == [{"x": 2}], "the first answer counts"


async def test_an_answer_to_a_request_that_was_withdrawn_is_refused_and_never_used() -> None:
    """The amount goes up and comes down again: what was approved before is asked about anew."""
    bench = Bench(durable=True).functions()

    async def execute(amount: int) -> PlanExecutionResult:
        return await bench.executor.execute_plan(plan(step("a", {"x": "$n"})), GOAL, {"n": amount}, run_id="r")

    [first] = (await execute(1)).pending_approvals
    [second] = (await execute(100)).pending_approvals
    with pytest.raises(ApprovalError, match="changed since"):
        await bench.executor.answer_approval("r", "a", answer("approve"), first.request_id)
    await bench.executor.answer_approval("r", "a", answer("approve"), second.request_id)
    third = await bench.executor.execute_plan(None, GOAL, {"n": 7}, run_id="r")
    assert third.status is ExecutionStatus.AWAITING_APPROVAL
    fourth = await bench.executor.execute_plan(None, GOAL, {"n": 100}, run_id="r")
    assert (fourth.status, bench.calls) == (ExecutionStatus.AWAITING_APPROVAL, [])
    ids = {first.request_id, second.request_id, *(each.pending_approvals[0].request_id for each in (third, fourth))}
    assert len(ids) == 4


async def test_a_message_that_is_no_answer_is_told_of_and_the_step_asks_anew() -> None:
    bench = Bench(durable=True).functions()
    [request] = (await bench.executor.execute_plan(plan(step("a", {"x": 1})), GOAL, run_id="r")).pending_approvals
    assert bench.executor.checkpoint_manager is not None
    bench.executor.checkpoint_manager.storage.send("r", f"approval:{request.request_id}", b"yes!")
    with pytest.raises(ApprovalError, match="cannot be read"):
        await bench.executor.answer_approval("r", "a", answer("approve"))
    result = await bench.executor.execute_plan(None, GOAL, run_id="r")
    assert "asked anew" in str(bench.executor.runtime.report_problem.call_args_list)
    await bench.executor.answer_approval("r", "a", answer("approve"), result.pending_approvals[0].request_id)
    assert (await bench.executor.execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert bench.calls == [{"x": 1}]


async def test_answers_to_a_completed_run_are_refused() -> None:
    bench = Bench(durable=True).functions().always(answer("approve"))
    await bench.executor.execute_plan(plan(step("a", {"x": 1})), GOAL, run_id="r")
    with pytest.raises(ApprovalError, match="run is completed"):
        await bench.executor.answer_approval("r", "a", answer("approve"))


def log_of(bench: Bench) -> list[dict[str, Any]]:
    assert bench.executor.checkpoint_manager is not None
    return [dict(record) for record in parse_log(bench.executor.checkpoint_manager.storage.read_log("r"))]


async def test_an_approval_is_not_that_of_a_fork() -> None:
    """What was approved in the run that it comes from is done there; an open question is the fork's as well."""
    bench = Bench(durable=True).functions()
    await bench.executor.execute_plan(plan(step("a", {"x": 1})), GOAL, run_id="r")
    manager = bench.executor.checkpoint_manager
    assert manager is not None
    before = manager.fork("r")
    await bench.executor.answer_approval("r", "a", answer("approve"))
    started = asyncio.Event()

    async def forever(**given: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    bench.executor.register_function("work", forever)
    run = asyncio.create_task(bench.executor.execute_plan(None, GOAL, run_id="r"))
    await started.wait()
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    after = manager.fork("r")
    bench.functions()
    [open_one] = await bench.executor.pending_approvals(before)
    await bench.executor.answer_approval(before, "a", answer("approve"), open_one.request_id)
    assert (await bench.executor.execute_plan(None, GOAL, run_id=before)).status is ExecutionStatus.COMPLETED
    assert len(bench.calls) == 1
    with pytest.raises(ApprovalError, match="of which this is a fork"):
        await bench.executor.answer_approval(after, "a", answer("approve"))
    result = await bench.executor.execute_plan(None, GOAL, run_id=after)
    assert (result.status, len(bench.calls)) == (ExecutionStatus.AWAITING_APPROVAL, 1)
    await bench.executor.answer_approval(after, "a", answer("reject"), result.pending_approvals[0].request_id)
    assert (await bench.executor.execute_plan(None, GOAL, run_id=after)).status is ExecutionStatus.REJECTED
    assert (await bench.executor.execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert len(bench.calls) == 2
