"""Plans as data: steps with dependencies, what a step does, approvals, judgements, and the result of an execution."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from framework.graph.goal import Goal


class ActionType(str, Enum):
    """What kind of work a step is."""

    LLM_CALL = "llm_call"
    TOOL_USE = "tool_use"
    SUB_GRAPH = "sub_graph"
    FUNCTION = "function"
    CODE_EXECUTION = "code_execution"


class StepStatus(str, Enum):
    """Where a step stands. Completed, failed, skipped and rejected steps do not run again by themselves."""

    PENDING = "pending"
    AWAITING_APPROVAL = "awaiting_approval"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    REJECTED = "rejected"


class ApprovalDecision(str, Enum):
    """A person's answer to an approval request."""

    APPROVE = "approve"
    REJECT = "reject"
    MODIFY = "modify"
    ABORT = "abort"


class JudgmentAction(str, Enum):
    """What a judge decides about a step's result."""

    ACCEPT = "accept"
    RETRY = "retry"
    REPLAN = "replan"
    ESCALATE = "escalate"


class ExecutionStatus(str, Enum):
    """How an execution of a plan ended."""

    COMPLETED = "completed"
    AWAITING_APPROVAL = "awaiting_approval"
    NEEDS_REPLAN = "needs_replan"
    NEEDS_ESCALATION = "needs_escalation"
    REJECTED = "rejected"
    ABORTED = "aborted"
    FAILED = "failed"


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow")


class ActionSpec(_Document):
    """The work of a step; which fields count depends on ``action_type``. ``model`` is the model that an llm_call asks
    instead of the provider's own, where the provider takes one (``supports_model``)."""

    action_type: ActionType
    prompt: str | None = None
    system_prompt: str | None = None
    model: str | None = None
    tool_name: str | None = None
    tool_args: dict[str, Any] = Field(default_factory=dict)
    graph_id: str | None = None
    function_name: str | None = None
    function_args: dict[str, Any] = Field(default_factory=dict)
    code: str | None = None
    language: str = "python"


class PlanStep(_Document):
    """One step: what it does, what it needs, and where it stands.

    Values in ``inputs`` that start with ``$`` are references (see ``framework.graph.references``). ``max_retries``
    counts attempts in total; a step that does not set it takes ``ExecutorConfig.max_retries_per_step``.
    """

    id: str
    description: str
    action: ActionSpec
    inputs: dict[str, Any] = Field(default_factory=dict)
    expected_outputs: list[str] = Field(default_factory=list)
    dependencies: list[str] = Field(default_factory=list)
    requires_approval: bool = False
    approval_message: str | None = None

    status: StepStatus = StepStatus.PENDING
    result: Any = None
    error: str | None = None
    attempts: int = 0
    max_retries: int = 3
    started_at: datetime | None = None
    completed_at: datetime | None = None

    def is_ready(self, completed_ids: set[str]) -> bool:
        """Whether the step may run: not begun, or waiting for an answer, and all its dependencies are completed."""
        waiting = self.status in (StepStatus.PENDING, StepStatus.AWAITING_APPROVAL)
        return waiting and all(needed in completed_ids for needed in self.dependencies)


class Plan(_Document):
    """Steps towards a goal, made by a planner outside. ``context`` holds the outputs of finished steps by step id,
    and whatever else the planner put there as initial context."""

    id: str
    goal_id: str
    description: str
    steps: list[PlanStep] = Field(default_factory=list)
    revision: int = 1
    current_step_idx: int = 0
    context: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    created_by: str = "external"
    previous_feedback: str | None = None

    @classmethod
    def from_json(cls, data: str | dict[str, Any]) -> Plan:
        """The plan in JSON text or a dict, optionally under the key ``plan``; one saved in progress is in progress.

        Raises ``json.JSONDecodeError`` for bad text, ``KeyError`` for a step without an id, ``AttributeError`` when
        ``steps`` is no list of objects, ``ValueError`` for an unknown action type and for values that do not fit.
        """
        loaded = json.loads(data) if isinstance(data, str) else data
        if not isinstance(loaded, dict):
            raise ValueError(f"A plan is a JSON object, not {type(loaded).__name__}.")
        plan = loaded.get("plan", loaded)
        if not isinstance(plan, dict):
            raise ValueError(f"The key 'plan' holds {type(plan).__name__}, not a JSON object.")
        steps = plan.get("steps") or []
        if not isinstance(steps, list):
            raise AttributeError(f"The 'steps' of a plan are a list of objects, not {type(steps).__name__}.")
        known = {key: value for key, value in plan.items() if value is not None}
        return cls.model_validate(
            {"id": "plan", "goal_id": "", "description": "", **known, "steps": [_step_from(step) for step in steps]}
        )

    def get_step(self, step_id: str) -> PlanStep | None:
        """The step of this id, or ``None``."""
        return next((step for step in self.steps if step.id == step_id), None)

    def get_ready_steps(self) -> list[PlanStep]:
        """Steps that may run now, in list order."""
        completed = {step.id for step in self.get_completed_steps()}
        return [step for step in self.steps if step.is_ready(completed)]

    def get_completed_steps(self) -> list[PlanStep]:
        """Completed steps, in list order."""
        return [step for step in self.steps if step.status is StepStatus.COMPLETED]

    def is_complete(self) -> bool:
        """Whether every step is completed; an empty plan is."""
        return all(step.status is StepStatus.COMPLETED for step in self.steps)

    def to_feedback_context(self) -> dict[str, Any]:
        """What a planner needs to make the next revision."""
        return {
            "plan_id": self.id,
            "revision": self.revision,
            "completed_steps": [
                {"id": step.id, "description": step.description, "result": step.result}
                for step in self.get_completed_steps()
            ],
            "failed_steps": [
                {"id": step.id, "description": step.description, "error": step.error, "attempts": step.attempts}
                for step in self.steps
                if step.status is StepStatus.FAILED
            ],
            "context": self.context,
        }


def _step_from(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise AttributeError(f"A step of a plan is an object, not {type(data).__name__}.")
    if "id" not in data:
        raise KeyError("id")
    action = {key: value for key, value in (data.get("action") or {}).items() if value is not None}
    action["action_type"] = ActionType(action.get("action_type", ActionType.FUNCTION.value))
    step = {key: value for key, value in data.items() if value is not None}
    return {"description": "", **step, "action": action}


class ApprovalRequest(_Document):
    """A question to a person: may this step run with these arguments?

    ``request_id`` changes whenever the step, its arguments or the plan's revision do, and each time it is asked anew.
    """

    step_id: str
    step_description: str
    action_type: str
    action_details: dict[str, Any] = Field(default_factory=dict)
    context: dict[str, Any] = Field(default_factory=dict)
    approval_message: str | None = None
    preview: str | None = None
    run_id: str | None = None
    request_id: str | None = None


class ApprovalResult(_Document):
    """The answer. ``modifications`` of a "modify" may hold ``inputs`` (a dict, merged) for every step, ``tool_args`` or
    ``function_args`` (dicts, merged) for one that uses a tool or calls a function, ``prompt`` (a text) for one that
    asks a model, and nothing else."""

    decision: ApprovalDecision
    reason: str | None = None
    modifications: dict[str, Any] = Field(default_factory=dict)


class Judgment(_Document):
    """What a judge decided, and why. ``feedback`` is for the worker's next attempt or for the planner."""

    action: JudgmentAction
    reasoning: str
    feedback: str | None = None
    rule_matched: str | None = None
    confidence: float = 1.0
    llm_used: bool = False
    context: dict[str, Any] = Field(default_factory=dict)


class EvaluationRule(_Document):
    """A rule of a judge. ``condition`` is in the language of ``framework.graph.expressions``; higher priority first."""

    id: str
    description: str
    condition: str
    action: JudgmentAction
    feedback_template: str = ""
    priority: int = 0


class PlanExecutionResult(_Document):
    """What an execution of a plan came to.

    ``results`` is the whole context. Counts and totals are the run's, over all processes; ``steps_executed`` counts
    attempts that were judged, ``attempts_interrupted`` those that a crash of their process may have cut off, and
    ``total_tokens`` those of models that judge as well, as ``total_cost`` does, in US dollars as far as prices are
    known. ``run_id`` names the run for life; ``checkpoint_id`` is its
    newest checkpoint, ``resumed_from`` the one this execution began at, ``steps_recovered`` how many completed steps
    it found. ``pending_approvals`` are the open requests of a run that waits. ``stale_steps`` are completed steps that
    a new revision of the plan kept though something they were made from has changed since. ``error_type`` is "budget"
    when the run's budget is used up.
    """

    status: ExecutionStatus
    results: dict[str, Any] = Field(default_factory=dict)
    feedback: str | None = None
    feedback_context: dict[str, Any] = Field(default_factory=dict)
    completed_steps: list[str] = Field(default_factory=list)
    steps_executed: int = 0
    total_tokens: int = 0
    total_latency_ms: int = 0
    total_cost: float = 0.0
    error: str | None = None
    error_type: str | None = None
    run_id: str | None = None
    checkpoint_id: str | None = None
    resumed_from: str | None = None
    steps_recovered: int = 0
    attempts_interrupted: int = 0
    stale_steps: list[str] = Field(default_factory=list)
    revision: int = 1
    pending_approvals: list[ApprovalRequest] = Field(default_factory=list)


def load_export(data: str | dict[str, Any]) -> tuple[Plan, Goal]:
    """Plan and goal of an export; without the key ``goal`` a minimal goal is made from the plan.

    Raises what ``Plan.from_json`` raises.
    """
    loaded = json.loads(data) if isinstance(data, str) else data
    plan = Plan.from_json(loaded)
    given = loaded.get("goal") if isinstance(loaded, Mapping) else None
    if isinstance(given, Mapping):
        name = str(given.get("name") or given.get("id") or plan.goal_id or plan.id)
        filled = {"id": plan.goal_id or plan.id, "name": name, "description": plan.description, **given}
        return plan, Goal.model_validate(filled)
    return plan, Goal(id=plan.goal_id or plan.id, name=plan.goal_id or plan.id, description=plan.description)
