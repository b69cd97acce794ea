"""One step of a run of a graph: its visit, the way on from there, and its commit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framework import _faults
from framework.errors import BudgetExceeded, UnstorableValue
from framework.graph import planner
from framework.graph.attempts import FailedAttempt, Visit, max_attempts, run_visit
from framework.graph.edge import EdgeSpec
from framework.graph.goal import Goal
from framework.graph.graph_standing import GraphStanding
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeResult, NodeSpec
from framework.graph.planner import Step
from framework.graph.routing import NOWHERE, Route, choose
from framework.graph.run_parts import Failure, unstorable
from framework.graph.run_records import attempt_record, given_input, step_record
from framework.graph.runtime_port import RuntimePort
from framework.graph.suspension import Suspended, Waiting
from framework.schemas.run import RunState


@dataclass(slots=True, kw_only=True)
class GraphSteps(GraphStanding):
    """What a run does with one step that is ready. ``reported`` says that its failure is among the problems."""

    goal: Goal
    port: RuntimePort
    reported: bool = False
    _waiting: set[Step] = field(default_factory=set)
    _specs: dict[str, NodeSpec] = field(default_factory=dict)
    _edges: dict[str, list[EdgeSpec]] = field(default_factory=dict)
    """Those that leave a node, of the nodes that were left so far."""
    _running: dict[asyncio.Task[Failure | None], Step] = field(default_factory=dict)
    _goal_text: str = ""

    def __post_init__(self) -> None:
        GraphStanding.__post_init__(self)  # not super(): a dataclass with slots is made anew
        self._specs = {node.id: node for node in self.graph.nodes}
        self._goal_text = self.goal.to_prompt_context()

    async def _step(self, step: Step) -> Failure | None:
        """Run one visit, route it and commit it. A failure that no edge catches is returned, and not committed."""
        spec = self._specs.get(step.node_id)
        if spec is None:
            return Failure(f"Node {step.node_id!r} is not in graph {self.graph.id!r}.", step)
        events: list[dict[str, Any]] = []
        with self.port.recording(events):
            _faults.reach("node.before")
            memory = self._memories[step.branch]
            before = memory.snapshot()
            try:
                self.journals.check(self.spent)
            except BudgetExceeded as error:
                return Failure(str(error), error_type=error.kind)
            self.port.emit("step_started", step=step.key, node_id=spec.id)
            try:
                try:
                    visit = await self._visit(step, spec, memory, events)
                except Suspended as suspended:
                    self._failed_before[step.key] = self.journals.attempt_of(step.key) - 1
                    await self._hold(step, events, suspended.waits)
                    return None
                if visit is None:
                    await self._hold(step, events)
                    return None
                _faults.reach("node.after")
                if self.session is not None and self.session.held_back:
                    await self.session.room()
                failure = await self._close_step(step, spec, memory, before, visit, events)
                self._tell_end(step, visit, failure)
                return failure
            except BudgetExceeded as error:
                # Its journal stays: with a larger budget the step goes on where it was.
                memory.roll_back(before)
                return Failure(str(error), step, error.kind)
            except asyncio.CancelledError:
                if step in self.position.ready:  # not committed: as if it had not begun
                    memory.roll_back(before)
                raise
            finally:
                pending = (*self.position.ready, *self.position.held)
                self.journals.close(step.key, finished=step not in pending)

    def _tell_end(self, step: Step, visit: Visit, failure: Failure | None) -> None:
        # A failure without a step is of the join that this step led to, not its own.
        own = failure is not None and failure.step == step
        error = failure.error if failure is not None and own else None if visit.result.success else visit.error
        self.port.emit(
            "step_finished" if error is None else "step_failed",
            step=step.key,
            node_id=step.node_id,
            attempt=visit.attempts,
            tokens=visit.spent.tokens,
            latency_ms=visit.spent.latency_ms,
            cost=visit.spent.cost,
            error=error,
        )

    async def _visit(
        self, step: Step, spec: NodeSpec, memory: SharedMemory, events: list[dict[str, Any]]
    ) -> Visit | None:
        try:
            implementation = self.nodes.implementation_of(spec)
        except LookupError as error:
            return Visit(NodeResult(False, error=str(error.args[0]), error_type="configuration"), 1)
        if implementation is None:
            return self._human_input(step, spec, memory)
        view = memory.with_permissions(spec.input_keys, spec.output_keys)
        input_data = given_input(step, self._inputs.get(step.key, {}), memory)
        idempotency_key = f"{self.run_id}/{step.key}"
        self.journals.open(step.key, idempotency_key, self, lambda: [input_data, dict(memory.view())])

        def context(attempt: int) -> NodeContext:
            ctx = self.nodes.context_for(spec, view)
            ctx.input_data = dict(input_data)  # each attempt its own: one may take things out of it
            ctx.goal, ctx.goal_context = self.goal, self._goal_text
            ctx.attempt, ctx.max_attempts = attempt, max_attempts(spec)
            ctx.run_id, ctx.step_key, ctx.idempotency_key = self.run_id, step.key, idempotency_key
            return self.journals.attach(step.key, ctx)

        async def failed(attempt: FailedAttempt) -> None:
            told = {"step": step.key, "node_id": spec.id, "attempt": attempt.attempt, "error": attempt.error}
            spent = attempt.spent
            self._tell_journal(step)
            self.port.emit("attempt_failed", **told, tokens=spent.tokens, latency_ms=spent.latency_ms, cost=spent.cost)
            self.port.problem(
                "warning",
                f"Node {spec.id!r} failed in attempt {attempt.attempt} of {max_attempts(spec)}: {attempt.error}",
            )
            self.spent += spent
            if self.session is not None:
                record = attempt_record(step, attempt.attempt, attempt.error, spent) | self.journals.counting(step.key)
                await self.session.attempt_failed(record, tuple(events))
                events.clear()

        try:
            return await run_visit(
                spec,
                implementation,
                memory,
                context,
                failed_before=self._failed_before.pop(step.key, 0),
                on_failed=failed,
                on_invalid=lambda message: self.port.problem("warning", f"Node {spec.id!r}: {message}"),
                step=(self.run_id, step.key) if self.session is not None else None,
            )
        finally:
            self._tell_journal(step)

    def _tell_journal(self, step: Step) -> None:
        for problem in self.journals.take_problems(step.key):
            self.port.problem("warning", problem)

    def _human_input(self, step: Step, spec: NodeSpec, memory: SharedMemory) -> Visit | None:
        """A node for a person that nobody implemented: done once its keys are answered, otherwise it waits."""
        values = {key: memory.peek(key) for key in spec.output_keys}
        given = all(value is not None for value in values.values())
        if given and (spec.output_keys or step.key in self._answered):
            return Visit(NodeResult(True, output=values), 1)
        return None

    async def _hold(self, step: Step, events: Sequence[dict[str, Any]], waits: Sequence[Waiting] = ()) -> None:
        """Leave a step for later: it waits for a person, or for what its node said."""
        self.position = planner.hold(self.position, step)
        if self.position.paused_at == step.node_id:
            self.next_after_pause = step.node_id
        if waits:
            self._waits.by_step[step.key] = tuple(waits)
        if self.session is not None:
            ends = (
                not self.position.ready
                and self._alone(step)
                and self._waits.by_step.keys() <= {step.key}  # what others wait for may be over by now: see _woken
                and not self._waits.is_due_soon(self.session, self._wake_at())
            )
            state = RunState.PAUSED if ends else None
            record: dict[str, Any] = {"kind": "wait", "node": step.node_id, "step": step.key}
            if waits:
                record["for"] = [each.to_json() for each in waits]
            progress = self._progress(self._last_node(), state)
            scopes = {step.branch: self._memories[step.branch]}
            due = self._wake_at() if ends else None
            await self.session.note(record, events, progress, scopes, state=state, wake_at=due)

    async def _close_step(
        self,
        step: Step,
        spec: NodeSpec,
        memory: SharedMemory,
        before: dict[str, Any],
        visit: Visit,
        events: list[dict[str, Any]],
    ) -> Failure | None:
        result = visit.result
        error: str | None = None if result.success else f"Node {spec.name!r} {visit.error}"
        route = NOWHERE
        written: set[str] = set()
        mapped: set[str] = set()
        if result.success:
            written = self._write_output(memory, result)
            onward = self.graph.entry_points.get(f"{spec.id}_resume") if self._was_asked(step, spec) else None
            llm = self.journals.llm_of(step.key, None)
            route = Route((onward,), ({},)) if onward is not None else await self._route(spec, memory, result, llm)
            visit = visit.also(route.spent)
            error = route.error
            if error is None and not spec.fan_out:
                mapped = self._map(memory, step.branch, route)
            if error is None and self.session is not None:
                try:
                    self.session.check({step.branch: memory})
                except UnstorableValue as problem:
                    error = f"Node {spec.name!r} failed after {visit.attempts} attempts: {problem}"
        if error is not None:
            memory.roll_back(before)
            written = set()
            llm = await self.journals.afresh(step.key, self.nodes.context_for(spec, memory).llm, visit)
            # Conditions, mappings and the handler see what the failed node said; the state does not.
            told = {} if result.success else self._told(result.output)
            result = NodeResult(False, output=told, error=error, error_type=result.error_type)
            # The last attempt's own problem comes with the commit, whichever way it goes on.
            self.port.problem("critical", error)
            # A node that chose an unknown one has no way on: its edges were not meant. Nor has one with an effect
            # that is unknown: whatever is committed next would forget it.
            is_over = route.error is not None or visit.unsettled
            route = NOWHERE if is_over else await self._route(spec, memory, result, llm)
            visit = visit.also(route.spent)
            if not route.targets:
                self.reported = True
                self.spent += visit.last  # attempts before it were counted as they failed
                self.journals.counted(step.key, failed=True)
                if self.session is not None:
                    self._keep_events(step, visit, error, events)
                return Failure(error, step)
            mapped = self._map(memory, step.branch, route)
            if self.session is not None:
                try:  # rolling back does not undo what the node changed inside containers
                    self.session.check({step.branch: memory})
                except UnstorableValue as problem:
                    return Failure(f"{error}; and then: {problem}", step)
        self.spent += visit.last
        self.journals.counted(step.key)
        # From here to the commit nothing waits: position, state and sequence change together.
        known = set(self.position.ready)
        self._advance(step, spec, result, route, written, mapped, failed=error is not None)
        failure = self._join_ready()
        record = step_record(step, visit, error, self.position) | self.journals.unpriced()
        self.steps.add(record)
        if self.session is not None:
            following = set(self.position.ready) - known
            self._waiting |= following  # a sibling that ends meanwhile must not start them
            await self._commit(step, record, events, failure)
            self._waiting -= following
        if self.position.branches:
            _faults.reach("branch.between")
        return failure

    def _told(self, output: Any) -> dict[str, Any]:
        """What a failed node put out, for its handler; nothing when it cannot be kept for a resume."""
        problem = unstorable(output) if self.session is not None else None
        if problem is not None:
            self.port.problem("warning", f"The output of the failed node is dropped: {problem}")
        return dict(output) if isinstance(output, dict) and problem is None else {}

    def _keep_events(self, step: Step, visit: Visit, error: str, events: list[dict[str, Any]]) -> None:
        """What the failing visit decided is kept, with the attempt that ended it."""
        assert self.session is not None
        record = attempt_record(step, visit.attempts, error, visit.last) | self.journals.counting(step.key)
        self.session.keep_attempt(record, tuple(events))
        events.clear()

    async def _route(self, spec: NodeSpec, memory: SharedMemory, result: NodeResult, llm: Any = None) -> Route:
        _faults.reach("routing")
        edges = self._edges.get(spec.id)
        if edges is None:
            edges = self._edges[spec.id] = self.graph.get_outgoing_edges(spec.id)
        return await choose(
            self.graph,
            spec,
            edges,
            memory,
            result,
            llm_of=lambda: llm if llm is not None else self.nodes.context_for(spec, memory).llm,
            goal=self.goal,
            on_warning=lambda message: self.port.problem("warning", message),
        )

    async def _commit(
        self, step: Step, record: Mapping[str, Any], events: Sequence[dict[str, Any]], failure: Failure | None
    ) -> None:
        assert self.session is not None
        alone = self._alone(step)
        state = None
        if failure is None and not self.position.ready and alone:
            if self.position.paused_at is not None:  # what a step waits for may be over by now: see _woken
                state = RunState.PAUSED if not self._waits.by_step else None
            elif self.position.finished:
                state = RunState.COMPLETED
        scopes = {branch: self._memories[branch] for branch in self._changed if branch in self._memories}
        gone, self._gone, self._changed = self._gone, set(), set()
        await self.session.step_done(
            record,
            events,
            self._progress(step.node_id, state),
            scopes,
            gone,
            quiet=alone,
            state=state,
            journal=step.key,
        )

    def _alone(self, step: Step) -> bool:
        """Whether no step but this one is in flight."""
        return all(running == step for running in self._running.values())
