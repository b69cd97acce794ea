"""The folder of a ``FileStorage``: where each thing of a run is, and who may use it now."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from framework.errors import CorruptData, RunBusy, RunNotFound, StorageError
from framework.storage.checks import check_id
from framework.storage.driver_errors import translate
from framework.storage.file_io import file_name
from framework.storage.file_locks import HeldLock, Patience, Want, try_lock
from framework.storage.file_records import after, holder_of, read_record, shown, write_record
from framework.storage.file_runs import RunFiles
from framework.storage.records import RunRecord

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How long a listing waits for a run that another process is at, before it goes by the files as they are."""

_CACHED_RUNS = 256
_EDITS = 0
"""Place of the mark in a run's lock that says whether commits or journal were changed."""


class Folder:
    """Paths, locks and records in a folder of runs. A run's files are used under its lock.

    Threads are kept apart by one lock of the store, other processes by lock files. A thread that has the store never
    waits for another process: it asks for all the lock files that it needs at once, and lets the store go until the
    next time it asks. Otherwise a process that is stopped in a write to one run would hold up the leases of all others.
    """

    def __init__(self, base_path: str | os.PathLike[str], clock: Callable[[], float], busy_seconds: float) -> None:
        self.base_path = Path(base_path)
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self.closed = False
        self._files: dict[str, RunFiles] = {}
        self._told: set[str] = set()  # runs that are held up, and were told of

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
    def _reading(self, doing: str) -> Iterator[None]:
        """The system's errors translated, without this thread alone in the store: to read files that are replaced as a
        whole, for as long as it takes."""
        if self.closed:
            raise StorageError(f"The store {self.base_path} is closed.")
        try:
            yield
        except OSError as error:
            raise translate(error, self.base_path, doing) from error

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """This thread alone in the store, with the system's errors translated. Never wait for others in it."""
        with self._lock, self._reading(doing):
            yield

    @contextmanager
    def _holding(
        self, doing: str, *wanted: Want, patience: float | None = None, anyway: bool = False
    ) -> Iterator[list[HeldLock]]:
        """This thread alone in the store with all these locks, waiting for them without either.

        Raises ``HeldUp`` when ``patience``, or else ``busy_seconds``, is over; ``anyway`` goes on without them then.
        """
        waiting = Patience(self._busy_seconds if patience is None else min(patience, self._busy_seconds))
        while True:
            with self._guard(doing), ExitStack() as held:
                locks: list[HeldLock] = []
                for want in wanted:
                    lock = try_lock(want)
                    if lock is None:
                        break
                    held.callback(lock.release)
                    locks.append(lock)
                else:
                    yield locks
                    return
            if not waiting.pause():
                break
        if not anyway:
            raise waiting.over(want)
        with self._guard(doing):
            yield [HeldLock(None, is_held_up=True) for _ in wanted]

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
        beside: Sequence[Want] = (),
        patience: float | None = None,
        anyway: bool = False,
    ) -> Iterator[RunFiles]:
        """A run's files, held against other threads and processes; ``edits`` for changing commits or journal.

        Unless it is ``new``, an unknown run has none to read (``shared``) and raises ``RunNotFound`` otherwise; nobody
        needs a lock file for each id that is asked for. The files are found anew when another process changed them
        since, when a change by this one failed, or when asked for (``anew``), for what nobody knew of: damage.
        ``beside`` are locks to hold as well; ``patience`` and ``anyway`` (for reading only) as of ``_holding``.
        """
        check_id(run_id)
        what = f"{doing} run {run_id!r}"
        with self._guard(what):
            if not new and not self._record_path(run_id).exists():
                if not shared:
                    raise RunNotFound(run_id)
                yield self._new_files(run_id)
                return
        wanted = [Want(self._lock_path(run_id), shared), *beside]
        with (
            self._holding(what, *wanted, patience=patience, anyway=anyway) as locks,
            self._opened(run_id, locks[0], edits=edits, anew=anew) as files,
        ):
            yield files

    @contextmanager
    def _opened(self, run_id: str, lock: HeldLock, *, edits: bool = False, anew: bool = False) -> Iterator[RunFiles]:
        """A run's files under its ``lock``; see ``_run_lock``."""
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
        with self._holding("use the indexes of", self._index(shared=shared)):
            yield

    def _index(self, *, shared: bool = False) -> Want:
        return Want(self.base_path / "locks" / "~indexes.lock", shared)

    def _definition(self, fingerprint: str, *, shared: bool = False) -> Want:
        """Held ``shared`` from looking for a definition until a record names it: it is not removed meanwhile."""
        return self._definition_of(file_name(fingerprint), shared=shared)

    def _definition_of(self, name: str, *, shared: bool = False) -> Want:
        return Want(self.base_path / "locks" / f"~definition-{name}.lock", shared)

    def _lock_path(self, run_id: str) -> Path:
        return self.base_path / "locks" / f"{file_name(run_id)}.lock"

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

    def _find(self, run_id: str, patience: float = LOOK_SECONDS) -> tuple[RunRecord | None, bool]:
        """A run as it is now, and whether another process has held it up for longer than ``patience``.

        Then it is read without its lock, as a crash at this moment would leave it, and shown as the process that is at
        it has it, even when the lease is over: nobody can claim it until that process goes on or ends.
        """
        with self._run_lock(run_id, "read", shared=True, patience=patience, anyway=True) as files:
            record = self._stored(files)
            if record is None:
                return None, False
            if not files.lock.is_held_up:
                self._told.discard(run_id)
                return self._shown(record), False
            if run_id not in self._told:
                self._told.add(run_id)
                logger.warning(
                    "Run %r is shown as its files say: another process has held %s for more than %g s. It is stopped, "
                    "or hangs in the middle of a write; the run goes on elsewhere once it has ended.",
                    run_id,
                    self._lock_path(run_id),
                    min(patience, self._busy_seconds),
                )
            return shown(record, record.owner), True

    def _current(self, run_ids: Iterable[str], *, free: bool = False) -> Iterator[RunRecord]:
        """These runs as they are now, without those that are gone or damaged, and those held up if ``free`` are asked.

        A listing waits for runs that are held up for about two seconds in all, however many there are.
        """
        patience = LOOK_SECONDS
        for run_id in run_ids:
            try:
                current, is_held_up = self._find(run_id, patience)
            except CorruptData as error:
                logger.warning("Listing runs: %s", error)
                continue
            if is_held_up:
                patience /= 2
            if current is not None and not (free and is_held_up):
                yield current

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
