"""A store with a run in every state, and the real command to look at it with."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


_FORKS = """
import json, os, sys
import framework.runner.cli.app, framework.runner.cli.commands_checkpoints, framework.runner.cli.commands_runs
import framework.runner.cli.agents, framework.storage.sqlite
from framework.__main__ import main

writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.environ.clear()
            os.environ.update(asked["env"])
            os.chdir(asked["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(asked["out"], writing), 1)
            os.dup2(os.open(asked["err"], writing), 2)
            sys.argv = ["surefoot", *asked["words"]]
            main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Runs commands each in a process of its own, forked from one that has imported everything: that takes 20 ms where
    a new interpreter takes 300."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="surefoot-cli-"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Sequence[str], env: Mapping[str, str], folder: Path) -> Ran:
        out, err = self._folder / "out", self._folder / "err"
        asked = {"words": words, "env": dict(env), "folder": str(folder), "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Ran(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def close(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._folder)


@dataclass(frozen=True, slots=True)
class Command:
    """The real command over one store, in a process of its own and with pipes."""

    url: str
    folder: Path
    forks: Forks

    def __call__(self, *words: str, env: Mapping[str, str] | None = None) -> Ran:
        ran = self.forks.run(words, {**self.environment(), **(env or {})}, self.folder)
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
