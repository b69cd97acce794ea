"""Surefoot beside its peers and the raw stores: every workload in one interleaved session on this machine.

``make bench`` runs it. Each participant runs each workload in a process of its own, in turn with the others and
several times; the tables hold medians. Compare only figures of one session. What is measured, and with which versions,
is in ``participants.py`` and ``peers/*.lock``. Results go to ``docs/benchmarks/``: ``results.json`` (every sample),
``results.md`` (the tables) and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environments import HERE, PEERS, ROOT, EnvironmentUnavailable, python_of
from participants import COMMANDS, IMPORTS, OWN, PARTICIPANTS, Participant

DOCS = ROOT / "docs" / "benchmarks"
CONVERSATIONS = (50, 200, 800, 3200)
RESUME_AT = 800
QUADRATIC = 1.5
"""A conversation whose bytes grow with this exponent from 200 to 800 messages is not measured at 3,200."""
_LONGEST_SECONDS = 600
"""What takes longer than this is stopped, and counts as failed."""
_FSYNCS = "fsync,fdatasync,sync_file_range,msync"


class WorkloadError(Exception):
    """A program of a participant failed, took too long, or said nothing that can be read."""


@dataclass(frozen=True)
class Sample:
    """One run of one workload by one participant."""

    participant: str
    workload: str
    steps: int
    runs: int
    seconds: float
    units: int
    stored: int
    written: int


@dataclass
class Session:
    """Everything one call of this program measured; what ``results.json`` holds."""

    facts: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    fsyncs: dict[str, float] = field(default_factory=dict)
    """Participant to calls of fsync and its kin for each step of ``small``."""
    starts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of whole processes: ``import X`` less an empty program, ``X --help``."""
    left_out: list[str] = field(default_factory=list)
    """What was not measured, and why."""
    failures: list[str] = field(default_factory=list)
    """What failed of this project's own programs and of the floors; with any, ``make bench`` ends with an error."""

    def fail(self, who: Participant, workload: str, error: Exception) -> None:
        """Note that a participant could not run a workload; its figures of that workload go, as they are not whole."""
        self.samples = [each for each in self.samples if (each.participant, each.workload) != (who.name, workload)]
        self.left_out.append(f"{who.name}, {workload}: {str(error).splitlines()[0]}")
        if who.group != "peer":
            self.failures.append(str(error))

    def fail_start(self, what: str, error: Exception, *, is_own: bool) -> None:
        """Note that a program could not be started for its time; its other times go."""
        self.starts.pop(what, None)
        self.left_out.append(f"{what}: {error}")
        if is_own:
            self.failures.append(f"{what}: {error}")

    def chosen(self, participant: str, workload: str, steps: int | None = None) -> list[Sample]:
        """The samples of one cell."""
        return [
            each
            for each in self.samples
            if (each.participant, each.workload) == (participant, workload) and steps in (None, each.steps)
        ]

    def median(self, participant: str, workload: str, what: str, steps: int | None = None) -> float | None:
        """Median of ``seconds`` (a unit), ``stored`` or ``written`` (bytes); ``None`` when nothing was measured."""
        samples = self.chosen(participant, workload, steps)
        if not samples:
            return None
        if what == "seconds":
            return statistics.median(each.seconds / each.units for each in samples)
        return statistics.median(getattr(each, what) for each in samples)


def _ended(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. One that takes too long is stopped with all that it started, as ``strace`` does."""
    try:
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
        )
    except OSError as error:
        raise WorkloadError(f"it cannot be started: {error}") from None
    try:
        out, err = running.communicate(timeout=_LONGEST_SECONDS)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise WorkloadError(f"it was stopped after {_LONGEST_SECONDS} s") from None
        raise
    return subprocess.CompletedProcess(command, running.returncode, out, err)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]


class Bench:
    """Runs programs and keeps what they say."""

    def __init__(self, session: Session, folder: Path, pythons: dict[str, Path], server: Any, ends: float) -> None:
        self._session = session
        self._folder = folder
        self._pythons = pythons
        self._server = server
        self._ends = ends
        self._number = 0
        self._failed_starts: set[str] = set()

    def is_over(self) -> bool:
        """Whether the time for repeats is used up."""
        return time.monotonic() > self._ends

    def measure(self, who: Participant, workload: str, steps: int, runs: int = 1) -> None:
        """Run a workload once and keep its sample."""
        with self._place(who) as (folder, url):
            if workload == "resume":
                self._run(who, "prepare", folder, url, steps, runs)
            before = self._wal(url)
            line = self._run(who, workload, folder, url, steps, runs)
            if url is not None:
                line["stored"] = self._size(url)
                line["written"] = self._wal(url) - before
            try:
                kept = {key: line[key] for key in ("seconds", "units", "stored", "written")}
            except (KeyError, TypeError):
                raise WorkloadError(f"{workload} printed what is no result: {line!r}") from None
            self._session.samples.append(Sample(who.name, workload, steps, runs, **kept))

    def count_fsyncs(self, who: Participant) -> None:
        """Calls of fsync for each step: of a long run less those of a short one, so that opening is not counted."""
        if who.is_postgres:
            counts = [self._server_syncs(who, steps) for steps in (40, 140)]
        elif shutil.which("strace"):
            counts = [self._traced(who, steps) for steps in (40, 140)]
        else:
            return
        self._session.fsyncs[who.name] = (counts[1] - counts[0]) / 100

    def time_starts(self) -> None:
        """Whole processes: what an import adds to an empty program, and ``--help``."""
        for environment, package in IMPORTS.items():
            if environment in self._pythons:
                python = str(self._pythons[environment])
                programs = [[python, "-c", "pass"], [python, "-c", f"import {package}"]]
                self._time_start(environment, f"import {package}", programs)
        for environment, command in COMMANDS.items():
            if environment in self._pythons:
                path = self._pythons[environment].parent / command
                self._time_start(environment, f"{command} --help", [[str(path), "--help"]])

    def _time_start(self, environment: str, what: str, programs: list[list[str]]) -> None:
        """Seconds of the last of the programs over those of the others; one that failed is not tried again."""
        if what in self._failed_starts:
            return
        try:
            *others, last = [self._whole(program) for program in programs]
        except WorkloadError as error:
            self._failed_starts.add(what)
            self._session.fail_start(what, error, is_own=environment == OWN)
        else:
            self._session.starts.setdefault(what, []).append(last - sum(others))

    @staticmethod
    def _whole(command: list[str]) -> float:
        began = time.perf_counter()
        done = _ended(command)
        if done.returncode:
            raise WorkloadError(f"it ended with {done.returncode}: {_last_line(done)}")
        return time.perf_counter() - began

    def _run(
        self, who: Participant, workload: str, folder: Path, url: str | None, steps: int, runs: int, *before: str
    ) -> dict[str, Any]:
        command = [*before, str(self._pythons[who.environment]), str(PEERS / who.program), workload]
        command += ["--folder", str(folder), "--steps", str(steps), "--runs", str(runs)]
        command += [part for option in who.options for part in ("--option", option)]
        command += ["--url", url] if url is not None else []
        try:
            done = _ended(command, folder)
        except WorkloadError as error:
            raise WorkloadError(f"{workload}: {error}") from None
        if done.returncode:
            said = f"{_last_line(done)}\n{done.stdout}{done.stderr}"
            raise WorkloadError(f"{workload} ended with {done.returncode}: {said}")
        try:
            line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise WorkloadError(f"{workload} printed no result\n{done.stdout}{done.stderr}") from None
        return line

    @contextlib.contextmanager
    def _place(self, who: Participant) -> Iterator[tuple[Path, str | None]]:
        """An empty folder, and an empty database for those that use one; both removed afterwards."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        name = f"bench_{self._number}"
        url = self._server.new_database(name) if who.is_postgres else None
        try:
            yield folder, url
        finally:
            shutil.rmtree(folder)
            if url is not None:
                self._server.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _size(self, url: str) -> int:
        """Bytes of a database over those of an empty one."""
        name = url.rpartition("/")[2]
        self._server.execute("CHECKPOINT")
        rows = self._server.execute(f"SELECT pg_database_size('{name}') - pg_database_size('template1')")
        return int(rows[0][0])

    def _wal(self, url: str | None) -> int:
        """Bytes the server has written to its log so far."""
        if url is None:
            return 0
        return int(self._server.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    def _server_syncs(self, who: Participant, steps: int) -> int:
        with self._place(who) as (folder, url):
            before = self._syncs()
            self._run(who, "small", folder, url, steps, 1)
            return self._syncs() - before

    def _syncs(self) -> int:
        time.sleep(1.1)  # a server process hands its counts on at most once in a second
        return int(self._server.execute("SELECT wal_sync FROM pg_stat_wal")[0][0])

    def _traced(self, who: Participant, steps: int) -> int:
        """Calls of fsync and its kin by every thread of a program."""
        with self._place(who) as (folder, url):
            log = folder.with_suffix(".strace")
            tracer = ("strace", "-f", "-qq", "-e", f"trace={_FSYNCS}", "-o", str(log))
            self._run(who, "small", folder, url, steps, 1, *tracer)
            lines = log.read_text(errors="replace").splitlines()
            log.unlink()
        return sum("sync(" in line or "sync_file_range(" in line for line in lines)


def plan(repeats: int) -> list[tuple[str, int, int, int]]:
    """Workload, steps, runs at once and how often, in the order they run within a repeat."""
    return [
        ("small", 200, 1, repeats),
        ("commit", 200, 1, repeats),
        ("call", 200, 1, repeats),
        ("concurrent", 20, 50, repeats),
        *(("conversation", steps, 1, repeats if steps < 800 else 1) for steps in CONVERSATIONS),
        ("large", 50, 1, min(repeats, 3)),
        ("resume", RESUME_AT, 1, min(repeats, 3)),
        ("waiting", 10, 1, repeats),
    ]


def run_all(
    bench: Bench, session: Session, repeats: int, chosen: Sequence[Participant], say: Callable[[str], None]
) -> Iterator[None]:
    """Every workload of every participant, in turn; the order of the participants changes with each repeat.

    Comes back after each workload, so that the caller can keep what was measured so far. What a participant cannot run
    is left out and said; the others go on.
    """
    failed: set[tuple[str, str]] = set()
    for repeat in range(repeats):
        bench.time_starts()
        for workload, steps, runs, times in plan(repeats):
            if repeat >= times:
                continue
            if repeat and bench.is_over():
                session.left_out.append(f"repeat {repeat + 1} of {workload} ({steps} steps): out of time")
                continue
            for who in (*chosen[repeat % len(chosen) :], *chosen[: repeat % len(chosen)]):
                if workload not in who.workloads or (who.name, workload) in failed:
                    continue
                if steps > CONVERSATIONS[2] and (exponent := _growth(session, who.name)) > QUADRATIC:
                    session.left_out.append(
                        f"{who.name}, {steps} messages: its bytes grow with exponent {exponent:.2f}"
                    )
                    continue
                say(f"{repeat + 1}/{repeats} {workload} {steps}: {who.name}")
                try:
                    bench.measure(who, workload, steps, runs)
                except WorkloadError as error:
                    failed.add((who.name, workload))
                    session.fail(who, workload, error)
            yield
    for who in chosen:
        if "small" in who.workloads and "no-store" not in who.options and (who.name, "small") not in failed:
            say(f"counting fsyncs: {who.name}")
            try:
                bench.count_fsyncs(who)
            except WorkloadError as error:
                session.fail(who, "fsyncs", error)
    yield


def _growth(session: Session, name: str) -> float:
    from report import exponent

    return exponent(session, name, CONVERSATIONS[1:3]) or 0.0


def facts_of_machine() -> dict[str, str]:
    """What the figures depend on, without a name of a machine."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {model}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "versions": ", ".join(_versions()),
    }


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def _versions() -> list[str]:
    named = ("langgraph", "langgraph-checkpoint-sqlite", "langgraph-checkpoint-postgres", "dbos", "apache-burr")
    found = []
    for lock in sorted(PEERS.glob("*.lock")):
        for line in lock.read_text().splitlines():
            name, _, version = line.partition("==")
            if name in (*named, "agent-framework-core"):
                found.append(f"{name} {version.split()[0]}")
    return found


def postgres() -> Any:
    """The private PostgreSQL of the tests, for as long as the ``with`` block runs."""
    path = ROOT / "core" / "tests" / "postgres_server.py"
    spec = importlib.util.spec_from_file_location("postgres_server", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["postgres_server"] = module
    spec.loader.exec_module(module)
    return module.running_postgres()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each workload runs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="no further repeat is begun after these")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="participants whose name holds NAME"
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="where the results go (default: docs/benchmarks)")
    parser.add_argument("--report", action="store_true", help="write tables and plots of the last session again")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    if not given.report:
        out.mkdir(parents=True, exist_ok=True)
        measure(given.repeats, given.minutes, given.only, out)
    write_report(out)
    if failures := load(out).failures:
        raise SystemExit("\n".join(["Programs of this project or the floors failed:", *failures]))


def measure(repeats: int, minutes: float, only: list[str], out: Path) -> None:
    """Make the environments and run everything; ``results.json`` is written anew after each workload."""
    began = time.monotonic()
    width = shutil.get_terminal_size().columns - 1

    def say(what: str) -> None:
        line = f"{time.monotonic() - began:5.0f} s  {what}"
        if sys.stderr.isatty():
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    session = Session(facts_of_machine())
    pythons = {OWN: Path(sys.executable)}
    for name in IMPORTS:
        if name != OWN:
            try:
                pythons[name] = python_of(name, say)
            except EnvironmentUnavailable as error:
                session.left_out.append(str(error).splitlines()[0])
    chosen = [
        who
        for who in PARTICIPANTS
        if who.environment in pythons and (not only or who.group == "floor" or any(part in who.name for part in only))
    ]
    if not shutil.which("strace"):
        session.left_out.append("fsyncs of the local stores: strace is not installed")
    with tempfile.TemporaryDirectory(prefix="surefoot-bench-") as folder, postgres() as server:
        bench = Bench(session, Path(folder), pythons, server, began + minutes * 60)
        for _ in run_all(bench, session, repeats, chosen, say):
            session.facts["took"] = f"{(time.monotonic() - began) / 60:.0f} minutes, {repeats} repeats"
            written = out / "results.json.new"
            written.write_text(json.dumps(asdict(session), indent=1) + "\n")
            written.replace(out / "results.json")
    say("done")
    print(file=sys.stderr)


def write_report(out: Path) -> None:
    """The tables, on the screen and beside the results, and the plots."""
    import report

    text = report.tables(load(out))
    (out / "results.md").write_text(text)
    print(text)
    try:
        python = python_of("plots", lambda what: print(what, file=sys.stderr))
    except EnvironmentUnavailable as error:
        raise SystemExit(str(error)) from None
    done = subprocess.run([python, HERE / "plots.py", out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The plots cannot be drawn:\n{done.stdout}{done.stderr}")
    print(done.stdout, end="")


def load(out: Path) -> Session:
    """The session whose results are in a folder."""
    path = out / "results.json"
    if not path.exists():
        raise SystemExit(f"There are no results in {out}; run it without --report first.")
    read = json.loads(path.read_text())
    read["samples"] = [Sample(**each) for each in read["samples"]]
    return Session(**read)


if __name__ == "__main__":
    main()
