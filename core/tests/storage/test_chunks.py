"""The difference of two states: exact, minimal where something only grew, and told apart by its digest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.errors import CorruptData
from framework.storage import codec
from framework.storage.checkpoints import fold
from framework.storage.chunks import (
    Chunk,
    Op,
    apply,
    chain,
    checksum,
    diff,
    diff_value,
    join_appends,
    state_digest,
    unreachable,
)

QUICK = settings(max_examples=60, deadline=None, database=None)
MANY = settings(max_examples=5_000, deadline=None, database=None)

KEYS = "abcd"

texts = st.text(st.sampled_from('ab"\\\n\x00é☃🐍,[]{}0'), max_size=6)
leaves = st.none() | st.booleans() | st.integers(-20, 20) | st.floats(allow_nan=False) | texts | st.binary(max_size=3)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
states = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)


@st.composite
def successors(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """A state as a step may leave it: some keys grown, some changed, some gone, some new."""
    new = copy.deepcopy(state)
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        value = new.get(key)
        if isinstance(value, list) and draw(st.booleans()):
            value.extend(draw(st.lists(leaves, max_size=3)))
        elif isinstance(value, str) and draw(st.booleans()):
            new[key] = value + draw(texts)
        elif draw(st.booleans()):
            new.pop(key, None)
        else:
            new[key] = draw(values)
    return new


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, bytes]]:
    """A run's states one after the other, encoded."""
    state = draw(states)
    found = [state]
    for _ in range(draw(st.integers(0, 5))):
        state = draw(successors(state))
        found.append(state)
    return [{key: codec.encode(value) for key, value in one.items()} for one in found]


def check_history(history: list[dict[str, bytes]]) -> None:
    previous: dict[str, bytes] = {}
    chunks: list[Chunk] = []
    chains: dict[str, int] = {}
    for state in history:
        step = diff(previous, state)
        assert apply(step, previous) == state
        assert len({chunk.key for chunk in step}) == len(step), "one chunk for each key"
        assert {chunk.key for chunk in step} == {
            key for key in {*previous, *state} if previous.get(key) != state.get(key)
        }, "a chunk for each changed key and for no other"
        before = state_digest(chains.values())
        for chunk in step:
            chains[chunk.key] = chain(chains.get(chunk.key, 0), chunk)
        assert (state_digest(chains.values()) == before) == (not step), "the digest changes with the state"
        chunks += step
        folded = fold(chunks)
        assert folded.values == state, "all chunks so far make the state"
        assert state_digest(folded.chains.values()) == state_digest(chains.values())
        previous = state


@QUICK
@given(histories())
def test_chunks_make_the_states(history: list[dict[str, bytes]]) -> None:
    check_history(history)


@pytest.mark.slow
@MANY
@given(histories())
def test_chunks_make_many_states(history: list[dict[str, bytes]]) -> None:
    check_history(history)


@QUICK
@given(states, states)
def test_any_state_can_follow_any(a: dict[str, Any], b: dict[str, Any]) -> None:
    old, new = ({key: codec.encode(value) for key, value in state.items()} for state in (a, b))
    assert apply(diff(old, new), old) == new
    assert diff(old, old) == []


@QUICK
@given(st.lists(values, max_size=4), st.lists(values, min_size=1, max_size=3))
def test_a_grown_list_costs_what_it_grew(old: list[Any], tail: list[Any]) -> None:
    chunk = diff_value("k", codec.encode(old), codec.encode(old + tail))
    assert chunk is not None
    assert chunk.op == "append"
    assert chunk.data == codec.encode(tail)[1:-1]


@QUICK
@given(texts, texts.filter(bool))
def test_a_grown_text_costs_what_it_grew(old: str, tail: str) -> None:
    chunk = diff_value("k", codec.encode(old), codec.encode(old + tail))
    assert chunk is not None
    assert chunk.op == "append"
    assert chunk.data == codec.encode(tail)[1:-1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1], [12]),
        ([1], [1.5]),
        ([1, 2], [1]),
        ([[1]], [[1, 2]]),
        ([1], [2, 1]),
        ("ab", "b"),
        ("1", 12),
        ([], ""),
        ({"a": 1}, {"a": 1, "b": 2}),
        (1, 12),
        ((1,), (1, 2)),
    ],
)
def test_what_did_not_only_grow_is_set_whole(old: Any, new: Any) -> None:
    assert diff_value("k", codec.encode(old), codec.encode(new)) == Chunk("k", "set", codec.encode(new))


def test_many_appends_join_in_order() -> None:
    assert join_appends(b"[]", [b"1", b"2,3"]) == b"[1,2,3]"
    assert join_appends(b"[0]", [b"1"]) == b"[0,1]"
    assert join_appends(b'"a"', [b"b", b"\\n"]) == b'"ab\\n"'
    assert join_appends(b"7", []) == b"7"


def test_appends_need_something_to_follow() -> None:
    with pytest.raises(ValueError, match="'k'"):
        apply([Chunk("k", "append", b"1")], {})
    with pytest.raises(ValueError, match="neither"):
        join_appends(b"7", [b"1"])
    with pytest.raises(CorruptData):
        fold([Chunk("k", "append", b"1")])


def test_a_later_set_or_delete_wins() -> None:
    grown = [Chunk("k", "set", b"[1]"), Chunk("k", "append", b"2")]
    assert apply([*grown, Chunk("k", "set", b"0")], {}) == {"k": b"0"}
    assert apply([*grown, Chunk("k", "delete", b"")], {}) == {}
    assert fold([*grown, Chunk("k", "delete", b"")]).chains == {}


def test_checksums_cover_key_operation_and_data() -> None:
    ops: list[Op] = ["set", "append", "delete"]
    chunks = [Chunk(key, op, data) for key in ("a", "b", "a ") for op in ops for data in (b"", b"1", b"2")]
    assert len({checksum(chunk) for chunk in chunks}) == len(chunks)


def test_equal_values_of_two_keys_do_not_cancel_out() -> None:
    one, two = (chain(0, Chunk(key, "set", b"1")) for key in "ab")
    assert state_digest([one, two]) not in (0, one, two)
    assert state_digest([one, two]) == state_digest([two, one])


def test_a_set_starts_the_chain_anew() -> None:
    last = Chunk("k", "set", b"[1]")
    assert chain(12345, last) == chain(0, last)
    assert chain(chain(0, last), Chunk("k", "append", b"2")) != chain(0, Chunk("k", "append", b"2"))


# --- retention ------------------------------------------------------------------------------------------------------


def reached(operations: dict[int, Op], at: int) -> set[int]:
    """The chunks that make one key's value at a sequence, the slow way."""
    found: list[int] = []
    for sequence in sorted(one for one in operations if one <= at):
        if operations[sequence] == "append":
            found.append(sequence)
        else:
            found = [sequence]
    return set(found)


def value_at(operations: dict[int, Op], at: int) -> list[int]:
    """The chunks that make a value: none of a deleted key, nor of one that was only ever appended to."""
    found = sorted(reached(operations, at))
    return found if found and operations[found[0]] == "set" else []


@QUICK
@given(
    st.dictionaries(st.integers(0, 9), st.sampled_from(["set", "append", "delete"]), min_size=1),
    st.sets(st.integers(1, 10), min_size=1, max_size=6),
    st.data(),
)
def test_only_what_nothing_reaches_goes(operations: dict[int, Op], kept: set[int], data: st.DataObject) -> None:
    dropped = data.draw(st.sampled_from(sorted(kept)))
    others = sorted(kept - {dropped})
    after = max((one for one in others if one < dropped), default=0)
    upto = min((one for one in others if one > dropped), default=None)
    if upto is None:
        return  # the newest is never dropped
    gone = unreachable(operations, after, upto)
    left = {sequence: op for sequence, op in operations.items() if sequence not in gone}
    for sequence in [0, *others, 11]:
        if sequence == 0 or sequence in others or sequence > max(others):
            assert value_at(left, sequence) == value_at(operations, sequence)
    assert not {sequence for sequence in gone if sequence <= after}
    needed = reached(operations, upto) | reached(operations, 11)
    superseded = [one for one in left if after < one < upto and one not in needed and left[one] != "append"]
    assert not [one for one in superseded if any(left[later] != "append" for later in left if one < later <= upto)]
