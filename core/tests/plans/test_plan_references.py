"""References in a plan: what is one, where it leads, and that what it gives is nobody else's."""

from __future__ import annotations

from typing import Any

import pytest

from framework.graph.references import MissingReference, resolve

CONTEXT: dict[str, Any] = {"city": "Rome", "rows": [{"n": 1}], "fetch": {"n": "context"}, "odd name": 5}
OUTPUTS: dict[str, Any] = {"fetch": {"n": "output", "items": [{"title": "a"}, {"title": "b"}]}, "step-2": {"x": None}}


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("$city", "Rome"),
        ("$odd name", 5),
        ("$fetch", {"n": "context"}),
        ("$fetch.n", "output"),
        ("$fetch.items.1.title", "b"),
        ("$step-2.x", None),
        ("$rows.0.n", 1),
        ("$$city", "$city"),
        ("$5.00 a month", "$5.00 a month"),
        ("$", "$"),
        ("city", "city"),
        ({"deep": ["$city", ("$rows.0.n",)]}, {"deep": ["Rome", (1,)]}),
        (7, 7),
    ],
)
def test_where_a_reference_leads(reference: Any, value: Any) -> None:
    assert resolve(reference, CONTEXT, OUTPUTS) == value


@pytest.mark.parametrize("reference", ["$nothing", "$fetch.items.9.title", "$city.name", "$rows.x", ["$nope"]])
def test_a_reference_to_nothing(reference: Any) -> None:
    with pytest.raises(MissingReference, match="Known names: .*city"):
        resolve(reference, CONTEXT, OUTPUTS)


def test_what_a_reference_gives_is_a_copy() -> None:
    rows = resolve("$rows", CONTEXT)
    rows[0]["n"] = 99
    assert CONTEXT["rows"] == [{"n": 1}]


def test_what_has_no_copy_is_given_itself() -> None:
    def generate() -> Any:
        yield 1

    client = generate()
    assert resolve("$client", {"client": client}) is client
