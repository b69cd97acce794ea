"""Carrying out a ``RetentionPolicy``: which rule takes a run (pure), and the sweep that asks a store step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.records import Retention, RunRecord
from framework.storage.retention_records import MOST_LISTED, Kept, Removed, SweepReport

if TYPE_CHECKING:
    from framework.storage.interface import Storage

COMPLETED = (RunState.COMPLETED,)
FAILED = (RunState.FAILED, RunState.CANCELLED)
UNFINISHED = (RunState.PAUSED, RunState.CRASHED)

_PAGE = 100
_STEP_SECONDS = 0.002
"""How long one step works in the store; writing it down comes on top."""
_REST = 4.0
"""A pause after a step is this many times as long as the step: others have the store for most of the time."""
_FIRST_AT_ONCE, _MOST_AT_ONCE = 25, 500
"""How many checkpoints beyond a number go in a run's first step, and in any of them."""
_LONGEST_SYNC = 0.01
"""How much of a step may be waiting for the disk, in seconds."""
_SHORTEST_REST, _LONGEST_REST = 0.002, 0.03


# --- which run goes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy says of one kind of runs, at one moment. ``before``: runs last changed before it (seconds since the
    epoch) go. ``newest`` is the last run that ``keep`` keeps: what changed before it goes."""

    states: tuple[RunState, ...]
    max_age: timedelta | None
    before: float | None
    keep: int | None
    newest: RunRecord | None = None

    def why(self, run: RunRecord) -> str:
        """The rule that takes ``run``, in words; ``""`` when it stays. Of two runs, the older one goes first."""
        if self.before is not None and run.updated_at < self.before and self.max_age is not None:
            return f"older than {in_words(self.max_age)}"
        if self.keep == 0 or (self.newest is not None and change(run) < change(self.newest)):
            return f"not among the newest {self.keep:,}" if self.keep else "none of its kind is kept"
        return ""


def change(run: RunRecord) -> tuple[float, str]:
    """What runs are ordered by for retention."""
    return run.updated_at, run.run_id


def rules_of(policy: RetentionPolicy, now: float) -> list[Rules]:
    """The rules of a policy by kind of run, those without any left out. ``newest`` is for the caller to fill in."""

    def rules(states: tuple[RunState, ...], max_age: timedelta | None, keep: int | None = None) -> Rules:
        before = None if max_age is None else now - max_age.total_seconds()
        return Rules(states, max_age, before, keep)

    def age(own: timedelta | None) -> timedelta | None:
        return policy.max_age if own is None else own

    every = [
        rules(COMPLETED, age(policy.completed_max_age), policy.keep_completed),
        rules(FAILED, age(policy.failed_max_age), policy.keep_failed),
        rules(UNFINISHED, policy.unfinished_max_age),
    ]
    return [each for each in every if each.max_age is not None or each.keep is not None]


def removable(policy: RetentionPolicy) -> tuple[RunState, ...]:
    """The states in which a policy lets a run go at all, and parts of it."""
    return (*COMPLETED, *FAILED, *(UNFINISHED if policy.unfinished_max_age is not None else ()))


def in_words(age: timedelta) -> str:
    """``30 d``, ``12 h``, ``90 s``."""
    seconds = age.total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{int(seconds // length)} {unit}"
    return f"{seconds:g} s"


# --- the sweep ------------------------------------------------------------------------------------------------------


def rest(held_seconds: float, stop: threading.Event) -> None:
    """Leave the store to others, for longer the longer it was held."""
    stop.wait(min(_LONGEST_REST, max(_SHORTEST_REST, _REST * held_seconds)))


@dataclass(slots=True)
class _Sweep:
    storage: Storage
    policy: RetentionPolicy
    now: float
    limit: int | None
    stop: threading.Event
    on_progress: Callable[[SweepReport], None] | None
    rest: Callable[[float, threading.Event], None]
    report: SweepReport
    settled: set[str] = field(default_factory=set)
    """Runs that were dealt with, so that a later rule does not count them again: those that stay, and, in a dry run,
    those that would go."""
    foretold: set[str] = field(default_factory=set)
    """Runs and parts that a dry run says would go: nothing of them is left to be pruned."""

    def run(self) -> None:
        used = self.report.used_bytes_before
        if not self.report.dry_run:
            self._purge()  # what an earlier sweep left when it was killed; the size is what remains then
            used = self.storage.usage().used_bytes
        for rules in rules_of(self.policy, self.now):
            if rules.keep:
                newest = self.storage.nth_newest_ended(rules.states, rules.keep)
                rules = Rules(rules.states, rules.max_age, rules.before, rules.keep, newest)
            if rules.keep == 0 or rules.before is not None or rules.newest is not None:
                self._remove(rules.states, rules.why)
        if self.policy.max_total_bytes is not None:
            self._remove_above(self.policy.max_total_bytes, used)
        if self.policy.max_age is not None:
            self._prune(self.now - self.policy.max_age.total_seconds())
        if not self.report.dry_run:
            self._shrink()
        self._measure()

    def _measure(self) -> None:
        report = self.report
        report.used_bytes_after = self.storage.usage().used_bytes
        if self.policy.max_total_bytes is not None:
            left = report.used_bytes_after - (report.freed_bytes if report.dry_run else 0)
            report.over_bytes = max(0, left - self.policy.max_total_bytes)

    # --- runs ---

    def _remove(self, states: Sequence[RunState], why: Callable[[RunRecord], str]) -> None:
        """Remove runs, the longest unchanged first, until one stays by ``why``."""
        for page in self._pages(lambda after: self.storage.list_ended(states, _PAGE, after)):
            going: list[RunRecord] = []
            for run in page:
                if not why(run):
                    self._retire(going, why)
                    return
                going.append(run)
            self._retire(going, why)
            if self._is_over():
                return

    def _remove_above(self, most: int, used: int) -> None:
        """Remove finished runs until the store holds at most ``most`` bytes.

        By what the runs take, as the store estimates it: no more go than a dry run said. What the store really holds
        may fall later, when a database has cleaned up; the next sweep begins with that.
        """
        rule = f"the store holds more than {most:,} bytes"
        for page in self._pages(lambda after: self.storage.list_ended((*COMPLETED, *FAILED), _PAGE, after)):
            left = [run for run in page if run.run_id not in self.settled]
            while left:
                above = used - self.report.freed_bytes - most
                if above <= 0 or self._is_over():
                    return
                count = self._enough(left, above)
                self._retire(left[:count], lambda _: rule)
                left = left[count:]

    def _enough(self, runs: Sequence[RunRecord], above: int) -> int:
        """How many of these, the first first, go until they took so many bytes; at least one."""
        if self.report.dry_run:
            return 1
        looked = self.storage.retire_runs(runs, removable(self.policy), dry_run=True)
        for count, each in enumerate(looked, 1):
            above -= each.bytes
            if above <= 0:
                return count
        return len(runs)

    def _retire(self, runs: Sequence[RunRecord], why: Callable[[RunRecord], str]) -> None:
        waiting = [run for run in runs if run.run_id not in self.settled]
        while waiting and not self._is_over():
            room = len(waiting) if self.limit is None else self.limit - self.report.runs
            began = time.monotonic()
            done = self.storage.retire_runs(
                waiting[:room], removable(self.policy), _STEP_SECONDS, dry_run=self.report.dry_run
            )
            took = time.monotonic() - began
            for run, retired in zip(waiting, done, strict=False):
                self._count(run, retired.kept, why(run), retired.run_ids, retired.bytes)
            waiting = waiting[len(done) :]
            if self.report.dry_run:
                self._tell()
            elif any(each.run_ids for each in done):
                self._told(took)
                self._purge()

    def _count(self, run: RunRecord, kept: str, rule: str, run_ids: Sequence[str], size: int) -> None:
        report = self.report
        if report.dry_run or kept:
            self.settled.add(run.run_id)
        if kept:
            report.kept_runs += 1
            if len(report.kept) < MOST_LISTED:
                report.kept.append(Kept(run.run_id, kept, rule))
            return
        if report.dry_run:
            self.foretold.update(run_ids)
        parts = len(run_ids) - 1
        report.runs += 1
        report.rules[rule] = report.rules.get(rule, 0) + 1
        report.parts += parts
        report.freed_bytes += size
        if report.rules[rule] <= MOST_LISTED:
            report.removed.append(Removed(run.run_id, run.state, run.updated_at, parts, size, rule))

    def _purge(self) -> None:
        more = True
        while more and not self.stop.is_set():
            began = time.monotonic()
            more = self.storage.purge(_STEP_SECONDS)
            self._told(time.monotonic() - began, quietly=not more)

    # --- checkpoints ---

    def _prune(self, before: float) -> None:
        for page in self._pages(lambda after: self.storage.list_aged(before, _PAGE, after)):
            for run in page:
                if run.run_id not in self.foretold:
                    self._prune_run(run.run_id, before)

    def _prune_run(self, run_id: str, before: float) -> None:
        if self.report.dry_run:
            self.report.checkpoints += self.storage.prune_older(run_id, before, dry_run=True)
            self._tell()
            return
        while not self._is_stopped():
            began = time.monotonic()
            gone = self.storage.prune_older(run_id, before)
            took = time.monotonic() - began
            self.report.checkpoints += gone
            if not gone:
                return
            self._told(took)

    def _shrink(self) -> None:
        while not self._is_stopped():
            began = time.monotonic()
            given = self.storage.shrink(_STEP_SECONDS)
            if not given:
                return
            self.report.given_back_bytes += given
            self._told(time.monotonic() - began)

    # --- pace ---

    def _pages(self, read: Callable[[RunRecord | None], list[RunRecord]]) -> Iterator[list[RunRecord]]:
        after: RunRecord | None = None
        while not self._is_stopped():
            page = read(after)
            if page:
                yield page
            if len(page) < _PAGE:
                return
            after = page[-1]

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.report)

    def _told(self, took: float, *, quietly: bool = False) -> None:
        if not quietly:
            self._tell()
        self.rest(took, self.stop)

    def _is_over(self) -> bool:
        if self.limit is not None and self.report.runs >= self.limit:
            self.report.complete = False
            return True
        return self._is_stopped()

    def _is_stopped(self) -> bool:
        if self.stop.is_set():
            self.report.complete = False
        return self.stop.is_set()


class Pruning:
    """``Storage.prune`` of one run after another, in short steps with pauses between them, as sweeps are made.

    ``on_step`` is told after each step how many checkpoints it removed. A kill between two loses nothing.
    """

    def __init__(
        self,
        storage: Storage,
        keep: int,
        on_step: Callable[[int], None] | None = None,
        rest: Callable[[float, threading.Event], None] = rest,
    ) -> None:
        self._storage = storage
        self._keep = keep
        self._on_step = on_step
        self._rest = rest
        self._never = threading.Event()
        self._at_once = _FIRST_AT_ONCE
        self._shortest = _LONGEST_SYNC

    def prune(self, run_id: str, stored: int) -> int:
        """Remove all but the newest checkpoints of a run that has ``stored`` of them, but for pinned ones; how many.

        Raises ``StorageError``.
        """
        gone = 0
        # What the next run's checkpoints hold is not known yet.
        self._at_once = min(self._at_once, _FIRST_AT_ONCE)
        while True:
            stored = max(self._keep, stored - self._at_once)
            began = time.monotonic()
            step = self._storage.prune(run_id, Retention(stored))
            took = time.monotonic() - began
            gone += step
            self._adapt(took)
            if self._on_step is not None:
                self._on_step(step)
            self._rest(took, self._never)
            if stored == self._keep:
                return gone

    def _adapt(self, took: float) -> None:
        # Each step waits for the disk once, however little it removes: fewer at a time would make that no shorter.
        self._shortest = min(self._shortest, took)
        is_short = took < self._shortest + 2 * _STEP_SECONDS
        self._at_once = min(_MOST_AT_ONCE, self._at_once * 2) if is_short else max(1, self._at_once // 2)


def sweep(
    storage: Storage,
    policy: RetentionPolicy,
    *,
    now: float | None = None,
    dry_run: bool = False,
    limit: int | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[SweepReport], None] | None = None,
    rest: Callable[[float, threading.Event], None] = rest,
) -> SweepReport:
    """Remove what ``policy`` does not keep; see ``Storage.sweep``. ``rest`` is called after each step with the seconds
    that it took, to leave the store to others."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit is how many runs may go, 0 or more, not {limit}.")
    usage = storage.usage()
    moment = usage.now if now is None else now
    report = SweepReport(dry_run=dry_run, now=moment, used_bytes_before=usage.used_bytes)
    _Sweep(storage, policy, moment, limit, stop or threading.Event(), on_progress, rest, report).run()
    return report
