"""A run as its store has it, read without claiming it, and as far as it can be read: damage is told, not raised."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from framework.errors import CorruptData, RunNotFound, StorageError, StoreTooNew, SurefootError, UnknownType
from framework.graph import journal_rows
from framework.graph.journal_rows import CallRecord
from framework.graph.readable import plain_json, readable
from framework.graph.run_messages import cancel_name
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import CheckpointRow, Damage, JournalRow, LogRow, Message, RunRecord

_READ_ATTEMPTS = 5
_MAX_READ_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One reading of a run.

    ``state`` is the run's, ``crashed`` also when its owner's process is certainly gone. ``definition`` is the canonical
    form, ``None`` when the store lacks it. ``rows`` are the readable checkpoints, newest first; ``checkpoint`` is the
    one that a resume goes on from, with its ``body`` and the state's encoded ``values`` by stored key; without one the
    run begins with its ``initial`` values. ``records`` are the log's up to that checkpoint, ``later`` those after it,
    ``events`` the decisions and problems, ``messages`` what was left for the run from outside, ``calls`` those in its
    journal, by step and number. ``blocked`` says why no checkpoint can be used though there are some. ``left`` are the
    names of the messages to the run and, by their ids, to the parts of it that its steps wait for.
    """

    record: RunRecord
    state: RunState
    header: Mapping[str, Any]
    definition: Mapping[str, Any] | None
    rows: Sequence[CheckpointRow]
    checkpoint: CheckpointRow | None
    body: Mapping[str, Any]
    values: Mapping[str, bytes]
    initial: Mapping[str, bytes]
    records: Sequence[Mapping[str, Any]]
    later: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    messages: Sequence[Message]
    calls: Sequence[CallRecord]
    damage: Sequence[Damage]
    blocked: str | None
    left: Mapping[str, frozenset[str]]

    @property
    def is_plan(self) -> bool:
        """Whether it executes a plan rather than a graph."""
        return self.record.executor_type == "flexible"

    @property
    def asked_to_stop(self) -> bool:
        """Whether its present, or last, owner was asked to cancel it."""
        return any(message.name == cancel_name(self.record.token) for message in self.messages)

    @property
    def log(self) -> list[Mapping[str, Any]]:
        """All records, whichever side of the checkpoint."""
        return [*self.records, *self.later]


def read_stored(storage: Storage, run_id: str, clock: Callable[[], float] = time.time) -> StoredRun:
    """The run as it is by ``clock`` (seconds since the epoch). Raises ``RunNotFound``, ``StorageError`` when its record
    itself cannot be read.

    A run that goes on meanwhile is read again, a few times, to be seen at one moment. One that is seen to commit each
    time may be shown with steps newer than its record; but never as it stood before its owner gave it up, since an
    owner that is gone from a run that it held would look like a crash.
    """
    for attempt in range(1, _MAX_READ_ATTEMPTS + 1):
        record = storage.find_run(run_id)
        if record is None:
            raise RunNotFound(run_id)
        found = _read(storage, record, clock())
        now = storage.find_run(run_id)
        if now is None or (now.sequence, _held(now)) == (record.sequence, _held(record)):
            break
        if attempt >= _READ_ATTEMPTS and _held(now) == _held(record):
            break
    return found


def _held(record: RunRecord) -> tuple[RunState, str | None, int]:
    """What a commit of a run that only goes on leaves as it was."""
    return record.state, record.owner, record.token


def _read(storage: Storage, record: RunRecord, now: float) -> StoredRun:
    run_id = record.run_id
    damage: list[Damage] = []
    header = _guarded(lambda: readable(plain_json(record.header or b"{}")), damage, record, "header") or {}
    definition = _definition(storage, record, damage)
    initial = _guarded(lambda: stored.load_state(storage, run_id, 0).values, damage, record, "initial state")
    rows = list(_guarded(lambda: list(storage.read_checkpoint_rows(run_id, damage.append)), damage, record, "") or ())

    def build(row: CheckpointRow) -> tuple[CheckpointRow, dict[str, Any], Mapping[str, bytes]]:
        body = readable_body(row)
        return row, body, stored.load_state(storage, run_id, row.sequence, body.get("digest")).values

    unreadable: list[Damage] = []
    blocked: str | None = None
    newest = None
    try:
        newest = stored.read_newest(storage, run_id, build, unreadable.append)
    except StorageError as error:  # written by a newer version, or changing too fast to be read
        blocked = str(error)
    damage.extend(unreadable)
    if newest is None and blocked is None and (unreadable or initial is None):
        blocked = (
            "no checkpoint of it can be read, and starting over would repeat finished steps. Restore the store from a "
            "backup, or start a new run under another run_id"
        )
    row, body, values = newest if newest is not None else (None, {}, initial or {})
    log = _guarded(lambda: storage.read_log(run_id, on_damage=damage.append), damage, record, "log") or []
    records = _records(log, damage, record)
    messages = _guarded(lambda: storage.read_messages(run_id, damage.append), damage, record, "messages")
    left = {run_id: frozenset(message.name for message in messages or ())}
    waits = ((body.get("position") or {}).get("waits") or {}).values()
    for part in {str(each["run"]) for listed in waits for each in listed if each.get("run")}:
        sent = _guarded(lambda part=part: storage.read_messages(part), damage, record, f"messages to {part}")
        left[part] = frozenset(message.name for message in sent or ())
    state = effective_state(record)
    calls = _guarded(lambda: _calls(storage, record, state, left[run_id], now, damage), damage, record, "journal")
    chosen = row.sequence if row is not None else 0
    return StoredRun(
        record=record,
        state=state,
        header=header,
        definition=definition,
        rows=rows,
        checkpoint=row,
        body=body,
        values=values,
        initial=initial or {},
        records=[each for each in records if each["sequence"] <= chosen],
        later=[each for each in records if each["sequence"] > chosen],
        events=_events(log, damage, record),
        messages=messages or (),
        calls=calls or (),
        damage=tuple(dict.fromkeys(damage)),
        blocked=blocked,
        left=left,
    )


def _calls(
    storage: Storage,
    record: RunRecord,
    state: RunState,
    messages: Container[str],
    now: float,
    damage: list[Damage],
) -> list[CallRecord]:
    found: list[CallRecord] = []
    running = state is RunState.RUNNING
    rows = storage.read_journal(record.run_id, on_damage=damage.append)
    for step, group in groupby(rows, key=lambda row: row.step):
        parsed = [
            _guarded(lambda row=row: _parse_call(row), damage, record, f"journal row {step}/{row.number}")
            for row in group
        ]
        known = [each for each in parsed if each is not None]
        found += journal_rows.describe(step, known, running=running, messages=messages, now=now)
    return found


def _parse_call(row: JournalRow) -> journal_rows.Row:
    try:
        return journal_rows.parse([row])[0]
    except UnknownType:
        parsed = readable(plain_json(row.record))
        if not isinstance(parsed, dict):
            raise CorruptData("It is not an object.") from None
        return {**parsed, "n": row.number}


def readable_body(row: CheckpointRow) -> dict[str, Any]:
    """A checkpoint's body; in readable form where it holds types that are not registered.

    Raises ``CorruptData``, ``StoreTooNew``.
    """
    try:
        return stored.parse_body(row)
    except UnknownType:
        return stored.whole_body(row, readable(plain_json(row.body)))


def _definition(storage: Storage, record: RunRecord, damage: list[Damage]) -> Mapping[str, Any] | None:
    if not record.fingerprint:
        return None

    def read() -> Mapping[str, Any]:
        data = storage.definition(record.fingerprint)
        if data is None:
            raise CorruptData("It is missing.")
        found = readable(plain_json(data))
        if not isinstance(found, dict):
            raise CorruptData("It is not an object.")
        return found

    found: Mapping[str, Any] | None = _guarded(read, damage, record, "definition")
    return found


def _guarded(read: Any, damage: list[Damage], record: RunRecord, what: str) -> Any:
    """What ``read`` returns; ``None``, with the damage noted, when it cannot."""
    try:
        return read()
    except StoreTooNew:
        raise
    except SurefootError as error:
        damage.append(Damage(record.run_id, None, f"{what or 'checkpoints'} of run {record.run_id}", str(error)))
        return None


def _records(rows: Sequence[LogRow], damage: list[Damage], record: RunRecord) -> list[dict[str, Any]]:
    """The records of all rows that can be read; steps that a rewind undid are left out."""
    records: list[dict[str, Any]] = []
    for row in rows:
        made = _guarded(lambda row=row: _parse(row), damage, record, f"log row {row.sequence}")
        for each in made or ():
            if each.get("kind") == "rewind":
                records = [earlier for earlier in records if earlier["sequence"] <= each.get("to", 0)]
            records.append(each)
    return records


def _parse(row: LogRow) -> list[dict[str, Any]]:
    try:
        return stored.parse_log([row])
    except UnknownType:
        return [{**each, "sequence": row.sequence} for each in readable(stored.plain_records(row))]


def _events(rows: Sequence[LogRow], damage: list[Damage], record: RunRecord) -> list[Mapping[str, Any]]:
    events: list[Mapping[str, Any]] = []
    for row in rows:
        if row.log is not None:
            data = row.log
            made = _guarded(lambda data=data: readable(plain_json(data)), damage, record, f"events {row.sequence}")
            events.extend(each for each in made or () if isinstance(each, dict))
    return events
