"""Contents of a ``FileStorage`` as bytes with their places, and replacing them where they are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from framework.errors import CorruptData, RunNotFound
from framework.storage import file_definitions, file_messages
from framework.storage.chunks import Chunk
from framework.storage.documents import document_bytes
from framework.storage.file_commits import CommitFile, Entry
from framework.storage.file_documents import RunDocuments
from framework.storage.file_folder import Folder
from framework.storage.file_records import read_record, write_record
from framework.storage.file_runs import RunFiles
from framework.storage.records import Content, Damage, Place

Report = Callable[[Damage], None]

_BATCH_FILES = 100
Changes = dict[Place, tuple[bytes, bytes]]
"""By place: the bytes that were read there, and those to put there."""


class HasContents(Folder):
    """The part of ``FileStorage`` that moves contents as bytes."""

    _documents: RunDocuments

    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        """See ``Storage``."""
        return [chunk for _, chunk in self.read_placed_chunks(run_id, sequence)]

    def read_placed_chunks(self, run_id: str, sequence: int) -> list[tuple[int, Chunk]]:
        """See ``Storage``."""
        with self._run_lock(run_id, "read the state of", shared=True, anew=True) as files:
            return files.placed_chunks(sequence) if self._record_path(run_id).exists() else []

    def sample_header(self) -> bytes | None:
        """The header of some run that can be read, or ``None``; found without reading them all."""
        with self._reading("look into it"):
            for path in (self.base_path / "executions").glob("[!.]*.json"):
                try:
                    record = read_record(path)
                except CorruptData:
                    continue
                if record is not None:
                    return record.header
        return None

    # --- reading ------------------------------------------------------------------------------------------------

    def read_contents(
        self, run_id: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> Iterator[Content]:
        """See ``Storage``."""
        report = on_damage or _ignore
        if run_id is None:
            yield from self._definition_contents(report)
            return
        try:
            with self._reading(f"read the document of run {run_id!r}"):
                document = self._documents.load(run_id)
            if document is not None:
                yield Content(Place("document", run_id), document_bytes(document))
        except CorruptData as error:
            report(Damage(run_id, None, f"document of run {run_id}", str(error)))
        with self._run_lock(run_id, "read the contents of", shared=True, anew=True) as files:
            entries = sorted(files.commits.values(), key=lambda entry: entry.sequence)
            found = self._record_contents(run_id, report) if self._record_path(run_id).exists() else []
            found += [
                Content(Place("message", run_id, 0, message.name), message.body)
                for message in file_messages.read(self._messages(run_id), run_id, report)
            ]
            found += [
                Content(Place("journal", run_id, row.number, row.step), row.record)
                for row in files.journal.read_all(report)
            ]
            for damage in files.damage:
                report(damage)
        yield from found
        for start in range(0, len(entries), _BATCH_FILES):
            # The lock is not kept all the time: a file that moves meanwhile is left out.
            with self._run_lock(run_id, "read the contents of", shared=True) as files:
                commits = list(_read_entries(files, entries[start : start + _BATCH_FILES], report))
            for commit in commits:
                yield from _commit_contents(commit)

    def _definition_contents(self, report: Report) -> Iterator[Content]:
        with self._reading("list its definitions"):
            paths = sorted((self.base_path / "definitions").glob("[!.]*.json"))
        for path in paths:
            try:
                with self._reading("read a definition of"):
                    fingerprint = file_definitions.fingerprint_in(path)
                    body = None if fingerprint is None else file_definitions.read(path, fingerprint)
                if fingerprint is not None and self._definition_path(fingerprint) != path:
                    raise CorruptData(f"{path} was renamed or copied: it is definition {fingerprint}.")
            except CorruptData as error:
                report(Damage("", None, str(path), str(error)))
                continue
            if fingerprint is not None and body is not None:
                yield Content(Place("definition", "", 0, fingerprint), body)

    def _record_contents(self, run_id: str, report: Report) -> list[Content]:
        try:
            record = read_record(self._record_path(run_id))
        except CorruptData as error:
            report(Damage(run_id, None, str(self._record_path(run_id)), str(error)))
            return []
        if record is None:
            return []
        found = [Content(Place("header", run_id), record.header)]
        return found if record.error is None else [*found, Content(Place("error", run_id), record.error.encode())]

    # --- replacing ----------------------------------------------------------------------------------------------

    def replace_contents(self, changes: Sequence[tuple[Content, bytes]]) -> int:
        """See ``Storage``. All or nothing file by file."""
        by_run: dict[str, Changes] = {}
        for content, data in changes:
            by_run.setdefault(content.place.run_id, {})[content.place] = (content.data, data)
        definitions = by_run.pop("", {})
        count = sum(self._replace_definition(place.key, old, new) for place, (old, new) in definitions.items())
        return count + sum(self._replace_of_run(run_id, found) for run_id, found in by_run.items())

    def _replace_definition(self, fingerprint: str, old: bytes, new: bytes) -> bool:
        with self._guard("replace a definition of"):
            return file_definitions.replace(self._definition_path(fingerprint), fingerprint, old, new)

    def _replace_of_run(self, run_id: str, changes: Changes) -> int:
        count = 0
        document = changes.pop(Place("document", run_id), None)
        if document is not None:
            count += self._documents.replace(run_id, *document)
        try:
            with self._run_lock(run_id, "replace contents of", edits=True, anew=True) as files:
                count += self._replace_in_record(run_id, changes)
                places = {place for place in changes if place.kind == "message"}
                for place in places:
                    count += file_messages.replace(self._messages(run_id), run_id, place.key, *changes[place])
                rows = {
                    (place.key, place.sequence): change for place, change in changes.items() if place.kind == "journal"
                }
                count += files.journal.replace(rows) if rows else 0
                count += _replace_in_commits(files, changes)
        except RunNotFound:
            return count  # it was deleted meanwhile
        return count

    def _replace_in_record(self, run_id: str, changes: Changes) -> int:
        header, error = changes.get(Place("header", run_id)), changes.get(Place("error", run_id))
        if header is None and error is None:
            return 0
        record = read_record(self._record_path(run_id))
        if record is None:
            return 0
        made, count = record, 0
        if header is not None and record.header == header[0]:
            made, count = replace(made, header=header[1]), count + 1
        if error is not None and record.error == error[0].decode():
            made, count = replace(made, error=error[1].decode()), count + 1
        if count:
            write_record(self._record_path(run_id), made)
        return count


def _read_entries(files: RunFiles, entries: Sequence[Entry], report: Report) -> Iterator[CommitFile]:
    for entry in entries:
        try:
            yield files.read_entry(entry)
        except FileNotFoundError:
            continue
        except CorruptData as error:
            report(Damage(files.run_id, entry.sequence, str(entry.path), str(error)))


def _commit_contents(commit: CommitFile) -> Iterator[Content]:
    run_id, at = commit.run_id, commit.sequence
    if at:  # the record of the initial state is the store's own
        yield Content(Place("record", run_id, at), commit.record)
    if commit.log is not None:
        yield Content(Place("log", run_id, at), commit.log)
    if commit.checkpoint_id is not None and commit.checkpoint is not None:
        yield Content(Place("checkpoint", run_id, at, commit.checkpoint_id), commit.checkpoint)
    if commit.error is not None:
        yield Content(Place("error", run_id, at), commit.error.encode())
    for chunk in commit.chunks:
        yield Content(Place("chunk", run_id, at, chunk.key, chunk.op), chunk.data)


def _replace_in_commits(files: RunFiles, changes: Changes) -> int:
    """Write each commit's file again in which something is to be replaced; how much was."""
    count = 0
    kinds = ("record", "log", "checkpoint", "error", "chunk")
    for sequence in sorted({place.sequence for place in changes if place.kind in kinds}):
        entry = files.commits.get(sequence)
        if entry is None:
            continue
        commit = files.read_entry(entry)
        made = rewritten(commit, changes)
        if made != commit:
            before, after = list(_commit_contents(commit)), list(_commit_contents(made))
            count += sum(one != other for one, other in zip(before, after, strict=True))
            files.put(entry.path, made)
    return count


def rewritten(commit: CommitFile, changes: Changes) -> CommitFile:
    """A commit with those of its contents replaced that are as they were read."""

    def now(place: Place, data: bytes) -> bytes:
        old, new = changes.get(place, (None, data))
        return new if old == data else data

    run_id, at, checkpoint_id = commit.run_id, commit.sequence, commit.checkpoint_id
    return replace(
        commit,
        record=now(Place("record", run_id, at), commit.record),
        log=None if commit.log is None else now(Place("log", run_id, at), commit.log),
        checkpoint=None
        if commit.checkpoint is None or checkpoint_id is None
        else now(Place("checkpoint", run_id, at, checkpoint_id), commit.checkpoint),
        error=None if commit.error is None else now(Place("error", run_id, at), commit.error.encode()).decode(),
        chunks=tuple(
            chunk._replace(data=now(Place("chunk", run_id, at, chunk.key, chunk.op), chunk.data))
            for chunk in commit.chunks
        ),
    )


def _ignore(damage: Damage) -> None:
    """What nobody asked to hear of."""
