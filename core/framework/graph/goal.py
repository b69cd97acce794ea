"""What an agent is for: a goal, how its success is measured, and what it must respect."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from framework.errors import ExpressionError
from framework.graph.expressions import compile_expression
from framework.graph.text import summary_of

SUCCESS_SHARE = 0.9
"""Share of the total weight that met criteria must reach."""


class GoalStatus(str, Enum):
    """Where a goal stands in its life."""

    DRAFT = "draft"
    READY = "ready"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    SUSPENDED = "suspended"


class SuccessCriterion(BaseModel):
    """One measure of success. ``metric`` is free text such as output_contains, output_equals, llm_judge or custom."""

    model_config = ConfigDict(extra="allow")

    id: str
    description: str
    metric: str
    target: Any
    weight: float = Field(default=1.0, ge=0.0, le=1.0)
    met: bool = False


class Constraint(BaseModel):
    """Something the agent must ("hard") or should ("soft") respect. ``check`` may be a condition over ``value``."""

    model_config = ConfigDict(extra="allow")

    id: str
    description: str
    constraint_type: str
    category: str = "general"
    check: str = ""


class Goal(BaseModel):
    """What an agent is for. The executors never evaluate it: a run's success is that of its path."""

    model_config = ConfigDict(extra="allow")

    id: str
    name: str
    description: str
    status: GoalStatus = GoalStatus.DRAFT
    success_criteria: list[SuccessCriterion] = Field(default_factory=list)
    constraints: list[Constraint] = Field(default_factory=list)
    context: dict[str, Any] = Field(default_factory=dict)
    required_capabilities: list[str] = Field(default_factory=list)
    input_schema: dict[str, Any] = Field(default_factory=dict)
    output_schema: dict[str, Any] = Field(default_factory=dict)
    version: str = "1.0.0"
    parent_version: str | None = None
    evolution_reason: str | None = None
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    updated_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    def is_success(self) -> bool:
        """Whether the met criteria carry at least 90 % of the total weight. False when nothing carries weight."""
        total = sum(criterion.weight for criterion in self.success_criteria)
        met = sum(criterion.weight for criterion in self.success_criteria if criterion.met)
        # The tolerance is for sums such as 0.3 + 0.6, which fall just below nine tenths.
        return total > 0 and met >= SUCCESS_SHARE * total - 1e-9

    def check_constraint(self, constraint_id: str, value: Any) -> bool:
        """Whether ``value`` satisfies the constraint's ``check``, a condition such as ``len(value) <= 280``.

        Raises ValueError when there is no such constraint, and ExpressionError (a ValueError) when its ``check`` is
        not a condition over ``value`` or cannot be evaluated: a text nobody can check is never taken as satisfied.
        """
        constraint = next((known for known in self.constraints if known.id == constraint_id), None)
        if constraint is None:
            raise ValueError(f"Goal {self.id!r} has no constraint {constraint_id!r}.")
        label = f"Constraint {constraint_id!r} cannot be checked"
        try:
            condition = compile_expression(constraint.check)
        except ExpressionError as error:
            raise ExpressionError(
                f"{label}: its check {summary_of(constraint.check)!r} is no condition. {error}"
            ) from error
        if condition.names != {"value"}:
            raise ExpressionError(
                f"{label}: its check {summary_of(constraint.check)!r} must be a condition over the one name 'value', "
                "such as 'value <= 10'."
            )
        try:
            return condition.test({"value": value})
        except ExpressionError as error:
            raise ExpressionError(f"{label}: {error}") from error

    def to_prompt_context(self) -> str:
        """The goal as a block of text for a prompt: name, description, criteria, constraints and context."""
        lines = [f"# Goal: {self.name}", self.description]
        if self.success_criteria:
            lines += ["", "## Success criteria", *(f"- {criterion.description}" for criterion in self.success_criteria)]
        if self.constraints:
            lines += ["", "## Constraints"]
            for constraint in self.constraints:
                tag = "MUST" if constraint.constraint_type == "hard" else "SHOULD"
                lines.append(f"- [{tag}] {constraint.description}")
        if self.context:
            lines += ["", "## Context", *(f"- {key}: {value}" for key, value in self.context.items())]
        return "\n".join(lines)
