"""Texts, checksums and run records as PostgreSQL's rows hold them, and back."""

from __future__ import annotations

import secrets
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from framework.errors import CorruptData
from framework.schemas.run import RunState
from framework.storage.records import NewRun, RunRecord
from framework.storage.sqlite_schema import row_crc

if TYPE_CHECKING:
    from collections.abc import Sequence

_MARK = "\x10"
_ZERO, _ITSELF, _SHORTENED = _MARK + "0", _MARK + "1", _MARK + "2"
_INDEXED_BYTES = 1_000
_STATES = frozenset(state.value for state in RunState)

RECORD = (
    "pk, run_id, executor_type, goal_id, coalesce(long_fingerprint, fingerprint), header, facts_crc, state, sequence, "
    "created_at, updated_at, error, owner, token, lease_until, recovery_attempts, parent_run_id, wake_at"
)
"""The columns that ``record_of`` takes, after the store's time."""


def escaped(text: str) -> str:
    """``text`` without NUL, which PostgreSQL takes in no text; ``unescaped`` gives it back."""
    if "\x00" not in text and _MARK not in text:
        return text
    return text.replace(_MARK, _ITSELF).replace("\x00", _ZERO)


def unescaped(text: str) -> str:
    """The text that ``escaped`` was given."""
    if _MARK not in text:
        return text
    return text.replace(_ZERO, "\x00").replace(_ITSELF, _MARK)


def indexed(text: str) -> tuple[str, str | None]:
    """``text`` for an indexed column, and for the column that holds it whole if it was too long for that.

    No two texts have the same entry: of a long one it is the beginning and a digest.
    """
    whole = escaped(text)
    if len(whole) * 4 <= _INDEXED_BYTES or len(whole.encode()) <= _INDEXED_BYTES:
        return whole, None
    return f"{whole[:200]}{_SHORTENED}{sha256(whole.encode()).hexdigest()}", whole


def text_of(entry: str, whole: str | None) -> str:
    """The text that ``indexed`` was given."""
    return unescaped(entry if whole is None else whole)


def new_key() -> int:
    """A number that names one call of the store, so that it knows its own write again."""
    return secrets.randbits(63)


def facts_crc(new: NewRun) -> int:
    """A checksum of what never changes about a run. Not of its creation, whose time the database gives."""
    return row_crc(new.run_id, new.executor_type, new.goal_id, new.fingerprint, new.parent_run_id, new.header)


def record_of(row: Sequence[Any], where: str, *, gone: bool = False) -> RunRecord:
    """The record in a row of the store's time and ``RECORD``; ``gone`` when its owner certainly is.

    Raises ``CorruptData``.
    """
    now, _, run_id, kind, goal, fingerprint, header, crc, stored, sequence, created, updated, error, *others = row
    owner, token, lease_until, attempts, parent, wake_at = others
    kind, goal, fingerprint = unescaped(kind), unescaped(goal), unescaped(fingerprint)
    if crc != row_crc(run_id, kind, goal, fingerprint, parent, header) or stored not in _STATES:
        raise CorruptData(f"The record of run {run_id!r} in {where} does not match its checksum.")
    state = RunState(stored)
    if state is RunState.RUNNING and (owner is None or lease_until <= now or gone):
        state = RunState.CRASHED
    return RunRecord(
        run_id=run_id,
        executor_type=kind,
        goal_id=goal,
        fingerprint=fingerprint,
        header=header,
        state=state,
        sequence=sequence,
        created_at=created,
        updated_at=updated,
        # What a run ended with before it was claimed is not what it comes to now, unless its owner left it.
        error=None if state is RunState.RUNNING or error is None else unescaped(error),
        owner=owner,
        token=token,
        lease_until=lease_until,
        recovery_attempts=attempts,
        parent_run_id=parent,
        wake_at=wake_at,
    )
