"""Messages of a ``FileStorage``: ``messages/<run>/<name>.json``, one file each, never changed. Use the run's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from framework.errors import CorruptData, MessageRefused
from framework.storage.file_io import dump_checked, file_name, load_checked, make_directory, show, unshow, write_atomic
from framework.storage.records import Damage, Message


@dataclass(frozen=True, slots=True)
class _Numbered:
    number: int
    message: Message


def leave(folder: Path, message: Message) -> None:
    """Put a message in the folder of its run. Raises ``MessageRefused`` when its name is taken."""
    path = folder / f"{file_name(message.name)}.json"
    if path.exists():
        raise MessageRefused(message.run_id, message.name, "one of this name was left before.")
    make_directory(folder)
    content = {
        "run_id": message.run_id,
        "name": message.name,
        "number": count(folder) + 1,  # the order they were left in, whatever the clock did
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
        except CorruptData as error:
            if on_damage is not None:
                on_damage(Damage(run_id, None, str(path), str(error)))
    found.sort(key=lambda each: each.number)
    return [each.message for each in found]


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
