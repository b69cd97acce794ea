"""One execution of a graph, in progress: runs what the planner says is ready, and commits what came back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from framework import _faults
from framework._secrets import mask_error
from framework.errors import BranchConflict, BudgetExceeded, UnstorableValue
from framework.graph import planner
from framework.graph.attempts import FailedAttempt, Visit, max_attempts, run_visit
from framework.graph.edge import GraphSpec
from framework.graph.goal import Goal
from framework.graph.memory import SharedMemory, isolated
from framework.graph.merge import LOCAL, BranchWrites, merge
from framework.graph.node_base import NodeContext, NodeResult, NodeSpec
from framework.graph.planner import Outcome, Position, Step
from framework.graph.routing import Route, choose
from framework.graph.run_journals import RunJournals, Waits
from framework.graph.run_opening import Restored
from framework.graph.run_parts import Ending, Failure, NodeSource, let_others_run, unstorable
from framework.graph.run_path import RunPath
from framework.graph.run_records import (
    attempt_record,
    attempts_used,
    finished_steps,
    given_input,
    step_record,
    stored_input,
)
from framework.graph.run_session import Progress, RunSession
from framework.graph.runtime_port import RuntimePort
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Suspended, Waiting
from framework.schemas.checkpoint import CheckpointStatus
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class GraphRun:
    """The live side of a run. ``session`` is ``None`` without a checkpoint manager: then nothing is written."""

    graph: GraphSpec
    goal: Goal
    run_id: str
    nodes: NodeSource
    port: RuntimePort
    session: RunSession | None
    position: Position
    memory: SharedMemory
    steps: RunPath = field(default_factory=RunPath)
    spent: Spent = NOTHING
    recovered: int = 0
    next_after_pause: str | None = None
    failed_steps: list[Step] = field(default_factory=list)
    reported: bool = False
    journals: RunJournals = field(init=False)
    _memories: dict[str, SharedMemory] = field(default_factory=dict)
    _writers: dict[str, dict[str, str]] = field(default_factory=dict)
    _inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failed_before: dict[str, int] = field(default_factory=dict)
    _answered: set[str] = field(default_factory=set)
    _changed: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)
    _waiting: set[Step] = field(default_factory=set)
    _waits: Waits = field(default_factory=Waits)
    _specs: dict[str, NodeSpec] = field(default_factory=dict)
    _running: dict[asyncio.Task[Failure | None], Step] = field(default_factory=dict)
    _failure: Failure | None = None
    _may_be_woken: bool = False
    _asked: set[Any] = field(default_factory=set)
    _goal_text: str = ""

    def __post_init__(self) -> None:
        self._specs = {node.id: node for node in self.graph.nodes}
        self._goal_text = self.goal.to_prompt_context()
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

    async def hold_waiting(self) -> None:
        """After a resume that brought nothing new: steps whose wait is over go on alone, as that may be why the run was
        woken; when none is, all go on but those that wait for a time or a message."""
        if self._may_be_woken and not await self._woken():
            self._go_on()
            for step in self.position.ready:
                if step.key in self._waits.by_step:
                    self.position = planner.hold(self.position, step)

    async def commit_resume(self, input_keys: Sequence[str]) -> None:
        """Make durable what a resume brought, before its first step."""
        if self.session is not None:
            record: dict[str, Any] = {"kind": "resume", "input_keys": list(input_keys)}
            if self.journals.budget is not None:
                record["budget"] = self.journals.budget.to_json()
            await self.session.note(record, (), self._progress(self._last_node()), {"": self.memory})

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> Ending:
        """Run until nothing is left, the run pauses, or it fails. Storage errors and cancellation pass through."""
        try:
            while True:
                if self.session is not None and self.session.cancel_requested.is_set():
                    raise asyncio.CancelledError  # also when a node swallowed the cancellation
                if self._failure is None:
                    self._failure = self._join_ready()
                ready = self._launchable()
                if len(ready) == 1 and not self._running:
                    # The common case, one step at a time, needs no task of its own.
                    self._note_failure(await self._step(ready[0]))
                    await let_others_run()
                    continue
                for step in ready:
                    self._running[asyncio.create_task(self._step(step))] = step
                if not self._running:
                    if self._failure is None and await self._woken():
                        continue
                    return self._finish()
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del self._running[task]
                # Every finished task is looked at before any error leaves, so that none goes unseen.
                errors = [error for task in done if (error := task.exception()) is not None]
                for task in done:
                    if task.exception() is None:
                        self._note_failure(task.result())
                if errors:
                    raise errors[0]
                if self._failure is not None and self._fails_fast(self._failure):
                    await self._stop_others()
        except GeneratorExit:  # the coroutine is being closed: nothing can be waited for
            for task in self._running:
                if not task.get_loop().is_closed():
                    task.cancel()
            raise
        except BaseException:
            await self._stop_others()
            raise

    def _note_failure(self, failure: Failure | None) -> None:
        """Remember a failed step, so that it is not run again. Of several the first by key is the run's failure."""
        if failure is None:
            return
        if failure.step is not None:
            self.failed_steps = sorted([*self.failed_steps, failure.step], key=lambda step: step.key)
        known = self._failure
        if known is None or (failure.step is not None and failure.step == self.failed_steps[0]):
            self._failure = failure

    def _launchable(self) -> list[Step]:
        """Ready steps that may start: not running, not waiting for the commit they follow, within the step budget."""
        if self._failure is not None and self._fails_fast(self._failure):
            return []
        running = set(self._running.values())
        unfit = running | self._waiting | set(self.failed_steps)
        steps = [step for step in self.position.ready if step not in unfit]
        room = self.graph.max_steps - self.position.steps_taken - len(running)
        if len(steps) > room:
            if room <= 0 and not running:
                self._note_failure(
                    Failure(
                        f"Stopped at the limit of max_steps={self.graph.max_steps} steps before {steps[0].node_id!r}. "
                        "Look for a loop that does not end, or raise GraphSpec.max_steps and resume."
                    )
                )
            return steps[: max(0, room)]
        return steps

    def _fails_fast(self, failure: Failure) -> bool:
        branch = self.position.branches.get(failure.step.branch) if failure.step is not None else None
        if branch is None:
            return True
        return self._specs[branch.source].fan_out_policy == "fail_fast"

    async def _stop_others(self) -> None:
        """Cancel the steps in flight and wait for them; a commit under way is finished first."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True) if tasks else ():
            if isinstance(outcome, Exception):
                logger.warning("A step that was being stopped failed as well: %s", mask_error(outcome))
        self._running.clear()

    def _finish(self) -> Ending:
        if self._failure is not None:
            return Ending(RunState.FAILED, self._failure.error, self._failure.error_type)
        if self.position.paused_at is not None:
            return Ending(RunState.PAUSED)
        return Ending(RunState.COMPLETED)

    async def _woken(self) -> bool:
        """Whether steps that waited can go on now, or so soon that the process stays for it; then they are ready."""
        if self.session is None or self.session.ended:
            return False
        steps = {step.key: step for step in self.position.held}
        over = await self._waits.woken(self.session, steps)
        for key in over:
            self.position = planner.release(self.position, steps[key])
        return bool(over)

    def _wake_at(self) -> float | None:
        return self._waits.wake_at(step.key for step in self.position.held)

    # --- one step -----------------------------------------------------------------------------------------------

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
            ctx = copy(self.nodes.context_for(spec, view))
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

    def _was_asked(self, step: Step, spec: NodeSpec) -> bool:
        """Whether the run already paused here, for the answer that completed this step: one pause is enough."""
        return step.key in self._answered and self.nodes.implementation_of(spec) is None

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
        route = Route()
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
            # A node that chose an unknown one has no way on: its edges were not meant.
            route = await self._route(spec, memory, result, llm) if route.error is None else Route()
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
        record = step_record(step, visit, error, self.position)
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

    def _write_output(self, memory: SharedMemory, result: NodeResult) -> set[str]:
        """Put what the node returned into its memory; the keys that the step changed."""
        own = memory.own
        for key, value in (result.output or {}).items():
            if key not in own or own[key] is not value:
                memory.put(key, value)
        memory.settle()
        # Also what was written with the value it had: in a branch it is the node's now, no longer a mapped input.
        return memory.take_written() | set(result.output or {})

    async def _route(self, spec: NodeSpec, memory: SharedMemory, result: NodeResult, llm: Any = None) -> Route:
        _faults.reach("routing")
        return await choose(
            self.graph,
            spec,
            memory,
            result,
            llm=llm if llm is not None else self.nodes.context_for(spec, memory).llm,
            goal=self.goal,
            on_warning=lambda message: self.port.problem("warning", message),
        )

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

    # --- what is committed --------------------------------------------------------------------------------------

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

    def _last_node(self) -> str:
        return self.steps.last or self.graph.entry_node

    def _progress(self, node_id: str, state: RunState | None = None) -> Progress:
        ready = self.position.ready or self.position.held
        position = planner.to_json(self.position)
        del position["visits"]  # the log tells them: see planner.visits_of
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

    async def end(self, ending: Ending, events: Sequence[dict[str, Any]] = ()) -> None:
        """Record an ending that was not part of a step's commit."""
        if self.session is not None and not self.session.ended:
            progress = self._progress(self._last_node(), ending.state)
            due = self._wake_at() if ending.state is RunState.PAUSED else None
            scopes = dict(self._memories)
            await self.session.end(ending.state, ending.error, events, progress, scopes, self._gone, wake_at=due)

    async def leave(self) -> None:
        """Give the run up without an end, for the next process to go on with."""
        if self.session is not None and not self.session.ended:
            await self.session.leave(self._progress(self._last_node()), dict(self._memories), self._gone)

    @property
    def path(self) -> list[str]:
        """The nodes visited, over all processes, each visit once; failed steps last."""
        return [*self.steps, *(step.node_id for step in self.failed_steps)]
