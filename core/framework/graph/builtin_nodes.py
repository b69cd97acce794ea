"""The node types that come with the library: a Python function, a language model, and a router."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from framework.graph.json_reply import parse_json_object
from framework.graph.node_base import NodeContext, NodeProtocol, NodeResult, is_infrastructure_error
from framework.graph.text import fill_placeholders, shorten, summary_of, text_of

LLM_NOT_AVAILABLE = "LLM not available"


class FunctionNode(NodeProtocol):
    """Runs one Python function, sync or async.

    A node with input keys calls it with those that exist in the state (else in the input data); one without calls it
    with the whole input data. Sync functions run in the event loop's thread, as they may use it.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The function's return value as ``output["result"]``, and in the state under the node's output keys.

        A returned dict that holds declared output keys is spread over them, in the state and in ``output``; any other
        value goes to the first output key. An exception of the function gives a failed result; one of the run's own
        store is raised.
        """
        name = getattr(self.func, "__name__", type(self.func).__name__)
        log = _Log.decide(ctx, f"Run function {name} for node {ctx.node_id}", f"Call {name}", "function_call")
        try:
            value = self.func(**self._arguments(ctx))
            if inspect.isawaitable(value):
                value = await value
            output = self._store(ctx, value)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error)
        return log.finished(NodeResult(success=True, output=output), summary_of(value))

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

    The provider is synchronous and runs in a worker thread, and so does ``tool_executor``; an async one runs in the
    event loop. Cancelling the node stops waiting for the thread, which itself ends with its call.
    """

    def __init__(self, tool_executor: Callable[..., Any] | None = None) -> None:
        self.tool_executor = tool_executor

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The reply as ``output["result"]`` and under the node's output keys, which are written to the state too.

        With one output key that is the raw reply, or the value when the reply is a JSON object of exactly that key.
        With several, each key's value from the JSON object in the reply, else from the input data, else the raw reply.
        Errors of the model or a tool give a failed result; an error of the run's own store is raised.
        """
        if ctx.llm is None:
            return NodeResult(success=False, error=LLM_NOT_AVAILABLE)
        log = _Log.decide(ctx, f"Generate the output of node {ctx.node_id}", "Ask the language model", "llm_call")
        try:
            response = await self._ask(ctx)
            output = self._store(ctx, response.content)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error)
        result = NodeResult(success=True, output=output, tokens_used=_tokens(response))
        return log.finished(result, summary_of(response.content))

    async def _ask(self, ctx: NodeContext) -> Any:
        messages = [{"role": "user", "content": _user_message(ctx)}]
        system = _system_prompt(ctx)
        if ctx.available_tools and self.tool_executor is not None:
            return await _in_thread(
                ctx.llm.complete_with_tools,
                messages=messages,
                system=system,
                tools=ctx.available_tools,
                tool_executor=_blocking(self.tool_executor),
            )
        return await _in_thread(ctx.llm.complete, messages=messages, system=system)

    def _store(self, ctx: NodeContext, content: Any) -> dict[str, Any]:
        values = _by_output_key(ctx, content)
        for key, value in values.items():
            ctx.memory.write(key, value)
        return {"result": content, **values}


class RouterNode(NodeProtocol):
    """Chooses the next node among the node's ``routes``: by a model when it has a prompt, else by ``route_on``."""

    async def execute(self, ctx: NodeContext) -> NodeResult:
        """The chosen route's node as ``next_node``, with why in ``route_reason``, and no output.

        Fails when nothing matches and there is no route named ``default``. A model that fails or answers something
        else means ``default``; an error of the run's own store is raised.
        """
        routes = ctx.node_spec.routes
        log = _Log.decide(ctx, f"Choose the route of node {ctx.node_id}", f"One of {sorted(routes)}", "routing")
        try:
            if ctx.node_spec.system_prompt and ctx.llm is not None:
                key, reason, tokens = await self._by_model(ctx)
            else:
                key, reason, tokens = *self._by_value(ctx), 0
            target = routes.get(key)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            return log.failed(error)
        if target is None:
            known = ", ".join(map(repr, routes)) or "none"
            problem = f"Router {ctx.node_id!r}: {reason}, and it has no route 'default'. Its routes are: {known}."
            return log.finished(NodeResult(success=False, error=problem, tokens_used=tokens), problem)
        result = NodeResult(success=True, next_node=target, route_reason=reason, tokens_used=tokens)
        return log.finished(result, f"route {key!r} to {target!r}: {reason}")

    async def _by_model(self, ctx: NodeContext) -> tuple[str, str, int]:
        routes = ctx.node_spec.routes
        choices = "\n".join(f"- {key}" for key in routes)
        question = (
            f"{_user_message(ctx)}\n\nChoose one of these routes:\n{choices}\n\n"
            'Answer with JSON only: {"chosen": "<route>", "reasoning": "<one sentence>"}'
        )
        try:
            response = await _in_thread(
                ctx.llm.complete, messages=[{"role": "user", "content": question}], system=_system_prompt(ctx)
            )
        except Exception as error:
            if is_infrastructure_error(error):
                raise
            return "default", f"the model failed ({type(error).__name__}: {shorten(str(error), 120)})", 0
        tokens = _tokens(response)
        answer = parse_json_object(response.content) or {}
        chosen = answer.get("chosen")
        if not isinstance(chosen, str) or chosen not in routes:
            return "default", f"the model chose no known route ({summary_of(chosen, 60)})", tokens
        return chosen, shorten(str(answer.get("reasoning") or "chosen by the model")), tokens

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


def _by_output_key(ctx: NodeContext, content: Any) -> dict[str, Any]:
    keys = ctx.node_spec.output_keys
    if len(keys) == 1:
        parsed = parse_json_object(content, in_prose=False)
        return parsed if parsed is not None and set(parsed) == set(keys) else {keys[0]: content}
    parsed = parse_json_object(content) if keys else None
    if parsed is None:
        return dict.fromkeys(keys, content)
    return {key: parsed[key] if key in parsed else ctx.input_data.get(key, content) for key in keys}


def _tokens(response: Any) -> int:
    counts = (getattr(response, "input_tokens", 0), getattr(response, "output_tokens", 0))
    return sum(count for count in counts if isinstance(count, int))


async def _in_thread(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a synchronous provider without blocking the event loop; one that returns an awaitable is awaited here."""
    value = await asyncio.to_thread(function, **arguments)
    return await value if inspect.isawaitable(value) else value


def _blocking(tool_executor: Callable[..., Any]) -> Callable[..., Any]:
    """``tool_executor`` as the provider's thread can call it: an async one runs in this loop while the thread waits."""
    if not any(map(inspect.iscoroutinefunction, (tool_executor, type(tool_executor).__call__))):
        return tool_executor
    loop = asyncio.get_running_loop()

    def call(use: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(tool_executor(use), loop).result()

    return call


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

    def failed(self, error: Exception) -> NodeResult:
        """The failed result that ``error`` means. Errors of the run's own store are raised again instead."""
        if is_infrastructure_error(error):
            raise error
        kind = type(error).__name__
        return self.finished(NodeResult(success=False, error=str(error) or kind, error_type=kind), "")

    def finished(self, result: NodeResult, summary: str) -> NodeResult:
        result.latency_ms = int((perf_counter() - self.started) * 1000)
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
