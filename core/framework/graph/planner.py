"""What follows what: the pure planner of graphs. No clock, no I/O, no randomness.

``advance(graph, position, outcome)`` says where a run stands after a step: which steps are ready, which branches wait
at their join, whether the run is paused or finished. Executors run what is ready, decide which edges hold (that may
ask a model, so it is not done here), and commit the position that comes back. Any executor that keeps positions,
on one machine or on many, resumes from any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from framework.graph.edge import GraphSpec

BranchStatus = Literal["running", "arrived", "ended", "passed", "arriving", "ending", "passing"]
"""``arriving`` and ``ending``: its last step paused the run, so it is over only once the run is resumed."""


_OVER = ("arrived", "ended", "passed")


@dataclass(frozen=True, slots=True)
class Step:
    """One visit of a node. ``branch`` is empty outside fan-outs; ``visit`` counts from 1 within the branch."""

    node_id: str
    visit: int
    branch: str = ""
    key: str = field(init=False, repr=False, compare=False)
    """The step's identity within its run."""

    def __post_init__(self) -> None:
        own = f"{self.node_id}#{self.visit}"
        object.__setattr__(self, "key", f"{self.branch}:{own}" if self.branch else own)

    def __hash__(self) -> int:
        return hash(self.key)  # a text keeps its own


@dataclass(frozen=True, slots=True)
class Branch:
    """One concurrent path of a fan-out.

    ``source`` is the fan-out node, ``group`` the key of its step, which all siblings share, ``parent`` the branch
    around, ``index`` the place among the siblings, ``head`` the first node, ``join`` where it waits for them.
    ``onward`` is the join of a fan-out further out, when the branch went straight there (status ``passed``).
    """

    id: str
    parent: str
    source: str
    group: str
    index: int
    head: str
    join: str | None
    status: BranchStatus = "running"
    onward: str | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    ``ready`` are the steps to run next, in the definition's order. ``held`` are steps that wait for a resume because
    the run paused after ``paused_at``. ``visits`` counts, by ``branch:node`` (``node`` at the root). ``steps_taken``
    is what counts against ``max_steps``. ``branches`` are the live ones by id.
    """

    ready: tuple[Step, ...] = ()
    held: tuple[Step, ...] = ()
    visits: Mapping[str, int] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    steps_taken: int = 0
    paused_at: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing follows and nothing waits."""
        return not self.ready and not self.held and not self.branches


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to, as far as the planner cares.

    ``targets`` are the nodes that routing chose, in order; none ends the branch or the run. ``stops`` says that the
    node is terminal. ``pauses`` that it is a pause node and did not fail. ``fans_out`` that all targets are followed
    at once.
    """

    step: Step
    targets: tuple[str, ...] = ()
    stops: bool = False
    pauses: bool = False
    fans_out: bool = False


@dataclass(frozen=True, slots=True)
class Join:
    """Branches that are over and whose writes go to ``parent``, in the order of ``branches``.

    ``into`` is the step at the join, ``None`` when no branch reached one. ``position`` is the one after the join.
    """

    parent: str
    branches: tuple[Branch, ...]
    into: Step | None
    position: Position


@dataclass(frozen=True, slots=True)
class Advance:
    """The position after a step, before any join, and the branches that started."""

    position: Position
    started: tuple[Branch, ...] = ()


def start(node_id: str, *, visits: Mapping[str, int] | None = None) -> Position:
    """The position of a run that has done nothing and begins at ``node_id``."""
    return _visit(Position(visits=dict(visits or {})), node_id, "")[0]


def advance(graph: GraphSpec, position: Position, outcome: Outcome) -> Advance:
    """The position after ``outcome.step``, which must be ready. Raises ``ValueError`` when it is not."""
    step = outcome.step
    if step not in position.ready:
        raise ValueError(f"step {step.key} is not ready")
    position = Position(
        tuple(other for other in position.ready if other != step),
        position.held,
        position.visits,
        position.branches,
        position.steps_taken + 1,
        position.paused_at,
    )
    if outcome.pauses:
        return _pause(graph, position, outcome)
    if outcome.stops or not outcome.targets:
        return Advance(_end(position, step))
    if outcome.fans_out:
        return _fan_out(graph, position, outcome)
    return Advance(_go(position, step, outcome.targets[0]))


def joinable(position: Position) -> str | None:
    """The group of a fan-out whose branches are all over, an inner one before the one around it; or ``None``."""
    if not position.branches:
        return None
    running = {branch.group for branch in position.branches.values() if branch.status not in _OVER}
    over = [branch for branch in position.branches.values() if branch.group not in running]
    return max(over, key=lambda branch: len(branch.id)).group if over else None


def join(position: Position, group: str) -> Join:
    """End the branches of ``group``, all of which are over, and let their parent go on.

    At the join node when one of them reached it; otherwise the parent is over as well.
    """
    siblings = tuple(
        sorted((branch for branch in position.branches.values() if branch.group == group), key=lambda each: each.index)
    )
    over = tuple(f"{branch.id}:" for branch in siblings)
    branches = {key: branch for key, branch in position.branches.items() if branch.group != group}
    visits = {key: count for key, count in position.visits.items() if not key.startswith(over)}
    position = replace(position, branches=branches, visits=visits)
    parent, node = siblings[0].parent, siblings[0].join
    outer = branches.get(parent)
    if node is not None and any(branch.status == "arrived" for branch in siblings):
        if outer is not None and outer.join == node:
            # The inner fan-out meets where the one around it does: the parent branch has arrived as well.
            return Join(parent, siblings, None, _mark(position, outer, "arrived"))
        position, step = _visit(position, node, parent)
        return Join(parent, siblings, step, position)
    onward = [branch.onward for branch in siblings if branch.status == "passed" and branch.onward is not None]
    if outer is not None and onward:
        position = _leave(position, outer, outer.join if outer.join in onward else onward[0])
    elif outer is not None:
        position = _mark(position, outer, "ended")
    return Join(parent, siblings, None, position)


def hold(position: Position, step: Step) -> Position:
    """The position while ``step``, which is ready, waits for somebody's answer; it did not run."""
    ready = tuple(other for other in position.ready if other != step)
    return replace(position, ready=ready, held=(*position.held, step), paused_at=_paused_at(position, step))


def resume(position: Position) -> Position:
    """The position of a paused run that goes on: what was held is ready.

    ``_pause`` already decided where: at the pause node's own entry point, else where its edges led.
    """
    over: dict[str, BranchStatus] = {"arriving": "arrived", "ending": "ended", "passing": "passed"}
    branches = {
        key: replace(branch, status=over.get(branch.status, branch.status)) for key, branch in position.branches.items()
    }
    return replace(position, ready=(*position.ready, *position.held), held=(), paused_at=None, branches=branches)


def release(position: Position, step: Step) -> Position:
    """The position once ``step``, which was held by ``hold``, can go on; what else is held stays so."""
    held = tuple(other for other in position.held if other != step)
    paused_at = position.paused_at
    if paused_at == step.node_id:
        pausing = [each.head for each in position.branches.values() if each.status not in (*_OVER, "running")]
        paused_at = min([other.node_id for other in held] + pausing, default=None)
    return replace(position, ready=(*position.ready, step), held=held, paused_at=paused_at)


def _paused_at(position: Position, step: Step) -> str:
    """The node the run paused at; of branches that pause at the same time the same one whichever was faster."""
    return step.node_id if position.paused_at is None else min(position.paused_at, step.node_id)


def _visit_key(branch: str, node_id: str) -> str:
    return f"{branch}:{node_id}" if branch else node_id


def _visit(position: Position, node_id: str, branch: str) -> tuple[Position, Step]:
    key = _visit_key(branch, node_id)
    count = position.visits.get(key, 0) + 1
    step = Step(node_id, count, branch)
    return Position(
        (*position.ready, step),
        position.held,
        {**position.visits, key: count},
        position.branches,
        position.steps_taken,
        position.paused_at,
    ), step


def _go(position: Position, step: Step, target: str) -> Position:
    """Follow one edge: to the next node, or to the join of the branch or of one around it."""
    branch = position.branches.get(step.branch)
    if branch is not None and target in _joins(position, branch):
        return _leave(position, branch, target)
    return _visit(position, target, step.branch)[0]


def _joins(position: Position, branch: Branch) -> list[str]:
    """The joins that ``branch`` may go to: its own and, from the inside out, those of the branches around it."""
    joins = []
    at: Branch | None = branch
    while at is not None:
        if at.join is not None:
            joins.append(at.join)
        at = position.branches.get(at.parent)
    return joins


def _leave(position: Position, branch: Branch, join_node: str | None) -> Position:
    """End a branch at a join: its own, or one further out, which the branches around it then arrive at."""
    if branch.join == join_node:
        return _mark(position, branch, "arrived")
    return _mark(position, replace(branch, onward=join_node), "passed")


def _end(position: Position, step: Step) -> Position:
    """Nothing follows the step: its branch is over, or the run when there is none."""
    branch = position.branches.get(step.branch)
    return position if branch is None else _mark(position, branch, "ended")


def _mark(position: Position, branch: Branch, status: BranchStatus) -> Position:
    return replace(position, branches={**position.branches, branch.id: replace(branch, status=status)})


def _fan_out(graph: GraphSpec, position: Position, outcome: Outcome) -> Advance:
    step = outcome.step
    node = graph.join_of(step.node_id)
    started = tuple(
        Branch(
            id=f"{step.branch}/{step.node_id}#{step.visit}.{index}",
            parent=step.branch,
            source=step.node_id,
            group=step.key,
            index=index,
            head=target,
            join=node,
            status="arrived" if target == node else "running",
        )
        for index, target in enumerate(outcome.targets)
    )
    position = replace(position, branches={**position.branches, **{branch.id: branch for branch in started}})
    for branch in started:
        if branch.status == "running" and branch.head in _joins(position, branch):
            position = _leave(position, branch, branch.head)
        elif branch.status == "running":
            position, _ = _visit(position, branch.head, branch.id)
    return Advance(position, started)


def _pause(graph: GraphSpec, position: Position, outcome: Outcome) -> Advance:
    """Hold what would follow until the run is resumed. Other branches go on to their join meanwhile.

    An entry point ``<node>_resume`` says where a resume begins; without one it is where routing led.
    """
    step = outcome.step
    entry = graph.entry_points.get(f"{step.node_id}_resume")
    before = position.ready
    if entry is not None:
        made = Advance(_visit(position, entry, step.branch)[0])
    elif outcome.stops or not outcome.targets:
        made = Advance(_end(position, step))
    elif outcome.fans_out:
        made = _fan_out(graph, position, outcome)
    else:
        made = Advance(_go(position, step, outcome.targets[0]))
    new = tuple(other for other in made.position.ready if other not in before)
    waiting: dict[str, BranchStatus] = {"arrived": "arriving", "ended": "ending", "passed": "passing"}
    branches = {
        key: branch
        if branch == position.branches.get(key)
        else replace(branch, status=waiting.get(branch.status, branch.status))
        for key, branch in made.position.branches.items()
    }
    held = replace(
        made.position,
        ready=before,
        held=(*made.position.held, *new),
        paused_at=_paused_at(position, step),
        branches=branches,
    )
    return replace(made, position=held)


def to_json(position: Position, *, visits: bool = True) -> dict[str, Any]:
    """The position as plain data. Without ``visits`` where the log tells them: see ``visits_of``."""
    plain: dict[str, Any] = {
        "ready": [[step.node_id, step.visit, step.branch] for step in position.ready],
        "steps_taken": position.steps_taken,
    }
    if visits:
        plain["visits"] = dict(position.visits)
    if position.held:
        plain["held"] = [[step.node_id, step.visit, step.branch] for step in position.held]
    if position.paused_at is not None:
        plain["paused_at"] = position.paused_at
    if position.branches:
        plain["branches"] = [
            [b.id, b.parent, b.source, b.group, b.index, b.head, b.join, b.status, b.onward]
            for b in position.branches.values()
        ]
    return plain


def from_json(plain: Mapping[str, Any]) -> Position:
    """The position that ``to_json`` wrote. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for other data."""
    branches = [Branch(*row) for row in plain.get("branches", ())]
    return Position(
        ready=tuple(Step(*row) for row in plain["ready"]),
        held=tuple(Step(*row) for row in plain.get("held", ())),
        visits=dict(plain.get("visits", {})),
        branches={branch.id: branch for branch in branches},
        steps_taken=plain["steps_taken"],
        paused_at=plain.get("paused_at"),
    )


def visits_of(records: Iterable[Mapping[str, Any]], position: Position) -> dict[str, int]:
    """The visit counters at ``position``, from the records of all steps before it.

    So that a checkpoint need not repeat a counter for every node ever visited. Counters of branches that are over are
    left out, as ``join`` drops them.
    """
    visits: dict[str, int] = {}
    branches = position.branches
    for record in records:
        if record.get("kind") != "step":
            continue
        branch, node_id, visit = record.get("branch", ""), record["node"], record["visit"]
        if not branch or branch in branches:
            key = f"{branch}:{node_id}" if branch else node_id
            if visit > visits.get(key, 0):
                visits[key] = visit
    for step in (*position.ready, *position.held):
        if not step.branch or step.branch in branches:
            key = _visit_key(step.branch, step.node_id)
            visits[key] = max(visits.get(key, 0), step.visit)
    return visits


def missing_nodes(graph: GraphSpec, position: Position) -> list[str]:
    """Nodes that the position names and the graph does not have."""
    known = {node.id for node in graph.nodes}
    named = [step.node_id for step in (*position.ready, *position.held)]
    for branch in position.branches.values():
        named += [branch.source] if branch.join is None else [branch.source, branch.join]
    return sorted(set(named) - known)
