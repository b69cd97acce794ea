"""Attempts that fail by themselves, with real stores: what they took counts once, whatever the process does then; and
effects that time out, through both executors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeContext
from framework.graph.plan import ActionSpec, ExecutionStatus, PlanStep
from framework.graph.worker_node import WorkerNode
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.runtime import Runtime
from framework.storage.backend import open_storage
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from tests import forks
from tests.journal.journal_kit import Bench
from tests.plans.plan_kit import GOAL, plan

PROGRAM = Path(__file__).with_name("between_program.py")


def live(url: str, die: str = "") -> tuple[int, list[str]]:
    """One process: how often it asked the model, and its last line."""
    done = forks.run(
        [sys.executable, str(PROGRAM), url, die],
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == (9 if die else 0), done.stderr
    lines = done.stdout.splitlines()
    return lines.count("asked"), lines


def test_failed_attempts_count_what_they_took_once(tmp_path: Path) -> None:
    asked, lines = live(f"sqlite:///{tmp_path}/runs.db")
    assert asked == 3
    assert json.loads(lines[-1]) == {"success": True, "tokens": 30, "error": None}


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_a_process_that_ends_between_the_mark_and_the_record_of_a_failed_attempt_loses_nothing(
    scheme: str, deaths: int, tmp_path: Path
) -> None:
    """Each attempt that was cut off there is made again, as one that a crash ends, and its tokens were paid for."""
    url = f"sqlite:///{tmp_path}/runs.db" if scheme == "sqlite" else f"file://{tmp_path}/store"
    asked = sum(live(url, "record")[0] for _ in range(deaths))
    assert asked == deaths
    with open_storage(url) as storage:
        assert CheckpointManager(storage).journal("run") == [], "the attempt failed: its calls count no more"
    again, lines = live(url)
    assert again == 3
    assert json.loads(lines[-1]) == {"success": True, "tokens": 10 * (3 + deaths), "error": None}


# --- effects that time out --------------------------------------------------------------------------------------------

Settle = tuple[list[str], Any]
SETTLED: dict[str, Settle] = {
    "done": (["--done", '"receipt 17"'], "receipt 17"),
    "redo": (["--redo"], "receipt 2"),
    "skip": (["--skip"], None),
}


def settle(url: str, call: str, how: list[str]) -> None:
    done = forks.run(
        [sys.executable, "-m", "framework", "runs", "settle", "run", call, *how, "--storage", url],
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr


class Till:
    """Takes the money, and its first answer comes too late."""

    def __init__(self) -> None:
        self.paid = 0

    def pay(self) -> str:
        self.paid += 1
        if self.paid == 1:
            raise TimeoutError("no answer in time")
        return f"receipt {self.paid}"


@pytest.mark.parametrize("how", SETTLED)
async def test_an_effect_that_times_out_pauses_a_graphs_run_until_it_is_settled(how: str, tmp_path: Path) -> None:
    url, till = f"sqlite:///{tmp_path}/runs.db", Till()

    async def body(ctx: NodeContext) -> Any:
        return await ctx.call("pay", till.pay, policy="ask")

    with open_storage(url) as storage:
        bench = Bench(storage)
        result = await bench.run(body)
        # What the node raises ends its attempt; the effect is asked about when the step runs again.
        while result.paused_at is None:
            assert not result.success
            result = await bench.run(body)
        [unknown] = bench.manager.journal("run")
        assert (unknown.state, till.paid) == ("unknown", 1)
    options, value = SETTLED[how]
    settle(url, unknown.id, options)
    with open_storage(url) as storage:
        result = await Bench(storage).run(body)
    assert (result.success, result.output["value"]) == (True, value), result.error
    assert till.paid == (2 if how == "redo" else 1)


@pytest.mark.parametrize("how", ["done", "redo"])
async def test_an_effect_that_times_out_pauses_a_plans_run_until_it_is_settled(how: str, tmp_path: Path) -> None:
    url, till = f"sqlite:///{tmp_path}/runs.db", Till()

    async def use(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, till.pay())

    def executor(storage: Storage) -> FlexibleGraphExecutor:
        made = FlexibleGraphExecutor(
            Runtime(MemoryStorage()), checkpoint_manager=CheckpointManager(storage), judge=HybridJudge()
        )
        tool = Tool("pay", "Pays.", {"type": "object", "properties": {}}, effects=True)
        made.worker = WorkerNode(made.runtime, tools=[tool], tool_executor=use)
        return made

    action = ActionSpec.model_validate({"action_type": "tool_use", "tool_name": "pay", "tool_args": {}})
    steps = plan(PlanStep(id="pay", description="pay", action=action))
    with open_storage(url) as storage:
        for _ in range(3):
            result = await executor(storage).execute_plan(steps, GOAL, run_id="run")
            if result.status is ExecutionStatus.AWAITING_APPROVAL:
                break
        assert result.status is ExecutionStatus.AWAITING_APPROVAL
        [unknown] = CheckpointManager(storage).journal("run")
        assert (unknown.state, till.paid) == ("unknown", 1)
    settle(url, unknown.id, SETTLED[how][0])
    with open_storage(url) as storage:
        result = await executor(storage).execute_plan(steps, GOAL, run_id="run")
    assert result.status is ExecutionStatus.COMPLETED, result
    assert till.paid == (2 if how == "redo" else 1)


# --- steps before that are not committed ------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
@pytest.mark.parametrize(
    "config", [{"durability": "exit"}, {"save_frequency": "every_n_nodes", "n_nodes": 3}], ids=["exit", "n"]
)
def test_what_an_uncommitted_step_came_to_decides_whether_later_journals_count(
    config: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    """The process is killed in the third step; the first runs again and may come to something else."""
    url = f"sqlite:///{tmp_path}/runs.db"
    ledger, program = tmp_path / "ledger", str(PROGRAM.with_name("uncommitted_program.py"))
    for number, dies in enumerate((True, False)):
        base = "0" if same else str(number)
        done = forks.run(
            [sys.executable, program, url, str(ledger), json.dumps(config), base, "die" if dies else ""],
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == (9 if dies else 0), done.stderr
    calls = ledger.read_text().split()
    assert json.loads(done.stdout.splitlines()[-1]) == [True, f"b of {base}", f"c of {base}"]
    assert calls == (["b=0", "c=0"] if same else ["b=0", "c=0", "b=1", "c=1"])
