"""The worker: each kind of action, its outputs, and which kind of error is which."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework import _secrets
from framework.errors import LeaseLost, StorageError
from framework.graph.plan import ActionSpec, PlanStep
from framework.graph.worker_node import AttemptInfo, StepExecutionResult, WorkerNode, parse_llm_json_response
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime


class RateLimitError(Exception):
    """As several clients name it."""


class StatusError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code


def step(kind: str, inputs: dict[str, Any] | None = None, **action: Any) -> PlanStep:
    spec = ActionSpec.model_validate({"action_type": kind, **action})
    return PlanStep(id="s", description="work", action=spec, inputs=inputs or {})


async def run(worker: WorkerNode, work: PlanStep, context: dict[str, Any] | None = None, **more: Any) -> Any:
    result = await worker.execute(work, context or {}, **more)
    assert isinstance(result, StepExecutionResult)
    assert (result.error is None) is result.success
    return result


def worker(**parts: Any) -> WorkerNode:
    return WorkerNode(MagicMock(spec=Runtime), **parts)


@pytest.mark.parametrize(
    ("text", "parsed", "cleaned"),
    [
        ('{"a": 1}', {"a": 1}, '{"a": 1}'),
        ('Sure:\n```json\n{"a": 1}\n```\nor {"b": 2}', {"a": 1}, '{"a": 1}'),
        ("see [1, 2] there", [1, 2], "[1, 2]"),
        ("no json", None, "no json"),
        ("NaN", None, "NaN"),
        ('{"a": Infinity}', None, '{"a": Infinity}'),
        (None, None, "None"),
        (5, None, "5"),
    ],
)
def test_json_in_replies(text: Any, parsed: Any, cleaned: str) -> None:
    assert parse_llm_json_response(text) == (parsed, cleaned)


async def test_a_model_is_asked_with_inputs_and_feedback() -> None:
    seen: list[Any] = []

    def reply(messages: Any, system: Any, tools: Any) -> str:
        seen.append((messages[0]["content"], system))
        return '{"n": 3}'

    work = step("llm_call", {"city": "$place", "data": {"k": [1]}}, prompt="About {city}.", system_prompt="Be brief")
    result = await run(
        worker(llm=ScriptedLLM(reply)), work, {"place": "Rome"}, info=AttemptInfo(2, feedback="name a source")
    )
    assert result.outputs == {"result": {"n": 3}, "response": '{"n": 3}', "parsed_json": {"n": 3}}
    assert result.tokens_used > 0
    text, system = seen[0]
    assert text.startswith("About Rome.")
    assert '"k": [1]' in text
    assert "name a source" in text
    assert system == "Be brief"


async def test_functions_sync_and_async() -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    both = worker(functions={"later": later, "now": lambda x: x + 1, "maybe": lambda x: later(x)})
    for name in ("later", "now", "maybe"):
        result = await run(both, step("function", {"x": "$n"}, function_name=name, function_args={"x": 0}), {"n": 4})
        assert result.outputs == {"result": 5}


async def test_a_function_that_asks_for_it_is_told_about_the_attempt() -> None:
    def told(x: int, feedback: str | None, idempotency_key: str) -> list[Any]:
        return [x, feedback, idempotency_key]

    info = AttemptInfo(2, feedback="more", idempotency_key="run/s")
    work = step("function", function_name="told", function_args={"x": 1})
    result = await run(worker(functions={"told": told}), work, info=info)
    assert result.outputs["result"] == [1, "more", "run/s"]


async def test_a_function_works_on_copies() -> None:
    def spoil(rows: list[int]) -> int:
        rows.append(4)
        return len(rows)

    context = {"rows": [1, 2, 3]}
    result = await run(
        worker(functions={"spoil": spoil}), step("function", {"rows": "$rows"}, function_name="spoil"), context
    )
    assert (result.outputs["result"], context["rows"]) == (4, [1, 2, 3])


async def test_tools_by_executor() -> None:
    def execute(use: ToolUse) -> ToolResult:
        assert (use.id, use.name) == ("step_search", "search")
        return ToolResult(use.id, json.dumps({"hits": 2, "q": use.input["q"]}))

    async def later(use: ToolUse) -> ToolResult:
        return execute(use)

    work = step("tool_use", {"word": "$topic"}, tool_name="search", tool_args={"q": "$word", "limit": 5})
    for executor in (execute, later):
        with_tool = worker(tools=[Tool("search", "finds")], tool_executor=executor)
        result = await run(with_tool, work, {"topic": "rivers"})
        assert result.outputs == {"result": '{"hits": 2, "q": "rivers"}', "hits": 2, "q": "rivers"}


async def test_a_function_wins_over_a_tool_of_its_name() -> None:
    def search(q: str) -> dict[str, Any]:
        return {"success": False, "error": "nothing", "error_type": "missing_data"}

    both = worker(tools={"search": Tool("search", "finds")}, functions={"search": search}, tool_executor=MagicMock())
    result = await run(both, step("tool_use", tool_name="search", tool_args={"q": "x"}))
    assert (result.error, result.error_type) == ("nothing", "missing_data")
    both.register_function("search", lambda q: {"success": True, "outputs": {"hits": 1}})
    assert (await run(both, step("tool_use", tool_name="search", tool_args={"q": "x"}))).outputs == {"hits": 1}


@pytest.mark.parametrize(
    ("returned", "outputs", "error", "error_type"),
    [
        ({"success": True, "hits": 3, "error": None}, {"hits": 3}, None, None),
        ({"success": True, "outputs": {"a": 1}, "more": 2, "error": "no"}, {"a": 1}, None, None),
        ({"success": True, "outputs": [1]}, {"result": [1]}, None, None),
        ({"success": False}, {}, "Tool 'f' failed and did not say why", "tool_error"),
        ({"success": False, "error": {"code": 7}, "error_type": 7}, {}, '{"code": 7}', "7"),
        ({"failed": True}, {"result": {"failed": True}}, None, None),
    ],
)
async def test_what_a_function_used_as_a_tool_reports(
    returned: Any, outputs: dict[str, Any], error: str | None, error_type: str | None
) -> None:
    result = await run(worker(functions={"f": lambda: returned}), step("tool_use", tool_name="f"))
    assert (result.outputs, result.error, result.error_type) == (outputs, error, error_type)


async def test_what_a_sub_graph_reports() -> None:
    for success, output, expected in ((True, [1], {"result": [1]}), (True, None, {}), (False, {"y": 1}, {})):
        answer = SimpleNamespace(success=success, output=output, error=None, total_tokens=0)
        result = await run(worker(sub_graph_executor=lambda *_: answer), step("sub_graph", graph_id="g"))  # noqa: B023
        assert result.outputs == expected


async def test_sub_graphs_by_executor() -> None:
    async def execute(graph_id: str, inputs: dict[str, Any], context: dict[str, Any]) -> Any:
        assert (graph_id, inputs, context) == ("g", {"x": 1}, {"k": [1]})
        return SimpleNamespace(success=True, output={"y": 2}, error=None, total_tokens=9)

    result = await run(worker(sub_graph_executor=execute), step("sub_graph", {"x": 1}, graph_id="g"), {"k": [1]})
    assert (result.outputs, result.tokens_used) == ({"y": 2}, 9)


async def test_code_sees_the_context_overlaid_by_the_inputs() -> None:
    work = step("code_execution", {"a": 10}, code="total = a + b\nresult = total * 2")
    result = await run(worker(), work, {"a": 1, "b": 2, "client": object()})
    assert result.outputs == {"result": 24, "total": 12}


async def test_names_that_code_sets_itself_are_new_whatever_the_context_holds() -> None:
    """So a step that runs again has the same outputs as before."""
    code = "total = a + 1\ncount: int = 0\nkept = kept + 1\nresult = total + count"
    context = {"a": 1, "total": 99, "count": 99, "kept": 1, "result": 99}
    result = await run(worker(), step("code_execution", code=code), context)
    assert result.outputs == {"result": 2, "total": 2, "count": 0}, "kept is read first, so it is an input"


async def test_code_gives_the_same_outputs_in_an_attempt_with_feedback() -> None:
    told = AttemptInfo(2, feedback="more")
    own = step("code_execution", code="feedback = 'mine'\nresult = 1")
    assert (await run(worker(), own, info=told)).outputs == {"feedback": "mine", "result": 1}
    assert (await run(worker(), step("code_execution", code="result = feedback"), info=told)).outputs == {
        "result": "more"
    }


async def test_a_missing_reference_is_named_with_its_step_and_what_there_is() -> None:
    for work in (step("function", {"x": "$other.y"}, function_name="one"), step("tool_use", tool_name="one")):
        work.action.tool_args = {"x": ["$other.y"]}
        result = await run(worker(functions={"one": lambda x: x}), work, {"city": 1}, outputs={"load": {"rows": 2}})
        assert result.error_type == "missing_data"
        assert all(word in result.error for word in ("Step 's'", "'$other.y'", "city, load")), result.error


@pytest.mark.parametrize(
    ("work", "error_type"),
    [
        (step("llm_call", prompt="x"), "configuration"),
        (step("llm_call"), "configuration"),
        (step("tool_use"), "invalid_action"),
        (step("tool_use", tool_name="none"), "missing_tool"),
        (step("tool_use", tool_name="known"), "configuration"),
        (step("sub_graph"), "invalid_action"),
        (step("sub_graph", graph_id="g"), "configuration"),
        (step("function"), "invalid_action"),
        (step("function", function_name="none"), "missing_function"),
        (step("function", {"wrong": 1}, function_name="one"), "invalid_action"),
        (step("function", {"x": "$missing.y"}, function_name="one"), "missing_data"),
        (step("function", function_name="one", function_args={"x": ["$missing"]}), "missing_data"),
        (step("code_execution"), "invalid_action"),
        (step("code_execution", code="import os"), "security"),
        (step("code_execution", code="1/0"), "code_error"),
        (step("code_execution", code="x", language="ruby"), "invalid_action"),
    ],
)
async def test_what_cannot_be_done(work: PlanStep, error_type: str) -> None:
    result = await run(worker(tools=[Tool("known", "")], functions={"one": lambda x: x}), work)
    assert (result.success, result.error_type) == (False, error_type), result.error


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (TimeoutError("late"), "timeout"),
        (ConnectionResetError("gone"), "connection_error"),
        (RateLimitError("slow down"), "rate_limit"),
        (StatusError(429), "rate_limit"),
        (StatusError(503), "connection_error"),
        (StatusError(400), None),
        (ValueError("cannot generate: rate is bad"), None),
        (TypeError("inside"), None),
    ],
)
async def test_errors_are_told_apart_by_their_type(error: Exception, error_type: str | None) -> None:
    def fail(**_: Any) -> None:
        raise error

    failing = worker(
        llm=ScriptedLLM([error]),
        functions={"fail": fail, "tool": fail},
        tools=[Tool("other", "")],
        tool_executor=lambda use: fail(),
        sub_graph_executor=lambda *_: fail(),
    )
    cases = [
        (step("llm_call", prompt="x"), "llm_error"),
        (step("function", function_name="fail"), "function_exception"),
        (step("tool_use", tool_name="tool"), "tool_exception"),
        (step("tool_use", tool_name="other"), "tool_exception"),
        (step("sub_graph", graph_id="g"), "sub_graph_exception"),
    ]
    for work, otherwise in cases:
        result = await run(failing, work)
        assert result.error_type == (error_type or otherwise)
        assert result.error == str(error)


async def test_a_tool_that_says_error() -> None:
    failing = worker(tools=[Tool("t", "")], tool_executor=lambda use: ToolResult(use.id, "no such page", is_error=True))
    result = await run(failing, step("tool_use", tool_name="t"))
    assert (result.error_type, result.error) == ("tool_error", "no such page")


async def test_an_error_of_the_runs_own_store_is_no_result() -> None:
    def fail() -> None:
        raise StorageError("disk full")

    with pytest.raises(StorageError):
        await worker(functions={"f": fail}).execute(step("function", function_name="f"), {})


async def test_each_attempt_is_a_decision_with_its_outcome() -> None:
    runtime = MagicMock(spec=Runtime)
    runtime.decide.return_value = "dec_0"
    await WorkerNode(runtime, functions={"f": lambda: 1}).execute(step("function", function_name="f"), {})
    assert runtime.decide.call_args.kwargs["node_id"] == "s"
    outcome = runtime.record_outcome.call_args.kwargs
    assert (outcome["decision_id"], outcome["success"], outcome["error"]) == ("dec_0", True, None)


class Unwilling:
    """A runtime whose notes fail."""

    def __init__(self, error: Exception, *failing: str) -> None:
        self.error, self.failing, self.outcomes = error, failing, list[Any]()

    def decide(self, **_: Any) -> str:
        if "decide" in self.failing:
            raise self.error
        return "dec_0"

    def record_outcome(self, **outcome: Any) -> None:
        self.outcomes.append(outcome)
        if "record_outcome" in self.failing:
            raise self.error


@pytest.mark.parametrize("failing", ["decide", "record_outcome"])
async def test_a_note_that_fails_does_not_lose_the_result(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Unwilling(ValueError("no room"), failing)
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return 7

    node = WorkerNode(runtime, functions={"f": work})
    with caplog.at_level(logging.WARNING):
        result = await node.execute(step("function", function_name="f"), {})
    assert (result.success, result.outputs, calls) == (True, {"result": 7}, [1])
    (record,) = [each for each in caplog.records if each.name == "framework.graph.worker_node"]
    assert (record.levelname, "'s'" in record.getMessage()) == ("WARNING", True)
    assert "ValueError: no room" in record.getMessage()
    assert "in decide" in record.getMessage() or "in record_outcome" in record.getMessage(), "the traceback"
    assert len(runtime.outcomes) == (failing == "record_outcome"), "an unknown decision has no outcome"


@pytest.mark.parametrize("failing", ["decide", "record_outcome"])
async def test_a_note_that_fails_with_the_runs_own_store_ends_the_run(failing: str) -> None:
    for error in (StorageError("disk full"), LeaseLost("r", 1)):
        node = WorkerNode(Unwilling(error, failing), functions={"f": lambda: 7})
        with pytest.raises(type(error)):
            await node.execute(step("function", function_name="f"), {})


class Modelled:
    """A provider that notes what it is asked with; ``supports_model`` says whether it takes another model."""

    def __init__(self, supports: object) -> None:
        self.supports_model = supports
        self.asked: list[dict[str, Any]] = []

    def complete(self, messages: Any, system: Any = None, **more: Any) -> LLMResponse:
        self.asked.append(more)
        return LLMResponse(content="done", model=more.get("model", "own"))


class Plain(Modelled):
    def complete(self, messages: Any, system: Any = None) -> LLMResponse:  # type: ignore[override]
        return super().complete(messages, system)


@pytest.mark.parametrize(
    ("llm", "asked"),
    [
        (Modelled(True), {"model": "large"}),
        (Modelled(False), {}),
        (Modelled("yes"), {}),
        (Plain(True), {}),
    ],
)
async def test_an_llm_call_asks_the_model_it_names_where_the_provider_takes_one(
    llm: Modelled, asked: dict[str, Any]
) -> None:
    node = WorkerNode(MagicMock(spec=Runtime), llm=llm)
    assert (await node.execute(step("llm_call", prompt="p", model="large"), {})).success
    assert (await node.execute(step("llm_call", prompt="p"), {})).success
    assert llm.asked == [asked, {}]


async def test_a_function_steps_value_is_exact_and_what_a_tool_gives_is_masked() -> None:
    _secrets.register_secret("sk-very-secret-value")
    try:
        node = WorkerNode(MagicMock(spec=Runtime), functions={"f": lambda: {"token": "sk-very-secret-value"}})
        exact = await node.execute(step("function", function_name="f"), {})
        masked = await node.execute(step("tool_use", tool_name="f"), {})
    finally:
        _secrets.forget_secrets()
    assert exact.outputs == {"result": {"token": "sk-very-secret-value"}}
    assert masked.outputs == {"result": {"token": "***"}}
