"""What every store refuses before it touches anything: ids and keys that name nothing, commits that contradict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from framework.errors import CommitConflict, InvalidId, StorageError, ValueTooLarge
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk
from framework.storage.records import Commit, JournalWrite, NewRun, RunRecord

MAX_RUN_ID = 255
MAX_KEY = 1_000
MAX_NOTE = 1_000

MAX_VALUE_BYTES = 500_000_000
"""Bytes of one value at most, in every store alike: half of what SQLite and PostgreSQL take in a row."""

_MAX_NUMBER = 2**63 - 1


def check_text(value: object, what: str) -> str:
    """``value`` if a store can hold it: any text, empty too, without lone surrogates. Else ``InvalidId``."""
    if not isinstance(value, str):
        raise InvalidId(f"A {what} is a str, not {type(value).__name__} ({value!r:.80}).")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidId(f"A {what} must be valid Unicode; this one has lone surrogates: {value[:80]!r}.") from None
    return value


def check_id(value: object, what: str = "run id", limit: int = MAX_RUN_ID) -> str:
    """``value`` if it can name something in a store, else ``InvalidId`` saying why not."""
    # A run's id is looked at with every commit; other ids come once.
    if type(value) is str and limit == MAX_RUN_ID:
        return _check_run_id(value, what)
    return _check_id(value, what, limit)


@lru_cache(maxsize=1024)
def _check_run_id(value: str, what: str) -> str:
    return _check_id(value, what, MAX_RUN_ID)


def _check_id(value: object, what: str, limit: int) -> str:
    text = check_text(value, what)
    if not text:
        raise InvalidId(f"A {what} must not be empty.")
    if len(text) > limit:
        raise InvalidId(f"A {what} has at most {limit} characters; this one has {len(text)}: {text[:40]!r}...")
    if "\x00" in text:
        raise InvalidId(f"A {what} must not contain NUL: {text[:80]!r}.")
    return text


def check_index_key(value: object, what: str) -> str:
    """``value`` if it may be looked up in an index of run documents, else ``InvalidId``.

    Path-like keys are refused on every backend alike: they never name anything, and are a caller's mistake or attack.
    """
    text = check_id(value, what, MAX_KEY)
    if text.startswith(("/", "\\")) or ".." in text.replace("\\", "/").split("/"):
        raise InvalidId(f"A {what} must not look like a path: {text[:80]!r}.")
    return text


def check_prefix(value: object) -> str:
    """``value`` if an id may begin with it, empty too, else ``InvalidId``."""
    return check_id(value, "beginning of a run id") if value != "" else ""


def check_pin(run_id: str, checkpoint_id: str | None, note: str = "") -> None:
    """Raise ``InvalidId`` for what no pin can have."""
    check_id(run_id)
    if checkpoint_id is not None:
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
    if check_text(note, "note"):
        check_id(note, "note", MAX_NOTE)


def check_value(value: bytes | None, what: str) -> None:
    """Raise ``ValueTooLarge`` unless a store can hold a value of so many bytes."""
    if value is not None and len(value) > MAX_VALUE_BYTES:
        raise ValueTooLarge(what, len(value), MAX_VALUE_BYTES)


def check_step(value: object) -> str:
    """``value`` if it can name a step in the journal: any text that is not empty (a branch's may hold NUL)."""
    text = check_text(value, "step")
    if not text:
        raise InvalidId("A step must not be empty.")
    return text


def check_chunks(chunks: Sequence[Chunk]) -> None:
    """Raise unless each chunk writes a key of its own. Keys may hold NUL (a branch's own state does)."""
    for chunk in chunks:
        _check_chunk_key(chunk.key)
        if len(chunk.data) > MAX_VALUE_BYTES:
            check_value(chunk.data, f"The value of key {chunk.key!r}")
    if len({chunk.key for chunk in chunks}) < len(chunks):
        raise StorageError("One commit writes a key of the state twice; give one chunk for each key.")


def _check_chunk_key(key: object) -> None:
    if type(key) is str and key.isascii() and key:
        return
    if not check_text(key, "key of the state"):
        raise InvalidId("A key of the state must not be empty.")


def check_new_run(new: NewRun, owner: str | None) -> None:
    """Raise unless a store can record this run."""
    check_id(new.run_id)
    check_text(new.executor_type, "executor type")
    check_text(new.goal_id, "goal id")
    check_text(new.fingerprint, "fingerprint")
    if new.parent_run_id is not None:
        check_id(new.parent_run_id, "parent run id")
    if owner is not None:
        check_id(owner, "owner", MAX_KEY)
    check_value(new.definition, "The definition")
    check_value(new.header, "The header")
    check_chunks(new.chunks)


def moved_on(found: RunRecord, sequence: int) -> CommitConflict:
    """Why a claim of a run at ``sequence`` is refused."""
    return CommitConflict(
        f"Claim of run {found.run_id!r} at commit {sequence} refused: the last commit is {found.sequence}."
    )


def refusal(commit: Commit) -> StorageError | None:
    """Why no store could take this commit, whatever it holds, or ``None``."""
    try:
        check_id(commit.run_id)
        check_chunks(commit.chunks)
        if commit.checkpoint_id is not None:
            check_id(commit.checkpoint_id, "checkpoint id", MAX_KEY)
        if (commit.checkpoint_id is None) != (commit.checkpoint is None):
            raise StorageError("A commit gives a checkpoint and its id, or neither.")
        if commit.state is RunState.CRASHED:
            raise StorageError("The state crashed is never stored: it is what a running run without an owner shows.")
        if commit.wake_at is not None and (commit.state is not RunState.PAUSED or not math.isfinite(commit.wake_at)):
            raise StorageError("A commit gives a time to wake at only with the state paused, in seconds (finite).")
        for step in commit.journal_done:
            check_step(step)
        check_value(commit.record, "The record of the commit")
        check_value(commit.log, "The log of the commit")
        check_value(commit.checkpoint, "The checkpoint")
    except StorageError as error:
        return error
    return None


def journal_refusal(write: JournalWrite) -> StorageError | None:
    """Why no store could take these journal rows, or ``None``."""
    try:
        check_id(write.run_id)
        for row in write.rows:
            check_step(row.step)
            if type(row.number) is not int or not 0 <= row.number <= _MAX_NUMBER:
                raise InvalidId(f"A call in the journal has a number from 0 to 2**63 - 1, not {row.number!r:.80}.")
            if len(row.record) > MAX_VALUE_BYTES:
                check_value(row.record, f"The journal row {row.step!r}/{row.number}")
    except StorageError as error:
        return error
    return None


def check_fork(run_id: str, sequence: int, first: Commit) -> None:
    """Raise unless ``first`` can be the first commit of a fork at ``sequence``."""
    check_id(run_id)
    refused = refusal(first)
    if refused is not None:
        raise refused
    if first.token or first.release or first.replaces is not None or first.state is None:
        raise StorageError("The first commit of a fork has a state, and no token: nobody holds the new run.")
    if first.sequence != sequence + 1:
        raise CommitConflict(
            f"The first commit of a fork at sequence {sequence} has sequence {sequence + 1}, not {first.sequence}."
        )


def printable(text: str | None) -> str | None:
    """An error's text as a store can hold it: lone surrogates (of file names, say) written as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
