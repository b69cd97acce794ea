"""Sweeps in a ``FileStorage``: a run goes with its record; its files are moved to ``retired/`` and removed from there.

``retired/<run>.json`` says, before the record goes, that what is left of the run is to be removed, and stays until it
is out of the way. So a kill at any moment leaves a whole run, or none and a note of what to clean up. Looking for what
may go reads all records, as listing runs does here.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from framework import _faults
from framework.errors import CheckpointNotFound, CorruptData
from framework.schemas.run import RunState
from framework.storage import file_pins
from framework.storage.checks import check_id, check_pin
from framework.storage.file_commits import Entry
from framework.storage.file_definitions import KeepsDefinitions
from framework.storage.file_documents import RunDocuments
from framework.storage.file_folder import LOOK_SECONDS
from framework.storage.file_io import (
    dump_checked,
    file_name,
    load_checked,
    make_directory,
    sync_directory,
    write_atomic,
)
from framework.storage.file_locks import HeldUp
from framework.storage.file_records import age
from framework.storage.file_runs import RunFiles
from framework.storage.records import RunRecord
from framework.storage.retention_records import Pin, Retired, Standing, StoreUsage, why_kept
from framework.storage.verify import newest_readable

logger = logging.getLogger(__name__)

RETIRED = "retired"
"""The folder of runs that are gone and whose files are still to be removed."""


class SweepsFiles(KeepsDefinitions):
    """The part of ``FileStorage`` that knows pins and sweeps; see ``KeepsRuns``."""

    _documents: RunDocuments
    _records: Callable[..., list[RunRecord]]

    # --- pins ---------------------------------------------------------------------------------------------------

    def pin(self, run_id: str, checkpoint_id: str | None = None, note: str = "") -> Pin:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id, note)
        with self._run_lock(run_id, "pin", anew=True) as files:
            self._known(files)
            sequence = 0 if checkpoint_id is None else _newest(files, checkpoint_id)
            if checkpoint_id is not None and not sequence:
                raise CheckpointNotFound(run_id, checkpoint_id, [each.sequence for each in files.retained()])
            pins = {each.sequence: each for each in self._pins(run_id)}
            at = pins[sequence].pinned_at if sequence in pins else self._clock()
            made = Pin(run_id, sequence, checkpoint_id, note, at)
            file_pins.write(self._pins_path(run_id), list({**pins, sequence: made}.values()))
            return made

    def unpin(self, run_id: str, checkpoint_id: str | None = None) -> bool:
        """See ``KeepsRuns``."""
        check_pin(run_id, checkpoint_id)
        with self._run_lock(run_id, "unpin", shared=True) as files:
            if not self._record_path(files.run_id).exists():
                return False
        with self._run_lock(run_id, "unpin", anew=True) as files:
            sequence = 0 if checkpoint_id is None else _newest(files, checkpoint_id)
            pins = self._pins(run_id)
            left = [pin for pin in pins if pin.sequence != sequence]
            if len(left) == len(pins) or (checkpoint_id is not None and not sequence):
                return False
            file_pins.write(self._pins_path(run_id), left)
            return True

    def list_pins(self, run_ids: Sequence[str] | None = None) -> list[Pin]:
        """See ``KeepsRuns``."""
        if run_ids is None:
            with self._reading("list pins of"):
                names = {path.stem for path in (self.base_path / "pins").glob("[!.]*.json")}
            run_ids = [run.run_id for run in self._records() if file_name(run.run_id) in names] if names else []
        found: list[Pin] = []
        for run_id in sorted({check_id(each) for each in run_ids}, key=lambda each: each.encode()):
            with self._run_lock(run_id, "list the pins of", shared=True):
                if self._record_path(run_id).exists():
                    found += self._pins(run_id)
        return found

    def _pins_path(self, run_id: str) -> Path:
        return self.base_path / "pins" / f"{file_name(run_id)}.json"

    def _pins(self, run_id: str) -> list[Pin]:
        return file_pins.read(self._pins_path(run_id), run_id)

    def _keep_pins(self, run_id: str, upto: int) -> None:
        """Forget the pins of checkpoints above a sequence, which are gone."""
        pins = self._pins(run_id)
        left = [pin for pin in pins if pin.sequence <= upto]
        if len(left) < len(pins):
            file_pins.write(self._pins_path(run_id), left)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _drop(self, files: RunFiles, going: Sequence[Entry], upto: int) -> int:
        """Retire checkpoints below the one at ``upto``, which stays, but for pinned ones; how many."""
        if not going:
            return 0
        pinned = {pin.sequence for pin in self._pins(files.run_id)}
        count = after = 0
        staying = [each.sequence for each in files.retained() if each.sequence < upto]
        gone = {each.sequence: each for each in going if each.sequence not in pinned}
        for end in [*(sequence for sequence in staying if sequence not in gone), upto]:
            between = [entry for sequence, entry in sorted(gone.items()) if after < sequence < end]
            if between:
                _faults.reach("retention")
                files.retire(between, since=between[0].sequence, after=after, upto=end)
                count += len(between)
            after = end
        return count

    def prune_older(self, run_id: str, before: float, limit: int = 50, *, dry_run: bool = False) -> int:
        """See ``KeepsRuns``."""
        check_id(run_id)
        with self._run_lock(run_id, "look for old checkpoints of", shared=True) as files:
            if not self._aged(files, before):
                return 0
        needed = newest_readable(self, run_id)  # type: ignore[arg-type]  # a part of a whole Storage
        with self._run_lock(run_id, "prune", edits=not dry_run, shared=dry_run, anew=True) as files:
            going = [entry for entry in self._aged(files, before) if needed is None or entry.sequence < needed]
            if dry_run or not going:
                return len(going)
            going = going[: max(1, limit)]
            upto = next(each.sequence for each in files.retained() if each.sequence > going[-1].sequence)
            return self._drop(files, going, upto)

    def _aged(self, files: RunFiles, before: float) -> list[Entry]:
        """The checkpoints of a run that may go by age, oldest first."""
        retained = files.retained()
        if len(retained) < 2 or retained[0].at >= before:
            return []
        pinned = {pin.sequence for pin in self._pins(files.run_id)}
        if 0 in pinned:
            return []
        found = []
        for entry in retained[:-1]:
            if entry.at >= before:
                break
            if entry.sequence not in pinned:
                found.append(entry)
        return found

    # --- what may go --------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """See ``KeepsRuns``."""
        with self._reading("measure it"):
            used = _size_of(self.base_path) - _size_of(self.base_path / RETIRED)
        return StoreUsage(self._clock(), used)

    def list_ended(
        self, states: Sequence[RunState], limit: int = 100, after: RunRecord | None = None
    ) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        found = self._ended(states)
        if after is not None:
            found = [run for run in found if _change(run) > _change(after)]
        return found[:limit]

    def nth_newest_ended(self, states: Sequence[RunState], count: int) -> RunRecord | None:
        """See ``KeepsRuns``."""
        found = self._ended(states)
        return found[-count] if len(found) >= count else None

    def _ended(self, states: Sequence[RunState]) -> list[RunRecord]:
        records = self._records()
        there = {run.run_id for run in records}
        whole = [run.run_id for run in records if run.parent_run_id not in there]
        return sorted((run for run in self._current(whole) if run.state in states), key=_change)

    def list_aged(self, before: float, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        """See ``KeepsRuns``."""
        found: list[RunRecord] = []
        for run in self._current([run.run_id for run in self._records() if run.created_at < before], free=True):
            if len(found) == limit:
                break
            if after is not None and age(run) <= age(after):
                continue
            with self._run_lock(run.run_id, "look for old checkpoints of", shared=True) as files:
                if self._aged(files, before):
                    found.append(run)
        return found

    # --- removing it --------------------------------------------------------------------------------------------

    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        """See ``KeepsRuns``. Each run of a family goes by itself, the whole first: until the next sweep, a kill may
        leave parts, which then are runs of their own. Nobody waits but who wants one of these very runs, so it goes on
        for as long as it took to look which runs are parts."""
        began = time.monotonic()
        parts: dict[str, list[str]] = {}
        for record in self._records():
            if record.parent_run_id is not None:
                parts.setdefault(record.parent_run_id, []).append(record.run_id)
        until = time.monotonic() + max(seconds, time.monotonic() - began)
        done: list[Retired] = []
        for run in runs:
            done.append(self._retire(run, _family(run.run_id, parts), states, dry_run=dry_run))
            if time.monotonic() >= until and not dry_run:
                break
        return done

    def _retire(self, run: RunRecord, run_ids: Sequence[str], states: Sequence[RunState], *, dry_run: bool) -> Retired:
        try:
            family = [found for run_id in run_ids if (found := self._standing(run_id)) is not None]
        except CorruptData as error:
            return Retired(kept=f"it cannot be read: {error}")
        except HeldUp as error:
            return Retired(kept=f"another process is at it: {error}")
        kept = why_kept(run, family, states, self._clock())
        if kept:
            return Retired(kept=kept)
        checkpoints = size = 0
        for each in family:
            with self._run_lock(each.run.run_id, "measure", shared=True) as files:
                checkpoints += len(files.retained())
                size += sum(_size_of(path) for path in self._paths(each.run.run_id))
        if dry_run:
            return Retired(tuple(each.run.run_id for each in family), checkpoints, size)
        gone: list[str] = []
        for each in family:
            self._mark(each.run.run_id)
        for each in family:
            kept = self._take_away(each, states)
            if kept and not gone:
                return Retired(kept=kept)
            if not kept:
                gone.append(each.run.run_id)
        return Retired(tuple(gone), checkpoints, size)

    def _standing(self, run_id: str) -> Standing | None:
        with self._run_lock(run_id, "look at", shared=True, anew=True, patience=LOOK_SECONDS) as files:
            return self._standing_in(files)

    def _standing_in(self, files: RunFiles) -> Standing | None:
        record = self._stored(files)
        if record is None:
            return None
        pins = self._pins(files.run_id)
        return Standing(
            self._shown(record), *(any((pin.sequence == 0) == run for pin in pins) for run in (True, False))
        )

    def _take_away(self, expected: Standing, states: Sequence[RunState]) -> str:
        """Remove a run's record and document if it still stands so; else why it stays."""
        run_id = expected.run.run_id
        with self._run_lock(run_id, "remove", new=True, edits=True, anew=True) as files:
            found = self._standing_in(files)
            kept = why_kept(expected.run, [] if found is None else [found], states, self._clock())
            if kept:
                return kept
            _faults.reach("sweep.inside")
            path = self._record_path(run_id)
            path.unlink()  # from here on there is no such run
            sync_directory(path.parent)
            _faults.reach("sweep.retired")
        self._documents.delete(run_id)
        return ""

    def _mark(self, run_id: str) -> None:
        path = self.base_path / RETIRED / f"{file_name(run_id)}.json"
        with self._guard(f"remove run {run_id!r}"):
            make_directory(path.parent)
            write_atomic(path, dump_checked({"run_id": run_id}))

    def _paths(self, run_id: str) -> list[Path]:
        """All that a run has, but for its documents and lock."""
        folders = [self._checkpoints(run_id), self._history(run_id), self._messages(run_id), self._journal(run_id)]
        return [*folders, self._pins_path(run_id), self._pointer(run_id), self._record_path(run_id)]

    def purge(self, seconds: float = 0.004) -> bool:
        """See ``KeepsRuns``."""
        folder = self.base_path / RETIRED
        if not folder.is_dir():
            return False
        until = time.monotonic() + seconds
        with self._guard("remove the files of runs that are gone"):
            names = sorted(os.listdir(folder))
        for name in names:
            path = folder / name
            if name.endswith(".json") and not name.startswith("."):
                self._put_aside(path)
            elif path.is_dir():
                # Out of everybody's way: no lock is needed.
                with self._guard("remove the files of runs that are gone"):
                    pass
                if not _remove_tree(path, until):
                    return True
            _faults.reach("sweep.purge")
            if time.monotonic() >= until:
                break
        with self._guard("remove the files of runs that are gone"):
            return any(not name.startswith(".") for name in os.listdir(folder))

    def _put_aside(self, marker: Path) -> None:
        """Move what is left of a retired run out of the way, and forget that it is to be removed."""
        try:
            run_id = load_checked(marker)["run_id"]
        except FileNotFoundError:  # another sweep was faster
            return
        except (CorruptData, KeyError):
            marker.unlink(missing_ok=True)  # it only says what to clean up
            return
        with self._run_lock(run_id, "remove the files of", new=True, edits=True):
            if not self._record_path(run_id).exists():
                for path in self._paths(run_id):
                    aside = marker.with_name(f"{path.parent.name}-{secrets.token_hex(8)}")
                    with suppress(FileNotFoundError):
                        if path.is_dir():
                            os.rename(path, aside)
                        else:
                            path.unlink()
                self._files.pop(run_id, None)
                (self.base_path / "locks" / f"{file_name(run_id)}.lock").unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
        if self._is_gone(run_id):
            self._documents.delete(run_id)

    def _is_gone(self, run_id: str) -> bool:
        with self._guard(f"look for run {run_id!r}"):
            return not self._record_path(run_id).exists()

    def shrink(self, seconds: float = 0.004) -> int:
        """See ``KeepsRuns``. Files that are gone take no room."""
        return 0

    def compact(self) -> int:
        """See ``KeepsRuns``: here it removes what is left of retired runs, and definitions that no run has."""
        before = _size_of(self.base_path)
        while self.purge(1.0):
            pass
        self._remove_definitions()
        return max(0, before - _size_of(self.base_path))


def _newest(files: RunFiles, checkpoint_id: str) -> int:
    """The sequence of the newest checkpoint of this id, or 0."""
    return max((each.sequence for each in files.retained() if each.checkpoint_id == checkpoint_id), default=0)


def _change(run: RunRecord) -> tuple[float, str]:
    return run.updated_at, run.run_id


def _family(run_id: str, parts: dict[str, list[str]]) -> list[str]:
    """A run, its parts and theirs, each before its own parts."""
    found = [run_id]
    for each in found:
        found += [part for part in parts.get(each, ()) if part not in found]
    return found


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 for none. Files that go meanwhile do not count."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as entries:
            return sum(_size_of(Path(entry.path)) for entry in entries)
    except FileNotFoundError:
        return 0


def _remove_tree(folder: Path, until: float) -> bool:
    """Remove a folder's files until a moment of the monotonic clock, and then the folder; whether it is gone."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            (folder / name).unlink(missing_ok=True)
            if time.monotonic() >= until:
                return False
        folder.rmdir()
    return True
