"""A run's commits on their way to the store: handed over in order, and put back on track after one that failed.

What a commit carries is fixed when it is made: records, events and the chunks of the state, at one moment. So what a
refused commit carried can be handed over again later, whatever the run's steps have done to their memories since.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from framework._secrets import mask
from framework.errors import CorruptData, LeaseLost, RunNotFound, StorageError
from framework.graph.checkpoint_rules import checkpoint_id, retention_of
from framework.graph.state_tracker import StateTracker
from framework.schemas.checkpoint import CheckpointConfig, CheckpointStatus, ExecutorType, StepRecord
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.chunks import Chunk
from framework.storage.committer import Committer, Ticket
from framework.storage.interface import Storage
from framework.storage.records import Commit, RunRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROGRESS = frozenset({"step", "attempt", "wait"})
"""Kinds of records that say that a run got somewhere since it was claimed."""

MAX_UNDER_WAY = 64
"""Commits of one run that may wait for the store under ``durability="async"``; with more, the run waits as well."""

MAX_BYTES_UNDER_WAY = 32_000_000
"""Bytes of values in them, likewise."""


@dataclass(slots=True)
class Progress:
    """Where a run stands, as the executor sees it after a step: what a checkpoint records besides the state."""

    node_id: str
    next_id: str | None
    step_number: int
    total_tokens: int
    total_latency_ms: int
    position: Mapping[str, Any]
    status: CheckpointStatus = CheckpointStatus.IN_PROGRESS
    steps: Mapping[str, StepRecord] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    total_cost: float = 0.0
    plain: bool = False
    """Whether ``position``, ``context`` and ``steps`` hold nothing but JSON's own types."""


@dataclass(eq=False, slots=True)
class Pending:
    """A commit not known to be durable. ``progress`` ``None`` makes no checkpoint; a ``state`` ends the session.

    ``order`` numbers them as they were made. ``sequence`` and ``future`` are those of the last time it was handed
    over; until then there is no ``future``.
    """

    records: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    chunks: Sequence[Chunk] = ()
    digest: str = ""
    progress: Progress | None = None
    state: RunState | None = None
    error: str | None = None
    journal_done: Sequence[str] = ()
    wake_at: float | None = None
    order: int = 0
    sequence: int = 0
    checkpoint_id: str | None = None
    future: Ticket | None = None

    @property
    def size(self) -> int:
        """Bytes of the values it writes."""
        return sum(len(chunk.data) for chunk in self.chunks)


async def wait_for(future: Future[T]) -> T:
    """Wait for the committer without blocking the loop. A cancellation waits too: what was handed over gets done."""
    try:
        await wait_until_done(future)
    except asyncio.CancelledError:
        if future.exception() is not None:
            logger.warning("A commit failed while its run was being cancelled: %s", mask(str(future.exception())))
        raise
    return future.result()


async def wait_until_done(future: Future[Any] | Ticket) -> bool:
    """Return when ``future`` is done, whatever came of it. A cancellation is raised then, not before.

    Whether that had to be waited for, and so others had a turn.
    """
    if future.done():
        return False
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        # A waiter of our own each time: cancelling this task cancels the waiter, never the work handed over.
        waiter: asyncio.Future[None] = loop.create_future()
        if isinstance(future, Ticket):
            future.wake(loop, waiter)
            if future.done():
                break
        else:
            future.add_done_callback(lambda _, waiter=waiter: _wake(loop, waiter))  # type: ignore[misc]
        try:
            await waiter
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return True


def _wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    try:
        loop.call_soon_threadsafe(wake)
    except RuntimeError:
        logger.debug("a commit was done after the event loop that waited for it was closed")


class RunCommits:
    """The commits of one run in this process, for ``RunSession``."""

    def __init__(
        self,
        config: CheckpointConfig,
        committer: Committer,
        run: RunRecord,
        tracker: StateTracker,
        on_problem: Callable[[str], None],
    ) -> None:
        self.checkpoint_id: str | None = None
        self.ended: RunState | None = None
        """The state that a durable commit ended the session with."""
        self._waited = False
        self._config = config
        self._committer = committer
        self._retention = retention_of(config)
        self._run_id = run.run_id
        self._token = run.token
        self._executor_type = ExecutorType(run.executor_type)
        self._tracker = tracker
        self._on_problem = on_problem
        self._sequence = run.sequence
        self._made = 0
        self._pending: list[Pending] = []
        self._lost_track = False
        self._recovering = asyncio.Lock()

    @property
    def lost_track(self) -> bool:
        """Whether commits were refused that have not been handed over again."""
        return self._lost_track

    @property
    def ending(self) -> bool:
        """Whether a commit that ends the session is on its way."""
        return any(commit.state is not None for commit in self._pending)

    def take_waited(self) -> bool:
        """Whether a commit had to be waited for since the last call of this."""
        waited, self._waited = self._waited, False
        return waited

    def put(self, commit: Pending, *, alone: bool = False) -> None:
        """Hand a commit over, or, after a refused one, keep it until that is made up for; ``settle`` sees to it.

        ``alone`` says that the run does nothing else until the commit is made: see ``Committer.hand_over``.
        """
        self._made += 1
        commit.order = self._made
        if not self._lost_track:
            self._submit(commit, alone and not self._pending)
        self._pending.append(commit)

    async def settle(self, *, wait: bool = True) -> None:
        """Wait for the commits made so far, after making up for refused ones; not for those under way unless ``wait``.

        With more than ``MAX_UNDER_WAY`` commits under way this waits for the oldest in any case: a store that is slower
        than its run holds the run up, rather than have its memory fill. Raises ``StorageError`` for a refused commit
        unless ``on_commit_error`` is "continue": then it is reported as a problem, and what it carried is handed over
        again at the next call. Raises ``LeaseLost``.
        """
        upto = self._made
        if self._lost_track and not await self._recover():
            return
        while self._pending and self._pending[0].order <= upto and not self._lost_track:
            first = self._pending[0]
            assert first.future is not None  # only after a refused one is a commit not handed over
            if not wait and not first.future.done() and not self._is_full():
                return
            self._waited |= await wait_until_done(first.future)
            if not self._pending or self._pending[0] is not first:
                continue  # another step of the run saw to it
            try:
                self._check(first.future)
            except StorageError as error:
                if self._config.on_commit_error == "stop":
                    self._pending.clear()
                    raise
                self._lost_track = True
                self._on_problem(f"A commit failed and the run goes on without it: {error}")
            else:
                self._durable(first)

    def _is_full(self) -> bool:
        """Whether so much is under way that the run has to wait for the store, whatever its durability."""
        if len(self._pending) > MAX_UNDER_WAY:
            return True
        return len(self._pending) > 1 and sum(each.size for each in self._pending) > MAX_BYTES_UNDER_WAY

    def _check(self, future: Ticket) -> None:
        try:
            future.result()
        except RunNotFound:
            raise StorageError(
                f"Run {self._run_id!r} vanished from the store while it was going on: it was deleted, or the store "
                "was. Its record cannot be continued; run it again to start anew."
            ) from None

    def _durable(self, commit: Pending) -> None:
        self._pending.remove(commit)
        self.ended = commit.state

    # --- after a refused commit ---------------------------------------------------------------------------------

    async def _recover(self) -> bool:
        """Learn what the store holds and hand over the rest again; ``False`` when it cannot be read now."""
        async with self._recovering:
            if not self._lost_track:
                return True  # another step of the run was first
            for each in list(self._pending):
                if each.future is not None:
                    await wait_until_done(each.future)
            run_id = self._run_id
            try:
                record, state = await wait_for(self._committer.call(lambda storage: _standing(storage, run_id)))
                # From here on nothing waits: what is pending, the state's chains and the sequence change together.
                self._take_up(record, state)
            except StorageError as error:
                self._on_problem(f"The store cannot be read back after a failed commit: {error}")
                return False
            return True

    def _take_up(self, record: RunRecord, state: stored.State) -> None:
        if record.token != self._token:
            raise LeaseLost(self._run_id, self._token)
        refused: list[Pending] = []
        for each in list(self._pending):
            if each.future is None or each.sequence > record.sequence:
                refused.append(each)
                continue
            self._durable(each)  # in spite of its error, as when only the answer was lost
            if self.ended is not None:
                self._pending.clear()  # the run is given up: nothing can follow
                return
        again = self._merge(refused, state)
        self._sequence = record.sequence
        self._pending = again
        self._lost_track = False
        for each in again:
            self._submit(each)

    def _merge(self, refused: Sequence[Pending], state: stored.State) -> list[Pending]:
        """What refused commits carried, as few commits over ``state``: one checkpoint, then what came after it."""
        ends = 1 + max((index for index, each in enumerate(refused) if each.progress is not None), default=-1)
        try:
            values = chunklib.apply((chunk for each in refused for chunk in each.chunks), state.values)
        except ValueError as error:
            raise CorruptData(
                f"The state of run {self._run_id!r} is not what its commits made of it: {error}."
            ) from None
        chunks = chunklib.diff(state.values, values)
        chains = {key: chain for key, chain in state.chains.items() if key in values}
        for chunk in chunks:
            if chunk.op != "delete":
                chains[chunk.key] = chunklib.chain(chains.get(chunk.key, 0), chunk)
        # The values stay as the tracker knows them; only how the store comes to them is new.
        self._tracker.rebase(chains)
        merged: list[Pending] = []
        for group in (refused[:ends], refused[ends:]):
            if group:
                merged.append(
                    Pending(
                        records=[record for each in group for record in each.records],
                        events=[event for each in group for event in each.events],
                        chunks=chunks if group[-1].progress is not None else (),
                        digest=stored.format_digest(chains.values()),
                        progress=group[-1].progress,
                        state=group[-1].state,
                        error=group[-1].error,
                        journal_done=[step for each in group for step in each.journal_done],
                        wake_at=group[-1].wake_at,
                        order=group[0].order,
                    )
                )
        return merged

    # --- handing over -------------------------------------------------------------------------------------------

    def _submit(self, pending: Pending, alone: bool = False) -> None:
        body: bytes | None = None
        if pending.progress is not None:
            body = self._body(pending.progress, pending.digest)
            self.checkpoint_id = pending.checkpoint_id = checkpoint_id(
                self._run_id, pending.progress.node_id, self._sequence + 1
            )
        commit = Commit(
            run_id=self._run_id,
            token=self._token,
            sequence=self._sequence + 1,
            record=stored.encode_records(pending.records),
            log=codec.encode(pending.events, "log") if pending.events else None,
            checkpoint_id=pending.checkpoint_id if body is not None else None,
            checkpoint=body,
            chunks=pending.chunks,
            state=pending.state,
            error=pending.error,
            release=pending.state is not None,
            retention=self._retention,
            journal_done=pending.journal_done,
            wake_at=pending.wake_at,
            progress=not _PROGRESS.isdisjoint([record.get("kind") for record in pending.records]),
        )
        pending.future = self._committer.hand_over(commit, alone=alone)
        self._sequence += 1
        pending.sequence = self._sequence

    def _body(self, progress: Progress, digest: str) -> bytes:
        is_graph = self._executor_type is ExecutorType.GRAPH
        return stored.encode_body(
            executor=self._executor_type.value,
            at=datetime.now(),
            status=progress.status.value,
            step_number=progress.step_number,
            tokens=progress.total_tokens,
            latency_ms=progress.total_latency_ms,
            digest=digest,
            node=progress.node_id if is_graph else None,
            step=None if is_graph else progress.node_id,
            next_id=progress.next_id,
            position=progress.position,
            context=progress.context,
            steps={key: record.model_dump() for key, record in progress.steps.items()} if progress.steps else None,
            cost=progress.total_cost,
            plain=progress.plain,
        )


def _standing(storage: Storage, run_id: str) -> tuple[RunRecord, stored.State]:
    run = storage.find_run(run_id)
    if run is None:
        raise StorageError(f"Run {run_id!r} vanished from the store while it was going on: it was deleted.")
    return run, stored.load_state(storage, run_id, run.sequence)
