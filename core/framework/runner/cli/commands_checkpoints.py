"""``surefoot checkpoints``: list, show, compare and verify the checkpoints of runs; pruning and pins are beside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from framework._secrets import mask, mask_value
from framework.errors import CheckpointNotFound, StorageError
from framework.graph.checkpoint_diff import Change, diff_checkpoints, find_checkpoint, position_in_words, state_at
from framework.graph.readable import masked_state, plain_json, preview, readable_state, type_of
from framework.graph.stored_run import readable_body
from framework.graph.text import text_of
from framework.runner.cli.app import Group
from framework.runner.cli.exits import Exit, not_found
from framework.runner.cli.output import Cell, Column, Screen, Styled
from framework.runner.cli.pinning import pin_checkpoint, unpin_checkpoint
from framework.runner.cli.pruning import prune
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import find_run, open_store
from framework.runner.cli.text import ago, clock_time, counted, timestamp
from framework.runner.cli.verifying import verify
from framework.runner.cli.view_screens import heading, state_table, value_text
from framework.storage.backend import Storage
from framework.storage.records import CheckpointRow, Damage

_STATUS = {"paused": "paused", "failed": "failed", "completed": "completed"}
_KINDS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "appended": (">", "green")}
_VALUE_CHARS = 200


@click.group("checkpoints", cls=Group)
def checkpoints() -> None:
    """List, show, compare, verify, pin and prune the checkpoints of runs.

    RUN is a run's id, the beginning of exactly one id, or `latest`. A checkpoint is named by its number (0 is the run's
    start), its id, or `latest`.
    """


# --- list -----------------------------------------------------------------------------------------------------------


@checkpoints.command("list", short_help="List the checkpoints a run keeps.")
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def list_checkpoints(settings: Settings, run_id: str) -> int:
    """List the checkpoints a run keeps, oldest first. Any of them can be shown, compared, and forked from."""
    screen, now = settings.screen, time.time()
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        damage: list[Damage] = []
        listed = [_listed(row, damage) for row in storage.read_checkpoint_rows(record.run_id, damage.append)][::-1]
        pins = {pin.sequence: pin.note for pin in storage.list_pins([record.run_id]) if pin.sequence}
    for each in listed:
        each["pinned"] = each["sequence"] in pins
    if screen.json:
        screen.document({"run_id": record.run_id, "checkpoints": listed, "damage": [asdict(each) for each in damage]})
        return Exit.DONE
    if not listed and not damage:
        screen.note(f"Run {record.run_id} keeps no checkpoints.")
        return Exit.DONE
    columns = [
        Column("no.", right=True),
        Column("after", grow=True),
        Column("status"),
        Column("next", grow=True, drop=1),
        Column("steps", right=True, drop=2),
        Column("tokens", right=True, drop=4),
        Column("made", right=True, drop=3),
        Column("id", drop=5),
    ]
    columns[3:3] = [Column("pinned")] if pins else []
    rows: list[list[Cell]] = []
    for each in listed:
        words = str(each["status"]).replace("_", " ")
        status: Cell = words if words == "in progress" else screen.state(_STATUS.get(words, "unknown"), words)
        made = ago(now - datetime.fromisoformat(each["at"]).timestamp()) if each["at"] is not None else ""
        following, tokens = ", ".join(each["next"]), f"{each['tokens']:,}" if each["tokens"] else ""
        mark: list[Cell] = ["yes" if each["pinned"] else ""] if pins else []
        row: list[Cell] = [str(each["sequence"]), each["after"] or "", status, *mark, following]
        rows.append([*row, str(each["steps"]), tokens, made, each["id"]])
    screen.table(columns, rows)
    for item in damage:
        screen.warning(f"damaged: {item.where}: {item.problem}")
    return Exit.DONE


def _listed(row: CheckpointRow, damage: list[Damage]) -> dict[str, Any]:
    try:
        body = readable_body(row)
    except StorageError as error:
        damage.append(Damage("", row.sequence, f"checkpoint {row.checkpoint_id}", str(error)))
        body = {}
    words = position_in_words(body)
    return {
        "sequence": row.sequence,
        "id": row.checkpoint_id,
        "after": words.get("after"),
        "status": words.get("status", "unreadable"),
        "next": words.get("next", []),
        "waiting": words.get("waiting", []),
        "steps": body.get("step_number", 0),
        "tokens": body.get("tokens", 0),
        "at": timestamp(at) if (at := _epoch(body.get("at"))) is not None else None,
        "bytes": len(row.body),
    }


def _epoch(at: Any) -> float | None:
    return at.timestamp() if hasattr(at, "timestamp") else None


# --- show -----------------------------------------------------------------------------------------------------------


@checkpoints.command("show", short_help="Show a checkpoint and its state.")
@click.argument("run_id", metavar="RUN")
@click.argument("which", metavar="[NO.|ID|latest]", default="latest")
@click.option("-k", "--key", metavar="KEY", help="Only this key's value; in a pipe as it is, for another program.")
@click.option("--full", is_flag=True, help="Show whole values, not shortened.")
@click.pass_obj
def show(settings: Settings, run_id: str, which: str, key: str | None, full: bool) -> int:
    """Show a checkpoint: where the run stood, and its state by key."""
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        row, body, values = _checkpoint(storage, record.run_id, which)
    shown = readable_state(values)
    if key is not None:  # asked for by its name, also of a secret
        return _show_key(screen, record.run_id, key, shown, full=full)
    words = position_in_words(body)
    sequence = row.sequence if row is not None else 0
    if screen.json:
        told = {"run_id": record.run_id, "sequence": sequence, "id": row.checkpoint_id if row is not None else None}
        at = _epoch(body.get("at"))
        made = timestamp(at) if at is not None else None
        screen.document({**told, "at": made, "position": words, "state": mask_value(masked_state(shown))})
        return Exit.DONE
    shown = masked_state(shown)
    at = _epoch(body.get("at"))
    pairs: list[tuple[str, Cell]] = [("run", record.run_id)]
    pairs.append(("checkpoint", f"{sequence} ({row.checkpoint_id})" if row is not None else "0 (the run's start)"))
    pairs += [("made", f"{clock_time(at)} ({ago(time.time() - at)})")] if at is not None else []
    for name, value in words.items():
        text = ", ".join(value) if isinstance(value, list) else value_text(value, full=full)
        pairs.append((name.replace("_", " "), text))
    screen.fields(pairs)
    heading(screen, "State", counted(len(shown), "key"))
    if full:
        for name, value in shown.items():
            screen.say(Styled(name, "bold"), Styled(f"  {type_of(plain_json(values[name]))}", "bright_black"))
            screen.say(value_text(value, full=True))
    else:
        rows = [(name, type_of(plain_json(values[name])), len(values[name])) for name in shown]
        texts = [preview(value, _VALUE_CHARS) for value in shown.values()]
        state_table(screen, [(*facts, text) for facts, text in zip(rows, texts, strict=True)], full=True)
    return Exit.DONE


def _checkpoint(
    storage: Storage, run_id: str, which: str
) -> tuple[CheckpointRow | None, dict[str, Any], dict[str, bytes]]:
    """A checkpoint, its body and the run's own state there; no row and body for the start.

    Raises ``CheckpointNotFound``, ``StorageError``.
    """
    if which == "0":
        return None, {}, state_at(storage, run_id, 0)
    row = find_checkpoint(storage, run_id, which)
    if row is None:
        kept = [each.sequence for each in storage.read_checkpoint_rows(run_id)]
        raise CheckpointNotFound(run_id, which, kept)
    body = readable_body(row)
    return row, body, state_at(storage, run_id, row.sequence, body.get("digest"))


def _show_key(screen: Screen, run_id: str, key: str, shown: dict[str, Any], *, full: bool) -> int:
    if key not in shown:
        raise not_found(f"The state of run {run_id!r} has no key {key!r} there; it has: {', '.join(shown) or 'none'}.")
    if screen.json:
        screen.document({"run_id": run_id, "key": key, "value": mask_value(shown[key])})
    else:
        screen.say(value_text(shown[key], full=full or not screen.is_terminal, limit=2000))
    return Exit.DONE


# --- diff -----------------------------------------------------------------------------------------------------------


@checkpoints.command("diff", short_help="Compare two checkpoints of a run.")
@click.argument("run_id", metavar="RUN")
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", default="latest")
@click.option("--full", is_flag=True, help="Show whole values, not shortened.")
@click.pass_obj
def diff(settings: Settings, run_id: str, first: str, second: str, full: bool) -> int:
    """Compare two checkpoints of a run: what changed in the state from A to B, key by key, and where it stood."""
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        changes = diff_checkpoints(storage, record.run_id, first, second)
    if screen.json:
        screen.document(
            {
                "run_id": record.run_id,
                "from": first,
                "to": second,
                "changes": mask_value([asdict(change) for change in changes]),
            }
        )
        return Exit.DONE
    for title, where in (("State", "state"), ("Position", "position")):
        found = [change for change in changes if change.where == where]
        screen.say(Styled(title, "bold"), "" if found else Styled("  the same", "bright_black"))
        if found:
            _changes_table(screen, found, full=full)
        if where == "state":
            screen.say()
    return Exit.DONE


def _changes_table(screen: Screen, changes: Sequence[Change], *, full: bool) -> None:
    if full:
        for change in changes:
            mark, style = _KINDS[change.kind]
            screen.say(Styled(f"{mark} {change.path}", style), f"  {change.kind}")
            if change.kind in ("removed", "changed"):
                screen.say(Styled(f"  - {mask(text_of(change.old))}", "red"))
            if change.kind != "removed":
                screen.say(Styled(f"  + {mask(text_of(change.new))}", "green"))
        return
    columns = [Column(""), Column("where", grow=True), Column("before", grow=True), Column("after", grow=True)]
    rows: list[list[Cell]] = []
    for change in changes:
        mark, style = _KINDS[change.kind]
        old = "" if change.kind in ("added", "appended") else value_text(change.old, full=False, limit=_VALUE_CHARS)
        new = "" if change.kind == "removed" else value_text(change.new, full=False, limit=_VALUE_CHARS)
        old = "..." if change.kind == "appended" else old
        new = f"... {new}" if change.kind == "appended" else new
        rows.append([Styled(mark, style), Styled(change.path, style), Styled(old, "red"), Styled(new, "green")])
    screen.table(columns, rows)


# --- verify -------------------------------------------------------------------------------------------------------


checkpoints.add_command(verify)


for _command in (prune, pin_checkpoint, unpin_checkpoint):
    checkpoints.add_command(_command)
