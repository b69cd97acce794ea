"""The commits of one run as files: what a file says, and the index by which they are found.

A retained checkpoint is ``checkpoints/by_run/<run>/<checkpoint id>.json``; any other commit, and what is left of a
checkpoint that retention took, is ``history/<run>/<sequence>.json``. Both have the same form. While a commit has both
files, in the middle of being moved, the checkpoint counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from framework.errors import CorruptData
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk, Op, unreachable
from framework.storage.file_io import dump_checked, file_name, load_checked, make_directory, show, unshow, write_atomic
from framework.storage.records import CheckpointRow, Damage

Stamp = tuple[int, int, int]
"""Tells one content of a path from another without reading it: inode, time of change, size."""


@dataclass(frozen=True, slots=True)
class CommitFile:
    """All that one commit made durable. ``reach`` covers the state at it (see ``RunFiles.reach_after``)."""

    run_id: str
    sequence: int
    at: float
    record: bytes
    log: bytes | None
    checkpoint_id: str | None
    checkpoint: bytes | None
    chunks: tuple[Chunk, ...]
    reach: int | None
    state: RunState | None = None
    error: str | None = None
    release: bool = False
    wake_at: float | None = None
    journal_done: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The file."""
        return dump_checked(
            {
                "run_id": self.run_id,
                "sequence": self.sequence,
                "checkpoint_id": self.checkpoint_id,
                "at": self.at,
                "record": show(self.record),
                "log": None if self.log is None else show(self.log),
                "has_log": self.log is not None,  # a log may be the JSON null itself
                "checkpoint": None if self.checkpoint is None else show(self.checkpoint),
                "chunks": [_show_chunk(chunk) for chunk in self.chunks],
                "reach": self.reach,
                "state": None if self.state is None else self.state.value,
                "error": self.error,
                "release": self.release,
                "wake_at": self.wake_at,
                "journal_done": list(self.journal_done),
            }
        )

    def without(self, keys: Iterable[str] | None, *, reach: bool = True) -> CommitFile:
        """What history keeps: no checkpoint, and no chunks of ``keys`` (``None``: none at all)."""
        gone = None if keys is None else set(keys)
        return replace(
            self,
            checkpoint_id=None,
            checkpoint=None,
            chunks=() if gone is None else tuple(chunk for chunk in self.chunks if chunk.key not in gone),
            reach=self.reach if reach else None,
        )


def read_commit_file(path: Path) -> CommitFile:
    """The commit in a file. Raises ``CorruptData``, ``StoreTooNew``, ``OSError``."""
    content = load_checked(path)
    try:
        state = content["state"]
        return CommitFile(
            run_id=content["run_id"],
            sequence=content["sequence"],
            at=content["at"],
            record=unshow(content["record"]),
            log=unshow(content["log"]) if content["has_log"] else None,
            checkpoint_id=content["checkpoint_id"],
            checkpoint=None if content["checkpoint_id"] is None else unshow(content["checkpoint"]),
            chunks=tuple(_unshow_chunk(shown) for shown in content["chunks"]),
            reach=content["reach"],
            state=None if state is None else RunState(state),
            error=content["error"],
            release=content["release"],
            wake_at=content.get("wake_at"),  # files of format 1 have none
            journal_done=tuple(content.get("journal_done", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"{path} is not a commit of this store: {error!r}.") from None


def _show_chunk(chunk: Chunk) -> dict[str, Any]:
    shown: dict[str, Any] = {"key": chunk.key, "op": chunk.op}
    if chunk.op == "delete" and not chunk.data:
        return shown
    if chunk.op == "append":
        # A tail is half of a value: as the whole list or text that it would be, it can be read.
        for name, before, after in (("items", b"[", b"]"), ("text", b'"', b'"')):
            whole = before + chunk.data + after
            value = show(whole)
            if isinstance(value, list if name == "items" else str):
                return {**shown, name: value}
    return {**shown, "value": show(chunk.data)}


def _unshow_chunk(shown: Mapping[str, Any]) -> Chunk:
    for name in ("items", "text"):
        if name in shown:
            return Chunk(shown["key"], shown["op"], orjson.dumps(shown[name])[1:-1])
    return Chunk(shown["key"], shown["op"], unshow(shown["value"]) if "value" in shown else b"")


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index knows of a commit file without reading it again."""

    path: Path
    stamp: Stamp
    sequence: int
    checkpoint_id: str | None
    ops: Mapping[str, Op]
    reach: int | None
    at: float
    state: RunState | None
    error: str | None
    release: bool
    wake_at: float | None
    journal_done: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Bad:
    stamp: Stamp
    damage: Damage


class RunFiles:
    """The commit files of one run, found anew by ``refresh`` and read only when they changed.

    ``commits`` has the readable ones by sequence, ``keys`` the operations on each key of the state by sequence.
    Use it under the run's lock.
    """

    def __init__(self, run_id: str, checkpoints: Path, history: Path) -> None:
        self.run_id = run_id
        self.checkpoints = checkpoints
        self.history = history
        self.commits: dict[int, Entry] = {}
        self.keys: dict[str, dict[int, Op]] = {}
        self._files: dict[str, Entry | _Bad] = {}

    def refresh(self) -> None:
        """Bring the index up to date with the directories."""
        # Files only move from checkpoints to history, so in this order none is missed.
        seen = {**_scan(self.checkpoints), **_scan(self.history)}
        changed = False
        for path in self._files.keys() - seen.keys():
            del self._files[path]
            changed = True
        for path, stamp in seen.items():
            known = self._files.get(path)
            if known is None or known.stamp != stamp:
                self._files[path] = self._examine(Path(path), stamp)
                changed = True
        if changed:
            self._index()

    def _index(self) -> None:
        old = self.commits
        new: dict[int, Entry] = {}
        for entry in self._files.values():
            if isinstance(entry, Entry):
                other = new.get(entry.sequence)
                if other is None or other.path.parent == self.history:
                    new[entry.sequence] = entry
        for sequence in {*old, *new}:
            before, after = old.get(sequence), new.get(sequence)
            if before is after:
                continue
            for key in before.ops if before is not None else ():
                del self.keys[key][sequence]
                if not self.keys[key]:
                    del self.keys[key]
            for key, op in after.ops.items() if after is not None else ():
                self.keys.setdefault(key, {})[sequence] = op
        self.commits = new

    def _examine(self, path: Path, stamp: Stamp) -> Entry | _Bad:
        try:
            found = self.read(path)
        except CorruptData as error:
            sequence = int(path.stem) if path.parent == self.history and path.stem.isdecimal() else None
            return _Bad(stamp, Damage(self.run_id, sequence, str(path), str(error)))
        return Entry(
            path=path,
            stamp=stamp,
            sequence=found.sequence,
            checkpoint_id=found.checkpoint_id,
            ops={chunk.key: chunk.op for chunk in found.chunks},
            reach=found.reach,
            at=found.at,
            state=found.state,
            error=found.error,
            release=found.release,
            wake_at=found.wake_at,
            journal_done=found.journal_done,
        )

    def read(self, path: Path) -> CommitFile:
        """The commit in a file of this run. Raises ``CorruptData`` for another's, too."""
        found = read_commit_file(path)
        if path.parent == self.history:
            names = [str(found.sequence)]
        else:
            names = [file_name(found.checkpoint_id or ""), self.second_name(found.checkpoint_id or "", found.sequence)]
        if found.run_id != self.run_id or path.stem not in names:
            raise CorruptData(f"{path} was renamed or copied: it is commit {found.sequence} of run {found.run_id!r}.")
        return found

    def read_entry(self, entry: Entry) -> CommitFile:
        """The commit of an entry, read again. Raises ``CorruptData``."""
        return self.read(entry.path)

    @property
    def damage(self) -> list[Damage]:
        """What cannot be read, apart from copies of commits that can."""
        found = (bad.damage for bad in self._files.values() if isinstance(bad, _Bad))
        return [damage for damage in found if damage.sequence not in self.commits]

    def damage_at(self, path: Path) -> Damage | None:
        """What is wrong with one file, if anything."""
        bad = self._files.get(str(path))
        return bad.damage if isinstance(bad, _Bad) else None

    def retained(self) -> list[Entry]:
        """The readable checkpoints, oldest first."""
        found = [entry for entry in self.commits.values() if entry.checkpoint_id is not None]
        return sorted(found, key=lambda entry: entry.sequence)

    def last(self) -> int:
        """The highest sequence that can be read."""
        return max(self.commits, default=0)

    # --- names ---

    def history_path(self, sequence: int) -> Path:
        """Where a commit that is no checkpoint is kept."""
        return self.history / f"{sequence}.json"

    @staticmethod
    def second_name(checkpoint_id: str, sequence: int) -> str:
        """The name, less its ending, of a checkpoint whose id another retained checkpoint has already."""
        return f"{file_name(checkpoint_id)}~{sequence}"

    def checkpoint_path(self, checkpoint_id: str) -> Path:
        """Where a checkpoint is kept."""
        return self.checkpoints / f"{file_name(checkpoint_id)}.json"

    def at_path(self, path: Path) -> Entry | None:
        """The readable commit at a path, or ``None``."""
        entry = self._files.get(str(path))
        return entry if isinstance(entry, Entry) else None

    # --- the state ---

    def sequences(self, key: str, at: int) -> list[int]:
        """The commits whose chunks make the value of ``key`` at a sequence, in order; none of a deleted key."""
        entries, base = self.keys.get(key, {}), self._base(key, at)
        if base is None:
            return []
        return sorted(sequence for sequence in entries if base <= sequence <= at)

    def _base(self, key: str, at: int) -> int | None:
        entries = self.keys.get(key, {})
        base = max((sequence for sequence, op in entries.items() if op != "append" and sequence <= at), default=None)
        return None if base is None or entries[base] == "delete" else base

    def reach_at(self, at: int) -> int:
        """One number for which chunks, by key and commit, make the state at a sequence."""
        total = 0
        for key in self.keys:
            for sequence in self.sequences(key, at):
                total ^= _mark(key, sequence)
        return total

    def reach_after(self, sequence: int, chunks: Iterable[Chunk]) -> int:
        """``reach_at`` of a new commit. It is stored with the commit, so that a file lost later is noticed."""
        previous = self.commits.get(sequence - 1)
        known = None if previous is None else previous.reach
        total = self.reach_at(sequence - 1) if known is None else known
        for key, op, _ in chunks:
            if op != "append":
                for earlier in self.sequences(key, sequence - 1):
                    total ^= _mark(key, earlier)
            if op == "set" or (op == "append" and self._base(key, sequence - 1) is not None):
                total ^= _mark(key, sequence)
        return total

    def state_chunks(self, at: int) -> list[Chunk]:
        """The chunks that make the state at a sequence. Raises ``CorruptData`` when any of them cannot be read."""
        if at not in self.commits:
            if self.damage:
                raise CorruptData(f"Commit {at} of run {self.run_id!r} is missing or damaged.")
            # Taken away by rewind, or by hand: the state is what the commits before it made.
            at = max((sequence for sequence in self.commits if sequence < at), default=0)
        entry = self.commits.get(at)
        if entry is None:
            raise CorruptData(f"The initial state of run {self.run_id!r} is missing.")
        if entry.reach is not None and entry.reach != self.reach_at(at):
            raise CorruptData(f"The state of run {self.run_id!r} at {at} needs files that are missing or damaged.")
        wanted = {key: found for key in sorted(self.keys) if (found := self.sequences(key, at))}
        read = {
            sequence: {chunk.key: chunk for chunk in self.read_entry(self.commits[sequence]).chunks}
            for sequence in {sequence for found in wanted.values() for sequence in found}
        }
        try:
            return [read[sequence][key] for key, found in wanted.items() for sequence in found]
        except KeyError as error:
            raise CorruptData(f"A file of run {self.run_id!r} lost the chunk of key {error}.") from None

    # --- retention ---

    def retire(self, dropped: list[Entry], since: int, after: int, upto: int) -> None:
        """Move ``dropped`` checkpoints to history and drop the chunks that no other reaches.

        ``dropped`` lie between the retained checkpoints ``after`` (0: none) and ``upto``, oldest first; ``since`` is
        where to begin looking for what they made unreachable. A kill at any moment leaves every checkpoint that is
        still there whole: copies come first, then the newest goes first, then older files are thinned out.
        """
        overwritten = {
            key
            for sequence in range(since, upto + 1)
            if sequence in self.commits
            for key, op in self.commits[sequence].ops.items()
            if op != "append"
        }
        gone: dict[int, set[str]] = {}
        for key in overwritten:
            for sequence in unreachable(self.keys[key], after, upto):
                gone.setdefault(sequence, set()).add(key)
        if dropped:
            make_directory(self.history)
        for entry in dropped:
            kept = self.read_entry(entry).without(gone.pop(entry.sequence, ()))
            write_atomic(self.history_path(entry.sequence), kept.to_bytes())
        for entry in reversed(dropped):
            entry.path.unlink()
        for sequence in sorted(gone):
            if self.commits[sequence].checkpoint_id is None:  # a checkpoint keeps its delete markers until it goes
                thinned = self.read_entry(self.commits[sequence]).without(gone[sequence])
                write_atomic(self.history_path(sequence), thinned.to_bytes())
        self.refresh()

    def rewind(self, to: int, *, keep_damaged: bool) -> int:
        """Take the checkpoints and chunks after sequence ``to`` away, leaving their history; how many checkpoints.

        Files that cannot be read go as well; ``keep_damaged`` puts them aside under another name. Newest first, so a
        kill in between leaves a state that the run had.
        """
        count = 0
        for path, found in list(self._files.items()):
            if isinstance(found, _Bad) and not (found.damage.sequence is not None and found.damage.sequence <= to):
                count += found.damage.sequence is None
                if keep_damaged:
                    os.replace(path, f"{path}.damaged")
                else:
                    os.unlink(path)
        last = self.last()
        for sequence in sorted((sequence for sequence in self.commits if sequence > to), reverse=True):
            entry = self.commits[sequence]
            # The newest, too, when it has no chunks: its note of what makes the state no longer holds.
            if entry.checkpoint_id is not None or entry.ops or sequence == last:
                make_directory(self.history)
                kept = self.read_entry(entry).without(None, reach=False)
                write_atomic(self.history_path(sequence), kept.to_bytes())
                if entry.checkpoint_id is not None:
                    entry.path.unlink()
                    count += 1
        self.refresh()
        return count


def _mark(key: str, sequence: int) -> int:
    # 63 bits: JSON readers other than ours know no larger integers.
    digest = blake2b(f"{sequence} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _scan(directory: Path) -> dict[str, Stamp]:
    found: dict[str, Stamp] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # a reader without a lock may see a file go
                        continue
                    found[entry.path] = (stat.st_ino, stat.st_ctime_ns, stat.st_size)
    except FileNotFoundError:
        return {}
    return found


def checkpoint_row(content: CommitFile) -> CheckpointRow:
    if content.checkpoint_id is None or content.checkpoint is None:
        raise CorruptData(f"Commit {content.sequence} of run {content.run_id!r} is no checkpoint.")
    return CheckpointRow(content.sequence, content.checkpoint_id, content.checkpoint)


def read_row(files: RunFiles, entry: Entry, report: Callable[[Damage], None]) -> CheckpointRow | None:
    """The checkpoint of an entry, ``None`` when it went or is damaged, which is told to ``report``."""
    try:
        content = files.read_entry(entry)
        return checkpoint_row(content) if content.sequence == entry.sequence else None
    except FileNotFoundError:
        return None
    except CorruptData as error:
        report(Damage(files.run_id, entry.sequence, str(entry.path), str(error)))
        return None
