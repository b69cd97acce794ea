"""Copying a run up to one of its checkpoints inside an SQLite file. The caller holds the write transaction."""

from __future__ import annotations

import sqlite3

from framework.errors import CheckpointNotFound, CorruptData
from framework.storage.chunks import Chunk, checksum
from framework.storage.interface import Rewrite
from framework.storage.records import Place
from framework.storage.sqlite_schema import OPS, SETS_MARK, row_crc

_CHUNKS = """
WITH base AS (
    SELECT key, max(sequence) AS sequence FROM chunks
    WHERE run_pk = :run AND op <> 0 AND sequence <= :upto GROUP BY key
)
SELECT chunks.sequence, chunks.key, chunks.op, CAST(chunks.data AS BLOB), chunks.checksum
FROM chunks LEFT JOIN base ON base.key = chunks.key
WHERE chunks.run_pk = :run AND chunks.sequence <= :upto
AND (chunks.sequence = 0 OR base.sequence IS NULL OR chunks.sequence >= base.sequence)
ORDER BY chunks.sequence, chunks.key
"""
"""The initial state, and each key's last set (or delete) at or before a sequence with the appends that follow it.

A chunk with no base at all belongs to no state; it is left to the reader to find it damaged.
"""


def copy(
    db: sqlite3.Connection, run_id: str, source: int, target: int, upto: int, rewrite: Rewrite | None = None
) -> None:
    """Copy log, checkpoint and chunks of the run ``source`` at ``upto`` to ``target``; both by ``pk``.

    ``run_id`` is the source's. ``rewrite`` gives the bytes of each copy. Raises ``CheckpointNotFound``,
    ``CorruptData``.
    """
    rewritten = rewrite or _as_it_is
    _copy_checkpoint(db, run_id, source, target, upto, rewritten)
    sets = _copy_chunks(db, run_id, source, target, upto, rewritten)
    _copy_log(db, run_id, source, target, upto, sets, rewritten)


def _as_it_is(place: Place, data: bytes) -> bytes:
    return data


def _copy_checkpoint(
    db: sqlite3.Connection, run_id: str, source: int, target: int, upto: int, rewrite: Rewrite
) -> None:
    row = db.execute(
        "SELECT checkpoint_id, CAST(body AS BLOB), crc, at FROM checkpoints WHERE run_pk = ? AND sequence = ?",
        (source, upto),
    ).fetchone()
    if row is None:
        kept = db.execute("SELECT sequence FROM checkpoints WHERE run_pk = ? ORDER BY sequence", (source,)).fetchall()
        raise CheckpointNotFound(run_id, upto, [each[0] for each in kept])
    checkpoint_id, body, crc, at = row
    if row_crc(upto, checkpoint_id, body) != crc:
        raise CorruptData(f"Checkpoint {checkpoint_id!r} of run {run_id!r} does not match its checksum.")
    body = rewrite(Place("checkpoint", run_id, upto, checkpoint_id), body)
    crc = row_crc(upto, checkpoint_id, body)
    db.execute(
        "INSERT INTO checkpoints (run_pk, sequence, checkpoint_id, body, crc, at) VALUES (?, ?, ?, ?, ?, ?)",
        (target, upto, checkpoint_id, body, crc, at),
    )


def _copy_chunks(
    db: sqlite3.Connection, run_id: str, source: int, target: int, upto: int, rewrite: Rewrite
) -> dict[int, list[str]]:
    """Copy the chunks that make the state; the keys that the copies set or delete, by sequence."""
    sets: dict[int, list[str]] = {}
    copies = []
    for sequence, key, op, data, stored in db.execute(_CHUNKS, {"run": source, "upto": upto}):
        chunk = Chunk(key, OPS[op], data) if op in range(len(OPS)) and data is not None else None
        if chunk is None or checksum(chunk) != stored:
            raise CorruptData(f"A chunk of key {key!r} of run {run_id!r} does not match its checksum.")
        if chunk.op != "append":
            sets.setdefault(sequence, []).append(key)
        chunk = chunk._replace(data=rewrite(Place("chunk", run_id, sequence, key, chunk.op), data))
        copies.append((target, sequence, key, op, chunk.data, checksum(chunk)))
    db.executemany("INSERT INTO chunks (run_pk, sequence, key, op, data, checksum) VALUES (?, ?, ?, ?, ?, ?)", copies)
    return sets


def _copy_log(
    db: sqlite3.Connection,
    run_id: str,
    source: int,
    target: int,
    upto: int,
    sets: dict[int, list[str]],
    rewrite: Rewrite,
) -> None:
    rows = db.execute(
        "SELECT sequence, CAST(record AS BLOB), CAST(log AS BLOB), crc FROM steps "
        "WHERE run_pk = ? AND sequence <= ? ORDER BY sequence",
        (source, upto),
    ).fetchall()
    if [row[0] for row in rows] != list(range(1, upto + 1)):
        raise CorruptData(f"The log of run {run_id!r} lacks commits before {upto}.")
    for sequence, record, log, crc in rows:
        if row_crc(sequence, record, log) != crc:
            raise CorruptData(f"Commit {sequence} in the log of run {run_id!r} does not match its checksum.")
    copies = []
    for sequence, record, log, _ in rows:
        moved = rewrite(Place("record", run_id, sequence), record)
        moved_log = None if log is None else rewrite(Place("log", run_id, sequence), log)
        marks = SETS_MARK.join(sets.get(sequence, ())) or None
        copies.append((target, sequence, moved, moved_log, row_crc(sequence, moved, moved_log), marks))
    db.executemany("INSERT INTO steps (run_pk, sequence, record, log, crc, sets) VALUES (?, ?, ?, ?, ?, ?)", copies)
