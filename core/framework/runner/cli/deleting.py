"""``surefoot runs cancel`` and ``delete``: they show what would go, and ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import click

from framework.errors import CommitConflict, CorruptData, RunBusy, RunPinned
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.resume_outlook import owner_in_words
from framework.runner.cli.app import Command
from framework.runner.cli.confirming import age_in_seconds, agreed, consent_options
from framework.runner.cli.exits import CommandError, Exit, usage_error
from framework.runner.cli.output import Cell, Column, Styled
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import all_runs, command_for, find_run, open_store
from framework.runner.cli.text import ago, counted
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import RunRecord

_DELETABLE = [state.value for state in RunState if state is not RunState.RUNNING]
_UNFINISHED = (RunState.RUNNING, RunState.CRASHED, RunState.PAUSED, RunState.FAILED)
_SHOWN = 20


# --- cancel ---------------------------------------------------------------------------------------------------------


@click.command("cancel", cls=Command, short_help="Stop a run; it can be resumed.")
@click.argument("run_id", metavar="RUN")
@consent_options
@click.pass_obj
def cancel(settings: Settings, run_id: str, yes: bool, dry_run: bool) -> int:
    """Stop a run, whichever process runs it. What is finished stays, and it can be resumed.

    A run that nobody runs is cancelled at once. One that runs elsewhere is asked to stop: it does so within about a
    second, after the commit that is under way.
    """
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id, latest=_UNFINISHED)
        state = effective_state(record)
        if state is RunState.CANCELLED:
            return _cancelled(settings, record, "is cancelled already", outcome="cancelled")
        if state is RunState.RUNNING:
            owner = owner_in_words(record.owner) if record.owner else "nobody"
            screen.note(f"Run {record.run_id} is running ({owner}); the step in flight would be stopped.")
            if not agreed(settings, "Stop it?", yes=yes, dry_run=dry_run):
                return _cancelled(settings, record, "would be asked to stop", outcome="unchanged")
        elif state is not RunState.COMPLETED:
            screen.note(
                f"Run {record.run_id} is {state.value}; it would be cancelled. `surefoot recover` leaves it alone."
            )
            if not agreed(settings, "Cancel it?", yes=yes, dry_run=dry_run):
                return _cancelled(settings, record, f"is {state.value} and would be cancelled", outcome="unchanged")
        manager = CheckpointManager(storage, CheckpointConfig(retention_strategy="all"))
        if manager.cancel(record.run_id):
            return _cancelled(settings, record, "is cancelled", outcome="cancelled")
    _cancelled(settings, record, "was asked to stop", outcome="asked")
    screen.note("See it stop:")
    screen.note("  ", command_for(settings, "runs", "watch", record.run_id), wrap=False)
    return Exit.DONE


def _cancelled(settings: Settings, record: RunRecord, words: str, *, outcome: str) -> int:
    if settings.json:
        settings.screen.document({"run_id": record.run_id, "outcome": outcome})
    else:
        settings.screen.say(f"Run {record.run_id} {words}.")
    return Exit.DONE


# --- delete ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is to be deleted, and what stays although it was asked for."""

    going: list[RunRecord]
    parts: set[str]
    staying: list[tuple[str, str]]
    unreadable: list[str]
    """Ids of runs that were named and whose records are damaged; they go, too."""

    @property
    def ids(self) -> list[str]:
        return [*self.unreadable, *(record.run_id for record in self.going)]


@click.command("delete", cls=Command, short_help="Delete runs for good.")
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@click.option(
    "-s", "--state", "states", multiple=True, type=click.Choice(_DELETABLE), help="All runs in this state. Repeatable."
)
@click.option("--older-than", metavar="AGE", help="All runs that last changed longer ago than AGE: 30d, 12h, 90m.")
@click.option("--force", is_flag=True, help="Pinned ones, too.")
@consent_options
@click.pass_obj
def delete(
    settings: Settings,
    run_ids: tuple[str, ...],
    states: tuple[str, ...],
    older_than: str | None,
    force: bool,
    yes: bool,
    dry_run: bool,
) -> int:
    """Delete runs for good, with their checkpoints and the runs that are parts of them.

    Name runs, or choose them with --state and --older-than; with both, runs for which both hold. Running ones stay, and
    so do pinned ones without --force. A damaged run is deleted as well, when its whole id is named.
    """
    if run_ids and (states or older_than):
        raise usage_error("Name runs, or choose them with --state and --older-than; not both.")
    if not run_ids and not states and not older_than:
        raise usage_error("Nothing was chosen. Name runs, or choose them with --state or --older-than.")
    with open_store(settings) as storage:
        chosen = _choose(storage, run_ids, states, age_in_seconds(older_than) if older_than else None, force=force)
        if not chosen.ids:
            return _nothing(settings, chosen, named=bool(run_ids))
        if not settings.json:
            _preview(settings, chosen)
        question = f"Delete {counted(len(chosen.ids), 'run')} for good?"
        done: list[str] = []
        if agreed(settings, question, yes=yes, dry_run=dry_run):
            done = _delete(storage, chosen, force=force)
    if settings.json:
        document: dict[str, object] = {
            "deleted": done,
            "kept": [{"run_id": key, "why": why} for key, why in chosen.staying],
        }
        if dry_run:
            document["would_delete"] = chosen.ids
        settings.screen.document(document)
    elif not dry_run:
        settings.screen.say(f"Deleted {counted(len(done), 'run')}.")
        for key, why in chosen.staying:
            settings.screen.note(f"{key} stays: {why}.")
    return Exit.BUSY if run_ids and chosen.staying else Exit.DONE


def _choose(
    storage: Storage, run_ids: Sequence[str], states: Sequence[str], older_than: float | None, *, force: bool = False
) -> _Chosen:
    everything = list(all_runs(storage))
    unreadable: list[str] = []
    if run_ids:
        wanted: set[str] = set()
        for each in run_ids:
            try:
                wanted.add(find_run(storage, each).run_id)
            except CorruptData:
                unreadable.append(each)
        wanted |= set(unreadable)  # for their parts
    else:
        limit = time.time() - older_than if older_than is not None else None
        kinds = {RunState(state) for state in states}
        wanted = {
            record.run_id
            for record in everything
            if (not kinds or effective_state(record) in kinds) and (limit is None or record.updated_at < limit)
        }
        # Chosen by a rule, a part goes with its whole or not at all: the whole may still need it.
        there = {record.run_id for record in everything}
        wanted -= {each.run_id for each in everything if each.parent_run_id in there - wanted}
    parts: set[str] = set()
    grew = True
    while grew:
        new = {r.run_id for r in everything if r.parent_run_id in wanted | parts} - wanted - parts
        parts |= new
        grew = bool(new)
    going: list[RunRecord] = []
    staying: list[tuple[str, str]] = []
    pinned = set() if force else _held_by_pins(storage, [each for each in everything if each.run_id in wanted | parts])
    for record in everything:
        if record.run_id in wanted | parts:
            if record.run_id in pinned:
                staying.append((record.run_id, "it, or a run that it belongs with, is pinned (--force deletes it)"))
            elif effective_state(record) is RunState.RUNNING:
                staying.append((record.run_id, "it is running"))
            else:
                going.append(record)
    return _Chosen(going, parts, staying, list(dict.fromkeys(unreadable)))


def _held_by_pins(storage: Storage, chosen: Sequence[RunRecord]) -> set[str]:
    """Those of the runs that have a pin, or belong with one that has: as whole and part."""
    held = {pin.run_id for pin in storage.list_pins([each.run_id for each in chosen])}
    grew = bool(held)
    while grew:
        more = {each.run_id for each in chosen if each.parent_run_id in held}
        more |= {each.parent_run_id for each in chosen if each.run_id in held and each.parent_run_id is not None}
        grew = not more <= held
        held |= more
    return held


def _nothing(settings: Settings, chosen: _Chosen, *, named: bool) -> int:
    if named:
        listing = ", ".join(run_id for run_id, _ in chosen.staying)
        if any("pinned" in why for _, why in chosen.staying):
            raise CommandError(
                f"Not deleted, as it is pinned or running: {listing}. --force deletes pinned ones.", Exit.BUSY
            )
        raise CommandError(f"Running, so not deleted: {listing}. Cancel it first, or wait for it.", Exit.BUSY)
    if settings.json:
        kept = [{"run_id": run_id, "why": why} for run_id, why in chosen.staying]
        settings.screen.document({"deleted": [], "kept": kept})
    else:
        settings.screen.say("There is nothing to delete.")
    return Exit.DONE


def _preview(settings: Settings, chosen: _Chosen) -> None:
    screen, now = settings.screen, time.time()
    columns = [Column("run", grow=True), Column("state"), Column("last change", right=True, drop=1), Column("", drop=2)]
    rows: list[list[Cell]] = []
    for run_id in chosen.unreadable:
        rows.append([run_id, screen.state("unknown", "damaged"), "", ""])
    for record in chosen.going[:_SHOWN]:
        state = screen.state(effective_state(record).value)
        part = f"part of {record.parent_run_id}" if record.run_id in chosen.parts else ""
        rows.append([record.run_id, state, ago(now - record.updated_at), part])
    screen.table(columns, rows)
    if len(chosen.going) > _SHOWN:
        screen.say(Styled(f"and {len(chosen.going) - _SHOWN} more", "bright_black"))


def _delete(storage: Storage, chosen: _Chosen, *, force: bool = False) -> list[str]:
    """Delete what was chosen, parts before their wholes; the ids. What was taken up meanwhile stays."""
    done = [run_id for run_id in chosen.unreadable if storage.delete_run(run_id, force=force)]
    for record in sorted(chosen.going, key=lambda each: each.run_id not in chosen.parts):
        try:
            try:
                deleted = storage.delete_run(record.run_id, force=force)
            except RunBusy:
                # A crashed run whose owner is gone still has its lease: taking it over first gives the lease up.
                _take_over(storage, record)
                deleted = storage.delete_run(record.run_id, force=force)
        except (RunBusy, CommitConflict):
            chosen.staying.append((record.run_id, "it has been taken up meanwhile"))
        except RunPinned:
            chosen.staying.append((record.run_id, "it has been pinned meanwhile"))
        else:
            if deleted:
                done.append(record.run_id)
    return done


def _take_over(storage: Storage, record: RunRecord) -> None:
    """Claim and release a run whose owner is certainly gone. Raises ``RunBusy``, ``CommitConflict``.

    Such a run is crashed, and stays so if it is not deleted after all: one that has got further is not claimed.
    """
    from framework.storage.ownership import is_alive, new_owner, retire  # noqa: PLC0415 - beside its only use

    owner = new_owner()
    try:
        claimed = storage.claim_run(record.run_id, owner, 30.0, is_alive, record.sequence)
        storage.release_lease(record.run_id, claimed.token)
    finally:
        retire(owner)
