"""What a view says of runs of graphs that ended in every way, and what a resume of them would do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.errors import RunNotFound
from framework.graph.edge import GraphSpec
from framework.graph.node import NodeSpec
from framework.graph.run_view import as_json, view_run
from framework.runtime import Runtime
from framework.schemas.checkpoint import Checkpoint, ExecutorType
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from tests.graph.executor_kit import GOAL, edge, graph_of
from tests.graph.run_view_kit import (
    RUN_ID,
    by_key,
    cancelled_when,
    checked,
    crash,
    execute,
    executor_for,
    kill,
    letter,
    spread,
    standings,
    start_and_wait_inside,
)


@pytest.fixture(params=["memory", "sqlite", "file", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/runs.db", "file": f"file://{tmp_path}/store"}
    url = urls.get(request.param) or request.getfixturevalue("postgres_url")
    opened = open_storage(url)
    with opened:
        yield opened


def down(**_: Any) -> Any:
    raise ConnectionError("the line is down")


GOOD = {"draft": lambda **_: "Dear reader", "send": lambda **_: "sent"}
ANSWER = {"approved": True, "by": "me"}


async def test_a_completed_run(storage: Storage) -> None:
    await execute(storage, letter(), GOOD, {"to": "reader", **ANSWER})
    view = checked(storage, definition=letter())
    assert (view.state, view.kind, view.definition_id, view.goal_id) == (RunState.COMPLETED, "graph", "graph", "goal")
    assert view.input == {"to": "reader", **ANSWER}
    assert view.path == ("draft", "ask", "send")
    assert set(standings(view).values()) == {"done"}
    draft = by_key(view)["draft#1"]
    assert (draft.goes_to, draft.edge, draft.attempts) == (("ask",), "draft-ask-on_success-0", 1)
    assert draft.finished_at == pytest.approx(view.updated_at, abs=60)
    assert (view.steps_taken, view.owner, view.lease_seconds_left) == (3, None, None)
    assert (view.checkpoints, view.first_checkpoint, view.last_checkpoint) == (3, 1, 3)
    keys = {each.key: each for each in view.state_keys}
    assert (keys["text"].type, keys["text"].summary, keys["text"].bytes) == ("str", "Dear reader", 13)
    assert (view.resume.verdict, view.resume.kept) == ("nothing", ("draft#1", "ask#1", "send#1"))
    assert view.resume.refusals == ()


async def test_a_run_that_waits_for_a_persons_input(storage: Storage) -> None:
    await execute(storage, letter(), GOOD, {"to": "reader"})
    view = checked(storage)
    assert view.state is RunState.PAUSED
    assert standings(view) == {"draft#1": "done", "ask#1": "waiting"}
    assert view.resume.verdict == "waits"
    assert [(each.kind, each.step, each.keys) for each in view.resume.waiting] == [("input", "ask", ("approved", "by"))]
    assert "'ask' asks for approved, by" in view.resume.summary
    assert view.resume.again == ()


async def test_a_run_paused_after_a_pause_node_says_where_it_goes_on(storage: Storage) -> None:
    graph = graph_of("one", "two", pause_nodes=["one"])
    await execute(storage, graph, {"one": lambda **_: 1, "two": lambda **_: 2})
    view = checked(storage)
    assert standings(view) == {"one#1": "done", "two#1": "next"}
    assert (view.resume.verdict, view.resume.first) == ("goes_on", ("two#1",))
    assert any("paused after 'one'" in note for note in view.resume.notes)


async def test_a_failed_run_names_its_attempts_and_keeps_what_is_done(storage: Storage) -> None:
    await execute(storage, letter(), {**GOOD, "send": down}, {"to": "reader", **ANSWER})
    view = checked(storage)
    assert view.state is RunState.FAILED
    assert view.error is not None
    assert "the line is down" in view.error
    send = by_key(view)["send#1"]
    assert (send.status, send.attempts) == ("failed", 2)
    assert [each.number for each in send.failed_attempts] == [1, 2]
    assert (view.resume.verdict, view.resume.kept) == ("goes_on", ("draft#1", "ask#1"))
    assert [(each.step, each.certain) for each in view.resume.again] == [("send#1", True)]
    assert "no call of it is recorded" in view.resume.again[0].why


async def test_a_failure_that_an_edge_handles_is_told_from_one_that_ends_the_run(storage: Storage) -> None:
    graph = graph_of("try", "rescue", edges=[edge("try", "rescue", "on_failure")])
    await execute(storage, graph, {"try": down, "rescue": lambda **_: 1})
    view = checked(storage)
    step = by_key(view)["try#1"]
    assert (step.status, step.goes_to) == ("handled", ("rescue",))
    assert step.error is not None
    assert "the line is down" in step.error
    assert view.state is RunState.COMPLETED


async def test_a_run_stopped_by_the_step_limit_has_a_next_step_that_did_not_begin(storage: Storage) -> None:
    graph = graph_of("one", "two", max_steps=1)
    await execute(storage, graph, {"one": lambda **_: 1, "two": lambda **_: 2})
    view = checked(storage)
    assert standings(view) == {"one#1": "done", "two#1": "next"}
    assert view.resume.again == ()
    assert any("max_steps" in note for note in view.resume.notes)


async def test_visits_of_a_loop_are_steps_of_their_own(storage: Storage) -> None:
    graph = graph_of(
        NodeSpec(id="count", node_type="function", output_keys=["n"], max_retries=1),
        edges=[edge("count", "count", "conditional", condition_expr="n < 3")],
    )
    seen: list[int] = []

    def count(**_: Any) -> int:
        seen.append(1)
        return len(seen)

    await execute(storage, graph, {"count": count})
    view = checked(storage)
    assert list(standings(view)) == ["count#1", "count#2", "count#3"]
    assert [step.goes_to for step in view.steps] == [("count",), ("count",), ()]


async def test_a_cancelled_fan_out_keeps_finished_branches_and_names_those_that_may_have_begun(
    storage: Storage,
) -> None:
    inside, finished = asyncio.Event(), asyncio.Event()

    async def hangs(**_: Any) -> Any:
        inside.set()
        await asyncio.Event().wait()

    async def quick(**_: Any) -> int:
        await inside.wait()
        return 1

    async def wait_for_a(**_: Any) -> Any:
        while not any(b'"a"' in row.record for row in storage.read_log(RUN_ID)):
            await asyncio.sleep(0)
        finished.set()
        await asyncio.Event().wait()

    functions = {"begin": lambda **_: {}, "a": quick, "b": hangs, "c": wait_for_a, "end": lambda **_: 1}
    await cancelled_when(finished, storage, spread(), functions)
    view = checked(storage)
    assert view.state is RunState.CANCELLED
    steps = by_key(view)
    assert steps["begin#1"].goes_to == ("a", "b", "c")
    a, b, c = (steps[f"/begin#1.{index}:{name}#1"] for index, name in enumerate("abc"))
    assert (a.status, b.status, c.status) == ("done", "interrupted", "interrupted")
    assert a.goes_to == ("end",)
    assert view.resume.kept == ("begin#1", a.key)
    assert [(each.step, each.certain) for each in view.resume.again] == [(b.key, False), (c.key, False)]
    assert "may have been in flight" in view.resume.again[0].why

    done = {"begin": lambda **_: {}, **dict.fromkeys("abc", lambda **_: 1), "end": lambda **_: 1}
    await execute(storage, spread(), done)
    view = checked(storage)
    assert view.resume.verdict == "nothing"
    assert by_key(view)["end#1"].status == "done"


@pytest.mark.parametrize("shape", ["letter", "spread"])
def test_a_process_that_dies_leaves_a_crashed_run_whose_step_in_flight_is_named(tmp_path: Path, shape: str) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    crash(url, shape)
    with open_storage(url) as storage:
        view = checked(storage)
    assert view.state is RunState.CRASHED  # though its lease still lasts
    assert view.resume.verdict == "goes_on"
    interrupted = {step.node_id for step in view.steps if step.status == "interrupted"}
    assert {each.node_id for each in view.resume.again} == interrupted
    if shape == "letter":
        assert view.resume.kept == ("draft#1", "ask#1")
        assert interrupted == {"send"}
    else:
        assert "begin#1" in view.resume.kept
        assert {"b", "c"} <= interrupted


def test_a_run_that_runs_elsewhere_is_busy_until_its_process_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    process = start_and_wait_inside(url, "letter")
    try:
        with open_storage(url) as storage:
            view = checked(storage)
            assert (view.state, view.resume.verdict) == (RunState.RUNNING, "busy")
            assert view.lease_seconds_left is not None
            assert 0 < view.lease_seconds_left <= 30
            assert f"process {process.pid}" in view.resume.summary
            assert by_key(view)["send#1"].status == "running"
            kill(process)
            assert checked(storage).state is RunState.CRASHED
    finally:
        kill(process)


async def test_a_definition_that_changed_is_refused_with_the_difference(storage: Storage) -> None:
    await execute(storage, letter(), {**GOOD, "send": down}, {"to": "reader", **ANSWER})
    changed = letter()
    changed.nodes[2].output_keys = ["receipt"]
    view = checked(storage, definition=changed)
    assert view.resume.verdict == "refused"
    assert view.resume.changes == ("node 'send': output_keys ['sent'] -> ['receipt']",)
    assert checked(storage, definition=letter()).resume.verdict == "goes_on"
    without = GraphSpec.model_validate({**letter().model_dump(), "nodes": letter().nodes[:2]})
    assert any(
        "'send'" in line and "no longer has" in line for line in checked(storage, definition=without).resume.refusals
    )


async def test_a_completed_run_is_nothing_to_resume_for_a_later_version_of_its_graph(storage: Storage) -> None:
    await execute(storage, letter(), GOOD, {"to": "reader", **ANSWER})
    changed = letter()
    changed.nodes[2].output_keys = ["receipt"]
    view = checked(storage, definition=changed)
    assert (view.resume.verdict, len(view.resume.changes)) == ("nothing", 1)


async def test_a_run_that_was_saved_by_hand_cannot_be_resumed_by_an_executor(storage: Storage) -> None:
    storage.save_checkpoint(
        Checkpoint(id="c1", run_id=RUN_ID, executor_type=ExecutorType.GRAPH, memory_snapshot={"x": 1})
    )
    view = checked(storage)
    assert view.resume.verdict == "refused"
    assert "not started by an executor" in view.resume.summary
    assert [key.key for key in view.state_keys] == ["x"]


async def test_a_run_that_committed_nothing_begins_at_its_start(storage: Storage) -> None:
    inside = asyncio.Event()

    async def hangs(**_: Any) -> Any:
        inside.set()
        await asyncio.Event().wait()

    await cancelled_when(inside, storage, graph_of("only"), {"only": hangs})
    view = checked(storage)
    assert standings(view) == {"only#1": "interrupted"}
    assert (view.checkpoints, view.first_checkpoint, view.resume.checkpoint_id) == (0, None, None)
    assert "begins at its start" in view.resume.summary


async def test_problems_totals_and_metadata_are_shown(storage: Storage) -> None:
    executor = executor_for(storage, {"only": down})
    executor.runtime = Runtime(storage)
    await executor.execute(graph_of("only"), GOAL, {}, run_id=RUN_ID, parent_run_id="parent-1")
    view = checked(storage)
    assert view.parent_run_id == "parent-1"
    assert [problem.severity for problem in view.problems] == ["critical"]
    assert "the line is down" in view.problems[0].description


async def test_a_view_is_plain_json(storage: Storage) -> None:
    await execute(storage, letter(), {**GOOD, "send": down}, {"to": "reader", **ANSWER})
    plain = as_json(view_run(storage, RUN_ID, definition=letter()))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["state"] == "failed"
    assert plain["resume"]["again"][0]["node_id"] == "send"


def test_an_unknown_run_is_not_found(storage: Storage) -> None:
    with pytest.raises(RunNotFound):
        view_run(storage, "nobody")


async def test_a_fork_names_where_it_comes_from_and_goes_on_from_there(storage: Storage) -> None:
    await execute(storage, letter(), {**GOOD, "send": down}, {"to": "reader", **ANSWER})
    manager = executor_for(storage, GOOD).checkpoint_manager
    assert manager is not None
    forked = manager.fork(RUN_ID, at=1, changes={"text": "Dear all"})
    view = checked(storage, run_id=forked)
    assert view.forked_from is not None
    assert (view.forked_from["run_id"], view.forked_from["sequence"]) == (RUN_ID, 1)
    assert (view.resume.kept, view.resume.first, view.resume.verdict) == (("draft#1",), ("ask#1",), "goes_on")
    assert {each.key: each.summary for each in view.state_keys}["text"] == "Dear all"


def test_a_request_to_stop_a_running_run_is_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    process = start_and_wait_inside(url, "letter")
    try:
        with open_storage(url) as storage:
            manager = executor_for(storage, {}).checkpoint_manager
            assert manager is not None
            # Its loop is blocked inside the step, so it cannot follow the request yet.
            assert manager.cancel(RUN_ID) is False
            view = checked(storage)
            assert view.asked_to_stop
            assert "asked to stop" in view.resume.summary
    finally:
        kill(process)
