"""Runs that are parts of others, as their store has them: what a paused one waits for, and what each has spent. Blocks.

A step of a plan that runs a graph waits while that graph's run does. It is then held with what the part waits for, each
with the part's id (``Waiting.run``); messages and answers are the part's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from framework.graph import journal_rows, planner
from framework.graph.run_opening import counted_calls
from framework.graph.spending import NOTHING, Spent
from framework.graph.stored_run import readable_body
from framework.graph.suspension import Waiting
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage.interface import Storage
from framework.storage.records import CheckpointRow

_PAUSED_AT_END = ("arriving", "ending", "passing")
"""How branches stand that paused after their last step."""


@dataclass(frozen=True, slots=True)
class PausedPart:
    """A paused run that is a part of another. ``waits`` is what it waits for, at least one. ``is_over`` says that a
    time or a message of these has come, so that it goes on when it is executed."""

    waits: tuple[Waiting, ...]
    is_over: bool

    def may_go_on(self, answered_at: str) -> bool:
        """Whether to execute it: something has come, or a person has answered at the checkpoint ``answered_at``."""
        asked = {each.call for each in self.waits if each.kind == "input"}
        return self.is_over or answered_at in asked


def paused_part(storage: Storage, run_id: str, now: float) -> PausedPart | None:
    """The run as it waits; ``None`` when there is none, or it is not paused. ``now`` is in seconds since the epoch.

    Raises ``StorageError``.
    """
    run = storage.find_run(run_id)
    if run is None or run.state is not RunState.PAUSED:
        return None
    row, body = _newest(storage, run_id)
    if row is None or row.sequence > run.sequence:
        return None  # it went on in between
    waits = part_waits(body, run_id)
    asked = _asked_at(storage, run_id, body)
    if asked is not None or not waits:
        waits = (*waits, Waiting("input", row.checkpoint_id, asked or run_id, run=run_id))
    return PausedPart(waits, is_over(storage, run_id, waits, now))


def _asked_at(storage: Storage, run_id: str, body: Mapping[str, Any]) -> str | None:
    """The node at which a run with the checkpoint ``body`` asks a person; ``None`` when it only waits for others."""
    plain: Mapping[str, Any] = body.get("position") or {}
    suspended = plain.get("waits") or {}
    position = planner.from_json(plain) if plain else planner.Position()
    asked = [step for step in position.held if step.key not in suspended]
    ending = [branch.id for branch in position.branches.values() if branch.status in _PAUSED_AT_END]
    if not suspended:  # then all that is held is
        return position.paused_at
    if not asked and not ending:
        return None
    # Where the run paused first may be where another branch waits. The node that asks is held itself, or its branch, or
    # that around, did nothing after it.
    records = [record for logged in storage.read_log(run_id) for record in stored.plain_records(logged)]
    holding = {record.get("step") for record in records if record.get("kind") == "wait" and not record.get("for")}
    last = {str(record.get("branch") or ""): str(record["node"]) for record in records if record.get("kind") == "step"}
    nodes = [step.node_id for step in asked if step.key in holding]
    for branch in (*(step.branch for step in asked if step.key not in holding), *ending):
        while branch and branch not in last:
            branch = position.branches[branch].parent
        nodes.append(last.get(branch) or position.paused_at or run_id)
    return min(nodes)


def cancelled_part(run_id: str) -> Waiting:
    """What a step waits for whose part somebody cancelled: for a person who calls the whole."""
    return Waiting("input", run_id, run_id, run=run_id, question="was cancelled; it goes on when the plan is called")


def _newest(storage: Storage, run_id: str) -> tuple[CheckpointRow | None, Mapping[str, Any]]:
    """The run's newest checkpoint that can be read, with its body."""
    found = stored.read_newest(storage, run_id, lambda row: (row, readable_body(row)), lambda damage: None)
    return found if found is not None else (None, {})


def part_waits(body: Mapping[str, Any], run_id: str) -> tuple[Waiting, ...]:
    """What a checkpoint's ``body`` says that steps of the run wait for, as a whole of which it is a part says it."""
    listed = ((body.get("position") or {}).get("waits") or {}).values()
    waits = [Waiting.from_json(each) for waits in listed for each in waits]
    return tuple(each if each.run else replace(each, run=run_id) for each in waits)


def is_over(storage: Storage, run_id: str, waits: Iterable[Waiting], now: float) -> bool:
    """Whether one of what the run waits for has come: its time, or a message to the run that it is of."""
    left: dict[str, set[str]] = {}
    for each in waits:
        if each.is_over((), now):
            return True
        of = each.run or run_id
        if each.message and of not in left:
            left[of] = {message.name for message in storage.read_messages(of)}
        if each.is_over(left.get(of, ()), now):
            return True
    return False


def spent_by(storage: Storage, run_id: str) -> Spent:
    """What the run has taken, with attempts and questions that no checkpoint of it counts. Raises ``StorageError``."""
    run = storage.find_run(run_id)
    if run is None:
        return NOTHING
    row, body = _newest(storage, run_id)
    spent = Spent.of_record(body) if row is not None else NOTHING
    if run.state is RunState.COMPLETED:
        return spent
    chosen = row.sequence if row is not None else 0
    counted: dict[str, int] = {}
    for logged in storage.read_log(run_id):
        records = stored.plain_records(logged)
        counted |= counted_calls(records)  # which grow
        if logged.sequence > chosen:
            attempts = [record for record in records if record.get("kind") == "attempt"]
            spent = sum(map(Spent.of_record, attempts), spent)
    journal = storage.read_journal(run_id, on_damage=lambda item: None)
    for step, group in groupby(journal, key=lambda each: each.step):
        spent += journal_rows.fold(journal_rows.parse(group, lenient=True), counted.get(step, 0)).spent
    return spent
