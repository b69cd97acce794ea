"""The storage contract on messages, and on finding runs by the beginning of their ids."""

from __future__ import annotations

from framework.errors import InvalidId, MessageRefused, RunNotFound
from framework.schemas.run import RunState
from framework.storage.contract import (
    BAD_IDS,
    ODD_IDS,
    Check,
    StorageUnderTest,
    accept,
    commit,
    equal,
    new_run,
    race,
    raises,
    require,
    snapshot,
)
from framework.storage.records import Message, Retention


def messages_are_kept(subject: StorageUnderTest) -> None:
    """A message comes back with its bytes, in the order of sending, at once and from the store opened again."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    store.open_run(new_run("run_2"))
    before = snapshot(store)
    bodies = [b"", b"null", b"\x00\xff", b'{"a": 1}', b"[ 1 ]", "☃".encode(), b"x" * 100_000]
    for number, body in enumerate(bodies):
        if subject.clock is not None:
            subject.clock.advance(-1 if number % 2 else 5)  # the order is that of sending, not of the clock
        store.send("run_1", f"m{10 - number}", body)
    equal(snapshot(store), before, "the run itself after messages were left for it")
    for seen in subject.before_and_after_reopening(store):
        found = seen.read_messages("run_1")
        equal([each.body for each in found], bodies, "the bodies")
        equal([each.name for each in found], [f"m{10 - number}" for number in range(len(bodies))], "the names")
        require(all(type(each) is Message and each.run_id == "run_1" for each in found), "they are of the run")
        require(all(each.sent_at > 0 for each in found), "they say when they were sent")
        equal(seen.read_messages("run_2"), [], "the messages of another run")
        equal(seen.count_messages(["run_1", "run_2", "nobody"]), {"run_1": len(bodies)}, "their numbers")
        equal(seen.count_messages([]), {}, "the numbers of no runs")
        equal(seen.verify().damage, (), "what verify finds")


def message_names_are_taken_once(subject: StorageUnderTest) -> None:
    """The second message of a name is refused and changes nothing, whatever the run did meanwhile."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    store.open_run(new_run("run_2"))
    store.send("run_1", "answer", b"first")
    store.send("run_2", "answer", b"other")
    accept(store, commit(1, token=1, state=RunState.PAUSED, release=True, retention=Retention(1)))
    store.claim_run("run_1", "you", 60)
    store = subject.again(store)
    try:
        store.send("run_1", "answer", b"second")
    except MessageRefused as error:
        equal((error.run_id, error.name), ("run_1", "answer"), "the run and name that the refusal says")
    else:
        raise AssertionError("A second message of one name was taken")
    equal([each.body for each in store.read_messages("run_1")], [b"first"], "the message after the refusal")
    equal([each.body for each in store.read_messages("run_2")], [b"other"], "the other run's")


def message_names_have_one_winner(subject: StorageUnderTest) -> None:
    """Of threads that send under one name at once, one wins; under names of their own, all do."""
    store = subject.new()
    store.open_run(new_run())
    results = race(6, lambda index: store.send("run_1", "one", b"%d" % index))
    won = [index for index, result in enumerate(results) if result is None]
    lost = [result for result in results if isinstance(result, MessageRefused)]
    equal((len(won), len(lost)), (1, 5), f"winners and losers of one name ({results})")
    equal([each.body for each in store.read_messages("run_1")], [b"%d" % won[0]], "the message of the winner")
    results = race(6, lambda index: store.send("run_1", f"own {index}", b"%d" % index))
    equal(results, [None] * 6, "senders under names of their own")
    names = sorted(each.name for each in store.read_messages("run_1"))
    equal(names, sorted(["one", *(f"own {index}" for index in range(6))]), "all that was sent")


def completed_runs_take_no_messages(subject: StorageUnderTest) -> None:
    """A completed run refuses messages; one that is running, crashed, failed, paused or cancelled takes them."""
    store = subject.new()
    for state in (RunState.FAILED, RunState.PAUSED, RunState.CANCELLED, RunState.COMPLETED):
        store.open_run(new_run(state.value), "me", 60)
        store.send(state.value, "before", b"1")
        accept(store, commit(1, state.value, 1, state=state, release=True))
    store.open_run(new_run("crashed"))
    for run_id in ("failed", "paused", "cancelled", "crashed"):
        store.send(run_id, "after", b"2")
        equal([each.name for each in store.read_messages(run_id)][-1], "after", f"the last message to a {run_id} run")
    with raises(MessageRefused, "a message to a completed run"):
        store.send("completed", "after", b"2")
    equal([each.name for each in store.read_messages("completed")], ["before"], "what a completed run keeps")
    with raises(RunNotFound, "a message to an unknown run"):
        store.send("nobody", "after", b"2")
    equal((store.read_messages("nobody"), store.find_run("nobody")), ([], None), "an unknown run after that")


def message_names_may_be_odd(subject: StorageUnderTest) -> None:
    """Names that look like paths are kept apart; those that name nothing are refused with ``InvalidId``."""
    store = subject.new()
    store.open_run(new_run())
    names = (*ODD_IDS, "x" * 1_000)
    for number, name in enumerate(names):
        store.send("run_1", name, b"%d" % number)
    store = subject.again(store)
    equal([each.name for each in store.read_messages("run_1")], list(names), "the names")
    equal([each.body for each in store.read_messages("run_1")], [b"%d" % n for n in range(len(names))], "the bodies")
    for bad in BAD_IDS:
        with raises(InvalidId, f"the name {bad[:20]!r}"):
            store.send("run_1", bad, b"")
        with raises(InvalidId, f"a message to {bad[:20]!r}"):
            store.send(bad, "name", b"")
        with raises(InvalidId, f"the messages of {bad[:20]!r}"):
            store.read_messages(bad)
    equal(len(store.read_messages("run_1")), len(names), "the messages after what was refused")


def messages_go_with_their_run(subject: StorageUnderTest) -> None:
    """``delete_run`` removes the run's messages, and only its; a new run of the id has none."""
    store = subject.new()
    for run_id in ("run_1", "run_2"):
        store.open_run(new_run(run_id))
        store.send(run_id, "m", b"1")
    store.delete_run("run_1")
    equal(store.read_messages("run_1"), [], "the messages of a deleted run")
    equal(len(store.read_messages("run_2")), 1, "the messages of another")
    store.open_run(new_run("run_1"))
    store = subject.again(store)
    equal(store.read_messages("run_1"), [], "the messages of a new run of the id")
    store.send("run_1", "m", b"2")
    store.delete_checkpoints("run_1")
    equal([each.body for each in store.read_messages("run_1")], [b"2"], "its own message")


def runs_are_found_by_prefix(subject: StorageUnderTest) -> None:
    """``find_runs`` gives the runs whose id begins so, by id, an equal one first; no text is a pattern."""
    store = subject.new()
    ids = ["run", "run_1", "run_10", "run_2", "Run", "rum", "r%n", "r_n", "rün", "run\U0010ffffa", "run☃", "x" * 255]
    for run_id in ids:
        store.open_run(new_run(run_id), "me", 60)
    store = subject.again(store)
    for prefix in (
        "",
        "r",
        "run",
        "run_1",
        "run_10",
        "run_10 ",
        "R",
        "r%",
        "r_",
        "rü",
        "run\U0010ffff",
        "x" * 255,
        "é",
    ):
        expected = sorted(run_id for run_id in ids if run_id.startswith(prefix))
        found = store.find_runs(prefix)
        equal([record.run_id for record in found], expected, f"the runs that begin with {prefix[:20]!r}")
        equal(found, [store.find_run(run_id) for run_id in expected], "their records")
        equal([record.run_id for record in store.find_runs(prefix, 2)], expected[:2], "at most two of them")
    for bad in ("nul\x00", "\ud800", "x" * 256):
        with raises(InvalidId, f"the beginning {bad[:20]!r}"):
            store.find_runs(bad)


CHECKS: tuple[Check, ...] = (
    messages_are_kept,
    message_names_are_taken_once,
    message_names_have_one_winner,
    completed_runs_take_no_messages,
    message_names_may_be_odd,
    messages_go_with_their_run,
    runs_are_found_by_prefix,
)
