"""What one execution of a plan is given to work with, and how it may end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from framework._secrets import mask
from framework.graph.goal import Goal
from framework.graph.plan import ExecutionStatus, Judgment, PlanStep
from framework.graph.worker_actions import AttemptInfo, StepExecutionResult
from framework.schemas.run import RunState

RUN_STATES = {
    ExecutionStatus.COMPLETED: RunState.COMPLETED,
    ExecutionStatus.AWAITING_APPROVAL: RunState.PAUSED,
    ExecutionStatus.ABORTED: RunState.CANCELLED,
    ExecutionStatus.NEEDS_REPLAN: RunState.FAILED,
    ExecutionStatus.NEEDS_ESCALATION: RunState.FAILED,
    ExecutionStatus.REJECTED: RunState.FAILED,
    ExecutionStatus.FAILED: RunState.FAILED,
}
"""How a plan's ending is recorded. All but the first can be resumed, and revised by a new plan."""


class Worker(Protocol):
    """What does the work of an attempt."""

    async def execute(
        self, step: PlanStep, context: Mapping[str, Any], *, outputs: Mapping[str, Any], info: AttemptInfo
    ) -> StepExecutionResult: ...


class Judge(Protocol):
    """What judges a result."""

    async def evaluate(
        self, step: PlanStep, result: Any, goal: Goal, context: Mapping[str, Any] | None = None
    ) -> Judgment: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What an execution may use: see ``ExecutorConfig``."""

    max_total_steps: int
    max_retries_per_step: int
    max_recovery_attempts: int
    timeout_seconds: float | None
    max_concurrency: int
    retry_delay_seconds: float
    retry_max_delay_seconds: float


@dataclass(frozen=True, slots=True)
class Ending:
    """How an execution ended; ``reason`` says why unless it is plainly completed."""

    status: ExecutionStatus
    reason: str | None = None
    error_type: str | None = None

    def __post_init__(self) -> None:
        if self.reason:
            object.__setattr__(self, "reason", mask(self.reason))
