"""``surefoot checkpoints prune``: by number, for runs; by age, size and count, for the whole store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

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
from framework.storage.records import Damage
from framework.storage.retention_records import Removed, SweepReport
from framework.storage.sweeping import Pruning, in_words
from framework.storage.verify import newest_readable

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
    without any of them the policy in $SUREFOOT_RETENTION counts. Running runs, pinned runs and checkpoints, and what a
    run needs to go on stay in any case, paused and crashed runs unless --unfinished-max-age is given. Other processes
    may go on with their runs meanwhile. Interrupted, it has done a part; the same command goes on.
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
    document: dict[str, Any] = {"keep": keep, "removed": 0}
    failed: list[tuple[str, str]] = []
    with open_store(settings) as storage:
        ids = (each.run_id for each in all_runs(storage)) if run_id is None else [find_run(storage, run_id).run_id]
        going = _look(screen, storage, ids, keep)
        total = sum(count for _, count in going.values())
        document |= {"would_remove": total, "runs": len(going)}
        words = f"{counted(total, 'checkpoint')} of {counted(len(going), 'run')}"
        if not going:
            screen.say(f"There is nothing to prune: no run keeps more than {keep}.")
        else:
            screen.say(f"{words} would go; the newest {keep} of each stay.")
            if agreed(settings, f"Remove {words} for good?", yes=yes, dry_run=dry_run):
                document |= _prune_each(screen, storage, going, keep, failed)
    if screen.json:
        screen.document(document)
    if failed:
        shown = "; ".join(f"{each}: {problem}" for each, problem in failed[:_SHOWN])
        more = f"; and {len(failed) - _SHOWN:,} more" if len(failed) > _SHOWN else ""
        raise CommandError(f"Not all could be pruned: {shown}{more}")
    return Exit.DONE


def _look(screen: Screen, storage: Storage, ids: Iterable[str], keep: int) -> dict[str, tuple[int, int]]:
    """By run: how many checkpoints it has, and how many of them would go. Runs of which none would are left out."""
    going: dict[str, tuple[int, int]] = {}
    total = 0
    with _line(screen, "Looking") as tell:
        for place, run_id in enumerate(ids, 1):
            stored, above = _above(storage, run_id, keep)
            if above:
                going[run_id] = stored, above
                total += above
            tell(counted(place, "run"), counted(total, "checkpoint"))
    return going


def _above(storage: Storage, run_id: str, keep: int) -> tuple[int, int]:
    """How many checkpoints a run has, and how many of them ``Storage.prune`` removes: those below its newest ``keep``
    and below the newest that can be read, without pinned ones."""
    damaged: list[Damage] = []
    readable = [row.sequence for row in storage.read_checkpoint_rows(run_id, damaged.append)]
    stored = sorted({*readable, *(each.sequence for each in damaged if each.sequence is not None)}, reverse=True)
    if len(stored) <= keep:
        return len(stored), 0
    oldest = stored[keep - 1]
    if (needed := newest_readable(storage, run_id)) is not None:
        oldest = min(oldest, needed)
    pinned = {pin.sequence for pin in storage.list_pins([run_id])}
    return len(stored), sum(sequence < oldest and sequence not in pinned for sequence in stored)


def _prune_each(
    screen: Screen,
    storage: Storage,
    going: dict[str, tuple[int, int]],
    keep: int,
    failed: list[tuple[str, str]],
) -> dict[str, Any]:
    """Prune these runs and give the room back; what a document says of it. ``failed`` gets those that cannot be."""
    before = storage.usage()
    removed = 0
    total = sum(count for _, count in going.values())

    def count(step: int) -> None:
        nonlocal removed
        removed += step
        tell(f"{removed:,} of {counted(total, 'checkpoint')}")

    with _line(screen, "Removing") as tell:
        pruning = Pruning(storage, keep, count)
        for run_id, (stored, _) in going.items():
            try:
                pruning.prune(run_id, stored)
            except SurefootError as error:
                failed.append((run_id, str(error)))
            except KeyboardInterrupt:
                screen.note(f"Removed {counted(removed, 'checkpoint')} until now. The same command goes on.")
                raise
    with _progress(screen, "Tidying up") as show:
        tidied = storage.sweep(RetentionPolicy(), on_progress=show)
    screen.say(f"Removed {counted(removed, 'checkpoint')}.")
    after = storage.usage()
    screen.fields(_sizes(before.used_bytes, after.used_bytes, tidied.given_back_bytes))
    return {
        "removed": removed,
        "used_bytes_before": before.used_bytes,
        "used_bytes_after": after.used_bytes,
        "given_back_bytes": tidied.given_back_bytes,
    }


def _sizes(before: int, after: int, given_back: int, about: str = "") -> list[tuple[Cell, Cell]]:
    pairs: list[tuple[Cell, Cell]] = [("store", f"{size(before)} before, {about}{size(after)} after")]
    if given_back:
        pairs.append(("given back", f"{size(given_back)} to the file system"))
    return pairs


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
            least = "at least about" if foretold.checkpoints else "about"
            much = f", {least} {size(foretold.freed_bytes)}," if foretold.runs else ""
            if agreed(settings, f"Remove {removed(foretold)}{much} for good?", yes=yes, dry_run=dry_run):
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
    # What old checkpoints take is not known before they go.
    about = "" if done else "at most about " if report.checkpoints else "about "
    pairs = _sizes(report.used_bytes_before, after, report.given_back_bytes, about)
    told = 0
    for why, count in Counter(each.why for each in report.kept).most_common(5):
        pairs.append(("stays", f"{counted(count, 'run')}: {why}"))
        told += count
    if told < report.kept_runs:
        pairs.append(("stays", f"{report.kept_runs - told:,} more"))
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
def _line(screen: Screen, doing: str) -> Iterator[Callable[..., None]]:
    """One line on the terminal that says how far it is, while it lasts. Its parts are given after each step, and shown
    as often as somebody can read them."""
    if not screen.errors_to_terminal:
        yield lambda *parts: None
        return
    with screen.err.status(f"{doing} ...") as line:
        shown = time.monotonic()

        def tell(*parts: str) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _SHOWN_SECONDS:
                line.update(f"{doing}: {', '.join(parts) or '...'}")
                shown = time.monotonic()

        yield tell


@contextmanager
def _progress(screen: Screen, doing: str, runs: int = 0) -> Iterator[Callable[[SweepReport], None]]:
    """As ``_line``, of a sweep that removes so many ``runs``, if that is known."""

    def parts(report: SweepReport) -> list[str]:
        found = [f"{report.runs:,} of {counted(runs, 'run')}"] if runs else []
        found += [counted(report.runs, "run")] if report.runs and not runs else []
        found += [counted(report.checkpoints, "old checkpoint")] if report.checkpoints else []
        return found + ([f"{size(report.given_back_bytes)} given back"] if report.given_back_bytes else [])

    with _line(screen, doing) as tell:
        last: SweepReport | None = None

        def told(report: SweepReport) -> None:
            nonlocal last
            last = report
            tell(*parts(report))

        try:
            yield told
        except KeyboardInterrupt:
            if last is not None and not last.dry_run and removed(last):
                screen.note(f"Removed {removed(last)} until now. The same command goes on.")
            raise
