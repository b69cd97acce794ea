"""What becomes of the writes of concurrent branches at their join."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import BranchConflict
from framework.graph.edge import GraphSpec
from framework.graph.merge import LOCAL, BranchWrites, append_only_keys, merge
from framework.graph.node import NodeSpec


def make_graph(**fields: Any) -> GraphSpec:
    return GraphSpec.model_validate({"id": "g", "goal_id": "goal", "entry_node": "a", "nodes": [{"id": "a"}], **fields})


def branch(head: str, values: dict[str, Any], **writers: str) -> BranchWrites:
    return BranchWrites(head, values, {**dict.fromkeys(values, head), **writers})


def merged(base: dict[str, Any], *values: dict[str, Any], **fields: Any) -> dict[str, Any]:
    heads = [f"n{index}" for index in range(len(values))]
    return merge(make_graph(**fields), base, [branch(*pair) for pair in zip(heads, values, strict=True)])


def test_what_one_branch_wrote_is_taken_as_it_is() -> None:
    value = object()
    result = merged({"old": 1}, {"x": value}, {"y": 2}, {})
    assert result == {"x": value, "y": 2}
    assert result["x"] is value


def test_an_undeclared_key_of_two_branches_is_a_conflict_that_names_the_writers() -> None:
    writes = [branch("n0", {"x": 1}, x="deep"), branch("n1", {"y": 1}), branch("n2", {"x": 1})]
    with pytest.raises(BranchConflict) as caught:
        merge(make_graph(), {}, writes)
    assert (caught.value.key, caught.value.nodes) == ("x", ("deep", "n2"))
    assert "append_only_keys" in str(caught.value)
    assert "reducers" in str(caught.value)


def test_inputs_mapped_for_one_branch_are_not_merged() -> None:
    writes = [branch("n0", {"part": 1, "x": 1}, part=LOCAL), branch("n1", {"part": 2}, part=LOCAL)]
    assert merge(make_graph(), {}, writes) == {"x": 1}


def test_the_return_value_of_functions_stays_in_its_branch_unless_declared() -> None:
    writes = [branch("n0", {"result": 1}), branch("n1", {"result": 2})]
    assert merge(make_graph(), {}, writes) == {}
    assert merge(make_graph(), {}, writes[:1]) == {}
    assert merge(make_graph(reducers={"result": "sum"}), {}, writes) == {"result": 3}
    declared = make_graph(nodes=[{"id": "a", "output_keys": ["result"]}])
    assert merge(declared, {}, writes[:1]) == {"result": 1}
    with pytest.raises(BranchConflict):
        merge(declared, {}, writes)


def test_append_only_keys_are_those_of_the_graph_and_of_its_nodes() -> None:
    nodes = [NodeSpec(id="a", append_only_keys=["y"]), NodeSpec(id="b", append_only_keys=["z"])]
    assert append_only_keys(make_graph(append_only_keys=["x"], nodes=nodes)) == {"x", "y", "z"}


@pytest.mark.parametrize(
    ("base", "values", "expected"),
    [
        ({"log": [1]}, [[1, 2], [1, 3]], [1, 2, 3]),
        ({"log": [1]}, [[1], [1, 3]], [1, 3]),
        ({}, [[2], [3]], [2, 3]),
        ({"log": "a"}, ["ab", "ac"], "abc"),
        ({"log": []}, [[], []], []),
    ],
)
def test_tails_of_append_only_keys_are_joined(base: dict[str, Any], values: list[Any], expected: Any) -> None:
    assert merged(base, *({"log": value} for value in values), append_only_keys=["log"]) == {"log": expected}
    assert merged(base, *({"log": value} for value in values), reducers={"log": "append"}) == {"log": expected}


@pytest.mark.parametrize(
    ("base", "values"),
    [
        ({"log": [1]}, [[2], [1, 3]]),  # rewritten, not extended
        ({"log": [1]}, [[], [1, 3]]),  # shortened
        ({"log": [1]}, ["1", [1, 3]]),  # another type
        ({}, [5, 6]),  # not a list at all
        ({"log": (1,)}, [(1, 2), (1, 3)]),
    ],
)
def test_what_is_not_appended_is_a_conflict(base: dict[str, Any], values: list[Any]) -> None:
    with pytest.raises(BranchConflict):
        merged(base, *({"log": value} for value in values), append_only_keys=["log"])


@pytest.mark.parametrize(
    ("name", "base", "values", "expected"),
    [
        ("sum", {"k": 10}, [11, 13], 14),
        ("sum", {}, [1, 2], 3),
        ("sum", {"k": 1.5}, [2.0, 1.5], 2.0),
        ("min", {"k": 0}, [5, 3], 3),
        ("max", {"k": 9}, [5, 3], 5),
        ("merge", {"k": {"a": 1}}, [{"a": 1, "b": 2}, {"a": 9}], {"a": 9, "b": 2}),
        ("merge", {}, [{"a": 1}, {"a": 1}], {"a": 1}),
        ("merge", {}, [{}, {"b": 1}], {"b": 1}),
        ("union", {"k": {1}}, [{1, 2}, {3}], {1, 2, 3}),
        ("union", {"k": ["a"]}, [["a", "b"], ["b", "c"]], ["a", "b", "c"]),
        ("union", {}, [frozenset({1}), frozenset({2})], frozenset({1, 2})),
    ],
)
def test_reducers(name: str, base: dict[str, Any], values: list[Any], expected: Any) -> None:
    result = merged(base, *({"k": value} for value in values), reducers={"k": name})
    assert result == {"k": expected}
    assert type(result["k"]) is type(expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sum", [1, "two"]),
        ("sum", [None, 1]),
        ("max", [1, "two"]),
        ("min", [{}, {}]),
        ("merge", [{"a": 1}, {"a": 2}]),
        ("merge", [{"a": 1}, [2]]),
        ("union", [{1}, [2]]),
        ("union", [1, 2]),
    ],
)
def test_values_a_reducer_cannot_combine_are_a_conflict(name: str, values: list[Any]) -> None:
    with pytest.raises(BranchConflict) as caught:
        merged({}, *({"k": value} for value in values), reducers={"k": name})
    assert caught.value.nodes == ("n0", "n1")
    assert caught.value.key.startswith("k")


def test_the_state_around_the_branches_is_not_changed() -> None:
    base = {"log": [1], "found": {"a": 1}, "seen": [1]}
    copy = {"log": [1], "found": {"a": 1}, "seen": [1]}
    options = {"append_only_keys": ["log"], "reducers": {"found": "merge", "seen": "union"}}
    for _ in range(2):
        merged(
            base,
            {"log": [1, 2], "found": {"a": 1, "b": 1}, "seen": [2]},
            {"log": [1, 3], "found": {"a": 1, "c": 1}, "seen": [3]},
            **options,
        )
    assert base == copy


values = st.one_of(st.integers(-3, 3), st.lists(st.integers(0, 3), max_size=3), st.text("ab", max_size=2))
writes = st.lists(st.dictionaries(st.sampled_from("wxyz"), values, max_size=3), min_size=2, max_size=4)
reducers = st.dictionaries(st.sampled_from("wxyz"), st.sampled_from(["append", "sum", "min", "max", "union"]))


@given(writes, st.dictionaries(st.sampled_from("wxyz"), values), reducers, st.randoms(use_true_random=False))
def test_the_order_in_which_branches_are_given_does_not_matter(
    written: list[dict[str, Any]], base: dict[str, Any], chosen: dict[str, str], rng: Any
) -> None:
    branches = [branch(f"n{index}", each) for index, each in enumerate(written)]
    shuffled = list(branches)
    rng.shuffle(shuffled)
    outcomes: list[Any] = []
    for each in (branches, shuffled):
        try:
            outcomes.append(merge(make_graph(reducers=chosen), base, each))
        except BranchConflict as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
