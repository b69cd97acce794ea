"""No space, or no right to write: a clear error, and what was committed before stays good and readable."""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path
from typing import Protocol

import pytest

from framework.storage.backend import FileStorage, Storage
from framework.storage.sqlite import SQLiteStorage


class Python(Protocol):
    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


BACKENDS = ["sqlite", "files"]

COMMON = """
import os, resource, signal, sys
from pathlib import Path
from framework.errors import StorageError
from framework.schemas.checkpoint import Checkpoint
from framework.storage.backend import FileStorage
from framework.storage.contract import commit, new_run
from framework.storage.chunks import Chunk
from framework.storage.records import Retention
from framework.storage.sqlite import SQLiteStorage

folder = Path(sys.argv[2])

def opened():
    return SQLiteStorage(folder / "runs.db") if sys.argv[1] == "sqlite" else FileStorage(folder)

def save(store, number, size=1_000):
    memory = {"n": number, "x": "x" * size}
    store.save_checkpoint(Checkpoint(id=f"c{number}", run_id="run_1", executor_type="graph", memory_snapshot=memory))

def newest(store):
    return store.load_latest_checkpoint("run_1").memory_snapshot["n"]
"""

FULL = (
    COMMON
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails, as on a full disk
store = opened()
for number in range(3):
    save(store, number)
other = opened()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
for attempt in range(3):
    try:
        save(store, 3, 3_000_000)
    except StorageError as error:
        assert "resume" in str(error) and "space" in str(error).lower(), error
        print(type(error).__name__)
    else:
        raise SystemExit("3 MB were stored in files of at most 1 MB")
    assert newest(store) == newest(other) == 2
    assert [entry.id for entry in store.list_checkpoints("run_1")] == ["c0", "c1", "c2"]
    assert store.verify().ok
good = commit(4, chunks=[Chunk("n", "set", b"4")])
too_large = commit(5, chunks=[Chunk("x", "set", b'"' + b"x" * 3_000_000 + b'"')])
try:
    outcomes = store.commit([good, too_large])
except StorageError:
    outcomes = [None if store.find_run("run_1").sequence == 4 else "lost", "refused"]
assert outcomes[1] is not None
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save(store, 9, 3_000_000)
assert newest(store) == newest(other) == 9
assert store.verify().ok and other.verify().ok
store.close(), other.close()
"""
)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_full_disk_is_reported_and_survived(name: str, tmp_path: Path, python: Python) -> None:
    assert python(FULL, name, tmp_path) == "StorageError\n" * 3
    store: Storage = SQLiteStorage(tmp_path / "runs.db") if name == "sqlite" else FileStorage(tmp_path)
    with store:
        assert store.verify().ok
        newest = store.load_latest_checkpoint("run_1")
        assert newest is not None
        assert newest.memory_snapshot["n"] == 9
    assert not list(tmp_path.rglob("*.tmp"))


FULL_FROM_THE_START = (
    COMMON
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    opened()
except StorageError as error:
    print(error)
"""
)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_store_that_cannot_be_made_says_why(name: str, tmp_path: Path, python: Python) -> None:
    assert "Free space" in python(FULL_FROM_THE_START, name, tmp_path)


READ_ONLY = (
    COMMON
    + """
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # nobody: for root no file is read-only
try:
    store = opened()
except StorageError as error:
    assert "write access" in str(error) or "may write" in str(error), error
    print("not opened")
    raise SystemExit
for action in (
    lambda: save(store, 9),
    lambda: store.claim_run("run_1", "me", 60),
    lambda: store.open_run(new_run("run_2")),
    lambda: store.delete_run("run_1"),
    lambda: store.prune("run_1", Retention(1)),
):
    try:
        action()
    except StorageError as error:
        assert "write access" in str(error), error
    else:
        raise SystemExit("a read-only store was written to")
assert newest(store) == 2
assert [entry.id for entry in store.list_checkpoints("run_1")] == ["c0", "c1", "c2"]
assert [record.run_id for record in store.list_runs()] == ["run_1"]
store.close()
print("readable")
"""
)

PREPARE = (
    COMMON
    + """
store = opened()
for number in range(3):
    save(store, number)
store.close()
"""
)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_read_only_store_is_reported_and_stays_good(name: str, python: Python) -> None:
    # Not below tmp_path, which only its owner may enter, and the reader may be nobody.
    folder = Path(tempfile.mkdtemp(prefix="surefoot-read-only-"))
    try:
        python(PREPARE, name, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        set_writable(folder, False)
        said = python(READ_ONLY, name, folder)
        assert said == ("readable\n" if name == "files" else "not opened\n")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        set_writable(folder, True)
        python(PREPARE.replace("range(3)", "range(3, 5)"), name, folder)
    finally:
        set_writable(folder, True)
        shutil.rmtree(folder)


def set_writable(folder: Path, writable: bool) -> None:
    """Give or take everybody's right to write below a folder."""
    for path in [folder, *folder.rglob("*")]:
        mode = path.stat().st_mode | stat.S_IROTH | stat.S_IRGRP
        if path.is_dir():
            mode |= stat.S_IXOTH | stat.S_IXGRP
        writing = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
        path.chmod(mode | stat.S_IWUSR if writable else mode & ~writing)
