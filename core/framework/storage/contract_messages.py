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


def paused_runs_with_messages_are_listed(subject: StorageUnderTest) -> None:
    """``list_messaged`` gives the paused runs that have a message, by id and in pages; no other run."""
    store = subject.new()
    ids = ["c", "a", "e", "b☃", "b", "\U0010ffffz", "\uffffz", "run 10", "run 2", "B", *ODD_IDS[:3]]
    for run_id in (*ids, "without a message"):
        store.open_run(new_run(run_id), "me", 60)
        accept(store, commit(1, run_id, 1, state=RunState.PAUSED, release=True))
    for number, run_id in enumerate(ids):
        store.send(run_id, "m", b"1")
        if number % 2:
            store.send(run_id, "n", b"2")
    for state in (RunState.RUNNING, RunState.FAILED, RunState.CANCELLED, RunState.COMPLETED):
        store.open_run(new_run(f"is {state.value}"), "me", 60)
        store.send(f"is {state.value}", "m", b"1")
        accept(store, commit(1, f"is {state.value}", 1, state=state))
    for seen in subject.before_and_after_reopening(store):
        listed = seen.list_messaged()
        equal([record.run_id for record in listed], sorted(ids), "the paused runs with messages")
        equal(listed, [seen.find_run(record.run_id) for record in listed], "their records")
        for limit in (1, 3, len(ids)):
            pages, after = list[str](), ""
            while page := seen.list_messaged(limit, after):
                require(len(page) <= limit, f"a page of {limit} runs has {len(page)}")
                after = page[-1].run_id
                pages += [record.run_id for record in page]
            equal(pages, sorted(ids), f"pages of {limit}")
        equal(seen.list_messaged(0), [], "at most none of them")
        equal([record.run_id for record in seen.list_messaged(1, "b")], ["b☃"], "the next after b")
        equal([record.run_id for record in seen.list_messaged(1, "bb")], ["b☃"], "the next after no run's id")
        equal(seen.list_messaged(after="\U0010ffffz"), [], "the next after the last")
    for bad in ("nul\x00", "\ud800", "x" * 256):
        with raises(InvalidId, f"the runs after {bad[:20]!r}"):
            seen.list_messaged(after=bad)


def runs_with_messages_come_and_go(subject: StorageUnderTest) -> None:
    """A run is in ``list_messaged`` from its pause and first message on, until it is claimed, ends or is deleted."""
    store = subject.new()

    def listed() -> list[str]:
        return [record.run_id for record in store.list_messaged()]

    for run_id in ("run_1", "run_2"):
        store.open_run(new_run(run_id), "me", 60)
        store.send(run_id, "early", b"1")
    equal(listed(), [], "before they pause")
    accept(store, *(commit(1, run_id, 1, state=RunState.PAUSED, release=True) for run_id in ("run_1", "run_2")))
    equal(listed(), ["run_1", "run_2"], "when they have paused")
    token = store.claim_run("run_1", "you", 60).token
    equal(listed(), ["run_2"], "when one is claimed")
    accept(store, commit(2, token=token, checkpoint_id=None, state=RunState.PAUSED, wake_at=5.0, release=True))
    equal(listed(), ["run_1", "run_2"], "when it has paused again, with a time to wake at, too")
    first = commit(2, "fork", state=RunState.PAUSED)
    store.fork_run("run_1", 1, b"{}", first)
    equal(listed(), ["run_1", "run_2"], "after a fork, which takes no messages")
    store.send("fork", "m", b"1")
    store.delete_run("run_2")
    equal(listed(), ["fork", "run_1"], "when one is deleted and the fork has a message")
    store.open_run(new_run("run_2"), "me", 60)
    accept(store, commit(1, "run_2", 1, state=RunState.PAUSED, release=True))
    accept(store, commit(3, state=RunState.COMPLETED))
    equal(listed(), ["fork"], "when one is completed, and a new run has the id of the deleted one")


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
    paused_runs_with_messages_are_listed,
    runs_with_messages_come_and_go,
    runs_are_found_by_prefix,
)
