"""What counts as an answer that fits: every word of a JSON schema, for the sender as for the node."""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from framework.graph.answer_schema import Expected, problem_of

NAMED = {"$ref": "#/$defs/name", "$defs": {"name": {"type": "string", "minLength": 2}}}
CLOSED = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
PAIR = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "minimum": 3}, 3, 2),
        ({"type": "number", "exclusiveMaximum": 1}, 0.5, 1),
        ({"type": "integer", "multipleOf": 5}, 10, 7),
        ({"type": "string", "pattern": "^[a-z]+$"}, "abc", "ABC"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "ab", "abcd"),
        ({"type": "string", "format": "date"}, "2026-02-28", "2026-02-30"),
        ({"type": "string", "format": "date-time"}, "2026-02-28T10:00:00Z", "yesterday"),
        ({"type": "string", "format": "time"}, "00:00:00", "25:00:00"),
        ({"type": "string", "format": "duration"}, "P1DT2H", "a day"),
        ({"type": "string", "format": "email"}, "a@b.example", "nobody"),
        ({"type": "string", "format": "uri"}, "https://a.example/x", "a b"),
        ({"type": "string", "format": "uuid"}, "12345678-1234-5678-1234-567812345678", "1234"),
        (NAMED, "Bo", "B"),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}, 5, 2),
        ({"oneOf": [{"minimum": 5}, {"maximum": 3}]}, 2, 4),
        ({"allOf": [{"minimum": 5}, {"maximum": 7}]}, 6, 8),
        ({"not": {"type": "null"}}, 0, None),
        (CLOSED, {"a": 1}, {"a": 1, "b": 2}),
        (PAIR, ["x", 1], ["x", 1, 2]),
        ({"type": "array", "uniqueItems": True}, [1, 2], [1, 1]),
        ({"type": "integer"}, 4.0, True),
        ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and value else "",
)
def test_the_sender_and_the_node_refuse_the_same(schema: dict[str, Any], good: Any, bad: Any) -> None:
    expected = Expected(schema)
    assert problem_of(schema, good) is None
    assert expected.taken(good, "q") == good
    problem = problem_of(schema, bad)
    assert problem is not None
    assert problem.startswith("the answer")
    with pytest.raises(ValueError, match="does not fit: the answer"):
        expected.taken(bad, "q")


def test_a_problem_says_where_and_what() -> None:
    schema = {"properties": {"items": {"items": {"required": ["id"], "properties": {"id": {"enum": [1, 2]}}}}}}
    assert problem_of(schema, {"items": [{"id": 1}, {}]}) == "the answer.items[1] has no 'id'"
    assert problem_of(schema, {"items": [{"id": 3}]}) == "the answer.items[0].id is 3, not one of 1, 2"
    assert problem_of({"type": ["string", "null"]}, 1.5) == "the answer is number, not string or null"
    assert problem_of(None, object()) is None, "anything"


@pytest.mark.parametrize(
    "schema",
    [{"type": "strin"}, {"minimum": "3"}, {"pattern": "(["}, {"$ref": "#/$defs/x"}, {"$ref": "http://127.0.0.1:9/x"}],
    ids=["type", "minimum", "pattern", "ref", "remote"],
)
def test_a_schema_that_cannot_be_used_is_refused_when_the_question_is_asked(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no JSON schema that can be used: "):
        Expected(schema)


def test_a_property_may_be_called_as_a_word_of_the_language_is() -> None:
    for schema in ({"properties": {"$ref": {"type": "string"}}}, {"items": {"$ref": "#"}, "type": "array"}):
        assert Expected(schema).schema == schema


class Colour(enum.Enum):
    RED = "red"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    at: datetime
    colour: Colour
    pair: tuple[int, int]


def test_a_strict_type_takes_what_json_can_say() -> None:
    expected = Expected(Strict)
    answer = {"at": "2026-01-02T03:04:05Z", "colour": "red", "pair": [1, 2]}
    assert problem_of(expected.schema, answer) is None
    taken = expected.taken(answer, "q")
    assert (taken.colour, taken.pair, taken.at.year) == (Colour.RED, (1, 2), 2026)


class Odd:
    """A type that has no JSON schema."""


class Even(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    number: Annotated[int, Field(ge=0)]

    @field_validator("number")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value == 13:
            raise KeyError("a bug of the validator")
        if value % 2:
            raise ValueError("it is odd")
        return value


def test_what_only_the_type_knows_is_refused_by_the_node() -> None:
    expected = Expected(Even)
    assert problem_of(expected.schema, {"number": 3}) is None
    assert "greater" in (problem_of(expected.schema, {"number": -1}) or "") or problem_of(
        expected.schema, {"number": -1}
    )
    with pytest.raises(ValueError, match=r"number: .*it is odd"):
        expected.taken({"number": 3}, "q")
    with pytest.raises(ValueError, match="KeyError"):
        expected.taken({"number": 13}, "q")


@pytest.mark.parametrize(
    "given",
    [Callable[[], int], Annotated[str, Field(pattern=r"^\p{L}+$")]],
    ids=["no schema", "a pattern of its own language"],
)
def test_a_type_whose_schema_cannot_be_checked_is_left_to_the_node(given: Any) -> None:
    assert Expected(given).schema is None


def test_python_values_count_as_what_json_writes_them_as() -> None:
    expected = Expected(timedelta)
    assert problem_of(expected.schema, timedelta(hours=1)) is None
    assert expected.taken(timedelta(hours=1), "q") == timedelta(hours=1)
    assert expected.taken("PT1H", "q") == timedelta(hours=1)
    assert problem_of({"type": "string"}, Odd()) is not None
