"""Dropping checkpoints, and the chunks that only they could reach, inside an SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from framework import _faults
from framework.storage.chunks import Chunk
from framework.storage.records import Retention
from framework.storage.sqlite_schema import SETS_MARK


def pinned(db: sqlite3.Connection, pk: int, before: int) -> list[int]:
    """The pinned checkpoints of a run below the sequence ``before``, in order."""
    rows = db.execute(
        "SELECT sequence FROM pins WHERE run_pk = ? AND sequence > 0 AND sequence < ? ORDER BY sequence", (pk, before)
    )
    return [row[0] for row in rows]


def replace(db: sqlite3.Connection, pk: int, sequence: int) -> None:
    """Drop a checkpoint from between the others, unless it is pinned."""
    values = (pk, sequence)
    if db.execute("SELECT 1 FROM pins WHERE run_pk = ? AND sequence = ?", values).fetchone():
        return
    if not db.execute("DELETE FROM checkpoints WHERE run_pk = ? AND sequence = ?", values).rowcount:
        return
    before, after = (
        db.execute(f"SELECT {which} FROM checkpoints WHERE run_pk = ? AND sequence {side} ?", values).fetchone()[0]
        for which, side in (("max(sequence)", "<"), ("min(sequence)", ">"))
    )
    if after is not None:
        _drop_chunks(db, pk, sequence, before or 0, after)


def prune(db: sqlite3.Connection, pk: int, retention: Retention, needed: int | None = None) -> int:
    """Drop all but the newest checkpoints; pinned ones, and those from sequence ``needed`` on, stay in any case."""
    if retention.keep is None:
        return 0
    kept = db.execute(
        "SELECT sequence FROM checkpoints WHERE run_pk = ? ORDER BY sequence DESC LIMIT 1 OFFSET ?",
        (pk, retention.keep - 1),
    ).fetchone()
    first = db.execute("SELECT min(sequence) AS first FROM checkpoints WHERE run_pk = ?", (pk,)).fetchone()["first"]
    if kept is None or first == kept["sequence"]:
        return 0
    oldest: int = kept["sequence"] if needed is None else min(kept["sequence"], needed)
    return drop_below(db, pk, oldest, first)


def drop_below(db: sqlite3.Connection, pk: int, oldest: int, first: int) -> int:
    """Drop the checkpoints below the retained one ``oldest`` that are not pinned; how many. ``first`` is the lowest."""
    after = 0
    dropped = 0
    for upto in (*pinned(db, pk, oldest), oldest):
        # Between two that stay, all go at once.
        since = first
        if after:
            found = db.execute("SELECT min(sequence) FROM checkpoints WHERE run_pk = ? AND sequence > ?", (pk, after))
            since = found.fetchone()[0]
        if since < upto:
            gone = "DELETE FROM checkpoints WHERE run_pk = ? AND sequence > ? AND sequence < ?"
            dropped += db.execute(gone, (pk, after, upto)).rowcount
            _faults.reach("retention")
            _drop_chunks(db, pk, since, after, upto)
        after = upto
    return dropped


def drop_before(db: sqlite3.Connection, pk: int, chunks: Sequence[Chunk], sequence: int) -> None:
    """Drop what the chunks of the commit ``sequence`` took the place of, its checkpoint being the only one left.

    What ``prune`` comes to when the checkpoint before was the only one as well, without looking anything up.
    """
    _faults.reach("retention")
    sets = [(pk, chunk.key, sequence) for chunk in chunks if chunk.op == "set"]
    if sets:
        db.executemany("DELETE FROM chunks WHERE run_pk = ? AND key = ? AND sequence > 0 AND sequence < ?", sets)
    for chunk in chunks:
        if chunk.op == "delete":
            _drop_unreachable(db, pk, chunk.key, 0, sequence)


def _drop_chunks(db: sqlite3.Connection, pk: int, since: int, after: int, upto: int) -> None:
    """Drop the chunks that only checkpoints between ``after`` and ``upto`` could reach, of which none is left.

    A key's chunks before its last set at or before ``upto`` are such. Only keys set since the oldest checkpoint
    dropped, ``since``, can have gained one, and the log rows name them: the cost follows what is dropped, not the
    history. Sequence 0, the input, always stays.
    """
    rows = db.execute(
        "SELECT sets FROM steps WHERE run_pk = ? AND sequence >= ? AND sequence <= ? AND sets IS NOT NULL",
        (pk, since, upto),
    ).fetchall()
    for key in sorted({key for row in rows for key in row["sets"].split(SETS_MARK)}):
        _drop_unreachable(db, pk, key, after, upto)


def _drop_unreachable(connection: sqlite3.Connection, run_pk: int, key: str, after: int, upto: int) -> None:
    """Remove a key's chunks that nothing reads once no checkpoint is retained between two; see ``chunks.unreachable``.

    ``after`` and ``upto`` are retained checkpoints next to each other, ``after`` 0 when it is the initial state.
    """
    base = connection.execute(
        "SELECT max(sequence) FROM chunks WHERE run_pk = ? AND key = ? AND sequence > ? AND sequence <= ? AND op <> 0",
        (run_pk, key, after, upto),
    ).fetchone()[0]
    if base is None:
        return
    connection.execute(
        "DELETE FROM chunks WHERE run_pk = ? AND key = ? AND sequence > ? AND sequence < ?", (run_pk, key, after, base)
    )
    connection.execute(
        "DELETE FROM chunks WHERE run_pk = :run AND key = :key AND sequence = :base AND op = 2 AND NOT EXISTS "
        "(SELECT 1 FROM chunks AS first WHERE first.run_pk = :run AND first.key = :key AND first.sequence <= :after)",
        {"run": run_pk, "key": key, "base": base, "after": after},
    )
