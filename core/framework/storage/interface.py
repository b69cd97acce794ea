"""The storage interface: what a backend must do. ``framework.testing.check_storage`` tests any implementation.

Storage is synchronous; executors hand their calls to one thread (``committer``). A backend implements the abstract
methods, which move opaque bytes; what the bytes mean (checkpoints, values) is added once, here, for all backends.

Requirements every backend meets:

1. ``commit`` is all or nothing for each commit and journal write, durable on return, and refuses a stale fencing token
   (``LeaseLost``), a sequence that is not the next (``CommitConflict``) and a run it does not know (``RunNotFound``).
2. ``open_run``, ``claim_run`` and ``fork_run`` are atomic: of any number of callers, in any number of processes, one
   wins.
3. Ids and keys are any text without NUL and lone surrogates, not empty, at most 1,000 characters (run ids 255);
   they never name anything outside the store. Others raise ``InvalidId``.
4. Bytes that do not match their checksum raise ``CorruptData`` when read by name, and never hide other rows.
5. At most one message is ever left under one name of a run, whoever sends at once; it stays as long as the run.
6. Driver errors surface as ``StorageError`` with what to do about them.
7. One value (a record, a chunk, a message ...) has at most ``MAX_VALUE_BYTES`` bytes; a larger one raises
   ``ValueTooLarge`` before anything is written.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

from framework.errors import CorruptData, LeaseLost, RunError, RunNotFound, StorageError
from framework.schemas.checkpoint import Checkpoint, CheckpointMetadata
from framework.schemas.run import Run, RunState, RunStatus, RunSummary
from framework.storage import checkpoints as stored
from framework.storage.checks import MAX_KEY, MAX_RUN_ID, MAX_VALUE_BYTES, check_id, check_index_key
from framework.storage.chunks import Chunk
from framework.storage.records import (
    NO_TOKEN,
    CheckpointRow,
    Commit,
    Content,
    Damage,
    JournalRow,
    LogRow,
    Message,
    NewRun,
    Place,
    Retention,
    RunRecord,
    Stray,
    VerifyReport,
    Write,
)
from framework.storage.retention_interface import KeepsRuns

__all__ = ["MAX_KEY", "MAX_RUN_ID", "MAX_VALUE_BYTES", "IsAlive", "Storage", "check_id", "check_index_key"]

logger = logging.getLogger(__name__)

IsAlive = Callable[[str], bool | None]
"""Says of a lease's owner: alive (True), certainly gone (False), or cannot tell from here (None)."""

Rewrite = Callable[[Place, bytes], bytes]
"""Gives the bytes to store for the copy of a content, from its place in the run it is copied from and its bytes."""


class WouldWait(Exception):
    """Raised by a commit of a store that is held by ``try_hold``, when it would have to wait; it left no trace."""


class Storage(KeepsRuns, ABC):
    """A store of runs, their checkpoints and their state. Thread-safe; also a context manager that closes itself."""

    closed: bool = False
    """Whether ``close`` was called. Set by the backend."""

    compression: Literal["zstd"] | None = None
    """How large chunks are compressed before the store is given them (see ``compression``); ``None``: not at all.

    A store that was written with it is read by any, whatever this says. A store that wraps another shows that one's.
    """

    # --- runs and their ownership -------------------------------------------------------------------------------

    @abstractmethod
    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        """Accept a run; for an ``owner``, take its lease. Durable on return. Raises ``RunExists``, ``InvalidId``."""

    @abstractmethod
    def find_run(self, run_id: str) -> RunRecord | None:
        """The run as recorded, or ``None``. A running run whose lease has expired is ``crashed``."""

    @abstractmethod
    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        """Take over a run's lease and set its state to running; durable on return.

        Succeeds when nobody holds the lease, it has expired, or ``is_alive(holder)`` is ``False``. The token grows by
        one; ``recovery_attempts`` are as ``records.attempts_after_claim`` says: one more when the owner had vanished,
        the same when it had given the lease up, 0 when the run was not crashed. A completed run is
        returned as it is, unclaimed. The returned ``state`` and ``error`` are those found: ``crashed``, ``failed``,
        ``paused`` ... The error stays recorded until a commit with a state replaces it, so a claim whose owner ends
        before its first commit loses nothing. With ``sequence``, the last commit that the caller knows of, a run that
        has another one is left as it is: ``CommitConflict``. ``wake_at`` is
        cleared. Raises ``RunNotFound``, ``RunBusy``.
        """

    @abstractmethod
    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        """Extend the lease from now. Raises ``LeaseLost`` when ``token`` is not the run's, ``RunNotFound``."""

    def renew_leases(
        self, leases: Sequence[tuple[str, int]], lease_seconds: float
    ) -> Sequence[RunError | StorageError | None]:
        """Extend leases, each a run's id and token, as ``renew_lease`` does; for each ``None`` or what it raises.

        A backend that can does it in one transaction: a process may hold a thousand. Raises ``StorageError`` when the
        store as a whole fails; then some may have been renewed. As an outcome it is of one run that another process
        holds up for now, and that the others did not wait for: the lease is as it was, and worth another try.
        """
        outcomes: list[RunError | StorageError | None] = []
        for run_id, token in leases:
            try:
                self.renew_lease(run_id, token, lease_seconds)
            except (LeaseLost, RunNotFound) as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
        return outcomes

    @abstractmethod
    def release_lease(self, run_id: str, token: int) -> None:
        """Give the lease up; nothing else changes. A token that is not the run's changes nothing."""

    @abstractmethod
    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        """At most ``limit`` runs, newest first (by creation, then id); ``before`` continues after that run.

        ``states`` filters on the state as ``find_run`` shows it, ``crashed`` included.
        """

    @abstractmethod
    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        """At most ``limit`` runs whose id begins with ``prefix``, by id, so an id that is equal comes first.

        ``""`` is every id's beginning. Raises ``InvalidId``.
        """

    @abstractmethod
    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        """At most ``limit`` paused runs whose ``wake_at`` is ``now`` or before, the longest due first (then by id).

        ``now`` is in seconds since the epoch, ``None`` for the store's clock. ``after`` continues after that run, as it
        was listed, whatever has become of it since. Fewer than ``limit`` means that there are no more. Cheap enough to
        ask every second, and each page costs what it has, not what was before it.
        """

    @abstractmethod
    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        """Remove everything of the run: record, commits, chunks, journal, messages, ``Run`` document; whether any was.

        Raises ``RunBusy`` while somebody holds its lease, ``RunPinned`` when it or a checkpoint of it is pinned; with
        ``force`` the pins go, too.
        """

    # --- messages -----------------------------------------------------------------------------------------------

    @abstractmethod
    def send(self, run_id: str, name: str, body: bytes) -> None:
        """Leave a message for a run, whoever holds it; durable on return. It stays until the run is deleted.

        Raises ``MessageRefused`` when one of this name was left before, or when the run is completed; ``RunNotFound``,
        ``InvalidId``.
        """

    @abstractmethod
    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        """A run's messages in the order they were left; damaged ones go to ``on_damage`` and are left out."""

    @abstractmethod
    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        """How many messages each of these runs has, damaged ones too; runs without any are left out.

        Cheap enough to ask every second for all runs of a process: as messages stay, a new one makes the number grow.
        """

    @abstractmethod
    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        """At most ``limit`` paused runs that have a message, damaged ones too, by id; those with ids above ``after``.

        Fewer than ``limit`` means that there are no more; else go on after the last one's id. What it costs follows
        the runs that have messages, not all that are paused. Raises ``InvalidId``.
        """

    # --- forks --------------------------------------------------------------------------------------------------

    @abstractmethod
    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        """Make the run ``first.run_id`` from the checkpoint at ``sequence`` of the run ``run_id``, all or nothing.

        The new run has the kind, goal and definition of the other; ``header`` as its own; the other's log and this one
        checkpoint up to ``sequence``, and its initial state and state there; and then the commit ``first``, with
        ``sequence`` plus one, no token and a state. Nobody holds it. The chunks are its own: nothing that happens to
        the other run later changes it, and the other is not touched. Messages, journal and ``Run`` document stay
        behind.
        Each content that is copied (records, logs, the checkpoint, chunks) passes through ``rewrite`` when given; what
        that raises is raised, and there is no new run.
        Whoever holds the other run may go on committing. Everything taken over is checked: raises ``CorruptData``
        rather than copy what is damaged, ``CheckpointNotFound``, ``RunNotFound``, ``RunExists``, ``InvalidId``, and
        what ``commit`` gives as the error for ``first``.
        """

    # --- commits ------------------------------------------------------------------------------------------------

    @abstractmethod
    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        """Make commits and journal writes durable, in order and, where the backend can, in one transaction with one
        sync; for each ``None`` or the error that refused it.

        An error of one never touches another. What an error refused left no trace. Raises ``StorageError`` when the
        store as a whole fails (closed, disk full): then nothing of all of them was written, unless it says that this is
        not known, as where a database over a network went away between a request and its answer. ``find_run`` and
        ``read_log`` tell it once they can be asked; to make the same commit again is safe, because a sequence is given
        once. Where a backend tries by itself again, a commit is made once and never refused for
        its own earlier try.
        """

    def try_hold(self) -> bool:
        """Take the store for this thread, for commits that wait for nobody; whether that was possible without waiting.

        Until ``let_go`` a commit that would have to wait for a lock raises ``WouldWait`` instead, and the disk is all
        that it waits for: so an event loop may make it itself. A backend that cannot promise this answers ``False``,
        as this method does, and all its commits are made in a thread.
        """
        return False

    def let_go(self) -> None:
        """The end of what ``try_hold`` began, in the same thread."""
        raise NotImplementedError(f"{type(self).__name__} has try_hold() and lacks let_go().")

    @abstractmethod
    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        """A run's journal rows, of one ``step`` or all, by step and number; damaged ones are left out.

        Each damaged row goes to ``on_damage`` with the key that it says it has. With a ``step``, a row whose own step
        was damaged may not be found to be this one's; without, every damaged row of the run is told. Rows stay until a
        commit names their step in ``journal_done``, or the run's checkpoints go.
        """

    @abstractmethod
    def definition(self, fingerprint: str) -> bytes | None:
        """The JSON of a definition as given to ``open_run``, or ``None``."""

    @abstractmethod
    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        """The commits with a sequence above ``after``, in order; damaged ones go to ``on_damage`` and are left out."""

    @abstractmethod
    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        """Retained checkpoints, newest first, at most ``limit``; damaged ones go to ``on_damage`` and are left out."""

    @abstractmethod
    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        """One retained checkpoint by id, or ``None``. Raises ``CorruptData``."""

    @abstractmethod
    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        """The chunks that make the state at ``sequence``: of each key the last ``set`` at or before it and the appends
        that follow, in order; nothing of a deleted key. ``sequence`` 0 is the initial state. Raises ``CorruptData``."""

    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        """What ``read_chunks`` gives, each with the sequence of its own commit. Raises ``CorruptData``."""
        raise StorageError(f"{type(self).__name__} does not tell where its chunks are, so it cannot be encrypted.")

    @abstractmethod
    def prune(self, run_id: str, retention: Retention) -> int:
        """Apply ``retention`` now; how many checkpoints went. The newest and pinned ones are never removed."""

    @abstractmethod
    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        """Forget the checkpoints and chunks after ``sequence``, because they are damaged; how many checkpoints.

        The log stays, and the next commit still follows the last one. So does the journal: its rows belong to steps
        that run again. Pins of what goes go, too. Durable on return. Raises ``LeaseLost``, ``RunNotFound``, and
        ``RunPinned`` for a pinned checkpoint after ``sequence`` that can be read: what comes next would overwrite it.
        """

    @abstractmethod
    def delete_checkpoints(self, run_id: str, *, force: bool = False) -> int:
        """Remove the run's checkpoints, state log and journal; how many checkpoints. Its record and log stay.

        Raises ``RunBusy`` while somebody holds the lease, ``RunPinned`` when the run or a checkpoint of it is pinned;
        with ``force`` pins of checkpoints go, too.
        """

    @abstractmethod
    def verify(self, run_id: str | None = None) -> VerifyReport:
        """Read one run or everything, from end to end, and report what is damaged. Changes nothing."""

    # --- run documents (decisions and problems, written by the runtime) ------------------------------------------

    @abstractmethod
    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        """Store a ``Run`` document, replacing an earlier one of the same id. Durable on return.

        With a ``token`` it is a write of the run's owner, or of its last one: ``LeaseLost`` when the store has the run
        under another token, as somebody owns or owned it since. A run that the store does not know has no owner.
        """

    @abstractmethod
    def load_run(self, run_id: str) -> Run | None:
        """The ``Run`` document, or ``None``. Raises ``CorruptData``."""

    @abstractmethod
    def list_all_runs(self) -> list[str]:
        """Ids of all ``Run`` documents, oldest first."""

    @abstractmethod
    def list_all_goals(self) -> list[str]:
        """Ids of the goals that have ``Run`` documents."""

    @abstractmethod
    def get_runs_by_goal(self, goal_id: str) -> list[str]:
        """Ids of the ``Run`` documents of a goal. Raises ``InvalidId``."""

    @abstractmethod
    def get_runs_by_status(self, status: str | RunStatus) -> list[str]:
        """Ids of the ``Run`` documents with a status. Raises ``InvalidId``."""

    @abstractmethod
    def get_runs_by_node(self, node_id: str) -> list[str]:
        """Ids of the ``Run`` documents in which a node decided something. Raises ``InvalidId``."""

    def load_summary(self, run_id: str) -> RunSummary | None:
        """The summary of a ``Run`` document, or ``None``."""
        run = self.load_run(run_id)
        return RunSummary.from_run(run) if run is not None else None

    def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
        """Wait until a run may have something to do, at most ``timeout`` seconds; whether that may be so.

        ``True`` when, since the last call, the store was told of a message, a time to wake at or a lease given up
        while its run was unfinished; at once when that has happened already. ``False`` when the time passed or
        ``stop`` was set. A lease that ends and a time that comes tell nobody, and a notice may be lost with a
        connection: look at the runs after each call, whatever it returned. Here it only waits, as a store without
        notices does.
        """
        (stop or threading.Event()).wait(max(timeout, 0))
        return False

    # --- what a store holds for nobody ---------------------------------------------------------------------------

    def find_strays(self) -> list[Stray]:
        """What no run needs: rows and files of runs that are not recorded, left-overs of crashes. Changes nothing.

        Work in progress is never among it. Here there is nothing to find.
        """
        return []

    def remove_stray(self, stray: Stray) -> bool:
        """Remove what ``find_strays`` found, if it still is there and still needed by nobody; whether it was removed.

        Durable on return.
        """
        return False

    # --- contents as bytes, for a layer that translates them (encryption) ----------------------------------------

    def read_contents(
        self, run_id: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> Iterator[Content]:
        """Every content of a run with its place, its ``Run`` document included; of no run: the definitions.

        Contents that come or go meanwhile may be left out. Damaged ones go to ``on_damage`` and are left out.
        """
        raise StorageError(f"{type(self).__name__} does not list its contents, so they cannot be encrypted anew.")

    def replace_contents(self, changes: Sequence[tuple[Content, bytes]]) -> int:
        """Put other bytes in the place of contents, each if it still is as it was read; how many were replaced.

        All or nothing where the backend can, and durable on return. Nothing else of a run changes: not its owner, its
        token, nor a time. So whoever holds the run may go on meanwhile. For translations that keep the meaning only.
        """
        raise StorageError(f"{type(self).__name__} does not replace contents, so they cannot be encrypted anew.")

    # --- the store itself ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def url(self) -> str:
        """A URL that ``open_storage`` opens this store by."""

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; the store can no longer be used. Calling it twice is harmless."""

    def get_stats(self) -> dict[str, int | str]:
        """``total_runs`` and ``total_goals`` of the ``Run`` documents, and ``storage_path``."""
        return {
            "total_runs": len(self.list_all_runs()),
            "total_goals": len(self.list_all_goals()),
            "storage_path": self.url,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- checkpoints as models, the same over every backend ------------------------------------------------------

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint given whole, recording its run if need be. Durable on return.

        Only the difference to the run's newest checkpoint is written. Executors do not use this: they commit
        differences. Raises ``UnstorableValue``, ``InvalidId``, ``RunBusy`` (somebody holds the run's lease).
        """
        stored.save_checkpoint(self, checkpoint)

    def load_checkpoint(self, run_id: str, checkpoint_id: str) -> Checkpoint | None:
        """One checkpoint with its state, or ``None`` when there is none of this id or it is damaged (logged)."""
        check_id(run_id)
        check_id(checkpoint_id, "checkpoint id", MAX_KEY)
        report = _reporter(run_id)
        try:
            row = self.find_checkpoint_row(run_id, checkpoint_id)
            return None if row is None else stored.build_checkpoint(self, run_id, row, report)
        except CorruptData as error:
            report(Damage(run_id, None, f"checkpoint {checkpoint_id}", str(error)))
            return None

    def load_latest_checkpoint(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint that can be read, or ``None``. Damaged ones are reported and passed over."""
        check_id(run_id)
        report = _reporter(run_id, on_damage)
        return stored.read_newest(self, run_id, lambda row: stored.build_checkpoint(self, run_id, row, report), report)

    def list_checkpoints(self, run_id: str) -> list[CheckpointMetadata]:
        """The retained checkpoints, oldest first; damaged ones are left out (logged)."""
        check_id(run_id)
        report = _reporter(run_id)
        listed = []
        for row in self.read_checkpoint_rows(run_id, report):
            try:
                listed.append(stored.metadata(run_id, row))
            except CorruptData as error:
                report(Damage(run_id, row.sequence, f"checkpoint {row.checkpoint_id}", str(error)))
        return listed[::-1]


def _reporter(run_id: str, on_damage: Callable[[Damage], None] | None = None) -> Callable[[Damage], None]:
    """Logs damage as a warning and tells it to ``on_damage``, each only once."""
    told: set[Damage] = set()

    def report(damage: Damage) -> None:
        if damage in told:
            return
        told.add(damage)
        # A damaged name may hold what no log file can be written with.
        where, problem = (text.encode("utf-8", "backslashreplace").decode() for text in (damage.where, damage.problem))
        logger.warning("Run %r: %s is damaged: %s", run_id, where, problem)
        if on_damage is not None:
            on_damage(damage)

    return report
