"""What is SQLite's own: its settings, one sync a commit, its schema's versions, its size, other connections."""

from __future__ import annotations

import re
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import pytest

from framework.errors import CorruptData, StorageError, StoreTooNew
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage import sqlite_schema as schema
from framework.storage.chunks import Chunk, diff
from framework.storage.contract import Writer, accept, commit, journal, new_run, state_at
from framework.storage.memory import MemoryStorage
from framework.storage.records import Retention, RunRecord
from framework.storage.sqlite import SQLiteStorage


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


def commits_in_wal(path: Path) -> int:
    """Transactions in the write-ahead log: frames whose header says how large the file is after them.

    Each is one sync with ``synchronous=FULL`` (sqlite.org/fileformat2.html, 4.1).
    """
    data = Path(f"{path}-wal").read_bytes()
    page, salt = struct.unpack_from(">I4xQ", data, 8)
    frames = range(32, len(data) - page, 24 + page)
    headers = [struct.unpack_from(">IIQ", data, start) for start in frames]
    return sum(1 for _, size, its_salt in headers if its_salt == salt and size)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def test_every_commit_is_synced(path: Path) -> None:
    with SQLiteStorage(path) as store:
        settings = {name: store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    assert settings == {"journal_mode": "wal", "synchronous": 2}


def test_a_commit_is_one_transaction(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(state={"a": 1, "b": []}), "me", 60)
        accept(store, commit(1, token=1, chunks=[Chunk("a", "set", b"2")]))
        before = commits_in_wal(path)
        accept(
            store,
            commit(
                2,
                token=1,
                log=b"[]",
                chunks=[Chunk("a", "set", b"3"), Chunk("b", "append", b"1"), Chunk("c", "delete", b"")],
                state=RunState.COMPLETED,
                release=True,
                retention=Retention(1),
                replaces=1,
            ),
        )
        assert commits_in_wal(path) == before + 1


def test_a_batch_is_one_transaction(path: Path) -> None:
    with SQLiteStorage(path) as store:
        for number in range(20):
            store.open_run(new_run(f"run_{number}"))
        before = commits_in_wal(path)
        accept(store, *(commit(1, f"run_{number}") for number in range(20)))
        assert commits_in_wal(path) == before + 1


@pytest.mark.parametrize("rows", [1, 30])
def test_journal_rows_are_one_transaction_and_share_one(path: Path, rows: int) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        before = commits_in_wal(path)
        accept(store, journal(*(("s", number, b"x" * 300) for number in range(rows)), token=1))
        assert commits_in_wal(path) == before + 1
        writes = [journal(("s", number, b"y"), token=1) for number in range(rows)]
        accept(store, *writes, commit(1, token=1), *writes)
        assert commits_in_wal(path) == before + 2
        assert len(store.read_journal("run_1")) == rows


def test_a_refused_journal_write_writes_nothing(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        before = commits_in_wal(path)
        for rows in (1, 2):
            outcome = store.commit([journal(*(("s", number, b"") for number in range(rows)), token=2)])[0]
            assert outcome is not None
        assert commits_in_wal(path) == before


def test_an_error_of_one_write_undoes_only_it(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        store._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)  # what no check of ours foresees
        large = b"x" * 20_000
        outcomes = store.commit(
            [
                journal(("s", 1, b"1"), token=1),
                journal(("s", 2, large), token=1),
                journal(("s", 3, b"3"), ("s", 4, large), token=1),
                commit(1, token=1, chunks=[Chunk("a", "set", b"1"), Chunk("b", "set", large)]),
                journal(("s", 5, b"5"), token=1),
            ]
        )
        assert [outcome is None for outcome in outcomes] == [True, False, False, False, True]
        assert all("MAX_VALUE_BYTES" in str(outcome) for outcome in outcomes if outcome is not None)
        assert [row.number for row in store.read_journal("run_1")] == [1, 5]
        assert store.read_log("run_1") == []


def test_no_statement_numbers_its_values() -> None:
    """``?1`` is a name to Python: with a sequence it warns from 3.12 on, and is refused from 3.14 on."""
    sources = sorted(Path(schema.__file__).parent.glob("*.py"))
    numbered = {path.name for path in sources if re.search(r"\?[0-9]", path.read_text(encoding="utf-8"))}
    assert (len(sources) > 50, numbered) == (True, set())


def test_asking_what_is_due_reads_an_index(path: Path) -> None:
    with SQLiteStorage(path) as store:
        asked: list[str] = []
        store._db.set_trace_callback(asked.append)
        assert store.list_due() == []
        store._db.set_trace_callback(None)
        [query] = [statement for statement in asked if "FROM runs" in statement]
        plan = store._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert plan[0]["detail"] == "SEARCH runs USING INDEX runs_by_waking ((wake_at,run_id)>(?,?) AND wake_at<?)"
        assert not any("SCAN" in row["detail"] for row in plan)


def test_a_journal_does_not_pile_up(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        for sequence in range(1, 60):
            accept(store, journal(*((f"s{sequence}", number, b"x" * 5_000) for number in range(10)), token=1))
            accept(store, commit(sequence, token=1, journal_done=[f"s{sequence}"]))
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size < 1_000_000


def test_a_refused_commit_writes_nothing(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        before = commits_in_wal(path)
        assert store.commit([commit(7, token=1)])[0] is not None
        assert commits_in_wal(path) == before


@pytest.mark.parametrize("keep", [None, 1, 50])
def test_size_follows_what_was_said(path: Path, keep: int | None) -> None:
    messages: list[str] = []
    with SQLiteStorage(path) as store:
        store.open_run(new_run(), "me", 60)
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        empty = path.stat().st_size
        old: dict[str, bytes] = {}
        for sequence in range(1, 401):
            messages.append(f"{sequence:04}" + "m" * 1_017)
            new = {"messages": codec.encode(messages)}
            chunks, old = diff(old, new), new
            accept(store, commit(sequence, token=1, chunks=chunks, retention=Retention(keep)))
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size - empty < 1.35 * 400 * 1_024
        assert state_at(store, 400) == old


def test_a_replaced_value_does_not_pile_up(path: Path) -> None:
    with SQLiteStorage(path) as store:
        writer = Writer(store)
        for sequence in range(1, 60):
            writer.write({"big": "x" * 50_000 + str(sequence)}, checkpoint_id="same", replaces=sequence - 1)
        writer.check(store, [59], "after saving one id again and again")
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size < 1_000_000


# --- files of other versions and of others --------------------------------------------------------------------------


def test_the_schema_version_is_recorded(path: Path) -> None:
    SQLiteStorage(path).close()
    with closing(sqlite3.connect(path)) as other:
        assert schema.version_of(other) == schema.SCHEMA_VERSION == len(schema.MIGRATIONS)


def test_a_newer_store_is_refused_and_left_alone(path: Path) -> None:
    with SQLiteStorage(path) as store:
        store.open_run(new_run())
        store._db.execute("UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match=rf"schema version 99.*up to {schema.SCHEMA_VERSION}\..*Upgrade"):
        SQLiteStorage(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database, but some text " * 99, b"SQLite format 3\x00" + b"\xff" * 4_000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"runs\.db.*(damaged|restore)"):
        SQLiteStorage(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StorageError, match="something else"):
        SQLiteStorage(path)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with SQLiteStorage(path) as store:
        store.open_run(new_run())


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Check that the path"):
        SQLiteStorage(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(path: Path) -> None:
    path.touch()
    with pytest.raises(StorageError, match="Check that the path"):
        SQLiteStorage(path / "below" / "runs.db")


def test_memory_is_another_class() -> None:
    with pytest.raises(StorageError, match="MemoryStorage"):
        SQLiteStorage(":memory:")


NEXT = """
ALTER TABLE runs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'nobody';
CREATE TABLE tenants (name TEXT PRIMARY KEY);
"""


def test_an_older_store_is_migrated_with_its_data(path: Path) -> None:
    with SQLiteStorage(path) as store:
        writer = Writer(store, state={"a": [1]})
        writer.write({"a": [1, 2]})
    with closing(schema.connect(path, 5)) as connection:
        schema.migrate(connection, str(path), (*schema.MIGRATIONS, NEXT))
        assert schema.version_of(connection) == schema.SCHEMA_VERSION + 1
        assert [tuple(row) for row in connection.execute("SELECT run_id, tenant FROM runs")] == [("run_1", "nobody")]
        schema.migrate(connection, str(path), (*schema.MIGRATIONS, NEXT))  # nothing left to do
        connection.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(schema.SCHEMA_VERSION),))
    with SQLiteStorage(path) as store:
        writer.check(store, [1], "after the migration, read by the older code")


@pytest.mark.parametrize("version", range(1, schema.SCHEMA_VERSION))
def test_a_store_of_an_older_version_is_migrated_when_it_is_opened(path: Path, version: int) -> None:
    with closing(schema.connect(path, 5)) as connection:
        schema.migrate(connection, str(path), schema.MIGRATIONS[:version])
        assert schema.version_of(connection) == version
        connection.execute("INSERT INTO definitions VALUES ('f1', ?, ?)", (b"{}", schema.row_crc("f1", b"{}")))
        facts = ("run_1", "graph", "goal", "f1", None, 5.0, b"{}")
        connection.execute(
            "INSERT INTO runs (run_id, executor_type, goal_id, fingerprint, header, header_crc, state, created_at, "
            "updated_at, token, lease_until, recovery_attempts) "
            "VALUES ('run_1', 'graph', 'goal', 'f1', ?, ?, 'paused', 5.0, 6.0, 3, 0, 0)",
            (b"{}", schema.row_crc(*facts)),
        )
    before = commits_in_wal(path) if Path(f"{path}-wal").exists() else 0
    with SQLiteStorage(path) as store:
        assert commits_in_wal(path) - before <= 1
        assert schema.version_of(store._db) == schema.SCHEMA_VERSION
        record = store.find_run("run_1")
        assert record is not None
        assert (record.token, record.created_at, record.header, record.wake_at) == (3, 5.0, b"{}", None)
        assert (store.read_messages("run_1"), store.read_journal("run_1"), store.list_due()) == ([], [], [])
        assert store.list_messaged() == []
        store.send("run_1", "answer", b"42")
        assert [message.body for message in store.read_messages("run_1")] == [b"42"]
        accept(store, journal(("s", 1, b"1")), commit(1, state=RunState.PAUSED, wake_at=7.0))
        assert [row.record for row in store.read_journal("run_1")] == [b"1"]
        assert [due.wake_at for due in store.list_due()] == [7.0]
        assert store.verify().ok
    new = path.with_name("new.db")
    SQLiteStorage(new).close()
    listing = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    with closing(sqlite3.connect(path)) as migrated, closing(sqlite3.connect(new)) as made:
        assert migrated.execute(listing).fetchall() == made.execute(listing).fetchall()


def test_messages_left_before_the_index_of_their_runs_are_in_it(path: Path) -> None:
    with SQLiteStorage(path) as store:
        for run_id in ("run_1", "run_2"):
            store.open_run(new_run(run_id))
            accept(store, commit(1, run_id, state=RunState.PAUSED))
        store.send("run_1", "m", b"1")
    with closing(schema.connect(path, 5)) as connection:
        connection.execute("DROP INDEX runs_by_message")
        connection.execute("ALTER TABLE runs DROP COLUMN messaged")
        for index in ("change", "parent", "definition"):
            connection.execute(f"DROP INDEX runs_by_{index}")
        for table in ("pins", "retired"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE checkpoints DROP COLUMN at")
        connection.execute("UPDATE meta SET value = '3' WHERE name = 'schema_version'")
    with SQLiteStorage(path) as store:
        assert [run.run_id for run in store.list_messaged()] == ["run_1"]


def test_pages_of_runs_that_are_due_are_full_though_some_are_damaged(path: Path) -> None:
    with SQLiteStorage(path) as store:
        for number in range(6):
            store.open_run(new_run(f"run_{number}"))
            accept(store, commit(1, f"run_{number}", state=RunState.PAUSED, wake_at=float(number // 3)))
        store._db.execute("UPDATE runs SET header_crc = 0 WHERE run_id IN ('run_0', 'run_1')")
        first = store.list_due(2.0, 2)
        assert [run.run_id for run in first] == ["run_2", "run_3"], "damaged ones take no place"
        assert [run.run_id for run in store.list_due(2.0, 2, first[-1])] == ["run_4", "run_5"]
        assert [run.run_id for run in store.list_due(0.5, 2, first[0])] == []


def test_runs_with_messages_are_found_by_an_index_and_pages_are_full(path: Path) -> None:
    with SQLiteStorage(path) as store:
        for number in range(6):
            store.open_run(new_run(f"run_{number}"))
            accept(store, commit(1, f"run_{number}", state=RunState.PAUSED))
            if number:
                store.send(f"run_{number}", "m", b"1")
        store._db.execute("UPDATE runs SET header_crc = 0 WHERE run_id IN ('run_1', 'run_3')")
        statements: list[str] = []
        store._db.set_trace_callback(statements.append)
        assert [run.run_id for run in store.list_messaged(2)] == ["run_2", "run_4"], "damaged ones take no place"
        assert [run.run_id for run in store.list_messaged(2, "run_4")] == ["run_5"]
        store._db.set_trace_callback(None)
        [query] = {statement for statement in statements if "messaged" in statement and "'run_4'" not in statement}
        plan = store._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()[0]
        assert "USING INDEX runs_by_message" in plan["detail"]
        assert "SEARCH" in plan["detail"], "neither all paused runs nor all with messages are read"


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    SQLiteStorage(path).close()
    with closing(schema.connect(path, 5)) as connection:
        with pytest.raises(sqlite3.Error):
            schema.migrate(connection, str(path), (*schema.MIGRATIONS, NEXT, "CREATE TABLE runs (x);\n"))
        assert schema.version_of(connection) == schema.SCHEMA_VERSION
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'tenants'").fetchone()[0] == 0
    SQLiteStorage(path).close()


# --- others at the same file ----------------------------------------------------------------------------------------


def test_waiting_for_another_transaction_ends(path: Path) -> None:
    with SQLiteStorage(path, busy_seconds=0.05) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        store.open_run(new_run())
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="busy_seconds"):
            store.commit([commit(1)])
        other.execute("ROLLBACK")
        accept(store, commit(1))


FORK = """
    import os, sys, threading
    from framework.storage.sqlite import SQLiteStorage
    from framework.storage.contract import accept, commit, new_run

    store = SQLiteStorage(sys.argv[1])
    for run_id in ("parent", "child", "busy"):
        store.open_run(new_run(run_id))
    stop = threading.Event()

    def work():
        sequence = 0
        while not stop.wait(0.0005):  # leaves the lock to others now and then
            sequence += 1
            accept(store, commit(sequence, "busy"))

    thread = threading.Thread(target=work)
    thread.start()
    children = []
    for number in range(1, 6):
        accept(store, commit(number, "parent"))
        child = os.fork()
        if not child:
            assert store._connection is None, "the parent's connection crossed the fork"
            accept(store, commit(number, "child"))
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    thread.join()
    accept(store, commit(6, "parent"))
    assert store.verify().ok
    assert store.find_run("parent").sequence == 6 and store.find_run("child").sequence == 5
    store.close()
    print("fine")
"""


def test_a_store_may_be_used_on_both_sides_of_a_fork(path: Path, python: Python) -> None:
    assert python(FORK, path) == "fine\n"
    with SQLiteStorage(path) as store:
        assert store.verify().ok


def test_a_store_in_memory_survives_a_fork(python: Python) -> None:
    program = """
        import os
        from framework.storage.memory import MemoryStorage
        from framework.storage.contract import accept, commit, new_run

        store = MemoryStorage()
        store.open_run(new_run())
        child = os.fork()
        accept(store, commit(1))
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(store.find_run("run_1").sequence)
    """
    assert python(program) == "1\n"


# --- damage of columns that no checksum of a value covers -----------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET state = 'nonsense'",
        "UPDATE runs SET wake_at = 'soon'",
        "UPDATE runs SET header = x'00'",
        "UPDATE runs SET header = CAST('text' AS TEXT)",
        "UPDATE runs SET fingerprint = 'other'",
        "UPDATE runs SET goal_id = 'other'",
        "UPDATE runs SET parent_run_id = 'other'",
    ],
)
def test_a_damaged_record_is_reported_and_hides_no_other(path: Path, statement: str) -> None:
    with SQLiteStorage(path) as store:
        for run_id in ("run_1", "run_2"):
            Writer(store, run_id).write({"a": 1})
        store._db.execute(f"{statement} WHERE run_id = 'run_1'")
        with pytest.raises(CorruptData, match="run_1"):
            store.find_run("run_1")
        assert [record.run_id for record in store.list_runs()] == ["run_2"]
        assert {damage.run_id for damage in store.verify().damage} == {"run_1"}
        assert store.delete_run("run_1")


def test_memory_storage_is_sqlite(tmp_path: Path) -> None:
    with MemoryStorage() as store:
        store.open_run(new_run())
        assert store.get_stats() == {"total_runs": 0, "total_goals": 0, "storage_path": "memory://"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_read_as_it_is_at_one_moment(tmp_path: Path) -> None:
    """Its state and its last sequence change together, also for who reads while its owner commits and ends it."""
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as owner, SQLiteStorage(path) as other:
        owner.open_run(new_run(), "me", 60)
        sequence = 0

        def between(_statement: str) -> None:
            nonlocal sequence
            sequence += 1
            accept(owner, commit(sequence, token=1, state=RunState.PAUSED if sequence % 2 else RunState.RUNNING))

        other._db.set_trace_callback(between)
        reads: list[Callable[[], RunRecord | None]] = [
            lambda: other.find_run("run_1"),
            lambda: other.list_runs()[0],
            lambda: other.find_runs("run")[0],
        ]
        for read in reads:
            before = sequence
            found = read()
            assert found is not None
            assert sequence > before
            assert found.state is (RunState.PAUSED if found.sequence % 2 else RunState.RUNNING)
        other._db.set_trace_callback(None)
