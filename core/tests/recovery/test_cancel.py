"""``CheckpointManager.cancel``: at once when nobody runs the run, else by its owner; messages to a run; metadata."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import LeaseLost, ResumeError, RunNotFound, UnstorableValue
from framework.graph.cancelling import was_asked_to_stop
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult
from framework.graph.run_messages import Inbox, cancel_name
from framework.graph.run_opening import Definition
from framework.runtime import Runtime
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState, RunStatus
from framework.storage import codec
from framework.storage.backend import FileStorage, Storage
from framework.storage.checkpoints import parse_log
from framework.storage.contract import new_run
from framework.storage.memory import MemoryStorage
from framework.storage.ownership import effective_state
from framework.storage.records import Commit, Message, Write
from framework.storage.sqlite import SQLiteStorage
from tests import forks

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

CORE = Path(__file__).parents[2]
RUN_ID = "run-1"
GOAL = Goal(id="goal", name="Goal", description="Reach the end.")


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.storage.heartbeat.LOOK_SECONDS", 0.02)


def last_record(agent: Agent) -> dict[str, Any]:
    assert agent.storage is not None
    return parse_log(agent.storage.read_log(RUN_ID))[-1]


async def cancel(agent: Agent) -> bool:
    assert agent.storage is not None
    return await asyncio.to_thread(CheckpointManager(agent.storage).cancel, RUN_ID)


def waiting_agent(agent: Agent) -> asyncio.Event:
    """a, then b, which waits for ever the first time, then c."""
    waits = asyncio.Event()

    async def wait(ctx: NodeContext) -> dict[str, Any]:
        if waits.is_set():
            return {"b": 1}
        waits.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    agent.node("a", lambda ctx: {"a": 1})
    agent.node("b", wait)
    agent.node("c", lambda ctx: {"c": 1})
    agent.chain("a", "b", "c")
    return waits


async def test_a_running_run_is_asked_to_stop_and_does(agent: Agent) -> None:
    waits = waiting_agent(agent)
    assert agent.storage is not None
    agent.runtime = Runtime(agent.storage)
    task = asyncio.create_task(agent.run())
    await waits.wait()
    await cancel(agent)
    await cancel(agent)  # asking again is harmless, also when it has stopped meanwhile
    result = await task
    assert task.cancelling() == 0
    assert (result.success, result.error, result.path) == (False, "cancelled on request", ["a"])
    assert result.session_state["resume_from"] == "b"
    record = agent.record()
    assert (record.state, record.error, record.owner) == (RunState.CANCELLED, "cancelled on request", None)
    assert last_record(agent) == {
        "kind": "end",
        "state": "cancelled",
        "error": "cancelled on request",
        "sequence": record.sequence,
    }
    document = agent.storage.load_run(RUN_ID)
    assert document is not None
    assert document.status is RunStatus.CANCELLED

    again = await agent.run()  # the old request does not cancel it again
    assert (again.success, again.path, agent.ran) == (True, ["a", "b", "c"], ["b#1", "c#1"])
    assert agent.state() is RunState.COMPLETED
    with pytest.raises(ResumeError, match="completed"):
        await cancel(agent)


async def test_a_node_that_swallows_the_cancellation_is_the_last(quick: Agent) -> None:
    waits = asyncio.Event()

    async def stubborn(ctx: NodeContext) -> dict[str, Any]:
        waits.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return {"b": "finished all the same"}
        raise AssertionError("never")

    quick.node("b", stubborn)
    quick.chain("b", "c")
    task = asyncio.create_task(quick.run())
    await waits.wait()
    await cancel(quick)
    result = await task
    assert (result.error, result.path, quick.state()) == ("cancelled on request", ["b"], RunState.CANCELLED)
    again = await quick.run()
    assert (again.success, quick.ran, again.output["b"]) == (True, ["c#1"], "finished all the same")


async def test_all_branches_stop(quick: Agent) -> None:
    waiting: set[str] = set()
    everybody = asyncio.Event()

    async def wait(ctx: NodeContext) -> dict[str, Any]:
        waiting.add(ctx.node_id)
        if len(waiting) == 3:
            everybody.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    quick.node("fan", fan_out=True)
    for name in ("x", "y", "z"):
        quick.node(name, wait)
        quick.chain("fan", name)
        quick.chain(name, "join")
    task = asyncio.create_task(quick.run())
    await everybody.wait()
    await cancel(quick)
    assert (await task).error == "cancelled on request"
    quick.work |= {name: (lambda ctx: {ctx.node_id: 1}) for name in ("x", "y", "z")}
    assert (await quick.run()).success
    assert sorted(ctx.node_id for ctx in quick.contexts) == ["join", "x", "y", "z"]


async def test_a_cancelled_caller_is_still_cancelled(quick: Agent) -> None:
    waits = waiting_agent(quick)
    await quick.cancelled_when(waits)
    assert quick.record().error == "cancelled"


async def test_a_request_during_the_last_commit_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    inboxes: list[Inbox] = []

    class Known(Inbox):
        def __init__(self, run_id: str, token: int) -> None:
            super().__init__(run_id, token)
            inboxes.append(self)

    class Slow(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            if any(isinstance(one, Commit) and one.state is RunState.COMPLETED for one in commits):
                asked.set()
                inboxes[0].deliver([Message(RUN_ID, cancel_name(1), b"null", 0.0)])
                assert seen.wait(20)
            return super().commit(commits)

    asked, seen = threading.Event(), threading.Event()
    monkeypatch.setattr("framework.graph.run_session.Inbox", Known)
    with Slow() as store:
        graph = GraphSpec.model_validate(
            {
                "id": "g",
                "goal_id": "goal",
                "entry_node": "a",
                "nodes": [{"id": "a", "node_type": "function"}],
                "edges": [],
            }
        )
        executor = GraphExecutor(Runtime(store), checkpoint_manager=CheckpointManager(store))
        executor.register_function("a", lambda: 1)
        task = asyncio.create_task(executor.execute(graph, GOAL, {}, run_id=RUN_ID))
        assert await asyncio.to_thread(asked.wait, 20)
        while not inboxes[0].cancel_requested.is_set():
            await asyncio.sleep(0)
        seen.set()
        result = await task
        assert (result.success, result.error, task.cancelling()) == (True, None, 0)
        record = store.find_run(RUN_ID)
        assert record is not None
        assert record.state is RunState.COMPLETED


async def test_a_run_that_was_taken_over_is_not_recorded_as_cancelled(quick: Agent) -> None:
    waits = waiting_agent(quick)
    task = asyncio.create_task(quick.run())
    await waits.wait()
    assert quick.storage is not None
    record = quick.record()
    quick.storage.send(RUN_ID, cancel_name(record.token), b"null")
    quick.storage.claim_run(RUN_ID, "another", 60, lambda owner: False)
    with pytest.raises(LeaseLost):
        await task
    assert quick.state() is RunState.RUNNING


@pytest.mark.parametrize("ending", ["paused", "failed", "crashed", "cancelled"])
async def test_a_run_that_nobody_runs_is_cancelled_at_once(agent: Agent, ending: str) -> None:
    agent.node("a", lambda ctx: {"a": 1})
    agent.node("b", lambda ctx: NodeResult(ending != "failed", {"b": 1}, error="broken"))
    agent.chain("a", "b", "c")
    agent.options["pause_nodes"] = ["b"]
    assert agent.storage is not None
    agent.runtime = Runtime(agent.storage)
    await agent.run()
    if ending == "crashed":
        agent.storage.claim_run(RUN_ID, "someone who is gone", 0)
    if ending == "cancelled":
        assert await cancel(agent)
    before = agent.record()
    assert await cancel(agent) is True
    after = agent.record()
    assert (after.state, after.error, after.owner) == (RunState.CANCELLED, "cancelled on request", None)
    assert after.sequence == before.sequence + (ending != "cancelled")
    document = agent.storage.load_run(RUN_ID)
    assert document is not None
    assert document.status is RunStatus.CANCELLED
    assert await cancel(agent) is True
    assert agent.record() == after
    agent.work["b"] = lambda ctx: {"b": 2}
    result = await agent.run()
    assert result.success
    assert result.output["a"] == 1


async def test_an_unknown_run_is_not_found(agent: Agent) -> None:
    with pytest.raises(RunNotFound):
        await cancel(agent)


async def test_a_request_that_its_owner_did_not_live_to_see_is_known(quick: Agent) -> None:
    assert quick.storage is not None
    quick.storage.open_run(new_run(RUN_ID), "host/elsewhere", 60)
    assert await cancel(quick) is False
    assert was_asked_to_stop(quick.storage, quick.record())
    quick.storage.claim_run(RUN_ID, "next", 60, lambda owner: False)
    assert not was_asked_to_stop(quick.storage, quick.record())


PROGRAM = """
    import asyncio, sys, time
    from framework.graph.checkpoint_manager import CheckpointManager
    from framework.graph.edge import EdgeSpec, GraphSpec
    from framework.graph.executor import GraphExecutor
    from framework.graph.goal import Goal
    from framework.graph.node import NodeResult, NodeSpec
    from framework.runtime import Runtime
    from framework.storage.backend import open_storage

    async def work(ctx):
        while True:
            time.sleep(0.05)  # blocks the loop nearly all the time
            await asyncio.sleep(0)
            print("turn", flush=True)

    class Node:
        async def execute(self, ctx):
            if ctx.node_id == "a":
                return NodeResult(True, {"a": 1})
            await work(ctx)

    async def main():
        storage = open_storage(sys.argv[1])
        graph = GraphSpec(id="g", goal_id="goal", entry_node="a",
            nodes=[NodeSpec(id="a", node_type="custom"), NodeSpec(id="b", node_type="custom")],
            edges=[EdgeSpec(id="e", source="a", target="b", condition="on_success")])
        executor = GraphExecutor(Runtime(storage), checkpoint_manager=CheckpointManager(storage),
            node_registry={"a": Node(), "b": Node()})
        result = await executor.execute(graph, Goal(id="goal", name="G", description="d"), {}, run_id="run-1")
        print("result", result.success, result.error, flush=True)

    asyncio.run(main())
"""


def start(url: str) -> subprocess.Popen[str]:
    return forks.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), url],
        env={**os.environ, "PYTHONPATH": str(CORE)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_a_run_of_another_process_stops_within_seconds(kind: str, tmp_path: Path) -> None:
    store: Storage = SQLiteStorage(tmp_path / "runs.db") if kind == "sqlite" else FileStorage(tmp_path / "runs")
    with store:
        process = start(store.url)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "turn\n"
            record = store.find_run(RUN_ID)
            assert record is not None
            assert effective_state(record) is RunState.RUNNING
            began = time.monotonic()
            CheckpointManager(store).cancel(RUN_ID)
            said = process.stdout.read().splitlines()[-1]
            assert time.monotonic() - began < 10
            assert said == "result False cancelled on request"
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
        record = store.find_run(RUN_ID)
        assert record is not None
        assert (record.state, record.owner) == (RunState.CANCELLED, None)


def test_a_killed_run_is_seen_as_crashed_before_its_lease_ends(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        process = start(store.url)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "turn\n"
        finally:
            process.kill()
            process.communicate()
        [record] = store.list_runs()
        assert record.state is RunState.RUNNING
        assert effective_state(record) is RunState.CRASHED
        assert CheckpointManager(store).cancel(RUN_ID) is True  # nobody alive has to be asked


# --- messages -------------------------------------------------------------------------------------------------------


async def test_a_session_is_told_of_each_message_once(storage: Storage) -> None:
    told: list[tuple[str, bytes]] = []
    fourth = asyncio.Event()

    def listen(message: Message) -> None:
        told.append((message.name, message.body))
        if len(told) == 4:
            fourth.set()
        if message.name == "m1":
            raise RuntimeError("a listener that fails")

    manager = CheckpointManager(storage)
    storage.open_run(new_run(RUN_ID, fingerprint="f"), None)
    storage.send(RUN_ID, "m0", b"0")
    opened = await open_plainly(manager, RUN_ID)
    remove = opened.session.on_message(listen)
    for number in (1, 2):
        storage.send(RUN_ID, f"m{number}", b"%d" % number)
    assert [each.name for each in await opened.session.messages()] == ["m0", "m1", "m2"]
    await asyncio.to_thread(storage.send, RUN_ID, "m3", b"3")
    await fourth.wait()
    assert told == [(f"m{number}", b"%d" % number) for number in range(4)]
    late: list[str] = []
    opened.session.on_message(lambda message: late.append(message.name))
    assert late == ["m0", "m1", "m2", "m3"]
    remove()
    await opened.session.abandon()


async def open_plainly(manager: CheckpointManager, run_id: str, **options: Any) -> Any:
    definition = Definition("graph", ExecutorType.GRAPH, "goal", "f", {}, lambda old, new: [])
    return await manager.open_session(
        definition, run_id, initial={}, input_data={}, header={}, on_problem=lambda text: None, **options
    )


async def test_looking_for_messages_costs_no_query_per_commit(monkeypatch: pytest.MonkeyPatch, quick: Agent) -> None:
    monkeypatch.setattr("framework.storage.heartbeat.LOOK_SECONDS", 3600.0)
    assert isinstance(quick.storage, MemoryStorage)
    looks: list[int] = []
    count = quick.storage.count_messages

    def counting(ids: Sequence[str]) -> dict[str, int]:
        looks.append(1)
        return count(ids)

    monkeypatch.setattr(quick.storage, "count_messages", counting)
    quick.chain(*(f"n{index}" for index in range(50)))
    assert (await quick.run()).success
    assert len(looks) <= 1


# --- metadata -------------------------------------------------------------------------------------------------------


async def test_metadata_is_kept_with_the_run(agent: Agent) -> None:
    agent.node("a", lambda ctx: NodeResult(False, error="broken"))
    facts = {"agent_path": "/srv/agent", "mock": False, "model": None, "tags": ["x", {"y": 1.5}]}
    executor = agent.executor()
    await executor.execute(agent.graph, GOAL, {}, run_id=RUN_ID, metadata=facts)
    assert codec.decode(agent.record().header)["metadata"] == facts
    await agent.executor().execute(agent.graph, GOAL, {}, run_id=RUN_ID, metadata={"other": 1})
    assert codec.decode(agent.record().header)["metadata"] == facts


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        ({"when": object()}, "metadata.when"),
        ({"a": {"b": [1, {2}]}}, "metadata.a.b[1]"),
        ({"a": float("nan")}, "metadata.a"),
        ({1: 2}, "metadata"),
        ({"a b": b"x"}, "metadata['a b']"),
        (["x"], "metadata"),
    ],
)
async def test_metadata_that_is_not_json_is_refused(quick: Agent, metadata: Any, path: str) -> None:
    quick.node("a")
    result = await quick.executor().execute(quick.graph, GOAL, {}, run_id=RUN_ID, metadata=metadata)
    assert not result.success
    assert f"{path}: " in (result.error or "")
    assert quick.storage is not None
    assert quick.storage.find_run(RUN_ID) is None
    with pytest.raises(UnstorableValue):
        await open_plainly(CheckpointManager(quick.storage), RUN_ID, metadata=metadata)
