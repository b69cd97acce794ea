"""The safe evaluator: its language, its refusals, its limits, and that nothing but ExpressionError leaves it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict, defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from framework.errors import ExpressionError, SurefootError
from framework.graph import expression_values
from framework.graph.expressions import MAX_TEXT_CHARS, compile_expression, evaluate


class Report(BaseModel):
    score: int = 7

    @property
    def secret(self) -> str:
        return "property"


@dataclasses.dataclass
class Point:
    x: int = 3
    _hidden: int = 4

    def method(self) -> int:
        return self.x


class Colour(str, Enum):
    RED = "red"


NAMES: dict[str, Any] = {
    "score": 85,
    "output": {"confidence": 0.9, "items": [1, 2, 3], "name": "Ada", "deep": {"er": {"x": 1}}, "get": "key named get"},
    "memory": {"plan": None, "len": 5},
    "text": "Hello World",
    "report": Report(),
    "point": Point(),
    "colour": Colour.RED,
    "tags": {"a", "b"},
    "price": Decimal("9.90"),
    "day": datetime(2026, 1, 2, tzinfo=UTC),
    "later": datetime(2026, 1, 3, tzinfo=UTC),
    "max": 3,
    "nothing": None,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("score > 80", True),
        ("  score > 80  ", True),
        ("0 < score <= 85 != 3", True),
        ("1 < 3 < 2", False),
        ("score > 80 and text or nothing", "Hello World"),
        ("score < 80 and boom", False),
        ("score > 80 or boom", True),
        ("not score", False),
        ("-score + 2 * 3 - 7 // 2 + 7 % 4 + 2 ** 3", -71),
        ("1 / 4", 0.25),
        ("~5 & 3 | 8 ^ 1 << 2 >> 1", (~5 & 3) | (8 ^ ((1 << 2) >> 1))),
        ("2 in output.items", True),
        ("'confidence' in output", True),
        ("'lo W' in text", True),
        ("'zz' not in text", True),
        ("'a' in tags", True),
        ("nothing is None and score is not null", True),
        ("true and not false", True),
        ("none is None", True),
        ("True is true", True),
        ("output.confidence > 0.8", True),
        ("output.deep.er.x", 1),
        ("output['deep']['er'].x", 1),
        ("output.get", "key named get"),
        ("output.get('missing', 4)", 4),
        ("output.get('name')", "Ada"),
        ("memory.plan is None", True),
        ("memory.len", 5),
        ("report.score + point.x", 10),
        ("colour == 'red'", True),
        ("output.items[0] + output.items[-1]", 4),
        ("output.items[1:]", [2, 3]),
        ("text[::-1]", "dlroW olleH"),
        ("text[:5]", "Hello"),
        ("'yes' if score > 80 else 'no'", "yes"),
        ("[1, 'a', (2, 3), {'k': 1}, {4}]", [1, "a", (2, 3), {"k": 1}, {4}]),
        ("[1] + [2]", [1, 2]),
        ("'ab' * 2", "abab"),
        ("2 * [0]", [0, 0]),
        ("len(output) + len(text)", 16),
        ("max(1, 5) + max", 8),
        ("min([3, 1, 2])", 1),
        ("max([], default=0)", 0),
        ("abs(-3) + int('7') + int(2.9)", 12),
        ("float('1.5')", 1.5),
        ("str(12) + str([1, None])", "12[1, None]"),
        ("bool([])", False),
        ("any([0, 1]) and all([1, 1])", True),
        ("round(2.567, 1)", 2.6),
        ("round(2.567, ndigits=1)", 2.6),
        ("round(2.5)", 2),
        ("sum([1, 2.5])", 3.5),
        ("sum([1], start=2)", 3),
        ("sorted({'b', 'a'})", ["a", "b"]),
        ("sorted([1, 3, 2], reverse=True)", [3, 2, 1]),
        ("text.lower()", "hello world"),
        ("text.upper().startswith('HELLO')", True),
        ("' x '.strip().endswith('x')", True),
        ("'a,b'.split(',')", ["a", "b"]),
        ("price * 2 > 19", True),
        ("later - day", timedelta(days=1)),
        ("day < later", True),
        ("tags | {'c'} == {'a', 'b', 'c'}", True),
        ("(score\n > 80)", True),
    ],
)
def test_language(text: str, value: Any) -> None:
    assert evaluate(text, NAMES) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "().__class__.__bases__[0].__subclasses__()",
        "output.__class__",
        "text.__class__.__mro__",
        "_private",
        "point._hidden",
        "point.method",
        "point.method()",
        "report.secret",
        "report.model_dump()",
        "report.model_fields",
        "text.format(output)",
        "'{0.__class__}'.format(text)",
        "'%s' % text",
        "b'%s' % text",
        "text.lower",
        "text.join([])",
        "output.update({})",
        "output.pop('name')",
        "output.keys()",
        "tags.add('x')",
        "output.items.append(1)",
        "open('/etc/passwd')",
        "eval('1')",
        "exec('1')",
        "getattr(text, 'x')",
        "type(text)",
        "print(1)",
        "vars()",
        "globals()",
        "(lambda: 1)()",
        "lambda: 1",
        "[x for x in output]",
        "{x for x in output}",
        "{x: 1 for x in output}",
        "any(x for x in output)",
        "f'{text}'",
        "f'{text.__class__}'",
        "(y := 5)",
        "[*output]",
        "{**output}",
        "len(*output)",
        "max(**output)",
        "sorted([1], key=len)",
        "min([1], key=abs)",
        "len()()",
        "output['name']()",
        "(len)(text)(1)",
        "[len][0](text)",
        "len",
        "score is 85",
        "await text",
        "yield",
        "import os",
        "score = 1",
        "score; score",
        "...",
        "1j",
        "text @ text",
        "tags.a",
        "score.real",
        "score[0]",
        "output[1:2]",
        "output.items['a']",
        "output.items[1:2, 3]",
        "nothing.x",
        "boom",
        "output.missing",
        "output['missing']",
        "output.items[99]",
        "'a' + 1",
        "text < 3",
        "1 / 0",
        "{[]: 1}",
        "[] in tags",
        "3 in score",
        "len(3)",
        "sum(['a'])",
        "sum([[1]], start=[])",
        "int([])",
        "int('x')",
        "int('1', 2)",
        "abs('x')",
        "-text",
        "str(point)",
        "str(tags)",
        "str(open)",
        "str()",
        "output.get()",
        "report.get('x')",
        "''.upper(1)",
        "text * text",
        "1.5 << 2",
        "1 << -1",
        "",
        "   ",
        "score >",
        "score && text",
        "(",
        "\x00",
        "\ud800",
        "must be polite",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text, {**NAMES})


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9",
        "2 ** 5000",
        "2.0 ** 5000",
        "(-8) ** 0.5",
        "(10 ** 1000) * (10 ** 1000)",
        "1 << 1000000000",
        "'a' * 1000000000",
        "1000000000 * 'a'",
        "[0] * 1000000000",
        "[[[0] * 1000] * 1000] * 1000",
        "str([[[0] * 900] * 900] * 900)",
        "[[[0] * 900] * 900] * 900 == [[[0] * 900] * 900] * 900",
        "round(5, -1000000000)",
        "int('9' * 5000)",
        "float('9' * 5000)",
        "int(huge_decimal)",
        "round(huge_decimal)",
        "str(huge_int)",
        "huge_int + 1",
        "-huge_int",
        "huge_text + huge_text",
        "str([" + "huge_text, " * 300 + "])",
        "[" + "'b' in huge_text, " * 200 + "]",
        "[" + "huge_text.split('a'), " * 100 + "]",
        "[" + "huge_list[1:], " * 100 + "]",
        "[" + "sorted(huge_list), " * 100 + "]",
        "huge_text in huge_list",
        "-" * 4000 + "1",
        "not " * 1000 + "1",
        "(" * 4000,
        "[" * 190 + "]" * 190,
        "1" + "+1" * 1000,
        "output" + ".a" * 1000,
        "output" + "[0]" * 1000,
        "1 if 1 else " * 300 + "1",
        "9" * (MAX_TEXT_CHARS + 1),
    ],
)
def test_resource_bombs_are_refused(text: str) -> None:
    names = {
        "output": {},
        "huge_decimal": Decimal("1e900000"),
        "huge_int": 1 << 100_000,
        "huge_text": "a" * 2_000_000,
        "huge_list": list(range(100_000)),
    }
    with pytest.raises(ExpressionError):
        evaluate(text, names)


@pytest.mark.parametrize("text", ["str(tangle)", "tangle == other", "{knot}", "tangle in [other]", "str(cycle)"])
def test_values_that_share_or_contain_themselves_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty levels of pairs take no memory, and 2**60 steps to look at."""
    monkeypatch.setattr(expression_values, "MAX_WORK", 10_000)
    tangle: list[Any] = [0]
    other: list[Any] = [0]
    knot: tuple[Any, ...] = (0,)
    for _ in range(60):
        tangle, other, knot = [tangle, tangle], [other, other], (knot, knot)
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ExpressionError, match="too much work"):
        evaluate(text, {"tangle": tangle, "other": other, "knot": knot, "cycle": cycle})


def test_a_large_state_does_not_make_a_plain_condition_refused() -> None:
    names = {"messages": list(range(500_000)), "body": "a" * 5_000_000}
    assert evaluate("len(messages) > 5 and messages[-1] == 499999 and 'b' not in body", names) is True
    assert evaluate("messages != [] and max(messages) > 3 and 499999 in messages", names) is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score > boom", r"no value named 'boom' \(column 9\)"),
        ("'é' + boom", r"column 7"),  # characters, not bytes
        ("  score + boom", r"column 11"),
        ("(score >\n boom)", r"line 2, column 2"),
        ("score.__class__", r"'__class__', as it starts with '_', \(column 1\)"),
        ("open('x')", r"calling 'open'; allowed are .*len.*\(column 1\)"),
        ("score && score", r"Write 'and' for '&&'"),
        ("score >", r"Not an expression"),
        ("output.missing", r"no key 'missing' \(column 1\)"),
        ("score > 'a'", r"TypeError.*\(column 9\)"),
        ("score is 85", r"use '=='"),
    ],
)
def test_errors_say_what_and_where(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as caught:
        evaluate(text, NAMES)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SurefootError)


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(ExpressionError, match="must be text"):
        compile_expression(3)  # type: ignore[arg-type]


def test_compiled_once_and_shared() -> None:
    expression = compile_expression("a.b > limit and true")
    assert compile_expression("a.b > limit and true") is expression
    assert expression.names == {"a", "limit"}
    assert expression.evaluate({"a": {"b": 2}, "limit": 1}) is True
    assert expression.evaluate({"a": {"b": 0}, "limit": 1}) is False
    assert "a.b > limit" in repr(expression)


def test_names_of_the_caller_win_over_the_constants() -> None:
    assert evaluate("true", {"true": "mine"}) == "mine"


def test_reading_changes_nothing() -> None:
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for text in ("counts.missing", "counts['missing']"):
        with pytest.raises(ExpressionError):
            evaluate(text, {"counts": counts})
    assert counts == {}


def test_methods_are_for_exactly_str_and_dict() -> None:
    class Loud(str):
        def lower(self) -> str:
            raise AssertionError("called")

    with pytest.raises(ExpressionError, match="for text"):
        evaluate("loud.lower()", {"loud": Loud("X")})
    with pytest.raises(ExpressionError, match="for dicts"):
        evaluate("ordered.get('x')", {"ordered": OrderedDict()})


def test_errors_of_a_value_are_translated() -> None:
    class Rude:
        def __eq__(self, other: object) -> bool:
            raise OSError("no")

        def __bool__(self) -> bool:
            raise OSError("not either")

        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(ExpressionError, match="OSError: no"):
        evaluate("rude == 1", {"rude": Rude()})
    with pytest.raises(ExpressionError, match="not either"):
        compile_expression("rude").test({"rude": Rude()})
    with pytest.raises(ExpressionError, match="has no fields"):
        evaluate("kind.score", {"kind": Report})


WORDS = [
    *("score", "output", "memory", "text", "nothing", "tags", "report", ".", "[", "]", "(", ")", "{", "}", ":", ","),
    *("+", "-", "*", "/", "//", "%", "**", "<<", ">>", "&", "|", "^", "~", "@", "==", "!=", "<", "<=", ">", ">="),
    *("and", "or", "not", "in", "is", "None", "True", "if", "else", "for", "lambda", ":=", "=", "0", "1", "2.5", "9e9"),
    *("'a'", '"b"', "b'c'", "f'{x}'", "len", "max", "sum", "str", "sorted", "int", "round", "lower", "get", "split"),
    *("__class__", "confidence", "items", "99999999", " ", "\n"),
]


def outcome(text: str) -> None:
    """Evaluate; any exception but ExpressionError fails the test."""
    with contextlib.suppress(ExpressionError):
        compile_expression(text).test(NAMES)


@given(st.text(max_size=200))
@example("'\\d'")
@example("0_0")
@example("1if 1else 2")
@settings(deadline=None)
def test_random_text_raises_nothing_else(text: str) -> None:
    outcome(text)


@given(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_random_words_raise_nothing_else(text: str) -> None:
    outcome(text)


numbers = st.integers(-5, 5).map(lambda n: f"({n})")
formulas = st.recursive(
    numbers,
    lambda inner: st.builds(
        "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "<", "==", "and", "or", "%", "//", "in"]), inner
    ),
    max_leaves=12,
)


@given(formulas)
@settings(deadline=None)
def test_agrees_with_python(text: str) -> None:
    """What the evaluator accepts means what it means in Python."""
    try:
        expected: Any = eval(text, {"__builtins__": {}})
    except (TypeError, ZeroDivisionError):
        with pytest.raises(ExpressionError):
            evaluate(text, {})
        return
    actual = evaluate(text, {})
    assert actual == expected
    assert type(actual) is type(expected)
