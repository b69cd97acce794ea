"""The storage contract on models: checkpoints saved whole, and ``Run`` documents with their indexes."""

from __future__ import annotations

import datetime as dt
from typing import Any

from framework.errors import InvalidId, LeaseLost, RunBusy, UnstorableValue
from framework.schemas.checkpoint import Checkpoint, CheckpointStatus, ExecutorType, StepRecord
from framework.schemas.decision import Decision
from framework.schemas.run import Run, RunState, RunStatus
from framework.storage.contract import (
    BAD_IDS,
    ODD_IDS,
    Check,
    StorageUnderTest,
    commit,
    equal,
    new_run,
    race,
    raises,
    require,
    snapshot,
)
from framework.storage.contract_runs import found
from framework.storage.interface import Storage
from framework.storage.records import Retention


def checkpoint(checkpoint_id: str = "ckpt_test_0", run_id: str = "run_123", **fields: Any) -> Checkpoint:
    """A checkpoint of a graph, given whole."""
    defaults: dict[str, Any] = {"executor_type": ExecutorType.GRAPH, "current_node_id": "node_1"}
    return Checkpoint(id=checkpoint_id, run_id=run_id, **{**defaults, **fields})


def latest(store: Storage, run_id: str = "run_123") -> Checkpoint:
    """The latest checkpoint, which must be there."""
    newest = store.load_latest_checkpoint(run_id)
    if newest is None:
        raise AssertionError(f"Run {run_id!r} has no latest checkpoint")
    return newest


def checkpoints_come_back_equal(subject: StorageUnderTest) -> None:
    """Every field of a checkpoint saved whole, and every type of value in it."""
    store = subject.new()
    given = checkpoint(
        next_node_id="node_2",
        created_at=dt.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=dt.UTC),
        memory_snapshot={
            "text": "é☃",
            "number": 1.5,
            "big": 2**80,
            "none": None,
            "nested": {"list": [1, {"x": (1, 2)}], 3: {4}},
            "bytes": b"\x00\xff",
            "when": dt.timedelta(days=-1, microseconds=5),
        },
        execution_path=["start", "node_1"],
        step_number=2,
        total_tokens=30,
        total_latency_ms=40,
        context={"plan": {"a": (1,)}},
        status=CheckpointStatus.PAUSED,
        goal_id="goal",
        position={"visits": {"node_1": 2}},
        steps={"node_1#2": StepRecord(step_id="node_1", visit=2)},
        something_new={"kept": True},
    )
    store.save_checkpoint(given)
    for seen in subject.before_and_after_reopening(store):
        loaded = seen.load_checkpoint("run_123", "ckpt_test_0")
        if loaded is None:
            raise AssertionError("The saved checkpoint is not found")
        expected = given.model_copy(update={"sequence": loaded.sequence, "digest": loaded.digest})
        equal(loaded.model_dump(), expected.model_dump(), "the checkpoint as loaded")
        require(loaded.sequence >= 1 and loaded.digest, "a loaded checkpoint has its sequence and its digest")
        equal(latest(seen).model_dump(), loaded.model_dump(), "the latest checkpoint")
        equal(seen.list_checkpoints("run_123"), [loaded.to_metadata()], "the listing")


def latest_is_the_last_saved(subject: StorageUnderTest) -> None:
    """Order is the order of saving, not that of times or names."""
    store = subject.new()
    for number in range(5):
        when = dt.datetime(2026, 1, 10 - number)
        store.save_checkpoint(checkpoint(f"ckpt_test_{9 - number}", created_at=when, memory_snapshot={"n": number}))
        equal(latest(store).memory_snapshot, {"n": number}, "the latest memory")
    store = subject.again(store)
    equal(latest(store).id, "ckpt_test_5", "the latest id")
    listed = [entry.id for entry in store.list_checkpoints("run_123")]
    equal(listed, [f"ckpt_test_{number}" for number in (9, 8, 7, 6, 5)], "the listing, oldest first")


def saving_an_id_again_replaces_it(subject: StorageUnderTest) -> None:
    """One id is one checkpoint: the newer takes the older's place and becomes the latest."""
    store = subject.new()
    for number in range(4):
        store.save_checkpoint(checkpoint(memory_snapshot={"n": [number] * number, "x": "same"}))
        if number == 1:
            store.save_checkpoint(checkpoint("other", memory_snapshot={"y": 1}))
    store = subject.again(store)
    equal([entry.id for entry in store.list_checkpoints("run_123")], ["other", "ckpt_test_0"], "the listing")
    equal(latest(store).memory_snapshot, {"n": [3, 3, 3], "x": "same"}, "the latest memory")
    other = store.load_checkpoint("run_123", "other")
    equal(other is not None and other.memory_snapshot, {"y": 1}, "the checkpoint in between")
    equal(store.prune("run_123", Retention(1)), 1, "how many prune took")
    equal(latest(store).memory_snapshot, {"n": [3, 3, 3], "x": "same"}, "the latest memory after pruning")


def missing_checkpoints_are_none(subject: StorageUnderTest) -> None:
    """What is not there is ``None``, an empty list or 0, never an error."""
    store = subject.new()
    store.open_run(new_run())
    for run_id in ("run_1", "nobody"):
        equal(store.load_checkpoint(run_id, "c"), None, "load_checkpoint")
        equal(store.load_latest_checkpoint(run_id), None, "load_latest_checkpoint")
        equal(store.list_checkpoints(run_id), [], "list_checkpoints")
        equal(store.delete_checkpoints(run_id), 0, "delete_checkpoints")
    store.save_checkpoint(checkpoint())
    equal(store.delete_checkpoints("run_123"), 1, "delete_checkpoints of one")
    equal(store.load_latest_checkpoint("run_123"), None, "the latest after deleting")
    equal(store.load_checkpoint("run_123", "ckpt_test_0"), None, "a deleted checkpoint")
    store.save_checkpoint(checkpoint(memory_snapshot={"again": 1}))
    equal(latest(store).memory_snapshot, {"again": 1}, "the latest after saving again")


def checkpoint_ids_may_be_odd(subject: StorageUnderTest) -> None:
    """Ids of runs and checkpoints that look like paths are kept, apart from each other; others are refused."""
    store = subject.new()
    for number, odd in enumerate((*ODD_IDS, "x" * 300, "x" * 301)):
        store.save_checkpoint(checkpoint(odd, memory_snapshot={"n": number}))
    for number, odd in enumerate(ODD_IDS):
        store.save_checkpoint(checkpoint(odd, run_id=odd, memory_snapshot={"n": -number}))
    store = subject.again(store)
    for number, odd in enumerate((*ODD_IDS, "x" * 300, "x" * 301)):
        loaded = store.load_checkpoint("run_123", odd)
        equal(loaded is not None and (loaded.id, loaded.memory_snapshot), (odd, {"n": number}), f"checkpoint {odd!r}")
    for number, odd in enumerate(ODD_IDS):
        equal(latest(store, odd).memory_snapshot, {"n": -number}, f"the latest of run {odd!r}")
    for bad in BAD_IDS:
        with raises(InvalidId, f"the checkpoint id {bad[:20]!r}"):
            store.save_checkpoint(checkpoint(bad))
        with raises(InvalidId, f"the run id {bad[:20]!r}"):
            store.save_checkpoint(checkpoint(run_id=bad))


def keys_of_a_memory_are_checked(subject: StorageUnderTest) -> None:
    """Keys up to 1,000 characters of any text; others, and values without a stored form, fail naming the path."""
    store = subject.new()
    memory = {"k" * 1_000: 1, "a/b": 2, "../x": 3, "☃": 4, "with space": 5, "$t": 6, "CON": 7}
    store.save_checkpoint(checkpoint(memory_snapshot=memory))
    before = snapshot(store, "run_123")
    for bad in ("", "k" * 1_001, "nul\x00", "\ud800"):
        with raises(UnstorableValue, f"the key {bad[:20]!r}"):
            store.save_checkpoint(checkpoint("bad", memory_snapshot={bad: 1}))
    try:
        store.save_checkpoint(checkpoint("bad", memory_snapshot={"report": {"sections": [1, object()]}}))
    except UnstorableValue as error:
        equal(error.path, "state.report.sections[1]", "the path that the error names")
    else:
        raise AssertionError("An object() was stored")
    equal(snapshot(store, "run_123"), before, "the run after what was refused")
    equal(latest(subject.again(store)).memory_snapshot, memory, "the memory")


def saving_needs_the_lease_free(subject: StorageUnderTest) -> None:
    """A checkpoint given whole carries no token, so it is refused while somebody holds the run."""
    store = subject.new()
    store.open_run(new_run("run_123", {"a": 1}), "owner", 60)
    with raises(RunBusy, "saving a checkpoint of a held run"):
        store.save_checkpoint(checkpoint())
    store.release_lease("run_123", 1)
    store.save_checkpoint(checkpoint(memory_snapshot={"a": 1, "b": 2}))
    equal(latest(store).memory_snapshot, {"a": 1, "b": 2}, "the memory")


def savers_do_not_lose_each_other(subject: StorageUnderTest) -> None:
    """Threads that save checkpoints of one run at once: all are there, each with its own memory."""
    store = subject.new()
    saved = [checkpoint(f"c{index}", memory_snapshot={f"k{index}": [index]}) for index in range(4)]
    results = race(4, lambda index: store.save_checkpoint(saved[index]))
    equal(results, [None] * 4, "what the savers returned")
    for index in range(4):
        loaded = store.load_checkpoint("run_123", f"c{index}")
        equal(loaded is not None and loaded.memory_snapshot, {f"k{index}": [index]}, f"the memory of saver {index}")


def damaged_listing_hides_nothing(subject: StorageUnderTest) -> None:
    """A checkpoint whose body cannot be understood is passed over and told; the others are listed and loaded."""
    store = subject.new()
    store.save_checkpoint(checkpoint("good", memory_snapshot={"a": 1}))
    store.commit([commit(2, "run_123", checkpoint_id="bad", checkpoint=b"[1, 2")])
    equal([entry.id for entry in store.list_checkpoints("run_123")], ["good"], "the listing")
    damage: list[str] = []
    newest = store.load_latest_checkpoint("run_123", lambda found: damage.append(found.where))
    equal(newest is not None and newest.id, "good", "the newest readable checkpoint")
    require(damage and "bad" in damage[0], f"the damage reported: {damage}")
    equal(store.load_checkpoint("run_123", "bad"), None, "the damaged checkpoint")
    report = store.verify("run_123")
    require(not report.ok, "verify did not see the damage")
    equal(store.prune("run_123", Retention(1)), 0, "pruning to one, of which the newest cannot be read")
    equal(latest(store).id, "good", "the newest readable checkpoint after pruning")


# --- Run documents --------------------------------------------------------------------------------------------------


def document(run_id: str, goal_id: str = "goal", nodes: tuple[str, ...] = (), **fields: Any) -> Run:
    """A ``Run`` in which ``nodes`` decided something."""
    run = Run(id=run_id, goal_id=goal_id, started_at=dt.datetime(2026, 1, 1), **fields)
    for number, node_id in enumerate(nodes):
        run.add_decision(Decision(id=f"dec_{number}", node_id=node_id, intent="decide"))
    return run


def documents_come_back_equal(subject: StorageUnderTest) -> None:
    """A ``Run`` document and its summary, at once and from the store opened again, also when saved again."""
    store = subject.new()
    run = document("run_1", nodes=("a", "b"), input_data={"x": [1, 2**70, 0.1]}, something_new="kept")
    run.add_problem("critical", "it broke\nbadly ☃")
    store.save_run(run)
    equal(store.load_run("run_1"), run, "the document")
    run.complete(RunStatus.FAILED)
    store.save_run(run)
    for seen in subject.before_and_after_reopening(store):
        loaded = seen.load_run("run_1")
        equal(loaded, run, "the document saved again")
        summary = seen.load_summary("run_1")
        equal(summary is not None and (summary.run_id, summary.problem_count), ("run_1", 1), "the summary")
        equal((seen.load_run("nobody"), seen.load_summary("nobody")), (None, None), "an unknown document")


def documents_are_indexed(subject: StorageUnderTest) -> None:
    """By goal, status and node, in the order of the first save; a change of status leaves no old entry."""
    store = subject.new()
    for number in range(6):
        nodes = (f"n{number % 2}", "shared", "a/b")
        store.save_run(document(f"run_{number}", f"goal_{number % 3}", nodes))
    for number in (4, 1):
        run = document(f"run_{number}", f"goal_{number % 3}", ("shared",), status=RunStatus.COMPLETED)
        store.save_run(run)
    for seen in subject.before_and_after_reopening(store):
        equal(seen.list_all_runs(), [f"run_{number}" for number in range(6)], "all documents")
        equal(seen.list_all_goals(), ["goal_0", "goal_1", "goal_2"], "all goals")
        equal(seen.get_runs_by_goal("goal_1"), ["run_1", "run_4"], "by goal")
        equal(seen.get_runs_by_status("completed"), ["run_1", "run_4"], "by status, as text")
        equal(seen.get_runs_by_status(RunStatus.RUNNING), ["run_0", "run_2", "run_3", "run_5"], "by status")
        equal(seen.get_runs_by_node("n1"), ["run_3", "run_5"], "by node")
        equal(seen.get_runs_by_node("shared"), [f"run_{number}" for number in range(6)], "by a shared node")
        equal(seen.get_runs_by_node("a/b"), ["run_0", "run_2", "run_3", "run_5"], "by a node with a slash")
        equal((seen.get_runs_by_goal("x"), seen.get_runs_by_node("x")), ([], []), "by unknown keys")
        equal(seen.get_runs_by_status("paused"), [], "by an unknown status")
        stats = seen.get_stats()
        equal((stats["total_runs"], stats["total_goals"]), (6, 3), "the statistics")
        require("storage_path" in stats, "the statistics name the storage_path")


def documents_are_fenced(subject: StorageUnderTest) -> None:
    """With a token, a document is written by the run's owner or its last one, by nobody who owned it before."""
    store = subject.new()
    store.open_run(new_run("run_1"), "first", 60)
    first = document("run_1", "goal_1", ("a",), narrative="first")
    store.save_run(first, 1)
    store.release_lease("run_1", 1)
    first.complete(RunStatus.FAILED)
    store.save_run(first, 1)
    equal(store.load_run("run_1"), first, "the document of an owner who gave the lease up, and nobody followed")
    require(store.claim_run("run_1", "second", 60).token == 2, "the second owner's token is 2")
    with raises(LeaseLost, "a document of a former owner"):
        store.save_run(document("run_1", "goal_2", ("b",), narrative="late"), 1)
    with raises(LeaseLost, "a document with a token that nobody has yet"):
        store.save_run(document("run_1", "goal_2", ("b",), narrative="early"), 3)
    for seen in subject.before_and_after_reopening(store):
        equal(seen.load_run("run_1"), first, "the document after the refusals")
        equal((seen.get_runs_by_node("b"), seen.get_runs_by_goal("goal_2")), ([], []), "the indexes after the refusals")
        store = seen
    second = document("run_1", "goal_1", ("a",), narrative="second", status=RunStatus.COMPLETED)
    store.save_run(second, 2)
    equal(store.load_run("run_1"), second, "the document of the owner")
    store.save_run(document("unknown"), 7)
    equal(store.list_all_runs(), ["run_1", "unknown"], "all documents")


def index_keys_are_checked(subject: StorageUnderTest) -> None:
    """Keys that look like paths raise ``InvalidId``, a ``ValueError``; documents under such keys are kept, though."""
    store = subject.new()
    for key in ("../x", "/etc/passwd", "..\\..", "..", "\\x", *BAD_IDS):
        for lookup in (store.get_runs_by_goal, store.get_runs_by_status, store.get_runs_by_node):
            with raises(ValueError, f"looking up {key[:20]!r}"):
                lookup(key)
    for number, odd in enumerate(ODD_IDS):
        store.save_run(document(odd, goal_id=odd, nodes=(odd,), narrative=str(number)))
    store = subject.again(store)
    equal(store.list_all_runs(), list(ODD_IDS), "all documents")
    equal(store.list_all_goals(), sorted(ODD_IDS), "all goals")
    for number, odd in enumerate(ODD_IDS):
        loaded = store.load_run(odd)
        equal(loaded is not None and loaded.narrative, str(number), f"the document {odd!r}")
    equal(store.get_runs_by_node("a/b"), ["a/b"], "by an odd node")
    equal(store.get_runs_by_goal("☃" * 85), ["☃" * 85], "by a long goal")
    for bad in BAD_IDS:
        with raises(InvalidId, f"a document with the id {bad[:20]!r}"):
            store.save_run(document(bad))
    with raises(UnstorableValue, "a document with an object in it"):
        store.save_run(document("run_1", input_data={"x": object()}))
    equal(store.load_run("run_1"), None, "the refused document")


def documents_go_with_their_run(subject: StorageUnderTest) -> None:
    """``delete_run`` removes the document and its index entries; either may exist without the other."""
    store = subject.new()
    store.open_run(new_run("both"), "me", 60)
    for run_id in ("both", "document only"):
        store.save_run(document(run_id, nodes=("n",)))
    with raises(RunBusy, "deleting a held run"):
        store.delete_run("both")
    equal(store.get_runs_by_node("n"), ["both", "document only"], "the index after the refusal")
    equal(found(store, "both").state, RunState.RUNNING, "the held run")
    store.release_lease("both", 1)
    equal((store.delete_run("both"), store.delete_run("document only")), (True, True), "deleting both")
    store = subject.again(store)
    equal((store.list_all_runs(), store.list_all_goals()), ([], []), "what is left")
    equal((store.get_runs_by_node("n"), store.get_runs_by_status("running")), ([], []), "the indexes")
    equal(store.delete_run("document only"), False, "deleting again")


def concurrent_documents_are_all_indexed(subject: StorageUnderTest) -> None:
    """Threads that save documents under the same keys lose none."""
    store = subject.new()
    results = race(5, lambda index: store.save_run(document(f"run_{index}", nodes=("n",))))
    equal(results, [None] * 5, "what the savers returned")
    expected = [f"run_{index}" for index in range(5)]
    equal(sorted(store.get_runs_by_node("n")), expected, "by node")
    equal(sorted(store.list_all_runs()), expected, "all documents")


CHECKS: tuple[Check, ...] = (
    checkpoints_come_back_equal,
    latest_is_the_last_saved,
    saving_an_id_again_replaces_it,
    missing_checkpoints_are_none,
    checkpoint_ids_may_be_odd,
    keys_of_a_memory_are_checked,
    saving_needs_the_lease_free,
    savers_do_not_lose_each_other,
    damaged_listing_hides_nothing,
    documents_come_back_equal,
    documents_are_indexed,
    documents_are_fenced,
    index_keys_are_checked,
    documents_go_with_their_run,
    concurrent_documents_are_all_indexed,
)
