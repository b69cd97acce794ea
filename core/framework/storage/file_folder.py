"""The folder of a ``FileStorage``: where each thing of a run is, and who may use it now."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from framework.errors import CorruptData, RunBusy, RunNotFound, StorageError
from framework.storage.checks import check_id
from framework.storage.driver_errors import translate
from framework.storage.file_io import file_name, locked
from framework.storage.file_records import after, holder_of, read_record, shown, write_record
from framework.storage.file_runs import RunFiles
from framework.storage.records import RunRecord

_CACHED_RUNS = 256
_EDITS = 0
"""Place of the mark in a run's lock that says whether commits or journal were changed."""


class Folder:
    """Paths, locks and records in a folder of runs. A run's files are used under its lock."""

    def __init__(self, base_path: str | os.PathLike[str], clock: Callable[[], float], busy_seconds: float) -> None:
        self.base_path = Path(base_path)
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self.closed = False
        self._files: dict[str, RunFiles] = {}

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._files.clear()

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self, child: bool) -> None:
        self._lock.release()

    # --- locks and paths ----------------------------------------------------------------------------------------

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """This thread alone in the store, with the system's errors translated."""
        with self._lock:
            if self.closed:
                raise StorageError(f"The store {self.base_path} is closed.")
            try:
                yield
            except OSError as error:
                raise translate(error, self.base_path, doing) from error

    @contextmanager
    def _run_lock(
        self,
        run_id: str,
        doing: str,
        *,
        shared: bool = False,
        new: bool = False,
        edits: bool = False,
        anew: bool = False,
    ) -> Iterator[RunFiles]:
        """A run's files, held against other threads and processes; ``edits`` for changing commits or journal.

        Unless it is ``new``, an unknown run has none to read (``shared``) and raises ``RunNotFound`` otherwise; nobody
        needs a lock file for each id that is asked for. The files are found anew when another process changed them
        since, when a change by this one failed, or when asked for (``anew``), for what nobody knew of: damage.
        """
        name = file_name(check_id(run_id))
        with self._guard(f"{doing} run {run_id!r}"):
            if not new and not self._record_path(run_id).exists():
                if not shared:
                    raise RunNotFound(run_id)
                yield self._new_files(run_id)
                return
            path = self.base_path / "locks" / f"{name}.lock"
            with locked(path, shared=shared, busy_seconds=self._busy_seconds) as lock:
                files = self._files.pop(run_id, None) or self._new_files(run_id)
                if len(self._files) >= _CACHED_RUNS:
                    del self._files[next(iter(self._files))]
                self._files[run_id] = files
                files.lock = lock
                mark, known = lock.mark(_EDITS), files.mark
                files.mark = None  # not known to be true while it is being changed, nor when that fails
                if mark is None or mark != known:
                    files.journal.forget()
                if anew or mark is None or mark != known:
                    files.refresh()
                # Before anything is changed, so that a kill in the middle of it is seen as a change as well.
                mark = lock.new_mark(_EDITS) if edits else mark
                if not edits:
                    files.mark = mark
                yield files
                if edits and not files.doubtful:
                    files.mark = mark
                files.doubtful = False

    def _new_files(self, run_id: str) -> RunFiles:
        return RunFiles(
            run_id,
            checkpoints=self._checkpoints(run_id),
            history=self._history(run_id),
            journal=self._journal(run_id),
            messages=self._messages(run_id),
        )

    @contextmanager
    def _index_lock(self, *, shared: bool = False) -> Iterator[None]:
        path = self.base_path / "locks" / "~indexes.lock"
        with self._guard("use the indexes of"), locked(path, shared=shared, busy_seconds=self._busy_seconds):
            yield

    @contextmanager
    def _definition_lock(self, *, shared: bool = False) -> Iterator[None]:
        """Held ``shared`` from looking for a definition until a record names it: none is removed meanwhile."""
        path = self.base_path / "locks" / "~definitions.lock"
        with self._guard("use the definitions of"), locked(path, shared=shared, busy_seconds=self._busy_seconds):
            yield

    def _record_path(self, run_id: str) -> Path:
        return self.base_path / "executions" / f"{file_name(run_id)}.json"

    def _checkpoints(self, run_id: str) -> Path:
        return self.base_path / "checkpoints" / "by_run" / file_name(run_id)

    def _history(self, run_id: str) -> Path:
        return self.base_path / "history" / file_name(run_id)

    def _messages(self, run_id: str) -> Path:
        return self.base_path / "messages" / file_name(run_id)

    def _journal(self, run_id: str) -> Path:
        return self.base_path / "journal" / file_name(run_id)

    def _pointer(self, run_id: str) -> Path:
        return self.base_path / "checkpoint_indexes" / f"latest_{file_name(run_id)}.txt"

    def _definition_path(self, fingerprint: str) -> Path:
        return self.base_path / "definitions" / f"{file_name(fingerprint)}.json"

    # --- run records --------------------------------------------------------------------------------------------

    def _read_record(self, path: Path) -> RunRecord | None:
        record = read_record(path)
        if record is not None and self._record_path(record.run_id) != path:
            raise CorruptData(f"{path} was renamed or copied: it is the record of run {record.run_id!r}.")
        return record

    def _stored(self, files: RunFiles) -> RunRecord | None:
        """The record with what commits newer than it changed: the run as it is stored."""
        record = self._read_record(self._record_path(files.run_id))
        if record is None:
            return None
        for entry in files.after(record.sequence):
            record = after(record, entry)
        return record

    def _write_record(self, record: RunRecord) -> None:
        write_record(self._record_path(record.run_id), record)

    def _shown(self, record: RunRecord, *, gone: bool = False) -> RunRecord:
        return shown(record, None if gone else holder_of(record, self._clock()))

    def _known(self, files: RunFiles) -> RunRecord:
        record = self._stored(files)
        if record is None:
            raise RunNotFound(files.run_id)
        return record

    def _refuse_if_held(self, record: RunRecord) -> None:
        now = self._clock()
        holder = holder_of(record, now)
        if holder is not None:
            raise RunBusy(record.run_id, holder, record.lease_until - now)
