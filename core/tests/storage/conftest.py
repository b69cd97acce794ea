"""The backends that storage tests run on, each with a clock that tests move."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.sqlite import SQLiteStorage
from framework.testing import StorageUnderTest

Clock = Callable[[], float]
CORE = Path(__file__).parents[2]


def make_memory(folder: Path) -> StorageUnderTest:
    def new(clock: Clock = time.time) -> Storage:
        return MemoryStorage(clock=clock)

    return StorageUnderTest(new)


def make_sqlite(folder: Path) -> StorageUnderTest:
    def new(clock: Clock = time.time) -> Storage:
        return SQLiteStorage(Path(tempfile.mkdtemp(dir=folder), "runs.db"), clock=clock)

    def again(store: SQLiteStorage, clock: Clock = time.time) -> Storage:
        store.close()
        return SQLiteStorage(store.path, clock=clock)

    return StorageUnderTest(new, again)


def make_files(folder: Path) -> StorageUnderTest:
    def new(clock: Clock = time.time) -> Storage:
        return FileStorage(tempfile.mkdtemp(dir=folder), clock=clock)

    def again(store: FileStorage, clock: Clock = time.time) -> Storage:
        store.close()
        return FileStorage(store.base_path, clock=clock)

    return StorageUnderTest(new, again)


@pytest.fixture(params=[make_memory, make_sqlite, make_files], ids=["memory", "sqlite", "files"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageUnderTest]:
    """Every backend in turn."""
    with request.param(tmp_path) as subject:
        yield subject


@pytest.fixture(params=[make_sqlite, make_files], ids=["sqlite", "files"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorageUnderTest]:
    """Every backend that outlives its process."""
    with request.param(tmp_path) as subject:
        yield subject


class Python(Protocol):
    """Runs a program in a process of its own; its arguments are texts, its environment this one's and ``env``."""

    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


@pytest.fixture
def python() -> Python:
    """A way to run a program in another process: gives what it printed, and fails unless it ends with ``code``."""

    def run(program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
