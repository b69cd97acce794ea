"""Approvals from outside: which requests of a stored run wait, and the answer to one of them, given by any process.

An answer is a message to the run (``Storage.send``), named after the request it answers. So it needs no lease, it may
come while the run goes on elsewhere, and of any number of answers to a request the store takes exactly one, those of
callbacks included. When the run uses it, it becomes a part of the plan's state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from framework.errors import ApprovalError, CodecError, CorruptData, MessageRefused, ResumeError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.plan import ApprovalRequest, ApprovalResult, StepStatus
from framework.graph.plan_approvals import problem_of
from framework.graph.plan_state import Asked, PlanState, has_plan
from framework.graph.run_opening import Restored, read_run
from framework.graph.run_session import wait_for
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.backend import Storage
from framework.storage.committer import committer_of
from framework.storage.records import Message

logger = logging.getLogger(__name__)

_NAME = "approval:"


class Answers:
    """The answers left for one run, in its store."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._committer = committer_of(storage)
        self._run_id = run_id

    async def leave(self, step_id: str, request_id: str, answer: ApprovalResult) -> bool:
        """Leave the answer to a request, durable on return; ``False`` when something was left to it before.

        Raises ``ApprovalError`` when the run is completed, ``RunNotFound``, ``StorageError``.
        """
        plain = {"decision": answer.decision.value, "reason": answer.reason, "modifications": answer.modifications}
        body = codec.encode({"step": step_id, "answer": plain}, "answer")
        name, run_id = f"{_NAME}{request_id}", self._run_id
        try:
            await wait_for(self._committer.call(lambda storage: storage.send(run_id, name, body)))
        except MessageRefused:
            run = await wait_for(self._committer.call(lambda storage: storage.find_run(run_id)))
            if run is not None and run.state is RunState.COMPLETED:
                raise ApprovalError(run_id, step_id, _COMPLETED) from None
            return False
        return True

    async def find(self, request_ids: Iterable[str]) -> dict[str, ApprovalResult | None]:
        """The answers left to these requests, by request; ``None`` for what is no answer. Raises ``StorageError``."""
        run_id, wanted = self._run_id, set(request_ids)
        if not wanted:
            return {}
        messages = await wait_for(self._committer.call(lambda storage: storage.read_messages(run_id)))
        found = {request: message for message in messages if (request := request_of(message)) in wanted}
        return {request: _read(message) for request, message in found.items()}


def request_of(message: Message) -> str | None:
    """The request that a message answers; ``None`` for a message of another kind."""
    return message.name.removeprefix(_NAME) if message.name.startswith(_NAME) else None


def _read(message: Message) -> ApprovalResult | None:
    try:
        plain: Any = codec.decode(message.body)
        return ApprovalResult.model_validate(plain["answer"])
    except (CodecError, CorruptData, ValidationError, KeyError, TypeError) as error:
        logger.warning("Message %r to run %r holds no answer: %s", message.name, message.run_id, error)
        return None


_COMPLETED = "the run is completed, so nothing waits for an answer."


async def stored_state(manager: CheckpointManager, run_id: str) -> PlanState:
    """Where the plan of a run stands, by its store, answers that the run has not seen yet included. Changes nothing.

    Raises ``RunNotFound``, ``ResumeError``, ``StorageError``.
    """
    state = state_of(await _found(manager, run_id), run_id)
    approvals = [state.standing(step.id).approval for step in state.plan.steps]
    unanswered = [asked for asked in approvals if asked is not None and asked.answer is None]
    answers = await Answers(manager.storage, run_id).find(asked.request_id for asked in unanswered)
    for asked in unanswered:
        asked.answer = answers.get(asked.request_id)
    return state


async def pending_approvals(manager: CheckpointManager, run_id: str) -> list[ApprovalRequest]:
    """The requests of a run that wait for an answer, in the plan's order. Raises ``RunNotFound``, ``ResumeError``."""
    state = await stored_state(manager, run_id)
    waiting = (state.standing(step.id).approval for step in state.plan.steps if _waits(step.status))
    open_ones = [asked.request for asked in waiting if asked is not None and asked.answer is None]
    # A fork's requests were made by the run that it was forked from.
    return [request.model_copy(update={"run_id": run_id}) for request in open_ones]


async def answer_approval(
    manager: CheckpointManager, run_id: str, step_id: str, answer: ApprovalResult, request_id: str | None
) -> None:
    """Leave the answer to the request of a step; durable on return. The run may be paused or going on anywhere.

    Of several answers one is taken. Raises ``ApprovalError``, ``RunNotFound``, ``ResumeError``, ``StorageError``.
    """
    found = await _found(manager, run_id)
    state = state_of(found, run_id)
    asked = _open_request(found, state, step_id, run_id, request_id)
    step = state.plan.get_step(step_id)
    assert step is not None  # it has a request
    problem = problem_of(answer, step, durable=True)
    if problem is not None:
        raise ApprovalError(run_id, step_id, f"{problem}. Nothing was stored; answer again.")
    answers = Answers(manager.storage, run_id)
    if not await answers.leave(step_id, asked.request_id, answer):
        left = await answers.find([asked.request_id])
        raise ApprovalError(run_id, step_id, _answered(left.get(asked.request_id)))
    # The run may have gone on in the meantime, and have asked for something else.
    found = await _found(manager, run_id)
    now = state_of(found, run_id).standing(step_id).approval
    if (now is None or now.request_id != asked.request_id) and not _is_used(found, asked.request_id):
        raise ApprovalError(
            run_id,
            step_id,
            f"request {asked.request_id!r} was withdrawn while it was being answered: the step, its arguments or the "
            "plan have changed since. The answer will not be used. Look at pending_approvals(run_id) again.",
        )


async def _found(manager: CheckpointManager, run_id: str) -> Restored:
    return await wait_for(committer_of(manager.storage).call(lambda storage: read_run(storage, run_id)))


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


def _open_request(found: Restored, state: PlanState, step_id: str, run_id: str, request_id: str | None) -> Asked:
    step = state.plan.get_step(step_id)
    if step is None:
        known = ", ".join(repr(each.id) for each in state.plan.steps) or "none"
        raise ApprovalError(run_id, step_id, f"the plan has no such step; its steps are {known}.")
    if found.found is RunState.COMPLETED:
        raise ApprovalError(run_id, step_id, _COMPLETED)
    asked = state.standing(step_id).approval
    if asked is None:
        raise ApprovalError(run_id, step_id, "it has not asked for an approval. See pending_approvals(run_id).")
    if asked.answer is not None and not asked.is_of(run_id):
        text = f"its answer is to run {asked.request.run_id!r}, of which this is a fork; it asks anew when it goes on."
        raise ApprovalError(run_id, step_id, text)
    if asked.answer is not None:
        raise ApprovalError(run_id, step_id, _answered(asked.answer))
    if request_id is not None and request_id != asked.request_id:
        raise ApprovalError(
            run_id,
            step_id,
            f"the answer is to request {request_id!r}, but the step, its arguments or the plan have changed since and "
            f"it asks anew with {asked.request_id!r}. Look at pending_approvals(run_id) and answer that.",
        )
    return asked


def _answered(answer: ApprovalResult | None) -> str:
    word = answer.decision.value if answer is not None else "what was left cannot be read"
    return f"its request was answered already ({word}); an answer is given once."


def _is_used(found: Restored, request_id: str) -> bool:
    return any(
        record.get("kind") == "approval_answer" and record.get("request") == request_id
        for record in (*found.records, *found.later)
    )


def _waits(status: StepStatus) -> bool:
    return status in (StepStatus.AWAITING_APPROVAL, StepStatus.PENDING)
