"""Pins in the SQLite file. Sequence 0 stands for the run itself; a checkpoint's sequence is 1 or more."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from framework.errors import CheckpointNotFound, RunPinned
from framework.storage.retention_records import Pin

_LIST = (
    "SELECT runs.run_id, pins.sequence, checkpoints.checkpoint_id, pins.note, pins.pinned_at FROM pins "
    "JOIN runs ON runs.pk = pins.run_pk LEFT JOIN checkpoints ON checkpoints.run_pk = pins.run_pk "
    "AND checkpoints.sequence = pins.sequence {which}ORDER BY runs.run_id, pins.sequence"
)
_LIST_ALL = _LIST.format(which="")
_LIST_SOME = _LIST.format(which="WHERE runs.run_id IN (SELECT value FROM json_each(?)) ")


def put(db: sqlite3.Connection, run_pk: int, run_id: str, checkpoint_id: str | None, note: str, now: float) -> Pin:
    """Pin a run or one of its checkpoints, inside the caller's transaction. Raises ``CheckpointNotFound``."""
    sequence = 0 if checkpoint_id is None else find(db, run_pk, checkpoint_id)
    if checkpoint_id is not None and not sequence:
        rows = db.execute("SELECT sequence FROM checkpoints WHERE run_pk = ? ORDER BY sequence", (run_pk,))
        raise CheckpointNotFound(run_id, checkpoint_id, [row[0] for row in rows])
    db.execute(
        "INSERT INTO pins (run_pk, sequence, note, pinned_at) VALUES (?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET note = excluded.note",
        (run_pk, sequence, note, now),
    )
    row = db.execute("SELECT pinned_at FROM pins WHERE run_pk = ? AND sequence = ?", (run_pk, sequence)).fetchone()
    return Pin(run_id, sequence, checkpoint_id, note, row[0])


def find(db: sqlite3.Connection, run_pk: int, checkpoint_id: str) -> int:
    """The sequence of the newest checkpoint of this id, or 0."""
    row = db.execute(
        "SELECT max(sequence) FROM checkpoints WHERE run_pk = ? AND checkpoint_id = ?", (run_pk, checkpoint_id)
    ).fetchone()
    return row[0] or 0


def take(db: sqlite3.Connection, run_pk: int, sequence: int) -> bool:
    """Take a pin away; whether there was one."""
    return db.execute("DELETE FROM pins WHERE run_pk = ? AND sequence = ?", (run_pk, sequence)).rowcount > 0


def read(db: sqlite3.Connection, run_ids: Sequence[str] | None) -> list[Pin]:
    """The pins of these runs, or all."""
    rows = db.execute(_LIST_ALL) if run_ids is None else db.execute(_LIST_SOME, (json.dumps(list(run_ids)),))
    return [Pin(*row) for row in rows.fetchall()]


def refuse_if_pinned(db: sqlite3.Connection, run_pk: int, run_id: str, *, force: bool) -> None:
    """Raise ``RunPinned`` for a run with any pin, unless ``force``."""
    if force:
        return
    row = db.execute("SELECT sequence, note FROM pins WHERE run_pk = ? ORDER BY sequence LIMIT 1", (run_pk,)).fetchone()
    if row is not None:
        raise RunPinned(run_id, row[0], row[1])
