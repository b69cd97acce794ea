"""Waiting for notices of a PostgreSQL database: one connection of its own, for however many threads wait."""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING

from framework.storage import postgres_driver as driver
from framework.storage.postgres_database import LONGEST_PAUSE_SECONDS, Database
from framework.storage.postgres_pool import abandon

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

SLICE_SECONDS = 0.1
"""How long, at most, until a waiting thread sees that it is to stop."""

ASK_SECONDS = 30.0
"""A connection that was silent for this long is asked whether it still is one."""


class Listener:
    """Notices of the database's channel. One waiting thread reads the connection; all of them are told.

    A notice that comes while the connection is away is lost, so a new one counts as a notice: the caller looks.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reset()

    def _reset(self) -> None:
        self._connection: Connection | None = None
        self._heard_at = 0.0
        self._retry_at = 0.0
        self._pause = SLICE_SECONDS
        self._changed = threading.Condition()
        self._notices = 0
        self._reading = False
        self._told = False
        self._seen = 0
        self.waiting = 0

    def wait(self, timeout: float, stop: threading.Event | None = None) -> bool:
        """See ``Storage.wait_for_work``. Raises no error when the database is away: it keeps trying."""
        end = time.monotonic() + max(timeout, 0)
        # What no call has reported yet counts at once; what comes now counts for all that are waiting.
        with self._changed:
            seen = self._seen
            self.waiting += 1
        try:
            return self._wait(end, seen, stop)
        finally:
            with self._changed:
                self.waiting -= 1

    def _wait(self, end: float, seen: int, stop: threading.Event | None) -> bool:
        while True:
            with self._changed:
                if self._notices != seen:
                    self._seen = self._notices
                    return True
                left = end - time.monotonic()
                if self._database.closed.is_set() or (stop is not None and stop.is_set()) or left <= 0:
                    return False
                if self._reading:
                    self._changed.wait(min(left, SLICE_SECONDS))
                    continue
                self._reading = True
            heard = False
            try:
                heard = self._read(min(left, SLICE_SECONDS))
            finally:
                with self._changed:
                    self._reading = False
                    self._notices += heard
                    self._changed.notify_all()

    def _read(self, seconds: float) -> bool:
        """Read notices for a moment, connecting first if need be; whether there were any."""
        connection = self._connection
        if connection is None:
            return self._listen(seconds)
        error_type = driver.load().Error
        try:
            poller = select.poll()
            poller.register(connection.pgconn.socket, select.POLLIN)
            if not poller.poll(seconds * 1000):
                if time.monotonic() - self._heard_at > ASK_SECONDS:
                    connection.deadline = time.monotonic() + driver.CONNECT_SECONDS  # type: ignore[attr-defined]
                    connection.execute("SELECT 1")
                    self._heard_at = time.monotonic()
                told, self._told = self._told, False
                return told
            connection.pgconn.consume_input()
            heard = False
            while connection.pgconn.notifies() is not None:
                heard = True
            self._heard_at = time.monotonic()
            return heard
        except (error_type, OSError):
            self._drop()
            return False

    def _listen(self, seconds: float) -> bool:
        """Connect and listen, if it is time to try; whether that was done."""
        address = self._database.address
        now = time.monotonic()
        if address.listen_conninfo is None or now < self._retry_at:
            self._database.closed.wait(seconds)
            return False
        error_type = driver.load().Error
        try:
            connection = driver.connect(address.listen_conninfo)
            self._connection = connection
            connection.add_notify_handler(self._on_notice)
            connection.deadline = time.monotonic() + driver.CONNECT_SECONDS  # type: ignore[attr-defined]
            connection.execute(f'LISTEN "{self._database.channel}"'.encode())
        except error_type:
            self._drop()
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)
            return False
        self._pause = SLICE_SECONDS
        self._heard_at = time.monotonic()
        return True

    def _on_notice(self, notice: object) -> None:
        """A notice that came with the answer to a question of ours."""
        self._told = True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close the connection; threads that wait are let go within a moment. The database is closed already."""
        with self._changed:
            while self._reading:
                self._changed.wait(SLICE_SECONDS)
            self._drop()

    def stand_still(self) -> None:
        """Have no thread read until ``go_on``, which the same thread calls."""
        self._changed.acquire()
        while self._reading:
            self._changed.wait(SLICE_SECONDS)

    def go_on(self, child: bool) -> None:
        """Read again; a forked ``child`` has a connection of its own."""
        if child:
            connection = self._connection
            self._reset()
            if connection is not None:
                abandon(connection)
        else:
            self._changed.release()
