"""What an attempt of a plan's step, and its judgement, say that they took and wish for; how the log has it, and how a
checkpoint has where the plan stands."""

from __future__ import annotations

import math
from typing import Any

from framework.graph.plan import Judgment, PlanStep
from framework.graph.plan_planner import FINAL, ready_steps
from framework.graph.plan_state import PlanState
from framework.graph.run_session import Progress
from framework.graph.worker_actions import StepExecutionResult
from framework.schemas.checkpoint import CheckpointStatus
from framework.schemas.run import RunState

_CHECKPOINT_STATUS = {
    RunState.COMPLETED: CheckpointStatus.COMPLETED,
    RunState.PAUSED: CheckpointStatus.PAUSED,
    RunState.FAILED: CheckpointStatus.FAILED,
}

_RETRY_AFTER_MAX_SECONDS = 300.0
"""The most of a provider's wish to wait that is granted."""


def spent_on(judgment: Judgment | None) -> tuple[int, float]:
    """The tokens of a model that judged and their price in US dollars, by what the judge says of it."""
    if judgment is None:
        return 0, 0.0
    tokens, cost = positive(judgment.context.get("tokens_used")), positive(judgment.context.get("cost"))
    return (tokens if isinstance(tokens, int) else 0), float(cost)


def positive(said: object) -> int | float:
    """A finite number above zero; 0 for whatever else somebody's own judge or worker has put there."""
    if isinstance(said, (int, float)) and not isinstance(said, bool) and 0 < said < math.inf:
        return said
    return 0


def asked_to_wait(result: StepExecutionResult) -> float:
    """Seconds that a provider asked to wait before the next attempt."""
    return min(float(positive(result.retry_after)), _RETRY_AFTER_MAX_SECONDS) if not result.success else 0.0


def ended_record(kind: str, step: PlanStep, reason: str, result: StepExecutionResult) -> dict[str, Any]:
    """The log record of an attempt after which its step does not go on in this execution."""
    record: dict[str, Any] = {"kind": kind, "node": step.id, "error": reason}
    return {**record, "cost": round(result.cost, 12)} if result.cost else record


def left_behind(error: BaseException) -> str:
    """What a worker says of work that a time limit cannot end."""
    said = str(error.__cause__ or "")
    return f"; {said}" if said else ""


def progress_of(state: PlanState, step: PlanStep | None, last_step: str, run_state: RunState | None = None) -> Progress:
    """Where a plan stands, as a checkpoint records it: counts and the step it follows, never the history."""
    ready = ready_steps(state.plan, state.earlier)
    position: dict[str, Any] = {"steps_taken": state.steps_taken, "revision": state.plan.revision}
    optional = {"interrupted": state.interrupted, "recoveries": state.recoveries, "children": state.children}
    position |= {name: value for name, value in optional.items() if value}
    return Progress(
        node_id=step.id if step is not None else last_step,
        next_id=ready[0].id if ready else None,
        step_number=sum(1 for each in state.plan.steps if each.status in FINAL),
        total_tokens=state.total_tokens,
        total_latency_ms=state.total_latency_ms,
        position=position,
        status=_CHECKPOINT_STATUS.get(run_state, CheckpointStatus.IN_PROGRESS)
        if run_state is not None
        else CheckpointStatus.IN_PROGRESS,
        steps={step.id: state.record(step)} if step is not None else {},
        total_cost=state.total_cost,
    )
