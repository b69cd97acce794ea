"""Runs the agent program in processes of its own, kills them, and checks what the ledger and the store say then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from framework.graph import planner
from framework.graph.planner import Step
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.checkpoints import parse_log
from tests import forks

PROGRAM = Path(__file__).with_name("agent_program.py")
CORE = Path(__file__).parents[2]
RUN_ID = "agent-1"
PATIENCE_SECONDS = 50

Started = tuple[str, int]
"""A step's key and the number of its attempt."""


@dataclass(frozen=True)
class Committed:
    """What the store's log says: finished steps, and failed attempts of any step."""

    steps: frozenset[str]
    attempts: frozenset[Started]


@dataclass(frozen=True)
class Life:
    """One process: the bodies it started, in order, and what was committed when it was gone."""

    pid: int
    result: dict[str, Any] | None
    started: Sequence[Started]
    committed: Committed


def ended(process: subprocess.Popen[str], told: str = "") -> tuple[str, str]:
    """What the process says until its end, of which a part may have been read already.

    ``communicate`` reads past the buffer of ``stdout``: what came together with a line that was read would be lost.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        if told:
            process.stdin.write(told)
        process.stdin.close()
        output, errors = process.stdout.read(), process.stderr.read()
        process.wait(PATIENCE_SECONDS)
    return output, errors


@dataclass
class Lab:
    """One run of the agent over any number of processes."""

    folder: Path
    backend: str = "sqlite"
    config: dict[str, Any] = field(default_factory=dict)
    pace: float = 0.0
    run_id: str = RUN_ID
    lives: list[Life] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/runs.db" if self.backend == "sqlite" else f"file://{self.folder}/store"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def start(self, fault: str | None = None, hold: str | None = None) -> subprocess.Popen[str]:
        """A new process that starts or resumes the run; killed at ``fault``, held at ``hold``, each a ``point:n``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = {
            "url": self.url,
            "run_id": self.run_id,
            "ledger": str(self.ledger),
            "config": self.config,
            "pace": self.pace,
        }
        environment = {**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"}
        if fault is not None:
            environment["SUREFOOT_FAULT"] = fault
        if hold is not None:
            environment["SUREFOOT_HOLD"] = hold
        return forks.Popen(
            [sys.executable, str(PROGRAM), json.dumps(arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def live(self, fault: str | None = None, kill_after_seconds: float | None = None) -> Life:
        """One process from start to end: its own, by ``fault``, or ``kill_after_seconds`` after it was ready."""
        process = self.start(fault)
        timer = None
        if kill_after_seconds is not None:
            self.expect(process, "ready")
            timer = threading.Timer(kill_after_seconds, process.kill)
            timer.start()
        output, errors = ended(process)
        if timer is not None:
            timer.cancel()
        result = None
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, f"the program failed:\n{errors}"
            result = json.loads(output.splitlines()[-1])
        life = Life(process.pid, result, self.started(process.pid), self.committed())
        self.lives.append(life)
        return life

    def expect(self, process: subprocess.Popen[str], *words: str) -> str:
        """Wait for the process to say one of ``words``; which. Anything else it says is given back as it is."""
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line in words or line.startswith("{"), process.communicate()
        return line

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Let a held process go on to its end; its result."""
        output, errors = ended(process, "go on\n")
        assert process.returncode == 0, errors
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def started(self, pid: int) -> list[Started]:
        """The bodies that a process started, in order."""
        return [(event["step"], event["attempt"]) for event in self.events() if event["pid"] == pid]

    def events(self, kind: str = "start") -> list[dict[str, Any]]:
        if not self.ledger.exists():
            return []
        events = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        return [event for event in events if event["event"] == kind]

    def committed(self) -> Committed:
        with open_storage(self.url) as storage:
            records = parse_log(storage.read_log(self.run_id)) if storage.find_run(self.run_id) is not None else []
        steps = [
            Step(record["node"], record["visit"], record.get("branch", "")).key
            for record in records
            if record["kind"] == "step"
        ]
        assert len(set(steps)) == len(steps), f"a step is in the log twice: {steps}"
        attempts = [(record["step"], record["attempt"]) for record in records if record["kind"] == "attempt"]
        return Committed(frozenset(steps), frozenset(attempts))

    def visits(self) -> dict[str, int]:
        """The visit counters at the newest checkpoint."""
        with open_storage(self.url) as storage:
            checkpoint = storage.load_latest_checkpoint(self.run_id)
            assert checkpoint is not None
            position = planner.from_json(checkpoint.position)
            return planner.visits_of(parse_log(storage.read_log(self.run_id)), position)

    # --- what must hold -----------------------------------------------------------------------------------------

    def check_nothing_repeated(self, *, every_step_committed: bool = True) -> None:
        """No process ran again what was committed before it began.

        A body in flight at a kill runs again, once for each kill. ``every_step_committed`` says that each step is
        durable before the next one starts, so nothing else is ever in flight.
        """
        before = Committed(frozenset(), frozenset())
        for life in self.lives:
            assert len(set(life.started)) == len(life.started), f"process {life.pid} ran an attempt twice"
            again = {step for step, _ in life.started} & before.steps
            assert not again, f"committed steps ran again: {again}"
            assert not set(life.started) & before.attempts, "a recorded attempt was made again"
            assert before.steps <= life.committed.steps, "a committed step was lost"
            if every_step_committed:
                _check_order(life)
            before = life.committed
        killed = [life for life in self.lives if life.result is None]
        for body in {body for life in self.lives for body in life.started}:
            ran = sum(body in life.started for life in self.lives)
            in_flight = sum(body in life.started and body[0] not in life.committed.steps for life in killed)
            assert ran <= 1 + in_flight, f"{body} ran {ran} times; it was in flight at {in_flight} kills"

    def check_finished(
        self, expected: Reference, result: dict[str, Any] | None = None, *, call_again: bool = True
    ) -> None:
        """The run's result is the undisturbed one's, its store is whole, and calling again runs nothing."""
        result = result or self.lives[-1].result
        assert result is not None
        assert {key: result.get(key) for key in expected.result} == expected.result
        assert self.visits() == expected.visits
        assert self.committed().steps == expected.steps
        with open_storage(self.url) as storage:
            run = storage.find_run(self.run_id)
            assert run is not None
            assert run.state is RunState.COMPLETED
            assert run.owner is None
            report = storage.verify()
            assert report.ok, report.damage
        if not call_again:
            return
        ran = len(self.events())
        again = self.live()
        assert len(self.events()) == ran
        assert again.result is not None
        assert {key: again.result.get(key) for key in expected.result} == expected.result
        assert again.result["recovered"] == expected.result["steps"]


@dataclass(frozen=True)
class Reference:
    """What the undisturbed run came to."""

    result: dict[str, Any]
    visits: dict[str, int]
    steps: frozenset[str]


def _check_order(life: Life) -> None:
    """A step starts only when everything before it on its way is committed; siblings' branches are not on its way."""
    for index, (step, attempt) in enumerate(life.started):
        branch = _branch_of(step)
        for earlier, number in life.started[:index]:
            if earlier == step:
                assert number < attempt
                assert (earlier, number) in life.committed.attempts, f"attempt {number} of {earlier} is not recorded"
            elif _on_one_way(branch, _branch_of(earlier)):
                assert earlier in life.committed.steps, f"{step} began before {earlier} was committed"


def _branch_of(step: str) -> str:
    return step.rpartition(":")[0]


def _on_one_way(one: str, other: str) -> bool:
    return one == other or not one or not other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


@pytest.fixture
def make_lab(tmp_path: Path) -> Callable[..., Lab]:
    """Makes runs, each in a folder of its own."""
    made: list[Lab] = []

    def make(**options: Any) -> Lab:
        made.append(Lab(tmp_path / f"lab{len(made)}", **options))
        return made[-1]

    return make


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same agent's run that nobody disturbs."""
    lab = Lab(tmp_path_factory.mktemp("undisturbed"))
    life = lab.live()
    assert life.result is not None
    assert life.result["success"], life.result
    same = {key: life.result[key] for key in ("success", "error", "output", "path", "steps", "tokens")}
    return Reference(same, lab.visits(), life.committed.steps)
