"""What of the state is written at each commit: just what changed, and nothing of it is missed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import UnstorableValue
from framework.graph.memory import SharedMemory
from framework.graph.state_tracker import Staged, StateTracker, scoped
from framework.storage import checkpoints as stored
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.chunks import Chunk

Scopes = dict[str, SharedMemory]


class Model:
    """The stored state, kept by applying what the tracker yields."""

    def __init__(self, append_only: tuple[str, ...] = ()) -> None:
        self.tracker = StateTracker(append_only)
        self.log: list[Chunk] = []

    def commit(self, scopes: Scopes, over: tuple[str, ...] = ()) -> Staged:
        staged = self.tracker.stage(scopes, over)
        self.tracker.accept(staged)
        self.log.extend(staged.chunks)
        state = stored.fold(self.log)
        assert staged.digest == stored.format_digest(state.chains.values())
        return staged

    @property
    def state(self) -> dict[str, bytes]:
        return chunklib.apply(self.log, {})

    def restart(self) -> SharedMemory:
        """A new tracker and a new memory, from what is stored."""
        state = stored.fold(self.log)
        values = {key: codec.decode(data) for key, data in state.values.items()}
        self.tracker.load(state, values)
        memory = SharedMemory()
        for key, value in values.items():
            memory.restored(key, value)
        return memory


def encoded(scopes: Scopes) -> dict[str, bytes]:
    return {
        scoped(branch, key): codec.encode(value)
        for branch, memory in scopes.items()
        for key, value in memory.own.items()
    }


leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.text('aé"\\', max_size=3)
values = st.recursive(
    leaves | st.binary(max_size=2) | st.tuples(leaves),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=5,
)
keys = st.sampled_from(["a", "b", "log", "text"])
changes = st.one_of(
    st.tuples(st.just("write"), keys, values),
    st.tuples(st.just("append"), keys, values),
    st.tuples(st.just("nest"), keys, values),
    st.tuples(st.just("delete"), keys, st.none()),
    st.tuples(st.just("look"), keys, st.none()),
    st.tuples(st.just("commit"), keys, st.none()),
    st.tuples(st.just("stage"), keys, st.none()),
    st.tuples(st.just("restart"), keys, st.none()),
)


def change(memory: SharedMemory, what: str, key: str, value: Any) -> None:
    """One thing that a node may do, in place or not."""
    if what == "write":
        memory.write(key, value)
    elif what == "append" and isinstance(memory.peek(key), list):
        memory.read(key).append(value)
    elif what == "append" and isinstance(memory.peek(key), str):
        memory.write(key, memory.read(key) + "tail")
    elif what == "nest" and isinstance(memory.peek(key), dict):
        memory.read(key)["deep"] = [value]
    elif what == "delete":
        kept = memory.snapshot()
        kept.pop(key, None)
        memory.roll_back(kept)
    elif what == "look":
        memory.view()


@given(st.lists(changes, max_size=25))
def test_what_is_stored_is_what_is_live(history: list[tuple[str, str, Any]]) -> None:
    model, memory = Model(), SharedMemory()
    for what, key, value in history:
        if what == "commit":
            model.commit({"": memory})
            assert model.state == encoded({"": memory})
        elif what == "stage":
            model.tracker.stage({"": memory})  # not accepted: as if nothing had been asked
        elif what == "restart":
            model.commit({"": memory})
            memory = model.restart()
        else:
            change(memory, what, key, value)
    model.commit({"": memory})
    assert model.state == encoded({"": memory})
    assert model.commit({"": memory}).chunks == []


@given(st.lists(st.tuples(st.sampled_from(["", "/f#1.0", "/f#1.1"]), changes), max_size=25))
def test_branches_are_stored_apart(history: list[tuple[str, tuple[str, str, Any]]]) -> None:
    root = SharedMemory()
    scopes = {"": root, "/f#1.0": root.branch(), "/f#1.1": root.branch()}
    model = Model()
    for branch, (what, key, value) in history:
        if what == "commit":
            model.commit({branch: scopes[branch]})
        elif what not in ("stage", "restart") and branch:
            change(scopes[branch], what, key, value)
            scopes[branch].settle()
    model.commit(scopes)
    assert model.state == encoded(scopes)
    model.commit({"": root}, over=("/f#1.0", "/f#1.1"))
    assert model.state == encoded({"": root})


appends = st.tuples(st.sampled_from(["append", "append", "commit", "restart", "shorten"]), st.text("ab", max_size=3))


@given(st.lists(appends, max_size=25))
def test_append_only_keys_are_stored_as_they_are(history: list[tuple[str, str]]) -> None:
    model, memory = Model(("log", "text")), SharedMemory()
    memory.write("log", [])
    memory.write("text", "")
    for what, value in history:
        if what == "append":
            memory.read("log").append(value)
            memory.write("text", memory.read("text") + value)
            continue
        if what == "shorten":  # against what was declared, but not to be missed
            model.commit({"": memory})
            memory.write("log", memory.read("log")[:-1])
            memory.write("text", memory.read("text")[:-1])
        model.commit({"": memory})
        assert model.state == encoded({"": memory})
        if what == "restart":
            memory = model.restart()
    model.commit({"": memory})
    assert model.state == encoded({"": memory})


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the values that were encoded, in order."""
    paths: list[str] = []
    encode = codec.encode

    def counted(value: Any, path: str = "value") -> bytes:
        paths.append(path)
        return encode(value, path)

    monkeypatch.setattr(codec, "encode", counted)
    return paths


def test_what_nobody_has_touched_is_not_encoded_again(encodings: list[str]) -> None:
    model, memory = Model(), SharedMemory()
    for key, value in {"big": ["x"] * 1000, "text": "t" * 1000, "number": 5}.items():
        memory.write(key, value)
    model.commit({"": memory})
    memory = model.restart()
    encodings.clear()
    memory.write("new", 1)
    memory.view()
    model.commit({"": memory})
    assert encodings == ["state.new"]
    memory.read("big")
    encodings.clear()
    assert model.commit({"": memory}).chunks == []
    assert encodings == ["state.big"], "handed out: it may have changed in place"


def test_an_append_only_key_costs_what_is_new(encodings: list[str]) -> None:
    model, memory = Model(("messages", "text")), SharedMemory()
    memory.write("messages", [])
    memory.write("text", "")
    model.commit({"": memory})
    sizes = []
    for number in range(300):
        memory.read("messages").append(f"message {number:04}")
        memory.write("text", memory.read("text") + "more ")
        encodings.clear()
        staged = model.commit({"": memory})
        assert [chunk.op for chunk in staged.chunks] == ["append", "append"]
        assert encodings == [f"state.messages[{number}:]", f"state.text[{number * 5}:]"]
        sizes.append(sum(len(chunk.data) for chunk in staged.chunks))
    assert max(sizes) == min(sizes)
    assert codec.decode(model.state["messages"])[-1] == "message 0299"
    memory = model.restart()
    memory.read("messages").append("after a restart")
    assert [chunk.data for chunk in model.commit({"": memory}).chunks] == [b'"after a restart"']


def test_a_growing_list_is_stored_as_appends_without_being_declared() -> None:
    model, memory = Model(), SharedMemory()
    memory.write("rows", [])
    for number in range(5):
        memory.read("rows").append({"n": number})
        model.commit({"": memory})
    assert [chunk.op for chunk in model.log] == ["set", *["append"] * 4]


# --- values that cannot be stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("a", {"rows": [1, object()]}, "state.a.rows[1]"),
        ("not a name", object(), "state['not a name']"),
        ("nul\x00", 1, "nul"),
        ("", 1, "state['']"),
        ("k" * 1001, 1, "state['kkk"),
        ("\ud800", 1, "state["),
    ],
)
def test_an_unstorable_value_is_named_and_leaves_the_tracker_as_it_was(key: str, value: Any, path: str) -> None:
    model, memory = Model(), SharedMemory()
    memory.write("good", [1])
    model.commit({"": memory})
    before = memory.snapshot()
    memory.read("good").append(2)
    memory.write(key, value)
    with pytest.raises(UnstorableValue) as caught:
        model.tracker.stage({"": memory})
    assert path in caught.value.path
    memory.roll_back(before)
    model.commit({"": memory})
    assert model.state == {"good": b"[1,2]"}


def test_a_key_that_is_no_text_is_refused() -> None:
    memory = SharedMemory()
    memory.put(5, 1)  # type: ignore[arg-type]
    with pytest.raises(UnstorableValue, match="str"):
        StateTracker().stage({"": memory})
