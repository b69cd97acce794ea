"""``EncryptedStorage``: any store with its content encrypted, by keys of a ``KeyRing``. The format: docs/adr/0015.

What is looked for stays plain: ids, keys' names, states, sequences, times, owners. All else is AES-256-GCM, bound to
its run and place. The layers above see a store like any other; differences are made before anything is encrypted, so an
unchanged value is stored once here, too.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from framework.errors import CorruptData, KeyNotFound, NotEncrypted, RunError, RunNotFound, StorageError
from framework.schemas.run import Run, RunState, RunStatus
from framework.storage.checks import (
    MAX_KEY,
    check_fork,
    check_id,
    check_new_run,
    check_value,
    journal_refusal,
    refusal,
)
from framework.storage.chunks import Chunk
from framework.storage.encryption_keys import KeyRing, require_library
from framework.storage.encryption_rotation import OnProgress, Rotated, count_keys, rotate
from framework.storage.encryption_seal import Sealer, header_place
from framework.storage.interface import IsAlive, Rewrite, Storage
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
from framework.storage.retention_records import Pin, Retired, StoreUsage
from framework.storage.sealed import is_sealed, is_sealed_document
from framework.storage.verify import newest_readable, refuse_pinned, verify_run

__all__ = ["EncryptedStorage", "KeyRing"]

logger = logging.getLogger(__name__)

_LOOKED_AT = 5
"""Runs and documents by which a store is taken for encrypted or plain when it is opened, of each kind of listing."""


class EncryptedStorage(Storage):
    """``inner`` with its content encrypted. Owns ``inner``: closing this closes it.

    Raises ``NotEncrypted`` for a store that has plain runs, ``KeyNotFound`` when ``keys`` has none of the keys that the
    oldest and newest runs need, or the documents of a store without runs, ``StorageError`` without the extra
    ``encryption``. Reading raises ``KeyNotFound`` for what needs a key that ``keys`` lacks, and never goes on to
    something older; content that was altered, moved or put there plain is damage like any other.
    """

    def __init__(self, inner: Storage, keys: KeyRing) -> None:
        require_library()
        self.inner = inner
        self.compression = inner.compression  # packed above this store, so before it is encrypted
        self.keys = keys
        self._sealer = Sealer(keys)
        records = _some_runs(inner)
        documents = [] if records else _some_documents(inner)
        if _appearance(records, documents) in ("plain", "mixed"):
            raise NotEncrypted(
                f"The store {inner.url} has runs that are not encrypted. Open it without keys; or encrypt it as a "
                "whole with `surefoot storage encrypt`, also when that was begun before and did not finish."
            )
        self._check_keys(records, documents)

    def _check_keys(self, records: Sequence[RunRecord], documents: Sequence[Run]) -> None:
        """Refuse keys that are of another store: what they encrypted here could not be read by those who have its own.

        One that can be read is enough: while keys are being changed, some have the newest and some not yet.
        """
        missing: KeyNotFound | None = None
        reads: list[Callable[[], object]] = [partial(self._sealer.open_record, record) for record in records]
        reads += [partial(self._sealer.open_document, document) for document in documents]
        for read in reads:
            try:
                read()
            except KeyNotFound as error:
                missing = error
            except CorruptData:
                continue  # said by whoever reads it; it tells nothing of the keys
            else:
                return
        if missing is not None:
            raise KeyNotFound(missing.key_id, f"These are not the keys of the store {self.inner.url}: {missing}")

    def __repr__(self) -> str:
        return f"EncryptedStorage({self.inner!r}, {self.keys!r})"

    @property
    def url(self) -> str:
        return self.inner.url

    def close(self) -> None:
        self.closed = True
        self.inner.close()

    def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
        return self.inner.wait_for_work(timeout, stop)

    def get_stats(self) -> dict[str, int | str]:
        return self.inner.get_stats()

    # --- keys ---------------------------------------------------------------------------------------------------

    def count_keys(self) -> Counter[str]:
        """How many contents are encrypted with each key, read from end to end. Plain ones count under ``""``."""
        return count_keys(self.inner)

    def rotate_keys(self, on_progress: OnProgress | None = None) -> Rotated:
        """Encrypt everything that an older key encrypts with the newest one. Runs may go on meanwhile.

        May be stopped at any moment and called again. Raises ``KeyNotFound``.
        """
        return rotate(self.inner, self._sealer, on_progress)

    # --- runs ---------------------------------------------------------------------------------------------------

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        check_new_run(new, owner)
        self._check_definition(new.fingerprint)
        return self._sealer.open_record(self.inner.open_run(self._sealer.seal_new(new), owner, lease_seconds))

    def _check_definition(self, fingerprint: str) -> None:
        """A definition that is there is not written again, so it must be one that can be read: with the right keys."""
        try:
            self.definition(fingerprint)
        except CorruptData as error:
            logger.warning("A run is started whose stored definition cannot be read: %s", error)

    def find_run(self, run_id: str) -> RunRecord | None:
        found = self.inner.find_run(run_id)
        return None if found is None else self._sealer.open_record(found)

    def claim_run(
        self,
        run_id: str,
        owner: str,
        lease_seconds: float,
        is_alive: IsAlive | None = None,
        sequence: int | None = None,
    ) -> RunRecord:
        check_id(owner, "owner", MAX_KEY)
        self.find_run(run_id)  # what cannot be read is not claimed
        return self._sealer.open_record(self.inner.claim_run(run_id, owner, lease_seconds, is_alive, sequence))

    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        self.inner.renew_lease(run_id, token, lease_seconds)

    def renew_leases(
        self, leases: Sequence[tuple[str, int]], lease_seconds: float
    ) -> Sequence[RunError | StorageError | None]:
        return self.inner.renew_leases(leases, lease_seconds)

    def release_lease(self, run_id: str, token: int) -> None:
        self.inner.release_lease(run_id, token)

    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        found: list[RunRecord] = []
        while True:
            page = self.inner.list_runs(states, limit=limit - len(found), before=before)
            found += self._readable(page)
            if len(found) >= limit or not page:
                return found
            before = page[-1]  # some were damaged: only a page without any says that there are no more

    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        return self._readable(self.inner.find_runs(prefix, limit))

    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        return self._paged(limit, lambda room, last: self.inner.list_due(now, room, last), after)

    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        return self._paged(limit, lambda room, last: self.inner.list_messaged(room, last.run_id if last else after))

    def _paged(
        self, limit: int, read: Callable[[int, RunRecord | None], list[RunRecord]], after: RunRecord | None = None
    ) -> list[RunRecord]:
        """Readable ones of pages that ``read`` gives for a size and the last run of the page before. Damaged ones are
        passed over, and only a short page of the store below says that there are no more."""
        found: list[RunRecord] = []
        while len(found) < limit:
            room = limit - len(found)
            page = read(room, after)
            found += self._readable(page)
            if len(page) < room:
                break
            after = page[-1]
        return found

    def _readable(self, records: Sequence[RunRecord]) -> list[RunRecord]:
        found = []
        for record in records:
            try:
                found.append(self._sealer.open_record(record))
            except CorruptData as error:
                logger.warning("Listing runs: %s", error)
        return found

    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        return self.inner.delete_run(run_id, force=force)

    # --- messages, journal --------------------------------------------------------------------------------------

    def send(self, run_id: str, name: str, body: bytes) -> None:
        check_id(run_id)
        check_id(name, "message name", MAX_KEY)
        check_value(body, f"Message {name!r}")
        self.inner.send(run_id, name, self._sealer.seal(Place("message", run_id, 0, name), bytes(body)))

    def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
        found = []
        for message in self.inner.read_messages(run_id, on_damage):
            with _telling(on_damage, run_id, None, f"message {message.name!r}"):
                body = self._sealer.open(Place("message", run_id, 0, message.name), message.body)
                found.append(replace(message, body=body))
        return found

    def count_messages(self, run_ids: Sequence[str]) -> dict[str, int]:
        return self.inner.count_messages(run_ids)

    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        found = []
        for row in self.inner.read_journal(run_id, step, on_damage):
            with _telling(on_damage, run_id, None, f"journal row {row.step!r}/{row.number!r}", (row.step, row.number)):
                record = self._sealer.open(Place("journal", run_id, row.number, row.step), row.record)
                found.append(replace(row, record=record))
        return found

    # --- forks --------------------------------------------------------------------------------------------------

    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        check_fork(run_id, sequence, first)
        check_value(header, "The header")
        source = self.inner.find_run(run_id)
        if source is None:
            raise RunNotFound(run_id)
        target = replace(source, run_id=first.run_id, parent_run_id=None)

        def move(place: Place, data: bytes) -> bytes:
            """What is bound to the other run becomes bound to the new one."""
            if place.op == "delete" and not data:
                return data
            plain = self._sealer.open(place, data)
            plain = plain if rewrite is None else rewrite(place, plain)
            return self._sealer.seal(place._replace(run_id=first.run_id), plain)

        sealed = self._sealer.seal(header_place(target), header)
        made = self.inner.fork_run(run_id, sequence, sealed, self._sealer.seal_commit(first), move)
        return self._sealer.open_record(made)

    # --- commits ------------------------------------------------------------------------------------------------

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        # What no store takes is not encrypted either: ids that are none, values that are too large.
        refused = [refusal(one) if isinstance(one, Commit) else journal_refusal(one) for one in commits]
        sealed: list[Write] = [
            self._sealer.seal_commit(one) if isinstance(one, Commit) else self._sealer.seal_journal(one)
            for one, problem in zip(commits, refused, strict=True)
            if problem is None
        ]
        outcomes = iter(self.inner.commit(sealed)) if sealed or not commits else iter(())
        return [problem if problem is not None else next(outcomes) for problem in refused]

    def definition(self, fingerprint: str) -> bytes | None:
        found = self.inner.definition(fingerprint)
        return None if found is None else self._sealer.open(Place("definition", "", 0, fingerprint), found)

    def read_log(self, run_id: str, after: int = 0, on_damage: Callable[[Damage], None] | None = None) -> list[LogRow]:
        rows = []
        for row in self.inner.read_log(run_id, after, on_damage):
            with _telling(on_damage, run_id, row.sequence, f"log row {row.sequence}"):
                record = self._sealer.open(Place("record", run_id, row.sequence), row.record)
                log = row.log if row.log is None else self._sealer.open(Place("log", run_id, row.sequence), row.log)
                rows.append(LogRow(row.sequence, record, log))
        return rows

    def read_checkpoint_rows(
        self, run_id: str, on_damage: Callable[[Damage], None] | None = None, limit: int | None = None
    ) -> Iterator[CheckpointRow]:
        for row in self.inner.read_checkpoint_rows(run_id, on_damage, limit):
            made: CheckpointRow | None = None
            with _telling(on_damage, run_id, row.sequence, f"checkpoint {row.checkpoint_id}"):
                made = self._open_row(run_id, row)
            if made is not None:
                yield made

    def find_checkpoint_row(self, run_id: str, checkpoint_id: str) -> CheckpointRow | None:
        found = self.inner.find_checkpoint_row(run_id, checkpoint_id)
        return None if found is None else self._open_row(run_id, found)

    def _open_row(self, run_id: str, row: CheckpointRow) -> CheckpointRow:
        place = Place("checkpoint", run_id, row.sequence, row.checkpoint_id)
        return replace(row, body=self._sealer.open(place, row.body))

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        return [chunk for _, chunk in self.read_placed_chunks(run_id, sequence)]

    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        placed = self.inner.read_placed_chunks(run_id, sequence)
        return [(at, self._sealer.open_chunk(run_id, at, chunk)) for at, chunk in placed]

    def prune(self, run_id: str, retention: Retention) -> int:
        if retention.keep is not None:
            needed = newest_readable(self, run_id)
            if needed is not None:
                # The store below cannot tell which checkpoints decrypt: it is told how many to keep for that.
                sequences = [row.sequence for row in self.inner.read_checkpoint_rows(run_id)]
                kept = sum(sequence >= needed for sequence in sequences)
                retention = Retention(max(retention.keep, kept))
        return self.inner.prune(run_id, retention)

    def rewind(self, run_id: str, token: int, sequence: int) -> int:
        refuse_pinned(self, check_id(run_id), sequence)
        return self.inner.rewind(run_id, token, sequence)

    def delete_checkpoints(self, run_id: str, *, force: bool = False) -> int:
        return self.inner.delete_checkpoints(run_id, force=force)

    def verify(self, run_id: str | None = None) -> VerifyReport:
        below = self.inner.verify(run_id)  # rows, files and their checksums, without what they say
        if run_id is not None:
            return verify_run(self, [check_id(run_id)], below.damage)
        run_ids: list[str] = []
        before: RunRecord | None = None
        while page := self.inner.list_runs(limit=500, before=before):
            run_ids += [record.run_id for record in page]
            before = page[-1]
        return verify_run(self, run_ids[::-1], below.damage, self.list_all_runs())

    # --- pins and sweeps: by what is plain ---------------------------------------------------------------------

    def pin(self, run_id: str, checkpoint_id: str | None = None, note: str = "") -> Pin:
        """See ``KeepsRuns``. The note is stored as it is given: not encrypted."""
        return self.inner.pin(run_id, checkpoint_id, note)

    def unpin(self, run_id: str, checkpoint_id: str | None = None) -> bool:
        return self.inner.unpin(run_id, checkpoint_id)

    def list_pins(self, run_ids: Sequence[str] | None = None) -> list[Pin]:
        return self.inner.list_pins(run_ids)

    def usage(self) -> StoreUsage:
        return self.inner.usage()

    def list_ended(
        self, states: Sequence[RunState], limit: int = 100, after: RunRecord | None = None
    ) -> list[RunRecord]:
        return self._paged(limit, lambda room, last: self.inner.list_ended(states, room, last), after)

    def nth_newest_ended(self, states: Sequence[RunState], count: int) -> RunRecord | None:
        found = self.inner.nth_newest_ended(states, count)
        return None if found is None else self._sealer.open_record(found)

    def list_aged(self, before: float, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        return self._paged(limit, lambda room, last: self.inner.list_aged(before, room, last), after)

    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        return self.inner.retire_runs(runs, states, seconds, dry_run=dry_run)

    def purge(self, seconds: float = 0.004) -> bool:
        return self.inner.purge(seconds)

    def prune_older(self, run_id: str, before: float, limit: int = 50, *, dry_run: bool = False) -> int:
        check_id(run_id)
        if not self.inner.prune_older(run_id, before, dry_run=True):
            return 0
        if newest_readable(self, run_id) != newest_readable(self.inner, run_id):
            # The store below cannot tell which checkpoints decrypt: with newer ones damaged, the old ones stay.
            return 0
        return self.inner.prune_older(run_id, before, limit, dry_run=dry_run)

    def shrink(self, seconds: float = 0.004) -> int:
        return self.inner.shrink(seconds)

    def compact(self) -> int:
        return self.inner.compact()

    # --- strays -------------------------------------------------------------------------------------------------

    def find_strays(self) -> list[Stray]:
        return self.inner.find_strays()

    def remove_stray(self, stray: Stray) -> bool:
        return self.inner.remove_stray(stray)

    # --- contents -----------------------------------------------------------------------------------------------

    def read_contents(
        self, run_id: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> Iterator[Content]:
        """As stored: encrypted."""
        return self.inner.read_contents(run_id, on_damage)

    def replace_contents(self, changes: Sequence[tuple[Content, bytes]]) -> int:
        """As given: encrypted already."""
        return self.inner.replace_contents(changes)

    # --- run documents ------------------------------------------------------------------------------------------

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        self.inner.save_run(self._sealer.seal_document(run), token)

    def load_run(self, run_id: str) -> Run | None:
        found = self.inner.load_run(run_id)
        return None if found is None else self._sealer.open_document(found)

    def list_all_runs(self) -> list[str]:
        return self.inner.list_all_runs()

    def list_all_goals(self) -> list[str]:
        return self.inner.list_all_goals()

    def get_runs_by_goal(self, goal_id: str) -> list[str]:
        return self.inner.get_runs_by_goal(goal_id)

    def get_runs_by_status(self, status: str | RunStatus) -> list[str]:
        return self.inner.get_runs_by_status(status)

    def get_runs_by_node(self, node_id: str) -> list[str]:
        return self.inner.get_runs_by_node(node_id)


class _telling:
    """Tells ``CorruptData`` inside its block to ``on_damage``, and goes on."""

    def __init__(
        self,
        on_damage: Callable[[Damage], None] | None,
        run_id: str,
        sequence: int | None,
        where: str,
        row: tuple[str, int] | None = None,
    ) -> None:
        self._tell, self._what, self._row = on_damage, (run_id, sequence, where), row or (None, None)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, CorruptData):
            return False
        if self._tell is not None:
            self._tell(Damage(*self._what, str(error), *self._row))
        return True


def appearance(storage: Storage) -> str:
    """Whether the runs of a store, or the documents of one without runs, are ``plain``, ``encrypted`` or ``mixed``, by
    some of them; ``empty`` without any.

    Needs no key. ``mixed`` is what an unfinished encryption of a store leaves.
    """
    records = _some_runs(storage)
    return _appearance(records, [] if records else _some_documents(storage))


def _some_runs(storage: Storage) -> list[RunRecord]:
    return [*storage.list_runs(limit=_LOOKED_AT), *storage.find_runs("", _LOOKED_AT)]


def _some_documents(storage: Storage) -> list[Run]:
    found = []
    ids = storage.list_all_runs()
    for run_id in dict.fromkeys((*ids[:_LOOKED_AT], *ids[-_LOOKED_AT:])):
        try:
            document = storage.load_run(run_id)
        except CorruptData:
            continue
        if document is not None:
            found.append(document)
    return found


def _appearance(records: Sequence[RunRecord], documents: Sequence[Run]) -> str:
    sealed = [is_sealed(record.header) for record in records] + [is_sealed_document(each) for each in documents]
    if not sealed:
        return "empty"
    return "encrypted" if all(sealed) else "mixed" if any(sealed) else "plain"
