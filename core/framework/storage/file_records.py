"""The record of a run as a file of a ``FileStorage``, and what commits newer than it say."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from framework.errors import CorruptData
from framework.schemas.run import RunState
from framework.storage.file_commits import Entry
from framework.storage.file_io import dump_checked, load_checked, show, unshow, write_atomic
from framework.storage.records import RunRecord


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


def after(record: RunRecord, entry: Entry) -> RunRecord:
    """The record once a commit has happened."""
    record = replace(record, sequence=entry.sequence)
    if entry.state is not None:
        record = replace(record, state=entry.state, error=entry.error, updated_at=entry.at)
    return replace(record, owner=None, lease_until=0.0) if entry.release else record


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
