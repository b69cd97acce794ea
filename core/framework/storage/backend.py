"""The storage interface, ``FileStorage``, and ``open_storage``: what the rest of the framework sees of storage."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from framework.errors import StorageError
from framework.storage.files import FileStorage
from framework.storage.interface import Storage

__all__ = ["FileStorage", "Storage", "open_storage"]

_SCHEMES = "sqlite:///runs.db, file:///folder, memory://"


def open_storage(url: str) -> Storage:
    """The store at ``url``, made when missing.

    ``sqlite:///runs.db`` is relative to the working directory, ``sqlite:////var/lib/runs.db`` absolute; ``file:///dir``
    is always absolute and ``file:dir`` relative; ``memory://`` is new at every call. Raises ``StorageError`` for a URL
    it does not know and for a store that cannot be opened.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.query or parts.fragment:
        raise StorageError(f"Storage URL {url!r}: options after ? or # are not known. Use one of: {_SCHEMES}.")
    if parts.scheme in ("sqlite", "file") and parts.netloc:
        raise StorageError(
            f"Storage URL {url!r} names a host ({parts.netloc}); write three slashes: {parts.scheme}:///{parts.netloc}{path}"
        )
    if parts.scheme == "sqlite" and len(path) > 1:
        from framework.storage.sqlite import SQLiteStorage  # noqa: PLC0415 - a driver is imported when it is used

        return SQLiteStorage(Path(path[1:] if path.startswith("/") else path))
    if parts.scheme == "file" and path:
        return FileStorage(Path(path))
    if parts.scheme == "memory" and not path:
        from framework.storage.memory import MemoryStorage  # noqa: PLC0415 - a driver is imported when it is used

        return MemoryStorage()
    raise StorageError(f"Storage URL {url!r} is not one this library opens. Use one of: {_SCHEMES}.")
