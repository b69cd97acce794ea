"""Pins in PostgreSQL. Sequence 0 stands for the run itself; a checkpoint's sequence is 1 or more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from framework.errors import CheckpointNotFound, RunPinned
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import escaped, unescaped
from framework.storage.retention_records import Pin

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

_LIST = (
    "SELECT runs.run_id, pins.sequence, checkpoints.checkpoint_id, pins.note, pins.pinned_at FROM {schema}.pins "
    "JOIN {schema}.runs ON runs.pk = pins.run_pk LEFT JOIN {schema}.checkpoints "
    "ON checkpoints.run_pk = pins.run_pk AND checkpoints.sequence = pins.sequence "
    "WHERE %(run_ids)s::text[] IS NULL OR runs.run_id = ANY (%(run_ids)s::text[]) "
    "ORDER BY runs.run_id, pins.sequence"
)
_PUT = (
    "INSERT INTO {schema}.pins (run_pk, sequence, note, pinned_at) "
    "VALUES (%(pk)s, %(sequence)s, %(note)s, {schema}.moment(%(now)s)) "
    "ON CONFLICT (run_pk, sequence) DO UPDATE SET note = excluded.note RETURNING pinned_at"
)
_TAKE = "DELETE FROM {schema}.pins WHERE run_pk = %(pk)s AND sequence = %(sequence)s"
_FIND = (
    "SELECT coalesce(max(sequence), 0) FROM {schema}.checkpoints "
    "WHERE run_pk = %(pk)s AND checkpoint_id = %(checkpoint_id)s"
)
_KEPT = "SELECT sequence FROM {schema}.checkpoints WHERE run_pk = %(pk)s ORDER BY sequence"
_FIRST = "SELECT sequence, note FROM {schema}.pins WHERE run_pk = %(pk)s ORDER BY sequence LIMIT 1"


def put(
    database: Database,
    connection: Connection,
    pk: int,
    run_id: str,
    checkpoint_id: str | None,
    note: str,
    now: float | None,
) -> Pin:
    """Pin a run or one of its checkpoints, inside the caller's transaction. Raises ``CheckpointNotFound``."""
    sequence = 0 if checkpoint_id is None else find(database, connection, pk, checkpoint_id)
    if checkpoint_id is not None and not sequence:
        rows = database.execute(connection, _KEPT, {"pk": pk}).fetchall()
        raise CheckpointNotFound(run_id, checkpoint_id, [row[0] for row in rows])
    values = {"pk": pk, "sequence": sequence, "note": escaped(note), "now": now}
    rows = database.execute(connection, _PUT, values).fetchall()
    return Pin(run_id, sequence, checkpoint_id, note, rows[0][0])


def find(database: Database, connection: Connection, pk: int, checkpoint_id: str) -> int:
    """The sequence of the newest checkpoint of this id, or 0."""
    rows = database.execute(connection, _FIND, {"pk": pk, "checkpoint_id": checkpoint_id}).fetchall()
    sequence: int = rows[0][0]
    return sequence


def take(database: Database, connection: Connection, pk: int, sequence: int) -> bool:
    """Take a pin away; whether there was one."""
    return database.execute(connection, _TAKE, {"pk": pk, "sequence": sequence}).rowcount > 0


def read(database: Database, run_ids: Sequence[str] | None) -> list[Pin]:
    """The pins of these runs, or all."""
    rows = database.query("list pins", _LIST, {"run_ids": None if run_ids is None else list(run_ids)})
    return [
        Pin(run_id, sequence, checkpoint_id, unescaped(note), at) for run_id, sequence, checkpoint_id, note, at in rows
    ]


def refuse_if_pinned(database: Database, connection: Connection, pk: int, run_id: str, *, force: bool) -> None:
    """Raise ``RunPinned`` for a run with any pin, unless ``force``."""
    if force:
        return
    row = database.execute(connection, _FIRST, {"pk": pk}).fetchone()
    if row is not None:
        raise RunPinned(run_id, row[0], unescaped(row[1]))
