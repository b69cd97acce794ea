"""Plans whose processes are killed within and after calls to models and tools: what was answered is not asked again."""

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

from framework.errors import MessageRefused
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.journal_rows import CallRecord
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from tests import forks

PROGRAM = Path(__file__).with_name("journaled_plan_program.py")
CORE = Path(__file__).parents[2]


@dataclass
class Bench:
    """One plan's run over any number of processes."""

    folder: Path
    work: str
    concurrency: int = 1

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/runs.db"

    def live(self, kill: str = "", **more: Any) -> dict[str, Any] | None:
        """One process from its start to its end; what came of the run, ``None`` when it was killed."""
        known = {"url": self.url, "ledger": str(self.folder / "ledger"), "concurrency": self.concurrency}
        process = forks.run(
            [sys.executable, str(PROGRAM), json.dumps({**known, "work": self.work, "kill": kill, **more})],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        if process.returncode == -signal.SIGKILL:
            return None
        assert process.returncode == 0, process.stderr
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return result

    def ended(self, **more: Any) -> dict[str, Any]:
        result = self.live(**more)
        assert result is not None
        return result

    def lines(self) -> list[tuple[str, str]]:
        ledger = self.folder / "ledger"
        return [tuple(json.loads(line)) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    def counts(self) -> Counter[str]:
        return Counter(call for call, _ in self.lines())

    def calls(self) -> list[CallRecord]:
        with open_storage(self.url) as storage:
            return CheckpointManager(storage).journal("r")

    def state(self) -> RunState:
        with open_storage(self.url) as storage:
            run = storage.find_run("r")
            assert run is not None
            return run.state

    def settle(self, call: str, **what: Any) -> None:
        with open_storage(self.url) as storage:
            CheckpointManager(storage).settle("r", call, **what)


@pytest.mark.parametrize("work", ["pay", "function"])
@pytest.mark.parametrize("word", ["done", "redo", "skip"])
def test_an_effect_cut_off_waits_to_be_settled(tmp_path: Path, work: str, word: str) -> None:
    bench = Bench(tmp_path, work)
    assert bench.live(kill="inside:1") is None
    [call] = bench.calls()
    assert (call.id, call.name, call.policy) == ("pay#1/1", "tool:pay", "ask")
    for _ in range(2):  # calling again changes nothing while nobody has said what happened
        paused = bench.ended()
        assert (paused["status"], bench.state()) == ("awaiting_approval", RunState.PAUSED)
        assert "'pay#1/1'" in paused["feedback"]
        assert [call.state for call in bench.calls()] == ["unknown"]
    assert bench.counts() == {"pay 5": 1}
    said = {"receipt": "from the bank"}
    bench.settle("pay#1/1", **{word: said if word == "done" else True})
    with pytest.raises(MessageRefused):
        bench.settle("pay#1/1", redo=True)
    result = bench.ended()
    assert (result["status"], bench.state(), bench.calls()) == ("completed", RunState.COMPLETED, [])
    assert result["executed"] == 1
    assert bench.counts() == {"pay 5": 2 if word == "redo" else 1, "judged pay": 1}
    assert len({key for call, key in bench.lines() if call == "pay 5"}) == 1, "made again with another key"
    assert all(key for call, key in bench.lines() if call == "pay 5")
    if word == "done" and work == "pay":
        assert result["receipt"] == "from the bank"
    if word == "done" and work == "function":
        assert result["result"] == said
    if word == "skip":
        assert (result["receipt"], result["result"]) == (None, None)


@pytest.mark.parametrize("work", ["look", "pay", "function"])
@pytest.mark.parametrize("point", ["node.after", "routing", "commit.before"])
def test_a_finished_call_and_its_judgement_are_not_asked_again(tmp_path: Path, work: str, point: str) -> None:
    """``node.after`` is before the judge is asked, the others are after."""
    bench = Bench(tmp_path, work)
    assert bench.live(kill=f"{point}:1") is None
    judged = point != "node.after"
    assert [call.state for call in bench.calls()] == ["done", "done"] if judged else ["done"]
    result = bench.ended()
    assert (result["status"], result["tokens"], result["cost"]) == ("completed", 5, 0.125)
    name = "look" if work == "look" else "pay"
    assert bench.counts() == {f"{name} 5": 1, "judged pay": 1}
    assert bench.calls() == []


@pytest.mark.parametrize("point", ["node.after:1", "routing:2", "commit.before:3", "commit.after:1"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_questions_of_parallel_steps_are_not_asked_again(tmp_path: Path, point: str, concurrency: int) -> None:
    bench = Bench(tmp_path, "think", concurrency)
    assert bench.live(kill=point) is None
    answered = {
        f"asked Think{call.step[5]}." if call.number == 1 else f"judged think{call.step[5]}"
        for call in bench.calls()
        if call.state == "done"
    }
    assert answered or point == "commit.after:1"
    result = bench.ended()
    assert (result["status"], result["tokens"], result["cost"]) == ("completed", 45, 1.125)
    counts = bench.counts()
    assert len(counts) == 6
    assert {counts[call] for call in answered} <= {1}, "an answered question was asked again"
    if concurrency == 1:
        assert set(counts.values()) == {1}
    assert bench.calls() == []


def test_a_journal_that_is_kept_counts_nothing_twice(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "think")
    assert bench.live(kill="routing:2", keep=True) is None
    assert bench.ended(keep=True)["tokens"] == 45
    assert {call.step for call in bench.calls()} == {"think1#1", "think2#1", "think3#1"}


def test_a_budget_counts_over_processes(tmp_path: Path) -> None:
    """Of 15 tokens a step; the first process dies with 15 committed and 10 in the journal of the second step."""
    bench = Bench(tmp_path, "think")
    assert bench.live(kill="node.after:2", max_tokens=25) is None
    for _ in range(2):  # the recorded budget holds for a later call without one
        stopped = bench.ended()
        assert (stopped["status"], stopped["error_type"], stopped["tokens"]) == ("failed", "budget", 25)
        assert "max_tokens=25" in stopped["feedback"]
    assert bench.counts() == {"asked Think1.": 1, "judged think1": 1, "asked Think2.": 1}
    larger = bench.ended(max_tokens=45)
    assert (larger["status"], larger["tokens"]) == ("completed", 45)
    assert set(bench.counts().values()) == {1}
