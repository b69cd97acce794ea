"""A run as one JSON document, for a bug report: all that the store has of it, with known secrets masked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from framework._secrets import mask_value, register_environment
from framework.errors import CorruptData, StorageError
from framework.graph.journal_rows import CallRecord
from framework.graph.readable import masked_state, plain_json, type_of
from framework.graph.stored_run import StoredRun, read_stored
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK, plain_body, plain_records
from framework.storage.interface import Storage
from framework.storage.records import CheckpointRow

FORMAT = "surefoot-run"
FORMAT_VERSION = 1
_SCOPE = "/"

TIMES = frozenset({"created_at", "updated_at", "finished_at", "lease_until", "wake_at", "at", "until"})
"""Fields of records and views that are moments, in seconds since the epoch."""


def export_run(
    storage: Storage, run_id: str, *, values: bool = True, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """The run as plain JSON: record, definition, input, log, checkpoints without their states, and the final state.

    Values keep the tags of the codec (``{"$t": "datetime", ...}``), so nothing is lost and no type has to be
    registered. Without ``values`` only their types and sizes are told, and of the log how the run went, error texts
    among it. The secrets among the environment variables, and others the program registered, are replaced by ``***``
    everywhere, and so are the texts of inputs and states under secret names. Damage is listed under ``damage``. Changes
    nothing. Raises ``RunNotFound``, ``StorageError``.
    """
    register_environment()
    run = read_stored(storage, run_id)
    record = {
        field.name: iso_time(value) if field.name in TIMES and value else value
        for field in dataclasses.fields(run.record)
        if field.name != "header"
        for value in (getattr(run.record, field.name),)
    }
    keys = run.header.get("input_keys") or []
    exported = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "exported_at": iso_time(clock()),
        "with_values": values,
        "run": {**record, "state": run.state.value, "header": dict(run.header)},
        "definition": run.definition,
        "input": _state({key: run.initial[key] for key in keys if key in run.initial}, values),
        "log": list(_log(storage, run, values)),
        "journal": [_call(each, values) for each in run.calls],
        "checkpoints": [_checkpoint(row, values) for row in reversed(run.rows)],
        "state_sequence": run.checkpoint.sequence if run.checkpoint is not None else 0,
        "state": _state(run.values, values),
        "document": _document(storage, run_id) if values else None,
        "damage": [dataclasses.asdict(item) for item in run.damage],
    }
    masked: dict[str, Any] = mask_value(exported)
    return masked


def iso_time(epoch_seconds: float) -> str:
    """A moment as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _state(encoded: Mapping[str, bytes], values: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, data in encoded.items():
        plain = plain_json(data)
        shown[key.replace(SCOPE_MARK, _SCOPE)] = plain if values else {"type": type_of(plain), "bytes": len(data)}
    masked: dict[str, Any] = masked_state(shown)
    return masked


def _log(storage: Storage, run: StoredRun, values: bool) -> Iterable[dict[str, Any]]:
    """The commits as they are, those a rewind undid among them: damaged ones are in the damage."""
    try:
        rows = storage.read_log(run.record.run_id)
    except StorageError:
        return
    for row in rows:
        try:
            records, events = plain_records(row), plain_json(row.log) if row.log is not None else []
        except CorruptData:
            continue
        if not values:
            records = [_without(each, _SPOKEN) for each in records]
            events = [{"kind": each.get("kind")} for each in events if isinstance(each, dict)]
        yield {"sequence": row.sequence, "records": records, "events": events}


def _call(call: CallRecord, values: bool) -> dict[str, Any]:
    plain = dataclasses.asdict(call)
    plain["answer"] = masked_state({"answer": plain_json(codec.encode(call.answer))})["answer"]
    return plain if values else _without(plain, ("answer", "question"))


_SPOKEN = ("feedback", "judgment", "reason")
"""Fields of a record that may quote values. Errors stay: without them nobody can tell what went wrong."""


def _without(record: Any, names: Iterable[str]) -> Any:
    return {key: item for key, item in record.items() if key not in names} if isinstance(record, dict) else None


def _checkpoint(row: CheckpointRow, values: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"sequence": row.sequence, "id": row.checkpoint_id, "bytes": len(row.body)}
    body = plain_body(row)
    if not values:
        position = _without(body.get("position") or {}, ("inputs",))
        body = {**_without(body, ("context", "extra", "steps")), "position": position}
    return {**shown, "body": body}


def _document(storage: Storage, run_id: str) -> Any:
    try:
        document = storage.load_run(run_id)
    except StorageError as error:
        return {"unreadable": str(error)}
    return None if document is None else masked_state(document.model_dump(mode="json"))
