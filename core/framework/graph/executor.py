"""``GraphExecutor``: runs a graph to its end, and with a checkpoint manager runs it so that nothing done is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from framework._secrets import mask_error, masked_traceback
from framework.errors import LeaseLost, ResumeError, StorageError, SurefootError, UnstorableValue
from framework.graph import planner
from framework.graph.budget import PartAccount, RunBudget, part_account
from framework.graph.builtin_nodes import FunctionNode, LLMNode, RouterNode
from framework.graph.cancelling import lets_go
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.crash_loops import too_often
from framework.graph.definition import canonical, describe_changes, fingerprint
from framework.graph.edge import GraphSpec
from framework.graph.goal import Goal
from framework.graph.graph_run import GraphRun
from framework.graph.memory import SharedMemory
from framework.graph.merge import append_only_keys
from framework.graph.node_base import NodeContext, NodeSpec
from framework.graph.run_messages import CANCELLED_ON_REQUEST, CancelRequested
from framework.graph.run_opening import Definition, Restored
from framework.graph.run_parts import Ending
from framework.graph.run_session import Opened
from framework.graph.runtime_port import RuntimePort
from framework.llm.provider import ToolPolicy
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK, path_of
from framework.storage.interface import check_id

logger = logging.getLogger(__name__)


@dataclass
class ExecutionResult:
    """What an execution came to.

    ``output`` is the whole state. ``path``, ``steps_executed`` and the totals are the run's, over all processes that
    worked on it; ``total_cost`` is in US dollars, as far as prices are known. ``session_state`` is filled when the run
    can be resumed. ``run_id`` names the run for life; ``checkpoint_id`` is its newest checkpoint, ``resumed_from`` the
    one this execution began at, and ``steps_recovered`` how many finished steps it did not have to run again.
    ``error_type`` is "budget" when the run's budget is used up, "recovery" when the run ended its process too often.
    """

    success: bool
    output: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    steps_executed: int = 0
    total_tokens: int = 0
    total_latency_ms: int = 0
    path: list[str] = field(default_factory=list)
    paused_at: str | None = None
    session_state: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    checkpoint_id: str | None = None
    resumed_from: str | None = None
    steps_recovered: int = 0
    total_cost: float = 0.0
    error_type: str | None = None


class GraphExecutor:
    """Executes graphs. One executor may run any number of them at once.

    ``runtime`` records decisions and problems (``framework.runtime.Runtime``, or anything with ``start_run``,
    ``end_run`` and ``report_problem``). With a ``checkpoint_manager`` every finished step is durable; without one
    nothing is written. ``approval_callback`` is kept for the caller.
    """

    def __init__(
        self,
        runtime: Any,
        llm: Any = None,
        tools: list[Any] | None = None,
        tool_executor: Callable[..., Any] | None = None,
        node_registry: dict[str, Any] | None = None,
        approval_callback: Callable[..., Any] | None = None,
        checkpoint_manager: CheckpointManager | None = None,
    ) -> None:
        self.runtime = runtime
        self.llm = llm
        self.tools = tools or []
        self.tool_executor = tool_executor
        self.node_registry = node_registry if node_registry is not None else {}
        self.approval_callback = approval_callback
        self.checkpoint_manager = checkpoint_manager

    def register_node(self, node_id: str, implementation: Any) -> None:
        """Use ``implementation`` for the node ``node_id``."""
        self.node_registry[node_id] = implementation

    def register_function(
        self, node_id: str, func: Callable[..., Any], *, effects: bool = False, policy: ToolPolicy | None = None
    ) -> None:
        """Use a function, synchronous or asynchronous, for the node ``node_id``.

        ``effects`` says that it changes something outside, ``policy`` ("rerun", "ask", "fail") what becomes of a call
        that was cut off: see `FunctionNode`. Raises ``ValueError`` for another policy.
        """
        self.node_registry[node_id] = FunctionNode(func, effects=effects, policy=policy)

    async def execute(
        self,
        graph: GraphSpec,
        goal: Goal,
        input_data: dict[str, Any] | None = None,
        session_state: dict[str, Any] | None = None,
        *,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        budget: RunBudget | None = None,
    ) -> ExecutionResult:
        """Run ``graph`` and return what came of it.

        With a checkpoint manager and a ``run_id`` the same call starts, resumes or returns: an unknown id starts a
        run; a failed, crashed, cancelled or paused one goes on after its last checkpoint; a completed one's result is
        returned and nothing runs. ``input_data`` that differs from the run's original input is written over the state
        when it goes on. A ``session_state`` from a paused or failed result goes on as well: in its own run when the
        manager knows it, else as a new run that begins where it says. ``parent_run_id`` is recorded with a new run
        that is a part of another, and so are ``metadata``: small facts about it, as JSON values, kept for its life and
        shown where runs are listed. ``budget`` limits what the run may spend in all; it is recorded, and counts for
        later calls until one gives another. A run that has used it up fails, and goes on with a larger one.

        What a node does wrong is a failed result, never an exception. Raises ``RunBusy``, ``DefinitionChanged``,
        ``ResumeError``, ``InvalidId``, ``UnknownType`` before anything ran, ``LeaseLost`` when another process took
        the run over, and ``asyncio.CancelledError``; the finished steps are durable then.
        """
        problems = graph.validate()
        if problems:
            return ExecutionResult(False, error="Invalid graph: " + "; ".join(problems), run_id=run_id)
        wrong = _session_problem(session_state)
        if wrong is not None:
            return ExecutionResult(False, error=wrong, run_id=run_id)
        with part_account() as whole:
            return await _Execution(
                self,
                graph,
                goal,
                dict(input_data or {}),
                dict(session_state or {}),
                run_id,
                parent_run_id,
                metadata,
                budget,
                whole,
            ).run()

    # --- what a run asks of its executor (graph_run.NodeSource) ---------------------------------------------------

    def implementation_of(self, spec: NodeSpec) -> Any:
        """The node's implementation; ``None`` for a person nobody stands in for. Raises ``LookupError``."""
        found = self.node_registry.get(spec.id)
        if found is not None:
            return found
        if spec.node_type == "function":
            raise LookupError(
                f"node {spec.id!r} is a function node and none is registered; call register_function({spec.id!r}, ...)"
            )
        if spec.node_type == "human_input":
            return None
        if spec.node_type == "router":
            return RouterNode()
        if spec.node_type == "llm_generate":
            return LLMNode()
        return LLMNode(tool_executor=self.tool_executor)

    def context_for(self, spec: NodeSpec, memory: SharedMemory) -> NodeContext:
        """What every attempt of the node is given by this executor; a new one each time, for the run to complete."""
        return NodeContext(
            runtime=self.runtime,
            node_id=spec.id,
            node_spec=spec,
            memory=memory,
            llm=self.llm,
            available_tools=[tool for tool in self.tools if tool.name in spec.tools],
        )


def _recorded_budget(restored: Restored | None) -> RunBudget | None:
    """The budget that the run was last given."""
    if restored is None:
        return None
    given = [restored.header.get("budget"), *(each.get("budget") for each in (*restored.records, *restored.later))]
    last = next((plain for plain in reversed(given) if plain is not None), None)
    return RunBudget.from_json(last) if last is not None else None


def _session_problem(state: Any) -> str | None:
    """What is wrong with a ``session_state``, if anything."""
    if state is None:
        return None
    if not isinstance(state, dict):
        return f"session_state is a dict, not {type(state).__name__}."
    memory = state.get("memory")
    if memory is not None and not isinstance(memory, dict):
        return f"session_state['memory'] is a dict of named values, not {type(memory).__name__}."
    for name in ("paused_at", "resume_from", "next_node", "run_id", "checkpoint_id"):
        if not isinstance(state.get(name), str | None):
            return f"session_state[{name!r}] is a text or None, not {type(state[name]).__name__}."
    return None


class _Execution:
    """One call of ``execute``: opens the run, drives it, and turns every ending into a result."""

    def __init__(
        self,
        executor: GraphExecutor,
        graph: GraphSpec,
        goal: Goal,
        input_data: dict[str, Any],
        session_state: dict[str, Any],
        run_id: str | None,
        parent_run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        budget: RunBudget | None = None,
        whole: PartAccount | None = None,
    ) -> None:
        self._executor = executor
        self._budget = budget
        self._whole = whole
        self._parent_run_id = parent_run_id
        self._metadata = metadata
        self._graph = graph
        self._goal = goal
        self._input = input_data
        self._session_state = session_state
        self._port = RuntimePort(executor.runtime)
        manager = executor.checkpoint_manager
        self._manager = manager if manager is not None and manager.config.enabled else None
        recorded = session_state.get("run_id")
        if run_id is None and self._manager is not None and isinstance(recorded, str):
            run_id = recorded or None
        self._named = run_id is not None
        self._run_id = run_id or ""
        self._reports: list[str] = []

    async def run(self) -> ExecutionResult:
        try:
            start = self._start_node()
        except ValueError as error:
            return ExecutionResult(False, error=str(error), run_id=self._run_id or None)
        if self._manager is None:
            self._run_id = await self._port.start(self._goal, self._input, self._run_id or None)
            return await self._drive(self._fresh(start, None), None)
        if self._named:
            check_id(self._run_id)
        else:
            # The runtime names the run; a named one is opened first, so that a busy run leaves no trace.
            self._run_id = await self._port.start(self._goal, self._input)
        try:
            opened = await self._open(self._manager, start)
        except (UnstorableValue, StorageError) as error:
            return await self._not_started(error)
        except GeneratorExit:
            if not self._named:
                self._port.abandon(self._run_id)
            raise
        except BaseException as error:
            await self._end_record(False, f"not started: {error}", {})
            raise
        if opened.session is None:
            assert opened.restored is not None
            return self._stored_result(opened.restored)
        try:
            self._port.fence(opened.session.token)
            if self._named:
                await self._start_record(opened.restored)
            return await self._drive(self._fresh(start, opened), opened.restored)
        except GeneratorExit:
            opened.session.let_go()
            raise
        finally:
            await opened.session.abandon()

    # --- opening ------------------------------------------------------------------------------------------------

    def _start_node(self) -> str | None:
        """Where a new run begins; ``None`` when it is a paused one after which nothing comes. Raises ``ValueError``."""
        state = self._session_state
        paused = state.get("paused_at")
        nothing_follows = "next_node" in state and state["next_node"] is None
        if paused is not None and nothing_follows and self._graph.get_node(paused) is not None:
            onward = state.get("resume_from")
            named = onward in self._graph.entry_points or f"{paused}_resume" in self._graph.entry_points
            if not named and (onward is None or self._graph.get_node(onward) is None):
                return None
        return self._graph.get_entry_point(state or None)

    def _initial(self) -> dict[str, Any]:
        return {**(self._session_state.get("memory") or {}), **self._input}

    async def _open(self, manager: CheckpointManager, start: str | None) -> Opened:
        definition = Definition(
            id=self._graph.id,
            executor_type=ExecutorType.GRAPH,
            goal_id=self._goal.id,
            fingerprint=fingerprint(self._graph),
            body=canonical(self._graph),
            describe=describe_changes,
            append_only=append_only_keys(self._graph),
            check=self._check,
            # What the branches of a fan-out hold is in the run's own store only.
            must_exist=bool(self._session_state.get("in_fan_out")),
        )
        header: dict[str, Any] = {"start": start}
        if self._session_state.get("checkpoint_id"):
            header["resumed_from"] = self._session_state["checkpoint_id"]
        if self._budget is not None:
            header["budget"] = self._budget.to_json()
        return await manager.open_session(
            definition,
            self._run_id,
            initial=self._initial(),
            input_data=self._input,
            header=header,
            on_problem=self._report,
            parent_run_id=self._parent_run_id,
            metadata=self._metadata,
        )

    def _check(self, restored: Restored) -> None:
        """Refuse what cannot go on, before the run is claimed. Raises ``ResumeError``."""
        position = restored.body.get("position")
        if position:
            missing = planner.missing_nodes(self._graph, planner.from_json(position))
            if missing:
                raise ResumeError(
                    self._run_id,
                    f"Run {self._run_id!r} stands at {', '.join(map(repr, missing))}, which graph {self._graph.id!r} "
                    "no longer has. Resume with a graph that has it, or start a new run under another run_id.",
                )
        told = self._session_state.get("checkpoint_id")
        if self._is_stale(restored) and restored.found is RunState.PAUSED:
            raise ResumeError(
                self._run_id,
                f"The session_state is of checkpoint {told!r}, and run {self._run_id!r} has gone on to "
                f"{restored.checkpoint_id!r}, where it is paused. Answer that pause: use its own session_state, or "
                "call again with the run_id alone.",
            )

    def _is_stale(self, restored: Restored) -> bool:
        """Whether the session_state is of another checkpoint than the run's newest."""
        told = self._session_state.get("checkpoint_id")
        return told is not None and told != restored.checkpoint_id

    def _report(self, description: str) -> None:
        logger.warning("Run %r: %s", self._run_id, description)
        self._reports.append(description)

    def _tell_reports(self) -> None:
        reports, self._reports = self._reports, []
        for description in reports:
            self._port.problem("warning", description)

    async def _start_record(self, restored: Restored | None) -> None:
        if restored is None:
            await self._port.start(self._goal, self._input, self._run_id)
        else:
            await self._port.start(self._goal, dict(restored.input_data), self._run_id, restored.events)

    async def _end_record(self, success: bool, narrative: str, output: dict[str, Any]) -> None:
        if not self._named:
            await self._port.end(success, narrative, output)

    async def _not_started(self, error: SurefootError) -> ExecutionResult:
        text = f"Run {self._run_id!r} was not started, because it could not be made durable: {error}"
        await self._end_record(False, text, {})
        return ExecutionResult(False, error=text, run_id=self._run_id)

    def _fresh(self, start: str | None, opened: Opened | None) -> GraphRun:
        restored = opened.restored if opened is not None else None
        memory = SharedMemory()
        if restored is None:
            for key, value in self._initial().items():
                memory.put(key, value)
        else:
            start = restored.header.get("start", self._graph.entry_node)
        run = GraphRun(
            graph=self._graph,
            goal=self._goal,
            run_id=self._run_id,
            nodes=self._executor,
            port=self._port,
            session=opened.session if opened is not None else None,
            position=planner.start(start) if start is not None else planner.Position(),
            memory=memory,
        )
        run.journals.budget = self._budget if self._budget is not None else _recorded_budget(restored)
        if self._whole is not None:
            run.journals.whole = self._whole
            self._whole.attach(lambda: run.spent + run.journals.unfinished, resumed=restored is not None)
        return run

    # --- driving ------------------------------------------------------------------------------------------------

    async def _drive(self, run: GraphRun, restored: Restored | None) -> ExecutionResult:
        events: list[dict[str, Any]] = []
        try:
            with self._port.recording(events):
                self._tell_reports()
            if restored is not None:
                await self._take_up(run, restored)
            steps = "step" if run.recovered == 1 else "steps"
            detail = f"{run.recovered} {steps} recovered" if restored is not None else None
            self._port.emit("run_resumed" if restored is not None else "run_started", detail=detail)
            if restored is None and run.position.ready:
                first = run.position.ready[0].node_id
                answered = self._session_state.get("paused_at") == first
                run.begin_with(self._input or self._initial(), answered=answered)
            with run.session.stoppable() if run.session is not None else nullcontext():
                ending = self._given_up(run, restored) or await run.run()
            if ending.state is RunState.PAUSED and run.session is None and run.position.branches:
                # A session_state names one next node; the other branches would be lost without a word.
                ending = Ending(
                    RunState.FAILED,
                    f"Node {run.position.paused_at!r} paused inside a fan-out, which only a run with checkpoints can "
                    "resume: give GraphExecutor a checkpoint_manager, or pause after the branches have met.",
                )
            with self._port.recording(events):
                self._tell_reports()
                if ending.error is not None and not run.reported:
                    self._port.problem("critical", ending.error)
            await run.end(ending, events)
        except CancelRequested:
            ending = await self._stopped(run, CANCELLED_ON_REQUEST, RunState.CANCELLED)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            if run.session is not None and lets_go(error):
                await self._let_go(run)
            else:
                await self._cancelled(run, "cancelled" if isinstance(error, asyncio.CancelledError) else repr(error))
            raise
        except GeneratorExit:
            # The coroutine is being closed, maybe with its loop gone: nothing can be waited for. A durable run is left
            # to the next process, as its record says; nobody goes on with any other.
            if run.session is None:
                self._port.end_now("closed before its end")
            else:
                self._port.abandon(run.run_id)
            raise
        except StorageError as error:
            self._port.problem("critical", str(error))
            ending = Ending(RunState.FAILED, str(error))
        except LeaseLost:
            # The new owner writes the run's record now; ending ours would overwrite it.
            self._port.abandon(run.run_id)
            raise
        except SurefootError as error:
            await self._port.end(success=False, narrative=f"stopped: {error}", output_data=dict(run.memory.view()))
            raise
        except Exception as error:
            # No node's error: those are caught where they run. A condition, a tool list, a runtime may raise anything;
            # it is logged, recorded as the run's end, and the caller gets what was done so far.
            logger.error("Run %r stopped by an unexpected error:\n%s", run.run_id, masked_traceback(error))
            ending = await self._stopped(run, f"{type(error).__name__}: {error}")
        self._tell_reports()
        return await self._result(run, ending, restored)

    def _given_up(self, run: GraphRun, restored: Restored | None) -> Ending | None:
        """The end of a run that has ended its process too often; ``None`` for any other."""
        if run.session is None or restored is None or restored.found is not RunState.CRASHED:
            return None
        times = run.session.recovery_attempts
        if times <= run.session.config.max_recovery_attempts:
            return None
        at = [step.node_id for step in run.position.ready]
        return Ending(
            RunState.FAILED, too_often(self._run_id, times, "CheckpointConfig.max_recovery_attempts", at), "recovery"
        )

    async def _stopped(self, run: GraphRun, problem: str, state: RunState = RunState.FAILED) -> Ending:
        events: list[dict[str, Any]] = []
        with self._port.recording(events):
            self._port.problem("critical" if state is RunState.FAILED else "warning", problem)
        ending = Ending(state, problem)
        try:
            await run.end(ending, events)
        except LeaseLost:
            self._port.abandon(run.run_id)
            raise
        except SurefootError as error:
            why = mask_error(error)
            logger.warning("Run %r is %s, which could not be recorded: %s", run.run_id, state.value, why)
        ended = run.session.ended_as if run.session is not None else None
        return ending if ended in (None, state) else Ending(ended)

    async def _take_up(self, run: GraphRun, restored: Restored) -> None:
        # A session_state is edited by its holder, but one of an earlier checkpoint only says what the state was then.
        memory = {} if self._is_stale(restored) else self._session_state.get("memory") or {}
        edited = {
            key: value
            for key, value in memory.items()
            if SCOPE_MARK not in key and (key not in restored.values or not codec.same(restored.values[key], value))
        }
        brought = {**edited, **self._input}
        changed = run.take_up(restored, brought)
        await run.hold_waiting()
        if changed or self._budget is not None:
            await run.commit_resume(sorted(brought))

    async def _let_go(self, run: GraphRun) -> None:
        """Leave the run to the next process. Its record stays as it was saved last: it says that the run goes on."""
        try:
            await run.leave()
        except SurefootError as error:
            logger.warning("Run %r was let go; what was not committed yet is not kept: %s", run.run_id, error)
        finally:
            self._port.emit("run_ended", error="let go, for the next process", detail=RunState.RUNNING.value)
            self._port.abandon(run.run_id)

    async def _cancelled(self, run: GraphRun, why: str) -> None:
        try:
            await run.end(Ending(RunState.CANCELLED, why))
        except SurefootError as error:
            logger.warning("Run %r was cancelled, which could not be recorded: %s", run.run_id, mask_error(error))
        finally:
            self._port.emit("run_ended", error=why, detail=RunState.CANCELLED.value)
            await self._port.end(False, why, dict(run.memory.view()), cancelled=True)

    # --- results ------------------------------------------------------------------------------------------------

    async def _result(self, run: GraphRun, ending: Ending, restored: Restored | None) -> ExecutionResult:
        success = ending.state not in (RunState.FAILED, RunState.CANCELLED)
        spent = run.spent + run.journals.unfinished
        paused_at = run.position.paused_at if ending.state is RunState.PAUSED else None
        result = ExecutionResult(
            success,
            output=run.memory.read_all(),
            error=ending.error,
            steps_executed=run.position.steps_taken + len(run.failed_steps),
            total_tokens=spent.tokens,
            total_latency_ms=spent.latency_ms,
            total_cost=spent.cost,
            error_type=ending.error_type,
            path=run.path,
            paused_at=paused_at,
            run_id=run.run_id,
            checkpoint_id=run.session.checkpoint_id if run.session is not None else None,
            resumed_from=restored.checkpoint_id if restored is not None else None,
            steps_recovered=run.recovered,
        )
        if paused_at is not None:
            result.session_state = {
                "paused_at": paused_at,
                "resume_from": f"{paused_at}_resume",
                "memory": dict(result.output),
                "next_node": run.next_after_pause,
            }
            if run.position.branches:
                result.session_state["in_fan_out"] = True
        if run.session is not None and ending.state is not RunState.COMPLETED:
            if not success:
                ready = run.position.ready
                result.session_state = {
                    "memory": dict(result.output),
                    "resume_from": ready[0].node_id if ready else None,
                    "recovered_from_failure": True,
                }
            result.session_state |= {
                "run_id": run.run_id,
                "checkpoint_id": result.checkpoint_id,
                "execution_path": list(result.path),
            }
        self._port.emit(
            "run_ended",
            tokens=spent.tokens,
            latency_ms=spent.latency_ms,
            cost=spent.cost,
            error=ending.error,
            detail=ending.state.value,
        )
        narrative = f"paused at {paused_at}" if paused_at is not None else (ending.error or "")
        cancelled = ending.state is RunState.CANCELLED
        await self._port.end(success, narrative, dict(result.output), cancelled=cancelled)
        return result

    def _stored_result(self, restored: Restored) -> ExecutionResult:
        """The result of a completed run, from the store alone."""
        return ExecutionResult(
            True,
            output={key: value for key, value in restored.values.items() if SCOPE_MARK not in key},
            steps_executed=restored.body.get("step_number", 0),
            total_tokens=restored.body.get("tokens", 0),
            total_latency_ms=restored.body.get("latency_ms", 0),
            total_cost=restored.body.get("cost", 0.0),
            path=path_of(restored.records),
            run_id=self._run_id,
            checkpoint_id=restored.checkpoint_id,
            resumed_from=restored.checkpoint_id,
            steps_recovered=sum(1 for record in restored.records if record.get("kind") == "step"),
        )
