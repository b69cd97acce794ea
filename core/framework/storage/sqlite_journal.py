"""Journal rows in the SQLite file: written in the caller's transaction, one b-tree, one statement for a write."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from framework.storage.records import Damage, JournalRow
from framework.storage.sqlite_schema import row_crc

_PUT = "INSERT OR REPLACE INTO journal (run_pk, step, number, record, crc) VALUES (?, ?, ?, ?, ?)"
_PUT_FENCED = (
    "INSERT OR REPLACE INTO journal (run_pk, step, number, record, crc) SELECT pk, ?, ?, ?, ? FROM runs "
    "WHERE run_id = ? AND token = ? AND owner IS NOT NULL"
)
_PROGRESS = "UPDATE runs SET recovery_attempts = 0 WHERE run_id = ? AND recovery_attempts <> 0"
_READ = (
    "SELECT step, number, CAST(record AS BLOB), crc FROM journal WHERE run_pk = "
    "(SELECT pk FROM runs WHERE run_id = ?) {which}ORDER BY step, number"
)
_READ_ALL, _READ_STEP = _READ.format(which=""), _READ.format(which="AND step = ? ")


def put(db: sqlite3.Connection, run_pk: int, rows: Sequence[JournalRow]) -> None:
    """Write rows, in the place of those with the same step and number."""
    db.executemany(
        _PUT,
        [(run_pk, row.step, row.number, row.record, row_crc(row.step, row.number, row.record)) for row in rows],
    )


def put_fenced(db: sqlite3.Connection, run_id: str, token: int, row: JournalRow) -> bool:
    """Write one row if ``token`` is that of the run's owner, in one statement; whether it was written.

    This is what a call inside a step waits for, so it is spared the query that says why not.
    """
    step, number, record = row.step, row.number, row.record
    crc = row_crc(step, number, record)
    return db.execute(_PUT_FENCED, (step, number, record, crc, run_id, token)).rowcount == 1


def tell_progress(db: sqlite3.Connection, run_id: str) -> None:
    """Set the run's count of recoveries to 0, since it got somewhere."""
    db.execute(_PROGRESS, (run_id,))


def forget(db: sqlite3.Connection, run_pk: int, steps: Sequence[str]) -> None:
    """Remove all rows of these steps."""
    db.executemany("DELETE FROM journal WHERE run_pk = ? AND step = ?", [(run_pk, step) for step in steps])


def read(
    db: sqlite3.Connection, run_id: str, step: str | None, on_damage: Callable[[Damage], None] | None
) -> list[JournalRow]:
    """The rows of a run; see ``Storage.read_journal``."""
    if step is None:
        rows = db.execute(_READ_ALL, (run_id,)).fetchall()
    else:
        rows = db.execute(_READ_STEP, (run_id, step)).fetchall()
    found = []
    for its_step, number, record, crc in rows:
        if row_crc(its_step, number, record) == crc:
            found.append(JournalRow(its_step, number, record))
        elif on_damage is not None:
            where = f"journal row {its_step!r}/{number!r}"
            said = its_step if isinstance(its_step, str) else None, number if isinstance(number, int) else None
            on_damage(Damage(run_id, None, where, "it does not match its checksum", *said))
    return found
