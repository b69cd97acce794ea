"""Commits and journal writes as calls of the database's functions: any number in one statement, one round trip.

All checks and the fence are inside the functions, in the transaction that writes. The functions of one statement are
called in order, and each of their own statements sees what the ones before have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from framework import _faults
from framework.errors import CommitConflict, LeaseLost, RunBusy, RunNotFound, StorageError, SurefootError
from framework.storage import postgres_driver as driver
from framework.storage.checks import journal_refusal, printable, refusal
from framework.storage.chunks import Chunk, checksum
from framework.storage.postgres_database import Database
from framework.storage.postgres_rows import escaped, indexed, new_key
from framework.storage.records import Commit, JournalWrite, Write
from framework.storage.sqlite_schema import OPS, row_crc

if TYPE_CHECKING:
    from framework.storage.postgres_driver import Connection

CHUNKS = "%(ops)b::smallint[], %(keys)s::text[], %(long_keys)s::text[], %(datas)b::bytea[], %(checksums)b::bytea[]"
_COMMIT = (
    "SELECT * FROM {schema}.commit_run(%(run_id)s, %(token)s, %(sequence)s, %(write_key)s, %(now)s, %(record)b, "
    "%(log)b, %(crc)s, %(sets)s::text[], %(checkpoint_id)s, %(checkpoint)b, %(checkpoint_crc)s, " + CHUNKS + ", "
    "%(journal_done)s::text[], %(replaces)s, %(state)s, %(error)s, %(wake_at)s, %(progress)s, %(release)s, %(keep)s)"
)
_JOURNAL = (
    "SELECT * FROM {schema}.write_journal(%(run_id)s, %(token)s, %(now)s, %(steps)s::text[], %(long_steps)s::text[], "
    "%(numbers)b::bigint[], %(records)b::bytea[], %(crcs)b::bigint[], %(again)s, %(progress)s)"
)
_AT_ONCE = 500
"""Calls in one statement; with 25 values each PostgreSQL takes five times as many."""

Outcome = tuple[str, str | None, float | None, int | None]
"""What became of a write, the lease's holder and seconds left, the last commit: the database's type ``outcome``."""


class Call(NamedTuple):
    """A write as the statement that makes it, with its place among those that were given."""

    place: int
    write: Write
    statement: str
    values: dict[str, Any]


def chunk_values(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Chunks as the arrays that ``CHUNKS`` takes; all ``None`` when there are none."""
    if not chunks:
        return dict.fromkeys(("ops", "keys", "long_keys", "datas", "checksums"))
    keys = [indexed(chunk.key) for chunk in chunks]
    return {
        "ops": [OPS.index(chunk.op) for chunk in chunks],
        "keys": [entry for entry, _ in keys],
        "long_keys": [whole for _, whole in keys],
        "datas": [bytes(chunk.data) for chunk in chunks],
        "checksums": [checksum(chunk) for chunk in chunks],
    }


def commit(database: Database, writes: Sequence[Write], now: float | None) -> list[Exception | None]:
    """See ``Storage.commit``. ``now`` is the time for tests, ``None`` for the database's."""
    outcomes: list[Exception | None] = [None] * len(writes)
    calls = []
    for index, write in enumerate(writes):
        refused = refusal(write) if isinstance(write, Commit) else journal_refusal(write)
        if refused is not None:
            outcomes[index] = refused
        else:
            calls.append(call_of(write, now, index))
    # Two processes that lock the same runs in different orders would wait for each other. Of one run the order stays.
    calls.sort(key=lambda call: call.write.run_id)
    answers: Sequence[Outcome | StorageError]
    try:
        answers = _make(database, calls)
    except StorageError as error:
        if len(calls) < 2 or (error.__cause__ is not None and driver.is_away(error.__cause__)):
            raise
        answers = _make_singly(database, calls)
    for call, answer in zip(calls, answers, strict=True):
        outcomes[call.place] = answer if isinstance(answer, StorageError) else error_of(call.write, answer)
    return outcomes


def call_of(write: Write, now: float | None, place: int = 0) -> Call:
    """The statement that makes a write which has been checked."""
    if isinstance(write, Commit):
        return Call(place, write, _COMMIT, _commit_values(write, now))
    return Call(place, write, _JOURNAL, _journal_values(write, now))


def error_of(write: Write, outcome: Outcome) -> SurefootError | None:
    """The error that refused a write, or ``None``."""
    what, holder, seconds_left, last = outcome
    if what == "done":
        return None
    if what == "not_found":
        return RunNotFound(write.run_id)
    if what == "lost":
        return LeaseLost(write.run_id, write.token)
    if what == "busy":
        return RunBusy(write.run_id, holder or "", seconds_left or 0.0)
    if what == "conflict" and isinstance(write, Commit):
        return CommitConflict(f"Commit {write.sequence} of run {write.run_id!r} refused: the last commit is {last}.")
    return StorageError(f"Commit of run {write.run_id!r}: the database answered {what!r}, which means nothing here.")


def _make(database: Database, calls: Sequence[Call]) -> list[Outcome]:
    """Make all of ``calls`` in one transaction, durable on return, or none. Raises ``StorageError``."""
    if not calls:
        return []
    doing = f"commit run {calls[0].write.run_id!r}" if len(calls) == 1 else f"commit {len(calls)} writes"
    slices = [calls[start : start + _AT_ONCE] for start in range(0, len(calls), _AT_ONCE)]

    def attempt(connection: Connection, again: bool) -> list[Outcome]:
        return [answer for part in slices for answer in _call(database, connection, part, again)]

    if len(slices) == 1 and not _faults.installed():
        return database.run(doing, attempt, writes=True)
    if _faults.installed():
        slices = [[call] for call in calls]
    return database.transaction(doing, attempt)


def _call(database: Database, connection: Connection, calls: Sequence[Call], again: bool) -> list[Outcome]:
    """Make ``calls`` by one statement, which is a transaction by itself unless there is one."""
    if len(calls) == 1:
        statement, values = calls[0].statement, {**calls[0].values, "again": again}
    else:
        statement = " UNION ALL ".join(_numbered(call.statement, number) for number, call in enumerate(calls))
        values = {
            f"{name}_{number}": value
            for number, call in enumerate(calls)
            for name, value in (*call.values.items(), ("again", again))
        }
    prepare = None if len(calls) == 1 else False
    rows = database.execute(connection, statement, values, prepare=prepare).fetchall()
    if len(rows) != len(calls):
        raise StorageError(f"Store {database.where}: {len(calls)} writes had {len(rows)} answers. Open it again.")
    for call in calls:
        _faults.reach("commit.inside")
        if isinstance(call.write, Commit) and call.write.retention is not None:
            _faults.reach("retention")
    return [(row[0], row[1], row[2], row[3]) for row in rows]


@lru_cache(2 * _AT_ONCE)
def _numbered(statement: str, number: int) -> str:
    """``statement`` with names of values that end in a number."""
    return re.sub(r"%\((\w+)\)", rf"%(\1_{number})", statement)


def _make_singly(database: Database, calls: Sequence[Call]) -> list[Outcome | StorageError]:
    """Each of ``calls`` by itself, since together they failed; raises when none of them can be made.

    What was applied already, as the answer to a broken connection may hide, is known again by its key.
    """
    answers: list[Outcome | StorageError] = []
    failed: StorageError | None = None
    done = False
    for call in calls:
        try:
            answers.extend(_make(database, [call]))
            done = True
        except StorageError as error:
            failed = error
            answers.append(error)
            if error.__cause__ is not None and driver.is_away(error.__cause__) and not done:
                raise
    if failed is not None and not done:
        raise failed
    return answers


def _commit_values(commit: Commit, now: float | None) -> dict[str, Any]:
    kept = None if commit.retention is None or commit.checkpoint_id is None else commit.retention.keep
    sets = [indexed(chunk.key)[0] for chunk in commit.chunks if chunk.op != "append"]
    body = commit.checkpoint
    return {
        "run_id": commit.run_id,
        "token": commit.token,
        "sequence": commit.sequence,
        "write_key": new_key(),
        "now": now,
        "record": bytes(commit.record),
        "log": commit.log,
        "crc": row_crc(commit.sequence, commit.record, commit.log),
        "sets": sets or None,
        "checkpoint_id": commit.checkpoint_id,
        "checkpoint": body,
        "checkpoint_crc": None if body is None else row_crc(commit.sequence, commit.checkpoint_id, body),
        **chunk_values(commit.chunks),
        "journal_done": [indexed(step)[0] for step in commit.journal_done] or None,
        "replaces": commit.replaces,
        "state": None if commit.state is None else commit.state.value,
        "error": None if commit.error is None else escaped(printable(commit.error) or ""),
        "wake_at": commit.wake_at,
        "progress": commit.progress,
        "release": commit.release,
        "keep": kept,
    }


def _journal_values(write: JournalWrite, now: float | None) -> dict[str, Any]:
    # Of two rows under one key the last counts, and one statement may not write a row twice.
    rows = list({(row.step, row.number): row for row in write.rows}.values())
    steps = [indexed(row.step) for row in rows]
    return {
        "run_id": write.run_id,
        "token": write.token,
        "now": now,
        "steps": [entry for entry, _ in steps],
        "long_steps": [whole for _, whole in steps],
        "numbers": [row.number for row in rows],
        "records": [bytes(row.record) for row in rows],
        "crcs": [row_crc(row.step, row.number, row.record) for row in rows],
        "progress": write.progress,
    }
