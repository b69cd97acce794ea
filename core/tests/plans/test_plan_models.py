"""Plans as data: defaults, what JSON they are read from, and round trips of plans in progress."""

from __future__ import annotations

import json
from typing import Any

import pytest

from framework.graph.plan import (
    ActionSpec,
    ActionType,
    ApprovalDecision,
    ExecutionStatus,
    JudgmentAction,
    Plan,
    PlanStep,
    StepStatus,
    load_export,
)


def step(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    action = ActionSpec(action_type=ActionType.FUNCTION, function_name="f")
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def test_enums_have_exactly_their_values() -> None:
    assert [each.value for each in ActionType] == "llm_call tool_use sub_graph function code_execution".split()
    assert [each.value for each in StepStatus] == (
        "pending awaiting_approval in_progress completed failed skipped rejected".split()
    )
    assert [each.value for each in ApprovalDecision] == "approve reject modify abort".split()
    assert [each.value for each in JudgmentAction] == "accept retry replan escalate".split()
    assert [each.value for each in ExecutionStatus] == (
        "completed awaiting_approval needs_replan needs_escalation rejected aborted failed".split()
    )


def test_defaults_of_a_plan_from_json() -> None:
    plan = Plan.from_json({"steps": [{"id": "s"}]})
    assert (plan.id, plan.goal_id, plan.description, plan.revision) == ("plan", "", "", 1)
    assert plan.steps[0].action.action_type is ActionType.FUNCTION
    assert (plan.steps[0].max_retries, plan.steps[0].status) == (3, StepStatus.PENDING)
    assert plan.context == {}
    assert plan.created_by == "external"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("{not json", json.JSONDecodeError),
        ({"steps": [{"description": "no id"}]}, KeyError),
        ({"steps": [{"id": "s", "action": {"action_type": "llm_generate"}}]}, ValueError),
        ({"steps": "abc"}, AttributeError),
        ({"steps": ["abc"]}, AttributeError),
        ("[1]", ValueError),
        ({"plan": 3}, ValueError),
    ],
)
def test_what_is_no_plan(data: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Plan.from_json(data)


def test_a_plan_in_progress_comes_back_as_it_was() -> None:
    plan = Plan(id="p", goal_id="g", description="d", revision=3, context={"a": {"x": 1}})
    plan.steps = [
        step("a", status=StepStatus.COMPLETED, result={"x": 1}, attempts=2, max_retries=7),
        step(
            "b", "a", status=StepStatus.FAILED, error="no", attempts=7, requires_approval=True, approval_message="ok?"
        ),
    ]
    plan.steps[0].action = ActionSpec(action_type=ActionType.SUB_GRAPH, graph_id="g1", model="m")
    for again in (
        Plan.from_json({"plan": json.loads(plan.model_dump_json())}),
        Plan.from_json(plan.model_dump_json()),
        Plan.model_validate(plan.model_dump()),
    ):
        assert again == plan


def test_ready_steps_are_those_whose_dependencies_are_completed() -> None:
    plan = Plan(id="p", goal_id="g", description="", steps=[step("b", "a"), step("a"), step("c", "a", "b")])
    assert [each.id for each in plan.get_ready_steps()] == ["a"]
    plan.steps[1].status = StepStatus.COMPLETED
    plan.steps[0].status = StepStatus.AWAITING_APPROVAL
    assert [each.id for each in plan.get_ready_steps()] == ["b"], "a step that waits for its answer can go on"
    plan.steps[0].status = StepStatus.IN_PROGRESS
    assert plan.get_ready_steps() == []
    assert not plan.is_complete()
    assert Plan(id="p", goal_id="g", description="").is_complete()
    assert plan.get_step("c") is plan.steps[2]
    assert plan.get_step("d") is None


def test_feedback_for_the_planner() -> None:
    done = step("a", status=StepStatus.COMPLETED, result={"x": 1})
    failed = step("b", status=StepStatus.FAILED, error="no", attempts=3)
    plan = Plan(id="p", goal_id="g", description="", revision=2, steps=[done, failed, step("c")], context={"k": 1})
    assert plan.to_feedback_context() == {
        "plan_id": "p",
        "revision": 2,
        "completed_steps": [{"id": "a", "description": "a", "result": {"x": 1}}],
        "failed_steps": [{"id": "b", "description": "b", "error": "no", "attempts": 3}],
        "context": {"k": 1},
    }


def test_an_export_brings_its_goal_or_gets_a_minimal_one() -> None:
    plan = {"id": "p", "goal_id": "g", "description": "do it", "steps": [{"id": "a"}]}
    goal = {"id": "g", "name": "G", "description": "why", "success_criteria": []}
    loaded, given = load_export(json.dumps({"plan": plan, "goal": goal}))
    assert (loaded.id, given.name) == ("p", "G")
    loaded, made = load_export(plan)
    assert (made.id, made.description) == ("g", "do it")
