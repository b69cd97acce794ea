"""The storage interface, ``FileStorage``, and ``open_storage``: what the rest of the framework sees of storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from framework.errors import KeyNotFound, StorageError
from framework.storage.files import FileStorage
from framework.storage.interface import Storage
from framework.storage.sealed import NO_KEYS, is_sealed

if TYPE_CHECKING:
    from framework.storage.compression import Compression
    from framework.storage.encryption_keys import KeyRing

__all__ = ["FileStorage", "Storage", "open_storage"]

_SCHEMES = "sqlite:///runs.db, file:///folder, postgresql://host/database, memory://"


def open_storage(url: str, keys: KeyRing | None = None) -> Storage:
    """The store at ``url``, made when missing; with ``keys``, one whose content is encrypted (``EncryptedStorage``).

    ``sqlite:///runs.db`` is relative to the working directory, ``sqlite:////var/lib/runs.db`` absolute; ``file:///dir``
    is always absolute and ``file:dir`` relative; ``postgresql://user:password@host/database?schema=name`` is described
    at ``PostgresStorage``; ``memory://`` is new at every call. ``sqlite:///runs.db?compression=zstd`` stores large
    values compressed from now on; any store reads them. Raises ``StorageError`` for a URL it does not know and for a
    store that cannot be opened, ``KeyNotFound`` for an encrypted store without ``keys``, ``NotEncrypted`` for a plain
    one with them. Keys in the environment count for the command line and ``AgentRunner`` only:
    ``open_storage(url, keys=KeyRing.from_environment())``.
    """
    storage = open_plain(url)
    try:
        if keys is not None:
            from framework.storage.encryption import EncryptedStorage  # noqa: PLC0415 - needs an optional library

            return EncryptedStorage(storage, keys)
        _refuse_encrypted(storage)
    except BaseException:
        storage.close()
        raise
    return storage


def _refuse_encrypted(storage: Storage) -> None:
    """Raise ``KeyNotFound`` for a store whose runs are encrypted, by one of them."""
    if isinstance(storage, FileStorage):
        header = storage.sample_header()
    else:
        first = storage.find_runs("", 1)
        header = first[0].header if first else None
    if is_sealed(header):
        raise KeyNotFound(None, f"The store {storage.url} cannot be opened: {NO_KEYS}.")


def open_plain(url: str) -> Storage:
    """The store at ``url`` as it is stored, encrypted or not: for what keeps stores. Raises as ``open_storage``."""
    if url.startswith(("postgresql:", "postgres:")):
        from framework.storage.postgres import PostgresStorage  # noqa: PLC0415 - a driver is imported when it is used

        return PostgresStorage(url)
    parts = urlsplit(url)
    path = unquote(parts.path)
    compression = _compression(url, parts.query) if parts.scheme == "sqlite" and not parts.fragment else None
    if (parts.query or parts.fragment) and compression is None:
        raise StorageError(
            f"Storage URL {_shown(url)!r}: options after ? or # are not known, but for ?compression=zstd of sqlite. "
            f"Use one of: {_SCHEMES}."
        )
    if parts.scheme in ("sqlite", "file") and parts.netloc:
        raise StorageError(
            f"Storage URL {url!r} names a host ({parts.netloc}); write three slashes: {parts.scheme}:///{parts.netloc}{path}"
        )
    if parts.scheme == "sqlite" and len(path) > 1:
        from framework.storage.sqlite import SQLiteStorage  # noqa: PLC0415 - a driver is imported when it is used

        return SQLiteStorage(Path(path[1:] if path.startswith("/") else path), compression=compression)
    if parts.scheme == "file" and path:
        return FileStorage(Path(path))
    if parts.scheme == "memory" and not path:
        from framework.storage.memory import MemoryStorage  # noqa: PLC0415 - a driver is imported when it is used

        return MemoryStorage()
    raise StorageError(f"Storage URL {_shown(url)!r} is not one this library opens. Use one of: {_SCHEMES}.")


def _shown(url: str) -> str:
    """``url`` as an error may quote it: a URL of some database may hold a password."""
    from framework.storage.postgres_address import without_password  # noqa: PLC0415 - for errors only

    return without_password(url)


def _compression(url: str, query: str) -> Compression | None:
    """The ``compression`` that a URL's query asks for; ``None`` for a query that is, or also has, anything else."""
    options = parse_qsl(query, keep_blank_values=True)
    if [name for name, _ in options] != ["compression"]:
        return None
    if options[0][1] != "zstd":
        raise StorageError(
            f"Storage URL {_shown(url)!r}: compression {options[0][1]!r} is not known; write compression=zstd."
        )
    return "zstd"
