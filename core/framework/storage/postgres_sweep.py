"""Sweeps in PostgreSQL: what may go, found by index; gone in one short transaction; its rows removed in slices.

A retired run loses its row in ``runs``, by which everything else is found, and its key is noted in ``retired``. Keys
are never given twice, so what is left under it is seen by nobody, and any sweep may remove it at any time.

A sweep never waits for whoever writes to a run: a row that is locked stays for the next sweep. Rows of retired runs are
removed without waiting for the disk (``synchronous_commit = off``): what a crash undoes is removed again.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from framework import _faults
from framework.errors import CorruptData, RunNotFound
from framework.schemas.run import RunState
from framework.storage import postgres_documents as documents
from framework.storage import postgres_pins
from framework.storage import postgres_runs as runs
from framework.storage.checks import check_id, check_pin
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import RECORD, record_of
from framework.storage.records import RunRecord
from framework.storage.retention_records import Pin, Retired, Standing, StoreUsage, why_kept
from framework.storage.verify import newest_readable

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

_NOW = "{schema}.moment(%(now)s)"
_SELECT = f"SELECT {_NOW}, {RECORD} FROM {{schema}}.runs"
_WHOLE = (
    "(parent_run_id IS NULL OR NOT EXISTS "
    "(SELECT 1 FROM {schema}.runs AS whole WHERE whole.run_id = runs.parent_run_id))"
)
_NO_PIN = (
    "NOT EXISTS (SELECT 1 FROM {schema}.pins WHERE pins.run_pk = old.run_pk AND pins.sequence IN (0, old.sequence))"
)
_AGED = f"""
{_SELECT} WHERE created_at < %(before)s AND (created_at, run_id) > (%(created_at)s, %(run_id)s) AND (
    SELECT old.at FROM {{schema}}.checkpoints AS old WHERE old.run_pk = runs.pk
    AND old.sequence < (SELECT max(newest.sequence) FROM {{schema}}.checkpoints AS newest WHERE newest.run_pk = runs.pk)
    AND {_NO_PIN} ORDER BY old.sequence LIMIT 1
) < %(before)s
ORDER BY created_at, run_id LIMIT %(limit)s
"""
_TO_DROP = f"""
SELECT old.sequence FROM {{schema}}.checkpoints AS old
WHERE old.run_pk = (SELECT pk FROM {{schema}}.runs WHERE run_id = %(run_id)s) AND {_NO_PIN} AND old.sequence < least(
    (SELECT max(newest.sequence) FROM {{schema}}.checkpoints AS newest WHERE newest.run_pk = old.run_pk),
    (SELECT min(young.sequence) FROM {{schema}}.checkpoints AS young
     WHERE young.run_pk = old.run_pk AND young.at >= %(before)s),
    %(needed)s::bigint
) ORDER BY old.sequence
"""
_STAYS = "SELECT min(sequence) FROM {schema}.checkpoints WHERE run_pk = %(pk)s AND sequence > %(last)s"
_FAMILY = """
WITH RECURSIVE family (root, pk, run_id, fingerprint, depth) AS (
    SELECT run_id, pk, run_id, fingerprint, 0 FROM {schema}.runs WHERE run_id = ANY (%(run_ids)s::text[])
    UNION
    SELECT family.root, part.pk, part.run_id, part.fingerprint, depth + 1
    FROM family JOIN {schema}.runs AS part ON part.parent_run_id = family.run_id WHERE depth < 100
)
SELECT root, pk, run_id, fingerprint, min(depth) FROM family GROUP BY root, pk, run_id, fingerprint
ORDER BY root, min(depth), pk
"""
_LOCK_ROOTS = "SELECT run_id FROM {schema}.runs WHERE run_id = ANY (%(run_ids)s::text[]) FOR UPDATE SKIP LOCKED"
_LOCK = f"{_SELECT} WHERE pk = ANY (%(pks)b::bigint[]) FOR UPDATE SKIP LOCKED"
_LOOK = f"{_SELECT} WHERE pk = ANY (%(pks)b::bigint[])"
_PINNED = (
    "SELECT run_pk, bool_or(sequence = 0), bool_or(sequence > 0) FROM {schema}.pins "
    "WHERE run_pk = ANY (%(pks)b::bigint[]) GROUP BY run_pk"
)
_LOCK_DEFINITION = "SELECT pg_advisory_xact_lock(%(lock)s)"
_REMOVE = (
    "WITH gone AS (DELETE FROM {schema}.runs WHERE pk = ANY (%(pks)b::bigint[]) RETURNING pk) "
    "INSERT INTO {schema}.retired (run_pk) SELECT pk FROM gone"
)
_FORGET_DEFINITIONS = (
    "DELETE FROM {schema}.definitions WHERE fingerprint = ANY (%(fingerprints)s::text[]) "
    "AND NOT EXISTS (SELECT 1 FROM {schema}.runs WHERE runs.fingerprint = definitions.fingerprint)"
)
_SIZES = {
    "runs": "pg_column_size(header) + 3 * octet_length(run_id) + coalesce(pg_column_size(error), 0) + 260",
    "steps": "pg_column_size(record) + coalesce(pg_column_size(log), 0) + coalesce(pg_column_size(sets), 0) + 90",
    "checkpoints": "pg_column_size(body) + octet_length(checkpoint_id) + 90",
    "chunks": "pg_column_size(data) + 2 * octet_length(key) + octet_length(checksum) + 80",
    "journal": "pg_column_size(record) + 2 * octet_length(step) + 80",
    "messages": "pg_column_size(body) + 2 * octet_length(name) + 110",
    "documents": "pg_column_size(body) + 2 * octet_length(run_id) + 130",
    "definitions": "pg_column_size(body) + 2 * octet_length(fingerprint) + 50",
}
"""By table: about how many bytes a row takes, with its entries in indexes; of long values without reading them."""
_PARTS = ("steps", "checkpoints", "chunks", "journal", "messages")
_MEASURE = (
    "SELECT runs.run_id, (SELECT count(*) FROM {schema}.checkpoints WHERE run_pk = runs.pk), "
    + " + ".join(
        f"(SELECT coalesce(sum({size}), 0) FROM {{schema}}.{table} WHERE "
        + ("run_pk = runs.pk)" if table in _PARTS else f"{table}.run_id = runs.run_id)")
        for table, size in _SIZES.items()
        if table in (*_PARTS, "documents")
    )
    + f" + {_SIZES['runs']} FROM {{schema}}.runs WHERE pk = ANY (%(pks)b::bigint[])"
)
_TABLES = (
    "SELECT relname, pg_total_relation_size(pg_class.oid), pg_relation_size(pg_class.oid) "
    "/ current_setting('block_size')::bigint FROM pg_class "
    "JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE nspname = %(name)s AND relkind = 'r' AND relname = ANY (%(tables)s::text[])"
)
_SAMPLED_PAGES = 4_000
_SLICE_ROWS = 200
_PURGED_AT_ONCE = 20
_NEXT_RETIRED = "SELECT run_pk FROM {schema}.retired ORDER BY run_pk LIMIT %(limit)s FOR UPDATE SKIP LOCKED"
_PURGE = (
    "DELETE FROM {{schema}}.{table} WHERE ctid = ANY (ARRAY("
    "SELECT ctid FROM {{schema}}.{table} WHERE run_pk = ANY (%(pks)b::bigint[]) LIMIT %(limit)s))"
)
_ANY_RETIRED = "SELECT EXISTS (SELECT 1 FROM {schema}.retired)"
_FORGET_RETIRED = "DELETE FROM {schema}.retired WHERE run_pk = ANY (%(pks)b::bigint[])"
_COMPACT_SECONDS = 86_400.0


class SweepsPostgres:
    """The part of ``PostgresStorage`` that knows pins and sweeps; see ``KeepsRuns``."""

    _database: Database
    _families = 1
    """Runs retired in one transaction; follows how long that takes."""

    @abstractmethod
    def _now(self) -> float | None: ...

    # --- pins ---------------------------------------------------------------------------------------------------

    def pin(self, run_id: str, checkpoint_id: str | None = None, note: str = "") -> Pin:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id, note)

        def work(connection: Connection, again: bool) -> Pin:
            _, pk, _ = runs.lock(self._database, connection, run_id, self._now())
            return postgres_pins.put(self._database, connection, pk, run_id, checkpoint_id, note, self._now())

        return self._database.transaction(f"pin run {run_id!r}", work)

    def unpin(self, run_id: str, checkpoint_id: str | None = None) -> bool:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id)
        taken = False

        def work(connection: Connection, again: bool) -> bool:
            nonlocal taken
            try:
                _, pk, _ = runs.lock(self._database, connection, run_id, self._now())
            except RunNotFound:
                return taken
            sequence = 0
            if checkpoint_id is not None:
                sequence = postgres_pins.find(self._database, connection, pk, checkpoint_id)
                if not sequence:
                    return taken
            taken = postgres_pins.take(self._database, connection, pk, sequence) or taken
            return taken

        return self._database.transaction(f"unpin run {run_id!r}", work)

    def list_pins(self, run_ids: Sequence[str] | None = None) -> list[Pin]:
        """See ``KeepsRuns``."""
        return postgres_pins.read(self._database, None if run_ids is None else [check_id(each) for each in run_ids])

    # --- what may go --------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """See ``KeepsRuns``. What the rows take, estimated from a sample of large tables: a database gives the room of
        rows that are gone to new ones, not back."""
        values = {"name": self._database.address.schema, "tables": list(_SIZES)}
        whole = used = 0
        for table, total, pages in self._database.query("measure it", _TABLES, values):
            part = min(100.0, 100.0 * _SAMPLED_PAGES / max(1, pages))
            statement = f"SELECT coalesce(sum({_SIZES[table]}), 0) FROM {{schema}}.{table} TABLESAMPLE SYSTEM ({part})"
            found = int(int(self._database.query("measure it", statement)[0][0]) * 100.0 / part)
            whole += total
            used += found
        now = self._database.query("read the time", f"SELECT {_NOW}", {"now": self._now()})[0][0]
        return StoreUsage(now, used, max(0, whole - used), can_shrink=False)

    def list_ended(
        self, states: Sequence[RunState], limit: int = 100, after: RunRecord | None = None
    ) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        found: list[RunRecord] = []
        for state in dict.fromkeys(states):
            found += self._ended(state, limit, after)
        return sorted(found, key=lambda run: (run.updated_at, run.run_id))[:limit]

    def nth_newest_ended(self, states: Sequence[RunState], count: int) -> RunRecord | None:
        """See ``KeepsRuns``."""
        found: list[RunRecord] = []
        for state in dict.fromkeys(states):
            found += self._ended(state, count, None, newest=True)
        found.sort(key=lambda run: (run.updated_at, run.run_id), reverse=True)
        return found[count - 1] if len(found) >= count else None

    def _ended(self, state: RunState, limit: int, after: RunRecord | None, *, newest: bool = False) -> list[RunRecord]:
        """Runs in one state that are no part of another, in the order of the index."""
        stored = RunState.RUNNING if state is RunState.CRASHED else state
        where = f"state = '{stored.value}' AND {_WHOLE}"
        if stored is RunState.RUNNING:
            # Whoever gives a lease up sets its end to 0.
            where += f" AND lease_until {'<=' if state is RunState.CRASHED else '>'} {_NOW}"
        beyond, way = ("<", "DESC") if newest else (">", "ASC")
        place = None if after is None else (after.updated_at, after.run_id)
        found: list[RunRecord] = []
        while len(found) < limit:
            values: dict[str, Any] = {"now": self._now(), "limit": min(1_000, limit - len(found))}
            further = ""
            if place is not None:
                values |= {"updated_at": place[0], "run_id": place[1]}
                further = f" AND (updated_at, run_id) {beyond} (%(updated_at)s, %(run_id)s)"
            statement = f"{_SELECT} WHERE {where}{further} ORDER BY updated_at {way}, run_id {way} LIMIT %(limit)s"
            rows = self._database.query("list the runs that ended", statement, values)
            found += runs.readable(self._database, rows)
            if len(rows) < values["limit"]:
                break
            place = (rows[-1][11], rows[-1][2])
        return found

    def list_aged(self, before: float, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        place = (after.created_at, after.run_id) if after is not None else (float("-inf"), "")
        found: list[RunRecord] = []
        while len(found) < limit:
            values: dict[str, Any] = {"before": before, "created_at": place[0], "run_id": place[1]}
            values["now"] = self._now()
            values["limit"] = limit - len(found)
            rows = self._database.query("list runs with old checkpoints", _AGED, values)
            found += runs.readable(self._database, rows)
            if len(rows) < values["limit"]:
                break
            place = (rows[-1][10], rows[-1][2])
        return found

    # --- removing it --------------------------------------------------------------------------------------------

    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        """See ``KeepsRuns``. A run that somebody writes to at this very moment stays, too."""
        if not runs:
            return []
        if dry_run:
            return self._database.transaction(
                "see which runs would go",
                lambda connection, again: self._retire(connection, runs, states, dry_run=True),
                snapshot=True,
            )
        some = list(runs[: self._families])
        done: list[Retired] = []

        def work(connection: Connection, again: bool) -> list[Retired]:
            nonlocal done
            before, done = done, self._retire(connection, some, states)
            if again and before:
                # An earlier try did it, only its answer was lost.
                done = [one if one.run_ids else now for one, now in zip(before, done, strict=True)]
            _faults.reach("sweep.inside")
            return done

        began = time.monotonic()
        retired = self._database.transaction("remove runs", work)
        took = time.monotonic() - began
        # Nobody waits for it but who accepts runs of the same definitions: it may take a few steps' time.
        if took > 16 * seconds:
            self._families = max(1, self._families // 2)
        elif took < 4 * seconds and len(some) == self._families:
            self._families = min(100, 2 * self._families)
        _faults.reach("sweep.retired")
        return retired

    def _retire(
        self,
        connection: Connection,
        expected: Sequence[RunRecord],
        states: Sequence[RunState],
        *,
        dry_run: bool = False,
    ) -> list[Retired]:
        """Remove those of ``expected`` that may go, in the caller's transaction; what became of each."""
        wanted = {"run_ids": [run.run_id for run in expected]}
        fingerprints: set[str] = set()
        locked = set(wanted["run_ids"])
        if not dry_run:
            # Before the runs' rows, as whoever accepts a run does, and in one order for all sweeps.
            fingerprints = {row[3] for row in self._database.execute(connection, _FAMILY, wanted).fetchall()}
            for lock in sorted(runs.definition_lock(self._database, each) for each in fingerprints):
                self._database.execute(connection, _LOCK_DEFINITION, {"lock": lock})
            # The whole first: of two sweeps, who has it removes its parts.
            locked = {row[0] for row in self._database.execute(connection, _LOCK_ROOTS, wanted).fetchall()}
        families: dict[str, list[tuple[int, str, str]]] = {run.run_id: [] for run in expected}
        for root, pk, run_id, fingerprint, _ in self._database.execute(connection, _FAMILY, wanted).fetchall():
            families[root].append((pk, run_id, fingerprint))
        pks = [pk for root in locked for pk, _, _ in families[root]]
        standings, moment = self._standings(connection, pks, _LOOK if dry_run else _LOCK)
        sizes = {
            run_id: (checkpoints, int(size))
            for run_id, checkpoints, size in self._database.execute(connection, _MEASURE, {"pks": pks}).fetchall()
        }
        done: list[Retired] = []
        gone: list[tuple[int, str, str]] = []
        for run in expected:
            family = families[run.run_id]
            kept = _why_kept(run, family, standings, states, moment)
            if kept:
                done.append(Retired(kept=kept))
                continue
            ids = tuple(run_id for _, run_id, _ in family)
            measured = [sizes[run_id] for run_id in ids]
            done.append(Retired(ids, sum(one for one, _ in measured), sum(size for _, size in measured)))
            gone += family
        if gone and not dry_run:
            self._remove(connection, gone, fingerprints)
        return done

    def _standings(
        self, connection: Connection, pks: list[int], statement: str
    ) -> tuple[dict[int, Standing | str], float]:
        """How runs stand now, by their keys, or why they cannot be read; and when that was by the store's clock.

        Those that somebody else locks are left out.
        """
        values = {"pks": pks, "now": self._now()}
        rows = self._database.execute(connection, statement, values).fetchall()
        # Once they are locked nobody can pin them any more.
        pinned = {row[0]: row[1:] for row in self._database.execute(connection, _PINNED, values).fetchall()}
        found: dict[int, Standing | str] = {}
        for row in rows:
            try:
                found[row[1]] = Standing(record_of(row, self._database.where), *pinned.get(row[1], (False, False)))
            except CorruptData as error:
                found[row[1]] = f"it cannot be read: {error}"
        return found, max((row[0] for row in rows), default=0.0)

    def _remove(self, connection: Connection, gone: Sequence[tuple[int, str, str]], fingerprints: set[str]) -> None:
        self._database.execute(connection, _REMOVE, {"pks": [pk for pk, _, _ in gone]})
        documents.delete_all(self._database, connection, [run_id for _, run_id, _ in gone])
        # One that was not locked is of a part that came meanwhile; it is found as a stray.
        unused = {fingerprint for _, _, fingerprint in gone} & fingerprints
        self._database.execute(connection, _FORGET_DEFINITIONS, {"fingerprints": sorted(unused)})

    def purge(self, seconds: float = 0.004) -> bool:
        """See ``KeepsRuns``."""
        if not self._database.query("look for rows to remove", _ANY_RETIRED)[0][0]:
            return False

        def work(connection: Connection, again: bool) -> bool:
            self._database.execute(connection, "SET LOCAL synchronous_commit = off")
            until = time.monotonic() + seconds
            while True:
                rows = self._database.execute(connection, _NEXT_RETIRED, {"limit": _PURGED_AT_ONCE}).fetchall()
                values = {"pks": [row[0] for row in rows], "limit": _SLICE_ROWS}
                whole = True
                for table in (*_PARTS, "pins"):
                    statement = _PURGE.format(table=table)
                    while whole and rows:
                        if self._database.execute(connection, statement, values).rowcount < _SLICE_ROWS:
                            break
                        whole = time.monotonic() < until
                if whole and rows:
                    self._database.execute(connection, _FORGET_RETIRED, values)
                if not rows or time.monotonic() >= until:
                    break
            return bool(self._database.execute(connection, _ANY_RETIRED).fetchall()[0][0])

        more = self._database.transaction("remove the rows of runs that are gone", work)
        _faults.reach("sweep.purge")
        return more

    def prune_older(self, run_id: str, before: float, limit: int = 50, *, dry_run: bool = False) -> int:
        """See ``KeepsRuns``."""
        values: dict[str, Any] = {"run_id": check_id(run_id), "before": before, "needed": None}
        doing = f"prune run {run_id!r}"
        if not self._database.query(doing, _TO_DROP, values):
            return 0
        values["needed"] = newest_readable(self, run_id)  # type: ignore[arg-type]  # a part of a whole Storage
        if dry_run:
            return len(self._database.query(doing, _TO_DROP, values))
        pruned = 0

        def work(connection: Connection, again: bool) -> int:
            nonlocal pruned
            try:
                _, pk, _ = runs.lock(self._database, connection, run_id, self._now())
            except RunNotFound:
                return pruned
            going = [row[0] for row in self._database.execute(connection, _TO_DROP, values).fetchall()]
            if not going:
                return pruned  # nothing is left when an earlier try did it
            last = going[: max(1, limit)][-1]
            stays = self._database.execute(connection, _STAYS, {"pk": pk, "last": last}).fetchall()[0][0]
            statement = "SELECT {schema}.drop_below(%(pk)s, %(stays)s)"
            rows = self._database.execute(connection, statement, {"pk": pk, "stays": stays}).fetchall()
            _faults.reach("retention")
            pruned = int(rows[0][0])
            return pruned

        return self._database.transaction(doing, work)

    def shrink(self, seconds: float = 0.004) -> int:
        """See ``KeepsRuns``. The server's own autovacuum makes room for new rows; only ``compact`` gives it back."""
        return 0

    def compact(self) -> int:
        """See ``KeepsRuns``: ``VACUUM FULL`` of each table, which locks it meanwhile."""
        while self.purge(1.0):
            pass
        values = {"name": self._database.address.schema, "tables": [*_SIZES, "pins", "retired", "run_nodes"]}
        doing = "write it anew"

        def size() -> int:
            return sum(row[1] for row in self._database.query(doing, _TABLES, values))

        before = size()
        for table in values["tables"]:
            self._database.run(
                doing,
                lambda connection, again, table=table: self._database.execute(  # type: ignore[misc]
                    connection, f"VACUUM (FULL, ANALYZE) {{schema}}.{table}", prepare=False
                ),
                seconds=_COMPACT_SECONDS,
            )
        return max(0, before - size())


def _why_kept(
    run: RunRecord,
    family: Sequence[tuple[int, str, str]],
    standings: dict[int, Standing | str],
    states: Sequence[RunState],
    now: float,
) -> str:
    """Why a run stays, with its parts; ``""`` when they may go."""
    standing: list[Standing] = []
    for pk, run_id, _ in family:
        found = standings.get(pk)
        if found is None:
            return "it is in use" if run_id == run.run_id else f"its part {run_id} is in use"
        if isinstance(found, str):
            return found
        standing.append(found)
    return why_kept(run, standing, states, now)
