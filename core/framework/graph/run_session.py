"""One durable run in this process: opened, committed to step by step, and ended. Shared by both executors.

A session owns the run's lease from ``open_session`` to ``end``. It collects what each step leaves behind (a record,
decisions and problems, changed scopes of the state, the next position), decides with the manager's configuration when
that is committed, and hands commits to the store's committer thread, so the event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from framework import _faults
from framework.errors import LeaseLost, RunError, StorageError, SurefootError
from framework.graph import stopping
from framework.graph.cancelling import LEFT
from framework.graph.checkpoint_rules import is_due
from framework.graph.memory import SharedMemory
from framework.graph.run_commits import Pending, Progress, RunCommits, wait_for
from framework.graph.run_messages import Inbox, public
from framework.graph.run_metadata import json_facts
from framework.graph.run_opening import Definition, Restored, open_run
from framework.graph.spending import NOTHING, Spent
from framework.graph.state_tracker import Staged, StateTracker
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.committer import Committer, committer_of
from framework.storage.interface import Storage
from framework.storage.ownership import new_owner, retire
from framework.storage.records import Damage, JournalRow, JournalWrite, Message, NewRun, RunRecord

__all__ = ["Opened", "Progress", "RunSession", "open_session", "wait_for"]

logger = logging.getLogger(__name__)

_LAST_ATTEMPTS = 6
"""How often a run's last commit is tried under ``on_commit_error="continue"``: no later one could make up for it."""

_ASSURED_LOOK_SECONDS = 0.5
"""How often to look, at most, whether a lease that may have ended was renewed."""

_LAST_DELAY_SECONDS = 0.05
"""Before the second of them; doubled before each further one, 1.55 s in all."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run taken hold of: ``session`` is ``None`` when it is completed; ``restored`` is ``None`` when it is new."""

    session: RunSession | None
    restored: Restored | None


async def open_session(
    storage: Storage,
    config: CheckpointConfig,
    definition: Definition,
    run_id: str,
    *,
    initial: Mapping[str, Any],
    input_data: Mapping[str, Any],
    header: Mapping[str, Any],
    on_problem: Callable[[str], None],
    scopes: Mapping[str, SharedMemory] | None = None,
    parent_run_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Opened:
    """Start the run ``run_id``, take it over, or look up its result; durable on return.

    ``initial`` is a new run's state (its input included), ``scopes`` what it begins with beside that, and
    ``parent_run_id`` the run it is a part of. ``metadata`` are facts about the run for whoever lists runs: JSON values,
    recorded with a new run (in its header under "metadata") and kept for its life. ``on_problem`` is told what went
    wrong without ending the run: damaged checkpoints passed over, commits that failed under
    ``on_commit_error="continue"``. Raises ``RunBusy``, ``DefinitionChanged``, ``ResumeError``, ``UnstorableValue``
    (nothing is recorded then), ``UnknownType``, ``StorageError``.
    """
    committer = committer_of(storage)
    await committer.back_pressure.room()
    tracker = StateTracker(definition.append_only)
    memory = SharedMemory()
    for key, value in initial.items():
        memory.put(key, value)
    staged = tracker.stage({**(scopes or {}), "": memory})
    new = NewRun(
        run_id=run_id,
        executor_type=definition.executor_type.value,
        goal_id=definition.goal_id,
        fingerprint=definition.fingerprint,
        definition=codec.encode(dict(definition.body), "definition"),
        header=codec.encode(
            {
                **header,
                "definition_id": definition.id,
                "input_keys": list(input_data),
                **({"metadata": json_facts(metadata)} if metadata else {}),
            },
            "header",
        ),
        chunks=staged.chunks,
        parent_run_id=parent_run_id,
    )
    owner = new_owner()
    lease = config.lease_seconds
    asked = time.monotonic()
    allow_change = config.definition_change == "allow"
    try:
        record, restored = await wait_for(
            committer.call(
                lambda store: open_run(store, new, owner, lease, definition, allow_change),
                size=sum(len(chunk.data) for chunk in staged.chunks),
            )
        )
    except BaseException:
        retire(owner)
        raise
    if restored is None:
        tracker.accept(staged)
    else:
        tracker.load(restored.state, restored.values)
        for item in restored.damage:
            on_problem(f"{item.where} of run {run_id!r} is damaged and was passed over: {item.problem}")
    if restored is not None and restored.found is RunState.COMPLETED:
        retire(owner)
        return Opened(None, restored)
    session = RunSession(config, committer, record, owner, tracker, on_problem, asked)
    if restored is not None:
        session.take_up(restored)
    return Opened(session, restored)


class RunSession:
    """The durable side of one run. Made by ``open_session``; used by one executor, from one event loop."""

    def __init__(
        self,
        config: CheckpointConfig,
        committer: Committer,
        run: RunRecord,
        owner: str,
        tracker: StateTracker,
        on_problem: Callable[[str], None],
        since: float,
    ) -> None:
        self.run_id = run.run_id
        self.recovery_attempts = run.recovery_attempts
        """How often in a row the run was taken over from a process that vanished, this time included."""
        self._config = config
        self._committer = committer
        self._owner = owner
        self._token = run.token
        self._tracker = tracker
        self._on_problem = on_problem
        self._commits = RunCommits(config, committer, run, tracker, on_problem)
        self._records: list[Mapping[str, Any]] = []
        self._events: list[Mapping[str, Any]] = []
        self._scopes: dict[str, SharedMemory] = {}
        self._over: set[str] = set()
        self._checked: tuple[Mapping[str, SharedMemory], Staged] | None = None
        self._saved_step = 0
        self._ended = False
        self._journaled: set[str] = set()
        self._journal_spent: dict[str, Spent] = {}
        self._journal_counted: Mapping[str, int] = {}
        self._unpriced: str | None = None
        self._rewound = False
        self._journal_done: list[str] = []
        self._inbox = Inbox(run.run_id, run.token)
        self._lost: RunError | None = None
        self._stopping = False
        deliver, lose = self._inbox.deliver, self._inbox.tell(self._lose)
        committer.heartbeat.hold(self.run_id, self._token, config.lease_seconds, deliver, lose, since=since)
        stopping.add(self)

    @property
    def token(self) -> int:
        """The fencing token with which this process owns the run."""
        return self._token

    @property
    def checkpoint_id(self) -> str | None:
        """The run's newest checkpoint, which under ``durability="async"`` may still be on its way."""
        return self._commits.checkpoint_id

    def others_had_a_turn(self) -> bool:
        """Whether this run has waited for a commit since the last call of this, so that other tasks could go on."""
        return self._commits.take_waited()

    def take_up(self, restored: Restored) -> None:
        """Go on after a restored checkpoint."""
        self._commits.checkpoint_id = restored.checkpoint_id
        self._journaled.update(restored.journal)
        self._journal_spent = {step: spent for step, spent in restored.journal.items() if spent is not NOTHING}
        self._journal_counted = restored.journal_counted
        self._unpriced = restored.unpriced
        self._rewound = restored.rewinds
        self._saved_step = int(restored.body.get("step_number") or 0)
        if restored.rewinds:
            self._records.append({"kind": "rewind", "to": restored.checkpoint_sequence})

    # --- what comes from outside --------------------------------------------------------------------------------

    @property
    def cancel_requested(self) -> asyncio.Event:
        """Set, within about a second, once ``CheckpointManager.cancel`` asked this owner of the run to stop.

        An executor drives its run inside ``stoppable`` and need not look; its loop may, to stop also when a node
        swallowed the cancellation: ``if session.cancel_requested.is_set(): raise asyncio.CancelledError``.
        """
        return self._inbox.cancel_requested

    def stoppable(self) -> AbstractContextManager[None]:
        """A block of the current task that a request to cancel the run stops, as ``asyncio.timeout`` does at its time.

        What the block waits for is cancelled; a commit under way is finished first. Leaving the block raises
        ``run_messages.CancelRequested`` then, and the task is not cancelled: only the run is. A cancellation of the
        task itself passes through as ``asyncio.CancelledError``. Whoever catches ``CancelRequested`` records the ending
        with ``end(RunState.CANCELLED, CANCELLED_ON_REQUEST, ...)``, unless ``ended_as`` says it ended before.
        """
        return self._inbox.stoppable()

    def on_message(self, listener: Callable[[Message], None]) -> Callable[[], None]:
        """Tell ``listener`` of each message left for the run (``Storage.send``) once, within about a second.

        Those from before the run was opened, too. It is called in the event loop's thread and must not block; one that
        raises is logged. Call the result to stop it.
        """
        return self._inbox.on_message(listener)

    async def messages(self) -> list[Message]:
        """All messages left for the run until now, in their order. Raises ``StorageError``."""
        run_id = self.run_id
        return public(await wait_for(self._committer.call(lambda storage: storage.read_messages(run_id))))

    def _lose(self, error: RunError) -> None:
        """The lease is another's, as the heartbeat found out: what is in flight here is worth nothing any more."""
        if not self._ended and not self._commits.ending and self._commits.ended is None:
            self._lost = error
            if isinstance(error, LeaseLost):  # of a run that was deleted the next commit tells
                self._inbox.stop(error)

    def stop_at_commit(self) -> None:
        """Have the run let go (``cancelling.LET_GO``) as soon as its next step, or failed attempt, is committed.

        From any thread. What is in flight beside that is cut, and runs again in the next process.
        """
        self._inbox.call(self._ask_to_stop)

    def _ask_to_stop(self) -> None:
        self._stopping = True

    async def _may_go_on(self) -> None:
        """Return when another step may begin: while the lease is certain, and nobody asked to stop.

        Raises ``LeaseLost``. A store that cannot be reached makes the run wait here once its lease may have ended: then
        another process may have the run, and whatever a further step did would be done twice.
        """
        if self._stopping and self._inbox.let_go():
            await asyncio.get_running_loop().create_future()
        beat, told = self._committer.heartbeat, False
        while not self._ended and not beat.is_assured(self.run_id, self._token):
            if self._lost is not None or self._stopping:
                break
            if not told:
                told = True
                self._on_problem("The lease may have ended, as it could not be renewed: no step begins until it is.")
            await asyncio.sleep(min(_ASSURED_LOOK_SECONDS, self._config.lease_seconds / 10))
        if self._lost is not None:
            raise self._lost

    # --- the journal --------------------------------------------------------------------------------------------

    @property
    def config(self) -> CheckpointConfig:
        """How the run is checkpointed."""
        return self._config

    @property
    def stops_on_error(self) -> bool:
        """Whether a refused commit, or journal row, ends the run."""
        return self._config.on_commit_error == "stop"

    def has_journal(self, step: str) -> bool:
        """Whether the store has journal rows of the step, by its key."""
        return step in self._journaled

    def write_journal(self, rows: Sequence[JournalRow], *, progress: bool = False) -> Future[None]:
        """Hand journal rows over, in order with the commits; done when they are durable, whatever ``durability``.

        ``progress`` says that the run got further, so what it was recovered before does not count any more.
        """
        self._journaled.update(row.step for row in rows)
        progress = progress and self.recovery_attempts > 0  # else there is nothing to take back
        return self._committer.journal(JournalWrite(self.run_id, self._token, rows, progress))

    def read_journal(self, step: str) -> Future[list[JournalRow]]:
        """A step's journal rows; damaged ones are reported as problems, and have an empty record."""
        run_id, damage = self.run_id, self._on_problem
        told: list[Damage] = []

        def read(storage: Storage) -> list[JournalRow]:
            rows = storage.read_journal(run_id, step, told.append)
            for item in told:
                damage(f"{item.where} of run {run_id!r} is damaged, so a call may be made again: {item.problem}")
            return [*rows, *(JournalRow(step, item.number or 0, b"") for item in told)]

        return self._committer.call(read)

    def read_messages(self) -> Future[list[Message]]:
        """As ``messages``, for whoever waits in another way."""
        run_id = self.run_id
        return self._committer.call(lambda storage: public(storage.read_messages(run_id)))

    def leave_message(self, name: str, body: bytes) -> Future[None]:
        """Leave the run a message itself, so that nobody else can under this name; see ``Storage.send``."""
        run_id = self.run_id
        return self._committer.call(lambda storage: storage.send(run_id, name, body))

    @property
    def has_uncommitted(self) -> bool:
        """Whether steps are finished that no durable commit, or none on its way, has taken up."""
        return self._commits.lost_track or any(kept["kind"] == "step" for kept in self._records)

    @property
    def rewound(self) -> bool:
        """Whether the run goes on from a state that is older than the newest commit: steps after it run again."""
        return self._rewound

    @property
    def journal_counted(self) -> Mapping[str, int]:
        """Up to which number of a call the run's records count what calls took, by step; of those found on a resume."""
        return self._journal_counted

    @property
    def unpriced(self) -> str | None:
        """A model that processes before have asked in the run and whose price was not known."""
        return self._unpriced

    @property
    def journal_spent(self) -> dict[str, Spent]:
        """What questions to models took that are in the journals found on a resume, by step."""
        return self._journal_spent

    # --- what a step leaves behind ------------------------------------------------------------------------------

    async def note(
        self,
        record: Mapping[str, Any],
        events: Sequence[Mapping[str, Any]],
        progress: Progress,
        scopes: Mapping[str, SharedMemory],
        *,
        state: RunState | None = None,
        wake_at: float | None = None,
    ) -> None:
        """Commit something that is no step: the input a resume brought, or a wait for an answer (``state`` paused).

        ``wake_at`` is when a paused run is due, in seconds since the epoch.
        """
        self._scopes.update(scopes)
        self._records.append(record)
        self._events.extend(events)
        self._put(progress, state=state, wake_at=wake_at)
        await self._settle(state)

    async def attempt_failed(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Record a failed attempt that will be retried, so that a restart continues its budget."""
        self.keep_attempt(record, events)
        # Not ahead of finished steps that still wait for their checkpoint: the log would tell of them without it.
        waiting = any(kept["kind"] == "step" for kept in self._records)
        if self._config.durability != "exit" and not waiting:
            self._put(None)
            await self._settle()
        await self._may_go_on()

    def keep_attempt(self, record: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Keep a failed attempt for the next commit: the last one, which the run's ending follows."""
        self._records.append({"kind": "attempt", **record})
        self._events.extend(events)

    def check(self, scopes: Mapping[str, SharedMemory]) -> None:
        """Raise ``UnstorableValue`` when these memories hold what cannot be stored.

        A ``step_done`` that follows at once, with the same memories unchanged, does not encode them again.
        """
        self._checked = None
        self._checked = (dict(scopes), self._tracker.stage(scopes))

    @property
    def held_back(self) -> bool:
        """Whether so much waits for the store, over all runs of this process, that no further commit is to be made."""
        return self._committer.back_pressure.full

    async def room(self) -> None:
        """Return once a commit may be made: for a step that is over and not encoded yet.

        A cancellation lets it go on at once, and is raised where the step waits next: its commit is not left out.
        """
        try:
            await self._committer.back_pressure.room()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()  # counted once, for whoever cancelled it
            task.cancel(*error.args)

    async def step_done(
        self,
        record: Mapping[str, Any],
        events: Sequence[Mapping[str, Any]],
        progress: Progress,
        scopes: Mapping[str, SharedMemory],
        over: Iterable[str] = (),
        *,
        quiet: bool = True,
        state: RunState | None = None,
        journal: str | None = None,
        wake_at: float | None = None,
    ) -> None:
        """Commit a finished step, or keep it for the next commit when none is due.

        ``scopes`` are the memories the step changed, by branch; branches in ``over`` are gone. ``quiet`` says that no
        other step is in flight. A ``state`` (completed, paused) ends the session with this commit. What is committed
        is fixed before the first ``await``, so concurrent steps commit in the order they call this. ``journal`` is the
        step's key in the journal: its rows go with the commit that takes the step up. ``wake_at`` is when a run that
        this pauses is due.
        Raises ``StorageError`` or ``LeaseLost`` when a commit was refused; under ``on_commit_error="continue"``
        only ``LeaseLost``.
        """
        checked, self._checked = self._checked, None
        self._scopes.update(scopes)
        for branch in over:
            self._scopes.pop(branch, None)
            self._over.add(branch)
        self._records.append({"kind": "step", **record})
        self._events.extend(events)
        if journal in self._journaled and not self._config.keep_journal:
            self._journal_done.append(journal)
        if state is not None or self._commits_now(quiet, progress):
            _faults.reach("commit.before")
            self._put(progress, state=state, checked=checked, wake_at=wake_at, alone=quiet)
            await self._settle(state)
            _faults.reach("commit.after")
        if state is None:
            await self._may_go_on()

    async def end(
        self,
        state: RunState,
        error: str | None,
        events: Sequence[Mapping[str, Any]],
        progress: Progress,
        scopes: Mapping[str, SharedMemory],
        over: Iterable[str] = (),
        *,
        wake_at: float | None = None,
    ) -> None:
        """Record that the run ended without a last step (failed, cancelled, nothing left to do) and give it up.

        ``progress`` and ``scopes`` are committed with it when finished steps still wait for a commit. When the run's
        last step has ended it already, that stands: see ``ended_as``.
        """
        if self._commits.ending:
            # The last step's commit was interrupted while it was under way: how that ended is how the run ended.
            await self._settle(state)
            if self._ended:
                return
        waiting = self._commits.lost_track or any(record["kind"] == "step" for record in self._records)
        self._records.append({"kind": "end", "state": state.value, **({"error": error} if error else {})})
        self._events.extend(events)
        if waiting or state is RunState.COMPLETED:
            self._scopes.update(scopes)
            self._over |= set(over)
            self._put(progress, state=state, error=error, wake_at=wake_at)
        else:
            self._put(None, state=state, error=error, wake_at=wake_at)
        for attempt in range(_LAST_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_LAST_DELAY_SECONDS * 2 ** (attempt - 1))
            await self._settle(state)
            if self._ended:
                return
        self._on_problem(
            f"The end of the run could not be recorded in {_LAST_ATTEMPTS} attempts. The store has it as crashed: when "
            "it is resumed, the steps after its last checkpoint run again."
        )

    async def leave(self, progress: Progress, scopes: Mapping[str, SharedMemory], over: Iterable[str] = ()) -> None:
        """Give the run up without an end, for the next process to go on with: see ``cancelling.LET_GO``.

        Finished steps that still wait for their commit get it. The log says that the run was let go, so that this is
        not taken for a crash. When the run's last step has ended it already, that stands. Raises ``StorageError``,
        ``LeaseLost``; the run is given up all the same.
        """
        try:
            if self._commits.ending:
                await self._settle(RunState.CANCELLED)  # waits, as for any end: which one is in that commit
            if not self._ended:
                waiting = self._commits.lost_track or any(record["kind"] == "step" for record in self._records)
                self._records.append({"kind": LEFT})
                if waiting:
                    self._scopes.update(scopes)
                    self._over |= set(over)
                self._put(progress if waiting else None)
                await self._commits.settle(wait=True)
        finally:
            await self.abandon()

    @property
    def ended_as(self) -> RunState | None:
        """The state of the durable commit that ended the run here; ``None`` before, and when it was only abandoned."""
        return self._commits.ended

    @property
    def ended(self) -> bool:
        """Whether the run has been given up, by its last commit or by ``abandon``."""
        return self._ended

    async def abandon(self) -> None:
        """Stop holding the run, whatever happened; harmless after its end. What is committed stays."""
        if not self._ended:
            released = self.let_go()
            if released is not None:
                await wait_for(released)

    def let_go(self) -> Future[None] | None:
        """``abandon`` for a coroutine that is being closed, where nothing can be waited for."""
        self._close()
        token, run_id = self._token, self.run_id
        try:
            return self._committer.call(lambda storage: _release_quietly(storage, run_id, token))
        except StorageError as error:  # the store itself is gone, as when the program ends
            logger.warning("The lease of run %r was not released; it expires by itself: %s", run_id, error)
            return None

    def _close(self) -> None:
        self._ended = True
        self._committer.heartbeat.drop(self.run_id, self._token)
        stopping.discard(self)
        retire(self._owner)

    # --- commits ------------------------------------------------------------------------------------------------

    def _commits_now(self, quiet: bool, progress: Progress) -> bool:
        if self._config.durability == "exit":
            return False
        # A commit that also takes up earlier steps must find every branch at rest.
        return self._config.save_frequency == "every_node" or (quiet and self._is_due(progress))

    def _is_due(self, progress: Progress) -> bool:
        """Whether a multiple of ``n_nodes`` was reached since the last checkpoint, maybe before this quiet moment."""
        steps = range(self._saved_step + 1, progress.step_number + 1)
        return any(is_due(self._config, step) for step in steps[-self._config.n_nodes :])

    def _put(
        self,
        progress: Progress | None,
        *,
        state: RunState | None = None,
        error: str | None = None,
        checked: tuple[Mapping[str, SharedMemory], Staged] | None = None,
        wake_at: float | None = None,
        alone: bool = False,
    ) -> None:
        """Make one commit of everything collected. ``alone``: the run does nothing else meanwhile."""
        commit = Pending(self._records, self._events, progress=progress, state=state, error=error, wake_at=wake_at)
        if state is RunState.COMPLETED and self._journaled and not self._config.keep_journal:
            # With what is left of steps that a resume did not come to again.
            self._journal_done = sorted(self._journaled)
        if self._journal_done and progress is not None:
            commit.journal_done, self._journal_done = self._journal_done, []
            self._journaled.difference_update(commit.journal_done)
        if progress is not None:
            if checked is not None and checked[0] == self._scopes and not self._over:
                staged = checked[1]
            else:
                staged = self._tracker.stage(self._scopes, self._over)
            commit.chunks, commit.digest = staged.chunks, staged.digest
            self._tracker.accept(staged)
            self._scopes, self._over = {}, set()
            self._saved_step = progress.step_number
        self._records, self._events = [], []
        self._commits.put(commit, alone=alone and self._config.durability != "async")

    async def _settle(self, state: RunState | None = None) -> None:
        """Wait for what was made as the durability asks; always when a ``state`` ends the run."""
        await self._commits.settle(wait=self._config.durability != "async" or state is not None)
        if self._commits.ended is None or self._ended:
            return
        self._close()
        if self._commits.ended is RunState.COMPLETED and self._config.on_success == "delete":
            run_id = self.run_id
            try:
                await wait_for(self._committer.call(lambda storage: storage.delete_run(run_id)))
            except SurefootError as error:
                # The run is completed, and durably so: it only takes up room.
                self._on_problem(f"The completed run was not removed from the store: {error}")


def _release_quietly(storage: Storage, run_id: str, token: int) -> None:
    try:
        storage.release_lease(run_id, token)
    except StorageError as error:
        logger.warning("The lease of run %r was not released; it expires by itself: %s", run_id, error)
