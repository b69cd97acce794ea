"""What verify and repair find of each kind of damage, what they mend, and that they take no work in progress for it."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage, open_plain
from framework.storage.chunks import Chunk
from framework.storage.contract import Writer, accept, commit, new_run
from framework.storage.encryption import EncryptedStorage
from framework.storage.memory import MemoryStorage
from framework.storage.ownership import new_owner, retire
from framework.storage.records import Retention
from framework.storage.repair import Finding, examine, repair
from framework.storage.sqlite import SQLiteStorage
from framework.storage.sqlite_commits import insert_chunks
from framework.storage.sqlite_wal import lost_commits
from tests import forks
from tests.storage.conftest import make
from tests.storage.test_encryption import BACKENDS, RING


@pytest.fixture(params=["sqlite", "files", "memory", "postgresql"])
def store(request: pytest.FixtureRequest) -> Iterator[Storage]:
    with make(request.param, request)._factory() as made:
        yield made


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SQLiteStorage]:
    with SQLiteStorage(tmp_path / "runs.db") as made:
        fill(made)
        yield made


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileStorage]:
    with FileStorage(tmp_path / "runs") as made:
        fill(made)
        yield made


def fill(store: Storage) -> None:
    writer = Writer(store, state={"a": [0]})
    for number in range(1, 5):
        writer.write({"a": list(range(number + 1))})


def told(store: Storage, run_id: str | None = None) -> list[str]:
    return [f"{each.where}: {each.problem}" for each in examine(store, run_id).findings]


def mend(store: Storage) -> list[tuple[bool, str]]:
    return [(each.done, each.told) for each in repair(store, examine(store).findings)]


def test_a_sound_store_has_no_findings(store: Storage) -> None:
    fill(store)
    found = examine(store)
    assert (found.findings, found.ok, found.report.checkpoints) == ((), True, 4)
    assert repair(store, found.findings) == []


# --- damage is told and kept ------------------------------------------------------------------------------------------


def test_commits_that_are_missing_from_the_log(sqlite: SQLiteStorage, files: FileStorage) -> None:
    sqlite._db.execute("DELETE FROM steps WHERE sequence IN (2, 3)")
    assert "log: commits 2 to 3 are missing" in told(sqlite)
    (files.base_path / "checkpoints/by_run/run_1/ckpt_2.json").unlink()
    assert "log: commit 2 is missing" in told(files)
    assert not examine(files).ok


def test_appends_that_follow_nothing(sqlite: SQLiteStorage) -> None:
    sqlite._db.execute("DELETE FROM chunks WHERE sequence = 0")
    assert "chunk 1 of key 'a': it appends to a value that is not there" in told(sqlite)


def test_chunks_of_no_commit(sqlite: SQLiteStorage) -> None:
    insert_chunks(sqlite._db, 1, 9, [Chunk("b", "set", b"1")])
    assert told(sqlite) == ["chunk 9 of key 'b': it belongs to no commit in the log"]


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE runs SET header = '{}'", "run run_1: The record of run 'run_1'"),
        ("UPDATE steps SET record = '[]' WHERE sequence = 3", "log row 3: it does not match its checksum"),
        ("UPDATE checkpoints SET body = '{}' WHERE sequence = 4", "checkpoint ckpt_4: its body does not match"),
        ("UPDATE chunks SET data = '9' WHERE sequence = 2", "checkpoint ckpt_4: A chunk of key 'a'"),
        ("DELETE FROM definitions", "run run_1: Its definition is missing"),
        ("UPDATE documents SET body = '{}'", "document of run document"),
    ],
    ids=["record", "log", "checkpoint", "chunk", "definition", "document"],
)
def test_damaged_rows(statement: str, finding: str, sqlite: SQLiteStorage) -> None:
    from framework.schemas.run import Run

    sqlite.save_run(Run(id="document", goal_id="g"))
    sqlite._db.execute(statement)
    before = list(sqlite._db.iterdump())
    found = examine(sqlite)
    assert any(f"{each.where}: {each.problem}".startswith(finding) for each in found.findings), told(sqlite)
    assert not found.ok
    repair(sqlite, found.findings, evidence=True)
    assert list(sqlite._db.iterdump()) == before  # what is damaged may be evidence


def test_a_damaged_database(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as made:
        fill(made)
        root = made._db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs_by_creation'").fetchone()[0]
        size = made._db.execute("PRAGMA page_size").fetchone()[0]
    data = bytearray(path.read_bytes())
    start = (root - 1) * size
    data[start + 3 : start + 5] = b"\x00\x00"  # the index says that it has no entries
    path.write_bytes(data)
    with SQLiteStorage(path) as made:
        found = examine(made)
    assert any(str(path) == each.where for each in found.findings)
    assert not found.ok


def test_damage_above_the_store_below(store: Storage) -> None:
    encrypted = EncryptedStorage(store, RING)
    fill(encrypted)
    assert examine(encrypted).findings == ()
    content = next(each for each in store.read_contents("run_1") if each.place.kind == "chunk" and each.place.sequence)
    store.replace_contents([(content, content.data[:-1] + bytes([content.data[-1] ^ 1]))])
    assert store.verify().ok
    assert not examine(encrypted).ok


# --- strays -----------------------------------------------------------------------------------------------------------


def test_rows_of_no_run(sqlite: SQLiteStorage) -> None:
    sqlite.open_run(new_run("other", fingerprint="f other"))
    accept(sqlite, commit(1, "other", chunks=[Chunk("b", "set", b"1")]))
    sqlite.send("other", "m", b"1")
    sqlite._db.execute("DELETE FROM runs WHERE run_id = 'other'")
    found = examine(sqlite)
    assert not found.ok
    assert {each.where for each in found.findings} == {"steps", "checkpoints", "chunks", "messages", "definitions"}
    assert all(each.repair == "remove it" for each in found.findings)
    assert mend(sqlite) == [(True, "removed")] * 5
    assert examine(sqlite).findings == ()
    assert sqlite.read_chunks("run_1", 4) != []


def test_files_of_no_run(files: FileStorage) -> None:
    Writer(files, run_id="other", state={"b": 1}).write({"b": 2})
    files.send("other", "m", b"1")
    (files.base_path / "executions/other.json").unlink()
    found = examine(files)
    assert {each.where for each in found.findings} == {"history/other", "checkpoints/by_run/other", "messages/other"}
    assert mend(files) == [(True, "removed")] * 3
    assert examine(files).findings == ()
    assert len(list(files.read_checkpoint_rows("run_1"))) == 4


def test_files_whose_writing_was_cut_short(files: FileStorage) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = files.base_path / "history/run_1"
    mine, others = folder / f".9.json.{os.getpid()}-00000000.tmp", folder / f".9.json.{ended.pid}-00000000.tmp"
    for path in (mine, others):
        path.write_bytes(b"{")
    assert examine(files).findings == ()  # they are young: somebody may be at work
    for path in (mine, others):
        os.utime(path, (time.time() - 120,) * 2)
    found = examine(files)
    assert [each.where for each in found.findings] == [str(others.relative_to(files.base_path))]
    assert found.ok  # an ordinary left-over
    assert mend(files) == [(True, "removed")]
    assert (mine.exists(), others.exists()) == (True, False)


def test_damaged_files_are_put_away_only_when_asked(files: FileStorage) -> None:
    torn = files.base_path / "checkpoints/by_run/run_1/ckpt_4.json"
    torn.write_text("torn")
    files.rewind("run_1", files.claim_run("run_1", "me", 60).token, 3)
    found = [each for each in examine(files).findings if each.kind == "stray"]
    assert [(each.where, each.repair) for each in found] == [("checkpoints/by_run/run_1/ckpt_4.json.damaged", None)]
    assert "may tell what happened" in found[0].advice
    assert repair(files, found) == []
    assert [each.done for each in repair(files, found, evidence=True)] == [True]
    assert not torn.with_name("ckpt_4.json.damaged").exists()


def test_a_stray_that_is_needed_by_now_stays(files: FileStorage) -> None:
    Writer(files, run_id="other", state={"b": 1}).write({"b": 2})
    record = files.base_path / "executions/other.json"
    data = record.read_bytes()
    record.unlink()
    found = examine(files).findings
    record.write_bytes(data)
    assert {each.done for each in repair(files, found)} == {False}
    assert len(list(files.read_checkpoint_rows("other"))) == 1


# --- leases -----------------------------------------------------------------------------------------------------------


def lease(store: Storage, owner: str, seconds: float) -> list[Finding]:
    store.claim_run("run_1", owner, seconds)
    return list(examine(store).findings)


def test_the_lease_of_a_process_that_is_gone_is_released(store: Storage) -> None:
    fill(store)
    owner = new_owner()
    assert lease(store, owner, 60) == []  # alive
    retire(owner)
    found = examine(store)
    assert ["its process is gone" in each.problem for each in found.findings] == [True]
    assert found.ok  # as after any crash
    assert mend(store) == [(True, "its lease was released")]
    record = store.find_run("run_1")
    assert record is not None
    assert (record.owner, record.state) == (None, RunState.CRASHED)
    assert mend(store) == []


def test_a_lease_that_was_taken_over_meanwhile_stays(store: Storage) -> None:
    fill(store)
    owner = new_owner()
    lease(store, owner, 60)
    retire(owner)
    found = examine(store).findings
    record = store.find_run("run_1")
    assert record is not None
    store.release_lease("run_1", record.token)
    store.claim_run("run_1", "elsewhere", 60)
    assert [each.done for each in repair(store, found)] == [False]
    record = store.find_run("run_1")
    assert record is not None
    assert record.owner == "elsewhere"


def test_leases_of_others_are_told_and_kept(store: Storage) -> None:
    fill(store)
    assert lease(store, "elsewhere", 3_600) == []
    record = store.find_run("run_1")
    assert record is not None
    store.renew_lease("run_1", record.token, 40 * 86_400)
    found = examine(store)
    assert [(each.problem, each.repair) for each in found.findings] == [
        ("its lease lasts 40 days more, longer than any is given: a clock was wrong", None)
    ]
    assert "elsewhere" in found.findings[0].advice
    assert (found.ok, mend(store)) == (False, [])


def test_an_expired_lease_is_told(store: Storage) -> None:
    fill(store)
    assert "expired" in lease(store, "elsewhere", -300)[0].problem
    assert examine(store).ok
    assert mend(store) == []
    assert "5 minutes ago" in told(store, "run_1")[0]


# --- while others work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_work_in_progress_is_no_damage(encrypted: bool, store: Storage) -> None:
    """Runs are begun, written, pruned, forked and deleted all the time; nothing of that is ever taken for damage."""
    whole: Storage = EncryptedStorage(store, RING) if encrypted else store
    stop, failures = threading.Event(), list[BaseException]()

    def work(name: str) -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                writer = Writer(whole, run_id=f"{name}_{number}", state={"a": [], "b": 0})
                for step in range(1, 12):
                    state = {"a": list(range(step % 7)), "b": step, **({"c": "t" * step} if step % 3 else {})}
                    writer.write(state, retention=Retention(1 + step % 2))
                if number > 2:
                    whole.delete_run(f"{name}_{number - 2}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    try:
        found = [finding for _ in range(4) for finding in examine(whole).findings]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    # A run with no owner is what these writers leave; that is no finding either.
    assert [finding for finding in found if finding.kind != "lease"] == []


WRITER = """
    import sys
    from framework.storage.backend import open_storage
    from framework.storage.contract import Writer
    from framework.storage.records import Retention

    with open_storage(sys.argv[1]) as store:
        writer = Writer(store, state={"a": []})
        print("ready", flush=True)
        number = 0
        while True:
            number += 1
            writer.write({"a": list(range(number % 9))}, retention=Retention(2))
"""


@pytest.mark.parametrize("url", BACKENDS[:2], ids=["sqlite", "files"])
def test_another_process_writes_meanwhile(url: str, tmp_path: Path) -> None:
    import textwrap

    url = url.format(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), url]
    with forks.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            with open_plain(url) as store:
                for _ in range(5):
                    assert examine(store).findings == ()
                    assert lost_commits(tmp_path / "runs.db") is None
        finally:
            child.kill()
    with open_plain(url) as store:
        assert [each for each in examine(store).findings if each.serious] == []


# --- the log of the SQLite file ---------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The path of a store whose log is as a killed process leaves it."""
    source = tmp_path / "source.db"
    with SQLiteStorage(source) as made:
        writer = Writer(made, state={"a": []})
        for number in range(10):
            writer.write({"a": list(range(number))})
        for suffix in ("", "-wal"):
            (tmp_path / f"runs.db{suffix}").write_bytes((tmp_path / f"source.db{suffix}").read_bytes())
    return tmp_path / "runs.db"


def damage_log(log: Path, change: Callable[[bytearray], None]) -> str | None:
    path = Path(f"{log}-wal")
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return lost_commits(log)


def test_a_log_that_is_whole_or_cut_short_loses_nothing(log: Path) -> None:
    assert lost_commits(log) is None
    assert damage_log(log, lambda data: data.__delitem__(slice(len(data) - 9_000, len(data)))) is None
    assert damage_log(log, lambda data: data.clear()) is None
    Path(f"{log}-wal").unlink()
    assert lost_commits(log) is None


def test_a_damaged_frame_hides_commits(log: Path) -> None:
    def flip(data: bytearray) -> None:
        data[32 + 24 + 16_384 * 5 + 24 * 5 + 100] ^= 1

    problem = damage_log(log, flip)
    assert problem is not None
    assert re.search(r"frame \d+ of its log does not match its checksum", problem)
    # This is what it is for: SQLite says nothing, and the commits are gone.
    connection = sqlite3.connect(log)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_damaged_header_hides_all(log: Path) -> None:
    problem = damage_log(log, lambda data: data.__setitem__(13, data[13] ^ 1))
    assert problem == "its header does not match its checksum"


def test_findings_are_plain_data() -> None:
    with MemoryStorage() as store:
        store.open_run(new_run(), "elsewhere", -10)
        accept(store, commit(1))
        (finding,) = examine(store).findings
        assert json.loads(json.dumps([finding.kind, finding.run_id, finding.serious])) == ["lease", "run_1", False]
