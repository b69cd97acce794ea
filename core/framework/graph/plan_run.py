"""One execution of a plan, in progress: runs what is ready, has it judged, and commits what came of it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from framework import _faults
from framework._secrets import mask_error
from framework.errors import BudgetExceeded, UnknownEffect, UnstorableValue
from framework.graph.attempts import backoff_seconds
from framework.graph.budget import RunBudget
from framework.graph.goal import Goal
from framework.graph.journal import AttemptJournal
from framework.graph.node_base import is_infrastructure_error
from framework.graph.plan import (
    ActionType,
    ApprovalRequest,
    ExecutionStatus,
    Judgment,
    JudgmentAction,
    PlanStep,
    StepStatus,
)
from framework.graph.plan_answers import Answers
from framework.graph.plan_gate import ApprovalGate
from framework.graph.plan_journals import PlanJournals, journaled_judge, waiting_for, with_part, with_spent
from framework.graph.plan_outcomes import asked_to_wait, ended_record, left_behind, positive, progress_of, spent_on
from framework.graph.plan_parts import PlanParts
from framework.graph.plan_planner import problems_of_names, ready_steps, standstill
from framework.graph.plan_state import PlanState, now
from framework.graph.plan_terms import Ending, Judge, Limits, Worker
from framework.graph.run_events import RunEventKind
from framework.graph.run_session import Progress, RunSession
from framework.graph.runtime_port import RuntimePort
from framework.graph.spending import Spent
from framework.graph.suspension import Suspended, Waiting, wake_at
from framework.graph.time_limit import TimeLimit
from framework.graph.worker_actions import SUB_GRAPH_PAUSED, AttemptInfo, StepExecutionResult, failure_of
from framework.graph.worker_errors import error_text
from framework.schemas.run import RunState

logger = logging.getLogger(__name__)


class PlanRun:
    """The live side of a plan's run. ``session`` is ``None`` without a checkpoint manager: then nothing is written."""

    def __init__(
        self,
        state: PlanState,
        goal: Goal,
        run_id: str,
        *,
        port: RuntimePort,
        session: RunSession | None,
        worker: Worker,
        judge: Judge,
        limits: Limits,
        approval_callback: Callable[[ApprovalRequest], Any] | None,
        answers: Answers | None = None,
        budget: RunBudget | None = None,
    ) -> None:
        self.state = state
        self.goal = goal
        self.run_id = run_id
        self.session = session
        self.port = port
        self._worker = worker
        self._judge = judge
        self._limits = limits
        self.gate = ApprovalGate(self, approval_callback, answers, getattr(worker, "sandbox", None))
        self.journals = PlanJournals(run_id, session, budget)
        self.journals.only_of(
            self._key(step.id) for step in state.plan.steps if step.status is not StepStatus.COMPLETED
        )
        self.parts = PlanParts(run_id, worker)
        self.answered: dict[str, str] = {}
        """Runs of sub-graphs that waited for a person who has answered by calling again, with the checkpoints they
        waited at."""
        self.brought: frozenset[str] = frozenset()
        """The names of the context that the caller who resumes the plan gave other values, until parts have them."""
        self._given: set[str] = set()
        self._held: dict[str, tuple[Waiting, ...]] = {}
        self._running: dict[asyncio.Task[None], str] = {}
        self._sleeps: set[asyncio.Future[None]] = set()
        self._attempting = 0
        self._stop: Ending | None = None
        self._last_step = state.plan.steps[0].id if state.plan.steps else state.plan.id

    # --- the loop -----------------------------------------------------------------------------------------------

    async def run(self) -> Ending:
        """Run until nothing can go on. Storage errors and cancellation pass through."""
        self.gate.skip_blocked()
        unheard = self.session.on_message(self.gate.hear) if self.session is not None else None
        try:
            while True:
                if self.gate.has_news and self._stop is None:
                    await self.gate.look()
                await self._wake()
                for step in self._launchable():
                    self._running[asyncio.create_task(self._step(step))] = step.id
                if not self._running:
                    # An answer that came a moment ago may not have been told of yet.
                    if self._stop is None and await self.gate.look():
                        continue
                    return self._finish()
                done = await self._next()
                for task in done:
                    del self._running[task]
                # Every finished task is looked at before any error leaves, so that none goes unseen.
                errors = [error for task in done if (error := task.exception()) is not None]
                if errors:
                    raise errors[0]
        except GeneratorExit:  # the coroutine is being closed: nothing can be waited for
            for task in self._running:
                if not task.get_loop().is_closed():
                    task.cancel()
            raise
        except BaseException:
            await self._stop_others()
            raise
        finally:
            if unheard is not None:
                unheard()

    async def _next(self) -> set[asyncio.Task[None]]:
        """Wait until steps are over, which it returns, or until something may have come for one that waits."""
        waited: set[asyncio.Future[None]] = {*self._running, *([self.gate.news()] if self.gate.waiting else [])}
        seconds = self.parts.seconds_to_look(self._held) if self._stop is None else None
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return {task for task in self._running if task.done()}

    async def _wake(self) -> None:
        """Let steps go on whose sub-graphs can."""
        if self._stop is not None or self.parts.seconds_to_look(self._held) is None:
            return
        for step in self.state.plan.steps:
            if step.id in self._held and await self.parts.may_go_on(step, self._held[step.id]):
                del self._held[step.id]
        await self.hold_cancelled(self._held)

    async def hold_cancelled(self, waits: Mapping[str, Sequence[Waiting]]) -> None:
        """Hold the steps with these ``waits``, by id, whose sub-graphs' runs somebody has cancelled by themselves."""
        for step in self.state.plan.steps:
            if step.id in waits and (cancelled := await self.parts.cancelled(step, waits[step.id])):
                self._held[step.id] = cancelled

    def _launchable(self) -> list[PlanStep]:
        """Ready steps that may start. One that waits for its answer keeps its place among those that may run at once,
        so with ``max_concurrency`` 1 nothing overtakes it."""
        if self._stop is not None:
            return []
        busy = {*self._running.values(), *self.gate.waiting, *self._held}
        ready = [step for step in ready_steps(self.state.plan, self.state.earlier) if step.id not in busy]
        room = max(1, self._limits.max_concurrency) - len(busy)
        budget = self._limits.max_total_steps - self._used
        if ready and room > 0 and budget <= 0 and not self._running:
            self._end_at_limit(ready[0])
        return ready[: max(0, min(room, budget))]

    @property
    def _used(self) -> int:
        """Attempts that count against the limit of all: judged, under way, and those that crashes may have cut off."""
        return self.state.steps_taken + self._attempting + self.state.interrupted

    def _end_at_limit(self, step: PlanStep) -> None:
        limit, lost = self._limits.max_total_steps, self.state.interrupted
        counted = f" ({lost} of them cut off by crashes)" if lost else ""
        self.stop(
            ExecutionStatus.FAILED,
            f"Stopped at the limit of max_total_steps={limit} attempts{counted} before step {step.id!r}. "
            "Raise ExecutorConfig.max_total_steps and resume, or make a plan with fewer steps.",
        )

    def stop(self, status: ExecutionStatus, reason: str | None, error_type: str | None = None) -> None:
        """Start nothing more; what runs is finished first. The first reason counts."""
        if self._stop is None:
            self._stop = Ending(status, reason, error_type)
            for sleep in self._sleeps:
                sleep.cancel()

    def _finish(self) -> Ending:
        if self._stop is not None:
            return self._stop
        waits = [waiting_for(self._held)] if self._held else []
        if self.gate.waiting:
            listing = ", ".join(map(repr, sorted(self.gate.waiting)))
            why = "".join(f"; {step_id!r}: {problem}" for step_id, problem in sorted(self.gate.problems.items()))
            waits.insert(0, f"Waiting for approval of {listing}{why}")
        if waits:
            return Ending(ExecutionStatus.AWAITING_APPROVAL, ". ".join(waits))
        found = standstill(self.state.plan, self.state.earlier)
        return Ending(found.status, found.reason)

    async def _stop_others(self) -> None:
        """Cancel the steps in flight and wait for them; a commit under way is finished first."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.warning("A step that was being stopped failed as well: %s", mask_error(outcome))
        self._running.clear()

    # --- one step -----------------------------------------------------------------------------------------------

    async def _step(self, step: PlanStep) -> None:
        events: list[dict[str, Any]] = []
        with self.port.recording(events):
            _faults.reach("node.before")
            try:
                self.journals.check(self.spent)
                await self._attempts(step, events)
            except BudgetExceeded as error:
                # Its journal stays: with a larger budget the step goes on where it was.
                self.stop(ExecutionStatus.FAILED, str(error), error.kind)
                self.port.problem("critical", str(error))
                if step.action.action_type is ActionType.SUB_GRAPH:  # what its run has taken is in the totals now
                    self.state.keep(step)
                    await self.note({"kind": "stopped", "node": step.id, "error": str(error)}, step, events)
            except Suspended as suspended:
                await self._hold(step, suspended.waits, events)
            finally:
                key = self._key(step.id)
                self._tell_journal(key)
                self.journals.close(key, finished=step.status is StepStatus.COMPLETED)

    async def _hold(self, step: PlanStep, waits: tuple[Waiting, ...], events: list[dict[str, Any]]) -> None:
        """The step waits, until somebody has said what became of an effect of it, or for what its sub-graph waits."""
        self._held[step.id] = waits
        self.state.keep(step)
        record = {
            "kind": "wait",
            "node": step.id,
            "step": self._key(step.id),
            "for": [each.to_json() for each in waits],
        }
        await self.note(record, step, events)

    def _tell_journal(self, key: str) -> None:
        for problem in self.journals.take_problems(key):
            self.port.problem("warning", problem)

    @property
    def spent(self) -> Spent:
        """What the run has spent, over all processes, but for steps in flight."""
        return Spent(self.state.total_tokens, self.state.total_latency_ms, 0, self.state.total_cost)

    def _key(self, step_id: str) -> str:
        """The key of the step's present visit, in the journal and in the run's events."""
        return f"{step_id}#{self.state.standing(step_id).visit}"

    def _place(self, step: PlanStep) -> str:
        """The step's idempotency key."""
        first = self.state.standing(step.id).visit == 1
        return f"{self.run_id}/{step.id if first else self._key(step.id)}"

    async def _attempts(self, step: PlanStep, events: list[dict[str, Any]]) -> None:
        """Attempt a step until it is accepted, given up, waits for a person, or the run stops."""
        told = False
        while True:
            work, barred, stood = step, None, step.status
            key = self._key(step.id)
            journal = self.journals.attempt(key, self._place(step), self)
            if journal is not None:
                await journal.begin()
            if step.requires_approval:
                # Before each attempt: what was approved are the arguments too, and others may have changed the context.
                allowed = await self.gate.allow(step, events)
                if allowed is None:
                    return
                if self._stop is not None:  # while it was asked; its answer stays for when the run goes on
                    step.status = stood
                    self.state.keep(step)
                    return
                if isinstance(allowed, StepExecutionResult):
                    barred = allowed
                else:
                    work = allowed
            # From here until the worker has its arguments nothing waits.
            if self._used >= self._limits.max_total_steps:
                self._end_at_limit(step)
                return
            before, settled = step.status, False
            step.status, step.started_at = StepStatus.IN_PROGRESS, now()
            step.attempts += 1
            self._attempting += 1
            if not told:
                self.tell("step_started", step, attempt=step.attempts)
                told = True
            try:
                result = barred if barred is not None else await self._work(step, work, journal)
                self._leave_part(step, key, result)
                if journal is not None:
                    await journal.over()
                _faults.reach("node.after")
                own_tokens, own_cost = result.tokens_used, float(positive(result.cost))
                judgment = await self._judged(step, work, result, journal)
                tokens, cost = spent_on(judgment)
                if tokens or own_cost + cost != result.cost:
                    result = replace(result, tokens_used=own_tokens + tokens, cost=own_cost + cost)
                if journal is not None:
                    result = with_spent(result, journal)
                    await journal.over()
                    if judgment is None or judgment.action is not JudgmentAction.ACCEPT:
                        await journal.failed()
                    self._tell_journal(key)
                _faults.reach("routing")
                if self.session is not None and self.session.held_back:
                    await self.session.room()
                # An attempt counts once it is judged, so that a sibling's commit does not count one that a crash ends.
                settled = True
                self._attempting -= 1
                self.state.steps_taken += 1
                if result.executor_type == "sub_graph":
                    self.state.standing(step.id).count_child(own_tokens, own_cost)
                    self.journals.part_counted(key)
                self.journals.counted(key)  # the totals have it in a moment, with nothing waiting in between
                delay = await self._settle(step, result, judgment, events)
                accepted = judgment is not None and judgment.action is JudgmentAction.ACCEPT
                if accepted and step.status is StepStatus.FAILED and journal is not None:
                    await journal.failed()  # its outputs could not be taken
            except BaseException:
                if not settled:  # as if the attempt had not begun
                    step.status = before
                    step.attempts -= 1
                    self._attempting -= 1
                raise
            if delay is None:
                return
            await self._wait(delay)
            if self._stop is not None:
                return

    def _leave_part(self, step: PlanStep, key: str, result: StepExecutionResult) -> None:
        """Count what the sub-graph of an attempt took that is left for later, and raise why: it waits (``Suspended``),
        or was refused more of the plan's budget (``BudgetExceeded``)."""
        part = self.journals.part_of(key)
        refused = part.refused if part is not None else None
        if result.success or not (result.waits or refused is not None):
            return
        standing = self.state.standing(step.id)
        self.state.spend(standing, result.tokens_used, result.latency_ms, result.cost)
        standing.count_child(result.tokens_used, result.cost)
        self.journals.part_counted(key)
        if refused is not None:
            raise refused
        raise Suspended(result.waits)

    async def _wait(self, seconds: float) -> None:
        """Sleep; no longer than until the run stops, which a provider's wish to wait for minutes must not hold up."""
        if self._stop is not None:
            return
        sleep = asyncio.ensure_future(asyncio.sleep(seconds))
        self._sleeps.add(sleep)
        try:
            await asyncio.wait({sleep})
        finally:
            self._sleeps.discard(sleep)
            if not sleep.get_loop().is_closed():
                sleep.cancel()
        if not sleep.cancelled():
            sleep.result()

    def _max_attempts(self, step: PlanStep) -> int:
        said = "max_retries" in step.model_fields_set
        return max(1, step.max_retries if said else self._limits.max_retries_per_step)

    async def _work(self, step: PlanStep, work: PlanStep, journal: AttemptJournal | None) -> StepExecutionResult:
        standing = self.state.standing(step.id)
        key = self._key(step.id)
        part = None
        if work.action.action_type is ActionType.SUB_GRAPH:
            part = self.journals.part(key, Spent(standing.child_tokens, 0, 0, standing.child_cost), self)
        child = self.parts.run_of(key)
        info = AttemptInfo(
            number=step.attempts,
            feedback=standing.feedback,
            idempotency_key=self._place(step),
            run_id=self.run_id,
            child_run_id=child if self.session is not None else None,
            child_tokens=standing.child_tokens,
            child_cost=standing.child_cost,
            journal=journal,
            part=part,
            answered_at=self.answered.get(child, ""),
            brought=self.brought if child not in self._given else frozenset(),
        )
        result = await self._worked(work, info)
        if part is not None and part.resumed:  # it went on here, with what was brought
            self._given.add(child)
        return result if part is None else with_part(result, part)

    async def _worked(self, work: PlanStep, info: AttemptInfo) -> StepExecutionResult:
        seconds = self._limits.timeout_seconds
        kind = work.action.action_type.value
        try:
            async with TimeLimit(seconds if seconds and seconds > 0 else None) as limit:
                with info.part.open() if info.part is not None else nullcontext():
                    return await self._worker.execute(
                        work, self.state.memory.view(), outputs=self.state.outputs(), info=info
                    )
        except Exception as error:
            # A worker of the caller's own may raise anything; the judge decides what follows.
            if is_infrastructure_error(error):
                raise
            if isinstance(error, TimeoutError) and limit.expired():
                text = f"timed out after {seconds:g} s" + left_behind(error)
                return StepExecutionResult(False, error=text, error_type="timeout", executor_type=kind)
            return failure_of(error, "exception", kind)

    async def _judged(
        self, step: PlanStep, work: PlanStep, result: StepExecutionResult, journal: AttemptJournal | None
    ) -> Judgment | None:
        """The judgement; ``None`` when the judge failed, or an effect of the attempt is unknown and its policy is
        ``fail``, which ends the run. With ``ask`` the step is held instead: whatever a judge says of it, to accept it,
        to replan or to try again, would forget the effect or make it twice."""
        if journal is not None:
            try:
                await journal.settled()
            except UnknownEffect as error:
                self.stop(ExecutionStatus.FAILED, f"Step {step.id!r}: {error}", type(error).__name__)
                return None
        if result.error_type == SUB_GRAPH_PAUSED and not result.success:
            return Judgment(action=JudgmentAction.ESCALATE, reasoning="Its sub-graph is paused", feedback=result.error)
        seen = work.model_copy(
            update={"attempts": step.attempts, "max_retries": self._max_attempts(step), "status": step.status}
        )
        plain = {
            "success": result.success,
            "outputs": result.outputs,
            "error": result.error,
            "error_type": result.error_type,
            "tokens_used": result.tokens_used,
            "latency_ms": result.latency_ms,
            "executor_type": result.executor_type,
            "cost": result.cost,
            "transient": result.transient,
            "retry_after": result.retry_after,
        }
        seconds = self._limits.timeout_seconds
        try:
            async with asyncio.timeout(seconds if seconds and seconds > 0 else None) as limit:
                judge = journaled_judge(self._judge, journal)
                judgment = await judge.evaluate(seen, plain, self.goal, dict(self.state.memory.view()))
            if not isinstance(judgment, Judgment):
                raise TypeError(f"it returned {type(judgment).__name__}, not a Judgment")
            return judgment
        except Exception as error:
            # A judge of the caller's own may raise anything. Its step was not judged, so nothing of it is taken.
            if is_infrastructure_error(error):
                raise
            if isinstance(error, TimeoutError) and limit.expired():
                reason = f"The judge gave no judgement within {seconds:g} s (ExecutorConfig.timeout_seconds)"
                return Judgment(action=JudgmentAction.ESCALATE, reasoning=reason, feedback=reason, confidence=0.0)
            self.stop(ExecutionStatus.FAILED, f"The judge failed at step {step.id!r}: {error_text(error)}")
            return None

    async def _settle(
        self, step: PlanStep, result: StepExecutionResult, judgment: Judgment | None, events: list[dict[str, Any]]
    ) -> float | None:
        """Take and commit what was decided. Seconds until the next attempt, or ``None`` when there is none.

        Nothing waits before the commit is handed over: what is kept and what is committed change together.
        """
        standing = self.state.standing(step.id)
        self.state.spend(standing, result.tokens_used, result.latency_ms, result.cost)
        if judgment is None:
            self.gate.use_up(step)
            await self._back(step, "unjudged", "not judged", result, events)
            return None
        standing.judgment = judgment.model_dump(mode="json", exclude_defaults=True)
        if judgment.action is JudgmentAction.ACCEPT:
            await self._accept(step, result, events)
            return None
        feedback = judgment.feedback or result.error or judgment.reasoning
        standing.feedback = feedback
        if judgment.action is JudgmentAction.ESCALATE:
            reason = f"Step {step.id!r} needs a person: {feedback}"
            self.stop(ExecutionStatus.NEEDS_ESCALATION, reason)
            self.port.problem("critical", reason)
            if result.error_type != SUB_GRAPH_PAUSED:  # it ran: to run it again is for a person to say
                self.gate.use_up(step)
            await self._back(step, "escalated", feedback, result, events)
            return None
        if judgment.action is JudgmentAction.RETRY and step.attempts < self._max_attempts(step):
            return await self._retry(step, result, feedback, events)
        reason = (
            feedback
            if judgment.action is JudgmentAction.REPLAN
            else f"failed after {step.attempts} attempts: {feedback}"
        )
        await self._fail(step, reason, result, events)
        return None

    async def _accept(self, step: PlanStep, result: StepExecutionResult, events: list[dict[str, Any]]) -> None:
        state = self.state
        odd = problems_of_names(result.outputs, f"the outputs of step {step.id!r}")
        if odd:
            await self._fail(step, f"its outputs cannot be taken: {'; '.join(odd)}", result, events)
            return
        before = (state.memory.snapshot(), state.stored.snapshot())
        step.status, step.completed_at, step.error = StepStatus.COMPLETED, now(), None
        standing = state.standing(step.id)
        standing.feedback, standing.child_tokens, standing.child_cost = None, 0, 0.0
        try:
            state.complete(step, result.outputs)
            self.gate.use_up(step)
            state.keep(step)
            if self.session is not None:
                self.session.check(state.scopes)
        except UnstorableValue as error:
            state.memory.roll_back(before[0])
            state.stored.roll_back(before[1])
            state.drop_outputs(step)
            await self._fail(step, f"its outputs cannot be stored: {error}", result, events)
            return
        self._last_step = step.id
        if self.session is not None:
            record = {"node": step.id, "visit": 1, "at": round(time.time(), 3)}
            optional = {
                "attempts": step.attempts if step.attempts > 1 else 0,
                "tokens": result.tokens_used,
                "latency_ms": result.latency_ms,
                "cost": round(result.cost, 12),
            }
            record |= {name: value for name, value in optional.items() if value}
            record |= self.journals.unpriced()
            ends = self._nothing_left()
            progress = self._progress(step, RunState.COMPLETED if ends else None)
            await self.session.step_done(
                record,
                tuple(events),
                progress,
                state.scopes,
                state=RunState.COMPLETED if ends else None,
                journal=self._key(step.id),
            )
            events.clear()
        self.tell("step_finished", step, result, attempt=step.attempts)
        if len(self._running) > 1:
            _faults.reach("branch.between")

    def _nothing_left(self) -> bool:
        """Whether the step being committed is the plan's last, and all went well."""
        alone = len(self._running) <= 1 and not self.gate.waiting and self._stop is None
        plan, earlier = self.state.plan, self.state.earlier
        return (
            alone and not ready_steps(plan, earlier) and (standstill(plan, earlier).status is ExecutionStatus.COMPLETED)
        )

    async def _retry(
        self, step: PlanStep, result: StepExecutionResult, feedback: str, events: list[dict[str, Any]]
    ) -> float:
        standing = self.state.standing(step.id)
        counting = self.journals.counting(self._key(step.id))
        step.status, step.error = StepStatus.PENDING, feedback
        self.tell("attempt_failed", step, result, attempt=step.attempts, error=feedback)
        if result.success and result.executor_type == "sub_graph":
            # Its run is completed and was not good enough: the next attempt needs a new one.
            standing.visit += 1
            standing.child_tokens, standing.child_cost = 0, 0.0
        self.port.problem(
            "warning", f"Step {step.id!r}: attempt {step.attempts} of {self._max_attempts(step)} again: {feedback}"
        )
        self.port.decided(f"Retry plan step {step.id}", "retry", feedback, step.id)
        self.state.keep(step)
        if self.session is not None:
            record = self._attempt_record(step, result, feedback) | counting
            await self.session.attempt_failed(record, tuple(events))
            events.clear()
        delay = backoff_seconds(
            self._limits.retry_delay_seconds, self._limits.retry_max_delay_seconds, step.attempts + 1, random.random()
        )
        return delay + asked_to_wait(result)

    def _attempt_record(self, step: PlanStep, result: StepExecutionResult, feedback: str) -> dict[str, Any]:
        standing = self.state.standing(step.id)
        record: dict[str, Any] = {"step": step.id, "node": step.id, "attempt": step.attempts, "error": feedback}
        optional = {
            "feedback": standing.feedback,
            "judgment": standing.judgment,
            "tokens": result.tokens_used,
            "latency_ms": result.latency_ms,
            "cost": round(result.cost, 12),
            "child_tokens": standing.child_tokens,
            "child_cost": standing.child_cost,
            "visit": standing.visit if standing.visit > 1 else None,
        }
        return record | {name: value for name, value in optional.items() if value}

    async def _fail(
        self, step: PlanStep, reason: str, result: StepExecutionResult, events: list[dict[str, Any]]
    ) -> None:
        step.status, step.error, step.completed_at = StepStatus.FAILED, reason, now()
        text = f"Step {step.id!r} failed: {reason}"
        self.port.problem("critical", text)
        self.stop(ExecutionStatus.NEEDS_REPLAN, text)
        self.gate.use_up(step)
        self.state.keep(step)
        await self.note(ended_record("failed", step, reason, result), step, events)
        self.tell("step_failed", step, result, attempt=step.attempts, error=reason)

    async def _back(
        self, step: PlanStep, kind: str, reason: str, result: StepExecutionResult, events: list[dict[str, Any]]
    ) -> None:
        """The step may run again when the run goes on; now the run ends."""
        step.status, step.error = StepStatus.PENDING, reason
        self.state.keep(step)
        await self.note(ended_record(kind, step, reason, result), step, events)
        self.tell("step_failed", step, result, attempt=step.attempts, error=reason)

    # --- what is committed --------------------------------------------------------------------------------------

    async def note(self, record: Mapping[str, Any], step: PlanStep, events: list[dict[str, Any]]) -> None:
        if self.session is not None:
            record = {**record, **self.journals.counting(self._key(step.id))}
            await self.session.note(record, tuple(events), self._progress(step), self.state.scopes)
            events.clear()

    async def commit_resume(self, record: Mapping[str, Any]) -> None:
        """Make durable what a resume brought, before its first step."""
        if self.session is not None:
            await self.session.note(record, (), self._progress(None), self.state.scopes)
        self.state.take_progress()  # from here on, whatever is committed is progress

    def tell(
        self,
        kind: RunEventKind,
        step: PlanStep,
        result: StepExecutionResult | None = None,
        *,
        attempt: int,
        error: str | None = None,
    ) -> None:
        """Tell those who watch the run of a step."""
        self.port.emit(
            kind,
            step=self._key(step.id),
            node_id=step.id,
            attempt=attempt,
            tokens=result.tokens_used if result is not None else 0,
            latency_ms=result.latency_ms if result is not None else 0,
            cost=result.cost if result is not None else 0.0,
            error=error,
        )

    def _progress(self, step: PlanStep | None, run_state: RunState | None = None) -> Progress:
        progress = progress_of(self.state, step, self._last_step, run_state)
        if not self._held:
            return progress
        waits = {self._key(step_id): [each.to_json() for each in waits] for step_id, waits in self._held.items()}
        return replace(progress, position={**progress.position, "waits": waits})

    async def leave(self) -> None:
        """Give the run up without an end, for the next process to go on with."""
        if self.session is not None and not self.session.ended:
            await self.session.leave(self._progress(None), self.state.scopes)

    async def end(self, run_state: RunState, error: str | None, events: Sequence[dict[str, Any]] = ()) -> None:
        """Record an ending that was not part of a step's commit."""
        if self.session is not None and not self.session.ended:
            progress = self._progress(None, run_state)
            due = wake_at(each for waits in self._held.values() for each in waits)
            due = due if run_state is RunState.PAUSED else None
            await self.session.end(run_state, error, events, progress, self.state.scopes, wake_at=due)
