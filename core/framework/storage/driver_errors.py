"""Errors of the drivers below a store (SQLite's, the operating system's), translated once into ``StorageError``."""

from __future__ import annotations

from pathlib import Path

from framework.errors import CorruptData, StorageError

_ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("disk is full", "no space", "file too large", "disk i/o error", "quota"),
        "Free space on its disk (or raise the file-size limit) and resume; what was committed is intact",
    ),
    (
        ("readonly", "read-only", "permission denied", "operation not permitted"),
        "Give this process write access to the store and its folder; what was committed is intact",
    ),
    (
        ("locked", "busy"),
        "Another process holds a long transaction on it; end that process, or raise busy_seconds",
    ),
    (
        ("too big",),
        "A store takes values of at most MAX_VALUE_BYTES; keep such data in a file, and its name in the store",
    ),
    (
        ("malformed", "not a database", "can't decode"),
        "The file is damaged or is no store; restore it from a backup, or give another path",
    ),
    (
        ("unable to open", "no such file", "not a directory", "is a directory", "file exists"),
        "Check that the path names a store, in a folder this process may write to",
    ),
)


def translate(error: Exception, path: Path, doing: str) -> StorageError:
    """The driver's error as ours: what could not be done, to which store, and what to do about it."""
    text = str(error)
    lower = text.lower()
    for marks, advice in _ADVICE:
        if any(mark in lower for mark in marks):
            kind = CorruptData if "malformed" in marks else StorageError
            return kind(f"Store {path}: cannot {doing}: {text}. {advice}.")
    return StorageError(f"Store {path}: cannot {doing}: {text}. Nothing of this call was written.")
