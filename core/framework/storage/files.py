"""``FileStorage``: runs as readable JSON files in a folder, for looking into and for debugging.

Below the folder: ``runs/``, ``summaries/``, ``indexes/`` (``Run`` documents, see ``file_documents``), and per run
``executions/<run>.json`` (record and lease), ``checkpoints/by_run/<run>/`` and ``history/<run>/`` (commits, see
``file_commits``), ``journal/<run>/`` (``file_journal``), ``messages/<run>/`` (``file_messages``),
``pins/`` (``file_pins``), ``retired/`` (``file_sweep``),
``checkpoint_indexes/latest_<run>.txt`` (the newest checkpoint's id, for people; nothing relies on it),
``definitions/`` (kept until ``compact``, as runs share them) and ``locks/``.

A commit is one file put in its place by one rename: that is the moment it happens. What follows, such as the record's
new state and retention, is derived from it again if a crash comes first: commits newer than the record say what it
lacks. Locks are ``flock`` on local file systems; use one machine.

What a run's folders hold is kept in memory (``file_runs``, ``file_journal``), so a write costs what it changes and not
what is there already. A mark in the run's lock file tells when another process was there; then they are read again.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from framework.errors import (
    CommitConflict,
    CorruptData,
    LeaseLost,
    MessageRefused,
    RunBusy,
    RunError,
    RunExists,
    RunNotFound,
    StorageError,
    SurefootError,
)
from framework.schemas.run import Run, RunState
from framework.storage import file_definitions, file_forks, file_messages, file_pins, forks
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
from framework.storage.documents import FindsDocuments, Index
from framework.storage.file_commits import CommitFile, Entry
from framework.storage.file_contents import HasContents
from framework.storage.file_documents import INDEXES, RunDocuments
from framework.storage.file_folder import LOOK_SECONDS
from framework.storage.file_io import (
    dump_checked,
    file_name,
    load_checked,
    make_directory,
    remove_stale,
    write_atomic,
)
from framework.storage.file_locks import BUSY_SECONDS, HeldUp, Want
from framework.storage.file_records import (
    age,
    claimed_record,
    forked_record,
    holder_of,
    new_record,
    with_progress,
)
from framework.storage.file_runs import RunFiles, checkpoint_row, read_row
from framework.storage.file_strays import FindsStrays
from framework.storage.file_sweep import SweepsFiles
from framework.storage.interface import IsAlive, Rewrite, Storage
from framework.storage.records import (
    NO_TOKEN,
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
    due_after,
)
from framework.storage.verify import newest_readable, refuse_pinned, verify_run

logger = logging.getLogger(__name__)


class FileStorage(FindsDocuments, SweepsFiles, FindsStrays, HasContents, Storage):
    """A store in a folder, for any number of processes on one machine. The folder is made when missing.

    ``clock`` gives seconds since the epoch, for leases and times; the order of commits never depends on it.
    ``busy_seconds`` is how long to wait for another process that is at the same run, or at the indexes.
    """

    def __init__(
        self,
        base_path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        super().__init__(base_path, clock, busy_seconds)
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

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        definition = self._definition(new.fingerprint, shared=True)
        with self._run_lock(new.run_id, "record", new=True, edits=True, beside=[definition]) as files:
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
            files.put(files.history_path(0), initial)
            self._write_record(record)
            return self._shown(record)

    def find_run(self, run_id: str) -> RunRecord | None:
        return self._find(run_id)[0]

    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        check_id(owner, "owner", MAX_KEY)
        with self._run_lock(run_id, "claim", anew=True) as files:
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
            claimed = claimed_record(stored, found, owner, now, lease_seconds)
            self._write_record(claimed)
            return replace(claimed, state=found.state, error=found.error)

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        self._renew(run_id, token, lease_seconds)

    def renew_leases(
        self, leases: Sequence[tuple[str, int]], lease_seconds: float
    ) -> list[RunError | StorageError | None]:
        """See ``Storage``. First come those that nobody holds up, so none waits for another run's."""
        outcomes = [self._renewal(run_id, token, lease_seconds, 0.0) for run_id, token in leases]
        until = time.monotonic() + min(LOOK_SECONDS, lease_seconds / 6)
        for place, (run_id, token) in enumerate(leases):
            if isinstance(outcomes[place], HeldUp):
                patience = max(0.0, until - time.monotonic())
                outcomes[place] = self._renewal(run_id, token, lease_seconds, patience)
        return outcomes

    def _renewal(
        self, run_id: str, token: int, lease_seconds: float, patience: float
    ) -> RunError | StorageError | None:
        try:
            self._renew(run_id, token, lease_seconds, patience)
        except (LeaseLost, RunNotFound, HeldUp) as error:
            return error
        return None

    def _renew(self, run_id: str, token: int, lease_seconds: float, patience: float | None = None) -> None:
        with self._run_lock(run_id, "renew the lease of", patience=patience) as files:
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

    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        latest = self._clock() if now is None else now
        current = self._current((record.run_id for record in self._records()), free=True)
        due = [
            (record.wake_at, record.run_id, record)
            for record in current
            if record.state is RunState.PAUSED and record.wake_at is not None and record.wake_at <= latest
        ]
        due = [each for each in due if each[:2] > due_after(after)]
        return [record for _, _, record in sorted(due, key=lambda each: each[:2])[:limit]]

    def _records(
        self, names: Iterable[str] | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[RunRecord]:
        """The readable records as they are in their files, oldest first: all, or those of runs with these names."""
        found = []
        with self._reading("list its runs"):
            folder = self.base_path / "executions"
            for path in folder.glob("[!.]*.json") if names is None else [folder / f"{name}.json" for name in names]:
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

    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        with self._run_lock(run_id, "delete", new=True, edits=True) as files:
            path = self._record_path(run_id)
            existed = path.exists()
            try:
                stored = self._stored(files)
            except CorruptData as error:
                logger.warning("Deleting a run whose record cannot be read: %s", error)
            else:
                if stored is not None:
                    self._refuse_if_held(stored)
                    file_pins.refuse_if_pinned(self._pins(run_id), force=force)
            path.unlink(missing_ok=True)  # from here on there is no such run
            self._clear(files)
            self._files.pop(run_id, None)
            (self.base_path / "locks" / f"{file_name(run_id)}.lock").unlink(missing_ok=True)
        had_document = self._documents.delete(run_id)
        return existed or had_document

    def _clear(self, files: RunFiles) -> None:
        self._pointer(files.run_id).unlink(missing_ok=True)
        self._pins_path(files.run_id).unlink(missing_ok=True)
        for folder in (files.checkpoints, files.history, self._messages(files.run_id), self._journal(files.run_id)):
            if folder.exists():
                shutil.rmtree(folder)
        files.journal.forget()
        files.refresh()

    # --- messages -----------------------------------------------------------------------------------------------

    def send(self, run_id: str, name: str, body: bytes) -> None:
        check_id(name, "message name", MAX_KEY)
        check_value(body, f"Message {name!r}")
        with self._run_lock(run_id, "send a message to") as files:
            if self._known(files).state is RunState.COMPLETED:
                raise MessageRefused(run_id, name, "the run is completed.")
            files.messages.leave(Message(run_id, name, bytes(body), self._clock()), files.lock)

    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        # Each is a file that is never changed, so nothing is read in half without the lock; a heartbeat looks here.
        lock = self._run_lock(run_id, "read the messages of", shared=True, patience=LOOK_SECONDS, anyway=True)
        with lock:
            if not self._record_path(run_id).exists():
                return []
            return file_messages.read(self._messages(run_id), run_id, on_damage)

    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        with self._reading("count messages"):
            counts = {run_id: file_messages.count(self._messages(check_id(run_id))) for run_id in run_ids}
        return {run_id: count for run_id, count in counts.items() if count}

    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        check_prefix(after)
        # A completed run never pauses again, so its commits need not be looked at.
        found = [
            record.run_id
            for record in self._records(file_messages.folders(self.base_path / "messages"))
            if record.run_id > after and record.state is not RunState.COMPLETED
        ]
        current = self._current(sorted(found), free=True)
        paused = (record for record in current if record.state is RunState.PAUSED)
        return list(islice(paused, limit))

    # --- journal ------------------------------------------------------------------------------------------------

    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        wanted = None if step is None else check_step(step)
        with self._run_lock(run_id, "read the journal of", shared=True) as files:
            if not self._record_path(run_id).exists():
                return []
            return files.journal.read(wanted, files.done, on_damage)

    # --- forks --------------------------------------------------------------------------------------------------

    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        check_fork(run_id, sequence, first)
        new_id = first.run_id
        if new_id == run_id:
            raise RunExists(new_id)
        fingerprint = self._fingerprint(run_id)
        wanted = [
            Want(self._lock_path(run_id), shared=True),
            Want(self._lock_path(new_id)),
            self._definition(fingerprint, shared=True),
        ]
        with (
            self._holding(f"fork run {run_id!r}", *wanted) as locks,
            self._opened(run_id, locks[0], anew=True) as source,
            self._opened(new_id, locks[1], edits=True, anew=True) as target,
        ):
            found = self._known(source)
            if found.fingerprint != fingerprint:  # deleted, and accepted anew with another definition
                raise RunNotFound(run_id)
            if self._record_path(new_id).exists():
                raise RunExists(new_id)
            self._clear(target)
            file_forks.copy(source, target, sequence, rewrite)
            self._publish(target, first)
            made = forked_record(found, first, header, self._clock())
            self._write_record(made)  # from here on there is such a run
            self._point(target)
            if first.retention is not None and first.checkpoint_id is not None:
                self._prune(target, first.retention)
            return self._shown(made)

    def _fingerprint(self, run_id: str) -> str:
        """Of which definition a run is: that never changes."""
        with self._reading(f"fork run {run_id!r}"):
            record = self._read_record(self._record_path(run_id))
        if record is None:
            raise RunNotFound(run_id)
        return record.fingerprint

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        with self._guard("commit"):
            pass  # a store that is closed, or cannot be reached, refuses them all at once
        return [self._commit_one(write) if isinstance(write, Commit) else self._journal_one(write) for write in commits]

    def _journal_one(self, write: JournalWrite) -> SurefootError | None:
        refused = journal_refusal(write)
        if refused is not None:
            return refused
        try:
            with self._run_lock(write.run_id, "write the journal of", edits=True) as files:
                stored = self._fence(files, write.token)
                files.journal.write(stored.sequence, write.rows)
                further = with_progress(stored, write)
                if further is not stored:
                    # The rows are durable: whatever goes wrong from here on, they must not be reported as refused.
                    try:
                        self._write_record(further)
                    except OSError as error:
                        files.doubtful = True
                        logger.warning("Run %r: journal rows are durable, but: %s", write.run_id, error)
        except SurefootError as error:
            return error
        return None

    def _commit_one(self, commit: Commit) -> SurefootError | None:
        refused = refusal(commit)
        if refused is not None:
            return refused
        try:
            with self._run_lock(commit.run_id, "commit", edits=True) as files:
                self._admit(files, commit)
                try:
                    replaced = self._publish(files, commit)
                except CorruptData:
                    files.refresh(reread=True)  # a file was damaged since it was found; it is left out from here on
                    replaced = self._publish(files, commit)
                # It is durable: whatever goes wrong from here on, it must not be reported as refused.
                try:
                    try:
                        self._follow_up(files, commit, replaced)
                    except CorruptData:
                        files.refresh(reread=True)
                        self._follow_up(files, commit, replaced)
                except (OSError, CorruptData) as error:
                    files.doubtful = True
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
        if replaced is not None and (
            replaced.checkpoint_id is None or any(pin.sequence == replaced.sequence for pin in self._pins(files.run_id))
        ):
            replaced = None
        path = files.history_path(commit.sequence)
        if commit.checkpoint_id is not None:
            path = files.checkpoint_path(commit.checkpoint_id)
            if replaced is not None and replaced.path == path:
                # The rename below overwrites it, so what must outlive it is copied first.
                files.put(files.history_path(replaced.sequence), files.read_entry(replaced).without(()))
            elif path.exists():
                path = path.with_name(f"{files.second_name(commit.checkpoint_id, commit.sequence)}.json")
        make_directory(path.parent)
        files.put(path, content, point="commit.inside")
        return replaced

    def _follow_up(self, files: RunFiles, commit: Commit, replaced: Entry | None) -> None:
        self._write_record(with_progress(self._known(files), commit))
        if commit.journal_done:
            files.journal.remove_done(commit.journal_done, files.done)
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
        newest = files.newest()
        path = self._pointer(files.run_id)
        if newest is not None:
            write_atomic(path, (newest.checkpoint_id or "").encode(), durable=False)
        else:
            path.unlink(missing_ok=True)

    def _prune(self, files: RunFiles, retention: Retention, needed: int | None = None) -> int:
        """Retire all but the newest checkpoints; pinned ones, and those from ``needed`` on, stay in any case."""
        retained = files.retained() if retention.keep is not None else []
        if retention.keep is None or len(retained) <= max(1, retention.keep):
            return 0
        oldest = retained[-max(1, retention.keep)].sequence
        if needed is not None:
            oldest = min(oldest, needed)
        return self._drop(files, [entry for entry in retained if entry.sequence < oldest], oldest)

    # --- reading commits ----------------------------------------------------------------------------------------

    def definition(self, fingerprint: str) -> bytes | None:
        with self._reading("read a definition of"):
            return file_definitions.read(self._definition_path(fingerprint), fingerprint)

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        report = on_damage or _ignore
        rows = []
        with self._run_lock(run_id, "read the log of", shared=True, anew=True) as files:
            for entry in files.after(after):
                try:
                    content = files.read_entry(entry)
                except CorruptData as error:
                    report(Damage(run_id, entry.sequence, str(entry.path), str(error)))
                else:
                    rows.append(LogRow(entry.sequence, content.record, content.log))
            for damage in files.damage:
                if damage.sequence is None or damage.sequence > after:
                    report(damage)
        return rows

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        report = on_damage or _ignore
        with self._run_lock(run_id, "read the checkpoints of", shared=True, anew=True) as files:
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
        with self._run_lock(run_id, "read a checkpoint of", shared=True, anew=True) as files:
            found = [entry for entry in files.retained() if entry.checkpoint_id == checkpoint_id]
            if found:
                return checkpoint_row(files.read_entry(found[-1]))
            damage = files.damage_at(files.checkpoint_path(checkpoint_id))
            if damage is not None:
                raise CorruptData(damage.problem)
            return None

    def prune(self, run_id: str, retention: Retention) -> int:
        needed = newest_readable(self, run_id)
        with suppress(RunNotFound), self._run_lock(run_id, "prune", edits=True, anew=True) as files:
            return self._prune(files, retention, needed)
        return 0

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        refuse_pinned(self, run_id, sequence)
        with self._run_lock(run_id, "rewind", edits=True, anew=True) as files:
            stored = self._known(files)
            if stored.token != token or stored.owner is None:
                raise LeaseLost(run_id, token)
            count = files.rewind(sequence, keep_damaged=True)
            self._keep_pins(run_id, sequence)
            self._point(files)
            return count

    def delete_checkpoints(self, run_id: str, *, force: bool = False) -> int:
        with suppress(RunNotFound), self._run_lock(run_id, "delete the checkpoints of", edits=True, anew=True) as files:
            self._refuse_if_held(self._known(files))
            file_pins.refuse_if_pinned(self._pins(run_id), force=force)
            count = files.rewind(0, keep_damaged=False)
            self._keep_pins(run_id, 0)
            shutil.rmtree(self._journal(run_id), ignore_errors=not self._journal(run_id).exists())
            files.journal.forget()
            self._point(files)
            return count
        return 0

    def verify(self, run_id: str | None = None) -> VerifyReport:
        damage: list[Damage] = []
        if run_id is not None:
            return verify_run(self, [check_id(run_id)])
        run_ids = [record.run_id for record in self._records(on_damage=damage.append)]
        return verify_run(self, run_ids, damage, self.list_all_runs())

    # --- run documents ------------------------------------------------------------------------------------------

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        if token == NO_TOKEN:
            self._documents.save(run)
            return
        lock = self._run_lock(run.id, "save the document of", shared=True, new=True, beside=[self._index()])
        with lock as files:
            found = self._stored(files)  # nobody takes it over meanwhile
            if found is not None and found.token != token:
                raise LeaseLost(run.id, token)
            self._documents.put(run)

    def load_run(self, run_id: str) -> Run | None:
        check_id(run_id)
        with self._reading(f"read the document of run {run_id!r}"):
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
