"""A process that is stopped in the middle of a write: the others get a clear error in time, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from framework.errors import StorageError
from framework.schemas.run import Run, RunState
from framework.storage.backend import FileStorage, Storage
from framework.storage.contract import Writer, accept, commit
from framework.storage.ownership import is_alive
from framework.storage.sqlite import SQLiteStorage
from tests.storage.conftest import CORE

BUSY_SECONDS = 0.1
OPENERS: dict[str, Callable[[Path], Storage]] = {
    "sqlite": lambda folder: SQLiteStorage(folder / "runs.db", busy_seconds=BUSY_SECONDS),
    "files": lambda folder: FileStorage(folder / "runs", busy_seconds=BUSY_SECONDS),
}

_STOPS = """
import os, signal, sys
from framework.storage.backend import open_storage
from framework.storage.contract import accept, commit
from framework.storage.ownership import new_owner
from framework.testing import install_fault

store = open_storage(sys.argv[1])
token = store.claim_run("run_1", new_owner(), 600).token
accept(store, commit(2, token=token))
install_fault("commit.inside", action=lambda: os.kill(os.getpid(), signal.SIGSTOP))
accept(store, commit(3, token=token))
print("done", flush=True)
"""


@pytest.fixture(params=sorted(OPENERS))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A store with two runs of one commit each, which waits for others for a moment only."""
    with OPENERS[request.param](tmp_path) as opened:
        for run_id in ("run_1", "run_2"):
            Writer(opened, run_id).write({"a": 1})
        yield opened


@contextmanager
def stopped_inside_a_commit(store: Storage) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns run_1 and stands still while it makes its third commit."""
    command = [sys.executable, "-c", _STOPS, store.url]
    environment = {**os.environ, "PYTHONPATH": str(CORE)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "it ended before it could be stopped"
            yield process
        finally:
            process.kill()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return str(caught.value)


def test_others_get_a_clear_error_and_take_over_once_it_is_ended(store: Storage) -> None:
    with stopped_inside_a_commit(store) as process:
        said = refused(lambda: store.claim_run("run_1", "me", 60, is_alive))
        assert "nother process" in said
        assert "end" in said
        assert str(getattr(store, "path", None) or getattr(store, "base_path", None)) in said
        if isinstance(store, SQLiteStorage):
            # One writer at a time for the whole file; who only reads is not held up.
            assert "busy_seconds" in refused(lambda: store.commit([commit(2, "run_2")]))
            assert [row.sequence for row in store.read_log("run_1")] == [1, 2]
            assert [run.run_id for run in store.list_runs()] == ["run_2", "run_1"]
        else:
            accept(store, commit(2, "run_2"))
            store.save_run(Run(id="run_2", goal_id="g"))
        process.kill()
        process.wait()
        claimed = store.claim_run("run_1", "me", 60, is_alive)
    assert (claimed.state, claimed.token) == (RunState.CRASHED, 2)
    # Files may have the last commit already, and then the whole of it.
    assert claimed.sequence in ((2,) if isinstance(store, SQLiteStorage) else (2, 3))
    accept(store, commit(claimed.sequence + 1, token=claimed.token))
    assert store.verify().ok


@pytest.mark.slow
def test_it_goes_on_where_it_stood(store: Storage) -> None:
    with stopped_inside_a_commit(store) as process:
        refused(lambda: store.claim_run("run_1", "me", 60, is_alive))
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
        assert process.wait() == 0
        run = store.find_run("run_1")
    assert run is not None
    assert (run.sequence, run.token) == (3, 1)
    assert store.verify().ok
