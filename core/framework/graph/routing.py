"""Where a run goes after a node: a router's choice, or the edges that hold, and the inputs they map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.goal import Goal
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeResult, NodeSpec
from framework.graph.spending import NOTHING, Spent


@dataclass(frozen=True, slots=True)
class Route:
    """The nodes to go to, in order, and for each the values its edge maps into the state.

    ``error`` says why there is no valid way. ``spent`` is what asking a model for the way took.
    """

    targets: tuple[str, ...] = ()
    mapped: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    spent: Spent = NOTHING


NOWHERE = Route()
"""Nothing follows."""


async def choose(
    graph: GraphSpec,
    spec: NodeSpec,
    edges: Iterable[EdgeSpec],
    memory: SharedMemory,
    result: NodeResult,
    *,
    llm_of: Callable[[], Any],
    goal: Goal,
    on_warning: Callable[[str], None],
) -> Route:
    """The route after ``spec`` returned ``result``.

    A router's ``next_node`` wins and maps nothing. Otherwise the first edge that holds, by priority; for a successful
    fan-out node every edge that holds. No edge means the end, of the branch or the run. After a success in a terminal
    node nothing is evaluated. ``edges`` are those that leave the node, in that order; ``llm_of`` gives the model that
    they may ask.
    """
    if result.success and spec.id in graph.terminal_nodes:
        return NOWHERE
    next_node = result.next_node if result.success else None
    if next_node:
        if graph.get_node(next_node) is None:
            return Route(error=f"Node {spec.name!r} chose {next_node!r} as next, which is not in graph {graph.id!r}.")
        return Route((next_node,), ({},))
    targets: list[str] = []
    mapped: list[dict[str, Any]] = []
    spent = NOTHING
    output = result.output or {}
    for edge in edges:
        if edge.condition is EdgeCondition.LLM_DECIDE and (llm := llm_of()) is not None:
            target = graph.get_node(edge.target)
            names = (spec.name, target.name if target is not None else edge.target)
            holds, took = await edge.decide(result.success, output, memory.view(), llm, goal, *names, on_warning)
            spent += took
        else:
            holds = edge.should_traverse(result.success, output, memory.view(), on_warning=on_warning)
        if holds:
            targets.append(edge.target)
            mapped.append(_map(edge, result, memory))
            if not (spec.fan_out and result.success):
                break
    return Route(tuple(targets), tuple(mapped), spent=spent)


def _map(edge: EdgeSpec, result: NodeResult, memory: SharedMemory) -> dict[str, Any]:
    """The values an edge maps. A value taken from the state is from now on known under two keys."""
    output = result.output or {}
    if not result.success and not edge.input_mapping:
        return {}  # what a failed node put out is no result: it is passed on only where a mapping asks for it
    for source in edge.input_mapping.values():
        if source not in output:
            memory.peek(source)
    return edge.map_inputs(output, memory.view())
