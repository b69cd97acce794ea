"""The bench of every fault: stores of each kind, lives (processes) that work on a run, and the check after each."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framework import _faults
from framework.errors import SurefootError
from framework.storage import ownership
from framework.storage.backend import FileStorage, Storage, open_storage
from framework.storage.postgres import PostgresStorage
from framework.storage.sqlite import SQLiteStorage
from tests.faults.ledger import Entry, Event, Ledger, read_ledger, read_log, violations
from tests.faults.processes import Worker, WorkerFailed, run_apart, spawn
from tests.faults.work import run_work
from tests.postgres_server import PostgresServer

BACKENDS = ("sqlite", "files", "postgres")
"""The stores that outlive a process. A store in memory has no kill to survive; the model's machine drives it."""

LEASE_SECONDS = 30.0
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Life:
    """What one process is to do. ``fault`` is called in it once it is ready, before it opens the store.

    ``elsewhere`` has it pass for a process of another machine, of which only the lease tells whether it lives.
    """

    number: int
    url: str
    work: str
    run_id: str
    ledger: Path
    pace: float = 0.0
    lease: float = LEASE_SECONDS
    fault: Callable[[], None] | None = None
    clock: Clock | None = None
    elsewhere: bool = False

    def run(self) -> dict[str, Any]:
        """In the worker: the run's result, or the error that was raised."""
        if self.elsewhere:
            place = f"host-{self.number}/-/-"
            vars(ownership)["_place"] = lambda: place
        if self.fault is not None:
            self.fault()
        ledger = Ledger(self.ledger, self.number)
        try:
            with open_at(self.url, self.clock) as store:
                ledger.watch(store, self.run_id)
                return asyncio.run(run_work(self.work, store, self.run_id, ledger, self.pace, self.lease))
        except SurefootError as error:
            return {"raised": type(error).__name__, "text": str(error)}


def open_at(url: str, clock: Clock | None = None) -> Storage:
    """The store at ``url``, by ``clock`` if there is one."""
    if clock is None:
        return open_storage(url)
    if url.startswith("postgresql:"):
        return PostgresStorage(url, clock=clock)
    kind, _, path = url.partition("://")
    return SQLiteStorage(Path(path[1:]), clock=clock) if kind == "sqlite" else FileStorage(path, clock=clock)


def at_point(point: str, number: int, action: Callable[[], None]) -> Callable[[], None]:
    """A fault for a life: ``action`` when it reaches ``point`` for the ``number``-th time."""

    def install() -> None:
        reached: Counter[str] = Counter()

        def hook(name: str) -> None:
            reached[name] += 1
            if name == point and reached[name] == number:
                action()

        _faults.install(hook)

    return install


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# --- a task's means -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lab:
    """The means of one task: its folder, its random numbers, and what it has to report."""

    name: str
    seed: str
    folder: Path
    server: PostgresServer | None = None
    count: int = 0
    kills: int = 0
    violations: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    rng: random.Random = field(init=False)
    _stores: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.name}")

    @property
    def errors(self) -> Path:
        """Where workers write to standard error."""
        return self.folder / "errors.txt"

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def new_store(self, backend: str) -> str:
        """The URL of a store that does not exist yet."""
        self._stores += 1
        name = f"store{self._stores}"
        if backend == "sqlite":
            return f"sqlite:///{self.folder / name}.db"
        if backend == "files":
            return f"file://{self.folder / name}"
        schema = f"{self.name.replace('/', '_').replace('-', '_')}_{os.getpid()}_{self._stores}"
        return f"{self._server().url}?schema={schema}"

    def drop_store(self, url: str) -> None:
        """Remove a store that nobody uses any more."""
        if url.startswith("postgresql:"):
            server, name = self._server(), url.rpartition("=")[2]
            run_apart(lambda: len(server.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')), self.errors)
        elif url.startswith("file:"):
            shutil.rmtree(url.removeprefix("file://"))
        else:
            path = url.removeprefix("sqlite:///")
            for suffix in ("", "-wal", "-shm"):
                Path(path + suffix).unlink(missing_ok=True)

    def _server(self) -> PostgresServer:
        if self.server is None:
            raise RuntimeError("This task needs a PostgreSQL server, and none was started.")
        return self.server


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader of the store found after a life."""

    state: str | None
    owner: str | None
    token: int
    log: list[Entry]
    journal: int
    damage: list[str]


def look(url: str, run_id: str, work: str) -> dict[str, Any]:
    """In a process of its own: everything that the checks need of the store, which is verified as a whole."""
    with open_storage(url) as store:
        record = store.find_run(run_id)
        report = store.verify()
        return {
            "state": None if record is None else record.state.value,
            "owner": None if record is None else record.owner,
            "token": 0 if record is None else record.token,
            "log": [entry.to_json() for entry in read_log(store, run_id, work)],
            "journal": len(store.read_journal(run_id)) if record is not None else 0,
            "damage": [f"{item.where}: {item.problem}" for item in report.damage],
        }


def integrity(path: str) -> str:
    """What SQLite itself says of its file: "ok"."""
    with closing(sqlite3.connect(path)) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


SAME = ("success", "error", "output", "path", "steps", "tokens")
_references: dict[tuple[str, str], dict[str, Any]] = {}


def reference(work: str, lab: Lab) -> dict[str, Any]:
    """The result of a run of ``work`` that nothing disturbs. Its ``seconds`` are the whole life's."""
    key = (work, "sqlite")
    if key not in _references:
        folder = lab.folder / f"reference-{work}"
        folder.mkdir()
        life = Life(0, f"sqlite:///{folder}/runs.db", work, "run", folder / "ledger")
        result = spawn(life.run, lab.errors).result()
        if not result.get("success"):
            raise WorkerFailed(f"The undisturbed run failed: {result}")
        _references[key] = result
        shutil.rmtree(folder)
    return _references[key]


@dataclass(slots=True)
class Case:
    """One run over any number of lives, checked after each."""

    lab: Lab
    url: str
    work: str
    run_id: str
    pace: float = 0.0
    lease: float = LEASE_SECONDS
    lives: int = 0
    log: list[Entry] = field(default_factory=list)
    result: dict[str, Any] | None = None
    story: list[str] = field(default_factory=list)
    ledger: Path = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = self.lab.folder / f"ledger-{self.url.rpartition('=')[2].rpartition('/')[2]}-{self.run_id}"

    def next_life(self, **options: Any) -> Life:
        self.lives += 1
        life = Life(self.lives, self.url, self.work, self.run_id, self.ledger, self.pace, self.lease)
        return replace(life, **options)

    def start(self, **options: Any) -> Worker:
        return spawn(self.next_life(**options).run, self.lab.errors)

    def events(self) -> list[Event]:
        return read_ledger(self.ledger)

    def fail(self, text: str) -> None:
        """Report a violation, with what was done to the run."""
        self.lab.violation(f"{self.lab.name} {self.work} {self.run_id}: {text} [lives: {'; '.join(self.story[-12:])}]")

    def check(self, url: str | None = None) -> Seen:
        """Read the store and check every invariant that holds at any time."""
        url = url or self.url
        found = run_apart(lambda: look(url, self.run_id, self.work), self.lab.errors)
        seen = Seen(**{**found, "log": [Entry.from_json(each) for each in found["log"]]})
        for problem in (*seen.damage, *violations(self.events(), seen.log, self.log)):
            self.fail(problem)
        self.log = seen.log
        self.lab.count += 1
        return seen

    def take(self, result: dict[str, Any] | None) -> None:
        """Keep a life's result; one that says that the run failed is a violation."""
        if result is not None and "raised" in result:
            self.fail(f"a life ended with {result['raised']}: {result['text']}")
        self.result = result if result is not None and "success" in result else None

    def finish(self) -> None:
        """Let the run come to its end if it has not, and check that it is that of an undisturbed run."""
        if self.result is None:
            self.story.append("undisturbed")
            self.take(self.start().result())
        expected = reference(self.work, self.lab)
        if self.result is not None:
            for key in SAME:
                if self.result[key] != expected[key]:
                    self.fail(f"{key} is {self.result[key]!r}, of an undisturbed run {expected[key]!r}")
        seen = self.check()
        if (seen.state, seen.owner, seen.journal) != ("completed", None, 0):
            self.fail(f"it ended {seen.state}, owned by {seen.owner}, with {seen.journal} rows in its journal")
        ran = len(self.events())
        again = self.start().result()
        if {key: again.get(key) for key in SAME if key != "steps"} != {
            key: expected[key] for key in SAME if key != "steps"
        }:
            self.fail(f"called again it gives {again}")
        if len(self.events()) != ran:
            self.fail("called again after its end it ran something")
        self.ledger.unlink()


def now() -> float:
    return time.monotonic()
