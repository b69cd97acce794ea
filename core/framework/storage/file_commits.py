"""The commits of one run as files: what a file says. The index by which they are found is in ``file_runs``.

A retained checkpoint is ``checkpoints/by_run/<run>/<checkpoint id>.json``; any other commit, and what is left of a
checkpoint that retention took, is ``history/<run>/<sequence>.json``. Both have the same form. While a commit has both
files, in the middle of being moved, the checkpoint counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from framework.errors import CorruptData
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk, Op
from framework.storage.file_io import dump_checked, load_checked, show, unshow

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
