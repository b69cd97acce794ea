"""What an attempt of a plan's step, and its judgement, say that they took and wish for; how the log has it."""

from __future__ import annotations

import math
from typing import Any

from framework.graph.plan import Judgment, PlanStep
from framework.graph.worker_actions import StepExecutionResult

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
