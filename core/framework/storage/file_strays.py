"""Files of a ``FileStorage`` that nothing needs: of runs without a record, of writes that a crash cut short, and
damaged ones that were put aside."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from framework.storage.file_folder import LOOK_SECONDS, Folder
from framework.storage.file_io import STALE_SECONDS, sync_directory
from framework.storage.file_locks import HeldUp, Want
from framework.storage.file_sweep import RETIRED
from framework.storage.records import Stray

logger = logging.getLogger(__name__)

_FOLDERS = ("history", "checkpoints/by_run", "journal", "messages")
_PINS = "pins"
_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")
_QUIET_SECONDS = 60.0
_EVIDENCE = "it was put aside as damaged when a run went on without it, and may tell what happened"


class FindsStrays(Folder):
    """The part of ``FileStorage`` that finds and removes files nothing needs. A stray's name is its path below the
    store's folder."""

    def find_strays(self) -> list[Stray]:
        """See ``Storage``."""
        with self._reading("look for files of no run"):
            return [*self._without_record(), *self._loose_files()]

    def remove_stray(self, stray: Stray) -> bool:
        """See ``Storage``."""
        if stray not in self.find_strays():
            return False
        doing, path = f"remove {stray.name} from", self.base_path / stray.name
        is_of_run = path.is_dir() or path.parent.name == _PINS
        # Whoever accepts a run of this name holds this lock until its record is there.
        name = path.stem if path.parent.name == _PINS else path.name
        with self._holding(doing, *([self._lock_of(name)] if is_of_run else [])):
            if is_of_run and self._has_record(name):
                return False
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            sync_directory(path.parent)
            return True

    def _lock_of(self, name: str, *, shared: bool = False) -> Want:
        return Want(self.base_path / "locks" / f"{name}.lock", shared)

    def _has_record(self, name: str) -> bool:
        return (self.base_path / "executions" / f"{name}.json").exists()

    def _is_retired(self, name: str) -> bool:
        """Whether a sweep took the run away, and the next one removes what is left of it."""
        return (self.base_path / RETIRED / f"{name}.json").exists()

    def _without_record(self) -> Iterator[Stray]:
        for path, name in self._of_runs():
            if self._has_record(name) or self._is_retired(name):
                continue
            try:
                with self._holding("look for files of no run", self._lock_of(name, shared=True), patience=LOOK_SECONDS):
                    gone = not path.exists() or self._has_record(name)  # deleted, or accepted, meanwhile
            except HeldUp as error:
                logger.warning("Not counted among the files of no run, as somebody is at them: %s", error)
                continue
            if not gone:
                where = str(path.relative_to(self.base_path))
                yield Stray(where, "files of a run that has no record", harmless=_is_start(path))

    def _of_runs(self) -> Iterator[tuple[Path, str]]:
        """What is there of runs besides their records, and the names of the runs' files."""
        for folder in _FOLDERS:
            if (self.base_path / folder).is_dir():
                yield from ((path, path.name) for path in sorted((self.base_path / folder).iterdir()) if path.is_dir())
        yield from ((path, path.stem) for path in sorted((self.base_path / _PINS).glob("[!.]*.json")))

    def _loose_files(self) -> Iterator[Stray]:
        for directory, folders, names in os.walk(self.base_path):
            if Path(directory) == self.base_path and RETIRED in folders:
                folders.remove(RETIRED)  # on its way out already
            for each in sorted(names):
                path = Path(directory, each)
                name = str(path.relative_to(self.base_path))
                found = _TEMPORARY.fullmatch(each)
                if found is not None and _is_over(int(found[1]), path):
                    yield Stray(name, "a file whose writing was cut short", harmless=True)
                elif each.endswith(".damaged"):
                    yield Stray(name, "a damaged file that was put aside", safe=False, reason=_EVIDENCE, harmless=True)


def _is_start(path: Path) -> bool:
    """Whether a folder holds no more than a crash in the middle of accepting or deleting a run leaves."""
    return path.parent.name != "history" or {each.name for each in path.iterdir()} <= {"0.json"}


def _is_over(pid: int, path: Path) -> bool:
    """Whether a temporary file is nobody's work in progress: its process is gone for a while, or it is old.

    A process of another container has a number that says nothing here, so a young file is left alone in any case.
    """
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if age < _QUIET_SECONDS:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return age > STALE_SECONDS
    return age > STALE_SECONDS
