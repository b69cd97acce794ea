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
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from framework.errors import (
    CorruptData,
    LeaseLost,
    MessageRefused,
    RunBusy,
    RunError,
    RunExists,
    RunNotFound,
    StorageError,
)
from framework.schemas.run import Run, RunState
from framework.storage import (
    forks,
    sqlite_commits,
    sqlite_documents,
    sqlite_forks,
    sqlite_journal,
    sqlite_messages,
    sqlite_retention,
)
from framework.storage import sqlite_schema as schema
from framework.storage.checks import (
    MAX_KEY,
    check_fork,
    check_id,
    check_new_run,
    check_prefix,
    check_step,
    check_value,
    moved_on,
)
from framework.storage.compression import Compression, check_compression
from framework.storage.documents import FindsDocuments, Index
from framework.storage.driver_errors import translate
from framework.storage.interface import IsAlive, Rewrite, Storage, WouldWait
from framework.storage.records import (
    NO_TOKEN,
    Commit,
    Damage,
    JournalRow,
    Message,
    NewRun,
    Retention,
    RunRecord,
    VerifyReport,
    Write,
    attempts_after_claim,
    due_after,
)
from framework.storage.sqlite_contents import HasContents
from framework.storage.sqlite_pins import refuse_if_pinned
from framework.storage.sqlite_reading import ReadsCommits
from framework.storage.sqlite_schema import RUN_COLUMNS, facts_crc, row_crc
from framework.storage.sqlite_strays import FindsStrays
from framework.storage.sqlite_sweep import SweepsSQLite, forget_definition
from framework.storage.verify import newest_readable, refuse_pinned, verify_run

logger = logging.getLogger(__name__)

_STATES = frozenset(state.value for state in RunState)


class SQLiteStorage(FindsDocuments, ReadsCommits, SweepsSQLite, FindsStrays, HasContents, Storage):
    """A store in one SQLite file, for any number of processes on one machine.

    ``path`` is created when missing, ``:memory:`` is refused (use ``MemoryStorage``). ``clock`` gives seconds since
    the epoch; leases of all processes on the file must see the same clock, which on one machine they do.
    ``busy_seconds`` is how long to wait for another process's transaction. With ``compression`` large values are
    stored compressed from now on; what is stored already stays as it is, and is read either way.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = 30,
        compression: Compression | None = None,
    ) -> None:
        if str(path) == ":memory:":
            raise StorageError("SQLiteStorage keeps a file; for a store in memory use MemoryStorage or memory://.")
        self.compression = check_compression(compression)
        self._open(Path(path), clock, busy_seconds)

    def _open(self, path: Path, clock: Callable[[], float], busy_seconds: float) -> None:
        self.path = path
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self._writer = sqlite_commits.CommitWriter(path, clock)
        self._waits = True
        self._patient = True
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
        options = f"?compression={self.compression}" if self.compression is not None else ""
        return f"sqlite:///{quote(str(self.path))}{options}"

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._disconnect()
        self._close_aside()

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
            self._patient = True

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
                if self._waits and not self._patient:
                    self._be_patient()
                yield self._db
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
                # UnicodeDecodeError: SQLite's message quotes a damaged schema.
                raise translate(error, self.path, doing) from error

    @contextmanager
    def _write(self, doing: str) -> Iterator[sqlite3.Connection]:
        """One durable transaction: committed when the block ends, undone when it raises."""
        with self._guard(doing) as db:
            self._begin(db, doing)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _be_patient(self) -> None:
        """Wait for other processes again, which the last commits of ``try_hold`` did not."""
        self._patient = True
        self._db.execute(f"PRAGMA busy_timeout = {int(self._busy_seconds * 1000)}")

    def _begin_at_once(self, db: sqlite3.Connection) -> None:
        """As ``_begin``, but raises ``WouldWait`` when another process, or connection, is writing."""
        if self._patient:
            self._patient = False
            db.execute("PRAGMA busy_timeout = 0")
        try:
            self._begin(db, "commit")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise WouldWait from error
            raise

    def _begin(self, db: sqlite3.Connection, doing: str) -> None:
        if self._file_now() != self._file:
            # SQLite would go on writing into a file that nobody can open any more.
            raise StorageError(
                f"The store {self.path} was deleted or replaced while open; nothing was written to {doing}. "
                "Open it again, and restore it from a backup if it is missing."
            )
        db.execute("BEGIN IMMEDIATE")

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        now = self._clock()
        with self._write(f"record run {new.run_id!r}") as db:
            db.execute(
                "INSERT OR IGNORE INTO definitions (fingerprint, body, crc) VALUES (?, ?, ?)",
                (new.fingerprint, new.definition, row_crc(new.fingerprint, new.definition)),
            )
            pk = self._insert_run(db, new, now, owner, lease_seconds)
            sqlite_commits.insert_chunks(db, pk, 0, new.chunks)
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
            db.execute(
                "UPDATE runs SET owner = ?, token = token + 1, lease_until = ?, state = 'running', wake_at = NULL, "
                "recovery_attempts = ?, updated_at = ? WHERE pk = ?",
                (owner, now + lease_seconds, attempts_after_claim(found), now, row["pk"]),
            )
            claimed = self._record(self._row(db, run_id))
            # The caller wants to know what it took over, with the lease it now holds.
            return replace(claimed, state=found.state, error=found.error)

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        refused = self.renew_leases([(check_id(run_id), token)], lease_seconds)[0]
        if refused is not None:
            raise refused

    def renew_leases(self, leases: Sequence[tuple[str, int]], lease_seconds: float) -> list[RunError | None]:
        renew = "UPDATE runs SET lease_until = ? WHERE run_id = ? AND token = ? AND owner IS NOT NULL"
        outcomes: list[RunError | None] = []
        with self._write("renew leases") as db:
            until = self._clock() + lease_seconds
            for run_id, token in leases:
                renewed = db.execute(renew, (until, run_id, token)).rowcount
                if renewed:
                    outcomes.append(None)
                else:
                    outcomes.append(LeaseLost(run_id, token) if self._find_row(db, run_id) else RunNotFound(run_id))
        return outcomes

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
                f"SELECT {RUN_COLUMNS} FROM runs WHERE {condition} ORDER BY created_at DESC, run_id DESC LIMIT ?",
                (*values, limit),
            )
            return self._readable(rows)

    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        # A range of the index of run_id: SQLite compares text as UTF-8 bytes, of which nothing is above this mark.
        bounds = {"prefix": check_prefix(prefix).encode(), "limit": limit}
        with self._guard("find runs") as db:
            rows = db.execute(
                f"SELECT {RUN_COLUMNS} FROM runs WHERE run_id >= CAST(:prefix AS TEXT) AND "
                "run_id < CAST(:prefix || x'F8' AS TEXT) ORDER BY run_id LIMIT :limit",
                bounds,
            )
            return self._readable(rows)

    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        with self._guard("list the runs that are due") as db:
            # The plus keeps SQLite from reading all paused runs: few of them have a time.
            rows = db.execute(
                f"SELECT {RUN_COLUMNS} FROM runs WHERE wake_at <= ? AND (wake_at, run_id) > (?, ?) "
                "AND +state = 'paused' ORDER BY wake_at, run_id",
                (self._clock() if now is None else now, *due_after(after)),
            )
            # Read one by one, for damaged ones to be passed over: a short list says that there are no more.
            with closing(rows):
                return list(islice(self._each_readable(rows), limit))

    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        with self._guard("list the runs with messages") as db:
            rows = db.execute(
                f"SELECT {RUN_COLUMNS} FROM runs INDEXED BY runs_by_message "
                "WHERE messaged = 1 AND state = 'paused' AND run_id > ? ORDER BY run_id",
                (check_prefix(after),),
            )
            # Read one by one, for damaged ones to be passed over: a short list says that there are no more.
            with closing(rows):
                return list(islice(self._each_readable(rows), limit))

    def _readable(self, rows: Iterable[sqlite3.Row]) -> list[RunRecord]:
        return list(self._each_readable(list(rows)))

    def _each_readable(self, rows: Iterable[sqlite3.Row]) -> Iterator[RunRecord]:
        for row in rows:
            try:
                yield self._record(row)
            except CorruptData as error:
                logger.warning("Listing runs: %s", error)

    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        check_id(run_id)
        with self._write(f"delete run {run_id!r}") as db:
            self._writer.forget()
            row = self._find_row(db, run_id)
            had_document = sqlite_documents.delete(db, run_id)
            if row is None:
                return had_document
            self._refuse_if_held(row)
            refuse_if_pinned(db, row["pk"], run_id, force=force)
            for table in ("steps", "checkpoints", "chunks", "journal", "messages", "pins", "runs"):
                column = "pk" if table == "runs" else "run_pk"
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (row["pk"],))
            forget_definition(db, row["fingerprint"])
            return True

    def _find_row(self, db: sqlite3.Connection, run_id: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = db.execute(f"SELECT {RUN_COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
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
        return RunRecord(
            run_id=row["run_id"],
            executor_type=row["executor_type"],
            goal_id=row["goal_id"],
            fingerprint=row["fingerprint"],
            header=row["header"],
            state=state,
            sequence=row["last"] or 0,
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

    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        check_fork(run_id, sequence, first)
        now = self._clock()
        with self._write(f"fork run {run_id!r}") as db:
            source = self._row(db, run_id)
            found = self._record(source)  # raises when it is damaged
            new = NewRun(first.run_id, found.executor_type, found.goal_id, found.fingerprint, b"", header)
            pk = self._insert_run(db, new, now)
            sqlite_forks.copy(db, run_id, source["pk"], pk, sequence, rewrite)
            refused = self._writer.write(db, first)
            if refused is not None:
                raise refused
            return self._record(self._row(db, first.run_id))

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        with self._guard("commit") as db:
            outcomes = self._write_group(db, commits, apart=False)
            if outcomes is None:
                # In the good case savepoints cost time and serve nothing, so they are made only now.
                outcomes = self._write_group(db, commits, apart=True)
        return outcomes or []

    def try_hold(self) -> bool:
        # What a subclass does in its commit is not known here: it may wait.
        if type(self).commit is not SQLiteStorage.commit or self.closed or not self._lock.acquire(blocking=False):
            return False
        self._waits = False
        return True

    def let_go(self) -> None:
        self._waits = True
        self._lock.release()

    def _write_group(
        self, db: sqlite3.Connection, writes: Sequence[Write], *, apart: bool
    ) -> list[Exception | None] | None:
        """One durable transaction; ``None`` when the driver refused to write one of several, which undid them all."""
        writer = self._writer
        if self._waits:
            self._begin(db, "commit")
        else:
            self._begin_at_once(db)
        written = False
        try:
            outcomes = writer.write_all(db, writes, apart=apart)
            written = True
            db.execute("COMMIT")
        except BaseException as error:
            writer.undone()
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error) and len(writes) > 1 and not apart and not written:
                return None
            raise
        writer.done()
        return outcomes

    # --- checkpoints and the whole ------------------------------------------------------------------------------

    def prune(self, run_id: str, retention: Retention) -> int:
        if self.find_run(run_id) is None:
            return 0
        needed = newest_readable(self, run_id)
        with self._write(f"prune run {run_id!r}") as db:
            self._writer.forget()
            row = self._find_row(db, run_id)
            return 0 if row is None else sqlite_retention.prune(db, row["pk"], retention, needed)

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        refuse_pinned(self, run_id, sequence)
        with self._write(f"rewind run {run_id!r}") as db:
            self._writer.forget()
            row = self._row(db, run_id)
            if row["token"] != token or row["owner"] is None:
                raise LeaseLost(run_id, token)
            values = (row["pk"], sequence)
            db.execute("DELETE FROM pins WHERE run_pk = ? AND sequence > ?", values)
            db.execute("DELETE FROM chunks WHERE run_pk = ? AND sequence > ?", values)
            return db.execute("DELETE FROM checkpoints WHERE run_pk = ? AND sequence > ?", values).rowcount

    def delete_checkpoints(self, run_id: str, *, force: bool = False) -> int:
        with self._write(f"delete the checkpoints of run {run_id!r}") as db:
            self._writer.forget()
            row = self._find_row(db, check_id(run_id))
            if row is None:
                return 0
            self._refuse_if_held(row)
            refuse_if_pinned(db, row["pk"], run_id, force=force)
            db.execute("DELETE FROM pins WHERE run_pk = ? AND sequence > 0", (row["pk"],))
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

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        with self._write(f"save the document of run {run.id!r}") as db:
            found = None if token == NO_TOKEN else self._find_row(db, check_id(run.id))
            if found is not None and found["token"] != token:
                raise LeaseLost(run.id, token)
            sqlite_documents.save(db, run)

    def load_run(self, run_id: str) -> Run | None:
        with self._guard(f"read the document of run {run_id!r}") as db:
            return sqlite_documents.load(db, check_id(run_id), str(self.path))

    def _document_ids(self, index: Index, key: str = "") -> list[str]:
        with self._guard("list run documents") as db:
            return [row[0] for row in db.execute(sqlite_documents.INDEXES[index], (key,) if key else ())]
