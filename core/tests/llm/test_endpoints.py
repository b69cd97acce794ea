"""What endpoints do that are not as they should be: options they refuse, replies that never come, and no streams."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import LLMError, LLMRateLimited, LLMRefused, LLMTimeout, LLMUnavailable
from framework.llm.anthropic import AnthropicProvider
from framework.llm.calls import ask, method_of
from framework.llm.openai import OpenAIProvider
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.refusals import refused_option
from framework.llm.scripted import ScriptedLLM
from framework.llm.silence import Silence
from framework.llm.tool_loop import Conversation, Patience, Turn, paid_before, talk, talk_async

if TYPE_CHECKING:
    from tests.llm.conftest import RawServer

ASK = [{"role": "user", "content": "q"}]
KEY = "sk-secret-0123456789abcdef"
TOOL = Tool("add", "Adds.")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [choice]}


def openai_of(raw: RawServer, **more: Any) -> OpenAIProvider:
    return OpenAIProvider("gpt-4o", api_key=KEY, base_url=raw.url, **more)


def json_answer(body: Any, status: int = 200) -> dict[str, Any]:
    return {"status": status, "headers": {"Content-Type": "application/json; charset=utf-8"}, "body": json.dumps(body)}


def error_answer(message: str, **more: Any) -> dict[str, Any]:
    return json_answer({"error": {"message": message, "type": "invalid_request_error", **more}}, 400)


@pytest.fixture(params=["sync", "async"])
def complete(request: pytest.FixtureRequest) -> Callable[..., LLMResponse]:
    if request.param == "sync":
        return lambda llm, **given: llm.complete(messages=ASK, **given)
    return lambda llm, **given: asyncio.run(llm.acomplete(messages=ASK, **given))


# --- options that are refused -----------------------------------------------------------------------------------------

OPENAI = OpenAIProvider.refusable
ANTHROPIC = AnthropicProvider.refusable


@pytest.mark.parametrize(
    ("text", "body", "names", "expected"),
    [
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         {"param": "max_tokens", "code": "unsupported_parameter"}, OPENAI, "max_tokens"),
        ("Unrecognized request argument supplied: stream_options", None, OPENAI, "stream_options"),
        ("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
         {"param": None}, OPENAI, "response_format"),
        ("[{'type': 'extra_forbidden', 'loc': ('body', 'stream_options'), 'msg': 'Extra inputs are not permitted'}]",
         [], OPENAI, "stream_options"),
        ("'response_format.type' must be 'text' or 'json_object'", None, OPENAI, "response_format"),
        ("This response_format type is unavailable now", None, OPENAI, "response_format"),
        ("The model does not support structured outputs.", None, OPENAI, "response_format"),
        ('json: unknown field "stream_options"', None, OPENAI, "stream_options"),
        ("no", {"error": {"param": "stream_options", "code": "unknown_parameter"}}, OPENAI, "stream_options"),
        ("output_config: Extra inputs are not permitted", None, ANTHROPIC, "output_config"),
        ("'claude-3-haiku' does not support output format.", None, ANTHROPIC, "output_config"),
        ("Thinking may not be enabled when tool_choice forces tool use.", None, ANTHROPIC, "tool_choice"),
        # What is wrong with one request is no reason to leave the option out of all.
        ("max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
         {"param": "max_tokens", "code": "invalid_value"}, OPENAI, None),
        ("This model does not support max_tokens larger than 4096", None, OPENAI, None),
        ("Invalid schema for response_format 'reply': In context=('properties', 'a'), 'oneOf' is not permitted.",
         {"param": "response_format", "code": None}, OPENAI, None),
        ("response_format.json_schema.schema: the keyword 'minimum' is not supported", None, OPENAI, None),
        ("output_config.format.schema: For 'integer' type, property 'minimum' is not supported", None, ANTHROPIC, None),
        ("tools.0.custom.input_schema: JSON schema is invalid", None, ANTHROPIC, None),
        ("Unknown parameter: 'response_format.json_schema.schema.strict'", None, OPENAI, None),
        ("The model `gpt-9` does not exist; response_format was fine", None, OPENAI, None),
        ("Unknown parameter: 'seed'. stream_options", {"param": "seed", "code": "unknown_parameter"}, OPENAI, None),
        ("stream_options", None, OPENAI, None),
    ],
)  # fmt: skip
def test_only_an_option_that_is_named_as_unknown_counts(text: str, body: Any, names: Any, expected: str | None) -> None:
    request = {name: 1 for name in names if name != "max_completion_tokens"}
    assert refused_option(text, body, request, names) == expected
    without = {name: 1 for name in request if name != expected}
    assert refused_option(text, body, without, names) is None


def test_a_schema_that_is_invalid_is_the_error_of_its_node_alone(raw: RawServer, complete: Any) -> None:
    done = raw.stream(chunk(content="ok"), chunk(finish="stop"))
    invalid = error_answer("Invalid schema for response_format 'reply': 'a' is bad", param="response_format")
    large = error_answer("max_tokens is too large: 9. At most 5 are supported", param="max_tokens")
    raw.answer(invalid, large, done)
    llm = openai_of(raw)
    for _ in range(2):
        with pytest.raises(LLMRefused):
            complete(llm, json_schema=SCHEMA)
    assert complete(llm, json_schema=SCHEMA).content == "ok"
    assert [sorted(each) for each in raw.seen()] == [sorted(raw.seen()[0])] * 3
    llm.close()


def test_what_is_left_out_from_now_on_is_said_once(raw: RawServer, caplog: pytest.LogCaptureFixture) -> None:
    done = raw.stream(chunk(content="ok"), chunk(finish="stop"))
    raw.answer(error_answer("Unknown parameter: 'stream_options'"), done, done)
    llm = openai_of(raw)
    with caplog.at_level(logging.WARNING, "framework.llm"):
        assert [llm.complete(messages=ASK).content for _ in range(2)] == ["ok", "ok"]
    assert [each.getMessage() for each in caplog.records] == [
        "OpenAI (gpt-4o) does not take the option 'stream_options'; it is left out from now on."
    ]
    llm.close()


def test_one_of_the_two_names_of_the_limit_has_to_stay(raw: RawServer) -> None:
    raw.answer(
        error_answer("Unknown parameter: 'max_tokens'"), error_answer("Unknown parameter: 'max_completion_tokens'")
    )
    llm = openai_of(raw)
    with pytest.raises(LLMRefused, match="max_completion_tokens"):
        llm.complete(messages=ASK)
    assert len(raw.seen()) == 2
    llm.close()


def test_an_option_refused_to_another_request_meanwhile_is_left_out_of_this_one_too(
    raw: RawServer, complete: Any
) -> None:
    raw.answer(
        error_answer("Unknown parameter: 'stream_options'"), raw.stream(chunk(content="ok"), chunk(finish="stop"))
    )

    class Meanwhile(OpenAIProvider):
        def _open(self, client: Any, request: dict[str, Any]) -> Any:
            self._refused[self.model] = frozenset({"stream_options"})  # by a request in another thread
            return super()._open(client, request)

    llm = Meanwhile("gpt-4o", api_key=KEY, base_url=raw.url)
    assert complete(llm).content == "ok"
    assert ["stream_options" in each for each in raw.seen()] == [True, False]
    llm.close()


# --- silence ----------------------------------------------------------------------------------------------------------

COMMENT = ": still here\n\n"
EMPTY = f"data: {json.dumps(chunk())}\n\n"


@pytest.mark.parametrize("drop", [COMMENT, EMPTY])
def test_what_only_keeps_the_connection_alive_is_silence(raw: RawServer, complete: Any, drop: str) -> None:
    begun = raw.stream(chunk(role="assistant", content="Hal"))
    raw.answer({**begun, "drip": drop, "every": 0.05})
    llm = openai_of(raw, timeout_seconds=0.3)
    with pytest.raises(LLMTimeout, match=r"kept the connection alive.*timeout_seconds is 0.3"):
        complete(llm)
    llm.close()


def test_pings_of_anthropic_are_silence_too(raw: RawServer, complete: Any) -> None:
    raw.answer({"body": "", "drip": 'event: ping\ndata: {"type": "ping"}\n\n', "every": 0.05})
    llm = AnthropicProvider(KEY, base_url=raw.url, timeout_seconds=0.3)
    with pytest.raises(LLMTimeout, match="kept the connection alive"):
        complete(llm)
    llm.close()


@pytest.mark.parametrize("delta", [{"content": "a"}, {"reasoning_content": "hm"}])
def test_a_reply_that_keeps_coming_is_bounded_by_the_total_limit_alone(
    raw: RawServer, complete: Any, delta: dict[str, Any]
) -> None:
    raw.answer({"body": "", "drip": f"data: {json.dumps(chunk(**delta))}\n\n", "every": 0.02})
    llm = openai_of(raw, timeout_seconds=0.3, total_timeout_seconds=0.8)
    with pytest.raises(LLMTimeout, match=r"not whole after .* \(total_timeout_seconds is 0.8\)"):
        complete(llm)
    llm.close()


def test_silence_is_measured_from_the_last_part_of_the_reply() -> None:
    now = [0.0]
    silence = Silence("who", 10, None, clock=lambda: now[0])
    for now[0] in (9, 18, 27):
        silence.check()
        silence.heard()
    now[0] = 37
    silence.check()
    now[0] = 37.5
    with pytest.raises(LLMTimeout, match="for 10.5 s"):
        silence.check()


# --- no stream --------------------------------------------------------------------------------------------------------


def whole(message: dict[str, Any], finish: str | None = "stop") -> dict[str, Any]:
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15, "prompt_tokens_details": None}
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "w", "object": "chat.completion", "model": "gpt-4o", "choices": [choice], "usage": usage}


def test_a_server_that_does_not_stream_is_taken_at_its_word(raw: RawServer, complete: Any) -> None:
    raw.answer(json_answer(whole({"content": "All of it."})))
    llm = openai_of(raw)
    reply = complete(llm)
    assert (reply.content, reply.stop_reason, reply.model) == ("All of it.", "stop", "gpt-4o")
    assert (reply.input_tokens, reply.output_tokens) == (12, 3)
    assert reply.cost == pytest.approx((12 * 2.5 + 3 * 10) / 1e6)
    llm.close()


def test_tool_calls_of_a_server_that_does_not_stream(raw: RawServer) -> None:
    calls = [
        {"id": each, "type": "function", "function": {"name": "add", "arguments": f'{{"a": "{each}"}}'}}
        for each in "xy"
    ]
    raw.answer(
        json_answer(whole({"content": None, "tool_calls": calls}, "tool_calls")), json_answer(whole({"content": "2"}))
    )
    llm, used = openai_of(raw), list[ToolUse]()

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "1")

    reply = llm.complete_with_tools(messages=ASK, system="", tools=[TOOL], tool_executor=run)
    assert (reply.content, reply.input_tokens) == ("2", 24)
    assert used == [ToolUse("x", "add", {"a": "x"}), ToolUse("y", "add", {"a": "y"})]
    llm.close()


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (whole({"content": "Half"}, None), LLMUnavailable, "broke off"),
        ({"choices": [{"finish_reason": "stop"}]}, LLMUnavailable, "cannot be read"),
        (["no reply"], LLMUnavailable, "cannot be read"),
        ({"error": {"message": "not today", "type": "overloaded_error"}}, LLMRateLimited, "not today"),
        ({"error": {"message": "no money", "code": "insufficient_quota"}}, LLMRefused, "no money"),
        ({"error": "broken"}, LLMUnavailable, "broken"),
    ],
)
def test_a_body_that_is_no_whole_reply(
    raw: RawServer, complete: Any, body: Any, kind: type[LLMError], text: str
) -> None:
    raw.answer(json_answer(body))
    llm = openai_of(raw)
    with pytest.raises(kind, match=text):
        complete(llm)
    llm.close()


def test_a_body_that_is_cut_off_is_not_used(raw: RawServer, complete: Any) -> None:
    answer = json_answer(whole({"content": "All of it."}))
    raw.answer({**answer, "body": answer["body"][:-9]})
    llm = openai_of(raw)
    with pytest.raises(LLMUnavailable, match="cannot be read"):
        complete(llm)
    llm.close()


def test_a_message_of_anthropics_that_is_not_streamed(raw: RawServer, complete: Any) -> None:
    body = {
        "id": "m", "type": "message", "role": "assistant", "model": "claude-haiku-4-5",
        "content": [
            {"type": "text", "text": "Sunny"},
            {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use", "usage": {"input_tokens": 5, "output_tokens": 2},
    }  # fmt: skip
    raw.answer(json_answer(body))
    llm = AnthropicProvider(KEY, base_url=raw.url)
    reply = complete(llm)
    assert (reply.content, reply.input_tokens, reply.output_tokens) == ("Sunny", 5, 2)
    assert reply.raw_response == [ToolUse("t", "add", {"a": 1})]
    llm.close()


# --- how long a reply may be ------------------------------------------------------------------------------------------


async def test_who_does_not_say_asks_for_the_providers_own_limit(raw: RawServer) -> None:
    done = raw.stream(chunk(content="ok"), chunk(finish="stop"))
    raw.answer(*[done] * 6)
    llm = openai_of(raw, max_tokens=5000)
    await asyncio.to_thread(llm.complete, messages=ASK)  # the contract's default
    await llm.acomplete(messages=ASK)
    await ask(llm, messages=ASK)
    await ask(llm, messages=ASK, max_tokens=7)
    await method_of(llm)(messages=ASK)
    await method_of(llm)(messages=ASK, max_tokens=8)
    assert [each["max_tokens"] for each in await asyncio.to_thread(raw.seen)] == [1024, 1024, 5000, 7, 5000, 8]
    await llm.aclose()
    scripted = ScriptedLLM(["a"])
    assert method_of(scripted) == scripted.complete


# --- one request of a tool loop ---------------------------------------------------------------------------------------

USE = ToolUse("1", "add", {})
CALLS = Turn(LLMResponse("", "m", 5, 1, cost=0.5), (USE,))
DONE = Turn(LLMResponse("done", "m", 7, 2, cost=0.25))


def loop(way: str, turns: list[Any], patience: Patience) -> tuple[LLMResponse, int, list[float]]:
    """The reply, how often the tool was called, and the waits."""
    waits: list[float] = []
    used: list[ToolUse] = []

    def turn(talked: Any) -> Turn:
        each = turns.pop(0)
        if isinstance(each, Exception):
            raise each
        assert isinstance(each, Turn)
        return each

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "1")

    async def turn_async(talked: Any) -> Turn:
        return turn(talked)

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    conversation = Conversation(ASK, "m", 10)
    patience = replace(patience, sleep=waits.append, sleep_async=wait)
    if way == "sync":
        return talk(conversation, turn, run, patience), len(used), waits
    return asyncio.run(talk_async(conversation, turn_async, run, patience)), len(used), waits


@pytest.mark.parametrize("way", ["sync", "async"])
def test_one_request_is_made_again_and_no_tool_called_again(way: str, caplog: pytest.LogCaptureFixture) -> None:
    turns = [CALLS, LLMRateLimited("busy", retry_after=7), LLMTimeout("late"), DONE]
    with caplog.at_level(logging.WARNING, "framework.llm"):
        reply, used, waits = loop(way, turns, Patience())
    assert (reply.content, reply.input_tokens, reply.output_tokens, reply.cost) == ("done", 12, 3, 0.75)
    assert used == 1
    assert waits == [7.5, 1.0]
    assert [each.getMessage().split(":")[0] for each in caplog.records] == [
        "A request inside a tool loop failed and is made again in 7.5 s (1 of 2)",
        "A request inside a tool loop failed and is made again in 1 s (2 of 2)",
    ]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    ("turns", "patience", "kind", "asked"),
    [
        ([CALLS, *[LLMUnavailable("down")] * 4], Patience(), LLMUnavailable, 4),
        ([CALLS, *[LLMRateLimited("x", retry_after=900)] * 2], Patience(0), LLMRateLimited, 2),
        ([CALLS, *[LLMRefused("no")] * 2], Patience(), LLMRefused, 2),
        ([CALLS, *[ValueError("a bug")] * 2], Patience(), ValueError, 2),
        ([LLMUnavailable("nothing was called yet"), DONE], Patience(), LLMUnavailable, 1),
    ],
)
def test_what_does_not_pass_ends_the_loop(
    way: str, turns: list[Any], patience: Patience, kind: type[Exception], asked: int
) -> None:
    left = list(turns)
    with pytest.raises(kind) as caught:
        loop(way, left, patience)
    assert len(turns) - len(left) == asked
    paid = paid_before(caught.value)
    assert (paid.input_tokens if paid is not None else 0) == (5 if turns[0] is CALLS else 0)


def test_the_wait_has_a_limit_and_each_turn_its_own_tries() -> None:
    busy = LLMRateLimited("busy", retry_after=900)
    reply, used, waits = loop("sync", [CALLS, busy, busy, CALLS, busy, busy, DONE], Patience(longest_wait_seconds=60))
    assert (reply.content, used, waits) == ("done", 2, [60.5, 61.0, 60.5, 61.0])


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("retries", [2, 0])
def test_a_provider_makes_its_request_again(raw: RawServer, way: str, retries: int) -> None:
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    raw.answer(
        raw.stream(chunk(tool_calls=[call]), chunk(finish="tool_calls")),
        json_answer({"error": {"message": "down"}}, 503),
        json_answer({"error": {"message": "busy"}}, 429),
        raw.stream(chunk(content="done"), chunk(finish="stop")),
    )
    llm = openai_of(raw, request_retries=retries)
    waits: list[float] = []
    used: list[ToolUse] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "1")

    llm.patience = replace(llm.patience, sleep=waits.append, sleep_async=wait)
    given: dict[str, Any] = {"messages": ASK, "system": "", "tools": [TOOL], "tool_executor": run}

    def ask_it() -> Any:
        return llm.complete_with_tools(**given) if way == "sync" else asyncio.run(llm.acomplete_with_tools(**given))

    if retries:
        assert ask_it().content == "done"
        assert waits == [0.5, 1.0]
    else:
        with pytest.raises(LLMUnavailable):
            ask_it()
    assert (len(used), len(raw.seen())) == (1, 2 + retries)
    llm.close()
