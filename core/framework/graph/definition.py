"""The identity of a graph: what a run's finished steps and positions rely on, its hash, and how two of them differ.

Pure. Wording, budgets and unknown fields are left out, so changing them never stops a run from being resumed. A field
at its default is left out too: a field added to the library later does not change the identity of older graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.node_base import NodeSpec
from framework.graph.text import shorten

MAX_LINES = 30
_VALUE_CHARS = 60

# What a part looks like when `canonical` left the field out.
_NODE_DEFAULTS: dict[str, Any] = {
    "node_type": "llm_tool_use",
    "input_keys": [],
    "output_keys": [],
    "system_prompt": None,
    "tools": [],
    "model": None,
    "function": None,
    "routes": [],
    "append_only_keys": [],
    "fan_out": False,
    "fan_out_policy": "fail_fast",
    "join_node": None,
}
_EDGE_DEFAULTS: dict[str, Any] = {
    "source": None,
    "target": None,
    "condition": "always",
    "condition_expr": None,
    "input_mapping": {},
    "priority": 0,
}
_GRAPH_DEFAULTS: dict[str, Any] = {
    "entry_node": None,
    "entry_points": {},
    "terminal_nodes": [],
    "pause_nodes": [],
    "append_only_keys": [],
    "reducers": {},
}


def canonical(graph: GraphSpec) -> dict[str, Any]:
    """The parts of ``graph`` that give finished steps and positions their meaning, as JSON-compatible values.

    Nodes and edges are keyed by id, so their order does not matter. What does matter keeps its order: input and output
    keys, a router's routes (the first match wins), and, in ``edge_order``, edges of one node with equal priority. A
    fan-out node holds its resolved join node. Works for invalid graphs as well; of equal ids the last one counts.
    """
    edges = {edge.id: _without_defaults(_edge(edge), _EDGE_DEFAULTS) for edge in graph.edges}
    fields = {
        "entry_node": graph.entry_node,
        "entry_points": dict(graph.entry_points),
        "terminal_nodes": sorted(set(graph.terminal_nodes)),
        "pause_nodes": sorted(set(graph.pause_nodes)),
        "append_only_keys": sorted(set(graph.append_only_keys)),
        "reducers": dict(graph.reducers),
    }
    return {
        **_without_defaults(fields, _GRAPH_DEFAULTS),
        "nodes": {node.id: _without_defaults(_node(graph, node), _NODE_DEFAULTS) for node in graph.nodes},
        "edges": edges,
        "edge_order": _edge_order(graph),
    }


def fingerprint(graph: GraphSpec) -> str:
    """The SHA-256 of the canonical form of ``graph``, in hex. Equal for graphs that mean the same."""
    text = json.dumps(canonical(graph), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Readable lines, one per difference between two results of `canonical`; an empty list means they are equal.

    At most `MAX_LINES` differences are listed; a last line then counts the others.
    """
    lines = list(_changes(old, new))
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"... and {len(lines) - MAX_LINES} more"]
    return lines


def _node(graph: GraphSpec, node: NodeSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "node_type": node.node_type,
        "input_keys": list(node.input_keys),
        "output_keys": list(node.output_keys),
        "system_prompt": node.system_prompt,
        "tools": sorted(set(node.tools)),
        "model": node.model,
        "function": node.function,
        "routes": [[key, target] for key, target in node.routes.items()],
        "append_only_keys": sorted(set(node.append_only_keys)),
    }
    if node.fan_out:
        join = graph.join_of(node.id)
        fields |= {"fan_out": True, "fan_out_policy": node.fan_out_policy, "join_node": join}
    return fields


def _edge(edge: EdgeSpec) -> dict[str, Any]:
    conditional = edge.condition is EdgeCondition.CONDITIONAL  # an expression on any other edge is never read
    return {
        "source": edge.source,
        "target": edge.target,
        "condition": edge.condition.value,
        "condition_expr": edge.condition_expr if conditional else None,
        "input_mapping": dict(edge.input_mapping),
        "priority": edge.priority,
    }


def _edge_order(graph: GraphSpec) -> dict[str, list[list[str]]]:
    """Per node, its groups of edges with equal priority, where there is more than one edge in the group."""
    groups: dict[str, dict[int, list[str]]] = {}
    for edge in graph.edges:
        groups.setdefault(edge.source, {}).setdefault(edge.priority, []).append(edge.id)
    order = {
        source: [ids for _, ids in sorted(by_priority.items(), reverse=True) if len(ids) > 1]
        for source, by_priority in groups.items()
    }
    return {source: tied for source, tied in order.items() if tied}


def _without_defaults(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value != defaults[key]}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    parts = {"nodes", "edges", "edge_order"}
    for key in _all_keys(old, new):
        if key not in parts:
            yield from _field_change("graph", key, old, new, _GRAPH_DEFAULTS)
    yield from _part_changes("node", old.get("nodes", {}), new.get("nodes", {}), _NODE_DEFAULTS)
    yield from _part_changes("edge", old.get("edges", {}), new.get("edges", {}), _EDGE_DEFAULTS)
    yield from _order_changes(old, new)


def _part_changes(
    kind: str, old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    for part_id in _all_keys(old, new):
        label = f"{kind} {part_id!r}"
        if part_id not in new:
            yield f"{label}{_ends(old[part_id])} was removed"
        elif part_id not in old:
            yield f"{label}{_ends(new[part_id])} was added"
        else:
            for key in _all_keys(old[part_id], new[part_id]):
                yield from _field_change(label, key, old[part_id], new[part_id], defaults)


def _field_change(
    label: str, key: str, old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    before, after = old.get(key, defaults.get(key)), new.get(key, defaults.get(key))
    if before != after:
        first, second = _short_pair(before, after)
        yield f"{label}: {key} {first} -> {second}"


def _order_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Order changes that no other line explains: the edges are the same on both sides, their order is not."""
    before, after = old.get("edge_order", {}), new.get("edge_order", {})
    for source in _all_keys(before, after):
        first, second = before.get(source, []), after.get(source, [])
        if first != second and sorted(map(sorted, first)) == sorted(map(sorted, second)):
            left, right = _short_pair(first, second)
            yield f"node {source!r}: order of its equal-priority edges {left} -> {right}"


def _all_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted({*old, *new})


def _ends(part: Mapping[str, Any]) -> str:
    return f" ({part['source']} -> {part['target']})" if "source" in part and "target" in part else ""


def _short_pair(before: object, after: object) -> tuple[str, str]:
    """Both values in short, cut so that the place where they differ is visible."""
    first, second = repr(before), repr(after)
    shorter, longer = sorted((len(first), len(second)))
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), shorter)
    start = max(0, same - _VALUE_CHARS // 2) if longer > _VALUE_CHARS else 0
    return _excerpt(first, start), _excerpt(second, start)


def _excerpt(text: str, start: int) -> str:
    return ("…" if start else "") + shorten(text[start:], _VALUE_CHARS)
