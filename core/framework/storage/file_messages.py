"""Messages of a ``FileStorage``: ``messages/<run>/<name>.json``, one file each, never changed. Use the run's lock."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from framework.errors import CorruptData, MessageRefused
from framework.storage.file_io import (
    dump_checked,
    file_name,
    load_checked,
    make_directory,
    show,
    unshow,
    write_atomic,
)
from framework.storage.file_locks import HeldLock
from framework.storage.records import Damage, Message

_PLACE = 1
"""Of the mark in a run's lock that says whether messages were left; the first place is ``file_folder``'s."""


@dataclass(frozen=True, slots=True)
class _Numbered:
    number: int
    message: Message


class RunMessages:
    """Leaves messages for one run, without counting again those that it knows of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark: bytes | None = None
        self._count = 0

    def leave(self, message: Message, lock: HeldLock) -> None:
        """Put a message in the folder of its run. Raises ``MessageRefused`` when its name is taken."""
        path = self.folder / f"{file_name(message.name)}.json"
        if path.exists():
            raise MessageRefused(message.run_id, message.name, "one of this name was left before.")
        mark = lock.mark(_PLACE)
        if mark is None or mark != self._mark:  # another process left one since
            self._count = count(self.folder)
        self._mark = None
        mark = lock.new_mark(_PLACE)
        make_directory(self.folder)
        _put(path, _Numbered(self._count + 1, message))  # the order they were left in, whatever the clock did
        self._count += 1
        self._mark = mark


def replace(folder: Path, run_id: str, name: str, old: bytes, new: bytes) -> bool:
    """Put ``new`` in the place of a message's body that still is ``old``; whether it was."""
    path = folder / f"{file_name(name)}.json"
    try:
        found = _load(path, run_id)
    except (CorruptData, FileNotFoundError):
        return False
    if found.message.body != old:
        return False
    _put(path, _Numbered(found.number, dataclasses.replace(found.message, body=new)))
    return True


def _put(path: Path, numbered: _Numbered) -> None:
    message = numbered.message
    content = {
        "run_id": message.run_id,
        "name": message.name,
        "number": numbered.number,
        "sent_at": message.sent_at,
        "body": show(message.body),
    }
    write_atomic(path, dump_checked(content))


def read(folder: Path, run_id: str, on_damage: Callable[[Damage], None] | None) -> list[Message]:
    """The messages in a folder, in the order they were left; see ``Storage.read_messages``."""
    found: list[_Numbered] = []
    for path in folder.glob("[!.]*.json"):
        try:
            found.append(_load(path, run_id))
        except FileNotFoundError:  # a reader without a lock may see a file go
            continue
        except CorruptData as error:
            if on_damage is not None:
                on_damage(Damage(run_id, None, str(path), str(error)))
    found.sort(key=lambda each: each.number)
    return [each.message for each in found]


def folders(parent: Path) -> list[str]:
    """The names of the folders that hold messages, one for each run that has any."""
    try:
        names = os.listdir(parent)
    except FileNotFoundError:  # no run ever had one
        return []
    return [name for name in names if count(parent / name)]


def count(folder: Path) -> int:
    """How many messages are in a folder, without reading them."""
    try:
        return sum(1 for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return 0


def _load(path: Path, run_id: str) -> _Numbered:
    content = load_checked(path)
    try:
        message = Message(content["run_id"], content["name"], unshow(content["body"]), content["sent_at"])
        number = content["number"]
        if not isinstance(number, int) or not isinstance(message.name, str):
            raise TypeError("its number or name")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"{path} is not a message of this store: {error!r}.") from None
    if message.run_id != run_id or file_name(message.name) != path.stem:
        raise CorruptData(f"{path} was renamed or copied: it is message {message.name!r} to run {message.run_id!r}.")
    return _Numbered(number, message)
