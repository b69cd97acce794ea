"""``surefoot runs settle`` and ``send``: what became of an effect, and a value that a node waits for."""

from __future__ import annotations

import json
from typing import Any

import click

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.journal_answers import part_that_waits
from framework.graph.journal_slots import QUESTION
from framework.runner.cli.app import Command
from framework.runner.cli.exits import CommandError, Exit, not_found, usage_error
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import RESUMABLE, command_for, find_run, open_store
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.records import RunRecord


@click.command("settle", cls=Command, short_help="Say what became of a call whose effect is unknown.")
@click.argument("run_id", metavar="RUN")
@click.argument("call", metavar="CALL")
@click.option("--done", metavar="JSON", help="It happened, and this is the call's value (of a tool: its text).")
@click.option("--redo", is_flag=True, help="It did not happen, or may happen twice: make it again, with the same key.")
@click.option("--skip", is_flag=True, help="Leave it: it is not made, and its value is null.")
@click.pass_obj
def settle(settings: Settings, run_id: str, call: str, done: str | None, redo: bool, skip: bool) -> int:
    """Say what became of a CALL that was in flight when its process ended, such as shop#1/4; `runs show` names them.

    The answer is stored; `surefoot resume` or `surefoot recover` goes on with it.
    """
    if [done is not None, redo, skip].count(True) != 1:
        raise usage_error("Give exactly one of --done JSON, --redo and --skip.")
    given: dict[str, Any] = {"done": _value(done, "--done")} if done is not None else {"redo": redo, "skip": skip}
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id, latest=RESUMABLE)
        whole = _whole(storage, record)
        manager = CheckpointManager(storage)
        calls = {each.id: each for each in manager.journal(record.run_id)}
        open_here = call in calls and calls[call].state in ("unknown", "running")
        if not open_here and (part := part_that_waits(storage, record.run_id, call)) is not None:
            record = find_run(storage, part)  # of a sub-graph that the run waits with
            calls = {each.id: each for each in manager.journal(part)}
        if call not in calls:
            unknown = [each.id for each in calls.values() if each.state in ("unknown", "running")]
            listing = f"Those with an unknown effect: {', '.join(unknown)}." if unknown else "No effect is unknown."
            raise not_found(f"Run {record.run_id!r} has no recorded call {call!r} in flight. {listing}")
        if calls[call].state != "unknown":
            _refuse_running(record)
        manager.settle(record.run_id, call, **given)
    action = next(name for name, each in given.items() if name == "done" or each)
    _tell(settings, record.run_id, {"call": call, "action": action}, f"{call} is settled: {action}.", whole=whole)
    if action == "redo":
        screen.note(f"It is made again with the idempotency key {calls[call].key}")
    return Exit.DONE


@click.command(
    "send",
    cls=Command,
    short_help="Give a run the value that a node of it waits for.",
    context_settings={"ignore_unknown_options": True},  # -4 is a value
)
@click.argument("run_id", metavar="RUN")
@click.argument("name")
@click.argument("value", metavar="JSON")
@click.option(
    "--occurrence",
    type=click.IntRange(min=1),
    metavar="N",
    help="Which of the run's waits for this signal is meant, begun or yet to come; the first that is open.",
)
@click.pass_obj
def send(settings: Settings, run_id: str, name: str, value: str, occurrence: int | None) -> int:
    """Give a run a value: NAME is that of a signal, or the id of a question, as `runs show` names it.

    A signal may come before the run's first wait for it. Each wait takes one value, the first; one that comes too late
    is refused. `surefoot resume` or `surefoot recover` goes on with it.
    """
    given = _value(value, "JSON")
    if not name:
        raise usage_error("NAME is empty; it is that of a signal, or the id of a question.")
    if occurrence is not None and QUESTION.search(name):
        raise usage_error("--occurrence is of signals; a question is answered by its id alone.")
    with open_store(settings) as storage:
        record = find_run(storage, run_id, latest=(*RESUMABLE, RunState.RUNNING))
        CheckpointManager(storage).send(record.run_id, name, given, occurrence=occurrence)
        whole = _whole(storage, record)
    running = whole.state is RunState.RUNNING
    _tell(settings, record.run_id, {"name": name}, f"{name} was sent.", whole=whole, running=running)
    return Exit.DONE


def _value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise usage_error(
            f"{where} is not JSON: {error.msg} at column {error.colno}. Write true, 42, '\"a text\"' or "
            """'{"key": "value"}'."""
        ) from None


def _whole(storage: Storage, record: RunRecord) -> RunRecord:
    """The run that a part, such as that of a plan's sub-graph, is resumed with."""
    while record.parent_run_id is not None and storage.find_run(record.parent_run_id) is not None:
        record = find_run(storage, record.parent_run_id)
    return record


def _tell(
    settings: Settings, run_id: str, facts: dict[str, Any], text: str, *, whole: RunRecord, running: bool = False
) -> None:
    screen = settings.screen
    command = None if running else command_for(settings, "resume", whole.run_id)
    if screen.json:
        screen.document({"run_id": run_id, **facts, "resume_command": command})
        return
    screen.say(f"Run {run_id}: {text}")
    if command is not None:
        screen.note("Go on with:")
        screen.note("  ", command, wrap=False)


def _refuse_running(record: RunRecord) -> None:
    if record.state is RunState.RUNNING:
        raise CommandError(f"Run {record.run_id!r} is running; settle its call once it has paused or ended.", Exit.BUSY)
