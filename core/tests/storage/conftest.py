"""The backends that storage tests run on, each with a clock that tests move."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.postgres import PostgresStorage
from framework.storage.sqlite import SQLiteStorage
from framework.testing import StorageUnderTest
from tests import forks
from tests.postgres_server import PostgresServer

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


def make_postgres(database: str) -> StorageUnderTest:
    """Stores in one database, each in a schema of its own."""

    def new(clock: Clock | None = None) -> Storage:
        return PostgresStorage(f"{database}?schema=t_{uuid.uuid4().hex}", clock=clock)

    def again(store: PostgresStorage, clock: Clock | None = None) -> Storage:
        store.close()
        return PostgresStorage(store.url, clock=clock)

    return StorageUnderTest(new, again)


def make(name: str, request: pytest.FixtureRequest) -> StorageUnderTest:
    """The backend of this name."""
    if name == "postgresql":
        # Asked for by name, so that the other backends' tests start no server.
        server: PostgresServer = request.getfixturevalue("postgres")
        # A store's URL leaves the password out; whoever opens it, here or in another process, finds it there.
        request.getfixturevalue("monkeypatch").setenv("PGPASSWORD", server.password)
        return make_postgres(request.getfixturevalue("postgres_database"))
    makers = {"memory": make_memory, "sqlite": make_sqlite, "files": make_files}
    return makers[name](request.getfixturevalue("tmp_path"))


@pytest.fixture(params=["memory", "sqlite", "files", "postgresql"])
def backend(request: pytest.FixtureRequest) -> Iterator[StorageUnderTest]:
    """Every backend in turn."""
    with make(request.param, request) as subject:
        yield subject


@pytest.fixture(params=["sqlite", "files", "postgresql"])
def durable(request: pytest.FixtureRequest) -> Iterator[StorageUnderTest]:
    """Every backend that outlives its process."""
    with make(request.param, request) as subject:
        yield subject


class Python(Protocol):
    """Runs a program in a process of its own; its arguments are texts, its environment this one's and ``env``."""

    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


@pytest.fixture
def python() -> Python:
    """A way to run a program in another process: gives what it printed, and fails unless it ends with ``code``."""

    def run(program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str:
        done = forks.run(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
