"""The difference of two checkpoints, and of two values."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework import _secrets
from framework.errors import CheckpointNotFound, RunNotFound
from framework.graph.checkpoint_diff import diff_values
from framework.graph.node import NodeSpec
from framework.graph.readable import plain_json, readable, type_of
from framework.graph.run_view import diff_checkpoints, export_run, find_checkpoint, state_at
from framework.storage import codec
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import graph_of
from tests.graph.run_view_kit import RUN_ID, execute

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=12,
)


def differences(old: Any, new: Any) -> list[tuple[str, str, Any, Any]]:
    return list(diff_values(old, new, "v"))


@settings(deadline=None)
@given(VALUES)
def test_a_value_does_not_differ_from_its_copy(value: Any) -> None:
    assert differences(value, copy.deepcopy(value)) == []


@settings(deadline=None)
@given(VALUES, VALUES)
def test_values_that_differ_have_a_difference_which_names_what_is_there(old: Any, new: Any) -> None:
    found = differences(old, new)
    assert bool(found) == (json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True))
    for path, kind, before, after in found:
        assert path.startswith("v")
        assert kind in ("added", "removed", "changed", "appended")
        assert kind != "changed" or before != after or type(before) is not type(after)


@settings(deadline=None)
@given(st.lists(VALUES, max_size=5), st.lists(VALUES, min_size=1, max_size=3))
def test_what_is_put_at_the_end_is_appended(old: list[Any], tail: list[Any]) -> None:
    assert differences(old, [*old, *tail]) == [("v", "appended", None, tail)]


@settings(deadline=None)
@given(st.lists(st.integers(), max_size=5), st.lists(st.integers(), max_size=5), st.integers())
def test_one_entry_taken_out_is_one_removal(start: list[int], end: list[int], item: int) -> None:
    found = differences([*start, item, *end], [*start, *end])
    assert [(kind, before) for _, kind, before, _ in found] == [("removed", item)]


def test_differences_name_the_path() -> None:
    old = {"report": {"sections": [{"title": "a"}, {"title": "b"}], "x y": 1}, "n": 1}
    new = {"report": {"sections": [{"title": "a"}, {"title": "c"}], "x y": 2}, "n": True}
    assert [path for path, *_ in diff_values(old, new)] == ["report.sections[1].title", "report['x y']", "n"]


class Reading:
    """A type that the reader's program does not have."""


def test_stored_values_are_readable_without_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    codec.register(Reading, name="tests.Reading", to_plain=lambda _: {"celsius": 21}, from_plain=lambda _: Reading())
    value = {
        "when": dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.UTC),
        "price": Decimal("1.50"),
        "pair": (1, {"a"}),
        "by number": {1: "one"},
        "raw": b"xyz",
        "far": float("inf"),
        "reading": Reading(),
    }
    data = codec.encode(value)
    monkeypatch.delitem(codec._by_name, "tests.Reading")
    shown = readable(plain_json(data))
    assert shown == {
        "when": "2026-01-02T03:04:00Z",
        "price": "1.50",
        "pair": [1, ["a"]],
        "by number": {"1": "one"},
        "raw": "base64:eHl6",
        "far": "Infinity",
        "reading": {"$type": "tests.Reading", "celsius": 21},
    }
    json.dumps(shown, allow_nan=False)
    assert type_of(plain_json(codec.encode((1, 2)))) == "tuple of 2"


@pytest.fixture
def storage() -> MemoryStorage:
    """Three steps that add, append to and change keys of the state."""
    graph = graph_of(
        *(NodeSpec(id=name, node_type="function", output_keys=["log", "report", name], max_retries=1) for name in "abc")
    )
    outputs = {
        "a": {"log": ["a"], "report": {"title": "draft", "pages": [1]}, "a": 1},
        "b": {"log": ["a", "b"], "report": {"title": "draft", "pages": [1, 2]}},
        "c": {"log": ["a", "b", "c"], "report": {"title": "final", "pages": [1, 2]}, "c": 3},
    }
    stored = MemoryStorage()
    functions = {name: lambda name=name, **_: outputs[name] for name in "abc"}
    asyncio.run(execute(stored, graph, functions, {"given": "x"}))
    return stored


def state_lines(storage: MemoryStorage, a: int | str, b: int | str | None) -> list[str]:
    return [each.line() for each in diff_checkpoints(storage, RUN_ID, a, b) if each.where == "state"]


def test_the_difference_of_two_checkpoints_is_by_key_and_deep(storage: MemoryStorage) -> None:
    assert 'log: appended ["c"]' in state_lines(storage, 2, 3)
    assert "report.title: draft -> final" in state_lines(storage, 2, 3)
    assert "report.pages: appended [2]" in state_lines(storage, 1, 2)
    assert not any(line.startswith("given") for line in state_lines(storage, 0, "latest"))


def test_the_position_is_part_of_the_difference(storage: MemoryStorage) -> None:
    changes = {each.path: each for each in diff_checkpoints(storage, RUN_ID, 1, None) if each.where == "position"}
    assert (changes["after"].old, changes["after"].new) == ("a", "c")
    assert (changes["status"].old, changes["status"].new) == ("in_progress", "completed")
    assert (changes["steps_taken"].old, changes["steps_taken"].new) == (1, 3)


def test_back_again_is_the_other_way_round(storage: MemoryStorage) -> None:
    assert "c: removed 3" in state_lines(storage, 3, 2)
    assert state_lines(storage, 2, 2) == []


def test_checkpoints_are_found_by_sequence_id_and_as_the_latest(storage: MemoryStorage) -> None:
    newest = find_checkpoint(storage, RUN_ID)
    assert newest is not None
    assert newest == find_checkpoint(storage, RUN_ID, "latest") == find_checkpoint(storage, RUN_ID, 3)
    assert newest == find_checkpoint(storage, RUN_ID, newest.checkpoint_id) == find_checkpoint(storage, RUN_ID, "3")
    assert find_checkpoint(storage, RUN_ID, 9) is None
    with pytest.raises(CheckpointNotFound, match="1 to 3"):
        diff_checkpoints(storage, RUN_ID, 1, 9)
    with pytest.raises(RunNotFound):
        find_checkpoint(storage, "nobody")


# --- exports --------------------------------------------------------------------------------------------------------


def test_an_export_is_json_and_holds_everything(storage: MemoryStorage) -> None:
    exported = export_run(storage, RUN_ID)
    assert json.loads(json.dumps(exported)) == exported
    assert (exported["format"], exported["run"]["state"]) == ("surefoot-run", "completed")
    assert exported["input"] == {"given": "x"}
    assert exported["state"]["report"] == {"title": "final", "pages": [1, 2]}
    assert [row["sequence"] for row in exported["log"]] == [1, 2, 3]
    assert exported["log"][0]["records"][0]["node"] == "a"
    assert set(exported["definition"]["nodes"]) == {"a", "b", "c"}
    assert [each["sequence"] for each in exported["checkpoints"]] == [1, 2, 3]
    assert exported["damage"] == []


def test_an_export_without_values_tells_types_and_sizes_only(storage: MemoryStorage) -> None:
    text = json.dumps(export_run(storage, RUN_ID, values=False))
    assert "final" not in text
    assert '"x"' not in text
    assert json.loads(text)["state"]["report"] == {"type": "dict with 2 keys", "bytes": 31}


def test_secrets_of_the_environment_are_masked_in_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    storage = MemoryStorage()
    graph = graph_of(NodeSpec(id="a", node_type="function", output_keys=["x"], max_retries=1))

    def leak(**_: Any) -> Any:
        raise ConnectionError("refused for very-secret-value")

    try:
        asyncio.run(execute(storage, graph, {"a": leak}, {"note": {"inner": ["very-secret-value"]}}))
        text = json.dumps(export_run(storage, RUN_ID))
    finally:
        _secrets.forget_secrets()
    assert "very-secret-value" not in text
    assert text.count("***") >= 2


def test_a_key_that_refers_to_another_changes_with_it_and_not_by_becoming_a_reference() -> None:
    storage = MemoryStorage()
    graph = graph_of(
        *(NodeSpec(id=name, node_type="function", output_keys=["one", "two"], max_retries=1) for name in "abc")
    )
    shared = ["x"]
    outputs: dict[str, dict[str, Any]] = {
        "a": {"one": ["x"], "two": ["x"]},
        "b": {"one": shared, "two": shared},
        "c": {"one": shared, "two": shared},
    }

    def work(name: str) -> dict[str, Any]:
        if name == "c":
            shared.append("y")
        return outputs[name]

    functions = {name: lambda name=name, **_: work(name) for name in "abc"}
    asyncio.run(execute(storage, graph, functions))
    assert any(b'"ref"' in data for data in state_at(storage, RUN_ID, 2).values())
    assert not [line for line in state_lines(storage, 1, 2) if line.startswith(("one", "two"))]
    assert {'one: appended ["y"]', 'two: appended ["y"]'} <= set(state_lines(storage, 2, 3))
