"""Where a run of a graph stands: its position, the state of each branch, and what follows a step's outcome.

Nothing here waits: what one method changes belongs together, and the commit that follows takes all of it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from framework.errors import BranchConflict
from framework.graph import planner
from framework.graph.edge import GraphSpec
from framework.graph.memory import SharedMemory, isolated
from framework.graph.merge import LOCAL, BranchWrites, merge
from framework.graph.node_base import NodeResult, NodeSpec
from framework.graph.planner import Outcome, Position, Step
from framework.graph.routing import Route
from framework.graph.run_journals import RunJournals
from framework.graph.run_opening import Restored
from framework.graph.run_parts import Failure, NodeSource
from framework.graph.run_path import RunPath
from framework.graph.run_records import attempts_used, finished_steps, stored_input
from framework.graph.run_session import Progress, RunSession
from framework.graph.run_waits import Waits
from framework.graph.spending import NOTHING, Spent
from framework.schemas.checkpoint import CheckpointStatus
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK


@dataclass(slots=True, kw_only=True)
class GraphStanding:
    """A run's position and state. ``session`` is ``None`` without a checkpoint manager: then nothing is written.

    ``failed_steps`` are those that no edge caught, by key; ``recovered`` counts the steps of earlier processes.
    """

    graph: GraphSpec
    run_id: str
    nodes: NodeSource
    session: RunSession | None
    position: Position
    memory: SharedMemory
    steps: RunPath = field(default_factory=RunPath)
    spent: Spent = NOTHING
    recovered: int = 0
    next_after_pause: str | None = None
    failed_steps: list[Step] = field(default_factory=list)
    journals: RunJournals = field(init=False)
    _memories: dict[str, SharedMemory] = field(default_factory=dict)
    _writers: dict[str, dict[str, str]] = field(default_factory=dict)
    _inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failed_before: dict[str, int] = field(default_factory=dict)
    _answered: set[str] = field(default_factory=set)
    _changed: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)
    _waits: Waits = field(default_factory=Waits)
    _may_be_woken: bool = False
    _asked: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._memories = {"": self.memory}
        self.journals = RunJournals(self.run_id, self.session)

    # --- where it starts ----------------------------------------------------------------------------------------

    def begin_with(self, input_data: dict[str, Any], *, answered: bool = False) -> None:
        """A run that has done nothing: its first step is given the caller's input."""
        first = self.position.ready[0]
        self._inputs[first.key] = input_data
        if answered:
            self._answered.add(first.key)

    def take_up(self, restored: Restored, input_data: Mapping[str, Any]) -> bool:
        """Go on after a restored checkpoint. ``input_data`` is what the caller brings now.

        Returns whether it changed anything that must be made durable before the first step.
        """
        plain = restored.body.get("position", {})
        self.steps = RunPath(restored.records)
        self.recovered = self.steps.count
        self.spent = Spent.of_record(restored.body)
        if restored.journal:
            self.journals.forget(finished_steps(restored.records))
        if plain:
            self.position = planner.from_json(plain)
            self.position = replace(self.position, visits=planner.visits_of(restored.records, self.position))
            self.next_after_pause = plain.get("after_pause")
            self._waits = Waits.from_json(plain.get("waits", {}))
        for branch in sorted(self.position.branches.values(), key=lambda each: len(each.id)):
            self._memories[branch.id] = self._memories[branch.parent].branch()
        for key, value in restored.values.items():
            branch_id, mark, name = key.rpartition(SCOPE_MARK)
            if (branch_id if mark else "") in self._memories:
                self._memories[branch_id if mark else ""].restored(name, value)
        self._writers = {branch: dict(keys) for branch, keys in plain.get("writers", {}).items()}
        for key, stored in plain.get("inputs", {}).items():
            view = self._memories[stored["branch"]].view()
            self._inputs[key] = {**{name: view[name] for name in stored["same"]}, **stored.get("own", {})}
        if not plain and self.position.ready:
            self._inputs[self.position.ready[0].key] = dict(restored.input_data)
        self._failed_before = attempts_used([*restored.records, *restored.later])
        for record in restored.later:
            if record.get("kind") == "attempt":
                self.spent += Spent.of_record(record)
        return self._take_input(restored, input_data)

    def _take_input(self, restored: Restored, input_data: Mapping[str, Any]) -> bool:
        new = {
            key: value
            for key, value in input_data.items()
            # The same call again must not take the state back to where it began.
            if key not in restored.input_data or not codec.same(restored.input_data[key], value)
        }
        for key, value in new.items():
            self.memory.put(key, value)
        # A pause that nobody was told of, because the run stopped for another reason, is still to be told of.
        told = restored.found is RunState.PAUSED or (bool(new) and not self.position.ready)
        waiting = self.position.paused_at is not None and told
        self._asked = {record.get("step") for record in restored.records if record.get("kind") == "wait"}
        self._may_be_woken = waiting and not new and bool(self._waits.by_step)
        if waiting and not self._may_be_woken:
            self._go_on()
        for step in self.position.ready if new else ():
            self._inputs[step.key] = {**self._inputs.get(step.key, {}), **new}
        return waiting or bool(new)

    def _go_on(self) -> None:
        """All that is held goes on. Only who was asked can have answered; what merely comes after a pause was not."""
        self._answered.update(step.key for step in self.position.held if step.key in self._asked)
        self.position = planner.resume(self.position)

    def _release(self, step: Step) -> None:
        """One held step can go on; the others wait on."""
        before = self.position.paused_at
        self.position = planner.release(self.position, step)
        if self.position.paused_at != before:
            self.next_after_pause = self.position.paused_at
        self._waits.by_step.pop(step.key, None)

    # --- what follows a step ------------------------------------------------------------------------------------

    def _was_asked(self, step: Step, spec: NodeSpec) -> bool:
        """Whether the run already paused here, for the answer that completed this step: one pause is enough."""
        return step.key in self._answered and self.nodes.implementation_of(spec) is None

    def _write_output(self, memory: SharedMemory, result: NodeResult) -> set[str]:
        """Put what the node returned into its memory; the keys that the step changed."""
        own = memory.own
        for key, value in (result.output or {}).items():
            if key not in own or own[key] is not value:
                memory.put(key, value)
        memory.settle()
        # Also what was written with the value it had: in a branch it is the node's now, no longer a mapped input.
        return memory.take_written() | set(result.output or {})

    def _map(self, memory: SharedMemory, branch: str, route: Route) -> set[str]:
        """Put the values that the edge taken maps into the state; the keys that this changed."""
        view = memory.view()
        values = route.mapped[0] if route.mapped else {}
        changed = {key: value for key, value in values.items() if key not in view or view[key] is not value}
        for key, value in changed.items():
            memory.put(key, isolated(value, key) if branch else value)
        return set(changed)

    def _advance(
        self,
        step: Step,
        spec: NodeSpec,
        result: NodeResult,
        route: Route,
        written: set[str],
        mapped: set[str],
        *,
        failed: bool,
    ) -> None:
        memory = self._memories[step.branch]
        self._changed.add(step.branch)
        known = set(self.position.ready) | set(self.position.held)
        made = planner.advance(
            self.graph,
            self.position,
            Outcome(
                step,
                targets=route.targets,
                stops=spec.id in self.graph.terminal_nodes and not failed,
                pauses=spec.id in self.graph.pause_nodes and not failed and not self._was_asked(step, spec),
                fans_out=spec.fan_out and not failed and len(route.targets) > 0,
            ),
        )
        self.position = made.position
        if step.branch:
            # What is mapped for a node inside the branch stays there; what is mapped for the join goes to the join.
            inside = made.position.branches[step.branch].status == "running"
            writers = self._writers.setdefault(step.branch, {})
            writers |= dict.fromkeys(written, spec.id) | dict.fromkeys(mapped, LOCAL if inside else spec.id)
        if self.position.paused_at == step.node_id:
            self.next_after_pause = route.targets[0] if route.targets else None
        self._inputs.pop(step.key, None)
        self._waits.by_step.pop(step.key, None)
        output = dict(result.output or {})
        if made.started:
            for branch in made.started:
                overlay = memory.branch()
                self._memories[branch.id] = overlay
                self._changed.add(branch.id)
                given = self._map(overlay, branch.id, Route(mapped=(route.mapped[branch.index],)))
                self._writers[branch.id] = dict.fromkeys(given, LOCAL if branch.status == "running" else spec.id)
        for new in (*self.position.ready, *self.position.held):
            if new not in known:
                self._inputs[new.key] = output

    def _join_ready(self) -> Failure | None:
        """Merge every group of branches that is over. A conflict leaves it as it is and fails the run."""
        while (group := planner.joinable(self.position)) is not None:
            joined = planner.join(self.position, group)
            parent = self._memories[joined.parent]
            writes = [
                BranchWrites(each.head, self._memories[each.id].own, self._writers.get(each.id, {}))
                for each in joined.branches
            ]
            try:
                merged = merge(self.graph, parent.view(), writes)
            except BranchConflict as error:
                return Failure(str(error))
            for key, value in merged.items():
                parent.put(key, value)
            if joined.parent:
                names = {key: writer for write in writes for key, writer in write.writers.items() if writer != LOCAL}
                self._writers.setdefault(joined.parent, {}).update({key: names.get(key, "join") for key in merged})
            self._changed.add(joined.parent)
            for each in joined.branches:
                self._gone.add(each.id)
                del self._memories[each.id]
                self._writers.pop(each.id, None)
            if joined.into is not None:
                self._inputs[joined.into.key] = merged
            self.position = joined.position
        return None

    # --- as told and as recorded --------------------------------------------------------------------------------

    def _wake_at(self) -> float | None:
        return self._waits.wake_at(step.key for step in self.position.held)

    def _last_node(self) -> str:
        return self.steps.last or self.graph.entry_node

    def _progress(self, node_id: str, state: RunState | None = None) -> Progress:
        ready = self.position.ready or self.position.held
        position = planner.to_json(self.position, visits=False)
        if self.position.paused_at is not None and self.next_after_pause is not None:
            position["after_pause"] = self.next_after_pause
        if self._waits.by_step:
            position["waits"] = self._waits.to_json()
        if self._writers:
            position["writers"] = {branch: keys for branch, keys in self._writers.items() if keys}
        position["inputs"] = {
            step.key: stored_input(step, given, self._memories[step.branch].view())
            for step in (*self.position.ready, *self.position.held)
            if (given := self._inputs.get(step.key))
        }
        plain = not self._waits.by_step and not any("own" in each for each in position["inputs"].values())
        status = CheckpointStatus.IN_PROGRESS
        if state is not None and state is not RunState.CANCELLED:  # which a checkpoint does not tell from a crash
            status = CheckpointStatus(state.value)
        return Progress(
            node_id=node_id,
            next_id=ready[0].node_id if ready else None,
            step_number=self.position.steps_taken,
            total_tokens=self.spent.tokens,
            total_latency_ms=self.spent.latency_ms,
            total_cost=self.spent.cost,
            position=position,
            status=status,
            plain=plain,
        )

    @property
    def path(self) -> list[str]:
        """The nodes visited, over all processes, each visit once; failed steps last."""
        return [*self.steps, *(step.node_id for step in self.failed_steps)]
