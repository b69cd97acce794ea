"""``surefoot runs``: list, show, follow, cancel, fork, answer, export and delete runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from framework import __version__
from framework._secrets import mask_value
from framework.errors import SurefootError
from framework.graph.crash_loops import is_given_up
from framework.graph.edge import GraphSpec
from framework.graph.run_view import RunView, as_json, export_run, view_run
from framework.runner.cli.answering import approve, reject
from framework.runner.cli.app import Group
from framework.runner.cli.deleting import cancel, delete
from framework.runner.cli.exits import Exit, usage_error
from framework.runner.cli.forking import ForkOptions, fork_options, fork_run
from framework.runner.cli.output import Cell, Column, jsonable
from framework.runner.cli.pinning import as_document, pin_run, unpin_run
from framework.runner.cli.settings import Settings
from framework.runner.cli.settling import send, settle
from framework.runner.cli.stores import command_for, facts_of, find_run, open_store
from framework.runner.cli.text import ago, size, timestamp
from framework.runner.cli.view_screens import next_command, show_run, steps_table
from framework.runner.cli.watching import watch
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import RunRecord

_STATES = [state.value for state in RunState]


@click.group("runs", cls=Group)
def runs() -> None:
    """List, show, watch, answer, settle, cancel, fork, export, pin and delete runs.

    RUN is a run's id, the beginning of exactly one id, or `latest`.
    """


for _command in (approve, reject, send, settle, cancel, pin_run, unpin_run, delete, watch):
    runs.add_command(_command)


# --- list -----------------------------------------------------------------------------------------------------------


@runs.command("list")
@click.option(
    "-s", "--state", "states", multiple=True, type=click.Choice(_STATES), help="Only runs in this state. Repeatable."
)
@click.option("--agent", metavar="NAME", help="Only runs of this agent: its folder's name or path, or its graph's id.")
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="At most this many.")
@click.option("--before", metavar="RUN", help="Only runs that began before this one, for the next page.")
@click.pass_obj
def list_runs(settings: Settings, states: tuple[str, ...], agent: str | None, limit: int, before: str | None) -> int:
    """List runs, newest first."""
    screen = settings.screen
    now = time.time()
    with open_store(settings) as storage:
        start = find_run(storage, before) if before is not None else None
        wanted = _matching(storage, [RunState(state) for state in states], agent, start)
        found = [record for _, record in zip(range(limit + 1), wanted, strict=False)]
        page, more = found[:limit], len(found) > limit
        pinned = {pin.run_id for pin in storage.list_pins([record.run_id for record in page])}
        listed = [{**_listed(storage, record), "pinned": record.run_id in pinned} for record in page]
    if screen.json:
        screen.document({"runs": mask_value(listed), "next_before": page[-1].run_id if more else None})
        return Exit.DONE
    if not page:
        chosen = " that match" if states or agent or before else " in this store yet; `surefoot run AGENT` starts one"
        screen.note(f"There are no runs{chosen}.")
        return Exit.DONE
    columns = [
        Column("run", grow=any(len(record.run_id) > 44 for record in page)),
        Column("state"),
        Column("agent", grow=True, drop=2),
        Column("steps", right=True, drop=3),
        Column("changed", right=True, drop=1),
        Column("started", right=True, drop=4),
    ]
    columns[2:2] = [Column("pinned")] if pinned else []
    rows: list[list[Cell]] = []
    for record, each in zip(page, listed, strict=True):
        steps = "" if each["steps"] is None else str(each["steps"])
        started, changed = ago(now - record.created_at), ago(now - record.updated_at)
        mark: list[Cell] = ["yes" if each["pinned"] else ""] if pinned else []
        words = "given up" if each["given_up"] else each["state"]
        state = screen.state(each["state"], words)
        rows.append([record.run_id, state, *mark, each["agent"] or "", steps, changed, started])
    screen.table(columns, rows)
    if more:
        filters = [word for state in states for word in ("--state", state)] + (["--agent", agent] if agent else [])
        older = command_for(settings, "runs", "list", *filters, "--before", page[-1].run_id)
        screen.note("There are more; older ones:")
        screen.note("  ", older, wrap=False)
    return Exit.DONE


def _matching(
    storage: Storage, states: Sequence[RunState], agent: str | None, before: RunRecord | None
) -> Iterator[RunRecord]:
    """Runs in these states (all without), of this agent, newest first, after ``before``."""
    # A run whose owner is certainly gone is recorded as running until its lease ends.
    asked = list({*states, RunState.RUNNING}) if RunState.CRASHED in states else list(states)
    page = storage.list_runs(asked or None, before=before)
    while page:
        for record in page:
            if states and effective_state(record) not in states:
                continue
            if agent is None or _is_of(record, agent):
                yield record
        page = storage.list_runs(asked or None, before=page[-1])


def _is_of(record: RunRecord, agent: str) -> bool:
    facts = _facts(record)
    path = facts.get("agent_path")
    if agent in (facts.get("agent_name"), path, facts.get("definition_id")):
        return True
    return isinstance(path, str) and Path(agent).expanduser().absolute() == Path(path)


def _facts(record: RunRecord) -> dict[str, Any]:
    """What was recorded with a run, and its definition's id; nothing when that cannot be read."""
    from framework.graph.readable import plain_json  # noqa: PLC0415 - beside its only use

    try:
        header = plain_json(record.header or b"{}")
        return {**facts_of(record), "definition_id": header.get("definition_id")}
    except SurefootError:
        return {}


def _listed(storage: Storage, record: RunRecord) -> dict[str, Any]:
    facts = _facts(record)
    return {
        "run_id": record.run_id,
        "state": effective_state(record).value,
        "kind": "plan" if record.executor_type == "flexible" else "graph",
        "agent": facts.get("agent_name") or facts.get("definition_id"),
        "agent_path": facts.get("agent_path"),
        "goal_id": record.goal_id,
        "steps": _steps_of(storage, record),
        "created_at": timestamp(record.created_at),
        "updated_at": timestamp(record.updated_at),
        "error": record.error,
        "recovery_attempts": record.recovery_attempts,
        "given_up": is_given_up(record),
        "parent_run_id": record.parent_run_id,
    }


def _steps_of(storage: Storage, record: RunRecord) -> int | None:
    """Steps done, by the newest checkpoint; ``None`` when that cannot be read."""
    from framework.graph.stored_run import readable_body  # noqa: PLC0415 - beside its only use

    try:
        for row in storage.read_checkpoint_rows(record.run_id, limit=1):
            body = readable_body(row)
            return int(body.get("step_number") or 0)
    except SurefootError:
        return None
    return 0 if record.sequence == 0 else None


# --- show, steps ----------------------------------------------------------------------------------------------------


@runs.command("show", short_help="Show a run, and what a resume would do.")
@click.argument("run_id", metavar="RUN")
@click.option("--agent", metavar="PATH", help="The agent's folder, to see whether it still fits. Default: as recorded.")
@click.option("--full", is_flag=True, help="Show everything, and nothing shortened.")
@click.pass_obj
def show(settings: Settings, run_id: str, agent: str | None, full: bool) -> int:
    """Show a run: its steps, its state, and what a resume would do."""
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        view = view_run(storage, record.run_id, definition=_definition_for(settings, record, agent))
        pins = storage.list_pins([record.run_id])
    if screen.json:
        document = {**as_json(view), "pins": [as_document(pin) for pin in pins]}
        screen.document(mask_value({**document, "next_command": next_command(settings, view)}))
    else:
        show_run(settings, view, full=full, pins=pins)
    return Exit.DONE


def _definition_for(settings: Settings, record: RunRecord, agent: str | None) -> GraphSpec | None:
    """The graph that the agent's folder holds now; ``None`` when there is none, which a note says if it was named."""
    from framework.runner.agent_file import read_agent_file  # noqa: PLC0415 - not for every command
    from framework.runner.cli.agents import folder_of  # noqa: PLC0415 - it loads the runner

    try:
        return read_agent_file(folder_of(record, agent)).graph
    except SurefootError as error:
        if agent is not None:
            raise
        if _facts(record).get("agent_path") is not None:
            settings.screen.note(f"note: {error}")
        return None


@runs.command("steps", short_help="List the steps of a run.")
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def steps(settings: Settings, run_id: str) -> int:
    """List the steps of a run: every visit of a node, or every step of a plan."""
    screen = settings.screen
    with open_store(settings) as storage:
        view: RunView = view_run(storage, find_run(storage, run_id).run_id)
    if screen.json:
        screen.document({"run_id": view.run_id, "state": view.state.value, "steps": mask_value(as_json(view.steps))})
    elif view.steps:
        steps_table(screen, view.steps, is_plan=view.kind == "plan")
    else:
        screen.note(f"Run {view.run_id} has no steps.")
    for line in view.damage:
        screen.warning(f"damaged: {line}")
    return Exit.DONE


# --- fork, export ---------------------------------------------------------------------------------------------------


@runs.command("fork", short_help="Start a new run from a checkpoint of another.")
@click.pass_obj
@fork_options
def fork(settings: Settings, run_id: str, options: ForkOptions) -> int:
    """Start a new run from a checkpoint of RUN; the same as `surefoot fork`."""
    return fork_run(settings, run_id, options)


@runs.command("export", short_help="Write a run as one JSON document.")
@click.argument("run_id", metavar="RUN")
@click.option("-f", "--file", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@click.option("--no-values", is_flag=True, help="Types and sizes only, for a run whose values nobody may see.")
@click.pass_obj
def export(settings: Settings, run_id: str, path: Path | None, no_values: bool) -> int:
    """Write a run as one JSON document, for a bug report. Known secrets are masked.

    Without --file it goes to stdout. The document holds what the run was given and what it made; --no-values leaves
    that out.
    """
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        exported = {**export_run(storage, record.run_id, values=not no_values), "library_version": __version__}
    if path is None:
        screen.document(exported)
        return Exit.DONE
    text = json.dumps(jsonable(exported), indent=1, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise usage_error(f"The export cannot be written to {path}: {error.strerror or error}.") from error
    if screen.json:
        screen.document({"run_id": record.run_id, "file": str(path), "bytes": len(text.encode())})
    else:
        screen.say(f"Run {record.run_id} was written to {path} ({size(len(text.encode()))}).")
        if not no_values:
            screen.note("It holds the run's values. Look through it before you give it away, or use --no-values.")
    return Exit.DONE
