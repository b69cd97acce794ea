"""The storage contract on runs: accepting, finding, listing, claiming and deleting them."""

from __future__ import annotations

from framework.errors import CommitConflict, InvalidId, LeaseLost, RunBusy, RunExists, RunNotFound, StorageError
from framework.schemas.run import RunState
from framework.storage.chunks import Chunk
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
    refuse,
    require,
    snapshot,
    state_at,
)
from framework.storage.interface import Storage
from framework.storage.records import Retention, RunRecord


def found(store: Storage, run_id: str = "run_1") -> RunRecord:
    """The record of a run that must be there."""
    record = store.find_run(run_id)
    if record is None:
        raise AssertionError(f"Run {run_id!r} is not found")
    return record


def open_run_records_everything(subject: StorageUnderTest) -> None:
    """What was given comes back, at once and from the store opened again."""
    store = subject.new()
    new = new_run("run_1", {"a": [1]}, executor_type="flexible", goal_id="", header=b'{"x": 1}', parent_run_id="run_0")
    record = store.open_run(new, "owner", 60)
    equal(store.find_run("run_1"), record, "find_run after open_run")
    store = subject.again(store)
    equal(store.find_run("run_1"), record, "find_run after opening the store again")
    given = (new.run_id, new.executor_type, new.goal_id, new.fingerprint, new.header, new.parent_run_id)
    kept = (
        record.run_id,
        record.executor_type,
        record.goal_id,
        record.fingerprint,
        record.header,
        record.parent_run_id,
    )
    equal(kept, given, "what open_run recorded")
    fresh = (record.state, record.sequence, record.error, record.owner, record.token, record.recovery_attempts)
    equal(fresh, (RunState.RUNNING, 0, None, "owner", 1, 0), "the record of a new run")
    equal(record.lease_until, record.updated_at + 60, "the end of the lease")
    equal(store.definition(new.fingerprint), new.definition, "the definition")
    equal(store.definition("unknown"), None, "an unknown definition")
    equal(state_at(store, 0), {"a": b"[1]"}, "the initial state")


def run_without_owner_is_crashed(subject: StorageUnderTest) -> None:
    """A running run that nobody holds shows as crashed, and anybody may claim it."""
    store = subject.new()
    record = store.open_run(new_run())
    equal((record.state, record.owner, record.token), (RunState.CRASHED, None, 0), "a run opened by nobody")
    equal(store.claim_run("run_1", "me", 60).token, 1, "the first token")


def open_run_twice_is_refused(subject: StorageUnderTest) -> None:
    """The second ``open_run`` of an id raises ``RunExists`` and changes nothing."""
    store = subject.new()
    store.open_run(new_run(state={"a": 1}), "first", 60)
    before = snapshot(store)
    with raises(RunExists, "opening a run twice"):
        store.open_run(new_run(state={"a": 2}, header=b'"other"', fingerprint="f2"), "second", 60)
    equal(snapshot(store), before, "the run after the refused open_run")
    equal(store.definition("f2"), None, "the definition of a refused run")


def open_run_has_one_winner(subject: StorageUnderTest) -> None:
    """Of threads that open the same id at once, one wins."""
    store = subject.new()
    results = race(6, lambda index: store.open_run(new_run(), f"owner {index}", 60))
    won = [result for result in results if isinstance(result, RunRecord)]
    lost = [result for result in results if isinstance(result, RunExists)]
    equal((len(won), len(lost)), (1, 5), f"winners and losers of open_run ({results})")
    equal(found(store).owner, won[0].owner, "the recorded owner")


def unknown_runs_are_not_found(subject: StorageUnderTest) -> None:
    """Reading an unknown run gives nothing; acting on it raises ``RunNotFound``."""
    store = subject.new()
    equal(store.find_run("nobody"), None, "find_run")
    equal(store.read_log("nobody"), [], "read_log")
    equal(list(store.read_checkpoint_rows("nobody")), [], "read_checkpoint_rows")
    equal(store.find_checkpoint_row("nobody", "c"), None, "find_checkpoint_row")
    equal(store.read_chunks("nobody", 0), [], "read_chunks")
    equal(store.prune("nobody", Retention(1)), 0, "prune")
    equal(store.delete_checkpoints("nobody"), 0, "delete_checkpoints")
    equal(store.delete_run("nobody"), False, "delete_run")
    store.release_lease("nobody", 1)
    with raises(RunNotFound, "claim_run"):
        store.claim_run("nobody", "me", 60)
    with raises(RunNotFound, "renew_lease"):
        store.renew_lease("nobody", 1, 60)
    with raises(RunNotFound, "rewind"):
        store.rewind("nobody", 1, 0)
    refuse(store, commit(1, "nobody"), RunNotFound, "a commit to an unknown run")
    equal(store.list_runs(), [], "list_runs after all this")


def odd_ids_are_kept_apart(subject: StorageUnderTest) -> None:
    """Ids that look like paths, names of devices or SQL are just ids."""
    store = subject.new()
    for index, run_id in enumerate(ODD_IDS):
        store.open_run(new_run(run_id, {"index": index}, goal_id=run_id, fingerprint=run_id))
        accept(store, commit(1, run_id, checkpoint_id=run_id, chunks=[Chunk(run_id, "set", b"%d" % index)]))
    store = subject.again(store)
    for index, run_id in enumerate(ODD_IDS):
        record = found(store, run_id)
        equal((record.run_id, record.goal_id, record.sequence), (run_id, run_id, 1), f"the run {run_id!r}")
        equal(state_at(store, 1, run_id), {"index": b"%d" % index, run_id: b"%d" % index}, f"the state of {run_id!r}")
        row = store.find_checkpoint_row(run_id, run_id)
        equal(row is not None and row.checkpoint_id, run_id, f"the checkpoint {run_id!r}")
        require(store.definition(run_id) is not None, f"the definition {run_id!r} is missing")
    listed = [record.run_id for record in store.list_runs(limit=1_000)]
    equal(sorted(listed), sorted(ODD_IDS), "the listing of odd ids")
    for run_id in ODD_IDS[::2]:
        equal(store.delete_run(run_id), True, f"deleting {run_id!r}")
    listed = [record.run_id for record in store.list_runs(limit=1_000)]
    equal(sorted(listed), sorted(ODD_IDS[1::2]), "the listing after deleting every other")


def bad_ids_are_refused(subject: StorageUnderTest) -> None:
    """Ids that name nothing raise ``InvalidId``, a ``ValueError``, wherever they are given."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    for bad in (*BAD_IDS, "x" * 256):
        what = f"the run id {bad[:20]!r}"
        for call in (
            lambda bad=bad: store.open_run(new_run(bad)),
            lambda bad=bad: store.find_run(bad),
            lambda bad=bad: store.claim_run(bad, "me", 60),
            lambda bad=bad: store.renew_lease(bad, 1, 60),
            lambda bad=bad: store.release_lease(bad, 1),
            lambda bad=bad: store.delete_run(bad),
            lambda bad=bad: store.read_log(bad),
            lambda bad=bad: list(store.read_checkpoint_rows(bad)),
            lambda bad=bad: store.find_checkpoint_row(bad, "c"),
            lambda bad=bad: store.read_chunks(bad, 0),
            lambda bad=bad: store.prune(bad, Retention(1)),
            lambda bad=bad: store.rewind(bad, 1, 0),
            lambda bad=bad: store.delete_checkpoints(bad),
            lambda bad=bad: store.verify(bad),
            lambda bad=bad: store.load_run(bad),
            lambda bad=bad: store.load_checkpoint(bad, "c"),
            lambda bad=bad: store.load_latest_checkpoint(bad),
            lambda bad=bad: store.list_checkpoints(bad),
        ):
            with raises(InvalidId, what):
                call()
        refuse(store, commit(1, bad), InvalidId, f"a commit to {what}")
    for bad in BAD_IDS:
        what = f"the checkpoint id {bad[:20]!r}"
        with raises(ValueError, what):
            store.find_checkpoint_row("run_1", bad)
        with raises(InvalidId, what):
            store.load_checkpoint("run_1", bad)
        refuse(store, commit(1, token=1, checkpoint_id=bad), InvalidId, f"a commit of {what}")
    for bad in ("", "lone\ud800surrogate"):
        refuse(store, commit(1, token=1, chunks=[Chunk(bad, "set", b"1")]), InvalidId, f"the key {bad!r}")
        with raises(InvalidId, f"an owner named {bad!r}"):
            store.claim_run("run_1", bad, 60)
    with raises(InvalidId, "a goal id with a surrogate"):
        store.open_run(new_run("run_2", goal_id="\udfff"))
    equal([record.run_id for record in store.list_runs()], ["run_1"], "the runs after all this")


def claim_grows_the_token(subject: StorageUnderTest) -> None:
    """Each owner has a higher token than the one before, and older tokens no longer count."""
    store = subject.new()
    store.open_run(new_run(), "first", 0)
    for token in (2, 3, 4):
        record = store.claim_run("run_1", f"owner {token}", 0)
        equal((record.token, record.owner), (token, f"owner {token}"), "the token and owner after a claim")
    record = store.claim_run("run_1", "last", 60)
    store = subject.again(store)
    equal(found(store).token, 5, "the token in the store")
    for stale in (1, 2, 3, 4, 6):
        with raises(LeaseLost, f"renewing with token {stale}"):
            store.renew_lease("run_1", stale, 60)
        with raises(LeaseLost, f"rewinding with token {stale}"):
            store.rewind("run_1", stale, 0)
        refuse(store, commit(1, token=stale), LeaseLost, f"a commit with token {stale}")
        store.release_lease("run_1", stale)
        equal(found(store).owner, "last", f"the owner after releasing with token {stale}")
    accept(store, commit(1, token=5))


def held_runs_are_busy(subject: StorageUnderTest) -> None:
    """While a lease holds, nobody else claims, commits without a token, or deletes."""
    store = subject.new()
    store.open_run(new_run(), "holder", 60)
    for alive in (None, lambda owner: True, lambda owner: None):
        try:
            store.claim_run("run_1", "thief", 60, alive)
        except RunBusy as error:
            equal(error.owner, "holder", "the owner that RunBusy names")
            require(0 < error.seconds_left <= 60.001, f"RunBusy says {error.seconds_left} s are left of 60")
        else:
            raise AssertionError("claim_run took a held lease")
    with raises(RunBusy, "deleting a held run"):
        store.delete_run("run_1")
    with raises(RunBusy, "deleting the checkpoints of a held run"):
        store.delete_checkpoints("run_1")
    refuse(store, commit(1), RunBusy, "a commit without a token to a held run")
    asked: list[str] = []

    def is_alive(owner: str) -> bool:
        asked.append(owner)
        return False

    record = store.claim_run("run_1", "heir", 60, is_alive)
    equal((asked, record.owner, record.token), (["holder"], "heir", 2), "claiming from an owner that is gone")
    equal((record.state, record.recovery_attempts), (RunState.CRASHED, 1), "the state of a run whose owner is gone")


def released_leases_are_free(subject: StorageUnderTest) -> None:
    """After release the run is nobody's; its old token is worth nothing."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    before = found(store)
    store.release_lease("run_1", 1)
    after = found(store)
    equal((after.owner, after.token, after.lease_until), (None, 1, 0.0), "the lease after its release")
    equal((after.sequence, after.updated_at, after.error), (before.sequence, before.updated_at, None), "the rest")
    with raises(LeaseLost, "renewing a released lease"):
        store.renew_lease("run_1", 1, 60)
    refuse(store, commit(1, token=1), LeaseLost, "a commit after release")
    accept(store, commit(1))
    equal(store.claim_run("run_1", "you", 60).token, 2, "the token after release and claim")


def claim_tells_the_state_found(subject: StorageUnderTest) -> None:
    """``claim_run`` returns the state and error it found, and sets the run to running."""
    store = subject.new()
    for number, state in enumerate((RunState.FAILED, RunState.PAUSED, RunState.CANCELLED)):
        run_id = f"run_{number}"
        store.open_run(new_run(run_id), "me", 60)
        accept(store, commit(1, run_id, 1, state=state, error="why", release=True))
        equal((found(store, run_id).state, found(store, run_id).error), (state, "why"), "the committed state")
        claimed = store.claim_run(run_id, "you", 60)
        equal((claimed.state, claimed.error, claimed.owner), (state, "why", "you"), "the state that claim_run found")
        now = found(store, run_id)
        equal((now.state, now.error), (RunState.RUNNING, None), "the state after a claim")
        equal((now.sequence, now.recovery_attempts), (1, 0), "sequence and attempts after a claim")
        store.release_lease(run_id, claimed.token)
        now = found(store, run_id)
        equal((now.state, now.error), (RunState.CRASHED, "why"), "the state and error once its owner is gone")


def claim_knows_the_last_commit(subject: StorageUnderTest) -> None:
    """``claim_run`` with a sequence leaves a run that has another last commit as it is."""
    store = subject.new()
    store.open_run(new_run())
    accept(store, commit(1, token=0, state=RunState.FAILED, error="why"))
    before = found(store)
    for other in (0, 2):
        with raises(CommitConflict, "claiming at another commit"):
            store.claim_run("run_1", "me", 60, None, other)
    equal(found(store), before, "the run after claims at other commits")
    equal(store.claim_run("run_1", "me", 60, None, 1).state, RunState.FAILED, "the state found at the last commit")
    with raises(RunBusy, "claiming a held run, whatever the sequence"):
        store.claim_run("run_1", "you", 60, None, 0)


def completed_runs_are_not_claimed(subject: StorageUnderTest) -> None:
    """A completed run is returned as it is, unclaimed."""
    store = subject.new()
    store.open_run(new_run(), "me", 60)
    accept(store, commit(1, token=1, state=RunState.COMPLETED, release=True))
    before = found(store)
    equal(before.state, RunState.COMPLETED, "the state")
    equal(store.claim_run("run_1", "you", 60), before, "what claim_run returns")
    equal(found(store), before, "the run after claim_run")


def recovery_attempts_count_crashes(subject: StorageUnderTest) -> None:
    """Each claim from an owner that vanished counts, until there is progress; a lease given up is no crash."""
    store = subject.new()
    store.open_run(new_run(), "me", 0)
    for attempts in (1, 2, 3):
        record = store.claim_run("run_1", f"owner {attempts}", 0)
        equal((record.state, record.recovery_attempts), (RunState.CRASHED, attempts), "attempts after a crash")
    record = store.claim_run("run_1", "owner", 60)
    accept(store, commit(1, token=record.token, state=RunState.FAILED, error="e", release=True))
    equal(found(store).recovery_attempts, 4, "attempts after a failure")
    equal(store.claim_run("run_1", "owner", 0).recovery_attempts, 0, "attempts after claiming a failed run")
    for attempts in (1, 2):
        record = store.claim_run("run_1", "owner", 0)
        equal(record.recovery_attempts, attempts, "attempts after another crash")
    store.release_lease("run_1", record.token)
    record = store.claim_run("run_1", "owner", 0)
    equal((record.state, record.recovery_attempts), (RunState.CRASHED, 2), "attempts after a lease was given up")
    accept(store, commit(2, token=record.token))
    equal(found(store).recovery_attempts, 2, "attempts after a commit that is no progress")
    accept(store, commit(3, token=record.token, progress=True))
    equal(found(store).recovery_attempts, 0, "attempts after progress")
    equal(store.claim_run("run_1", "owner", 60).recovery_attempts, 1, "attempts after a crash that followed progress")


def leases_are_renewed_together(subject: StorageUnderTest) -> None:
    """``renew_leases`` answers for each lease, and renews those that are held."""
    store = subject.new()
    for run_id in ("a", "b", "c"):
        store.open_run(new_run(run_id), "me", 0)
    store.claim_run("b", "you", 0)
    outcomes = store.renew_leases([("a", 1), ("b", 1), ("nobody", 1), ("c", 1)], 60)
    equal([type(each) for each in outcomes], [type(None), LeaseLost, RunNotFound, type(None)], "what became of each")
    states = [found(store, run_id).state for run_id in ("a", "b", "c")]
    equal(states, [RunState.RUNNING, RunState.CRASHED, RunState.RUNNING], "the states after renewing")
    equal(store.renew_leases([], 60), [], "renewing nothing")


def claim_has_one_winner(subject: StorageUnderTest) -> None:
    """Of threads that claim a crashed run at once, one wins and the others are told who."""
    store = subject.new()
    store.open_run(new_run(), "dead", 0)
    results = race(6, lambda index: store.claim_run("run_1", f"owner {index}", 60))
    won = [result for result in results if isinstance(result, RunRecord)]
    lost = [result for result in results if isinstance(result, RunBusy)]
    equal((len(won), len(lost)), (1, 5), f"winners and losers of claim_run ({results})")
    equal((found(store).owner, found(store).token), (won[0].owner, 2), "the recorded owner and token")


def leases_follow_the_clock(subject: StorageUnderTest) -> None:
    """With a clock that can be moved: a lease ends at its time, renewing moves it, expiry is a crash."""
    store, clock = subject.new(), subject.clock
    if clock is None:
        return  # this store's clock cannot be moved; leases of no length, used elsewhere, cover expiry
    store.open_run(new_run(), "me", 10)
    clock.advance(9)
    with raises(RunBusy, "claiming before the lease ends"):
        store.claim_run("run_1", "you", 10)
    store.renew_lease("run_1", 1, 10)
    equal(found(store).lease_until, clock.now + 10, "the lease after renewing")
    clock.advance(9)
    equal(found(store).state, RunState.RUNNING, "the state before the renewed lease ends")
    equal([record.run_id for record in store.list_runs([RunState.RUNNING])], ["run_1"], "the running runs")
    clock.advance(1)
    equal(found(store).state, RunState.CRASHED, "the state once the lease has ended")
    equal([record.run_id for record in store.list_runs([RunState.CRASHED])], ["run_1"], "the crashed runs")
    equal(store.list_runs([RunState.RUNNING]), [], "the running runs once the lease has ended")
    accept(store, commit(1, token=1))  # late, but nobody took over
    store.renew_lease("run_1", 1, 10)
    equal(found(store).state, RunState.RUNNING, "the state after renewing late")
    clock.advance(11)
    equal(store.claim_run("run_1", "you", 10).token, 2, "the token after expiry and claim")
    refuse(store, commit(2, token=1), LeaseLost, "a commit of the owner that lost the lease")


def runs_are_listed_newest_first(subject: StorageUnderTest) -> None:
    """By creation, then id, with filters and pages."""
    store, clock = subject.new(), subject.clock
    for number in range(7):
        if clock is not None and number % 2:
            clock.advance(1)
        run_id = f"run_{number}"
        store.open_run(new_run(run_id), "me", 60)
        if number in (1, 4):
            accept(store, commit(1, run_id, 1, state=RunState.FAILED, error="e", release=True))
        if number == 5:
            store.release_lease(run_id, 1)
    every = store.list_runs()
    ages = [(record.created_at, record.run_id) for record in every]
    equal(ages, sorted(ages, reverse=True), "the order of the listing")
    equal({record.run_id for record in every}, {f"run_{number}" for number in range(7)}, "the runs listed")
    equal([store.find_run(record.run_id) for record in every], every, "each record of the listing")
    pages: list[RunRecord] = []
    while page := store.list_runs(limit=3, before=pages[-1] if pages else None):
        require(len(page) <= 3, f"a page of at most 3 runs has {len(page)}")
        pages += page
    equal(pages, every, "the listing page by page")
    for states, expected in (
        ([RunState.FAILED], {"run_1", "run_4"}),
        ([RunState.CRASHED], {"run_5"}),
        ([RunState.RUNNING], {"run_0", "run_2", "run_3", "run_6"}),
        ([RunState.FAILED, RunState.CRASHED], {"run_1", "run_4", "run_5"}),
        ([RunState.COMPLETED], set[str]()),
        ([], set[str]()),
    ):
        listed = [record.run_id for record in store.list_runs(states)]
        equal(set(listed), expected, f"the runs with states {states}")
        equal(listed, [record.run_id for record in every if record.run_id in expected], f"the order with {states}")
    equal([record.run_id for record in store.list_runs([RunState.FAILED], limit=1)], ["run_4"], "one failed run")


def deleted_runs_leave_nothing(subject: StorageUnderTest) -> None:
    """``delete_run`` removes a run; its id can be used again as if it had never been."""
    store = subject.new()
    for run_id in ("run_1", "run_2"):
        store.open_run(new_run(run_id, {"a": 1}), "me", 60)
        accept(store, commit(1, run_id, 1, chunks=[Chunk("b", "set", b"2")], release=True))
    other = snapshot(store, "run_2")
    equal(store.delete_run("run_1"), True, "deleting a run")
    equal(store.delete_run("run_1"), False, "deleting it again")
    store = subject.again(store)
    equal(snapshot(store, "run_2"), other, "another run after the deletion")
    require(store.definition("f1") is not None, "the definition that another run needs is gone")
    equal((store.find_run("run_1"), store.read_log("run_1")), (None, []), "what is left of the run")
    equal(list(store.read_checkpoint_rows("run_1")), [], "its checkpoints")
    record = store.open_run(new_run("run_1", {"c": 3}), "me", 60)
    equal((record.sequence, record.token), (0, 1), "a new run of the old id")
    equal(state_at(store, 0), {"c": b"3"}, "its initial state")
    equal(store.read_log("run_1"), [], "its log")


def closed_stores_say_so(subject: StorageUnderTest) -> None:
    """Closing twice is harmless; using a closed store raises ``StorageError``."""
    store = subject.new()
    with store as entered:
        require(entered is store, "a store as a context manager gives itself")
        store.open_run(new_run())
    store.close()
    with raises(StorageError, "find_run of a closed store"):
        store.find_run("run_1")
    with raises(StorageError, "commit to a closed store"):
        store.commit([commit(1)])
    require("://" in store.url or store.url.startswith("file:"), f"{store.url!r} is not the URL of a store")


CHECKS: tuple[Check, ...] = (
    open_run_records_everything,
    run_without_owner_is_crashed,
    open_run_twice_is_refused,
    open_run_has_one_winner,
    unknown_runs_are_not_found,
    odd_ids_are_kept_apart,
    bad_ids_are_refused,
    claim_grows_the_token,
    held_runs_are_busy,
    released_leases_are_free,
    claim_tells_the_state_found,
    claim_knows_the_last_commit,
    completed_runs_are_not_claimed,
    recovery_attempts_count_crashes,
    leases_are_renewed_together,
    claim_has_one_winner,
    leases_follow_the_clock,
    runs_are_listed_newest_first,
    deleted_runs_leave_nothing,
    closed_stores_say_so,
)
