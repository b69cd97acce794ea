"""``surefoot runs pin``, ``checkpoints pin`` and ``unpin`` of both: what is kept whatever retention says."""

from __future__ import annotations

from dataclasses import asdict

import click

from framework.errors import CheckpointNotFound
from framework.graph.checkpoint_diff import find_checkpoint
from framework.runner.cli.app import Command
from framework.runner.cli.exits import Exit, usage_error
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import find_run, open_store
from framework.runner.cli.text import timestamp
from framework.storage.backend import Storage
from framework.storage.checks import MAX_NOTE
from framework.storage.retention_records import Pin

_note = click.option("--note", default="", metavar="TEXT", help="Why it is kept; shown with the run.")


def as_document(pin: Pin) -> dict[str, object]:
    """A pin as commands show it in JSON."""
    return {**asdict(pin), "pinned_at": timestamp(pin.pinned_at)}


@click.command("pin", cls=Command, short_help="Keep a run whatever retention says.")
@click.argument("run_id", metavar="RUN")
@_note
@click.pass_obj
def pin_run(settings: Settings, run_id: str, note: str) -> int:
    """Keep a run: no retention policy removes it or its old checkpoints, and deleting it is refused.

    How many checkpoints its own commits keep stays as it was configured; `surefoot checkpoints pin` keeps one.
    """
    return _pin(settings, run_id, None, note)


@click.command("unpin", cls=Command, short_help="Leave a run to retention again.")
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def unpin_run(settings: Settings, run_id: str) -> int:
    """Take a run's pin away. Its pinned checkpoints stay pinned."""
    return _unpin(settings, run_id, None)


@click.command("pin", cls=Command, short_help="Keep a checkpoint whatever retention says.")
@click.argument("run_id", metavar="RUN")
@click.argument("checkpoint")
@_note
@click.pass_obj
def pin_checkpoint(settings: Settings, run_id: str, checkpoint: str, note: str) -> int:
    """Keep a checkpoint with its state, and with it its run. CHECKPOINT is a number, an id or `latest`."""
    return _pin(settings, run_id, checkpoint, note)


@click.command("unpin", cls=Command, short_help="Leave a checkpoint to retention again.")
@click.argument("run_id", metavar="RUN")
@click.argument("checkpoint")
@click.pass_obj
def unpin_checkpoint(settings: Settings, run_id: str, checkpoint: str) -> int:
    """Take a checkpoint's pin away. It goes when its run's retention is applied next."""
    return _unpin(settings, run_id, checkpoint)


def _pin(settings: Settings, run_id: str, checkpoint: str | None, note: str) -> int:
    if len(note) > MAX_NOTE:
        raise usage_error(f"--note has at most {MAX_NOTE:,} characters; this one has {len(note):,}.")
    with open_store(settings) as storage:
        found = find_run(storage, run_id).run_id
        pin = storage.pin(found, _id_of(storage, found, checkpoint), note)
    if settings.json:
        settings.screen.document(as_document(pin))
    else:
        settings.screen.say(f"{_what(pin.run_id, pin.sequence)} is pinned.")
    return Exit.DONE


def _unpin(settings: Settings, run_id: str, checkpoint: str | None) -> int:
    with open_store(settings) as storage:
        found = find_run(storage, run_id).run_id
        checkpoint_id, sequence = _id_of(storage, found, checkpoint), 0
        if checkpoint_id is not None:
            row = storage.find_checkpoint_row(found, checkpoint_id)
            sequence = row.sequence if row is not None else 0
        was = storage.unpin(found, checkpoint_id)
    if settings.json:
        settings.screen.document({"run_id": found, "checkpoint_id": checkpoint_id, "was_pinned": was})
    else:
        settings.screen.say(f"{_what(found, sequence)} {'is no longer' if was else 'was not'} pinned.")
    return Exit.DONE


def _id_of(storage: Storage, run_id: str, checkpoint: str | None) -> str | None:
    if checkpoint is None:
        return None
    row = find_checkpoint(storage, run_id, checkpoint)
    if row is None:
        raise CheckpointNotFound(run_id, checkpoint, [each.sequence for each in storage.read_checkpoint_rows(run_id)])
    return row.checkpoint_id


def _what(run_id: str, sequence: int) -> str:
    return f"Checkpoint {sequence} of run {run_id}" if sequence else f"Run {run_id}"
