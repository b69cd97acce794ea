"""The programs of ``make bench`` for this project and the floors, and its tables."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("compare", "environments", "participants", "report"):
        sys.modules.pop(name, None)


def run(program: str, workload: str, folder: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "peers" / program), workload, "--folder", str(folder), *more]
    done = forks.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout)
    return line


@pytest.mark.parametrize("program", ["raw_program.py", "surefoot_program.py"])
@pytest.mark.parametrize("workload", ["small", "conversation", "call"])
def test_a_program_measures_its_steps(program: str, workload: str, tmp_path: Path) -> None:
    measured = run(program, workload, tmp_path, "--steps", "6")
    assert measured["units"] == 6
    assert measured["seconds"] > 0
    # A journal goes with its step, a replaced value need not stay; what else is stored is at least one message.
    assert measured["stored"] > 1024


@pytest.mark.parametrize("program", ["raw_program.py", "surefoot_program.py"])
def test_runs_at_once_are_all_counted(program: str, tmp_path: Path) -> None:
    assert run(program, "concurrent", tmp_path, "--steps", "3", "--runs", "4")["units"] == 12


@pytest.mark.parametrize("program", ["raw_program.py", "surefoot_program.py"])
def test_resume_goes_on_where_the_first_process_died(program: str, tmp_path: Path) -> None:
    run(program, "prepare", tmp_path, "--steps", "5")
    assert run(program, "resume", tmp_path, "--steps", "5")["seconds"] > 0


def test_the_commits_of_a_run_are_written_again_without_it(tmp_path: Path) -> None:
    measured = run("surefoot_program.py", "commit", tmp_path, "--steps", "6")
    assert measured["units"] == 6
    assert measured["stored"] > 6 * 1024


def test_a_resume_at_the_wrong_place_is_no_figure(tmp_path: Path) -> None:
    run("surefoot_program.py", "prepare", tmp_path, "--steps", "5")
    command = [sys.executable, str(BENCHMARKS / "peers" / "surefoot_program.py"), "resume", "--folder", str(tmp_path)]
    done = forks.run([*command, "--steps", "4"], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode != 0
    assert not done.stdout


def test_without_a_store_nothing_is_written(tmp_path: Path) -> None:
    assert run("surefoot_program.py", "small", tmp_path, "--steps", "4", "--option", "no-store")["stored"] == 0
    assert not list(tmp_path.rglob("*"))


@pytest.mark.usefixtures("on_path")
def test_the_tables_say_what_was_measured_and_what_was_not() -> None:
    compare, report = importlib.import_module("compare"), importlib.import_module("report")
    session = compare.Session({"date": "today"}, left_out=["burr sqlite, 3200 messages: its bytes grow"])
    for steps, stored in ((50, 51_200), (200, 204_800), (800, 819_200)):
        session.samples.append(compare.Sample("surefoot", "conversation", steps, 1, 1.0, steps, stored, 0))
    for name, seconds in (("surefoot", 0.4), ("raw SQLite", 0.2)):
        session.samples.append(compare.Sample(name, "small", 200, 1, seconds, 200, 300_000, 0))
    page = report.tables(session)
    assert report.exponent(session, "surefoot") == pytest.approx(1.0)
    small = next(line for line in page.splitlines() if line.startswith("| surefoot ") and "2.000" in line)
    assert small.split("|")[3].strip() == "2.00"
    assert "burr sqlite, 3200 messages: its bytes grow" in page
    missed = next(line for line in page.splitlines() if line.startswith("| the whole durable step"))
    assert "**no**" in missed
    unknown = next(line for line in page.splitlines() if line.startswith("| resume at 800"))
    assert unknown.split("|")[4].strip() == "–"


@pytest.mark.usefixtures("on_path")
def test_what_one_participant_cannot_run_is_left_out_and_the_others_go_on() -> None:
    compare, participants = importlib.import_module("compare"), importlib.import_module("participants")
    session = compare.Session({})
    named = {who.name: who for who in participants.PARTICIPANTS}
    chosen = [named["burr sqlite"], named["surefoot"], named["raw SQLite"]]
    measured: list[tuple[str, str]] = []

    class Bench:
        """Measures nothing; burr's third run of ``concurrent`` fails."""

        def is_over(self) -> bool:
            return False

        def time_starts(self) -> None: ...

        def count_fsyncs(self, who: Any) -> None: ...

        def measure(self, who: Any, workload: str, steps: int, runs: int = 1) -> None:
            measured.append((who.name, workload))
            if measured.count(("burr sqlite", "concurrent")) == 3 and measured[-1] == ("burr sqlite", "concurrent"):
                raise compare.WorkloadError("concurrent ended with 1: the disk is full\nits own words")
            session.samples.append(compare.Sample(who.name, workload, steps, runs, 1.0, steps, 1000, 0))

    for _ in compare.run_all(Bench(), session, 5, chosen, lambda what: None):
        pass
    assert session.left_out == ["burr sqlite, concurrent: concurrent ended with 1: the disk is full"]
    assert not session.chosen("burr sqlite", "concurrent")
    assert measured.count(("burr sqlite", "concurrent")) == 3
    assert len(session.chosen("burr sqlite", "small")) == len(session.chosen("surefoot", "concurrent")) == 5
    assert not session.failures
    session.fail(named["surefoot"], "call", compare.WorkloadError("call ended with 1: no"))
    assert session.failures == ["call ended with 1: no"]


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for has."""
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.usefixtures("on_path")
def test_what_is_no_result_and_what_does_not_start_is_told_and_stopped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, participants = importlib.import_module("compare"), importlib.import_module("participants")
    raw = next(who for who in participants.PARTICIPANTS if who.name == "raw SQLite")
    session = compare.Session({})
    bench = compare.Bench(session, tmp_path, {raw.environment: Path(sys.executable)}, None, 0)
    program = tmp_path / "program.py"
    monkeypatch.setattr(compare, "PEERS", tmp_path)
    (tmp_path / raw.program).write_text("print('{\"seconds\": 1}')")
    with pytest.raises(compare.WorkloadError, match="no result: {'seconds': 1}"):
        bench.measure(raw, "small", 5)
    monkeypatch.setattr(compare, "IMPORTS", {raw.environment: "nothing_of_this_name"})
    monkeypatch.setattr(compare, "COMMANDS", {raw.environment: "nothing-of-this-name"})
    bench.time_starts()
    bench.time_starts()
    missing, command = session.left_out
    assert "No module named 'nothing_of_this_name'" in missing
    assert "cannot be started" in command
    assert not session.starts
    # What runs too long is stopped with what it started, as a tracer its program.
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    monkeypatch.setattr(compare, "_LONGEST_SECONDS", 1)
    with pytest.raises(compare.WorkloadError, match="stopped after 1 s"):
        compare._ended([sys.executable, str(program)], tmp_path)
    if (tmp_path / "child").exists():  # on a machine so slow that it never came to it there is none
        child = int((tmp_path / "child").read_text())
        until = time.monotonic() + 20
        while is_running(child):
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.usefixtures("on_path")
def test_every_participant_has_its_program_and_lock_file() -> None:
    participants = importlib.import_module("participants")
    for who in participants.PARTICIPANTS:
        assert (BENCHMARKS / "peers" / who.program).exists()
        assert who.environment == "surefoot" or (BENCHMARKS / "peers" / f"{who.environment}.lock").exists()
    assert len({who.name for who in participants.PARTICIPANTS}) == len(participants.PARTICIPANTS)
