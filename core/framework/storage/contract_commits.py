"""The storage contract on commits: all or nothing, in order, the exact state at every retained checkpoint."""

from __future__ import annotations

import itertools
import random
from functools import partial
from typing import Any

from framework.errors import CommitConflict, CorruptData, InvalidId, LeaseLost, RunBusy, RunNotFound, StorageError
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage import codec
from framework.storage.chunks import Chunk
from framework.storage.contract import (
    KEEP_ALL,
    KEEP_ONE,
    Check,
    StorageUnderTest,
    Writer,
    accept,
    commit,
    digest_of,
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
from framework.storage.contract_runs import found
from framework.storage.records import CheckpointRow, LogRow, Retention


def commits_are_kept_whole(subject: StorageUnderTest) -> None:
    """Record, log, checkpoint, chunks and state of a commit are there together, and after opening again."""
    store = subject.new()
    store.open_run(new_run(state={"a": 1}), "me", 60)
    one = commit(
        1,
        token=1,
        log=b'["decided"]',
        chunks=[Chunk("b", "set", b'"x"'), Chunk("a", "delete", b"")],
        state=RunState.PAUSED,
        error="waits",
    )
    accept(store, one)
    for seen in subject.before_and_after_reopening(store):
        record = found(seen)
        equal((record.sequence, record.state, record.error), (1, RunState.PAUSED, "waits"), "the run")
        equal((record.owner, record.token), ("me", 1), "its lease")
        equal(seen.read_log("run_1"), [LogRow(1, one.record, one.log)], "the log")
        row = CheckpointRow(1, "ckpt_1", one.checkpoint or b"")
        equal(list(seen.read_checkpoint_rows("run_1")), [row], "the checkpoints")
        equal(seen.find_checkpoint_row("run_1", "ckpt_1"), row, "the checkpoint by id")
        equal(seen.find_checkpoint_row("run_1", "ckpt_2"), None, "an unknown checkpoint")
        equal(state_at(seen, 1), {"b": b'"x"'}, "the state after it")
        equal(state_at(seen, 0), {"a": b"1"}, "the state before it")


def bytes_are_opaque(subject: StorageUnderTest) -> None:
    """Whatever bytes a commit holds come back unchanged, JSON or not."""
    samples = [
        b"",
        b"\x00\xff\xfe",
        b"null",
        b"[ 1, 2 ]",
        b'{"a":1,"a":2}',
        b'{"$raw":1}',
        b'{"$base64":"AA=="}',
        b"1e400",
        b"123456789012345678901234567890",
        b'"\\ud800"',
        "ü".encode("latin-1"),
        b"[" * 300 + b"]" * 300,
        b'"' + "é☃".encode() + b'\\n"',
        bytes(range(256)) * 40,
    ]
    store = subject.new()
    store.open_run(new_run(definition=samples[1], header=samples[3]))
    for sequence, data in enumerate(samples, 1):
        accept(
            store,
            commit(
                sequence,
                record=data,
                log=data,
                checkpoint=data,
                chunks=[
                    Chunk("s", "set", data),
                    Chunk(f"k{sequence - 1}", "append", data),
                    Chunk(f"k{sequence}", "set", data),
                ],
            ),
        )
    store = subject.again(store)
    equal((store.definition("f1"), found(store).header), (samples[1], samples[3]), "definition and header")
    rows = store.read_log("run_1")
    equal([(row.record, row.log) for row in rows], [(data, data) for data in samples], "records and logs")
    bodies = [row.body for row in store.read_checkpoint_rows("run_1")]
    equal(bodies, samples[::-1], "the bodies of checkpoints")
    for sequence, data in enumerate(samples, 1):
        chunks = {chunk.key: chunk.data for chunk in store.read_chunks("run_1", sequence)}
        equal(chunks.get("s"), data, f"the chunk {data[:20]!r}")
        if sequence > 1:
            equal(chunks.get(f"k{sequence - 1}"), data, f"the appended chunk {data[:20]!r}")


def sequences_have_no_gaps(subject: StorageUnderTest) -> None:
    """A commit's sequence is the last one's plus one; anything else is refused and leaves no trace."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    for wrong in (0, 2, -1, 100):
        refuse(store, commit(wrong, token=1), CommitConflict, f"sequence {wrong} as the first")
    accept(store, commit(1, token=1))
    for wrong in (0, 1, 3):
        refuse(store, commit(wrong, token=1), CommitConflict, f"sequence {wrong} after 1")
    store = subject.again(store)
    refuse(store, commit(1, token=1), CommitConflict, "sequence 1 again, in the store opened again")
    accept(store, commit(2, token=1))


def refused_commits_leave_no_trace(subject: StorageUnderTest) -> None:
    """Nothing of a refused commit is seen, whatever it carried; ``refuse`` compares before and after."""
    store = subject.new()
    store.open_run(new_run(state={"a": [1]}), "me", 60)
    accept(store, commit(1, token=1))
    full: dict[str, Any] = {
        "log": b'"l"',
        "chunks": [Chunk("a", "delete", b""), Chunk("b", "set", b"1")],
        "state": RunState.COMPLETED,
        "error": "e",
        "release": True,
        "retention": KEEP_ONE,
        "replaces": 1,
    }
    refuse(store, commit(3, token=1, **full), CommitConflict, "a wrong sequence")
    refuse(store, commit(2, token=2, **full), LeaseLost, "a wrong token")
    refuse(store, commit(2, **full), RunBusy, "no token while the lease holds")
    twice = [Chunk("c", "set", b"[]"), Chunk("c", "append", b"1")]
    refuse(store, commit(2, token=1, **{**full, "chunks": twice}), StorageError, "two chunks of one key")
    refuse(store, commit(2, token=1, checkpoint_id="x", checkpoint=None), StorageError, "an id and no checkpoint")
    refuse(store, commit(2, token=1, checkpoint_id=None, checkpoint=b"1"), StorageError, "a checkpoint and no id")
    refuse(store, commit(2, token=1, state=RunState.CRASHED), StorageError, "the state crashed")
    accept(store, commit(2, token=1, **full))


def batches_are_independent(subject: StorageUnderTest) -> None:
    """Of commits handed over together each succeeds or fails by itself, those of one run in their order."""
    store = subject.new()
    for run_id in ("run_1", "run_2", "run_3"):
        store.open_run(new_run(run_id), "me", 60)
    batch = [
        commit(1, "run_1", 1, chunks=[Chunk("a", "set", b"[1]")]),
        commit(1, "run_2", 9, chunks=[Chunk("a", "set", b"[1]")]),
        commit(2, "run_1", 1, chunks=[Chunk("a", "append", b"2")]),
        commit(1, "nobody", 1),
        commit(2, "run_3", 1),
        commit(1, "run_3", 1, chunks=[Chunk("a", "set", b"[1]")]),
        commit(4, "run_1", 1),
        commit(3, "run_1", 1, checkpoint_id="bad\x00"),
        commit(3, "run_1", 1, chunks=[Chunk("a", "append", b"3")], state=RunState.COMPLETED, release=True),
        commit(4, "run_1", 1),
    ]
    kinds = [
        None,
        LeaseLost,
        None,
        RunNotFound,
        CommitConflict,
        None,
        CommitConflict,
        InvalidId,
        None,
        LeaseLost,
    ]
    outcomes = store.commit(batch)
    equal([None if one is None else type(one) for one in outcomes], kinds, f"the outcomes ({outcomes})")
    store = subject.again(store)
    equal([found(store, run_id).sequence for run_id in ("run_1", "run_2", "run_3")], [3, 0, 1], "the sequences")
    equal(state_at(store, 3), {"a": b"[1,2,3]"}, "the state of the run with three good commits")
    equal(found(store).state, RunState.COMPLETED, "its state")
    equal(store.read_log("run_2"), [], "the log of the run whose commit was refused")
    equal(store.commit([]), [], "the outcome of no commits")


def commits_race_in_order(subject: StorageUnderTest) -> None:
    """Of threads that commit the same sequence at once, one wins; the others are refused without a trace."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    for sequence in (1, 2):
        attempts = [
            commit(sequence, token=1, chunks=[Chunk(f"key {index} {sequence}", "set", b"1")]) for index in range(4)
        ]
        results = race(4, partial(lambda attempts, index: store.commit([attempts[index]])[0], attempts))
        conflicts = [result for result in results if isinstance(result, CommitConflict)]
        equal((results.count(None), len(conflicts)), (1, 3), f"winners and losers ({results})")
        equal(len(state_at(store, sequence)), sequence, "the number of keys written")


def state_changes_with_its_commit(subject: StorageUnderTest) -> None:
    """``state`` replaces the run's and its error; a commit without one leaves both; ``release`` frees the lease."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    accept(store, commit(1, token=1, state=RunState.FAILED, error="first\udcff"))
    equal((found(store).state, found(store).error), (RunState.FAILED, "first\\udcff"), "state and error")
    accept(store, commit(2, token=1))
    equal(found(store).state, RunState.FAILED, "the state after a commit without one")
    accept(store, commit(3, token=1, state=RunState.RUNNING))
    equal((found(store).state, found(store).error), (RunState.RUNNING, None), "the state after running again")
    accept(store, commit(4, token=1, state=RunState.CANCELLED, release=True))
    store = subject.again(store)
    record = found(store)
    equal((record.state, record.owner, record.token), (RunState.CANCELLED, None, 1), "the run after its release")


def commits_need_no_checkpoint(subject: StorageUnderTest) -> None:
    """A commit that is no checkpoint keeps its log and its chunks, and the next builds on them."""
    store = subject.new()
    writer = Writer(store, state={"a": [0]})
    writer.write({"a": [0, 1]}, checkpoint_id=None)
    writer.write({"a": [0, 1], "b": 1}, checkpoint_id=None, log=b'"attempt"', state=RunState.FAILED, error="e")
    writer.check(store, [], "before the first checkpoint")
    writer.write({"a": [0, 1, 2], "b": 1}, retention=KEEP_ONE)
    writer.write({"a": [0, 1, 2]}, checkpoint_id=None, retention=KEEP_ONE)
    store = subject.again(store)
    writer.check(store, [3], "with one checkpoint among commits")
    equal([row.sequence for row in store.read_log("run_1")], [1, 2, 3, 4], "the log")
    equal([row.sequence for row in store.read_log("run_1", after=2)], [3, 4], "the log after 2")
    equal(store.read_log("run_1", after=4), [], "the log after its end")


def retention_keeps_exact_states(subject: StorageUnderTest) -> None:
    """Whatever is kept, the state at each retained checkpoint is exactly what was committed."""
    for keep in (None, 1, 2, 5):
        store = subject.new()
        writer = Writer(store, state={"input": "as given", "gone": [1]})
        for state in itertools.islice(growing_states(), 15):
            writer.write(state, retention=Retention(keep))
            kept = range(max(1, writer.sequence - (keep or 99) + 1), writer.sequence + 1)
            writer.check(store, list(kept), f"keep={keep}, after {writer.sequence}")
        store = subject.again(store)
        writer.check(store, list(kept), f"keep={keep}, opened again")
        equal(len(store.read_log("run_1")), 15, f"keep={keep}: the log")
        require(store.verify().ok, f"keep={keep}: verify found {store.verify().damage}")


def prune_applies_retention_now(subject: StorageUnderTest) -> None:
    """``prune`` counts what went; the newest checkpoint stays, whatever is asked."""
    store = subject.new()
    writer = Writer(store, state={"input": 1})
    for state in itertools.islice(growing_states(), 12):
        writer.write(state)
    equal(store.prune("run_1", KEEP_ALL), 0, "pruning to all")
    equal(store.prune("run_1", Retention(12)), 0, "pruning to as many as there are")
    equal(store.prune("run_1", Retention(7)), 5, "pruning to 7")
    writer.check(store, range(6, 13), "after pruning to 7")
    equal(store.prune("run_1", Retention(3)), 4, "pruning to 3")
    writer.check(store, range(10, 13), "after pruning to 3")
    equal(store.prune("run_1", Retention(0)), 2, "pruning to 0")
    store = subject.again(store)
    writer.check(store, [12], "after pruning to 0, which leaves the newest")


def deleted_keys_stay_deleted(subject: StorageUnderTest) -> None:
    """A key of the initial state, deleted later, does not come back when retention takes the commit that did it."""
    store = subject.new()
    writer = Writer(store, state={"a": [1, 2], "b": "x"})
    writer.write({"b": "x"}, retention=KEEP_ONE)
    writer.write({"b": "xy"}, retention=KEEP_ONE)
    writer.write({"b": "xyz", "c": 1}, retention=KEEP_ONE)
    writer.check(store, [3], "after deleting a key")
    writer.write({"b": "xyz"}, retention=KEEP_ONE)
    writer.write({"a": [1, 2, 3], "b": "xyz"}, retention=KEEP_ONE)
    writer.write({"a": [1, 2, 3, 4], "b": "xyz"}, retention=KEEP_ONE)
    store = subject.again(store)
    writer.check(store, [6], "after setting it again")


def random_states_are_exact(subject: StorageUnderTest) -> None:
    """Random writes, appends, deletions, gaps between checkpoints and prunings against a plain list of states."""
    source = random.Random(20_260_101)
    for _ in range(3):
        store = subject.new()
        writer = Writer(store, state={key: [0] for key in "abc"})
        state: dict[str, Any] = {key: [0] for key in "abc"}
        kept: list[int] = []
        for _ in range(25):
            state = {key: value for key, value in state.items() if source.random() > 0.12}
            for key in source.sample("abcdef", source.randrange(3)):
                longer = [*state.get(key, []), source.randrange(100)]
                state[key] = longer if source.random() < 0.7 else longer[-2:]
            is_checkpoint = source.random() < 0.7
            keep = source.choice((None, None, 1, 2, 4))
            name = f"ckpt_{writer.sequence + 1}" if is_checkpoint else None
            writer.write(state, checkpoint_id=name, retention=Retention(keep))
            if is_checkpoint:
                kept = [*kept, writer.sequence][-(keep or 999) :]
            if source.random() < 0.1 and kept:
                keep = source.randrange(1, 4)
                equal(store.prune("run_1", Retention(keep)), max(0, len(kept) - keep), "how many prune took")
                kept = kept[-keep:]
            writer.check(store, kept, f"after commit {writer.sequence}")


def one_checkpoint_replaces_another(subject: StorageUnderTest) -> None:
    """``replaces`` takes a checkpoint out; those around it keep their exact state."""
    store = subject.new()
    writer = Writer(store, state={"input": 1})
    states = growing_states()
    for _ in range(6):
        writer.write(next(states))
    writer.write(next(states), checkpoint_id="ckpt_3", replaces=3)
    writer.check(store, [1, 2, 4, 5, 6, 7], "after replacing the third")
    row = store.find_checkpoint_row("run_1", "ckpt_3")
    equal(row is not None and row.sequence, 7, "the sequence of the id that was used again")
    writer.write(next(states), checkpoint_id="other", replaces=1)
    writer.check(store, [2, 4, 5, 6, 7, 8], "after replacing the first by another id")
    writer.write(next(states), checkpoint_id="other", replaces=8, retention=Retention(3))
    writer.check(store, [6, 7, 9], "after replacing the newest and pruning")
    writer.write(next(states), checkpoint_id="other")
    row = store.find_checkpoint_row("run_1", "other")
    equal(row is not None and row.sequence, 10, "the newest of two checkpoints with one id")
    writer.check(store, [6, 7, 9, 10], "with two checkpoints of one id")
    writer.write(next(states), replaces=999)
    store = subject.again(store)
    writer.check(store, [6, 7, 9, 10, 11], "after replacing what is not there")
    equal(len(store.read_log("run_1")), 11, "the log of all this")


def checkpoints_are_listed_newest_first(subject: StorageUnderTest) -> None:
    """By sequence, whatever they are called and whatever the clock says."""
    store, clock = subject.new(), subject.clock
    store.open_run(new_run())
    names = ["zz", "b", "a", "10", "9", "Z"]
    for sequence, name in enumerate(names, 1):
        if clock is not None:
            clock.advance(-100)
        accept(store, commit(sequence, checkpoint_id=name))
    store = subject.again(store)
    equal([row.checkpoint_id for row in store.read_checkpoint_rows("run_1")], names[::-1], "the order")
    limited = store.read_checkpoint_rows("run_1", limit=2)
    equal([row.checkpoint_id for row in limited], ["Z", "9"], "the newest two")
    equal(list(store.read_checkpoint_rows("run_1", limit=0)), [], "none")
    equal(found(store).sequence, 6, "the last sequence")


def rewind_forgets_what_came_later(subject: StorageUnderTest) -> None:
    """The state goes back to a checkpoint, the log stays, and the sequence goes on."""
    store = subject.new()
    writer = Writer(store, state={"input": 1})
    states = growing_states()
    for _ in range(6):
        writer.write(next(states))
    token = store.claim_run("run_1", "me", 60).token
    equal(store.rewind("run_1", token, 4), 2, "how many checkpoints rewind took")
    writer.states[5:] = [writer.states[4], writer.states[4]]
    writer.check(store, [1, 2, 3, 4], "after rewinding to 4")
    equal(len(store.read_log("run_1")), 6, "the log")
    equal(store.rewind("run_1", token, 6), 0, "rewinding to the end")
    store = writer.store = subject.again(store)
    writer.write(next(states), token=token)
    writer.write(next(states), token=token, retention=Retention(2))
    writer.check(store, [7, 8], "after going on")
    equal(store.rewind("run_1", token, 0), 2, "rewinding to the start")
    writer.states[1:] = [writer.states[0]] * 8
    writer.check(store, [], "after rewinding to the start")


def deleted_checkpoints_leave_the_log(subject: StorageUnderTest) -> None:
    """Checkpoints and state go, record and log stay, and the run can be written to again."""
    store = subject.new()
    writer = Writer(store, state={"input": 1})
    states = growing_states()
    for _ in range(5):
        writer.write(next(states))
    writer.write(next(states), checkpoint_id=None)
    record = found(store)
    equal(store.delete_checkpoints("run_1"), 5, "how many there were")
    equal(store.delete_checkpoints("run_1"), 0, "how many are left")
    writer.states[1:] = [writer.states[0]] * 6
    writer.check(store, [], "after deleting the checkpoints")
    equal(found(store), record, "the record")
    equal(len(store.read_log("run_1")), 6, "the log")
    store = writer.store = subject.again(store)
    writer.write(next(states), retention=KEEP_ONE)
    writer.write(next(states), retention=KEEP_ONE)
    writer.check(store, [8], "after going on")


def digests_tell_states_apart(subject: StorageUnderTest) -> None:
    """The digest of a state follows from its chunks, the same before and after retention."""
    store = subject.new()
    writer = Writer(store, state={"input": 1})
    digests = []
    for state in itertools.islice(growing_states(), 10):
        writer.write(state)
        digests.append(digest_of(store.read_chunks("run_1", writer.sequence)))
    equal(len(set(digests)), 10, "the number of different digests of ten states")
    store.prune("run_1", Retention(3))
    store = subject.again(store)
    for sequence in (8, 9, 10):
        kept = stored.load_state(store, "run_1", sequence, digests[sequence - 1])
        equal(dict(kept.values), writer.states[sequence], f"the state at {sequence} with its digest")
        with raises(CorruptData, "a state with another's digest"):
            stored.load_state(store, "run_1", sequence, digests[0])


def scoped_keys_are_keys(subject: StorageUnderTest) -> None:
    """Keys of a branch's own state hold NUL and may be long; keys that share a beginning stay apart."""
    store = subject.new()
    state = {f"branch{mark}key": mark for mark in ("\x00", "\x00\x00", "\x1f\x1f", "", " ", "%00")}
    state |= {"k" * 1_000: "long", "k" * 999: "shorter", "ключ": "☃", "a": "1", "A": "2"}
    writer = Writer(store)
    writer.write(state, retention=KEEP_ONE)
    writer.write({**state, "a": "12", f"branch{chr(0)}key": None}, retention=KEEP_ONE)
    writer.write({"a": "12"}, retention=KEEP_ONE)
    store = subject.again(store)
    writer.check(store, [3], "with odd keys")


def runs_do_not_mix(subject: StorageUnderTest) -> None:
    """Many runs written side by side each have their own state, log and checkpoints."""
    store = subject.new()
    writers = [Writer(store, f"run_{number}", {"own": number}) for number in range(5)]
    states = growing_states()
    for turn in range(4):
        for number, writer in enumerate(writers):
            writer.write({**next(states), "own": [number, turn]}, retention=Retention(2))
    before = [snapshot(store, writer.run_id) for writer in writers]
    store.prune("run_0", KEEP_ONE)
    store.delete_checkpoints("run_1")
    store.delete_run("run_2")
    store = subject.again(store)
    equal([snapshot(store, writer.run_id) for writer in writers[3:]], before[3:], "runs nobody touched")
    writers[0].check(store, [4], "the run that was pruned")
    require(store.verify().ok, f"verify found {store.verify().damage}")


def verify_counts_what_it_read(subject: StorageUnderTest) -> None:
    """A whole store is reported as whole, with how much was read."""
    store = subject.new()
    require(store.verify().ok, "verify of an empty store")
    for number in range(3):
        writer = Writer(store, f"run_{number}", {"a": 1})
        writer.write({"a": 1, "b": codec.decode(b"[1]")})
        writer.write({"b": 2})
    report = store.verify()
    equal((report.ok, report.runs, report.checkpoints), (True, 3, 6), f"the report ({report})")
    one = store.verify("run_1")
    equal((one.ok, one.runs, one.checkpoints), (True, 1, 2), f"the report on one run ({one})")


CHECKS: tuple[Check, ...] = (
    commits_are_kept_whole,
    bytes_are_opaque,
    sequences_have_no_gaps,
    refused_commits_leave_no_trace,
    batches_are_independent,
    commits_race_in_order,
    state_changes_with_its_commit,
    commits_need_no_checkpoint,
    retention_keeps_exact_states,
    prune_applies_retention_now,
    deleted_keys_stay_deleted,
    random_states_are_exact,
    one_checkpoint_replaces_another,
    checkpoints_are_listed_newest_first,
    rewind_forgets_what_came_later,
    deleted_checkpoints_leave_the_log,
    digests_tell_states_apart,
    scoped_keys_are_keys,
    runs_do_not_mix,
    verify_counts_what_it_read,
)
