"""References in a plan: what is one, where it leads, and that what it gives is nobody else's."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.graph.plan import Plan
from framework.graph.plan_planner import problems_of
from framework.graph.references import MissingReference, call_arguments, resolve

CONTEXT: dict[str, Any] = {
    "city": "Rome",
    "rows": [{"n": 1}],
    "fetch": {"n": "context"},
    "odd name": 5,
    "total.sum": 9,
    "price": "$city",
}
OUTPUTS: dict[str, Any] = {
    "fetch": {"n": "output", "items": [{"title": "a"}, {"title": "b"}], "any key": 1, 'a "b"': 2, "by": {0: "zero"}},
    "step-2": {"x": None},
    "1_fetch": {"x": 3},
    "2": {"x": 4, "00": "no money"},
    "step 1": {"x": 5, "long name": 6},
    "étape": {"x": 7},
    "a.b": {"x": 8},
    "a": {"b": {"x": "of a", "y": 9}},
    "br}ace": {"x": 10},
}


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("$city", "Rome"),
        ("$odd name", 5),
        ("$total.sum", 9),
        ("$fetch", {"n": "context"}),
        ("$fetch.n", "output"),
        ("$fetch.items.1.title", "b"),
        ("$fetch.items[1].title", "b"),
        ("$fetch.items[-1][ 'title' ]", "b"),
        ('$fetch["items"][0]["title"]', "a"),
        ("$fetch[“any key”]", 1),
        ("$fetch['any key']", 1),
        ('$fetch["a \\"b\\""]', 2),
        ("$fetch.by[0]", "zero"),
        ("$step-2.x", None),
        ("$rows.0.n", 1),
        ("$rows[0].n", 1),
        ("$1_fetch.x", 3),
        ("$2.x", 4),
        ("$2", {"x": 4, "00": "no money"}),
        ("$2.00", "no money"),
        ("$step 1.x", 5),
        ("$step 1['long name']", 6),
        ("$étape.x", 7),
        ("$a.b.x", 8),
        ("$a['b'].y", 9),
        ("${city}", "Rome"),
        ("${fetch.n}", "output"),
        ("${fetch}.items[0].title", "a"),
        ("${a.b}.x", 8),
        ("${a.b.x}", 8),
        ("${a}.b.x", "of a"),
        ('${fetch["any key"]}', 1),
        ("${br}ace.x}", 10),
        ("$br}ace.x", 10),
        ({"deep": ["$city", ("$rows.0.n",)]}, {"deep": ["Rome", (1,)]}),
    ],
)
def test_where_a_reference_leads(reference: Any, value: Any) -> None:
    assert resolve(reference, CONTEXT, OUTPUTS) == value


@pytest.mark.parametrize(
    ("text", "itself"),
    [
        ("$$city", "$city"),
        ("$$$city", "$$city"),
        ("$$", "$"),
        *((text, text) for text in ("$5", "$5.00", "$5.00 a month", "$5,000.50", "$10-20", "$5/month", "$2.50 each")),
        *((text, text) for text in ("$", "$ 5", "$ city", "$(date)", "$-x", "$.x", "$?", "$€", "city", "a $city", "")),
        *((text, text) for text in ("$100k budget", "$next step.x", "$step 2.x", "$HOME is not set", "$citywide sale")),
        *((text, text) for text in ("$x\ty", "$city-wide sale", "$nope[0] and more", "$_x y", "$odd names")),
        *((value, value) for value in (7, None, b"$city", {"$city": 1})),
    ],
)
def test_what_is_no_reference(text: Any, itself: Any) -> None:
    assert resolve(text, CONTEXT, OUTPUTS) == itself


@pytest.mark.parametrize(
    "reference",
    [
        *("$nothing", "$fetch.items.9.title", "$city.name", "$rows.x", ["$nope"], "$rows[1]", "$rows[-2]", "$rows[x]"),
        *("$9_nope.x", "$9.title", "$9[0]", "$5k", "$next.step.x", "$été", "${nope}", "${}", "${", "${city", "$_x"),
        *("$city is nice", "${city} is nice", "$fetch.any key", "$2.99", "$a.b.y", "$rows." + "9" * 5000),
        *("$nothing ", '$nope["any key"]', "${nope} is nice", "${next step.x}", "$odd name is nice", "$city's own"),
        *("$step 1.y z", "$fetch, please"),
    ],
)
def test_a_reference_to_nothing(reference: Any) -> None:
    with pytest.raises(MissingReference, match="Known names: .*city"):
        resolve(reference, CONTEXT, OUTPUTS)


def test_the_message_says_which_reference_where_and_what_there_is() -> None:
    with pytest.raises(MissingReference) as caught:
        resolve("$fetch.title", {}, {"fetch": {"n": 1, "items": []}, 3: {}})  # type: ignore[dict-item]
    assert caught.value.reference == "$fetch.title"
    assert caught.value.at_step("s") == (
        "Step 's': Nothing is known under the reference '$fetch.title': 'fetch' has items, n. "
        "Known names: 3, fetch. For the text itself write '$$fetch.title'."
    )
    with pytest.raises(MissingReference) as long:
        resolve("$x" * 10_000, {f"{i:03}": i for i in range(500)})
    assert len(str(long.value)) < 600
    assert "and 480 more" in str(long.value)


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.sampled_from(["result", "any key", '"}]']))
def test_every_id_that_a_plan_accepts_can_be_referred_to(ids: list[str], key: str) -> None:
    steps = [{"id": each, "action": {"action_type": "function"}} for each in ids]
    if problems_of(Plan.from_json({"steps": steps})):
        return
    outputs = {each: {key: number} for number, each in enumerate(ids)}
    quoted = key.replace('"', '\\"')
    for number, each in enumerate(ids):
        assert resolve(f"${{{each}}}", {}, outputs) == {key: number}
        if key != '"}]':
            assert resolve(f'${{{each}}}["{quoted}"]', {}, outputs) == number
        if not each.startswith(("$", "{")):
            assert resolve(f"${each}", {}, outputs) == {key: number}
        alone = {each: outputs[each]}
        assert resolve(f'${{{each}}}["{quoted}"]', {}, alone) == number


@given(st.text(), st.text())
def test_text_that_cannot_be_a_reference_is_itself(sign: str, text: str) -> None:
    known = {"city": "Rome"}
    if not text.startswith("$"):
        assert resolve(text, known) == text
    assert resolve(f"$${text}", known) == f"${text}"
    if sign and not (sign[0].isalnum() or sign[0] in "$_{" or sign[0].isdigit()):
        assert resolve(f"${sign}", known) == f"${sign}"


@given(st.decimals(0, 10**9, allow_nan=False, places=2), st.sampled_from(["", " a month", "/kg", ", please", "."]))
def test_money_is_itself(amount: Any, after: str) -> None:
    for text in (f"${amount}{after}", f"${amount:,}{after}", f"${int(amount)}{after}"):
        assert resolve(text, CONTEXT | {"7x": 1}, {"x": {}}) == text


@given(st.text())
def test_a_text_is_itself_found_or_refused_whatever_it_is(text: str) -> None:
    try:
        resolve(f"${text}", CONTEXT, OUTPUTS)
    except MissingReference as error:
        assert error.reference == f"${text}"


@pytest.mark.parametrize("text", ["a." * 20_000, "{" + "}.a" * 5_000, "[" * 20_000, 'a["' * 10_000, "." * 20_000])
def test_a_long_text_is_read_in_no_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(MissingReference):
        resolve(f"$x{text}", {"x": 1, "xa": 1})
    assert time.process_time() - started < 5


def test_what_a_reference_gives_is_a_copy() -> None:
    rows = resolve("$rows", CONTEXT)
    rows[0]["n"] = 99
    assert CONTEXT["rows"] == [{"n": 1}]


def test_what_has_no_copy_is_given_itself() -> None:
    def generate() -> Any:
        yield 1

    client = generate()
    assert resolve("$client", {"client": client}) is client


def test_arguments_refer_to_each_other_and_to_the_context() -> None:
    declared = {"q": "$word", "deep": ["$limit", "$city"], "limit": 5, "city": "$city", "note": "$$5", "word": "old"}
    assert call_arguments(declared, {"word": "new"}, CONTEXT, OUTPUTS) == {
        "q": "new",
        "deep": [5, "Rome"],
        "limit": 5,
        "city": "Rome",
        "note": "$5",
        "word": "new",
    }


def test_what_a_reference_gives_is_not_read_again() -> None:
    assert call_arguments({"cost": "$price"}, {"x": "$city"}, CONTEXT, OUTPUTS) == {"cost": "$city", "x": "$city"}
    with pytest.raises(MissingReference, match="'\\$list'"):  # not the text "$city" in a list
        call_arguments({"list": ["$city"], "copy": "$list"}, {}, CONTEXT, OUTPUTS)
