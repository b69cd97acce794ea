"""What the tests of `GraphExecutor` share: the least of a runtime, plain nodes, and short ways to write graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec

GOAL = Goal(id="goal", name="Goal", description="Get it done")
Behaviour = Callable[[NodeContext], NodeResult]


class MinimalRuntime:
    """No more than what an executor may ask of a runtime."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []
        self.problems: list[tuple[str, str]] = []

    def start_run(self, **arguments: Any) -> str:
        self.started.append(arguments)
        return f"run-{len(self.started)}"

    def end_run(self, **arguments: Any) -> None:
        self.ended.append(arguments)

    def report_problem(self, *, severity: str, description: str) -> str:
        self.problems.append((severity, description))
        return ""


class PlainNode:
    """A node that is no subclass of anything; keeps the contexts it was given."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.contexts: list[NodeContext] = []

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.contexts.append(ctx)
        return self.behaviour(ctx)


def returning(**output: Any) -> PlainNode:
    return PlainNode(lambda ctx: NodeResult(success=True, output=output))


def failing(error: str = "no luck") -> PlainNode:
    return PlainNode(lambda ctx: NodeResult(success=False, error=error))


def graph_of(*nodes: NodeSpec | str, edges: list[EdgeSpec] | None = None, **fields: Any) -> GraphSpec:
    """A graph; without edges a chain of its nodes. Nodes given by id are tried once."""
    specs = [NodeSpec(id=node, max_retries=1) if isinstance(node, str) else node for node in nodes]
    if edges is None:
        edges = [edge(one.id, other.id) for one, other in pairwise(specs)]
    fields.setdefault("entry_node", specs[0].id)
    return GraphSpec(id="graph", goal_id="goal", nodes=specs, edges=edges, **fields)


def edge(source: str, target: str, condition: str = "always", **fields: Any) -> EdgeSpec:
    name = f"{source}-{target}-{condition}-{fields.get('priority', 0)}"
    return EdgeSpec(id=name, source=source, target=target, condition=EdgeCondition(condition), **fields)


async def run(
    graph: GraphSpec,
    nodes: dict[str, Any],
    input_data: dict[str, Any] | None = None,
    session_state: dict[str, Any] | None = None,
    *,
    runtime: Any = None,
    **parts: Any,
) -> ExecutionResult:
    executor = GraphExecutor(runtime=runtime or MinimalRuntime(), node_registry=nodes, **parts)
    return await executor.execute(graph, GOAL, input_data, session_state)
