"""One call of ``execute_plan``: opens the run, drives it, and turns every ending into a result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from framework._secrets import mask_error, masked_traceback
from framework.errors import DefinitionChanged, LeaseLost, ResumeError, StorageError, SurefootError, UnstorableValue
from framework.graph.budget import PartAccount, RunBudget
from framework.graph.cancelling import lets_go, was_let_go
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.crash_loops import too_often
from framework.graph.goal import Goal
from framework.graph.plan import ActionType, ApprovalRequest, ExecutionStatus, Plan, PlanExecutionResult
from framework.graph.plan_answers import Answers, require_plan, state_of
from framework.graph.plan_journals import recorded_budget
from framework.graph.plan_parts import PlanParts
from framework.graph.plan_planner import canonical, canonical_step, describe_changes, fingerprint, ready_steps
from framework.graph.plan_run import PlanRun
from framework.graph.plan_state import SCOPE, HowFar, PlanState, plan_of
from framework.graph.plan_terms import RUN_STATES, Ending, Limits, Worker
from framework.graph.resume_outlook import waits_of
from framework.graph.run_messages import CANCELLED_ON_REQUEST, CancelRequested
from framework.graph.run_opening import Definition, Restored
from framework.graph.run_session import Opened, RunSession, wait_for
from framework.graph.runtime_port import RuntimePort, new_run_id
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.checkpoints import SCOPE_MARK
from framework.storage.committer import committer_of
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
        metadata: Mapping[str, Any] | None = None,
        budget: RunBudget | None = None,
        whole: PartAccount | None = None,
    ) -> None:
        self._executor = executor
        self._manager = manager
        self._plan = plan
        self._goal = goal
        self._context = context
        self._named = run_id is not None
        self._run_id = run_id or ""
        self._replan = replan
        self._metadata = metadata
        self._budget = budget
        self._whole = whole
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
            self._port.fence(opened.session.token)
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
            header={"budget": self._budget.to_json()} if self._budget is not None else {},
            on_problem=self._report,
            scopes={SCOPE: fresh.stored} if fresh is not None else None,
            metadata=self._metadata,
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
        self._keep_unknown(old, self._plan, self._manager)

    def _keep_unknown(self, old: Plan, new: Plan, manager: CheckpointManager) -> None:
        """Raise where a step that is changed or gone has an effect that is unknown: nobody would be asked about it."""
        kept = {step.id: canonical_step(step) for step in new.steps}
        gone = {step.id for step in old.steps if kept.get(step.id) != canonical_step(step)}
        unknown = [each for each in manager.journal(self._run_id) if each.state == "unknown"]
        lost = [f"{each.id!r} ({each.name})" for each in unknown if each.step.rpartition("#")[0] in gone]
        if lost:
            raise ResumeError(
                self._run_id,
                f"The plan of run {self._run_id!r} cannot be revised: it changes or drops steps whose calls have "
                f"begun, and nothing says how they ended: {', '.join(lost)}. Settle them with "
                "CheckpointManager.settle (done, redo or skip), and revise the plan then.",
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

    def _run_of(self, state: PlanState, session: RunSession | None, found: Restored | None = None) -> PlanRun:
        executor = self._executor
        run = PlanRun(
            state,
            self._goal,
            self._run_id,
            port=self._port,
            session=session,
            worker=executor.worker,
            judge=executor.judge,
            limits=executor.limits(),
            approval_callback=executor.approval_callback,
            answers=Answers(self._manager.storage, self._run_id) if self._manager is not None else None,
            budget=self._budget if self._budget is not None else recorded_budget(found),
        )
        if self._whole is not None:
            run.journals.whole = self._whole
            self._whole.attach(lambda: run.spent + run.journals.unfinished, resumed=found is not None)
        return run

    async def _resume(self, found: Restored, session: RunSession, revision: int) -> PlanExecutionResult:
        old = plan_of(found.values)
        given = dict(self._plan.context) if self._plan is not None else {}
        state = PlanState.restore(found.values, found.body, self._plan)
        for attempt in found.later:
            if attempt.get("kind") == "attempt":
                state.take_attempt(attempt)
        await self._port.start(self._goal, self._input_of(state.plan), self._run_id, found.events)
        record: dict[str, Any] = {"kind": "resume"}
        if found.found is RunState.CRASHED and not was_let_go([*found.records, *found.later]):
            record["cut_off"] = await self._take_crash(state, found, session)
        else:
            state.take_progress()
        if found.found is RunState.FAILED:
            state.start_afresh()
        brought = {
            name: value
            for name, value in self._context.items()
            if name not in found.input_data or not _is_same(found.input_data[name], value)
        }
        parts = PlanParts(self._run_id, self._executor.worker)
        unfinished = await parts.unfinished(state, old)
        planned: dict[str, Any] = {}
        if self._revised:
            ids = {step.id for step in (*old.steps, *state.plan.steps)}
            planned = {
                name: value
                for name, value in given.items()
                if name not in ids and not _is_same(old.context.get(name), value)
            }
            record["replan"] = state.revise(old, revision, {*planned, *brought})
            record["revision"] = state.plan.revision
            self._tell_stale(record["replan"]["stale"])
            state.bring(planned)
        state.bring(brought)
        record["input_keys"] = sorted(brought)
        if self._budget is not None:
            record["budget"] = self._budget.to_json()
        run = self._run_of(state, session, found)
        for key, (counted, spent) in unfinished.items():
            run.journals.part(key, counted, run, spent)
        waits = parts.now(state, waits_of(found.body))
        is_paused = found.found is RunState.PAUSED
        if is_paused and (brought or not await parts.is_woken(state, waits, await session.messages())):
            run.answered = parts.told(waits.values())
        elif is_paused or found.found is RunState.CRASHED:
            await run.hold_cancelled(waits)  # nobody may have called it
        run.brought = frozenset((*planned, *brought))
        if state.recoveries > self._executor.limits().max_recovery_attempts:
            run.stop(ExecutionStatus.FAILED, _too_often(state, record["cut_off"], self._run_id))
        changes = (
            self._revised
            or bool(brought)
            or self._budget is not None
            or found.found in (RunState.FAILED, RunState.CRASHED)
        )
        return await self._drive(run, found, record if changes else None)

    async def _take_crash(self, state: PlanState, found: Restored, session: RunSession) -> list[str]:
        """Count a crash, and forget earlier ones if anything was made durable since; the steps it may have cut off."""
        assert self._manager is not None
        # Of finished calls inside a step only the store's own count knows.
        if session.recovery_attempts <= 1 or any(record.get("kind") == "end" for record in found.later):
            state.take_progress()
        lost = state.take_crash(self._executor.limits().max_concurrency)
        steps = [step for step in state.plan.steps if step.id in lost]
        ids = [
            f"{self._run_id}/{step.id}#{state.standing(step.id).visit}"
            for step in steps
            if step.action.action_type is ActionType.SUB_GRAPH
        ]
        if ids:
            children = await wait_for(committer_of(self._manager.storage).call(lambda store: _how_far(store, ids)))
            if any(_is_further(how_far, state.children.get(run_id)) for run_id, how_far in children.items()):
                state.recoveries = 1  # the run of a sub-graph got further
            state.children = children
        return lost

    def _tell_stale(self, stale: list[str]) -> None:
        if stale:
            self._report(
                f"Completed steps {', '.join(map(repr, stale))} keep results made from what the new revision of the "
                "plan has changed or dropped. Change such a step, or give it another id, to have it run again."
            )

    # --- driving ------------------------------------------------------------------------------------------------

    async def _drive(
        self, run: PlanRun, found: Restored | None, brought: Mapping[str, Any] | None = None
    ) -> PlanExecutionResult:
        recovered = len(run.state.plan.get_completed_steps()) if found is not None else 0
        events: list[dict[str, Any]] = []
        try:
            with self._port.recording(events):
                self._tell_reports()
            steps = "step" if recovered == 1 else "steps"
            detail = f"{recovered} {steps} recovered" if found is not None else None
            self._port.emit("run_resumed" if found is not None else "run_started", detail=detail)
            if brought is not None:
                await run.commit_resume(brought)
                if self._manager is not None and self._manager.config.durability == "async":
                    # What counts crashes is durable before a step that may crash begins.
                    await wait_for(committer_of(self._manager.storage).call(lambda store: None))
            with session.stoppable() if (session := run.session) is not None else nullcontext():
                ending = await run.run()
            with self._port.recording(events):
                self._tell_reports()
            await self._close(run, ending, events)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            if run.session is not None and lets_go(error):
                await self._let_go(run)
            else:
                await self._cancelled(run, "cancelled" if isinstance(error, asyncio.CancelledError) else repr(error))
            raise
        except CancelRequested:
            ending = await self._stopped(run, Ending(ExecutionStatus.ABORTED, CANCELLED_ON_REQUEST), "warning")
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
            ending = Ending(ExecutionStatus.FAILED, str(error))
        except LeaseLost:
            # The new owner writes the run's record now; ending ours would overwrite it.
            self._port.abandon(run.run_id)
            raise
        except Exception as error:
            # No step's error: those are judged. A runtime may raise anything; it is logged,
            # recorded as the run's end, and the caller gets what was done so far.
            logger.error("Run %r stopped by an unexpected error:\n%s", run.run_id, masked_traceback(error))
            ending = Ending(ExecutionStatus.FAILED, f"{type(error).__name__}: {error}")
            ending = await self._stopped(run, ending)
        self._tell_reports()
        return await self._result(run, ending, found, recovered)

    async def _close(self, run: PlanRun, ending: Ending, events: list[dict[str, Any]]) -> None:
        reason = ending.reason if ending.status is not ExecutionStatus.COMPLETED else None
        await run.end(RUN_STATES[ending.status], reason, events)

    async def _stopped(self, run: PlanRun, ending: Ending, severity: str = "critical") -> Ending:
        """Record an ending from outside the plan; what the run came to, which its last step may have said before."""
        events: list[dict[str, Any]] = []
        with self._port.recording(events):
            self._port.problem(severity, str(ending.reason))
        try:
            await self._close(run, ending, events)
        except SurefootError as error:
            status = ending.status.value
            logger.warning("Run %r is %s, which could not be recorded: %s", run.run_id, status, mask_error(error))
        ended = run.session.ended_as if run.session is not None else None
        return Ending(ExecutionStatus.COMPLETED) if ended is RunState.COMPLETED else ending

    async def _let_go(self, run: PlanRun) -> None:
        """Leave the run to the next process. Its record stays as it was saved last: it says that the run goes on."""
        try:
            await run.leave()
        except SurefootError as error:
            logger.warning("Run %r was let go; what was not committed yet is not kept: %s", run.run_id, error)
        finally:
            self._port.emit("run_ended", error="let go, for the next process", detail=RunState.RUNNING.value)
            self._port.abandon(run.run_id)

    async def _cancelled(self, run: PlanRun, why: str) -> None:
        try:
            await run.end(RunState.CANCELLED, why)
        except SurefootError as error:
            logger.warning("Run %r was cancelled, which could not be recorded: %s", run.run_id, mask_error(error))
        finally:
            self._port.emit("run_ended", error=why, detail=RunState.CANCELLED.value)
            await self._port.end(False, why, dict(run.state.memory.view()), cancelled=True)

    # --- results ------------------------------------------------------------------------------------------------

    async def _result(
        self, run: PlanRun, ending: Ending, found: Restored | None, recovered: int
    ) -> PlanExecutionResult:
        state = run.state
        spent = run.spent + run.journals.unfinished
        completed = ending.status is ExecutionStatus.COMPLETED
        result = PlanExecutionResult(
            status=ending.status,
            results=state.memory.read_all(),
            feedback=ending.reason,
            feedback_context={} if completed else state.plan.to_feedback_context(),
            completed_steps=[step.id for step in state.plan.get_completed_steps()],
            steps_executed=state.steps_taken,
            total_tokens=spent.tokens,
            total_latency_ms=spent.latency_ms,
            total_cost=round(spent.cost, 12),
            error=ending.reason if ending.status is ExecutionStatus.FAILED else None,
            error_type=ending.error_type,
            run_id=run.run_id,
            checkpoint_id=run.session.checkpoint_id if run.session is not None else None,
            resumed_from=found.checkpoint_id if found is not None else None,
            steps_recovered=recovered,
            attempts_interrupted=state.interrupted,
            stale_steps=state.stale,
            revision=state.plan.revision,
            pending_approvals=run.gate.open_requests,
        )
        waits = ending.status is ExecutionStatus.AWAITING_APPROVAL
        self._port.emit(
            "run_ended",
            tokens=spent.tokens,
            latency_ms=spent.latency_ms,
            cost=round(spent.cost, 12),
            error=None if completed or waits else ending.reason,
            detail=RUN_STATES[ending.status].value,
        )
        await self._port.end(
            success=completed or waits,
            narrative="" if completed else f"{ending.status.value}: {ending.reason or 'no reason given'}",
            output_data=dict(result.results),
            cancelled=ending.status is ExecutionStatus.ABORTED,
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
            total_cost=state.total_cost,
            run_id=self._run_id,
            checkpoint_id=found.checkpoint_id,
            resumed_from=found.checkpoint_id,
            steps_recovered=len(completed),
            attempts_interrupted=state.interrupted,
            stale_steps=state.stale,
            revision=state.plan.revision,
        )


def _how_far(storage: Storage, run_ids: list[str]) -> dict[str, HowFar]:
    """How far runs of sub-graphs are; those that this store does not have are left out."""
    found = {run_id: storage.find_run(run_id) for run_id in run_ids}
    return {
        run_id: [run.sequence, run.token, run.recovery_attempts] for run_id, run in found.items() if run is not None
    }


def _is_further(now: HowFar, before: HowFar | None) -> bool:
    """Whether the run of a sub-graph got somewhere since the crash before: by a commit, or, claimed anew since, by
    calls inside a step, which have set its own count of recoveries back."""
    if before is None:
        return now[0] > 0
    sequence, token, attempts = now
    return sequence > before[0] or (token > before[1] and attempts == 0)


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception as error:  # noqa: BLE001 - arrays and the like compare to something that is no truth value
        logger.debug("values of type %s cannot be compared (%s)", type(one).__name__, error)
        return False


def _too_often(state: PlanState, lost: list[str], run_id: str) -> str:
    at = lost or [step.id for step in ready_steps(state.plan, state.earlier)]
    return too_often(run_id, state.recoveries, "ExecutorConfig.max_recovery_attempts", at)
