"""The fault suite itself: a small one passes, and a store with a mistake in it does not."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import orjson
import psycopg
import pytest

from tests import forks
from tests.faults import torn, zombies
from tests.faults.catalogue import FAULTS
from tests.faults.suite import Settings, tasks_of

CORE = Path(__file__).parents[2]
SMALL = ("kills", "power-failure", "disk-full", "bit-flips", "cut")
"""Of each kind of fault one; those that wait for leases or servers are left to the suite."""


def run(program: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAULTS_", "SEED"))}
    environment = {**kept, "PYTHONPATH": str(CORE), **settings}
    return forks.run([sys.executable, *program], env=environment, cwd=CORE, capture_output=True, text=True)


def test_a_small_suite_passes(tmp_path: Path) -> None:
    where = tmp_path / "report.json"
    done = run(["-m", "tests.faults.suite"], FAULTS_KILLS="18", FAULTS_ONLY=",".join(SMALL), FAULTS_REPORT=str(where))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = orjson.loads(where.read_bytes())
    assert {row["fault"] for row in figures["rows"]} == set(SMALL)
    assert sum(row["kills"] for row in figures["rows"] if row["fault"] == "kills") == 18
    assert f"SEED={figures['seed']} FAULTS_KILLS=18" in done.stdout
    assert "| kills | postgres | 6 |" in done.stdout


# Each program makes one mistake in the library and does one task of the suite, which must find it.
MISTAKES = {
    "a commit is confirmed before it is made": (
        "kills/sqlite/0",
        """
        from framework.storage.sqlite import SQLiteStorage
        plain, close, held = SQLiteStorage.commit, SQLiteStorage.close, []
        def commit(self, commits):
            if self.path.name == ":memory:":
                return plain(self, commits)
            earlier, held[:] = held[:], commits
            plain(self, earlier)
            return [None] * len(commits)
        def close_late(self):
            if self.path.name != ":memory:" and not self.closed:
                commit(self, [])
            close(self)
        SQLiteStorage.commit, SQLiteStorage.close = commit, close_late
        """,
        "confirmed and is lost",
    ),
    "finished calls are forgotten": (
        "kills/sqlite/0",
        """
        from framework.storage.sqlite import SQLiteStorage
        SQLiteStorage.read_journal = lambda *args, **more: []
        """,
        "was finished under token",
    ),
    "tokens are not checked": (
        "stopped/sqlite/0",
        """
        from dataclasses import replace
        from framework.storage.sqlite import SQLiteStorage
        plain = SQLiteStorage.commit
        def commit(self, commits):
            return plain(self, [replace(one, token=self.find_run(one.run_id).token) for one in commits])
        SQLiteStorage.commit = commit
        """,
        "a worker that was replaced ended with",
    ),
    "files are not synced": (
        "power-failure/files/0",
        """
        import os
        os.fsync = lambda descriptor: None
        """,
        "confirmed and is lost",
    ),
    "SQLite does not sync": (
        "power-failure/sqlite/0",
        """
        from framework.storage import sqlite_schema
        plain = sqlite_schema.connect
        def connect(*args, **more):
            connection = plain(*args, **more)
            connection.execute("PRAGMA synchronous = OFF")
            return connection
        sqlite_schema.connect = connect
        """,
        "confirmed and is lost",
    ),
    "checksums are not looked at": (
        "bit-flips/files/0",
        """
        from framework.storage import file_io
        file_io._digest = lambda content: "the same for all"
        """,
        "bits flipped",
    ),
}
_DO = """
from tests.faults import suite
from tests.faults.processes import prepare_to_fork
prepare_to_fork()
fault, backend, number = {task!r}.split("/")
for seed in range(4):
    outcome = suite.perform(suite.Task(fault, backend, int(number), 24), str(seed), None)
    print("\\n".join(outcome["violations"]))
    if outcome["violations"]:
        break
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    task, program, found = MISTAKES[mistake]
    lines = [line[8:] for line in program.splitlines()]
    done = run(["-c", "\n".join(lines) + _DO.format(task=task)], TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert found in done.stdout
    assert done.stdout.strip(), "nothing was found"


def test_tasks_are_the_same_for_the_same_seed_and_cover_what_was_asked_for() -> None:
    one, two = (Settings("7", 10_000, ("sqlite", "files", "postgres"), (), 2, None) for _ in range(2))
    assert tasks_of(one) == tasks_of(two)
    kills = [task for task in tasks_of(one) if task.fault == "kills"]
    assert 10_000 - 3 <= sum(task.size for task in kills) <= 10_000 + 3
    assert {task.fault for task in tasks_of(one)} == set(FAULTS)
    only = Settings("7", 10_000, ("sqlite",), ("kills/sqlite/17",), 2, None)
    assert [task.name for task in tasks_of(only)] == ["kills/sqlite/17"]


def test_a_setting_that_is_not_known_is_refused() -> None:
    done = run(["-m", "tests.faults.suite"], FAULTS_ONLY="kils")
    assert done.returncode == 1
    assert "Unknown: kils" in done.stderr


def test_a_transaction_that_stands_still_is_seen(postgres_url: str) -> None:
    with psycopg.connect(postgres_url.partition("?")[0]) as client:
        assert not zombies._stands_still(postgres_url)
        client.execute("SELECT 1")
        assert zombies._stands_still(postgres_url)
        client.rollback()
        assert not zombies._stands_still(postgres_url)


def test_what_of_a_log_is_in_the_file_already_is_known(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "runs.db", isolation_level=None)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA wal_autocheckpoint = 0", "CREATE TABLE t (a)"):
        database.execute(statement)
    database.execute("INSERT INTO t VALUES (randomblob(30000))")
    log = tmp_path / "runs.db-wal"
    assert torn._folded_in(tmp_path) == 0
    database.execute("PRAGMA wal_checkpoint(PASSIVE)")
    assert torn._folded_in(tmp_path) == log.stat().st_size > 30_000
    database.execute("INSERT INTO t VALUES (1)")
    assert torn._folded_in(tmp_path) == 0, "the log began anew"
    database.close()
    assert torn._folded_in(tmp_path) == 0
