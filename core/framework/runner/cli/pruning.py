"""``surefoot checkpoints prune``: by number, for runs; by age, size and count, for the whole store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from framework.errors import SurefootError
from framework.runner.cli.app import Command
from framework.runner.cli.confirming import agreed, consent_options
from framework.runner.cli.exits import CommandError, Exit, usage_error
from framework.runner.cli.output import Cell, Column, Screen, Styled
from framework.runner.cli.retention_options import OPTIONS, chosen_policy, policy_of, policy_options
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import all_runs, command_for, find_run, open_store
from framework.runner.cli.text import ago, counted, size
from framework.schemas.retention import RetentionPolicy
from framework.storage.backend import Storage
from framework.storage.records import Retention
from framework.storage.retention_records import SweepReport

_SHOWN = 10


@click.command("prune", cls=Command, short_help="Remove old checkpoints and finished runs.")
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option("--all", "everything", is_flag=True, help="With --keep: all runs of the store.")
@click.option("--keep", type=click.IntRange(1), help="How many of a run's newest checkpoints stay.")
@policy_options
@consent_options
@click.pass_obj
def prune(
    settings: Settings,
    /,
    run_id: str | None,
    everything: bool,
    keep: int | None,
    yes: bool,
    dry_run: bool,
    **given: str | None,
) -> int:
    """Remove old checkpoints of runs (--keep), or finished runs and old checkpoints of the whole store.

    With --keep the newest checkpoints of RUN, or of --all runs, stay. The other options say which finished runs stay;
    without any of them the policy in $SUREFOOT_RETENTION counts. Running, paused and crashed runs, pinned runs and
    checkpoints, and what a run needs to go on stay in any case. Other processes may go on with their runs meanwhile.
    """
    policy = policy_of(given)
    if keep is not None:
        if policy is not None:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in OPTIONS if given[name] is not None)
            raise usage_error(f"--keep is about checkpoints, {names} about a store; give them one by one.")
        if (run_id is None) == (not everything):
            raise usage_error("Name a RUN, or choose all of them with --all.")
        return _prune_runs(settings, run_id, keep, yes=yes, dry_run=dry_run)
    if run_id is not None or everything:
        raise usage_error("Say how many checkpoints stay: --keep N.")
    policy = policy if policy is not None else chosen_policy(None)
    if policy is None:
        raise usage_error("Say what stays: --keep N with a RUN or --all, or --max-age AGE and others (--help).")
    return _sweep(settings, policy, yes=yes, dry_run=dry_run)


# --- by number ------------------------------------------------------------------------------------------------------


def _prune_runs(settings: Settings, run_id: str | None, keep: int, *, yes: bool, dry_run: bool) -> int:
    screen = settings.screen
    with open_store(settings) as storage:
        ids = [each.run_id for each in all_runs(storage)] if run_id is None else [find_run(storage, run_id).run_id]
        going = {each: count for each in ids if (count := _above(storage, each, keep))}
        total, removed, failed = sum(going.values()), 0, list[tuple[str, str]]()
        words = f"{counted(total, 'checkpoint')} of {counted(len(going), 'run')}"
        if not going:
            screen.say(f"There is nothing to prune: no run keeps more than {keep}.")
        else:
            screen.say(f"{words} would go; the newest {keep} of each stay.")
            if agreed(settings, f"Remove {words} for good?", yes=yes, dry_run=dry_run):
                for each in going:
                    try:
                        removed += storage.prune(each, Retention(keep))
                    except SurefootError as error:
                        failed.append((each, str(error)))
                screen.say(f"Removed {counted(removed, 'checkpoint')}.")
    if screen.json:
        screen.document({"would_remove": total, "removed": removed, "runs": len(going), "keep": keep})
    if failed:
        listing = "; ".join(f"{each}: {problem}" for each, problem in failed)
        raise CommandError(f"Not all could be pruned: {listing}")
    return Exit.DONE


def _above(storage: Storage, run_id: str, keep: int) -> int:
    """How many checkpoints a run keeps beyond its newest ``keep``, without pinned ones."""
    pinned = {pin.sequence for pin in storage.list_pins([run_id])}
    older = [row.sequence for row in storage.read_checkpoint_rows(run_id)][keep:]
    return sum(sequence not in pinned for sequence in older)


# --- by policy ------------------------------------------------------------------------------------------------------


def _sweep(settings: Settings, policy: RetentionPolicy, *, yes: bool, dry_run: bool) -> int:
    screen = settings.screen
    with open_store(settings) as storage:
        foretold = storage.sweep(policy, dry_run=True)
        done: SweepReport | None = None
        if foretold.runs or foretold.checkpoints:
            if not screen.json:
                _preview(screen, foretold)
            question = f"Remove {_words(foretold)} for good?"
            if agreed(settings, question, yes=yes, dry_run=dry_run):
                with _progress(screen, foretold) as tell:
                    done = storage.sweep(policy, on_progress=tell)
        elif not dry_run:
            done = storage.sweep(
                policy
            )  # an earlier sweep may have been interrupted, and there may be room to give back
        usage = storage.usage()
    report = done if done is not None else foretold
    if screen.json:
        document = asdict(report)
        document |= {"dry_run": done is None, "policy": policy.model_dump(mode="json", exclude_none=True)}
        screen.document(document)
    else:
        _summary(settings, report, done is not None, usage.free_bytes if not usage.can_shrink else 0)
    return Exit.DONE


def _words(report: SweepReport) -> str:
    parts = [counted(report.runs, "run")] if report.runs else []
    parts += [counted(report.checkpoints, "old checkpoint")] if report.checkpoints else []
    return " and ".join(parts) or "nothing"


def _preview(screen: Screen, report: SweepReport) -> None:
    now = time.time()
    columns = [
        Column("run", grow=True),
        Column("state"),
        Column("last change", right=True, drop=2),
        Column("size", right=True, drop=1),
        Column("why", grow=True, drop=3),
    ]
    rows: list[list[Cell]] = []
    for each in report.removed[:_SHOWN]:
        state = screen.state(each.state.value)
        name = each.run_id + (f" (+{counted(each.parts, 'part')})" if each.parts else "")
        rows.append([name, state, ago(now - each.updated_at), size(each.bytes), each.why])
    if rows:
        screen.table(columns, rows)
    if report.runs > len(rows):
        screen.say(Styled(f"and {report.runs - len(rows):,} more", "bright_black"))


def _summary(settings: Settings, report: SweepReport, done: bool, stuck: int) -> None:
    screen = settings.screen
    if not (report.runs or report.checkpoints):
        screen.say("There is nothing to prune by these rules.")
    else:
        parts = f", with {counted(report.parts, 'part')}" if report.parts else ""
        screen.say(f"{'Removed' if done else 'Would remove'} {_words(report)}{parts}.")
    after = report.used_bytes_after if done else max(0, report.used_bytes_after - report.freed_bytes)
    pairs: list[tuple[Cell, Cell]] = [
        ("store", f"{size(report.used_bytes_before)} before, {'' if done else 'about '}{size(after)} after"),
    ]
    if report.given_back_bytes:
        pairs.append(("given back", f"{size(report.given_back_bytes)} to the file system"))
    for why, count in Counter(each.why for each in report.kept).most_common(5):
        pairs.append(("stays", f"{counted(count, 'run')}: {why}"))
    screen.fields(pairs)
    if report.over_bytes:
        screen.warning(
            f"the store {'holds' if done else 'would hold'} {size(report.over_bytes)} more than --max-total-bytes: the "
            "rest is of runs that are unfinished or pinned, or room that a database needs."
        )
    if stuck:
        screen.note(f"The file has {size(stuck)} of free room that it cannot give back in small steps. Once:")
        screen.note("  ", command_for(settings, "storage", "compact"), wrap=False)


@contextmanager
def _progress(screen: Screen, foretold: SweepReport) -> Iterator[Callable[[SweepReport], None] | None]:
    """One line on the terminal that says how far it is, while it lasts."""
    if not screen.errors_to_terminal:
        yield None
        return
    with screen.err.status("Removing ...") as line:

        def tell(report: SweepReport) -> None:
            runs = f"{report.runs:,} of {counted(foretold.runs, 'run')}"
            old = f", {counted(report.checkpoints, 'old checkpoint')}" if report.checkpoints else ""
            back = f", {size(report.given_back_bytes)} given back" if report.given_back_bytes else ""
            line.update(f"Removing: {runs}{old}{back}")

        yield tell
