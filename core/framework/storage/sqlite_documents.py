"""``Run`` documents in the SQLite file, and their indexes."""

from __future__ import annotations

import sqlite3

from framework.errors import CorruptData
from framework.schemas.run import Run
from framework.storage.documents import Index, document_bytes, nodes_of, parse_document
from framework.storage.sqlite_schema import row_crc

ALL = "SELECT run_id FROM documents ORDER BY pk"
GOALS = "SELECT DISTINCT goal_id FROM documents ORDER BY goal_id"
BY_GOAL = "SELECT run_id FROM documents WHERE goal_id = ? ORDER BY pk"
BY_STATUS = "SELECT run_id FROM documents WHERE status = ? ORDER BY pk"
BY_NODE = "SELECT run_id FROM run_nodes JOIN documents USING (run_id) WHERE node_id = ? ORDER BY documents.pk"
INDEXES: dict[Index, str] = {"all": ALL, "goals": GOALS, "by_goal": BY_GOAL, "by_status": BY_STATUS, "by_node": BY_NODE}
"""Queries of one column, ids, for what they are named after."""


def save(db: sqlite3.Connection, run: Run) -> None:
    """Write a document and its index entries, replacing an earlier one of the same id."""
    body = document_bytes(run)
    db.execute(
        "INSERT INTO documents (run_id, goal_id, status, body, crc) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (run_id) DO UPDATE SET goal_id = excluded.goal_id, status = excluded.status, "
        "body = excluded.body, crc = excluded.crc",
        (run.id, run.goal_id, run.status.value, body, row_crc(run.id, body)),
    )
    db.execute("DELETE FROM run_nodes WHERE run_id = ?", (run.id,))
    entries = [(node_id, run.id) for node_id in nodes_of(run)]
    db.executemany("INSERT INTO run_nodes (node_id, run_id) VALUES (?, ?)", entries)


def load(db: sqlite3.Connection, run_id: str, where: str) -> Run | None:
    """A document, or ``None``. ``where`` names the store. Raises ``CorruptData``."""
    row = db.execute("SELECT CAST(body AS BLOB) AS body, crc FROM documents WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        return None
    if row_crc(run_id, row["body"]) != row["crc"]:
        raise CorruptData(f"The document of run {run_id!r} in {where} does not match its checksum.")
    return parse_document(row["body"], run_id, where)


def delete(db: sqlite3.Connection, run_id: str) -> bool:
    """Remove a document and its index entries; whether there were any."""
    removed = db.execute("DELETE FROM run_nodes WHERE run_id = ?", (run_id,)).rowcount
    return removed + db.execute("DELETE FROM documents WHERE run_id = ?", (run_id,)).rowcount > 0
