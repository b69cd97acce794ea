"""A value that is not encoded again would have given the same bytes, whatever was done to it and by whom."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.graph import state_tracker
from framework.graph.memory import SharedMemory
from framework.graph.shadows import shadow_of
from framework.graph.state_tracker import StateTracker
from framework.storage import checkpoints as stored
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.chunks import Chunk

leaves = st.sampled_from([None, True, False, 0, 1, 0.0, 1.0, -0.0, "", "a", "1", float("nan"), 2**70])
odd = st.tuples(leaves) | st.binary(max_size=2)
values = st.recursive(
    leaves | odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)
STEPS = ["write", "same", "copy", "append", "insert", "set", "pop", "swap", "deep", "commit", "stage", "restart"]
steps = st.tuples(st.sampled_from(STEPS), st.integers(0, 9), values)


@contextmanager
def shadows_of_all() -> Iterator[None]:
    with patch.object(state_tracker, "_WORTH_A_SHADOW", 0):
        yield


def containers(value: Any) -> list[Any]:
    """The lists and dicts in a value, itself first."""
    if not isinstance(value, list | dict):
        return []
    inner = value if isinstance(value, list) else list(value.values())
    return [value, *(each for item in inner for each in containers(item))]


def change(target: Any, what: str, at: int, value: Any) -> None:
    """Change a list or dict in place, by a reference that the memory knows nothing of."""
    if isinstance(target, list):
        if what == "append":
            target.append(value)
        elif what == "insert":
            target.insert(at % (len(target) + 1), value)
        elif target and what == "set":
            target[at % len(target)] = value
        elif target and what == "pop":
            target.pop(at % len(target))
        elif target and what == "swap":
            target.reverse()
    elif what in ("append", "insert"):
        target["ab"[at % 2]] = value
    elif target and what in ("set", "pop", "swap"):
        key = list(target)[at % len(target)]
        old = target.pop(key)
        if what != "pop":
            target[key] = value if what == "set" else old


@given(st.lists(steps, max_size=30))
def test_what_is_stored_is_what_always_encoding_stores(history: list[tuple[str, int, Any]]) -> None:
    tracker, memory, log = StateTracker(), SharedMemory(), list[Chunk]()
    memory.write("x", [])

    def commit() -> None:
        staged = tracker.stage({"": memory})
        tracker.accept(staged)
        log.extend(staged.chunks)
        state = stored.fold(log)
        assert staged.digest == stored.format_digest(state.chains.values())
        assert state.values == {key: codec.encode(value) for key, value in memory.own.items()}

    with shadows_of_all():
        for what, at, value in history:
            held = memory.own["x"]
            if what == "write":
                memory.write("x", value)
            elif what == "same":
                memory.write("x", held)
            elif what == "copy":
                memory.write("x", copy.copy(held) if at % 2 else copy.deepcopy(held))
            elif what == "commit":
                commit()
            elif what == "stage":
                tracker.stage({"": memory})  # not accepted: as if nothing had been asked
            elif what == "restart":
                commit()
                state = stored.fold(log)
                loaded = {key: codec.decode(data) for key, data in state.values.items()}
                tracker.load(state, loaded)
                memory = SharedMemory()
                for key, each in loaded.items():
                    memory.restored(key, each)
                memory.read("x")  # from here on anybody may hold it
            else:
                inside = containers(held)
                if inside:
                    change(inside[at % len(inside)] if what == "deep" else inside[0], "set", at, value)
                    if what != "deep":
                        change(inside[at % len(inside)], what, at, value)
        commit()
        again = tracker.stage({"": memory})
        assert again.chunks == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1], [True]),
        ([1], [1.0]),
        ([0.0], [-0.0]),
        ([{"a": 1}], [{"a": True}]),
        ([[1]], [[1], [1]]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ([1], {"a": 1}),
    ],
    ids=str,
)
def test_what_is_equal_and_stored_otherwise_is_not_the_same(old: Any, new: Any) -> None:
    shadow = shadow_of(old)
    assert shadow is not None
    assert shadow.is_same(old)
    assert not shadow.is_same(new)


def test_what_may_change_unseen_has_no_shadow() -> None:
    deep: Any = []
    for _ in range(20):
        deep = [deep]
    for value in ((1,), {1: 2}, [{1}], [(1,)], [bytearray(b"")], {"a": object()}, deep, "text", [[object()]]):
        assert shadow_of(value) is None


@pytest.fixture
def encoded_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was encoded."""
    sizes = []
    encode = codec.encode

    def noted(value: Any, path: str = "value") -> bytes:
        data = encode(value, path)
        sizes.append(len(data))
        return data

    monkeypatch.setattr("framework.storage.codec.encode", noted)
    return sizes


@pytest.mark.parametrize("kind", ["texts", "dicts"])
def test_a_list_that_everybody_holds_costs_what_is_new(kind: str, encoded_bytes: list[int]) -> None:
    """Written once or read and grown at each step, nothing of its old part is encoded again."""

    def message(number: int) -> Any:
        text = f"{number:<1000}"
        return text if kind == "texts" else {"role": "user", "content": text, "parts": [number]}

    tracker, memory, log = StateTracker(), SharedMemory(), list[Chunk]()
    memory.write("messages", [message(number) for number in range(300)])
    memory.write("unchanged", [message(number) for number in range(300)])
    for number in range(50):
        staged = tracker.stage({"": memory})
        tracker.accept(staged)
        log += staged.chunks
        if number == 0:
            encoded_bytes.clear()
        memory.read("unchanged")
        memory.read("messages").append(message(300 + number))
    assert len(encoded_bytes) == 49
    assert max(encoded_bytes) < 1_200
    expected = codec.encode(memory.own["messages"][:-1])
    assert chunklib.apply(log, {})["messages"] == expected
    # And what is changed in the middle, by whoever holds it, is seen.
    memory.own["unchanged"][7] = message(0)
    staged = tracker.stage({"": memory})
    assert [(chunk.key, chunk.op) for chunk in staged.chunks] == [("messages", "append"), ("unchanged", "set")]
