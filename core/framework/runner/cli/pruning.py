"""``surefoot checkpoints prune``: by number, for runs; by age, size and count, for the whole store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import click

from framework.errors import SurefootError
from framework.runner.cli.app import Command
from framework.runner.cli.confirming import agreed, consent_options
from framework.runner.cli.exits import CommandError, Exit, usage_error
from framework.runner.cli.output import Cell, Column, Screen, Styled
from framework.runner.cli.retention_options import OPTIONS, chosen_policy, policy_of, policy_options, removed
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import all_runs, command_for, find_run, open_store
from framework.runner.cli.text import ago, counted, size
from framework.schemas.retention import RetentionPolicy
from framework.storage.backend import Storage
from framework.storage.records import Retention
from framework.storage.retention_records import Removed, SweepReport
from framework.storage.sweeping import in_words

_SHOWN = 10
"""Runs shown by name for each rule."""

_SHOWN_SECONDS = 0.1
"""How often the line that says how far it is is written anew, at most."""


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
        with _progress(screen, "Looking") as tell:
            foretold = storage.sweep(policy, dry_run=True, on_progress=tell)
        done: SweepReport | None = None
        if foretold.runs or foretold.checkpoints:
            if not screen.json:
                _preview(screen, foretold, policy)
            question = f"Remove {removed(foretold)} for good?"
            if agreed(settings, question, yes=yes, dry_run=dry_run):
                # Of the moment that was shown: no run gets too old while somebody thinks about it.
                with _progress(screen, "Removing", foretold.runs) as tell:
                    done = storage.sweep(policy, now=foretold.now, on_progress=tell)
        elif not dry_run:
            done = _tidy(screen, storage, policy, foretold)
        usage = storage.usage()
    report = done if done is not None else foretold
    if screen.json:
        document = asdict(report)
        document |= {"dry_run": done is None, "policy": policy.model_dump(mode="json", exclude_none=True)}
        screen.document(document)
    else:
        _summary(settings, report, done is not None, usage.free_bytes if not usage.can_shrink else 0)
    return Exit.DONE


def _tidy(screen: Screen, storage: Storage, policy: RetentionPolicy, foretold: SweepReport) -> SweepReport:
    """Finish a sweep that was interrupted and give free room back, and remove nothing else: nobody was asked."""
    with _progress(screen, "Tidying up") as tell:
        done = storage.sweep(RetentionPolicy(), on_progress=tell)
    done.kept, done.kept_runs = foretold.kept, foretold.kept_runs
    if policy.max_total_bytes is not None:
        done.over_bytes = max(0, done.used_bytes_after - policy.max_total_bytes)
    return done


def _preview(screen: Screen, report: SweepReport, policy: RetentionPolicy) -> None:
    """The runs that would go, by the rule that takes them: said once, above those of them that went longest without a
    change."""
    for place, (rule, count) in enumerate(report.rules.items()):
        if place:
            screen.say("")
        screen.say(Styled(f"{counted(count, 'run')}: {rule}", "bold"))
        shown = [each for each in report.removed if each.why == rule][:_SHOWN]
        if shown:
            _table(screen, shown, report.now)
        if count > len(shown):
            screen.say(Styled(f"and {count - len(shown):,} more", "bright_black"))
    if report.checkpoints and policy.max_age is not None:
        if report.rules:
            screen.say("")
        words = f"{counted(report.checkpoints, 'checkpoint')} of runs that stay: older than {in_words(policy.max_age)}"
        screen.say(Styled(words, "bold"))


def _table(screen: Screen, shown: Sequence[Removed], now: float) -> None:
    columns = [
        Column("run", grow=True, middle=True),
        Column("state"),
        Column("parts", right=True, drop=3),
        Column("last change", right=True, drop=2),
        Column("size", right=True, drop=1),
    ]
    rows: list[list[Cell]] = [
        [
            each.run_id,
            screen.state(each.state.value),
            f"{each.parts:,}" if each.parts else "",
            ago(now - each.updated_at),
            size(each.bytes),
        ]
        for each in shown
    ]
    if not any(each.parts for each in shown):
        columns.pop(2)
        rows = [[*row[:2], *row[3:]] for row in rows]
    screen.table(columns, rows)


def _summary(settings: Settings, report: SweepReport, done: bool, stuck: int) -> None:
    screen = settings.screen
    if not (report.runs or report.checkpoints):
        screen.say("There is nothing to prune by these rules.")
    else:
        parts = f", with {counted(report.parts, 'part')}" if report.parts else ""
        screen.say(f"{'Removed' if done else 'Would remove'} {removed(report)}{parts}.")
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
            f"the store {'holds' if done else 'would hold'} {size(report.over_bytes)} more than --max-total-bytes. "
            "What runs take is estimated, and the next prune corrects it; runs that are unfinished or pinned stay, and "
            "a database needs some room itself."
        )
    if stuck:
        screen.note(f"The file has {size(stuck)} of free room that it cannot give back in small steps. Once:")
        screen.note("  ", command_for(settings, "storage", "compact"), wrap=False)


@contextmanager
def _progress(screen: Screen, doing: str, runs: int = 0) -> Iterator[Callable[[SweepReport], None] | None]:
    """One line on the terminal that says how far it is, of so many ``runs`` if that is known, while it lasts."""
    if not screen.errors_to_terminal:
        yield None
        return
    with screen.err.status(f"{doing} ...") as line:
        shown = time.monotonic()

        def tell(report: SweepReport) -> None:
            nonlocal shown
            if time.monotonic() - shown < _SHOWN_SECONDS:
                return
            shown = time.monotonic()
            parts = [f"{report.runs:,} of {counted(runs, 'run')}"] if runs else []
            parts += [counted(report.runs, "run")] if report.runs and not runs else []
            parts += [counted(report.checkpoints, "old checkpoint")] if report.checkpoints else []
            parts += [f"{size(report.given_back_bytes)} given back"] if report.given_back_bytes else []
            line.update(f"{doing}: {', '.join(parts) or '...'}")

        yield tell
