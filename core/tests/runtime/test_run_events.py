"""What those who watch a run are told, and that watching never disturbs it."""

from __future__ import annotations

import logging

import pytest

from framework.graph import GraphExecutor, NodeResult, NodeSpec
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.node import NodeContext
from framework.graph.run_events import RunEvent
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import open_storage
from tests.graph.executor_kit import GOAL, PlainNode, edge, failing, graph_of, returning


def _told(events: list[RunEvent]) -> list[tuple[str, str | None, str | None]]:
    return [(event.kind, event.step, event.detail) for event in events]


async def test_a_run_tells_of_its_start_its_steps_and_its_end() -> None:
    with open_storage("memory://") as storage:
        runtime = Runtime(storage)
        events: list[RunEvent] = []
        runtime.add_listener(events.append)
        executor = GraphExecutor(runtime, node_registry={"a": returning(x=1), "b": returning(y=2)})
        result = await executor.execute(graph_of("a", "b"), GOAL)
        assert _told(events) == [
            ("run_started", None, None),
            ("step_started", "a#1", None),
            ("step_finished", "a#1", None),
            ("step_started", "b#1", None),
            ("step_finished", "b#1", None),
            ("run_ended", None, "completed"),
        ]
        assert {event.run_id for event in events} == {result.run_id}


async def test_failed_attempts_and_failed_steps_are_told_with_their_error() -> None:
    def second_time(ctx: NodeContext) -> NodeResult:
        return NodeResult(ctx.attempt == 2, error="not yet", tokens_used=3)

    with open_storage("memory://") as storage:
        runtime = Runtime(storage)
        events: list[RunEvent] = []
        runtime.add_listener(events.append)
        graph = graph_of(
            NodeSpec(id="a", max_retries=2, retry_delay_seconds=0),
            "b",
            "c",
            edges=[edge("a", "b"), edge("b", "c", "on_failure")],
        )
        nodes = {"a": PlainNode(second_time), "b": failing("broken"), "c": failing("broken too")}
        result = await GraphExecutor(runtime, node_registry=nodes).execute(graph, GOAL)
        assert not result.success
        told = [(event.kind, event.step, event.attempt, event.tokens) for event in events if event.step is not None]
        assert told == [
            ("step_started", "a#1", 0, 0),
            ("attempt_failed", "a#1", 1, 3),
            ("step_finished", "a#1", 2, 6),
            ("step_started", "b#1", 0, 0),
            ("step_failed", "b#1", 1, 0),
            ("step_started", "c#1", 0, 0),
            ("step_failed", "c#1", 1, 0),
        ]
        assert "broken" in str(events[5].error)
        assert (events[-1].kind, events[-1].detail, events[-1].error) == ("run_ended", "failed", result.error)


async def test_a_step_is_durable_when_it_is_told_to_be_finished_and_a_resume_says_what_it_recovered() -> None:
    with open_storage("memory://") as storage:
        runtime = Runtime(storage)
        events: list[RunEvent] = []
        sequences: list[int] = []

        def listen(event: RunEvent) -> None:
            events.append(event)
            if event.kind == "step_finished":
                record = storage.find_run("r")
                assert record is not None
                sequences.append(record.sequence)

        runtime.add_listener(listen)
        manager = CheckpointManager(storage, CheckpointConfig())
        executor = GraphExecutor(
            runtime, node_registry={"a": returning(x=1), "b": failing()}, checkpoint_manager=manager
        )
        await executor.execute(graph_of("a", "b"), GOAL, run_id="r")
        assert sequences == [1]
        events.clear()
        executor.register_node("b", returning(y=2))
        await executor.execute(graph_of("a", "b"), GOAL, run_id="r")
        assert _told(events)[0] == ("run_resumed", None, "1 step recovered")
        assert _told(events)[-1] == ("run_ended", None, "completed")


async def test_a_listener_that_raises_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with open_storage("memory://") as storage:
        runtime = Runtime(storage)
        kinds: list[str] = []

        def broken(event: RunEvent) -> None:
            raise ValueError("no")

        runtime.add_listener(broken)
        remove = runtime.add_listener(lambda event: kinds.append(event.kind))
        executor = GraphExecutor(runtime, node_registry={"a": returning(x=1)})
        with caplog.at_level(logging.ERROR):
            assert (await executor.execute(graph_of("a"), GOAL)).success
        assert kinds == ["run_started", "step_started", "step_finished", "run_ended"]
        assert "A listener of run" in caplog.text
        remove()
        remove()
        await executor.execute(graph_of("a"), GOAL)
        assert len(kinds) == 4
        assert runtime.has_listeners
