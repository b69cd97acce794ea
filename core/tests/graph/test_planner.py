"""The pure planner: any graph, any outcomes, any order of concurrent steps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.graph import planner
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.node import NodeSpec
from framework.graph.planner import Outcome, Position, Step

MAX_VISITS = 2
MAX_DEPTH = 2


@dataclass(frozen=True)
class Case:
    """A graph, and by ``seed`` what every step of it comes to."""

    graph: GraphSpec
    seed: int

    def outcome(self, step: Step) -> Outcome:
        """What ``step`` comes to: the same in every replay. Loops and nested fan-outs end after a while."""
        rng = random.Random(f"{self.seed}/{step.key}")
        node = self.graph.get_node(step.node_id)
        assert node is not None
        ways = [edge.target for edge in self.graph.get_outgoing_edges(step.node_id)]
        targets = [target for target in ways if rng.random() < 0.9]
        if step.visit >= MAX_VISITS:
            targets = []
        fans_out = node.fan_out and bool(targets) and step.branch.count("/") < MAX_DEPTH
        return Outcome(
            step,
            targets=tuple(targets if fans_out else targets[:1]),
            stops=step.node_id in self.graph.terminal_nodes,
            pauses=step.node_id in self.graph.pause_nodes and rng.random() < 0.7,
            fans_out=fans_out,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 7))
    names = [f"n{index}" for index in range(count)]
    name = st.sampled_from(names)
    ways = [(each, target) for each in names for target in draw(st.lists(name, min_size=1, max_size=3, unique=True))]
    fanning = draw(st.sets(name, min_size=1, max_size=3))
    nodes = [
        NodeSpec(
            id=each,
            node_type="custom",
            fan_out=each in fanning,
            join_node=draw(st.none() | name) if each in fanning else None,
        )
        for each in names
    ]
    paused = draw(st.lists(name, max_size=3, unique=True))
    resumed = draw(st.lists(st.sampled_from(paused), max_size=1)) if paused else []
    graph = GraphSpec(
        id="g",
        goal_id="goal",
        entry_node="n0",
        nodes=nodes,
        edges=[EdgeSpec(id=f"e{index}", source=one, target=other) for index, (one, other) in enumerate(ways)],
        pause_nodes=paused,
        entry_points={f"{each}_resume": draw(name) for each in resumed},
        terminal_nodes=draw(st.lists(name, max_size=1)),
    )
    return Case(graph, draw(st.integers(0, 1_000_000)))


@dataclass
class Replay:
    """One way through a case."""

    done: list[Step] = field(default_factory=list)
    seen: set[Step] = field(default_factory=set)
    joins: set[tuple[object, ...]] = field(default_factory=set)
    pauses: list[tuple[str | None, frozenset[Step]]] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)


def replay(case: Case, order: random.Random, *, through_json: bool = False) -> Replay:
    """Run ``case`` to its end, choosing by ``order`` among the ready steps, resuming when nothing else is left."""
    found = Replay()
    position = planner.start("n0")
    while True:
        while (group := planner.joinable(position)) is not None:
            made = planner.join(position, group)
            branches = tuple((branch.id, branch.status) for branch in made.branches)
            found.joins.add((made.parent, branches, made.into))
            position = made.position
        if through_json:
            position = planner.from_json(json.loads(json.dumps(planner.to_json(position))))
        found.positions.append(position)
        # The counters can be told from the steps done alone, so checkpoints leave them out.
        records = [{"kind": "step", "node": s.node_id, "visit": s.visit, "branch": s.branch} for s in found.done]
        assert planner.visits_of(records, position) == position.visits
        found.seen |= {*position.ready, *position.held}
        assert len(set(position.ready)) == len(position.ready)
        if position.ready:
            step = order.choice(position.ready)
            position = planner.advance(case.graph, position, case.outcome(step)).position
            found.done.append(step)
        elif position.paused_at is not None:
            found.pauses.append((position.paused_at, frozenset(position.held)))
            position = planner.resume(position)
        else:
            return found


@given(cases(), st.integers(0, 1000))
def test_no_step_is_lost_or_done_twice(case: Case, order: int) -> None:
    found = replay(case, random.Random(order))
    assert len(set(found.done)) == len(found.done)
    assert set(found.done) == found.seen
    last = found.positions[-1]
    assert last.finished
    assert last.steps_taken == len(found.done)
    assert last.paused_at is None


@given(cases(), st.integers(0, 1000), st.integers(0, 1000))
def test_the_end_does_not_depend_on_the_order_of_branches(case: Case, one: int, other: int) -> None:
    first, second = replay(case, random.Random(one)), replay(case, random.Random(other))
    assert set(first.done) == set(second.done)
    assert first.joins == second.joins
    assert first.pauses == second.pauses
    assert first.positions[-1] == second.positions[-1]


@given(cases(), st.integers(0, 1000))
def test_a_position_survives_as_json(case: Case, order: int) -> None:
    direct, stored = replay(case, random.Random(order)), replay(case, random.Random(order), through_json=True)
    assert direct.positions == stored.positions
    assert direct.done == stored.done


@given(cases(), st.integers(0, 1000))
def test_the_branches_of_a_group_join_once_and_all_together(case: Case, order: int) -> None:
    found = replay(case, random.Random(order))
    joined = [branch_id for _, branches, _ in found.joins for branch_id, _ in branches]  # type: ignore[attr-defined]
    assert len(set(joined)) == len(joined)
    worked = {step.branch for step in found.done} - {""}
    assert worked <= set(joined)


@given(cases(), st.integers(0, 1000))
def test_planning_changes_nothing_it_is_given(case: Case, order: int) -> None:
    rng = random.Random(order)
    for position in replay(case, rng).positions:
        before = json.dumps(planner.to_json(position))
        for step in position.ready:
            planner.advance(case.graph, position, case.outcome(step))
            planner.hold(position, step)
        planner.resume(position)
        assert json.dumps(planner.to_json(position)) == before


# --- what the rules say, by example -------------------------------------------------------------------------------


def graph(*ways: str, fan_out: str = "", join: str | None = None, **fields: object) -> GraphSpec:
    """A graph of ``a>b`` ways; ``fan_out`` names the nodes that fan out."""
    pairs = [way.split(">") for way in ways]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    return GraphSpec.model_validate(
        {
            "id": "g",
            "goal_id": "goal",
            "entry_node": names[0],
            "nodes": [
                {"id": name, "fan_out": name in fan_out, "join_node": join if name in fan_out else None}
                for name in names
            ],
            "edges": [
                {"id": way, "source": one, "target": other} for way, (one, other) in zip(ways, pairs, strict=True)
            ],
            **fields,
        }
    )


def test_one_step_after_another() -> None:
    spec = graph("a>b", "b>a")
    position = planner.start("a")
    assert position.ready == (Step("a", 1),)
    position = planner.advance(spec, position, Outcome(Step("a", 1), ("b",))).position
    position = planner.advance(spec, position, Outcome(Step("b", 1), ("a",))).position
    assert position.ready == (Step("a", 2),)
    assert position.steps_taken == 2
    position = planner.advance(spec, position, Outcome(Step("a", 2))).position
    assert position.finished


def test_a_step_that_is_not_ready_is_refused() -> None:
    with pytest.raises(ValueError, match="b#1 is not ready"):
        planner.advance(graph("a>b"), planner.start("a"), Outcome(Step("b", 1)))


def test_a_terminal_node_ends_whatever_its_edges_say() -> None:
    made = planner.advance(graph("a>b"), planner.start("a"), Outcome(Step("a", 1), ("b",), stops=True))
    assert made.position.finished


def test_keys_tell_branches_and_visits_apart() -> None:
    assert Step("a", 2).key == "a#2"
    assert Step("a", 1, "/f#1.0").key == "/f#1.0:a#1"


def test_a_join_waits_for_all_branches() -> None:
    spec = graph("f>a", "f>b", "a>j", "b>j", fan_out="f")
    made = planner.advance(spec, planner.start("f"), Outcome(Step("f", 1), ("a", "b"), fans_out=True))
    assert [branch.id for branch in made.started] == ["/f#1.0", "/f#1.1"]
    position = planner.advance(spec, made.position, Outcome(made.position.ready[1], ("j",))).position
    assert planner.joinable(position) is None
    position = planner.advance(spec, position, Outcome(position.ready[0], ("j",))).position
    joined = planner.join(position, planner.joinable(position) or "")
    assert joined.into == Step("j", 1)
    assert [branch.head for branch in joined.branches] == ["a", "b"]
    assert joined.position.ready == (Step("j", 1),)
    assert joined.position.branches == {}
    assert joined.position.visits == {"f": 1, "j": 1}


def test_an_inner_join_comes_before_the_one_around_it() -> None:
    spec = graph("f>g", "f>x", "g>a", "g>b", "a>j", "b>j", "x>j", fan_out="fg", join="j")
    position = planner.advance(spec, planner.start("f"), Outcome(Step("f", 1), ("g", "x"), fans_out=True)).position
    inner = Step("g", 1, "/f#1.0")
    position = planner.advance(spec, position, Outcome(inner, ("a", "b"), fans_out=True)).position
    for step in position.ready:
        position = planner.advance(spec, position, Outcome(step, ("j",))).position
    assert planner.joinable(position) == inner.key
    first = planner.join(position, inner.key)
    assert first.into is None, "its join is that of the fan-out around it"
    second = planner.join(first.position, planner.joinable(first.position) or "")
    assert second.into == Step("j", 1)
    assert planner.joinable(second.position) is None


def test_a_pause_holds_what_follows() -> None:
    spec = graph("a>b", pause_nodes=["a"])
    position = planner.advance(spec, planner.start("a"), Outcome(Step("a", 1), ("b",), pauses=True)).position
    assert (position.ready, position.held, position.paused_at) == ((), (Step("b", 1),), "a")
    assert not position.finished
    position = planner.resume(position)
    assert (position.ready, position.held, position.paused_at) == ((Step("b", 1),), (), None)


def test_a_pause_in_a_branch_holds_its_join_back() -> None:
    spec = graph("f>a", "f>b", "a>j", "b>j", fan_out="f", pause_nodes=["a"])
    position = planner.advance(spec, planner.start("f"), Outcome(Step("f", 1), ("a", "b"), fans_out=True)).position
    first, second = position.ready
    position = planner.advance(spec, position, Outcome(first, ("j",), pauses=True)).position
    position = planner.advance(spec, position, Outcome(second, ("j",))).position
    assert position.ready == ()
    assert planner.joinable(position) is None
    assert planner.joinable(planner.resume(position)) == "f#1"


def test_a_step_may_be_held_before_it_runs() -> None:
    position = planner.hold(planner.start("a"), Step("a", 1))
    assert (position.ready, position.held, position.paused_at, position.steps_taken) == ((), (Step("a", 1),), "a", 0)
    assert planner.resume(position) == planner.start("a")


def test_nodes_that_a_graph_no_longer_has_are_named() -> None:
    old = graph("f>a", "f>b", "a>j", "b>j", fan_out="f")
    position = planner.advance(old, planner.start("f"), Outcome(Step("f", 1), ("a", "b"), fans_out=True)).position
    assert planner.missing_nodes(old, position) == []
    assert planner.missing_nodes(graph("f>a"), position) == ["b", "j"]


@pytest.mark.parametrize("plain", [{}, {"ready": [["a"]], "visits": {}, "steps_taken": 0}, {"ready": 5}])
def test_other_data_is_no_position(plain: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        planner.from_json(plain)
