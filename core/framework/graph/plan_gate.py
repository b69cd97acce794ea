"""The gate that a step which requires approval must pass: asks, waits, and uses an answer once."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from framework._secrets import mask_error, masked_traceback
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.plan import (
    ActionType,
    ApprovalDecision,
    ApprovalRequest,
    ApprovalResult,
    ExecutionStatus,
    PlanStep,
    StepStatus,
)
from framework.graph.plan_answers import Answers, request_of
from framework.graph.plan_approvals import modified, problem_of, request_for
from framework.graph.plan_planner import blocked_by_rejection
from framework.graph.plan_state import Asked, PlanState, now
from framework.graph.references import MissingReference
from framework.graph.run_session import RunSession
from framework.graph.runtime_port import RuntimePort
from framework.graph.text import shorten
from framework.graph.worker_actions import StepExecutionResult, failure
from framework.storage.records import Message

logger = logging.getLogger(__name__)


class GatedRun(Protocol):
    """What the gate needs of the run it belongs to."""

    state: PlanState
    run_id: str
    port: RuntimePort
    session: RunSession | None

    def note(self, record: Mapping[str, Any], step: PlanStep, events: list[dict[str, Any]]) -> Awaitable[None]: ...

    def stop(self, status: ExecutionStatus, reason: str | None) -> None: ...


class ApprovalGate:
    """``waiting`` are the ids of steps that wait for an answer from outside, and ``has_news`` says that one may have
    come. ``answers`` are those left in the store of a durable run."""

    def __init__(
        self,
        run: GatedRun,
        callback: Callable[[ApprovalRequest], Any] | None,
        answers: Answers | None = None,
        sandbox: object = None,
    ) -> None:
        self.waiting: set[str] = set()
        self.has_news = False
        self._news: asyncio.Future[None] | None = None
        self.problems: dict[str, str] = {}
        """Why a callback gave no answer, by step."""
        self._answers = answers
        # Somebody's own may know no such check; it refuses when it is to run the code.
        self._sandbox = sandbox if isinstance(sandbox, CodeSandbox) else None
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
                return failure(error.at_step(step.id), "missing_data", step.action.action_type.value)
            refused = self._refused_code(step, request)
            if refused:
                kind = "code_error" if refused.startswith("SyntaxError") else "security"
                return failure(f"Refused, so nobody was asked: {refused}", kind, "code_execution")
            asked = standing.approval
            if asked is not None and asked.answer is None:  # an open request of a fork is its own from now on
                asked.request = asked.request.model_copy(update={"run_id": run.run_id})
            if asked is None or not asked.is_of(run.run_id) or asked.request_id != request.request_id:
                # An answer to another request is no answer to this one, nor to one that comes to be the same later.
                # Nor is an answer to the run that this one was forked from: what was approved there is done there.
                if asked is not None:
                    standing.asked += 1
                    request = self._request(step, standing.asked)
                standing.approval = Asked(request)
                step.status = StepStatus.AWAITING_APPROVAL
                run.state.keep_approval(step)
                record = {"kind": "approval_request", "node": step.id, "request": request.request_id}
                await run.note(record, step, events)
            elif asked.answer is not None:
                return await self._use(step, asked, asked.answer, events)
            elif asked.request_id in (left := await self._left([asked])):
                asked.answer = left[asked.request_id]
                if asked.answer is None:
                    self._ask_anew(step)
                    continue
                run.state.keep_approval(step)
                await run.note({"kind": "approval_answer", **_brief(step, asked)}, step, events)
            else:
                answer = await self._ask(step, request)
                if answer is None:
                    step.status = StepStatus.AWAITING_APPROVAL
                    self.waiting.add(step.id)
                    return None
                problem = problem_of(answer, step, durable=run.session is not None)
                if problem is not None:
                    return _unusable(step, problem)
                if self._answers is not None:
                    # Somebody else may have answered meanwhile: the first answer counts, and is what is found then.
                    is_ours = await self._answers.leave(step.id, asked.request_id, answer)
                    if not is_ours and asked.request_id not in await self._left([asked]):
                        self._ask_anew(step)
                else:
                    asked.answer = answer

    def _request(self, step: PlanStep, asked: int) -> ApprovalRequest:
        state = self._run.state
        revision, context = state.plan.revision, state.memory.view()
        return request_for(step, self._run.run_id, revision, asked, context, state.outputs())

    def _refused_code(self, step: PlanStep, request: ApprovalRequest) -> str:
        """Why the step's code would not be run even if somebody approved it."""
        code = step.action.code
        if self._sandbox is None or step.action.action_type is not ActionType.CODE_EXECUTION or not code:
            return ""
        return "; ".join(self._sandbox.check(code, request.context))

    async def _left(self, approvals: Iterable[Asked]) -> dict[str, ApprovalResult | None]:
        """What was left to these requests, by request; ``None`` for what is no answer."""
        wanted = [asked.request_id for asked in approvals]
        return await self._answers.find(wanted) if self._answers is not None else {}

    def _ask_anew(self, step: PlanStep) -> None:
        """What was left to its request cannot be read."""
        standing = self._run.state.standing(step.id)
        standing.asked += 1
        standing.approval = None
        text = f"What was left as the answer to the approval request of step {step.id!r} cannot be read; asked anew."
        self._run.port.problem("warning", text)

    async def _ask(self, step: PlanStep, request: ApprovalRequest) -> ApprovalResult | None:
        """The callback's answer; ``None`` without a callback, and when it gave none."""
        if self._callback is None:
            return None
        try:
            answer = self._callback(request.model_copy(deep=True))
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:  # a callback may raise anything; nobody has answered then, and the step waits
            logger.warning("The approval callback failed at step %r:\n%s", step.id, masked_traceback(error))
            problem = f"the approval callback raised {type(error).__name__}: {shorten(mask_error(error))}"
        else:
            if isinstance(answer, ApprovalResult):
                self.problems.pop(step.id, None)
                return answer
            problem = f"the approval callback returned {type(answer).__name__}, not an ApprovalResult"
        self.problems[step.id] = problem
        self._run.port.problem("warning", f"Step {step.id!r} waits for its approval: {problem}.")
        return None

    def hear(self, message: Message) -> None:
        """A message was left for the run."""
        if request_of(message) is not None:
            self.has_news = True
            if self._news is not None and not self._news.done():
                self._news.set_result(None)

    def news(self) -> asyncio.Future[None]:
        """Done once an answer has been left."""
        self._news = asyncio.get_running_loop().create_future()
        if self.has_news:
            self._news.set_result(None)
        return self._news

    async def look(self) -> bool:
        """Whether answers to waiting steps have come; these need not wait any more."""
        self.has_news = False
        approvals = {step_id: self._run.state.standing(step_id).approval for step_id in self.waiting}
        asked = {step_id: each for step_id, each in approvals.items() if each is not None}
        left = await self._left(asked.values())
        come = {step_id for step_id, each in asked.items() if each.request_id in left}
        self.waiting -= come
        return bool(come)

    async def _use(
        self, step: PlanStep, asked: Asked, answer: ApprovalResult, events: list[dict[str, Any]]
    ) -> PlanStep | StepExecutionResult | None:
        decision = answer.decision
        problem = problem_of(answer, step, durable=False)
        if problem is not None:  # stored by a version that did not look, or by somebody else's program
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
        # A fork's requests were made by the run that it was forked from.
        return [asked.request.model_copy(update={"run_id": self._run.run_id}) for asked in found if asked is not None]


def _unusable(step: PlanStep, problem: str) -> StepExecutionResult:
    return failure(
        f"The answer to its approval request is unusable: {problem}", "invalid_answer", step.action.action_type.value
    )


def _brief(step: PlanStep, asked: Asked) -> dict[str, Any]:
    assert asked.answer is not None
    reason = shorten(asked.answer.reason) if asked.answer.reason else None
    return {"node": step.id, "request": asked.request_id, "decision": asked.answer.decision.value, "reason": reason}
