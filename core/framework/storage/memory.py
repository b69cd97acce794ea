"""``MemoryStorage``: a store that lives and dies with its process, for tests and throw-away runs.

It is SQLite's own in-memory database behind the same code, not an imitation of one: what holds here holds on a file,
except that nothing outlives the process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from framework.storage.sqlite import SQLiteStorage
from framework.storage.sqlite_schema import prepare


class MemoryStorage(SQLiteStorage):
    """A store in this process's memory. "Durable" here means: until the object is closed or the process ends."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._open(Path(":memory:"), clock, 30)

    @property
    def url(self) -> str:
        return "memory://"

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        prepare(connection)
        return connection

    def _disconnect(self) -> None:
        # Before a fork the connection stays: it has no file, so the child's copy is its own.
        if self.closed:
            super()._disconnect()

    def _beside(self, doing: str) -> AbstractContextManager[sqlite3.Connection]:
        return self._guard(doing)  # there is only the one connection

    def _fold(self, db: sqlite3.Connection) -> None:
        """There is no log."""
