"""An account outside the agent: an append-only file that counts node bodies, model calls and tool calls.

The demo believes this file and not the agent. Each entry is one line of JSON and is synced to disk before the work it
announces goes on, so a process killed at any moment leaves a complete account of what it did and paid.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

current_step: ContextVar[str] = ContextVar("current_step", default="")
"""The step whose body is running here; worker threads of the step inherit it."""


class Ledger:
    """Writes entries of one run. Thread-safe; several processes may write to one file.

    Without a ``path`` nothing is written. ``tell`` is called with each entry as well, for a progress display.
    """

    def __init__(self, path: Path | None, run_id: str, tell: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.run_id = run_id
        self._tell = tell
        self._lock = threading.Lock()
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            # A line that a crash cut short must not swallow the next one. Readers skip empty lines.
            os.write(self._file, b"\n")

    def write(self, kind: str, **facts: Any) -> None:
        """Append one entry; on disk when this returns."""
        entry = {"kind": kind, "run": self.run_id, "pid": os.getpid(), "step": current_step.get(), **facts}
        with self._lock:
            if self._file is not None:
                os.write(self._file, json.dumps(entry).encode() + b"\n")
                os.fsync(self._file)
            if self._tell is not None:
                self._tell(entry)


def read(path: Path, run_id: str) -> list[dict[str, Any]]:
    """All complete entries of a run, oldest first; none when there is no such file."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line) if line else {}
        except ValueError:  # cut short by a crash
            continue
        if entry.get("run") == run_id:
            entries.append(entry)
    return entries


@dataclass(frozen=True, slots=True)
class Bill:
    """What a number of entries add up to. The money is invented."""

    bodies: int = 0
    tools: int = 0
    calls: int = 0
    tokens: int = 0
    usd: float = 0.0

    def __sub__(self, other: Bill) -> Bill:
        return Bill(
            self.bodies - other.bodies,
            self.tools - other.tools,
            self.calls - other.calls,
            self.tokens - other.tokens,
            self.usd - other.usd,
        )


def bill(entries: list[dict[str, Any]]) -> Bill:
    """Add up entries."""
    calls = [entry for entry in entries if entry["kind"] == "llm"]
    return Bill(
        bodies=sum(entry["kind"] == "body" for entry in entries),
        tools=sum(entry["kind"] == "tool" for entry in entries),
        calls=len(calls),
        tokens=sum(entry["tokens"] for entry in calls),
        usd=sum(entry["usd"] for entry in calls),
    )


def bodies(entries: list[dict[str, Any]]) -> dict[str, list[str]]:
    """By step, the idempotency key each run of its body was given, in order."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        if entry["kind"] == "body":
            found.setdefault(entry["step"], []).append(entry["key"])
    return found
