"""``PostgresStorage``: a store in PostgreSQL, for any number of processes on any number of machines.

A commit is one call of a function in the database, which checks the fence and writes in one transaction: one round
trip, and one sync of the server's log (``postgres_commits``). Connections that break are replaced, and what was in the
middle then is found out, not done twice (``postgres_database``). Waiting workers are told (``postgres_listen``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from framework.errors import CorruptData, LeaseLost, MessageRefused, RunError, RunExists, RunNotFound, StorageError
from framework.schemas.run import Run, RunState
from framework.storage import (
    forks,
    postgres_address,
    postgres_commits,
    postgres_contents,
    postgres_documents,
    postgres_forks,
    postgres_pins,
    postgres_strays,
)
from framework.storage import postgres_reading as reading
from framework.storage import postgres_runs as runs
from framework.storage.checks import (
    MAX_KEY,
    check_fork,
    check_id,
    check_new_run,
    check_prefix,
    check_step,
    check_value,
)
from framework.storage.chunks import Chunk
from framework.storage.documents import FindsDocuments, Index
from framework.storage.interface import IsAlive, Storage
from framework.storage.postgres_database import Database
from framework.storage.postgres_listen import Listener
from framework.storage.postgres_rows import indexed, new_key
from framework.storage.postgres_schema import channel_of, migrate, version_of
from framework.storage.postgres_sweep import SweepsPostgres
from framework.storage.records import (
    NO_TOKEN,
    CheckpointRow,
    Commit,
    Content,
    Damage,
    JournalRow,
    LogRow,
    Message,
    NewRun,
    Retention,
    RunRecord,
    Stray,
    VerifyReport,
    Write,
)
from framework.storage.sqlite_schema import row_crc
from framework.storage.verify import newest_readable, refuse_pinned, verify_run

if TYPE_CHECKING:
    from framework.storage.interface import Rewrite
    from framework.storage.postgres_driver import Connection

_DEFINITION = "SELECT body, crc FROM {schema}.definitions WHERE fingerprint = %(fingerprint)s"
_SEND = "SELECT {schema}.leave_message(%(run_id)s, %(now)s, %(write_key)s, %(name)s, %(long_name)s, %(body)b, %(crc)s)"
_MISCOUNTED = """
SELECT run_id, sequence, last FROM (
    SELECT run_id, sequence, coalesce((SELECT max(sequence) FROM {schema}.steps WHERE run_pk = pk), 0) AS last
    FROM {schema}.runs WHERE %(run_id)s::text IS NULL OR run_id = %(run_id)s
) AS counted WHERE sequence <> last
"""


class PostgresStorage(FindsDocuments, SweepsPostgres, Storage):
    """A store in a schema of a PostgreSQL database (14 or newer), made when missing.

    ``url`` is ``postgresql://user:password@host:port/database`` with options of libpq and these:

    - ``schema`` (``surefoot``): where its tables are. Several stores may share a database.
    - ``pool_size`` (4): connections at most; they are opened when needed.
    - ``patience_seconds`` (30): how long a call waits for a database that is restarted or away before it raises
      ``StorageError``. Opening the store waits 5 seconds at most.
    - ``listen``: ``host:port`` for the connection that waits for notices, if the URL's is a pooler; ``no`` for none.
    - ``prepare`` (``yes``, with ``listen`` ``no``): whether the server is to keep statements that are made often.

    The database's clock decides; ``clock``, which gives seconds since the epoch, is for tests. Safe to use from any
    thread, and after ``os.fork``. Raises ``StorageError`` when the package psycopg is missing (extra ``postgres``),
    for a URL it cannot use, and for a database it cannot reach or use.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        address = postgres_address.parse(url)
        self._clock = clock
        self._database = Database(address, channel_of(address.schema))
        self._listener = Listener(self._database)
        # A store that is dropped without close() lets go of its connections all the same, also at the program's end.
        self._let_go = weakref.finalize(self, _close, self._database, self._listener)
        try:
            newest = migrate(self._database)
        except BaseException:
            self.close()
            raise
        self._database.opened(partial(version_of, newest=newest))
        forks.register(self)

    @property
    def url(self) -> str:
        """A URL that opens this store, without the password: libpq takes that from PGPASSWORD or a password file."""
        return self._database.where

    def close(self) -> None:
        self.closed = True
        self._let_go()

    def before_fork(self) -> None:
        self._listener.stand_still()
        self._database.pool.stand_still()

    def after_fork(self, child: bool) -> None:
        self._database.go_on(child)
        self._listener.go_on(child)

    def _now(self) -> float | None:
        """The time for tests; ``None`` for the database's."""
        return None if self._clock is None else float(self._clock())

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        if not runs.accept(self._database, new, owner, lease_seconds, self._now()):
            raise RunExists(new.run_id)
        found = self.find_run(new.run_id)
        if found is None:
            raise RunNotFound(new.run_id)
        return found

    def find_run(self, run_id: str) -> RunRecord | None:
        return runs.find(self._database, check_id(run_id), self._now())

    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        check_id(owner, "owner", MAX_KEY)
        return runs.claim(self._database, check_id(run_id), owner, lease_seconds, is_alive, sequence, self._now())

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        refused = self.renew_leases([(run_id, token)], lease_seconds)[0]
        if refused is not None:
            raise refused

    def renew_leases(self, leases: Sequence[tuple[str, int]], lease_seconds: float) -> list[RunError | None]:
        for run_id, _ in leases:
            check_id(run_id)
        return runs.renew(self._database, leases, lease_seconds, self._now())

    def release_lease(self, run_id: str, token: int) -> None:
        runs.release(self._database, check_id(run_id), token)

    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        return runs.list_runs(self._database, states, limit, before, self._now())

    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        return runs.find_runs(self._database, check_prefix(prefix), limit, self._now())

    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        return runs.list_due(self._database, now, limit, after, self._now())

    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        return runs.list_messaged(self._database, limit, check_prefix(after), self._now())

    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        return runs.delete(self._database, check_id(run_id), self._now(), force=force)

    # --- messages and notices -----------------------------------------------------------------------------------

    def send(self, run_id: str, name: str, body: bytes) -> None:
        check_id(run_id)
        check_id(name, "message name", MAX_KEY)
        check_value(body, f"Message {name!r}")
        entry, whole = indexed(name)
        values: dict[str, Any] = {"run_id": run_id, "name": entry, "long_name": whole, "body": bytes(body)}
        values |= {"now": self._now(), "write_key": new_key(), "crc": row_crc(name, bytes(body))}
        outcome = self._database.query(f"send a message to run {run_id!r}", _SEND, values, writes=True)[0][0]
        if outcome == "not_found":
            raise RunNotFound(run_id)
        if outcome != "done":
            why = "the run is completed." if outcome == "completed" else "one of this name was left before."
            raise MessageRefused(run_id, name, why)

    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        return reading.messages(self._database, check_id(run_id), on_damage)

    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        return reading.count_messages(self._database, [check_id(run_id) for run_id in run_ids])

    def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
        return self._listener.wait(timeout, stop)

    # --- forks --------------------------------------------------------------------------------------------------

    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        check_fork(run_id, sequence, first)
        return postgres_forks.fork(self._database, run_id, sequence, header, first, rewrite, self._now())

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        if self.closed:
            raise StorageError(f"The store {self.url} is closed.")
        return postgres_commits.commit(self._database, commits, self._now())

    def prune(self, run_id: str, retention: Retention) -> int:
        if self.find_run(run_id) is None or retention.keep is None:
            return 0
        values = {"keep": retention.keep, "needed": newest_readable(self, run_id)}
        pruned = 0

        def work(connection: Connection, again: bool) -> int:
            nonlocal pruned
            try:
                _, pk, _ = runs.lock(self._database, connection, run_id, self._now())
            except RunNotFound:
                return pruned
            statement = "SELECT {schema}.prune_run(%(pk)s, %(keep)s, %(needed)s)"
            row = self._database.execute(connection, statement, {**values, "pk": pk}).fetchone()
            pruned = pruned if row is None else row[0] or pruned  # nothing is left when an earlier try did it
            return pruned

        return self._database.transaction(f"prune run {run_id!r}", work)

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        refuse_pinned(self, run_id, sequence)
        removed = 0

        def work(connection: Connection, again: bool) -> int:
            nonlocal removed
            found, pk, _ = runs.lock(self._database, connection, check_id(run_id), self._now())
            if found.token != token or found.owner is None:
                raise LeaseLost(run_id, token)
            removed = self._forget(connection, pk, sequence) or removed
            return removed

        return self._database.transaction(f"rewind run {run_id!r}", work)

    def delete_checkpoints(self, run_id: str, *, force: bool = False) -> int:
        check_id(run_id)
        removed = 0

        def work(connection: Connection, again: bool) -> int:
            nonlocal removed
            try:
                found, pk, row = runs.lock(self._database, connection, run_id, self._now())
            except RunNotFound:
                return removed
            runs.refuse_if_held(row, found)
            postgres_pins.refuse_if_pinned(self._database, connection, pk, run_id, force=force)
            removed = self._forget(connection, pk, 0) or removed
            self._database.execute(connection, "DELETE FROM {schema}.journal WHERE run_pk = %(pk)s", {"pk": pk})
            return removed

        return self._database.transaction(f"delete the checkpoints of run {run_id!r}", work)

    def _forget(self, connection: Connection, pk: int, sequence: int) -> int:
        """Remove the checkpoints, their pins and the chunks after ``sequence``; how many checkpoints."""
        values = {"pk": pk, "sequence": sequence}
        after = "WHERE run_pk = %(pk)s AND sequence > %(sequence)s"
        for table in ("chunks", "pins"):
            self._database.execute(connection, f"DELETE FROM {{schema}}.{table} {after}", values)
        return self._database.execute(connection, f"DELETE FROM {{schema}}.checkpoints {after}", values).rowcount

    # --- reading ------------------------------------------------------------------------------------------------

    def definition(self, fingerprint: str) -> bytes | None:
        rows = self._database.query("read a definition", _DEFINITION, {"fingerprint": indexed(fingerprint)[0]})
        if not rows:
            return None
        body: bytes = rows[0][0]
        if row_crc(fingerprint, body) != rows[0][1]:
            raise CorruptData(f"The definition {fingerprint} in {self.url} does not match its checksum.")
        return body

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        return reading.log(self._database, check_id(run_id), after, on_damage)

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        return iter(reading.checkpoints(self._database, check_id(run_id), on_damage, limit))

    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
        return reading.checkpoint(self._database, check_id(run_id), checkpoint_id)

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        return [chunk for _, chunk in self.read_placed_chunks(run_id, sequence)]

    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        return reading.placed_chunks(self._database, check_id(run_id), sequence)

    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        wanted = None if step is None else check_step(step)
        return reading.journal(self._database, check_id(run_id), wanted, on_damage)

    def verify(self, run_id: str | None = None) -> VerifyReport:
        values = {"run_id": None if run_id is None else check_id(run_id)}
        damage = [
            Damage(name, last, f"record of run {name}", f"it counts {sequence} commits, the log {last}")
            for name, sequence, last in self._database.query("verify", _MISCOUNTED, values)
        ]
        if run_id is not None:
            return verify_run(self, [run_id], damage)
        rows = self._database.query("verify", "SELECT run_id FROM {schema}.runs ORDER BY pk")
        return verify_run(self, [row[0] for row in rows], damage, self.list_all_runs())

    def find_strays(self) -> list[Stray]:
        return postgres_strays.find(self._database)

    def remove_stray(self, stray: Stray) -> bool:
        return postgres_strays.remove(self._database, stray)

    # --- contents as bytes --------------------------------------------------------------------------------------

    def read_contents(
        self, run_id: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> Iterator[Content]:
        return postgres_contents.read(self._database, None if run_id is None else check_id(run_id), on_damage)

    def replace_contents(self, changes: Sequence[tuple[Content, bytes]]) -> int:
        return postgres_contents.replace(self._database, changes)

    # --- run documents ------------------------------------------------------------------------------------------

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        postgres_documents.save(self._database, run, token)

    def load_run(self, run_id: str) -> Run | None:
        return postgres_documents.load(self._database, check_id(run_id))

    def _document_ids(self, index: Index, key: str = "") -> list[str]:
        return postgres_documents.ids(self._database, index, key)


def _close(database: Database, listener: Listener) -> None:
    database.close()
    listener.close()
