"""What follows what in a plan: the pure planner of plans. No clock, no I/O, no randomness.

It reads a plan whose steps say where they stand and answers what may run, what can never run, and how the plan ended.
``known`` are ids of completed steps that an earlier revision of the plan had and this one no longer lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.errors import UnstorableValue
from framework.graph.plan import ExecutionStatus, Plan, PlanStep, StepStatus
from framework.graph.text import shorten, text_of
from framework.storage import codec

FINAL = frozenset({StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.REJECTED})
"""Statuses after which a step does not run again by itself."""

_MAX_LINES = 30
_VALUE_CHARS = 70


@dataclass(frozen=True, slots=True)
class Standstill:
    """How a plan stands when nothing runs and nothing may start: a status and, unless completed, why."""

    status: ExecutionStatus
    reason: str | None = None


def problems_of(plan: Plan) -> list[str]:
    """What makes a plan impossible to execute at all, a line each: ids that are empty, too long or not unique."""
    ids = [step.id for step in plan.steps]
    lines = [f"step id {step_id!r} is used more than once" for step_id in sorted({i for i in ids if ids.count(i) > 1})]
    lines += [
        f"step id {step_id[:40]!r} is empty, too long or holds a NUL" for step_id in ids if not _is_usable(step_id)
    ]
    lines += problems_of_names(plan.context, "the plan's context")
    for step in plan.steps:
        produced = plan.context.get(step.id, step.result) if step.status is StepStatus.COMPLETED else None
        lines += problems_of_names(produced, f"the outputs of step {step.id!r}")
        lines += problems_of_names(step.inputs, f"the inputs of step {step.id!r}")
    return lines


def problems_of_names(values: Any, where: str) -> list[str]:
    """A line for each name in a dict that is no text, and so no name; nothing for what is no dict."""
    if not isinstance(values, Mapping):
        return []
    odd = [name for name in values if not isinstance(name, str)]
    return [
        f"{where}: the name {shorten(repr(name), 40)} is a {type(name).__name__}, not a text; write {str(name)[:40]!r}"
        for name in odd
    ]


def _is_usable(step_id: str) -> bool:
    return 0 < len(step_id) <= 200 and "\x00" not in step_id


def ready_steps(plan: Plan, known: Collection[str] = ()) -> list[PlanStep]:
    """Steps that may run now, in list order."""
    completed = {step.id for step in plan.steps if step.status is StepStatus.COMPLETED} | set(known)
    return [step for step in plan.steps if step.is_ready(completed)]


def cut_off(plan: Plan, max_concurrency: int, unasked: Collection[str], known: Collection[str] = ()) -> list[str]:
    """Steps that may have been in flight when the plan's process ended at this standing, in list order.

    ``unasked`` are steps that need an answer they do not have: each holds one of the ``max_concurrency`` places, and
    has not begun.
    """
    placed = ready_steps(plan, known)[: max(1, max_concurrency)]
    return [step.id for step in placed if step.id not in unasked]


def dependents(plan: Plan, step_id: str) -> list[PlanStep]:
    """Steps that need ``step_id``, directly or through others, in list order."""
    found = {step_id}
    grew = True
    while grew:
        new = {step.id for step in plan.steps if step.id not in found and not found.isdisjoint(step.dependencies)}
        grew = bool(new)
        found |= new
    return [step for step in plan.steps if step.id in found and step.id != step_id]


def blocked_by_rejection(plan: Plan) -> list[PlanStep]:
    """Steps that have not run and never will, because they need a rejected step, directly or through others."""
    rejected = [step.id for step in plan.steps if step.status is StepStatus.REJECTED]
    blocked = {found.id for step_id in rejected for found in dependents(plan, step_id)}
    return [step for step in plan.steps if step.id in blocked and step.status not in FINAL]


def standstill(plan: Plan, known: Collection[str] = ()) -> Standstill:
    """How the plan stands once nothing runs and nothing is ready."""
    failed = [step for step in plan.steps if step.status is StepStatus.FAILED]
    open_steps = [step for step in plan.steps if step.status not in FINAL]
    rejected = [step.id for step in plan.steps if step.status is StepStatus.REJECTED]
    skipped = [step.id for step in plan.steps if step.status is StepStatus.SKIPPED]
    if failed:
        listing = "; ".join(f"{step.id!r}: {step.error or 'no reason given'}" for step in failed)
        return Standstill(ExecutionStatus.NEEDS_REPLAN, f"Failed steps: {listing}")
    if open_steps:
        return Standstill(ExecutionStatus.NEEDS_REPLAN, _why_stuck(plan, open_steps, set(known)))
    if rejected:
        left_out = f"; skipped, because they need them: {_listed(skipped)}" if skipped else ""
        return Standstill(ExecutionStatus.REJECTED, f"Rejected steps: {_listed(rejected)}{left_out}")
    return Standstill(ExecutionStatus.COMPLETED, f"Skipped steps: {_listed(skipped)}" if skipped else None)


def _why_stuck(plan: Plan, open_steps: Sequence[PlanStep], known: set[str]) -> str:
    ids = {step.id for step in plan.steps} | known
    completed = {step.id for step in plan.steps if step.status is StepStatus.COMPLETED} | known
    lines = []
    for step in open_steps:
        missing = [needed for needed in step.dependencies if needed not in completed]
        unknown = [needed for needed in missing if needed not in ids]
        what = f"needs {_listed(missing)}" if missing else f"stands at {step.status.value}"
        lines.append(f"{step.id!r} {what}" + (f", and there is no step {_listed(unknown)}" if unknown else ""))
    return "The plan is stuck, no step can run: " + "; ".join(lines)


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(map(repr, ids))


# --- identity -------------------------------------------------------------------------------------------------------


def canonical_step(step: PlanStep) -> dict[str, Any]:
    """What gives a step its meaning, as JSON-compatible values; wording, budgets and standing are left out."""
    action = step.action
    fields: dict[str, Any] = {
        "action_type": action.action_type.value,
        "prompt": action.prompt,
        "system_prompt": action.system_prompt,
        "tool_name": action.tool_name,
        "tool_args": action.tool_args,
        "graph_id": action.graph_id,
        "function_name": action.function_name,
        "function_args": action.function_args,
        "code": action.code,
        "inputs": step.inputs,
        "expected_outputs": step.expected_outputs,
        "dependencies": sorted(set(step.dependencies)),
        "requires_approval": step.requires_approval,
    }
    return {key: _plain(value) for key, value in fields.items() if value}


def _plain(value: Any) -> Any:
    try:
        return json.loads(codec.encode(value))
    except UnstorableValue:  # then no store has the plan, and nobody else compares it
        return text_of(value)


def canonical(plan: Plan) -> dict[str, Any]:
    """The plan's meaning: its steps by id, and their order, which decides what runs first."""
    return {"steps": {step.id: canonical_step(step) for step in plan.steps}, "order": [step.id for step in plan.steps]}


def fingerprint(body: Mapping[str, Any]) -> str:
    """The SHA-256, in hex, of a canonical form."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Readable lines, one per difference of two canonical forms, at most 30 and a count; empty when they are equal."""
    lines = list(_changes(old, new))
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"... and {len(lines) - _MAX_LINES} more"]
    return lines


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = old.get("steps", {}), new.get("steps", {})
    for step_id in [*before, *(added for added in after if added not in before)]:
        if step_id not in after:
            yield f"step {step_id!r} was removed"
        elif step_id not in before:
            yield f"step {step_id!r} was added"
        else:
            one, two = before[step_id], after[step_id]
            for key in sorted({*one, *two}):
                if one.get(key) != two.get(key):
                    texts = (shorten(repr(value), _VALUE_CHARS) for value in (one.get(key), two.get(key)))
                    yield f"step {step_id!r}: {key} {' -> '.join(texts)}"
    if old.get("order") != new.get("order") and set(before) == set(after):
        yield "the order of the steps changed"


def ranks(plan: Plan) -> dict[str, int]:
    """The place of each step in the order in which one step at a time would run: the first ready one of the list."""
    order: dict[str, int] = {}
    waiting = list(plan.steps)
    ids = {step.id for step in waiting}
    while waiting:
        # Dependencies that no step has do not hold anything up here: this is an order, not a permission.
        chosen = next(
            (step for step in waiting if all(n in order or n not in ids for n in step.dependencies)), waiting[0]
        )
        order[chosen.id] = len(order)
        waiting.remove(chosen)
    return order


def request_id(step: PlanStep, revision: int, arguments: bytes, asked: int) -> str:
    """What an answer is bound to: the step, the plan's revision, the resolved arguments, and which asking it is."""
    body = {"step": canonical_step(step), "id": step.id, "revision": revision, "asked": asked}
    text = json.dumps(body, sort_keys=True)
    return f"apr_{hashlib.sha256(text.encode() + arguments).hexdigest()[:24]}"
