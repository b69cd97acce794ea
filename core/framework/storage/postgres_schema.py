"""The schema of a PostgreSQL store: numbered migrations, one at a time, each in a transaction of its own."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import StorageError, StoreTooNew
from framework.storage.postgres_database import Database

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

MIGRATIONS = Path(__file__).with_name("postgres_migrations")
"""``0001.sql`` and so on: the script that leads from each version to the next; version 0 is no tables."""

TABLE = "surefoot_migrations"
MIGRATION_SECONDS = 3_600.0
"""How long a migration may take, in this process or in another one that this one waits for."""

_CHANNEL_BYTES = 63
_HAS_TABLE = (
    "SELECT 1 FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = %s AND relname = %s"
)


def scripts(folder: Path = MIGRATIONS) -> list[str]:
    """The migrations in order, as they are written."""
    files = sorted(folder.glob("*.sql"))
    expected = [f"{number:04}.sql" for number in range(1, len(files) + 1)]
    if not files or [file.name for file in files] != expected:
        raise StorageError(f"The migrations in {folder} are not 0001.sql, 0002.sql and so on; install surefoot anew.")
    return [file.read_text(encoding="utf-8") for file in files]


def channel_of(schema: str) -> str:
    """The name under which workers on a schema of a database are told of work."""
    name = f"surefoot_{schema}"
    if len(name.encode()) <= _CHANNEL_BYTES and "'" not in name:
        return name
    return f"surefoot_{blake2b(schema.encode(), digest_size=16).hexdigest()}"


def lock_of(*names: str) -> int:
    """A number for an advisory lock on what is named."""
    digest = blake2b("\x00".join(names).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def migrate(database: Database, migrations: list[str] | None = None) -> int:
    """Bring the store to the newest version, and give that. Of any number of processes one does, the others wait.

    Raises ``StoreTooNew``, ``StorageError``.
    """
    steps = scripts() if migrations is None else migrations
    while database.run("open it", lambda connection, _: version_of(database, connection, len(steps))) < len(steps):
        database.transaction(
            "migrate it", lambda connection, _: _next(database, connection, steps), seconds=MIGRATION_SECONDS
        )
    return len(steps)


def version_of(database: Database, connection: Connection, newest: int) -> int:
    """The version of the store, 0 for none. Raises ``StoreTooNew`` when it is above ``newest``."""
    schema = database.address.schema
    # Not to_regclass: within a transaction it does not see what another one has made meanwhile.
    if connection.execute(_HAS_TABLE, [schema, TABLE]).fetchone() is None:
        return 0
    row = database.execute(connection, f"SELECT coalesce(max(version), 0) FROM {{schema}}.{TABLE}").fetchone()
    version: int = 0 if row is None else row[0]
    if version > newest:
        raise StoreTooNew(
            f"The store {database.where} has schema version {version}; this library knows up to {newest}. "
            "Upgrade surefoot."
        )
    return version


def _next(database: Database, connection: Connection, steps: list[str]) -> None:
    """Make one step, if another process has not made it meanwhile."""
    schema = database.address.schema
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [lock_of("migrate", schema)])
    version = version_of(database, connection, len(steps))
    if version == len(steps):
        return
    if version == 0:
        _prepare(database, connection)
    # Without values this may be many statements.
    connection.execute(database.text(steps[version]).encode(), prepare=False)
    database.execute(
        connection, f"INSERT INTO {{schema}}.{TABLE} (version) VALUES (%(version)s)", {"version": version + 1}
    )


def _prepare(database: Database, connection: Connection) -> None:
    """Make the schema and the table of migrations. Raises ``StorageError`` when there are tables of somebody else."""
    schema = database.address.schema
    # CREATE SCHEMA IF NOT EXISTS asks for a right even when there is nothing to do.
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [schema]).fetchone() is None:
        database.execute(connection, "CREATE SCHEMA {schema}")
    taken = connection.execute(
        "SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
        "WHERE nspname = %s AND relname IN ('runs', 'steps', 'chunks', 'checkpoints') ORDER BY relname",
        [schema],
    ).fetchall()
    if taken:
        names = ", ".join(row[0] for row in taken)
        raise StorageError(
            f"Store {database.where}: the schema {schema!r} has tables of something else ({names}). "
            "Give the store a schema of its own: ?schema=surefoot."
        )
    database.execute(
        connection,
        f"CREATE TABLE {{schema}}.{TABLE} "
        "(version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())",
    )
