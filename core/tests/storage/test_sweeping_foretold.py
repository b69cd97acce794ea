"""What a dry run says is what the sweep then does, also when it decides by size; and sizes are estimated well."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk
from framework.storage.contract import StorageUnderTest, Writer, accept, commit, new_run
from framework.storage.contract_retention import ended, ids
from framework.storage.interface import Storage
from framework.storage.retention_records import SweepReport
from framework.storage.sqlite import SQLiteStorage
from framework.storage.sweeping import COMPLETED, FAILED, sweep
from framework.testing import ManualClock


def both(store: Storage, policy: RetentionPolicy) -> SweepReport:
    """Sweep, and see that it did what a dry run had said."""

    def what(report: SweepReport) -> tuple[object, ...]:
        return report.runs, report.parts, report.checkpoints, report.removed, report.kept, report.rules

    foretold = sweep(store, policy, dry_run=True)
    done = sweep(store, policy, now=foretold.now, rest=lambda took, stop: None)
    assert what(done) == what(foretold)
    return done


def test_old_checkpoints_of_runs_that_stay_are_foretold(backend: StorageUnderTest) -> None:
    store = backend.new()
    for run_id in ("pinned checkpoint", "pinned run", "part stays", "gone"):
        writer = Writer(store, run_id)
        for number in range(5):
            writer.write({"a": number})
        accept(store, commit(6, run_id, state=RunState.COMPLETED))
    store.pin("pinned checkpoint", "ckpt_3")
    store.pin("pinned run")
    ended(store, "paused part", RunState.PAUSED, parent="part stays")
    store.open_run(new_run("part of gone", parent_run_id="gone"))
    for number in range(1, 4):
        accept(store, commit(number, "part of gone", state=RunState.FAILED))
    now = store.usage().now + 1_000
    policy = RetentionPolicy(max_age=timedelta(seconds=10))
    foretold = sweep(store, policy, now=now, dry_run=True)
    assert (foretold.runs, foretold.parts, foretold.checkpoints, foretold.kept_runs) == (1, 1, 4 + 5, 3)
    done = sweep(store, policy, now=now, rest=lambda took, stop: None)
    assert (done.runs, done.parts, done.checkpoints, done.kept_runs) == (1, 1, 4 + 5, 3)


def test_a_size_is_reached_as_foretold(backend: StorageUnderTest) -> None:
    store = backend.new()
    for number in range(9):
        ended(store, f"r{number}", size=100_000)
    whole, gone = store.usage().used_bytes, 0
    for part in (0.8, 0.4):
        done = both(store, RetentionPolicy(max_total_bytes=int(whole * part), keep_failed=0))
        assert list(done.rules.values()) == [done.runs]
        gone += done.runs
        assert sorted(ids(store.find_runs(""))) == [f"r{number}" for number in range(gone, 9)]
    assert 4 <= gone < 8


SHAPES = {
    "small values": (60, 20, 200),
    "1 KB": (40, 20, 1_000),
    "3 KB": (20, 20, 3_000),
    "50 KB": (20, 5, 50_000),
    "1 MB": (6, 2, 1_000_000),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sqlite_sizes_are_estimated_with_the_overhead_of_pages(shape: str, tmp_path: Path) -> None:
    runs, steps, size = SHAPES[shape]
    with SQLiteStorage(tmp_path / "runs.db", clock=ManualClock()) as store:
        store._db.execute("PRAGMA synchronous = OFF")
        empty = store.usage().used_bytes
        for number in range(runs):
            run_id = f"customer-onboarding-{number:06}"
            store.open_run(new_run(run_id))
            value = b'"%b"' % (b"x" * size)
            chunks = [[Chunk("messages", "set", value)] for _ in range(steps)]
            accept(store, *(commit(at, run_id, chunks=each) for at, each in enumerate(chunks, 1)))
            accept(store, commit(steps + 1, run_id, state=RunState.COMPLETED))
        used = store.usage().used_bytes - empty
        said = sum(each.bytes for each in store.retire_runs(store.list_ended(COMPLETED), COMPLETED, dry_run=True))
        assert 0.88 < said / used < 1.12, (said, used)


def test_a_long_look_tells_how_far_it_is_and_can_be_stopped(backend: StorageUnderTest) -> None:
    store = backend.new()
    for number in range(3):
        ended(store, f"r{number}")
    Writer(store, "aged").write({"a": 1})
    writer = Writer(store, "old")
    writer.write({"a": 1})
    writer.write({"a": 2})
    seen: list[tuple[int, int]] = []
    stop = threading.Event()
    policy = RetentionPolicy(keep_completed=1, max_age=timedelta(0))
    now = store.usage().now + 10
    report = sweep(
        store, policy, now=now, dry_run=True, on_progress=lambda each: seen.append((each.runs, each.checkpoints))
    )
    assert seen[-1] == (report.runs, report.checkpoints) == (3, 1)
    assert seen == sorted(seen)
    sweep(store, policy, now=now, dry_run=True, stop=stop, on_progress=lambda each: stop.set())
    report = sweep(store, policy, now=now, dry_run=True, stop=stop)
    assert (report.runs, report.complete) == (0, False)


def test_the_nth_newest_of_two_kinds_is_found_without_reading_the_others(tmp_path: Path) -> None:
    clock = ManualClock()
    with SQLiteStorage(tmp_path / "runs.db", clock=clock) as store:
        for number in range(8):
            ended(store, f"r{number}", RunState.CANCELLED if number % 3 else RunState.FAILED)
            clock.advance(1)
        ended(store, "part", RunState.FAILED, parent="r0")
        read: list[str] = []
        record = store._record

        def counted(row: object) -> object:
            read.append("")
            return record(row)  # type: ignore[arg-type]

        store._record = counted  # type: ignore[assignment, method-assign]
        found = [store.nth_newest_ended(FAILED, count) for count in range(1, 10)]
        assert [run and run.run_id for run in found] == [*(f"r{number}" for number in reversed(range(8))), None]
        assert len(read) == 8
        del store._record
        store._db.execute("UPDATE runs SET header_crc = 0 WHERE run_id = 'r5'")
        after_damage = store.nth_newest_ended(FAILED, 3)
        assert after_damage is not None
        assert after_damage.run_id == "r4"
