"""Plans whose processes are killed while a sub-graph waits: the plan is recovered, and nothing is asked twice."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.recovery import recoverable_runs
from framework.graph.run_view import view_run
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from tests import forks

PROGRAM = Path(__file__).with_name("parts_program.py")
CORE = Path(__file__).parents[2]
ASKED = {"sleep": "None", "person": "None", "wait": "7", "ask": "7"}


@dataclass
class Bench:
    """One plan's run over any number of processes."""

    folder: Path
    wait: str
    backend: str = "sqlite"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/runs.db" if self.backend == "sqlite" else f"file://{self.folder}/store"

    def live(self, what: str, kill: str = "", **more: Any) -> Any:
        """One process from its start to its end; what came of the run, "killed" when it was."""
        known = {"url": self.url, "ledger": str(self.folder / "ledger"), "what": what, "wait": self.wait, "kill": kill}
        process = forks.run(
            [sys.executable, str(PROGRAM), json.dumps({**known, **more})],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        if process.returncode == -signal.SIGKILL:
            return "killed"
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    def asked(self) -> Counter[str]:
        return Counter((self.folder / "ledger").read_text().splitlines())

    def states(self) -> list[RunState]:
        """Of the plan and of its part, as whoever recovers sees them."""
        with open_storage(self.url) as storage:
            crashed = {run.run_id for run in recoverable_runs(storage) if run.state is RunState.CRASHED}
            found = [storage.find_run(run_id) for run_id in ("r", "r/s#1")]
            return [RunState.CRASHED if run.run_id in crashed else run.state for run in found if run is not None]

    def answer(self) -> None:
        """Give the plan what its part waits for."""
        with open_storage(self.url) as storage:
            [waiting] = view_run(storage, "r").resume.waiting
            assert waiting.run == "r/s#1"
            if waiting.name is not None and waiting.kind in ("signal", "answer"):
                CheckpointManager(storage).send("r", waiting.name, 7)

    def recovered(self, **more: Any) -> Any:
        """What came of the run, once something is there to recover."""
        while (found := self.live("recover", **more)) is None:
            pass
        return found


def check_life(bench: Bench, kill: str, second: str = "") -> None:
    seconds = 1.0 if bench.wait == "sleep" else 0.0
    assert bench.live("start", kill, seconds=seconds, max_tokens=1000) == "killed"
    if kill == "part":
        assert bench.states() == [RunState.CRASHED, RunState.PAUSED]
        held = bench.recovered(seconds=seconds)
        assert (held["status"], held["tokens"]) in (("awaiting_approval", 10 + 10 * (bench.wait == "person")),) or (
            bench.wait == "sleep" and held["status"] == "completed"
        )
        if held["status"] == "completed":
            return
    assert bench.states() == [RunState.PAUSED, RunState.PAUSED]
    bench.answer()
    if bench.wait == "person":
        assert bench.live("recover") is None, "a person has to call"
        result = bench.live("start")
    else:
        if second:
            assert bench.recovered(kill=second, seconds=seconds) == "killed"
        result = bench.recovered(seconds=seconds)
    assert (result["run_id"], result["status"], result["tokens"]) == ("r", "completed", 40)
    asked = bench.asked()
    assert set(asked) == {"one before", f"one after {ASKED[bench.wait]}", "two before", "two after None"}
    assert set(asked.values()) == {1}, "a question was asked again"


def test_a_plan_killed_after_its_part_paused_goes_on_where_it_was(tmp_path: Path) -> None:
    check_life(Bench(tmp_path, "wait"), "part")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("second", ["", "node.before:2", "commit.before:1", "commit.after:1", "commit.before:2"])
@pytest.mark.parametrize("kill", ["part", "plan"])
@pytest.mark.parametrize("wait", ["sleep", "wait", "ask", "person"])
def test_plans_are_killed_anywhere_around_a_wait(
    tmp_path: Path, wait: str, kill: str, second: str, backend: str
) -> None:
    check_life(Bench(tmp_path, wait, backend), kill, second)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["commit.before:1", "commit.after:1", "node.before:2", "node.before:3"])
def test_a_budget_holds_over_kills(tmp_path: Path, kill: str) -> None:
    """The questions before the kill count, wherever they are recorded by then."""
    bench = Bench(tmp_path, "")
    assert bench.live("start", kill, max_tokens=25) == "killed"
    result = bench.recovered()
    assert (result["status"], result["error_type"], result["tokens"]) == ("failed", "budget", 30)
    assert sorted(bench.asked().items()) == [("one after None", 1), ("one before", 1), ("two before", 1)]
