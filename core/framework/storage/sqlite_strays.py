"""Rows of an SQLite file that belong to no run. Transactions leave none behind: they tell of damage."""

from __future__ import annotations

import sqlite3
from abc import abstractmethod
from contextlib import AbstractContextManager

from framework.storage.records import Stray

_NO_RUN = "run_pk NOT IN (SELECT pk FROM runs) AND run_pk NOT IN (SELECT run_pk FROM retired)"
"""The rows of retired runs are for a sweep to remove."""
_ROWS = {
    "steps": (_NO_RUN, ("commit in the log", "commits in the log"), "run"),
    "checkpoints": (_NO_RUN, ("checkpoint", "checkpoints"), "run"),
    "chunks": (_NO_RUN, ("chunk", "chunks"), "run"),
    "journal": (_NO_RUN, ("journal row", "journal rows"), "run"),
    "messages": (_NO_RUN, ("message", "messages"), "run"),
    "pins": (_NO_RUN, ("pin", "pins"), "run"),
    "definitions": ("fingerprint NOT IN (SELECT fingerprint FROM runs)", ("definition", "definitions"), "run"),
    "run_nodes": ("run_id NOT IN (SELECT run_id FROM documents)", ("index entry", "index entries"), "document"),
}
"""By table: which rows nobody needs, what they are, and what they lack. A run's rows come and go with it, in one
transaction, so neither looking nor removing ever meets one in progress."""


class FindsStrays:
    """The part of ``SQLiteStorage`` that finds and removes rows of no run."""

    @abstractmethod
    def _guard(self, doing: str) -> AbstractContextManager[sqlite3.Connection]: ...

    @abstractmethod
    def _write(self, doing: str) -> AbstractContextManager[sqlite3.Connection]: ...

    def find_strays(self) -> list[Stray]:
        """See ``Storage``."""
        found = []
        for table, (condition, (one, more), owner) in _ROWS.items():
            with self._guard("look for rows of no run") as db:
                count = db.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0]
            if count:
                found.append(Stray(table, f"{count:,} {one if count == 1 else more} of no {owner} that is recorded"))
        return found

    def remove_stray(self, stray: Stray) -> bool:
        """See ``Storage``."""
        if stray.name not in _ROWS:
            return False
        with self._write("remove rows of no run") as db:
            return db.execute(f"DELETE FROM {stray.name} WHERE {_ROWS[stray.name][0]}").rowcount > 0
