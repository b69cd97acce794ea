"""Contents of the SQLite file as bytes with their places, read page by page and replaced where they are unchanged."""

from __future__ import annotations

import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from framework.storage.checks import check_id
from framework.storage.chunks import Chunk, checksum
from framework.storage.records import Content, Damage, Place
from framework.storage.sqlite_schema import OPS, facts_crc, row_crc

Report = Callable[[Damage], None]

_PAGE = 100
_PK = "(SELECT pk FROM runs WHERE run_id = :run)"
_STEPS = (
    f"SELECT sequence, CAST(record AS BLOB), CAST(log AS BLOB), crc FROM steps WHERE run_pk = {_PK} "
    "AND sequence > :a ORDER BY sequence LIMIT :page"
)
_CHECKPOINTS = (
    f"SELECT sequence, checkpoint_id, CAST(body AS BLOB), crc FROM checkpoints WHERE run_pk = {_PK} "
    "AND sequence > :a ORDER BY sequence LIMIT :page"
)
_CHUNKS = (
    f"SELECT key, sequence, op, CAST(data AS BLOB), checksum FROM chunks WHERE run_pk = {_PK} "
    "AND (key, sequence, op) > (:a, :b, :c) ORDER BY key, sequence, op LIMIT :page"
)
_JOURNAL = (
    f"SELECT step, number, CAST(record AS BLOB), crc FROM journal WHERE run_pk = {_PK} "
    "AND (step, number) > (:a, :b) ORDER BY step, number LIMIT :page"
)
_MESSAGES = (
    f"SELECT name, CAST(body AS BLOB), sent_at, crc FROM messages WHERE run_pk = {_PK} AND name > :a "
    "ORDER BY name LIMIT :page"
)
_DEFINITIONS = (
    "SELECT fingerprint, CAST(body AS BLOB), crc FROM definitions WHERE fingerprint > :a ORDER BY fingerprint "
    "LIMIT :page"
)


class HasContents:
    """The part of ``SQLiteStorage`` that moves contents as bytes, over its connection."""

    @abstractmethod
    def _guard(self, doing: str) -> AbstractContextManager[sqlite3.Connection]:
        """The connection, held by this thread."""

    @abstractmethod
    def _write(self, doing: str) -> AbstractContextManager[sqlite3.Connection]:
        """One durable transaction."""

    @abstractmethod
    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        """See ``Storage``."""

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        """See ``Storage``."""
        return [chunk for _, chunk in self.read_placed_chunks(run_id, sequence)]

    def read_contents(
        self, run_id: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> Iterator[Content]:
        """See ``Storage``."""
        report = on_damage or _ignore
        if run_id is None:
            for fingerprint, body, crc in self._pages(_DEFINITIONS, "", {}):
                if row_crc(fingerprint, body) == crc:
                    yield Content(Place("definition", "", 0, fingerprint), body)
                else:
                    report(Damage("", None, f"definition {fingerprint}", "it does not match its checksum"))
            return
        check_id(run_id)
        yield from self._run_contents(run_id, report)

    def _run_contents(self, run_id: str, report: Report) -> Iterator[Content]:
        bad = "it does not match its checksum"
        with self._guard("read contents") as db:
            row = db.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            document = db.execute(
                "SELECT CAST(body AS BLOB), crc FROM documents WHERE run_id = ?", (run_id,)
            ).fetchone()
        if document is not None:
            if row_crc(run_id, document[0]) == document[1]:
                yield Content(Place("document", run_id), document[0])
            else:
                report(Damage(run_id, None, f"document of run {run_id}", bad))
        if row is None:
            return
        if facts_crc(row, row["created_at"]) == row["header_crc"] and isinstance(row["header"], bytes):
            yield Content(Place("header", run_id), row["header"])
        else:
            report(Damage(run_id, None, f"run {run_id}", bad))
        if row["error"] is not None:
            yield Content(Place("error", run_id), row["error"].encode("utf-8", "surrogateescape"))
        for sequence, record, log, crc in self._pages(_STEPS, 0, {"run": run_id}):
            if row_crc(sequence, record, log) != crc:
                report(Damage(run_id, sequence, f"log row {sequence}", bad))
                continue
            yield Content(Place("record", run_id, sequence), record)
            if log is not None:
                yield Content(Place("log", run_id, sequence), log)
        for sequence, checkpoint_id, body, crc in self._pages(_CHECKPOINTS, 0, {"run": run_id}):
            if row_crc(sequence, checkpoint_id, body) == crc:
                yield Content(Place("checkpoint", run_id, sequence, checkpoint_id), body)
            else:
                report(Damage(run_id, sequence, f"checkpoint {checkpoint_id}", bad))
        for key, sequence, op, data, stored in self._pages(_CHUNKS, ("", -1, -1), {"run": run_id}):
            chunk = Chunk(key, OPS[op], data) if op in range(len(OPS)) and data is not None else None
            if chunk is not None and checksum(chunk) == stored:
                yield Content(Place("chunk", run_id, sequence, key, chunk.op), data)
            else:
                report(Damage(run_id, sequence, f"chunk of key {key!r}", bad))
        for step, number, record, crc in self._pages(_JOURNAL, ("", -1), {"run": run_id}):
            if row_crc(step, number, record) == crc:
                yield Content(Place("journal", run_id, number, step), record)
            else:
                report(Damage(run_id, None, f"journal row {step!r}/{number!r}", bad))
        for name, body, sent_at, crc in self._pages(_MESSAGES, "", {"run": run_id}):
            if row_crc(name, body, sent_at) == crc:
                yield Content(Place("message", run_id, 0, name), body)
            else:
                report(Damage(run_id, None, f"message {name!r}", bad))

    def _pages(self, query: str, after: Any, values: dict[str, Any]) -> Iterator[Sequence[Any]]:
        """The rows of a query that goes on after the key in its first columns; the store is free between pages."""
        while True:
            key = after if isinstance(after, tuple) else (after,)
            bound = {**dict(zip("abc", key, strict=False)), **values, "page": _PAGE}
            with self._guard("read contents") as db:
                rows = db.execute(query, bound).fetchall()
            yield from rows
            if len(rows) < _PAGE:
                return
            after = tuple(rows[-1])[: len(key)]

    def replace_contents(self, changes: Sequence[tuple[Content, bytes]]) -> int:
        """See ``Storage``."""
        with self._write("replace contents") as db:
            return sum(_replace(db, content, data) for content, data in changes)


def _replace(db: sqlite3.Connection, content: Content, data: bytes) -> bool:
    """Put ``data`` in the place of a content that is as it was read; whether it was."""
    place, old = content.place, content.data
    if place.kind == "definition":
        statement = "UPDATE definitions SET body = ?, crc = ? WHERE fingerprint = ? AND CAST(body AS BLOB) = ?"
        return _did(db, statement, data, row_crc(place.key, data), place.key, old)
    if place.kind == "document":
        statement = "UPDATE documents SET body = ?, crc = ? WHERE run_id = ? AND CAST(body AS BLOB) = ?"
        return _did(db, statement, data, row_crc(place.run_id, data), place.run_id, old)
    run = db.execute("SELECT * FROM runs WHERE run_id = ?", (place.run_id,)).fetchone()
    return run is not None and _replace_in_run(db, run, content, data)


def _replace_in_run(db: sqlite3.Connection, run: sqlite3.Row, content: Content, data: bytes) -> bool:
    place, old, pk, at = content.place, content.data, run["pk"], content.place.sequence
    if place.kind == "header":
        if facts_crc(run, run["created_at"]) != run["header_crc"] or run["header"] != old:
            return False
        crc = facts_crc({**dict(run), "header": data}, run["created_at"])
        return _did(db, "UPDATE runs SET header = ?, header_crc = ? WHERE pk = ?", data, crc, pk)
    if place.kind == "error":
        return _did(db, "UPDATE runs SET error = ? WHERE pk = ? AND error = ?", data.decode(), pk, old.decode())
    if place.kind in ("record", "log"):
        row = db.execute(
            "SELECT CAST(record AS BLOB), CAST(log AS BLOB), crc FROM steps WHERE run_pk = ? AND sequence = ?", (pk, at)
        ).fetchone()
        if row is None or row_crc(at, row[0], row[1]) != row[2] or row[place.kind == "log"] != old:
            return False
        record, log = (data, row[1]) if place.kind == "record" else (row[0], data)
        statement = "UPDATE steps SET record = ?, log = ?, crc = ? WHERE run_pk = ? AND sequence = ?"
        return _did(db, statement, record, log, row_crc(at, record, log), pk, at)
    if place.kind == "checkpoint":
        statement = (
            "UPDATE checkpoints SET body = ?, crc = ? "
            "WHERE run_pk = ? AND sequence = ? AND checkpoint_id = ? AND CAST(body AS BLOB) = ?"
        )
        return _did(db, statement, data, row_crc(at, place.key, data), pk, at, place.key, old)
    if place.kind == "chunk" and place.op in OPS:
        statement = (
            "UPDATE chunks SET data = ?, checksum = ? "
            "WHERE run_pk = ? AND key = ? AND sequence = ? AND op = ? AND CAST(data AS BLOB) = ?"
        )
        op = OPS.index(place.op)
        return _did(db, statement, data, checksum(Chunk(place.key, OPS[op], data)), pk, place.key, at, op, old)
    if place.kind == "journal":
        statement = (
            "UPDATE journal SET record = ?, crc = ? "
            "WHERE run_pk = ? AND step = ? AND number = ? AND CAST(record AS BLOB) = ?"
        )
        return _did(db, statement, data, row_crc(place.key, at, data), pk, place.key, at, old)
    found = db.execute("SELECT sent_at FROM messages WHERE run_pk = ? AND name = ?", (pk, place.key)).fetchone()
    if found is None:
        return False
    statement = "UPDATE messages SET body = ?, crc = ? WHERE run_pk = ? AND name = ? AND CAST(body AS BLOB) = ?"
    return _did(db, statement, data, row_crc(place.key, data, found[0]), pk, place.key, old)


def _did(db: sqlite3.Connection, statement: str, *values: Any) -> bool:
    return db.execute(statement, values).rowcount == 1


def _ignore(damage: Damage) -> None:
    """What nobody asked to hear of."""
