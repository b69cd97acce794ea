"""What a model costs, which provider serves it, and the LiteLLM provider over a stand-in for its package."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.errors import LLMRateLimited, LLMUnavailable, SurefootError
from framework.llm import AnthropicProvider, LiteLLMProvider, MockLLM, OpenAIProvider, prices
from framework.llm.calls import ask
from framework.llm.choose import UnknownModel, key_variable, missing_key, provider_for
from framework.llm.failures import retry_after, translate
from framework.llm.json_schemas import is_strict, schema_of_keys
from framework.llm.openai import tool_to_openai_format
from framework.llm.prices import InvalidPrices, cost_of_call, price_of, register_price
from framework.llm.provider import Tool, ToolResult, ToolUse

ASK = [{"role": "user", "content": "q"}]

# --- prices -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "_registered", {})
    monkeypatch.setattr(prices, "_file", None)
    monkeypatch.delenv(prices.VARIABLE, raising=False)


def test_a_model_that_is_not_known_has_no_price() -> None:
    assert cost_of_call("some-local-model", 1000, 1000) is None
    # Another model whose name merely begins alike is not the same model.
    assert price_of("gpt-4o-realtime-preview") is None
    assert price_of("gpt-4o-mini-2024-07-18") == price_of("openai/gpt-4o-mini") == price_of("gpt-4o-mini")
    assert price_of("claude-haiku-4-5-20251001") is not None


def test_cost_of_a_call() -> None:
    assert cost_of_call("gpt-4o-mini", 1_000_000, 1_000_000) == pytest.approx(0.75)
    assert cost_of_call("gpt-4o-mini", 1_000_000, 0, cached=1_000_000) == pytest.approx(0.075)


def test_what_is_registered_goes_before_the_file_and_that_before_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"gpt-4o": {"input": 1, "output": 1}, "my-*": {"input": 4, "output": 5}}))
    monkeypatch.setenv(prices.VARIABLE, str(file))
    assert cost_of_call("gpt-4o", 1_000_000, 0) == 1
    assert cost_of_call("my-model-7b", 0, 1_000_000) == 5
    register_price("gpt-4o", input=7, output=8)
    register_price("my-model-*", input=0, output=0)
    assert cost_of_call("gpt-4o-2024-08-06", 1_000_000, 0) == 7
    assert cost_of_call("my-model-7b", 0, 1_000_000) == 0
    with pytest.raises(ValueError, match="from 0 on, not -1"):
        register_price("x", input=-1, output=0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"m": {"input": 1}}', 'has to be an object with "input" and "output"'),
        ('{"m": {"input": "1", "output": 2}}', "has to be in numbers, not '1'"),
        ('{"m": {"input": -1, "output": 2}}', "from 0 on"),
    ],
)
def test_a_file_of_prices_that_is_wrong_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    file = tmp_path / "prices.json"
    file.write_text(text)
    monkeypatch.setenv(prices.VARIABLE, str(file))
    with pytest.raises(InvalidPrices, match=problem):
        price_of("m")
    with pytest.raises(InvalidPrices, match=problem):  # before anything is paid for
        OpenAIProvider("m", api_key="k" * 9)
    assert cost_of_call("m", 1, 1) is None  # and never after
    monkeypatch.setenv(prices.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(InvalidPrices, match="none.json"):
        price_of("m")


def test_a_cost_is_never_the_reason_why_a_paid_call_fails() -> None:
    mock: Any = MagicMock()
    assert cost_of_call(mock, 1, 1) is None
    assert cost_of_call("gpt-4o", mock, 1) is None
    assert cost_of_call("gpt-4o", 1, 1, cached=mock) is None


# --- which provider ---------------------------------------------------------------------------------------------------


def test_the_name_says_which_provider() -> None:
    for name in ("claude-haiku-4-5", "anthropic/claude-haiku-4-5"):
        llm = provider_for(name, api_key="k" * 9)
        assert isinstance(llm, AnthropicProvider)
        assert llm.model == "claude-haiku-4-5"
    for name in ("gpt-4o", "o3-mini", "openai/whatever"):
        assert isinstance(provider_for(name, api_key="k" * 9, timeout_seconds=3), OpenAIProvider)
    local = provider_for("llama3.1:8b", base_url="http://127.0.0.1:1/v1")
    assert isinstance(local, OpenAIProvider)
    assert (local.model, local.base_url) == ("llama3.1:8b", "http://127.0.0.1:1/v1")
    assert isinstance(provider_for("mock"), MockLLM)


def test_a_model_nobody_serves_is_one_clear_error() -> None:
    with pytest.raises(UnknownModel, match=r"surefoot\[litellm\]") as caught:
        provider_for("gemini/gemini-2.5-flash")
    assert isinstance(caught.value, SurefootError)
    with pytest.raises(ImportError, match=r'pip install "surefoot\[litellm\]"'):
        LiteLLMProvider()


def test_which_key_a_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_variable("claude-x") == "ANTHROPIC_API_KEY"
    assert key_variable("gpt-4o") == "OPENAI_API_KEY"
    assert key_variable("gemini/x") == "GEMINI_API_KEY"
    assert key_variable("mock") is key_variable("llama") is None
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert missing_key("gpt-4o") == "OPENAI_API_KEY"
    monkeypatch.setenv("OPENAI_API_KEY", "set")
    assert missing_key("gpt-4o") is missing_key("mock") is None


# --- LiteLLM ----------------------------------------------------------------------------------------------------------


def reply_of(content: str | None, *calls: tuple[str, str, str], finish: str | None = "stop") -> SimpleNamespace:
    tool_calls = [
        SimpleNamespace(id=each, function=SimpleNamespace(name=name, arguments=given)) for each, name, given in calls
    ]
    message = SimpleNamespace(content=content, tool_calls=tool_calls or None)
    usage = SimpleNamespace(prompt_tokens=10, completion_tokens=4, prompt_tokens_details=None)
    choice = SimpleNamespace(message=message, finish_reason=finish)
    return SimpleNamespace(choices=[choice], usage=usage, model="gpt-4o-mini")


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of that name with the one function, which takes its replies from ``replies`` and keeps its requests."""
    module: Any = ModuleType("litellm")
    module.replies, module.requests = [], []

    def completion(**request: Any) -> Any:
        module.requests.append(request)
        reply = module.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    module.completion = completion
    monkeypatch.setitem(sys.modules, "litellm", module)
    return module


def test_litellm_is_asked_as_its_package_wants(litellm: Any) -> None:
    llm = provider_for("gemini/flash", api_key="k" * 9)
    assert isinstance(llm, LiteLLMProvider)
    litellm.replies += [reply_of("hello", finish="length")]
    reply = llm.complete(messages=ASK, system="s", max_tokens=5, json_schema={"type": "object"})
    assert (reply.content, reply.input_tokens, reply.output_tokens) == ("hello", 10, 4)
    assert reply.stop_reason == "length"
    assert reply.cost == pytest.approx((10 * 0.15 + 4 * 0.6) / 1e6)
    request = litellm.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "s"}
    assert (request["model"], request["max_tokens"], request["num_retries"]) == ("gemini/flash", 5, 0)
    assert request["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert request["timeout"] == 60.0
    assert "k" * 9 not in repr(llm)


def test_litellm_tools(litellm: Any) -> None:
    llm = LiteLLMProvider(api_base="http://127.0.0.1:1")
    tool = Tool("add", "Adds.", {"properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert llm._tool_to_openai_format(tool) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
    litellm.replies += [
        reply_of(None, ("1", "add", '{"a": 1}'), ("2", "add", "{"), ("3", "rm", "{}"), finish="tool_calls"),
        reply_of("3"),
    ]
    used: list[ToolUse] = []

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "boom", is_error=True)

    reply = llm.complete_with_tools(messages=ASK, system=None, tools=[tool], tool_executor=run)
    assert (reply.content, reply.input_tokens) == ("3", 20)
    assert used == [ToolUse("1", "add", {"a": 1})]
    told = {each["tool_call_id"]: each["content"] for each in litellm.requests[1]["messages"] if each["role"] == "tool"}
    assert told["1"] == "Error: boom"
    assert "JSON object" in told["2"]
    assert "no tool 'rm'" in told["3"]
    assert litellm.requests[0]["api_base"] == "http://127.0.0.1:1"


def test_litellm_errors(litellm: Any) -> None:
    class APIError(Exception):
        status_code = 429
        response = SimpleNamespace(headers={"retry-after": "3"})

    litellm.replies += [APIError("slow down"), reply_of("half", finish=None), TypeError("a bug")]
    llm = LiteLLMProvider()
    with pytest.raises(LLMRateLimited, match="slow down") as caught:
        llm.complete(messages=ASK)
    assert caught.value.retry_after == 3
    with pytest.raises(LLMUnavailable, match="no finish reason"):
        llm.complete(messages=ASK)
    with pytest.raises(TypeError, match="a bug"):
        llm.complete(messages=ASK)


def test_litellm_replies_may_be_mocks(litellm: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As a program's tests patch ``litellm.completion``: what they do not set is a mock too."""
    for finish in ("stop", None):
        reply = MagicMock()
        reply.choices[0].message.content = "Hello!"
        reply.choices[0].message.tool_calls = None
        reply.usage.prompt_tokens, reply.usage.completion_tokens = 10, 5
        if finish is not None:
            reply.choices[0].finish_reason = finish
        litellm.replies.append(reply)
        made = LiteLLMProvider().complete(messages=ASK)
        assert (made.content, made.model, made.stop_reason) == ("Hello!", "gpt-4o-mini", finish or "")
        assert (made.input_tokens, made.output_tokens) == (10, 5)
        assert made.cost == pytest.approx((10 * 0.15 + 5 * 0.6) / 1e6)


async def test_litellm_has_time_limits_and_limits_of_length(litellm: Any) -> None:
    litellm.replies += [reply_of("a") for _ in range(4)]
    llm = LiteLLMProvider()
    llm.complete(messages=ASK)
    await ask(llm, messages=ASK)
    llm.complete_with_tools(messages=ASK, system="", tools=[], tool_executor=MagicMock())
    LiteLLMProvider(timeout=7).complete(messages=ASK)
    assert [(each["timeout"], each["max_tokens"]) for each in litellm.requests] == [
        (300.0, 1024),
        (300.0, 4096),
        (300.0, 4096),
        (7, 1024),
    ]


def test_litellm_makes_one_request_of_a_tool_loop_again(litellm: Any) -> None:
    litellm.replies += [reply_of(None, ("1", "add", "{}"), finish="tool_calls"), TimeoutError("late"), reply_of("3")]
    llm, used = LiteLLMProvider(), list[ToolUse]()
    llm.patience = replace(llm.patience, sleep=lambda _: None)

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "1")

    reply = llm.complete_with_tools(messages=ASK, system="", tools=[Tool("add", "Adds.")], tool_executor=run)
    assert (reply.content, len(used)) == ("3", 1)


# --- the pure parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after-ms": "20", "retry-after": "9"}, 0.02),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2020 07:28:30 GMT"}, 0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "later"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, datetime(2026, 10, 21, 7, 28, tzinfo=UTC)) == seconds


def test_what_is_no_error_of_a_client_is_not_translated() -> None:
    assert translate(KeyError("x"), "who") is None
    assert isinstance(translate(TimeoutError("x"), "who"), SurefootError)


def test_schemas() -> None:
    made = schema_of_keys(["a", "b"], optional={"b": 1})
    assert (list(made["properties"]), made["required"]) == (["a", "b"], ["a"])
    assert not is_strict(made)
    leaf = {"type": "string"}
    strict = {"type": "object", "properties": {"a": leaf}, "required": ["a"], "additionalProperties": False}
    assert is_strict(strict)
    assert is_strict({"type": "array", "items": {"anyOf": [strict, {"$ref": "#/$defs/x"}]}, "$defs": {"x": leaf}})
    for loose in (
        {},
        {**strict, "required": []},
        {**strict, "additionalProperties": True},
        {"type": "array"},
        {"type": "array", "items": {}},
        {"anyOf": [leaf, {}]},
        {**strict, "$defs": {"x": {}}},
        "text",
    ):
        assert not is_strict(loose)


def test_a_list_of_anything_is_told_to_openai_with_the_items_it_asks_for() -> None:
    tool = Tool("sort", "Sorts.", {"properties": {"values": {"type": "array"}, "by": {"type": "string"}}})
    properties = tool_to_openai_format(tool)["function"]["parameters"]["properties"]
    assert properties == {"values": {"type": "array", "items": {}}, "by": {"type": "string"}}
    assert tool.parameters["properties"]["values"] == {"type": "array"}, "the tool itself is not changed"
