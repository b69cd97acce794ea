"""``CheckpointManager``: when checkpoints are saved, which are kept, and how a run is found again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from framework.errors import SurefootError
from framework.graph.cancelling import cancel_run
from framework.graph.checkpoint_rules import checkpoint_id as new_checkpoint_id
from framework.graph.checkpoint_rules import is_due, retention_of
from framework.graph.forking import fork_run
from framework.graph.journal_answers import read_calls, send_value, settle_call
from framework.graph.journal_rows import CallRecord
from framework.graph.memory import SharedMemory
from framework.graph.run_opening import Definition
from framework.graph.run_session import Opened, open_session
from framework.graph.runtime_port import new_run_id as make_run_id
from framework.schemas.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointMetadata,
    ExecutorType,
)
from framework.storage.backend import Storage
from framework.storage.records import RunRecord

if TYPE_CHECKING:
    from framework.graph.recovery import Recovered

T = TypeVar("T")

logger = logging.getLogger(__name__)

NOT_GIVEN: Any = object()
"""Stands for a value that was not given where ``None`` is a value."""


class CheckpointManager:
    """Saves and restores checkpoints in ``storage``. Holds nothing of any run: any number may share a store.

    Give one to an executor to make its runs durable. The methods here serve callers who manage checkpoints
    themselves; they block, so call them from a thread in asynchronous code. But for ``cancel``, ``fork``, ``send``,
    ``settle`` and ``journal`` they never raise for what the store does: a failure is logged and answered with ``None``
    or nothing, and the earlier checkpoints stay as they were.
    """

    def __init__(self, storage: Storage, config: CheckpointConfig | None = None) -> None:
        self.storage = storage
        self.config = config if config is not None else CheckpointConfig()

    def save_checkpoint(
        self,
        run_id: str,
        node_id: str,
        memory: SharedMemory,
        executor_type: ExecutorType = ExecutorType.GRAPH,
        metadata: dict[str, Any] | None = None,
    ) -> str | None:
        """Save the state as it is now and apply retention. Returns the checkpoint's id; it is durable then.

        ``metadata`` may hold next_node_id, execution_path, step_number, total_tokens, total_latency_ms, context,
        status. Returns ``None`` when checkpointing is disabled, or when saving failed (logged).
        """
        if not self.config.enabled:
            return None
        given = dict(metadata or {})
        names = "next_node_id execution_path step_number total_tokens total_latency_ms context status".split()
        is_graph = executor_type == ExecutorType.GRAPH
        try:
            checkpoint = Checkpoint(
                id=new_checkpoint_id(run_id, node_id),
                run_id=run_id,
                executor_type=executor_type,
                created_at=datetime.now(),
                current_node_id=node_id if is_graph else None,
                current_step_id=None if is_graph else node_id,
                memory_snapshot=memory.read_all(),
                **{name: given[name] for name in names if given.get(name) is not None},
            )
            self.storage.save_checkpoint(checkpoint)
        except (SurefootError, ValueError, PermissionError) as error:
            logger.error("No checkpoint saved for run %r after %r: %s", run_id, node_id, error)
            return None
        try:
            self.storage.prune(run_id, retention_of(self.config))
        except SurefootError as error:
            logger.warning("Old checkpoints of run %r not pruned: %s", run_id, error)
        return checkpoint.id

    def restore_from_checkpoint(
        self, run_id: str, checkpoint_id: str | None = None
    ) -> tuple[dict[str, Any], str] | tuple[None, None]:
        """State and node to go on with, from one checkpoint or the newest readable one.

        The node is the recorded next one, else the checkpoint's own. ``(None, None)`` when disabled, when
        ``auto_recovery`` is off, when there is none, or when it cannot be read (logged).
        """
        if not self.config.enabled or not self.config.auto_recovery:
            return None, None
        checkpoint = self.get_checkpoint(run_id, checkpoint_id)
        if checkpoint is None:
            return None, None
        return dict(checkpoint.memory_snapshot), checkpoint.next_node_id or checkpoint.node_id

    def get_checkpoint(self, run_id: str, checkpoint_id: str | None = None) -> Checkpoint | None:
        """One checkpoint with its state, or the newest readable one; ``None`` when there is none (errors logged)."""
        try:
            if checkpoint_id is not None:
                return self.storage.load_checkpoint(run_id, checkpoint_id)
            return self.storage.load_latest_checkpoint(run_id)
        except SurefootError as error:
            logger.error("Checkpoint of run %r not loaded: %s", run_id, error)
            return None

    def list_checkpoints(self, run_id: str) -> list[CheckpointMetadata]:
        """The run's retained checkpoints, oldest first; empty when it has none or on an error (logged)."""
        try:
            return self.storage.list_checkpoints(run_id)
        except SurefootError as error:
            logger.error("Checkpoints of run %r not listed: %s", run_id, error)
            return []

    def delete_checkpoints(self, run_id: str) -> int:
        """Remove the run's checkpoints; how many. 0 when it has none or on an error (logged)."""
        try:
            return self.storage.delete_checkpoints(run_id)
        except SurefootError as error:
            logger.error("Checkpoints of run %r not deleted: %s", run_id, error)
            return 0

    def should_checkpoint(self, step_number: int) -> bool:
        """Whether a checkpoint is due after step ``step_number``, counted from 1."""
        return is_due(self.config, step_number)

    def fork(
        self,
        run_id: str,
        at: int | str | None = None,
        changes: Mapping[str, Any] | None = None,
        new_run_id: str | None = None,
    ) -> str:
        """Make a new run from a checkpoint of any run, running ones too; its id. The run is durable, and paused.

        ``at`` is the checkpoint's sequence or id, ``None`` the newest readable one. ``changes`` are values to set in
        the run's own state (a value may be ``None``); branches of a fan-out keep theirs. ``new_run_id`` is chosen when
        it is not given. The new run has its own copy of the state, of the path and totals so far, and of the input and
        metadata; where it comes from is in its header under "forked_from". Resume it as any paused run: it does what
        comes next there, or answers the pause it stands at; attempts that failed after that checkpoint are not its own.
        The original is not touched, and may be pruned or deleted.

        Raises ``RunNotFound``, ``CheckpointNotFound`` (says which are kept), ``RunExists``, ``InvalidId``,
        ``UnstorableValue`` (a change that cannot be stored, or to a name that no state has), ``CorruptData`` (damage is
        never copied), ``StorageError``.
        """
        return fork_run(self.storage, run_id, at, changes, new_run_id, make_run_id)

    def cancel(self, run_id: str) -> bool:
        """Cancel a run of a graph or a plan, whichever process runs it.

        ``True``: it is cancelled now, durably, as when nobody ran it. ``False``: its owner is alive and was asked to
        stop, durably; within about a second it ends its step in flight after the commit under way, records the run as
        cancelled and returns a failed result. Asking again is harmless. What is committed stays, and a cancelled run
        can be resumed. Raises ``RunNotFound``, ``ResumeError`` for a completed run, ``StorageError``.
        """
        return cancel_run(self.storage, run_id, self.config.lease_seconds)

    def send(self, run_id: str, name: str, value: Any, *, occurrence: int | None = None) -> None:
        """Give a run the value that a node of it waits for; durable on return. The run is resumed by its next call.

        ``name`` is that of ``ctx.wait_for(name)`` or the id of a question of ``ctx.ask`` (see ``journal``). One value
        counts for one wait, the first. A signal goes to the first wait for it that is open, or, before the run's first
        wait for it, is kept for that. ``occurrence`` says which of the run's waits for the signal is meant, from 1,
        begun or yet to come. To the run of a plan: it is for the one of its sub-graphs that waits for it. Raises
        ``MessageRefused`` for a second value, one that comes too late (the wait timed out, or its step is done), one
        that does not fit the question's schema, and when the run is completed or asks no such question;
        ``RunNotFound``, ``UnstorableValue``, ``InvalidId``, ``StorageError``, ``ValueError``.
        """
        send_value(self.storage, run_id, name, value, occurrence)

    def settle(
        self, run_id: str, call_id: str, *, done: Any = NOT_GIVEN, redo: bool = False, skip: bool = False
    ) -> None:
        """Say what became of a call whose effect is unknown after a crash; durable on return. Then resume the run.

        ``call_id`` is that of ``journal``. ``done`` is what the call is answered, of a tool its text; ``redo`` makes it
        again, with the same idempotency key; ``skip`` answers ``None`` (a tool's model is told that it was not made)
        without making it. Of a plan's run it may be a call of a sub-graph that the plan waits with. Raises
        ``ValueError`` unless exactly one is given, ``MessageRefused`` for a call that is not unknown, is settled
        already or belongs to a run that is running or completed; ``RunNotFound``, ``StorageError``.
        """
        given = [name for name, each in (("done", done is not NOT_GIVEN), ("redo", redo), ("skip", skip)) if each]
        if len(given) != 1:
            raise ValueError("settle: give exactly one of done=<the call's value>, redo=True and skip=True.")
        settle_call(self.storage, run_id, call_id, given[0], done if done is not NOT_GIVEN else None)

    def journal(self, run_id: str) -> list[CallRecord]:
        """The calls inside the run's unfinished steps as they are recorded, by step and number.

        Of finished steps only with ``CheckpointConfig.keep_journal``. Raises ``RunNotFound``, ``StorageError``,
        ``UnknownType``.
        """
        return read_calls(self.storage, run_id)

    def recoverable(self, *, failed: bool = False, limit: int | None = None) -> list[RunRecord]:
        """Runs that could go on though nobody works on them; at most ``limit``.

        Crashed ones, oldest first, then paused ones whose time has come or that were sent what they wait for, then,
        with ``failed``, failed ones.
        Of any kind of executor; ``RunRecord.executor_type`` and ``header`` tell. Claims nothing. Parts of other runs,
        and runs that were given up after crashing too often, are none. Raises ``StorageError``.
        """
        from framework.graph.recovery import recoverable_runs  # noqa: PLC0415 - few programs need it

        return recoverable_runs(self.storage, failed=failed)[:limit]

    async def recover(
        self,
        resume: Callable[[RunRecord], Awaitable[T]],
        *,
        failed: bool = False,
        limit: int | None = None,
        concurrency: int = 1,
    ) -> list[Recovered[T]]:
        """Have ``resume`` take up every run of ``recoverable``, at most ``concurrency`` at once; what came of each.

        ``resume`` executes the run by its id, as ``lambda run: executor.execute(graph, goal, run_id=run.run_id)``,
        and claims it with that: of many processes that recover at once, one wins each run, and the others list it as
        "busy". A run that was asked to stop before its process ended is cancelled instead. An error of this library
        is the outcome "failed"; any other passes through. Raises ``StorageError`` when the runs cannot be listed.
        For a worker that does this for ever see ``framework.runner.recovery.Worker``.
        """
        from framework.graph.recovery import recover_runs  # noqa: PLC0415 - few programs need it

        runs = await asyncio.to_thread(self.recoverable, failed=failed, limit=limit)
        lease = self.config.lease_seconds
        return await recover_runs(self.storage, runs, resume, concurrency=concurrency, lease_seconds=lease)

    async def open_session(
        self,
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
        """Start, take over or look up a run for an executor: see ``run_session.open_session``."""
        return await open_session(
            self.storage,
            self.config,
            definition,
            run_id,
            initial=initial,
            input_data=input_data,
            header=header,
            on_problem=on_problem,
            scopes=scopes,
            parent_run_id=parent_run_id,
            metadata=metadata,
        )
