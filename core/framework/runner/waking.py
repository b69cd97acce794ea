"""Paused runs that can go on by themselves: their sleep is over, or what they waited for has come. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

from framework.errors import SurefootError
from framework.graph.resume_outlook import waits_of
from framework.graph.stored_run import readable_body
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.records import RunRecord

_PAGE = 500
_MOST_DUE = 1000
"""Runs that are due and taken at one look; the longest due come first."""
_ANSWERS = ("signal:", "answer:", "settle:")


def woken_runs(storage: Storage) -> list[RunRecord]:
    """Paused runs to resume now, the longest paused first; parts of other runs are none.

    A run is one when its sleep, or the longest time of its wait, is over by the store's clock, or when a message has
    come that one of its steps waits for. One that waits for a person who has not answered is none, and neither is one
    that cannot be read: what reads it for its own sake says why. Costs one query for those that are due, and for every
    other paused run its messages; of those that have any its newest checkpoint. Raises ``StorageError``.
    """
    found = {run.run_id: run for run in storage.list_due(limit=_MOST_DUE)}
    for run in _paused(storage):
        if run.run_id not in found and _is_answered(storage, run):
            found[run.run_id] = run
    whole = (run for run in found.values() if run.parent_run_id is None)
    return sorted(whole, key=lambda run: (run.updated_at, run.run_id))


def _paused(storage: Storage) -> Iterator[RunRecord]:
    last: RunRecord | None = None
    while page := storage.list_runs([RunState.PAUSED], limit=_PAGE, before=last):
        yield from page
        last = page[-1]


def _is_answered(storage: Storage, run: RunRecord) -> bool:
    try:
        left = {message.name for message in storage.read_messages(run.run_id)}
        if not any(name.startswith(_ANSWERS) for name in left):
            return False
        row = next(iter(storage.read_checkpoint_rows(run.run_id, limit=1)), None)
        waits = waits_of(readable_body(row)) if row is not None else {}
    except SurefootError:
        return False
    now = time.time()
    return any(each.is_over(left, now) for step in waits.values() for each in step)
