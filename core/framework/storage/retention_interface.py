"""The part of the storage interface that keeps stores small: pins, and the steps that a sweep is made of.

A sweep (``sweeping``) decides what goes; a backend carries it out in steps so short that who commits meanwhile hardly
notices, each whole in itself: a kill between two, or other sweeps at the same time, lose nothing and leave nothing.
A run goes in two: ``retire_runs`` takes it out of sight at once, and ``purge`` removes what it held.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.records import RunRecord
from framework.storage.retention_records import Pin, Retired, StoreUsage, SweepReport

if TYPE_CHECKING:
    from framework.storage.interface import Storage


class KeepsRuns(ABC):
    """What ``Storage`` says of pins and sweeps."""

    # --- pins ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def pin(self, run_id: str, checkpoint_id: str | None = None, note: str = "") -> Pin:
        """Keep a run, or one retained checkpoint of it, until ``unpin``; durable on return.

        No sweep removes a pinned run or anything of it, and deleting it is refused (``RunPinned``). A pinned
        checkpoint, with its state, outlives its run's retention at commits and ``prune``, too. It counts in addition
        to what is kept. Pinned again, the ``note`` (at most 1,000 characters) is replaced. Of several checkpoints with
        one id the newest is meant. Raises ``RunNotFound``, ``CheckpointNotFound``, ``InvalidId``.
        """

    @abstractmethod
    def unpin(self, run_id: str, checkpoint_id: str | None = None) -> bool:
        """Take a pin away, durably; whether there was one. A checkpoint goes with its run's next retention."""

    @abstractmethod
    def list_pins(self, run_ids: Sequence[str] | None = None) -> list[Pin]:
        """The pins of these runs, or all, by run id and sequence (the run itself first)."""

    # --- what may go --------------------------------------------------------------------------------------------

    @abstractmethod
    def usage(self) -> StoreUsage:
        """How large the store is, and its clock. Cheap, but for ``FileStorage``, which looks at each file."""

    @abstractmethod
    def list_ended(
        self, states: Sequence[RunState], limit: int = 100, after: RunRecord | None = None
    ) -> list[RunRecord]:
        """At most ``limit`` runs in ``states``, the longest unchanged first (by ``updated_at``, then id).

        ``after`` goes on after that run. Parts of other runs are left out, unless those are gone. Damaged ones are
        passed over; fewer than ``limit`` means that there are no more.
        """

    @abstractmethod
    def nth_newest_ended(self, states: Sequence[RunState], count: int) -> RunRecord | None:
        """The last of the ``count`` (from 1) most recently changed runs that ``list_ended`` gives, ``None`` when there
        are fewer. Costs about ``count`` index entries."""

    @abstractmethod
    def list_aged(self, before: float, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        """At most ``limit`` runs made before ``before`` that keep a checkpoint from then which may go, by age of the
        run (``created_at``, id). ``after`` goes on after that run; fewer than ``limit``: no more.

        The newest checkpoint and pinned ones may not go, nor any of a pinned run.
        """

    # --- removing it --------------------------------------------------------------------------------------------

    @abstractmethod
    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        """Remove runs with their parts, each family all or nothing; durable on return.

        For each, in order, what became of it; fewer than given when others would have to wait longer than about
        ``seconds``, at least one. In the transaction that removes them it is checked that the run is as ``runs`` says
        (token, sequence, state, last change), that it and all its parts are in ``states`` and have no owner, and that
        nothing of them is pinned; else they stay (``Retired.kept``). From then on there are no such runs, nor their
        ``Run`` documents, pins, and the definitions that no run has any more. What they held is of no use to anybody,
        a new run of the same id included, and goes with ``purge``. With ``dry_run`` nothing changes.
        """

    @abstractmethod
    def purge(self, seconds: float = 0.004) -> bool:
        """Remove what retired runs held, whoever retired them, for about ``seconds``; whether there is more."""

    @abstractmethod
    def prune_older(self, run_id: str, before: float, limit: int = 50, *, dry_run: bool = False) -> int:
        """Remove at most ``limit`` of a run's checkpoints made before ``before``, the oldest first; how many.

        Fewer go, at least one, when others would have to wait while large ones do. The newest that can be read stays,
        and so do pinned ones and all of a pinned run. Call it until it gives 0.
        With ``dry_run`` nothing changes, and ``limit`` does not count.
        """

    @abstractmethod
    def shrink(self, seconds: float = 0.004) -> int:
        """Give room that the store does not use back to the file system, for about ``seconds``; how many bytes.

        0 when there is none left, or the store cannot (``StoreUsage.can_shrink``).
        """

    @abstractmethod
    def compact(self) -> int:
        """Write the store anew without what is free in it; by how many bytes it became smaller.

        Nobody else can write meanwhile, and the disk must have room for a second copy. Afterwards ``shrink`` can.
        """

    # --- all of it ----------------------------------------------------------------------------------------------

    def sweep(
        self,
        policy: RetentionPolicy,
        *,
        now: float | None = None,
        dry_run: bool = False,
        limit: int | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[SweepReport], None] | None = None,
    ) -> SweepReport:
        """Remove what ``policy`` does not keep, in short steps with pauses between them; what was done.

        ``now`` is in seconds since the epoch, ``None`` for the store's clock. At most ``limit`` runs go (their parts
        not counted). ``stop`` ends it after the step under way; ``on_progress`` is told after each. Several sweeps at
        once are harmless, and after a kill the next one finishes. Everything it reports as removed is durably so.
        Raises ``StorageError``.
        """
        from framework.storage.sweeping import sweep  # noqa: PLC0415 - it imports this interface

        return sweep(
            cast("Storage", self), policy, now=now, dry_run=dry_run, limit=limit, stop=stop, on_progress=on_progress
        )
