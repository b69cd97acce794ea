"""Any model that LiteLLM knows, over its package. A further extra: it is by far the largest of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from framework._secrets import register_named, register_secret
from framework.errors import LLMUnavailable
from framework.llm.failures import translate
from framework.llm.json_schemas import is_strict
from framework.llm.openai import count_of, read_calls, tool_to_openai_format, translated
from framework.llm.prices import cost_of_call, price_of
from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolExecutor
from framework.llm.sdk import MAX_TOKENS
from framework.llm.tool_loop import Conversation, Patience, Turn, talk

TIMEOUT_SECONDS = 300.0
"""Longest time of a call when nobody says: a whole reply, since these are not streamed."""


class LiteLLMProvider(LLMProvider):
    """``model`` as LiteLLM names it, such as ``gemini/gemini-2.5-flash``. It runs in worker threads when asked async.

    Without an ``api_key`` LiteLLM reads the vendor's own environment variable. ``api_base`` is the endpoint's URL.
    Further keywords go to each call: ``timeout`` (seconds for the whole reply, 300 unless given), ``temperature`` ...
    LiteLLM's own retries are off; ``request_retries`` bounds how often one request inside a tool loop is made again.
    The attribute ``max_tokens`` is the longest reply that nodes ask for which do not say themselves.
    Raises ImportError when the package is not installed.
    """

    supports_json_schema: ClassVar[bool] = True
    supports_model: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "gpt-4o-mini",
        api_key: str | None = None,
        api_base: str | None = None,
        *,
        request_retries: int = 2,
        **kwargs: Any,
    ) -> None:
        if not is_installed():
            raise ImportError(
                "LiteLLMProvider needs the package 'litellm'. Install it with: pip install \"surefoot[litellm]\""
            )
        price_of(model)  # a file of prices that cannot be used is said now, not after the first paid call
        register_secret(api_key)
        register_named("api_base", api_base)
        self.model = model
        self.api_key = api_key
        self.api_base = api_base
        self.max_tokens = MAX_TOKENS
        self.patience = Patience(request_retries)
        self.extra_kwargs = kwargs

    def __repr__(self) -> str:
        return f"LiteLLMProvider(model={self.model!r})"

    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int | None = 1024,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """Ask once. Tool calls give a response that has the calls, a list of `ToolUse`, as ``raw_response``.

        ``max_tokens`` None means the provider's own. Raises `LLMError`.
        """
        return self._turn(list(messages), system, tools or (), max_tokens, json_schema, model).response

    def complete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: ToolExecutor,
        max_iterations: int = 10,
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """Ask until the model calls no tool, as the other providers do. Raises `LLMError`, and what a tool raises."""
        conversation = Conversation(messages, model or self.model, max_iterations, tools)
        return talk(
            conversation,
            lambda talked: self._turn(talked, system, tools, max_tokens, json_schema, model),
            tool_executor,
            self.patience,
        )

    def turn(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> Turn:
        """One reply of `complete_with_tools`, with the tool calls it makes. Raises `LLMError`."""
        return self._turn(list(messages), system, tools, max_tokens or 4096, json_schema, model)

    def _tool_to_openai_format(self, tool: Tool) -> dict[str, Any]:
        return tool_to_openai_format(tool)

    def _turn(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None,
        json_schema: Mapping[str, Any] | None,
        model: str | None,
    ) -> Turn:
        litellm = import_module("litellm")
        name = model or self.model
        talked: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for message in messages:
            talked += translated(message)
        request: dict[str, Any] = {
            "model": name,
            "messages": talked,
            "max_tokens": max_tokens or self.max_tokens,
            "num_retries": 0,
            "timeout": TIMEOUT_SECONDS,
        }
        request |= {key: value for key, value in (("api_key", self.api_key), ("api_base", self.api_base)) if value}
        if tools:
            request["tools"] = [self._tool_to_openai_format(tool) for tool in tools]
        if json_schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": dict(json_schema), "strict": is_strict(json_schema)},
            }
            request["drop_params"] = True  # models without it answer all the same
        try:
            reply = litellm.completion(**{**request, **self.extra_kwargs})
        except Exception as error:
            problem = translate(error, f"LiteLLM ({name})")
            if problem is None:
                raise
            raise problem from error
        return _read(reply, name)


def is_installed() -> bool:
    """Whether the package litellm is there; it is not imported for this."""
    try:
        return find_spec("litellm") is not None
    except ValueError:  # a module without a spec stands in for it
        return True


def _read(reply: Any, name: str) -> Turn:
    choice = reply.choices[0]
    if choice.finish_reason is None:
        raise LLMUnavailable(f"LiteLLM ({name}) broke off: the reply has no finish reason. It is not used.")
    text = choice.message.content or ""
    calls = [
        (call.id, call.function.name, call.function.arguments)
        for call in getattr(choice.message, "tool_calls", None) or ()
    ]
    uses, refused, asked = read_calls(calls, text)
    usage = getattr(reply, "usage", None)
    tokens_in, tokens_out = count_of(usage, "prompt_tokens"), count_of(usage, "completion_tokens")
    cached = count_of(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
    told = getattr(reply, "model", None)
    model = told if isinstance(told, str) and told else name
    response = LLMResponse(
        content=text,
        model=model,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        stop_reason=choice.finish_reason if isinstance(choice.finish_reason, str) else "",
        raw_response=list(uses) if uses else reply,
        cost=_cost(model, name, tokens_in, tokens_out, cached) if usage else None,
    )
    return Turn(response, tuple(uses), refused, asked)


def _cost(model: str, asked: str, tokens_in: int, tokens_out: int, cached: int) -> float | None:
    cost = cost_of_call(model, tokens_in, tokens_out, cached)
    return cost if cost is not None else cost_of_call(asked, tokens_in, tokens_out, cached)
