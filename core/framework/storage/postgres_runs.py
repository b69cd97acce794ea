"""Runs and their leases in PostgreSQL: accepted, claimed, renewed, listed, deleted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from framework.errors import CorruptData, LeaseLost, RunBusy, RunError, RunNotFound
from framework.schemas.run import RunState
from framework.storage import postgres_documents as documents
from framework.storage import postgres_pins
from framework.storage.checks import moved_on
from framework.storage.postgres_commits import CHUNKS, chunk_values
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import RECORD, escaped, facts_crc, indexed, new_key, record_of
from framework.storage.postgres_schema import lock_of
from framework.storage.records import NewRun, RunRecord, attempts_after_claim, due_after
from framework.storage.sqlite_schema import row_crc

if TYPE_CHECKING:
    from framework.storage.interface import IsAlive
    from framework.storage.postgres_driver import Connection

logger = logging.getLogger(__name__)

_NOW = "{schema}.moment(%(now)s)"
_SELECT = f"SELECT {_NOW}, {RECORD} FROM {{schema}}.runs "
_FIND = f"{_SELECT} WHERE run_id = %(run_id)s"
_LOCK = f"SELECT {_NOW}, {RECORD}, claim_key FROM {{schema}}.runs WHERE run_id = %(run_id)s FOR UPDATE"
_ACCEPT = (
    "SELECT {schema}.accept_run(%(run_id)s, %(executor_type)s, %(goal_id)s, %(fingerprint)s, %(long_fingerprint)s, "
    "%(header)b, %(facts_crc)s, %(parent_run_id)s, %(definition)b, %(definition_crc)s, %(definition_lock)s, %(owner)s, "
    "%(lease_seconds)s, %(now)s, %(write_key)s, " + CHUNKS + ")"
)
_CLAIM = (
    f"UPDATE {{schema}}.runs SET owner = %(owner)s, token = token + 1, lease_until = {_NOW} + %(lease_seconds)s, "
    f"state = 'running', wake_at = NULL, recovery_attempts = %(attempts)s, updated_at = {_NOW}, "
    f"claim_key = %(write_key)s WHERE run_id = %(run_id)s RETURNING {_NOW}, {RECORD}"
)
_RENEW = f"""
WITH held AS (
    SELECT pk, runs.run_id, runs.token FROM {{schema}}.runs
    JOIN unnest(%(run_ids)s::text[], %(tokens)b::bigint[]) AS lease (run_id, token)
    ON runs.run_id = lease.run_id AND runs.token = lease.token
    WHERE owner IS NOT NULL ORDER BY runs.run_id FOR NO KEY UPDATE OF runs
)
UPDATE {{schema}}.runs SET lease_until = {_NOW} + %(lease_seconds)s
FROM held WHERE runs.pk = held.pk AND runs.token = held.token AND owner IS NOT NULL RETURNING runs.run_id, runs.token
"""
"""Locks in the order in which commits do, so that neither waits for the other."""
_KNOWN = "SELECT run_id FROM {schema}.runs WHERE run_id = ANY (%(run_ids)s::text[])"
_RELEASE = """
WITH released AS (
    UPDATE {schema}.runs SET owner = NULL, lease_until = 0 WHERE run_id = %(run_id)s AND token = %(token)s
    RETURNING run_id, state
)
SELECT {schema}.tell_workers(run_id) FROM released WHERE state <> 'completed'
"""
_DUE = (
    f"{_SELECT} WHERE state = 'paused' AND wake_at <= coalesce(%(due)s, {_NOW}) "
    "AND (wake_at, run_id) > (%(after_at)s, %(after)s) ORDER BY wake_at, run_id LIMIT %(limit)s"
)
_MESSAGED = f"{_SELECT} WHERE state = 'paused' AND messaged AND run_id > %(after)s ORDER BY run_id LIMIT %(limit)s"
_PREFIX = f"{_SELECT} WHERE run_id LIKE %(pattern)s ORDER BY run_id LIMIT %(limit)s"
_FINGERPRINT = "SELECT fingerprint FROM {schema}.runs WHERE run_id = %(run_id)s"
_LOCK_DEFINITION = "SELECT pg_advisory_xact_lock(%(lock)s)"
_DELETE_DEFINITION = (
    "DELETE FROM {schema}.definitions WHERE fingerprint = %(fingerprint)s "
    "AND NOT EXISTS (SELECT 1 FROM {schema}.runs WHERE runs.fingerprint = %(fingerprint)s)"
)


def accept(database: Database, new: NewRun, owner: str | None, lease_seconds: float, now: float | None) -> bool:
    """Record a run, durably; ``False`` when there is one of this id."""
    fingerprint, long_fingerprint = indexed(new.fingerprint)
    values = {
        "run_id": new.run_id,
        "executor_type": escaped(new.executor_type),
        "goal_id": escaped(new.goal_id),
        "fingerprint": fingerprint,
        "long_fingerprint": long_fingerprint,
        "header": bytes(new.header),
        "facts_crc": facts_crc(new),
        "parent_run_id": new.parent_run_id,
        "definition": bytes(new.definition),
        "definition_crc": row_crc(new.fingerprint, new.definition),
        "definition_lock": definition_lock(database, fingerprint),
        "owner": owner,
        "lease_seconds": float(lease_seconds),
        "now": now,
        "write_key": new_key(),
        **chunk_values(new.chunks),
    }
    accepted: bool = database.query(f"record run {new.run_id!r}", _ACCEPT, values, writes=True)[0][0]
    return accepted


def find(database: Database, run_id: str, now: float | None) -> RunRecord | None:
    """See ``Storage.find_run``."""
    rows = database.query(f"read run {run_id!r}", _FIND, {"run_id": run_id, "now": now})
    return record_of(rows[0], database.where) if rows else None


def lock(
    database: Database, connection: Connection, run_id: str, now: float | None
) -> tuple[RunRecord, int, list[Any]]:
    """A run's record, its ``pk`` and its whole row, locked in the caller's transaction. Raises ``RunNotFound``."""
    row = database.execute(connection, _LOCK, {"run_id": run_id, "now": now}).fetchone()
    if row is None:
        raise RunNotFound(run_id)
    return record_of(row[:-1], database.where), row[1], list(row)


def refuse_if_held(row: Sequence[Any], found: RunRecord) -> None:
    """Raise ``RunBusy`` when somebody holds the lease; ``row`` begins with the store's time."""
    if found.owner is not None and found.lease_until > row[0]:
        raise RunBusy(found.run_id, found.owner, found.lease_until - row[0])


def claim(
    database: Database,
    run_id: str,
    owner: str,
    lease_seconds: float,
    is_alive: IsAlive | None,
    sequence: int | None,
    now: float | None,
) -> RunRecord:
    """See ``Storage.claim_run``."""
    key = new_key()
    claimed: list[RunRecord] = []

    def work(connection: Connection, again: bool) -> RunRecord:
        found, _, row = lock(database, connection, run_id, now)
        if again and claimed and row[-1] == key:
            return claimed[-1]  # an earlier try did it, only its answer was lost
        if found.state is RunState.COMPLETED:
            return found
        if found.owner is not None and found.lease_until > row[0]:
            if is_alive is None or is_alive(found.owner) is not False:
                raise RunBusy(run_id, found.owner, found.lease_until - row[0])
            found = record_of(row[:-1], database.where, gone=True)
        if sequence is not None and found.sequence != sequence:
            raise moved_on(found, sequence)
        values = {"run_id": run_id, "owner": owner, "lease_seconds": float(lease_seconds), "now": now, "write_key": key}
        updated = database.execute(connection, _CLAIM, {**values, "attempts": attempts_after_claim(found)}).fetchone()
        if updated is None:
            raise RunNotFound(run_id)
        # The caller wants to know what it took over, with the lease it now holds.
        claimed.append(replace(record_of(updated, database.where), state=found.state, error=found.error))
        return claimed[-1]

    return database.transaction(f"claim run {run_id!r}", work)


def renew(
    database: Database, leases: Sequence[tuple[str, int]], lease_seconds: float, now: float | None
) -> list[RunError | None]:
    """See ``Storage.renew_leases``: one statement for all."""
    if not leases:
        return []
    values: dict[str, Any] = {
        "run_ids": [run_id for run_id, _ in leases],
        "tokens": [token for _, token in leases],
        "now": now,
    }
    values["lease_seconds"] = float(lease_seconds)
    renewed = set(database.query("renew leases", _RENEW, values, writes=True))
    if all(lease in renewed for lease in leases):
        return [None] * len(leases)
    known = {run_id for (run_id,) in database.query("renew leases", _KNOWN, values)}
    return [
        None if (run_id, token) in renewed else LeaseLost(run_id, token) if run_id in known else RunNotFound(run_id)
        for run_id, token in leases
    ]


def release(database: Database, run_id: str, token: int) -> None:
    """See ``Storage.release_lease``."""
    values = {"run_id": run_id, "token": token}
    database.query(f"release the lease of run {run_id!r}", _RELEASE, values, writes=True)


def list_runs(
    database: Database, states: Sequence[RunState] | None, limit: int, before: RunRecord | None, now: float | None
) -> list[RunRecord]:
    """See ``Storage.list_runs``."""
    values: dict[str, Any] = {"limit": limit, "now": now}
    where = ["true"]
    if states is not None:
        clauses = []
        for state in dict.fromkeys(states):
            if state is RunState.CRASHED:
                # Whoever gives a lease up sets its end to 0.
                clauses.append(f"state = 'running' AND lease_until <= {_NOW}")
            elif state is RunState.RUNNING:
                clauses.append(f"state = 'running' AND lease_until > {_NOW}")
            else:
                clauses.append(f"state = '{state.value}'")
        where.append(f"({' OR '.join(clauses) or 'false'})")
    if before is not None:
        where.append("(created_at, run_id) < (%(created_at)s, %(run_id)s)")
        values |= {"created_at": before.created_at, "run_id": before.run_id}
    statement = f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY created_at DESC, run_id DESC LIMIT %(limit)s"
    return _readable(database, "list runs", statement, values)


def find_runs(database: Database, prefix: str, limit: int, now: float | None) -> list[RunRecord]:
    """See ``Storage.find_runs``."""
    pattern = prefix.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    return _readable(database, "find runs", _PREFIX, {"pattern": pattern, "limit": limit, "now": now})


def list_due(
    database: Database, due: float | None, limit: int, after: RunRecord | None, now: float | None
) -> list[RunRecord]:
    """See ``Storage.list_due``."""
    found: list[RunRecord] = []
    above = due_after(after)
    while len(found) < limit:
        values: dict[str, Any] = {"due": due, "limit": limit - len(found), "now": now}
        rows = database.query("list the runs that are due", _DUE, {**values, "after_at": above[0], "after": above[1]})
        found += readable(database, rows)
        if len(rows) < values["limit"]:
            break
        above = rows[-1][-1], rows[-1][2]  # some were damaged: a short list would say that there are no more
    return found


def list_messaged(database: Database, limit: int, after: str, now: float | None) -> list[RunRecord]:
    """See ``Storage.list_messaged``."""
    found: list[RunRecord] = []
    while len(found) < limit:
        values: dict[str, Any] = {"after": after, "limit": limit - len(found), "now": now}
        rows = database.query("list the runs with messages", _MESSAGED, values)
        found += readable(database, rows)
        if len(rows) < values["limit"]:
            break
        after = rows[-1][2]  # some were damaged: a short list would say that there are no more
    return found


def delete(database: Database, run_id: str, now: float | None, *, force: bool = False) -> bool:
    """See ``Storage.delete_run``."""
    removed = False

    def work(connection: Connection, again: bool) -> bool:
        nonlocal removed
        row = database.execute(connection, _FINGERPRINT, {"run_id": run_id}).fetchone()
        if row is not None:
            # Before the run's row, as whoever accepts a run does: its definition is not taken away under it.
            values = {"lock": definition_lock(database, row[0]), "fingerprint": row[0]}
            database.execute(connection, _LOCK_DEFINITION, values)
            try:
                found, pk, locked = lock(database, connection, run_id, now)
            except RunNotFound:
                row = None
            else:
                refuse_if_held(locked, found)
                postgres_pins.refuse_if_pinned(database, connection, pk, run_id, force=force)
                for table in ("steps", "checkpoints", "chunks", "journal", "messages", "pins", "runs"):
                    column = "pk" if table == "runs" else "run_pk"
                    database.execute(connection, f"DELETE FROM {{schema}}.{table} WHERE {column} = %(pk)s", {"pk": pk})
                database.execute(connection, _DELETE_DEFINITION, values)
        had_document = documents.delete(database, connection, run_id)
        removed = removed or row is not None or had_document  # what an earlier try removed counts
        return removed

    return database.transaction(f"delete run {run_id!r}", work)


def _readable(database: Database, doing: str, statement: str, values: dict[str, Any]) -> list[RunRecord]:
    return readable(database, database.query(doing, statement, values))


def readable(database: Database, rows: Iterable[Sequence[Any]]) -> list[RunRecord]:
    """The records in rows of the store's time and ``RECORD``, without damaged ones."""
    found = []
    for row in rows:
        try:
            found.append(record_of(row, database.where))
        except CorruptData as error:
            logger.warning("Listing runs: %s", error)
    return found


def definition_lock(database: Database, fingerprint: str) -> int:
    """The advisory lock on a definition: shared to accept a run of it, exclusive to remove it."""
    return lock_of("definition", database.address.schema, fingerprint)
