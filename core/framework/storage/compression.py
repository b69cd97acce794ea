"""Large chunks, compressed on their way to the store and back: Zstandard, for stores that were opened with it.

Chunks are compressed above the store, so a store that encrypts gets what is compressed already (what is encrypted does
not compress). A compressed one needs no mark of its own: it begins with the four bytes of Zstandard's frame (RFC 8878),
of which the first two are not UTF-8, and what the codec writes always is. The digest of a state is that of its
uncompressed chunks; the checksum of a row is that of what is stored. See docs/adr/0016.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from framework.errors import CorruptData, StorageError
from framework.storage.checks import MAX_VALUE_BYTES
from framework.storage.chunks import Chunk
from framework.storage.records import Commit, NewRun, Write

if TYPE_CHECKING:
    from framework.storage.interface import Storage

Compression: TypeAlias = Literal["zstd"]

MIN_BYTES = 4096
"""Smaller chunks are stored as they are: there is little to gain, and each would pay for a context of its own."""

MIN_GAIN = 0.1
"""A chunk is stored compressed when that saves at least this part of it."""

LEVEL = 3

_FRAME: Final = b"\x28\xb5\x2f\xfd"


def check_compression(compression: object) -> Compression | None:
    """``compression`` if it is one that is known and can be used here. Raises ``StorageError``."""
    if compression is None:
        return None
    if compression != "zstd":
        raise StorageError(f"Unknown compression {compression!r}; give 'zstd' or None.")
    _zstandard("compress chunks with zstd")
    return "zstd"


def _zstandard(doing: str) -> Any:
    try:
        import zstandard
    except ImportError:
        raise StorageError(
            f"Cannot {doing}: the package zstandard is not installed. Install it with: pip install 'surefoot[zstd]'"
        ) from None
    return zstandard


def pack(chunk: Chunk) -> Chunk:
    """``chunk`` compressed, or itself when it is small, or hardly shrinks."""
    size = len(chunk.data)
    if not MIN_BYTES <= size <= MAX_VALUE_BYTES:  # one that is too large is refused by the store, as it is
        return chunk
    packed: bytes = _zstandard("compress a chunk").ZstdCompressor(level=LEVEL).compress(chunk.data)
    return Chunk(chunk.key, chunk.op, packed) if len(packed) <= size * (1 - MIN_GAIN) else chunk


def unpack(chunk: Chunk) -> Chunk:
    """The chunk that ``pack`` was given. Raises ``CorruptData``, and ``StorageError`` when the library is missing."""
    if chunk.data[:4] != _FRAME:
        return chunk
    zstandard = _zstandard(f"read the value of key {chunk.key!r}, which is stored compressed")
    try:
        size = zstandard.frame_content_size(chunk.data)
        if not 0 <= size <= MAX_VALUE_BYTES:
            raise CorruptData(f"A compressed chunk of key {chunk.key!r} says that it holds {size} bytes.")
        data: bytes = zstandard.ZstdDecompressor().decompress(chunk.data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CorruptData(f"A compressed chunk of key {chunk.key!r} cannot be read: {error}.") from None
    return Chunk(chunk.key, chunk.op, data)


def unpack_all(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Every chunk as ``unpack`` gives it."""
    return [unpack(chunk) if chunk.data[:4] == _FRAME else chunk for chunk in chunks]


def pack_all(storage: Storage, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """The chunks as ``storage`` is to be given them."""
    if storage.compression is None or not any(len(chunk.data) >= MIN_BYTES for chunk in chunks):
        return chunks
    return [pack(chunk) for chunk in chunks]


def pack_run(storage: Storage, new: NewRun) -> NewRun:
    """A new run as ``storage`` is to be given it."""
    chunks = pack_all(storage, new.chunks)
    return new if chunks is new.chunks else replace(new, chunks=chunks)


def pack_writes(storage: Storage, writes: Iterable[Write]) -> list[Write]:
    """Commits and journal writes as ``storage`` is to be given them."""
    if storage.compression is None:
        return list(writes)
    made: list[Write] = []
    for write in writes:
        if not isinstance(write, Commit):
            made.append(write)
            continue
        chunks = pack_all(storage, write.chunks)
        made.append(write if chunks is write.chunks else replace(write, chunks=chunks))
    return made
