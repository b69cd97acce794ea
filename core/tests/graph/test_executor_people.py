"""People and pauses in one durable run: the executor asks once, goes on after the answer, and skips nobody."""

from __future__ import annotations

from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeSpec
from framework.storage import open_storage
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of, returning


def person(**fields: Any) -> NodeSpec:
    return NodeSpec(**{"id": "ask", "node_type": "human_input", **fields})


@pytest.fixture
def manager() -> CheckpointManager:
    return CheckpointManager(open_storage("memory:"))


async def go(manager: CheckpointManager, graph: GraphSpec, answer: dict[str, Any] | None = None) -> ExecutionResult:
    """The same call that starts the run, or goes on with it."""
    nodes = {name: returning() for name in ("a", "b", "c")}
    executor = GraphExecutor(MinimalRuntime(), node_registry=nodes, checkpoint_manager=manager)
    return await executor.execute(graph, GOAL, answer, run_id="run")


@pytest.mark.parametrize("pause_nodes", [[], ["ask"]])
async def test_a_person_is_asked_once_and_the_edges_see_the_answer(
    manager: CheckpointManager, pause_nodes: list[str]
) -> None:
    edges = [edge("ask", "b", "conditional", condition_expr="answer == 'yes'", priority=1), edge("ask", "c")]
    graph = graph_of(person(output_keys=["answer"]), "b", "c", edges=edges, pause_nodes=pause_nodes)
    assert (await go(manager, graph)).paused_at == "ask"
    assert (await go(manager, graph)).paused_at == "ask"
    done = await go(manager, graph, {"answer": "yes"})
    assert (done.success, done.paused_at, done.path) == (True, None, ["ask", "b"])
    assert done.output["answer"] == "yes"


async def test_the_resume_entry_point_of_a_person_is_where_an_answered_run_goes_on(manager: CheckpointManager) -> None:
    spec = person(output_keys=["answer"])
    edges = [edge("ask", "b")]
    graph = graph_of(spec, "b", "c", edges=edges, pause_nodes=["ask"], entry_points={"ask_resume": "c"})
    assert (await go(manager, graph)).paused_at == "ask"
    assert (await go(manager, graph, {"answer": 1})).path == ["ask", "c"]


async def test_a_person_after_a_pause_node_is_asked_though_the_pause_was_resumed(manager: CheckpointManager) -> None:
    graph = graph_of("a", person(), "b", pause_nodes=["a"])
    assert (await go(manager, graph)).paused_at == "a"
    second = await go(manager, graph)
    assert (second.paused_at, second.path) == ("ask", ["a"])
    assert (await go(manager, graph)).path == ["a", "ask", "b"]
