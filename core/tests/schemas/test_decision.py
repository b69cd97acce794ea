"""Decisions as data: defaults, computed fields, the one-line summary, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from framework.schemas.decision import Decision, DecisionEvaluation, DecisionType, Option, Outcome


def make_decision(**fields: Any) -> Decision:
    options = [
        Option(id="a", description="ask a person", action_type="human"),
        Option(id="b", description="guess", action_type="llm"),
    ]
    given = {"id": "dec_0", "node_id": "triage", "intent": "classify", "options": options, "chosen_option_id": "a"}
    return Decision(**(given | fields))


def test_the_types_of_decisions() -> None:
    assert [kind.value for kind in DecisionType] == [
        "tool_selection",
        "parameter_choice",
        "path_choice",
        "output_format",
        "retry_strategy",
        "delegation",
        "termination",
        "custom",
    ]


def test_defaults() -> None:
    decision = Decision(id="dec_0", node_id="n", intent="i")
    assert (decision.decision_type, decision.options, decision.outcome) == (DecisionType.CUSTOM, [], None)
    assert decision.chosen_option is None
    assert Option(id="a", description="", action_type="x").confidence == 0.5
    assert Outcome(success=True).tokens_used == 0


@pytest.mark.parametrize("score", [-0.1, 1.1])
def test_scores_are_shares(score: float) -> None:
    with pytest.raises(ValidationError):
        DecisionEvaluation(outcome_quality=score)
    with pytest.raises(ValidationError):
        DecisionEvaluation(alignment_score=score)


def test_chosen_option_is_the_one_named() -> None:
    chosen = make_decision(chosen_option_id="b").chosen_option
    assert chosen is not None
    assert chosen.description == "guess"
    assert make_decision(chosen_option_id="c").chosen_option is None


@pytest.mark.parametrize(
    ("outcome", "evaluation", "successful", "good"),
    [
        (None, None, False, False),
        (Outcome(success=True), None, True, True),
        (Outcome(success=False), None, False, False),
        (Outcome(success=True), DecisionEvaluation(outcome_quality=0.5), True, False),
        (Outcome(success=True), DecisionEvaluation(goal_aligned=False), True, False),
        (Outcome(success=False), DecisionEvaluation(outcome_quality=0.6), False, True),
    ],
)
def test_success_and_quality(
    outcome: Outcome | None, evaluation: DecisionEvaluation | None, successful: bool, good: bool
) -> None:
    decision = make_decision(outcome=outcome, evaluation=evaluation)
    assert (decision.was_successful, decision.was_good_decision) == (successful, good)


def test_summary_is_one_line_with_node_intent_choice_and_quality() -> None:
    decision = make_decision(intent="classify\n  the request", evaluation=DecisionEvaluation(outcome_quality=0.75))
    assert decision.summary_for_builder() == "… [triage] classify the request -> ask a person (quality 0.75)"
    assert make_decision(outcome=Outcome(success=True)).summary_for_builder().startswith("✓ [triage]")
    assert make_decision(outcome=Outcome(success=False), chosen_option_id="gone").summary_for_builder().endswith("gone")


def test_json_has_the_computed_fields_and_loads_without_them() -> None:
    decision = make_decision(outcome=Outcome(success=True))
    text = decision.model_dump_json()
    written = json.loads(text)
    assert (written["was_successful"], written["chosen_option"]["id"]) == (True, "a")

    loaded = Decision.model_validate_json(text)
    assert loaded == decision
    assert loaded.model_extra == {}
    loaded.outcome = Outcome(success=False)
    again = loaded.model_dump_json()
    assert again.count('"was_successful"') == 1, "the loaded value must not shadow the computed one"
    assert json.loads(again)["was_successful"] is False


def test_unknown_fields_are_kept() -> None:
    decision = Decision.model_validate({"id": "dec_0", "node_id": "n", "intent": "i", "cost": 3})
    assert json.loads(decision.model_dump_json())["cost"] == 3
