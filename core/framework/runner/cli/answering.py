"""``surefoot runs approve`` and ``reject``: a person's answer to a step of a plan that waits for an approval."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from framework.errors import ApprovalError, ResumeError, UnknownType
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.plan import ApprovalDecision, ApprovalRequest, ApprovalResult
from framework.graph.plan_answers import Answers, answer_approval, pending_approvals
from framework.graph.plan_approvals import problem_of
from framework.graph.resume_outlook import open_requests
from framework.graph.run_steps import plan_state
from framework.graph.run_view import view_run
from framework.graph.stored_run import read_stored
from framework.graph.text import text_of
from framework.runner.cli.app import Command
from framework.runner.cli.exits import CommandError, Exit, not_found, usage_error
from framework.runner.cli.inputs import parse_object
from framework.runner.cli.output import Cell
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import command_for, find_run, open_store
from framework.runner.cli.text import shortened
from framework.runner.cli.view_screens import next_command
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.records import RunRecord

_KEEP_ALL = CheckpointConfig(retention_strategy="all")
"""An answer is a commit; it must not thin out what the run's own program keeps."""


@click.command("approve", cls=Command, short_help="Let a plan's step run that waits for an approval.")
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@click.option(
    "--modify",
    metavar="JSON",
    help="Approve it with changes: an object with tool_args, function_args, inputs or prompt.",
)
@click.option("--reason", metavar="TEXT", help="Recorded with the answer.")
@click.pass_obj
def approve(settings: Settings, run_id: str, step: str | None, modify: str | None, reason: str | None) -> int:
    """Let a step of a plan run that waits for an approval; STEP may be left out when only one waits.

    The answer is stored, and used when the program that runs the plan goes on with it.
    """
    changes = parse_object(modify, "--modify") if modify is not None else {}
    decision = ApprovalDecision.MODIFY if changes else ApprovalDecision.APPROVE
    result = ApprovalResult(decision=decision, reason=reason, modifications=changes)
    return _answer(settings, run_id, step, result)


@click.command("reject", cls=Command, short_help="Refuse a plan's step that waits for an approval.")
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@click.option("--reason", metavar="TEXT", help="Recorded with the answer.")
@click.option(
    "--abort", is_flag=True, help="Stop the whole run; without it only the step and what needs it are left out."
)
@click.pass_obj
def reject(settings: Settings, run_id: str, step: str | None, reason: str | None, abort: bool) -> int:
    """Refuse a step of a plan that waits for an approval; STEP may be left out when only one waits."""
    decision = ApprovalDecision.ABORT if abort else ApprovalDecision.REJECT
    return _answer(settings, run_id, step, ApprovalResult(decision=decision, reason=reason))


def _answer(settings: Settings, run_id: str, step: str | None, answer: ApprovalResult) -> int:
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id, latest=[RunState.PAUSED])
        if record.executor_type != "flexible":
            raise _not_a_plan(settings, storage, record)
        manager = CheckpointManager(storage, _KEEP_ALL)
        request = _asked(_waiting(manager, record.run_id), record.run_id, step)
        if not screen.json:
            screen.fields(list(_question(request, answer)))
        _store(manager, record.run_id, request, answer)
    if screen.json:
        told = {"run_id": record.run_id, "step": request.step_id, "request_id": request.request_id}
        screen.document({**told, "decision": answer.decision.value, "reason": answer.reason})
    else:
        screen.say("The answer is stored. It counts when the program that runs the plan goes on with this run.")
    return Exit.DONE


def _waiting(manager: CheckpointManager, run_id: str) -> list[ApprovalRequest]:
    """The requests that wait, also of a plan with values of types that only its own program knows."""
    state = plan_state(read_stored(manager.storage, run_id))
    if state is None:
        return asyncio.run(pending_approvals(manager, run_id))  # which says what is wrong
    named = {waiting.step for waiting in open_requests(state)}
    asked = [state.standing(step.id).approval for step in state.plan.steps if step.id in named]
    return [each.request for each in asked if each is not None]


def _store(manager: CheckpointManager, run_id: str, request: ApprovalRequest, answer: ApprovalResult) -> None:
    """Leave the answer. Raises ``ApprovalError`` and what the store raises."""
    try:
        asyncio.run(answer_approval(manager, run_id, request.step_id, answer, request.request_id))
    except UnknownType:
        # It rebuilds the run's values to look at the request, which was looked at here without that.
        state = plan_state(read_stored(manager.storage, run_id))
        step = state.plan.get_step(request.step_id) if state is not None else None
        problem = problem_of(answer, step, durable=True) if step is not None else "its step is gone"
        if problem is not None:
            raise ApprovalError(run_id, request.step_id, f"{problem}. Nothing was stored; answer again.") from None
        answers = Answers(manager.storage, run_id)
        if not asyncio.run(answers.leave(request.step_id, request.request_id or "", answer)):
            text = "its request was answered already; an answer is given once."
            raise ApprovalError(run_id, request.step_id, text) from None


def _not_a_plan(settings: Settings, storage: Storage, record: RunRecord) -> CommandError:
    text = f"Run {record.run_id!r} executes a graph, which asks for input rather than for approvals."
    try:
        command = next_command(settings, view_run(storage, record.run_id))
    except ResumeError:
        command = None
    command = command or command_for(settings, "resume", record.run_id, "-i", "{...}")
    return usage_error(f"{text} Answer it with:\n  {command}")


def _asked(waiting: list[ApprovalRequest], run_id: str, step: str | None) -> ApprovalRequest:
    """The request that is meant. Raises ``CommandError``."""
    if step is None and len(waiting) == 1:
        return waiting[0]
    listing = ", ".join(request.step_id for request in waiting)
    if not waiting:
        raise not_found(f"No step of run {run_id!r} waits for an approval.")
    if step is None:
        raise usage_error(f"{len(waiting)} steps of run {run_id!r} wait for an approval; name one: {listing}")
    for request in waiting:
        if request.step_id == step:
            return request
    raise not_found(f"Step {step!r} of run {run_id!r} does not wait for an approval; these do: {listing}")


def _question(request: ApprovalRequest, answer: ApprovalResult) -> list[tuple[str, Cell]]:
    pairs: list[tuple[str, Cell]] = [("step", f"{request.step_id}: {request.step_description}")]
    if request.approval_message:
        pairs.append(("asks", request.approval_message))
    if request.preview:
        pairs.append(("would do", shortened(request.preview, 400)))
    pairs.append(("answer", f"{answer.decision.value}{f' ({answer.reason})' if answer.reason else ''}"))
    pairs += [("changed", f"{name} = {shortened(text_of(value), 200)}") for name, value in _changes(answer)]
    return pairs


def _changes(answer: ApprovalResult) -> list[tuple[str, Any]]:
    return list(answer.modifications.items())
