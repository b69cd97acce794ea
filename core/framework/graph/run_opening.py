"""Taking hold of a run in the store: start it, take it over, or look up its result. Runs on the committer's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from framework.errors import CommitConflict, CorruptData, DefinitionChanged, ResumeError, RunExists, RunNotFound
from framework.graph import journal_rows
from framework.graph.spending import Spent
from framework.schemas.checkpoint import CheckpointStatus, ExecutorType
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage import codec
from framework.storage.compression import pack_run
from framework.storage.interface import Storage
from framework.storage.ownership import is_alive
from framework.storage.records import Damage, NewRun, RunRecord

_CLAIM_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Definition:
    """What a run executes: ``body`` is its canonical form, ``describe`` the difference of two such forms by line."""

    id: str
    executor_type: ExecutorType
    goal_id: str
    fingerprint: str
    body: Mapping[str, Any]
    describe: Callable[[dict[str, Any], dict[str, Any]], list[str]]
    append_only: frozenset[str] = frozenset()
    accept: Callable[[Restored], None] | None = None
    """Decides, before the run is claimed, whether what was found may go on, and raises when not; ``None`` compares
    fingerprints."""
    must_exist: bool = False
    """Whether an unknown run is ``RunNotFound`` rather than started."""
    check: Callable[[Restored], None] | None = None
    """Told what was found before the run is claimed; what it raises leaves the run as it was."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A run as found in the store.

    ``values`` is the state by stored key (branches' keys scoped), ``records`` and ``events`` the log up to the
    checkpoint, ``later`` the records after it (failed attempts). ``checkpoint_id`` is ``None`` when nothing was
    committed yet: the run begins with its initial state.
    """

    found: RunState
    checkpoint_id: str | None
    body: Mapping[str, Any]
    values: Mapping[str, Any]
    state: stored.State
    records: Sequence[Mapping[str, Any]]
    later: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    header: Mapping[str, Any]
    input_data: Mapping[str, Any]
    sequence: int
    checkpoint_sequence: int
    damage: Sequence[Damage]
    error: str | None
    journal: Mapping[str, Spent] = field(default_factory=dict)
    """The steps that have journal rows, and what their questions to models took that no record counts yet."""
    journal_counted: Mapping[str, int] = field(default_factory=dict)
    """Up to which number of a call the records count what calls took, by step."""
    unpriced: str | None = None
    """A model that the run has asked and whose price was not known."""

    @property
    def rewinds(self) -> bool:
        """Whether going on means to forget commits after the checkpoint: damaged ones, and steps that run again."""
        return any(record.get("kind") == "step" for record in self.later) or any(
            item.sequence is not None and item.sequence > self.checkpoint_sequence for item in self.damage
        )


def open_run(
    storage: Storage, new: NewRun, owner: str, lease_seconds: float, definition: Definition, allow_change: bool
) -> tuple[RunRecord, Restored | None]:
    """The run, leased to ``owner`` (unless completed), and what was found of it; ``None`` for a new run.

    Raises ``RunBusy``, ``DefinitionChanged``, ``ResumeError``, ``UnknownType``, ``StorageError``.
    """
    try:
        if storage.find_run(new.run_id) is None:
            if definition.must_exist:
                raise RunNotFound(new.run_id)
            return storage.open_run(pack_run(storage, new), owner, lease_seconds), None
    except RunExists:
        pass  # accepted elsewhere between the two calls: take it as found
    for _ in range(_CLAIM_ATTEMPTS):
        found = storage.find_run(new.run_id)
        if found is None:
            raise RunNotFound(new.run_id)
        if definition.accept is None and not allow_change and not _is_same(found, new, definition):
            _refuse_change(storage, found, definition)
        # Read before claiming: a run that cannot be restored stays as it was found, claimed by nobody.
        try:
            restored = restore(storage, found)
        except ResumeError:
            if _moved_on(storage, found):
                continue
            raise
        if definition.accept is not None:
            definition.accept(restored)
        if definition.check is not None and found.state is not RunState.COMPLETED:
            definition.check(restored)
        try:
            record = storage.claim_run(new.run_id, owner, lease_seconds, is_alive, restored.sequence)
        except CommitConflict:
            continue  # its owner committed once more in between; what was read is old
        if record.sequence != restored.sequence:
            continue  # and completed it with that
        if record.state is RunState.COMPLETED and not _holds_result(restored):
            raise _result_lost(new.run_id, restored)
        if restored.rewinds:
            storage.rewind(record.run_id, record.token, restored.checkpoint_sequence)
        state = _as_told(record.state, restored.body, [*restored.records, *restored.later])
        records = [*restored.records, *restored.later]
        counted = counted_calls(records)
        rows = {} if record.state is RunState.COMPLETED else _journal(storage, record.run_id)
        return record, replace(
            restored,
            found=state,
            error=record.error,
            journal={step: journal_rows.fold(each, counted.get(step, 0)).spent for step, each in rows.items()},
            journal_counted=counted,
            unpriced=_unpriced(records, rows),
        )
    raise ResumeError(new.run_id, f"Run {new.run_id!r} kept changing while it was being claimed; call again.")


def _holds_result(restored: Restored) -> bool:
    """Whether what was found of a completed run is its last commit, which says that it is complete."""
    is_last = restored.checkpoint_sequence == restored.sequence and not restored.rewinds
    return is_last and restored.body.get("status") == CheckpointStatus.COMPLETED.value


def _result_lost(run_id: str, restored: Restored) -> ResumeError:
    """What a completed run is refused with whose last commit cannot be read: an older result is not its result."""
    if restored.damage:
        why = f"cannot be read, so its result is not known. Damaged: {_listing(restored.damage)}"
    else:
        why = "is not in the store, so its result is not known: it was deleted, or was lost"
    return ResumeError(
        run_id,
        f"Run {run_id!r} is complete, but its last checkpoint {why}. Restore the store from a backup, or read an "
        "earlier checkpoint with CheckpointManager.get_checkpoint.",
    )


def _listing(damage: Sequence[Damage]) -> str:
    """The first of what is damaged, each once: a file may be met as a checkpoint and as a row of the log."""
    told = dict.fromkeys(
        item.problem if item.problem.startswith(item.where) else f"{item.where}: {item.problem}" for item in damage
    )
    return "; ".join(text.rstrip(".") for text in list(told)[:5])


def counted_calls(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Up to which number of a call the records count what calls took, by step."""
    counted: dict[str, int] = {}
    for step, number in (record["journaled"] for record in records if "journaled" in record):
        counted[step] = max(number, counted.get(step, 0))
    return counted


def _journal(storage: Storage, run_id: str) -> dict[str, list[journal_rows.Row]]:
    """Read after the run was claimed: until then its last owner may write. Damage is told when a step reads its own."""
    rows = storage.read_journal(run_id, on_damage=lambda item: None)
    return {step: journal_rows.parse(group, lenient=True) for step, group in groupby(rows, key=lambda row: row.step)}


def _unpriced(records: Sequence[Mapping[str, Any]], journal: Mapping[str, Sequence[journal_rows.Row]]) -> str | None:
    """The last model that records tell of as without a known price, or one that a recorded reply is of."""
    told = next((str(record["unpriced"]) for record in reversed(records) if "unpriced" in record), None)
    return next((found for rows in journal.values() if (found := journal_rows.unpriced_of(rows))), told)


def read_run(storage: Storage, run_id: str) -> Restored:
    """The run as it is, claimed by nobody. Raises ``RunNotFound`` and what ``restore`` raises."""
    for _ in range(_CLAIM_ATTEMPTS):
        found = storage.find_run(run_id)
        if found is None:
            raise RunNotFound(run_id)
        try:
            return restore(storage, found)
        except ResumeError:
            if not _moved_on(storage, found):
                raise
    raise ResumeError(run_id, f"Run {run_id!r} kept changing while it was being read; call again.")


def _moved_on(storage: Storage, found: RunRecord) -> bool:
    """Whether the run's owner committed since it was found: retention may have removed what was being read."""
    now = storage.find_run(found.run_id)
    return now is not None and now.sequence != found.sequence


def _is_same(found: RunRecord, new: NewRun, definition: Definition) -> bool:
    """Whether the run may go on with this definition, or, being completed, give its result to a caller who has it.

    A completed run executes nothing, so a later version of its own graph changes nothing; another graph's result,
    under a run id used twice, would be somebody else's.
    """
    if found.fingerprint == new.fingerprint:
        return True
    header = codec.decode(found.header) if found.header else {}
    return found.state is RunState.COMPLETED and header.get("definition_id") == definition.id


def _refuse_change(storage: Storage, found: RunRecord, definition: Definition) -> None:
    if not found.fingerprint:
        raise ResumeError(
            found.run_id,
            f"Run {found.run_id!r} was not started by an executor, so what it executes is not recorded. Read its "
            "checkpoints with CheckpointManager.restore_from_checkpoint, or choose another run_id.",
        )
    body = storage.definition(found.fingerprint)
    old = codec.decode(body) if body is not None else {}
    changes = definition.describe(old, dict(definition.body))
    raise DefinitionChanged(found.run_id, changes or ["the recorded definition cannot be compared"])


def _as_told(state: RunState, body: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> RunState:
    """The state that a run was left in. A new fork is recorded as paused wherever it stands, but only at a checkpoint
    that tells of a pause somebody was asked; elsewhere it goes on like a run that was stopped."""
    forked = state is RunState.PAUSED and bool(records) and records[-1].get("kind") == "fork"
    asked = body.get("status") == CheckpointStatus.PAUSED.value
    return RunState.CANCELLED if forked and not asked else state


def restore(storage: Storage, found: RunRecord) -> Restored:
    """The run at its newest readable checkpoint, or at its start when it has none.

    Raises ``ResumeError`` when it has checkpoints and none can be read, ``UnknownType``, ``StoreTooNew``.
    """
    run_id = found.run_id
    damage: list[Damage] = []
    body: Mapping[str, Any] = {}
    chosen_id, chosen = None, 0
    state: stored.State | None = None
    seen = 0
    for row in storage.read_checkpoint_rows(run_id, damage.append):
        seen += 1
        try:
            body = stored.parse_body(row)
            state = stored.load_state(storage, run_id, row.sequence, body.get("digest"))
        except CorruptData as error:
            damage.append(Damage(run_id, row.sequence, f"checkpoint {row.checkpoint_id}", str(error)))
            continue
        chosen_id, chosen = row.checkpoint_id, row.sequence
        break
    if state is None:
        if damage:
            raise ResumeError(
                run_id,
                f"No checkpoint of run {run_id!r} can be read, and starting over would repeat finished steps. "
                f"Damaged: {_listing(damage)}. Restore the store from a backup, or start a new run under another "
                "run_id.",
            )
        body = {}
        state = stored.load_state(storage, run_id, 0)
    rows = storage.read_log(run_id, on_damage=damage.append)
    records = stored.parse_log(rows)
    header = codec.decode(found.header) if found.header else {}
    initial = state.values if chosen == 0 else stored.load_state(storage, run_id, 0).values
    input_keys = header.get("input_keys") or []
    given = stored.decode_values(initial)
    return Restored(
        found=_as_told(found.state, body, records),
        checkpoint_id=chosen_id,
        body=body,
        values=stored.decode_values(state.values),
        state=state,
        records=[record for record in records if record["sequence"] <= chosen],
        later=[record for record in records if record["sequence"] > chosen],
        events=[event for row in rows if row.log is not None for event in codec.decode(row.log)],
        header=header,
        input_data={key: given[key] for key in input_keys if key in given},
        sequence=found.sequence,
        checkpoint_sequence=chosen,
        damage=tuple(damage),
        error=found.error,
    )
