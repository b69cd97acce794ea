"""Pins put and taken by one process between the commits of another, which remembers where its run stood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.chunks import diff
from framework.storage.committer import committer_of
from framework.storage.contract import accept, commit, new_run, state_at
from framework.storage.records import Commit, Retention
from framework.storage.sqlite import SQLiteStorage

RUN = "run_1"
KEYS = ("a", "b", "c")

# What a commit does to each key: leaves it, sets it to a number, appends to it, removes it.
CHANGES = st.fixed_dictionaries({key: st.sampled_from(("leave", "set", "append", "delete")) for key in KEYS})
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), CHANGES),
        st.tuples(st.just("commit"), CHANGES),
        st.tuples(st.just("commit"), CHANGES),
        st.tuples(st.just("log"), st.none()),
        st.tuples(st.just("pin"), st.integers(0, 9)),
        st.tuples(st.just("unpin"), st.integers(0, 9)),
        st.tuples(st.just("prune"), st.integers(1, 3)),
    ),
    max_size=30,
)


class Bench:
    """The run's owner, who commits, and another process's connection, with a model of what must be kept."""

    def __init__(self, folder: Path, keep: int, *, at_once: bool) -> None:
        self.owner = SQLiteStorage(folder / "runs.db")
        self.other = SQLiteStorage(folder / "runs.db")
        self.keep = keep
        self.at_once = at_once
        self.state: dict[str, Any] = {"a": 0, "input": ["given"]}
        self.states = [dict(self.state)]
        self.kept: list[int] = []
        self.pins: set[int] = set()
        self.number = 0
        self.owner.open_run(new_run(RUN, self.state), "me", 3600)

    def close(self) -> None:
        self.owner.close()
        self.other.close()

    def commit(self, changes: Mapping[str, str] | None) -> None:
        """One commit; without ``changes`` it makes no checkpoint."""
        before = {key: codec.encode(value) for key, value in self.state.items()}
        for key, change in (changes or {}).items():
            self.number += 1
            if change == "set":
                self.state[key] = self.number
            elif change == "append":
                old = self.state.get(key)
                self.state[key] = [*(old if isinstance(old, list) else ()), self.number]
            elif change == "delete":
                self.state.pop(key, None)
        after = {key: codec.encode(value) for key, value in self.state.items()}
        self.states.append(dict(self.state))
        sequence = len(self.states) - 1
        more: dict[str, Any] = {"checkpoint_id": None} if changes is None else {"chunks": diff(before, after)}
        self.put(commit(sequence, RUN, 1, retention=Retention(self.keep), **more))
        if changes is not None:
            self.kept.append(sequence)
            self.prune(self.keep)

    def put(self, one: Commit) -> None:
        if not self.at_once:
            accept(self.owner, one)
            return
        # As a lone run's commit is made: in the caller's thread, through the committer.
        ticket = committer_of(self.owner).hand_over(one, alone=True)
        assert ticket.done(), "it was not made at once"
        ticket.result()

    def prune(self, keep: int) -> None:
        newest = self.kept[-keep:]
        self.kept = [each for each in self.kept if each in self.pins or each >= newest[0]] if newest else []

    def act(self, name: str, given: Any) -> None:
        if name == "commit":
            self.commit(given)
        elif name == "log":
            self.commit(None)
        elif name == "prune":
            self.other.prune(RUN, Retention(given))
            self.prune(given)
        elif self.kept:
            sequence = self.kept[given % len(self.kept)]
            if name == "pin":
                self.other.pin(RUN, f"ckpt_{sequence}")
                self.pins.add(sequence)
            else:
                assert self.other.unpin(RUN, f"ckpt_{sequence}") is (sequence in self.pins)
                self.pins.discard(sequence)

    def check(self) -> None:
        for store in (self.owner, self.other):
            assert [row.sequence for row in store.read_checkpoint_rows(RUN)] == self.kept[::-1]
            for sequence in (0, *self.kept):
                found = {key: codec.decode(data) for key, data in state_at(store, sequence, RUN).items()}
                assert found == self.states[sequence], sequence
        assert {pin.sequence for pin in self.other.list_pins([RUN])} == self.pins


@pytest.mark.parametrize("at_once", [False, True], ids=["grouped", "at_once"])
@pytest.mark.parametrize("keep", [1, 3], ids=["latest_only", "prune_old"])
@settings(max_examples=20, deadline=None)
@given(actions=ACTIONS)
def test_every_pinned_checkpoint_stays_as_it_was(keep: int, actions: list[tuple[str, Any]], at_once: bool) -> None:
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), keep, at_once=at_once)
        if at_once:
            committer_of(bench.owner)._took = lambda seconds: None  # type: ignore[method-assign]  # never too slow
        try:
            for name, given_ in actions:
                bench.act(name, given_)
                bench.check()
        finally:
            bench.close()


def test_the_run_s_end_leaves_what_is_pinned(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 1, at_once=False)
    for _ in range(3):
        bench.act("commit", dict.fromkeys(KEYS, "set"))
    bench.act("pin", 0)
    bench.act("commit", dict.fromkeys(KEYS, "append"))
    bench.act("commit", dict.fromkeys(KEYS, "delete"))
    accept(bench.owner, commit(6, RUN, 1, checkpoint_id=None, state=RunState.COMPLETED, release=True))
    assert bench.kept == [3, 5]
    bench.check()
    assert bench.other.verify().damage == ()
    bench.close()
