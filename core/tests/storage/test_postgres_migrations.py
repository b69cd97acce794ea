"""Stores of every released version open with their data: PostgreSQL's, and SQLite's from files that never change."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest

from framework.errors import StorageError, StoreTooNew
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.stored_run import read_stored
from framework.runtime.core import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage import postgres_schema as schema
from framework.storage.backend import Storage
from framework.storage.chunks import Chunk
from framework.storage.contract import accept, commit, new_run, state_at
from framework.storage.postgres import PostgresStorage
from framework.storage.records import NO_TOKEN, JournalRow, JournalWrite
from framework.storage.sqlite import SQLiteStorage
from framework.storage.sqlite_schema import MIGRATIONS, row_crc
from tests.postgres_server import PostgresServer

FROZEN = Path(__file__).with_name("frozen")
NEXT = [
    "ALTER TABLE {schema}.runs ADD COLUMN tenant text NOT NULL DEFAULT 'nobody'; "
    "CREATE TABLE {schema}.tenants (name text)",
    "INSERT INTO {schema}.tenants SELECT DISTINCT tenant FROM {schema}.runs",
]


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


def name_of(url: str) -> str:
    return url.rpartition("schema=")[2]


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run statements on the database of a store's URL, with its schema for ``{schema}``; the rows."""
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        cursor = connection.execute(statement.replace("{schema}", name_of(url)).encode())
        return cursor.fetchall() if cursor.description else []


def version(url: str) -> int:
    found: int = sql(url, "SELECT max(version) FROM {schema}.surefoot_migrations")[0][0]
    return found


def thaw(url: str, number: int) -> None:
    """Make the store that a frozen file holds."""
    text = (FROZEN / f"postgres_{number}.sql").read_text(encoding="utf-8")
    sql(url, text.replace("{schema}", f'"{name_of(url)}"').replace("{channel}", schema.channel_of(name_of(url))))


def shape(url: str) -> list[tuple[Any, ...]]:
    """Columns, indexes and functions of a store's schema."""
    columns = (
        "SELECT table_name::text, column_name::text, data_type::text, column_default::text, is_nullable::text "
        "FROM information_schema.columns WHERE table_schema = '{schema}'"
    )
    others = (
        "SELECT tablename, indexname, indexdef, NULL, NULL FROM pg_indexes WHERE schemaname = '{schema}' UNION ALL "
        "SELECT proname, prosrc, pg_get_function_arguments(oid), proconfig::text, NULL FROM pg_proc "
        "WHERE pronamespace = '{schema}'::regnamespace"
    )
    rows = sql(url, f"{columns} UNION ALL {others}")
    return sorted(tuple(str(value).replace('"', "").replace(name_of(url), "") for value in row) for row in rows)


def check_and_go_on(store: Storage, messages: bool, journal: bool) -> None:
    """The run that every frozen store holds is there, and goes on."""
    record = store.find_run("run_1")
    assert record is not None
    assert (record.state, record.sequence, record.token, record.wake_at) == (RunState.PAUSED, 2, 1, None)
    assert state_at(store, 1) == {"input": b"[1]", "list": b"[1]"}
    assert state_at(store, 0) == {"input": b"[1]", "gone": b'"x"'}
    assert [chunk.data for chunk in store.read_chunks("run_1", 2)] == [b"[1]", b"[1]", b"2"]
    assert [row.log for row in store.read_log("run_1")] == [b'["decided"]', None]
    assert store.get_runs_by_node("n1") == ["run_1"]
    assert [message.body for message in store.read_messages("run_1")] == ([b"yes"] if messages else [])
    assert store.read_journal("run_1") == ([JournalRow("s", 1, b"j")] if journal else [])
    assert store.verify().ok, store.verify().damage
    store.send("run_1", "another", b"no")
    accept(store, JournalWrite("run_1", NO_TOKEN, [JournalRow("t", 1, b"k")]))
    claimed = store.claim_run("run_1", "me", 600)
    accept(store, commit(3, token=claimed.token, chunks=[Chunk("list", "set", b"[]")], journal_done=["t"]))
    assert state_at(store, 3) == {"input": b"[1]", "list": b"[]"}
    assert store.fork_run("run_1", 2, b"{}", commit(3, "fork", state=RunState.PAUSED)).sequence == 3
    assert store.verify().ok


# --- PostgreSQL -----------------------------------------------------------------------------------------------------

RELEASED = sorted(int(path.stem.rpartition("_")[2]) for path in FROZEN.glob("postgres_*.sql"))


def test_every_version_is_frozen() -> None:
    assert len(schema.scripts()) == len(RELEASED) == RELEASED[-1]


@pytest.mark.parametrize("number", RELEASED)
def test_every_older_version_is_migrated_when_it_is_opened(number: int, postgres_url: str) -> None:
    thaw(postgres_url, number)
    assert version(postgres_url) == number
    with PostgresStorage(postgres_url) as store:
        assert version(postgres_url) == len(schema.scripts())
        assert [(pin.sequence, pin.checkpoint_id, pin.note) for pin in store.list_pins()] == [(1, "ckpt_1", "evidence")]
        check_and_go_on(store, messages=True, journal=True)
    fresh = postgres_url.replace("schema=", "schema=fresh_")[: -len("fresh_")]
    PostgresStorage(fresh).close()
    assert shape(postgres_url) == shape(fresh)


def test_a_released_migration_never_changes() -> None:
    """A store in the field has run it as it was."""
    for number, script in enumerate(schema.scripts()[: len(RELEASED)], 1):
        assert script.strip() in (FROZEN / f"postgres_{number}.sql").read_text(encoding="utf-8")


def offered(url: str) -> tuple[set[tuple[Any, ...]], set[tuple[Any, ...]]]:
    """What programs call by name: columns with their types, and functions with their arguments and results."""
    columns = (
        "SELECT table_name::text, column_name::text, data_type::text FROM information_schema.columns "
        "WHERE table_schema = '{schema}'"
    )
    functions = (
        "SELECT proname::text, pg_get_function_identity_arguments(oid), pg_get_function_result(oid) FROM pg_proc "
        "WHERE pronamespace = '{schema}'::regnamespace"
    )
    return set(sql(url, columns)), set(sql(url, functions))


@pytest.mark.parametrize("number", RELEASED)
def test_programs_of_every_older_version_find_what_they_call(number: int, postgres_url: str) -> None:
    """They have the store open while a newer program migrates it."""
    thaw(postgres_url, number)
    columns, functions = offered(postgres_url)
    PostgresStorage(postgres_url).close()
    columns_now, functions_now = offered(postgres_url)
    assert columns <= columns_now
    assert functions <= functions_now
    must = (
        "SELECT table_name::text, column_name::text, data_type::text FROM information_schema.columns WHERE "
        "table_schema = '{schema}' AND is_nullable = 'NO' AND column_default IS NULL AND is_identity = 'NO'"
    )
    assert {row for row in sql(postgres_url, must) if row in columns_now - columns} == set(), "they leave these out"


JOURNAL_1 = (
    "SELECT what FROM {schema}.write_journal(%(run_id)s, %(token)s, %(now)s, %(steps)s::text[], "
    "%(long_steps)s::text[], %(numbers)b::bigint[], %(records)b::bytea[], %(crcs)b::bigint[], %(again)s)"
)
"""How programs of schema version 1 write to the journal."""
JOURNAL_2 = (
    "write_journal(text, bigint, double precision, text[], text[], bigint[], bytea[], bigint[], boolean, boolean)"
)
"""How this version's is told from the others."""


@pytest.mark.parametrize("claim", [True, False])
def test_a_program_of_version_1_goes_on_writing_the_journal(claim: bool, postgres_url: str) -> None:
    """By a statement that its server had prepared before the store was migrated."""
    thaw(postgres_url, 1)
    with psycopg.connect(postgres_url.partition("?")[0], autocommit=True, prepare_threshold=0) as old:

        def write(number: int, record: bytes, token: int) -> str:
            values: dict[str, Any] = {
                "run_id": "run_1",
                "token": token,
                "now": None,
                "steps": ["s"],
                "long_steps": [None],
                "numbers": [number],
                "records": [record],
                "crcs": [row_crc("s", number, record)],
                "again": False,
            }
            statement = JOURNAL_1.replace("{schema}", f'"{name_of(postgres_url)}"').encode()
            row = old.execute(statement, values, binary=True).fetchone()
            assert row is not None
            return str(row[0])

        assert write(1, b"before", NO_TOKEN) == "done"
        with PostgresStorage(postgres_url) as store:
            token = store.claim_run("run_1", "me", 600).token if claim else NO_TOKEN
            assert write(1, b"after", token) == "done"
            assert write(2, b"more", token) == "done"
            if claim:
                assert write(3, b"stale", token - 1) == "lost"
                assert write(3, b"taken", NO_TOKEN) == "busy"
            assert store.read_journal("run_1") == [JournalRow("s", 1, b"after"), JournalRow("s", 2, b"more")]
            assert store.verify().ok


def test_a_statement_that_a_newer_store_does_not_know_says_so(postgres_url: str) -> None:
    """Should a later version drop what this one calls, an open store says what to do about it."""
    with PostgresStorage(postgres_url) as store:
        store.open_run(new_run())
        write = JournalWrite("run_1", NO_TOKEN, [JournalRow("s", 1, b"j")])
        sql(postgres_url, f"ALTER FUNCTION {{schema}}.{JOURNAL_2} RENAME TO old")
        with pytest.raises(StorageError, match=r"write_journal.* does not exist.*restore it from a backup") as gone:
            store.commit([write])
        assert not isinstance(gone.value, StoreTooNew)
        sql(postgres_url, "INSERT INTO {schema}.surefoot_migrations (version) VALUES (99)")
        with pytest.raises(StoreTooNew, match=r"schema version 99.*up to \d+.*Upgrade surefoot"):
            store.commit([write])
        with pytest.raises(StoreTooNew):
            store.commit([write, JournalWrite("run_1", NO_TOKEN, [JournalRow("t", 1, b"j")])])
        sql(postgres_url, "ALTER TABLE {schema}.runs RENAME COLUMN header TO head")
        with pytest.raises(StoreTooNew):
            store.find_run("run_1")
        sql(postgres_url, "DROP TABLE {schema}.surefoot_migrations")
        with pytest.raises(StorageError, match="does not exist"):
            store.find_run("run_1")


@pytest.mark.parametrize("start", [0, 1, 2])
def test_any_version_reaches_the_newest(start: int, postgres_url: str) -> None:
    steps = [*schema.scripts(), *NEXT]
    with PostgresStorage(postgres_url) as store:
        store.open_run(new_run())
        newest = len(schema.scripts())
        if start:
            schema.migrate(store._database, steps[: newest + start])
        assert version(postgres_url) == newest + start
        schema.migrate(store._database, steps)
        schema.migrate(store._database, steps)  # nothing left to do
    assert version(postgres_url) == newest + 2
    assert sql(postgres_url, "SELECT run_id, tenant FROM {schema}.runs") == [("run_1", "nobody")]
    assert sql(postgres_url, "SELECT name FROM {schema}.tenants") == [("nobody",)]
    assert [row[0] for row in sql(postgres_url, "SELECT version FROM {schema}.surefoot_migrations ORDER BY 1")] == list(
        range(1, newest + 3)
    )


def test_a_migration_that_fails_leaves_the_version_before(postgres_url: str) -> None:
    with PostgresStorage(postgres_url) as store:
        newest = version(postgres_url)
        steps = [*schema.scripts(), NEXT[0], "CREATE TABLE {schema}.half (x int); SELECT 1 / 0"]
        with pytest.raises(StorageError, match="cannot migrate it.*division by zero"):
            schema.migrate(store._database, steps)
        assert version(postgres_url) == newest + 1
        assert sql(postgres_url, "SELECT to_regclass('{schema}.half')") == [(None,)]


def test_a_newer_store_is_refused(postgres_url: str) -> None:
    PostgresStorage(postgres_url).close()
    sql(postgres_url, "INSERT INTO {schema}.surefoot_migrations (version) VALUES (99)")
    with pytest.raises(StoreTooNew, match=r"schema version 99.*up to \d+.*Upgrade surefoot"):
        PostgresStorage(postgres_url)


def test_tables_of_something_else_are_left_alone(postgres_url: str) -> None:
    sql(postgres_url, "CREATE SCHEMA {schema}; CREATE TABLE {schema}.runs (theirs int)")
    with pytest.raises(StorageError, match=r"tables of something else \(runs\).*\?schema="):
        PostgresStorage(postgres_url)
    assert sql(postgres_url, "SELECT * FROM {schema}.runs") == []
    sql(postgres_url, "DROP TABLE {schema}.runs; CREATE TABLE {schema}.other (theirs int)")
    PostgresStorage(postgres_url).close()  # beside them is room


def test_while_one_migrates_others_wait(postgres: PostgresServer, postgres_url: str) -> None:
    with psycopg.connect(postgres_url.partition("?")[0]) as other, ThreadPoolExecutor(2) as pool:
        key = schema.lock_of("migrate", name_of(postgres_url))
        other.execute("SELECT pg_advisory_xact_lock(%s)", [key])
        opening = [pool.submit(PostgresStorage, postgres_url) for _ in range(2)]
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while postgres.execute(waiting) != [(2,)]:
            assert not any(one.done() for one in opening)
        other.rollback()
        for one in opening:
            one.result().close()
    assert version(postgres_url) == len(schema.scripts())


def test_processes_that_open_a_new_store_at_once(postgres_url: str, python: Python) -> None:
    program = """
        import sys
        from framework.storage.backend import open_storage
        from framework.storage.contract import new_run
        with open_storage(sys.argv[1]) as store:
            store.open_run(new_run(sys.argv[2]))
    """
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: python(program, postgres_url, name), "abcd"))
    assert sorted(sql(postgres_url, "SELECT run_id FROM {schema}.runs")) == [("a",), ("b",), ("c",), ("d",)]
    assert sql(postgres_url, "SELECT version FROM {schema}.surefoot_migrations") == [
        (number,) for number in range(1, len(schema.scripts()) + 1)
    ]


def test_migrations_without_gaps(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="install surefoot anew"):
        schema.scripts(tmp_path)
    (tmp_path / "0002.sql").write_text("")
    with pytest.raises(StorageError, match="install surefoot anew"):
        schema.scripts(tmp_path)


@pytest.mark.parametrize("name", ["a", "x" * 63, "ü" * 31])
def test_channels_are_names(name: str) -> None:
    assert len(schema.channel_of(name).encode()) <= 63
    assert schema.channel_of(name) != schema.channel_of(name[:-1] + "y")


# --- SQLite ---------------------------------------------------------------------------------------------------------


SQLITE = sorted(int(path.stem.rpartition("_")[2]) for path in FROZEN.glob("sqlite_*.sql"))


def thawed(path: Path, number: int) -> Path:
    """Make the SQLite store that a frozen file holds."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((FROZEN / f"sqlite_{number}.sql").read_text(encoding="utf-8"))
    return path


def test_every_version_of_sqlite_is_frozen() -> None:
    assert list(range(1, len(MIGRATIONS) + 1)) == SQLITE


@pytest.mark.parametrize("number", SQLITE)
def test_every_older_sqlite_file_is_migrated_when_it_is_opened(number: int, tmp_path: Path) -> None:
    with SQLiteStorage(thawed(tmp_path / "runs.db", number)) as store:
        check_and_go_on(store, messages=number >= 2, journal=number >= 3)


class Counting:
    """Appends the number of its visit."""

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        number = (ctx.memory.read("n") or 0) + 1
        return NodeResult(True, output={"n": number, "seen": [*(ctx.memory.read("seen") or []), number]})


def counting(until: int) -> GraphSpec:
    """The graph of the run that the files from version 5 on hold, which stopped at its limit of three steps."""
    again = EdgeSpec(
        id="again",
        source="work",
        target="work",
        condition=EdgeCondition.CONDITIONAL,
        condition_expr="n < 5",
        input_mapping={"n": "n"},
    )
    return GraphSpec(
        id="bench", goal_id="bench", entry_node="work", max_steps=until, nodes=[NodeSpec(id="work")], edges=[again]
    )


@pytest.mark.parametrize("number", [number for number in SQLITE if number >= 5])
async def test_a_run_of_an_older_version_is_read_forked_and_goes_on(number: int, tmp_path: Path) -> None:
    """Its rows of then and those added now are in different forms, of the log as well as of the checkpoints."""
    with SQLiteStorage(thawed(tmp_path / "runs.db", number)) as store:
        manager = CheckpointManager(store, CheckpointConfig(retention_strategy="all"))
        first = store.load_checkpoint("counting", store.list_checkpoints("counting")[0].id)
        assert first is not None
        assert (first.step_number, first.next_node_id, first.memory_snapshot["seen"]) == (1, "work", [0, 1])
        assert first.position["inputs"] == {"work#2": {"branch": "", "same": ["n", "seen"]}}
        forked = manager.fork("counting", 2, new_run_id="forked")
        for run_id, kept in (("counting", 3), (forked, 2)):
            executor = GraphExecutor(
                Runtime(tmp_path / "runs"), node_registry={"work": Counting()}, checkpoint_manager=manager
            )
            goal = Goal(id="bench", name="bench", description="measure")
            result = await executor.execute(counting(5), goal, {"seen": [0]}, run_id=run_id)
            assert (result.success, result.output["seen"]) == (True, [0, 1, 2, 3, 4, 5]), result.error
            assert (result.steps_recovered, result.path) == (kept, ["work"] * 5)
            found = read_stored(store, run_id)
            assert [each["visit"] for each in found.records if each["kind"] == "step"] == [1, 2, 3, 4, 5]
            assert found.damage == ()
        assert store.verify().ok
    with closing(sqlite3.connect(tmp_path / "runs.db")) as connection:
        rows = connection.execute("SELECT record FROM steps WHERE run_pk = 2 ORDER BY sequence").fetchall()
    steps = [row[0][:2] for row in rows if b"work" in row[0]]
    assert steps[:3] == [b"[{" if number == 5 else b'["'] * 3, "what was written then is left as it was"
    assert b'["' in steps[3:]
