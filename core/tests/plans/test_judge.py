"""The judge: its rules and their order, the model's replies, and what it does when nothing says anything."""

from __future__ import annotations

from typing import Any

import pytest

from framework import _secrets
from framework.graph.goal import Goal
from framework.graph.judge import HybridJudge, create_default_judge
from framework.graph.plan import ActionSpec, ActionType, EvaluationRule, JudgmentAction, PlanStep
from framework.llm.provider import LLMResponse
from framework.llm.scripted import ScriptedLLM

GOAL = Goal(id="g", name="Goal", description="d")


def step(attempts: int = 1, max_retries: int = 3) -> PlanStep:
    action = ActionSpec(action_type=ActionType.FUNCTION, function_name="f")
    return PlanStep(id="s", description="do", action=action, attempts=attempts, max_retries=max_retries)


def rule(rule_id: str, condition: str, action: JudgmentAction = JudgmentAction.RETRY, **fields: Any) -> EvaluationRule:
    return EvaluationRule(id=rule_id, description=f"because {rule_id}", condition=condition, action=action, **fields)


@pytest.mark.parametrize("before", [0, 170, 185, 190])
async def test_the_reason_why_no_model_could_be_asked_tells_no_part_of_a_secret(before: int) -> None:
    class Leaky:
        def complete(self, **_: Any) -> LLMResponse:
            raise ConnectionError("x" * before + " sk-very-secret-value")

    _secrets.register_secret("sk-very-secret-value")
    try:
        judgment = await HybridJudge(llm=Leaky()).evaluate(step(), "result", GOAL)
    finally:
        _secrets.forget_secrets()
    assert judgment.action is JudgmentAction.ESCALATE
    assert "ConnectionError" in judgment.reasoning
    assert "sk-" not in judgment.model_dump_json()


@pytest.mark.parametrize(
    ("result", "attempts", "expected", "action"),
    [
        ({"success": True, "error_type": "security"}, 1, "security_escalate", JudgmentAction.ESCALATE),
        ({"success": False, "error": "x"}, 3, "max_retries_fail", JudgmentAction.REPLAN),
        ({"success": True}, 1, "explicit_success", JudgmentAction.ACCEPT),
        ({"success": True}, 3, "explicit_success", JudgmentAction.ACCEPT),
        ({"success": False, "error_type": "rate_limit"}, 1, "transient_error_retry", JudgmentAction.RETRY),
        ({"success": False, "error_type": "timeout"}, 2, "transient_error_retry", JudgmentAction.RETRY),
        ({"success": False, "error_type": "missing_data"}, 1, "missing_data_replan", JudgmentAction.REPLAN),
        ({"success": False, "error": "odd"}, 1, None, JudgmentAction.RETRY),
        ({"success": False, "error": "odd", "transient": None}, 1, None, JudgmentAction.RETRY),
        ({"success": False, "error_type": "llm_error", "transient": False}, 1, None, JudgmentAction.REPLAN),
        ({"success": True, "transient": False}, 1, "explicit_success", JudgmentAction.ACCEPT),
        ("plain text", 1, None, JudgmentAction.ACCEPT),
        ("plain text", 3, None, JudgmentAction.ACCEPT),
    ],
)
async def test_the_default_rules(result: Any, attempts: int, expected: str | None, action: JudgmentAction) -> None:
    judgment = await create_default_judge().evaluate(step(attempts), result, GOAL)
    assert (judgment.rule_matched, judgment.action) == (expected, action)
    assert judgment.llm_used is False


def test_the_default_rules_in_their_order() -> None:
    assert [(each.id, each.priority) for each in create_default_judge().rules] == [
        ("security_escalate", 200),
        ("max_retries_fail", 150),
        ("explicit_success", 100),
        ("transient_error_retry", 90),
        ("missing_data_replan", 80),
    ]


async def test_the_first_rule_that_holds_wins() -> None:
    judge = HybridJudge(rules=[rule("low", "success", priority=1), rule("high", "success", priority=9)])
    judge.add_rule(rule("high-later", "success", priority=9))
    assert [each.id for each in judge.rules] == ["high", "high-later", "low"]
    judgment = await judge.evaluate(step(), {"success": True}, GOAL)
    assert (judgment.rule_matched, judgment.reasoning, judgment.confidence) == ("high", "because high", 1.0)
    assert judge.remove_rule("high")
    assert not judge.remove_rule("high")
    assert (await judge.evaluate(step(), {"success": True}, GOAL)).rule_matched == "high-later"


async def test_a_condition_that_errors_does_not_match() -> None:
    names = ["result.nothing > 3", "().__class__", "open('x')", "result['outputs']['n'] > 2"]
    judge = HybridJudge(rules=[rule(condition, condition) for condition in names])
    assert (await judge.evaluate(step(), {"success": True}, GOAL)).rule_matched is None
    found = await judge.evaluate(step(), {"success": True, "outputs": {"n": 3}}, GOAL, {"k": 1})
    assert found.rule_matched == names[-1]


@pytest.mark.parametrize(
    ("template", "feedback"),
    [
        ("{error} at {step.id} for {goal[name]}", "boom at s for Goal"),
        ("{result[outputs][items][0]:>3}", "  7"),
        ("{nothing}", "{nothing}"),
        ("{step.__class__}", "{step.__class__}"),
        ("{error.__class__.__mro__}", "{error.__class__.__mro__}"),
        ("{result[outputs][items][0]:>999999999}", "{result[outputs][items][0]:>999999999}"),
        ("{", "{"),
    ],
)
async def test_feedback_templates_reach_values_and_never_attributes(template: str, feedback: str) -> None:
    judge = HybridJudge(rules=[rule("r", "not success", feedback_template=template)])
    result = {"success": False, "error": "boom", "outputs": {"items": [7]}}
    assert (await judge.evaluate(step(), result, GOAL)).feedback == feedback


async def test_without_rules_and_model_a_failure_is_never_accepted() -> None:
    judge = HybridJudge()
    again = await judge.evaluate(step(1), {"success": False, "error": "e"}, GOAL)
    assert (again.action, again.feedback, again.confidence) == (JudgmentAction.RETRY, "e", 0.5)
    last = await judge.evaluate(step(3), {"success": False, "error": "e"}, GOAL)
    assert last.action is JudgmentAction.REPLAN


@pytest.mark.parametrize(
    ("reply", "action", "confidence"),
    [
        ("ACTION: accept\nCONFIDENCE: 0.9\nREASONING: fine\nFEEDBACK: none", JudgmentAction.ACCEPT, 0.9),
        ("**ACTION:** Retry\nCONFIDENCE: 0.8\nREASONING: thin\nFEEDBACK: say\nmore", JudgmentAction.RETRY, 0.8),
        ("ACTION: dance\nCONFIDENCE: 0.9", JudgmentAction.ESCALATE, 0.9),
        ("ACTION: accept\nCONFIDENCE: much", JudgmentAction.ESCALATE, 0.5),
        ("ACTION: accept\nCONFIDENCE: 0.2", JudgmentAction.ESCALATE, 0.2),
        ("hm", JudgmentAction.ACCEPT, 0.8),
    ],
)
async def test_replies_of_the_model(reply: str, action: JudgmentAction, confidence: float) -> None:
    judgment = await HybridJudge(llm=ScriptedLLM([reply])).evaluate(step(), {"success": True}, GOAL)
    assert (judgment.action, judgment.confidence, judgment.llm_used) == (action, confidence, True)
    if reply.endswith("more"):
        assert judgment.feedback == "say\nmore"
    if confidence == 0.2:
        assert judgment.context["original_judgment"]["action"] == "accept"


async def test_a_reply_that_says_nothing_does_not_accept_a_failure() -> None:
    judgment = await HybridJudge(llm=ScriptedLLM(["hm"])).evaluate(step(), {"success": False, "error": "e"}, GOAL)
    assert judgment.action is JudgmentAction.RETRY


async def test_a_model_that_fails_means_a_person() -> None:
    judgment = await HybridJudge(llm=ScriptedLLM([ConnectionError("down")])).evaluate(step(), {"success": True}, GOAL)
    assert judgment.action is JudgmentAction.ESCALATE
    assert "down" in judgment.reasoning


@pytest.mark.parametrize(
    ("content", "action"),
    [("ACTION: accept", JudgmentAction.ACCEPT), ("CONFIDENCE: 0.1", JudgmentAction.ESCALATE)],
)
async def test_what_the_model_cost_is_in_the_judgment(content: str, action: JudgmentAction) -> None:
    reply = LLMResponse(content=content, model="m", input_tokens=30, output_tokens=4)
    judgment = await HybridJudge(llm=ScriptedLLM([reply])).evaluate(step(), {"success": True}, GOAL)
    assert (judgment.action, judgment.context["tokens_used"]) == (action, 34)


async def test_a_reply_that_cannot_be_read_has_cost_something_too() -> None:
    class Odd:
        input_tokens, output_tokens = 30, 4

    class Model:
        async def complete(self, **_: Any) -> Any:
            return Odd()

    judgment = await HybridJudge(llm=Model()).evaluate(step(), {"success": True}, GOAL)
    assert (judgment.action, judgment.context) == (JudgmentAction.ESCALATE, {"tokens_used": 34})
    failed = await HybridJudge(llm=ScriptedLLM([ConnectionError("down")])).evaluate(step(), {"success": True}, GOAL)
    assert failed.context == {"tokens_used": 0}


async def test_without_a_model_nothing_is_said_of_its_cost() -> None:
    assert (await create_default_judge().evaluate(step(), {"success": True}, GOAL)).context == {}
    assert (await HybridJudge().evaluate(step(), {"success": True}, GOAL)).context == {}
