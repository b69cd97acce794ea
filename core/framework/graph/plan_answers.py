"""Approvals from outside: which requests of a stored run wait, and the answer to one of them, given by any process."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from framework.errors import ApprovalError, ResumeError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.plan import ApprovalRequest, ApprovalResult, StepStatus
from framework.graph.plan_approvals import problem_of
from framework.graph.plan_planner import describe_changes
from framework.graph.plan_run import progress_of
from framework.graph.plan_state import Asked, PlanState, has_plan
from framework.graph.run_opening import Definition, Restored, read_run
from framework.graph.run_session import wait_for
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage.committer import committer_of

logger = logging.getLogger(__name__)


async def stored_state(manager: CheckpointManager, run_id: str) -> PlanState:
    """Where the plan of a run stands, by its store. Changes nothing. Raises ``RunNotFound``, ``ResumeError``."""
    return state_of(
        await wait_for(committer_of(manager.storage).call(lambda storage: read_run(storage, run_id))), run_id
    )


async def pending_approvals(manager: CheckpointManager, run_id: str) -> list[ApprovalRequest]:
    """The requests of a run that wait for an answer, in the plan's order. Raises ``RunNotFound``, ``ResumeError``."""
    state = await stored_state(manager, run_id)
    waiting = (state.standing(step.id).approval for step in state.plan.steps if _waits(step.status))
    return [asked.request for asked in waiting if asked is not None and asked.answer is None]


async def answer_approval(
    manager: CheckpointManager, run_id: str, step_id: str, answer: ApprovalResult, request_id: str | None
) -> None:
    """Store the answer to the request of a step; durable on return. The run itself does not go on.

    The run's lease is held meanwhile, so of two answers one is refused. Raises ``ApprovalError``, ``RunBusy``,
    ``RunNotFound``, ``ResumeError``, ``StorageError``.
    """

    problem = problem_of(answer, durable=True)
    if problem is not None:
        raise ApprovalError(run_id, step_id, f"{problem}. Nothing was stored; answer again.")

    def accept(found: Restored) -> None:
        _open_request(found, run_id, step_id, request_id)

    definition = Definition(
        id="",
        executor_type=ExecutorType.FLEXIBLE,
        goal_id="",
        fingerprint="",
        body={},
        describe=describe_changes,
        accept=accept,
        must_exist=True,
    )
    opened = await manager.open_session(
        definition,
        run_id,
        initial={},
        input_data={},
        header={},
        on_problem=lambda problem: logger.warning("Run %r: %s", run_id, problem),
    )
    if opened.session is None or opened.restored is None:
        raise ApprovalError(run_id, step_id, "the run is completed, so nothing waits for an answer.")
    try:
        found = opened.restored
        state = state_of(found, run_id)
        step = state.plan.get_step(step_id)
        assert step is not None  # `accept` found it
        asked = _open_request(found, run_id, step_id, request_id)
        asked.answer = answer
        state.standing(step_id).approval = asked
        state.keep_approval(step)
        record = {
            "kind": "approval_answer",
            "node": step_id,
            "request": asked.request_id,
            "decision": answer.decision.value,
        }
        # What the run was stays what it is found to be: failed runs go on afresh, others where they were.
        kept = found.found if found.found in (RunState.FAILED, RunState.CANCELLED) else RunState.PAUSED
        last = str(found.body.get("step") or step_id)
        await opened.session.note(record, (), progress_of(state, step, last, kept), state.scopes, state=kept)
    finally:
        await opened.session.abandon()


def state_of(found: Restored, run_id: str) -> PlanState:
    """The state of a plan's run as found, attempts after its last checkpoint included. Raises ``ResumeError``."""
    require_plan(found.values, run_id)
    state = PlanState.restore(found.values, found.body, None)
    for record in found.later:
        if record.get("kind") == "attempt":
            state.take_attempt(record)
    return state


def require_plan(values: Mapping[str, object], run_id: str) -> None:
    """Raise ``ResumeError`` unless these are the values of a plan's run."""
    if not has_plan(values):
        raise ResumeError(
            run_id, f"Run {run_id!r} is not the run of a plan; resume it with the executor it began with."
        )


def _open_request(found: Restored, run_id: str, step_id: str, request_id: str | None) -> Asked:
    state = state_of(found, run_id)
    step = state.plan.get_step(step_id)
    if step is None:
        known = ", ".join(repr(each.id) for each in state.plan.steps) or "none"
        raise ApprovalError(run_id, step_id, f"the plan has no such step; its steps are {known}.")
    asked = state.standing(step_id).approval
    if asked is None:
        raise ApprovalError(run_id, step_id, "it has not asked for an approval. See pending_approvals(run_id).")
    if asked.answer is not None:
        raise ApprovalError(
            run_id,
            step_id,
            f"its request was answered already ({asked.answer.decision.value}); an answer is given once.",
        )
    if request_id is not None and request_id != asked.request_id:
        raise ApprovalError(
            run_id,
            step_id,
            f"the answer is to request {request_id!r}, but the step, its arguments or the plan have changed since and "
            f"it asks anew with {asked.request_id!r}. Look at pending_approvals(run_id) and answer that.",
        )
    return asked


def _waits(status: StepStatus) -> bool:
    return status in (StepStatus.AWAITING_APPROVAL, StepStatus.PENDING)
