"""What is known of a run: all that the store says of it, and what a resume would do. Claims and writes nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from framework.graph import readable
from framework.graph.checkpoint_diff import Change, diff_checkpoints, find_checkpoint, state_at
from framework.graph.crash_loops import is_given_up
from framework.graph.edge import GraphSpec
from framework.graph.journal_rows import CallState
from framework.graph.plan import Plan
from framework.graph.resume_outlook import Again, ResumeOutlook, Waiting, outlook
from framework.graph.run_export import TIMES, export_run, iso_time
from framework.graph.run_steps import FailedAttempt, StepStanding, StepView, graph_steps, plan_steps, total_cost
from framework.graph.stored_run import StoredRun, read_stored
from framework.schemas.run import RunState
from framework.storage.checkpoints import SCOPE_MARK, path_of
from framework.storage.interface import Storage

__all__ = [
    "Again",
    "CallView",
    "Change",
    "FailedAttempt",
    "ProblemView",
    "ResumeOutlook",
    "RunView",
    "StateKey",
    "StepStanding",
    "StepView",
    "Waiting",
    "as_json",
    "diff_checkpoints",
    "export_run",
    "find_checkpoint",
    "state_at",
    "view_run",
]


@dataclass(frozen=True, slots=True)
class ProblemView:
    """A problem that the run's runtime recorded. ``at`` is ISO 8601 text."""

    severity: str
    description: str
    at: str | None = None


@dataclass(frozen=True, slots=True)
class StateKey:
    """One key of the state: its type in words, the bytes it takes in the store, and what is in it, in short."""

    key: str
    type: str
    bytes: int
    summary: str


@dataclass(frozen=True, slots=True)
class CallView:
    """A call inside a step that is not finished, as the run's journal knows it; see ``CallRecord``.

    ``answer`` is what it was answered, in short, with what is under secret names masked. ``at`` is when it was
    recorded, ``until`` when a sleep or a wait ends. ``answers_to`` is the name that ``runs send`` takes.
    """

    id: str
    step: str
    number: int
    kind: str
    name: str
    state: CallState
    policy: str
    key: str
    at: float | None
    until: float | None
    tokens: int
    cost: float
    answer: str | None
    answers_to: str | None
    question: str | None


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment. Times are seconds since the epoch by the store's clock.

    ``state`` is ``crashed`` also when the owner's process is certainly gone, though its lease lasts. ``owner`` and
    ``lease_seconds_left`` are ``None`` when nobody holds it; ``asked_to_stop``: somebody asked its owner to cancel it.
    ``recovery_attempts`` is how often in a row it was taken over from a process that vanished, with no progress since;
    ``given_up`` says that it failed because that was too often.
    ``steps_taken`` counts visits (of a plan: attempts), ``cost`` is in USD and 0.0 when no price is known.
    ``checkpoints`` is how many are kept, ``first`` and ``last`` their sequences. ``steps`` are the visits in the order
    they were committed, then those to come; of a plan all its steps. ``calls`` are those recorded inside steps that
    are not finished, by step and number. ``damage`` are lines on what cannot be read, ``not_rebuilt`` on values whose
    type this program lacks.
    """

    run_id: str
    kind: Literal["graph", "plan"]
    definition_id: str | None
    fingerprint: str
    goal_id: str
    state: RunState
    created_at: float
    updated_at: float
    owner: str | None
    lease_seconds_left: float | None
    recovery_attempts: int
    given_up: bool
    asked_to_stop: bool
    error: str | None
    input: Mapping[str, Any]
    metadata: Mapping[str, Any]
    forked_from: Mapping[str, Any] | None
    parent_run_id: str | None
    resumed_from: str | None
    revision: int | None
    steps_taken: int
    total_tokens: int
    total_latency_ms: int
    cost: float
    path: tuple[str, ...]
    steps: tuple[StepView, ...]
    calls: tuple[CallView, ...]
    problems: tuple[ProblemView, ...]
    checkpoints: int
    first_checkpoint: int | None
    last_checkpoint: int | None
    state_keys: tuple[StateKey, ...]
    damage: tuple[str, ...]
    not_rebuilt: tuple[str, ...]
    resume: ResumeOutlook


def view_run(
    storage: Storage,
    run_id: str,
    *,
    definition: GraphSpec | Plan | None = None,
    clock: Callable[[], float] = time.time,
) -> RunView:
    """Everything the store says of a run, as far as it can be read. Claims nothing and writes nothing.

    With the ``definition`` that a resume would use, the view also says whether it would be refused and what differs.
    Damage is told in the view. The cost grows with the run's log and its present state, not with the number of its
    checkpoints times their size. Raises ``RunNotFound``; ``StorageError`` when the record itself cannot be read.
    """
    run = read_stored(storage, run_id, clock)
    record = run.record
    steps = plan_steps(run) if run.is_plan else graph_steps(run)
    position = run.body.get("position") or {}
    attempts = [each for each in run.later if each.get("kind") == "attempt"]
    return RunView(
        run_id=run_id,
        kind="plan" if run.is_plan else "graph",
        definition_id=run.header.get("definition_id"),
        fingerprint=record.fingerprint,
        goal_id=record.goal_id,
        state=run.state,
        created_at=record.created_at,
        updated_at=record.updated_at,
        owner=record.owner,
        lease_seconds_left=max(0.0, record.lease_until - clock()) if record.owner else None,
        recovery_attempts=record.recovery_attempts,
        given_up=is_given_up(record),
        asked_to_stop=run.asked_to_stop and run.state in (RunState.RUNNING, RunState.CRASHED),
        error=record.error,
        input=_input(run),
        metadata=run.header.get("metadata") or {},
        forked_from=run.header.get("forked_from"),
        parent_run_id=record.parent_run_id,
        resumed_from=run.header.get("resumed_from"),
        revision=position.get("revision") if run.is_plan else None,
        steps_taken=_steps_taken(run),
        total_tokens=run.body.get("tokens", 0) + sum(each.get("tokens", 0) for each in attempts),
        total_latency_ms=run.body.get("latency_ms", 0) + sum(each.get("latency_ms", 0) for each in attempts),
        cost=total_cost(run),
        path=tuple(run.body.get("path") or path_of(run.records)),
        steps=tuple(steps),
        calls=_calls(run, steps),
        problems=_problems(run),
        checkpoints=len(run.rows),
        first_checkpoint=run.rows[-1].sequence if run.rows else None,
        last_checkpoint=run.rows[0].sequence if run.rows else None,
        state_keys=_state_keys(run),
        damage=tuple(f"{item.where}: {item.problem}" for item in run.damage),
        not_rebuilt=tuple(_not_rebuilt(run)),
        resume=outlook(run, steps, definition, clock()),
    )


def as_json(value: Any) -> Any:
    """A view, or any part of one, as plain JSON: objects by field name, states as their words, moments as ISO 8601."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: iso_time(item) if _is_time(name, item) else as_json(item) for name, item in fields}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _is_time(name: str, item: Any) -> bool:
    return name in TIMES and isinstance(item, (int, float))


def _calls(run: StoredRun, steps: Sequence[StepView]) -> tuple[CallView, ...]:
    finished = {view.journal_key for view in steps if view.status in ("done", "handled")}
    return tuple(
        CallView(
            id=call.id,
            step=call.step,
            number=call.number,
            kind=call.kind,
            name=call.name,
            state=call.state,
            policy=call.policy,
            key=call.key,
            at=call.at,
            until=call.until,
            tokens=call.tokens,
            cost=call.cost,
            answer=_answer(call.answer) if call.state == "done" and call.kind != "sleep" else None,
            answers_to=call.answers_to,
            question=call.question,
        )
        for call in run.calls
        if call.step not in finished
    )


def _answer(value: Any) -> str:
    return readable.preview(readable.masked_state({"": value})[""], 200)


def _input(run: StoredRun) -> dict[str, Any]:
    keys = run.header.get("input_keys") or []
    given = readable.readable_state({key: run.initial[key] for key in keys if key in run.initial})
    masked: dict[str, Any] = readable.masked_state(given)
    return masked


def _steps_taken(run: StoredRun) -> int:
    position = run.body.get("position") or {}
    taken = int(position.get("steps_taken", run.body.get("step_number", 0)) or 0)
    return taken + (sum(1 for each in run.later if each.get("kind") == "attempt") if run.is_plan else 0)


def _problems(run: StoredRun) -> tuple[ProblemView, ...]:
    found = [each.get("problem") for each in run.events if each.get("kind") == "problem"]
    return tuple(
        ProblemView(str(each.get("severity", "")), str(each.get("description", "")), each.get("timestamp"))
        for each in found
        if isinstance(each, dict)
    )


def _state_keys(run: StoredRun) -> tuple[StateKey, ...]:
    shown = readable.readable_state(run.values)
    masked = readable.masked_state(shown)
    return tuple(
        StateKey(key, readable.type_in(data, shown[key]), len(data), readable.preview(masked[key], 200))
        for key, data in run.values.items()
        if SCOPE_MARK not in key
    )


def _not_rebuilt(run: StoredRun) -> list[str]:
    found = {key: readable.not_rebuilt(data) for key, data in run.values.items()}
    return [f"{key.replace(SCOPE_MARK, ':')}: {problem}" for key, problem in found.items() if problem is not None]
