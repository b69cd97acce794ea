"""One call of ``execute_plan``: opens the run, drives it, and turns every ending into a result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from framework.errors import DefinitionChanged, LeaseLost, ResumeError, StorageError, SurefootError, UnstorableValue
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.goal import Goal
from framework.graph.plan import ApprovalRequest, ExecutionStatus, Plan, PlanExecutionResult
from framework.graph.plan_answers import require_plan, state_of
from framework.graph.plan_planner import canonical, describe_changes, fingerprint
from framework.graph.plan_run import RUN_STATES, Ending, Limits, PlanRun, Worker
from framework.graph.plan_state import SCOPE, PlanState, plan_of
from framework.graph.run_opening import Definition, Restored
from framework.graph.run_session import Opened, RunSession
from framework.graph.runtime_port import RuntimePort, new_run_id
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage.checkpoints import SCOPE_MARK
from framework.storage.interface import check_id

logger = logging.getLogger(__name__)


class PlanExecutor(Protocol):
    """What an execution needs of the executor that began it."""

    runtime: Any
    judge: Any
    approval_callback: Callable[[ApprovalRequest], Any] | None

    @property
    def worker(self) -> Worker: ...

    def limits(self) -> Limits: ...


class PlanExecution:
    """Made for one call, and used up by ``run``."""

    def __init__(
        self,
        executor: PlanExecutor,
        manager: CheckpointManager | None,
        plan: Plan | None,
        goal: Goal,
        context: dict[str, Any],
        run_id: str | None,
        replan: bool,
    ) -> None:
        self._executor = executor
        self._manager = manager
        self._plan = plan
        self._goal = goal
        self._context = context
        self._named = run_id is not None
        self._run_id = run_id or ""
        self._replan = replan
        self._revised = False
        self._port = RuntimePort(executor.runtime)
        self._reports: list[str] = []

    async def run(self) -> PlanExecutionResult:
        """See ``FlexibleGraphExecutor.execute_plan``."""
        if self._manager is None:
            assert self._plan is not None
            self._run_id = await self._port.start(self._goal, self._input_of(self._plan), self._run_id or None)
            return await self._drive(self._run_of(PlanState.begin(self._plan, self._context), None), None)
        check_id(self._run_id if self._named else new_run_id())
        if not self._named:
            # The runtime names the run; a named one is opened first, so that a busy run leaves no trace.
            assert self._plan is not None
            self._run_id = await self._port.start(self._goal, self._input_of(self._plan))
        revision = self._plan.revision if self._plan is not None else 1
        fresh = PlanState.begin(self._plan, self._context) if self._plan is not None else None
        try:
            opened = await self._open(self._manager, fresh)
        except (UnstorableValue, StorageError) as error:
            return await self._not_started(error)
        except GeneratorExit:
            if not self._named:
                self._port.abandon(self._run_id)
            raise
        except BaseException as error:
            await self._end_record(f"not started: {error}")
            raise
        if opened.session is None:
            assert opened.restored is not None
            return self._stored_result(opened.restored)
        try:
            if opened.restored is None:
                assert fresh is not None
                if self._named:
                    await self._port.start(self._goal, self._input_of(fresh.plan), self._run_id)
                return await self._drive(self._run_of(fresh, opened.session), None)
            return await self._resume(opened.restored, opened.session, revision)
        except GeneratorExit:
            opened.session.let_go()
            raise
        finally:
            await opened.session.abandon()

    # --- opening ------------------------------------------------------------------------------------------------

    async def _open(self, manager: CheckpointManager, fresh: PlanState | None) -> Opened:
        body = canonical(fresh.plan) if fresh is not None else {}
        definition = Definition(
            id=fresh.plan.id if fresh is not None else "",
            executor_type=ExecutorType.FLEXIBLE,
            goal_id=self._goal.id,
            fingerprint=fingerprint(body),
            body=body,
            describe=describe_changes,
            accept=self._accept,
            must_exist=fresh is None,
        )
        return await manager.open_session(
            definition,
            self._run_id,
            initial=fresh.memory.view() if fresh is not None else {},
            input_data=self._context,
            header={},
            on_problem=self._report,
            scopes={SCOPE: fresh.stored} if fresh is not None else None,
        )

    def _accept(self, found: Restored) -> None:
        """Whether the stored run may go on with the given plan; raises otherwise. Runs before the run is claimed."""
        require_plan(found.values, self._run_id)
        if self._plan is None:
            return
        old = plan_of(found.values)
        changes = describe_changes(canonical(old), canonical(self._plan))
        self._revised = bool(changes)
        if not changes or (found.found is RunState.COMPLETED and not self._replan and old.id == self._plan.id):
            return  # a completed run executes nothing: its result is its result for any version of its plan
        if found.found is RunState.COMPLETED and self._replan:
            text = f"Run {self._run_id!r} is completed, so its plan cannot be revised; use another run_id."
            raise ResumeError(self._run_id, text)
        assert self._manager is not None
        if not self._replan and self._manager.config.definition_change != "allow":
            raise DefinitionChanged(
                self._run_id, changes, "take the plan as the run's next revision with execute_plan(..., replan=True)."
            )

    def _report(self, description: str) -> None:
        logger.warning("Run %r: %s", self._run_id, description)
        self._reports.append(description)

    def _tell_reports(self) -> None:
        reports, self._reports = self._reports, []
        for description in reports:
            self._port.problem("warning", description)

    def _input_of(self, plan: Plan) -> dict[str, Any]:
        return {"plan_id": plan.id, "revision": plan.revision}

    async def _end_record(self, narrative: str) -> None:
        if not self._named:
            await self._port.end(False, narrative, {})

    async def _not_started(self, error: SurefootError) -> PlanExecutionResult:
        text = f"Run {self._run_id!r} was not started, because it could not be made durable: {error}"
        await self._end_record(text)
        return PlanExecutionResult(status=ExecutionStatus.FAILED, error=text, run_id=self._run_id)

    def _run_of(self, state: PlanState, session: RunSession | None) -> PlanRun:
        executor = self._executor
        return PlanRun(
            state,
            self._goal,
            self._run_id,
            port=self._port,
            session=session,
            worker=executor.worker,
            judge=executor.judge,
            limits=executor.limits(),
            approval_callback=executor.approval_callback,
        )

    async def _resume(self, found: Restored, session: RunSession, revision: int) -> PlanExecutionResult:
        old = plan_of(found.values)
        given = dict(self._plan.context) if self._plan is not None else {}
        state = PlanState.restore(found.values, found.body, self._plan)
        for attempt in found.later:
            if attempt.get("kind") == "attempt":
                state.take_attempt(attempt)
        await self._port.start(self._goal, self._input_of(state.plan), self._run_id, found.events)
        record: dict[str, Any] = {"kind": "resume"}
        if found.found is RunState.FAILED:
            state.start_afresh()
        if self._revised:
            record["replan"] = state.revise(old, revision)
            record["revision"] = state.plan.revision
            ids = {step.id for step in (*old.steps, *state.plan.steps)}
            planned = {name: value for name, value in given.items() if name not in ids}
            state.bring({name: value for name, value in planned.items() if old.context.get(name) != value})
        brought = {
            name: value
            for name, value in self._context.items()
            if name not in found.input_data or found.input_data[name] != value
        }
        state.bring(brought)
        record["input_keys"] = sorted(brought)
        run = self._run_of(state, session)
        changes = self._revised or bool(brought) or found.found is RunState.FAILED
        return await self._drive(run, found, record if changes else None)

    # --- driving ------------------------------------------------------------------------------------------------

    async def _drive(
        self, run: PlanRun, found: Restored | None, brought: Mapping[str, Any] | None = None
    ) -> PlanExecutionResult:
        recovered = len(run.state.plan.get_completed_steps()) if found is not None else 0
        events: list[dict[str, Any]] = []
        try:
            with self._port.recording(events):
                self._tell_reports()
            if brought is not None:
                await run.commit_resume(brought)
            ending = await run.run()
            with self._port.recording(events):
                self._tell_reports()
            await self._close(run, ending, events)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            await self._cancelled(run, "cancelled" if isinstance(error, asyncio.CancelledError) else repr(error))
            raise
        except GeneratorExit:
            # The coroutine is being closed, maybe with its loop gone: nothing can be waited for.
            self._port.abandon(run.run_id)
            raise
        except StorageError as error:
            self._port.problem("critical", str(error))
            ending = Ending(ExecutionStatus.FAILED, str(error))
        except LeaseLost:
            # The new owner writes the run's record now; ending ours would overwrite it.
            self._port.abandon(run.run_id)
            raise
        except Exception as error:
            # No step's error: those are judged. An approval callback or a runtime may raise anything; it is logged,
            # recorded as the run's end, and the caller gets what was done so far.
            logger.exception("Run %r stopped by an unexpected error", run.run_id)
            ending = Ending(ExecutionStatus.FAILED, f"{type(error).__name__}: {error}")
            await self._stopped(run, ending)
        self._tell_reports()
        return await self._result(run, ending, found, recovered)

    async def _close(self, run: PlanRun, ending: Ending, events: list[dict[str, Any]]) -> None:
        reason = ending.reason if ending.status is not ExecutionStatus.COMPLETED else None
        await run.end(RUN_STATES[ending.status], reason, events)

    async def _stopped(self, run: PlanRun, ending: Ending) -> None:
        events: list[dict[str, Any]] = []
        with self._port.recording(events):
            self._port.problem("critical", str(ending.reason))
        try:
            await self._close(run, ending, events)
        except SurefootError as error:
            logger.warning("Run %r failed, which could not be recorded: %s", run.run_id, error)

    async def _cancelled(self, run: PlanRun, why: str) -> None:
        try:
            await run.end(RunState.CANCELLED, why)
        except SurefootError as error:
            logger.warning("Run %r was cancelled, which could not be recorded: %s", run.run_id, error)
        finally:
            await self._port.end(False, why, dict(run.state.memory.view()), cancelled=True)

    # --- results ------------------------------------------------------------------------------------------------

    async def _result(
        self, run: PlanRun, ending: Ending, found: Restored | None, recovered: int
    ) -> PlanExecutionResult:
        state = run.state
        completed = ending.status is ExecutionStatus.COMPLETED
        result = PlanExecutionResult(
            status=ending.status,
            results=state.memory.read_all(),
            feedback=ending.reason,
            feedback_context={} if completed else state.plan.to_feedback_context(),
            completed_steps=[step.id for step in state.plan.get_completed_steps()],
            steps_executed=state.steps_taken,
            total_tokens=state.total_tokens,
            total_latency_ms=state.total_latency_ms,
            error=ending.reason if ending.status is ExecutionStatus.FAILED else None,
            run_id=run.run_id,
            checkpoint_id=run.session.checkpoint_id if run.session is not None else None,
            resumed_from=found.checkpoint_id if found is not None else None,
            steps_recovered=recovered,
            revision=state.plan.revision,
            pending_approvals=run.gate.open_requests,
        )
        waits = ending.status is ExecutionStatus.AWAITING_APPROVAL
        await self._port.end(
            success=completed or waits,
            narrative="" if completed else f"{ending.status.value}: {ending.reason or 'no reason given'}",
            output_data=dict(result.results),
        )
        return result

    def _stored_result(self, found: Restored) -> PlanExecutionResult:
        """The result of a completed run, from the store alone; the caller's plan shows it too."""
        state = (
            PlanState.restore(found.values, found.body, self._plan)
            if self._plan is not None and not self._revised
            else state_of(found, self._run_id)
        )
        completed = [step.id for step in state.plan.get_completed_steps()]
        return PlanExecutionResult(
            status=ExecutionStatus.COMPLETED,
            results={key: value for key, value in found.values.items() if SCOPE_MARK not in key},
            completed_steps=completed,
            steps_executed=state.steps_taken,
            total_tokens=state.total_tokens,
            total_latency_ms=state.total_latency_ms,
            run_id=self._run_id,
            checkpoint_id=found.checkpoint_id,
            resumed_from=found.checkpoint_id,
            steps_recovered=len(completed),
            revision=state.plan.revision,
        )
