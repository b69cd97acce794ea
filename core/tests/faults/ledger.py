"""What really happened, written outside the store, and the invariants that it and the store's log must meet.

A ledger is a file of one JSON line for each event, appended in one write each, so that a kill loses none that a
process went beyond. A *tenure* is one process's hold of a run: from its claim (a token) to its end.

The invariants, checked by `violations` whenever a process has ended and at the run's end:

1. No committed step runs twice: no tenure starts a step, or an attempt, that was committed when it claimed the run, and
   none starts one attempt twice.
2. None is lost: what a store confirmed as durable is in its log, from then on unchanged, with no gap and no step twice.
3. A finished call is not made again; one in flight at the end of a tenure is made again with the same idempotency key,
   once for each tenure that ended in it.
4. One owner's commits only: a sequence is confirmed to one tenure; tokens never fall along the log; no token is given
   to two; no tenure commits at or before the sequence at which a later one claimed the run.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson

from framework.errors import LeaseLost
from framework.graph.planner import Step
from framework.storage.checkpoints import plain_records
from framework.storage.interface import Storage
from framework.storage.records import Commit, RunRecord, Write

Event = Mapping[str, Any]


class Ledger:
    """The events of one run, as one process (a life, with a number of its own) writes them."""

    def __init__(self, path: Path, life: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._life = life

    def write(self, event: str, **facts: Any) -> None:
        os.write(self._file, orjson.dumps({"e": event, "life": self._life, **facts}) + b"\n")

    def started(self, step: str, attempt: int) -> None:
        self.write("start", step=step, attempt=attempt)

    def called(self, what: str, key: str) -> None:
        self.write("call", what=what, key=key)

    def answered(self, what: str) -> None:
        self.write("answer", what=what)

    def watch(self, store: Storage, run_id: str) -> None:
        """Have the store's claims and commits of a run in the ledger, through this object."""
        plain_open, plain_claim, plain_commit = store.open_run, store.claim_run, store.commit

        def claimed(record: RunRecord) -> RunRecord:
            if record.run_id == run_id and record.state.value != "completed":
                self.write("claim", token=record.token, sequence=record.sequence)
            return record

        def commit(commits: Sequence[Write]) -> list[Exception | None]:
            outcomes = plain_commit(commits)
            for one, outcome in zip(commits, outcomes, strict=True):
                if one.run_id != run_id:
                    continue
                if outcome is not None:
                    self.write("refused", token=one.token, error=type(outcome).__name__)
                elif isinstance(one, Commit):
                    self.write("commit", token=one.token, sequence=one.sequence)
            return outcomes

        vars(store).update(
            open_run=lambda *args, **more: claimed(plain_open(*args, **more)),
            claim_run=lambda *args, **more: claimed(plain_claim(*args, **more)),
            commit=commit,
        )


def read_ledger(path: Path) -> list[Event]:
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


# --- the store's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One commit of the log: a digest of its bytes, and which step or attempt it made durable, if any."""

    sequence: int
    digest: str
    steps: tuple[str, ...]
    attempts: tuple[tuple[str, int], ...]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Entry:
        sequence, digest, steps, attempts = data
        return Entry(sequence, digest, tuple(steps), tuple((step, attempt) for step, attempt in attempts))

    def to_json(self) -> list[Any]:
        return [self.sequence, self.digest, list(self.steps), [list(each) for each in self.attempts]]


# --- the invariants -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tenure:
    """One process's hold of the run, and what it did meanwhile. ``sequence`` is that of the last commit it found."""

    life: int
    token: int
    sequence: int
    started: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def tenures(events: Iterable[Event]) -> list[Tenure]:
    """The holds in the order of their tokens."""
    made: list[Tenure] = []
    current: dict[int, Tenure] = {}
    for event in events:
        life = event["life"]
        match event["e"]:
            case "claim":
                current[life] = Tenure(life, event["token"], event["sequence"])
                made.append(current[life])
            case "start":
                current[life].started.append((event["step"], event["attempt"]))
            case "call":
                current[life].calls.append((event["what"], event["key"]))
            case "answer":
                current[life].answers.append(event["what"])
            case "commit":
                current[life].commits.append(event["sequence"])
            case "refused":
                current[life].refused.append(event["error"])
    return sorted(made, key=lambda tenure: tenure.token)


def violations(events: Sequence[Event], log: Sequence[Entry], earlier: Sequence[Entry] = ()) -> list[str]:
    """What is wrong with a run, given its ledger, its log and what its log was before; empty when nothing is."""
    held = tenures(events)
    return [
        *_log_is_whole(log, earlier),
        *_commits_are_owned(held, log),
        *_nothing_ran_again(held, log),
        *_calls_were_made_once(held),
    ]


def _log_is_whole(log: Sequence[Entry], earlier: Sequence[Entry]) -> Iterable[str]:
    numbers = [entry.sequence for entry in log]
    if numbers != list(range(1, len(log) + 1)):
        yield f"the log's sequences are {numbers}"
    if list(log[: len(earlier)]) != list(earlier):
        yield f"the log was changed: {len(earlier)} entries before, now {len(log)}, and they differ"
    for step, count in Counter(step for entry in log for step in entry.steps).items():
        if count > 1:
            yield f"step {step} is in the log {count} times"


def _commits_are_owned(held: Sequence[Tenure], log: Sequence[Entry]) -> Iterable[str]:
    tokens = Counter(tenure.token for tenure in held)
    if any(count > 1 for count in tokens.values()):
        yield f"a token was given twice: {sorted(tokens.elements())}"
    by_sequence: dict[int, Tenure] = {}
    for tenure in held:
        for sequence in tenure.commits:
            if sequence in by_sequence:
                yield f"sequence {sequence} was confirmed to tokens {by_sequence[sequence].token} and {tenure.token}"
            by_sequence[sequence] = tenure
            if sequence > len(log):
                yield f"commit {sequence} of token {tenure.token} was confirmed and is lost"
    order = [by_sequence[sequence].token for sequence in sorted(by_sequence)]
    if order != sorted(order):
        yield f"tokens fall along the log: {order}"
    for tenure in held:
        for other in held:
            late = [sequence for sequence in other.commits if sequence > tenure.sequence]
            if other.token < tenure.token and late:
                yield (
                    f"token {other.token} committed {late} although token {tenure.token} had claimed the run "
                    f"at {tenure.sequence}"
                )
            early = [sequence for sequence in tenure.commits if sequence <= tenure.sequence]
            if other is tenure and early:
                yield f"token {tenure.token} claimed the run at {tenure.sequence} and committed {early}"


def _nothing_ran_again(held: Sequence[Tenure], log: Sequence[Entry]) -> Iterable[str]:
    at = {step: entry.sequence for entry in log for step in entry.steps}
    tried = {attempt: entry.sequence for entry in log for attempt in entry.attempts}
    for tenure in held:
        for started, count in Counter(tenure.started).items():
            if count > 1:
                yield f"token {tenure.token} started attempt {started} {count} times"
            if at.get(started[0], tenure.sequence + 1) <= tenure.sequence:
                yield f"token {tenure.token} started the committed step {started[0]}"
            if tried.get(started, tenure.sequence + 1) <= tenure.sequence:
                yield f"token {tenure.token} made the recorded attempt {started} again"


def _calls_were_made_once(held: Sequence[Tenure]) -> Iterable[str]:
    keys: dict[str, set[str]] = defaultdict(set)
    answered: dict[str, int] = {}
    for tenure in held:
        for what, count in Counter(what for what, _ in tenure.calls).items():
            if count > 1:
                yield f"token {tenure.token} made the call {what!r} {count} times"
        for what, key in tenure.calls:
            keys[what].add(key)
            if what in answered:
                yield f"the call {what!r} was finished under token {answered[what]} and made again by {tenure.token}"
        for what in tenure.answers:
            answered.setdefault(what, tenure.token)
    for what, used in keys.items():
        if len(used) > 1:
            yield f"the call {what!r} was made with {len(used)} idempotency keys: {sorted(used)}"


def refused_with_lease_lost(tenure: Tenure) -> bool:
    return LeaseLost.__name__ in tenure.refused


# --- reading a run's side of the store ------------------------------------------------------------------------------


def read_log(store: Storage, run_id: str, work: str) -> list[Entry]:
    """The log of a run; empty for one that is not recorded."""
    if store.find_run(run_id) is None:
        return []
    entries = []
    for row in store.read_log(run_id):
        records = plain_records(row)
        steps = [_key(record, work) for record in records if record["kind"] == "step"]
        attempts = [(record["step"], record["attempt"]) for record in records if record["kind"] == "attempt"]
        digest = sha256(row.record + b"|" + (row.log or b"")).hexdigest()[:16]
        entries.append(Entry(row.sequence, digest, tuple(steps), tuple(attempts)))
    return entries


def _key(record: Mapping[str, Any], work: str) -> str:
    if work == "plan":  # its functions know the name of their step, and no plan here is made anew
        return str(record["node"])
    return Step(record["node"], record["visit"], record.get("branch", "")).key
