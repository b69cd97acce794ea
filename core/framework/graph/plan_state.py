"""Where a plan stands, live and stored: its steps' standing, their outputs, its context, and the keys these go under.

The context is the run's own state. What else must survive is in a scope of its own beside it, one key per subject, so
that a commit costs what it changes: ``plan`` (the plan itself), and per step ``step:<id>`` (its standing),
``out:<id>`` (its outputs) and ``ask:<id>`` (the approval request and its answer). An output that the context holds
under the same name is not stored twice: the step lists its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from framework.graph.memory import SharedMemory
from framework.graph.plan import ApprovalRequest, ApprovalResult, Plan, PlanStep, StepStatus
from framework.graph.plan_planner import FINAL, canonical_step, cut_off, dependents, ranks
from framework.graph.plan_stale import stale_steps
from framework.graph.references import own_copy
from framework.schemas.checkpoint import StepRecord
from framework.storage.checkpoints import SCOPE_MARK

HowFar: TypeAlias = list[int]
"""Of a sub-graph's run: the sequence of its last commit, its token, and how often it was recovered in a row."""

SCOPE = "plan"
_PLAN = "plan"
_LIVE = {"status", "result", "error", "attempts", "started_at", "completed_at"}
"""Fields of a step that say where it stands, not what it is."""


@dataclass(slots=True)
class Asked:
    """An approval request, its answer when there is one, and whether the answer has been used up."""

    request: ApprovalRequest
    answer: ApprovalResult | None = None
    used: bool = False

    @property
    def request_id(self) -> str:
        """What the answer is bound to."""
        return self.request.request_id or ""

    def is_of(self, run_id: str) -> bool:
        """Whether this run has asked it, not one that it was forked from."""
        return self.request.run_id in (None, run_id)


@dataclass(slots=True)
class Standing:
    """What is kept of a step besides its public fields.

    ``visit`` counts how often it became another step or its sub-graph had to run anew, ``revision`` is the plan's at
    completion, ``cost`` is in US dollars, ``asked`` how often its approval was asked anew, ``own`` and ``shared`` its
    outputs: values, and names whose value the context holds. ``child_tokens`` and ``child_cost`` are what failed
    attempts have counted of its sub-graph's run, which goes on in the next one. ``interrupted`` counts attempts that a
    crash may have cut off; ``stale`` says that it is completed, and that what its result was made from has changed
    since.
    """

    visit: int = 1
    revision: int = 1
    feedback: str | None = None
    judgment: dict[str, Any] | None = None
    tokens: int = 0
    latency_ms: int = 0
    cost: float = 0.0
    child_tokens: int = 0
    child_cost: float = 0.0
    asked: int = 0
    interrupted: int = 0
    stale: bool = False
    approval: Asked | None = None
    own: dict[str, Any] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    result_names: list[str] = field(default_factory=list)

    def count_child(self, tokens: int, cost: float) -> None:
        """Note what an attempt has counted of its sub-graph's run."""
        self.child_tokens += tokens
        self.child_cost = round(self.child_cost + cost, 12)


class PlanState:
    """A plan in execution. ``plan`` is the caller's object, kept up to date; ``memory`` the context; ``stored`` the
    scope beside it. ``earlier`` are completed steps of former revisions that the plan no longer lists. ``recoveries``
    counts crashes in a row with nothing committed in between, ``interrupted`` all attempts that crashes may have cut
    off, and ``children`` is how far the runs of sub-graphs in flight were at the last of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.memory = SharedMemory()
        self.stored = SharedMemory()
        self.earlier: set[str] = set()
        self.steps_taken = 0
        self.total_tokens = 0
        self.total_latency_ms = 0
        self.total_cost = 0.0
        self.recoveries = 0
        self.interrupted = 0
        self.children: dict[str, HowFar] = {}
        self._standings: dict[str, Standing] = {}
        self._writers: dict[str, str] = {}
        self._ranks = ranks(plan)

    # --- where it starts ----------------------------------------------------------------------------------------

    @classmethod
    def begin(cls, plan: Plan, context: Mapping[str, Any]) -> PlanState:
        """The state of a new run. A plan that is in progress goes on: its finished steps are finished."""
        state = cls(plan)
        ids = {step.id for step in plan.steps}
        brought = {**context, **{name: value for name, value in plan.context.items() if name not in ids}}
        for name, value in brought.items():
            _place(state.memory, name, value)
        done = [step for step in plan.steps if step.status is StepStatus.COMPLETED]
        done.sort(key=lambda step: step.completed_at.timestamp() if step.completed_at else 0.0)
        for step in done:
            outputs = plan.context.get(step.id, step.result)
            state._take_outputs(step, dict(outputs) if isinstance(outputs, Mapping) else {"result": outputs})
        state.keep_plan()
        for step in plan.steps:
            if step.status is StepStatus.IN_PROGRESS:
                step.status = StepStatus.PENDING
            if step.status is not StepStatus.PENDING or step.attempts:
                state.keep(step)
        return state

    @classmethod
    def restore(cls, values: Mapping[str, Any], body: Mapping[str, Any], plan: Plan | None) -> PlanState:
        """The state that a store holds; ``plan`` is the caller's object, ``None`` takes the stored plan."""
        prefix = f"{SCOPE}{SCOPE_MARK}"
        kept = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        state = cls(plan if plan is not None else plan_of(values))
        for key, value in values.items():
            if SCOPE_MARK not in key:
                state.memory.restored(key, value)
        for key, value in kept.items():
            state.stored.restored(key, value)
        for step in state.plan.steps:
            state.plan.context.pop(step.id, None)  # what a store holds is what counts
        for key, value in kept.items():
            kind, _, step_id = key.partition(":")
            if kind == "out":
                state._load_outputs(step_id, value)
        for step in state.plan.steps:
            state._load(step, kept)
        steps = {step.id for step in state.plan.steps}
        for key, value in kept.items():
            kind, _, step_id = key.partition(":")
            if kind == "step" and step_id not in steps and value.get("status") == StepStatus.COMPLETED.value:
                state.earlier.add(step_id)
                state._standings.setdefault(step_id, Standing()).revision = value.get("revision", 1)
        position = body.get("position") or {}
        state.steps_taken = position.get("steps_taken", 0)
        state.interrupted = position.get("interrupted", 0)
        state.recoveries = position.get("recoveries", 0)
        state.children = dict(position.get("children", {}))
        state.total_tokens = body.get("tokens", 0)
        state.total_latency_ms = body.get("latency_ms", 0)
        state.total_cost = body.get("cost", 0.0)
        state.plan.revision = plan_of(values).revision
        return state

    def _load(self, step: PlanStep, kept: Mapping[str, Any]) -> None:
        standing = self.standing(step.id)
        plain = kept.get(f"step:{step.id}", {})
        step.status = StepStatus(plain.get("status", StepStatus.PENDING.value))
        step.attempts = plain.get("attempts", 0)
        step.error = plain.get("error")
        step.started_at = plain.get("started_at")
        step.completed_at = plain.get("completed_at")
        step.result = None
        for name in ("visit", "revision", "asked", "interrupted", "stale", "child_tokens", "child_cost"):
            setattr(standing, name, plain.get(name, getattr(standing, name)))
        standing.feedback, standing.judgment = plain.get("feedback"), plain.get("judgment")
        standing.tokens, standing.latency_ms = plain.get("tokens", 0), plain.get("latency_ms", 0)
        standing.cost = plain.get("cost", 0.0)
        asked = kept.get(f"ask:{step.id}")
        if asked is not None:
            answer = asked.get("answer")
            standing.approval = Asked(
                ApprovalRequest.model_validate(asked["request"]),
                ApprovalResult.model_validate(answer) if answer is not None else None,
                asked.get("used", False),
            )
        if step.status is StepStatus.COMPLETED:
            outputs = self.outputs_of(step.id)
            step.result = {name: outputs[name] for name in standing.result_names if name in outputs}

    def _load_outputs(self, step_id: str, plain: Mapping[str, Any]) -> None:
        standing = self.standing(step_id)
        standing.own, standing.shared = dict(plain["own"]), list(plain["shared"])
        standing.result_names = list(plain.get("result", ()))
        self._writers.update(dict.fromkeys(standing.shared, step_id))
        self.plan.context[step_id] = self.outputs_of(step_id)

    # --- looking ------------------------------------------------------------------------------------------------

    @property
    def scopes(self) -> dict[str, SharedMemory]:
        """Both memories, as a session takes them."""
        return {"": self.memory, SCOPE: self.stored}

    def standing(self, step_id: str) -> Standing:
        """The kept side of a step."""
        return self._standings.setdefault(step_id, Standing())

    def outputs_of(self, step_id: str) -> dict[str, Any]:
        """The outputs of a finished step by name."""
        standing = self.standing(step_id)
        view = self.memory.view()
        return {**standing.own, **{name: view[name] for name in standing.shared if name in view}}

    def outputs(self) -> dict[str, Any]:
        """The outputs of all finished steps, by step id."""
        return {
            step_id: self.outputs_of(step_id) for step_id, each in self._standings.items() if each.own or each.shared
        }

    def record(self, step: PlanStep) -> StepRecord:
        """The step's standing as a checkpoint lists it."""
        standing = self.standing(step.id)
        return StepRecord(
            step_id=step.id,
            visit=standing.visit,
            status=step.status.value,
            attempts=step.attempts,
            error=step.error,
            tokens=standing.tokens,
            latency_ms=standing.latency_ms,
            cost=standing.cost,
        )

    def full_record(self, step: PlanStep) -> StepRecord:
        """The step's standing with all that is kept of it but its outputs."""
        standing = self.standing(step.id)
        asked = standing.approval
        return StepRecord.model_validate(
            {
                **self.record(step).model_dump(),
                "feedback": standing.feedback,
                "judgment": standing.judgment,
                "revision": standing.revision,
                "interrupted": standing.interrupted,
                "stale": standing.stale,
                "started_at": step.started_at,
                "completed_at": step.completed_at,
                "approval": None
                if asked is None
                else {
                    "request": asked.request.model_dump(),
                    "answer": None if asked.answer is None else asked.answer.model_dump(mode="json"),
                    "used": asked.used,
                },
            }
        )

    # --- changing -----------------------------------------------------------------------------------------------

    def bring(self, context: Mapping[str, Any]) -> None:
        """Put what a caller brings over the context."""
        for name, value in context.items():
            self._give_up(name)
            _place(self.memory, name, value)

    def complete(self, step: PlanStep, outputs: Mapping[str, Any]) -> None:
        """Take the outputs of a finished step into the context and under the step's id."""
        step.result = {name: own_copy(value)[0] for name, value in outputs.items()}
        stored = dict(outputs)
        if "result" in outputs:
            stored.update((name, outputs["result"]) for name in step.expected_outputs if name not in outputs)
        self._take_outputs(step, stored, list(outputs))

    def drop_outputs(self, step: PlanStep) -> None:
        """After both memories were rolled back: the step has no outputs, and the others have what they had."""
        self.plan.context.pop(step.id, None)
        step.result = None
        standing = self.standing(step.id)
        standing.own, standing.shared, standing.result_names = {}, [], []
        self._writers.clear()
        for key, plain in self.stored.view().items():
            kind, _, step_id = key.partition(":")
            if kind == "out":
                self._load_outputs(step_id, plain)

    def _take_outputs(self, step: PlanStep, stored: dict[str, Any], names: list[str] | None = None) -> None:
        standing = self.standing(step.id)
        standing.revision = self.plan.revision
        standing.stale = False
        standing.own, standing.shared = {}, []
        standing.result_names = list(stored) if names is None else names
        for name, value in stored.items():
            if self._precedes(name, step.id):
                standing.own[name] = own_copy(value)[0]
                continue
            self._give_up(name)
            _place(self.memory, name, value)
            self._writers[name] = step.id
            standing.shared.append(name)
        self.plan.context[step.id] = self.outputs_of(step.id)
        self._keep_outputs(step.id)

    def _precedes(self, name: str, step_id: str) -> bool:
        """Whether the step comes before the one whose value the context holds, whichever finished first."""
        writer = self._writers.get(name)
        if writer is None or writer == step_id:
            return False
        return self._order(step_id) < self._order(writer)

    def _order(self, step_id: str) -> tuple[int, int]:
        return self.standing(step_id).revision, self._ranks.get(step_id, -1)

    def _give_up(self, name: str) -> None:
        """The context is about to hold another value: the step it came from keeps it as its own."""
        writer = self._writers.pop(name, None)
        if writer is None:
            return
        standing = self.standing(writer)
        if name in standing.shared:
            standing.shared.remove(name)
            standing.own[name] = self.memory.view()[name]
            self._keep_outputs(writer)

    def forget(self, step: PlanStep) -> None:
        """Take a step as another one that has not run: its standing and outputs go, what the context holds stays.

        Its next run is another visit, so that neither its idempotency key nor its sub-graph's run is the former's.
        """
        standing = self._standings.pop(step.id, Standing())
        self._standings[step.id] = Standing(visit=standing.visit + 1)
        for name in standing.shared:
            self._writers.pop(name, None)
        step.status, step.attempts, step.error, step.result = StepStatus.PENDING, 0, None, None
        step.started_at = step.completed_at = None
        self.plan.context.pop(step.id, None)
        for kind in ("step", "out", "ask"):
            self.stored.own.pop(f"{kind}:{step.id}", None)
        self.keep(step)

    def start_afresh(self) -> None:
        """A failed run goes on: what failed may be tried again, with a new budget."""
        for step in self.plan.steps:
            if step.status is StepStatus.FAILED or (step.status is StepStatus.PENDING and step.attempts):
                standing = self.standing(step.id)
                standing.feedback = standing.feedback or step.error
                step.status, step.attempts, step.completed_at = StepStatus.PENDING, 0, None
                self.keep(step)

    def take_crash(self, max_concurrency: int) -> list[str]:
        """The process before ended without a word: count the attempts that it may have cut off; the steps' ids."""
        unasked = {step.id for step in self.plan.steps if step.requires_approval and not self._is_answered(step)}
        lost = cut_off(self.plan, max_concurrency, unasked, self.earlier)
        self.recoveries += 1
        self.interrupted += len(lost)
        for step in self.plan.steps:
            if step.id in lost:
                self.standing(step.id).interrupted += 1
                self.keep(step)
        return lost

    def _is_answered(self, step: PlanStep) -> bool:
        asked = self.standing(step.id).approval
        return asked is not None and asked.answer is not None and not asked.used

    def take_progress(self) -> None:
        """Something of the run is durable since the last crash."""
        self.recoveries, self.children = 0, {}

    def take_attempt(self, record: Mapping[str, Any]) -> None:
        """Count an attempt that was recorded after the last checkpoint."""
        step = self.plan.get_step(record["step"])
        self.take_progress()
        self.steps_taken += 1
        tokens, latency_ms, cost = record.get("tokens", 0), record.get("latency_ms", 0), record.get("cost", 0.0)
        if step is None or step.status in FINAL:
            self.spend(None, tokens, latency_ms, cost)
            return
        standing = self.standing(step.id)
        self.spend(standing, tokens, latency_ms, cost)
        step.attempts, step.error = record["attempt"], record.get("error")
        standing.feedback, standing.judgment = record.get("feedback"), record.get("judgment")
        standing.visit = record.get("visit", standing.visit)
        standing.child_tokens, standing.child_cost = record.get("child_tokens", 0), record.get("child_cost", 0.0)
        self.keep(step)

    def spend(self, standing: Standing | None, tokens: int, latency_ms: int, cost: float) -> None:
        """Add what an attempt took to the totals, and to its step's; ``cost`` is in US dollars.

        Rounded as it is stored, so that the sum is the same whichever process adds it up.
        """
        self.total_tokens += tokens
        self.total_latency_ms += latency_ms
        self.total_cost = round(self.total_cost + cost, 12)
        if standing is not None:
            standing.tokens += tokens
            standing.latency_ms += latency_ms
            standing.cost = round(standing.cost + cost, 12)

    def revise(self, old: Plan, revision: int, brought: Collection[str] = ()) -> dict[str, list[str]]:
        """Go over from ``old`` to the plan, as its next revision, at least ``revision``, with other values under the
        ``brought`` names of the context. What was kept, changed, added, removed, and is stale from now on, by id.

        A completed step stays completed when it did not change; outputs of one that was removed stay available. A
        rejected one stays rejected unless it, or a step that it needs, changed.
        """
        before = {step.id: step for step in old.steps}
        made = {step_id: {*each.own, *each.shared} for step_id, each in self._standings.items()}
        order = {**dict.fromkeys(self.earlier, -1), **ranks(old)}
        again = {step.id for step in self.plan.steps if step.id not in before and step.id in made}
        self.plan.revision = max(revision, old.revision + 1)
        done: dict[str, list[str]] = {"kept": [], "changed": [], "added": [], "removed": []}
        for step in self.plan.steps:
            former = before.get(step.id)
            if former is None:
                done["added"].append(step.id)
                if f"step:{step.id}" in self.stored.own:  # back again, and nobody can tell whether it is the same
                    self.forget(step)
            elif canonical_step(former) != canonical_step(step):
                done["changed"].append(step.id)
                self.forget(step)
            elif step.status is StepStatus.COMPLETED:
                done["kept"].append(step.id)
            elif step.status in (StepStatus.FAILED, StepStatus.SKIPPED):
                step.status, step.attempts, step.completed_at = StepStatus.PENDING, 0, None
                self.keep(step)
        self._reconsider_rejections({*done["changed"], *done["added"]})
        now = {step.id for step in self.plan.steps}
        for step_id, former in before.items():
            if step_id not in now:
                done["removed"].append(step_id)
                if step_id not in self.earlier:
                    self.forget(former)
        gone = {*done["changed"], *done["removed"], *again}
        done["stale"] = []
        for step_id in stale_steps(self.plan, gone, brought, made, order):
            if not self.standing(step_id).stale:
                self.standing(step_id).stale = True
                done["stale"].append(step_id)
        for step in self.plan.steps:
            if step.id in done["stale"]:
                self.keep(step)
        self.keep_plan()
        return done

    @property
    def stale(self) -> list[str]:
        """Completed steps whose results are made from what has changed since, in list order."""
        return [step.id for step in self.plan.get_completed_steps() if self.standing(step.id).stale]

    def _reconsider_rejections(self, redone: set[str]) -> None:
        """A rejection is of a step with its arguments: when those come from a step that changed, it is asked anew."""
        affected = {found.id for step_id in redone for found in dependents(self.plan, step_id)}
        for step in self.plan.steps:
            if step.status is StepStatus.REJECTED and step.id in affected:
                step.status, step.error, step.completed_at = StepStatus.PENDING, None, None
                self.keep(step)

    # --- keeping ------------------------------------------------------------------------------------------------

    def keep_plan(self) -> None:
        """Put the plan itself into the stored scope."""
        ids = {step.id for step in self.plan.steps}
        plain = self.plan.model_dump(exclude={"context": True, "steps": {"__all__": _LIVE}})
        for step, stored in zip(self.plan.steps, plain["steps"], strict=True):
            stored["action"]["action_type"] = step.action.action_type.value
            if "max_retries" not in step.model_fields_set:  # whose number is the configuration's
                stored.pop("max_retries", None)
        planned = {name: value for name, value in self.plan.context.items() if name not in ids | self.earlier}
        plain["context"] = own_copy(planned)[0]
        self.stored.restored(_PLAN, plain)

    def keep(self, step: PlanStep) -> None:
        """Put a step's standing into the stored scope, for the next commit."""
        standing = self.standing(step.id)
        plain: dict[str, Any] = {"status": step.status.value, "attempts": step.attempts}
        optional = {
            "error": step.error,
            "feedback": standing.feedback,
            "judgment": standing.judgment,
            "started_at": step.started_at,
            "completed_at": step.completed_at,
            "tokens": standing.tokens,
            "latency_ms": standing.latency_ms,
            "cost": standing.cost,
            "child_tokens": standing.child_tokens,
            "child_cost": standing.child_cost,
            "asked": standing.asked,
            "interrupted": standing.interrupted,
            "stale": standing.stale,
            "visit": standing.visit if standing.visit > 1 else None,
            "revision": standing.revision if standing.revision > 1 else None,
        }
        plain.update((name, value) for name, value in optional.items() if value)
        self.stored.restored(f"step:{step.id}", plain)

    def keep_approval(self, step: PlanStep) -> None:
        """Put a step's approval request and answer into the stored scope, with its standing."""
        asked = self.standing(step.id).approval
        if asked is not None:
            plain: dict[str, Any] = {"request": asked.request.model_dump()}
            if asked.answer is not None:
                answer = asked.answer.model_dump()
                plain["answer"] = {**answer, "decision": asked.answer.decision.value}
                plain["used"] = asked.used
            self.stored.restored(f"ask:{step.id}", plain)
        self.keep(step)

    def _keep_outputs(self, step_id: str) -> None:
        standing = self.standing(step_id)
        plain = {"own": dict(standing.own), "shared": list(standing.shared), "result": list(standing.result_names)}
        self.stored.restored(f"out:{step_id}", plain)


def plan_of(values: Mapping[str, Any]) -> Plan:
    """The plan as stored, with nothing of where it stands. Raises ``KeyError`` when there is none."""
    plain, _ = own_copy(values[f"{SCOPE}{SCOPE_MARK}{_PLAN}"])
    return Plan.model_validate(plain)


def has_plan(values: Mapping[str, Any]) -> bool:
    """Whether these are the values of a plan's run."""
    return f"{SCOPE}{SCOPE_MARK}{_PLAN}" in values


def now() -> datetime:
    """The time, aware."""
    return datetime.now().astimezone()


def _place(memory: SharedMemory, name: str, value: Any) -> None:
    """Put a copy, which nobody else holds; what has no copy is looked at again at every commit."""
    copied, is_own = own_copy(value)
    if is_own:
        memory.restored(name, copied)
    else:
        memory.put(name, copied)
