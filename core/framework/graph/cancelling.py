"""Cancelling a run from outside: at once when nobody runs it, else by asking its owner to stop. Blocks; see
``CheckpointManager.cancel``.

A run that nobody holds ends in one commit, without being claimed before: whatever fails or is killed in the middle,
it is as it was found, or cancelled. Only a lease whose owner is gone is taken over first, which changes nothing either:
such a run is crashed as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from framework import _faults
from framework._secrets import mask_error
from framework.errors import (
    CommitConflict,
    LeaseLost,
    MessageRefused,
    ResumeError,
    RunBusy,
    RunNotFound,
    StorageError,
    SurefootError,
)
from framework.graph import run_messages
from framework.graph.run_messages import CANCELLED_ON_REQUEST, cancel_name
from framework.schemas.run import RunState, RunStatus
from framework.storage import codec
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state, is_alive, new_owner, retire
from framework.storage.records import NO_TOKEN, Commit, RunRecord

logger = logging.getLogger(__name__)

LET_GO = run_messages.LET_GO
"""What a task that executes a run is cancelled with when the process is to end and not the run; see there."""

LEFT = "let_go"
"""The kind of the log record that says so: that a process ended in good order, and left the run to the next one."""

_ATTEMPTS = 20
_PAGE = 500

_GOING_ON = (RunState.RUNNING, RunState.CRASHED, RunState.PAUSED)
"""The states in which a part of a cancelled run is cancelled with it. One that failed is over, and says why."""


def cancel_run(storage: Storage, run_id: str, lease_seconds: float) -> bool:
    """Whether the run is cancelled now (``True``), or its owner asked to stop (``False``).

    With a run go the runs that are parts of it, such as those of a plan's sub-graphs, which are running, crashed or
    paused. Those of a run that was only asked to stop are its owner's, but for the paused and crashed ones.
    Raises ``RunNotFound``, ``ResumeError`` (completed), ``StorageError``; calling again does what is left.
    """
    cancelled = _cancel_one(storage, run_id, lease_seconds)
    for part in _parts(storage, run_id):
        if cancelled or effective_state(part) is not RunState.RUNNING:
            with suppress(RunNotFound, ResumeError):  # gone or completed meanwhile
                cancel_run(storage, part.run_id, lease_seconds)
    return cancelled


def cancel_if_asked(storage: Storage, record: RunRecord, lease_seconds: float) -> bool:
    """Cancel the crashed run ``record`` if its last owner was asked to and did not live to do it; whether it was.

    For who recovers crashed runs that nobody asked for. Raises ``RunBusy`` when the run has been taken up since it was
    read, ``RunNotFound``, ``StorageError``.
    """
    if not was_asked_to_stop(storage, record):
        return False
    try:
        _end_unheld(storage, record, lease_seconds)
    except (CommitConflict, LeaseLost):
        now = storage.find_run(record.run_id)
        raise RunBusy(record.run_id, now.owner if now is not None and now.owner else "another process", 0.0) from None
    for part in _parts(storage, record.run_id):
        with suppress(RunNotFound, ResumeError):
            cancel_run(storage, part.run_id, lease_seconds)
    return True


def lets_go(error: BaseException) -> bool:
    """Whether ``error`` is a cancellation with ``LET_GO``."""
    return isinstance(error, asyncio.CancelledError) and error.args[:1] == (LET_GO,)


def was_let_go(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last of a run's log records says that its process left it to the next one."""
    return bool(records) and records[-1].get("kind") == LEFT


def was_asked_to_stop(storage: Storage, record: RunRecord) -> bool:
    """Whether the run's present or last owner was asked to cancel it. Who recovers crashed runs cancels it instead."""
    name = cancel_name(record.token)
    return any(message.name == name for message in storage.read_messages(record.run_id))


def _cancel_one(storage: Storage, run_id: str, lease_seconds: float) -> bool:
    for _ in range(_ATTEMPTS):
        found = storage.find_run(run_id)
        if found is None:
            raise RunNotFound(run_id)
        if found.state is RunState.CANCELLED:
            return True
        if found.state is RunState.COMPLETED:
            raise ResumeError(run_id, f"Run {run_id!r} is completed; there is nothing left to cancel.")
        try:
            _end_unheld(storage, found, lease_seconds)
        except RunBusy:
            if _ask(storage, found):
                return False
        except (CommitConflict, LeaseLost):
            continue  # taken over while it was being cancelled: ask whoever has it now
        else:
            return True
    raise ResumeError(run_id, f"Run {run_id!r} kept changing hands while it was being cancelled; call again.")


def _parts(storage: Storage, run_id: str) -> Iterator[RunRecord]:
    """The runs that are parts of this one and not over, newest first."""
    last: RunRecord | None = None
    while True:
        page = storage.list_runs(_GOING_ON, limit=_PAGE, before=last)
        yield from (run for run in page if run.parent_run_id == run_id)
        if len(page) < _PAGE:
            return
        last = page[-1]


def _end_unheld(storage: Storage, found: RunRecord, lease_seconds: float) -> None:
    """End the run, unless it is not as it was found any more: ``CommitConflict``, or ``LeaseLost``.

    Raises ``RunBusy`` when somebody alive holds it, ``RunNotFound``, ``StorageError``.
    """
    try:
        _end(storage, found, NO_TOKEN)
    except RunBusy:
        _end_held(storage, found, lease_seconds)
    _end_document(storage, found)


def _end_held(storage: Storage, found: RunRecord, lease_seconds: float) -> None:
    """End a run whose owner is gone, but not its lease."""
    owner = new_owner()
    try:
        record = storage.claim_run(found.run_id, owner, lease_seconds, is_alive, found.sequence)
        if record.state is RunState.COMPLETED:
            raise CommitConflict(f"Run {found.run_id!r} was completed meanwhile.")
        try:
            if record.token != found.token + 1:
                raise LeaseLost(found.run_id, found.token)  # somebody took it up since, and is gone as well
            _end(storage, record, record.token)
        except BaseException:
            with suppress(StorageError):  # the first error counts; the lease ends by itself
                storage.release_lease(record.run_id, record.token)
            raise
    finally:
        retire(owner)


def _end(storage: Storage, record: RunRecord, token: int) -> None:
    end = {"kind": "end", "state": RunState.CANCELLED.value, "error": CANCELLED_ON_REQUEST}
    _faults.reach("commit.before")
    refused = storage.commit(
        [
            Commit(
                run_id=record.run_id,
                token=token,
                sequence=record.sequence + 1,
                record=codec.encode([end], "record"),
                state=RunState.CANCELLED,
                error=CANCELLED_ON_REQUEST,
                release=True,
            )
        ]
    )[0]
    if refused is not None:
        raise refused


def _end_document(storage: Storage, found: RunRecord) -> None:
    """Let the run's document, which its last process left as it was then, say that it is cancelled."""
    try:
        document = storage.load_run(found.run_id)
        if document is None:
            return
        document.complete(RunStatus.CANCELLED, CANCELLED_ON_REQUEST)
        now = storage.find_run(found.run_id)
        # One that was taken up in between has a document of its new owner's, who may even have ended it.
        if now is not None and (now.state, now.sequence) == (RunState.CANCELLED, found.sequence + 1):
            storage.save_run(document, now.token)
    except SurefootError as error:
        logger.warning("Run %r is cancelled, but its document does not say so: %s", found.run_id, mask_error(error))


def _ask(storage: Storage, found: RunRecord) -> bool:
    """Leave the request for the owner that was found; ``False`` when the run is no longer that owner's."""
    with suppress(MessageRefused):  # asked before, or completed meanwhile, which the next look tells
        storage.send(found.run_id, cancel_name(found.token), b"null")
    now = storage.find_run(found.run_id)
    return now is not None and now.token == found.token and now.state is RunState.RUNNING
