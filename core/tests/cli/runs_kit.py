"""A store with a run in every state, and the real command to look at it with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import ActionSpec, Plan, PlanStep
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import codec
from framework.storage.backend import Storage, open_storage
from tests import forks
from tests.graph.executor_kit import GOAL
from tests.graph.run_view_kit import CORE, cancelled_when, crash, execute, letter, spread

DONE, FAILED, PAUSED, CRASHED, CANCELLED, PLAN = (
    "order-done",
    "order-failed",
    "order-paused",
    "run-1",
    "order-cancelled",
    "campaign-1",
)


@dataclass(frozen=True, slots=True)
class Ran:
    """One command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Command:
    """The real command over one store, in a process of its own and with pipes."""

    url: str
    folder: Path

    def __call__(self, *words: str, env: Mapping[str, str] | None = None) -> Ran:
        done = forks.run(
            self.words(*words),
            cwd=self.folder,
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=50,
        )
        ran = Ran(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in ran.err, ran.err
        assert ran.code != 70
        return ran

    def words(self, *words: str) -> list[str]:
        """The command line, for a process that the test starts itself."""
        return [sys.executable, "-m", "framework", *words]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SUREFOOT", "XDG"))}
        home = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder / "data")}
        return {**kept, **home, "PYTHONPATH": str(CORE), "SUREFOOT_STORAGE": self.url, "PYTHONUTF8": "1"}


def down(**_: Any) -> Any:
    raise ConnectionError("the line is down")


def step(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    arguments = {"x": fields.pop("x", step_id)}
    action = ActionSpec.model_validate({"action_type": "function", "function_name": "work", "function_args": arguments})
    return PlanStep(id=step_id, description=f"the {step_id}", action=action, dependencies=list(needs), **fields)


def campaign() -> Plan:
    steps = [
        step("draft", expected_outputs=["draft"]),
        step("publish", "draft", x="$draft", requires_approval=True, approval_message="publish it?"),
        step("tell", "publish"),
    ]
    return Plan(id="campaign", goal_id="goal", description="Publish", steps=steps)


class Draft:
    """A value of a type that only the program of the plan knows."""


def register_draft() -> None:
    """What that program does before it opens its runs."""
    codec.register(Draft, name="campaign.Draft", to_plain=lambda _: {"words": 3}, from_plain=lambda _: Draft())


def plan_executor(storage: Storage) -> FlexibleGraphExecutor:
    manager = CheckpointManager(storage, CheckpointConfig(retention_strategy="all"))
    executor = FlexibleGraphExecutor(
        Runtime(storage), config=ExecutorConfig(retry_delay_seconds=0), checkpoint_manager=manager
    )
    register_draft()
    executor.register_function("work", lambda x=None: Draft() if x == "own type" else x)
    return executor


def start_plan_with_own_type(url: str, run_id: str) -> None:
    """A plan that waits for an approval, with a value in its context that no other program can rebuild."""
    plan = campaign()
    plan.steps[0].action.function_args = {"x": "own type"}
    plan.steps[1].action.function_args = {"x": "text"}
    with open_storage(url) as storage:
        asyncio.run(plan_executor(storage).execute_plan(plan, GOAL, run_id=run_id))


def go_on_with_plan(url: str, run_id: str = PLAN) -> str:
    """What the program that runs the plan does once it was answered; how it came out."""
    with open_storage(url) as storage:
        return asyncio.run(plan_executor(storage).execute_plan(None, GOAL, run_id=run_id)).status.value


async def _fill(storage: Storage) -> None:
    good = {"draft": lambda **_: "Dear reader", "send": lambda **_: "sent"}
    answer = {"approved": True, "by": "me"}
    await execute(storage, letter(), good, {"to": "reader", **answer}, run_id=DONE)
    await execute(storage, letter(), {**good, "send": down}, {"to": "nobody", **answer}, run_id=FAILED)
    await execute(storage, letter(), good, {"to": "reader", "note": ["a", "b"]}, run_id=PAUSED)
    await plan_executor(storage).execute_plan(campaign(), Goal(id="goal", name="Goal", description=""), run_id=PLAN)
    inside = asyncio.Event()

    async def hangs(**_: Any) -> Any:
        inside.set()
        await asyncio.Event().wait()

    functions = {"begin": lambda **_: {}, "a": hangs, "b": lambda **_: 1, "c": hangs, "end": lambda **_: 1}
    await cancelled_when(inside, storage, spread(), functions, run_id=CANCELLED)


def fill(url: str) -> None:
    """One run in each state."""
    with open_storage(url) as storage:
        asyncio.run(_fill(storage))
    crash(url, "letter")
