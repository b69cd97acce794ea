"""``FileStorage``: runs as readable JSON files in a folder, for looking into and for debugging.

Below the folder: ``runs/``, ``summaries/``, ``indexes/`` (``Run`` documents, see ``file_documents``), and per run
``executions/<run>.json`` (record and lease), ``checkpoints/by_run/<run>/`` and ``history/<run>/`` (commits, see
``file_commits``), ``journal/<run>/`` (``file_journal``), ``messages/<run>/`` (``file_messages``),
``checkpoint_indexes/latest_<run>.txt`` (the newest checkpoint's id, for people; nothing relies on it),
``definitions/`` (kept, as runs share them) and ``locks/``.

A commit is one file put in its place by one rename: that is the moment it happens. What follows, such as the record's
new state and retention, is derived from it again if a crash comes first: commits newer than the record say what it
lacks. Locks are ``flock`` on local file systems; use one machine.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from framework import _faults
from framework.errors import (
    CommitConflict,
    CorruptData,
    LeaseLost,
    MessageRefused,
    RunBusy,
    RunExists,
    RunNotFound,
    StorageError,
    SurefootError,
)
from framework.schemas.run import Run, RunState
from framework.storage import file_definitions, file_forks, file_journal, file_messages, forks
from framework.storage.checks import (
    MAX_KEY,
    check_fork,
    check_id,
    check_new_run,
    check_prefix,
    check_step,
    check_value,
    journal_refusal,
    moved_on,
    printable,
    refusal,
)
from framework.storage.chunks import Chunk
from framework.storage.documents import FindsDocuments, Index
from framework.storage.driver_errors import translate
from framework.storage.file_commits import CommitFile, Entry, RunFiles, checkpoint_row, read_row
from framework.storage.file_documents import INDEXES, RunDocuments
from framework.storage.file_io import (
    dump_checked,
    file_name,
    load_checked,
    locked,
    make_directory,
    remove_stale,
    write_atomic,
)
from framework.storage.file_records import (
    after,
    age,
    forked_record,
    holder_of,
    new_record,
    read_record,
    shown,
    write_record,
)
from framework.storage.interface import IsAlive, Storage
from framework.storage.records import (
    CheckpointRow,
    Commit,
    Damage,
    JournalRow,
    JournalWrite,
    LogRow,
    Message,
    NewRun,
    Retention,
    RunRecord,
    VerifyReport,
    Write,
)
from framework.storage.verify import newest_readable, verify_run

logger = logging.getLogger(__name__)

_CACHED_RUNS = 256


class FileStorage(FindsDocuments, Storage):
    """A store in a folder, for any number of processes on one machine. The folder is made when missing.

    ``clock`` gives seconds since the epoch, for leases and times; the order of commits never depends on it.
    """

    def __init__(self, base_path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.base_path = Path(base_path)
        self._clock = clock
        self._lock = threading.RLock()
        self.closed = False
        self._files: dict[str, RunFiles] = {}
        self._documents = RunDocuments(self.base_path, self._index_lock)
        folders = ["runs", "summaries", "checkpoints/by_run", "checkpoint_indexes", "history", "executions"]
        folders += ["definitions", "locks", *(f"indexes/{index}" for index in INDEXES)]
        with self._guard("open it"):
            for folder in folders:
                make_directory(self.base_path / folder)
            marker = self.base_path / "store.json"
            if marker.exists():
                load_checked(marker)  # raises StoreTooNew
            else:
                write_atomic(marker, dump_checked({"about": "A store of surefoot; see framework.storage.files."}))
            remove_stale(self.base_path)
            self._documents.adopt()
        forks.register(self)

    @property
    def url(self) -> str:
        return f"file://{quote(str(self.base_path.absolute()))}"

    def get_stats(self) -> dict[str, int | str]:
        return {**super().get_stats(), "storage_path": str(self.base_path)}

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
    def _run_lock(self, run_id: str, doing: str, *, shared: bool = False, new: bool = False) -> Iterator[RunFiles]:
        """A run's files, found anew and held against other threads and processes.

        Unless it is ``new``, an unknown run has none to read (``shared``) and raises ``RunNotFound`` otherwise; nobody
        needs a lock file for each id that is asked for.
        """
        name = file_name(check_id(run_id))
        with self._guard(f"{doing} run {run_id!r}"):
            if not new and not self._record_path(run_id).exists():
                if not shared:
                    raise RunNotFound(run_id)
                yield RunFiles(run_id, self._checkpoints(run_id), self._history(run_id))
                return
            with locked(self.base_path / "locks" / f"{name}.lock", shared=shared):
                files = self._files.pop(run_id, None)
                if files is None:
                    files = RunFiles(run_id, self._checkpoints(run_id), self._history(run_id))
                    if len(self._files) >= _CACHED_RUNS:
                        del self._files[next(iter(self._files))]
                self._files[run_id] = files
                files.refresh()
                yield files

    @contextmanager
    def _index_lock(self, *, shared: bool = False) -> Iterator[None]:
        with self._guard("use the indexes of"), locked(self.base_path / "locks" / "~indexes.lock", shared=shared):
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
        for sequence in sorted(sequence for sequence in files.commits if sequence > record.sequence):
            record = after(record, files.commits[sequence])
        return record

    def _write_record(self, record: RunRecord) -> None:
        write_record(self._record_path(record.run_id), record)

    def _shown(self, record: RunRecord, *, gone: bool = False) -> RunRecord:
        return shown(record, None if gone else holder_of(record, self._clock()))

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        with self._run_lock(new.run_id, "record", new=True) as files:
            if self._record_path(new.run_id).exists():
                raise RunExists(new.run_id)
            now = self._clock()
            record = new_record(new, now, owner, lease_seconds)
            self._clear(files)  # what a crash while deleting an earlier run of this id left
            file_definitions.keep(self._definition_path(new.fingerprint), new.fingerprint, new.definition)
            make_directory(files.history)
            initial = CommitFile(
                run_id=new.run_id,
                sequence=0,
                at=now,
                record=b"null",
                log=None,
                checkpoint_id=None,
                checkpoint=None,
                chunks=tuple(new.chunks),
                reach=files.reach_after(0, new.chunks),
            )
            write_atomic(files.history_path(0), initial.to_bytes())
            self._write_record(record)
            return self._shown(record)

    def find_run(self, run_id: str) -> RunRecord | None:
        with self._run_lock(run_id, "read", shared=True) as files:
            record = self._stored(files)
            return None if record is None else self._shown(record)

    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        check_id(owner, "owner", MAX_KEY)
        with self._run_lock(run_id, "claim") as files:
            stored = self._known(files)
            found = self._shown(stored)
            if found.state is RunState.COMPLETED:
                return found
            now = self._clock()
            holder = holder_of(stored, now)
            if holder is not None:
                if is_alive is None or is_alive(holder) is not False:
                    raise RunBusy(run_id, holder, stored.lease_until - now)
                found = self._shown(stored, gone=True)
            if sequence is not None and stored.sequence != sequence:
                raise moved_on(stored, sequence)
            claimed = replace(
                stored,
                owner=owner,
                token=stored.token + 1,
                lease_until=now + lease_seconds,
                state=RunState.RUNNING,
                wake_at=None,
                recovery_attempts=stored.recovery_attempts + 1 if found.state is RunState.CRASHED else 0,
                updated_at=now,
            )
            self._write_record(claimed)
            return replace(claimed, state=found.state, error=found.error)

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        with self._run_lock(run_id, "renew the lease of") as files:
            stored = self._known(files)
            if stored.token != token or stored.owner is None:
                raise LeaseLost(run_id, token)
            self._write_record(replace(stored, lease_until=self._clock() + lease_seconds))

    def release_lease(self, run_id: str, token: int) -> None:
        with suppress(RunNotFound), self._run_lock(run_id, "release the lease of") as files:
            stored = self._stored(files)
            if stored is not None and stored.token == token and stored.owner is not None:
                self._write_record(replace(stored, owner=None, lease_until=0.0))

    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        current = self._current(record.run_id for record in self._records())
        found = [record for record in current if states is None or record.state in states]
        found.sort(key=age, reverse=True)
        if before is not None:
            found = [record for record in found if age(record) < age(before)]
        return found[:limit]

    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        check_prefix(prefix)
        matching = sorted(record.run_id for record in self._records() if record.run_id.startswith(prefix))
        return list(islice(self._current(matching), limit))

    def list_due(self, now: float | None = None, limit: int = 100) -> list[RunRecord]:
        latest = self._clock() if now is None else now
        current = self._current(record.run_id for record in self._records())
        due = [
            (record.wake_at, record.run_id, record)
            for record in current
            if record.state is RunState.PAUSED and record.wake_at is not None and record.wake_at <= latest
        ]
        return [record for _, _, record in sorted(due, key=lambda each: each[:2])[:limit]]

    def _current(self, run_ids: Iterable[str]) -> Iterator[RunRecord]:
        """These runs as they are now, without those that are gone or damaged."""
        for run_id in run_ids:
            try:
                current = self.find_run(run_id)
            except CorruptData as error:
                logger.warning("Listing runs: %s", error)
                continue
            if current is not None:
                yield current

    def _records(self, on_damage: Callable[[Damage], None] | None = None) -> list[RunRecord]:
        """The readable records as they are in their files, oldest first."""
        found = []
        with self._guard("list its runs"):
            for path in (self.base_path / "executions").glob("[!.]*.json"):
                try:
                    record = self._read_record(path)
                except CorruptData as error:
                    logger.warning("Listing runs: %s", error)
                    if on_damage is not None:
                        on_damage(Damage("", None, str(path), str(error)))
                    continue
                if record is not None:
                    found.append(record)
        return sorted(found, key=age)

    def delete_run(self, run_id: str) -> bool:
        with self._run_lock(run_id, "delete", new=True) as files:
            path = self._record_path(run_id)
            existed = path.exists()
            try:
                stored = self._stored(files)
            except CorruptData as error:
                logger.warning("Deleting a run whose record cannot be read: %s", error)
            else:
                if stored is not None:
                    self._refuse_if_held(stored)
            path.unlink(missing_ok=True)  # from here on there is no such run
            self._clear(files)
            self._files.pop(run_id, None)
            (self.base_path / "locks" / f"{file_name(run_id)}.lock").unlink(missing_ok=True)
        had_document = self._documents.delete(run_id)
        return existed or had_document

    def _clear(self, files: RunFiles) -> None:
        self._pointer(files.run_id).unlink(missing_ok=True)
        for folder in (files.checkpoints, files.history, self._messages(files.run_id), self._journal(files.run_id)):
            if folder.exists():
                shutil.rmtree(folder)
        files.refresh()

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

    # --- messages -----------------------------------------------------------------------------------------------

    def send(self, run_id: str, name: str, body: bytes) -> None:
        check_id(name, "message name", MAX_KEY)
        check_value(body, f"Message {name!r}")
        with self._run_lock(run_id, "send a message to") as files:
            if self._known(files).state is RunState.COMPLETED:
                raise MessageRefused(run_id, name, "the run is completed.")
            file_messages.leave(self._messages(run_id), Message(run_id, name, bytes(body), self._clock()))

    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        with self._run_lock(run_id, "read the messages of", shared=True):
            if not self._record_path(run_id).exists():
                return []
            return file_messages.read(self._messages(run_id), run_id, on_damage)

    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        with self._guard("count messages"):
            counts = {run_id: file_messages.count(self._messages(check_id(run_id))) for run_id in run_ids}
        return {run_id: count for run_id, count in counts.items() if count}

    # --- journal ------------------------------------------------------------------------------------------------

    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        wanted = None if step is None else check_step(step)
        with self._run_lock(run_id, "read the journal of", shared=True) as files:
            if not self._record_path(run_id).exists():
                return []
            return file_journal.read(self._journal(run_id), run_id, wanted, files.commits.values(), on_damage)

    # --- forks --------------------------------------------------------------------------------------------------

    def fork_run(self, run_id: str, sequence: int, header: bytes, first: Commit) -> RunRecord:
        check_fork(run_id, sequence, first)
        new_id = first.run_id
        if new_id == run_id:
            raise RunExists(new_id)
        with ExitStack() as locks:
            # In one order everywhere, so that two forks never wait for each other.
            held = {
                one: locks.enter_context(self._run_lock(one, "fork", shared=one == run_id, new=one == new_id))
                for one in sorted((run_id, new_id))
            }
            source, target = held[run_id], held[new_id]
            found = self._known(source)
            if self._record_path(new_id).exists():
                raise RunExists(new_id)
            self._clear(target)
            file_forks.copy(source, target, sequence)
            self._publish(target, first)
            made = forked_record(found, first, header, self._clock())
            self._write_record(made)  # from here on there is such a run
            target.refresh()
            self._point(target)
            if first.retention is not None and first.checkpoint_id is not None:
                self._prune(target, first.retention)
            return self._shown(made)

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        with self._guard("commit"):
            return [
                self._commit_one(write) if isinstance(write, Commit) else self._journal_one(write) for write in commits
            ]

    def _journal_one(self, write: JournalWrite) -> SurefootError | None:
        refused = journal_refusal(write)
        if refused is not None:
            return refused
        try:
            with self._run_lock(write.run_id, "write the journal of") as files:
                last = self._fence(files, write.token).sequence
                file_journal.write(self._journal(write.run_id), write.run_id, last, write.rows)
        except SurefootError as error:
            return error
        return None

    def _commit_one(self, commit: Commit) -> SurefootError | None:
        refused = refusal(commit)
        if refused is not None:
            return refused
        try:
            with self._run_lock(commit.run_id, "commit") as files:
                self._admit(files, commit)
                replaced = self._publish(files, commit)
                # It is durable: whatever goes wrong from here on, it must not be reported as refused.
                try:
                    self._follow_up(files, commit, replaced)
                except (OSError, CorruptData) as error:
                    logger.warning("Run %r: commit %d is durable, but: %s", commit.run_id, commit.sequence, error)
        except SurefootError as error:
            return error
        return None

    def _fence(self, files: RunFiles, token: int) -> RunRecord:
        """The run, if the holder of ``token`` may write to it."""
        stored = self._known(files)
        if token and (stored.token != token or stored.owner is None):
            raise LeaseLost(files.run_id, token)
        if not token:
            self._refuse_if_held(stored)
        return stored

    def _admit(self, files: RunFiles, commit: Commit) -> None:
        """Raise unless the commit's owner holds the run and its sequence is the next."""
        stored = self._fence(files, commit.token)
        if commit.sequence != stored.sequence + 1:
            raise CommitConflict(
                f"Commit {commit.sequence} of run {commit.run_id!r} refused: the last commit is {stored.sequence}."
            )

    def _publish(self, files: RunFiles, commit: Commit) -> Entry | None:
        """Put the commit's file in its place; the checkpoint it replaces, if there is one."""
        content = CommitFile(
            run_id=commit.run_id,
            sequence=commit.sequence,
            at=self._clock(),
            record=commit.record,
            log=commit.log,
            checkpoint_id=commit.checkpoint_id,
            checkpoint=commit.checkpoint,
            chunks=tuple(commit.chunks),
            reach=files.reach_after(commit.sequence, commit.chunks),
            state=commit.state,
            error=printable(commit.error),
            release=commit.release,
            wake_at=commit.wake_at,
            journal_done=tuple(commit.journal_done),
        )
        replaced = None if commit.replaces is None else files.commits.get(commit.replaces)
        if replaced is not None and replaced.checkpoint_id is None:
            replaced = None
        path = files.history_path(commit.sequence)
        if commit.checkpoint_id is not None:
            path = files.checkpoint_path(commit.checkpoint_id)
            if replaced is not None and replaced.path == path:
                # The rename below overwrites it, so what must outlive it is copied first.
                write_atomic(files.history_path(replaced.sequence), files.read_entry(replaced).without(()).to_bytes())
            elif path.exists():
                path = path.with_name(f"{files.second_name(commit.checkpoint_id, commit.sequence)}.json")
        make_directory(path.parent)
        write_atomic(path, content.to_bytes(), point="commit.inside")
        return replaced

    def _follow_up(self, files: RunFiles, commit: Commit, replaced: Entry | None) -> None:
        files.refresh()
        self._write_record(self._known(files))
        if commit.journal_done:
            file_journal.remove_done(self._journal(files.run_id), files.run_id, files.commits.values())
        if commit.checkpoint_id is not None:
            self._point(files)
        if replaced is not None:
            at = replaced.sequence
            others = [entry.sequence for entry in files.retained() if entry.sequence != at]
            after = max((sequence for sequence in others if sequence < at), default=0)
            upto = min(sequence for sequence in others if sequence > at)
            moved = [] if at not in files.commits or files.commits[at].checkpoint_id is None else [files.commits[at]]
            files.retire(moved, since=at, after=after, upto=upto)
        if commit.retention is not None and commit.checkpoint_id is not None:
            self._prune(files, commit.retention)

    def _point(self, files: RunFiles) -> None:
        """Let the pointer name the newest checkpoint."""
        retained = files.retained()
        path = self._pointer(files.run_id)
        if retained:
            write_atomic(path, (retained[-1].checkpoint_id or "").encode(), durable=False)
        else:
            path.unlink(missing_ok=True)

    def _prune(self, files: RunFiles, retention: Retention, needed: int | None = None) -> int:
        """Retire all but the newest checkpoints; those from sequence ``needed`` on stay in any case."""
        retained = files.retained()
        if retention.keep is None or len(retained) <= max(1, retention.keep):
            return 0
        oldest = retained[-max(1, retention.keep)].sequence
        if needed is not None:
            oldest = min(oldest, needed)
        dropped = [entry for entry in retained if entry.sequence < oldest]
        if dropped:
            _faults.reach("retention")
            files.retire(dropped, since=dropped[0].sequence, after=0, upto=oldest)
        return len(dropped)

    # --- reading commits ----------------------------------------------------------------------------------------

    def definition(self, fingerprint: str) -> bytes | None:
        with self._guard("read a definition of"):
            return file_definitions.read(self._definition_path(fingerprint), fingerprint)

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        report = on_damage or _ignore
        rows = []
        with self._run_lock(run_id, "read the log of", shared=True) as files:
            for sequence in sorted(sequence for sequence in files.commits if sequence > max(0, after)):
                entry = files.commits[sequence]
                try:
                    content = files.read_entry(entry)
                except CorruptData as error:
                    report(Damage(run_id, sequence, str(entry.path), str(error)))
                else:
                    rows.append(LogRow(sequence, content.record, content.log))
            for damage in files.damage:
                if damage.sequence is None or damage.sequence > after:
                    report(damage)
        return rows

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        report = on_damage or _ignore
        with self._run_lock(run_id, "read the checkpoints of", shared=True) as files:
            entries = files.retained()[::-1][:limit]
            for damage in files.damage:
                if Path(damage.where).parent == files.checkpoints:
                    report(damage)
            row = None
            while row is None and entries:
                row = read_row(files, entries.pop(0), report)
        if row is not None:
            yield row
        for entry in entries:
            # The lock is not kept from row to row: an older checkpoint may go meanwhile, and is then left out.
            with self._run_lock(run_id, "read the checkpoints of", shared=True) as files:
                row = read_row(files, entry, report)
            if row is not None:
                yield row

    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
        with self._run_lock(run_id, "read a checkpoint of", shared=True) as files:
            found = [entry for entry in files.retained() if entry.checkpoint_id == checkpoint_id]
            if found:
                return checkpoint_row(files.read_entry(found[-1]))
            damage = files.damage_at(files.checkpoint_path(checkpoint_id))
            if damage is not None:
                raise CorruptData(damage.problem)
            return None

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        with self._run_lock(run_id, "read the state of", shared=True) as files:
            return files.state_chunks(sequence) if self._record_path(run_id).exists() else []

    def prune(self, run_id: str, retention: Retention) -> int:
        needed = newest_readable(self, run_id)
        with suppress(RunNotFound), self._run_lock(run_id, "prune") as files:
            return self._prune(files, retention, needed)
        return 0

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        with self._run_lock(run_id, "rewind") as files:
            stored = self._known(files)
            if stored.token != token or stored.owner is None:
                raise LeaseLost(run_id, token)
            count = files.rewind(sequence, keep_damaged=True)
            self._point(files)
            return count

    def delete_checkpoints(self, run_id: str) -> int:
        with suppress(RunNotFound), self._run_lock(run_id, "delete the checkpoints of") as files:
            self._refuse_if_held(self._known(files))
            count = files.rewind(0, keep_damaged=False)
            shutil.rmtree(self._journal(run_id), ignore_errors=not self._journal(run_id).exists())
            self._point(files)
            return count
        return 0

    def verify(self, run_id: str | None = None) -> VerifyReport:
        damage: list[Damage] = []
        if run_id is not None:
            return verify_run(self, [check_id(run_id)])
        run_ids = [record.run_id for record in self._records(damage.append)]
        return verify_run(self, run_ids, damage, self.list_all_runs())

    # --- run documents ------------------------------------------------------------------------------------------

    def save_run(self, run: Run) -> None:
        self._documents.save(run)

    def load_run(self, run_id: str) -> Run | None:
        check_id(run_id)
        with self._guard(f"read the document of run {run_id!r}"):
            return self._documents.load(run_id)

    def _document_ids(self, index: Index, key: str = "") -> list[str]:
        if index == "all":
            return self._documents.ids()
        return self._documents.goals() if index == "goals" else self._documents.find(index, key)

    def rebuild_indexes(self) -> None:
        """Make the indexes of the ``Run`` documents anew from the documents."""
        self._documents.rebuild()


def _ignore(damage: Damage) -> None:
    """What nobody asked to hear of."""
