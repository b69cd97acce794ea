"""The storage contract on retention: pins outlive it, sweeps remove whole runs in steps, and nothing else goes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import timedelta

from framework.errors import CheckpointNotFound, InvalidId, RunNotFound, RunPinned
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import Run, RunState
from framework.storage.chunks import Chunk
from framework.storage.contract import (
    KEEP_ONE,
    Check,
    StorageUnderTest,
    Writer,
    accept,
    commit,
    digest_of,
    equal,
    growing_states,
    journal,
    new_run,
    race,
    raises,
    require,
    snapshot,
    state_at,
)
from framework.storage.interface import Storage
from framework.storage.records import Retention, RunRecord
from framework.storage.retention_records import Pin, Retired

FINISHED = (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)


def ended(
    store: Storage, run_id: str, state: RunState = RunState.COMPLETED, parent: str | None = None, size: int = 10
) -> RunRecord:
    """A run with one commit that leaves it in ``state``."""
    store.open_run(new_run(run_id, {"a": 1}, parent_run_id=parent, fingerprint=f"f-{run_id}"))
    accept(store, commit(1, run_id, state=state, chunks=[Chunk("b", "set", b'"%b"' % (b"x" * size))]))
    return found(store, run_id)


def found(store: Storage, run_id: str) -> RunRecord:
    """The run, which must be there."""
    record = store.find_run(run_id)
    if record is None:
        raise AssertionError(f"run {run_id!r} is gone")
    return record


def purge(store: Storage) -> None:
    """Remove all that retired runs held."""
    for _ in range(10_000):
        if not store.purge(0.0):
            return
    raise AssertionError("purge never ends")


def ids(runs: Sequence[RunRecord]) -> list[str]:
    """Their ids."""
    return [run.run_id for run in runs]


def pinned_checkpoints_outlive_retention(subject: StorageUnderTest) -> None:
    """A pinned checkpoint stays with its exact state, at commits, ``prune`` and ``prune_older``; unpinned, it goes."""
    store = subject.new()
    writer = Writer(store, state={"input": 1, "gone": "x"})
    states = growing_states()
    pinned: list[int] = []
    for number in range(1, 25):
        state = next(states)
        if number < 6:
            state["gone"] = number
        writer.write(state, retention=KEEP_ONE if number > 3 else None)
        if number in (2, 9, 10, 17):
            store.pin("run_1", f"ckpt_{number}", f"note {number}")
            pinned.append(number)
        if number > 3:
            writer.check(store, sorted({*pinned, number}), f"after commit {number}")
    for seen in subject.before_and_after_reopening(store):
        equal([pin.sequence for pin in seen.list_pins()], pinned, "the pins")
        equal(seen.list_pins(["run_1"])[1].note, "note 9", "the note")
        equal(seen.list_pins(["run_1"])[1].checkpoint_id, "ckpt_9", "the checkpoint's id")
        equal(seen.list_pins(["other"]), [], "the pins of another run")
        equal(seen.prune("run_1", Retention(1)), 0, "pruning to one")
        equal(seen.prune_older("run_1", 1e15), 0, "pruning by age")
        writer.check(seen, [*pinned, 24], "after pruning")
        equal(seen.verify().damage, (), "what verify finds")
        store = seen
    equal(store.unpin("run_1", "ckpt_9"), True, "unpinning")
    equal(store.unpin("run_1", "ckpt_9"), False, "unpinning again")
    equal(store.prune("run_1", Retention(1)), 1, "pruning what is no longer pinned")
    writer.check(store, [2, 10, 17, 24], "after unpinning")
    writer.store = store
    writer.write({"all": "new"}, retention=Retention(2))
    writer.check(store, [2, 10, 17, 24, 25], "after a commit that keeps two")
    store.fork_run("run_1", 10, b"{}", commit(11, "fork", checkpoint_id="fork", state=RunState.PAUSED))
    equal(state_at(store, 10, "fork"), writer.states[10], "a fork of a pinned checkpoint")
    equal(store.list_pins(["fork"]), [], "the pins of a fork")


def pins_are_named_and_checked(subject: StorageUnderTest) -> None:
    """Pins of runs and checkpoints: noted anew, listed in order, refused for what is not there."""
    store = subject.new()
    writer = Writer(store)
    writer.write({"a": 1})
    writer.write({"a": 2}, checkpoint_id="twice")
    writer.write({"a": 3}, checkpoint_id="twice")
    Writer(store, "run_0")
    with raises(RunNotFound, "pinning an unknown run"):
        store.pin("nobody")
    with raises(CheckpointNotFound, "pinning an unknown checkpoint"):
        store.pin("run_1", "nothing")
    for bad in ("", "a\x00", "\ud800"):
        with raises(InvalidId, f"pinning run {bad!r}"):
            store.pin(bad)
        with raises(InvalidId, f"pinning checkpoint {bad!r}"):
            store.pin("run_1", bad)
    with raises(InvalidId, "a note that is too long"):
        store.pin("run_1", note="x" * 1_001)
    equal((store.unpin("run_1"), store.unpin("nobody"), store.unpin("run_1", "nothing")), (False,) * 3, "unpin")
    store.pin("run_1", "twice")
    store.pin("run_1", note="é")
    store.pin("run_0", note="first")
    again = store.pin("run_0", note="second")
    if subject.clock is not None:
        subject.clock.advance(5)
        equal(again.pinned_at, subject.clock.now - 5, "when it was pinned")
        equal(store.pin("run_0", note="second"), again, "what pinning again gives")
    listed = [(pin.run_id, pin.sequence, pin.checkpoint_id, pin.note) for pin in subject.again(store).list_pins()]
    expected = [("run_0", 0, None, "second"), ("run_1", 0, None, "é"), ("run_1", 3, "twice", "")]
    equal(listed, expected, "the pins")


def pins_refuse_deletion(subject: StorageUnderTest) -> None:
    """Deleting what is pinned is refused and changes nothing; with ``force`` it goes, with its pins."""
    store = subject.new()
    for run_id, checkpoint_id in (("run_1", None), ("run_2", "ckpt_1")):
        writer = Writer(store, run_id)
        writer.write({"a": 1})
        writer.write({"a": 2})
        store.pin(run_id, checkpoint_id)
        before = snapshot(store, run_id)
        for what in (store.delete_run, store.delete_checkpoints):
            with raises(RunPinned, f"{what.__name__} of {run_id}"):
                what(run_id)
        equal(snapshot(store, run_id), before, "the run after the refusals")
    equal(store.delete_checkpoints("run_2", force=True), 2, "how many went by force")
    equal([pin.run_id for pin in store.list_pins()], ["run_1"], "the pins left")
    equal(store.delete_run("run_2"), True, "deleting what is no longer pinned")
    equal(store.delete_run("run_1", force=True), True, "deleting by force")
    Writer(store, "run_1")
    equal(store.list_pins(), [], "the pins of a new run of this id")


def rewinding_respects_pins(subject: StorageUnderTest) -> None:
    """A rewind never takes a pinned checkpoint that can be read, and keeps the pins before it."""
    store = subject.new()
    writer = Writer(store)
    for number in range(5):
        writer.write({"a": list(range(number))})
    store.pin("run_1", "ckpt_2")
    store.pin("run_1", "ckpt_4")
    token = store.claim_run("run_1", "me", 60).token
    with raises(RunPinned, "rewinding past a pin"):
        store.rewind("run_1", token, 3)
    writer.check(store, [1, 2, 3, 4, 5], "after the refusal")
    equal(store.rewind("run_1", token, 4), 1, "rewinding to the pinned one")
    equal([pin.sequence for pin in store.list_pins()], [2, 4], "the pins left")


def unknown_types_are_no_damage(subject: StorageUnderTest) -> None:
    """A checkpoint whose types this program does not know stays pinned, and counts as whole if its state is."""
    store = subject.new()
    writer = Writer(store)
    writer.write({"a": 1})
    for a, digest in ((2, _digest_at(store, 1, "[2]")), (3, "0" * 16), (4, "f" * 16)):
        body = b'{"v":1,"digest":"%b","context":{"$t":"obj","c":"nobody.Knows","v":1}}' % digest.encode()
        writer.write({"a": [a]}, checkpoint=body)
    store.pin("run_1", "ckpt_2")
    token = store.claim_run("run_1", "me", 60).token
    with raises(RunPinned, "rewinding past a pin of unknown types"):
        store.rewind("run_1", token, 1)
    writer.check(store, [1, 2, 3, 4], "after the refusal")
    # The two newest are damaged: their states are not those they say.
    equal(store.unpin("run_1", "ckpt_2"), True, "taking the pin away")
    equal(store.prune("run_1", KEEP_ONE), 1, "how many went beside damaged ones")
    store.pin("run_1", "ckpt_4")
    equal(store.rewind("run_1", token, 2), 2, "rewinding past a pinned one that is damaged")
    equal([row.sequence for row in store.read_checkpoint_rows("run_1")], [2], "the checkpoints after the rewind")


def _digest_at(store: Storage, sequence: int, a: str) -> str:
    """The digest of the state at a sequence, once its key ``a`` is set to the JSON ``a``."""
    chunks = [chunk for chunk in store.read_chunks("run_1", sequence) if chunk.key != "a"]
    return digest_of([*chunks, Chunk("a", "set", a.encode())])


def replacing_spares_pins(subject: StorageUnderTest) -> None:
    """A commit that takes the place of a pinned checkpoint leaves it, also under the same id."""
    store = subject.new()
    writer = Writer(store)
    for number in range(1, 4):
        writer.write({"a": number, "list": list(range(number))})
    store.pin("run_1", "ckpt_2")
    writer.write({"a": 4}, checkpoint_id="ckpt_2", replaces=2)
    writer.check(store, [1, 2, 3, 4], "after the replacement")
    writer.write({"a": 5}, checkpoint_id="other", replaces=4)
    writer.check(store, [1, 2, 3, 5], "after a replacement of one that is not pinned")
    equal([pin.sequence for pin in store.list_pins()], [2], "the pins")


def ended_runs_are_listed_by_change(subject: StorageUnderTest) -> None:
    """The longest unchanged first, in pages, without parts of runs that are there; the n-th newest is found."""
    store = subject.new()
    for number in range(7):
        ended(store, f"r{number}", RunState.FAILED if number in (1, 4) else RunState.COMPLETED)
        if subject.clock is not None:
            subject.clock.advance(1)
    ended(store, "part", RunState.FAILED, parent="r0")
    ended(store, "orphan", RunState.FAILED, parent="gone")
    store.open_run(new_run("running"), "me", 60)
    store.open_run(new_run("crashed"))
    accept(store, commit(2, "r2"))  # which says nothing of its state
    completed = ["r0", "r2", "r3", "r5", "r6"]
    equal(ids(store.list_ended([RunState.COMPLETED])), completed, "the completed runs")
    equal(ids(store.list_ended([RunState.FAILED])), ["r1", "r4", "orphan"], "the failed runs")
    equal(ids(store.list_ended([RunState.CRASHED, RunState.PAUSED])), ["crashed"], "the unfinished runs")
    equal(ids(store.list_ended([RunState.RUNNING])), ["running"], "the running runs")
    both = store.list_ended([RunState.COMPLETED, RunState.FAILED])
    equal(ids(both), [*(f"r{number}" for number in range(7)), "orphan"], "both kinds")
    paged: list[str] = []
    after: RunRecord | None = None
    while page := store.list_ended([RunState.COMPLETED, RunState.FAILED], 3, after):
        paged += ids(page)
        after = page[-1]
    equal(paged, ids(both), "in pages")
    newest = [store.nth_newest_ended([RunState.COMPLETED], count) for count in (1, 5, 6)]
    equal([None if run is None else run.run_id for run in newest], ["r6", "r0", None], "the n-th newest")


def families_are_retired_whole(subject: StorageUnderTest) -> None:
    """A run goes with its parts, its document and definition at once; its id is free, and others are not touched."""
    store = subject.new()
    whole = ended(store, "whole", size=100_000)
    for part, parent in (("part", "whole"), ("part of part", "part"), ("other", None)):
        ended(store, part, RunState.FAILED, parent)
        accept(store, journal(("s", 1, b"1"), run_id=part))
    store.save_run(Run(id="whole", goal_id="g"))
    store.send("part", "m", b"1")
    kept = snapshot(store, "other")
    foretold = store.retire_runs([whole], FINISHED, dry_run=True)
    equal(sorted(foretold[0].run_ids), ["part", "part of part", "whole"], "what would go")
    # Files hold what is encrypted as text, a third longer.
    require(100_000 <= foretold[0].bytes < 150_000, f"bytes that would go: {foretold[0].bytes}")
    equal(foretold[0].checkpoints, 3, "checkpoints that would go")
    require(store.find_run("whole") is not None, "a dry run removed a run")
    equal(store.retire_runs([whole], FINISHED), foretold, "what went")
    equal(store.retire_runs([whole], FINISHED), [Retired(kept="it is gone already")], "retiring it again")
    for seen in subject.before_and_after_reopening(store):
        equal(ids(seen.find_runs("")), ["other"], "the runs left")
        equal((seen.load_run("whole"), seen.read_journal("part"), seen.read_messages("part")), (None, [], []), "left")
        store = seen
    if store.definition("f-whole") is not None:  # a store may keep definitions, which are few
        require(store.definition("f-other") is not None, "the definition of another run is gone")
    writer = Writer(store, "whole", {"new": True})
    writer.write({"new": 1})
    purge(store)
    equal(store.purge(), False, "purging when nothing is left")
    writer.check(store, [1], "a new run of the same id")
    equal(snapshot(store, "other"), kept, "another run")
    require(store.definition("f-other") is not None, "the definition of another run is gone")
    equal(store.verify().damage, (), "what verify finds")


def active_runs_are_never_retired(subject: StorageUnderTest) -> None:
    """A run that changed since it was looked at, is held, pinned or unfinished, or has such a part, stays as it is."""
    store = subject.new()
    held = ended(store, "claimed", RunState.FAILED)
    store.claim_run("claimed", "me", 60)
    changed = ended(store, "changed", RunState.FAILED)
    accept(store, commit(2, "changed"))
    pinned, marked = ended(store, "pinned"), ended(store, "marked")
    store.pin("pinned")
    store.pin("marked", "ckpt_1")
    paused, crashed = ended(store, "paused", RunState.PAUSED), ended(store, "crashed", RunState.RUNNING)
    whole = ended(store, "whole")
    ended(store, "part", RunState.PAUSED, "whole")
    guarded = ended(store, "guarded")
    ended(store, "pinned part", parent="guarded")
    store.pin("pinned part", note="evidence")
    runs = [held, changed, pinned, marked, paused, crashed, whole, guarded]
    before = {run_id: snapshot(store, run_id) for run_id in ids(store.find_runs(""))}
    outcomes = list[Retired]()
    while len(outcomes) < len(runs):
        outcomes += store.retire_runs(runs[len(outcomes) :], FINISHED)
    for run, outcome in zip(runs, outcomes, strict=True):
        require(outcome.kept and not outcome.run_ids, f"run {run.run_id!r} was retired")
    equal(outcomes[2].kept, "it is pinned", "why a pinned run stays")
    equal(outcomes[-1].kept, "its part pinned part is pinned", "why a run with a pinned part stays")
    purge(store)
    after = {run_id: snapshot(store, run_id) for run_id in ids(store.find_runs(""))}
    equal(after, before, "the runs")
    equal(bool(store.retire_runs([paused], (*FINISHED, RunState.PAUSED))[0].run_ids), True, "retiring a paused one")


def one_sweep_retires_a_run(subject: StorageUnderTest) -> None:
    """Of several sweeps at once each run goes with one, and runs that are claimed meanwhile stay whole."""
    store = subject.new()
    runs = [ended(store, f"r{number}", RunState.FAILED) for number in range(12)]

    def work(index: int) -> list[str]:
        if index == 3:
            return [run.run_id for run in runs[::2] if _claims(store, run.run_id)]
        gone: list[str] = []
        waiting = runs
        while waiting:
            done = store.retire_runs(waiting, FINISHED, 0.0)
            gone += [run_id for each in done for run_id in each.run_ids]
            waiting = waiting[len(done) :]
            store.purge(0.0)
        return gone

    results = race(4, work)
    require(all(isinstance(each, list) for each in results), f"an error: {results!r}")
    claimed = results.pop()
    gone = [run_id for each in results for run_id in each]
    equal(len(gone), len(set(gone)), "runs retired twice")
    equal(sorted([*gone, *claimed]), sorted(ids(runs)), "runs that went or were claimed")
    purge(store)
    equal(sorted(ids(store.find_runs(""))), sorted(claimed), "the runs left")
    equal(store.verify().damage, (), "what verify finds")


def _claims(store: Storage, run_id: str) -> bool:
    try:
        store.claim_run(run_id, "me", 60)
    except RunNotFound:
        return False
    return True


def old_checkpoints_are_pruned(subject: StorageUnderTest) -> None:
    """``prune_older`` takes what was made before a moment, the oldest first; the newest always stays."""
    clock = subject.clock
    if clock is None:
        return  # without a clock of ours nothing is old
    store = subject.new()
    began = clock.now
    writers = [Writer(store, run_id) for run_id in ("aged", "young", "pinned")]
    for number, state in enumerate(itertools.islice(growing_states(), 10)):
        clock.now = began + number
        for writer in writers:
            writer.write(state)
    store.pin("pinned")
    store.pin("aged", "ckpt_3")
    clock.now = began + 20
    Writer(store, "new").write({"a": 1})
    before = began + 6
    equal(ids(store.list_aged(before)), ["aged", "young"], "runs with old checkpoints")
    equal(ids(store.list_aged(before, 1)), ["aged"], "a page of them")
    equal(ids(store.list_aged(before, 1, found(store, "aged"))), ["young"], "the next page")
    equal(store.prune_older("aged", before, dry_run=True), 5, "how many would go")
    equal(store.prune_older("aged", before, 2), 2, "the first two")
    writers[0].check(store, [3, 4, 5, 6, 7, 8, 9, 10], "after the first two")
    equal(store.prune_older("aged", before, 2), 2, "the next two")
    writers[0].check(store, [3, 6, 7, 8, 9, 10], "after four")
    equal(store.prune_older("aged", before), 1, "the last one")
    equal(store.prune_older("aged", before), 0, "when nothing is left")
    equal((store.prune_older("pinned", before), store.prune_older("nobody", before)), (0, 0), "pinned, unknown")
    store = subject.again(store)
    writers[0].check(store, [3, 7, 8, 9, 10], "after all")
    writers[2].check(store, list(range(1, 11)), "a pinned run")
    equal(ids(store.list_aged(before)), ["young"], "runs with old checkpoints left")
    equal(store.prune_older("young", 1e15), 9, "when all are old")
    writers[1].check(store, [10], "the newest stays")
    equal(store.verify().damage, (), "what verify finds")


def sweeps_carry_out_a_policy(subject: StorageUnderTest) -> None:
    """A sweep removes exactly what a policy says, says so beforehand, and a second one finds nothing."""
    store = subject.new()
    clock = subject.clock
    pins: list[Pin] = []
    for number in range(8):
        state = (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED, RunState.PAUSED)[number % 4]
        ended(store, f"r{number}", state, size=5_000)
        if clock is not None:
            clock.advance(10)
    ended(store, "part", parent="r0")
    pins.append(store.pin("r1"))
    policy = RetentionPolicy(keep_completed=1, keep_failed=2)
    foretold = store.sweep(policy, dry_run=True)
    report = store.sweep(policy)
    for each in (foretold, report):
        equal(sorted(one.run_id for one in each.removed), ["r0", "r2"], "what goes")
        equal((each.runs, each.parts, each.complete), (2, 1, True), "how many")
        equal([(one.run_id, one.why) for one in each.kept], [("r1", "it is pinned")], "what stays")
    equal(foretold.freed_bytes, report.freed_bytes, "bytes")
    equal(sorted(ids(store.find_runs(""))), ["r1", "r3", "r4", "r5", "r6", "r7"], "the runs left")
    equal(store.sweep(policy).runs, 0, "a second sweep")
    used = store.usage().used_bytes
    equal(store.sweep(RetentionPolicy(max_total_bytes=used)).runs, 0, "a store that is small enough")
    report = store.sweep(RetentionPolicy(max_total_bytes=0), limit=2)
    equal((report.runs, report.complete), (2, False), "a limited sweep")
    report = store.sweep(RetentionPolicy(max_total_bytes=0))
    equal((report.runs, report.over_bytes > 0), (1, True), "a store that cannot become so small")
    equal(sorted(ids(store.find_runs(""))), ["r1", "r3", "r7"], "what no size removes")
    if clock is not None:
        clock.advance(100)
        equal(store.sweep(RetentionPolicy(max_age=timedelta(seconds=50))).runs, 0, "finished runs that are old")
        report = store.sweep(RetentionPolicy(unfinished_max_age=timedelta(seconds=50)))
        equal(sorted(one.run_id for one in report.removed), ["r3", "r7"], "unfinished runs that are old")
    equal(store.list_pins(), pins, "the pins")
    equal(store.verify().damage, (), "what verify finds")


def room_is_given_back(subject: StorageUnderTest) -> None:
    """What is removed makes the store smaller, by about what was said."""
    store = subject.new()
    ended(store, "small")
    empty = store.usage()
    big = ended(store, "big", size=3_000_000)
    full = store.usage()
    require(full.used_bytes - empty.used_bytes > 2_900_000, "a run of 3 MB makes the store no larger")
    retired = store.retire_runs([big], FINISHED)[0]
    # Files hold what is encrypted as text, a third longer.
    require(3_000_000 <= retired.bytes < 4_100_000, f"the bytes of a run of 3 MB: {retired.bytes}")
    purge(store)
    given = 0
    for _ in range(10_000):
        part = store.shrink()
        given += part
        if not part:
            break
    after = store.usage()
    if after.can_shrink:
        equal(after.free_bytes, 0, "what is free after shrinking")
    require(after.used_bytes < empty.used_bytes + 100_000, f"used before {empty.used_bytes}, after {after.used_bytes}")
    store.compact()
    equal(ids(store.find_runs("")), ["small"], "the runs after compacting")
    equal(store.verify().damage, (), "what verify finds")


CHECKS: list[Check] = [
    pinned_checkpoints_outlive_retention,
    pins_are_named_and_checked,
    pins_refuse_deletion,
    rewinding_respects_pins,
    unknown_types_are_no_damage,
    replacing_spares_pins,
    ended_runs_are_listed_by_change,
    families_are_retired_whole,
    active_runs_are_never_retired,
    one_sweep_retires_a_run,
    old_checkpoints_are_pruned,
    sweeps_carry_out_a_policy,
    room_is_given_back,
]
