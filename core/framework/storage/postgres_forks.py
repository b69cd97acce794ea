"""Forking a run inside PostgreSQL: a new run with the log, a checkpoint and the state of another, in one transaction.

The transaction sees one moment of the store, so whoever holds the other run may go on committing and pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from framework.errors import CheckpointNotFound, CorruptData, RunExists, RunNotFound
from framework.schemas.run import RunState
from framework.storage.postgres_commits import call_of, chunk_values, error_of
from framework.storage.postgres_database import Database
from framework.storage.postgres_reading import checked_chunk
from framework.storage.postgres_rows import RECORD, facts_crc, new_key, record_of
from framework.storage.records import Commit, ContentKind, NewRun, Place, RunRecord
from framework.storage.sqlite_schema import row_crc

if TYPE_CHECKING:
    from framework.storage.interface import Rewrite
    from framework.storage.postgres_driver import Connection

_SOURCE = f"SELECT {{schema}}.moment(%(now)s), {RECORD} FROM {{schema}}.runs WHERE run_id = %(run_id)s FOR KEY SHARE"
"""Not deleted meanwhile, which would take the definition away too."""
_MADE = (
    f"SELECT {{schema}}.moment(%(now)s), {RECORD} FROM {{schema}}.runs WHERE run_id = %(run_id)s AND made_key = %(key)s"
)
_MAKE = (
    "INSERT INTO {schema}.runs (run_id, executor_type, goal_id, fingerprint, long_fingerprint, header, facts_crc, "
    "state, sequence, created_at, updated_at, token, lease_until, parent_run_id, made_key) "
    "SELECT %(new_id)s, executor_type, goal_id, fingerprint, long_fingerprint, %(header)b, %(facts_crc)s, 'running', "
    "%(upto)s, moment, moment, 0, 0, NULL, %(key)s FROM {schema}.runs, {schema}.moment(%(now)s) AS moment "
    "WHERE run_id = %(run_id)s ON CONFLICT (run_id) DO NOTHING RETURNING pk"
)
_CHECKPOINT = (
    "SELECT checkpoint_id, body, crc, at FROM {schema}.checkpoints WHERE run_pk = %(source)s AND sequence = %(upto)s"
)
_KEPT = "SELECT sequence FROM {schema}.checkpoints WHERE run_pk = %(source)s ORDER BY sequence"
_PUT_CHECKPOINT = (
    "INSERT INTO {schema}.checkpoints (run_pk, sequence, checkpoint_id, body, crc, at) "
    "VALUES (%(target)s, %(upto)s, %(checkpoint_id)s, %(body)b, %(crc)s, %(made_at)s)"
)
_CHUNKS = """
WITH base AS (
    SELECT key, max(sequence) AS sequence FROM {schema}.chunks
    WHERE run_pk = %(source)s AND op <> 0 AND sequence <= %(upto)s GROUP BY key
)
SELECT chunks.sequence, chunks.key, chunks.long_key, chunks.op, chunks.data, chunks.checksum
FROM {schema}.chunks LEFT JOIN base ON base.key = chunks.key
WHERE chunks.run_pk = %(source)s AND chunks.sequence <= %(upto)s
AND (chunks.sequence = 0 OR base.sequence IS NULL OR chunks.sequence >= base.sequence)
ORDER BY chunks.sequence, chunks.key
"""
"""The initial state, and each key's last set (or delete) at or before a sequence with the appends that follow it.

A chunk with no base at all belongs to no state; it is left to the reader to find it damaged.
"""
_PUT_CHUNKS = (
    "INSERT INTO {schema}.chunks (run_pk, sequence, op, key, long_key, data, checksum) SELECT %(target)s, * FROM "
    "unnest(%(sequences)b::bigint[], %(ops)b::smallint[], %(keys)s::text[], %(long_keys)s::text[], %(datas)b::bytea[], "
    "%(checksums)b::bytea[])"
)
_LOG = (
    "SELECT sequence, record, log, crc FROM {schema}.steps WHERE run_pk = %(source)s AND sequence <= %(upto)s "
    "ORDER BY sequence"
)
_PUT_LOG = (
    "INSERT INTO {schema}.steps (run_pk, sequence, record, log, crc, sets, write_key) "
    "VALUES (%(target)s, %(sequence)s, %(record)b, %(log)b, %(crc)s, %(sets)s::text[], 0)"
)


def copy(
    database: Database,
    connection: Connection,
    run_id: str,
    source: int,
    target: int,
    upto: int,
    rewrite: Rewrite | None,
) -> None:
    """Copy log, checkpoint and chunks of the run ``source`` at ``upto`` to ``target``; both by ``pk``.

    ``run_id`` is the source's. Raises ``CheckpointNotFound``, ``CorruptData``, and what ``rewrite`` raises.
    """
    at = {"source": source, "target": target, "upto": upto}

    def translated(kind: ContentKind, data: bytes, sequence: int, key: str = "", op: str = "") -> bytes:
        return data if rewrite is None else rewrite(Place(kind, run_id, sequence, key, op), data)

    row = database.execute(connection, _CHECKPOINT, at).fetchone()
    if row is None:
        kept = database.execute(connection, _KEPT, at).fetchall()
        raise CheckpointNotFound(run_id, upto, [each[0] for each in kept])
    checkpoint_id, body, crc, made_at = row
    if row_crc(upto, checkpoint_id, body) != crc:
        raise CorruptData(f"Checkpoint {checkpoint_id!r} of run {run_id!r} does not match its checksum.")
    body = translated("checkpoint", body, upto, checkpoint_id)
    crc = row_crc(upto, checkpoint_id, body)
    made = {"checkpoint_id": checkpoint_id, "body": body, "crc": crc, "made_at": made_at}
    database.execute(connection, _PUT_CHECKPOINT, {**at, **made})

    sets: dict[int, list[str]] = {}
    sequences, chunks = [], []
    for sequence, key, long_key, op, data, stored in database.execute(connection, _CHUNKS, at).fetchall():
        chunk = checked_chunk(run_id, key, long_key, op, data, stored)
        if chunk.op != "append":
            sets.setdefault(sequence, []).append(key)
        sequences.append(sequence)
        chunks.append(chunk._replace(data=translated("chunk", data, sequence, chunk.key, chunk.op)))
    if chunks:
        database.execute(connection, _PUT_CHUNKS, {**at, "sequences": sequences, **chunk_values(chunks)})

    rows = database.execute(connection, _LOG, at).fetchall()
    if [row[0] for row in rows] != list(range(1, upto + 1)):
        raise CorruptData(f"The log of run {run_id!r} lacks commits before {upto}.")
    copies: list[dict[str, Any]] = []
    for sequence, record, log, crc in rows:
        if row_crc(sequence, record, log) != crc:
            raise CorruptData(f"Commit {sequence} in the log of run {run_id!r} does not match its checksum.")
        record = translated("record", record, sequence)
        log = None if log is None else translated("log", log, sequence)
        values = {"sequence": sequence, "record": record, "log": log, "crc": row_crc(sequence, record, log)}
        copies.append({**at, **values, "sets": sets.get(sequence)})
    with connection.cursor() as cursor:
        cursor.executemany(database.text(_PUT_LOG).encode(), copies)


def fork(
    database: Database,
    run_id: str,
    sequence: int,
    header: bytes,
    first: Commit,
    rewrite: Rewrite | None,
    now: float | None,
) -> RunRecord:
    """See ``Storage.fork_run``."""
    key = new_key()
    call = call_of(first, now)

    def work(connection: Connection, again: bool) -> RunRecord:
        if again:
            mine = database.execute(connection, _MADE, {"run_id": first.run_id, "key": key, "now": now}).fetchone()
            if mine is not None:
                return record_of(mine, database.where)  # an earlier try did it, only its answer was lost
        row = database.execute(connection, _SOURCE, {"run_id": run_id, "now": now}).fetchone()
        if row is None:
            raise RunNotFound(run_id)
        found = record_of(row, database.where)  # raises when it is damaged
        new = NewRun(first.run_id, found.executor_type, found.goal_id, found.fingerprint, b"", header)
        values = {"run_id": run_id, "new_id": first.run_id, "header": bytes(header), "key": key, "now": now}
        values |= {"facts_crc": facts_crc(new), "upto": sequence}
        made = database.execute(connection, _MAKE, values).fetchone()
        if made is None:
            raise RunExists(first.run_id)
        copy(database, connection, run_id, row[1], made[0], sequence, rewrite)
        answer = database.execute(connection, call.statement, call.values).fetchone()
        refused = None if answer is None else error_of(first, (answer[0], answer[1], answer[2], answer[3]))
        if refused is not None:
            raise refused
        forked = database.execute(connection, _MADE, {"run_id": first.run_id, "key": key, "now": now}).fetchone()
        if forked is None:
            raise RunNotFound(first.run_id)
        if first.state is not RunState.COMPLETED:
            database.execute(connection, "SELECT {schema}.tell_workers(%(run_id)s)", {"run_id": first.run_id})
        return record_of(forked, database.where)

    return database.transaction(f"fork run {run_id!r}", work, snapshot=True)
