"""The node types that come with the library: a Python function, a language model, and a router."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from framework._secrets import mask
from framework.errors import LLMError
from framework.graph.attempts import should_retry
from framework.graph.calls import KEY, policy_for, takes_key, tool_takes_key
from framework.graph.journal_lanes import whole_step
from framework.graph.json_reply import parse_json_object
from framework.graph.node_base import NodeContext, NodeProtocol, NodeResult, is_infrastructure_error
from framework.graph.node_errors import failed_result
from framework.graph.spending import NOTHING, Spent
from framework.graph.text import fill_placeholders, shorten, summary_of, text_of
from framework.llm.calls import ask, ask_with_tools
from framework.llm.json_schemas import schema_of_keys
from framework.llm.provider import ToolPolicy
from framework.llm.stops import stopped_short

LLM_NOT_AVAILABLE = "LLM not available"


class FunctionNode(NodeProtocol):
    """Runs one Python function, sync or async.

    A node with input keys calls it with those that exist in the state (else in the input data); one without calls it
    with the whole input data. A parameter ``idempotency_key`` that is no input is given the step's own key. Sync
    functions run in the event loop's thread, as they may use it.

    ``effects=True`` says that it changes something outside. ``policy`` says what becomes of a call that had begun
    before a crash and has no recorded outcome, whatever ``effects`` is: "rerun" (as without either) calls again, "ask"
    (as with effects) pauses the run until somebody settles it, "fail" raises `UnknownEffect`. With the last two a call
    is recorded before it is made, and so is what it returned; what it changes in its arguments is not. Raises
    ``ValueError`` for another policy.
    """

    def __init__(self, func: Callable[..., Any], *, effects: bool = False, policy: ToolPolicy | None = None) -> None:
        self.func = func
        self.policy = policy_for(getattr(func, "__name__", type(func).__name__), effects, policy)

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The function's return value as ``output["result"]``, and in the state under the node's output keys.

        A returned dict that holds declared output keys is spread over them, in the state and in ``output``; any other
        value goes to the first output key. An exception of the function gives a failed result; one of the run's own
        store is raised.
        """
        name = getattr(self.func, "__name__", type(self.func).__name__)
        log = _Log.decide(ctx, f"Run function {name} for node {ctx.node_id}", f"Call {name}", "function_call")
        try:
            arguments = self._arguments(ctx)
            if KEY not in arguments and takes_key(self.func):
                arguments[KEY] = ctx.idempotency_key
            value = await self._call(ctx, arguments)
            output = self._store(ctx, value)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error)
        return log.finished(NodeResult(success=True, output=output), summary_of(value))

    async def _call(self, ctx: NodeContext, arguments: dict[str, Any]) -> Any:
        if self.policy != "rerun" and ctx.journal is not None and ctx.journal.records:
            from framework.graph.journal_calls import call_function  # noqa: PLC0415 - it needs the stores' modules

            return await call_function(ctx.journal, ctx.node_id, self.func, arguments, self.policy)
        with whole_step(ctx.idempotency_key):
            value = self.func(**arguments)
            return await value if inspect.isawaitable(value) else value

    def _arguments(self, ctx: NodeContext) -> dict[str, Any]:
        if not ctx.node_spec.input_keys:
            return dict(ctx.input_data)
        state = ctx.memory.read_all()
        sources = {**ctx.input_data, **state}
        return {key: sources[key] for key in ctx.node_spec.input_keys if key in sources}

    def _store(self, ctx: NodeContext, value: Any) -> dict[str, Any]:
        keys = ctx.node_spec.output_keys
        declared = {key: value[key] for key in keys if key in value} if isinstance(value, dict) else {}
        for key, part in (declared or ({keys[0]: value} if keys else {})).items():
            ctx.memory.write(key, part)
        return {"result": value, **declared}


class LLMNode(NodeProtocol):
    """Asks a language model, with tools when the node has any and there is a ``tool_executor``.

    The event loop is not blocked: a provider with an async way is awaited, another one runs in a thread, and so does a
    ``tool_executor`` that is not async. Cancelling the node, or its time limit, stops waiting: a thread ends with the
    request or tool call it is in and begins no further one, and the next attempt waits for its end.
    """

    def __init__(self, tool_executor: Callable[..., Any] | None = None) -> None:
        self.tool_executor = tool_executor

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The reply as ``output["result"]`` and under the node's output keys, which are written to the state too.

        With one output key that is the raw reply, or the value when the reply is a JSON object of exactly that key.
        With several, each key's value from the JSON object in the reply, else from the input data, else the raw reply;
        a provider that can is asked for such an object. An ``output_schema`` of the node is asked for the same way.
        Errors of the model or a tool give a failed result; an error of the run's own store is raised. So does a reply
        that its model or provider refused, one that was stopped at the limit of the tool loop, and one cut at the limit
        of tokens when a JSON object was wanted; a text that was cut counts, and is reported as a problem.
        """
        if ctx.llm is None:
            return NodeResult(success=False, error=LLM_NOT_AVAILABLE)
        log = _Log.decide(ctx, f"Generate the output of node {ctx.node_id}", "Ask the language model", "llm_call")
        spent = NOTHING
        try:
            response = await self._ask(ctx)
            spent = Spent.of_reply(response)
            unfinished = _unfinished(ctx, response)
            if unfinished is not None:
                return log.finished(unfinished, "", spent)
            output = self._store(ctx, response.content)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error, spent)
        return log.finished(NodeResult(success=True, output=output), summary_of(response.content), spent)

    async def _ask(self, ctx: NodeContext) -> Any:
        spec = ctx.node_spec
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": _user_message(ctx)}],
            "system": _system_prompt(ctx),
            "max_tokens": spec.max_tokens,
            "json_schema": _wanted_schema(ctx),
            "model": spec.model,
        }
        if ctx.available_tools and self.tool_executor is not None:
            llm = ctx.llm
            if ctx.journal is None and any(map(tool_takes_key, ctx.available_tools)):
                from framework.graph.journal_calls import keyed_llm  # noqa: PLC0415 - it needs the stores' modules

                llm = keyed_llm(ctx)
            return await ask_with_tools(llm, tools=ctx.available_tools, tool_executor=self.tool_executor, **request)
        return await ask(ctx.llm, **request)

    def _store(self, ctx: NodeContext, content: Any) -> dict[str, Any]:
        values = _by_output_key(ctx, content)
        for key, value in values.items():
            ctx.memory.write(key, value)
        return {"result": content, **values}


def _unfinished(ctx: NodeContext, response: Any) -> NodeResult | None:
    """The failed result that a reply means which is known to be no whole answer; a cut text is only reported."""
    said = summary_of(response.content)
    transient: bool | None = None
    match stopped_short(response):
        case "refusal":
            kind, transient = "refusal", False
            problem = f"the model, or its provider's filter, refused to answer ({response.stop_reason}): {said}"
        case "iterations":
            # Another attempt would call the same tools again, to the same end.
            kind, transient = "max_iterations", False
            problem = f"the model still asked for tools at the limit of the tool loop (max_iterations): {said}"
        case "length":
            kind = "max_tokens"
            limit = ctx.node_spec.max_tokens or getattr(ctx.llm, "max_tokens", None)
            shown = f" of {limit}" if isinstance(limit, int) else ""
            problem = (
                f"the reply was cut off at the limit{shown} tokens ({response.stop_reason}); raise max_tokens of the "
                "node, or ask for less"
            )
            if _wanted_schema(ctx) is None:
                report = getattr(ctx.runtime, "report_problem", None)
                if report is not None:
                    report(severity="warning", description=f"Node {ctx.node_id!r}: {problem}. What came of it is used.")
                return None
        case None:
            return None
    return NodeResult(False, error=mask(problem), error_type=kind, error_names=(kind,), transient=transient)


class RouterNode(NodeProtocol):
    """Chooses the next node among the node's ``routes``: by a model when it has a prompt, else by ``route_on``."""

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The chosen route's node as ``next_node``, with why in ``route_reason``, and no output.

        Fails when nothing matches and there is no route named ``default``. A model that answers something else, or
        fails, means ``default``; but when it fails in a way that passes, that is only so in the last attempt. An error
        of the run's own store is raised.
        """
        routes = ctx.node_spec.routes
        log = _Log.decide(ctx, f"Choose the route of node {ctx.node_id}", f"One of {sorted(routes)}", "routing")
        try:
            if ctx.node_spec.system_prompt and ctx.llm is not None:
                key, reason, spent = await self._by_model(ctx)
            else:
                key, reason, spent = *self._by_value(ctx), NOTHING
            target = routes.get(key)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error)
        if target is None:
            known = ", ".join(map(repr, routes)) or "none"
            problem = f"Router {ctx.node_id!r}: {reason}, and it has no route 'default'. Its routes are: {known}."
            return log.finished(NodeResult(success=False, error=problem), problem, spent)
        result = NodeResult(success=True, next_node=target, route_reason=reason)
        return log.finished(result, f"route {key!r} to {target!r}: {reason}", spent)

    async def _by_model(self, ctx: NodeContext) -> tuple[str, str, Spent]:
        routes = ctx.node_spec.routes
        choices = "\n".join(f"- {key}" for key in routes)
        question = (
            f"{_user_message(ctx)}\n\nChoose one of these routes:\n{choices}\n\n"
            'Answer with JSON only: {"chosen": "<route>", "reasoning": "<one sentence>"}'
        )
        try:
            response = await ask(
                ctx.llm,
                messages=[{"role": "user", "content": question}],
                system=_system_prompt(ctx),
                max_tokens=ctx.node_spec.max_tokens,
                json_schema=_route_schema(list(routes)),
                model=ctx.node_spec.model,
            )
        except Exception as error:
            if is_infrastructure_error(error):
                raise
            passes = isinstance(error, LLMError) and error.transient and ctx.attempt < ctx.max_attempts
            if passes and should_retry(ctx.node_spec, failed_result(error)):
                raise
            reason = shorten(mask(f"{type(error).__name__}: {error}"), 160)
            return "default", f"the model failed ({reason})", NOTHING
        spent = Spent.of_reply(response)
        answer = parse_json_object(response.content) or {}
        chosen = answer.get("chosen")
        if not isinstance(chosen, str) or chosen not in routes:
            return "default", f"the model chose no known route ({summary_of(chosen, 60)})", spent
        return chosen, shorten(str(answer.get("reasoning") or "chosen by the model")), spent

    def _by_value(self, ctx: NodeContext) -> tuple[str, str]:
        value = ctx.input_data["route_on"] if "route_on" in ctx.input_data else _route_on(ctx.memory)
        key = _matching_route(value, list(ctx.node_spec.routes))
        if key is None:
            return "default", f"no route matches route_on = {summary_of(value, 60)}"
        return key, f"route_on = {summary_of(value, 60)} matches {key!r}"


def _route_on(memory: Any) -> Any:
    """The router's own key, which it may read whatever its input keys are."""
    peek = getattr(memory, "peek", None)
    if callable(peek):
        return peek("route_on")
    try:
        return memory.read("route_on")
    except PermissionError:  # a memory without `peek` has no other way to it
        return None


def _matching_route(value: Any, keys: list[str]) -> str | None:
    """The first route key that ``value`` means exactly, else the first it contains; "default" matches in its place."""
    if isinstance(value, str) and value in keys:
        return value
    exact = {"success": value is True, "failure": value is False, "error": isinstance(value, Exception)}
    for key in keys:
        if exact.get(key, False):
            return key
    for key in keys:
        if key == "default" or (isinstance(value, str) and key in value):
            return key
    return None


def _input_values(ctx: NodeContext) -> dict[str, Any]:
    """The declared input keys that have a value in the state."""
    found = {key: ctx.memory.read(key) for key in ctx.node_spec.input_keys}
    return {key: value for key, value in found.items() if value is not None}


def _user_message(ctx: NodeContext) -> str:
    lines = [f"{key}: {text_of(value)}" for key, value in _input_values(ctx).items()]
    return "\n".join(lines) if lines else text_of(ctx.input_data)


def _system_prompt(ctx: NodeContext) -> str:
    prompt = fill_placeholders(ctx.node_spec.system_prompt or "", _input_values(ctx))
    return "\n\n".join(part for part in (prompt, ctx.goal_context) if part)


def _wanted_schema(ctx: NodeContext) -> dict[str, Any] | None:
    """The JSON schema the reply should follow: the node's own, else that of several output keys.

    A key that the node was given already may be passed on by it, so the model need not say it again.
    """
    spec = ctx.node_spec
    if spec.output_schema is not None or len(spec.output_keys) < 2:
        return spec.output_schema
    return schema_of_keys(spec.output_keys, optional=ctx.input_data)


def _route_schema(routes: list[str]) -> dict[str, Any]:
    properties = {"chosen": {"type": "string", "enum": routes}, "reasoning": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _by_output_key(ctx: NodeContext, content: Any) -> dict[str, Any]:
    keys = ctx.node_spec.output_keys
    if len(keys) == 1:
        return {keys[0]: _only_value(ctx, keys[0], content)}
    parsed = parse_json_object(content) if keys else None
    if parsed is None:
        return dict.fromkeys(keys, content)
    return {key: parsed[key] if key in parsed else ctx.input_data.get(key, content) for key in keys}


def _only_value(ctx: NodeContext, key: str, content: Any) -> Any:
    """The value of a node's only output key: what the reply has under it, else a reply that follows the node's schema
    as the object it is, else the reply's text."""
    if ctx.node_spec.output_schema is not None:
        parsed = parse_json_object(content)
        return content if parsed is None else parsed.get(key, parsed)
    parsed = parse_json_object(content, in_prose=False)
    return parsed[key] if parsed is not None and set(parsed) == {key} else content


@dataclass
class _Log:
    """One decision of a node and its outcome, as the runtime records them; texts are short, values are not kept."""

    ctx: NodeContext
    decision_id: Any
    started: float

    @classmethod
    def decide(cls, ctx: NodeContext, intent: str, description: str, action_type: str) -> _Log:
        decide = getattr(ctx.runtime, "decide", None)
        decision_id: Any = ""
        if decide is not None:
            decision_id = decide(
                intent=intent,
                options=[{"id": action_type, "description": shorten(description), "action_type": action_type}],
                chosen=action_type,
                reasoning=f"Node type {ctx.node_spec.node_type}, attempt {ctx.attempt} of {ctx.max_attempts}",
                node_id=ctx.node_id,
            )
        return cls(ctx, decision_id, perf_counter())

    def failed(self, error: Exception, spent: Spent = NOTHING) -> NodeResult:
        """The failed result that ``error`` means. Errors of the run's own store are raised again instead."""
        if is_infrastructure_error(error):
            raise error
        return self.finished(failed_result(error), "", spent)

    def finished(self, result: NodeResult, summary: str, spent: Spent = NOTHING) -> NodeResult:
        result.latency_ms = int((perf_counter() - self.started) * 1000)
        if spent is not NOTHING:
            result.tokens_used += spent.tokens
            result.output_tokens += spent.output_tokens
            result.cost += spent.cost
        record = getattr(self.ctx.runtime, "record_outcome", None)
        if record is not None:
            short = shorten(summary)
            record(
                decision_id=self.decision_id,
                success=result.success,
                result=short or None,
                error=shorten(result.error) if result.error else None,
                summary=short,
                tokens_used=result.tokens_used,
                latency_ms=result.latency_ms,
            )
        return result
