"""The storage contract on forks: a new run from a checkpoint of another, whole, of its own, and all at once."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

from framework.errors import CheckpointNotFound, CommitConflict, InvalidId, RunExists, RunNotFound, StorageError
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk, diff
from framework.storage.contract import (
    BAD_IDS,
    KEEP_ONE,
    Check,
    StorageUnderTest,
    Writer,
    accept,
    commit,
    equal,
    growing_states,
    new_run,
    race,
    raises,
    refuse,
    require,
    snapshot,
    state_at,
)
from framework.storage.interface import Storage
from framework.storage.records import Commit, Retention, RunRecord


def first(sequence: int, run_id: str = "fork", **fields: Any) -> Commit:
    """The first commit of a fork at ``sequence``."""
    fields.setdefault("checkpoint_id", f"fork_{sequence}")
    return commit(sequence + 1, run_id, state=RunState.PAUSED, **fields)


def forks_are_whole(subject: StorageUnderTest) -> None:
    """A fork has the other run's log up to there, the checkpoint, both states, and its own first commit."""
    store = subject.new()
    writer = Writer(store, state={"input": [1], "text": "é", "gone": 0})
    for state in itertools.islice(growing_states(), 8):
        writer.write(state, log=b'["l"]')
    before = snapshot(store)
    chunk = Chunk("changed", "set", b'"by the fork"')
    record = store.fork_run("run_1", 5, b'{"h": 1}', first(5, chunks=[chunk], error="why", log=b'["f"]'))
    if subject.clock is not None:
        equal(record.created_at, subject.clock.now, "when the fork was made")
    for seen in subject.before_and_after_reopening(store):
        equal(seen.find_run("fork"), record, "find_run and what fork_run returned")
        source = seen.find_run("run_1")
        require(source is not None, "the other run is gone")
        if source is not None:
            same = (source.executor_type, source.goal_id, source.fingerprint)
            equal((record.executor_type, record.goal_id, record.fingerprint), same, "kind, goal and definition")
        equal((record.header, record.parent_run_id), (b'{"h": 1}', None), "its header and parent")
        equal((record.state, record.error, record.sequence), (RunState.PAUSED, "why", 6), "its state")
        equal((record.owner, record.token, record.lease_until), (None, 0, 0.0), "its lease")
        equal(record.recovery_attempts, 0, "its recovery attempts")
        log, forked = seen.read_log("run_1"), seen.read_log("fork")
        equal(forked[:5], log[:5], "the log taken over")
        equal([(row.sequence, row.log) for row in forked[5:]], [(6, b'["f"]')], "its own log")
        rows = list(seen.read_checkpoint_rows("fork"))
        equal([(row.sequence, row.checkpoint_id) for row in rows], [(6, "fork_5"), (5, "ckpt_5")], "its checkpoints")
        equal(rows[1], seen.find_checkpoint_row("run_1", "ckpt_5"), "the checkpoint taken over")
        equal(state_at(seen, 0, "fork"), writer.states[0], "its initial state")
        equal(state_at(seen, 5, "fork"), writer.states[5], "its state at the checkpoint taken over")
        equal(state_at(seen, 6, "fork"), {**writer.states[5], "changed": chunk.data}, "its state")
        equal(snapshot(seen), before, "the other run")
        equal(seen.verify().damage, (), "what verify finds")
        equal({found.run_id for found in seen.list_runs([RunState.PAUSED])}, {"fork"}, "the paused runs")


def forks_stand_on_their_own(subject: StorageUnderTest) -> None:
    """A fork goes on, is pruned and rewound, and outlives the other run; neither sees what the other does."""
    seed = random.Random(7)
    store = subject.new()
    writer = Writer(store, state={"input": 1, "deleted": "x" * 50})
    states = growing_states()
    for state in itertools.islice(states, 12):
        writer.write({**state, **({"deleted": [1]} if writer.sequence > 8 else {})})
    at = 10
    store.fork_run("run_1", at, b"{}", first(at))
    old = dict(writer.states[at])
    for state in itertools.islice(states, 6):
        writer.write(state, retention=KEEP_ONE)  # the other run's retention takes what the fork was made of
    fork_states = {0: writer.states[0], at: old, at + 1: old}
    for sequence in range(at + 2, at + 9):
        new = {key: data for key, data in old.items() if seed.random() < 0.8}
        new[f"k{seed.randrange(3)}"] = b"[%d]" % sequence
        accept(store, commit(sequence, "fork", chunks=diff(old, new)))
        fork_states[sequence] = old = new
    for sequence, state in fork_states.items():
        equal(state_at(store, sequence, "fork"), state, f"the fork's state at {sequence}")
    writer.check(store, [writer.sequence], "the other run after all this")
    equal(store.delete_run("run_1"), True, "deleting the other run")
    store = subject.again(store)
    require(store.definition("f1") is not None, "the definition that the fork needs is gone")
    for sequence, state in fork_states.items():
        equal(state_at(store, sequence, "fork"), state, f"the fork's state at {sequence} after the other run is gone")
    last = max(fork_states)
    store.prune("fork", Retention(2))
    for sequence in (0, last - 1, last):
        equal(state_at(store, sequence, "fork"), fork_states[sequence], f"the fork's state at {sequence} when pruned")
    token = store.claim_run("fork", "me", 60).token
    equal(token, 1, "the first token of a fork")
    store.rewind("fork", token, last - 1)
    equal(state_at(store, last, "fork"), fork_states[last - 1], "the fork's state when rewound")
    equal(store.verify().damage, (), "what verify finds")


def forks_can_be_forked(subject: StorageUnderTest) -> None:
    """A fork of a fork, at the checkpoint it took over and at its own; also one that is being run."""
    store = subject.new()
    writer = Writer(store, state={"a": 1})
    for number in range(4):
        writer.write({"a": 1, "list": list(range(number))})
    store.fork_run("run_1", 3, b"{}", first(3, chunks=[Chunk("b", "set", b"2")]))
    store.claim_run("fork", "me", 60)
    store.fork_run("fork", 3, b"{}", first(3, "fork of 3"))
    store.fork_run("fork", 4, b"{}", first(4, "fork of 4", chunks=[Chunk("a", "delete", b"")]))
    equal(state_at(store, 4, "fork of 3"), writer.states[3], "a fork at the checkpoint taken over")
    expected = {"list": writer.states[3]["list"], "b": b"2"}
    equal(state_at(store, 5, "fork of 4"), expected, "a fork at the fork's own checkpoint")
    equal([row.sequence for row in store.read_log("fork of 4")], [1, 2, 3, 4, 5], "its log")
    accept(store, commit(5, "fork", 1))  # its owner has lost nothing


def fork_ids_are_free(subject: StorageUnderTest) -> None:
    """An id that is taken, the run's own too, is refused with ``RunExists``; of concurrent forks of one id one wins."""
    store = subject.new()
    Writer(store, state={"a": 1}).write({"a": 2})
    store.open_run(new_run("taken", {"x": 1}))
    for run_id in ("taken", "run_1"):
        before = snapshot(store, run_id)
        with raises(RunExists, f"forking to {run_id!r}"):
            store.fork_run("run_1", 1, b"{}", first(1, run_id))
        equal(snapshot(store, run_id), before, f"the run {run_id!r} after the refusal")
    results = race(5, lambda index: store.fork_run("run_1", 1, b"%d" % index, first(1, "one")))
    won = [result for result in results if isinstance(result, RunRecord)]
    lost = [result for result in results if isinstance(result, RunExists)]
    equal((len(won), len(lost)), (1, 4), f"winners and losers ({results})")
    equal(store.find_run("one"), won[0], "the winner's")
    results = race(2, lambda index: store.fork_run("run_1", 1, b"", first(1, f"own {index}")))
    require(all(isinstance(result, RunRecord) for result in results), f"forks to ids of their own: {results}")


def forks_leave_nothing_when_refused(subject: StorageUnderTest) -> None:
    """Unknown runs, checkpoints that are not kept and commits that do not fit: refused, and no trace is left."""
    store = subject.new()
    writer = Writer(store, state={"a": 1})
    for number in range(2, 6):
        writer.write({"a": number}, **({"checkpoint_id": None} if number == 4 else {}))
    store.prune("run_1", Retention(2))
    before = snapshot(store)

    def nothing_left(what: str) -> None:
        equal(store.find_run("fork"), None, f"{what}: the fork")
        equal((store.read_log("fork"), store.read_chunks("fork", 9)), ([], []), f"{what}: what is left of the fork")
        equal(snapshot(store), before, f"{what}: the other run")

    with raises(RunNotFound, "forking an unknown run"):
        store.fork_run("nobody", 1, b"{}", first(1))
    for sequence in (0, 1, 3, 5, 99):
        try:
            store.fork_run("run_1", sequence, b"{}", first(sequence))
        except CheckpointNotFound as error:
            equal((error.run_id, error.checkpoint), ("run_1", sequence), "what the refusal names")
            require("2" in str(error) and "4" in str(error), f"the refusal says which are kept: {error}")
        else:
            raise AssertionError(f"There was a fork at {sequence}, which is no kept checkpoint")
        nothing_left(f"no checkpoint {sequence}")
    wrong: tuple[tuple[Commit, type[Exception]], ...] = (
        (first(5), CommitConflict),
        (commit(5, "fork", token=1, state=RunState.PAUSED), StorageError),
        (commit(5, "fork"), StorageError),
        (commit(5, "fork", state=RunState.CRASHED), StorageError),
        (first(4, chunks=[Chunk("a", "set", b"1"), Chunk("a", "set", b"2")]), StorageError),
        (first(4, chunks=[Chunk("", "set", b"1")]), InvalidId),
    )
    for one, kind in wrong:
        with raises(kind, f"a first commit that does not fit: {one}"):
            store.fork_run("run_1", 4, b"{}", one)
        nothing_left("a first commit that does not fit")
    for bad in BAD_IDS:
        with raises(InvalidId, f"forking to {bad[:20]!r}"):
            store.fork_run("run_1", 4, b"{}", first(4, bad))
        with raises(InvalidId, f"forking {bad[:20]!r}"):
            store.fork_run(bad, 4, b"{}", first(4))
    store = subject.again(store)
    nothing_left("after opening again")
    refuse(store, commit(1, "fork"), RunNotFound, "a commit to the fork that was refused")
    store.open_run(new_run("fork", {"z": 1}))
    equal((store.read_log("fork"), state_at(store, 0, "fork")), ([], {"z": b"1"}), "a new run of its id")


def running_runs_can_be_forked(subject: StorageUnderTest) -> None:
    """While another thread commits and prunes, every fork that succeeds is whole, and the run loses nothing."""
    store = subject.new()
    store.open_run(new_run(state={"n": 0, "list": []}), "me", 60)
    total = 40
    forked: list[tuple[int, str]] = []
    written = threading.Event()

    def write() -> None:
        for number in range(1, total + 1):
            chunks = [Chunk("n", "set", b"%d" % number), Chunk("list", "append", b"%d" % number)]
            accept(store, commit(number, token=1, chunks=chunks, retention=Retention(3)))

    def work(index: int) -> None:
        if index == 0:
            try:
                write()
            finally:
                written.set()
            return
        for attempt in range(10):
            over = written.is_set()
            record = store.find_run("run_1")
            while record is None or record.sequence == 0:
                require(not over, "no commit was made")
                over = written.is_set()
                record = store.find_run("run_1")
            name = f"fork {index} {attempt}"
            try:
                store.fork_run("run_1", record.sequence, b"{}", first(record.sequence, name))
            except CheckpointNotFound:
                continue  # three commits came in between
            forked.append((record.sequence, name))

    results = race(3, work)
    equal(results, [None] * 3, "what the threads came to")
    require(forked, "no fork succeeded")
    for sequence, name in forked:
        whole = {"n": b"%d" % sequence, "list": b"[" + b",".join(b"%d" % n for n in range(1, sequence + 1)) + b"]"}
        equal(state_at(store, sequence + 1, name), whole, f"the state of {name}")
        equal(len(store.read_log(name)), sequence + 1, f"the log of {name}")
    equal(len(store.read_log("run_1")), total, "the log of the run that was forked")


def messages_are_not_forked(subject: StorageUnderTest) -> None:
    """What was left for a run is not for its forks, which take messages of their own."""
    store: Storage = subject.new()
    Writer(store, state={"a": 1}).write({"a": 2})
    store.send("run_1", "answer", b"1")
    store.fork_run("run_1", 1, b"{}", first(1))
    equal(store.read_messages("fork"), [], "the messages of a new fork")
    store.send("fork", "answer", b"2")
    equal([each.body for each in store.read_messages("run_1")], [b"1"], "the other run's message")
    equal([each.body for each in store.read_messages("fork")], [b"2"], "the fork's message")


CHECKS: tuple[Check, ...] = (
    forks_are_whole,
    forks_stand_on_their_own,
    forks_can_be_forked,
    fork_ids_are_free,
    forks_leave_nothing_when_refused,
    running_runs_can_be_forked,
    messages_are_not_forked,
)
