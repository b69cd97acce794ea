"""Nodes that make calls, and a durable run of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.runner.tool_registry import ToolRegistry
from framework.runtime import Runtime
from framework.storage.memory import MemoryStorage


class Calls(NodeProtocol):
    """Makes each of the calls, by name, and keeps their values."""

    def __init__(self, calls: Mapping[str, Callable[[], Any]]) -> None:
        self.calls = calls
        self.values: dict[str, Any] = {}

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.values = {name: await ctx.call(name, make) for name, make in self.calls.items()}
        return NodeResult(True)


async def run_durably(
    node: Any, *, run_id: str, llm: Any = None, registry: ToolRegistry | None = None, tools: Sequence[str] = ()
) -> ExecutionResult:
    """Run a graph of one node ``work``: ``node``, or, without one, a question to ``llm`` with ``tools``."""
    storage = MemoryStorage()
    executor = GraphExecutor(
        Runtime(storage),
        llm=llm,
        tools=list(registry.get_tools().values()) if registry is not None else [],
        tool_executor=registry.get_executor().acall if registry is not None else None,
        node_registry={} if node is None else {"work": node},
        checkpoint_manager=CheckpointManager(storage),
    )
    spec = NodeSpec(id="work", tools=list(tools), output_keys=["said"] if node is None else [])
    graph = GraphSpec(id="g", goal_id="goal", entry_node="work", terminal_nodes=["work"], nodes=[spec], edges=[])
    result = await executor.execute(graph, Goal(id="goal", name="Goal", description=""), {"q": "?"}, run_id=run_id)
    assert result.success, result.error
    return result
