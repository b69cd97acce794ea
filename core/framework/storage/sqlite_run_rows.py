"""The rows of one run in an SQLite file: about how much room they take, and their removal slice by slice."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

_SLICE_ROWS = 50
SLICE_BYTES = 4 << 20
"""Rows, and bytes of them, that go in one statement: the clock is looked at between two."""


def _in_index(length: str) -> str:
    """What a row of this length takes in a table without rowid. Its pages are about 85 % full; a longer one goes on in
    pages of its own, of which the last is half empty on average."""
    most = "((:page - 12) * 64 / 255 - 23)"
    return f"(CASE WHEN {length} <= {most} THEN {length} * 1.18 ELSE {length} + :page / 2 END)"


def _in_table(length: str) -> str:
    """What it takes in a table with one: at a page's end there is room for half a row, on average; longer ones fill
    pages."""
    among_others = f"min(:page, {length} * :page / (:page - {length} / 2.0))"
    return f"(CASE WHEN {length} < :page THEN {among_others} ELSE {length} END)"


@dataclass(frozen=True, slots=True)
class _Table:
    """A table with rows of runs, by ``run_pk`` and ``key``. ``large`` is the length of a row's large values, which
    SQLite knows without reading them; ``takes`` is what a row takes in the file, with its entries in indexes."""

    name: str
    key: str
    large: str
    takes: str = ""

    def size(self) -> str:
        takes = self.takes or _in_index(f"({self.large} + 26)")
        return f"(SELECT coalesce(sum({takes}), 0) FROM {self.name} WHERE run_pk = :pk)"

    def lengths(self) -> str:
        return f"SELECT {self.large} FROM {self.name} WHERE run_pk = :pk LIMIT :rows"

    def delete(self) -> str:
        key = f"({self.key})" if "," in self.key else self.key
        first = f"SELECT {self.key} FROM {self.name} WHERE run_pk = :pk LIMIT :rows"
        return f"DELETE FROM {self.name} WHERE run_pk = :pk AND {key} IN ({first})"


_TABLES = (
    _Table(
        "chunks", "pk", "length(data)", _in_table("(length(data) + length(key) + 28)") + " + 1.3 * length(key) + 16"
    ),
    _Table("steps", "sequence", "length(record) + coalesce(length(log), 0)"),
    _Table("checkpoints", "sequence", "length(body)"),
    _Table("journal", "step, number", "length(record)"),
    _Table("messages", "pk", "length(body)", _in_table("(length(body) + length(name) + 36)") + " + 1.3 * length(name)"),
    _Table("pins", "sequence", "length(note)"),
)
_SIZE = (
    f"SELECT {' + '.join(table.size() for table in _TABLES)}"
    f" + (SELECT coalesce(sum({_in_table('(length(body) + 60)')} + 90), 0) FROM documents WHERE run_id = :run_id)"
    f" + (SELECT {_in_table('(length(header) + length(run_id) + 130)')} + 6 * length(run_id) + 240 "
    "FROM runs WHERE pk = :pk)"
)
_PURGE = tuple((table.lengths(), table.delete()) for table in _TABLES)


def size_of(db: sqlite3.Connection, pk: int, run_id: str, page_bytes: int) -> float:
    """About how many bytes of the file a run takes, with its document: within an eighth, by the lengths of its rows.

    It knows nothing of a file's unused room, nor of definitions, which runs share. 0 for a run that is gone.
    """
    found = db.execute(_SIZE, {"pk": pk, "run_id": run_id, "page": page_bytes}).fetchone()[0]
    return float(found or 0)


def purge(db: sqlite3.Connection, pk: int, until: float) -> bool:
    """Remove rows of a run that is gone, until a moment of the monotonic clock; whether none is left."""
    for lengths, delete in _PURGE:
        while sizes := db.execute(lengths, {"pk": pk, "rows": _SLICE_ROWS}).fetchall():
            count = _slice_of([row[0] for row in sizes])
            db.execute(delete, {"pk": pk, "rows": count})
            if time.monotonic() >= until:
                return False
            if count == len(sizes) < _SLICE_ROWS:
                break
    return True


def _slice_of(sizes: Sequence[int]) -> int:
    """How many of the rows with so many bytes go in one statement: at least one. Pure."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > SLICE_BYTES:
            return max(1, count)
    return len(sizes)
