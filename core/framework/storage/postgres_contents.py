"""Contents of a PostgreSQL store as bytes with their places, read page by page and replaced where unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from framework.storage.chunks import Chunk, checksum
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import RECORD, escaped, indexed, text_of, unescaped
from framework.storage.records import Content, Damage, Place
from framework.storage.sqlite_schema import OPS, row_crc

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

Report = Callable[[Damage], None]

_PAGE = 100
_BAD = "it does not match its checksum"
_OF_RUN = "WHERE run_pk = (SELECT pk FROM {schema}.runs WHERE run_id = %(run)s)"
_STEPS = (
    f"SELECT sequence, record, log, crc FROM {{schema}}.steps {_OF_RUN} AND sequence > %(a)s "
    "ORDER BY sequence LIMIT 100"
)
_CHECKPOINTS = (
    f"SELECT sequence, checkpoint_id, body, crc FROM {{schema}}.checkpoints {_OF_RUN} AND sequence > %(a)s "
    "ORDER BY sequence LIMIT 100"
)
_CHUNKS = (
    f"SELECT key, sequence, long_key, op, data, checksum FROM {{schema}}.chunks {_OF_RUN} "
    "AND (key, sequence) > (%(a)s, %(b)s) ORDER BY key, sequence LIMIT 100"
)
_JOURNAL = (
    f"SELECT step, number, long_step, record, crc FROM {{schema}}.journal {_OF_RUN} "
    "AND (step, number) > (%(a)s, %(b)s) ORDER BY step, number LIMIT 100"
)
_MESSAGES = (
    f"SELECT name, long_name, body, crc FROM {{schema}}.messages {_OF_RUN} AND name > %(a)s ORDER BY name LIMIT 100"
)
_DEFINITIONS = (
    "SELECT fingerprint, body, crc, (SELECT max(long_fingerprint) FROM {schema}.runs "
    "WHERE runs.fingerprint = definitions.fingerprint) FROM {schema}.definitions WHERE fingerprint > %(a)s "
    "ORDER BY fingerprint LIMIT 100"
)
_RUN = f"SELECT {RECORD} FROM {{schema}}.runs WHERE run_id = %(run)s"
_DOCUMENT = "SELECT body, crc FROM {schema}.documents WHERE run_id = %(run)s"

_AT = "WHERE run_pk = (SELECT pk FROM {schema}.runs WHERE run_id = %(run)s FOR NO KEY UPDATE)"
_REPLACE = {
    "definition": "UPDATE {schema}.definitions SET body = %(data)b, crc = %(crc)s "
    "WHERE fingerprint = %(key)s AND body = %(old)b",
    "document": "UPDATE {schema}.documents SET body = %(data)b, crc = %(crc)s "
    "WHERE run_id = %(run)s AND body = %(old)b",
    "checkpoint": f"UPDATE {{schema}}.checkpoints SET body = %(data)b, crc = %(crc)s {_AT} "
    "AND sequence = %(at)s AND checkpoint_id = %(name)s AND body = %(old)b",
    "chunk": f"UPDATE {{schema}}.chunks SET data = %(data)b, checksum = %(checksum)b {_AT} "
    "AND key = %(key)s AND sequence = %(at)s AND op = %(op)s AND data = %(old)b",
    "journal": f"UPDATE {{schema}}.journal SET record = %(data)b, crc = %(crc)s {_AT} "
    "AND step = %(key)s AND number = %(at)s AND record = %(old)b",
    "message": f"UPDATE {{schema}}.messages SET body = %(data)b, crc = %(crc)s {_AT} "
    "AND name = %(key)s AND body = %(old)b",
    "error": "UPDATE {schema}.runs SET error = %(text)s WHERE run_id = %(run)s AND error = %(old_text)s",
}
_LOCK_STEP = f"SELECT record, log, crc FROM {{schema}}.steps {_AT} AND sequence = %(at)s FOR NO KEY UPDATE"
_PUT_STEP = f"UPDATE {{schema}}.steps SET record = %(record)b, log = %(log)b, crc = %(crc)s {_AT} AND sequence = %(at)s"
_PUT_HEADER = (
    "UPDATE {schema}.runs SET header = %(data)b, facts_crc = %(crc)s WHERE run_id = %(run)s AND header = %(old)b"
)


def read(database: Database, run_id: str | None, on_damage: Report | None) -> Iterator[Content]:
    """See ``Storage.read_contents``."""
    report = on_damage or _ignore
    if run_id is not None:
        yield from _of_run(database, run_id, report)
        return
    for entry, body, crc, whole in _pages(database, _DEFINITIONS, ("",)):
        fingerprint = text_of(entry, whole)
        if row_crc(fingerprint, body) == crc:
            yield Content(Place("definition", "", 0, fingerprint), body)
        else:
            report(Damage("", None, f"definition {fingerprint}", _BAD))


def _of_run(database: Database, run_id: str, report: Report) -> Iterator[Content]:
    for body, crc in database.query("read contents", _DOCUMENT, {"run": run_id}):
        if row_crc(run_id, body) == crc:
            yield Content(Place("document", run_id), body)
        else:
            report(Damage(run_id, None, f"document of run {run_id}", _BAD))
    rows = database.query("read contents", _RUN, {"run": run_id})
    if not rows:
        return
    facts = _facts(rows[0])
    if row_crc(*facts) == rows[0][6]:
        yield Content(Place("header", run_id), facts[-1])
    else:
        report(Damage(run_id, None, f"run {run_id}", _BAD))
    if rows[0][11] is not None:
        yield Content(Place("error", run_id), unescaped(rows[0][11]).encode())
    for sequence, record, log, crc in _pages(database, _STEPS, (0,), run_id):
        if row_crc(sequence, record, log) != crc:
            report(Damage(run_id, sequence, f"log row {sequence}", _BAD))
            continue
        yield Content(Place("record", run_id, sequence), record)
        if log is not None:
            yield Content(Place("log", run_id, sequence), log)
    for sequence, checkpoint_id, body, crc in _pages(database, _CHECKPOINTS, (0,), run_id):
        if row_crc(sequence, checkpoint_id, body) == crc:
            yield Content(Place("checkpoint", run_id, sequence, checkpoint_id), body)
        else:
            report(Damage(run_id, sequence, f"checkpoint {checkpoint_id}", _BAD))
    for entry, sequence, whole, op, data, stored in _pages(database, _CHUNKS, ("", -1), run_id):
        key = text_of(entry, whole)
        chunk = Chunk(key, OPS[op], data) if op in range(len(OPS)) else None
        if chunk is not None and checksum(chunk) == stored:
            yield Content(Place("chunk", run_id, sequence, key, chunk.op), data)
        else:
            report(Damage(run_id, sequence, f"chunk of key {key!r}", _BAD))
    for entry, number, whole, record, crc in _pages(database, _JOURNAL, ("", -1), run_id):
        step = text_of(entry, whole)
        if row_crc(step, number, record) == crc:
            yield Content(Place("journal", run_id, number, step), record)
        else:
            report(Damage(run_id, None, f"journal row {step!r}/{number!r}", _BAD, step, number))
    for entry, whole, body, crc in _pages(database, _MESSAGES, ("",), run_id):
        name = text_of(entry, whole)
        if row_crc(name, body) == crc:
            yield Content(Place("message", run_id, 0, name), body)
        else:
            report(Damage(run_id, None, f"message {name!r}", _BAD))


def _facts(row: Sequence[Any]) -> tuple[Any, ...]:
    """What the checksum of a run's facts is made of, from a row of ``RECORD``: ``postgres_rows.facts_crc``."""
    return (row[1], unescaped(row[2]), unescaped(row[3]), unescaped(row[4]), row[16], row[5])


def _pages(
    database: Database, statement: str, after: tuple[Any, ...], run_id: str | None = None
) -> Iterator[tuple[Any, ...]]:
    """The rows of a statement that goes on after the key in its first columns; no connection is held in between."""
    while True:
        values = {**dict(zip("ab", after, strict=False)), "run": run_id}
        rows = database.query("read contents", statement, values)
        yield from rows
        if len(rows) < _PAGE:
            return
        after = rows[-1][: len(after)]


def replace(database: Database, changes: Sequence[tuple[Content, bytes]]) -> int:
    """See ``Storage.replace_contents``: all in one transaction."""
    replaced = 0

    def work(connection: Connection, again: bool) -> int:
        nonlocal replaced
        # In the order in which commits lock runs, so that neither waits for the other.
        ordered = sorted(changes, key=lambda change: change[0].place.run_id)
        replaced = sum(_replace(database, connection, content, bytes(data)) for content, data in ordered) or replaced
        return replaced

    return database.transaction("replace contents", work) if changes else 0


def _replace(database: Database, connection: Connection, content: Content, data: bytes) -> bool:
    """Put ``data`` in the place of a content that is as it was read; whether it was."""
    place, old = content.place, content.data
    values: dict[str, Any] = {"run": place.run_id, "at": place.sequence, "data": data, "old": old}
    if place.kind in ("record", "log"):
        row = database.execute(connection, _LOCK_STEP, values).fetchone()
        if row is None or row_crc(place.sequence, row[0], row[1]) != row[2] or row[place.kind == "log"] != old:
            return False
        record, log = (data, row[1]) if place.kind == "record" else (row[0], data)
        values |= {"record": record, "log": log, "crc": row_crc(place.sequence, record, log)}
        return database.execute(connection, _PUT_STEP, values).rowcount == 1
    if place.kind == "header":
        found = database.execute(connection, f"{_RUN} FOR NO KEY UPDATE", values).fetchone()
        if found is None or row_crc(*_facts(found)) != found[6]:
            return False
        values["crc"] = row_crc(*_facts(found)[:-1], data)
        return database.execute(connection, _PUT_HEADER, values).rowcount == 1
    crcs = {
        "definition": (place.key, data),
        "document": (place.run_id, data),
        "checkpoint": (place.sequence, place.key, data),
        "journal": (place.key, place.sequence, data),
        "message": (place.key, data),
    }
    if place.kind in crcs:
        values["crc"] = row_crc(*crcs[place.kind])
    elif place.kind == "error":
        values |= {"text": escaped(data.decode()), "old_text": escaped(old.decode())}
    elif place.op in OPS:
        op = OPS.index(place.op)
        values |= {"op": op, "checksum": checksum(Chunk(place.key, OPS[op], data))}
    else:
        return False
    values |= {"key": indexed(place.key)[0], "name": place.key}
    return database.execute(connection, _REPLACE[place.kind], values).rowcount == 1


def _ignore(damage: Damage) -> None:
    """What nobody asked to hear of."""
