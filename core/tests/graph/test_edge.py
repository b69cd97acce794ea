"""Edges: when they are followed, what they hand on, and what a condition that fails means."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.errors import LeaseLost
from framework.graph.edge import EdgeCondition, EdgeSpec
from framework.graph.goal import Goal
from framework.llm.scripted import Reply, ScriptedLLM

GOAL = Goal(id="g", name="Tidy up", description="Leave the desk empty.")


def edge(**fields: Any) -> EdgeSpec:
    return EdgeSpec(**{"id": "e", "source": "a", "target": "b", **fields})


def conditional(text: str | None) -> EdgeSpec:
    return edge(condition=EdgeCondition.CONDITIONAL, condition_expr=text)


def test_defaults_and_values() -> None:
    spec = edge(colour="kept")
    assert (spec.condition, spec.condition_expr, spec.input_mapping) == (EdgeCondition.ALWAYS, None, {})
    assert (spec.priority, spec.description) == (0, "")
    assert spec.model_dump()["colour"] == "kept"
    assert [c.value for c in EdgeCondition] == ["always", "on_success", "on_failure", "conditional", "llm_decide"]


@pytest.mark.parametrize(
    ("condition", "after_success", "after_failure"),
    [("always", True, True), ("on_success", True, False), ("on_failure", False, True), ("llm_decide", True, False)],
)
def test_simple_conditions(condition: str, after_success: bool, after_failure: bool) -> None:
    spec = edge(condition=condition)
    assert spec.should_traverse(True, {}, {}) is after_success
    assert spec.should_traverse(False, {}, {}) is after_failure


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("output.confidence > 0.8", True),
        ("output['confidence'] > 0.95", False),
        ("result == 'done'", True),
        ("score > 80", True),
        ("memory['score'] > 80 and memory.score > 80", True),
        ("true and not false", True),
        ("memory", True),
        ("output.missing_list", False),
        ("'x'", True),
        (None, True),
        ("", True),
        ("  ", True),
    ],
)
def test_conditional_ignores_success(text: str | None, followed: bool, success: bool) -> None:
    output = {"confidence": 0.9, "result": "done"}
    assert conditional(text).should_traverse(success, output, {"score": 85}, on_warning=lambda _: None) is followed


def test_state_wins_over_the_other_names() -> None:
    memory = {"output": "mine", "result": 3, "true": False}
    assert conditional("output == 'mine' and result == 3 and not true").should_traverse(True, {"result": 1}, memory)


def test_result_is_none_without_one() -> None:
    assert conditional("result is None").should_traverse(True, {}, {})


@pytest.mark.parametrize("text", ["missing > 3", "score >", "().__class__", "output.nope", "score + 'a'", "1 / 0"])
def test_a_condition_that_fails_is_false_with_one_warning(text: str) -> None:
    told: list[str] = []
    assert conditional(text).should_traverse(True, {}, {"score": 1}, on_warning=told.append) is False
    (warning,) = told
    assert "Edge 'e' (a -> b)" in warning
    assert repr(text) in warning


def test_without_a_callback_the_warning_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="framework.graph.edge"):
        assert conditional("missing").should_traverse(True, {}, {}) is False
    assert "no value named 'missing'" in caplog.text


def test_a_large_state_is_not_copied() -> None:
    class Lazy(dict[str, Any]):
        def __iter__(self) -> Any:
            raise AssertionError("iterated")

        keys = items = values = __iter__

    assert conditional("score > 3").should_traverse(True, {}, Lazy(score=4))


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"proceed": true, "reasoning": "r"}', True),
        ('```json\n{"proceed": false}\n```', False),
        ('Well: {"proceed": true} I think', True),
    ],
)
def test_llm_decide_follows_the_model(reply: str, expected: bool, success: bool) -> None:
    llm = ScriptedLLM([reply])
    assert edge(condition="llm_decide").should_traverse(success, {}, {}, llm, GOAL) is expected


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("reply", ["no idea", '{"proceed": "yes"}', "[]", "{}", ConnectionError("down")])
def test_llm_decide_without_a_usable_answer_follows_success(reply: Reply, success: bool) -> None:
    told: list[str] = []
    decided = edge(condition="llm_decide").should_traverse(
        success, {}, {}, ScriptedLLM([reply]), GOAL, on_warning=told.append
    )
    assert decided is success
    assert len(told) == 1


def test_llm_decide_lets_errors_of_the_own_store_through() -> None:
    llm = ScriptedLLM([LeaseLost("run_1", 3)])
    with pytest.raises(LeaseLost):
        edge(condition="llm_decide").should_traverse(True, {}, {}, llm, GOAL)


def test_llm_decide_asks_the_same_question_whatever_the_order_of_the_state() -> None:
    asked: list[Any] = []

    def script(messages: Any, system: Any, tools: Any) -> str:
        asked.append((messages, system))
        return '{"proceed": true}'

    spec = edge(condition="llm_decide", description="Only when tidy.")
    for memory in ({"x": 1, "y": "z" * 5000}, {"y": "z" * 5000, "x": 1}):
        spec.should_traverse(True, {"result": "r"}, memory, ScriptedLLM(script), GOAL, "Alpha", "Beta")
    assert asked[0] == asked[1]
    question = asked[0][0][0]["content"]
    for part in ("Tidy up", "Alpha", "Beta", "Only when tidy.", "- x: 1", "- result: r"):
        assert part in question
    assert len(question) < 1500


def test_llm_decide_works_with_a_mock() -> None:
    llm = MagicMock()
    llm.complete.return_value.content = '{"proceed": false}'
    assert edge(condition="llm_decide").should_traverse(True, {}, {}, llm, MagicMock()) is False
    llm.complete.assert_called_once()


def test_map_inputs_passes_everything_through_without_a_mapping() -> None:
    output = {"x": 1, "y": 2}
    mapped = edge().map_inputs(output, {"z": 3})
    assert mapped == output
    assert mapped is not output


def test_map_inputs_looks_in_the_output_then_the_state_and_drops_the_missing() -> None:
    spec = edge(input_mapping={"a": "x", "b": "z", "c": "missing", "d": "none"})
    assert spec.map_inputs({"x": 1, "none": None}, {"x": 9, "z": 3}) == {"a": 1, "b": 3, "d": None}
