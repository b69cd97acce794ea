"""A store looked over: what is damaged, what belongs to nobody, who holds what; and what of it can be put right safely.

Only what is proven safe is repaired: rows and files that no run needs, and leases of processes that are certainly gone.
A damaged checkpoint is never removed: resumes pass over it, and it may be what tells how it came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from framework.errors import CorruptData, StorageError
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.ownership import is_alive
from framework.storage.records import Damage, RunRecord, Stray, VerifyReport

FAR_SECONDS = 86_400.0
"""A lease that lasts longer than this from now was not meant: a clock was wrong when it was taken."""

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. ``serious`` says whether something is wrong, and not only left over.

    ``repair`` says what ``repair`` would do about it, ``None`` when it would do nothing; ``advice`` why not, or what
    else to do.
    """

    kind: Literal["damage", "stray", "lease"]
    run_id: str
    where: str
    problem: str
    serious: bool
    repair: str | None = None
    advice: str = ""
    stray: Stray | None = None
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """What was read, and what was found."""

    report: VerifyReport
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; left-overs do not count."""
        return not any(finding.serious for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What came of one repair: whether it was done, and in words."""

    finding: Finding
    done: bool
    told: str


def examine(storage: Storage, run_id: str | None = None, now: float | None = None) -> Examined:
    """Look over a store, or one run of it. Changes nothing, and takes no work in progress for damage.

    ``now`` is in seconds since the epoch. Raises ``StorageError``, also ``KeyNotFound``.
    """
    report = storage.verify(run_id)
    moment = time.time() if now is None else now
    findings = [_of_damage(damage) for damage in report.damage]
    findings += [finding for record in _records(storage, run_id) if (finding := of_lease(record, moment)) is not None]
    if run_id is None:
        findings += [_of_stray(stray) for stray in storage.find_strays()]
    return Examined(report, tuple(findings))


def repair(
    storage: Storage,
    findings: Sequence[Finding],
    on_repaired: Callable[[Repaired], None] | None = None,
    *,
    evidence: bool = False,
) -> list[Repaired]:
    """Do what the findings say under ``repair``, each if it still is as it was found.

    With ``evidence``, also remove what was put aside as damaged. What fails is told, and the rest is done.
    """
    outcomes = []
    for finding in findings:
        if finding.repair is None and not (evidence and finding.stray is not None):
            continue
        try:
            done, told = _repair_one(storage, finding)
        except StorageError as error:
            done, told = False, str(error)
        outcomes.append(Repaired(finding, done, told))
        if on_repaired is not None:
            on_repaired(outcomes[-1])
    return outcomes


def _repair_one(storage: Storage, finding: Finding) -> tuple[bool, str]:
    if finding.stray is not None:
        done = storage.remove_stray(finding.stray)
        return done, "removed" if done else "it is gone, or needed by now; nothing was done"
    record = storage.find_run(finding.run_id)
    if record is None or record.token != finding.token or record.owner is None or is_alive(record.owner) is not False:
        return False, "the run has another owner by now; nothing was done"
    storage.release_lease(finding.run_id, record.token)  # with its token: a newer owner's lease is not touched
    return True, "its lease was released"


def _of_damage(damage: Damage) -> Finding:
    advice = "kept: a resume uses the newest checkpoint that can be read" if damage.run_id else "restore a backup"
    return Finding("damage", damage.run_id, damage.where, damage.problem, serious=True, advice=advice)


def _of_stray(stray: Stray) -> Finding:
    action = "remove it" if stray.safe else None
    return Finding("stray", "", stray.name, stray.problem, not stray.harmless, action, stray.reason, stray)


def of_lease(record: RunRecord, now: float) -> Finding | None:
    """What is to be said about who holds a run, if anything."""
    if record.owner is None:
        return None
    left = record.lease_until - now
    gone = left > 0 and is_alive(record.owner) is False
    unfinished = record.state in (RunState.RUNNING, RunState.CRASHED)
    far = left > FAR_SECONDS
    lasts = f"its lease lasts {span(left)} more" + (", longer than any is given: a clock was wrong" if far else "")
    if gone:
        then = "release it; `surefoot recover` resumes the run" if unfinished else "release it"
        return Finding("lease", record.run_id, "lease", f"its process is gone, {lasts}", far, then, token=record.token)
    if far:
        advice = f"it cannot be told from here whether its owner is alive ({record.owner}); if it is not, fork the run"
        return Finding("lease", record.run_id, "lease", lasts, serious=True, advice=advice)
    if left <= 0 and unfinished:
        advice = "`surefoot recover` resumes it"
        return Finding("lease", record.run_id, "lease", f"its lease expired {span(-left)} ago", False, advice=advice)
    return None


def _records(storage: Storage, run_id: str | None) -> Iterator[RunRecord]:
    if run_id is not None:
        try:
            record = storage.find_run(run_id)
        except CorruptData:  # told by verify
            return
        if record is not None:
            yield record
        return
    before: RunRecord | None = None
    while page := storage.list_runs(limit=_PAGE, before=before):
        yield from page
        before = page[-1]


def span(seconds: float) -> str:
    """A time in words: ``40 s``, ``10 minutes``, ``90 days``."""
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
