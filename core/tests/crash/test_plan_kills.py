"""SIGKILL at every named point of a plan with parallel steps; fresh processes go on until it is complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from framework import _faults
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.backend import open_storage
from framework.storage.checkpoints import parse_log
from tests import forks

PROGRAM = Path(__file__).with_name("plan_program.py")
CORE = Path(__file__).parents[2]
RUN_ID = "plan-1"

# Which time a point is reached the first process ends, and the second.
KILLS = dict.fromkeys((*_faults.POINTS, "node.inside"), (3, 2)) | {"branch.between": (1, 1)}
SAME = ("status", "completed", "executed")


@dataclass(frozen=True)
class Log:
    """What the store's log says: committed steps, recorded attempts, answered requests."""

    steps: frozenset[str]
    attempts: frozenset[str]
    answered: frozenset[str]


@dataclass
class Bench:
    """One plan over any number of processes."""

    folder: Path
    backend: str = "sqlite"
    concurrency: int = 3
    before: list[Log] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    kills: int = 0

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/runs.db" if self.backend == "sqlite" else f"file://{self.folder}/store"

    def start(self, arguments: dict[str, Any], fault: str | None = None) -> subprocess.Popen[str]:
        known = {"url": self.url, "ledger": str(self.folder / "ledger.jsonl"), "concurrency": self.concurrency}
        environment = {**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"}
        if fault is not None:
            environment["SUREFOOT_FAULT"] = fault
        command = [sys.executable, str(PROGRAM), json.dumps({**known, **arguments})]
        pipe = subprocess.PIPE
        return forks.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def live(self, fault: str | None = None, mode: str = "run", **more: Any) -> dict[str, Any] | None:
        """One process from its start to its end; ``None`` when it was killed."""
        self.before.append(self.log())
        process = self.start({"mode": mode, **more}, fault)
        output, errors = process.communicate(timeout=50)
        self.pids.append(process.pid)
        if process.returncode == -signal.SIGKILL:
            self.kills += 1
            return None
        assert process.returncode == 0, errors
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def events(self, kind: str) -> list[tuple[int, str]]:
        ledger = self.folder / "ledger.jsonl"
        if not ledger.exists():
            return []
        events = [json.loads(line) for line in ledger.read_text().splitlines()]
        return [(event["pid"], event["step"]) for event in events if event["event"] == kind]

    def log(self) -> Log:
        with open_storage(self.url) as storage:
            records = parse_log(storage.read_log(RUN_ID)) if storage.find_run(RUN_ID) is not None else []
            answers = [codec.decode(message.body)["step"] for message in storage.read_messages(RUN_ID)]
        steps = [record["node"] for record in records if record["kind"] == "step"]
        assert len(set(steps)) == len(steps), f"a step is in the log twice: {steps}"
        return Log(
            frozenset(steps),
            frozenset(f"{record['step']}@{record['attempt']}" for record in records if record["kind"] == "attempt"),
            frozenset(answers),
        )

    def check(self, expected: dict[str, Any], result: dict[str, Any] | None) -> None:
        """Nothing committed ran or was asked again, nothing was lost, and the result is the undisturbed one's."""
        assert result is not None
        assert {key: result[key] for key in SAME} == {key: expected[key] for key in SAME}
        for key in ("results", "again", "outputs"):
            assert codec.decode(result[key].encode()) == codec.decode(expected[key].encode()), key
        for pid, before in zip(self.pids, self.before, strict=True):
            started = [step.removeprefix(f"{RUN_ID}/") for owner, step in self.events("start") if owner == pid]
            assert len(set(started)) == len(started), f"process {pid} ran a body twice"
            assert not {step.partition("@")[0] for step in started} & before.steps, "a committed step ran again"
            assert not set(started) & before.attempts, "a recorded attempt was made again"
            assert not {step for owner, step in self.events("ask") if owner == pid} & before.answered
        ran = Counter(step for _, step in self.events("start"))
        assert max(ran.values()) <= 1 + self.kills
        assert self.before == sorted(self.before, key=lambda log: len(log.steps)), "a committed step was lost"
        with open_storage(self.url) as storage:
            for run_id, parent in ((RUN_ID, None), (f"{RUN_ID}/sub#1", RUN_ID)):
                run = storage.find_run(run_id)
                assert run is not None
                assert (run.state, run.owner, run.parent_run_id) == (RunState.COMPLETED, None, parent)
            report = storage.verify()
            assert report.ok, report.damage


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = Bench(tmp_path_factory.mktemp("undisturbed"), concurrency=1).live()
    assert result is not None
    assert result["status"] == "completed", result
    assert result["again"] == result["results"]
    return result


@pytest.mark.parametrize("point", KILLS)
def test_a_plan_killed_twice_is_the_undisturbed_plan(tmp_path: Path, undisturbed: dict[str, Any], point: str) -> None:
    bench = Bench(tmp_path)
    for number in KILLS[point]:
        assert bench.live(f"{point}:{number}") is None, f"{point} was not reached {number} times"
    bench.check(undisturbed, bench.live())


def test_killed_between_commits_over_files(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    bench = Bench(tmp_path, backend="file")
    for fault in ("commit.inside:3", "branch.between:1", "commit.after:2"):
        bench.live(fault)
    assert bench.kills >= 2
    bench.check(undisturbed, bench.live())


@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("point", ["answer.before", "answer.after"])
def test_the_process_that_approves_is_killed(
    tmp_path: Path, undisturbed: dict[str, Any], point: str, backend: str
) -> None:
    """Paused in one process, answered in another that dies around its answer, and finished in a third."""
    bench = Bench(tmp_path, backend=backend)
    waiting = bench.live(mode="wait")
    assert waiting is not None
    assert waiting["status"] == "awaiting_approval"
    assert bench.live(f"{point}:1", mode="approve") is None
    if point == "answer.before":
        assert bench.log().answered == set()
        assert bench.live(mode="approve") is not None
    assert bench.log().answered == {"gate"}
    bench.check(undisturbed, bench.live())
    assert bench.events("ask") == []


@pytest.mark.parametrize("backend", ["sqlite", "file"])
def test_of_processes_that_answer_at_once_one_wins(tmp_path: Path, undisturbed: dict[str, Any], backend: str) -> None:
    bench = Bench(tmp_path, backend=backend)
    assert bench.live(mode="wait") is not None
    processes = [bench.start({"mode": "approve", "hold": True}) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    told = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        output, errors = process.communicate(timeout=50)
        assert process.returncode == 0, errors
        told.append(json.loads(output.splitlines()[-1]))
    refused = [each["refused"] for each in told if "refused" in each]
    assert len(refused) == 2, told
    assert all("answered already (approve)" in each for each in refused)
    bench.check(undisturbed, bench.live())


def test_a_step_that_ends_its_process_each_time_is_given_up(tmp_path: Path) -> None:
    """With one commit for each recovery the count is durable before the step begins again."""
    bench = Bench(tmp_path, concurrency=1)
    lives = 0
    while (result := bench.live("node.inside:1", recoveries=2)) is None:
        lives += 1
        assert lives < 9, "it would go on for ever"
    assert lives == 1 + 2, "the first time, and two recoveries"
    assert (result["status"], result["interrupted"], result["executed"]) == ("failed", 3, 1)
    assert "ended its process 3 times in a row" in result["error"]
    assert "'p1'" in result["error"]
    assert [step for _, step in bench.events("start")].count(f"{RUN_ID}/p1") == 3
    with open_storage(bench.url) as storage:
        run = storage.find_run(RUN_ID)
        assert run is not None
        assert (run.state, run.error, run.owner) == (RunState.FAILED, result["error"], None)
    # Called again, as by somebody who has seen to it, the count begins anew.
    assert bench.live("node.inside:1", recoveries=2) is None
    finished = bench.live()
    assert finished is not None
    assert (finished["status"], finished["interrupted"]) == ("completed", 4)


@pytest.mark.parametrize("durability", ["async", "exit"])
def test_it_is_given_up_whatever_the_durability(tmp_path: Path, durability: str) -> None:
    bench = Bench(tmp_path, concurrency=1)
    lives = 0
    while (result := bench.live("node.inside:1", recoveries=1, durability=durability)) is None:
        lives += 1
        assert lives < 6, "it would go on for ever"
    # A process may be killed before what it handed over is durable. What the next one commits is progress then.
    first_was_lost = [bool(log.steps) for log in bench.before[1:3]] == [False, True]
    assert (result["status"], lives) == ("failed", 3 if first_was_lost else 2)
    assert not first_was_lost or durability == "async"


@pytest.mark.parametrize(("lost", "lives"), [(1, 3), (2, 2)])
def test_what_a_recovery_commits_is_progress(tmp_path: Path, lost: int, lives: int) -> None:
    """Processes that are killed before their first commit count as crashes in a row; one commit, and it begins anew."""
    bench = Bench(tmp_path, concurrency=1)
    for _ in range(lost):
        assert bench.live("commit.before:1", recoveries=1) is None
    while (result := bench.live("node.inside:1", recoveries=1)) is None:
        assert bench.kills < 6, "it would go on for ever"
    assert (result["status"], bench.kills) == ("failed", lives)


def test_a_plan_that_gets_on_between_kills_is_never_given_up(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    bench = Bench(tmp_path, concurrency=1)
    while (result := bench.live("node.inside:2", recoveries=1)) is None:
        assert bench.kills < 12
    assert bench.kills >= 4
    bench.check(undisturbed, result)
    assert result["interrupted"] == bench.kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("point", KILLS)
def test_each_time_a_point_is_reached(
    tmp_path: Path, undisturbed: dict[str, Any], point: str, concurrency: int, backend: str
) -> None:
    number = 1
    while True:
        bench = Bench(tmp_path / str(number), backend=backend, concurrency=concurrency)
        bench.folder.mkdir()
        result = bench.live(f"{point}:{number}")
        bench.check(undisturbed, result or bench.live())
        if result is not None:
            break
        number += 1
    assert number > 1 or (point == "branch.between" and concurrency == 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_kill_after_every_commit(tmp_path: Path, undisturbed: dict[str, Any], backend: str, concurrency: int) -> None:
    """What a sub-graph's run commits is progress of the plan, too: one recovery is enough each time."""
    bench = Bench(tmp_path, backend=backend, concurrency=concurrency)
    while (result := bench.live("commit.after:1", recoveries=1)) is None:
        assert bench.kills < 40
    bench.check(undisturbed, result)
