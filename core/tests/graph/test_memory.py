"""The shared memory: permissions, taking writes back, branches' overlays, and what may have been changed in place."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.graph.memory import SharedMemory, isolated


def filled(**values: Any) -> SharedMemory:
    memory = SharedMemory()
    for key, value in values.items():
        memory.write(key, value)
    return memory


def test_reading_and_writing() -> None:
    memory = filled(a=1, b=[2])
    assert memory.read("a") == 1
    assert memory.read("missing") is None
    assert memory.read_all() == {"a": 1, "b": [2]}
    assert memory.read("b") is memory.read_all()["b"], "values are shared, not copied"


def test_permissions() -> None:
    memory = filled(a=1, b=2, c=3)
    view = memory.with_permissions(["a", "b"], ["b"])
    assert view.read("a") == 1
    assert view.read_all() == {"a": 1, "b": 2}
    with pytest.raises(PermissionError, match="'c'"):
        view.read("c")
    with pytest.raises(PermissionError, match="'a'"):
        view.write("a", 5)
    view.write("b", 7)
    assert memory.read("b") == 7
    assert view.peek("c") == 3


def test_no_permissions_mean_no_restriction() -> None:
    view = filled(a=1).with_permissions([], [])
    view.write("new", view.read("a"))
    assert view.read_all() == {"a": 1, "new": 1}


def test_writes_can_be_taken_back_through_any_view() -> None:
    memory = filled(a=1)
    view = memory.with_permissions([], [])
    before = memory.snapshot()
    view.write("a", 2)
    view.write("b", 3)
    memory.roll_back(before)
    assert view.read_all() == memory.read_all() == {"a": 1}


def test_what_was_handed_out_is_known() -> None:
    memory = SharedMemory()
    for key, value in {"list": [1], "text": "t", "other": [2]}.items():
        memory.restored(key, value)
    assert not memory.is_exposed("list")
    memory.view()
    assert not memory.is_exposed("list"), "the framework only looks"
    memory.with_permissions([], []).read("list")
    memory.read("text")
    assert memory.is_exposed("list")
    assert not memory.is_exposed("text"), "nobody can change a text in place"
    assert not memory.is_exposed("other")
    memory.read_all()
    assert memory.is_exposed("other")
    memory.write("made", {})
    assert memory.is_exposed("made"), "who wrote it may have kept it"


# --- branches -----------------------------------------------------------------------------------------------------


def test_a_branch_sees_the_state_around_it_and_keeps_its_writes() -> None:
    root = filled(a=1, rows=[1])
    one, other = root.branch(), root.branch()
    one.write("a", 2)
    one.write("b", 3)
    assert one.read_all() == {"a": 2, "rows": [1], "b": 3}
    assert other.read_all() == root.read_all() == {"a": 1, "rows": [1]}
    assert one.own == {"a": 2, "b": 3}
    assert one.keys() == ["a", "rows", "b"]


def test_a_change_in_place_counts_as_written_once_settled() -> None:
    root = filled(rows=[1], same=[2])
    one, other = root.branch(), root.branch()
    one.read("rows").append("mine")
    one.read("same")
    assert other.read("rows") == root.read("rows") == [1]
    assert one.read("rows") == [1, "mine"], "the copy is the branch's own from then on"
    assert one.own == {}
    one.settle()
    assert one.own == {"rows": [1, "mine"]}
    assert one.is_exposed("rows")


def test_rolling_a_branch_back_forgets_its_copies() -> None:
    branch = filled(rows=[1]).branch()
    before = branch.snapshot()
    branch.read("rows").append(2)
    branch.roll_back(before)
    assert branch.read("rows") == [1]
    branch.settle()
    assert branch.own == {}


def test_branches_of_branches() -> None:
    root = filled(rows=[0])
    outer = root.branch()
    outer.read("rows").append(1)
    outer.settle()
    inner = outer.branch()
    inner.read("rows").append(2)
    inner.settle()
    assert (root.read("rows"), outer.read("rows"), inner.read("rows")) == ([0], [0, 1], [0, 1, 2])
    assert inner.view() == {"rows": [0, 1, 2]}


def test_a_view_of_a_branch_is_the_branch() -> None:
    branch = filled(rows=[1]).branch()
    view = branch.with_permissions(["rows"], ["out"])
    view.read("rows").append(2)
    view.write("out", 1)
    branch.settle()
    assert branch.own == {"out": 1, "rows": [1, 2]}


def test_what_cannot_be_copied_is_shared() -> None:
    lock = threading.Lock()
    assert isolated(lock, "lock") is lock
    assert filled(lock=lock).branch().read("lock") is lock


def test_values_that_nobody_can_compare_count_as_changed_only_when_written() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError("no truth value")

        __hash__ = None  # type: ignore[assignment]

    branch = filled(odd=Odd()).branch()
    branch.read("odd")
    branch.settle()
    assert "odd" not in branch.own
    branch.write("odd", branch.read("odd"))
    assert "odd" in branch.own


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=8), st.integers(0, 8))
def test_a_snapshot_is_as_good_as_a_copy(writes: list[tuple[str, int]], at: int) -> None:
    memory, model = SharedMemory(), dict[str, int]()
    for key, value in writes[:at]:
        memory.write(key, value)
        model[key] = value
    before = memory.snapshot()
    for key, value in writes[at:]:
        memory.write(key, value)
    memory.roll_back(before)
    assert memory.read_all() == model
