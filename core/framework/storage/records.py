"""The rows a store keeps: runs, commits, chunks and leases, as plain frozen data with no behaviour of any backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from framework.schemas.run import RunState
from framework.storage.chunks import Chunk

NO_TOKEN = 0
"""Fencing token of a commit made by no owner: accepted only while nobody holds the run's lease."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to accept. ``chunks`` is its initial state (memory and input), kept as sequence 0 for the run's life.

    ``header`` is opaque JSON of the executor's (input keys, goal, lineage); ``definition`` is the JSON of the graph
    or plan, stored once per ``fingerprint``.
    """

    run_id: str
    executor_type: str
    goal_id: str
    fingerprint: str
    definition: bytes
    header: bytes
    chunks: Sequence[Chunk] = ()
    parent_run_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as recorded. Times are seconds since the epoch by the store's clock.

    ``state`` is ``crashed`` when the stored state is running and nobody alive holds the lease. ``error`` is that of
    the last commit with a state; a running run shows none. ``sequence`` is that of the last commit, 0 before the first.
    ``wake_at`` is when a paused run is due, ``None`` when no time was set. ``recovery_attempts`` is how often in a row
    it was claimed from an owner that vanished, without any progress in between.
    """

    run_id: str
    executor_type: str
    goal_id: str
    fingerprint: str
    header: bytes
    state: RunState
    sequence: int
    created_at: float
    updated_at: float
    error: str | None
    owner: str | None
    token: int
    lease_until: float
    recovery_attempts: int
    parent_run_id: str | None
    wake_at: float | None = None


_FAR = sys.float_info.max
"""A time after all others, and with a minus before them; not every store can be asked about infinity."""


def due_after(run: RunRecord | None) -> tuple[float, str]:
    """The time to wake at and the id above which ``list_due`` goes on after ``run``; below all without one."""
    if run is None:
        return -_FAR, ""
    return (run.wake_at if run.wake_at is not None else _FAR), run.run_id


def attempts_after_claim(found: RunRecord) -> int:
    """``recovery_attempts`` of a run that is being claimed, ``found`` as it was: the one rule of every backend.

    An owner that vanished is a crash. One that gave its lease up, as at a deploy, is none, and takes none back.
    """
    if found.state is not RunState.CRASHED:
        return 0
    return found.recovery_attempts + (0 if found.owner is None else 1)


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of the run stay: the newest ``keep``; ``None`` keeps all."""

    keep: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """What one commit makes durable, all or nothing.

    ``sequence`` is the previous commit's plus one. ``record`` (what happened) and ``log`` (decisions and problems)
    stay for the run's life; ``checkpoint`` (where to go on) stays while retention keeps it, and is ``None`` for a
    commit that is no checkpoint, such as a failed attempt. ``state`` replaces the run's when given, and ``error`` with
    it. ``replaces`` is the sequence of a checkpoint that this one takes the place of. Each chunk writes another key.

    ``journal_done`` names the steps whose journal rows go with this commit, in its transaction. ``wake_at``, only with
    a ``state`` of paused, is when the run is due, in seconds since the epoch by the store's clock; any claim and any
    later ``state`` clears it. ``progress`` says that the run got somewhere, and did not only come back: its
    ``recovery_attempts`` become 0.
    """

    run_id: str
    token: int
    sequence: int
    record: bytes
    log: bytes | None = None
    checkpoint_id: str | None = None
    checkpoint: bytes | None = None
    chunks: Sequence[Chunk] = ()
    state: RunState | None = None
    error: str | None = None
    release: bool = False
    retention: Retention | None = None
    replaces: int | None = None
    journal_done: Sequence[str] = ()
    wake_at: float | None = None
    progress: bool = False


@dataclass(frozen=True, slots=True)
class JournalRow:
    """What is recorded of one call inside a step that has not committed yet.

    ``step`` is any text that names the step, ``number`` (0 to 2**63 - 1) the call in it; together they are the row's
    key within its run. ``record`` is opaque to the store.
    """

    step: str
    number: int
    record: bytes


@dataclass(frozen=True, slots=True)
class JournalWrite:
    """Journal rows to make durable, all or nothing. A row whose key exists is replaced; of two here the last counts.

    ``token`` is the fencing token, as of a ``Commit``, and so is ``progress``: the run's ``recovery_attempts`` become 0
    together with it. The run's sequence and checkpoints are not touched.
    """

    run_id: str
    token: int
    rows: Sequence[JournalRow]
    progress: bool = False


Write: TypeAlias = Commit | JournalWrite
"""What ``Storage.commit`` makes durable."""


class LogRow(NamedTuple):
    """One commit as kept for the run's life. A tuple, since a resume makes one of every step there was."""

    sequence: int
    record: bytes
    log: bytes | None


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One retained checkpoint, without its state."""

    sequence: int
    checkpoint_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """Something left for a run from outside, under a name of its own. ``body`` is opaque to the store.

    ``sent_at`` is in seconds since the epoch by the store's clock.
    """

    run_id: str
    name: str
    body: bytes
    sent_at: float


ContentKind = Literal[
    "definition", "header", "error", "record", "log", "checkpoint", "chunk", "journal", "message", "document"
]


class Place(NamedTuple):
    """Where in a store a content is. No two contents of a store have one place.

    ``sequence`` is that of the commit (``record``, ``log``, ``checkpoint``, ``chunk``), or the number of the call
    (``journal``), else 0. ``key`` is the key of the state (``chunk``), the checkpoint's id, the step (``journal``), the
    message's name or the definition's fingerprint. ``op`` is the chunk's operation.
    """

    kind: ContentKind
    run_id: str
    sequence: int = 0
    key: str = ""
    op: str = ""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes at one place of a store, as they are stored."""

    place: Place
    data: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in the store that cannot be read or does not fit. ``where`` names the row or file.

    Of a journal row, ``step`` and ``number`` are its key as the damaged row says it, so perhaps another's, or ``None``
    where that cannot be read.
    """

    run_id: str
    sequence: int | None
    where: str
    problem: str
    step: str | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Stray:
    """Something in a store that no run and nothing else needs, such as what a crash left behind.

    ``name`` is the backend's own name for it. ``safe`` says whether removing it can lose nothing; ``reason`` why not.
    ``harmless`` says that it is an ordinary left-over, which tells of no damage.
    """

    name: str
    problem: str
    safe: bool = True
    reason: str = ""
    harmless: bool = False


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of reading a run, or a whole store, from end to end."""

    runs: int
    checkpoints: int
    chunks: int
    damage: Sequence[Damage] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing was found damaged."""
        return not self.damage
