"""A process that is stopped with a lock of a ``FileStorage``: whoever wants something else does not wait for it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from framework.errors import StorageError
from framework.graph.recovery import recoverable_runs
from framework.schemas.run import Run, RunState
from framework.storage import file_folder
from framework.storage.backend import FileStorage
from framework.storage.contract import accept, commit, new_run
from framework.storage.file_locks import Patience
from framework.storage.heartbeat import Heartbeat, Held

SOON = 20.0
A_MOMENT = 0.02
FIRST = commit(2, "new", state=RunState.PAUSED)

_HOLDS = """
import fcntl, os, signal, sys
files = [open(path, "a") for path in sys.argv[2:]]
for file in files:
    fcntl.flock(file, int(sys.argv[1]))
os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextmanager
def stopped_with(store: FileStorage, *names: str, shared: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that stands still with these locks; it ends when the block does, or when it is killed before."""
    paths = [str(store.base_path / "locks" / f"{name}.lock") for name in names]
    kind = "1" if shared else "2"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", _HOLDS, kind, *paths]) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "it ended before it could be stopped"
            yield process
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with the runs ``a`` and ``b``, each owned (token 1), one commit in, a checkpoint each."""
    with FileStorage(tmp_path / "store") as store:
        for run_id in ("a", "b"):
            store.open_run(new_run(run_id), f"owner of {run_id}", 60)
            accept(store, commit(1, run_id, token=1))
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[FileStorage]:
    with FileStorage(folder) as opened:
        yield opened


@pytest.fixture
def hasty(folder: Path) -> Iterator[FileStorage]:
    """The store, waiting for others for a moment only."""
    with FileStorage(folder, busy_seconds=A_MOMENT) as opened:
        yield opened


WAITS: dict[str, tuple[str, Callable[[FileStorage], object]]] = {
    "find": ("a", lambda store: store.find_run("a")),
    "list": ("a", lambda store: store.list_runs()),
    "claim": ("a", lambda store: store.claim_run("a", "me", 60, lambda owner: False)),
    "renew": ("a", lambda store: store.renew_lease("a", 1, 60)),
    "commit": ("a", lambda store: store.commit([commit(2, "a", token=1)])),
    "send": ("a", lambda store: store.send("a", "name", b"1")),
    "fork of it": ("a", lambda store: store.fork_run("a", 1, b"{}", FIRST)),
    "fork to it": ("new", lambda store: store.fork_run("a", 1, b"{}", FIRST)),
    "accept": ("new", lambda store: store.open_run(new_run("new"))),
    "accept its definition": ("~definition-d", lambda store: store.open_run(new_run("new", fingerprint="d"))),
    "owner's document": ("~indexes", lambda store: store.save_run(Run(id="a", goal_id="g"), 1)),
    "document": ("~indexes", lambda store: store.save_run(Run(id="a", goal_id="g"))),
    "list documents": ("~indexes", lambda store: store.list_all_runs()),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_lease_is_renewed_while_a_thread_waits_for_another_process(
    what: str, store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wait = WAITS[what]
    monkeypatch.setattr(file_folder, "LOOK_SECONDS", SOON)
    waits = threading.Event()

    class Watched(Patience):
        def __init__(self, seconds: float) -> None:
            super().__init__(SOON)

        def pause(self) -> bool:
            waits.set()
            return super().pause()

    monkeypatch.setattr(file_folder, "Patience", Watched)
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(wait(store)))
    with stopped_with(store, name) as process:
        thread.start()
        assert waits.wait(SOON)
        store.renew_lease("b", 1, 3600)
        assert not done, "it waits for the other process yet"
        assert thread.is_alive()
        process.kill()
        thread.join(SOON)
    assert len(done) == 1, "the lock went with the process"
    found = store.find_run("b")
    assert found is not None
    assert found.lease_until > time.time() + 1800


def test_many_leases_are_renewed_but_for_the_one_that_is_held_up(hasty: FileStorage) -> None:
    lost: list[str] = []
    beat = Heartbeat(lambda: hasty)
    now = time.monotonic()
    for run_id in ("a", "b"):
        beat.held[run_id] = Held(1, 3600.0, now, now, on_lost=lambda error: lost.append(error.run_id))
    with stopped_with(hasty, "a"):
        beat._renew(hasty, 3600.0, list(beat.held.items()))
        assert beat.is_assured("b", 1)
        assert not beat.is_assured("a", 1)
        assert now < beat.held["a"].due < beat.held["b"].due, "it is tried again soon"
    assert [type(each) for each in hasty.renew_leases([("a", 1), ("b", 2)], 60)] != [type(None)] * 2
    beat._renew(hasty, 3600.0, list(beat.held.items()))
    assert beat.is_assured("a", 1)
    assert not lost


def test_listings_show_a_run_that_is_held_up_as_its_files_say(
    hasty: FileStorage, caplog: pytest.LogCaptureFixture
) -> None:
    hasty.release_lease("a", 1)
    hasty.release_lease("b", 1)
    for run_id in ("a", "b"):
        hasty.claim_run(run_id, f"{os.uname().nodename}:{os.getpid()}", 0)  # a lease that is over
    with stopped_with(hasty, "a"), caplog.at_level(logging.WARNING):
        shown = {run.run_id: run.state for run in hasty.list_runs()}
        assert shown == {"a": RunState.RUNNING, "b": RunState.CRASHED}, "nobody can claim a now"
        assert [run.run_id for run in hasty.list_runs([RunState.CRASHED])] == ["b"]
        assert [run.run_id for run in hasty.find_runs("")] == ["a", "b"]
        assert [run.run_id for run in recoverable_runs(hasty)] == ["b"]
        assert hasty.claim_run("b", "me", 60).token == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "once for all looks"
    assert "Run 'a'" in said[0]
    assert "stopped" in said[0]
    assert [run.run_id for run in recoverable_runs(hasty)] == ["a"]


def test_a_run_to_wake_is_found_once_it_can_be_claimed(hasty: FileStorage) -> None:
    for run_id in ("a", "b"):
        hasty.send(run_id, "signal:go", b"1")
        accept(hasty, commit(2, run_id, token=1, state=RunState.PAUSED, wake_at=1.0, release=True))
    with stopped_with(hasty, "a"):
        assert [run.run_id for run in hasty.list_due()] == ["b"]
        assert [run.run_id for run in hasty.list_messaged()] == ["b"]
        assert [run.run_id for run in recoverable_runs(hasty)] == ["b"]
        assert [message.name for message in hasty.read_messages("a")] == ["signal:go"]
    assert [run.run_id for run in hasty.list_due()] == ["a", "b"]
    assert [run.run_id for run in hasty.list_messaged()] == ["a", "b"]


@pytest.mark.parametrize("knows", [True, False])
def test_a_commit_counts_though_its_writer_was_stopped_before_the_record(
    knows: bool, hasty: FileStorage, folder: Path
) -> None:
    path = folder / "executions" / "a.json"
    if knows:
        assert hasty.find_run("a") is not None
    with FileStorage(folder) as other:
        before = path.read_bytes()
        accept(other, commit(2, "a", token=1, state=RunState.COMPLETED, release=True))
    path.write_bytes(before)
    with stopped_with(hasty, "a"):
        found = hasty.find_run("a")
        assert found is not None
        assert (found.sequence, found.state) == (2, RunState.COMPLETED)
    # What was read without the lock is looked at again with it.
    with FileStorage(folder) as other:
        accept(other, commit(3, "a", error="late", state=RunState.FAILED))
    found = hasty.find_run("a")
    assert found is not None
    assert (found.sequence, found.state) == (3, RunState.FAILED)


def test_a_listing_waits_for_all_runs_that_are_held_up_no_longer_than_for_two(
    store: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    class Short(Patience):
        def __init__(self, seconds: float) -> None:
            waited.append(seconds)
            super().__init__(0.0)

    names = [f"run_{number}" for number in range(8)]
    for name in names:
        store.open_run(new_run(name))
    monkeypatch.setattr(file_folder, "Patience", Short)
    with stopped_with(store, *names):
        assert len(store.list_runs()) == 10
    assert len(waited) == 10
    assert sum(sorted(waited)[:-2]) <= file_folder.LOOK_SECONDS * 2


def test_what_would_write_says_who_is_in_the_way(hasty: FileStorage) -> None:
    with stopped_with(hasty, "a"), pytest.raises(StorageError, match=r"Another process has held .*a\.lock .*stopped"):
        hasty.claim_run("a", "me", 60, lambda owner: False)
    with stopped_with(hasty, "a", shared=True):
        assert [row.sequence for row in hasty.read_log("a")] == [1]
        with pytest.raises(StorageError, match="always another process that reads under") as caught:
            hasty.claim_run("a", "me", 60, lambda owner: False)
    assert "Another process has held" not in str(caught.value)


def test_files_that_somebody_is_at_are_no_strays(hasty: FileStorage, caplog: pytest.LogCaptureFixture) -> None:
    (hasty.base_path / "history" / "new").mkdir()
    with stopped_with(hasty, "new"):
        assert hasty.find_strays() == []
    assert "somebody is at them" in caplog.text
    assert [stray.name for stray in hasty.find_strays()] == ["history/new"]


def test_a_sweep_leaves_a_run_that_is_held_up(hasty: FileStorage) -> None:
    for run_id in ("a", "b"):
        accept(hasty, commit(2, run_id, token=1, state=RunState.COMPLETED, release=True))
    ended: Sequence[RunState] = [RunState.COMPLETED]
    runs = hasty.list_ended(ended)
    with stopped_with(hasty, "a"):
        kept = {run.run_id: one.kept for run, one in zip(runs, hasty.retire_runs(runs, ended, 10.0), strict=True)}
    assert kept["b"] == ""
    assert "another process is at it" in kept["a"]
