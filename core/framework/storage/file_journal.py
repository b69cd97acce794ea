"""The journal of a run in a ``FileStorage``: ``journal/<run>/<number>.json``, one file a write. Use the run's lock.

A file is put in its place by one rename, so the rows of a write are there together or not at all; of rows with one key
the newest file's counts. Rows go with a commit that names their step in ``journal_done``: the rename of the commit's
file is that moment. Each file says after which commit it was written, so a reader knows the rows that a later commit
took, also when a crash came before their files were removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.errors import CorruptData
from framework.storage.file_commits import Entry
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


def write(folder: Path, run_id: str, after: int, rows: Sequence[JournalRow]) -> None:
    """Put rows in the folder of their run, whose last commit is ``after``."""
    if not rows:
        return
    make_directory(folder)
    number = max((int(path.stem) for path in _paths(folder)), default=0) + 1
    _put(folder / f"{number}.json", run_id, _Written(after, rows), point="commit.inside")


def read(
    folder: Path,
    run_id: str,
    step: str | None,
    commits: Iterable[Entry],
    on_damage: Callable[[Damage], None] | None,
) -> list[JournalRow]:
    """The rows of a run; see ``Storage.read_journal``."""
    done = _done(commits)
    found: dict[tuple[str, int], JournalRow] = {}
    for path in _paths(folder):
        try:
            written = _load(path, run_id)
        except FileNotFoundError:  # a reader without a lock may see a file go
            continue
        except CorruptData as error:
            if on_damage is not None:
                on_damage(Damage(run_id, None, str(path), str(error)))
            continue
        for row in written.left(done):
            if step is None or row.step == step:
                found[row.step, row.number] = row
    return [found[key] for key in sorted(found)]


def remove_done(folder: Path, run_id: str, commits: Iterable[Entry]) -> None:
    """Remove what a commit took. Files that cannot be read stay, to be reported."""
    done = _done(commits)
    for path in _paths(folder):
        try:
            written = _load(path, run_id)
        except CorruptData:
            continue
        left = written.left(done)
        if not left:
            path.unlink()
        elif len(left) < len(written.rows):
            _put(path, run_id, _Written(written.after, left))


def _done(commits: Iterable[Entry]) -> dict[str, int]:
    """The last commit that took each step's rows."""
    done: dict[str, int] = {}
    for entry in commits:
        for step in entry.journal_done:
            done[step] = max(entry.sequence, done.get(step, 0))
    return done


def _paths(folder: Path) -> list[Path]:
    """The files in the order they were written."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    numbers = sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())
    return [folder / f"{number}.json" for number in numbers]


def _put(path: Path, run_id: str, written: _Written, point: str | None = None) -> None:
    rows = [{"step": row.step, "number": row.number, "record": show(row.record)} for row in written.rows]
    content = {"run_id": run_id, "write": int(path.stem), "after": written.after, "rows": rows}
    write_atomic(path, dump_checked(content), point=point)


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
