"""What there is to know about an agent without running it: a description, and what stands in its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.graph.edge import GraphSpec
from framework.graph.goal import Goal
from framework.graph.node_base import NodeSpec


@dataclass
class AgentInfo:
    """An agent's graph and goal as plain data, for listings and prompts."""

    name: str
    description: str
    goal_name: str
    goal_description: str
    node_count: int
    edge_count: int
    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]
    entry_node: str
    terminal_nodes: list[str]
    success_criteria: list[dict[str, Any]]
    constraints: list[dict[str, Any]]
    required_tools: list[str]
    has_tools_module: bool
    async_entry_points: list[dict[str, Any]] = field(default_factory=list)
    is_multi_entry_point: bool = False


@dataclass
class ValidationResult:
    """Whether an agent can run (``valid``: no ``errors``), and what should be looked at (``warnings``).

    ``missing_tools`` are names no registered tool has; ``missing_credentials`` are environment variables to set.
    """

    valid: bool
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing_tools: list[str] = field(default_factory=list)
    missing_credentials: list[str] = field(default_factory=list)


def describe(graph: GraphSpec, goal: Goal, has_tools_module: bool) -> AgentInfo:
    """The description of an agent."""
    return AgentInfo(
        name=graph.id,
        description=graph.description,
        goal_name=goal.name,
        goal_description=goal.description,
        node_count=len(graph.nodes),
        edge_count=len(graph.edges),
        nodes=[_node(node) for node in graph.nodes],
        edges=[
            {"id": edge.id, "source": edge.source, "target": edge.target, "condition": edge.condition.value}
            for edge in graph.edges
        ],
        entry_node=graph.entry_node,
        terminal_nodes=list(graph.terminal_nodes),
        success_criteria=[
            {"id": each.id, "description": each.description, "metric": each.metric, "target": each.target}
            for each in goal.success_criteria
        ],
        constraints=[
            {"id": each.id, "description": each.description, "type": each.constraint_type} for each in goal.constraints
        ],
        required_tools=required_tools(graph),
        has_tools_module=has_tools_module,
        async_entry_points=[entry.model_dump(mode="json") for entry in graph.async_entry_points],
        is_multi_entry_point=graph.has_async_entry_points(),
    )


def _node(node: NodeSpec) -> dict[str, Any]:
    return {
        "id": node.id,
        "name": node.name,
        "description": node.description,
        "type": node.node_type,
        "input_keys": list(node.input_keys),
        "output_keys": list(node.output_keys),
        "tools": list(node.tools),
    }


def required_tools(graph: GraphSpec) -> list[str]:
    """Names of the tools that nodes may use, sorted."""
    return sorted({tool for node in graph.nodes for tool in node.tools})


def missing_functions(graph: GraphSpec, registry: Mapping[str, Any]) -> Iterator[str]:
    """One message per function node that nothing was registered for."""
    for node in graph.nodes:
        if node.node_type == "function" and node.id not in registry:
            yield (
                f"Node {node.id!r} is a function node and no function is registered for it; call "
                f"register_function({node.id!r}, ...), or put @node_function({node.id!r}) on one in nodes.py."
            )
