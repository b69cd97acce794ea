"""A decision as data: what an agent could do, what it chose and why, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator


class Document(BaseModel):
    """Base of the models that are stored whole as JSON, by this version or another. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow")


class ComputingDocument(Document):
    """Base of those with computed fields, which are written for readers of the JSON and dropped when it is loaded:
    kept as unknown fields they would be written twice, once with a value that no longer holds."""

    @model_validator(mode="before")
    @classmethod
    def _drop_computed_fields(cls, data: Any) -> Any:
        computed = cls.__pydantic_decorators__.computed_fields  # model_computed_fields needs pydantic 2.10
        if isinstance(data, Mapping) and not computed.keys().isdisjoint(data):
            return {key: value for key, value in data.items() if key not in computed}
        return data


class DecisionType(str, Enum):
    """What kind of choice a decision was."""

    TOOL_SELECTION = "tool_selection"
    PARAMETER_CHOICE = "parameter_choice"
    PATH_CHOICE = "path_choice"
    OUTPUT_FORMAT = "output_format"
    RETRY_STRATEGY = "retry_strategy"
    DELEGATION = "delegation"
    TERMINATION = "termination"
    CUSTOM = "custom"


class Option(Document):
    """One thing the agent could have done."""

    id: str
    description: str
    action_type: str
    action_params: dict[str, Any] = Field(default_factory=dict)
    pros: list[str] = Field(default_factory=list)
    cons: list[str] = Field(default_factory=list)
    confidence: float = 0.5


class Outcome(Document):
    """What came of a decision."""

    success: bool
    result: Any = None
    error: str | None = None
    state_changes: dict[str, Any] = Field(default_factory=dict)
    tokens_used: int = 0
    latency_ms: int = 0
    summary: str = ""
    timestamp: datetime = Field(default_factory=datetime.now)


class DecisionEvaluation(Document):
    """A judgement of a decision made afterwards. Scores are 0 to 1."""

    goal_aligned: bool = True
    alignment_score: float = Field(default=1.0, ge=0.0, le=1.0)
    better_option_existed: bool = False
    better_option_id: str | None = None
    why_better: str | None = None
    outcome_quality: float = Field(default=1.0, ge=0.0, le=1.0)
    contributed_to_success: bool | None = None
    explanation: str = ""


class Decision(ComputingDocument):
    """A choice made by a node or step: the options, the one chosen, the reasoning, and later the outcome."""

    id: str
    node_id: str
    intent: str
    timestamp: datetime = Field(default_factory=datetime.now)
    decision_type: DecisionType = DecisionType.CUSTOM
    options: list[Option] = Field(default_factory=list)
    chosen_option_id: str = ""
    reasoning: str = ""
    active_constraints: list[str] = Field(default_factory=list)
    input_context: dict[str, Any] = Field(default_factory=dict)
    outcome: Outcome | None = None
    evaluation: DecisionEvaluation | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def chosen_option(self) -> Option | None:
        """The option that ``chosen_option_id`` names, or ``None``."""
        return next((option for option in self.options if option.id == self.chosen_option_id), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def was_successful(self) -> bool:
        """Whether an outcome is recorded and it is a success."""
        return self.outcome is not None and self.outcome.success

    @computed_field  # type: ignore[prop-decorator]
    @property
    def was_good_decision(self) -> bool:
        """By its evaluation: aligned with the goal and quality above 0.5. Not evaluated: whether it was successful."""
        if self.evaluation is None:
            return self.was_successful
        return self.evaluation.goal_aligned and self.evaluation.outcome_quality > 0.5

    def summary_for_builder(self) -> str:
        """One line: a mark, the node, the intent, what was chosen, and the evaluated quality if there is one."""
        marks = {None: "…", True: "✓", False: "✗"}
        mark = marks[None if self.outcome is None else self.outcome.success]
        chosen = self.chosen_option
        line = f"{mark} [{self.node_id}] {self.intent}"
        if chosen is not None:
            line += f" -> {chosen.description or chosen.id}"
        elif self.chosen_option_id:
            line += f" -> {self.chosen_option_id}"
        if self.evaluation is not None:
            line += f" (quality {self.evaluation.outcome_quality:.2f})"
        return " ".join(line.split())
