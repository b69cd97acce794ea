"""What the tests of durable plans share: small plans, and a store that processes come and go to."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import ActionSpec, Plan, PlanStep
from framework.runtime.core import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage, open_storage

GOAL = Goal(id="g", name="G", description="d")


def step(step_id: str, *needs: str, call: str = "work", **fields: Any) -> PlanStep:
    args = fields.pop("args", {})
    action = ActionSpec.model_validate({"action_type": "function", "function_name": call, "function_args": args})
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def plan(*steps: PlanStep, **fields: Any) -> Plan:
    return Plan(id="p", goal_id="g", description="d", steps=list(steps), **fields)


class Places:
    """A store that processes come and go to; each ``process`` opens it anew, and all note what they call."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls: list[Any] = []
        self.broken: set[Any] = set()
        self.stores: list[Storage] = []

    def process(self, config: dict[str, Any] | None = None, **settings: Any) -> FlexibleGraphExecutor:
        store = open_storage(self.url)
        self.stores.append(store)
        executor = FlexibleGraphExecutor(
            MagicMock(spec=Runtime),
            config=ExecutorConfig(**{"retry_delay_seconds": 0.0, **settings}),
            checkpoint_manager=CheckpointManager(store, CheckpointConfig.model_validate(config or {})),
        )
        executor.register_function("work", self.work)
        return executor

    def work(self, x: Any = None) -> Any:
        self.calls.append(x)
        if x in self.broken:
            raise RuntimeError(f"no {x}")
        return x

    @property
    def store(self) -> Storage:
        return self.stores[-1]


def chain(**changes: Any) -> Plan:
    return plan(
        step("a", args={"x": 1}, expected_outputs=["one"]),
        step("b", "a", args={"x": "$one"}, expected_outputs=["two"], **changes),
        step("c", "b", args={"x": 3}),
    )
