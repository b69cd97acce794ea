"""Encrypted contents: their form, what each is bound to, and how one is told from damage and from a missing key.

A content is encrypted with AES-256-GCM (NIST SP 800-38D): a byte for the version of the form, the id of the key (one
byte for its length), four bytes that tell the key from another of the same id, a nonce of 96 random bits, and the
ciphertext with its tag of 128 bits. Everything before the nonce and the content's place are authenticated with it.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import replace
from typing import TypeVar

import orjson

from framework.errors import CorruptData, KeyNotFound
from framework.schemas.run import Run, RunMetrics
from framework.storage.checks import printable
from framework.storage.chunks import Chunk
from framework.storage.documents import document_bytes, nodes_of, parse_document
from framework.storage.encryption_keys import CHECK_BYTES, KeyRing
from framework.storage.records import Commit, JournalWrite, NewRun, Place, RunRecord
from framework.storage.sealed import DOCUMENT_KEY, ERROR_PREFIX, VERSION_1, is_sealed, is_sealed_document

_NONCE_BYTES, _TAG_BYTES = 12, 16
_CONTEXT = b"surefoot content 1"

Facts = TypeVar("Facts", NewRun, RunRecord)


class Sealer:
    """Encrypts contents for their places with the newest key of a ring, and decrypts them with any."""

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys
        self._prefix = _prefix(keys, keys.newest)

    # --- bytes --------------------------------------------------------------------------------------------------

    def seal(self, place: Place, data: bytes) -> bytes:
        """``data`` encrypted for ``place``."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self.keys.cipher(self.keys.newest, place.run_id).encrypt(nonce, data, _bound(self._prefix, place))
        return self._prefix + nonce + sealed

    def open(self, place: Place, data: bytes) -> bytes:
        """What was encrypted for ``place``. Raises ``CorruptData``, ``KeyNotFound``."""
        where = in_words(place)
        key_id, prefix, check = _read_prefix(data, where)
        if key_id not in self.keys:
            raise KeyNotFound(
                key_id,
                f"{where} is encrypted with key {key_id!r}, which the key ring lacks; it has "
                f"{', '.join(self.keys.ids)}. Add that key, before the newest; nothing was passed over.",
            )
        if check != self.keys.check_of(key_id):
            raise KeyNotFound(
                key_id,
                f"{where} is encrypted with another key than the one that the key ring has as {key_id!r}. Give the "
                "right key under this id; nothing was passed over.",
            )
        from cryptography.exceptions import InvalidTag

        body = len(prefix) + _NONCE_BYTES
        try:
            return self.keys.cipher(key_id, place.run_id).decrypt(
                data[len(prefix) : body], data[body:], _bound(prefix, place)
            )
        except InvalidTag:
            raise CorruptData(f"{where} does not decrypt: it was altered, or is not in its place.") from None

    # --- parts of runs ------------------------------------------------------------------------------------------

    def seal_chunk(self, run_id: str, sequence: int, chunk: Chunk) -> Chunk:
        """A chunk to store. One that deletes has nothing to hide."""
        if chunk.op == "delete" and not chunk.data:
            return chunk
        return chunk._replace(data=self.seal(chunk_place(run_id, sequence, chunk), chunk.data))

    def open_chunk(self, run_id: str, sequence: int, chunk: Chunk) -> Chunk:
        """A stored chunk as it was. Raises ``CorruptData``, ``KeyNotFound``."""
        if chunk.op == "delete" and not chunk.data:
            return chunk
        return chunk._replace(data=self.open(chunk_place(run_id, sequence, chunk), chunk.data))

    def seal_error(self, run_id: str, error: str | None) -> str | None:
        """A run's error to store."""
        if error is None:
            return None
        text = (printable(error) or "").encode()
        return ERROR_PREFIX + base64.b64encode(self.seal(Place("error", run_id), text)).decode("ascii")

    def open_error(self, run_id: str, error: str | None) -> str | None:
        """A run's stored error as it was. Raises ``CorruptData``, ``KeyNotFound``."""
        if error is None:
            return None
        place = Place("error", run_id)
        try:
            sealed = base64.b64decode(error.removeprefix(ERROR_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        return self.open(place, sealed if error.startswith(ERROR_PREFIX) else error.encode()).decode()

    def seal_new(self, new: NewRun) -> NewRun:
        """A new run to store."""
        return replace(
            new,
            definition=self.seal(definition_place(new.fingerprint), new.definition),
            header=self.seal(header_place(new), new.header),
            chunks=[self.seal_chunk(new.run_id, 0, chunk) for chunk in new.chunks],
        )

    def seal_commit(self, commit: Commit) -> Commit:
        """A commit to store."""
        run_id, sequence = commit.run_id, commit.sequence
        checkpoint = commit.checkpoint
        if commit.checkpoint_id is not None and checkpoint is not None:
            checkpoint = self.seal(Place("checkpoint", run_id, sequence, commit.checkpoint_id), checkpoint)
        return replace(
            commit,
            record=self.seal(Place("record", run_id, sequence), commit.record),
            log=None if commit.log is None else self.seal(Place("log", run_id, sequence), commit.log),
            checkpoint=checkpoint,
            chunks=[self.seal_chunk(run_id, sequence, chunk) for chunk in commit.chunks],
            error=self.seal_error(run_id, commit.error),
        )

    def seal_journal(self, write: JournalWrite) -> JournalWrite:
        """Journal rows to store."""
        places = [Place("journal", write.run_id, row.number, row.step) for row in write.rows]
        rows = [
            replace(row, record=self.seal(place, row.record)) for place, row in zip(places, write.rows, strict=True)
        ]
        return replace(write, rows=rows)

    def open_record(self, record: RunRecord) -> RunRecord:
        """A run's record as it was. Raises ``CorruptData``, ``KeyNotFound``."""
        header = self.open(header_place(record), record.header)
        return replace(record, header=header, error=self.open_error(record.run_id, record.error))

    # --- run documents ------------------------------------------------------------------------------------------

    def seal_document(self, run: Run) -> Run:
        """A ``Run`` document to store: what it is looked up by, its times, and the rest encrypted. Raises as
        ``document_bytes`` does."""
        whole = document_bytes(run)
        shell = Run(
            id=run.id,
            goal_id=run.goal_id,
            status=run.status,
            started_at=run.started_at,
            completed_at=run.completed_at,
            metrics=RunMetrics(nodes_executed=nodes_of(run)),
        )
        sealed = self.seal(document_place(shell), whole)
        shell.input_data = {DOCUMENT_KEY: base64.b64encode(sealed).decode("ascii")}
        return shell

    def open_document(self, shell: Run) -> Run:
        """A stored ``Run`` document as it was. Raises ``CorruptData``, ``KeyNotFound``."""
        place = document_place(shell)
        if not is_sealed_document(shell):
            raise CorruptData(_not_encrypted(in_words(place)))
        try:
            sealed = base64.b64decode(shell.input_data[DOCUMENT_KEY], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise CorruptData(f"{in_words(place)} is not readable.") from None
        return parse_document(self.open(place, sealed), shell.id, in_words(place))


def key_of(data: bytes) -> str | None:
    """The id of the key that bytes are encrypted with; ``None`` for plain bytes. Raises ``CorruptData``."""
    return _read_prefix(data, "A content")[0] if is_sealed(data) else None


def _prefix(keys: KeyRing, key_id: str) -> bytes:
    return bytes((VERSION_1, len(key_id))) + key_id.encode("ascii") + keys.check_of(key_id)


def _read_prefix(data: bytes, where: str) -> tuple[str, bytes, bytes]:
    """The id of the key, all before the nonce, and the bytes that check the key. Raises ``CorruptData``."""
    if not is_sealed(data):
        raise CorruptData(_not_encrypted(where))
    if data[0] != VERSION_1:
        raise CorruptData(f"{where} is encrypted in a form {data[0]:#x} that this library does not know.")
    end = 2 + (data[1] if len(data) > 1 else 0)
    start = end + CHECK_BYTES
    if len(data) < start + _NONCE_BYTES + _TAG_BYTES or not data[2:end].isascii():
        raise CorruptData(f"{where} is too short to be encrypted, or names no key: it was altered.")
    return data[2:end].decode("ascii"), data[:start], data[end:start]


def _not_encrypted(where: str) -> str:
    return f"{where} is not encrypted, in a store that is: it was put there past the encryption, and is refused."


def _bound(prefix: bytes, place: Place) -> bytes:
    """What is authenticated with a content: the form, the key and the place, each part with its length."""
    parts = (prefix, place.kind.encode(), place.run_id, str(place.sequence).encode(), place.key, place.op.encode())
    texts = [part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass") for part in parts]
    return _CONTEXT + b"".join(len(text).to_bytes(4, "big") + text for text in texts)


# --- places -----------------------------------------------------------------------------------------------------------


def chunk_place(run_id: str, sequence: int, chunk: Chunk) -> Place:
    return Place("chunk", run_id, sequence, chunk.key, chunk.op)


def definition_place(fingerprint: str) -> Place:
    return Place("definition", "", 0, fingerprint)


def header_place(run: Facts) -> Place:
    """A header is bound to what else is recorded of its run for good: its kind, goal, definition and parent."""
    facts = [run.executor_type, run.goal_id, run.fingerprint, run.parent_run_id]
    return Place("header", run.run_id, 0, orjson.dumps(facts).decode())


def document_place(run: Run) -> Place:
    """A document is bound to what it is looked up by: its goal, status and nodes."""
    return Place("document", run.id, 0, orjson.dumps([run.goal_id, run.status.value, *nodes_of(run)]).decode())


def in_words(place: Place) -> str:
    """A place as messages name it."""
    at = f"{place.kind} {place.sequence}"
    names = {
        "definition": f"The definition {place.key}",
        "header": "The header",
        "error": "The error",
        "record": f"The {at} in the log",
        "log": f"The {at}",
        "checkpoint": f"Checkpoint {place.key!r}",
        "chunk": f"The {at} of key {place.key!r}",
        "journal": f"The journal row {place.key!r}/{place.sequence}",
        "message": f"Message {place.key!r}",
        "document": "The document",
    }
    return names[place.kind] + (f" of run {place.run_id!r}" if place.run_id else "")
