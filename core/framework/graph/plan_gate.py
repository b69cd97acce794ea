"""The gate that a step which requires approval must pass: asks, waits, and uses an answer once."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from framework.graph.plan import (
    ApprovalDecision,
    ApprovalRequest,
    ApprovalResult,
    ExecutionStatus,
    PlanStep,
    StepStatus,
)
from framework.graph.plan_approvals import modified, problem_of, request_for
from framework.graph.plan_planner import blocked_by_rejection
from framework.graph.plan_state import Asked, PlanState, now
from framework.graph.references import MissingReference
from framework.graph.run_session import RunSession
from framework.graph.runtime_port import RuntimePort
from framework.graph.text import shorten
from framework.graph.worker_actions import StepExecutionResult, failure


class GatedRun(Protocol):
    """What the gate needs of the run it belongs to."""

    state: PlanState
    run_id: str
    port: RuntimePort
    session: RunSession | None

    def note(self, record: Mapping[str, Any], step: PlanStep, events: list[dict[str, Any]]) -> Awaitable[None]: ...

    def stop(self, status: ExecutionStatus, reason: str | None) -> None: ...


class ApprovalGate:
    """``waiting`` are the ids of steps that wait for an answer from outside."""

    def __init__(self, run: GatedRun, callback: Callable[[ApprovalRequest], Any] | None) -> None:
        self.waiting: set[str] = set()
        self._told: set[str] = set()
        self._run = run
        self._callback = callback

    async def allow(self, step: PlanStep, events: list[dict[str, Any]]) -> PlanStep | StepExecutionResult | None:
        """The step as it may run now; ``None`` when it waits for its answer, or must not run; or the failed result of
        one that cannot run: nobody can be asked about it, or the answer cannot be used.

        Nothing waits between the last look at the step's arguments and the return.
        """
        run = self._run
        standing = run.state.standing(step.id)
        if standing.approval is not None and standing.approval.used:
            standing.asked += 1
            standing.approval = None
        while True:
            try:
                request = self._request(step, standing.asked)
            except MissingReference as error:
                return failure(str(error), "missing_data", step.action.action_type.value)
            asked = standing.approval
            if asked is None or asked.request_id != request.request_id:
                # An answer to another request is no answer to this one.
                standing.approval = Asked(request)
                step.status = StepStatus.AWAITING_APPROVAL
                run.state.keep_approval(step)
                record = {"kind": "approval_request", "node": step.id, "request": request.request_id}
                await run.note(record, step, events)
            elif asked.answer is not None:
                return await self._use(step, asked, asked.answer, events)
            elif self._callback is not None:
                answer = await self._ask(self._callback, request)
                problem = problem_of(answer, durable=run.session is not None)
                if problem is not None:
                    return _unusable(step, problem)
                asked.answer = answer
                run.state.keep_approval(step)
                await run.note({"kind": "approval_answer", **_brief(step, asked)}, step, events)
            else:
                step.status = StepStatus.AWAITING_APPROVAL
                self.waiting.add(step.id)
                return None

    def _request(self, step: PlanStep, asked: int) -> ApprovalRequest:
        state = self._run.state
        revision, context = state.plan.revision, state.memory.view()
        return request_for(step, self._run.run_id, revision, asked, context, state.outputs())

    async def _ask(self, callback: Callable[[ApprovalRequest], Any], request: ApprovalRequest) -> ApprovalResult:
        answer = callback(request.model_copy(deep=True))
        if inspect.isawaitable(answer):
            answer = await answer
        if not isinstance(answer, ApprovalResult):
            raise TypeError(f"The approval callback returned {type(answer).__name__}, not an ApprovalResult.")
        return answer

    async def _use(
        self, step: PlanStep, asked: Asked, answer: ApprovalResult, events: list[dict[str, Any]]
    ) -> PlanStep | StepExecutionResult | None:
        decision = answer.decision
        problem = problem_of(answer, durable=False)
        if problem is not None:  # stored by a version that did not look
            self.use_up(step)
            return _unusable(step, problem)
        if asked.request_id not in self._told:
            self._told.add(asked.request_id)
            self._tell(step, answer)
        if decision is ApprovalDecision.APPROVE:
            return step
        if decision is ApprovalDecision.MODIFY:
            return modified(step, answer)
        asked.used = True
        if decision is ApprovalDecision.REJECT:
            step.status, step.completed_at = StepStatus.REJECTED, now()
            step.error = answer.reason or "rejected"
            skipped = self.skip_blocked()
        else:
            step.status, step.error, skipped = StepStatus.PENDING, answer.reason or "aborted", []
            reason = f"Aborted at step {step.id!r}: {answer.reason or 'no reason given'}"
            self._run.stop(ExecutionStatus.ABORTED, reason)
        self._run.state.keep_approval(step)
        await self._run.note({"kind": decision.value, "node": step.id, "skipped": skipped}, step, events)
        return None

    def _tell(self, step: PlanStep, answer: ApprovalResult) -> None:
        port, reason = self._run.port, answer.reason or "no reason given"
        port.decided(f"Approval of plan step {step.id}", answer.decision.value, reason, step.id)

    def use_up(self, step: PlanStep) -> None:
        """The step is over, and the answer with it."""
        asked = self._run.state.standing(step.id).approval
        if asked is not None and asked.answer is not None:
            asked.used = True
            self._run.state.keep_approval(step)

    def skip_blocked(self) -> list[str]:
        """Skip what needs a rejected step; the ids."""
        blocked = blocked_by_rejection(self._run.state.plan)
        for step in blocked:
            step.status, step.completed_at = StepStatus.SKIPPED, now()
            step.error = "skipped: it needs a rejected step"
            self._run.state.keep(step)
        return [step.id for step in blocked]

    @property
    def open_requests(self) -> list[ApprovalRequest]:
        """Requests that wait for an answer, in list order."""
        found = [
            self._run.state.standing(step.id).approval for step in self._run.state.plan.steps if step.id in self.waiting
        ]
        return [asked.request for asked in found if asked is not None]


def _unusable(step: PlanStep, problem: str) -> StepExecutionResult:
    return failure(
        f"The answer to its approval request is unusable: {problem}", "invalid_answer", step.action.action_type.value
    )


def _brief(step: PlanStep, asked: Asked) -> dict[str, Any]:
    assert asked.answer is not None
    reason = shorten(asked.answer.reason) if asked.answer.reason else None
    return {"node": step.id, "request": asked.request_id, "decision": asked.answer.decision.value, "reason": reason}
