"""What every benchmark program shares: its arguments, the data of the workloads, and what it prints.

Standard library only, since each program runs in the environment of the framework it measures.

A program runs one workload once, in a process of its own, and prints one line of JSON:
``{"seconds": time of the measured part, "units": steps or calls in it, "stored": bytes in the folder afterwards,
"written": bytes this process sent to the disk in the measured part}``. Imports, opening the store and making the graph
are outside the measured part, except in the workloads that are about them.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KB = 1024
BLOB_BYTES = 5_000_000


@dataclass(frozen=True)
class Given:
    """One run of one workload, as the command line gave it."""

    workload: str
    folder: Path
    """Of this run alone; local stores go here."""
    url: str | None
    """Of a PostgreSQL database that is empty, for participants that use one."""
    steps: int
    runs: int
    """How many runs at once, for the workload that has several."""
    options: frozenset[str]
    """Variants of the participant, for example ``async`` or ``delta``."""


class Watch:
    """Seconds and bytes written of the measured part."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.written = 0
        self._before = 0
        self._began = 0.0

    def start(self) -> None:
        """The measured part begins here."""
        self._before = bytes_written()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """The measured part ends here."""
        self.seconds = time.perf_counter() - self._began
        self.written = bytes_written() - self._before

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The measured part is this block."""
        self.start()
        yield
        self.stop()


Workload = Callable[[Given, Watch], int]
"""Runs the workload, with the measured part inside ``watch.measured()``, and returns the units in it."""


def main(workloads: Mapping[str, Workload]) -> None:
    """Run the workload the command line names and print what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=sorted(workloads))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--url")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--option", action="append", default=[])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    units = workloads[given.workload](
        Given(given.workload, given.folder, given.url, given.steps, given.runs, frozenset(given.option)), watch
    )
    report(watch, units, given.folder)


def report(watch: Watch, units: int, folder: Path) -> None:
    """Print the line of JSON the caller reads."""
    line = {"seconds": watch.seconds, "units": units, "stored": stored_bytes(folder), "written": watch.written}
    print(json.dumps(line), flush=True)


def leave(watch: Watch, units: int, folder: Path) -> None:
    """Print the line and end the process at once: where only the time up to here was to be measured."""
    report(watch, units, folder)
    sys.stdout.flush()
    os._exit(0)


def message(number: int) -> str:
    """The ``number``-th message: 1 KB of text that hardly compresses, the same in every process."""
    return base64.b64encode(random.Random(number).randbytes(KB * 3 // 4)).decode()


def blob() -> str:
    """A text of 5 MB."""
    return base64.b64encode(random.Random(0).randbytes(BLOB_BYTES * 3 // 4)).decode()


def bytes_written() -> int:
    """Bytes this process has sent towards the disk so far; 0 where the system does not count them."""
    try:
        facts = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in facts.splitlines() if line.startswith("write_bytes")))


def stored_bytes(folder: Path) -> int:
    """Size of everything in a folder, once the logs of its SQLite databases are folded in."""
    for path in folder.rglob("*-wal"):
        connection = sqlite3.connect(str(path).removesuffix("-wal"))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not path.name.endswith(("-wal", "-shm")))
