"""Reading runs from end to end and saying what is damaged; the same over every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from framework.errors import CorruptData, RunPinned, UnknownType
from framework.storage import checkpoints as stored
from framework.storage.records import CheckpointRow, Damage, LogRow, VerifyReport
from framework.storage.sealed import is_sealed

if TYPE_CHECKING:
    from framework.storage.interface import Storage

Report = Callable[[Damage], None]

_LOOKS = 3


def verify_run(
    storage: Storage, run_ids: Sequence[str], found: Sequence[Damage] = (), documents: Sequence[str] = ()
) -> VerifyReport:
    """Read every record, log row, checkpoint, chunk, journal row, message and pin of ``run_ids``, and ``documents``.

    ``found`` is damage already known. A type that is not registered here is no damage: the bytes are whole, only this
    program cannot rebuild them. Others may go on writing meanwhile: what they do is no damage either.
    """
    damage = list(found)
    checkpoints = chunks = 0
    for run_id in run_ids:
        with _reporting(damage.append, run_id, None, f"run {run_id}"):
            run = storage.find_run(run_id)
            if run is not None and storage.definition(run.fingerprint) is None and storage.find_run(run_id) is not None:
                raise CorruptData("Its definition is missing.")
        damage += _lasting(_verify_log, storage, run_id)
        damage += _lasting(_verify_chains, storage, run_id)
        with _reporting(damage.append, run_id, None, f"checkpoints of run {run_id}"):
            for row in storage.read_checkpoint_rows(run_id, damage.append):
                checkpoints += 1
                chunks += _verify_checkpoint(storage, run_id, row, damage.append)
        with _reporting(damage.append, run_id, None, f"messages of run {run_id}"):
            storage.read_messages(run_id, damage.append)
        with _reporting(damage.append, run_id, None, f"journal of run {run_id}"):
            storage.read_journal(run_id, on_damage=damage.append)
        with _reporting(damage.append, run_id, None, f"pins of run {run_id}"):
            storage.list_pins([run_id])
        with _reporting(damage.append, run_id, 0, "initial state"):
            chunks += len(storage.read_chunks(run_id, 0))
    for run_id in dict.fromkeys([*run_ids, *documents]):
        with _reporting(damage.append, run_id, None, f"document of run {run_id}"):
            storage.load_run(run_id)
    # One damaged file may be met as a checkpoint and as a log row.
    return VerifyReport(len(run_ids), checkpoints, chunks, tuple(dict.fromkeys(damage)))


def _lasting(look: Callable[[Storage, str], list[Damage]], storage: Storage, run_id: str) -> list[Damage]:
    """What several looks in a row find alike: rows that come and go between two reads of one look are no damage."""
    found = look(storage, run_id)
    for _ in range(_LOOKS):
        if not found:
            break
        again = set(look(storage, run_id))
        found = [damage for damage in found if damage in again]
    return found


@contextlib.contextmanager
def _reporting(report: Report, run_id: str, sequence: int | None, where: str) -> Generator[None, None, None]:
    try:
        yield
    except UnknownType:
        return
    except CorruptData as error:
        report(Damage(run_id, sequence, where, str(error)))


def _verify_log(storage: Storage, run_id: str) -> list[Damage]:
    """What is wrong with the log of a run: rows that cannot be read, and commits that are not there."""
    damage: list[Damage] = []
    with _reporting(damage.append, run_id, None, f"log of run {run_id}"):
        rows = storage.read_log(run_id, on_damage=damage.append)
        # Files that cannot be read do not always tell which commit they were: those are told as what they are.
        known = all(each.sequence is not None for each in damage)
        undone = [sequence for row in rows for sequence in _verify_log_row(row, run_id, damage.append)]
        there = {row.sequence for row in rows} | {each.sequence for each in damage if each.sequence is not None}
        if known and not any(is_sealed(row.record) for row in rows):
            for first, final in _gaps(there.union(undone)):
                which = f"commit {first} is" if first == final else f"commits {first} to {final} are"
                damage.append(Damage(run_id, first, "log", f"{which} missing"))
    return damage


def _gaps(there: Collection[int]) -> list[tuple[int, int]]:
    """The sequences from 1 to the last one there that are not there, as ranges."""
    gaps: list[tuple[int, int]] = []
    for sequence in sorted({*range(1, max(there, default=0) + 1)}.difference(there)):
        if gaps and gaps[-1][1] == sequence - 1:
            gaps[-1] = (gaps[-1][0], sequence)
        else:
            gaps.append((sequence, sequence))
    return gaps


def _verify_chains(storage: Storage, run_id: str) -> list[Damage]:
    """Chunks that follow nothing, which no reader of a state would miss, and chunks of no commit."""
    if not _lists_contents(storage):
        return []  # the digests of checkpoints tell as much of their states
    damage: list[Damage] = []
    ops: dict[str, list[tuple[int, str]]] = {}
    for content in storage.read_contents(run_id):
        if content.place.kind == "chunk":
            ops.setdefault(content.place.key, []).append((content.place.sequence, content.place.op))
    record = None
    with contextlib.suppress(CorruptData):
        record = storage.find_run(run_id)
    for key, chain in sorted(ops.items()):
        before: str | None = None
        for sequence, op in sorted(chain):
            where = f"chunk {sequence} of key {key!r}"
            if op == "append" and before in (None, "delete"):
                damage.append(Damage(run_id, sequence, where, "it appends to a value that is not there"))
            if record is not None and sequence > record.sequence:
                damage.append(Damage(run_id, sequence, where, "it belongs to no commit in the log"))
            before = op
    return damage


def _lists_contents(storage: Storage) -> bool:
    """Whether a backend can tell of its chunks one by one; it need not, to be verified."""
    from framework.storage.interface import Storage as Interface  # noqa: PLC0415 - a cycle

    return type(storage).read_contents is not Interface.read_contents


def _verify_log_row(row: LogRow, run_id: str, report: Report) -> list[int]:
    """Look at a row of the log; the commits that it says were undone, whose own rows may be damaged and gone."""
    undone: list[int] = []
    if is_sealed(row.record):
        return undone  # a layer above reads it
    with _reporting(report, run_id, row.sequence, f"log row {row.sequence}"):
        for record in stored.parse_log([row]):
            if record.get("kind") == "rewind":
                undone += range(record["to"] + 1, row.sequence)
    return undone


def _verify_checkpoint(storage: Storage, run_id: str, row: CheckpointRow, report: Report) -> int:
    """Read the state of a checkpoint; how many chunks it took."""
    count = 0
    with _reporting(report, run_id, row.sequence, f"checkpoint {row.checkpoint_id}"):
        try:
            chunks = storage.read_chunks(run_id, row.sequence)
            count = len(chunks)
            digest = None if is_sealed(row.body) else _digest(row)
            if digest is not None and digest != stored.format_digest(stored.fold(chunks).chains.values()):
                raise CorruptData("Its state does not match its digest.")
        except CorruptData:
            if stored.is_retained(storage, run_id, row):  # and not pruned by its owner meanwhile
                raise
    return count


def newest_readable(storage: Storage, run_id: str) -> int | None:
    """The sequence of the newest checkpoint that is whole, state included, or ``None``. Retention never removes it."""

    def read(row: CheckpointRow) -> int:
        if is_sealed(row.body):
            return row.sequence  # what it says is told above this store, which says so when it matters
        stored.load_state(storage, run_id, row.sequence, _digest(row))
        return row.sequence

    return stored.read_newest(storage, run_id, read, lambda damage: None)


def refuse_pinned(storage: Storage, run_id: str, after: int) -> None:
    """Raise ``RunPinned`` if a pinned checkpoint above the sequence ``after`` is whole: a rewind would remove it.

    One of types that this program has not registered is whole, too: another program can read it.
    """
    for pin in storage.list_pins([run_id]):
        if pin.sequence <= after or pin.checkpoint_id is None:
            continue
        with contextlib.suppress(CorruptData):
            row = storage.find_checkpoint_row(run_id, pin.checkpoint_id)
            # Of one that is encrypted the layer above has looked whether it can be read.
            if row is not None and row.sequence == pin.sequence and not is_sealed(row.body):
                stored.load_state(storage, run_id, row.sequence, _digest(row))
                raise RunPinned(run_id, pin.sequence, pin.note)


def _digest(row: CheckpointRow) -> str | None:
    """The digest that a checkpoint has of its state, whether or not this program knows the types in its body.

    Raises ``CorruptData``, ``StoreTooNew``.
    """
    body: Any
    try:
        body = stored.parse_body(row)
    except UnknownType:
        body = orjson.loads(row.body)  # it is JSON, and what is not known is further inside
    digest: str | None = body.get("digest") if isinstance(body, dict) else None
    return digest
