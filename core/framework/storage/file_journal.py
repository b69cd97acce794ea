"""The journal of a run in a ``FileStorage``: ``journal/<run>/<number>.json``, one file a write. Use the run's lock.

A file is put in its place by one rename, so the rows of a write are there together or not at all; of rows with one key
the newest file's counts. Rows go with a commit that names their step in ``journal_done``: the rename of the commit's
file is that moment. Each file says after which commit it was written, so a reader knows the rows that a later commit
took, also when a crash came before their files were removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from framework.errors import CorruptData
from framework.storage.file_io import dump_checked, load_checked, make_directory, show, unshow, write_atomic
from framework.storage.records import Damage, JournalRow


@dataclass(frozen=True, slots=True)
class _Written:
    """A file's rows, and the last commit before it."""

    after: int
    rows: Sequence[JournalRow]

    def left(self, done: Mapping[str, int]) -> list[JournalRow]:
        """The rows that no later commit took."""
        return [row for row in self.rows if done.get(row.step, -1) <= self.after]


@dataclass(frozen=True, slots=True)
class _Held:
    """What is kept in memory of a file: the last commit before it, and the steps it has rows of."""

    after: int
    steps: frozenset[str]


class RunJournal:
    """The journal files of one run, and which steps each has rows of. Use it under the run's lock.

    Only the names are read for the first write, and each file once for the first commit that takes rows; after that
    what a write, a read of one step and a commit cost does not follow how many rows there are. ``forget`` when another
    process may have written.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self._last: int | None = None
        self._unread: set[int] = set()
        self._left_over: set[int] = set()  # perhaps with rows that a commit took, which a crash kept from removing
        self._damaged: set[int] = set()
        self._held: dict[int, _Held] = {}
        self._by_step: dict[str, set[int]] = {}

    def forget(self) -> None:
        """Look at the folder again before the next use."""
        self._last = None
        self._unread.clear()
        self._left_over.clear()
        self._damaged.clear()
        self._held.clear()
        self._by_step.clear()

    def write(self, after: int, rows: Sequence[JournalRow]) -> None:
        """Put rows in the folder of their run, whose last commit is ``after``."""
        if not rows:
            return
        number = self._find() + 1
        if self._path(number).exists():  # whoever wrote it did not take the lock; its rows must not be lost
            self.forget()
            number = self._find() + 1
        make_directory(self.folder)
        self._put(number, _Written(after, rows), point="commit.inside")
        self._last = number

    def read(
        self, step: str | None, done: Mapping[str, int], on_damage: Callable[[Damage], None] | None
    ) -> list[JournalRow]:
        """The rows of a run; see ``Storage.read_journal``. ``done`` has the last commit that took each step's rows.

        For all steps, all files are read again. For one, those that have its rows and those that nobody could read.
        """
        if step is None:
            self.forget()
        self._find()
        wanted = set(self._held) if step is None else self._by_step.get(step, set())
        found: dict[tuple[str, int], JournalRow] = {}
        for number in sorted(wanted | self._unread | self._damaged):
            try:
                written = self._load(number)
            except FileNotFoundError:  # a reader without a lock may see a file go
                continue
            except CorruptData as error:
                if on_damage is not None:
                    for key in _said(self._path(number)):
                        on_damage(Damage(self.run_id, None, str(self._path(number)), str(error), *key))
                continue
            left = written.left(done)
            if len(left) < len(written.rows):
                self._left_over.add(number)
            for row in left:
                if step is None or row.step == step:
                    found[row.step, row.number] = row
        return [found[key] for key in sorted(found)]

    def read_all(self, on_damage: Callable[[Damage], None] | None) -> list[JournalRow]:
        """All rows of all files, also those that later ones replaced."""
        self.forget()
        self._find()
        found: list[JournalRow] = []
        for number in sorted(self._unread):
            try:
                found += self._load(number).rows
            except FileNotFoundError:  # a reader without a lock may see a file go
                continue
            except CorruptData as error:
                if on_damage is not None:
                    for key in _said(self._path(number)):
                        on_damage(Damage(self.run_id, None, str(self._path(number)), str(error), *key))
        return found

    def replace(self, changes: Mapping[tuple[str, int], tuple[bytes, bytes]]) -> int:
        """Put other bytes in the place of rows, by step and number, that are as they were read; how many."""
        self.forget()
        self._find()
        count = 0
        for number in sorted(self._unread):
            try:
                written = self._load(number)
            except CorruptData:
                continue
            made = [
                JournalRow(row.step, row.number, changes[row.step, row.number][1])
                if changes.get((row.step, row.number), (None,))[0] == row.record
                else row
                for row in written.rows
            ]
            changed = sum(one != other for one, other in zip(made, written.rows, strict=True))
            if changed:
                self._put(number, _Written(written.after, made))
                count += changed
        return count

    def remove_done(self, steps: Iterable[str], done: Mapping[str, int]) -> None:
        """Remove what a commit took that names ``steps``. Files that cannot be read stay, to be reported."""
        self._find()
        numbers = self._unread | self._left_over
        for number in list(self._unread):
            with suppress(CorruptData):
                self._load(number)
        for step in steps:
            numbers |= self._by_step.get(step, set())
        for number in sorted(numbers - self._damaged):
            held = self._held[number]
            left = [step for step in held.steps if done.get(step, -1) <= held.after]
            if not left:
                self._path(number).unlink(missing_ok=True)
                self._drop(number)
            elif len(left) < len(held.steps):
                with suppress(CorruptData):
                    written = self._load(number)
                    self._put(number, _Written(written.after, written.left(done)))

    def _find(self) -> int:
        """The number of the last file."""
        if self._last is None:
            self._unread = set(_numbers(self.folder))
            self._last = max(self._unread, default=0)
        return self._last

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _load(self, number: int) -> _Written:
        try:
            written = _load(self._path(number), self.run_id)
        except CorruptData:
            self._drop(number)
            self._damaged.add(number)
            raise
        self._hold(number, written)
        return written

    def _put(self, number: int, written: _Written, point: str | None = None) -> None:
        _put(self._path(number), self.run_id, written, point)
        self._hold(number, written)

    def _hold(self, number: int, written: _Written) -> None:
        self._drop(number)
        held = _Held(written.after, frozenset(row.step for row in written.rows))
        self._held[number] = held
        for step in held.steps:
            self._by_step.setdefault(step, set()).add(number)

    def _drop(self, number: int) -> None:
        self._unread.discard(number)
        self._left_over.discard(number)
        self._damaged.discard(number)
        held = self._held.pop(number, None)
        for step in () if held is None else held.steps:
            self._by_step[step].discard(number)
            if not self._by_step[step]:
                del self._by_step[step]


def _numbers(folder: Path) -> list[int]:
    """The numbers of the files."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()]


def _put(path: Path, run_id: str, written: _Written, point: str | None = None) -> None:
    rows = [{"step": row.step, "number": row.number, "record": show(row.record)} for row in written.rows]
    content = {"run_id": run_id, "write": int(path.stem), "after": written.after, "rows": rows}
    write_atomic(path, dump_checked(content), point=point)


_KEY_LINE = re.compile(rb'^      "(step|number)": (.+?),?$', re.MULTILINE)
"""A line of a row's key as ``dump_checked`` writes it; lines of a record are further in."""


def _said(path: Path) -> list[tuple[str | None, int | None]]:
    """The keys of the rows that a damaged file says it has; one that is not known when they cannot all be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    said: dict[str, list[object]] = {"step": [], "number": []}
    for name, value in _KEY_LINE.findall(data):
        with suppress(orjson.JSONDecodeError):
            said[name.decode()].append(orjson.loads(value))
    keys = [
        (step, number)
        for step, number in zip(said["step"], said["number"], strict=False)
        if isinstance(step, str) and isinstance(number, int)
    ]
    rows = data.count(b'\n      "record": ')
    whole = len(said["step"]) == len(said["number"]) == len(keys) == rows > 0 and data.endswith(b"\n}\n")
    return [*keys] if whole else [(None, None)]


def _load(path: Path, run_id: str) -> _Written:
    content = load_checked(path)
    try:
        rows = [JournalRow(row["step"], row["number"], unshow(row["record"])) for row in content["rows"]]
        owner, number, after = content["run_id"], content["write"], int(content["after"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"{path} is not a journal of this store: {error!r}.") from None
    if (owner, str(number)) != (run_id, path.stem):
        raise CorruptData(f"{path} was renamed or copied: it is write {number} of run {owner!r}.")
    return _Written(after, rows)
