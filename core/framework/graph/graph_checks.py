"""What can be wrong with a graph, found before it runs. Pure: a graph in, messages out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import TYPE_CHECKING

from framework.graph.fan_out import distances

if TYPE_CHECKING:
    from framework.graph.edge import GraphSpec
    from framework.graph.node_base import NodeSpec

TRIGGER_TYPES = ("webhook", "api", "timer", "event", "manual")
ISOLATION_LEVELS = ("isolated", "shared", "synchronized")
REDUCER_NAMES = ("append", "sum", "min", "max", "merge", "union")
"""Names `GraphSpec.reducers` may use to combine what concurrent branches wrote to one key."""
_PAIRS_SHOWN = 5


def problems_of(graph: GraphSpec) -> list[str]:
    """Every problem of ``graph``, each naming the id it is about and what to do. Empty: the graph can run."""
    checks = (_duplicates, _missing, _reducers, _async_entry_points, _unreachable, _fan_outs)
    # Two branches may share a problem; it is worth saying once.
    return list(dict.fromkeys(problem for check in checks for problem in check(graph)))


def _duplicates(graph: GraphSpec) -> Iterator[str]:
    groups: tuple[tuple[str, Iterable[str]], ...] = (
        ("Node", (node.id for node in graph.nodes)),
        ("Edge", (edge.id for edge in graph.edges)),
        ("Async entry point", (entry.id for entry in graph.async_entry_points)),
    )
    for kind, ids in groups:
        for repeated, count in Counter(ids).items():
            if count > 1:
                yield f"{kind} id {repeated!r} is used {count} times; give each its own id."


def _missing(graph: GraphSpec) -> Iterator[str]:
    ids = {node.id for node in graph.nodes}
    references = [(graph.entry_node, "entry_node", "name a node as the entry")]
    references += [(node, "terminal_nodes", "remove it there or add the node") for node in graph.terminal_nodes]
    references += [(node, "pause_nodes", "remove it there or add the node") for node in graph.pause_nodes]
    for name, node in graph.entry_points.items():
        references.append((node, f"entry point {name!r}", "point it at a node"))
    for edge in graph.edges:
        references.append((edge.source, f"edge {edge.id!r} as its source", "correct the edge or add the node"))
        references.append((edge.target, f"edge {edge.id!r} as its target", "correct the edge or add the node"))
    for router in graph.nodes:
        # Only a router reads its routes; on other types they are a hint at most.
        if router.node_type == "router":
            for key, target in router.routes.items():
                references.append((target, f"route {key!r} of router {router.id!r}", "correct the route"))
    for entry in graph.async_entry_points:
        references.append((entry.entry_node, f"async entry point {entry.id!r}", "point it at a node"))
    for node_id, place, advice in references:
        if node_id not in ids:
            yield f"Node {node_id!r} does not exist, but {place} names it; {advice}."


def _reducers(graph: GraphSpec) -> Iterator[str]:
    for key, name in graph.reducers.items():
        if name not in REDUCER_NAMES:
            yield f"State key {key!r} names the unknown reducer {name!r}; use one of {', '.join(REDUCER_NAMES)}."


def _async_entry_points(graph: GraphSpec) -> Iterator[str]:
    for entry in graph.async_entry_points:
        if entry.trigger_type not in TRIGGER_TYPES:
            allowed = ", ".join(TRIGGER_TYPES)
            yield f"Async entry point {entry.id!r} has trigger_type {entry.trigger_type!r}; use one of {allowed}."
        if entry.isolation_level not in ISOLATION_LEVELS:
            allowed = ", ".join(ISOLATION_LEVELS)
            yield f"Async entry point {entry.id!r} has isolation_level {entry.isolation_level!r}; use one of {allowed}."


def _unreachable(graph: GraphSpec) -> Iterator[str]:
    links: dict[str, list[str]] = {}
    for edge in graph.edges:
        links.setdefault(edge.source, []).append(edge.target)
    for node in graph.nodes:
        links.setdefault(node.id, []).extend(node.routes.values())
    waiting = [
        graph.entry_node,
        *graph.entry_points.values(),
        *(entry.entry_node for entry in graph.async_entry_points),
    ]
    walked: set[str] = set()
    while waiting:
        node_id = waiting.pop()
        if node_id not in walked:
            walked.add(node_id)
            waiting.extend(links.get(node_id, ()))
    for node in graph.nodes:
        if node.id not in walked and node.id not in graph.pause_nodes:
            yield f"Node {node.id!r} cannot be reached from the entry; add an edge or a route to it, or remove it."


def _fan_outs(graph: GraphSpec) -> Iterator[str]:
    ids = {node.id for node in graph.nodes}
    for node in graph.nodes:
        if not node.fan_out:
            if node.join_node is not None:
                yield f"Node {node.id!r} has a join_node but does not fan out; set fan_out=True or remove join_node."
            continue
        if node.node_type == "router":
            yield f"Router {node.id!r} has fan_out=True, but a router follows one route; fan out in a node after it."
        if node.id in graph.branch_heads(node.id):
            yield f"Node {node.id!r} fans out to itself; lead that edge to another node, or mark it on_failure."
            continue
        if node.join_node is not None and node.join_node not in ids:
            yield f"Node {node.join_node!r} does not exist, but it is the join_node of {node.id!r}; name a node."
            continue
        yield from _join_problems(graph, node)
        yield from _declared_conflicts(graph, node)


def _join_problems(graph: GraphSpec, node: NodeSpec) -> Iterator[str]:
    if node.join_node is None:
        return
    links = graph.shape().links
    for head in graph.branch_heads(node.id):
        if node.join_node not in distances(links, head, node.id):
            yield (
                f"Node {node.id!r} fans out to {head!r}, which never reaches its join_node {node.join_node!r}; "
                "add edges that lead there, or choose another join_node."
            )


def _declared_conflicts(graph: GraphSpec, fan_out: NodeSpec) -> Iterator[str]:
    heads_of: dict[str, list[str]] = {}
    for head, region in graph.branch_region(fan_out.id).items():
        for node_id in region:
            heads_of.setdefault(node_id, []).append(head)
    writers: dict[str, list[NodeSpec]] = {}
    for node in graph.nodes:
        for key in dict.fromkeys(node.output_keys if node.id in heads_of else ()):
            writers.setdefault(key, []).append(node)
    for key, nodes in writers.items():
        advice = f"add {key!r} to the graph's append_only_keys or reducers"
        for node in nodes:
            heads = heads_of[node.id]
            if len(heads) > 1 and not _is_guarded(graph, key, node, node):
                yield (
                    f"Node {node.id!r} runs in the branches {heads[0]!r} and {heads[1]!r} of {fan_out.id!r} and so "
                    f"writes state key {key!r} twice; {advice}, or make {node.id!r} the join_node."
                )
        pairs = (
            (first, second)
            for first, second in combinations(nodes, 2)
            if _in_two_branches(heads_of[first.id], heads_of[second.id]) and not _is_guarded(graph, key, first, second)
        )
        # With many branches, all pairs would bury the point.
        for first, second in islice(pairs, _PAIRS_SHOWN):
            yield (
                f"Nodes {first.id!r} and {second.id!r} run concurrently after {fan_out.id!r} and both write "
                f"state key {key!r}; let one of them write another key, or {advice}."
            )


def _in_two_branches(heads: Sequence[str], other_heads: Sequence[str]) -> bool:
    """Whether some branch has only the one node and some branch only the other."""
    return bool(set(heads) - set(other_heads)) and bool(set(other_heads) - set(heads))


def _is_guarded(graph: GraphSpec, key: str, first: NodeSpec, second: NodeSpec) -> bool:
    """Whether something says how to combine what both nodes write to ``key``."""
    if key in graph.append_only_keys or key in graph.reducers:
        return True
    return key in first.append_only_keys and key in second.append_only_keys
