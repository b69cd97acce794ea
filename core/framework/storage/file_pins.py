"""Pins of a ``FileStorage``: ``pins/<run>.json``, one file for a run that has any. Use the run's lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from framework.errors import CorruptData, RunPinned
from framework.storage.file_io import dump_checked, load_checked, make_directory, write_atomic
from framework.storage.retention_records import Pin


def read(path: Path, run_id: str) -> list[Pin]:
    """The pins in a file, by sequence; none when there is no file. Raises ``CorruptData``."""
    try:
        content = load_checked(path)
    except FileNotFoundError:
        return []
    try:
        pins = [Pin(**each) for each in content["pins"]]
    except (KeyError, TypeError) as error:
        raise CorruptData(f"{path} does not hold the pins of a run: {error!r}.") from None
    if any(pin.run_id != run_id for pin in pins):
        raise CorruptData(f"{path} was renamed or copied: it holds the pins of another run than {run_id!r}.")
    return pins


def write(path: Path, pins: Sequence[Pin]) -> None:
    """Put the pins of a run in their place; without any, the file goes."""
    if not pins:
        path.unlink(missing_ok=True)
        return
    make_directory(path.parent)
    ordered = sorted(pins, key=lambda pin: pin.sequence)
    write_atomic(path, dump_checked({"pins": [asdict(pin) for pin in ordered]}))


def refuse_if_pinned(pins: Sequence[Pin], *, force: bool) -> None:
    """Raise ``RunPinned`` for a run with any pin, unless ``force``."""
    if pins and not force:
        raise RunPinned(pins[0].run_id, pins[0].sequence, pins[0].note)
