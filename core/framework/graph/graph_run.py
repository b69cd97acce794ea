"""One execution of a graph, in progress: runs what the planner says is ready, until nothing is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from framework._secrets import mask_error
from framework.graph import planner
from framework.graph.graph_steps import GraphSteps
from framework.graph.planner import Step
from framework.graph.run_parts import Ending, Failure, let_others_run
from framework.graph.run_waits import Watch
from framework.graph.time_limit import waiting
from framework.schemas.run import RunState

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class GraphRun(GraphSteps):
    """The live side of a run. ``session`` is ``None`` without a checkpoint manager: then nothing is written."""

    _failure: Failure | None = None
    _watch: Watch | None = None

    # --- where it starts ----------------------------------------------------------------------------------------

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
                if self._waits.by_step:
                    self._wake()
                ready = self._launchable()
                if len(ready) == 1 and not self._running and not self._waits.by_step:
                    # The common case, one step at a time, needs no task of its own.
                    self._note_failure(await self._step(ready[0]))
                    if self.session is None or not self.session.others_had_a_turn():
                        await let_others_run()
                    continue
                for step in ready:
                    self._running[asyncio.create_task(self._step(step))] = step
                if not self._running:
                    if self._failure is None and await self._woken():
                        continue
                    return self._finish()
                if self._waits.by_step:
                    await self._watching().wait(self._running, self._waits.wake_at(self._may_wake()))
                    done = {task for task in self._running if task.done()}
                else:
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
        finally:
            if self._watch is not None:
                self._watch.stop()

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

    # --- steps that wait ----------------------------------------------------------------------------------------

    async def _woken(self) -> bool:
        """Whether steps that waited can go on now, or so soon that the process stays for it; then they are ready."""
        if self.session is None or self.session.ended or not self._waits.by_step:
            return False
        watch = self._watching()
        await watch.look()
        while not self._wake():
            due = self._wake_at()
            if not self._waits.is_due_soon(self.session, due):
                return False
            with waiting():
                await watch.wait((), due)
        return True

    def _wake(self) -> bool:
        """Make ready what waited and can go on, as far as this process has heard; whether there was any."""
        held = self._may_wake()
        over = [held[key] for key in self._waits.over(self._watching().messages) if key in held] if held else []
        for step in over:
            self._release(step)
        return bool(over)

    def _may_wake(self) -> dict[str, Step]:
        """The steps, by key, that can be made ready once what they wait for is over."""
        if self.session is None or self.session.ended:
            return {}
        if self._failure is not None and self._fails_fast(self._failure):
            return {}
        running = set(self._running.values())  # one that is being held now has yet to make that durable
        return {step.key: step for step in self.position.held if step not in running}

    def _watching(self) -> Watch:
        if self._watch is None:
            assert self.session is not None
            self._watch = Watch(self.session)
        return self._watch

    # --- how it ends --------------------------------------------------------------------------------------------

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
