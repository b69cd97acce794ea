"""What people tell a run's unfinished steps: a value that a node waits for, or what became of an effect. Blocks; see
``CheckpointManager.send``, ``settle`` and ``journal``."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from framework.errors import MessageRefused, RunNotFound
from framework.graph import journal_rows as rows_of
from framework.graph.answer_schema import problem_of
from framework.graph.journal_rows import CallRecord, Row
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import Damage, RunRecord

logger = logging.getLogger(__name__)

_QUESTION = re.compile(r"/q[0-9a-f]{8}(\.\d+)?$")


def read_calls(storage: Storage, run_id: str) -> list[CallRecord]:
    """The calls in the run's journal, by step and number. Raises ``RunNotFound``, ``StorageError``, ``UnknownType``."""
    run = _found(storage, run_id)
    running = effective_state(run) is RunState.RUNNING
    return [each for step, rows in _rows(storage, run_id) for each in rows_of.describe(step, rows, running=running)]


def send_value(storage: Storage, run_id: str, name: str, value: Any) -> None:
    """Leave ``value`` for who waits for ``name``. Raises as ``CheckpointManager.send``."""
    _found(storage, run_id)
    body = codec.encode(value, "value")
    calls = [each for each in read_calls(storage, run_id) if each.answers_to == name]
    if _QUESTION.search(name):
        message = f"answer:{name}"
        if any(each.name == message for each in storage.read_messages(run_id)):
            raise MessageRefused(run_id, name, "this question was answered before; the first answer counts.")
        if not any(each.state == "waiting" for each in calls):
            raise MessageRefused(run_id, name, f"the run has no such open question. {_open(storage, run_id)}")
        problem = problem_of(calls[0].schema, value)
        if problem is not None:
            raise MessageRefused(run_id, name, f"the value does not fit what is asked: {problem}.")
    else:
        message = f"signal:{name}"
        if calls and not any(_still_waits(each) for each in calls):
            raise MessageRefused(run_id, name, "it comes too late; the step that waited for it has gone on without.")
    storage.send(run_id, message, body)


def settle_call(storage: Storage, run_id: str, call_id: str, action: str, value: Any) -> None:
    """Say what became of an effect. Raises as ``CheckpointManager.settle``."""
    run = _found(storage, run_id)
    if run.state is RunState.COMPLETED:
        raise MessageRefused(run_id, call_id, "the run is completed; nothing of it is left to settle.")
    if effective_state(run) is RunState.RUNNING:
        raise MessageRefused(run_id, call_id, "the run is running; settle it once it has paused or ended.")
    body = codec.encode({"action": action, "value": value}, "value")
    for step, rows in _rows(storage, run_id):
        for each in rows_of.describe(step, rows, running=False):
            if each.id == call_id and each.state == "unknown":
                row = next(row for row in rows if row["n"] == each.number)
                storage.send(run_id, rows_of.settle_message(step, row), body)
                return
            if each.id == call_id:
                raise MessageRefused(run_id, call_id, f"what became of this call is known: it is {each.state!r}.")
    unknown = [each.id for each in read_calls(storage, run_id) if each.state == "unknown"]
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


def _still_waits(call: CallRecord) -> bool:
    # One that has its answer is refused by the store: that is a second answer, not a late one.
    return call.state == "done" or (call.state == "waiting" and (call.until is None or call.until > time.time()))


def _open(storage: Storage, run_id: str) -> str:
    waiting: Sequence[str] = [
        str(each.answers_to) for each in read_calls(storage, run_id) if each.kind == "ask" and each.state == "waiting"
    ]
    return f"Open: {', '.join(waiting)}." if waiting else "It has none."
