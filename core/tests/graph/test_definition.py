"""The identity of a graph: what changes it, what does not, and how a change reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from framework.graph.definition import canonical, describe_changes, fingerprint
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.node_base import NodeSpec


def make_graph() -> GraphSpec:
    return GraphSpec(
        id="g",
        goal_id="goal",
        entry_node="a",
        entry_points={"start": "a", "c_resume": "d"},
        terminal_nodes=["d", "e"],
        pause_nodes=["c"],
        nodes=[
            NodeSpec(id="a", node_type="function", output_keys=["x", "y"], fan_out=True),
            NodeSpec(id="b", input_keys=["x"], output_keys=["z"], system_prompt="Say {x}.", tools=["t1", "t2"]),
            NodeSpec(id="c", node_type="router", routes={"yes": "d", "default": "e"}),
            NodeSpec(id="d"),
            NodeSpec(id="e"),
        ],
        edges=[
            EdgeSpec(id="ab", source="a", target="b"),
            EdgeSpec(id="ac", source="a", target="c", condition=EdgeCondition.ON_SUCCESS, priority=1),
            EdgeSpec(
                id="bd",
                source="b",
                target="d",
                condition=EdgeCondition.CONDITIONAL,
                condition_expr="x > 1",
                input_mapping={"k": "x"},
            ),
            EdgeSpec(id="be", source="b", target="e"),
        ],
        reducers={"total": "sum"},
    )


def changed(change: Callable[[GraphSpec], object]) -> GraphSpec:
    graph = make_graph()
    change(graph)
    return graph


def assign(part_id: str, /, **values: Any) -> Callable[[GraphSpec], object]:
    """A change that sets fields of the graph (""), of a node ("b") or of an edge ("bd")."""

    def change(graph: GraphSpec) -> None:
        part: Any = graph if not part_id else graph.get_node(part_id) or next(e for e in graph.edges if e.id == part_id)
        for name, value in values.items():
            setattr(part, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        assign("", id="other", goal_id="other", version="2.0.0", description="d", created_by="me"),
        assign("", max_steps=5, max_retries_per_node=9, default_model="m", max_tokens=3, memory_keys=["q"]),
        assign("", colour="blue"),
        assign("b", name="B", description="d", max_retries=9, retry_on=["OSError"], colour="blue"),
        assign("b", timeout_seconds=3.0, retry_delay_seconds=9.0, retry_max_delay_seconds=9.0),
        assign("bd", description="d", colour="blue"),
        assign("b", tools=["t2", "t1"]),
        assign("be", condition_expr="ignored on this edge"),
        assign("", terminal_nodes=["e", "d"]),
        lambda graph: random.Random(3).shuffle(graph.nodes),
        lambda graph: graph.edges.insert(0, graph.edges.pop(1)),
        assign("a", join_node="d"),  # what was found by itself, now said
    ],
)
def test_wording_budgets_and_meaningless_order_change_nothing(change: Callable[[GraphSpec], object]) -> None:
    graph = changed(change)
    assert fingerprint(graph) == fingerprint(make_graph())
    assert describe_changes(canonical(make_graph()), canonical(graph)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (assign("b", output_keys=["z", "w"]), "node 'b': output_keys ['z'] -> ['z', 'w']"),
        (assign("a", output_keys=["y", "x"]), "node 'a': output_keys ['x', 'y'] -> ['y', 'x']"),
        (assign("d", input_keys=["x"]), "node 'd': input_keys [] -> ['x']"),
        (assign("b", system_prompt="Shout {x}."), "node 'b': system_prompt 'Say {x}.' -> 'Shout {x}.'"),
        (assign("b", tools=["t1"]), "node 'b': tools ['t1', 't2'] -> ['t1']"),
        (assign("b", model="m"), "node 'b': model None -> 'm'"),
        (assign("b", function="f"), "node 'b': function None -> 'f'"),
        (assign("d", node_type="function"), "node 'd': node_type 'llm_tool_use' -> 'function'"),
        (assign("a", fan_out=False), "node 'a': fan_out True -> False"),
        (
            assign("a", fan_out_policy="finish_siblings"),
            "node 'a': fan_out_policy 'fail_fast' -> 'finish_siblings'",
        ),
        (assign("a", join_node="e"), "node 'a': join_node 'd' -> 'e'"),
        (assign("b", append_only_keys=["z"]), "node 'b': append_only_keys [] -> ['z']"),
        (
            assign("c", routes={"default": "e", "yes": "d"}),
            "node 'c': routes [['yes', 'd'], ['default', 'e']] -> [['default', 'e'], ['yes', 'd']]",
        ),
        (assign("bd", condition_expr="x > 2"), "edge 'bd': condition_expr 'x > 1' -> 'x > 2'"),
        (assign("bd", target="e"), "edge 'bd': target 'd' -> 'e'"),
        (assign("bd", priority=4), "edge 'bd': priority 0 -> 4"),
        (assign("bd", input_mapping={}), "edge 'bd': input_mapping {'k': 'x'} -> {}"),
        (assign("ab", condition=EdgeCondition.ON_FAILURE), "edge 'ab': condition 'always' -> 'on_failure'"),
        (assign("", entry_node="b"), "graph: entry_node 'a' -> 'b'"),
        (assign("", pause_nodes=[]), "graph: pause_nodes ['c'] -> []"),
        (assign("", terminal_nodes=["d"]), "graph: terminal_nodes ['d', 'e'] -> ['d']"),
        (assign("", reducers={}), "graph: reducers {'total': 'sum'} -> {}"),
        (assign("", append_only_keys=["log"]), "graph: append_only_keys [] -> ['log']"),
        (assign("", entry_points={"start": "a"}), "graph: entry_points"),
        (lambda graph: graph.nodes.pop(), "node 'e' was removed"),
        (lambda graph: graph.nodes.append(NodeSpec(id="f")), "node 'f' was added"),
        (lambda graph: graph.edges.pop(), "edge 'be' (b -> e) was removed"),
        (
            lambda graph: graph.edges.append(EdgeSpec(id="e1", source="a", target="e")),
            "edge 'e1' (a -> e) was added",
        ),
        (
            lambda graph: graph.edges.append(graph.edges.pop(2)),
            "node 'b': order of its equal-priority edges [['bd', 'be']] -> [['be', 'bd']]",
        ),
    ],
)
def test_a_change_of_meaning_is_seen_and_said(change: Callable[[GraphSpec], object], line: str) -> None:
    old, new = make_graph(), changed(change)
    assert fingerprint(old) != fingerprint(new)
    lines = describe_changes(canonical(old), canonical(new))
    assert any(found.startswith(line) for found in lines), lines


def test_removing_an_edge_of_a_tie_is_one_line() -> None:
    lines = describe_changes(canonical(make_graph()), canonical(changed(lambda graph: graph.edges.pop(2))))
    assert [line for line in lines if "edge" in line] == ["edge 'bd' (b -> d) was removed"]


def test_canonical_survives_json_and_leaves_defaults_out() -> None:
    form = canonical(make_graph())
    assert json.loads(json.dumps(form)) == form
    assert form["nodes"]["d"] == {}
    assert form["nodes"]["a"] == {
        "node_type": "function",
        "output_keys": ["x", "y"],
        "fan_out": True,
        "join_node": "d",
    }
    assert len(fingerprint(make_graph())) == 64


def test_works_for_graphs_that_are_not_valid() -> None:
    broken = GraphSpec(
        id="g",
        goal_id="g",
        entry_node="?",
        nodes=[NodeSpec(id="a", fan_out=True, system_prompt="\ud800"), NodeSpec(id="a")],
        edges=[EdgeSpec(id="e", source="a", target="nowhere")],
    )
    assert fingerprint(broken) != fingerprint(make_graph())


def test_long_values_are_shortened_around_the_difference() -> None:
    old = changed(assign("b", system_prompt="same " * 500 + "old end"))
    new = changed(assign("b", system_prompt="same " * 500 + "new end"))
    (line,) = describe_changes(canonical(old), canonical(new))
    assert len(line) < 220
    assert "old end" in line
    assert "new end" in line


def test_many_changes_are_counted() -> None:
    new = changed(lambda graph: graph.nodes.extend(NodeSpec(id=f"n{i:02}") for i in range(40)))
    lines = describe_changes(canonical(make_graph()), canonical(new))
    assert len(lines) == 31
    assert lines[-1] == "... and 10 more"


def test_forms_of_another_version_are_described_too() -> None:
    assert describe_changes({"entry_node": "a", "newer": 1}, {"entry_node": "a"}) == ["graph: newer 1 -> None"]
