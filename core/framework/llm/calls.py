"""How this library asks a language model: by its async way when it has one, in a thread of its own otherwise.

Any object with the two methods of `LLMProvider` will do; what it does not know of is not passed to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framework.llm.provider import AsyncToolExecutor, LLMProvider, LLMResponse, Message, Tool
from framework.llm.threads import Watch, in_thread
from framework.llm.tool_loop import blocking, is_async


async def ask(
    llm: Any,
    *,
    messages: Sequence[Message],
    system: str | None = None,
    max_tokens: int | None = None,
    json_schema: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> LLMResponse:
    """One reply of ``llm``, without blocking the event loop. Raises what the provider raises.

    ``max_tokens``, ``json_schema`` and ``model`` are wishes: an object that does not take them answers without.
    ``max_tokens`` None means the provider's own, see `method_of`.
    """
    method = method_of(llm, "complete")
    keywords = wishes(llm, method, max_tokens=max_tokens, json_schema=json_schema, model=model)
    response: LLMResponse = await _call(method, None, messages=messages, system=system, **keywords)
    return response


async def ask_with_tools(
    llm: Any,
    *,
    messages: Sequence[Message],
    system: str | None = None,
    tools: Sequence[Tool],
    tool_executor: AsyncToolExecutor,
    max_iterations: int | None = None,
    max_tokens: int | None = None,
    json_schema: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> LLMResponse:
    """The reply of ``llm`` once it calls no tool any more, without blocking the event loop.

    ``tool_executor`` may be async; one that is not runs in a thread. Raises what it and the provider raise. Once
    this is cancelled no further tool call begins.
    """
    method = method_of(llm, "complete_with_tools")
    keywords = wishes(
        llm, method, max_iterations=max_iterations, max_tokens=max_tokens, json_schema=json_schema, model=model
    )
    executor, watch = (tool_executor, None) if is_async(method) else blocking(tool_executor)
    response: LLMResponse = await _call(
        method, watch, messages=messages, system=system, tools=tools, tool_executor=executor, **keywords
    )
    return response


def tokens_of(response: Any) -> int:
    """Input and output tokens of a reply; 0 for what a reply of another make does not say."""
    return input_tokens_of(response) + output_tokens_of(response)


def input_tokens_of(response: Any) -> int:
    """Input tokens of a reply, 0 when it does not say."""
    return _count(getattr(response, "input_tokens", 0))


def output_tokens_of(response: Any) -> int:
    """Output tokens of a reply, 0 when it does not say."""
    return _count(getattr(response, "output_tokens", 0))


def cost_of(response: Any) -> float:
    """What a reply cost in US dollars; 0.0 when no price is known."""
    cost = getattr(response, "cost", None)
    return float(cost) if isinstance(cost, (int, float)) else 0.0


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def method_of(llm: Any, name: str = "complete") -> Callable[..., Any]:
    """The method to ask ``llm`` by: the async twin of ``name`` when it has one of its own, else ``name`` itself.

    For callers with threads of their own; what is not async blocks. A caller that does not say ``max_tokens`` asks for
    the provider's own: what the attribute ``max_tokens`` of ``llm`` says, when it has one.
    """
    method: Callable[..., Any] = getattr(llm, name)
    method = method if is_async(method) else _async_twin(llm, name) or method
    own = getattr(llm, "max_tokens", None)
    if type(own) is int and own > 0 and _takes(method, "max_tokens"):
        return functools.partial(method, max_tokens=own)
    return method


def turn_of(llm: Any, *, asynchronous: bool) -> Callable[..., Any] | None:
    """What gives one `Turn` of a conversation with tools, so that the caller can drive it (`framework.llm.tool_loop`).

    ``aturn`` when there is one and ``asynchronous``, else ``turn``; ``None`` for a provider without, or one that a more
    special class, or the object, wrapped in ``complete_with_tools``: that must not be gone round.
    """
    ways = {"complete_with_tools", "acomplete_with_tools"}
    if ways & set(getattr(llm, "__dict__", ())):
        return None
    for cls in type(llm).__mro__:
        found = vars(cls)
        if asynchronous and inspect.iscoroutinefunction(found.get("aturn")):
            given: Callable[..., Any] = llm.aturn
            return given
        if inspect.isfunction(found.get("turn")):
            given = llm.turn
            return given
        if ways & set(found):
            return None
    return None


async def _call(method: Callable[..., Any], watch: Watch | None, **keywords: Any) -> Any:
    if is_async(method):
        return await method(**keywords)
    value = await in_thread(functools.partial(method, **keywords), watch=watch)
    return await value if inspect.isawaitable(value) else value


def _async_twin(llm: Any, name: str) -> Callable[..., Any] | None:
    """The async twin of a method, unless a more special class, or the object, overrides only the synchronous one:
    a provider that was wrapped, counted or replaced there must not be gone round.

    Looked for in the classes, not on the object: a mock has every attribute one asks it for.
    """
    if name in getattr(llm, "__dict__", ()):
        return None
    for cls in type(llm).__mro__:
        if cls is LLMProvider:
            return None  # its own twins are threads too
        if inspect.iscoroutinefunction(vars(cls).get(f"a{name}")):
            twin: Callable[..., Any] = getattr(llm, f"a{name}")
            return twin
        if name in vars(cls):
            return None
    return None


def wishes(llm: Any, method: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """The wishes that are set and that ``llm`` takes."""
    found = {name: value for name, value in wanted.items() if value is not None}
    # `is True`, because any attribute of a mock is truthy.
    if "json_schema" in found and getattr(llm, "supports_json_schema", False) is not True:
        del found["json_schema"]
    if "model" in found and getattr(llm, "supports_model", False) is not True:
        del found["model"]
    return {name: value for name, value in found.items() if _takes(method, name)}


def _takes(method: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a callable that does not tell
        return True
    return keyword in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
