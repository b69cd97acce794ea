"""Run documents saved off the event loop, and the records of earlier processes read when somebody asks for them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from framework.errors import StorageError
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.runtime_port import RuntimePort
from framework.runtime import Runtime
from framework.schemas.run import Run, RunStatus
from framework.storage.memory import MemoryStorage
from framework.storage.records import NO_TOKEN

GOAL = Goal(id="goal", name="Goal", description="Do it.")
OPTIONS = [{"id": "a", "description": "the one"}]


class Watched(MemoryStorage):
    """Notes in which thread documents are read and saved, and with which status; can wait and fail."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.saved: list[RunStatus] = []
        self.gate: threading.Event | None = None
        self.failure: Exception | None = None

    def load_run(self, run_id: str) -> Run | None:
        self.threads.add(threading.get_ident())
        return super().load_run(run_id)

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        self.threads.add(threading.get_ident())
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        super().save_run(run, token)
        self.saved.append(run.status)


def events_of(count: int) -> list[dict[str, Any]]:
    """What a process recorded that made ``count`` decisions and ran into a problem."""
    runtime = Runtime(MemoryStorage())
    events: list[dict[str, Any]] = []
    runtime.start_run("goal", run_id="run-1")
    with runtime.recording(events):
        for number in range(count):
            decided = runtime.decide(f"intent {number}", OPTIONS, "a", "why", node_id=f"n{number % 3}")
            runtime.record_outcome(decided, success=number % 2 == 0, tokens_used=1)
        runtime.report_problem("warning", "early")
    return events


def loaded(storage: MemoryStorage, run_id: str = "run-1") -> Run:
    run = storage.load_run(run_id)
    assert run is not None
    return run


def test_direct_use_is_durable_on_return() -> None:
    storage = Watched()
    runtime = Runtime(storage)
    runtime.start_run("goal", run_id="run-1")
    assert loaded(storage).status is RunStatus.RUNNING
    runtime.end_run(success=True)
    assert loaded(storage).status is RunStatus.COMPLETED
    assert storage.threads == {threading.get_ident()}


def test_deferred_saves_are_made_when_they_are_called() -> None:
    storage = Watched()
    runtime, other = Runtime(storage), Runtime(storage)
    saves: list[Callable[[], None]] = []
    with runtime.deferring_saves(saves):
        runtime.start_run("goal", run_id="run-1")
        runtime.end_run(success=True, output_data={"x": 1})
        other.start_run("goal", run_id="run-2")
    assert storage.saved == [RunStatus.RUNNING], "another runtime's are not put off"
    assert storage.load_run("run-1") is None
    for save in saves:
        save()
    assert loaded(storage).output_data == {"x": 1}
    assert loaded(storage).status is RunStatus.COMPLETED


async def test_an_executor_leaves_documents_to_a_thread() -> None:
    storage = Watched()
    executor = GraphExecutor(Runtime(storage))
    executor.register_function("a", lambda: 1)
    graph = GraphSpec(id="graph", goal_id="goal", entry_node="a", nodes=[NodeSpec(id="a", node_type="function")])
    results = await asyncio.gather(*(executor.execute(graph, GOAL, run_id=f"run-{n}") for n in range(20)))
    assert all(result.success for result in results)
    assert threading.get_ident() not in storage.threads
    assert sorted(storage.saved) == [RunStatus.COMPLETED] * 20 + [RunStatus.RUNNING] * 20


async def test_the_loop_goes_on_while_a_document_is_saved() -> None:
    storage = Watched()
    storage.gate = threading.Event()
    port = RuntimePort(Runtime(storage))
    started = asyncio.create_task(port.start(GOAL, {}, "run-1"))
    await asyncio.sleep(0)
    assert not started.done(), "durable on return"
    storage.gate.set()
    assert await started == "run-1"
    assert storage.saved == [RunStatus.RUNNING]


async def test_a_start_cancelled_while_it_is_saved_leaves_nothing_active() -> None:
    storage = Watched()
    storage.gate = threading.Event()
    runtime = Runtime(storage)
    started = asyncio.create_task(RuntimePort(runtime).start(GOAL, {}, "run-1"))
    await asyncio.sleep(0)
    started.cancel()
    await asyncio.sleep(0)
    storage.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await started
    assert storage.saved == [RunStatus.RUNNING, RunStatus.CANCELLED], "in this order"
    assert runtime.current_run is None


async def test_a_deferred_save_that_fails_is_reported_as_always(caplog: pytest.LogCaptureFixture) -> None:
    storage = Watched()
    storage.failure = StorageError("The disk is full.")
    runtime = Runtime(storage)
    port = RuntimePort(runtime)
    with caplog.at_level(logging.WARNING):
        await port.start(GOAL, {}, "run-1")
    assert "was not saved" in caplog.text
    storage.failure = None
    await port.end(True, "", {})
    assert ["The disk is full" in problem.description for problem in loaded(storage).problems] == [True]


async def test_a_resumed_record_is_saved_beside_the_run_and_before_its_end() -> None:
    storage = Watched()
    storage.gate = threading.Event()
    runtime = Runtime(storage)
    port = RuntimePort(runtime)
    await port.start(GOAL, {}, "run-1", events_of(4))  # returns although the save waits
    assert storage.saved == []
    assert runtime.decide("more", OPTIONS, "a", "why", node_id="n9") == "dec_4"
    assert runtime.report_problem("warning", "late") == "prob_1"
    storage.gate.set()
    await port.end(True, "", {})
    assert storage.saved == [RunStatus.RUNNING, RunStatus.COMPLETED]
    run = loaded(storage)
    assert [decision.id for decision in run.decisions] == [f"dec_{n}" for n in range(5)]
    assert [problem.description for problem in run.problems] == ["early", "late"]
    assert run.metrics.total_decisions == 5
    assert run.metrics.successful_decisions == 2
    assert run.metrics.failed_decisions == 2
    assert run.metrics.total_tokens == 4
    assert run.metrics.nodes_executed == ["n0", "n1", "n2", "n9"]


def test_earlier_decisions_are_validated_when_somebody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[int] = []
    replay = Run.replay

    def counted(self: Run, events: Any, **given: Any) -> list[str]:
        replayed.append(len(events))
        return replay(self, events, **given)

    monkeypatch.setattr(Run, "replay", counted)
    runtime = Runtime(MemoryStorage())
    events = events_of(50)
    saves: list[Callable[[], None]] = []
    with runtime.deferring_saves(saves):
        runtime.start_run("goal", run_id="run-1", earlier=events)
        assert runtime.decide("more", OPTIONS, "a", "why") == "dec_50"
    assert replayed == []
    run = runtime.current_run
    assert run is not None
    assert replayed == [101]
    assert [decision.intent for decision in run.decisions][-2:] == ["intent 49", "more"]
    assert runtime.current_run is run
    assert replayed == [101]


def test_an_outcome_of_an_earlier_decision_is_recorded() -> None:
    runtime = Runtime(MemoryStorage())
    saves: list[Callable[[], None]] = []
    with runtime.deferring_saves(saves):
        runtime.start_run("goal", run_id="run-1", earlier=events_of(3))
        runtime.record_outcome("dec_1", success=True, tokens_used=5)
    run = runtime.current_run
    assert run is not None
    assert run.decisions[1].was_successful
    assert run.metrics.total_tokens == 7
