"""The runs of a plan's sub-graphs: what they take of its budget, and what steps that wait with them wait for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.child_runs import cancelled_part, paused_part, spent_by
from framework.graph.plan import ActionType, Plan, PlanStep, StepStatus
from framework.graph.plan_answers import request_of
from framework.graph.plan_state import PlanState, Standing
from framework.graph.run_commits import wait_for
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Waiting, wake_at
from framework.graph.worker_actions import Resources, manager_of
from framework.schemas.run import RunState
from framework.storage.committer import committer_of
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import Message

_COUNTED = ("visit", "child_tokens", "child_cost")

LOOK_SECONDS = 1.0
"""How often a plan that works on other steps looks for messages to the runs that it waits with."""


class PlanParts:
    """The parts of one plan's run. ``worker`` does its steps; of one that knows no registered graphs there are none."""

    def __init__(self, run_id: str, worker: object) -> None:
        resources = getattr(worker, "resources", None)
        self._resources = resources if isinstance(resources, Resources) else None
        self._run_id = run_id

    def run_of(self, key: str) -> str:
        """The id of the sub-graph's run in a step's visit."""
        return f"{self._run_id}/{key}"

    def manager_of(self, step: PlanStep) -> CheckpointManager | None:
        """By what the step's sub-graph is durable; ``None`` when it is not, or there is none."""
        if self._resources is None or step.action.action_type is not ActionType.SUB_GRAPH:
            return None
        registered = self._resources.sub_graphs.get(step.action.graph_id or "")
        return manager_of(registered) if registered is not None else None

    async def unfinished(self, state: PlanState, old: Plan) -> dict[str, tuple[Spent, Spent]]:
        """What the totals of a plan that goes on have counted of sub-graphs' runs that are not finished, and what the
        store has of each, by the keys of their visits; those of steps that only the ``old`` plan has, too. Raises
        ``StorageError``."""
        found = {}
        kept = state.stored.view()
        now = {step.id: step for step in state.plan.steps}
        for step_id, step in {**{step.id: step for step in old.steps}, **now}.items():
            manager = self.manager_of(step)
            plain = kept.get(f"step:{step_id}", {})
            if step_id in now:
                standing, status = state.standing(step_id), step.status
            else:
                standing = Standing(**{name: plain[name] for name in _COUNTED if name in plain})
                status = StepStatus(plain.get("status", StepStatus.PENDING.value))
            if manager is None or status is StepStatus.COMPLETED:
                continue
            key = f"{step_id}#{standing.visit}"
            spent = await wait_for(committer_of(manager.storage).call(partial(spent_by, run_id=self.run_of(key))))
            if spent is not NOTHING:
                found[key] = (Spent(standing.child_tokens, 0, 0, standing.child_cost), spent)
        return found

    async def may_go_on(self, step: PlanStep, waits: Iterable[Waiting]) -> bool:
        """Whether something that the step's sub-graph waits for has come, or comes so soon that its run stays for it;
        also when that run is over, or was left by who resumed it by itself. One that somebody cancelled stays so.
        Raises ``StorageError``."""
        manager = self.manager_of(step)
        run_ids = {each.run for each in waits if each.run}
        if manager is None or not run_ids:
            return False
        until = time.time() + manager.config.sleep_in_process_seconds

        def look(storage: Storage) -> bool:
            for run_id in sorted(run_ids):
                run = storage.find_run(run_id)
                if run is not None and effective_state(run) in (RunState.RUNNING, RunState.CANCELLED):
                    continue  # somebody resumed it by itself and still works on it, or wants it left alone
                found = paused_part(storage, run_id, until)
                if found is None or found.is_over:
                    return True
            return False

        return await wait_for(committer_of(manager.storage).call(look))

    async def cancelled(self, step: PlanStep, waits: Iterable[Waiting]) -> tuple[Waiting, ...]:
        """What to wait for when the run of the held step's sub-graph was cancelled meanwhile: the plan's next call,
        which a person makes. Nothing when it was not. Raises ``StorageError``."""
        manager = self.manager_of(step)
        run_ids = {each.run for each in waits if each.run}
        if manager is None or not run_ids:
            return ()

        def look(storage: Storage) -> tuple[Waiting, ...]:
            runs = [storage.find_run(run_id) for run_id in sorted(run_ids)]
            return tuple(cancelled_part(run.run_id) for run in runs if run and run.state is RunState.CANCELLED)

        return await wait_for(committer_of(manager.storage).call(look))

    async def is_woken(self, state: PlanState, waits: Mapping[str, Sequence[Waiting]], left: Iterable[Message]) -> bool:
        """Whether something has come that a paused plan waits for, so that this may be why it goes on, and not a person
        who calls it: for a sub-graph, for one of its ``waits``, by step id, or an answer to an approval. ``left`` are
        the messages to the plan's run. Raises ``StorageError``."""
        messages = list(left)
        names, requests = {each.name for each in messages}, {request_of(each) for each in messages}
        moment = time.time()
        for step in state.plan.steps:
            own = waits.get(step.id, ())
            asked = state.standing(step.id).approval
            if any(each.is_over(names, moment) for each in own if not each.run):
                return True
            if asked is not None and asked.answer is None and asked.request_id in requests:
                return True
            if await self.may_go_on(step, own):
                return True
        return False

    @staticmethod
    def now(state: PlanState, waits: Mapping[str, Sequence[Waiting]]) -> dict[str, Sequence[Waiting]]:
        """The ``waits``, by the keys of visits, of the visits that the plan's steps are at, by step id."""
        keys = {step.id: f"{step.id}#{state.standing(step.id).visit}" for step in state.plan.steps}
        return {step_id: waits[key] for step_id, key in keys.items() if key in waits}

    @staticmethod
    def told(waits: Iterable[Iterable[Waiting]]) -> dict[str, str]:
        """The sub-graphs' runs whose persons have answered when one calls the paused plan, with the checkpoints they
        waited at."""
        return {each.run: each.call for listed in waits for each in listed if each.kind == "input"}

    @staticmethod
    def seconds_to_look(held: Mapping[str, Iterable[Waiting]]) -> float | None:
        """How long until it is worth to ask ``may_go_on`` of these steps' waits; ``None`` when it never is."""
        waits = [each for listed in held.values() for each in listed if each.run]
        due = wake_at(waits)
        seconds = [LOOK_SECONDS] if any(each.kind != "sleep" for each in waits) else []
        if due is not None:
            left = due - time.time()  # one that is due and cannot go on all the same is another process's now
            seconds.append(left if left > 0 else LOOK_SECONDS)
        return min(seconds, default=None)
