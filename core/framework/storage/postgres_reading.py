"""Reading a run's log, checkpoints, chunks, journal and messages from PostgreSQL, each by one statement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from framework.errors import CorruptData
from framework.storage.chunks import Chunk, checksum
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import indexed, text_of
from framework.storage.records import CheckpointRow, Damage, JournalRow, LogRow, Message
from framework.storage.sqlite_schema import OPS, row_crc

OnDamage = Callable[[Damage], None] | None

_RUN = "(SELECT pk FROM {schema}.runs WHERE run_id = %(run_id)s)"
_LOG = (
    "SELECT sequence, record, log, crc FROM {schema}.steps "
    f"WHERE run_pk = {_RUN} AND sequence > %(after)s ORDER BY sequence"
)
_CHECKPOINTS = (
    "SELECT sequence, checkpoint_id, body, crc FROM {schema}.checkpoints "
    f"WHERE run_pk = {_RUN} ORDER BY sequence DESC LIMIT %(limit)s"
)
_CHECKPOINT = (
    "SELECT sequence, checkpoint_id, body, crc FROM {schema}.checkpoints "
    f"WHERE run_pk = {_RUN} AND checkpoint_id = %(checkpoint_id)s ORDER BY sequence DESC LIMIT 1"
)
_CHUNKS = f"""
WITH run AS {_RUN},
base AS (
    SELECT key, max(sequence) AS sequence FROM {{schema}}.chunks
    WHERE run_pk = (SELECT pk FROM run) AND op <> 0 AND sequence <= %(sequence)s GROUP BY key
)
SELECT chunks.sequence, chunks.key, chunks.long_key, chunks.op, chunks.data, chunks.checksum
FROM base JOIN {{schema}}.chunks ON chunks.run_pk = (SELECT pk FROM run) AND chunks.key = base.key
AND chunks.sequence >= base.sequence AND chunks.sequence <= %(sequence)s
"""
"""Each key's last set (or delete) at or before a sequence, and the appends that follow it."""
_JOURNAL = (
    f"SELECT step, long_step, number, record, crc FROM {{schema}}.journal WHERE run_pk = {_RUN} "
    "AND (%(step)s::text IS NULL OR step = %(step)s)"
)
_MESSAGES = f"SELECT name, long_name, body, sent_at, crc FROM {{schema}}.messages WHERE run_pk = {_RUN} ORDER BY pk"
_COUNTS = (
    "SELECT runs.run_id, count(*) FROM {schema}.runs JOIN {schema}.messages ON messages.run_pk = runs.pk "
    "WHERE runs.run_id = ANY (%(run_ids)s::text[]) GROUP BY runs.run_id"
)


def log(database: Database, run_id: str, after: int, on_damage: OnDamage) -> list[LogRow]:
    """See ``Storage.read_log``."""
    good = []
    values = {"run_id": run_id, "after": after}
    for sequence, record, log, crc in database.query(f"read the log of run {run_id!r}", _LOG, values):
        if row_crc(sequence, record, log) == crc:
            good.append(LogRow(sequence, record, log))
        elif on_damage is not None:
            on_damage(Damage(run_id, sequence, f"log row {sequence}", "it does not match its checksum"))
    return good


def checkpoints(database: Database, run_id: str, on_damage: OnDamage, limit: int | None) -> list[CheckpointRow]:
    """See ``Storage.read_checkpoint_rows``."""
    good = []
    values = {"run_id": run_id, "limit": limit}
    for sequence, checkpoint_id, body, crc in database.query(
        f"read the checkpoints of run {run_id!r}", _CHECKPOINTS, values
    ):
        if row_crc(sequence, checkpoint_id, body) == crc:
            good.append(CheckpointRow(sequence, checkpoint_id, body))
        elif on_damage is not None:
            where = f"checkpoint {checkpoint_id}"
            on_damage(Damage(run_id, sequence, where, "its body does not match its checksum"))
    return good


def checkpoint(database: Database, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
    """See ``Storage.find_checkpoint_row``."""
    values = {"run_id": run_id, "checkpoint_id": checkpoint_id}
    rows = database.query(f"read checkpoint {checkpoint_id!r} of run {run_id!r}", _CHECKPOINT, values)
    if not rows:
        return None
    sequence, checkpoint_id, body, crc = rows[0]
    if row_crc(sequence, checkpoint_id, body) != crc:
        raise CorruptData(f"Checkpoint {checkpoint_id!r} of run {run_id!r} does not match its checksum.")
    return CheckpointRow(sequence, checkpoint_id, body)


def placed_chunks(database: Database, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
    """See ``Storage.read_placed_chunks``."""
    values = {"run_id": run_id, "sequence": sequence}
    chunks = []
    for its_sequence, key, long_key, op, data, stored in database.query(
        f"read the state of run {run_id!r}", _CHUNKS, values
    ):
        chunk = checked_chunk(run_id, key, long_key, op, data, stored)
        if chunk.op != "delete":
            chunks.append((its_sequence, chunk))
    return sorted(chunks, key=lambda placed: (placed[1].key, placed[0]))


def checked_chunk(run_id: str, key: str, long_key: str | None, op: int, data: bytes, stored: bytes) -> Chunk:
    """The chunk of a row. Raises ``CorruptData``."""
    name = text_of(key, long_key)
    chunk = Chunk(name, OPS[op], data) if op in range(len(OPS)) else None
    if chunk is None or checksum(chunk) != stored or indexed(name)[0] != key:
        raise CorruptData(f"A chunk of key {name!r} of run {run_id!r} does not match its checksum.")
    return chunk


def journal(database: Database, run_id: str, step: str | None, on_damage: OnDamage) -> list[JournalRow]:
    """See ``Storage.read_journal``."""
    values = {"run_id": run_id, "step": None if step is None else indexed(step)[0]}
    found = []
    for entry, whole, number, record, crc in database.query(f"read the journal of run {run_id!r}", _JOURNAL, values):
        its_step = text_of(entry, whole)
        if row_crc(its_step, number, record) == crc:
            found.append(JournalRow(its_step, number, record))
        elif on_damage is not None:
            where = f"journal row {its_step!r}/{number!r}"
            on_damage(Damage(run_id, None, where, "it does not match its checksum", its_step, number))
    return sorted(found, key=lambda row: (row.step, row.number))


def messages(database: Database, run_id: str, on_damage: OnDamage) -> list[Message]:
    """See ``Storage.read_messages``."""
    found = []
    values = {"run_id": run_id}
    for entry, whole, body, sent_at, crc in database.query(f"read the messages of run {run_id!r}", _MESSAGES, values):
        message = Message(run_id, text_of(entry, whole), body, sent_at)
        if row_crc(message.name, body) == crc:
            found.append(message)
        elif on_damage is not None:
            on_damage(Damage(run_id, None, f"message {message.name!r}", "it does not match its checksum"))
    return found


def count_messages(database: Database, run_ids: Sequence[str]) -> dict[str, int]:
    """See ``Storage.count_messages``."""
    rows = database.query("count messages", _COUNTS, {"run_ids": list(run_ids)})
    return dict(rows)
