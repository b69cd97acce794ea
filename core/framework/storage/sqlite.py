"""``SQLiteStorage``: the embedded default. One file, WAL, ``synchronous=FULL``, one transaction and one fsync a commit.

The layout (``sqlite_schema``) keeps each commit to the ends of three b-trees: the log row, the chunk and its index
entry. The fence is a read inside the write transaction, so an ordinary commit does not touch the run's row at all.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from framework import _faults
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
from framework.storage import forks, sqlite_documents, sqlite_forks, sqlite_journal, sqlite_messages, sqlite_retention
from framework.storage import sqlite_schema as schema
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
from framework.storage.chunks import Chunk, checksum
from framework.storage.documents import FindsDocuments, Index
from framework.storage.driver_errors import translate
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
from framework.storage.sqlite_schema import OPS, SETS_MARK, facts_crc, row_crc
from framework.storage.verify import newest_readable, verify_run

logger = logging.getLogger(__name__)

_RUN_COLUMNS = (
    "pk, run_id, executor_type, goal_id, fingerprint, CAST(header AS BLOB) AS header, state, created_at, updated_at, "
    "error, owner, token, lease_until, recovery_attempts, parent_run_id, wake_at, header_crc"
)
_STATES = frozenset(state.value for state in RunState)
_OP_NUMBERS = frozenset(range(len(OPS)))


class SQLiteStorage(FindsDocuments, Storage):
    """A store in one SQLite file, for any number of processes on one machine.

    ``path`` is created when missing, ``:memory:`` is refused (use ``MemoryStorage``). ``clock`` gives seconds since
    the epoch; leases of all processes on the file must see the same clock, which on one machine they do.
    ``busy_seconds`` is how long to wait for another process's transaction.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time, busy_seconds: float = 30
    ) -> None:
        if str(path) == ":memory:":
            raise StorageError("SQLiteStorage keeps a file; for a store in memory use MemoryStorage or memory://.")
        self._open(Path(path), clock, busy_seconds)

    def _open(self, path: Path, clock: Callable[[], float], busy_seconds: float) -> None:
        self.path = path
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self.closed = False
        try:
            with self._guard("open it") as db:
                schema.migrate(db, str(self.path))
        except BaseException:
            self.close()
            raise
        forks.register(self)

    @property
    def url(self) -> str:
        return f"sqlite:///{quote(str(self.path))}"

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._disconnect()

    def before_fork(self) -> None:
        self._lock.acquire()
        self._disconnect()

    def after_fork(self, child: bool) -> None:
        self._lock.release()

    # --- connection and transactions ----------------------------------------------------------------------------

    @property
    def _db(self) -> sqlite3.Connection:
        if self.closed:
            raise StorageError(f"The store {self.path} is closed.")
        if self._connection is None:
            self._connection = self._connect()
            # A store that is dropped without close() lets go of its file all the same, also at the program's end.
            self._let_go = weakref.finalize(self, self._connection.close)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._let_go()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = schema.connect(self.path, self._busy_seconds)
        self._file = self._file_now()
        return connection

    def _file_now(self) -> tuple[int, int] | None:
        """Which file is at the path; ``None`` for none."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    @contextmanager
    def _guard(self, doing: str) -> Iterator[sqlite3.Connection]:
        """The connection, held by this thread, with the driver's errors translated."""
        with self._lock:
            try:
                yield self._db
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                # UnicodeDecodeError: SQLite's message quotes a damaged schema.
                raise translate(error, self.path, doing) from error

    @contextmanager
    def _write(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One durable transaction: committed when the block ends, undone when it raises."""
        with self._guard(doing) as db:
            if self._file_now() != self._file:
                # SQLite would go on writing into a file that nobody can open any more.
                raise StorageError(
                    f"The store {self.path} was deleted or replaced while open; nothing was written to {doing}. "
                    "Open it again, and restore it from a backup if it is missing."
                )
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        now = self._clock()
        with self._write(f"record run {new.run_id!r}") as db:
            db.execute(
                "INSERT OR IGNORE INTO definitions (fingerprint, body, crc) VALUES (?, ?, ?)",
                (new.fingerprint, new.definition, row_crc(new.fingerprint, new.definition)),
            )
            self._insert_chunks(db, self._insert_run(db, new, now, owner, lease_seconds), 0, new.chunks)
            return self._record(self._row(db, new.run_id))

    def _insert_run(
        self, db: sqlite3.Connection, new: NewRun, now: float, owner: str | None = None, lease_seconds: float = 0.0
    ) -> int:
        """Write a new run's row; its key. Raises ``RunExists``."""
        held = (None, 0, 0.0) if owner is None else (owner, 1, now + lease_seconds)
        facts = (new.run_id, new.executor_type, new.goal_id, new.fingerprint, new.header, facts_crc(new, now))
        try:
            cursor = db.execute(
                "INSERT INTO runs (run_id, executor_type, goal_id, fingerprint, header, header_crc, state, "
                "created_at, updated_at, owner, token, lease_until, recovery_attempts, parent_run_id) "
                "VALUES (?, ?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, ?, 0, ?)",
                (*facts, now, now, *held, new.parent_run_id),
            )
        except sqlite3.IntegrityError:
            raise RunExists(new.run_id) from None
        return cursor.lastrowid or 0

    def find_run(self, run_id: str) -> RunRecord | None:
        check_id(run_id)
        with self._guard(f"read run {run_id!r}") as db:
            row = self._find_row(db, run_id)
            return None if row is None else self._record(row)

    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        check_id(owner, "owner", MAX_KEY)
        with self._write(f"claim run {run_id!r}") as db:
            row = self._row(db, run_id)
            found = self._record(row)
            if found.state is RunState.COMPLETED:
                return found
            now = self._clock()
            holder = found.owner
            if holder is not None and found.lease_until > now:
                if is_alive is None or is_alive(holder) is not False:
                    raise RunBusy(run_id, holder, found.lease_until - now)
                found = self._record(row, gone=True)
            if sequence is not None and found.sequence != sequence:
                raise moved_on(found, sequence)
            attempts = found.recovery_attempts + 1 if found.state is RunState.CRASHED else 0
            db.execute(
                "UPDATE runs SET owner = ?, token = token + 1, lease_until = ?, state = 'running', wake_at = NULL, "
                "recovery_attempts = ?, updated_at = ? WHERE pk = ?",
                (owner, now + lease_seconds, attempts, now, row["pk"]),
            )
            claimed = self._record(self._row(db, run_id))
            # The caller wants to know what it took over, with the lease it now holds.
            return replace(claimed, state=found.state, error=found.error)

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        with self._write(f"renew the lease of run {run_id!r}") as db:
            cursor = db.execute(
                "UPDATE runs SET lease_until = ? WHERE run_id = ? AND token = ? AND owner IS NOT NULL",
                (self._clock() + lease_seconds, check_id(run_id), token),
            )
            if cursor.rowcount == 0:
                self._row(db, run_id)
                raise LeaseLost(run_id, token)

    def release_lease(self, run_id: str, token: int) -> None:
        with self._write(f"release the lease of run {run_id!r}") as db:
            db.execute(
                "UPDATE runs SET owner = NULL, lease_until = 0 WHERE run_id = ? AND token = ?",
                (check_id(run_id), token),
            )

    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        now = self._clock()
        where, values = [], list[Any]()
        if states is not None:
            clauses = []
            for state in states:
                if state is RunState.CRASHED:
                    clauses.append("(state = 'running' AND (owner IS NULL OR lease_until <= ?))")
                    values.append(now)
                elif state is RunState.RUNNING:
                    clauses.append("(state = 'running' AND owner IS NOT NULL AND lease_until > ?)")
                    values.append(now)
                else:
                    clauses.append("state = ?")
                    values.append(state.value)
            where.append("(" + (" OR ".join(clauses) or "0") + ")")
        if before is not None:
            where.append("(created_at, run_id) < (?, ?)")
            values.extend((before.created_at, before.run_id))
        condition = " AND ".join(where) or "1"
        with self._guard("list runs") as db:
            rows = db.execute(
                f"SELECT {_RUN_COLUMNS} FROM runs WHERE {condition} ORDER BY created_at DESC, run_id DESC LIMIT ?",
                (*values, limit),
            )
            return self._readable(rows)

    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        # A range of the index of run_id: SQLite compares text as UTF-8 bytes, of which nothing is above this mark.
        bounds = (check_prefix(prefix).encode(), limit)
        with self._guard("find runs") as db:
            rows = db.execute(
                f"SELECT {_RUN_COLUMNS} FROM runs WHERE run_id >= CAST(?1 AS TEXT) AND "
                "run_id < CAST(?1 || x'F8' AS TEXT) ORDER BY run_id LIMIT ?2",
                bounds,
            )
            return self._readable(rows)

    def list_due(self, now: float | None = None, limit: int = 100) -> list[RunRecord]:
        with self._guard("list the runs that are due") as db:
            # The plus keeps SQLite from reading all paused runs: few of them have a time.
            rows = db.execute(
                f"SELECT {_RUN_COLUMNS} FROM runs WHERE wake_at <= ? AND +state = 'paused' "
                "ORDER BY wake_at, run_id LIMIT ?",
                (self._clock() if now is None else now, limit),
            )
            return self._readable(rows)

    def _readable(self, rows: Iterable[sqlite3.Row]) -> list[RunRecord]:
        found = []
        for row in list(rows):
            try:
                found.append(self._record(row))
            except CorruptData as error:
                logger.warning("Listing runs: %s", error)
        return found

    def delete_run(self, run_id: str) -> bool:
        check_id(run_id)
        with self._write(f"delete run {run_id!r}") as db:
            row = self._find_row(db, run_id)
            had_document = sqlite_documents.delete(db, run_id)
            if row is None:
                return had_document
            self._refuse_if_held(row)
            for table in ("steps", "checkpoints", "chunks", "journal", "messages", "runs"):
                column = "pk" if table == "runs" else "run_pk"
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (row["pk"],))
            db.execute(
                "DELETE FROM definitions WHERE fingerprint = ? AND NOT EXISTS "
                "(SELECT 1 FROM runs WHERE runs.fingerprint = definitions.fingerprint)",
                (row["fingerprint"],),
            )
            return True

    def _find_row(self, db: sqlite3.Connection, run_id: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = db.execute(f"SELECT {_RUN_COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        return row

    def _row(self, db: sqlite3.Connection, run_id: str) -> sqlite3.Row:
        row = self._find_row(db, check_id(run_id))
        if row is None:
            raise RunNotFound(run_id)
        return row

    def _record(self, row: sqlite3.Row, *, gone: bool = False) -> RunRecord:
        whole = row["header_crc"] == facts_crc(row, row["created_at"]) and isinstance(row["wake_at"], float | None)
        if not whole or row["state"] not in _STATES:
            raise CorruptData(f"The record of run {row['run_id']!r} in {self.path} does not match its checksum.")
        state = RunState(row["state"])
        held = row["owner"] is not None and row["lease_until"] > self._clock() and not gone
        if state is RunState.RUNNING and not held:
            state = RunState.CRASHED
        last = self._db.execute("SELECT max(sequence) FROM steps WHERE run_pk = ?", (row["pk"],)).fetchone()[0]
        return RunRecord(
            run_id=row["run_id"],
            executor_type=row["executor_type"],
            goal_id=row["goal_id"],
            fingerprint=row["fingerprint"],
            header=row["header"],
            state=state,
            sequence=last or 0,
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            # What a run ended with before it was claimed is not what it comes to now, unless its owner left it.
            error=None if state is RunState.RUNNING else row["error"],
            owner=row["owner"],
            token=row["token"],
            lease_until=row["lease_until"],
            recovery_attempts=row["recovery_attempts"],
            parent_run_id=row["parent_run_id"],
            wake_at=row["wake_at"],
        )

    def _refuse_if_held(self, row: sqlite3.Row) -> None:
        now = self._clock()
        if row["owner"] is not None and row["lease_until"] > now:
            raise RunBusy(row["run_id"], row["owner"], row["lease_until"] - now)

    # --- messages -----------------------------------------------------------------------------------------------

    def send(self, run_id: str, name: str, body: bytes) -> None:
        check_id(name, "message name", MAX_KEY)
        check_value(body, f"Message {name!r}")
        with self._write(f"send a message to run {run_id!r}") as db:
            row = self._row(db, run_id)
            if row["state"] == RunState.COMPLETED.value:
                raise MessageRefused(run_id, name, "the run is completed.")
            sqlite_messages.leave(db, row["pk"], Message(run_id, name, bytes(body), self._clock()))

    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        with self._guard(f"read the messages of run {run_id!r}") as db:
            return sqlite_messages.read(db, check_id(run_id), on_damage)

    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        with self._guard("count messages") as db:
            return sqlite_messages.count(db, [check_id(run_id) for run_id in run_ids])

    # --- journal ------------------------------------------------------------------------------------------------

    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        with self._guard(f"read the journal of run {run_id!r}") as db:
            wanted = None if step is None else check_step(step)
            return sqlite_journal.read(db, check_id(run_id), wanted, on_damage)

    # --- forks --------------------------------------------------------------------------------------------------

    def fork_run(self, run_id: str, sequence: int, header: bytes, first: Commit) -> RunRecord:
        check_fork(run_id, sequence, first)
        now = self._clock()
        with self._write(f"fork run {run_id!r}") as db:
            source = self._row(db, run_id)
            found = self._record(source)  # raises when it is damaged
            new = NewRun(first.run_id, found.executor_type, found.goal_id, found.fingerprint, b"", header)
            pk = self._insert_run(db, new, now)
            sqlite_forks.copy(db, run_id, source["pk"], pk, sequence)
            refused = self._commit_one(db, first)
            if refused is not None:
                raise refused
            return self._record(self._row(db, first.run_id))

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        with self._write("commit") as db:
            alone = len(commits) == 1
            for write in commits:
                if alone:
                    outcomes.append(self._write_one(db, write))
                    continue
                # What is a single statement needs no savepoint: it leaves nothing behind when it fails.
                undo = isinstance(write, Commit) or len(write.rows) > 1
                if undo:
                    db.execute("SAVEPOINT one")
                try:
                    outcome = self._write_one(db, write)
                except (sqlite3.Error, OSError) as error:
                    if not db.in_transaction:
                        raise  # the whole transaction is gone, as when the disk is full
                    outcome = translate(error, self.path, f"commit run {write.run_id!r}")
                if undo:
                    if outcome is not None:
                        db.execute("ROLLBACK TO one")
                    db.execute("RELEASE one")
                outcomes.append(outcome)
        return outcomes

    def _write_one(self, db: sqlite3.Connection, write: Write) -> SurefootError | None:
        """Write one commit, or one call's journal rows, or say why not."""
        return self._commit_one(db, write) if isinstance(write, Commit) else self._journal_one(db, write)

    def _journal_one(self, db: sqlite3.Connection, write: JournalWrite) -> SurefootError | None:
        refused = journal_refusal(write)
        if refused is not None:
            return refused
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
        try:
            self._refuse_if_held(row)
        except RunBusy as error:
            return error
        return None

    def _commit_one(self, db: sqlite3.Connection, commit: Commit) -> SurefootError | None:
        """Write one commit, or say why not; nothing is written before all checks have passed."""
        refused = refusal(commit)
        if refused is not None:
            return refused
        row = db.execute(
            "SELECT pk, run_id, token, owner, lease_until, (SELECT max(sequence) FROM steps WHERE run_pk = pk) AS last "
            "FROM runs WHERE run_id = ?",
            (commit.run_id,),
        ).fetchone()
        if row is None:
            return RunNotFound(commit.run_id)
        fenced = self._fenced(row, commit.token)
        if fenced is not None:
            return fenced
        last = row["last"] or 0
        if commit.sequence != last + 1:
            return CommitConflict(
                f"Commit {commit.sequence} of run {commit.run_id!r} refused: the last commit is {last}."
            )
        pk = row["pk"]
        sets = SETS_MARK.join(chunk.key for chunk in commit.chunks if chunk.op != "append") or None
        db.execute(
            "INSERT INTO steps (run_pk, sequence, record, log, crc, sets) VALUES (?, ?, ?, ?, ?, ?)",
            (
                pk,
                commit.sequence,
                commit.record,
                commit.log,
                row_crc(commit.sequence, commit.record, commit.log),
                sets,
            ),
        )
        if commit.checkpoint_id is not None and commit.checkpoint is not None:
            crc = row_crc(commit.sequence, commit.checkpoint_id, commit.checkpoint)
            db.execute(
                "INSERT INTO checkpoints (run_pk, sequence, checkpoint_id, body, crc) VALUES (?, ?, ?, ?, ?)",
                (pk, commit.sequence, commit.checkpoint_id, commit.checkpoint, crc),
            )
        self._insert_chunks(db, pk, commit.sequence, commit.chunks)
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
        if commit.release:
            db.execute("UPDATE runs SET owner = NULL, lease_until = 0 WHERE pk = ?", (pk,))
        if commit.retention is not None and commit.checkpoint_id is not None:
            sqlite_retention.prune(db, pk, commit.retention)
        return None

    def _insert_chunks(self, db: sqlite3.Connection, pk: int, sequence: int, chunks: Sequence[Chunk]) -> None:
        if chunks:
            db.executemany(
                "INSERT INTO chunks (run_pk, sequence, key, op, data, checksum) VALUES (?, ?, ?, ?, ?, ?)",
                [(pk, sequence, c.key, OPS.index(c.op), c.data, checksum(c)) for c in chunks],
            )

    # --- reading commits ----------------------------------------------------------------------------------------

    def definition(self, fingerprint: str) -> bytes | None:
        with self._guard("read a definition") as db:
            row = db.execute(
                "SELECT CAST(body AS BLOB) AS body, crc FROM definitions WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
        if row is None:
            return None
        if row_crc(fingerprint, row["body"]) != row["crc"]:
            raise CorruptData(f"The definition {fingerprint} in {self.path} does not match its checksum.")
        body: bytes = row["body"]
        return body

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        with self._guard(f"read the log of run {run_id!r}") as db:
            rows = db.execute(
                "SELECT sequence, CAST(record AS BLOB), CAST(log AS BLOB), crc FROM steps WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) AND sequence > ? ORDER BY sequence",
                (check_id(run_id), after),
            ).fetchall()
        good = []
        for sequence, record, log, crc in rows:
            if row_crc(sequence, record, log) == crc:
                good.append(LogRow(sequence, record, log))
            elif on_damage is not None:
                on_damage(Damage(run_id, sequence, f"log row {sequence}", "it does not match its checksum"))
        return good

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        with self._guard(f"read the checkpoints of run {run_id!r}") as db:
            rows = db.execute(
                "SELECT sequence, checkpoint_id, CAST(body AS BLOB), crc FROM checkpoints WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) ORDER BY sequence DESC LIMIT ?",
                (check_id(run_id), -1 if limit is None else limit),
            ).fetchall()
        for sequence, checkpoint_id, body, crc in rows:
            if row_crc(sequence, checkpoint_id, body) == crc:
                yield CheckpointRow(sequence, checkpoint_id, body)
            elif on_damage is not None:
                where = f"checkpoint {checkpoint_id}"
                on_damage(Damage(run_id, sequence, where, "its body does not match its checksum"))

    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
        with self._guard(f"read checkpoint {checkpoint_id!r} of run {run_id!r}") as db:
            row = db.execute(
                "SELECT sequence, checkpoint_id, CAST(body AS BLOB) AS body, crc FROM checkpoints WHERE run_pk = "
                "(SELECT pk FROM runs WHERE run_id = ?) AND checkpoint_id = ? ORDER BY sequence DESC LIMIT 1",
                (check_id(run_id), checkpoint_id),
            ).fetchone()
        if row is None:
            return None
        if row_crc(row["sequence"], checkpoint_id, row["body"]) != row["crc"]:
            raise CorruptData(f"Checkpoint {checkpoint_id!r} of run {run_id!r} does not match its checksum.")
        return CheckpointRow(row["sequence"], row["checkpoint_id"], row["body"])

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        with self._guard(f"read the state of run {run_id!r}") as db:
            rows = db.execute(schema.READ_CHUNKS, {"run_id": check_id(run_id), "sequence": sequence}).fetchall()
        chunks = []
        for key, op, data, stored in rows:
            chunk = Chunk(key, OPS[op], data) if op in _OP_NUMBERS and data is not None else None
            if chunk is None or checksum(chunk) != stored:
                raise CorruptData(f"A chunk of key {key!r} of run {run_id!r} does not match its checksum.")
            if chunk.op != "delete":
                chunks.append(chunk)
        return chunks

    def prune(self, run_id: str, retention: Retention) -> int:
        if self.find_run(run_id) is None:
            return 0
        needed = newest_readable(self, run_id)
        with self._write(f"prune run {run_id!r}") as db:
            row = self._find_row(db, run_id)
            return 0 if row is None else sqlite_retention.prune(db, row["pk"], retention, needed)

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        with self._write(f"rewind run {run_id!r}") as db:
            row = self._row(db, run_id)
            if row["token"] != token or row["owner"] is None:
                raise LeaseLost(run_id, token)
            values = (row["pk"], sequence)
            db.execute("DELETE FROM chunks WHERE run_pk = ? AND sequence > ?", values)
            return db.execute("DELETE FROM checkpoints WHERE run_pk = ? AND sequence > ?", values).rowcount

    def delete_checkpoints(self, run_id: str) -> int:
        with self._write(f"delete the checkpoints of run {run_id!r}") as db:
            row = self._find_row(db, check_id(run_id))
            if row is None:
                return 0
            self._refuse_if_held(row)
            count = db.execute("DELETE FROM checkpoints WHERE run_pk = ?", (row["pk"],)).rowcount
            db.execute("DELETE FROM chunks WHERE run_pk = ? AND sequence > 0", (row["pk"],))
            db.execute("DELETE FROM journal WHERE run_pk = ?", (row["pk"],))
            return count

    def verify(self, run_id: str | None = None) -> VerifyReport:
        damage: list[Damage] = []
        with self._guard("verify") as db:
            if run_id is not None:
                return verify_run(self, [check_id(run_id)])
            for (problem,) in db.execute("PRAGMA integrity_check"):
                if problem != "ok":
                    damage.append(Damage("", None, str(self.path), problem))
            run_ids = [row[0] for row in db.execute("SELECT run_id FROM runs ORDER BY pk")]
        return verify_run(self, run_ids, damage, self.list_all_runs())

    # --- run documents ------------------------------------------------------------------------------------------

    def save_run(self, run: Run) -> None:
        with self._write(f"save the document of run {run.id!r}") as db:
            sqlite_documents.save(db, run)

    def load_run(self, run_id: str) -> Run | None:
        with self._guard(f"read the document of run {run_id!r}") as db:
            return sqlite_documents.load(db, check_id(run_id), str(self.path))

    def _document_ids(self, index: Index, key: str = "") -> list[str]:
        with self._guard("list run documents") as db:
            return [row[0] for row in db.execute(sqlite_documents.INDEXES[index], (key,) if key else ())]
