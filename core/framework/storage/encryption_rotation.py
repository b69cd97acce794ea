"""Every content of a store encrypted anew with the newest key: when keys change, or a plain store becomes encrypted.

Content by content: read, decrypted, encrypted, and put back if it still is what was read. Nothing else of a run
changes, so whoever holds it goes on, and a stop at any moment leaves a store that reads as before. Calling it again
goes on: what has the newest key is left alone.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from framework.errors import CorruptData, StorageError
from framework.schemas.run import Run, RunState
from framework.storage.documents import document_bytes, parse_document
from framework.storage.encryption_keys import KeyRing, require_library
from framework.storage.encryption_seal import (
    Sealer,
    definition_place,
    header_place,
    in_words,
    key_of,
)
from framework.storage.interface import Storage
from framework.storage.ownership import is_alive
from framework.storage.records import Content, Damage, RunRecord
from framework.storage.sealed import DOCUMENT_KEY, ERROR_PREFIX, is_sealed_document, is_sealed_error

_BATCH_CONTENTS = 100
_BATCH_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rotation is: runs read of all that there were at its start, and contents encrypted anew so far."""

    runs_done: int
    runs: int
    replaced: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Rotated:
    """What a rotation did. ``damage`` is what could not be read, and keeps the key it has."""

    runs: int
    replaced: int
    damage: tuple[Damage, ...]


def rotate(
    storage: Storage, sealer: Sealer, on_progress: OnProgress | None = None, *, from_plain: bool = False
) -> Rotated:
    """Encrypt with the sealer's newest key what another key encrypts, and with ``from_plain`` what none does.

    ``storage`` is the store below. ``from_plain`` is for stores that nobody uses meanwhile: it raises ``StorageError``
    while a run is held. Raises ``KeyNotFound`` at content whose key the ring lacks; what was done before that stays.
    """
    if from_plain:
        _refuse_held(storage)
    damage: list[Damage] = []
    batch = _Batch(storage)
    for content in storage.read_contents(None, damage.append):
        _turn(sealer, content, None, from_plain, batch, damage)
    batch.flush()
    run_ids = _ids(storage)
    for done, run_id in enumerate(run_ids):
        if on_progress is not None:
            on_progress(Progress(done, len(run_ids), batch.replaced))
        record = _record(storage, run_id, damage)
        for content in storage.read_contents(run_id, damage.append):
            if record is None and content.place.kind == "header":
                record = _record(storage, run_id, damage)
            _turn(sealer, content, record, from_plain, batch, damage)
        batch.flush()
    if on_progress is not None:
        on_progress(Progress(len(run_ids), len(run_ids), batch.replaced))
    return Rotated(len(run_ids), batch.replaced, tuple(dict.fromkeys(damage)))


def encrypt_plain(storage: Storage, keys: KeyRing, on_progress: OnProgress | None = None) -> Rotated:
    """Encrypt a plain store as a whole, or the rest of one whose encryption was stopped, while nothing uses it.

    Raises ``StorageError`` while a run is held. What SQLite and file systems keep of files that were overwritten may
    still be on the disk afterwards.
    """
    require_library()
    return rotate(storage, Sealer(keys), on_progress, from_plain=True)


def count_keys(storage: Storage, on_damage: Callable[[Damage], None] | None = None) -> Counter[str]:
    """How many contents of the store below are encrypted with each key; plain ones count under ``""``."""
    counts: Counter[str] = Counter()
    for run_id in (None, *_ids(storage)):
        for content in storage.read_contents(run_id, on_damage):
            data = _bytes_in(content)
            if data is not None:
                counts[key_of(data) or ""] += 1
    return counts


class _Batch:
    """Changes on their way to the store, a transaction for some of them."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._changes: list[tuple[Content, bytes]] = []
        self._bytes = 0
        self.replaced = 0

    def add(self, content: Content, data: bytes) -> None:
        self._changes.append((content, data))
        self._bytes += len(data)
        if len(self._changes) >= _BATCH_CONTENTS or self._bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._changes:
            self.replaced += self._storage.replace_contents(self._changes)
            self._changes, self._bytes = [], 0


def _turn(
    sealer: Sealer, content: Content, run: RunRecord | None, from_plain: bool, batch: _Batch, damage: list[Damage]
) -> None:
    """Put the content, encrypted anew if need be, into the batch."""
    try:
        data = _bytes_in(content)
        if data is None:
            return
        key_id = key_of(data)
        if key_id == sealer.keys.newest:
            return
        if key_id is None and not from_plain:
            sealer.open(content.place, data)  # raises: plain content is refused, here as elsewhere
        changed = _anew(sealer, content, data, run, plain=key_id is None)
    except CorruptData as error:
        place = content.place
        damage.append(Damage(place.run_id, place.sequence or None, in_words(place), str(error)))
        return
    if changed is not None:
        batch.add(content, changed)


def _anew(sealer: Sealer, content: Content, data: bytes, run: RunRecord | None, *, plain: bool) -> bytes | None:
    """The bytes to store in place of a content's; ``None`` when its run went meanwhile."""
    place = content.place
    if place.kind == "document":
        document = _document(content)
        return document_bytes(sealer.seal_document(document if plain else sealer.open_document(document)))
    if place.kind == "error":
        text = content.data.decode()
        return (
            sealer.seal_error(place.run_id, text if plain else sealer.open_error(place.run_id, text)) or ""
        ).encode()
    if place.kind == "header":
        if run is None:
            return None
        place = header_place(run)
    elif place.kind == "definition":
        place = definition_place(place.key)
    return sealer.seal(place, data if plain else sealer.open(place, data))


def _bytes_in(content: Content) -> bytes | None:
    """The bytes that are encrypted, or would be; ``None`` where there is nothing to hide. Raises ``CorruptData``."""
    place, data = content.place, content.data
    sealed = None
    if place.kind == "error" and is_sealed_error(text := data.decode()):
        sealed = text.removeprefix(ERROR_PREFIX)
    elif place.kind == "document" and is_sealed_document(document := _document(content)):
        sealed = document.input_data[DOCUMENT_KEY]
    elif place.op == "delete" and not data:
        return None
    if sealed is None:
        return data
    try:
        return base64.b64decode(sealed, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise CorruptData(f"{in_words(place)} is not readable.") from None


def _document(content: Content) -> Run:
    return parse_document(content.data, content.place.run_id, in_words(content.place))


def _record(storage: Storage, run_id: str, damage: list[Damage]) -> RunRecord | None:
    try:
        return storage.find_run(run_id)
    except CorruptData as error:
        damage.append(Damage(run_id, None, f"run {run_id}", str(error)))
        return None


def _ids(storage: Storage) -> list[str]:
    """Every run and document, the oldest run first: an unfinished encryption of a plain store shows at the newest."""
    ids: list[str] = []
    before: RunRecord | None = None
    while page := storage.list_runs(limit=500, before=before):
        ids += [record.run_id for record in page]
        before = page[-1]
    return list(dict.fromkeys([*ids[::-1], *storage.list_all_runs()]))


def _refuse_held(storage: Storage) -> None:
    running = storage.list_runs([RunState.RUNNING], limit=1_000)
    held = [record for record in running if record.owner is None or is_alive(record.owner) is not False]
    if held:
        raise StorageError(
            f"Run {held[0].run_id!r} is running (owner {held[0].owner}), and would go on writing without encryption. A "
            "store is encrypted while nothing uses it: let its runs finish or stop them, and call again."
        )
