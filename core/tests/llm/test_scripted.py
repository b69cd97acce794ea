"""The scripted provider: its replies, its tool loop, and what it counts."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import framework.llm
from framework.errors import SurefootError
from framework.llm import LLMProvider, LLMResponse, ScriptedLLM, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedCall, ScriptExhausted

ASK = [{"role": "user", "content": "one two three"}]
TOOL = Tool("add", "Adds.", {"type": "object"})


def test_replies_in_order_then_a_clear_error() -> None:
    llm = ScriptedLLM(["a", LLMResponse("b", "other", input_tokens=7, output_tokens=1)], model="m")
    assert llm.complete(messages=ASK, system="be kind") == LLMResponse("a", "m", 5, 1, "end_turn", cost=3e-05)
    assert llm.complete(messages=ASK, system=None).content == "b"
    with pytest.raises(ScriptExhausted, match="called 3 times, but its script has 2 replies") as caught:
        llm.complete(messages=ASK)
    assert isinstance(caught.value, SurefootError)
    assert (llm.calls, llm.input_tokens, llm.output_tokens) == (2, 12, 2)


def test_a_function_answers_any_call() -> None:
    llm = ScriptedLLM(lambda messages, system, tools: f"{messages[0]['content']}|{system}|{len(tools)}")
    assert llm.complete(messages=ASK, system="s", tools=[TOOL]).content == "one two three|s|1"
    assert isinstance(llm, LLMProvider)


def test_an_exception_is_raised_and_not_counted() -> None:
    llm = ScriptedLLM([ConnectionError("down"), "up"])
    with pytest.raises(ConnectionError, match="down"):
        llm.complete(messages=ASK)
    assert llm.complete(messages=ASK).content == "up"
    assert llm.calls == 1


def test_tokens_and_cost_are_the_same_every_time() -> None:
    def run() -> ScriptedLLM:
        llm = ScriptedLLM(["word " * 10], usd_per_million_input_tokens=2.0, usd_per_million_output_tokens=10.0)
        llm.complete(messages=[{"role": "user", "content": "extraordinarily long"}])
        return llm

    first, second = run(), run()
    assert (first.input_tokens, first.output_tokens) == (second.input_tokens, second.output_tokens) == (4, 10)
    assert first.cost_usd == second.cost_usd == pytest.approx(4 * 2e-6 + 10 * 10e-6)


def test_tool_loop() -> None:
    talks: list[Any] = []

    def script(messages: Any, system: Any, tools: Any) -> Any:
        talks.append(messages)
        match len(talks):
            case 1:
                return [ToolUse("t1", "add", {"a": 1, "b": 2}), ToolUse("t2", "add", {"a": 3, "b": 4})]
            case 2:
                return ToolUse("t3", "fail", {})
        return "the sum is 10"

    def execute(use: ToolUse) -> ToolResult:
        if use.name == "fail":
            return ToolResult(use.id, "no such tool", is_error=True)
        return ToolResult(use.id, str(use.input["a"] + use.input["b"]))

    llm = ScriptedLLM(script)
    response = llm.complete_with_tools(messages=ASK, system="s", tools=[TOOL], tool_executor=execute)
    assert (response.content, response.stop_reason) == ("the sum is 10", "end_turn")
    assert (response.input_tokens, response.output_tokens) == (llm.input_tokens, llm.output_tokens)
    assert llm.calls == 3
    assert [len(talk) for talk in talks] == [1, 3, 5]
    results = talks[1][-1]["content"]
    assert [(result["tool_use_id"], result["content"]) for result in results] == [("t1", "3"), ("t2", "7")]
    assert talks[2][-1]["content"][0]["is_error"] is True
    assert len(ASK) == 1


def test_tool_loop_stops_at_the_limit() -> None:
    llm = ScriptedLLM(lambda messages, system, tools: ToolUse("t", "add", {}))
    response = llm.complete_with_tools(
        messages=ASK, system="", tools=[TOOL], tool_executor=lambda use: ToolResult(use.id, "1"), max_iterations=3
    )
    assert response.stop_reason == "max_iterations"
    assert llm.calls == 3
    assert response.input_tokens == llm.input_tokens > 0


def test_errors_of_a_tool_are_raised() -> None:
    def execute(use: ToolUse) -> ToolResult:
        raise KeyError(use.name)

    with pytest.raises(KeyError, match="add"):
        ScriptedLLM([ToolUse("t", "add", {})]).complete_with_tools(ASK, "", [TOOL], execute)


def test_a_single_call_can_ask_for_tools() -> None:
    use = ToolUse("t", "add", {"a": 1})
    response = ScriptedLLM([use]).complete(messages=ASK, tools=[TOOL])
    assert (response.stop_reason, response.raw_response, response.content) == ("tool_use", [use], "")


def test_the_ledger_is_told_every_answered_call() -> None:
    ledger: list[ScriptedCall] = []
    llm = ScriptedLLM(["a", ValueError("x"), ToolUse("t", "add", {})], ledger=ledger.append)
    llm.complete(messages=ASK, system="s")
    with pytest.raises(ValueError, match="x"):
        llm.complete(messages=ASK)
    llm.complete(messages=ASK)
    assert [(call.number, call.content, call.system) for call in ledger] == [(1, "a", "s"), (2, "", "")]
    assert ledger[1].tool_calls[0].name == "add"
    assert sum(call.cost_usd for call in ledger) == pytest.approx(llm.cost_usd)


def test_a_mapping_answers_by_what_is_asked_whatever_came_before() -> None:
    script: dict[str, Any] = {
        "weather": [ToolUse("t", "add", {"a": 1}), [ToolUse("u", "add", {}), ToolUse("v", "add", {})], "sunny"],
        "two": "found in the message",
        "": "anything else",
    }
    for llm in (ScriptedLLM(script), ScriptedLLM(script)):  # the second one as after a restart
        used: list[str] = []

        def run(use: ToolUse, used: list[str] = used) -> ToolResult:
            used.append(use.id)
            return ToolResult(use.id, "ok")

        assert llm.complete(messages=ASK).content == "found in the message"
        assert llm.complete_with_tools(ASK, "the weather", [TOOL], run).content == "sunny"
        assert used == ["t", "u", "v"]
        assert llm.complete(messages=[{"role": "user", "content": "x"}]).content == "anything else"
    with pytest.raises(ScriptExhausted, match="no reply to 'one two three'.*knows: \\['four'\\]"):
        ScriptedLLM({"four": "5"}).complete(messages=ASK)
    with pytest.raises(ScriptExhausted, match="turn 3 of 'one'"):
        ScriptedLLM({"one": ["a", "b"]}).complete([*ASK, *({"role": "assistant", "content": said} for said in "ab")])


async def test_it_can_be_asked_the_async_way() -> None:
    llm = ScriptedLLM(["a", ToolUse("t", "add", {}), "b"])

    async def run(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, "1")

    assert (await llm.acomplete(messages=ASK)).content == "a"
    reply = await llm.acomplete_with_tools(messages=ASK, system="", tools=[TOOL], tool_executor=run)
    assert reply.content == "b"
    assert reply.cost == pytest.approx(llm.cost_usd - 3 * 3e-6 - 15e-6)


def test_threads_share_one_script() -> None:
    llm = ScriptedLLM([str(number) for number in range(100)], delay_seconds=0.0001)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: llm.complete(messages=ASK).content, range(100)))
    assert sorted(replies, key=int) == [str(number) for number in range(100)]
    assert llm.calls == 100


def test_the_package_exports_lazily() -> None:
    for name in framework.llm.__all__:
        assert getattr(framework.llm, name).__name__ == name
        assert name in dir(framework.llm)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = framework.llm.Nothing
    code = "import sys, framework.llm; sys.exit('framework.llm.scripted' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
