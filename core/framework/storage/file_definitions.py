"""The definitions of a ``FileStorage``: ``definitions/<fingerprint>.json``, shared by runs, kept until ``compact``.

Each has a lock file: held shared from looking for the definition until a record names it, and alone to remove it. So
removing one waits for nobody, and only who wants this very definition waits for that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from framework.errors import CorruptData
from framework.storage.file_folder import Folder
from framework.storage.file_io import dump_checked, load_checked, show, sync_directory, unshow, write_atomic
from framework.storage.file_locks import HeldUp

logger = logging.getLogger(__name__)

_AT_ONCE = 100
"""How many definitions are looked at together before they go: their locks are held meanwhile."""


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


# --- removing them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Named:
    """What a record said when its file was last read."""

    stamp: tuple[int, int, int]
    fingerprint: str


class KeepsDefinitions(Folder):
    """The part of ``FileStorage`` that removes definitions that no run has."""

    def _remove_definitions(self) -> None:
        """Remove the definitions that no run has, and that nobody is about to use, unless some record cannot be read:
        nobody knows what that needs."""
        records = self._named({})
        if records is None:
            return
        with self._reading("list its definitions"):
            paths = sorted((self.base_path / "definitions").glob("[!.]*.json"))
        needed = self._needed(records)
        unused = [path for path in paths if path not in needed]
        for start in range(0, len(unused), _AT_ONCE):
            again = self._remove_unused(unused[start : start + _AT_ONCE], records)
            if again is None:
                return
            records = again

    def _remove_unused(self, paths: Sequence[Path], known: Mapping[str, _Named]) -> Mapping[str, _Named] | None:
        """Remove those of some definitions that still no run has; the records then, as of ``_named``."""
        with ExitStack() as locks:
            free: dict[Path, Path] = {}
            for path in paths:
                want = self._definition_of(path.stem)
                try:
                    locks.enter_context(self._holding("remove a definition from", want, patience=0.0))
                except HeldUp:
                    continue  # somebody is about to accept a run of it
                free[path] = want.path
            # Only what has changed since is read again.
            records = self._named(known)
            if records is None:
                return None
            needed = self._needed(records)
            for path, lock_path in free.items():
                if path not in needed:
                    path.unlink(missing_ok=True)
                    lock_path.unlink(missing_ok=True)
            sync_directory(self.base_path / "definitions")
        return records

    def _needed(self, records: Mapping[str, _Named]) -> Collection[Path]:
        return {self._definition_path(fingerprint) for fingerprint in {each.fingerprint for each in records.values()}}

    def _named(self, known: Mapping[str, _Named]) -> Mapping[str, _Named] | None:
        """The definition that each record names, by the record's file; ``None`` when one cannot be read."""
        found: dict[str, _Named] = {}
        damaged = 0
        with self._reading("list its runs"), os.scandir(self.base_path / "executions") as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(".json"):
                    continue
                try:
                    stat = entry.stat()
                    stamp = (stat.st_ino, stat.st_ctime_ns, stat.st_size)
                    before = known.get(entry.name)
                    if before is not None and before.stamp == stamp:
                        found[entry.name] = before
                    elif (record := self._read_record(Path(entry.path))) is not None:
                        found[entry.name] = _Named(stamp, record.fingerprint)
                except FileNotFoundError:
                    continue  # it was deleted meanwhile
                except CorruptData as error:
                    logger.warning("Looking for definitions that are needed: %s", error)
                    damaged += 1
        if damaged:
            logger.warning("No definition is removed, as %d records of runs cannot be read.", damaged)
        return None if damaged else found
