"""What the tests of approvals share: an executor whose steps note what they are called with."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import (
    ActionSpec,
    ApprovalDecision,
    ApprovalRequest,
    ApprovalResult,
    Plan,
    PlanStep,
)
from framework.llm.provider import Tool, ToolUse
from framework.runtime.core import Runtime
from framework.storage.backend import open_storage

GOAL = Goal(id="g", name="G", description="d")


def answer(decision: str, **fields: Any) -> ApprovalResult:
    return ApprovalResult(decision=ApprovalDecision(decision), **fields)


def step(step_id: str, args: dict[str, Any] | None = None, **fields: Any) -> PlanStep:
    kind = fields.pop("kind", "function")
    own = {"tool_name": "work", "tool_args": args or {}}
    if kind == "function":
        own = {"function_name": "work", "function_args": args or {}}
    action = ActionSpec.model_validate({"action_type": kind, **own})
    return PlanStep(id=step_id, description=step_id, action=action, requires_approval=True, **fields)


def plan(*steps: PlanStep) -> Plan:
    return Plan(id="p", goal_id="g", description="d", steps=list(steps))


class Bench:
    """An executor whose function and tool note what they are called with."""

    def __init__(self, *, durable: bool = False, concurrency: int = 1, judge: Any = None) -> None:
        self.calls: list[Any] = []
        self.asked: list[ApprovalRequest] = []
        self.executor = FlexibleGraphExecutor(
            MagicMock(spec=Runtime),
            tools=[Tool(name="work", description="")],
            tool_executor=self._use,
            judge=judge,
            config=ExecutorConfig(retry_delay_seconds=0, max_retries_per_step=1, max_concurrency=concurrency),
            checkpoint_manager=CheckpointManager(open_storage("memory://")) if durable else None,
        )

    def functions(self) -> Bench:
        self.executor.register_function("work", lambda **given: self.calls.append(given))
        return self

    def _use(self, use: ToolUse) -> str:
        self.calls.append(use.input)
        return "ok"

    def always(self, given: Any) -> Bench:
        def callback(request: ApprovalRequest) -> Any:
            self.asked.append(request)
            return given

        self.executor.set_approval_callback(callback)
        return self
