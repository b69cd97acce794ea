"""The definitions of a ``FileStorage``: ``definitions/<fingerprint>.json``, shared by runs, kept until ``compact``."""

from __future__ import annotations

import logging
from pathlib import Path

from framework.errors import CorruptData
from framework.storage.file_io import dump_checked, load_checked, show, unshow, write_atomic

logger = logging.getLogger(__name__)


def read(path: Path, fingerprint: str) -> bytes | None:
    """The definition at a path, or ``None`` when there is none. Raises ``CorruptData``."""
    try:
        content = load_checked(path)
    except FileNotFoundError:
        return None
    if content.get("fingerprint") != fingerprint:
        raise CorruptData(f"{path} holds another definition: it was renamed or copied.")
    return unshow(content["definition"])


def keep(path: Path, fingerprint: str, definition: bytes) -> None:
    """Write a definition to its path unless it is there; a damaged one is written again."""
    try:
        if read(path, fingerprint) is not None:
            return
    except CorruptData as error:
        logger.warning("A damaged definition is written again: %s", error)
    write_atomic(path, dump_checked({"fingerprint": fingerprint, "definition": show(definition)}))


def fingerprint_in(path: Path) -> str | None:
    """What the definition at a path is of, or ``None`` when there is none. Raises ``CorruptData``."""
    try:
        found = load_checked(path).get("fingerprint")
    except FileNotFoundError:
        return None
    if not isinstance(found, str):
        raise CorruptData(f"{path} is not a definition of this store.")
    return found


def replace(path: Path, fingerprint: str, old: bytes, new: bytes) -> bool:
    """Put ``new`` in the place of a definition that still is ``old``; whether it was."""
    if read(path, fingerprint) != old:
        return False
    write_atomic(path, dump_checked({"fingerprint": fingerprint, "definition": show(new)}))
    return True
