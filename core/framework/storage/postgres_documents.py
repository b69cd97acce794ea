"""``Run`` documents in PostgreSQL, and their indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from framework.errors import CorruptData, LeaseLost
from framework.schemas.run import Run
from framework.storage.documents import Index, document_bytes, nodes_of, parse_document
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import indexed, text_of
from framework.storage.records import NO_TOKEN
from framework.storage.sqlite_schema import row_crc

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

_SAVE = (
    "INSERT INTO {schema}.documents (run_id, goal_id, long_goal_id, status, body, crc) "
    "VALUES (%(run_id)s, %(goal_id)s, %(long_goal_id)s, %(status)s, %(body)b, %(crc)s) "
    "ON CONFLICT (run_id) DO UPDATE SET goal_id = excluded.goal_id, long_goal_id = excluded.long_goal_id, "
    "status = excluded.status, body = excluded.body, crc = excluded.crc"
)
# Whoever takes the run over waits until the document is written, and commits with it.
_TOKEN = "SELECT token FROM {schema}.runs WHERE run_id = %(run_id)s FOR SHARE"
_CLEAR = "DELETE FROM {schema}.run_nodes WHERE run_id = %(run_id)s"
_INDEX = "INSERT INTO {schema}.run_nodes (node_id, run_id) SELECT unnest(%(nodes)s::text[]), %(run_id)s"
_LOAD = "SELECT body, crc FROM {schema}.documents WHERE run_id = %(run_id)s"
_DELETE = "DELETE FROM {schema}.documents WHERE run_id = %(run_id)s"
_IDS = "SELECT run_id, NULL FROM {schema}.documents "
INDEXES: dict[Index, str] = {
    "all": f"{_IDS} ORDER BY pk",
    "goals": "SELECT DISTINCT goal_id, long_goal_id FROM {schema}.documents",
    "by_goal": f"{_IDS} WHERE goal_id = %(key)s ORDER BY pk",
    "by_status": f"{_IDS} WHERE status = %(key)s ORDER BY pk",
    "by_node": "SELECT run_id, NULL FROM {schema}.run_nodes JOIN {schema}.documents USING (run_id) "
    "WHERE node_id = %(key)s ORDER BY documents.pk",
}
"""Queries of ids, shortened and whole, for what they are named after."""


def save(database: Database, run: Run, token: int) -> None:
    """Write a document and its index entries, replacing an earlier one of the same id. Durable on return.

    Raises ``LeaseLost`` for a ``token`` that is not the run's.
    """
    body = document_bytes(run)
    goal_id, long_goal_id = indexed(run.goal_id)
    values = {
        "run_id": run.id,
        "goal_id": goal_id,
        "long_goal_id": long_goal_id,
        "status": run.status.value,
        "body": body,
        "crc": row_crc(run.id, body),
        "nodes": [indexed(node_id)[0] for node_id in nodes_of(run)],
    }

    def work(connection: Connection, again: bool) -> None:
        if token != NO_TOKEN:
            row = database.execute(connection, _TOKEN, {"run_id": run.id}).fetchone()
            if row is not None and row[0] != token:
                raise LeaseLost(run.id, token)
        for statement in (_SAVE, _CLEAR, _INDEX):  # the first locks the document against another save of it
            database.execute(connection, statement, values)

    database.transaction(f"save the document of run {run.id!r}", work)


def load(database: Database, run_id: str) -> Run | None:
    """A document, or ``None``. Raises ``CorruptData``."""
    rows = database.query(f"read the document of run {run_id!r}", _LOAD, {"run_id": run_id})
    if not rows:
        return None
    body, crc = rows[0]
    if row_crc(run_id, body) != crc:
        raise CorruptData(f"The document of run {run_id!r} in {database.where} does not match its checksum.")
    return parse_document(body, run_id, database.where)


def delete(database: Database, connection: Connection, run_id: str) -> bool:
    """Remove a document and its index entries, in the caller's transaction; whether there were any."""
    removed = database.execute(connection, _DELETE, {"run_id": run_id}).rowcount
    return removed + database.execute(connection, _CLEAR, {"run_id": run_id}).rowcount > 0


def delete_all(database: Database, connection: Connection, run_ids: Sequence[str]) -> None:
    """Remove the documents of these runs and their index entries, in the caller's transaction."""
    for table in ("documents", "run_nodes"):
        statement = f"DELETE FROM {{schema}}.{table} WHERE run_id = ANY (%(run_ids)s::text[])"
        database.execute(connection, statement, {"run_ids": list(run_ids)})


def ids(database: Database, index: Index, key: str) -> list[str]:
    """Ids in an index, oldest first; of ``goals`` the goals' own."""
    rows = database.query("list run documents", INDEXES[index], {"key": indexed(key)[0]})
    found = [text_of(entry, whole) if index == "goals" else entry for entry, whole in rows]
    return sorted(found) if index == "goals" else found
