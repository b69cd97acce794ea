"""What retention is told and tells: pins, a store's size, and what was removed and what was kept. Plain frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from framework.schemas.run import RunState
from framework.storage.records import RunRecord


@dataclass(frozen=True, slots=True)
class Pin:
    """A run, or one checkpoint of it, that is kept whatever retention says.

    ``sequence`` and ``checkpoint_id`` are 0 and ``None`` for the run itself. ``pinned_at`` is in seconds since the
    epoch by the store's clock.
    """

    run_id: str
    sequence: int
    checkpoint_id: str | None
    note: str
    pinned_at: float


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How large a store is now.

    ``now`` is the store's clock, in seconds since the epoch. ``used_bytes`` is what its content takes on the disk, to a
    page in a database and to a byte in files, without the log of a database and without what is free in it.
    ``free_bytes`` is inside its file and of use to new content only, until ``shrink`` gives it back;
    ``can_shrink`` says whether ``shrink`` can, or ``compact`` is needed first.
    """

    now: float
    used_bytes: int
    free_bytes: int = 0
    can_shrink: bool = True


@dataclass(frozen=True, slots=True)
class Retired:
    """What became of one run that was to go.

    ``run_ids`` are the run and its parts, ``bytes`` about what they take in the store (in a database an estimate from
    the lengths of rows). When they stay, ``kept`` says why, and ``run_ids`` is empty.
    """

    run_ids: tuple[str, ...] = ()
    checkpoints: int = 0
    bytes: int = 0
    kept: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a store checks of one run before it goes: ``run`` as recorded, ``pinned`` itself or a checkpoint."""

    run: RunRecord
    pinned: bool
    pinned_checkpoint: bool


def why_kept(expected: RunRecord, family: Sequence[Standing], states: Sequence[RunState], now: float) -> str:
    """Why a run that stood as ``expected`` must stay, with its parts; ``""`` when they may go. Pure.

    ``family`` is the run itself first, then its parts and theirs, as they stand in the transaction that would remove
    them; ``states`` are those in which a run may go.
    """
    if not family:
        return "it is gone already"
    root = family[0].run
    seen = (root.token, root.sequence, root.state, root.updated_at)
    if seen != (expected.token, expected.sequence, expected.state, expected.updated_at):
        return "it changed meanwhile"
    for each in family:
        its = "it" if each is family[0] else f"its part {each.run.run_id}"
        if each.pinned:
            return f"{its} is pinned"
        if each.pinned_checkpoint:
            return f"a checkpoint of {its} is pinned"
        if each.run.owner is not None and each.run.lease_until > now:
            return f"{its} is in use"
        if each.run.state not in states:
            return f"{its} is {each.run.state.value}"
    return ""


@dataclass(frozen=True, slots=True)
class Removed:
    """A run that a sweep removed, or would remove. ``why`` is the rule, ``bytes`` as of ``Retired``, parts included."""

    run_id: str
    state: RunState
    updated_at: float
    parts: int
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A run that a rule would remove and that stays. ``rule`` is that rule."""

    run_id: str
    why: str
    rule: str


@dataclass(slots=True)
class SweepReport:
    """What one sweep did, or would do (``dry_run``).

    ``now`` is the moment that ages are counted from, in seconds since the epoch. ``runs`` and ``parts`` went, and
    ``checkpoints`` of runs that stay; ``rules`` says how many runs by which rule, in words. ``freed_bytes`` is what the
    runs that went took, as of ``Retired``; ``given_back_bytes`` went from the file to the file system. ``removed``
    names at most ``MOST_LISTED`` runs of each rule and ``kept`` so many in all; ``kept_runs`` counts them.
    ``used_bytes`` are those before and after. ``over_bytes`` is by how much the store still holds more than the
    policy's ``max_total_bytes``. ``complete`` says that nothing is left to do; ``False`` after ``limit`` runs, or when
    it was stopped.
    """

    dry_run: bool = False
    now: float = 0.0
    runs: int = 0
    parts: int = 0
    checkpoints: int = 0
    freed_bytes: int = 0
    given_back_bytes: int = 0
    used_bytes_before: int = 0
    used_bytes_after: int = 0
    over_bytes: int = 0
    kept_runs: int = 0
    complete: bool = True
    rules: dict[str, int] = field(default_factory=dict)
    removed: list[Removed] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


MOST_LISTED = 1_000
