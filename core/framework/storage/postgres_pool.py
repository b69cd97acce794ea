"""The connections of one PostgreSQL store: a bounded number, opened when needed, checked, never shared by a fork."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from framework.errors import StorageError
from framework.storage import postgres_driver as driver

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

IDLE_SECONDS = 300.0
"""A connection not used for this long is closed when another one is given back."""

_abandoned: list[Connection] = []
"""Connections of a parent process: their sockets are taken away, and they must not be collected and say good-bye."""


class Pool:
    """At most ``size`` connections made by ``connect``; the last used one is used next."""

    def __init__(self, connect: Callable[[float], Connection], size: int) -> None:
        self._connect = connect
        self.size = size
        self._reset()

    def _reset(self) -> None:
        self._permits = threading.Semaphore(self.size)
        self._idle: deque[tuple[Connection, float]] = deque()
        self._closed = False

    @contextmanager
    def borrow(self, deadline: float) -> Iterator[Connection]:
        """A connection for the block, outside any transaction before and after it; lost ones are replaced.

        ``deadline`` (``time.monotonic``) ends the wait for one, and every statement on it. Raises the driver's errors
        and ``StorageError`` when all are in use until then.
        """
        permits = self._permits
        if not permits.acquire(timeout=max(0, deadline - time.monotonic())):
            raise StorageError(
                f"All {self.size} connections to the store were in use for too long. Give it more: ?pool_size=."
            )
        try:
            connection = self._take(deadline)
            try:
                connection.deadline = deadline  # type: ignore[attr-defined]  # of our own class
                yield connection
            except BaseException:
                # In the middle of something: what of it the server has is undone by closing.
                if not driver.is_lost(connection) and connection.info.transaction_status != 0:
                    connection.close()
                raise
            finally:
                self._give_back(connection)
        finally:
            permits.release()

    def _take(self, deadline: float) -> Connection:
        while True:
            try:
                connection, _ = self._idle.pop()
            except IndexError:
                return self._connect(max(0, min(deadline - time.monotonic(), driver.CONNECT_SECONDS)))
            if not driver.is_stale(connection):
                return connection
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        if self._closed or driver.is_lost(connection) or connection.info.transaction_status != 0:
            connection.close()
            return
        now = time.monotonic()
        self._idle.append((connection, now))
        if now - self._idle[0][1] > IDLE_SECONDS:
            oldest, _ = self._idle.popleft()
            oldest.close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they are given back."""
        self._closed = True
        while self._idle:
            self._idle.pop()[0].close()

    def stand_still(self) -> None:
        """Wait until no connection is in use, and lend none until ``go_on``."""
        for _ in range(self.size):
            self._permits.acquire()

    def go_on(self, child: bool) -> None:
        """Lend connections again; a forked ``child`` has none of its parent's."""
        if child:
            closed = self._closed
            for connection, _ in self._idle:
                abandon(connection)
            self._reset()
            self._closed = closed
        else:
            self._permits.release(self.size)


def abandon(connection: Connection) -> None:
    """Let go of a parent's connection: close its socket here without a word to the server, which the parent talks to.

    Its number is given to the null device, so that nothing that is opened later is taken for the socket.
    """
    _abandoned.append(connection)
    if not driver.is_lost(connection):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, connection.pgconn.socket, inheritable=False)
        os.close(null)
