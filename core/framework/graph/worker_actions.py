"""The five kinds of work a plan's step may be: ask a model, use a tool, run a sub-graph, a function, or code."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework._secrets import mask, mask_value
from framework.errors import LLMError, RunBusy, UnstorableValue
from framework.graph.budget import PartAccount
from framework.graph.calls import KEY, StepThreads, tokens_of, tool_takes_key
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.child_runs import PausedPart, cancelled_part, paused_part, spent_by
from framework.graph.code_checks import needed_names
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.journal import AttemptJournal, CallSpec, request_hash
from framework.graph.journal_lanes import whole_step
from framework.graph.journal_llm import JournaledLLM, check_outcome, policy_of
from framework.graph.journal_rows import Policy
from framework.graph.json_reply import widest_braces
from framework.graph.node_base import is_infrastructure_error
from framework.graph.plan import ActionType, PlanStep
from framework.graph.references import MissingReference, call_arguments, own_copy, resolve
from framework.graph.run_commits import wait_for
from framework.graph.run_messages import CANCELLED_ON_REQUEST
from framework.graph.suspension import Waiting
from framework.graph.text import fill_placeholders, shorten, text_of
from framework.graph.worker_errors import error_text, transient_kind
from framework.llm.calls import ask, cost_of, method_of
from framework.llm.provider import Tool, ToolUse
from framework.llm.stops import stopped_short
from framework.llm.tool_loop import paid_before
from framework.storage import codec
from framework.storage.committer import committer_of
from framework.storage.interface import Storage

_FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)
_UNPARSED = object()


@dataclass
class StepExecutionResult:
    """What one attempt of a step came to. ``error_type`` names the kind of a failure (see docs/how-to/plans.md).

    ``cost`` is what models took, in US dollars, as far as prices are known. ``transient`` is what the provider's error
    says of itself, ``None`` for any other: ``False`` means that the same work will be refused each time.
    ``retry_after`` is how many seconds the provider asks to wait before the next attempt. ``waits`` of one that did not
    succeed is what the run of its sub-graph waits for: the step waits for that, and the attempt counts for nothing.
    """

    success: bool
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    error_type: str | None = None
    tokens_used: int = 0
    latency_ms: int = 0
    executor_type: str = ""
    cost: float = 0.0
    transient: bool | None = None
    retry_after: float | None = None
    waits: tuple[Waiting, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """What an attempt may know besides the step: ``feedback`` of the judge on the attempt before, a key that is the
    same for every attempt of the step in every process, and the run ids of the plan and of a sub-graph's run, with what
    the attempts before have counted of the tokens and dollars of that."""

    number: int = 1
    feedback: str | None = None
    idempotency_key: str = ""
    run_id: str | None = None
    child_run_id: str | None = None
    child_tokens: int = 0
    child_cost: float = 0.0
    journal: AttemptJournal | None = field(default=None, repr=False, compare=False)
    """Where questions to models and tool calls of the attempt are recorded, and answered from after a crash."""
    part: PartAccount | None = field(default=None, repr=False, compare=False)
    """How what a sub-graph takes counts with the plan; it is open while the worker works."""
    answered_at: str = ""
    """The checkpoint at which the sub-graph's run waited for a person, when one who was told has called again."""
    brought: frozenset[str] = frozenset()
    """The names of the context that the plan's caller gave other values, which the sub-graph's run has not yet."""


@dataclass(frozen=True, slots=True)
class SubGraph:
    """A graph that steps run by id: ``executor.execute(graph, goal, inputs, run_id=..., parent_run_id=...)``."""

    graph: Any
    goal: Any
    executor: Any


@dataclass(slots=True)
class Resources:
    """What work is done with. ``policies`` are those of functions that were registered with one, by name."""

    llm: Any = None
    tools: dict[str, Tool] = field(default_factory=dict)
    tool_executor: Callable[..., Any] | None = None
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    sub_graph_executor: Callable[..., Any] | None = None
    sub_graphs: dict[str, SubGraph] = field(default_factory=dict)
    sandbox: CodeSandbox = field(default_factory=CodeSandbox)
    threads: StepThreads = field(default_factory=StepThreads)


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt: the step, its resolved inputs, and where references lead."""

    step: PlanStep
    inputs: dict[str, Any]
    context: Mapping[str, Any]
    outputs: Mapping[str, Any]
    info: AttemptInfo


def failure(error: str, error_type: str, executor_type: str) -> StepExecutionResult:
    """A failed result; known secrets in ``error`` are masked."""
    return StepExecutionResult(False, error=mask(error), error_type=error_type, executor_type=executor_type)


def raised(error: Exception, otherwise: str, executor_type: str) -> StepExecutionResult:
    """The failed result that an exception means. Errors of the run's own store are raised again instead."""
    if is_infrastructure_error(error):
        raise error
    return failure_of(error, otherwise, executor_type)


def failure_of(error: Exception, otherwise: str, executor_type: str) -> StepExecutionResult:
    """The failed result that an exception means, whatever it is, with what a model's finished calls before it took."""
    result = failure(error_text(error), transient_kind(error) or otherwise, executor_type)
    if isinstance(error, LLMError):
        result.transient, result.retry_after = error.transient, error.retry_after
    paid = paid_before(error)
    if paid is not None:
        result.tokens_used, result.cost = tokens_of(paid), cost_of(paid)
    return result


def parse_llm_json_response(text: object) -> tuple[Any | None, str]:
    """The JSON value in a model's reply and the text it was read from; ``(None, text)`` when there is none.

    Looked for in fenced blocks, then in the whole text, then from the first to the last bracket.
    """
    if not isinstance(text, str):
        return None, str(text)
    spans = [span for span in (widest_braces(text), widest_braces(text, "[", "]")) if span is not None]
    candidates = [*_FENCE.findall(text), text, *sorted(spans, key=len, reverse=True)]
    for candidate in candidates:
        parsed = _loaded(candidate)
        if parsed is not _UNPARSED:
            return parsed, candidate.strip()
    return None, text.strip()


def _loaded(text: str) -> Any:
    """The JSON value that ``text`` is, or ``_UNPARSED``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _UNPARSED


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def _call(resources: Resources, work: Work, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what does the step's work, with arguments of its own: this may wait for the thread of an earlier attempt."""
    key = None if work.info.run_id is None else (work.info.run_id, work.step.id)
    return await resources.threads.call(key, function, *args, **kwargs)


# --- the actions ------------------------------------------------------------------------------------------------------


async def llm_call(resources: Resources, work: Work) -> StepExecutionResult:
    """Ask the model, or the one that the action names where the provider takes one; the JSON in its reply is the
    result, else the reply itself."""
    action = work.step.action
    if resources.llm is None:
        return failure("LLM not available: give the executor an llm", "configuration", "llm_call")
    if not action.prompt:
        return failure("The action has no prompt", "invalid_action", "llm_call")
    try:
        response = await ask(
            _model(resources, work),
            messages=[{"role": "user", "content": _prompt(action.prompt, work)}],
            system=action.system_prompt,
            model=action.model,
        )
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "llm_error", "llm_call")
    parsed, _ = parse_llm_json_response(response.content)
    result = parsed if parsed is not None else response.content
    done = StepExecutionResult(
        True,
        outputs={"result": result, "response": response.content, "parsed_json": parsed},
        tokens_used=tokens_of(response),
        executor_type="llm_call",
        cost=cost_of(response),
    )
    short = stopped_short(response)
    said = shorten(str(response.content), 120)
    if short == "refusal":
        done.error = f"The model, or its provider's filter, refused to answer ({response.stop_reason}): {said}"
        done.transient = False  # the same question would be refused again
    elif short == "length" and parsed is None and str(response.content).lstrip().startswith(("{", "[", "```")):
        done.error = f"The JSON of the reply was cut off at the model's limit ({response.stop_reason}): {said}"
    if done.error is not None:
        done.success, done.error_type, done.outputs = False, "llm_error", {}
    return done


def _model(resources: Resources, work: Work) -> Any:
    model, journal = _StepModel(resources, work), work.info.journal
    return model if journal is None else JournaledLLM(model, journal, journal.of.before_model)


class _StepModel:
    """The executor's model as ``ask`` sees it: what it takes is the same, but what is not async runs in the step's own
    thread, for whose end the step's next attempt waits."""

    def __init__(self, resources: Resources, work: Work) -> None:
        method = method_of(resources.llm)

        @functools.wraps(method, assigned=(), updated=())  # which keywords it takes is read from its signature
        async def complete(**keywords: Any) -> Any:
            return await _call(resources, work, method, **keywords)

        self.complete = complete
        self.model = getattr(resources.llm, "model", "")
        self.supports_model = getattr(resources.llm, "supports_model", False)


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
    args = call_arguments(work.step.action.tool_args, work.inputs, work.context, work.outputs)
    if name in resources.functions:
        return await _tool_function(resources, name, args, work)
    if name not in resources.tools:
        known = ", ".join(sorted({*resources.tools, *resources.functions})) or "none"
        return failure(f"There is no tool {name!r}; known: {known}", "missing_tool", "tool_use")
    if resources.tool_executor is None:
        return failure(f"Tool {name!r} cannot be used: no tool_executor was given", "configuration", "tool_use")
    try:
        content, is_error = await _use_tool(resources, work, name, args)
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "tool_exception", "tool_use")
    if is_error:
        return failure(text_of(content), "tool_error", "tool_use")
    outputs: dict[str, Any] = {"result": content}
    if isinstance(content, str) and isinstance(spread := _loaded(content), dict):
        outputs = {**outputs, **spread}
    return StepExecutionResult(True, outputs=outputs, executor_type="tool_use")


async def _use_tool(resources: Resources, work: Work, name: str, args: dict[str, Any]) -> tuple[Any, bool]:
    """What the tool executor answers, and whether that is an error; recorded where the attempt has a journal."""
    executor = resources.tool_executor
    assert executor is not None
    journal = work.info.journal
    recorded = journal is not None and journal.records
    keyed = recorded and tool_takes_key(resources.tools[name]) and KEY not in args

    async def make(key: str) -> list[Any]:
        use = ToolUse(id=f"step_{name}", name=name, input={**args, KEY: key} if keyed else args)
        answer = await _call(resources, work, executor, use)
        if recorded and journal is not None:
            check_outcome(answer, journal, policy_of(resources.tools[name]))
        return [mask_value(getattr(answer, "content", answer)), getattr(answer, "is_error", False) is True]

    # What a person says it answered becomes text, as a tool's own answer is: JSON in it is spread over the outputs.
    spec = CallSpec(
        policy_of(resources.tools[name]),
        settled=lambda action, value: [text_of(value) if action == "done" else None, False],
    )
    content, is_error = await _journaled(work, f"tool:{name}", args, make, spec)
    return content, is_error


async def _journaled(
    work: Work, name: str, args: Mapping[str, Any], make: Callable[[str], Awaitable[Any]], spec: CallSpec
) -> Any:
    """What ``make(key)`` returns, as a call of the attempt's journal; ``args`` are what it asks.

    What has no stored form is not recorded; whether the step's outputs can be, its commit will say.
    """
    journal = work.info.journal
    if journal is None or not journal.records:
        return await make(work.info.idempotency_key)
    made: list[Any] = []

    async def note(key: str) -> Any:
        made.append(await make(key))
        return made[0]

    kind, _, called = name.partition(":")
    request = request_hash([called, {key: args[key] for key in sorted(args)}], f"the arguments of {kind} {called!r}")
    try:
        return await journal.call(name, request, note, spec)
    except UnstorableValue:
        if not made:
            raise
        return made[0]


async def _tool_function(resources: Resources, name: str, args: dict[str, Any], work: Work) -> StepExecutionResult:
    known = resources.functions[name]
    given, problem = _bind(known, name, args, work.info)
    if problem is not None:
        return failure(problem, "invalid_action", "tool_use")

    async def make(key: str) -> Any:
        with whole_step(work.info.idempotency_key):
            return mask_value(await _call(resources, work, known, **given))

    tool = resources.tools.get(name)
    policy = resources.policies.get(name) or (policy_of(tool) if tool is not None else "rerun")
    try:
        value = await _journaled(work, f"tool:{name}", _asked(given), make, _function_spec(work, policy))
    except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
        return raised(error, "tool_exception", "tool_use")
    if not (isinstance(value, dict) and "success" in value):
        return StepExecutionResult(True, outputs={"result": value}, executor_type="tool_use")
    # One that says nothing of "outputs" has them beside "success", and they are not to be lost.
    beside = {key: item for key, item in value.items() if key not in ("success", "error", "error_type")}
    outputs = value.get("outputs", beside)
    result = StepExecutionResult(
        bool(value["success"]),
        outputs=outputs if isinstance(outputs, dict) else {"result": outputs},
        executor_type="tool_use",
    )
    if not result.success:
        result.error = text_of(value.get("error") or f"Tool {name!r} failed and did not say why")
        result.error_type = text_of(value.get("error_type") or "tool_error")
    return result


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a function is asked: its arguments, without the key."""
    return {name: value for name, value in given.items() if name != KEY}


def _function_spec(work: Work, policy: Policy) -> CallSpec:
    """How a call of a registered function is recorded: under the key that the function is given, the step's."""
    return CallSpec(policy, key=work.info.idempotency_key or None)


async def function(resources: Resources, work: Work) -> StepExecutionResult:
    """Call a registered function with ``function_args`` overlaid by the inputs."""
    name = work.step.action.function_name
    if not name:
        return failure("The action has no function_name", "invalid_action", "function")
    known = resources.functions.get(name)
    if known is None:
        problem = f"Function {name!r} is not registered; call register_function({name!r}, ...)"
        return failure(problem, "missing_function", "function")
    args = call_arguments(work.step.action.function_args, work.inputs, work.context, work.outputs)
    given, problem_ = _bind(known, name, args, work.info)
    if problem_ is not None:
        return failure(problem_, "invalid_action", "function")

    async def make(key: str) -> Any:
        with whole_step(work.info.idempotency_key):
            return await _call(resources, work, known, **given)

    policy = resources.policies.get(name, "rerun")
    try:
        if policy == "rerun":  # its value goes into the step's own commit
            value = await make("")
        else:
            value = await _journaled(work, f"function:{name}", _asked(given), make, _function_spec(work, policy))
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
    manager = manager_of(registered) if registered is not None and work.info.child_run_id is not None else None
    inputs = work.inputs
    try:
        if manager is not None:
            begun, paused = await _found(manager, work.info)
            if begun and not work.step.requires_approval:  # else a person has seen what it is given now
                inputs = _brought(work)
            if paused is not None and not paused.may_go_on(work.info.answered_at):
                # It waits since before: to execute it would be taken for a person's answer.
                return _held(graph_id, work.info, paused, await _spent_since(manager, work.info))
        if registered is not None:
            outcome = await _call(resources, work, _child, registered, work, inputs)
        else:
            assert resources.sub_graph_executor is not None
            given = (graph_id, work.inputs, _copied(work.context))
            outcome = await _call(resources, work, resources.sub_graph_executor, *given)
        if manager is not None and isinstance(getattr(outcome, "paused_at", None), str):
            _, paused = await _found(manager, work.info)
            if paused is not None:
                return _held(graph_id, work.info, paused, _newly_spent(outcome, work.info))
        if manager is not None and outcome.error == CANCELLED_ON_REQUEST:  # by itself: the plan would not be here
            left = PausedPart((cancelled_part(str(work.info.child_run_id)),), False)
            return _held(graph_id, work.info, left, _newly_spent(outcome, work.info))
    except RunBusy as busy:
        if manager is None or busy.run_id != work.info.child_run_id:
            return failure_of(busy, "sub_graph_exception", "sub_graph")
        # Somebody resumed it by itself, or its process is gone and its lease is not over yet.
        until = time.time() + busy.seconds_left
        waits = (
            Waiting("sleep", busy.run_id, until=until, run=busy.run_id, question="is worked on by another process"),
        )
        return _held(graph_id, work.info, PausedPart(waits, False), (0, 0.0))
    except Exception as error:  # noqa: BLE001 - a lost lease or a broken store is the child's, not this run's
        return failure_of(error, "sub_graph_exception", "sub_graph")
    paused_at = getattr(outcome, "paused_at", None)
    why: object = getattr(outcome, "error", None)
    success = bool(outcome.success)
    if isinstance(paused_at, str):
        child = getattr(outcome, "run_id", None)
        why, success = f"Run {child!r} of graph {graph_id!r} waits at {paused_at!r}; answer it, then resume", False
    tokens, cost = _newly_spent(outcome, work.info)
    if not success:
        kind = SUB_GRAPH_PAUSED if isinstance(paused_at, str) else "sub_graph_error"
        result = failure(text_of(why or f"Graph {graph_id!r} failed and did not say why"), kind, "sub_graph")
        result.tokens_used, result.cost = tokens, cost
        return result
    output = outcome.output or {}
    outputs = dict(output) if isinstance(output, Mapping) else {"result": output}
    return StepExecutionResult(True, outputs=outputs, tokens_used=tokens, executor_type="sub_graph", cost=cost)


SUB_GRAPH_PAUSED = "sub_graph_paused"


def manager_of(registered: SubGraph) -> CheckpointManager | None:
    """By what the runs of a registered graph are durable; ``None`` when they are not."""
    manager = getattr(registered.executor, "checkpoint_manager", None)
    return manager if isinstance(manager, CheckpointManager) and manager.config.enabled else None


async def _found(manager: CheckpointManager, info: AttemptInfo) -> tuple[bool, PausedPart | None]:
    """Whether the graph's run has begun, and as what it waits."""
    run_id, store = str(info.child_run_id), committer_of(manager.storage)
    soon = manager.config.sleep_in_process_seconds  # in which it is waited for without pausing

    def look(storage: Storage) -> tuple[bool, PausedPart | None]:
        return storage.find_run(run_id) is not None, paused_part(storage, run_id, time.time() + soon)

    return await wait_for(store.call(look))


def _brought(work: Work) -> dict[str, Any]:
    """The inputs of a run that goes on: it keeps those it began with, whatever other steps wrote since, but for what
    the plan's caller brings. Anything else would change under it, and be taken for a person's answer."""
    without = {name: value for name, value in work.context.items() if name not in work.info.brought}
    if len(without) == len(work.context):
        return {}
    found = {}
    for name, value in work.step.inputs.items():
        try:
            same = codec.same(resolve(value, without, work.outputs), work.inputs[name])
        except MissingReference:
            same = False
        if not same:
            found[name] = work.inputs[name]
    return found


async def _spent_since(manager: CheckpointManager, info: AttemptInfo) -> tuple[int, float]:
    """What the graph's run has taken, by its store, without what earlier attempts of the step have counted."""
    run_id = str(info.child_run_id)
    spent = await wait_for(committer_of(manager.storage).call(lambda storage: spent_by(storage, run_id)))
    return max(0, spent.tokens - info.child_tokens), max(0.0, round(spent.cost - info.child_cost, 12))


def _held(graph_id: str, info: AttemptInfo, paused: PausedPart, spent: tuple[int, float]) -> StepExecutionResult:
    waits = "; ".join(each.text for each in paused.waits)
    result = failure(f"Run {info.child_run_id!r} of graph {graph_id!r} {waits}", SUB_GRAPH_PAUSED, "sub_graph")
    result.waits, (result.tokens_used, result.cost) = paused.waits, spent
    return result


def _newly_spent(outcome: Any, info: AttemptInfo) -> tuple[int, float]:
    """The tokens and dollars of a graph's run, without those that earlier attempts of the step have counted: a run that
    went on says what it took from its beginning."""
    tokens, cost = int(getattr(outcome, "total_tokens", 0) or 0), getattr(outcome, "total_cost", 0.0)
    cost = float(cost) if isinstance(cost, (int, float)) else 0.0
    went_on = info.part is not None and info.part.resumed
    if not went_on and not isinstance(getattr(outcome, "resumed_from", None), str):
        return tokens, cost
    return max(0, tokens - info.child_tokens), max(0.0, round(cost - info.child_cost, 12))


def _copied(context: Mapping[str, Any]) -> dict[str, Any]:
    return {name: own_copy(value)[0] for name, value in context.items()}


async def _child(registered: SubGraph, work: Work, inputs: Mapping[str, Any]) -> Any:
    ids: dict[str, Any] = {}
    if work.info.child_run_id is not None:
        ids = {"run_id": work.info.child_run_id, "parent_run_id": work.info.run_id}
    child = registered.executor.execute(registered.graph, registered.goal, dict(inputs), **ids)
    # A task of its own, so that what the runtime takes as the current run is not mixed up.
    return await asyncio.create_task(child)


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
    needed = needed_names(action.code)
    offered = {"feedback": work.info.feedback} if work.info.feedback and "feedback" in needed else {}
    inputs = {**offered, **{name: work.context[name] for name in needed if name in work.context}, **work.inputs}
    result = await _call(resources, work, resources.sandbox.execute, action.code, inputs)
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
