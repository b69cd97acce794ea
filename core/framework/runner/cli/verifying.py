"""``surefoot checkpoints verify``: read everything, say what is wrong, and mend what can be mended safely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Any

import click

from framework._secrets import mask
from framework.errors import CorruptData
from framework.runner.cli.app import Command
from framework.runner.cli.confirming import agreed, consent_options
from framework.runner.cli.exits import Exit, usage_error
from framework.runner.cli.output import Screen, Styled
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import command_for, file_of, find_run, open_store, storage_url
from framework.runner.cli.text import counted
from framework.storage.backend import Storage
from framework.storage.records import Damage
from framework.storage.repair import Examined, Finding, Repaired, examine, repair
from framework.storage.sqlite_wal import lost_commits

KEEP_LOG = (
    "Opening the store would drop those commits for good: copy the file with its -wal and -shm elsewhere first. Then "
    "any other command opens it without them."
)

_MOST_PLACES = 5
"""Places with the same damage that are named; a run may have thousands."""


@click.command("verify", cls=Command, short_help="Read everything, say what is wrong, mend what is safe.")
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option("--repair", "mend", is_flag=True, help="Mend what can be mended safely, after showing it.")
@click.option("--evidence", is_flag=True, help="With --repair: also remove files that were put aside as damaged.")
@consent_options
@click.pass_obj
def verify(settings: Settings, run_id: str | None, mend: bool, evidence: bool, yes: bool, dry_run: bool) -> int:
    """Read a run, or the whole store, from end to end, and say what is wrong. Without --repair it changes nothing.

    Runs may go on meanwhile. --repair removes rows and files that no run needs, and releases leases whose processes are
    certainly gone. It never removes a damaged checkpoint: resumes use the newest one that can be read.

    The exit code is 1 when something is wrong, and still is after --repair.
    """
    if evidence and not mend:
        raise usage_error("--evidence says what --repair removes besides; give both.")
    screen = settings.screen
    path = file_of(storage_url(settings)) if storage_url(settings).startswith("sqlite:") else None
    lost = None if path is None else lost_commits(path)
    if lost is not None:
        if screen.json:
            screen.document({"ok": False, "log": lost, "advice": KEEP_LOG})
        else:
            screen.say(Styled(f"Not opened: {lost}.", "bold red"))
            screen.note(KEEP_LOG)
        return Exit.FAILED
    with open_store(settings) as storage:
        chosen = _named(storage, run_id) if run_id is not None else None
        found = examine(storage, chosen)
        unreadable = [] if found.report.ok else _unreadable(storage, {each.run_id for each in found.report.damage})
        if not screen.json:
            _show(settings, found, unreadable)
        planned = [each for each in found.findings if each.repair or (evidence and each.stray is not None)]
        mended: list[Repaired] = []
        if mend:
            mended = _mend(settings, storage, planned, evidence=evidence, yes=yes, dry_run=dry_run)
        done = {each.finding for each in mended if each.done}
    wrong = any(each.serious and each not in done for each in found.findings)
    if screen.json:
        screen.document(
            {
                "ok": not wrong,
                **asdict(found.report),
                "findings": [_plain(each) for each in found.findings],
                "repaired": [{**_plain(each.finding), "done": each.done, "told": each.told} for each in mended],
            }
        )
    elif planned and not mend:
        screen.note(f"{counted(len(planned), 'finding')} can be mended safely:")
        words = ["checkpoints", "verify", *([run_id] if run_id else []), "--repair"]
        screen.note("  ", command_for(settings, *words), wrap=False)
    return Exit.FAILED if wrong else Exit.DONE


def _plain(finding: Finding) -> dict[str, Any]:
    names = ("kind", "run_id", "where", "problem", "serious", "repair", "advice")
    return {name: getattr(finding, name) for name in names}


def _show(settings: Settings, found: Examined, unreadable: Sequence[str]) -> None:
    screen, report = settings.screen, found.report
    read = [counted(report.runs, "run"), counted(report.checkpoints, "checkpoint"), counted(report.chunks, "chunk")]
    words = f"Read {', '.join(read)}: "
    if report.ok:
        screen.say(words, Styled("nothing is damaged", "green"), ".")
    else:
        screen.say(words, Styled(f"{counted(len(report.damage), 'place')} damaged", "bold red"), ".")
        for run_id, places in groupby(report.damage, key=attrgetter("run_id")):
            screen.say(Styled(f"  {run_id}", "bold red"))
            for problem, same in groupby(places, key=lambda each: mask(each.problem)):
                screen.fields([("", f"{_listed([_place(each) for each in same])}: {problem}")], indent=2, width=2)
        if unreadable:
            screen.note("The records of these runs cannot be read; restore the store from a backup, or delete them:")
            screen.note("  ", command_for(settings, "runs", "delete", *unreadable), wrap=False)
        if {each.run_id for each in report.damage} - set(unreadable):
            screen.note("`surefoot runs show RUN` says what a resume would do in spite of the damage.")
    for kind, title in (("stray", "Of no use to any run"), ("lease", "Leases")):
        _section(screen, title, [each for each in found.findings if each.kind == kind])


def _place(damage: Damage) -> str:
    """Where it is, with checkpoints by number, as other commands take them."""
    is_checkpoint = damage.where.startswith("checkpoint ") and damage.sequence is not None
    return f"checkpoint {damage.sequence}" if is_checkpoint else damage.where


def _listed(places: Sequence[str]) -> str:
    """The places, or of many the first ones and how many more there are."""
    shown = ", ".join(places[:_MOST_PLACES])
    return shown if len(places) <= _MOST_PLACES else f"{shown} and {len(places) - _MOST_PLACES} more"


def _section(screen: Screen, title: str, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    screen.say()
    screen.say(Styled(title, "bold"))
    for each in findings:
        style = "bold red" if each.serious else "yellow"
        name = each.run_id or each.where
        then = f"--repair: {each.repair}" if each.repair else each.advice
        screen.say(Styled(f"  {name}", style))
        screen.fields([("", mask(each.problem))], indent=2, width=2)
        if then:
            screen.fields([("", Styled(mask(then), "bright_black"))], indent=2, width=2)


def _mend(
    settings: Settings, storage: Storage, planned: Sequence[Finding], *, evidence: bool, yes: bool, dry_run: bool
) -> list[Repaired]:
    screen = settings.screen
    if not planned:
        screen.say("There is nothing that can be mended safely.")
        return []
    screen.say()
    screen.say(Styled("To be mended", "bold"))
    for each in planned:
        screen.say(f"  {each.run_id or each.where}: {each.repair or 'remove it'}")
    if not agreed(settings, f"Do {'this' if len(planned) == 1 else 'these'}?", yes=yes, dry_run=dry_run):
        return []

    def tell(one: Repaired) -> None:
        mark = screen.mark("completed" if one.done else "failed")
        screen.say(
            Styled(f"{mark} {one.finding.run_id or one.finding.where}: {mask(one.told)}", "" if one.done else "red")
        )

    return repair(storage, planned, tell, evidence=evidence)


def _named(storage: Storage, run_id: str) -> str:
    try:
        return find_run(storage, run_id).run_id
    except CorruptData:  # it is damaged: that is what is to be told
        return run_id


def _unreadable(storage: Storage, run_ids: set[str]) -> list[str]:
    """Those of the runs whose records themselves cannot be read."""
    found = []
    for run_id in sorted(run_ids):
        try:
            storage.find_run(run_id)
        except CorruptData:
            found.append(run_id)
    return found
