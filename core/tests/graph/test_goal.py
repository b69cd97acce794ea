"""Goals: when they count as reached, what a constraint's check may be, and their text in a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from framework.errors import ExpressionError
from framework.graph.goal import Constraint, Goal, GoalStatus, SuccessCriterion


def make_goal(**fields: Any) -> Goal:
    return Goal(**{"id": "g", "name": "Tidy up", "description": "Leave the desk empty.", **fields})


def criterion(weight: float, met: bool) -> SuccessCriterion:
    return SuccessCriterion(id=f"{weight}{met}", description="d", metric="custom", target=1, weight=weight, met=met)


def constraint(check: str) -> Goal:
    return make_goal(constraints=[Constraint(id="c", description="d", constraint_type="hard", check=check)])


def test_defaults() -> None:
    goal = make_goal()
    assert (goal.status, goal.version, goal.success_criteria, goal.context) == (GoalStatus.DRAFT, "1.0.0", [], {})
    assert goal.parent_version is None
    assert goal.created_at.tzinfo is not None
    assert [status.value for status in GoalStatus] == ["draft", "ready", "active", "completed", "failed", "suspended"]


@pytest.mark.parametrize(
    ("criteria", "reached"),
    [
        ([], False),
        ([criterion(1.0, True)], True),
        ([criterion(1.0, False)], False),
        ([criterion(0.9, True), criterion(0.1, False)], True),
        ([criterion(0.89, True), criterion(0.11, False)], False),
        ([criterion(0.3, True), criterion(0.6, True), criterion(0.1, False)], True),  # 0.3 + 0.6 < 0.9 in floats
        ([criterion(0.0, True)], False),
    ],
)
def test_is_success_is_nine_tenths_of_the_weight(criteria: list[SuccessCriterion], reached: bool) -> None:
    assert make_goal(success_criteria=criteria).is_success() is reached


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_lies_between_zero_and_one(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        criterion(weight, True)


def test_check_constraint_evaluates_a_condition_over_value() -> None:
    goal = constraint("len(value) <= 5 and 'x' not in value")
    assert goal.check_constraint("c", "short") is True
    assert goal.check_constraint("c", "far too long") is False
    assert goal.check_constraint("c", "x") is False


@pytest.mark.parametrize("check", ["", "must be polite", "llm_judge", "1 < 2", "value > limit", "value.__class__"])
def test_check_constraint_never_pretends_to_have_checked(check: str) -> None:
    with pytest.raises(ExpressionError, match="Constraint 'c' cannot be checked"):
        constraint(check).check_constraint("c", "v")


def test_check_constraint_names_what_is_missing_or_failed() -> None:
    with pytest.raises(ValueError, match="no constraint 'other'"):
        constraint("value").check_constraint("other", 1)
    with pytest.raises(ExpressionError, match=r"'c' cannot be checked: .*TypeError"):
        constraint("value > 3").check_constraint("c", "text")


def test_prompt_context_lists_everything() -> None:
    goal = make_goal(
        success_criteria=[SuccessCriterion(id="s", description="Nothing is left", metric="custom", target=0)],
        constraints=[
            Constraint(id="h", description="Throw nothing away", constraint_type="hard"),
            Constraint(id="w", description="Be quick", constraint_type="soft"),
        ],
        context={"owner": "Ada"},
    )
    text = goal.to_prompt_context()
    for part in ("Tidy up", "Leave the desk empty.", "Nothing is left", "owner: Ada"):
        assert part in text
    assert "[MUST] Throw nothing away" in text
    assert "[SHOULD] Be quick" in text
