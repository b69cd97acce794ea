"""The record of a run as a file of a ``FileStorage``, and what commits newer than it say."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from framework.errors import CorruptData
from framework.schemas.run import RunState
from framework.storage.checks import printable
from framework.storage.file_commits import Entry
from framework.storage.file_io import dump_checked, load_checked, show, unshow, write_atomic
from framework.storage.records import Commit, NewRun, RunRecord, Write, attempts_after_claim


def read_record(path: Path) -> RunRecord | None:
    """The record in a file, or ``None`` when there is none. Raises ``CorruptData``."""
    try:
        content = load_checked(path)
    except FileNotFoundError:
        return None
    try:
        del content["format"]
        return RunRecord(**{**content, "header": unshow(content["header"]), "state": RunState(content["state"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"{path} is not the record of a run: {error!r}.") from None


def write_record(path: Path, record: RunRecord) -> None:
    """Put a record in its place."""
    content = {**asdict(record), "header": show(record.header), "state": record.state.value}
    write_atomic(path, dump_checked(content))


def new_record(new: NewRun, now: float, owner: str | None, lease_seconds: float) -> RunRecord:
    """The record of a run that is accepted now."""
    return RunRecord(
        run_id=new.run_id,
        executor_type=new.executor_type,
        goal_id=new.goal_id,
        fingerprint=new.fingerprint,
        header=new.header,
        state=RunState.RUNNING,
        sequence=0,
        created_at=now,
        updated_at=now,
        error=None,
        owner=owner,
        token=0 if owner is None else 1,
        lease_until=0.0 if owner is None else now + lease_seconds,
        recovery_attempts=0,
        parent_run_id=new.parent_run_id,
    )


def claimed_record(stored: RunRecord, found: RunRecord, owner: str, now: float, lease_seconds: float) -> RunRecord:
    """The record of a run that ``owner`` takes over now, which it ``found`` so."""
    return replace(
        stored,
        owner=owner,
        token=stored.token + 1,
        lease_until=now + lease_seconds,
        state=RunState.RUNNING,
        wake_at=None,
        recovery_attempts=attempts_after_claim(found),
        updated_at=now,
    )


def forked_record(source: RunRecord, first: Commit, header: bytes, now: float) -> RunRecord:
    """The record of a run that is made now from ``source``, after its first commit."""
    return replace(
        source,
        run_id=first.run_id,
        header=header,
        state=first.state or source.state,
        sequence=first.sequence,
        created_at=now,
        updated_at=now,
        error=printable(first.error),
        wake_at=first.wake_at,
        owner=None,
        token=0,
        lease_until=0.0,
        recovery_attempts=0,
        parent_run_id=None,
    )


def after(record: RunRecord, entry: Entry) -> RunRecord:
    """The record once a commit has happened."""
    record = replace(record, sequence=entry.sequence)
    if entry.state is not None:
        record = replace(record, state=entry.state, error=entry.error, updated_at=entry.at, wake_at=entry.wake_at)
    return replace(record, owner=None, lease_until=0.0) if entry.release else record


def with_progress(record: RunRecord, write: Write) -> RunRecord:
    """The record once a commit, or a journal write, has told of progress."""
    return replace(record, recovery_attempts=0) if write.progress and record.recovery_attempts else record


def holder_of(record: RunRecord, now: float) -> str | None:
    """Who holds the lease, as far as the clock tells."""
    return record.owner if record.lease_until > now else None


def shown(record: RunRecord, holder: str | None) -> RunRecord:
    """The record as a caller sees it, given who holds the lease."""
    if record.state is not RunState.RUNNING:
        return record
    # What a run ended with before it was claimed is not what it comes to now, unless its owner left it.
    return replace(record, state=RunState.CRASHED) if holder is None else replace(record, error=None)


def age(record: RunRecord) -> tuple[float, str]:
    return record.created_at, record.run_id
