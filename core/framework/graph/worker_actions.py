"""The five kinds of work a plan's step may be: ask a model, use a tool, run a sub-graph, a function, or code."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.graph.code_checks import check_code
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.json_reply import widest_braces
from framework.graph.node_base import is_infrastructure_error
from framework.graph.plan import ActionType, PlanStep
from framework.graph.references import call_arguments, own_copy
from framework.graph.text import fill_placeholders, shorten, text_of
from framework.graph.worker_errors import error_text, transient_kind
from framework.llm.provider import Tool, ToolUse

_FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)


@dataclass
class StepExecutionResult:
    """What one attempt of a step came to. ``error_type`` names the kind of a failure (see docs/how-to/plans.md)."""

    success: bool
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    error_type: str | None = None
    tokens_used: int = 0
    latency_ms: int = 0
    executor_type: str = ""


@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """What an attempt may know besides the step: ``feedback`` of the judge on the attempt before, a key that is the
    same for every attempt of the step in every process, and the run ids of the plan and of a sub-graph's run."""

    number: int = 1
    feedback: str | None = None
    idempotency_key: str = ""
    run_id: str | None = None
    child_run_id: str | None = None


@dataclass(frozen=True, slots=True)
class SubGraph:
    """A graph that steps run by id: ``executor.execute(graph, goal, inputs, run_id=..., parent_run_id=...)``."""

    graph: Any
    goal: Any
    executor: Any


@dataclass(slots=True)
class Resources:
    """What work is done with."""

    llm: Any = None
    tools: dict[str, Tool] = field(default_factory=dict)
    tool_executor: Callable[..., Any] | None = None
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    sub_graph_executor: Callable[..., Any] | None = None
    sub_graphs: dict[str, SubGraph] = field(default_factory=dict)
    sandbox: CodeSandbox = field(default_factory=CodeSandbox)


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt: the step, its resolved inputs, and where references lead."""

    step: PlanStep
    inputs: dict[str, Any]
    context: Mapping[str, Any]
    outputs: Mapping[str, Any]
    info: AttemptInfo


def failure(error: str, error_type: str, executor_type: str) -> StepExecutionResult:
    """A failed result."""
    return StepExecutionResult(False, error=error, error_type=error_type, executor_type=executor_type)


def raised(error: Exception, otherwise: str, executor_type: str) -> StepExecutionResult:
    """The failed result that an exception means. Errors of the run's own store are raised again instead."""
    if is_infrastructure_error(error):
        raise error
    return failure(error_text(error), transient_kind(error) or otherwise, executor_type)


def parse_llm_json_response(text: object) -> tuple[Any | None, str]:
    """The JSON value in a model's reply and the text it was read from; ``(None, text)`` when there is none.

    Looked for in fenced blocks, then in the whole text, then from the first to the last bracket.
    """
    if not isinstance(text, str):
        return None, str(text)
    spans = [span for span in (widest_braces(text), widest_braces(text, "[", "]")) if span is not None]
    candidates = [*_FENCE.findall(text), text, *sorted(spans, key=len, reverse=True)]
    for candidate in candidates:
        try:
            return json.loads(candidate), candidate.strip()
        except (ValueError, RecursionError):
            continue
    return None, text.strip()


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, async or not. One that is not runs in a thread, so that it blocks no other step and a time
    limit can end the wait for it; the thread itself ends with its call."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(*args, **kwargs)
    value = await asyncio.to_thread(function, *args, **kwargs)
    return await value if inspect.isawaitable(value) else value


# --- the actions ------------------------------------------------------------------------------------------------------


async def llm_call(resources: Resources, work: Work) -> StepExecutionResult:
    """Ask the model; the JSON in its reply is the result, else the reply itself."""
    action = work.step.action
    if resources.llm is None:
        return failure("LLM not available: give the executor an llm", "configuration", "llm_call")
    if not action.prompt:
        return failure("The action has no prompt", "invalid_action", "llm_call")
    try:
        response = await call(
            resources.llm.complete,
            messages=[{"role": "user", "content": _prompt(action.prompt, work)}],
            system=action.system_prompt,
        )
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "llm_error", "llm_call")
    counts = (getattr(response, "input_tokens", 0), getattr(response, "output_tokens", 0))
    parsed, _ = parse_llm_json_response(response.content)
    result = parsed if parsed is not None else response.content
    return StepExecutionResult(
        True,
        outputs={"result": result, "response": response.content, "parsed_json": parsed},
        tokens_used=sum(count for count in counts if isinstance(count, int)),
        executor_type="llm_call",
    )


def _prompt(prompt: str, work: Work) -> str:
    parts = [fill_placeholders(prompt, work.inputs)]
    if work.inputs:
        listing = "\n".join(f"- {name}: {text_of(value)}" for name, value in work.inputs.items())
        parts.append(f"--- Inputs ---\n{listing}")
    if work.info.feedback:
        parts.append(
            f"--- Feedback on the previous attempt ---\n{work.info.feedback}\n"
            "Take it into account and give a better answer."
        )
    return "\n\n".join(parts)


async def tool_use(resources: Resources, work: Work) -> StepExecutionResult:
    """Use a tool: a registered function of its name, else the tool executor."""
    name = work.step.action.tool_name
    if not name:
        return failure("The action has no tool_name", "invalid_action", "tool_use")
    args = _arguments(work.step.action.tool_args, work)
    if name in resources.functions:
        return await _tool_function(resources.functions[name], name, args, work)
    if name not in resources.tools:
        known = ", ".join(sorted({*resources.tools, *resources.functions})) or "none"
        return failure(f"There is no tool {name!r}; known: {known}", "missing_tool", "tool_use")
    if resources.tool_executor is None:
        return failure(f"Tool {name!r} cannot be used: no tool_executor was given", "configuration", "tool_use")
    try:
        answer = await call(resources.tool_executor, ToolUse(id=f"step_{name}", name=name, input=args))
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "tool_exception", "tool_use")
    content = getattr(answer, "content", answer)
    if getattr(answer, "is_error", False) is True:
        return failure(text_of(content), "tool_error", "tool_use")
    outputs: dict[str, Any] = {"result": content}
    if isinstance(content, str):
        try:
            spread = json.loads(content)
        except (ValueError, RecursionError):
            spread = None
        if isinstance(spread, dict):
            outputs = {**outputs, **spread}
    return StepExecutionResult(True, outputs=outputs, executor_type="tool_use")


async def _tool_function(
    function: Callable[..., Any], name: str, args: dict[str, Any], work: Work
) -> StepExecutionResult:
    given, problem = _bind(function, name, args, work.info)
    if problem is not None:
        return failure(problem, "invalid_action", "tool_use")
    try:
        value = await call(function, **given)
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "tool_exception", "tool_use")
    if isinstance(value, dict) and "success" in value:
        success = bool(value["success"])
        outputs = value.get("outputs", {})
        return StepExecutionResult(
            success,
            outputs=outputs if isinstance(outputs, dict) else {"result": outputs},
            error=value.get("error"),
            error_type=value.get("error_type") or (None if success else "tool_error"),
            executor_type="tool_use",
        )
    return StepExecutionResult(True, outputs={"result": value}, executor_type="tool_use")


async def function(resources: Resources, work: Work) -> StepExecutionResult:
    """Call a registered function with ``function_args`` overlaid by the inputs."""
    name = work.step.action.function_name
    if not name:
        return failure("The action has no function_name", "invalid_action", "function")
    known = resources.functions.get(name)
    if known is None:
        problem = f"Function {name!r} is not registered; call register_function({name!r}, ...)"
        return failure(problem, "missing_function", "function")
    given, problem_ = _bind(known, name, _arguments(work.step.action.function_args, work), work.info)
    if problem_ is not None:
        return failure(problem_, "invalid_action", "function")
    try:
        value = await call(known, **given)
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "function_exception", "function")
    return StepExecutionResult(True, outputs={"result": value}, executor_type="function")


async def sub_graph(resources: Resources, work: Work) -> StepExecutionResult:
    """Run a graph with the inputs: one registered by id, else through ``sub_graph_executor``."""
    graph_id = work.step.action.graph_id
    if not graph_id:
        return failure("The action has no graph_id", "invalid_action", "sub_graph")
    registered = resources.sub_graphs.get(graph_id)
    if registered is None and resources.sub_graph_executor is None:
        problem = (
            f"Graph {graph_id!r} cannot be run: call register_graph({graph_id!r}, ...) or give a sub_graph_executor"
        )
        return failure(problem, "configuration", "sub_graph")
    try:
        if registered is not None:
            # A task of its own, so that what the runtime takes as the current run is not mixed up.
            outcome = await asyncio.create_task(_child(registered, work))
        else:
            assert resources.sub_graph_executor is not None
            outcome = await call(resources.sub_graph_executor, graph_id, work.inputs, _copied(work.context))
    except Exception as error:  # noqa: BLE001 - a lost lease or a broken store is the child's, not this run's
        return failure(error_text(error), transient_kind(error) or "sub_graph_exception", "sub_graph")
    paused_at = getattr(outcome, "paused_at", None)
    why: str | None = getattr(outcome, "error", None)
    success = bool(outcome.success)
    if isinstance(paused_at, str):
        child = getattr(outcome, "run_id", None)
        why, success = f"Run {child!r} of graph {graph_id!r} waits at {paused_at!r}; answer it, then resume", False
    return StepExecutionResult(
        success,
        outputs=dict(outcome.output or {}) if success else {},
        error=why if not success else None,
        error_type=None if success else (SUB_GRAPH_PAUSED if isinstance(paused_at, str) else "sub_graph_error"),
        tokens_used=int(getattr(outcome, "total_tokens", 0) or 0),
        executor_type="sub_graph",
    )


SUB_GRAPH_PAUSED = "sub_graph_paused"


def _copied(context: Mapping[str, Any]) -> dict[str, Any]:
    return {name: own_copy(value)[0] for name, value in context.items()}


async def _child(registered: SubGraph, work: Work) -> Any:
    ids: dict[str, Any] = {}
    if work.info.child_run_id is not None:
        ids = {"run_id": work.info.child_run_id, "parent_run_id": work.info.run_id}
    return await registered.executor.execute(registered.graph, registered.goal, dict(work.inputs), **ids)


async def code_execution(resources: Resources, work: Work) -> StepExecutionResult:
    """Run code in the sandbox, with the context overlaid by the inputs as its variables."""
    action = work.step.action
    if not action.code:
        return failure("The action has no code", "invalid_action", "code_execution")
    if action.language.lower() not in ("python", "python3", "py"):
        return failure(
            f"Code in {action.language!r} cannot be run; only python can", "invalid_action", "code_execution"
        )
    # Only what the code needs is taken from the context: that may hold values which no code can be given, and names
    # that an earlier run of this very step left, which are not inputs.
    needed = check_code(action.code, allowed=resources.sandbox.safe_builtins).needed
    offered = {"feedback": work.info.feedback} if work.info.feedback else {}
    inputs = {**offered, **{name: work.context[name] for name in needed if name in work.context}, **work.inputs}
    result = await asyncio.to_thread(resources.sandbox.execute, action.code, inputs)
    if not result.success:
        kind = result.error_type or "code_error"
        return failure(result.error or "the code failed", kind, "code_execution")
    return StepExecutionResult(
        True, outputs={"result": result.result, **result.variables}, executor_type="code_execution"
    )


ACTIONS: Mapping[ActionType, Callable[[Resources, Work], Awaitable[StepExecutionResult]]] = {
    ActionType.LLM_CALL: llm_call,
    ActionType.TOOL_USE: tool_use,
    ActionType.SUB_GRAPH: sub_graph,
    ActionType.FUNCTION: function,
    ActionType.CODE_EXECUTION: code_execution,
}


# --- arguments --------------------------------------------------------------------------------------------------------


def _arguments(declared: Mapping[str, Any], work: Work) -> dict[str, Any]:
    return call_arguments(declared, work.inputs, work.context, work.outputs)


def _bind(
    function_: Callable[..., Any], name: str, args: dict[str, Any], info: AttemptInfo
) -> tuple[dict[str, Any], str | None]:
    """The arguments to call with, and what does not fit; told apart from a TypeError inside the function.

    A parameter named ``feedback`` or ``idempotency_key`` that nothing else fills is given what the attempt knows.
    """
    try:
        signature = inspect.signature(function_)
    except (TypeError, ValueError):  # some builtins tell nothing about their parameters
        return args, None
    offered = {"feedback": info.feedback, "idempotency_key": info.idempotency_key}
    given = dict(args)
    for key, value in offered.items():
        parameter = signature.parameters.get(key)
        # One that has a default keeps it while there is nothing to say.
        if parameter is not None and key not in args and (value or parameter.default is parameter.empty):
            given[key] = value
    try:
        signature.bind(**given)
    except TypeError as error:
        return (
            given,
            f"Function {name!r} cannot be called with {shorten(', '.join(sorted(given))) or 'nothing'}: {error}",
        )
    return given, None
