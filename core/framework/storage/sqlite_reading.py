"""Reading definitions, the log, checkpoints and states from the SQLite file; each row against its checksum."""

from __future__ import annotations

import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from framework.errors import CorruptData
from framework.storage import sqlite_schema as schema
from framework.storage.checks import MAX_KEY, check_id
from framework.storage.chunks import Chunk, checked
from framework.storage.records import CheckpointRow, Damage, LogRow
from framework.storage.sqlite_schema import OPS, log_crc, row_crc

_OP_NUMBERS = frozenset(range(len(OPS)))


class ReadsCommits:
    """The part of ``SQLiteStorage`` that reads what commits wrote, over its connection."""

    path: Path

    @abstractmethod
    def _guard(self, doing: str) -> AbstractContextManager[sqlite3.Connection]:
        """The connection, held by this thread."""

    def definition(self, fingerprint: str) -> bytes | None:
        """See ``Storage``."""
        with self._guard("read a definition") as db:
            row = db.execute(
                "SELECT CAST(body AS BLOB) AS body, crc FROM definitions WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
        if row is None:
            return None
        if row_crc(fingerprint, row["body"]) != row["crc"]:
            raise CorruptData(f"The definition {fingerprint} in {self.path} does not match its checksum.")
        body: bytes = row["body"]
        return body

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        """See ``Storage``."""
        with self._guard(f"read the log of run {run_id!r}") as db:
            rows = db.execute(
                "SELECT sequence, CAST(record AS BLOB), CAST(log AS BLOB), crc FROM steps WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) AND sequence > ? ORDER BY sequence",
                (check_id(run_id), after),
            ).fetchall()
        good = []
        for sequence, record, log, crc in rows:
            if log_crc(sequence, record, log) == crc:
                good.append(LogRow(sequence, record, log))
            elif on_damage is not None:
                on_damage(Damage(run_id, sequence, f"log row {sequence}", "it does not match its checksum"))
        return good

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        """See ``Storage``."""
        with self._guard(f"read the checkpoints of run {run_id!r}") as db:
            rows = db.execute(
                "SELECT sequence, checkpoint_id, CAST(body AS BLOB), crc FROM checkpoints WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) ORDER BY sequence DESC LIMIT ?",
                (check_id(run_id), -1 if limit is None else limit),
            ).fetchall()
        for sequence, checkpoint_id, body, crc in rows:
            if row_crc(sequence, checkpoint_id, body) == crc:
                yield CheckpointRow(sequence, checkpoint_id, body)
            elif on_damage is not None:
                where = f"checkpoint {checkpoint_id}"
                on_damage(Damage(run_id, sequence, where, "its body does not match its checksum"))

    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        """See ``Storage``."""
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
        with self._guard(f"read checkpoint {checkpoint_id!r} of run {run_id!r}") as db:
            row = db.execute(
                "SELECT sequence, checkpoint_id, CAST(body AS BLOB) AS body, crc FROM checkpoints WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) AND checkpoint_id = ? ORDER BY sequence DESC LIMIT 1",
                (check_id(run_id), checkpoint_id),
            ).fetchone()
        if row is None:
            return None
        if row_crc(row["sequence"], checkpoint_id, row["body"]) != row["crc"]:
            raise CorruptData(f"Checkpoint {checkpoint_id!r} of run {run_id!r} does not match its checksum.")
        return CheckpointRow(row["sequence"], row["checkpoint_id"], row["body"])

    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        """See ``Storage``."""
        with self._guard(f"read the state of run {run_id!r}") as db:
            rows = db.execute(schema.READ_CHUNKS, {"run_id": check_id(run_id), "sequence": sequence}).fetchall()
        placed: list[tuple[int, Chunk]] = []
        for at, key, op, data, stored in rows:
            chunk = checked(key, OPS[op], data, stored) if op in _OP_NUMBERS and data is not None else None
            if chunk is None:
                raise CorruptData(f"A chunk of key {key!r} of run {run_id!r} does not match its checksum.")
            if chunk.op != "delete":
                placed.append((at, chunk))
        return placed
