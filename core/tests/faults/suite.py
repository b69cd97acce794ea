"""The fault suite: ``make test-faults``, or ``python -m tests.faults.suite`` in core/.

Settings, all from the environment; the defaults are the whole suite:

    SEED=7                  the seed of all that is drawn; without one it is drawn itself, and always printed
    FAULTS_KILLS=10000      how many processes to kill; the other faults grow and shrink with it
    FAULTS_BACKENDS=...     of sqlite, files, postgres
    FAULTS_ONLY=...         faults (kills), or single tasks (kills/sqlite/17) as a failure names them
    FAULTS_LANES=2          tasks at a time; the number of processors
    FAULTS_REPORT=file      where to write the figures, as JSON

It is made of *tasks*, each with its own folder, stores and random numbers (of the seed and its name), so that one can
be repeated alone. What a task draws is the same each time; when the machine gets to it is not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import random
import select
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.faults import report
from tests.faults.bench import BACKENDS, Lab
from tests.faults.catalogue import FAULTS, Fault
from tests.faults.processes import prepare_to_fork
from tests.postgres_server import PostgresServer, running_postgres

WHOLE = 10_000
"""Kills in the whole suite: the measure that the sizes of the other faults are given for."""

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """A part of the suite that one lane does at a time."""

    fault: str
    backend: str
    number: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.fault}/{self.backend}/{self.number}"


@dataclass(frozen=True, slots=True)
class Settings:
    seed: str
    kills: int
    backends: tuple[str, ...]
    only: tuple[str, ...]
    lanes: int
    report: Path | None

    @staticmethod
    def from_environment() -> Settings:
        """Raises ``SystemExit`` with what is wrong."""
        get = os.environ.get
        backends = tuple(filter(None, (get("FAULTS_BACKENDS") or ",".join(BACKENDS)).split(",")))
        only = tuple(filter(None, (get("FAULTS_ONLY") or "").split(",")))
        unknown = [each for each in backends if each not in BACKENDS]
        unknown += [each for each in only if each.split("/")[0] not in FAULTS]
        if unknown:
            raise SystemExit(
                f"Unknown: {', '.join(unknown)}. Backends: {', '.join(BACKENDS)}. Faults: {', '.join(FAULTS)}."
            )
        try:
            kills = int(get("FAULTS_KILLS") or WHOLE)
            lanes = int(get("FAULTS_LANES") or os.cpu_count() or 1)
        except ValueError as error:
            raise SystemExit(f"FAULTS_KILLS and FAULTS_LANES are whole numbers: {error}.") from None
        seed = get("SEED") or str(random.SystemRandom().randrange(10**9))
        where = get("FAULTS_REPORT")
        return Settings(seed, max(1, kills), backends, only, max(1, lanes), Path(where) if where else None)

    def command(self, task: str) -> str:
        """What repeats one task."""
        return f"make test-faults SEED={self.seed} FAULTS_KILLS={self.kills} FAULTS_ONLY={task}"


def tasks_of(settings: Settings) -> list[Task]:
    """The tasks of the settings, those of all faults and backends mixed."""
    made: list[Task] = []
    for name, fault in FAULTS.items():
        chosen = [backend for backend in fault.backends if backend in settings.backends or backend not in BACKENDS]
        for backend in chosen:
            made.extend(_split(name, fault, backend, _size(fault, settings.kills, len(chosen))))
    if settings.only:
        made = [task for task in made if task.fault in settings.only or task.name in settings.only]
    random.Random(settings.seed).shuffle(made)
    return sorted(made, key=lambda task: not FAULTS[task.fault].slow)  # the long ones first, so that lanes end together


def _size(fault: Fault, kills: int, backends: int) -> int:
    total = fault.whole if fault.fixed else fault.whole * kills / WHOLE
    return max(1, round(total / backends)) if fault.whole else 0


def _split(name: str, fault: Fault, backend: str, size: int) -> Iterator[Task]:
    for number, start in enumerate(range(0, size, fault.chunk)):
        yield Task(name, backend, number, min(fault.chunk, size - start))


# --- lanes ----------------------------------------------------------------------------------------------------------


def perform(task: Task, seed: str, server: PostgresServer | None) -> dict[str, Any]:
    """Do one task; its outcome as plain data. The folder of one with violations stays."""
    folder = Path(tempfile.mkdtemp(prefix="surefoot-faults-"))
    lab = Lab(task.name, seed, folder, server)
    begun = time.monotonic()
    try:
        FAULTS[task.fault].run(lab, task.backend, task.size)
    except Exception:
        lab.violation(f"{task.name}: the task itself failed:\n{traceback.format_exc()}")
    if lab.violations:
        lab.violation(f"{task.name}: its files are in {folder}")
    else:
        shutil.rmtree(folder)
    return {
        "task": task.name,
        "fault": task.fault,
        "backend": task.backend,
        "count": lab.count,
        "kills": lab.kills,
        "violations": lab.violations,
        "seconds": time.monotonic() - begun,
        "notes": dict(lab.notes),
    }


def _lane(link: socket.socket, tasks: Sequence[Task], seed: str, server: PostgresServer | None) -> None:
    with link.makefile("rb") as orders:
        for order in orders:
            outcome = perform(tasks[int(order)], seed, server)
            link.sendall(orjson.dumps(outcome) + b"\n")


def _start_lanes(count: int, work: Callable[[socket.socket], None]) -> list[socket.socket]:
    links: list[socket.socket] = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        if os.fork() == 0:
            try:
                for other in (*links, ours):
                    other.close()
                work(theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        links.append(ours)
    return links


def _preload(backends: Collection[str]) -> None:
    """Import what the workers would each import for themselves otherwise."""
    if "postgres" in backends:
        for name in ("psycopg", "psycopg.types.json", "psycopg_binary", "framework.storage.postgres"):
            importlib.import_module(name)


def run_all(settings: Settings, tasks: Sequence[Task], server: PostgresServer | None) -> Iterator[dict[str, Any]]:
    """The outcomes, as they come. Raises ``RuntimeError`` when a lane ends."""
    _preload({task.backend for task in tasks})
    prepare_to_fork()
    links = _start_lanes(settings.lanes, lambda link: _lane(link, tasks, settings.seed, server))
    waiting = list(range(len(tasks)))[::-1]
    busy: dict[socket.socket, Any] = {}
    try:
        for link in links:
            if waiting:
                link.sendall(b"%d\n" % waiting.pop())
                busy[link] = link.makefile("rb")
        while busy:
            for link in select.select(list(busy), [], [])[0]:
                line = busy[link].readline()
                if not line:
                    raise RuntimeError("A lane of the fault suite ended by itself.")
                if waiting:
                    link.sendall(b"%d\n" % waiting.pop())
                else:
                    del busy[link]
                yield orjson.loads(line)
    finally:
        for link in links:
            link.close()
        for _ in links:
            with contextlib.suppress(ChildProcessError):
                os.wait()


# --- the program ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Run what the environment asks for; 0 when there was no violation."""
    settings = Settings.from_environment()
    tasks = tasks_of(settings)
    print(f"==> fault suite: SEED={settings.seed}, {len(tasks)} tasks on {settings.lanes} lanes", flush=True)
    if not tasks:
        raise SystemExit("FAULTS_ONLY and FAULTS_BACKENDS leave nothing to do.")
    outcomes: list[dict[str, Any]] = []
    begun = told = time.monotonic()
    with contextlib.ExitStack() as stack:
        server = None
        if any(task.backend == "postgres" for task in tasks):
            server = stack.enter_context(running_postgres())
        for outcome in run_all(settings, tasks, server):
            outcomes.append(outcome)
            for text in outcome["violations"]:
                print(f"VIOLATION {text}", flush=True)
            if outcome["violations"]:
                print(f"repeat with: {settings.command(outcome['task'])}", flush=True)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                print(report.progress(outcomes, len(tasks), told - begun), flush=True)
    figures = report.figures(outcomes, settings.seed, time.monotonic() - begun, machine())
    print(report.table(figures), flush=True)
    if settings.report is not None:
        settings.report.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    broken = sum(len(outcome["violations"]) for outcome in outcomes)
    again = f"make test-faults SEED={settings.seed} FAULTS_KILLS={settings.kills}"
    print(f"==> {broken} violations; repeat with: {again}", flush=True)
    return 1 if broken else 0


def machine() -> str:
    """The class of this machine, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} processors ({platform.machine()}), {memory:.0f} GB, {platform.system()} "
        f"{'.'.join(platform.release().split('.')[:2])}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}"
    )


if __name__ == "__main__":
    sys.exit(main())
