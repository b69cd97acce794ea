"""Runs that could go on though nobody works on them: found, and resumed by whoever claims each of them first.

A run is found by one query for all of a kind, and claimed by the executor that resumes it, in one transaction: of any
number of processes that look at once, one wins, and the others are told (``RunBusy``) and go on to the next. Parts of
other runs are never found, only the wholes they wake: whoever resumes the whole resumes them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from framework._secrets import mask_error
from framework.errors import LeaseLost, RunBusy, SurefootError
from framework.graph.cancelling import cancel_if_asked
from framework.graph.crash_loops import is_given_up
from framework.graph.resume_outlook import waits_of
from framework.graph.stored_run import readable_body
from framework.graph.suspension import Waiting
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import RunRecord

T = TypeVar("T")

_PAGE = 500
_MOST_WOKEN = 1000
"""Runs to resume that are looked for at one look; the longest due come first."""
_MOST_ASKED_FOR = 50
"""Wholes of parts that are read one by one at a look; with more of them all paused runs are listed, in pages."""
_MOST_RUNNING = 1000
"""Running runs whose owners are looked at for life, the newest first; others are found when their leases end."""
_DEEPEST = 100
"""Levels of parts of parts that are looked through."""
_ANSWERS = ("signal:", "answer:", "settle:")


@dataclass(frozen=True, slots=True)
class Recovered(Generic[T]):
    """What came of one run. ``outcome``: resumed (``result`` says how it went), cancelled (that was asked for before
    its process ended), busy (another process took it), failed (it could not be resumed: ``error``)."""

    run_id: str
    outcome: str
    result: T | None = None
    error: str | None = None


def recoverable_runs(
    storage: Storage, *, failed: bool = False, is_ours: Callable[[RunRecord], bool] = lambda run: True
) -> list[RunRecord]:
    """Runs to take up now: crashed ones, oldest first, then paused ones that can go on, then, if asked, failed ones.

    Their ``state`` is as can be told from here: a run whose owner certainly is gone is crashed before its lease ends.
    Failed runs that were given up after crashing too often are left out: those are for a person. Raises
    ``StorageError``.
    """
    crashed = [*_each(storage, RunState.CRASHED), *_orphans(storage)]
    found = sorted((run for run in crashed if _is_whole(run)), key=lambda run: (run.created_at, run.run_id))
    found += woken_runs(storage, is_ours=is_ours)
    if failed:
        over = [run for run in _each(storage, RunState.FAILED) if _is_whole(run) and not is_given_up(run)]
        found += sorted(over, key=lambda run: (run.updated_at, run.run_id))
    return [run for run in found if is_ours(run)]


def is_still(storage: Storage, run: RunRecord) -> bool:
    """Whether the run is as it was found: nobody has taken it since. Cheap; the claim alone decides."""
    now = storage.find_run(run.run_id)
    return now is not None and now.token == run.token and effective_state(now) is run.state


async def recover_runs(
    storage: Storage,
    runs: Sequence[RunRecord],
    resume: Callable[[RunRecord], Awaitable[T]],
    *,
    concurrency: int = 1,
    lease_seconds: float,
) -> list[Recovered[T]]:
    """Have ``resume`` take up each run, in order, at most ``concurrency`` at once; what came of each.

    ``resume`` executes the run by its id. What it raises of this library's errors is an outcome, anything else passes
    through once the others have ended. Cancelled, it cancels those under way in the same way.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is how many runs go on at once, at least 1, not {concurrency}.")
    free = asyncio.Semaphore(concurrency)

    async def one(run: RunRecord) -> Recovered[T]:
        async with free:
            return await recover_run(storage, run, resume, lease_seconds)

    tasks = [asyncio.create_task(one(run)) for run in runs]
    try:
        ended = await asyncio.gather(*(asyncio.shield(task) for task in tasks), return_exceptions=True)
    except asyncio.CancelledError as error:
        # Said on as it came: a gather would cancel them without the word that lets runs go.
        for task in tasks:
            task.cancel(*error.args)
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    for each in ended:
        if isinstance(each, BaseException):
            raise each
    return [each for each in ended if isinstance(each, Recovered)]


async def recover_run(
    storage: Storage, run: RunRecord, resume: Callable[[RunRecord], Awaitable[T]], lease_seconds: float
) -> Recovered[T]:
    """Take up one run that was found; see ``recover_runs``."""
    try:
        if not await asyncio.to_thread(is_still, storage, run):
            return Recovered(run.run_id, "busy")
        asked = run.state is RunState.CRASHED
        if asked and await asyncio.to_thread(cancel_if_asked, storage, run, lease_seconds):
            return Recovered(run.run_id, "cancelled")
        return Recovered(run.run_id, "resumed", await resume(run))
    except (RunBusy, LeaseLost):
        return Recovered(run.run_id, "busy")
    except SurefootError as error:
        return Recovered(run.run_id, "failed", error=mask_error(error))


def woken_runs(storage: Storage, *, is_ours: Callable[[RunRecord], bool] = lambda run: True) -> list[RunRecord]:
    """Paused runs to resume now, the longest paused first; parts of other runs are none.

    A run is one when the first of its sleeps and timeouts is over by the store's clock, also while others of its steps
    wait for a person, or when a message has come that one of its steps waits for. What a part of it waits for, as the
    run of a plan's sub-graph, wakes the whole, when that is paused for it. One that cannot be read is none: what
    reads it for its own sake says why. Runs that are not ``is_ours`` are passed over, and hide none: those that are due
    are read in pages until a thousand are found. Costs one query for each 500 that are due, one for each 500 paused
    runs that have messages, and for each of these its messages and its newest checkpoint, and of parts their wholes;
    other paused runs cost nothing, unless parts of many wholes are due, when they are listed. Raises ``StorageError``.
    """
    found: dict[str, RunRecord] = {}
    known: set[str] = set()
    wholes = _Wholes(storage)

    def wake(run: RunRecord) -> None:
        whole = run if _is_whole(run) else wholes.waiting_for(run)
        if whole is not None and whole.run_id not in found and is_ours(whole):
            found[whole.run_id] = whole

    for run in _due(storage):
        known.add(run.run_id)
        wake(run)
        if len(found) >= _MOST_WOKEN:
            break
    for run in _messaged(storage):
        if run.run_id not in known and _is_answered(storage, run):
            wake(run)
    return sorted(found.values(), key=lambda run: (run.updated_at, run.run_id))


class _Wholes:
    """The paused runs that parts belong to, as they are at one look: each is read once.

    Parts of plans that have failed, or go on without them, stay paused and due. However many these are, a look costs
    a few queries for them, not one for each.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._read: dict[str, RunRecord | None] = {}
        self._parts: dict[str, frozenset[str]] = {}
        self._has_all = False

    def waiting_for(self, part: RunRecord) -> RunRecord | None:
        """The paused run that waits for what this part of it, or of a part of it, waits for; ``None`` without one.

        A whole that is paused for other reasons would be resumed again and again, with the part left as it is.
        """
        run = part
        for _ in range(_DEEPEST):
            above = self._paused(run.parent_run_id) if run.parent_run_id is not None else None
            if above is None or part.run_id not in self._waited_for(above):
                return None
            run = above
            if _is_whole(run):
                return run
        return None

    def _paused(self, run_id: str) -> RunRecord | None:
        if run_id not in self._read and not self._has_all:
            if len(self._read) < _MOST_ASKED_FOR:
                run = self._storage.find_run(run_id)
                self._read[run_id] = run if run is not None and run.state is RunState.PAUSED else None
            else:
                self._read |= {run.run_id: run for run in _each(self._storage, RunState.PAUSED)}
                self._has_all = True
        return self._read.get(run_id)

    def _waited_for(self, run: RunRecord) -> frozenset[str]:
        if run.run_id not in self._parts:
            waits = (each for step in _waits(self._storage, run).values() for each in step)
            self._parts[run.run_id] = frozenset(each.run for each in waits if each.run)
        return self._parts[run.run_id]


def _due(storage: Storage) -> Iterator[RunRecord]:
    last: RunRecord | None = None
    while page := storage.list_due(limit=_PAGE, after=last):
        yield from page
        if len(page) < _PAGE:
            return
        last = page[-1]


def _messaged(storage: Storage) -> Iterator[RunRecord]:
    last = ""
    while page := storage.list_messaged(_PAGE, last):
        yield from page
        last = page[-1].run_id
        if len(page) < _PAGE:
            return


def _is_whole(run: RunRecord) -> bool:
    return run.parent_run_id is None


def _pages(storage: Storage, state: RunState) -> Iterator[list[RunRecord]]:
    last: RunRecord | None = None
    while page := storage.list_runs([state], limit=_PAGE, before=last):
        yield page
        if len(page) < _PAGE:
            return
        last = page[-1]


def _each(storage: Storage, state: RunState) -> Iterator[RunRecord]:
    for page in _pages(storage, state):
        yield from page


def _orphans(storage: Storage) -> Iterator[RunRecord]:
    """Running runs whose process, of this machine, is gone though the lease lasts."""
    for run in storage.list_runs([RunState.RUNNING], limit=_MOST_RUNNING):
        if effective_state(run) is RunState.CRASHED:
            yield replace(run, state=RunState.CRASHED)


def _is_answered(storage: Storage, run: RunRecord) -> bool:
    try:
        left = {message.name for message in storage.read_messages(run.run_id)}
        if not any(name.startswith(_ANSWERS) for name in left):
            return False
    except SurefootError:
        return False
    now = time.time()
    # What parts wait for is left for them, not for this run.
    waits = [each for step in _waits(storage, run).values() for each in step if not each.run]
    return any(each.is_over(left, now) for each in waits)


def _waits(storage: Storage, run: RunRecord) -> Mapping[str, Sequence[Waiting]]:
    """What the run's steps wait for, by its newest checkpoint; nothing of a run that cannot be read."""
    try:
        row = next(iter(storage.read_checkpoint_rows(run.run_id, limit=1)), None)
        return waits_of(readable_body(row)) if row is not None else {}
    except SurefootError:
        return {}
