"""The storage contract on the journal: the calls of a step until it commits, and the times that runs wait for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from framework.errors import InvalidId, LeaseLost, RunBusy, RunNotFound, StorageError, ValueTooLarge
from framework.schemas.run import RunState
from framework.storage.checks import MAX_VALUE_BYTES
from framework.storage.chunks import Chunk
from framework.storage.contract import (
    BAD_IDS,
    ODD_IDS,
    Check,
    StorageUnderTest,
    Writer,
    accept,
    commit,
    equal,
    journal,
    new_run,
    race,
    raises,
    refuse,
    require,
    snapshot,
    state_at,
)
from framework.storage.contract_runs import found
from framework.storage.interface import Storage
from framework.storage.records import Commit, JournalRow, Write

Row = tuple[str, int, bytes]


def rows_of(store: Storage, run_id: str = "run_1", step: str | None = None) -> list[Row]:
    """The journal of a run as plain tuples."""
    return [(row.step, row.number, row.record) for row in store.read_journal(run_id, step)]


def journal_rows_are_kept(subject: StorageUnderTest) -> None:
    """Rows come back with their bytes, by step and number, at once and from the store opened again; alone, too."""
    store = subject.new()
    record = store.open_run(new_run(state={"a": 1}), "me", 60)
    store.open_run(new_run("run_2"))
    samples = [b"", b"null", b"\x00\xff\xfe", b'{"a": 1}', b"[ 1 ]", b'{"$raw":1}', "☃".encode(), b"x" * 100_000]
    given: list[Row] = [(step, number, data) for step in ("b", "a") for number, data in enumerate(samples)]
    random.Random(3).shuffle(given)
    accept(store, journal(*given[:5], token=1))
    for row in given[5:]:
        accept(store, journal(row, token=1))
    accept(store, journal(token=1), journal(("a", 0, b"of another run"), run_id="run_2"))
    for seen in subject.before_and_after_reopening(store):
        equal(rows_of(seen), sorted(given), "all rows")
        equal(rows_of(seen, step="a"), sorted(row for row in given if row[0] == "a"), "the rows of one step")
        equal(rows_of(seen, step="c"), [], "the rows of a step without any")
        equal(rows_of(seen, "run_2"), [("a", 0, b"of another run")], "the rows of another run")
        require(all(type(row) is JournalRow for row in seen.read_journal("run_1")), "they are JournalRow objects")
        equal(found(seen), record, "the run itself")
        equal((seen.read_log("run_1"), state_at(seen, 0)), ([], {"a": b"1"}), "its log and state")
        equal(seen.verify().damage, (), "what verify finds")
    accept(seen, commit(1, token=1))  # the sequence goes on from where it was


def outcomes_replace_intents(subject: StorageUnderTest) -> None:
    """A row whose step and number exist takes their place, in the same write, batch, or later."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    accept(store, journal(("s", 1, b"intent"), ("s", 2, b"intent"), ("t", 1, b"other step"), token=1))
    accept(store, journal(("s", 1, b"a longer outcome" * 100), token=1))
    accept(store, journal(("s", 3, b"first"), ("s", 3, b"second"), token=1))
    accept(store, journal(("s", 4, b"first"), token=1), journal(("s", 4, b""), token=1))
    expected = [("s", 1, b"a longer outcome" * 100), ("s", 2, b"intent"), ("s", 3, b"second"), ("s", 4, b"")]
    for seen in subject.before_and_after_reopening(store):
        equal(rows_of(seen), [*expected, ("t", 1, b"other step")], "the rows")


def journal_needs_the_token(subject: StorageUnderTest) -> None:
    """A stale token, a released lease, an unknown run: refused, with no trace. Without a token the run must be free."""
    store = subject.new()
    store.open_run(new_run(), "first", 0)
    row = ("s", 1, b"1")
    accept(store, journal(row, token=1))  # an expired lease that nobody took is still the owner's
    store.claim_run("run_1", "second", 60)
    for stale in (1, 3):
        refuse(store, journal(("s", 1, b"stale"), ("s", 2, b"stale"), token=stale), LeaseLost, f"token {stale}")
    refuse(store, journal(("s", 1, b"free")), RunBusy, "no token while the run is held")
    refuse(store, journal(token=1), LeaseLost, "no rows with a stale token")
    accept(store, journal(("s", 2, b"2"), token=2))
    store.release_lease("run_1", 2)
    refuse(store, journal(("s", 3, b"3"), token=2), LeaseLost, "a released lease")
    accept(store, journal(("s", 4, b"4")))
    equal(rows_of(store), [row, ("s", 2, b"2"), ("s", 4, b"4")], "what was accepted")
    refuse(store, journal(row, run_id="nobody"), RunNotFound, "an unknown run")
    equal((rows_of(store, "nobody"), store.find_run("nobody")), ([], None), "an unknown run after that")


def journal_keys_are_checked(subject: StorageUnderTest) -> None:
    """Steps may be any text, kept apart; what names nothing is refused with ``InvalidId``, and the whole write."""
    store = subject.new()
    store.open_run(new_run())
    steps = (*ODD_IDS, "branch\x00step", "x" * 5_000)
    for number, step in enumerate(steps):
        accept(store, journal((step, number, b"%d" % number)))
    accept(store, journal(("numbers", 2**63 - 1, b"last"), ("numbers", 0, b"first")))
    store = subject.again(store)
    expected = sorted((step, number, b"%d" % number) for number, step in enumerate(steps))
    equal([row for row in rows_of(store) if row[0] != "numbers"], expected, "the rows of odd steps")
    equal([row[2] for row in rows_of(store, step="numbers")], [b"first", b"last"], "the numbers")
    for step in steps:
        equal(len(rows_of(store, step=step)), 1, f"the rows of step {step[:20]!r}")
    bad: tuple[tuple[Any, Any], ...] = (
        ("", 1),
        ("lone\ud800surrogate", 1),
        (7, 1),
        ("s", -1),
        ("s", 2**63),
        ("s", "1"),
    )
    for step, number in bad:
        refuse(store, journal(("good", 1, b""), (step, number, b"")), InvalidId, f"the row {step!r}/{number!r}")
    for step in ("", "\udfff"):
        with raises(InvalidId, f"reading step {step!r}"):
            store.read_journal("run_1", step)
        refuse(store, commit(1, journal_done=[step]), InvalidId, f"a commit that takes step {step!r}")
    for run_id in BAD_IDS:
        refuse(store, journal(("s", 1, b""), run_id=run_id), InvalidId, f"a write to run {run_id[:20]!r}")
        with raises(InvalidId, f"the journal of run {run_id[:20]!r}"):
            store.read_journal(run_id)


def batches_mix_commits_and_journals(subject: StorageUnderTest) -> None:
    """In one call, in order: what is refused touches nothing else, whichever kind it is."""
    store = subject.new()
    for run_id in ("run_1", "run_2"):
        store.open_run(new_run(run_id), "me", 60)
    batch: list[tuple[Write, type[Exception] | None]] = [
        (journal(("s", 1, b"a"), ("s", 2, b"b"), token=1), None),
        (commit(2, token=1, journal_done=["s"]), StorageError),
        (journal(("s", 3, b"c"), token=9), LeaseLost),
        (journal(("s", 4, b"d"), ("", 1, b""), token=1), InvalidId),
        (journal(("s", 5, b"e"), run_id="run_2", token=1), None),
        (commit(1, token=1, chunks=[Chunk("a", "set", b"1")]), None),
        (journal(("s", 1, b"A"), token=1), None),
        (commit(1, "run_2", 1, journal_done=["s"]), None),
        (journal(("s", 6, b"f"), run_id="run_2", token=1), None),
        (commit(2, "nobody", journal_done=["s"]), RunNotFound),
        (journal(("s", 7, b"g"), run_id="nobody"), RunNotFound),
    ]
    outcomes = store.commit([write for write, _ in batch])
    for (write, kind), outcome in zip(batch, outcomes, strict=True):
        fits = outcome is None if kind is None else isinstance(outcome, kind)
        require(fits, f"expected {kind}, found {outcome!r} for {write}")
    for seen in subject.before_and_after_reopening(store):
        equal(rows_of(seen), [("s", 1, b"A"), ("s", 2, b"b")], "the journal of run_1")
        equal(rows_of(seen, "run_2"), [("s", 6, b"f")], "the journal of run_2")
        equal((found(seen).sequence, found(seen, "run_2").sequence), (1, 1), "the sequences")


def rows_go_with_the_commit_of_their_step(subject: StorageUnderTest) -> None:
    """``journal_done`` takes the rows of these steps and no others; new rows of such a step are kept again."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    accept(store, journal(("a", 1, b"1"), ("a", 2, b"2"), ("b", 1, b"3"), ("c", 1, b"4"), token=1))
    accept(store, journal(("b", 2, b"5"), token=1))
    accept(store, commit(1, token=1, journal_done=["a", "c", "unknown"]))
    store = subject.again(store)
    equal(rows_of(store), [("b", 1, b"3"), ("b", 2, b"5")], "what is left")
    accept(store, journal(("a", 2, b"again"), token=1))
    accept(store, commit(2, token=1))
    equal(rows_of(store), [("a", 2, b"again"), ("b", 1, b"3"), ("b", 2, b"5")], "rows after a commit that takes none")
    before = snapshot(store)
    refuse(store, commit(7, token=1, journal_done=["a", "b"]), StorageError, "a commit out of order that takes rows")
    refuse(store, commit(3, token=8, journal_done=["a", "b"]), LeaseLost, "a stale commit that takes rows")
    equal(snapshot(store), before, "the journal after the refusals")
    accept(store, commit(3, token=1, checkpoint_id=None, journal_done=("b",), state=RunState.FAILED, release=True))
    store = subject.again(store)
    equal(rows_of(store), [("a", 2, b"again")], "what is left in the end")


def journal_goes_with_its_run(subject: StorageUnderTest) -> None:
    """Deleting the run or its checkpoints removes its journal, and only its; a fork has none; rewind leaves it."""
    store = subject.new()
    for run_id in ("run_1", "run_2"):
        writer = Writer(store, run_id, {"a": 0})
        for number in range(3):
            writer.write({"a": number})
        accept(store, journal(("s", 1, b"1"), run_id=run_id))
    store.fork_run("run_1", 2, b"{}", commit(3, "fork", state=RunState.PAUSED))
    equal(rows_of(store, "fork"), [], "the journal of a fork")
    token = store.claim_run("run_1", "me", 60).token
    accept(store, journal(("s", 2, b"2"), token=token))
    store.rewind("run_1", token, 1)
    equal(rows_of(store), [("s", 1, b"1"), ("s", 2, b"2")], "the journal after rewind")
    store.release_lease("run_1", token)
    store.delete_checkpoints("run_1")
    equal(rows_of(store), [], "the journal after delete_checkpoints")
    accept(store, journal(("s", 3, b"3")))
    equal(rows_of(store), [("s", 3, b"3")], "a row written after that")
    store.delete_run("run_1")
    equal(rows_of(store), [], "the journal of a deleted run")
    store.open_run(new_run())
    store = subject.again(store)
    equal((rows_of(store), rows_of(store, "run_2")), ([], [("s", 1, b"1")]), "a new run of the id, and another run")


def finished_calls_are_progress(subject: StorageUnderTest) -> None:
    """A write that tells of progress sets ``recovery_attempts`` to 0, together with its rows; no other write does."""
    store = subject.new()
    store.open_run(new_run(), "me", 0)
    store.open_run(new_run("run_2"), "me", 0)
    for attempts in (1, 2):
        token = store.claim_run("run_1", f"owner {attempts}", 0).token
    other = store.claim_run("run_2", "owner", 0)
    refuse(store, journal(("s", 1, b"stale"), token=token + 1, progress=True), LeaseLost, "progress with a stale token")
    refuse(store, journal(("", 1, b"bad"), token=token, progress=True), InvalidId, "progress with a row of no step")
    accept(store, journal(("s", 1, b"intent"), token=token), journal(("s", 2, b"1"), ("s", 3, b"2"), token=token))
    equal(found(store).recovery_attempts, 2, "attempts after writes that are no progress")
    accept(store, journal(("s", 1, b"outcome"), token=token, progress=True))
    for seen in subject.before_and_after_reopening(store):
        record = found(seen)
        equal((record.recovery_attempts, record.token, record.sequence), (0, token, 0), "the run after progress")
        equal(rows_of(seen), [("s", 1, b"outcome"), ("s", 2, b"1"), ("s", 3, b"2")], "its rows")
        equal(found(seen, "run_2"), other, "another run")
    store = seen
    for attempts in (1, 2):
        token = store.claim_run("run_1", f"owner {attempts}", 0).token
        equal(found(store).recovery_attempts, attempts, "attempts after crashes that followed progress")
    accept(store, commit(1, token=token, progress=True))
    token = store.claim_run("run_1", "owner", 0).token
    several = journal(("s", 4, b""), ("t", 1, b""), token=token, progress=True)
    accept(store, several, commit(2, token=token, journal_done=["s"]))
    equal(found(store).recovery_attempts, 0, "attempts after several rows that are progress, in a batch with a commit")
    equal(rows_of(store), [("t", 1, b"")], "the rows of that")


def concurrent_journal_writes_all_stay(subject: StorageUnderTest) -> None:
    """Threads that write rows of one step at once lose none."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    count = 8

    def write(index: int) -> None:
        for number in range(5):
            accept(store, journal(("s", index * 10 + number, b"%d" % index), token=1))

    equal(race(count, write), [None] * count, "what the threads came to")
    expected = [("s", index * 10 + number, b"%d" % index) for index in range(count) for number in range(5)]
    equal(rows_of(store), expected, "the rows")


def large_values_are_kept_or_refused(subject: StorageUnderTest) -> None:
    """Values of 50 MB are stored; above ``MAX_VALUE_BYTES`` each is refused, naming the limit, and nothing is left."""
    store = subject.new()
    store.open_run(new_run())
    large = b'"' + b"0123456789abcdef" * 3_125_000 + b'"'
    accept(store, journal(("s", 1, large)))
    store = subject.again(store)
    kept = rows_of(store)
    require(len(kept) == 1 and kept[0][2] == large, "a journal row of 50 MB did not come back as it was")
    accept(store, commit(1, chunks=[Chunk("large", "set", large)], journal_done=["s"]))
    del kept
    store = subject.again(store)
    require(state_at(store, 1)["large"] == large, "a value of 50 MB did not come back as it was")
    store.delete_checkpoints("run_1")
    too_large = bytes(MAX_VALUE_BYTES + 1)  # pages of zeros that nobody touches take no memory
    attempts: dict[str, Write] = {
        "a journal row": journal(("s", 1, b"fine"), ("s", 2, too_large)),
        "a chunk": commit(2, chunks=[Chunk("key", "set", too_large)]),
        "a record": commit(2, record=too_large),
        "a log": commit(2, log=too_large),
        "a checkpoint": commit(2, checkpoint=too_large),
    }
    for what, write in attempts.items():
        error = refuse(store, write, ValueTooLarge, f"{what} above the limit")
        require(f"{MAX_VALUE_BYTES:,}" in str(error), f"the refusal of {what} does not name the limit: {error}")
    accept(store, commit(2))
    with raises(ValueTooLarge, "a message above the limit"):
        store.send("run_1", "m", too_large)
    for fields in ({"header": too_large}, {"definition": too_large, "fingerprint": "large"}):
        with raises(ValueTooLarge, "a new run above the limit"):
            store.open_run(new_run("run_2", **fields))
    equal((store.read_messages("run_1"), store.find_run("run_2")), ([], None), "what is left of those")


# --- times to wake at -----------------------------------------------------------------------------------------------


def pause(run_id: str, wake_at: float | None, sequence: int = 1, token: int = 1, **fields: Any) -> Commit:
    """A commit after which the run waits for a time."""
    return commit(sequence, run_id, token, state=RunState.PAUSED, wake_at=wake_at, release=True, **fields)


def due(store: Storage, *arguments: Any) -> list[str]:
    """The ids of the runs that are due."""
    return [record.run_id for record in store.list_due(*arguments)]


def paused_runs_become_due(subject: StorageUnderTest) -> None:
    """``wake_at`` is kept with the run, and ``list_due`` gives the paused runs whose time has come, earliest first."""
    store = subject.new()
    times = {"c": 20.0, "a": 30.0, "b": 20.0, "never": None, "far": 4e12}
    for run_id, wake_at in times.items():
        store.open_run(new_run(run_id), "me", 60)
        equal(found(store, run_id).wake_at, None, "the time of a new run")
        accept(store, pause(run_id, wake_at))
    for seen in subject.before_and_after_reopening(store):
        equal({run_id: found(seen, run_id).wake_at for run_id in times}, dict(times), "the times")
        equal(due(seen, 19.999), [], "what is due before any")
        equal(due(seen, 20.0), ["b", "c"], "what is due at the first time")
        equal(due(seen, 30.0), ["b", "c", "a"], "what is due at the second")
        equal(due(seen, 30.0, 1), ["b"], "at most one of them")
        equal(due(seen, 30.0, 0), [], "at most none of them")
        for limit in (1, 2, 3):
            pages, last = list[str](), None
            while page := seen.list_due(30.0, limit, last):
                require(len(page) <= limit, f"a page of {limit} runs has {len(page)}")
                last = page[-1]
                pages += [record.run_id for record in page]
            equal(pages, ["b", "c", "a"], f"pages of {limit}")
        gone = replace(found(seen, "b"), run_id="bb")
        equal(due(seen, 30.0, 5, gone), ["c", "a"], "the next after a run that is gone")
        gone = replace(gone, wake_at=25.0)
        equal(due(seen, 30.0, 5, gone), ["a"], "the next after a time between")
        equal(due(seen, 25.0, 5, gone), [], "the next after the last that is due")
        equal(due(seen), ["b", "c", "a"], "what is due by the store's clock")
        equal(seen.list_due(20.0), [found(seen, "b"), found(seen, "c")], "the records")
        equal(sorted(record.wake_at or 0.0 for record in seen.list_runs([RunState.PAUSED]))[-1], 4e12, "as listed")


def the_stores_clock_says_what_is_due(subject: StorageUnderTest) -> None:
    """With a clock that can be moved: a run becomes due at its time, not before."""
    store, clock = subject.new(), subject.clock
    if clock is None:
        return  # this store's clock cannot be moved; times long past and far ahead, used elsewhere, cover it
    store.open_run(new_run(), "me", 60)
    accept(store, pause("run_1", clock.now + 100))
    clock.advance(99)
    equal(due(store), [], "a second before its time")
    clock.advance(1)
    equal(due(store), ["run_1"], "at its time")


def waking_times_are_cleared(subject: StorageUnderTest) -> None:
    """A claim, and any later state, clears ``wake_at``; a commit without a state leaves it."""
    store = subject.new()
    states = (RunState.CANCELLED, RunState.FAILED, RunState.RUNNING, RunState.COMPLETED, RunState.PAUSED)
    for state in states:
        store.open_run(new_run(state.value), "me", 60)
        accept(store, pause(state.value, 5.0))
        accept(store, commit(2, state.value), journal(("s", 1, b""), run_id=state.value))
        equal(found(store, state.value).wake_at, 5.0, "the time after a commit without a state")
        accept(store, commit(3, state.value, state=state))
        equal(found(store, state.value).wake_at, None, f"the time after the state {state.value}")
    equal(due(store), [], "what is due after that")
    store.open_run(new_run("claimed"), "me", 60)
    accept(store, pause("claimed", 5.0))
    equal(due(store), ["claimed"], "what is due before the claim")
    equal(store.claim_run("claimed", "you", 60).wake_at, None, "the time that claim_run returns")
    for seen in subject.before_and_after_reopening(store):
        equal((found(seen, "claimed").wake_at, due(seen)), (None, []), "after the claim")
    accept(seen, pause("claimed", 6.0, 2, 2), pause("claimed", 7.0, 3, 0))
    equal(found(seen, "claimed").wake_at, 7.0, "a later time")
    seen.delete_run("claimed")
    equal(due(seen), [], "what is due when the run is gone")


def waking_times_are_checked(subject: StorageUnderTest) -> None:
    """A time is given with the state paused, and is a number; forks have the time of their first commit."""
    store = subject.new()
    Writer(store, state={"a": 1}).write({"a": 2})
    for state in (None, RunState.RUNNING, RunState.FAILED, RunState.COMPLETED):
        refuse(store, commit(2, state=state, wake_at=5.0), StorageError, f"a time with the state {state}")
    for wake_at in (float("nan"), float("inf"), float("-inf")):
        refuse(store, pause("run_1", wake_at, 2, 0), StorageError, f"the time {wake_at}")
    accept(store, pause("run_1", 5.0, 2, 0))
    forked = store.fork_run("run_1", 2, b"{}", commit(3, "fork", state=RunState.PAUSED))
    equal((forked.wake_at, due(store)), (None, ["run_1"]), "a fork of a run with a time")
    forked = store.fork_run("run_1", 2, b"{}", commit(3, "fork 2", state=RunState.PAUSED, wake_at=4.0))
    equal((forked.wake_at, due(store)), (4.0, ["fork 2", "run_1"]), "a fork with a time of its own")


CHECKS: tuple[Check, ...] = (
    journal_rows_are_kept,
    outcomes_replace_intents,
    journal_needs_the_token,
    journal_keys_are_checked,
    batches_mix_commits_and_journals,
    rows_go_with_the_commit_of_their_step,
    journal_goes_with_its_run,
    finished_calls_are_progress,
    concurrent_journal_writes_all_stay,
    large_values_are_kept_or_refused,
    paused_runs_become_due,
    the_stores_clock_says_what_is_due,
    waking_times_are_cleared,
    waking_times_are_checked,
)
