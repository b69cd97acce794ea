"""Both vendors' providers over real HTTP: replies, tools, errors, broken streams, and what is left open at the end."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import LLMError, LLMRateLimited, LLMRefused, LLMTimeout, LLMUnavailable
from framework.llm.calls import ask, ask_with_tools
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.sdk import SDKProvider

if TYPE_CHECKING:
    from tests.llm.conftest import RawServer, Server

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = Tool("weather", "The weather.", {"properties": {"city": {"type": "string"}}, "required": ["city"]})
TIME = Tool("clock", "The time.")
KEY = "sk-secret-0123456789abcdef"

Make = Callable[..., SDKProvider]


@pytest.fixture(params=["openai", "anthropic"])
def make(request: pytest.FixtureRequest, server: Server) -> Make:
    made: Make = getattr(server, request.param)
    return made


@pytest.fixture(params=["sync", "async"])
def complete(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``complete`` the blocking way, or the other way in an event loop of its own."""
    if request.param == "sync":
        return lambda llm, **given: llm.complete(messages=ASK, **given)
    return lambda llm, **given: asyncio.run(llm.acomplete(messages=ASK, **given))


def ended(llm: SDKProvider) -> str:
    """The endpoint's own word for a reply that is whole."""
    return "stop" if llm.vendor == "OpenAI" else "end_turn"


def run_tool(use: ToolUse) -> ToolResult:
    return ToolResult(use.id, f"{use.name} of {use.input}")


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_reply(server: Server, make: Make, complete: Any) -> None:
    server.reply("It is sunny.")
    llm = make()
    reply = complete(llm, system="Be brief.", max_tokens=77)
    assert (reply.content, reply.stop_reason, reply.model) == ("It is sunny.", ended(llm), llm.model)
    assert reply.input_tokens > 0
    assert reply.output_tokens > 0
    assert reply.cost > 0
    sent = server.requests()[0]["body"]
    assert sent["stream"] is True
    assert "Be brief." in json.dumps(sent)
    assert 77 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))
    llm.close()


def test_another_model_and_no_system_prompt(server: Server, make: Make) -> None:
    server.reply("ok")
    llm = make()
    llm.complete(messages=ASK, system=None, model="other-model")
    sent = server.requests()[0]["body"]
    assert sent["model"] == "other-model"
    assert "system" not in json.dumps(sent["messages"])
    assert "system" not in sent
    llm.close()


def test_a_reply_cut_at_max_tokens_says_so(server: Server, make: Make) -> None:
    llm = make()
    reason = "length" if llm.vendor == "OpenAI" else "max_tokens"
    server.reply("half", finish_reason=reason)
    assert llm.complete(messages=ASK).stop_reason == reason
    llm.close()


# --- tools ------------------------------------------------------------------------------------------------------------


def test_tool_calls_of_one_reply_are_all_answered(server: Server, make: Make) -> None:
    server.call_tools(("weather", {"city": "Paris"}), ("weather", {"city": "Rome"}))
    server.reply("Both sunny.")
    llm, used = make(), list[ToolUse]()

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return run_tool(use)

    reply = llm.complete_with_tools(messages=ASK, system="", tools=[WEATHER], tool_executor=run)
    assert reply.content == "Both sunny."
    assert [use.input for use in used] == [{"city": "Paris"}, {"city": "Rome"}]
    first, second = (each["body"] for each in server.requests())
    assert "Both sunny." not in json.dumps(first)
    assert all(use.id in json.dumps(second["messages"]) for use in used)
    assert json.dumps(second["messages"]).count("weather of") == 2
    assert reply.input_tokens > 0
    llm.close()


async def test_an_async_tool_runs_in_the_loop_and_another_one_beside_it(server: Server, make: Make) -> None:
    llm, loop = make(), asyncio.get_running_loop()
    seen: list[bool] = []

    async def run_async(use: ToolUse) -> ToolResult:
        seen.append(asyncio.get_running_loop() is loop)
        return run_tool(use)

    def run_sync(use: ToolUse) -> ToolResult:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append(True)
        return run_tool(use)

    for run in (run_async, run_sync):
        server.call_tools(("weather", {"city": "Paris"}))
        server.reply("Sunny.")
        reply = await ask_with_tools(llm, messages=ASK, tools=[WEATHER], tool_executor=run)
        assert reply.content == "Sunny."
    assert seen == [True, True]
    await llm.aclose()


def test_broken_arguments_and_tools_that_were_not_offered_are_not_run(server: Server, make: Make) -> None:
    server.queue({"type": "tool_fault", "kind": "malformed_arguments"}, {"type": "tool_fault", "kind": "unknown_tool"})
    server.call_tools(("weather", {"city": "Paris"}))
    server.call_tools(("weather", {"city": "Paris"}))
    server.reply("I give up.")
    llm, used = make(), list[ToolUse]()

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return run_tool(use)

    reply = llm.complete_with_tools(messages=ASK, system="", tools=[WEATHER], tool_executor=run)
    assert reply.content == "I give up."
    assert used == []
    talks = [json.dumps(each["body"]["messages"]) for each in server.requests()]
    assert "have to be a JSON object" in talks[1]
    assert "There is no tool" in talks[2]
    llm.close()


def test_a_loop_that_does_not_end(server: Server, make: Make) -> None:
    server.queue({"type": "reply", "tool_calls": [{"name": "weather", "arguments": {}}], "times": 3})
    llm = make()
    reply = llm.complete_with_tools(messages=ASK, system="", tools=[WEATHER], tool_executor=run_tool, max_iterations=3)
    assert reply.stop_reason == "max_iterations"
    assert len(server.requests()) == 3
    assert reply.output_tokens > 0
    llm.close()


def test_what_a_tool_raises_is_raised_and_the_calls_before_it_are_not_forgotten(server: Server, make: Make) -> None:
    from framework.llm.tool_loop import paid_before

    server.call_tools(("weather", {"city": "Paris"}))

    def broken(use: ToolUse) -> ToolResult:
        raise ZeroDivisionError(use.name)

    llm = make()
    with pytest.raises(ZeroDivisionError, match="weather") as caught:
        llm.complete_with_tools(messages=ASK, system="", tools=[WEATHER], tool_executor=broken)
    paid = paid_before(caught.value)
    assert paid is not None
    assert paid.input_tokens > 0
    llm.close()


def test_complete_hands_out_the_calls_it_does_not_run(server: Server, make: Make) -> None:
    server.call_tools(("weather", {"city": "Paris"}))
    llm = make()
    reply = llm.complete(messages=ASK, tools=[WEATHER, TIME])
    assert reply.stop_reason == ("tool_calls" if llm.vendor == "OpenAI" else "tool_use")
    assert [(use.name, use.input) for use in reply.raw_response] == [("weather", {"city": "Paris"})]
    assert len(server.requests()[0]["body"]["tools"]) == 2
    llm.close()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "transient"),
    [
        (400, LLMRefused, False),
        (401, LLMRefused, False),
        (403, LLMRefused, False),
        (404, LLMRefused, False),
        (422, LLMRefused, False),
        (408, LLMTimeout, True),
        (429, LLMRateLimited, True),
        (500, LLMUnavailable, True),
        (503, LLMUnavailable, True),
        (529, LLMRateLimited, True),
    ],
)
def test_each_status_is_an_error_of_its_kind_after_one_request(
    server: Server, make: Make, complete: Any, status: int, kind: type[LLMError], transient: bool
) -> None:
    server.queue({"type": "fail", "status": status, "message": f"no, {KEY}!", "retry_after": 7})
    llm = make()
    with pytest.raises(kind) as caught:
        complete(llm)
    error = caught.value
    assert (type(error), error.transient, error.status) == (kind, transient, status)
    assert error.retry_after == 7 or status != 429
    assert KEY not in str(error)
    assert "no, ***!" in str(error)
    assert len(server.requests()) == 1  # the client's own retries are off
    llm.close()


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ({"kind": "truncate", "after_chunks": 3}, LLMUnavailable, "broke off"),
        ({"kind": "disconnect", "after_chunks": 3}, LLMUnavailable, "broke off its reply"),
        ({"kind": "stall", "after_chunks": 3, "stall_seconds": 0.6}, LLMTimeout, "did not answer in time"),
    ],
)
def test_no_half_reply_is_taken_for_a_whole_one(
    server: Server, make: Make, complete: Any, fault: dict[str, Any], kind: type[LLMError], text: str
) -> None:
    server.queue({"type": "stream_fault", **fault})
    server.reply("one two three four five six seven eight nine ten")
    llm = make(timeout_seconds=0.2)
    with pytest.raises(kind, match=text) as caught:
        complete(llm)
    assert caught.value.transient
    llm.close()


def test_silence_before_the_reply_is_a_timeout(server: Server, make: Make, complete: Any) -> None:
    server.queue({"type": "delay", "seconds": 0.6})
    llm = make(timeout_seconds=0.15)
    with pytest.raises(LLMTimeout):
        complete(llm)
    llm.close()


def test_nobody_listens(make: Make, complete: Any) -> None:
    llm = make()
    llm.base_url = "http://127.0.0.1:9"
    with pytest.raises(LLMUnavailable, match="cannot be reached"):
        complete(llm)
    llm.close()


def test_a_bug_is_not_called_an_error_of_the_provider(make: Make, complete: Any) -> None:
    llm = make(no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        complete(llm)


# --- event loops ------------------------------------------------------------------------------------------------------


async def test_the_loop_goes_on_while_a_model_thinks(server: Server, make: Make) -> None:
    llm = make()
    await ask(llm, messages=ASK)  # the first call also imports the client
    server.queue({"type": "delay", "seconds": 0.5})
    turns = 0
    task = asyncio.create_task(ask(llm, messages=ASK))
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20, "a loop that is blocked takes a handful of turns"
    await llm.aclose()


async def test_a_cancelled_call_closes_its_connection(server: Server, make: Make) -> None:
    llm = make()
    server.queue({"type": "delay", "seconds": 1})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await ask(llm, messages=ASK)
    server.reply("still there")
    assert (await ask(llm, messages=ASK)).content == "still there"
    await llm.aclose()


def test_one_provider_serves_many_loops_and_leaves_nothing_open(server: Server, make: Make) -> None:
    llm = make()

    async def many() -> list[LLMResponse]:
        return await asyncio.gather(*(ask(llm, messages=ASK) for _ in range(5)))

    for _ in range(3):
        assert len(asyncio.run(many())) == 5
    assert llm._async_clients == {}
    gc.collect()  # an open connection would warn here, and warnings are errors


async def test_a_closed_provider_can_be_used_again(server: Server, make: Make) -> None:
    llm = make()
    for _ in range(2):
        await ask(llm, messages=ASK)
        assert len(llm._async_clients) == 1
        await llm.aclose()
        assert llm._async_clients == {}
        await asyncio.to_thread(llm.complete, messages=ASK)
        llm.close()


# --- structured output ------------------------------------------------------------------------------------------------

STRICT = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
LOOSE = {"type": "object", "properties": {"city": {}}, "required": ["city"], "additionalProperties": False}


@pytest.mark.parametrize("schema", [STRICT, LOOSE])
def test_a_json_schema_is_asked_for_and_followed(server: Server, make: Make, schema: dict[str, Any]) -> None:
    llm = make()
    enforced = llm.vendor == "Anthropic" and schema is STRICT
    if enforced:  # this server answers tool calls and OpenAI's schemas by itself, not Anthropic's
        server.reply('{"city": "Paris", "degrees": 21}')
    reply = llm.complete(messages=ASK, json_schema=schema)
    assert set(json.loads(reply.content)) == set(schema["required"])
    assert reply.stop_reason == ended(llm)
    sent = server.requests()[0]["body"]
    if llm.vendor == "OpenAI":
        assert sent["response_format"]["json_schema"]["strict"] is (schema is STRICT)
        assert sent["response_format"]["json_schema"]["schema"] == schema
    elif enforced:
        assert sent["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    else:
        assert sent["tool_choice"] == {"type": "tool", "name": sent["tools"][0]["name"]}
        assert sent["tools"][0]["input_schema"] == schema
    llm.close()


@pytest.mark.parametrize("schema", [STRICT, LOOSE])
def test_an_endpoint_that_refuses_a_schema_is_asked_without_it_from_then_on(
    server: Server, make: Make, complete: Any, schema: dict[str, Any]
) -> None:
    llm = make()
    # Anthropic's models without structured output are asked for a tool call first.
    ways = 2 if llm.vendor == "Anthropic" and schema is STRICT else 1
    text = "response_format, output_config.format and tool_choice are not supported by this model"
    server.queue({"type": "fail", "status": 400, "message": text, "times": ways})
    for _ in range(2):
        server.reply("plain")
        assert complete(llm, json_schema=schema).content == "plain"
    sent = server.requests()
    assert [each["status"] for each in sent] == [400] * ways + [200, 200]
    assert ['"city"' in json.dumps(each["body"]) for each in sent] == [True] * ways + [False, False]
    server.queue({"type": "fail", "status": 400, "message": text})
    with pytest.raises(LLMRefused):  # without anything to leave out it is simply refused
        complete(llm)
    llm.close()


def test_a_tool_loop_keeps_its_tools_when_a_schema_is_wanted(server: Server, make: Make) -> None:
    server.call_tools(("weather", {"city": "Paris"}))
    server.reply('{"city": "Paris"}')
    llm = make()
    reply = llm.complete_with_tools(messages=ASK, system="", tools=[WEATHER], tool_executor=run_tool, json_schema=LOOSE)
    assert json.loads(reply.content) == {"city": "Paris"}
    assert all("weather" in json.dumps(each["body"]["tools"]) for each in server.requests())
    llm.close()


# --- what only given bytes can show -----------------------------------------------------------------------------------


def chunk(**delta: Any) -> dict[str, Any]:
    finish = delta.pop("finish", None)
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [choice]}


def of_call(index: int, **function: str) -> dict[str, Any]:
    call_id = function.pop("id", None)
    return {"index": index, "id": call_id, "type": "function", "function": function}


def openai_of(raw: RawServer, **more: Any) -> Any:
    from framework.llm.openai import OpenAIProvider

    return OpenAIProvider("gpt-4o", api_key=KEY, base_url=raw.url, **more)


def anthropic_of(raw: RawServer) -> Any:
    from framework.llm.anthropic import AnthropicProvider

    return AnthropicProvider(KEY, base_url=raw.url)


def test_retry_after_in_milliseconds_and_as_a_date(raw: RawServer) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    body = json.dumps({"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}})
    raw.answer(
        {"status": 429, "headers": {"retry-after-ms": "250", "Retry-After": "9"}, "body": body},
        {"status": 429, "headers": {"Retry-After": later}, "body": body},
        {"status": 503, "headers": {"Retry-After": "soon"}, "body": body},
    )
    llm = openai_of(raw)
    found: list[Any] = []
    for _ in range(3):
        with pytest.raises(LLMError) as caught:
            llm.complete(messages=ASK)
        found.append(caught.value.retry_after)
    assert found[0] == 0.25
    assert 80 < found[1] <= 90
    assert found[2] is None
    llm.close()


def test_an_empty_account_is_not_worth_another_attempt(raw: RawServer) -> None:
    error = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
    raw.answer({"status": 429, "headers": {"Content-Type": "application/json"}, "body": json.dumps({"error": error})})
    llm = openai_of(raw)
    with pytest.raises(LLMRefused, match="quota"):
        llm.complete(messages=ASK)
    llm.close()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("overloaded_error", LLMRateLimited), ("api_error", LLMUnavailable), ("invalid_request_error", LLMRefused)],
)
def test_an_error_in_the_middle_of_a_stream(raw: RawServer, kind: str, expected: type[LLMError]) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "in the middle"}}
    raw.answer(raw.stream(error, names=True))
    llm = anthropic_of(raw)
    with pytest.raises(expected, match="in the middle"):
        llm.complete(messages=ASK)
    llm.close()
    raw.answer(raw.stream(chunk(content="Hal"), {"error": {"message": "in the middle", "type": kind}}))
    other = openai_of(raw)
    with pytest.raises(expected, match="in the middle"):
        other.complete(messages=ASK)
    other.close()


def test_calls_that_a_server_does_not_number(raw: RawServer) -> None:
    raw.answer(
        raw.stream(
            chunk(tool_calls=[of_call(0, id="x", name="weather", arguments='{"city": ')]),
            chunk(tool_calls=[of_call(0, arguments='"Paris"}')]),
            chunk(tool_calls=[of_call(0, id="y", name="clock", arguments="")]),
            chunk(finish="stop"),
        )
    )
    llm = openai_of(raw)
    reply = llm.complete(messages=ASK, tools=[WEATHER, TIME])
    assert reply.raw_response == [ToolUse("x", "weather", {"city": "Paris"}), ToolUse("y", "clock", {})]
    assert reply.stop_reason == "stop"  # as this server says it
    assert reply.cost is None  # no usage was told: no price is guessed
    llm.close()


def test_cached_tokens_have_their_own_price_and_a_refusal_is_told(raw: RawServer) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    last = {**chunk(), "choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 600}}}
    raw.answer(raw.stream(chunk(refusal="I will not."), chunk(finish="stop"), last))
    llm = openai_of(raw)
    reply = llm.complete(messages=ASK)
    assert (reply.content, reply.stop_reason, reply.input_tokens) == ("I will not.", "refusal", 1000)
    assert reply.cost == pytest.approx((400 * 2.5 + 600 * 1.25 + 10 * 10) / 1e6)
    llm.close()


def test_options_an_endpoint_does_not_know_are_left_out_from_then_on(raw: RawServer) -> None:
    def refusal(option: str) -> dict[str, Any]:
        body = json.dumps({"error": {"message": f"Unsupported parameter: '{option}'"}})
        return {"status": 400, "headers": {"Content-Type": "application/json"}, "body": body}

    done = raw.stream(chunk(content="ok"), chunk(finish="stop"))
    raw.answer(refusal("stream_options"), refusal("max_tokens"), done, done)
    llm = openai_of(raw)
    assert [llm.complete(messages=ASK).content for _ in range(2)] == ["ok", "ok"]
    seen = raw.seen()
    assert [("stream_options" in each, "max_tokens" in each) for each in seen] == [
        (True, True),
        (False, True),
        (False, False),
        (False, False),
    ]
    assert seen[-1]["max_completion_tokens"] == 1024
    llm.close()


def test_anthropic_counts_cached_input_and_repeats_its_own_blocks(raw: RawServer) -> None:
    usage = {
        "input_tokens": 100,
        "cache_read_input_tokens": 1000,
        "cache_creation_input_tokens": 10,
        "output_tokens": 1,
    }
    message: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5-20251001",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    start = {"type": "message_start", "message": message}

    def block(index: int, begin: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
        pieces = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        first = {"type": "content_block_start", "index": index, "content_block": begin}
        return [first, *pieces, {"type": "content_block_stop", "index": index}]

    def end(reason: str) -> list[dict[str, Any]]:
        delta = {"stop_reason": reason, "stop_sequence": None}
        return [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": 50}}, {"type": "message_stop"}]

    thinking = block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "hmm"},
        {"type": "signature_delta", "signature": "sig"},
    )
    calling = block(
        1,
        {"type": "tool_use", "id": "t", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": '{"city"'},
        {"type": "input_json_delta", "partial_json": ': "Paris"}'},
    )
    text = block(
        0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Sun"}, {"type": "text_delta", "text": "ny"}
    )
    raw.answer(
        raw.stream(start, *thinking, *calling, *end("tool_use"), names=True),
        raw.stream(start, *text, *end("end_turn"), names=True),
    )
    llm = anthropic_of(raw)
    reply = llm.complete_with_tools(messages=ASK, system="s", tools=[WEATHER], tool_executor=run_tool)
    assert (reply.content, reply.input_tokens, reply.output_tokens) == ("Sunny", 2220, 100)
    assert reply.cost == pytest.approx(2 * (100 * 1 + 1000 * 0.1 + 10 * 1.25 + 50 * 5) / 1e6)
    assert raw.seen()[1]["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "hmm", "signature": "sig"},
        {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Paris"}},
    ]
    llm.close()


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_provider_shows_no_key(make: Make) -> None:
    llm = make(default_headers={"X-Api-Key": "header-secret-1"})
    assert KEY not in repr(llm)
    assert KEY not in str(llm)
    from framework._secrets import mask

    assert mask(f"{KEY} header-secret-1") == "*** ***"


def test_no_key_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from framework.llm import AnthropicProvider, OpenAIProvider

    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"\AAnthropic API key required.*ANTHROPIC_API_KEY"):
        AnthropicProvider()
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIProvider("gpt-4o")
    assert OpenAIProvider("llama", base_url="http://127.0.0.1:1").base_url == "http://127.0.0.1:1"
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert AnthropicProvider().model == "claude-haiku-4-5-20251001"


def test_a_client_that_is_not_installed_is_one_clear_error() -> None:
    from framework.llm import OpenAIProvider

    class Missing(OpenAIProvider):
        package = "no_such_client"

    with pytest.raises(ImportError, match=r"Missing needs the package 'no_such_client'.*surefoot\[no_such_client\]"):
        Missing("m", api_key=KEY)


def test_many_threads_share_one_provider(server: Server, make: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server.queue({"type": "reply", "text": "same", "times": 20})
    llm = make()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: llm.complete(messages=ASK).content, range(20)))
    assert replies == ["same"] * 20
    llm.close()
