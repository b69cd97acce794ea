"""Power failures and torn writes: what was not synced is gone, partly there, or there, and in any order.

A worker is watched at its system calls. At each sync the file as it is then is remembered as durable, by its inode, and
at each sync of a folder the names in it. At a random call the power fails: the worker is killed, and the store is built
anew from what was durable, and, of what was not, a random part: per folder the names of before or after, per file the
bytes of before or after, or a mixture of both in sectors. Everything that was confirmed must be in it.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.bench import Case, Lab, look
from tests.faults.disks import is_stores
from tests.faults.ledger import Entry
from tests.faults.processes import run_apart
from tests.faults.syscalls import SYNCS, Call, Verdict, kill_at, run_watched
from tests.faults.work import WORKS

SECTOR_BYTES = 512
WAL_HEADER_BYTES = 32
MOST_LIVES = 5


@dataclass(slots=True)
class Disk:
    """What is durable of a folder, and the call at which the power fails."""

    folder: Path
    fails_at: int
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    """Open descriptors by inode: while one is open the number is given to no other file."""

    def __call__(self, call: Call) -> Verdict:
        if call.number >= self.fails_at:
            return "kill"
        if call.name in SYNCS and is_stores(call, str(self.folder)) and call.path is not None:
            self._synced(Path(call.path))
        return None

    def _synced(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(descriptor)
            if found.st_ino in self.held:
                os.close(descriptor)
            else:
                self.held[found.st_ino] = descriptor
            if stat.S_ISDIR(found.st_mode):
                self.names[found.st_ino] = _names(path)
            else:
                self.contents[found.st_ino] = path.read_bytes()
                # The systems that stores are used on keep a new file's name with its first sync.
                self.names.setdefault(path.parent.stat().st_ino, {})[path.name] = found.st_ino
        except FileNotFoundError:
            return  # "... (deleted)": a file that has no name any more

    def remember(self) -> None:
        """What a store holds when a life begins is durable."""
        for path in [self.folder, *self.folder.rglob("*")]:
            self._synced(path)

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)

    def after_failure(self, target: Path, rng: random.Random) -> None:
        """Build the folder as it could be found after the power has failed."""
        current = {path.stat().st_ino: path for path in [self.folder, *self.folder.rglob("*")]}
        self._build(self.folder.stat().st_ino, current, target, rng)

    def _build(self, inode: int, current: dict[int, Path], target: Path, rng: random.Random) -> None:
        target.mkdir()
        path = current.get(inode)
        durable = self.names.get(inode, {})
        latest = _names(path) if path is not None else durable
        for name in sorted({*durable, *latest}):
            # Each name by itself: a rename may have reached the disk, and one before it not.
            chosen = (latest if rng.random() < 0.5 else durable).get(name)
            if chosen is None:
                continue
            child = current.get(chosen)
            if chosen in self.names or (child is not None and child.is_dir()):
                self._build(chosen, current, target / name, rng)
            else:
                after = child.read_bytes() if child is not None else None
                (target / name).write_bytes(_torn(self.contents.get(chosen, b""), after, rng))


def _names(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


def _torn(before: bytes, after: bytes | None, rng: random.Random) -> bytes:
    """Some of the bytes that were written since the last sync."""
    if after is None or after == before:
        return before
    how = rng.randrange(4)
    if how < 2:
        return (before, after)[how]
    if how == 2:
        return after[: rng.randint(len(before), len(after))] if after.startswith(before) else before
    sectors = range(0, len(after), SECTOR_BYTES)
    if len(before) < len(after):
        before = before + bytes(len(after) - len(before))
    return b"".join((after if rng.random() < 0.5 else before)[at : at + SECTOR_BYTES] for at in sectors)


def fail_power(lab: Lab, backend: str, size: int) -> None:
    """``size`` power failures."""
    done = number = 0
    while done < size:
        number += 1
        folder = lab.folder / f"disk{number}"
        folder.mkdir()
        case = Case(lab, store_url(backend, folder), lab.rng.choice(WORKS), f"run-{number}")
        for life in range(MOST_LIVES):
            disk = Disk(folder, lab.rng.randint(1, 330))
            disk.remember()
            case.story.append(f"power fails at call {disk.fails_at}")
            worker, _ = run_watched(case.next_life().run, lab.errors, disk)
            case.take(worker.result())
            if not worker.killed:
                disk.close()
                break
            done += 1
            lab.kills += 1
            found = lab.folder / f"disk{number}-{life}"
            disk.after_failure(found, lab.rng)
            disk.close()
            shutil.rmtree(folder)
            folder = found
            case.url = store_url(backend, folder)
            case.check()
        case.finish()
        shutil.rmtree(folder)


def store_url(backend: str, folder: Path) -> str:
    return f"sqlite:///{folder}/runs.db" if backend == "sqlite" else f"file://{folder}"


# --- a file cut off at any length -----------------------------------------------------------------------------------


def cut_files(lab: Lab, backend: str, size: int) -> None:
    """``size`` times: the newest file of a killed worker's store cut off at some length.

    SQLite's log is found with all whole transactions before the cut; a file that was cut is reported. Each store that
    then says it is whole must let the run end as ever. What SQLite has begun to fold into its file it had synced
    before: no torn write takes that away, and the two would not fit together any more.
    """
    for number in range(size):
        folder = lab.folder / f"cut{number}"
        folder.mkdir()
        case = Case(lab, store_url(backend, folder), lab.rng.choice(WORKS), f"run-{number}")
        worker, _ = run_watched(case.next_life().run, lab.errors, kill_at(lab.rng.randint(20, 300)))
        case.take(worker.result())
        copy = lab.folder / f"cut{number}-whole"
        shutil.copytree(folder, copy)  # as looking at a store of SQLite empties its log
        whole = case.check(store_url(backend, copy)).log
        shutil.rmtree(copy)
        victim = folder / "runs.db-wal" if backend == "sqlite" else _newest(folder)
        whole_bytes = victim.stat().st_size if victim.exists() else 0
        least = _folded_in(folder) if backend == "sqlite" else 0
        if least:
            lab.notes["killed while it folded the log in"] += 1
        if whole_bytes > least:
            length = lab.rng.randrange(least, whole_bytes)
            os.truncate(victim, length)
            case.story.append(f"{victim.name} cut to {length} bytes")
            lab.notes["files cut"] += 1
            _check_cut(case, backend, whole)
        shutil.rmtree(folder)
        case.ledger.unlink(missing_ok=True)


def _folded_in(folder: Path) -> int:
    """How many bytes of SQLite's log a checkpoint has written to the file, or had begun to when the process died.

    The index of the log tells how many frames, in the field ``nBackfillAttempted`` (https://www.sqlite.org/walformat.html,
    2.1), and the log's header the size of a page.
    """
    log, index = folder / "runs.db-wal", folder / "runs.db-shm"
    if not index.exists() or not log.exists() or log.stat().st_size < WAL_HEADER_BYTES:
        return 0
    frames = int.from_bytes(index.read_bytes()[128:132], sys.byteorder)
    page = int.from_bytes(log.read_bytes()[8:12], "big")
    return WAL_HEADER_BYTES + frames * (24 + page) if frames else 0


def _newest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*.json") if path.is_file() and path.parent.name != "locks"]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=folder / "none.json")


def _check_cut(case: Case, backend: str, whole: list[Entry]) -> None:
    lab = case.lab
    lab.count += 1
    found = run_apart(lambda: _read_cut(case.url, case.run_id, case.work), lab.errors)
    if found["raised"] or found["damage"]:
        lab.notes["reported"] += 1
        if backend == "sqlite":
            case.fail(f"SQLite's log with its end missing is found damaged: {found}")
        return
    log = [Entry.from_json(each) for each in found["log"]]
    if log != whole[: len(log)]:
        case.fail("after the cut the log is not a beginning of what it was")
    # What was lost here had been synced: it runs again, and to the same end.
    case.ledger.unlink(missing_ok=True)
    case.log = []
    case.result = None
    case.finish()
    case.ledger.touch()


def _read_cut(url: str, run_id: str, work: str) -> dict[str, object]:
    try:
        return {"raised": None, **look(url, run_id, work)}
    except Exception as error:
        return {"raised": type(error).__name__, "damage": [str(error)], "log": []}
