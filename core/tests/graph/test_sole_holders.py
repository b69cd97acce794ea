"""A container that nobody holds any more is not looked at again; one that anybody may hold always is."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.graph import sole_holders, state_tracker
from framework.graph.memory import SharedMemory
from framework.graph.sole_holders import Held, held_by_these_only
from framework.graph.state_tracker import StateTracker
from framework.storage import checkpoints as stored
from framework.storage import codec
from framework.storage.chunks import Chunk

values = st.recursive(
    st.sampled_from([None, True, 1, 2.5, "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
).filter(lambda value: isinstance(value, list | dict))
steps = st.tuples(
    st.sampled_from(
        ["write", "write and keep", "keep", "keep inner", "drop", "change kept", "change", "commit", "commit"]
    ),
    st.sampled_from("xy"),
    st.integers(0, 9),
    values,
)


def inner_ones(value: Any) -> list[Any]:
    """The lists and dicts in a value, itself first."""
    found = [value]
    for each in found:
        items = each.values() if isinstance(each, dict) else each
        found.extend(item for item in items if isinstance(item, list | dict))
    return found


def change(target: Any, number: int) -> None:
    if isinstance(target, list):
        target.append(number)
    else:
        target["new"] = number


@pytest.mark.parametrize("with_shadows", [True, False])
@given(history=st.lists(steps, max_size=30))
def test_what_is_stored_is_what_is_live_whoever_held_it(
    with_shadows: bool, history: list[tuple[str, str, int, Any]]
) -> None:
    with patch.object(state_tracker, "_WORTH_A_SHADOW", 0 if with_shadows else 1 << 40):
        store_all(history)


def store_all(history: list[tuple[str, str, int, Any]]) -> None:
    tracker, memory, log = StateTracker(), SharedMemory(), list[Chunk]()
    kept: list[Any] = []

    def do(what: str, key: str, number: int, value: Any) -> None:
        # In a function of its own, so that nothing is held by a variable that is left over.
        if what in ("write", "write and keep"):
            own = copy.deepcopy(value)
            memory.write(key, own)
            if what != "write":
                kept.append(own)
        elif what in ("keep", "keep inner", "change") and key in memory.keys():  # noqa: SIM118 - not a dict
            found = inner_ones(memory.read(key))
            chosen = found[number % len(found)] if what != "keep" else found[0]
            if what == "change":
                change(chosen, number)
            else:
                kept.append(chosen)
        elif what == "drop" and kept:
            del kept[number % len(kept)]
        elif what == "change kept" and kept:
            change(kept[number % len(kept)], number)

    def commit() -> None:
        before = memory.snapshot()  # as the executor holds one
        staged = tracker.stage({"": memory})
        tracker.accept(staged)
        log.extend(staged.chunks)
        assert before == memory.own

    for step in history:
        if step[0] == "commit":
            commit()
            live = {key: codec.encode(value) for key, value in memory.own.items() if not is_shared(memory, key)}
            state = stored.fold(log).values
            assert {key: state[key] for key in live} == live
        else:
            do(*step)


def is_shared(memory: SharedMemory, key: str) -> bool:
    """Whether another key holds the same objects, which are stored once and referred to."""
    mine = {id(each) for each in inner_ones(memory.own[key])}
    return any(other != key and mine & {id(each) for each in inner_ones(memory.own[other])} for other in memory.own)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []
    encode = codec.encode

    def noted(value: Any, path: str = "value") -> bytes:
        paths.append(path)
        return encode(value, path)

    monkeypatch.setattr(codec, "encode", noted)
    monkeypatch.setattr("framework.graph.state_tracker._WORTH_A_SHADOW", 1 << 40)  # or nothing would be encoded at all
    return paths


def commit(tracker: StateTracker, memory: SharedMemory, times: int = 1) -> None:
    for _ in range(times):
        before = memory.snapshot()
        tracker.accept(tracker.stage({"": memory}))
        assert before.keys() == memory.own.keys()


@pytest.mark.parametrize("worth", [0, 1 << 40], ids=["with shadows", "without"])
def test_what_a_node_left_is_not_looked_at_for_ever(
    worth: int, encodings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_tracker, "_WORTH_A_SHADOW", worth)
    looked = count_looks(monkeypatch)
    tracker, memory = StateTracker(), SharedMemory()
    memory.write("big", [{"n": [number], "text": "t"} for number in range(100)])
    commit(tracker, memory, 2)
    encodings.clear()
    looked.clear()
    commit(tracker, memory, 5)
    assert not encodings
    assert not looked
    memory.read("big")[7]["n"].append(1)
    commit(tracker, memory)
    assert encodings == ["state.big"]
    commit(tracker, memory)
    encodings.clear()
    looked.clear()
    commit(tracker, memory, 3)
    assert not encodings
    assert not looked


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the path of each value staged."""
    looked: list[str] = []
    stage = StateTracker._stage_value

    def noted(self: StateTracker, staged: Any, branch: str, key: str, *given: Any) -> None:
        looked.append(key)
        stage(self, staged, branch, key, *given)

    monkeypatch.setattr(StateTracker, "_stage_value", noted)
    return looked


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_somebody_holds_is_looked_at_each_time(depth: int, encodings: list[str]) -> None:
    tracker, memory = StateTracker(), SharedMemory()
    memory.write("big", [[[1]]])
    held = memory.own["big"]
    for _ in range(depth):
        held = held[0]
    commit(tracker, memory, 3)
    encodings.clear()
    commit(tracker, memory, 3)
    assert encodings == ["state.big"] * 3
    held.append(2)
    staged = tracker.stage({"": memory})
    assert len(staged.chunks) == 1


def test_a_change_that_was_not_accepted_is_not_forgotten() -> None:
    tracker, memory = StateTracker(), SharedMemory()
    memory.write("big", [[1]])
    commit(tracker, memory, 1)
    memory.read("big")[0].append(2)
    tracker.stage({"": memory})
    for _ in range(3):
        staged = tracker.stage({"": memory})
        assert [chunk.data for chunk in staged.chunks] == [b"[[1,2]]"]


def test_what_cannot_be_stored_leaves_the_others_exposed() -> None:
    tracker, memory = StateTracker(), SharedMemory()
    memory.write("big", [[1]])
    commit(tracker, memory, 1)
    memory.write("wrong", object())
    memory.take_idle()
    with pytest.raises(Exception, match="state.wrong"):
        tracker.stage({"": memory})
    assert memory.is_exposed("big")


@pytest.mark.parametrize("value", [(1,), {1}, "text", [(1, [2])], {1: [2]}, [{1}], [bytearray(b"")]], ids=repr)
def test_what_may_hide_a_holder_is_never_taken_for_free(value: Any) -> None:
    holder = Held(copy.deepcopy(value))
    assert not held_by_these_only(holder, "key", ())


def test_nothing_is_where_counts_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Held([1])
    assert held_by_these_only(holder, "key", ())
    monkeypatch.setattr(sole_holders, "_EXACT", False)
    assert not held_by_these_only(holder, "key", ())
