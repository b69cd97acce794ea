"""The ``Run`` documents of a ``FileStorage`` and their indexes: readable JSON, and JSON lists of run ids.

The documents are the truth, the indexes follow: ``indexes/unfinished`` exists while they do not. Who finds it without
its writer at work, or cannot read an index, builds all of them again.
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import orjson

from framework.errors import CorruptData
from framework.schemas.run import Run, RunSummary
from framework.storage.documents import document_bytes, nodes_of, parse_document
from framework.storage.file_io import file_name, text_of, write_atomic

logger = logging.getLogger(__name__)

INDEXES = ("by_goal", "by_status", "by_node")
_CHECKSUM = "$checksum"


class Lock(Protocol):
    """Holds the indexes against other threads and processes; ``shared`` against writers only."""

    def __call__(self, *, shared: bool = False) -> AbstractContextManager[None]: ...


class RunDocuments:
    """``runs/``, ``summaries/`` and ``indexes/`` below a directory. ``lock`` guards the indexes."""

    def __init__(self, base: Path, lock: Lock) -> None:
        self._runs = base / "runs"
        self._summaries = base / "summaries"
        self._indexes = base / "indexes"
        self._all = self._indexes / "all_runs.json"
        self._unfinished = self._indexes / "unfinished"
        self._lock = lock

    # --- documents ---

    def save(self, run: Run) -> None:
        """Store a document with its summary and index entries."""
        with self._lock():
            self.put(run)

    def put(self, run: Run) -> None:
        """``save`` for who holds the lock of the indexes already."""
        text = _with_checksum(document_bytes(run))
        self._begin(run.id)
        old = self._entries(run.id)
        write_atomic(self._path(run.id), text)
        summary = RunSummary.from_run(run).model_dump_json(indent=2)
        write_atomic(self._summaries / f"{file_name(run.id)}.json", summary.encode())
        order = self._read(self._all)
        if run.id not in order:
            order.append(run.id)
            self._write(self._all, order)
        new = self._entries_of(run)
        for path in old - new:
            self._write(path, [known for known in self._read(path) if known != run.id])
        for path in sorted(new):
            known = self._read(path)
            if run.id not in known:
                position = {run_id: index for index, run_id in enumerate(order)}
                self._write(path, sorted([*known, run.id], key=lambda one: position.get(one, len(order))))
        self._end()

    def replace(self, run_id: str, old: bytes, new: bytes) -> bool:
        """Put ``new`` in the place of a document that still is ``old``; whether it was. It is looked up by the same."""
        with self._lock():
            run = self._try_load(run_id)
            if run is None or document_bytes(run) != old:
                return False
            summary = RunSummary.from_run(parse_document(new, run_id, str(self._path(run_id))))
            write_atomic(self._path(run_id), _with_checksum(new))
            write_atomic(self._summaries / f"{file_name(run_id)}.json", summary.model_dump_json(indent=2).encode())
            return True

    def load(self, run_id: str) -> Run | None:
        """The document of a run, or ``None``. Raises ``CorruptData``."""
        path = self._path(run_id)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if _CHECKSUM.encode() in data:  # files of other writers have none
            data = _verified(data, path)
        return parse_document(data, run_id, str(path))

    def delete(self, run_id: str) -> bool:
        """Remove a document, its summary and index entries; whether there was one."""
        with self._lock():
            if not self._path(run_id).exists() and run_id not in self._read(self._all):
                return False
            self._begin(run_id)
            old = self._entries(run_id)
            self._path(run_id).unlink(missing_ok=True)
            (self._summaries / f"{file_name(run_id)}.json").unlink(missing_ok=True)
            for path in [self._all, *old]:
                self._write(path, [known for known in self._read(path) if known != run_id])
            self._end()
            return True

    def ids(self) -> list[str]:
        """The ids of all documents, in the order of their first save."""
        return self._listed(self._all)

    def goals(self) -> list[str]:
        """The goals that have documents."""
        with self._consistent():
            names = [path.stem for path in (self._indexes / "by_goal").glob("[!.]*.json")]
            goals = {goal for name in names if (goal := text_of(name)) is not None}
            for name in names:
                if text_of(name) is None:  # a cut name: the goal's text is in its documents
                    for run_id in self._try_read(self._indexes / "by_goal" / f"{name}.json")[:1]:
                        run = self._try_load(run_id)
                        if run is not None:
                            goals.add(run.goal_id)
            return sorted(goals)

    def find(self, index: str, key: str) -> list[str]:
        """The ids of the documents under a key of an index."""
        return self._listed(self._indexes / index / f"{file_name(key)}.json")

    # --- indexes ---

    def adopt(self) -> None:
        """Index the documents of a folder that has none of these indexes yet."""
        if not self._all.exists() and any(self._runs.glob("[!.]*.json")):
            self.rebuild()

    def rebuild(self) -> None:
        """Make the indexes from the documents. What cannot be read keeps the entries it has."""
        with self._lock():
            self._rebuild()

    def _rebuild(self) -> None:
        self._begin("")
        old_order = self._try_read(self._all)
        old_entries = {path: self._try_read(path) for path in self._index_files()}
        started: dict[str, float] = {}
        paths: dict[str, set[Path]] = {}
        for path in self._runs.glob("[!.]*.json"):
            run_id = text_of(path.stem)
            try:
                run = self._load_at(path, run_id)
            except CorruptData as error:
                logger.warning("Indexing: %s", error)
                candidates = [*old_order, *([] if run_id is None else [run_id])]
                known = next((one for one in candidates if self._path(one) == path), None)
                if known is not None:
                    started[known] = 0.0
                    paths[known] = {entry for entry, ids in old_entries.items() if known in ids}
            else:
                started[run.id] = run.started_at.timestamp()
                paths[run.id] = self._entries_of(run)
        position = {run_id: index for index, run_id in enumerate(old_order)}
        order = sorted(started, key=lambda one: (position.get(one, len(position)), started[one], one))
        lists: dict[Path, list[str]] = {path: [] for path in old_entries}
        for run_id in order:
            for path in paths[run_id]:
                lists.setdefault(path, []).append(run_id)
        for path, ids in lists.items():
            self._write(path, ids)
        self._write(self._all, order)
        self._end()

    def _load_at(self, path: Path, run_id: str | None) -> Run:
        if run_id is None:
            try:
                run_id = str(json.loads(path.read_bytes())["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptData(f"{path} is not a run document: {error!r}.") from None
        run = self.load(run_id)
        if run is None:
            raise CorruptData(f"{path} does not bear the name of its run, {run_id!r}.")
        return run

    def _listed(self, path: Path) -> list[str]:
        try:
            with self._consistent():
                return self._read(path)
        except CorruptData as error:
            logger.warning("%s The indexes are built again.", error)
            with self._lock():
                self._rebuild()
                return self._read(path)

    def _consistent(self) -> AbstractContextManager[None]:
        """Hold the indexes for reading, once no change of them is unfinished."""
        if self._unfinished.exists():
            with self._lock():  # waits for who is at work; if it is still there then, its writer died
                if self._unfinished.exists():
                    logger.warning("A process ended while it wrote indexes; they are built again.")
                    self._rebuild()
        return self._lock(shared=True)

    def _begin(self, run_id: str) -> None:
        if self._unfinished.exists() and run_id:
            self._rebuild()
        write_atomic(self._unfinished, run_id.encode())

    def _end(self) -> None:
        self._unfinished.unlink(missing_ok=True)

    def _entries(self, run_id: str) -> set[Path]:
        """Where the indexes have a run now; read from its document, or searched for when that cannot be read."""
        try:
            run = self.load(run_id)
        except CorruptData:
            return {path for path in self._index_files() if run_id in self._try_read(path)}
        return set() if run is None else self._entries_of(run)

    def _index_files(self) -> list[Path]:
        return [path for index in INDEXES for path in (self._indexes / index).glob("[!.]*.json")]

    def _entries_of(self, run: Run) -> set[Path]:
        keys = [("by_goal", run.goal_id), ("by_status", run.status.value), *(("by_node", one) for one in nodes_of(run))]
        return {self._indexes / index / f"{file_name(key)}.json" for index, key in keys}

    def _try_load(self, run_id: str) -> Run | None:
        try:
            return self.load(run_id)
        except CorruptData as error:
            logger.warning("Listing: %s", error)
            return None

    def _try_read(self, path: Path) -> list[str]:
        try:
            return self._read(path)
        except CorruptData:
            return []

    @staticmethod
    def _read(path: Path) -> list[str]:
        try:
            content = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return []
        except orjson.JSONDecodeError as error:
            raise CorruptData(f"The index {path} cannot be read: {error}.") from None
        if not isinstance(content, list) or not all(isinstance(run_id, str) for run_id in content):
            raise CorruptData(f"The index {path} is not a list of run ids.")
        return content

    @staticmethod
    def _write(path: Path, ids: list[str]) -> None:
        if ids:
            write_atomic(path, orjson.dumps(ids, option=orjson.OPT_INDENT_2))
        else:
            path.unlink(missing_ok=True)

    def _path(self, run_id: str) -> Path:
        return self._runs / f"{file_name(run_id)}.json"


def _with_checksum(data: bytes) -> bytes:
    content = json.loads(data)
    content[_CHECKSUM] = _digest(content)
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _digest(content: dict[str, Any]) -> str:
    # Not orjson: a document may hold integers beyond 64 bits.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _verified(data: bytes, path: Path) -> bytes:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CorruptData(f"The document {path} cannot be read: {error}.") from None
    if isinstance(content, dict) and _CHECKSUM in content and content.pop(_CHECKSUM) != _digest(content):
        raise CorruptData(
            f"The document {path} does not match its checksum. If it was edited on purpose, remove its {_CHECKSUM}."
        )
    return json.dumps(content).encode()
