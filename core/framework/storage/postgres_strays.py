"""Rows of a PostgreSQL store that belong to no run. Transactions leave none behind: they tell of damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from framework.storage.postgres_database import Database
from framework.storage.records import Stray

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

_NO_RUN = (
    "NOT EXISTS (SELECT 1 FROM {schema}.runs WHERE runs.pk = run_pk) "
    "AND NOT EXISTS (SELECT 1 FROM {schema}.retired WHERE retired.run_pk = {table}.run_pk)"
)
"""The rows of retired runs are for a sweep to remove."""
_ROWS = {
    "steps": (_NO_RUN, ("commit in the log", "commits in the log"), "run"),
    "checkpoints": (_NO_RUN, ("checkpoint", "checkpoints"), "run"),
    "chunks": (_NO_RUN, ("chunk", "chunks"), "run"),
    "journal": (_NO_RUN, ("journal row", "journal rows"), "run"),
    "messages": (_NO_RUN, ("message", "messages"), "run"),
    "pins": (_NO_RUN, ("pin", "pins"), "run"),
    "definitions": (
        "NOT EXISTS (SELECT 1 FROM {schema}.runs WHERE runs.fingerprint = definitions.fingerprint)",
        ("definition", "definitions"),
        "run",
    ),
    "run_nodes": (
        "NOT EXISTS (SELECT 1 FROM {schema}.documents WHERE documents.run_id = run_nodes.run_id)",
        ("index entry", "index entries"),
        "document",
    ),
}
"""By table: which rows nobody needs, what they are, and what they lack. A run's rows come and go with it, in one
transaction, so looking never meets one in progress."""


def find(database: Database) -> list[Stray]:
    """See ``Storage.find_strays``."""
    found = []
    for table, (condition, (one, more), owner) in _ROWS.items():
        statement = f"SELECT count(*) FROM {{schema}}.{table} WHERE {condition.replace('{table}', table)}"
        count = database.query("look for rows of no run", statement)[0][0]
        if count:
            found.append(Stray(table, f"{count:,} {one if count == 1 else more} of no {owner} that is recorded"))
    return found


def remove(database: Database, stray: Stray) -> bool:
    """See ``Storage.remove_stray``."""
    if stray.name not in _ROWS:
        return False
    removed = False

    def work(connection: Connection, again: bool) -> bool:
        nonlocal removed
        # A run that is being accepted is not to be seen yet, and needs its definition all the same: wait for it.
        database.execute(connection, "LOCK TABLE {schema}.runs, {schema}.documents IN SHARE ROW EXCLUSIVE MODE")
        condition = _ROWS[stray.name][0].replace("{table}", stray.name)
        statement = f"DELETE FROM {{schema}}.{stray.name} WHERE {condition}"
        removed = database.execute(connection, statement).rowcount > 0 or removed
        return removed

    return database.transaction("remove rows of no run", work)
