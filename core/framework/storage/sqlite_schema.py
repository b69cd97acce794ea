"""The SQLite file: its tables, its versions and how to reach the newest, its connection and its error texts.

Tables, one row each for: ``runs`` a run and its lease; ``definitions`` a graph or plan by content hash; ``steps`` a
commit, kept for the run's life; ``checkpoints`` a retained checkpoint; ``chunks`` a write to a key of a state;
``documents`` and ``run_nodes`` the runtime's ``Run`` document and its index; ``messages`` what was left for a run;
``journal`` a call of a step that has not committed yet; ``pins`` what retention leaves alone (sequence 0: the run);
``retired`` a run that is gone and whose rows are still to be removed.

Chunks have a rowid, so they are written to the end of their table and fill its pages; only the small index entry goes
between others. Pages of 8 KiB hold chunks of about 1 KB with 7 % waste (4 KiB: 33 %), and a commit, which writes whole
pages, half of what it does with 16 KiB. A store keeps the size that it was made with.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from framework.errors import StorageError, StoreTooNew
from framework.storage.chunks import Op
from framework.storage.records import NewRun

SCHEMA_VERSION = 6
PAGE_BYTES = 8_192

WAL_BYTES = 1_048_576
"""The log is folded into the file, and begun anew, when it has grown to this size.

SQLite's own limit is 1000 pages. A sync of a file that is overwritten costs about half of one of a file that grows
(whose size has to be made durable as well), so a short log is used up to its end soon and written over from then on.
"""
OPS: tuple[Op, ...] = ("append", "set", "delete")
"""Operations by their number in ``chunks.op``."""

RUN_COLUMNS = (
    "pk, run_id, executor_type, goal_id, fingerprint, CAST(header AS BLOB) AS header, state, created_at, updated_at, "
    "error, owner, token, lease_until, recovery_attempts, parent_run_id, wake_at, header_crc, "
    "(SELECT max(steps.sequence) FROM steps WHERE steps.run_pk = runs.pk) AS last"
)
"""What a ``RunRecord`` is made of. In one statement, which sees one moment: a commit changes both the run's row and its
last sequence, and a second query could see it when the first did not."""

SETS_MARK = "\x1f\x1f"
"""Joins the keys in ``steps.sets``; a key that holds it itself is only looked at in vain."""

_VERSION_1 = """
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE runs (
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    executor_type TEXT NOT NULL,
    goal_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    header BLOB NOT NULL,
    header_crc INTEGER NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    error TEXT,
    owner TEXT,
    token INTEGER NOT NULL,
    lease_until REAL NOT NULL,
    recovery_attempts INTEGER NOT NULL,
    parent_run_id TEXT
);
CREATE INDEX runs_by_creation ON runs (created_at, run_id);
CREATE INDEX runs_by_state ON runs (state, created_at, run_id);

CREATE TABLE definitions (
    fingerprint TEXT PRIMARY KEY,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE steps (
    run_pk INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    record BLOB NOT NULL,
    log BLOB,
    crc INTEGER NOT NULL,
    sets TEXT,
    PRIMARY KEY (run_pk, sequence)
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    run_pk INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    checkpoint_id TEXT NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (run_pk, sequence)
) WITHOUT ROWID;

CREATE TABLE chunks (
    pk INTEGER PRIMARY KEY,
    run_pk INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    key TEXT NOT NULL,
    op INTEGER NOT NULL,
    data BLOB NOT NULL,
    checksum BLOB NOT NULL
);
CREATE UNIQUE INDEX chunks_by_key ON chunks (run_pk, key, sequence, op);

CREATE TABLE documents (
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    goal_id TEXT NOT NULL,
    status TEXT NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
);
CREATE INDEX documents_by_goal ON documents (goal_id);
CREATE INDEX documents_by_status ON documents (status);

CREATE TABLE run_nodes (
    node_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    PRIMARY KEY (node_id, run_id)
) WITHOUT ROWID;
CREATE INDEX run_nodes_by_run ON run_nodes (run_id);
"""

_VERSION_2 = """
CREATE TABLE messages (
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    run_pk INTEGER NOT NULL,
    name TEXT NOT NULL,
    body BLOB NOT NULL,
    sent_at REAL NOT NULL,
    crc INTEGER NOT NULL
);
CREATE UNIQUE INDEX messages_by_name ON messages (run_pk, name);
"""

_VERSION_3 = """
CREATE TABLE journal (
    run_pk INTEGER NOT NULL,
    step TEXT NOT NULL,
    number INTEGER NOT NULL,
    record BLOB NOT NULL,
    crc INTEGER NOT NULL,
    PRIMARY KEY (run_pk, step, number)
) WITHOUT ROWID;

ALTER TABLE runs ADD COLUMN wake_at REAL;
CREATE INDEX runs_by_waking ON runs (wake_at, run_id) WHERE wake_at IS NOT NULL;
"""

_VERSION_4 = """
ALTER TABLE runs ADD COLUMN messaged INTEGER NOT NULL DEFAULT 0;
UPDATE runs SET messaged = 1 WHERE pk IN (SELECT run_pk FROM messages);
CREATE INDEX runs_by_message ON runs (run_id) WHERE messaged = 1 AND state = 'paused';

ALTER TABLE checkpoints ADD COLUMN at REAL;
CREATE TABLE pins (
    run_pk INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    note TEXT NOT NULL,
    pinned_at REAL NOT NULL,
    PRIMARY KEY (run_pk, sequence)
) WITHOUT ROWID;
CREATE TABLE retired (run_pk INTEGER PRIMARY KEY);
CREATE INDEX runs_by_change ON runs (state, updated_at, run_id);
CREATE INDEX runs_by_parent ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
CREATE INDEX runs_by_definition ON runs (fingerprint);
"""

_VERSION_5 = ""
"""The same tables. Values in ``chunks`` may be compressed, which a program that knows up to version 4 would take for
damage."""

_VERSION_6 = ""
"""The same tables. The log's records and the checkpoints' bodies may be short (``short_forms.py``)."""

MIGRATIONS: tuple[str, ...] = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4, _VERSION_5, _VERSION_6)
"""The script that leads from each version to the next; version 0 is an empty file."""

READ_CHUNKS = """
WITH run AS (SELECT pk FROM runs WHERE run_id = :run_id),
base AS (
    SELECT key, max(sequence) AS sequence FROM chunks
    WHERE run_pk = (SELECT pk FROM run) AND op <> 0 AND sequence <= :sequence GROUP BY key
)
SELECT chunks.sequence, chunks.key, chunks.op, CAST(chunks.data AS BLOB), chunks.checksum FROM base JOIN chunks
ON chunks.run_pk = (SELECT pk FROM run) AND chunks.key = base.key
AND chunks.sequence >= base.sequence AND chunks.sequence <= :sequence
ORDER BY chunks.key, chunks.sequence
"""
"""Each key's last set (or delete) at or before a sequence, and the appends that follow it."""


def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """A connection with WAL, a full sync at each commit, and rows by name."""
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    try:
        prepare(connection)
        if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
            # Only for a new file: on others this would be a write at each opening, waiting for who else writes.
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Some builds of SQLite overwrite what is removed by default. To write a page and free it took 100 times as long
        # as to free it (25 ms for a value of 5 MB), while everybody waits.
        connection.execute("PRAGMA secure_delete = FAST").fetchall()
        connection.execute("PRAGMA cache_size = -16384")
        page = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.execute(f"PRAGMA wal_autocheckpoint = {max(1, WAL_BYTES // page)}")
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(connection: sqlite3.Connection) -> None:
    """Rows by name, and text that a damaged file holds as something to look at instead of an error."""
    connection.row_factory = sqlite3.Row
    connection.text_factory = _text


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def row_crc(*values: bytes | str | float | None) -> int:
    """A checksum of a row's values that changes with any of them and with where one ends."""
    parts = []
    for value in values:
        data = value if type(value) is bytes else repr(value).encode("utf-8", "surrogatepass")
        parts.append(b"%d:" % len(data))
        parts.append(data)
    return crc32(b"".join(parts))


def log_crc(sequence: int, record: bytes, log: bytes | None) -> int:
    """``row_crc`` of a log row, for the many that a resume reads."""
    if log is None and type(record) is bytes:
        number = b"%d" % sequence
        return crc32(b"4:None", crc32(record, crc32(b"%d:%b%d:" % (len(number), number, len(record)))))
    return row_crc(sequence, record, log)


def version_of(connection: sqlite3.Connection) -> int:
    """The schema version of a file; 0 when it has no tables of ours."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone()
    if found is None:
        return 0
    row = connection.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()
    return 0 if row is None else int(row[0])


def _known_version(connection: sqlite3.Connection, name: str, newest: int) -> int:
    version = version_of(connection)
    if version > newest:
        raise StoreTooNew(
            f"The store {name} has schema version {version}; this library knows up to {newest}. Upgrade surefoot."
        )
    return version


def migrate(connection: sqlite3.Connection, name: str, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    """Bring the file to the newest version, in one transaction. Raises ``StoreTooNew``, ``StorageError``."""
    newest = len(migrations)
    if _known_version(connection, name, newest) == newest:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _known_version(connection, name, newest)  # another process may have been first
        if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StorageError(f"{name} is an SQLite file of something else; give another path.")
        for script in migrations[version:]:
            for statement in script.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('schema_version', ?)", (str(newest),))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def facts_crc(run: NewRun | sqlite3.Row | Mapping[str, Any], created_at: float) -> int:
    """A checksum of what never changes about a run."""
    if isinstance(run, NewRun):
        run_id, kind, goal_id, fingerprint = run.run_id, run.executor_type, run.goal_id, run.fingerprint
        return row_crc(run_id, kind, goal_id, fingerprint, run.parent_run_id, float(created_at), run.header)
    names = ("run_id", "executor_type", "goal_id", "fingerprint", "parent_run_id", "created_at", "header")
    return row_crc(*(run[name] for name in names))
