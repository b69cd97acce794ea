"""Asking any object: the async way where there is one, a thread otherwise, and only what the object knows of."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from framework.llm.calls import ask, ask_with_tools, cost_of, tokens_of
from framework.llm.mock import MockLLM
from framework.llm.provider import LLMProvider, LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM

ASK = [{"role": "user", "content": "q"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
WISHES: dict[str, Any] = {"max_tokens": 9, "json_schema": SCHEMA, "model": "m"}


class Native(MockLLM):
    """Has an async way of its own, and says which way it was asked."""

    def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
        return LLMResponse("sync", "m")

    async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
        return LLMResponse(f"async {sorted(keywords)}", "m")


class Wrapped(Native):
    """Overrides only the synchronous method, as a recorder does."""

    def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
        return LLMResponse(threading.current_thread().name, "m")


class Plain:
    """Has one method, with few keywords."""

    def complete(self, messages: Any, system: str = "") -> LLMResponse:
        return LLMResponse(f"{threading.current_thread() is threading.main_thread()}", "m")


async def test_the_async_way_is_taken() -> None:
    reply = await ask(Native(), messages=ASK, **WISHES)
    assert reply.content == "async ['json_schema', 'max_tokens', 'messages', 'model', 'system']"


async def test_a_provider_wrapped_in_its_synchronous_method_is_not_gone_round() -> None:
    assert (await ask(Wrapped(), messages=ASK)).content == "surefoot step"
    llm = Native()
    llm.complete = lambda **keywords: LLMResponse("replaced", "m")  # type: ignore[method-assign]
    assert (await ask(llm, messages=ASK)).content == "replaced"


async def test_an_object_without_an_async_way_runs_in_a_thread_and_gets_what_it_takes() -> None:
    assert (await ask(Plain(), messages=ASK, **WISHES)).content == "False"


async def test_mocks_are_asked_by_the_contract() -> None:
    for llm in (MagicMock(), MagicMock(spec=LLMProvider)):
        llm.complete.return_value = LLMResponse("r", "m")
        assert (await ask(llm, messages=ASK, **{**WISHES, "max_tokens": None})).content == "r"
        llm.complete.assert_called_once_with(messages=ASK, system=None)
    llm = AsyncMock()
    llm.complete.return_value = LLMResponse("awaited", "m")
    assert (await ask(llm, messages=ASK)).content == "awaited"


async def test_an_async_tool_is_run_for_a_synchronous_provider() -> None:
    loop = asyncio.get_running_loop()

    async def run(use: ToolUse) -> ToolResult:
        assert asyncio.get_running_loop() is loop
        return ToolResult(use.id, f"got {use.input['x']}")

    class Sync(ScriptedLLM):
        def complete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
            return super().complete_with_tools(*args, **keywords)

    for kind in (ScriptedLLM, Sync):
        llm = kind([ToolUse("1", "t", {"x": 5}), "done"])
        reply = await ask_with_tools(llm, messages=ASK, tools=[Tool("t", "")], tool_executor=run)
        assert reply.content == "done"


async def test_the_default_async_methods_of_a_provider() -> None:
    class Own(LLMProvider):
        def complete(self, messages: Any, system: Any = "", tools: Any = None, max_tokens: int = 1024) -> LLMResponse:
            return LLMResponse(threading.current_thread().name, "m")

        def complete_with_tools(
            self, messages: Any, system: Any, tools: Any, tool_executor: Any, max_iterations: int = 10
        ) -> LLMResponse:
            return LLMResponse(tool_executor(ToolUse("1", "t", {})).content, "m")

    async def run(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, "from the loop")

    llm = Own()
    assert (await llm.acomplete(ASK, system="s")).content == "surefoot step"
    reply = await llm.acomplete_with_tools(ASK, system="s", tools=[], tool_executor=run)
    assert reply.content == "from the loop"


def test_counts_of_a_reply_of_another_make() -> None:
    assert (tokens_of(MagicMock()), cost_of(MagicMock())) == (0, 0.0)
    assert (tokens_of(LLMResponse("", "m", 2, 3)), cost_of(LLMResponse("", "m"))) == (5, 0.0)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "Mock reply: q"),
        ({"type": "string", "enum": ["b", "a"]}, "b"),
        ({"const": 4}, 4),
        ({"type": "array", "items": {"type": "integer", "minimum": 3}, "minItems": 2}, [3, 3]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"type": ["boolean", "null"]}, True),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"k": {"type": "number"}}}}}, {"k": 1}),
        ({"type": "object", "properties": {"a": {}, "b": {"type": "boolean"}}}, {"a": "Mock a: q", "b": True}),
    ],
)
async def test_the_mock_follows_a_schema_and_says_the_same_every_time(schema: dict[str, Any], expected: Any) -> None:
    import json

    replies = [await ask(MockLLM(), messages=ASK, json_schema=schema) for _ in range(2)]
    assert replies[0] == replies[1]
    assert json.loads(replies[0].content) == expected
    assert replies[0].cost == 0.0


async def test_the_mock_without_a_schema_and_with_tools() -> None:
    llm = MockLLM()
    assert (await ask(llm, messages=ASK)).content == "Mock reply to: q"
    reply = await ask_with_tools(llm, messages=ASK, tools=[Tool("t", "")], tool_executor=MagicMock())
    assert reply.content == "Mock reply to: q"
    recursive: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert "next" in (await ask(llm, messages=ASK, json_schema=recursive)).content
