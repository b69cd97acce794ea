"""The difference of two states, and how to put it back: pure functions over encoded values.

A state here is a mapping of key to the value's encoded bytes (see ``codec``). JSON makes growth visible in the
bytes themselves: a list that grew at its end starts with the old text less its closing bracket, a text likewise
less its closing quote. So the difference needs no second look at the values, and what is appended is exactly the
bytes that are new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

Op = Literal["set", "append", "delete"]

_LIST, _TEXT, _COMMA = ord("["), ord('"'), ord(",")
_ABSENT = bytes(8)
_EMPTY = blake2b(digest_size=8)


class Chunk(NamedTuple):
    """One write to one key of the state.

    ``data`` is the encoded value for ``set``; for ``append`` the encoded items joined by commas (a list) or the
    escaped characters (a text) that follow the old end; empty for ``delete``.
    """

    key: str
    op: Op
    data: bytes


def diff_value(key: str, old: bytes | None, new: bytes) -> Chunk | None:
    """The chunk that turns ``old`` (``None``: absent) into ``new``, or ``None`` when they are equal."""
    if old is None:
        return Chunk(key, "set", new)
    if old == new:
        return None
    first = new[0]
    grown = len(new) > len(old) and first == old[0] and first in (_LIST, _TEXT)
    if grown and new.startswith(memoryview(old)[:-1]):
        end = len(old) - 1
        if first == _TEXT:
            return Chunk(key, "append", new[end:-1])
        if len(old) == 2:  # the empty list: the new items have no comma before them
            return Chunk(key, "append", new[1:-1])
        if new[end] == _COMMA:
            return Chunk(key, "append", new[end + 1 : -1])
    return Chunk(key, "set", new)


def diff(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[Chunk]:
    """The chunks that turn state ``old`` into state ``new``, by key in the order of ``new``, deletions last."""
    chunks = [chunk for key, value in new.items() if (chunk := diff_value(key, old.get(key), value)) is not None]
    chunks.extend(Chunk(key, "delete", b"") for key in old if key not in new)
    return chunks


def join_appends(base: bytes, tails: list[bytes]) -> bytes:
    """The encoded value ``base`` (a list or a text) with ``tails`` appended in order.

    Raises ``ValueError`` when ``base`` is neither.
    """
    if not tails:
        return base
    if base[:1] == b'"':
        return b"".join((base[:-1], *tails, b'"'))
    if base[:1] == b"[":
        head = base[:-1]
        separator = b"," if len(base) > 2 else b""
        return b"".join((head, separator, b",".join(tails), b"]"))
    raise ValueError("an append chunk follows a value that is neither a list nor a text")


def apply(chunks: Iterable[Chunk], state: Mapping[str, bytes]) -> dict[str, bytes]:
    """``state`` after ``chunks``, given in the order they were made. ``apply(diff(a, b), a) == b``.

    Raises ``ValueError`` when an append has nothing to follow.
    """
    result = dict(state)
    pending: dict[str, list[bytes]] = {}

    def settle(key: str) -> None:
        tails = pending.pop(key, None)
        if tails:
            if key not in result:
                raise ValueError(f"an append chunk for key {key!r} has no value to follow")
            result[key] = join_appends(result[key], tails)

    for key, op, data in chunks:
        if op == "append":
            pending.setdefault(key, []).append(data)
        else:
            pending.pop(key, None)
            if op == "set":
                result[key] = data
            else:
                result.pop(key, None)
    for key in list(pending):
        settle(key)
    return result


def checksum(chunk: Chunk) -> bytes:
    """8 bytes that change when the chunk's key, operation or data does (BLAKE2b, RFC 7693)."""
    return chunk.sum if type(chunk) is SummedChunk else _checksum(chunk)


def _checksum(chunk: Chunk) -> bytes:
    hasher = _begun(chunk.op, chunk.key).copy()
    hasher.update(chunk.data)
    return hasher.digest()


@lru_cache(maxsize=256)
def _begun(op: str, key: str) -> blake2b:
    """A hasher that has read a chunk's operation and key, to be copied: most chunks are of few keys."""
    return blake2b(f"{op} {key}\x00".encode("utf-8", "surrogatepass"), digest_size=8)


class SummedChunk(Chunk):
    """A chunk that brings its checksum along, so that large values are hashed once on their way."""

    sum: bytes

    def _replace(self, **changes: Any) -> Chunk:  # type: ignore[override]
        """A chunk with other parts, and so with another checksum than this one's."""
        return Chunk(*self)._replace(**changes)


def checked(key: str, op: Op, data: bytes, sum: bytes) -> SummedChunk | None:
    """A chunk that was read, with its checksum; ``None`` when it does not match."""
    hasher = _begun(op, key).copy()
    hasher.update(data)
    if hasher.digest() != sum:
        return None
    chunk: SummedChunk = tuple.__new__(SummedChunk, (key, op, data))
    chunk.sum = sum
    return chunk


def summed(chunk: Chunk, known: bytes | None = None) -> SummedChunk:
    """``chunk`` with its checksum, which is ``known`` to whoever has verified it."""
    if type(chunk) is SummedChunk:
        return chunk
    made: SummedChunk = tuple.__new__(SummedChunk, chunk)
    made.sum = _checksum(chunk) if known is None else known
    return made


def chain(previous: int, chunk: Chunk) -> int:
    """The digest of a key's value after ``chunk``, from the digest before it (0: absent).

    A ``set`` starts the chain anew, so chunks that retention removed before it do not matter.
    """
    if chunk.op == "delete":
        return 0
    hasher = _EMPTY.copy()
    if chunk.op == "append":
        hasher.update(previous.to_bytes(8, "big"))
    hasher.update(checksum(chunk))
    return int.from_bytes(hasher.digest(), "big")


def chains_of(chunks: Iterable[Chunk]) -> dict[str, int]:
    """Each key's ``chain`` after ``chunks``, given in the order they were made; 0 for a key that they delete.

    A resume links the chunk of every step there was, so this spares each of them the calls and numbers of ``chain``.
    """
    linked: dict[str, bytes] = {}
    for chunk in chunks:
        key, op, _ = chunk
        if op == "delete":
            linked[key] = _ABSENT
            continue
        hasher = _EMPTY.copy()
        if op == "append":
            hasher.update(linked.get(key, _ABSENT))
        hasher.update(checksum(chunk))
        linked[key] = hasher.digest()
    return {key: int.from_bytes(digest, "big") for key, digest in linked.items()}


def state_digest(chains: Iterable[int]) -> int:
    """One number for a whole state: the exclusive or of its keys' chains, so a change costs only its own keys.

    Each chain covers its key's name, so equal values under two keys do not cancel out.
    """
    total = 0
    for value in chains:
        total ^= value
    return total


def unreachable(operations: Mapping[int, Op], after: int, upto: int) -> list[int]:
    """The sequences of one key's chunks that nothing reads once no checkpoint is retained between two.

    ``operations`` has the key's chunks by sequence. ``after`` and ``upto`` are retained checkpoints, or 0 for the
    initial state, next to each other. A chunk between them counts for ``upto`` and later only from the key's last
    ``set`` or ``delete`` on; and that delete itself only while there is an earlier value for it to hide.
    """
    base = max((at for at, op in operations.items() if op != "append" and after < at <= upto), default=None)
    if base is None:
        return []
    gone = sorted(at for at in operations if after < at < base)
    if operations[base] == "delete" and min(operations) > after:
        gone.append(base)
    return gone
