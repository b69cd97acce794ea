"""What people tell a run's unfinished steps: a value that a node waits for, or what became of an effect. Blocks; see
``CheckpointManager.send``, ``settle`` and ``journal``."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from framework.errors import MessageRefused, RunNotFound
from framework.graph import journal_rows as rows_of
from framework.graph import journal_slots as slots
from framework.graph.answer_schema import problem_of
from framework.graph.journal_rows import CallRecord, Row
from framework.graph.run_records import finished_steps
from framework.graph.stored_run import readable_body
from framework.graph.suspension import Waiting
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.checkpoints import plain_records
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import Damage, RunRecord

logger = logging.getLogger(__name__)

_SETTLED = "this call was settled before; the first word counts. Its step goes on with it when the run does."

_MOST_PARTS = 10_000
"""Parts of one run that are looked through."""


def read_calls(storage: Storage, run_id: str) -> list[CallRecord]:
    """The calls in the run's journal, by step and number. Raises ``RunNotFound``, ``StorageError``, ``UnknownType``."""
    run = _found(storage, run_id)
    running = effective_state(run) is RunState.RUNNING
    asked = _asked_to_settle(storage, run_id) if running else frozenset()
    records: list[CallRecord] = []
    journal = _rows(storage, run_id)
    messages, now = {each.name for each in storage.read_messages(run_id)} if journal else set(), time.time()
    for step, rows in journal:
        named = {row["n"]: rows_of.settle_message(step, row) for row in rows if rows_of.is_lost_effect(row)}
        for each in rows_of.describe(step, rows, running=running, messages=messages, now=now):
            # Its step is held for it, while others of the run work: it is not in flight.
            held = each.state == "running" and named.get(each.number) in asked
            records.append(replace(each, state="unknown") if held else each)
    return records


def _asked_to_settle(storage: Storage, run_id: str) -> frozenset[str]:
    """The messages that settle what held steps of a run wait for, as its newest checkpoint tells."""
    waits = _held_for(storage, run_id)
    return frozenset(each.message for each in waits if each.kind == "settle" and not each.run)


def _held_for(storage: Storage, run_id: str) -> list[Waiting]:
    """What held steps of a run wait for, as its newest checkpoint tells."""
    row = next(iter(storage.read_checkpoint_rows(run_id, limit=1)), None)
    position = (readable_body(row).get("position") or {}) if row is not None else {}
    return [Waiting.from_json(each) for listed in (position.get("waits") or {}).values() for each in listed]


def part_that_waits(storage: Storage, run_id: str, name: str) -> str | None:
    """The part of a run, as of a plan's sub-graph, that waits for the signal, the question or the call ``name``.

    A step of the run waits for it, or is still at work with it. ``None`` when none does. Raises ``MessageRefused`` when
    several do, and ``StorageError``.
    """
    waits = [*_held_for(storage, run_id), *_waits_at_work(storage, run_id)]
    found = sorted({each.run for each in waits if each.run and _name_of(each) == name})
    if len(found) > 1:
        listing = ", ".join(map(repr, found))
        raise MessageRefused(
            run_id, name, f"several of its sub-graphs' runs wait for it; name the one meant: {listing}."
        )
    return found[0] if found else None


def _waits_at_work(storage: Storage, run_id: str) -> list[Waiting]:
    """What parts of a run wait for while they work on, each with the part's id: in another branch, or in the process.

    Also of one that crashed together with the run. Others, such as those that a revised plan left, are nobody's now.
    """
    run = storage.find_run(run_id)
    state = effective_state(run) if run is not None else None
    if state not in (RunState.RUNNING, RunState.CRASHED):
        return []
    found = []
    for part in storage.find_runs(f"{run_id}/", _MOST_PARTS):
        if part.parent_run_id != run_id or effective_state(part) is not state:
            continue
        own = [
            Waiting("answer" if row["kind"] == "ask" else "signal", f"{step}/{row['n']}", str(row.get("to")))
            for step, rows in _rows(storage, part.run_id)
            for row in rows_of.fold(rows).rows.values()
            if row["kind"] in ("ask", "wait") and row["state"] == "waiting"
        ]
        held = [each for each in _held_for(storage, part.run_id) if each.kind == "settle" and not each.run]
        found += [replace(each, run=part.run_id) for each in (*own, *held)]
    return found


def _name_of(waiting: Waiting) -> str:
    return waiting.name if waiting.kind in ("signal", "answer", "settle") else ""


def send_value(storage: Storage, run_id: str, name: str, value: Any, occurrence: int | None = None) -> None:
    """Leave ``value`` for who waits for ``name``. Raises as ``CheckpointManager.send``."""
    if not name:
        raise ValueError(f"send: the name is {name!r}; it is that of a signal, or the id of a question.")
    if occurrence is not None and (slots.QUESTION.search(name) or occurrence < 1):
        raise ValueError(f"send: occurrence is {occurrence!r}; it counts waits for one signal, from 1, not questions.")
    run = _found(storage, run_id)
    if run.state is RunState.COMPLETED:
        raise MessageRefused(run_id, name, "the run is completed and waits for nothing any more.")
    if run.state is RunState.CANCELLED:
        raise MessageRefused(
            run_id,
            name,
            "the run is cancelled and waits for nothing. To have it go on all the same, resume it (surefoot resume, or "
            "the executor's next call), and send the value once it waits.",
        )
    if run.executor_type == ExecutorType.FLEXIBLE.value:  # a plan's own steps wait for no values
        part = part_that_waits(storage, run_id, name)
        if part is None:
            raise MessageRefused(run_id, name, f"no sub-graph of the plan waits for it. {_parts_open(storage, run_id)}")
        send_value(storage, part, name, value, occurrence)
        return
    body = codec.encode(value, "value")
    if slots.QUESTION.search(name):
        message = _answered(storage, run_id, name, value)
    else:
        message = _signalled(storage, run_id, name, occurrence)
    try:
        storage.send(run_id, message, body)
    except MessageRefused:
        # What was read above has changed in between; the store decides.
        if _found(storage, run_id).state is RunState.COMPLETED:
            raise
        raise MessageRefused(
            run_id, name, "another one was there first, or the wait for it is over; nothing was changed."
        ) from None


def _answered(storage: Storage, run_id: str, question: str, value: Any) -> str:
    """The message that an answer is to be. Raises ``MessageRefused``."""
    rows = [row for _, listed in _rows(storage, run_id) for row in rows_of.fold(listed).rows.values()]
    row = next((row for row in rows if row["kind"] == "ask" and row.get("to") == question), None)
    names = {each.name for each in storage.read_messages(run_id)}
    is_open = row is not None and row["state"] == "waiting"
    message = slots.answer_message(question, len(row.get("refused", ())) + 1 if row is not None else 1)
    if message in names or (not is_open and any(slots.is_answer(each, question) for each in names)):
        raise MessageRefused(run_id, question, "this question was answered before; the first answer counts.")
    if row is None or not is_open:
        raise MessageRefused(run_id, question, f"the run has no such open question. {_open(storage, run_id)}")
    problem = problem_of(row["schema"], value)
    if problem is not None:
        raise MessageRefused(run_id, question, f"the value does not fit what is asked: {problem}.")
    return message


def _signalled(storage: Storage, run_id: str, name: str, occurrence: int | None) -> str:
    """The message that a signal is to be: of the first wait that is open, else an early one. Raises
    ``MessageRefused``."""
    given, waits = _waits_for(storage, run_id, name)
    waiting = [number for number, state in waits.items() if state == "open" and number not in given]
    if occurrence is None:
        if waiting:
            return slots.signal_message(name, min(waiting))
        coming = max(waits, default=0) + 1
        if not waits and coming not in given:
            return slots.signal_message(name, coming)
        last = coming - 1 if waits else coming
        free = next(number for number in itertools.count(coming) if number not in given)
        if last in given and given[last] != slots.CLOSED and waits.get(last) in (None, "open"):
            problem = "a value was sent before that the run has not taken yet; the first one counts."
        else:
            how = "timed out" if given.get(last) == slots.CLOSED or waits[last] == "late" else "is over"
            problem = f"it comes too late; wait number {last} of the run for it {how}."
        raise MessageRefused(
            run_id, name, f"{problem} One for a wait that has not begun yet has to say which: occurrence={free}."
        )
    if occurrence in given:
        over = "it comes too late; the wait for it timed out."
        problem = over if given[occurrence] == slots.CLOSED else "one was sent before; the first one counts."
        raise MessageRefused(run_id, name, f"Occurrence {occurrence}: {problem}")
    if waits.get(occurrence, "open") != "open":
        raise MessageRefused(run_id, name, f"Occurrence {occurrence}: it comes too late; the wait for it is over.")
    return slots.signal_message(name, occurrence)


def _waits_for(storage: Storage, run_id: str, name: str) -> tuple[dict[int, bytes], dict[int, str]]:
    """By occurrence: what was left for waits for the signal, and each wait begun, "open", "late" or "over"."""
    # In this order: a wait that is over has left what says so before its row goes.
    journal = _rows(storage, run_id)
    given = {}
    for message in storage.read_messages(run_id):
        found = slots.signal_of(message.name)
        if found is not None and found[0] == name:
            given[found[1]] = message.body
    marks = [row for step, rows in journal if step == slots.SIGNALS for row in rows]
    claims = [claim for claim in map(slots.Claim.of_row, marks) if claim.name == name]
    if not claims:
        return given, {}
    rows = [(step, row) for step, listed in journal for row in rows_of.fold(listed).rows.values()]
    known = {row["occurrence"]: row for _, row in rows if row["kind"] == "wait" and row.get("to") == name}
    finished: set[str] | None = None
    waits = {}
    for claim in claims:
        row = known.get(claim.occurrence)
        if row is not None and row["state"] == "waiting":
            waits[claim.occurrence] = "open" if row.get("until", math.inf) > time.time() else "late"
        elif row is not None:
            waits[claim.occurrence] = "over"
        else:
            # Its row is not written yet, its attempt failed and will be made again, or its step is done.
            finished = _finished(storage, run_id) if finished is None else finished
            waits[claim.occurrence] = "over" if claim.step in finished else "open"
    return given, waits


def _finished(storage: Storage, run_id: str) -> set[str]:
    records = [record for row in storage.read_log(run_id) for record in plain_records(row)]
    return finished_steps(records)


def settle_call(storage: Storage, run_id: str, call_id: str, action: str, value: Any) -> None:
    """Say what became of an effect. Raises as ``CheckpointManager.settle``."""
    run = _found(storage, run_id)
    if run.state is RunState.COMPLETED:
        raise MessageRefused(run_id, call_id, "the run is completed; nothing of it is left to settle.")
    running = effective_state(run) is RunState.RUNNING
    asked = _asked_to_settle(storage, run_id) if running else frozenset()
    body = codec.encode({"action": action, "value": value}, "value")
    known: str | None = None
    journal = _rows(storage, run_id)
    messages = {each.name for each in storage.read_messages(run_id)}
    for step, rows in journal:
        for each in rows_of.describe(step, rows, running=False, messages=messages, now=time.time()):
            if each.id == call_id and each.state == "unknown":
                row = next(row for row in rows if row["n"] == each.number)
                message = rows_of.settle_message(step, row)
                if running and message not in asked:
                    problem = (
                        "the run is running, and may be making this call now; settle it once it has paused or ended."
                    )
                    raise MessageRefused(run_id, call_id, problem)
                try:
                    storage.send(run_id, message, body)
                except MessageRefused:
                    # What was read above has changed in between; the store decides.
                    if all(message != left.name for left in storage.read_messages(run_id)):
                        raise
                    raise MessageRefused(run_id, call_id, _SETTLED) from None
                return
            if each.id == call_id:
                known = each.state
    part = part_that_waits(storage, run_id, call_id)  # which may have a call of the same id
    if part is not None:
        settle_call(storage, part, call_id, action, value)
        return
    if known is not None:
        problem = _SETTLED if known == "settled" else f"what became of this call is known: it is {known!r}."
        raise MessageRefused(run_id, call_id, problem)
    unknown = [each.id for each in read_calls(storage, run_id) if each.state == "unknown"]
    waits = [*_held_for(storage, run_id), *_waits_at_work(storage, run_id)]
    unknown += [f"{each.name} of run {each.run!r}" for each in waits if each.kind == "settle" and each.run]
    listing = f"Those that are: {', '.join(unknown)}." if unknown else "It has none."
    raise MessageRefused(run_id, call_id, f"the run has no such call whose effect is unknown. {listing}")


def _found(storage: Storage, run_id: str) -> RunRecord:
    run = storage.find_run(run_id)
    if run is None:
        raise RunNotFound(run_id)
    return run


def _rows(storage: Storage, run_id: str) -> list[tuple[str, list[Row]]]:
    damage: list[Damage] = []
    rows = storage.read_journal(run_id, on_damage=damage.append)
    for item in damage:
        logger.warning("%s of run %r is damaged and left out: %s", item.where, run_id, item.problem)
    return [(step, rows_of.parse(group)) for step, group in groupby(rows, key=lambda row: row.step)]


def _open(storage: Storage, run_id: str) -> str:
    waiting: Sequence[str] = [
        str(each.answers_to) for each in read_calls(storage, run_id) if each.kind == "ask" and each.state == "waiting"
    ]
    return f"Open: {', '.join(waiting)}." if waiting else "It has none."


def _parts_open(storage: Storage, run_id: str) -> str:
    """What the runs of a plan's sub-graphs wait for, for an error."""
    waits = [*_held_for(storage, run_id), *_waits_at_work(storage, run_id)]
    open_ones = {(each.name, each.run) for each in waits if each.run and each.kind in ("signal", "answer")}
    listing = ", ".join(f"{name!r} (run {part!r})" for name, part in sorted(open_ones))
    early = f"A value for one that does not wait yet is sent to its own run, like '{run_id}/<step>#1'."
    return f"Open: {listing}. {early}" if listing else f"None waits for a value. {early}"
