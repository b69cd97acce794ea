"""Reading runs from end to end and saying what is damaged; the same over every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from framework.errors import CorruptData, UnknownType
from framework.storage import checkpoints as stored
from framework.storage.records import CheckpointRow, Damage, LogRow, VerifyReport

if TYPE_CHECKING:
    from framework.storage.interface import Storage

Report = Callable[[Damage], None]


def verify_run(
    storage: Storage, run_ids: Sequence[str], found: Sequence[Damage] = (), documents: Sequence[str] = ()
) -> VerifyReport:
    """Read every record, log row, checkpoint, chunk, journal row and message of ``run_ids``, and ``documents``.

    ``found`` is damage already known. A type that is not registered here is no damage: the bytes are whole, only this
    program cannot rebuild them.
    """
    damage = list(found)
    checkpoints = chunks = 0
    for run_id in run_ids:
        with _reporting(damage.append, run_id, None, f"run {run_id}"):
            run = storage.find_run(run_id)
            if run is not None and storage.definition(run.fingerprint) is None:
                raise CorruptData("Its definition is missing.")
        with _reporting(damage.append, run_id, None, f"log of run {run_id}"):
            for log in storage.read_log(run_id, on_damage=damage.append):
                _verify_log(log, run_id, damage.append)
        with _reporting(damage.append, run_id, None, f"checkpoints of run {run_id}"):
            for row in storage.read_checkpoint_rows(run_id, damage.append):
                checkpoints += 1
                chunks += _verify_checkpoint(storage, run_id, row, damage.append)
        with _reporting(damage.append, run_id, None, f"messages of run {run_id}"):
            storage.read_messages(run_id, damage.append)
        with _reporting(damage.append, run_id, None, f"journal of run {run_id}"):
            storage.read_journal(run_id, on_damage=damage.append)
        with _reporting(damage.append, run_id, 0, "initial state"):
            chunks += len(storage.read_chunks(run_id, 0))
    for run_id in dict.fromkeys([*run_ids, *documents]):
        with _reporting(damage.append, run_id, None, f"document of run {run_id}"):
            storage.load_run(run_id)
    # One damaged file may be met as a checkpoint and as a log row.
    return VerifyReport(len(run_ids), checkpoints, chunks, tuple(dict.fromkeys(damage)))


@contextlib.contextmanager
def _reporting(report: Report, run_id: str, sequence: int | None, where: str) -> Generator[None, None, None]:
    try:
        yield
    except UnknownType:
        return
    except CorruptData as error:
        report(Damage(run_id, sequence, where, str(error)))


def _verify_log(row: LogRow, run_id: str, report: Report) -> None:
    with _reporting(report, run_id, row.sequence, f"log row {row.sequence}"):
        stored.parse_log([row])


def _verify_checkpoint(storage: Storage, run_id: str, row: CheckpointRow, report: Report) -> int:
    """Read the state of a checkpoint; how many chunks it took."""
    count = 0
    with _reporting(report, run_id, row.sequence, f"checkpoint {row.checkpoint_id}"):
        try:
            chunks = storage.read_chunks(run_id, row.sequence)
            count = len(chunks)
            digest = stored.parse_body(row).get("digest")
            if digest is not None and digest != stored.format_digest(stored.fold(chunks).chains.values()):
                raise CorruptData("Its state does not match its digest.")
        except CorruptData:
            if stored.is_retained(storage, run_id, row):  # and not pruned by its owner meanwhile
                raise
    return count


def newest_readable(storage: Storage, run_id: str) -> int | None:
    """The sequence of the newest checkpoint that is whole, state included, or ``None``. Retention never removes it."""

    def read(row: CheckpointRow) -> int:
        with contextlib.suppress(UnknownType):  # whole, though this program cannot rebuild it
            stored.load_state(storage, run_id, row.sequence, stored.parse_body(row).get("digest"))
        return row.sequence

    return stored.read_newest(storage, run_id, read, lambda damage: None)
