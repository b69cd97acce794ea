"""The index of one run's files in a ``FileStorage``: which commits there are, and which of them make a state."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from framework.errors import CorruptData
from framework.storage.chunks import Chunk, Op, unreachable
from framework.storage.file_commits import CommitFile, Entry, Stamp, read_commit_file
from framework.storage.file_io import file_name, make_directory, sync_directory, write_atomic
from framework.storage.file_journal import RunJournal
from framework.storage.file_locks import HeldLock
from framework.storage.file_messages import RunMessages
from framework.storage.records import CheckpointRow, Damage


@dataclass(frozen=True, slots=True)
class _Bad:
    stamp: Stamp
    damage: Damage


@dataclass(slots=True)
class _Key:
    """The operations on one key of the state, by sequence and in order, so that no commit looks at all of them."""

    ops: dict[int, Op] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)

    def put(self, sequence: int, op: Op) -> None:
        self.ops[sequence] = op
        insort(self.order, sequence)
        if op != "append":
            insort(self.bases, sequence)

    def remove(self, sequence: int) -> None:
        self.order.remove(sequence)
        if self.ops.pop(sequence) != "append":
            self.bases.remove(sequence)

    def base(self, at: int) -> int | None:
        """The last set at or before a sequence, ``None`` when there is none or a delete came later."""
        count = bisect_right(self.bases, at)
        base = self.bases[count - 1] if count else None
        return None if base is None or self.ops[base] == "delete" else base

    def sequences(self, at: int) -> list[int]:
        """The commits whose chunks make the value at a sequence, in order; none of a deleted key."""
        base = self.base(at)
        return [] if base is None else self.order[bisect_left(self.order, base) : bisect_right(self.order, at)]


class RunFiles:
    """The commit files of one run, its journal and its messages. Use it under the run's lock.

    ``refresh`` finds them anew and reads those that changed; ``put`` and ``remove`` keep the index up with what this
    process does itself, at a cost that does not follow the number of files. ``mark`` is what the run's lock said when
    the index was last known to be true, ``None`` for never; ``doubtful`` says that a change failed in the middle.
    ``commits`` has the readable ones by sequence.
    """

    def __init__(self, run_id: str, checkpoints: Path, history: Path, journal: Path, messages: Path) -> None:
        self.run_id = run_id
        self.checkpoints = checkpoints
        self.history = history
        self.journal = RunJournal(journal, run_id)
        self.lock = HeldLock(None)
        self.mark: bytes | None = None
        self.doubtful = False
        self.messages = RunMessages(messages)
        self.commits: dict[int, Entry] = {}
        self._keys: dict[str, _Key] = {}
        self._files: dict[str, Entry | _Bad] = {}
        self._copies: dict[int, list[Entry]] = {}
        self._retained: list[int] = []
        self._last = 0
        self._done: dict[str, int] | None = {}

    # --- the index ---

    def refresh(self, *, reread: bool = False) -> None:
        """Bring the index up to date with the directories, whoever wrote to them.

        ``reread`` reads the files, too, that seem unchanged: bits may flip without anyone writing.
        """
        # Files only move from checkpoints to history, so in this order none is missed.
        seen = {**_scan(self.checkpoints), **_scan(self.history)}
        for path in self._files.keys() - seen.keys():
            self._know(path, None)
        for path, stamp in seen.items():
            known = self._files.get(path)
            if reread or known is None or known.stamp != stamp:
                self._know(path, self._examine(Path(path), stamp))

    def put(self, path: Path, content: CommitFile, *, point: str | None = None) -> None:
        """Write a commit file, in the place of one that is there. ``point`` as of ``write_atomic``."""
        write_atomic(path, content.to_bytes(), point=point)
        self._know(str(path), _entry(path, _stamp(path.stat()), content))

    def remove(self, path: Path) -> None:
        """Remove a commit file."""
        path.unlink()
        self._know(str(path), None)

    def _know(self, path: str, found: Entry | _Bad | None) -> None:
        """Take in what is at a path now."""
        before = self._files.pop(path, None)
        if isinstance(before, Entry):
            self._copies[before.sequence].remove(before)
        if found is not None:
            self._files[path] = found
        if isinstance(found, Entry):
            self._copies.setdefault(found.sequence, []).append(found)
        for sequence in {each.sequence for each in (before, found) if isinstance(each, Entry)}:
            self._settle(sequence)

    def _settle(self, sequence: int) -> None:
        """Let the index say what the files of one commit say; a checkpoint goes before its copy in history."""
        copies = self._copies.get(sequence, [])
        before = self.commits.get(sequence)
        after = next((each for each in copies if each.path.parent == self.checkpoints), copies[0] if copies else None)
        if before is after:
            return
        if before is not None:
            self._forget(before)
        if after is None:
            del self._copies[sequence]
            if sequence == self._last:
                self._last = max(self.commits, default=0)
            return
        self.commits[sequence] = after
        self._last = max(self._last, sequence)
        for key, op in after.ops.items():
            self._keys.setdefault(key, _Key()).put(sequence, op)
        if after.checkpoint_id is not None:
            insort(self._retained, sequence)
        if self._done is not None:
            for step in after.journal_done:
                self._done[step] = max(sequence, self._done.get(step, 0))

    def _forget(self, entry: Entry) -> None:
        del self.commits[entry.sequence]
        for key in entry.ops:
            self._keys[key].remove(entry.sequence)
            if not self._keys[key].ops:
                del self._keys[key]
        if entry.checkpoint_id is not None:
            self._retained.remove(entry.sequence)
        if entry.journal_done and all(each.journal_done != entry.journal_done for each in self._copies[entry.sequence]):
            self._done = None

    def _examine(self, path: Path, stamp: Stamp) -> Entry | _Bad | None:
        try:
            return _entry(path, stamp, self.read(path))
        except FileNotFoundError:  # a reader without a lock may see a file go
            return None
        except CorruptData as error:
            sequence = int(path.stem) if path.parent == self.history and path.stem.isdecimal() else None
            return _Bad(stamp, Damage(self.run_id, sequence, str(path), str(error)))

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
        return [self.commits[sequence] for sequence in self._retained]

    def newest(self) -> Entry | None:
        """The newest readable checkpoint."""
        return self.commits[self._retained[-1]] if self._retained else None

    def last(self) -> int:
        """The highest sequence that can be read."""
        return self._last

    def after(self, sequence: int) -> list[Entry]:
        """The readable commits above a sequence, in order."""
        newer = range(max(0, sequence) + 1, self._last + 1)
        return [self.commits[each] for each in newer if each in self.commits]

    @property
    def done(self) -> Mapping[str, int]:
        """The last commit that took each step's journal rows."""
        if self._done is None:
            self._done = {}
            for entry in self.commits.values():
                for step in entry.journal_done:
                    self._done[step] = max(entry.sequence, self._done.get(step, 0))
        return self._done

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

    def needed(self, upto: int) -> dict[str, set[int]]:
        """For each key of the state the commits whose chunks of it decide what it is at ``upto``; deletes too."""
        found: dict[str, set[int]] = {}
        for name, key in self._keys.items():
            count = bisect_right(key.bases, upto)
            base = key.bases[count - 1] if count else 0
            found[name] = set(key.order[bisect_left(key.order, base) : bisect_right(key.order, upto)])
        return found

    def _sequences(self, name: str, at: int) -> list[int]:
        key = self._keys.get(name)
        return [] if key is None else key.sequences(at)

    def _base(self, name: str, at: int) -> int | None:
        key = self._keys.get(name)
        return None if key is None else key.base(at)

    def reach_at(self, at: int) -> int:
        """One number for which chunks, by key and commit, make the state at a sequence."""
        total = 0
        for key in self._keys:
            for sequence in self._sequences(key, at):
                total ^= _mark(key, sequence)
        return total

    def reach_after(self, sequence: int, chunks: Iterable[Chunk]) -> int:
        """``reach_at`` of a new commit. It is stored with the commit, so that a file lost later is noticed."""
        previous = self.commits.get(sequence - 1)
        known = None if previous is None else previous.reach
        total = self.reach_at(sequence - 1) if known is None else known
        for key, op, _ in chunks:
            if op != "append":
                for earlier in self._sequences(key, sequence - 1):
                    total ^= _mark(key, earlier)
            if op == "set" or (op == "append" and self._base(key, sequence - 1) is not None):
                total ^= _mark(key, sequence)
        return total

    def state_chunks(self, at: int) -> list[Chunk]:
        """The chunks that make the state at a sequence. Raises as ``placed_chunks`` does."""
        return [chunk for _, chunk in self.placed_chunks(at)]

    def placed_chunks(self, at: int) -> list[tuple[int, Chunk]]:
        """The chunks that make the state at a sequence, each with that of its commit.

        Raises ``CorruptData`` when any of them cannot be read.
        """
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
        wanted = {key: found for key in sorted(self._keys) if (found := self._sequences(key, at))}
        read = {
            sequence: {chunk.key: chunk for chunk in self.read_entry(self.commits[sequence]).chunks}
            for sequence in {sequence for found in wanted.values() for sequence in found}
        }
        try:
            return [(sequence, read[sequence][key]) for key, found in wanted.items() for sequence in found]
        except KeyError as error:
            raise CorruptData(f"A file of run {self.run_id!r} lost the chunk of key {error}.") from None

    # --- retention ---

    def retire(self, dropped: list[Entry], since: int, after: int, upto: int) -> None:
        """Move ``dropped`` checkpoints to history and drop the chunks that no other reaches.

        ``dropped`` lie between the retained checkpoints ``after`` (0: none) and ``upto``, oldest first; ``since`` is
        where to begin looking for what they made unreachable. A kill at any moment leaves every checkpoint that is
        still there whole: copies come first, then the newest goes first, then older files are thinned out: an
        append goes before what it appends to, and the deletion of a key after all that it hides.
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
            for sequence in unreachable(self._keys[key].ops, after, upto):
                gone.setdefault(sequence, set()).add(key)
        if dropped:
            make_directory(self.history)
        done: dict[int, set[str]] = {}
        for entry in dropped:
            # An earlier call may have been cut short: older files can still hold what a deletion here hides.
            older = {key for sequence, keys in gone.items() if sequence < entry.sequence for key in keys}
            now = {key for key in gone.get(entry.sequence, ()) if key not in older or entry.ops[key] != "delete"}
            self.put(self.history_path(entry.sequence), self.read_entry(entry).without(now))
            done[entry.sequence] = now
        gone = {sequence: left for sequence, keys in gone.items() if (left := keys - done.get(sequence, set()))}
        for entry in reversed(dropped):
            self.remove(entry.path)
        if dropped and gone:
            sync_directory(self.checkpoints)  # or a power failure brings back one whose chunks are gone
        for sequence in sorted(gone, reverse=True):
            self._thin(sequence, {key for key in gone[sequence] if self.commits[sequence].ops.get(key) != "delete"})
        for sequence in sorted(gone):
            self._thin(sequence, gone[sequence])

    def _thin(self, sequence: int, keys: set[str]) -> None:
        """Take the chunks of ``keys`` out of a commit in history; a checkpoint keeps its deletions until it goes."""
        entry = self.commits[sequence]
        if entry.checkpoint_id is None and not keys.isdisjoint(entry.ops):
            self.put(entry.path, self.read_entry(entry).without(keys))

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
                self._know(path, None)
        last = self.last()
        for sequence in sorted((sequence for sequence in self.commits if sequence > to), reverse=True):
            entry = self.commits[sequence]
            # The newest, too, when it has no chunks: its note of what makes the state no longer holds.
            if entry.checkpoint_id is not None or entry.ops or sequence == last:
                make_directory(self.history)
                kept = self.read_entry(entry).without(None, reach=False)
                self.put(self.history_path(sequence), kept)
                if entry.checkpoint_id is not None:
                    self.remove(entry.path)
                    sync_directory(self.checkpoints)
                    count += 1
        return count


def _entry(path: Path, stamp: Stamp, found: CommitFile) -> Entry:
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


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_ctime_ns, stat.st_size


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
                    found[entry.path] = _stamp(stat)
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
