"""Approvals of plan steps: what is asked, what an answer is bound to, and what a modified step looks like. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from framework.errors import UnstorableValue
from framework.graph.code_checks import needed_names
from framework.graph.plan import ActionType, ApprovalDecision, ApprovalRequest, ApprovalResult, PlanStep
from framework.graph.plan_planner import request_id
from framework.graph.references import call_arguments, own_copy, resolve
from framework.graph.text import shorten, summary_of, text_of
from framework.storage import codec

_MODIFIABLE: dict[str, type[Any]] = {"tool_args": dict, "function_args": dict, "inputs": dict, "prompt": str}
_ARGUMENTS = {ActionType.TOOL_USE: "tool_args", ActionType.FUNCTION: "function_args"}
"""Where an action has the arguments of its call."""
_OWN = {**_ARGUMENTS, ActionType.LLM_CALL: "prompt"}
"""What an answer may modify of an action, besides the inputs."""
_DETAILS = ("tool_name", "tool_args", "prompt", "function_name", "function_args", "graph_id", "code")


def request_for(
    step: PlanStep, run_id: str, revision: int, asked: int, context: Mapping[str, Any], outputs: Mapping[str, Any]
) -> ApprovalRequest:
    """What a person is asked about ``step``, with its arguments resolved. Raises ``MissingReference``."""
    inputs = resolve(step.inputs, context, outputs)
    if step.action.action_type is ActionType.CODE_EXECUTION and step.action.code:
        # What the code takes from the context are arguments of it as well.
        needed = needed_names(step.action.code)
        inputs = {**{name: own_copy(context[name])[0] for name in sorted(needed) if name in context}, **inputs}
    action = step.action.model_dump(include=set(_DETAILS))
    details = {name: value for name, value in action.items() if value}
    taken = _ARGUMENTS.get(step.action.action_type)
    for name in ("tool_args", "function_args"):
        declared = details.pop(name, {})  # what this kind of action does not take is not part of it
        if name == taken and (declared or inputs):
            details[name] = call_arguments(declared, inputs, context, outputs)
    return ApprovalRequest(
        step_id=step.id,
        step_description=step.description,
        action_type=step.action.action_type.value,
        action_details=details,
        context=inputs,
        approval_message=step.approval_message,
        preview=_preview(step, details, inputs),
        run_id=run_id,
        request_id=request_id(step, revision, _bytes_of({"details": details, "inputs": inputs}), asked),
    )


def problem_of(answer: ApprovalResult, step: PlanStep, *, durable: bool) -> str | None:
    """Why the answer cannot be used for ``step``, or ``None``. A ``durable`` one must have a stored form as well."""
    changes = cast("Any", answer.modifications)  # an answer may be made without validation
    if not isinstance(cast("Any", answer.decision), ApprovalDecision):
        return f"its decision is {answer.decision!r}, not an ApprovalDecision"
    if durable:
        try:
            codec.encode({"modifications": changes, "reason": answer.reason}, "answer")
        except UnstorableValue as error:
            return f"the answer cannot be stored: {error}"
    if answer.decision is not ApprovalDecision.MODIFY:
        return None
    if not isinstance(changes, dict):
        return f"modifications must be a dict, not {type(changes).__name__}"
    action = step.action.action_type
    taken = [name for name in ("inputs", _OWN.get(action)) if name is not None]
    for name, value in changes.items():
        if name not in taken:
            return f"a {action.value} step like {step.id!r} has no {name!r} to modify, only {' and '.join(taken)}"
        kind = _MODIFIABLE[name]
        if not isinstance(value, kind):
            return f"the modification {name!r} must be a {kind.__name__}, not {type(value).__name__}"
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            return f"the names in the modification {name!r} must be texts"
    return None


def modified(step: PlanStep, answer: ApprovalResult) -> PlanStep:
    """A copy of ``step`` with the answer's modifications, which have no problem.

    A modified argument also wins over an input of its name.
    """
    changes = answer.modifications
    copied = step.model_copy(deep=True)
    copied.action.tool_args.update(changes.get("tool_args") or {})
    copied.action.function_args.update(changes.get("function_args") or {})
    copied.inputs.update(changes.get("inputs") or {})
    for name in changes.get(_ARGUMENTS.get(step.action.action_type, ""), ()):
        copied.inputs.pop(name, None)
    if "prompt" in changes:
        copied.action.prompt = changes["prompt"]
    return copied


def _preview(step: PlanStep, details: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    what = next((details[name] for name in ("tool_name", "function_name", "graph_id") if name in details), "")
    args = {**details.get("tool_args", {}), **details.get("function_args", {}), **inputs}
    listing = ", ".join(f"{name}={summary_of(value, 60)}" for name, value in args.items())
    body = details.get("code") or details.get("prompt") or ""
    head = f"{step.action.action_type.value} {what}({listing})" if what else step.action.action_type.value
    return shorten(f"{head}: {body}" if body else head, 400)


def _bytes_of(arguments: Mapping[str, Any]) -> bytes:
    try:
        return codec.encode(arguments)
    except UnstorableValue:  # then the run is not stored either, and its answers never leave this process
        return text_of(arguments).encode("utf-8", "surrogatepass")
