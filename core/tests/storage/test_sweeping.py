"""Sweeps: the rules, kills between steps, the background, the cost, and that only what should go goes."""

from __future__ import annotations

import signal
import sqlite3
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest

from framework import _faults
from framework.errors import StorageError
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.retention import RetentionPolicy, parse_age, parse_size
from framework.schemas.run import RunState
from framework.storage import sqlite_run_rows
from framework.storage import sqlite_schema as schema
from framework.storage.backend import FileStorage, Storage
from framework.storage.chunks import Chunk
from framework.storage.contract import KEEP_ONE, StorageUnderTest, Writer, accept, commit, new_run
from framework.storage.contract_retention import FINISHED, ended, ids, purge
from framework.storage.memory import MemoryStorage
from framework.storage.retention_records import SweepReport
from framework.storage.sqlite import SQLiteStorage
from framework.storage.sweeping import COMPLETED, FAILED, UNFINISHED, Pruning, Rules, in_words, rules_of, sweep
from framework.storage.sweeping_background import start_sweeping
from framework.testing import ManualClock

# --- what a policy says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43_200), ("1.5d", 129_600), (" 2W ", 1_209_600)]
)
def test_ages_are_read(text: str, seconds: float) -> None:
    assert parse_age(text) == timedelta(seconds=seconds)
    assert RetentionPolicy.from_options({"max_age": text}).max_age == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("7 b", 7), ("1.5KB", 1536), ("500mb", 500 << 20), ("2GiB", 2 << 30), ("1t", 1 << 40)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_age=30", "A retention policy: max_age: '30' is no age; write a number and s, m, h, d or w"),
        ("max_age=9999999d", "more than a thousand years"),
        ("max_total_bytes=2XB", "max_total_bytes: '2XB' is no size; write a number and KB, MB, GB or TB"),
        ("keep_completed=many", "keep_completed: 'many' is no whole number"),
        ("keep_completed=-1", "keep_completed: input should be greater than or equal to 0"),
        ("max_ages=1d", "there is no max_ages; the options are max_age, max_total_bytes, keep_completed"),
        ("max_age", "'max_age' is not name=value"),
        ("max_age=1d,max-age=2d", "max_age is given twice"),
        (" , ", "is empty; write for example max_age=30d"),
    ],
)
def test_a_bad_policy_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^A retention policy") as caught:
        RetentionPolicy.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_is_read_from_text_and_stands_in_a_configuration() -> None:
    policy = RetentionPolicy.parse("max-age=30d, max_total_bytes=2GB,keep_completed=100,failed_max_age=90d")
    assert policy == RetentionPolicy(
        max_age=timedelta(days=30), max_total_bytes=2 << 30, keep_completed=100, failed_max_age=timedelta(days=90)
    )
    assert RetentionPolicy().is_empty
    assert not policy.is_empty
    assert CheckpointConfig().retention is None
    config = CheckpointConfig(retention=policy)
    assert CheckpointConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="extra"):
        CheckpointConfig.model_validate({"retention": {"max_agee": 1}})


def test_the_rules_of_each_kind() -> None:
    assert rules_of(RetentionPolicy(max_total_bytes=1), 100.0) == []
    policy = RetentionPolicy.parse("max_age=10s,failed_max_age=1d,keep_completed=3,unfinished_max_age=20s")
    assert rules_of(policy, 100.0) == [
        Rules(COMPLETED, timedelta(seconds=10), 90.0, 3),
        Rules(FAILED, timedelta(days=1), 100.0 - 86_400, None),
        Rules(UNFINISHED, timedelta(seconds=20), 80.0, None),
    ]
    assert [in_words(timedelta(seconds=each)) for each in (86_400, 7200, 60, 90, 0.5)] == [
        "1 d",
        "2 h",
        "1 min",
        "90 s",
        "0.5 s",
    ]


class Python(Protocol):
    """As in ``conftest``."""

    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


# --- kills and errors in between ------------------------------------------------------------------------------------


SWEEP = """
    import sys
    from framework.schemas.retention import RetentionPolicy
    from framework.storage import sweeping
    from framework.storage.backend import open_storage
    from framework.testing import install_faults_from_environment

    sweeping._STEP_SECONDS = 0.0
    store = open_storage(sys.argv[1])
    install_faults_from_environment()
    store.sweep(RetentionPolicy(keep_completed=0))
"""


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("point", _faults.SWEEP_POINTS)
def test_a_sweep_that_is_killed_is_finished_by_the_next(
    point: str, nth: int, durable: StorageUnderTest, python: Python
) -> None:
    store = durable.new()
    for number in range(3):
        ended(store, f"r{number}")
        ended(store, f"part {number}", RunState.FAILED, parent=f"r{number}")
    kept = Writer(store, "kept")
    kept.write({"a": 1})
    python(SWEEP, store.url, env={"SUREFOOT_FAULT": f"{point}:{nth}"}, code=-signal.SIGKILL)
    store = durable.again(store)
    assert store.verify().ok
    for run in store.list_runs():
        assert [row.sequence for row in store.read_checkpoint_rows(run.run_id)] == [1]
    store.sweep(RetentionPolicy(keep_completed=0, keep_failed=0))
    assert ids(store.find_runs("")) == ["kept"]
    kept.check(store, [1], "the run that stays")
    assert_no_orphans(store)


def assert_no_orphans(store: Storage) -> None:
    """Nothing is stored of runs that are not there."""
    assert store.purge() is False
    assert store.verify().ok
    if isinstance(store, SQLiteStorage):
        for table in ("steps", "checkpoints", "chunks", "journal", "messages", "pins"):
            query = f"SELECT count(*) FROM {table} WHERE run_pk NOT IN (SELECT pk FROM runs)"
            assert store._db.execute(query).fetchone()[0] == 0, table
        query = "SELECT count(*) FROM definitions WHERE fingerprint NOT IN (SELECT fingerprint FROM runs)"
        assert store._db.execute(query).fetchone()[0] == 0
    elif isinstance(store, FileStorage):
        names = {path.stem for path in (store.base_path / "executions").glob("*.json")}
        for folder in ("checkpoints/by_run", "history", "journal", "messages", "pins", "retired"):
            found = {path.stem for path in (store.base_path / folder).glob("[!.]*")}
            assert found <= names, folder


def test_a_sweep_is_stopped_between_steps(backend: StorageUnderTest) -> None:
    store = backend.new()
    for number in range(5):
        ended(store, f"r{number}")
    stop = threading.Event()
    stop.set()
    report = store.sweep(RetentionPolicy(keep_completed=0), stop=stop)
    assert (report.runs, report.complete) == (0, False)
    seen: list[int] = []
    report = store.sweep(RetentionPolicy(keep_completed=0), on_progress=lambda each: seen.append(each.runs))
    assert (report.runs, report.complete) == (5, True)
    assert seen
    assert seen == sorted(seen)
    with pytest.raises(ValueError, match="limit"):
        store.sweep(RetentionPolicy(), limit=-1)


def test_a_damaged_run_stays_and_hides_no_other(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        for number in range(4):
            ended(store, f"r{number}")
        ended(store, "part", parent="r2")
        store._db.execute("UPDATE runs SET header_crc = 0 WHERE run_id IN ('r1', 'part')")
        report = store.sweep(RetentionPolicy(keep_completed=0))
        assert [each.run_id for each in report.removed] == ["r0", "r3"]
        assert [(each.run_id, each.why[:17]) for each in report.kept] == [("r2", "it cannot be read")]


# --- steps are short, and cost what they remove ---------------------------------------------------------------------


def test_the_store_is_left_to_others_after_each_step(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        for number in range(3):
            ended(store, f"r{number}", size=1_000_000)
        rests: list[float] = []
        report = sweep(store, RetentionPolicy(keep_completed=0), rest=lambda took, stop: rests.append(took))
        assert report.runs == 3
        assert len(rests) >= 3
        assert report.given_back_bytes > 2_900_000
    assert (tmp_path / "runs.db").stat().st_size < 1_000_000


def test_rows_are_removed_in_slices(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        writer = Writer(store)
        for number in range(300):
            writer.write({"list": list(range(number))})
        accept(store, commit(301, state=RunState.COMPLETED))
        run = store.find_run("run_1")
        assert run is not None
        assert store.retire_runs([run], FINISHED)[0].run_ids == ("run_1",)
        slices = 1
        while store.purge(0.0):
            slices += 1
        assert slices >= 3 * 300 // 50
        assert_no_orphans(store)


def test_slices_of_large_values_are_small_and_write_little(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as store:
        store.open_run(new_run("run_1"))
        value = b'"%b"' % (b"x" * 1_500_000)
        chunks = [[Chunk(f"key {number}", "set", value)] for number in range(8)]
        accept(store, *(commit(number, chunks=each) for number, each in enumerate(chunks, 1)))
        accept(store, commit(9, state=RunState.COMPLETED, chunks=[Chunk("huge", "set", b'"%b"' % (b"x" * 6_000_000))]))
    with SQLiteStorage(path) as store:
        run = store.find_run("run_1")
        assert run is not None
        store.retire_runs([run], FINISHED)
        rows = "SELECT count(*), sum(length(data)) FROM chunks"
        count, held = store._db.execute(rows).fetchone()
        while count:
            store.purge(0.0)
            before, (count, left) = (count, held), store._db.execute(rows).fetchone()
            held = left or 0
            # One statement, after which the clock is looked at; a value that is larger by itself goes alone.
            assert before[1] - held <= 4 << 20 or before[0] - count == 1
        purge(store)
        # What is freed is not written over first, whatever the library's default is.
        assert path.with_name("runs.db-wal").stat().st_size < 2_000_000
        assert_no_orphans(store)


def test_old_checkpoints_with_large_values_go_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_run_rows, "SLICE_BYTES", 250_000)
    clock = ManualClock()
    with SQLiteStorage(tmp_path / "runs.db", clock=clock) as store:
        sizes = {"small": [100] * 60, "large": [100_000] * 12, "mixed": [100] * 30 + [100_000] * 8}
        for run_id, each in sizes.items():
            store.open_run(new_run(run_id))
            values = [[Chunk("a", "set", b'"%b"' % (b"x" * size))] for size in (*each, 1)]
            accept(store, *(commit(number, run_id, chunks=value) for number, value in enumerate(values, 1)))
        clock.advance(60)
        before = store.usage().now - 30
        steps: dict[str, list[int]] = {run_id: [] for run_id in sizes}
        for run_id, removed in steps.items():
            free = store.usage().free_bytes
            while gone := store.prune_older(run_id, before, 500):
                free, was = store.usage().free_bytes, free
                removed.append(gone)
                assert free - was < 2 * sqlite_run_rows.SLICE_BYTES, (run_id, removed)
        assert {run_id: sum(removed) for run_id, removed in steps.items()} == {
            run_id: len(each) for run_id, each in sizes.items()
        }
        assert len(steps["small"]) == 1
        assert len(steps["large"]) >= 3
        assert store.verify().ok


def test_one_run_after_another_is_pruned_in_steps() -> None:
    store = MemoryStorage()
    for run_id, count in (("long", 70), ("short", 3)):
        writer = Writer(store, run_id)
        for number in range(count):
            writer.write({"a": number})
    store.pin("long", "ckpt_2")
    told: list[int] = []
    rests: list[float] = []
    pruning = Pruning(store, 2, told.append, lambda took, stop: rests.append(took))
    assert pruning.prune("long", 70) == sum(told) == 67
    assert len(rests) == len(told) >= 2
    assert max(told) <= 50
    assert (pruning.prune("short", 3), pruning.prune("short", 2), pruning.prune("nobody", 9)) == (1, 0, 0)
    assert [row.sequence for row in store.read_checkpoint_rows("long")] == [70, 69, 2]
    store.close()


def test_each_rule_names_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.storage.sweeping.MOST_LISTED", 2)
    with MemoryStorage() as store:
        for number in range(4):
            ended(store, f"done {number}")
            ended(store, f"failed {number}", RunState.FAILED)
        report = store.sweep(RetentionPolicy(keep_completed=0, keep_failed=1), dry_run=True)
        assert [each.run_id for each in report.removed] == ["done 0", "done 1", "failed 0", "failed 1"]
        assert sorted(report.rules.values()) == [3, 4]


def test_one_step_gives_many_pages_back(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        ended(store, "big", size=2_000_000)
        ended(store, "last", size=400_000)  # which has to be moved to the front
        store.delete_run("big")
        assert store.usage().free_bytes > 100 * schema.PAGE_BYTES
        given = [store.shrink(1e9)]
        while part := store.shrink(1e9):
            given.append(part)
        assert given[0] == 16 * schema.PAGE_BYTES
        assert given[1] > given[0], "as long as it is fast, more at a time"
        assert sum(given) > 1_900_000
        assert store.usage().free_bytes == 0
        assert store.verify().ok


def plan_of(store: SQLiteStorage, call: Any) -> list[str]:
    """How SQLite finds what the statements of a call read or write."""
    statements: list[str] = []
    with store._beside("trace") as aside:
        for db in (store._db, aside):
            db.set_trace_callback(statements.append)
        call()
        for db in (store._db, aside):
            db.set_trace_callback(None)
    found = []
    for each in statements:
        if each.lstrip().split(" ", 1)[0].strip() in ("SELECT", "DELETE", "WITH", "UPDATE"):
            found += [row["detail"] for row in store._db.execute(f"EXPLAIN QUERY PLAN {each}")]
    return found


def test_no_statement_of_a_sweep_reads_a_whole_table(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        for number in range(3):
            ended(store, f"r{number}")
        Writer(store, "aged").write({"a": 1})
        policy = RetentionPolicy(keep_completed=1, keep_failed=1, max_total_bytes=1, max_age=timedelta(0))
        plan = plan_of(store, lambda: sweep(store, policy, limit=2, rest=lambda took, stop: None))
        assert any("runs_by_change" in step for step in plan)
        scans = [step for step in plan if step.startswith("SCAN")]
        allowed = ("retired", "family", "CONSTANT", "runs USING INDEX runs_by_change")
        assert [step for step in scans if not any(each in step for each in allowed)] == []


def test_a_sweep_does_not_make_a_file_that_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as store:
        ended(store, "r")
        for file in tmp_path.iterdir():
            file.unlink()
        with pytest.raises(StorageError, match="deleted or replaced"):
            store.sweep(RetentionPolicy(keep_completed=0))
        assert not path.exists()


def test_damaged_pins_keep_everything_and_are_reported(tmp_path: Path) -> None:
    with FileStorage(tmp_path) as store:
        writer = Writer(store)
        writer.write({"a": 1})
        store.pin("run_1", "ckpt_1")
        path = tmp_path / "pins" / "run_1.json"
        path.write_text(path.read_text().replace("ckpt_1", "ckpt_2"))
        writer.write({"a": 2}, retention=KEEP_ONE)
        accept(store, commit(3, state=RunState.COMPLETED))
        report = store.sweep(RetentionPolicy(keep_completed=0))
        assert report.runs == 0
        assert "checksum" in report.kept[0].why
        writer.states.append(writer.states[-1])
        writer.check(store, [1, 2, 3], "with damaged pins")
        assert [each.where for each in store.verify().damage] == ["pins of run run_1"]


# --- files of other versions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_file_is_swept_and_pinned(tmp_path: Path, version: int) -> None:
    path = tmp_path / "runs.db"
    with closing(schema.connect(path, 5)) as connection:
        schema.migrate(connection, str(path), schema.MIGRATIONS[:version])
        facts = ("run_1", "graph", "goal", "f1", None, 5.0, b"{}")
        connection.execute("INSERT INTO definitions VALUES ('f1', ?, ?)", (b"{}", schema.row_crc("f1", b"{}")))
        connection.execute(
            "INSERT INTO runs (run_id, executor_type, goal_id, fingerprint, header, header_crc, state, created_at, "
            "updated_at, token, lease_until, recovery_attempts) "
            "VALUES ('run_1', 'graph', 'goal', 'f1', ?, ?, 'completed', 5.0, 60.0, 3, 0, 0)",
            (b"{}", schema.row_crc(*facts)),
        )
        for sequence in (1, 2):
            body = commit(sequence).checkpoint
            assert body is not None
            log = commit(sequence).record
            connection.execute(
                "INSERT INTO steps VALUES (1, ?, ?, NULL, ?, NULL)",
                (sequence, log, schema.row_crc(sequence, log, None)),
            )
            name = f"ckpt_{sequence}"
            row = (sequence, name, body, schema.row_crc(sequence, name, body))
            connection.execute(
                "INSERT INTO checkpoints (run_pk, sequence, checkpoint_id, body, crc) VALUES (1, ?, ?, ?, ?)", row
            )
    with SQLiteStorage(path, clock=ManualClock(100.0)) as store:
        # Their age is not known; they are no younger than the run's last change.
        assert store.prune_older("run_1", 59.0) == 0
        store.pin("run_1", "ckpt_1")
        assert store.sweep(RetentionPolicy(max_age=timedelta(seconds=10))).kept[0].why == "a checkpoint of it is pinned"
        assert [pin.sequence for pin in store.list_pins()] == [1]
        store.unpin("run_1", "ckpt_1")
        assert store.prune_older("run_1", 61.0) == 1
        assert store.sweep(RetentionPolicy(max_age=timedelta(seconds=10))).runs == 1
        assert_no_orphans(store)


def test_a_file_that_cannot_shrink_is_made_to(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("CREATE TABLE other (x)")
        connection.execute("DROP TABLE other")
        connection.execute("VACUUM")
    with SQLiteStorage(path) as store:
        ended(store, "big", size=2_000_000)
        store.sweep(RetentionPolicy(keep_completed=0))
        usage = store.usage()
        assert (usage.can_shrink, usage.free_bytes > 1_900_000, store.shrink()) == (False, True, 0)
        assert store.compact() > 1_900_000
        ended(store, "again", size=2_000_000)
        assert store.usage().can_shrink
        assert store.sweep(RetentionPolicy(keep_completed=0)).given_back_bytes > 1_900_000
    assert path.stat().st_size < 1_000_000


# --- in the background ----------------------------------------------------------------------------------------------


def test_the_background_sweeps_and_stops() -> None:
    with MemoryStorage() as store:
        ended(store, "r1")
        swept = threading.Event()
        reports: list[SweepReport] = []

        def told(report: SweepReport) -> None:
            reports.append(report)
            if len(reports) == 2:
                swept.set()

        with start_sweeping(
            store, RetentionPolicy(keep_completed=0), every=0.01, chance=lambda: 0.0, on_sweep=told
        ) as sweeping:
            assert swept.wait(20)
        assert not sweeping._thread.is_alive()
        assert (reports[0].runs, reports[1].runs, store.find_run("r1")) == (1, 0, None)
        assert sweeping.last is not None
    with pytest.raises(ValueError, match="every"):
        start_sweeping(store, RetentionPolicy(), every=0)


def test_the_background_goes_on_after_an_error_and_ends_with_the_store(caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    class Broken(MemoryStorage):
        calls = 0

        def sweep(self, *args: Any, **options: Any) -> SweepReport:
            self.calls += 1
            if self.calls == 1:
                raise StorageError("the disk is full")
            failed.set()
            return SweepReport(over_bytes=5)

    store = Broken()
    sweeping = start_sweeping(store, RetentionPolicy(max_total_bytes=1), every=0.01, chance=lambda: 0.0)
    assert failed.wait(20)
    store.close()
    sweeping._thread.join(20)
    assert sweeping.stop()
    assert "the disk is full" in caplog.text
    assert "5 bytes more than max_total_bytes" in caplog.text


def test_a_purge_of_nothing_writes_nothing(durable: StorageUnderTest) -> None:
    store = durable.new()
    ended(store, "r")
    purge(store)
    usage = store.usage()
    assert store.sweep(RetentionPolicy(), now=5.0) == SweepReport(
        now=5.0, used_bytes_before=usage.used_bytes, used_bytes_after=usage.used_bytes
    )
