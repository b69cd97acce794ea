"""Writing commits and journal rows inside an SQLite file, in the caller's transaction.

Who commits step after step is the owner of a run's lease, through one store object. So a store remembers, for each run
it committed to last, where the run stands: the next commit then needs no query before it writes. What is remembered is
a guess that the first statement checks (the fencing token, the log's key); a commit that does not fit it is looked at
anew, as one of a run that nobody knows.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework import _faults
from framework.errors import CommitConflict, LeaseLost, RunBusy, RunError, RunNotFound, SurefootError
from framework.storage import sqlite_journal, sqlite_retention
from framework.storage.checks import journal_refusal, printable, refusal
from framework.storage.chunks import Chunk, checksum
from framework.storage.driver_errors import translate
from framework.storage.records import Commit, JournalWrite, Write
from framework.storage.sqlite_schema import OPS, SETS_MARK, log_crc, row_crc

_REMEMBERED = 1024
"""Runs whose standing is remembered at most."""

_NUMBERS = {op: number for number, op in enumerate(OPS)}

_LOOK = (
    "SELECT pk, run_id, token, owner, lease_until, (SELECT max(sequence) FROM steps WHERE run_pk = pk) AS last "
    "FROM runs WHERE run_id = ?"
)
_LOG = "INSERT INTO steps (run_pk, sequence, record, log, crc, sets) VALUES (?, ?, ?, ?, ?, ?)"
_LOG_FENCED = (
    "INSERT INTO steps (run_pk, sequence, record, log, crc, sets) SELECT pk, ?, ?, ?, ?, ? FROM runs "
    "WHERE pk = ? AND run_id = ? AND token = ? AND owner IS NOT NULL"
)
_CHECKPOINT = "INSERT INTO checkpoints (run_pk, sequence, checkpoint_id, body, crc, at) VALUES (?, ?, ?, ?, ?, ?)"
_CHECKPOINT_IN_PLACE = (
    "UPDATE checkpoints SET sequence = ?, checkpoint_id = ?, body = ?, crc = ?, at = ? "
    "WHERE run_pk = ? AND sequence = ? AND NOT EXISTS "
    "(SELECT 1 FROM pins WHERE pins.run_pk = checkpoints.run_pk AND pins.sequence = checkpoints.sequence)"
)
_CHUNK = "INSERT INTO chunks (run_pk, sequence, key, op, data, checksum) VALUES (?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class _Standing:
    """Where a run stood after a commit of its owner through this store.

    ``only`` is the sequence of its only checkpoint, when all others, and the chunks that only they could reach, are
    known to be gone. ``progressed`` says that this owner has set the count of recoveries to 0.
    """

    pk: int
    token: int
    sequence: int
    only: int | None
    progressed: bool = False


class CommitWriter:
    """Writes for one store. Used by whoever holds its write transaction."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._standing: OrderedDict[str, _Standing] = OrderedDict()
        self._new: dict[str, _Standing | None] = {}

    def forget(self) -> None:
        """Forget where runs stand: they may have been changed by other means."""
        self._standing.clear()
        self._new.clear()

    def undone(self) -> None:
        """The transaction was rolled back."""
        for run_id in self._new:
            self._standing.pop(run_id, None)
        self._new.clear()

    def done(self) -> None:
        """The transaction is durable."""
        for run_id, standing in self._new.items():
            self._standing.pop(run_id, None)
            if standing is not None:
                self._standing[run_id] = standing
        self._new.clear()
        while len(self._standing) > _REMEMBERED:
            self._standing.popitem(last=False)

    def write_all(self, db: sqlite3.Connection, writes: Sequence[Write], *, apart: bool) -> list[Exception | None]:
        """Write commits and journal rows; for each ``None`` or why it was refused, and then it left nothing.

        What refuses a commit is found before anything of it is written, so only an error of the driver, such as a full
        disk, could leave a part of one. Such an error is raised and the transaction is to be rolled back; with
        ``apart`` it is the outcome of the one it came to, unless the whole transaction is gone.
        """
        if not apart:
            return [self.write(db, write) for write in writes]
        outcomes: list[Exception | None] = []
        for write in writes:
            db.execute("SAVEPOINT one")
            try:
                outcome: Exception | None = self.write(db, write)
            except (sqlite3.Error, OSError) as error:
                if not db.in_transaction:
                    raise  # the whole transaction is gone, as when the disk is full
                self._new[write.run_id] = None
                outcome = translate(error, self._path, f"commit run {write.run_id!r}")
            if outcome is not None:
                db.execute("ROLLBACK TO one")
            db.execute("RELEASE one")
            outcomes.append(outcome)
        return outcomes

    def write(self, db: sqlite3.Connection, write: Write) -> SurefootError | None:
        """Write one commit, or one call's journal rows, or say why not."""
        if isinstance(write, Commit):
            return refusal(write) or self._commit(db, write)
        refused = journal_refusal(write) or self._journal(db, write)
        if refused is None and write.progress:
            sqlite_journal.tell_progress(db, write.run_id)
        return refused

    def _journal(self, db: sqlite3.Connection, write: JournalWrite) -> SurefootError | None:
        alone = write.token and len(write.rows) == 1
        if alone and sqlite_journal.put_fenced(db, write.run_id, write.token, write.rows[0]):
            _faults.reach("commit.inside")
            return None
        row = db.execute(
            "SELECT pk, run_id, token, owner, lease_until FROM runs WHERE run_id = ?", (write.run_id,)
        ).fetchone()
        if row is None:
            return RunNotFound(write.run_id)
        fenced = self._fenced(row, write.token)
        if fenced is None:
            sqlite_journal.put(db, row["pk"], write.rows)
            _faults.reach("commit.inside")
        return fenced

    def _fenced(self, row: sqlite3.Row, token: int) -> RunError | None:
        """Why the holder of ``token`` may not write to the run, or ``None``."""
        if token:
            stale = row["token"] != token or row["owner"] is None
            return LeaseLost(row["run_id"], token) if stale else None
        now = self._clock()
        if row["owner"] is not None and row["lease_until"] > now:
            return RunBusy(row["run_id"], row["owner"], row["lease_until"] - now)
        return None

    def _known(self, commit: Commit) -> _Standing | None:
        """Where the run stands if it is as this store left it, and this commit is the next one."""
        known = self._new[commit.run_id] if commit.run_id in self._new else self._standing.get(commit.run_id)
        fits = known is not None and commit.token and known.token == commit.token
        return known if fits and known is not None and known.sequence + 1 == commit.sequence else None

    def _commit(self, db: sqlite3.Connection, commit: Commit) -> SurefootError | None:
        """Write one commit, or say why not; nothing is written before all checks have passed."""
        record, log, sequence = commit.record, commit.log, commit.sequence
        sets = [chunk.key for chunk in commit.chunks if chunk.op != "append"]
        row = (sequence, record, log, log_crc(sequence, record, log), SETS_MARK.join(sets) or None)
        known = self._known(commit)
        pk, last = 0, sequence - 1
        if known is not None:
            try:
                fenced = db.execute(_LOG_FENCED, (*row, known.pk, commit.run_id, commit.token))
                pk = known.pk if fenced.rowcount == 1 else 0
            except sqlite3.IntegrityError:
                pass  # somebody committed in between: found out below
            if not pk:
                known = None
        if not pk:
            found = db.execute(_LOOK, (commit.run_id,)).fetchone()
            if found is None:
                return RunNotFound(commit.run_id)
            refused = self._fenced(found, commit.token)
            if refused is not None:
                return refused
            last = found["last"] or 0
            if sequence != last + 1:
                return CommitConflict(f"Commit {sequence} of run {commit.run_id!r} refused: the last commit is {last}.")
            pk = found["pk"]
            db.execute(_LOG, (pk, *row))
        if known is None:
            known = _Standing(pk, commit.token, last, None)
        only = self._write_rest(db, commit, known)
        progressed = known.progressed or commit.progress
        standing = (
            None if commit.release or not commit.token else _Standing(pk, commit.token, sequence, only, progressed)
        )
        self._new[commit.run_id] = standing
        return None

    def _write_rest(self, db: sqlite3.Connection, commit: Commit, known: _Standing) -> int | None:
        """Write all but the log's row; the sequence of the run's only checkpoint, if it is known to have one."""
        pk, only, sequence = known.pk, known.only, commit.sequence
        if commit.checkpoint_id is None or commit.checkpoint is None:
            if commit.chunks:
                insert_chunks(db, pk, sequence, commit.chunks)
                only = None
            self._write_run(db, commit, known)
            return only
        crc = row_crc(sequence, commit.checkpoint_id, commit.checkpoint)
        keep = None if commit.retention is None else commit.retention.keep
        steady = keep == 1 and only is not None and commit.replaces is None
        values = (sequence, commit.checkpoint_id, commit.checkpoint, crc, self._clock())
        if not steady or db.execute(_CHECKPOINT_IN_PLACE, (*values, pk, only)).rowcount != 1:
            steady = False
            db.execute(_CHECKPOINT, (pk, *values))
        if commit.chunks:
            insert_chunks(db, pk, sequence, commit.chunks)
        self._write_run(db, commit, known)
        if steady:
            sqlite_retention.drop_before(db, pk, commit.chunks, sequence)
        elif commit.retention is not None:
            # Where nothing was dropped, as after a run's first checkpoint, no chunks were looked at either.
            dropped = sqlite_retention.prune(db, pk, commit.retention)
            steady = dropped > 0 and not sqlite_retention.pinned(db, pk, sequence)
        return sequence if keep == 1 and steady else None

    def _write_run(self, db: sqlite3.Connection, commit: Commit, known: _Standing) -> None:
        pk = known.pk
        if commit.journal_done:
            sqlite_journal.forget(db, pk, commit.journal_done)
        _faults.reach("commit.inside")
        if commit.replaces is not None:
            sqlite_retention.replace(db, pk, commit.replaces)
        if commit.state is not None:
            db.execute(
                "UPDATE runs SET state = ?, error = ?, updated_at = ?, wake_at = ? WHERE pk = ?",
                (commit.state.value, printable(commit.error), self._clock(), commit.wake_at, pk),
            )
        if commit.progress and not known.progressed:
            db.execute("UPDATE runs SET recovery_attempts = 0 WHERE pk = ? AND recovery_attempts <> 0", (pk,))
        if commit.release:
            db.execute("UPDATE runs SET owner = NULL, lease_until = 0 WHERE pk = ?", (pk,))


def insert_chunks(db: sqlite3.Connection, pk: int, sequence: int, chunks: Sequence[Chunk]) -> None:
    """Write chunks of one commit."""
    db.executemany(_CHUNK, [(pk, sequence, c.key, _NUMBERS[c.op], c.data, checksum(c)) for c in chunks])
