"""Calls of a PostgreSQL database that outlive its restarts: made again, within a limit, and nothing is done twice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from framework.errors import StorageError
from framework.storage import postgres_driver as driver
from framework.storage.postgres_address import Address
from framework.storage.postgres_pool import Pool

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection, Cursor

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
OPENING_SECONDS = 5.0
"""How long, at most, a server is waited for when a store is opened: nobody knows yet that there is one."""

IDLE_TRANSACTION_SECONDS = 10
"""A process that stands still in the middle of a transaction loses it after this long, and others get the run."""


class Database:
    """The database at ``address``. Statements name schema and channel as ``{schema}`` and ``{channel}``.

    A call is tried again when its connection was lost or the server asked for it, until ``patience_seconds`` are over.
    So every call must be one that can be made twice; it is told when it may have been done before.
    """

    def __init__(self, address: Address, channel: str) -> None:
        self.address = address
        self.channel = channel
        self.pool = Pool(self._connect, address.pool_size)
        self.closed = threading.Event()
        self._patience = min(address.patience_seconds, OPENING_SECONDS)
        self._texts: dict[str, str] = {}
        self._check: Callable[[Database, Connection], object] | None = None

    @property
    def where(self) -> str:
        """The store's name in messages."""
        return self.address.shown

    def opened(self, check: Callable[[Database, Connection], object]) -> None:
        """Say that the server was there: from now on it is waited for as long as the address says.

        ``check`` raises ``StoreTooNew`` once a newer version of this library has migrated the store.
        """
        self._patience = self.address.patience_seconds
        self._check = check

    def text(self, statement: str) -> str:
        """``statement`` with the names of schema and channel put in."""
        found = self._texts.get(statement)
        if found is None:
            found = statement.replace("{schema}", f'"{self.address.schema}"').replace("{channel}", self.channel)
            self._texts[statement] = found
        return found

    def run(
        self,
        doing: str,
        attempt: Callable[[Connection, bool], T],
        *,
        writes: bool = False,
        seconds: float | None = None,
    ) -> T:
        """What ``attempt`` gives for a connection, and whether an earlier attempt may have been carried out.

        ``seconds`` is how long it may take, if not as long as the address says. Raises what it raises, the driver's
        errors as ``StorageError``.
        """
        deadline = time.monotonic() + (self._patience if seconds is None else seconds)
        pause = FIRST_PAUSE_SECONDS
        again = False
        error_type = driver.load().Error
        while True:
            if self.closed.is_set():
                raise StorageError(f"The store {self.where} is closed.")
            lost = False
            try:
                with self.pool.borrow(deadline) as connection:
                    try:
                        return attempt(connection, again)
                    except error_type:
                        lost = driver.is_lost(connection)
                        raise
            except error_type as error:
                # Not done for sure when the connection is still there, or there was none at all.
                again = again or (writes and lost)
                left = deadline - time.monotonic()
                if left <= 0 or not (lost or driver.is_passing(error)):
                    self._refuse_newer(error)
                    raise driver.translate(error, self.where, doing, unknown=again) from error
            # Many processes come back to a restarted server at once, so not all at the same moment.
            self.closed.wait(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _refuse_newer(self, error: Exception) -> None:
        """Raise ``StoreTooNew`` when ``error`` is of a statement that fits the store no longer."""
        if self._check is None or not driver.is_misunderstood(error):
            return
        try:
            with self.pool.borrow(time.monotonic() + self._patience) as connection:
                self._check(self, connection)
        except driver.load().Error:
            return  # it cannot be asked: then ``error`` says what is wrong

    def query(
        self, doing: str, statement: str, values: Mapping[str, Any] | None = None, *, writes: bool = False
    ) -> list[tuple[Any, ...]]:
        """The rows of one statement that changes nothing, or ``writes`` and can be made twice."""

        def attempt(connection: Connection, again: bool) -> list[tuple[Any, ...]]:
            return self.execute(connection, statement, values).fetchall()

        return self.run(doing, attempt, writes=writes)

    def execute(
        self,
        connection: Connection,
        statement: str,
        values: Mapping[str, Any] | None = None,
        *,
        prepare: bool | None = None,
    ) -> Cursor:
        """One statement, in one round trip. ``prepare=False`` for one that will hardly come again."""
        return connection.execute(self.text(statement).encode(), values or {}, prepare=prepare, binary=True)

    def transaction(
        self,
        doing: str,
        work: Callable[[Connection, bool], T],
        *,
        snapshot: bool = False,
        seconds: float | None = None,
    ) -> T:
        """What ``work`` gives, in a transaction that is durable on return and undone when it raises.

        ``work`` is told whether an earlier try may have been committed. With ``snapshot`` all its statements see the
        store as the first one does.
        """
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ" if snapshot else "BEGIN ISOLATION LEVEL READ COMMITTED"

        def attempt(connection: Connection, again: bool) -> T:
            connection.execute(
                self.text(
                    f"{begin}; SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_SECONDS}s'; "
                    "SET LOCAL enable_seqscan = off; SELECT set_config('synchronous_commit', 'on', true) "
                    "WHERE current_setting('synchronous_commit') = 'off'"
                ).encode(),
                prepare=False,  # several statements
            )
            try:
                result = work(connection, again)
            except BaseException:
                if not driver.is_lost(connection):
                    connection.execute("ROLLBACK")
                raise
            if connection.execute("COMMIT").statusmessage != "COMMIT":
                raise StorageError(f"Store {self.where}: cannot {doing}: the server undid it. Nothing was written.")
            return result

        return self.run(doing, attempt, writes=True, seconds=seconds)

    def _connect(self, seconds: float) -> Connection:
        connection = driver.connect(self.address.conninfo, seconds, self.address.prepare)
        version = connection.info.server_version // 10_000
        encoding = connection.info.parameter_status("server_encoding") or "UTF8"
        if version >= driver.OLDEST_SERVER and encoding == "UTF8":
            return connection
        connection.close()
        if encoding != "UTF8":
            raise StorageError(
                f"Store {self.where}: the database's encoding is {encoding}, which cannot hold every text. "
                "Make one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0."
            )
        raise StorageError(
            f"Store {self.where}: this is PostgreSQL {version}; this library needs {driver.OLDEST_SERVER} or newer."
        )

    def go_on(self, child: bool) -> None:
        """Go on after a fork. A ``child`` takes nothing over that a thread of its parent may have held."""
        if child:
            closed, self.closed = self.closed.is_set(), threading.Event()
            if closed:
                self.closed.set()
        self.pool.go_on(child)

    def close(self) -> None:
        """Close the connections; calls that wait for the server end with an error."""
        self.closed.set()
        self.pool.close()
