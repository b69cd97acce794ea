"""Sweeps in the SQLite file: what may go, found by index; gone in one short transaction; its rows removed in slices.

A retired run loses its row in ``runs``, by which everything else is found, and its key is noted in ``retired``. Keys
are never given twice, so what is left under it is seen by nobody, and any sweep may remove it at any time.

Sweeps use a connection of their own, so that commits of this process wait for them no more than those of others do.
Rows are removed without a sync of their own (``synchronous = NORMAL``): the next commit's covers them, and what a
power cut undoes is removed again.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import islice
from pathlib import Path

from framework import _faults
from framework.errors import CorruptData, StorageError
from framework.schemas.run import RunState
from framework.storage import forks, sqlite_documents, sqlite_pins, sqlite_retention, sqlite_run_rows
from framework.storage import sqlite_schema as schema
from framework.storage.checks import check_id, check_pin
from framework.storage.driver_errors import translate
from framework.storage.records import RunRecord
from framework.storage.retention_records import Pin, Retired, Standing, StoreUsage, why_kept
from framework.storage.verify import newest_readable

_FAMILY = """
WITH RECURSIVE family(pk, run_id, depth) AS (
    SELECT pk, run_id, 0 FROM runs WHERE run_id = ?
    UNION
    SELECT part.pk, part.run_id, depth + 1 FROM family JOIN runs AS part INDEXED BY runs_by_parent
    ON part.parent_run_id = family.run_id WHERE depth < 100
)
SELECT {columns} FROM runs WHERE pk IN (SELECT pk FROM family) ORDER BY
    (SELECT min(depth) FROM family WHERE family.pk = runs.pk), runs.pk
"""
_WHOLE = "(parent_run_id IS NULL OR NOT EXISTS (SELECT 1 FROM runs AS whole WHERE whole.run_id = runs.parent_run_id))"
_AGED = """
SELECT run_id FROM runs WHERE created_at < :before AND (created_at, run_id) > (:created_at, :run_id)
AND NOT EXISTS (SELECT 1 FROM pins WHERE run_pk = runs.pk AND sequence = 0)
AND (
    SELECT coalesce(old.at, runs.updated_at) FROM checkpoints AS old WHERE old.run_pk = runs.pk
    AND old.sequence < (SELECT max(sequence) FROM checkpoints WHERE run_pk = runs.pk)
    AND NOT EXISTS (SELECT 1 FROM pins WHERE pins.run_pk = old.run_pk AND pins.sequence = old.sequence)
    ORDER BY old.sequence LIMIT 1
) < :before
ORDER BY created_at, run_id LIMIT :limit
"""
_YOUNGEST_TO_GO = """
SELECT min(sequence) FROM checkpoints WHERE run_pk = :pk
AND coalesce(at, (SELECT updated_at FROM runs WHERE pk = :pk)) >= :before
"""
_LOOK_SECONDS = 0.0007
_MOST_PAGES = 256
"""Pages given back in one transaction: each may be one to move, all of which are written when it ends."""


class Aside:
    """A connection beside a store's own, for one thread at a time. It stands still, closed, while the process forks."""

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self._path = path
        self._busy_seconds = busy_seconds
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        forks.register(self)

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """The connection, held by this thread."""
        with self._lock:
            if self._connection is None:
                self._connection = schema.connect(self._path, self._busy_seconds)
            yield self._connection

    def close(self) -> None:
        """Close it; ``use`` opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def before_fork(self) -> None:
        self._lock.acquire()
        self.close()

    def after_fork(self, child: bool) -> None:
        self._lock.release()


class SweepsSQLite:
    """The part of ``SQLiteStorage`` that knows pins and sweeps; see ``KeepsRuns``."""

    path: Path
    closed: bool
    _clock: Callable[[], float]
    _busy_seconds: float
    _aside: Aside | None = None
    _file: tuple[int, int] | None
    _vacuum_pages = 16

    @abstractmethod
    def _guard(self, doing: str) -> AbstractContextManager[sqlite3.Connection]: ...

    @abstractmethod
    def _write(self, doing: str) -> AbstractContextManager[sqlite3.Connection]: ...

    @abstractmethod
    def _file_now(self) -> tuple[int, int] | None: ...

    @abstractmethod
    def _row(self, db: sqlite3.Connection, run_id: str) -> sqlite3.Row: ...

    @abstractmethod
    def _find_row(self, db: sqlite3.Connection, run_id: str) -> sqlite3.Row | None: ...

    @abstractmethod
    def _record(self, row: sqlite3.Row, *, gone: bool = False) -> RunRecord: ...

    @abstractmethod
    def _each_readable(self, rows: Iterable[sqlite3.Row]) -> Iterator[RunRecord]: ...

    # --- the connection aside -----------------------------------------------------------------------------------

    def _beside(self, doing: str) -> AbstractContextManager[sqlite3.Connection]:
        """The connection that sweeps use, with the driver's errors translated."""
        return self._beside_file(doing)

    @contextmanager
    def _beside_file(self, doing: str) -> Iterator[sqlite3.Connection]:
        with self._guard(doing):  # raises when the store is closed
            if self._file_now() != self._file:
                raise StorageError(f"The store {self.path} was deleted or replaced while open; open it again.")
            if self._aside is None:
                self._aside = Aside(self.path, self._busy_seconds)
            aside = self._aside
        try:
            with aside.use() as db:
                yield db
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise translate(error, self.path, doing) from error

    def _close_aside(self) -> None:
        if self._aside is not None:
            self._aside.close()

    @contextmanager
    def _slice(self, doing: str, *, synced: bool) -> Iterator[sqlite3.Connection]:
        """A short transaction beside the store's own; ``synced``: durable when the block ends."""
        with self._beside(doing) as db:
            db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._begin_aside(db)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _begin_aside(self, db: sqlite3.Connection) -> None:
        """Begin a transaction that writes. SQLite's own waiting looks for the lock ever more seldom, up to ten times a
        second, and beside one who commits without a pause would hardly ever get it."""
        until = time.monotonic() + self._busy_seconds
        db.execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    db.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                    if not is_busy or time.monotonic() >= until:
                        raise
                    time.sleep(_LOOK_SECONDS)
        finally:
            db.execute(f"PRAGMA busy_timeout = {int(self._busy_seconds * 1000)}")

    # --- pins ---------------------------------------------------------------------------------------------------

    def pin(self, run_id: str, checkpoint_id: str | None = None, note: str = "") -> Pin:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id, note)
        with self._write(f"pin run {run_id!r}") as db:
            return sqlite_pins.put(db, self._row(db, run_id)["pk"], run_id, checkpoint_id, note, self._clock())

    def unpin(self, run_id: str, checkpoint_id: str | None = None) -> bool:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id)
        with self._write(f"unpin run {run_id!r}") as db:
            row = self._find_row(db, run_id)
            if row is None:
                return False
            sequence = 0 if checkpoint_id is None else sqlite_pins.find(db, row["pk"], checkpoint_id)
            return (sequence > 0) == (checkpoint_id is not None) and sqlite_pins.take(db, row["pk"], sequence)

    def list_pins(self, run_ids: Sequence[str] | None = None) -> list[Pin]:
        """See ``KeepsRuns``."""
        with self._guard("list pins") as db:
            return sqlite_pins.read(db, None if run_ids is None else [check_id(run_id) for run_id in run_ids])

    # --- what may go --------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """See ``KeepsRuns``."""
        with self._guard("measure it") as db:
            page, pages, free, vacuum = (
                int(db.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_size", "page_count", "freelist_count", "auto_vacuum")
            )
        return StoreUsage(self._clock(), (pages - free) * page, free * page, can_shrink=vacuum == 2)

    def list_ended(
        self, states: Sequence[RunState], limit: int = 100, after: RunRecord | None = None
    ) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        found: list[RunRecord] = []
        for state in states:
            found += self._ended(state, limit, after)
        return sorted(found, key=lambda run: (run.updated_at, run.run_id))[:limit]

    def _ended(self, state: RunState, limit: int, after: RunRecord | None) -> list[RunRecord]:
        """Runs in one state that are no part of another, in the order of the index."""
        where, values = _ended_where(state, self._clock())
        if after is not None:
            where += " AND (updated_at, run_id) > (?, ?)"
            values += [after.updated_at, after.run_id]
        with self._guard("list the runs that ended") as db:
            rows = db.execute(
                f"SELECT {schema.RUN_COLUMNS} FROM runs INDEXED BY runs_by_change WHERE {where} AND {_WHOLE} "
                "ORDER BY updated_at, run_id",
                values,
            )
            # Read one by one, for damaged ones to be passed over: a short list says that there are no more.
            with closing(rows):
                return list(islice(self._each_readable(rows), limit))

    def nth_newest_ended(self, states: Sequence[RunState], count: int) -> RunRecord | None:
        """See ``KeepsRuns``."""
        now = self._clock()
        each = [_ended_where(state, now) for state in dict.fromkeys(states)]
        # One statement, in which SQLite merges what each state's part of the index gives in order.
        parts = " UNION ALL ".join(
            f"SELECT updated_at, run_id FROM runs INDEXED BY runs_by_change WHERE {where} AND {_WHOLE}"
            for where, _ in each
        )
        values = [value for _, some in each for value in some]
        place = count - 1
        while True:
            with self._beside("look for the newest runs") as db:
                statement = f"{parts} ORDER BY updated_at DESC, run_id DESC LIMIT 1 OFFSET ?"
                row = db.execute(statement, [*values, place]).fetchone()
            if row is None:
                return None
            with self._guard("look for the newest runs") as db:
                stored = self._find_row(db, row["run_id"])
                for run in self._each_readable([] if stored is None else [stored]):
                    return run
            place += 1  # it cannot be read, or went this moment: rather one more is kept

    def list_aged(self, before: float, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        place = (after.created_at, after.run_id) if after is not None else (-1e300, "")
        found: list[RunRecord] = []
        while len(found) < limit:
            values = {"before": before, "created_at": place[0], "run_id": place[1], "limit": limit - len(found)}
            with self._beside("list runs with old checkpoints") as db:
                run_ids = [row[0] for row in db.execute(_AGED, values).fetchall()]
            if not run_ids:
                break
            with self._guard("list runs with old checkpoints") as db:
                rows = [row for run_id in run_ids if (row := self._find_row(db, run_id)) is not None]
                found += self._each_readable(rows)
            if not rows:
                break
            place = (rows[-1]["created_at"], rows[-1]["run_id"])
        return found

    # --- removing it --------------------------------------------------------------------------------------------

    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        """See ``KeepsRuns``."""
        if not runs:
            return []
        if dry_run:
            with self._beside("see which runs would go") as db:
                families = [(run, self._family(db, run.run_id)) for run in runs]
                return [
                    self._retire(db, run, rows, states, self._sizes(db, rows), dry_run=True) for run, rows in families
                ]
        done: list[Retired] = []
        with self._beside("measure runs") as db:
            # Before the transaction: long runs take long to measure, and nobody has to wait for it.
            sizes = []
            until = time.monotonic() + 5 * seconds
            for run in runs:
                sizes.append(self._sizes(db, self._family(db, run.run_id)))
                if time.monotonic() >= until:
                    break
        with self._slice("remove runs", synced=True) as db:
            until = time.monotonic() + seconds
            for run, size in zip(runs, sizes, strict=False):
                done.append(self._retire(db, run, self._family(db, run.run_id), states, size))
                if time.monotonic() >= until:
                    break
            _faults.reach("sweep.inside")
        _faults.reach("sweep.retired")
        return done

    def _family(self, db: sqlite3.Connection, run_id: str) -> list[sqlite3.Row]:
        return db.execute(_FAMILY.format(columns=schema.RUN_COLUMNS), (run_id,)).fetchall()

    def _sizes(self, db: sqlite3.Connection, family: Sequence[sqlite3.Row]) -> tuple[int, int]:
        """Checkpoints of a run with its parts, and about how many bytes of the file they take."""
        checkpoints = 0
        size = 0.0
        page = db.execute("PRAGMA page_size").fetchone()[0]
        for row in family:
            count = "SELECT count(*) FROM checkpoints WHERE run_pk = ?"
            checkpoints += db.execute(count, (row["pk"],)).fetchone()[0]
            size += sqlite_run_rows.size_of(db, row["pk"], row["run_id"], page)
        return checkpoints, round(size)

    def _retire(
        self,
        db: sqlite3.Connection,
        run: RunRecord,
        rows: Sequence[sqlite3.Row],
        states: Sequence[RunState],
        sizes: tuple[int, int],
        *,
        dry_run: bool = False,
    ) -> Retired:
        try:
            family = [self._standing(db, row) for row in rows]
        except CorruptData as error:
            return Retired(kept=f"it cannot be read: {error}")
        kept = why_kept(run, family, states, self._clock())
        if kept:
            return Retired(kept=kept)
        if not dry_run:
            for row in rows:
                db.execute("DELETE FROM runs WHERE pk = ?", (row["pk"],))
                db.execute("INSERT INTO retired (run_pk) VALUES (?)", (row["pk"],))
                sqlite_documents.delete(db, row["run_id"])
            for fingerprint in {row["fingerprint"] for row in rows}:
                forget_definition(db, fingerprint)
        return Retired(tuple(each.run.run_id for each in family), *sizes)

    def _standing(self, db: sqlite3.Connection, row: sqlite3.Row) -> Standing:
        found = db.execute("SELECT min(sequence), max(sequence) FROM pins WHERE run_pk = ?", (row["pk"],)).fetchone()
        return Standing(self._record(row), found[0] == 0, bool(found[1]))

    def purge(self, seconds: float = 0.004) -> bool:
        """See ``KeepsRuns``."""
        with self._beside("look for rows to remove") as db:
            if db.execute("SELECT 1 FROM retired LIMIT 1").fetchone() is None:
                return False
        with self._slice("remove the rows of runs that are gone", synced=False) as db:
            until = time.monotonic() + seconds
            while (row := db.execute("SELECT run_pk FROM retired ORDER BY run_pk LIMIT 1").fetchone()) is not None:
                if not sqlite_run_rows.purge(db, row[0], until):
                    break
                db.execute("DELETE FROM retired WHERE run_pk = ?", (row[0],))
                if time.monotonic() >= until:
                    break
            more = db.execute("SELECT 1 FROM retired LIMIT 1").fetchone() is not None
        _faults.reach("sweep.purge")
        return more

    def prune_older(self, run_id: str, before: float, limit: int = 50, *, dry_run: bool = False) -> int:
        """See ``KeepsRuns``."""
        check_id(run_id)
        with self._beside(f"look for old checkpoints of run {run_id!r}") as db:
            row = self._find_row(db, run_id)
            if row is None or not self._to_drop(db, row["pk"], before, None):
                return 0
        needed = newest_readable(self, run_id)  # type: ignore[arg-type]  # a part of a whole Storage
        if dry_run:
            with self._beside(f"look for old checkpoints of run {run_id!r}") as db:
                return len(self._to_drop(db, row["pk"], before, needed))
        with self._slice(f"prune run {run_id!r}", synced=True) as db:
            row = self._find_row(db, run_id)
            going = [] if row is None else self._to_drop(db, row["pk"], before, needed)
            if row is None or not going:
                return 0
            return self._drop_some(db, row["pk"], going[: max(1, limit)])

    def _drop_some(self, db: sqlite3.Connection, pk: int, going: Sequence[int]) -> int:
        """Drop these checkpoints one by one, until much room is free; how many. What a checkpoint holds that no other
        needs is known only afterwards."""
        free, page = _pages(db)[1:]
        for dropped, sequence in enumerate(going, 1):
            # Below the first that stays, all but the pinned go.
            next_one = "SELECT min(sequence) FROM checkpoints WHERE run_pk = ? AND sequence > ?"
            stays = db.execute(next_one, (pk, sequence)).fetchone()[0]
            sqlite_retention.drop_below(db, pk, stays, sequence)
            if (_pages(db)[1] - free) * page >= sqlite_run_rows.SLICE_BYTES:
                return dropped
        return len(going)

    def _to_drop(self, db: sqlite3.Connection, pk: int, before: float, needed: int | None) -> list[int]:
        """The checkpoints of a run that may go by age, in order."""
        if db.execute("SELECT 1 FROM pins WHERE run_pk = ? AND sequence = 0", (pk,)).fetchone() is not None:
            return []
        newest = db.execute("SELECT max(sequence) FROM checkpoints WHERE run_pk = ?", (pk,)).fetchone()[0]
        young = db.execute(_YOUNGEST_TO_GO, {"pk": pk, "before": before}).fetchone()[0]
        oldest = min(each for each in (newest or 0, young, needed) if each is not None)
        rows = db.execute(
            "SELECT sequence FROM checkpoints WHERE run_pk = ? AND sequence < ? AND sequence NOT IN "
            "(SELECT sequence FROM pins WHERE run_pk = ?) ORDER BY sequence",
            (pk, oldest, pk),
        )
        return [row[0] for row in rows]

    def shrink(self, seconds: float = 0.004) -> int:
        """See ``KeepsRuns``."""
        with self._beside("give free room back") as db:
            before = _pages(db)
            if not before[1] or db.execute("PRAGMA auto_vacuum").fetchone()[0] != 2:
                self._fold(db)
                return 0
            db.execute("PRAGMA synchronous = NORMAL")
            self._begin_aside(db)
            try:
                began = time.monotonic()
                for _ in range(min(before[1], self._vacuum_pages)):
                    # Python 3.11 and 3.12.0 take one step of a statement without columns, which is one page.
                    db.execute("PRAGMA incremental_vacuum(1)").fetchall()
                    if time.monotonic() - began >= seconds:
                        break
                db.execute("COMMIT")
                took = time.monotonic() - began
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._vacuum_pages = min(_MOST_PAGES, self._vacuum_pages * 2) if took < seconds / 2 else self._vacuum_pages
            self._vacuum_pages = max(1, self._vacuum_pages // 2) if took > seconds else self._vacuum_pages
            return int(max(1, (before[0] - _pages(db)[0]) * before[2]))

    def _fold(self, db: sqlite3.Connection) -> None:
        """Fold the log into the file, which then becomes as short as it is; as far as that goes without waiting."""
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def compact(self) -> int:
        """See ``KeepsRuns``."""
        while self.purge(1.0):
            pass
        with self._guard("write it anew") as db:
            before = _pages(db)
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            after = _pages(db)
        return int(max(0, before[0] * before[2] - after[0] * after[2]))


def forget_definition(db: sqlite3.Connection, fingerprint: str) -> None:
    """Remove a definition that no run has."""
    db.execute(
        "DELETE FROM definitions WHERE fingerprint = ? AND NOT EXISTS "
        "(SELECT 1 FROM runs WHERE runs.fingerprint = definitions.fingerprint)",
        (fingerprint,),
    )


def _ended_where(state: RunState, now: float) -> tuple[str, list[str | float]]:
    """The condition that a run is in a state, with its values."""
    if state not in (RunState.CRASHED, RunState.RUNNING):
        return "state = ?", [state.value]
    lease = "(owner IS NULL OR lease_until <= ?)" if state is RunState.CRASHED else "lease_until > ?"
    return f"state = ? AND {lease}", [RunState.RUNNING.value, now]


def _pages(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Pages of the file, those that are free, and the bytes of one."""
    count, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return count, free, size
