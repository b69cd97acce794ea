"""What an executor tells those who watch a run live: small facts, told as they happen and kept nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RunEventKind = Literal[
    "run_started", "run_resumed", "step_started", "attempt_failed", "step_finished", "step_failed", "run_ended"
]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One thing that happened in a run.

    ``step`` is the visit's key (``<node or step id>#<visit>``, with its branch before it in a fan-out), ``node_id``
    the node or plan step. ``attempt`` counts from 1. ``tokens``, ``latency_ms`` and ``cost`` (USD) are the step's; in
    ``run_ended`` the run's. ``detail`` says of ``run_resumed`` how many steps were recovered and of ``run_ended`` how
    it ended (``completed``, ``failed``, ``paused``, ``cancelled``). When ``step_finished`` is told of a run with
    checkpoints, the step is durable.
    """

    kind: RunEventKind
    run_id: str
    step: str | None = None
    node_id: str | None = None
    attempt: int = 0
    tokens: int = 0
    latency_ms: int = 0
    cost: float = 0.0
    error: str | None = None
    detail: str | None = None
