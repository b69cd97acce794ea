"""Graphs as data: lookups, where a run starts or continues, joins of fan-outs, and what validation finds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.graph.edge import AsyncEntryPointSpec, EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.node_base import NodeSpec


def make_graph(links: str = "", nodes: str = "", fan_out: str = "", **fields: Any) -> GraphSpec:
    """A graph from "a>b b>c": an edge each; ``!`` marks on_failure. Nodes in order of mention, ``nodes`` first."""
    edges = []
    names = dict.fromkeys(nodes.split())
    for link in links.split():
        source, target = link.rstrip("!").split(">")
        names |= {source: None, target: None}
        condition = EdgeCondition.ON_FAILURE if link.endswith("!") else EdgeCondition.ALWAYS
        edges.append(EdgeSpec(id=link, source=source, target=target, condition=condition))
    specs = [NodeSpec(id=name, fan_out=name in fan_out.split()) for name in names]
    entry = fields.pop("entry_node", next(iter(names), "a"))
    return GraphSpec(**{"id": "g", "goal_id": "goal", "entry_node": entry, "nodes": specs, "edges": edges, **fields})


def node(graph: GraphSpec, node_id: str) -> NodeSpec:
    found = graph.get_node(node_id)
    assert found is not None
    return found


def test_defaults() -> None:
    graph = GraphSpec.model_validate({"id": "g", "goal_id": "goal", "entry_node": "a", "name": "kept"})
    assert (graph.version, graph.max_steps, graph.max_tokens, graph.max_retries_per_node) == ("1.0.0", 100, 1024, 3)
    assert graph.default_model == "claude-haiku-4-5-20251001"
    assert (graph.append_only_keys, graph.reducers, graph.pause_nodes) == ([], {}, [])
    assert graph.model_dump()["name"] == "kept"


def test_a_graph_is_rebuilt_from_its_dump() -> None:
    graph = make_graph("a>b a>c b>d c>d", fan_out="a", reducers={"x": "sum"})
    assert GraphSpec.model_validate(graph.model_dump()) == graph
    assert GraphSpec.model_validate_json(graph.model_dump_json()) == graph


def test_lookups() -> None:
    graph = make_graph("a>b a>c b>c", async_entry_points=[AsyncEntryPointSpec(id="hook", name="H", entry_node="b")])
    graph.edges.append(EdgeSpec(id="first", source="a", target="c", priority=5))
    assert node(graph, "b").id == "b"
    assert graph.get_node("zz") is None
    assert [e.id for e in graph.get_outgoing_edges("a")] == ["first", "a>b", "a>c"]
    assert [e.id for e in graph.get_incoming_edges("c")] == ["a>c", "b>c", "first"]
    assert graph.has_async_entry_points()
    assert graph.get_async_entry_point("hook") is not None
    assert graph.get_async_entry_point("zz") is None
    assert not make_graph("a>b").has_async_entry_points()


# --- where to start -----------------------------------------------------------------------------------------------


PAUSING = make_graph(
    "start>ask ask>use ask>other use>end other>end",
    pause_nodes=["ask", "use"],
    entry_points={"ask_resume": "other", "again": "use", "end": "start"},
)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (None, "start"),
        ({}, "start"),
        ({"memory": {"x": 1}}, "start"),
        ({"paused_at": None, "resume_from": None, "next_node": None}, "start"),
        ({"paused_at": "ask"}, "other"),
        ({"paused_at": "ask", "resume_from": "ask_resume", "next_node": "use"}, "other"),
        ({"paused_at": "ask", "resume_from": "use"}, "use"),  # an explicit node wins over the resume entry point
        ({"paused_at": "ask", "resume_from": "again"}, "other"),
        ({"resume_from": "again"}, "use"),
        ({"resume_from": "other"}, "other"),
        ({"resume_from": "end"}, "start"),  # an entry point's name before a node's
        ({"paused_at": "use", "resume_from": "use_resume", "next_node": "end"}, "end"),
        ({"next_node": "use"}, "use"),
        ({"paused_at": "gone", "next_node": "use"}, "use"),
    ],
)
def test_get_entry_point(state: dict[str, Any] | None, expected: str) -> None:
    assert PAUSING.get_entry_point(state) == expected


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"paused_at": "gone"}, "paused_at='gone'"),
        ({"paused_at": "use", "resume_from": "use_resume", "next_node": None}, "'use_resume'"),
        ({"resume_from": "gone"}, "resume_from='gone'"),
        ({"next_node": "gone"}, "next_node='gone'"),
        ({"next_node": ""}, "next_node=''"),
    ],
)
def test_a_position_that_leads_nowhere_is_an_error_not_a_restart(state: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="Set next_node to a node id") as caught:
        PAUSING.get_entry_point(state)
    assert named in str(caught.value)


# --- joins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("links", "join"),
    [
        ("f>a f>b a>j b>j j>end", "j"),
        ("f>a f>b a>x x>j b>j j>end", "j"),
        ("f>a f>j a>j", "j"),  # a target may itself be the join
        ("f>a f>b a>b b>end", "b"),
        ("f>a f>b", None),
        ("f>a f>b a>x b>y", None),
        ("f>a", "a"),
        ("f>a f>b a>j b>k a>k b>j", "j"),  # equally near: first declared
        ("f>a f>b a>k a>j b>j b>k", "k"),
        ("f>a f>b a>far b>x x>far a>y y>near b>near", "far"),  # both take two at most; first declared of equals
        ("f>a f>b a>x x>k b>k a>j b>y y>j2 j>j2", "k"),
        ("f>a f>b f>err! a>j b>j", "j"),  # an on_failure edge of the fan-out starts no branch
        ("f>a f>b a>err! b>err! a>x x>j b>j", "j"),  # a shared error handler is no join
        ("f>a f>b a>err! b>err!", "err"),  # unless it is all they share
        ("f>a f>b a>f b>f", "f"),  # a loop meets where it began
        ("f>a f>b a>f! b>f! a>j b>j", "j"),
        ("f>a f>b a>f b>j", None),  # a loop around one branch only meets nowhere
        ("f>a f>b f>c a>j b>j c>other", None),
        ("f>a f>b a>a2 a2>a b>j a2>j", "j"),  # cycles inside a branch
    ],
)
def test_join_of(links: str, join: str | None) -> None:
    assert make_graph(links, fan_out="f").join_of("f") == join


def test_join_of_prefers_the_smallest_sum_among_equal_longest_ways() -> None:
    # far: ways 2 and 2; near: ways 2 and 1.
    graph = make_graph("f>a f>b a>x x>far b>y y>far x>near b>near", nodes="f far", fan_out="f")
    assert graph.join_of("f") == "near"


def test_join_of_counts_routes() -> None:
    graph = make_graph("f>r f>b b>j", fan_out="f")
    node(graph, "r").node_type = "router"
    node(graph, "r").routes = {"yes": "j", "default": "j"}
    assert graph.join_of("f") == "j"


def test_a_terminal_node_leads_nowhere() -> None:
    graph = make_graph("f>a f>b a>j b>j", fan_out="f", terminal_nodes=["a"])
    assert graph.join_of("f") is None
    assert graph.branch_region("f") == {"a": {"a"}, "b": {"b", "j"}}


def test_join_of_a_declared_node_of_a_plain_node_and_of_an_unknown_one() -> None:
    graph = make_graph("f>a f>b a>j b>j j>end", fan_out="f")
    node(graph, "f").join_node = "end"
    assert graph.join_of("f") == "end"
    assert graph.join_of("a") is None
    with pytest.raises(ValueError, match="no node 'zz'"):
        graph.join_of("zz")
    with pytest.raises(ValueError, match="no node 'zz'"):
        graph.branch_region("zz")


def test_branch_region_ends_at_the_join_and_at_the_fan_out_itself() -> None:
    graph = make_graph("f>a f>b f>j a>x x>j b>j j>end x>f!", fan_out="f")
    assert graph.branch_region("f") == {"a": {"a", "x"}, "b": {"b"}, "j": set()}


def test_branches_follow_edge_priority_and_count_a_target_once() -> None:
    graph = make_graph("f>a f>b a>j b>j", fan_out="f")
    graph.edges.append(EdgeSpec(id="again", source="f", target="b", priority=3))
    assert graph.branch_heads("f") == ["b", "a"]


letters = st.sampled_from("fabcde")


@given(st.lists(st.tuples(letters, letters), max_size=14), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_joins_are_total_deterministic_and_reached_by_every_branch(pairs: list[tuple[str, str]], random: Any) -> None:
    links = [f"{source}>{target}" for source, target in dict.fromkeys(pairs)]
    graph = make_graph(" ".join(links), nodes="f a b c d e", fan_out="f")
    join, regions = graph.join_of("f"), graph.branch_region("f")
    shuffled = graph.model_copy(update={"edges": random.sample(graph.edges, len(graph.edges))})
    assert shuffled.join_of("f") == join
    assert shuffled.branch_region("f") == regions
    graph.validate()
    for head, region in regions.items():
        assert "f" not in region
        assert join not in region
        assert head in region or head in {join, "f"}
        if join is not None:
            edges = {(edge.source, edge.target) for edge in graph.edges}
            assert head == join or any((member, join) in edges for member in region)
    if join is None:
        assert not regions or not set.intersection(*regions.values())


# --- validation ---------------------------------------------------------------------------------------------------


def assert_problem(graph: GraphSpec, *parts: str) -> None:
    problems = graph.validate()
    assert any(all(part in problem for part in parts) for problem in problems), problems


def routed() -> GraphSpec:
    """A graph whose node c is reached only through a router's route."""
    graph = make_graph("a>b c>d")
    node(graph, "b").node_type = "router"
    node(graph, "b").routes = {"go": "c"}
    return graph


@pytest.mark.parametrize(
    "graph",
    [
        make_graph("a>b"),
        make_graph("a>b", terminal_nodes=["b"], pause_nodes=["a"], entry_points={"start": "a"}),
        make_graph("a>b b>a"),
        make_graph("a>b", nodes="a b asleep", pause_nodes=["asleep"]),
        make_graph("a>b x>y", entry_points={"other": "x"}),
        make_graph("a>b x>y", async_entry_points=[AsyncEntryPointSpec(id="h", name="h", entry_node="x")]),
        make_graph("f>a f>b a>j b>j", fan_out="f"),
        make_graph("a>b", reducers={key: key for key in ("append", "sum", "min", "max", "merge", "union")}),
        routed(),
    ],
)
def test_valid_graphs(graph: GraphSpec) -> None:
    assert graph.validate() == []


def test_missing_nodes_are_named_with_the_place() -> None:
    graph = make_graph("a>b", entry_node="e1", terminal_nodes=["t1"], pause_nodes=["p1"], entry_points={"start": "s1"})
    graph.edges.append(EdgeSpec(id="bad", source="x1", target="y1"))
    graph.async_entry_points.append(AsyncEntryPointSpec(id="hook", name="h", entry_node="h1"))
    node(graph, "b").node_type = "router"
    node(graph, "b").routes = {"go": "r1"}
    for parts in [
        ("'e1'", "entry_node"),
        ("'t1'", "terminal_nodes"),
        ("'p1'", "pause_nodes"),
        ("'s1'", "entry point 'start'"),
        ("'x1'", "edge 'bad'"),
        ("'y1'", "edge 'bad'"),
        ("'r1'", "route 'go' of router 'b'"),
        ("'h1'", "async entry point 'hook'"),
    ]:
        assert_problem(graph, "does not exist", *parts)


def test_an_empty_graph_is_not_valid() -> None:
    assert_problem(GraphSpec(id="g", goal_id="g", entry_node=""), "entry_node")


def test_ids_are_unique() -> None:
    graph = make_graph("a>b")
    graph.nodes.append(NodeSpec(id="b"))
    graph.edges.append(EdgeSpec(id="a>b", source="a", target="b"))
    graph.async_entry_points += [AsyncEntryPointSpec(id="h", name="h", entry_node="a")] * 3
    assert_problem(graph, "Node id 'b' is used 2 times")
    assert_problem(graph, "Edge id 'a>b' is used 2 times")
    assert_problem(graph, "Async entry point id 'h' is used 3 times")


def test_unreachable_nodes() -> None:
    graph = make_graph("a>b c>d")
    assert_problem(graph, "Node 'c' cannot be reached")
    assert_problem(graph, "Node 'd' cannot be reached")
    assert len(graph.validate()) == 2


def test_async_entry_points_and_reducers() -> None:
    graph = make_graph("a>b", reducers={"x": "average"})
    graph.async_entry_points.append(
        AsyncEntryPointSpec(id="h", name="h", entry_node="a", trigger_type="smoke", isolation_level="none")
    )
    assert_problem(graph, "'h'", "trigger_type 'smoke'", "webhook")
    assert_problem(graph, "'h'", "isolation_level 'none'", "shared")
    assert_problem(graph, "'x'", "reducer 'average'", "union")


def test_fan_out_settings_that_contradict() -> None:
    graph = make_graph("f>a f>b a>j b>j a>f", fan_out="f")
    node(graph, "a").join_node = "j"
    assert_problem(graph, "'a'", "join_node", "fan_out=True")
    node(graph, "f").node_type = "router"
    assert_problem(graph, "Router 'f'", "fan_out")
    assert_problem(make_graph("f>f f>a", fan_out="f"), "'f'", "fans out to itself")


def test_a_join_node_exists_and_every_branch_reaches_it() -> None:
    graph = make_graph("f>a f>b a>j b>end", fan_out="f")
    node(graph, "f").join_node = "j"
    assert_problem(graph, "fans out to 'b'", "never reaches its join_node 'j'")
    node(graph, "f").join_node = "zz"
    assert_problem(graph, "'zz' does not exist", "'f'")


def writing(links: str, keys: dict[str, list[str]], **fields: Any) -> GraphSpec:
    graph = make_graph(links, fan_out="f", **fields)
    for node_id, names in keys.items():
        node(graph, node_id).output_keys = names
    return graph


def test_two_branches_that_declare_one_key() -> None:
    graph = writing("f>a f>b a>x x>j b>j", {"x": ["report", "x"], "b": ["report"], "a": ["x"], "j": ["report"]})
    (problem,) = graph.validate()
    for part in ("'x'", "'b'", "'f'", "'report'", "append_only_keys", "reducers"):
        assert part in problem


def test_a_node_in_two_branches_conflicts_with_itself() -> None:
    graph = writing("f>a f>b f>c a>x b>x c>end", {"x": ["report"]})
    assert graph.join_of("f") is None
    (problem,) = graph.validate()
    for part in ("'x'", "'a'", "'b'", "'report'", "twice"):
        assert part in problem


@pytest.mark.parametrize("fields", [{"append_only_keys": ["report"]}, {"reducers": {"report": "append"}}])
def test_a_key_that_says_how_to_combine_is_no_conflict(fields: dict[str, Any]) -> None:
    assert writing("f>a f>b a>j b>j", {"a": ["report"], "b": ["report"]}, **fields).validate() == []
    assert writing("f>a f>b f>c a>x b>x c>end", {"x": ["report"]}, **fields).validate() == []


def test_append_only_in_both_nodes_is_enough_in_one_is_not() -> None:
    graph = writing("f>a f>b a>j b>j", {"a": ["report"], "b": ["report"]})
    node(graph, "a").append_only_keys = ["report"]
    assert_problem(graph, "'a'", "'b'", "'report'")
    node(graph, "b").append_only_keys = ["report"]
    assert graph.validate() == []


def test_nodes_of_one_branch_the_join_and_the_fan_out_may_share_keys() -> None:
    keys = {"f": ["k"], "a": ["k"], "x": ["k"], "j": ["k"]}
    assert writing("f>a f>b a>x x>j b>j", keys).validate() == []


def test_many_conflicts_do_not_bury_the_point() -> None:
    heads = [f"n{i}" for i in range(60)]
    graph = writing(" ".join(f"f>{h} {h}>j" for h in heads), {head: ["k"] for head in heads})
    assert 1 <= len(graph.validate()) <= 5
