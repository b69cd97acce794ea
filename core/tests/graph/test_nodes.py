"""Nodes: their specification and result, and the function, LLM and router nodes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from unittest.mock import MagicMock

import pytest
from pydantic import ValidationError

from framework.errors import LeaseLost, StorageError
from framework.graph.builtin_nodes import FunctionNode, LLMNode, RouterNode
from framework.graph.json_reply import parse_json_object, parse_json_reply, widest_braces
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.text import fill_placeholders, shorten, summary_of, text_of
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM


class Recorder:
    """A runtime that keeps what nodes tell it."""

    def __init__(self) -> None:
        self.decisions: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []

    def decide(self, **decision: Any) -> str:
        self.decisions.append(decision)
        return f"dec_{len(self.decisions) - 1}"

    def record_outcome(self, **outcome: Any) -> None:
        self.outcomes.append(outcome)


def context(
    state: dict[str, Any] | None = None, input_data: dict[str, Any] | None = None, *, llm: Any = None, **spec: Any
) -> NodeContext:
    node = NodeSpec(**{"id": "n", **spec})
    memory = SharedMemory()
    for key, value in (state or {}).items():
        memory.write(key, value)
    return NodeContext(
        runtime=Recorder(),
        node_id=node.id,
        node_spec=node,
        memory=memory.with_permissions(node.input_keys, node.output_keys),
        input_data=input_data or {},
        llm=llm,
    )


def state_of(ctx: NodeContext) -> dict[str, Any]:
    memory = ctx.memory
    assert isinstance(memory, SharedMemory)
    return memory.with_permissions([], []).read_all()


# --- specification, result, interface -----------------------------------------------------------------------------


def test_spec_defaults() -> None:
    spec = NodeSpec.model_validate({"id": "n", "colour": "kept"})
    assert (spec.name, spec.description, spec.node_type, spec.max_retries) == ("n", "", "llm_tool_use", 3)
    assert (spec.fan_out, spec.fan_out_policy, spec.join_node, spec.timeout_seconds) == (False, "fail_fast", None, None)
    assert (spec.retry_delay_seconds, spec.retry_max_delay_seconds, spec.append_only_keys) == (0.2, 30.0, [])
    assert spec.model_dump()["colour"] == "kept"
    assert NodeSpec(id="n", name="N").name == "N"


@pytest.mark.parametrize("field", [{"timeout_seconds": 0}, {"retry_delay_seconds": -1}, {"fan_out_policy": "shrug"}])
def test_spec_refuses_values_without_meaning(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NodeSpec.model_validate({"id": "n", **field})


def test_context_and_result_defaults() -> None:
    ctx = NodeContext(MagicMock(), "n", NodeSpec(id="n"), SharedMemory())
    assert (ctx.attempt, ctx.max_attempts, ctx.run_id, ctx.step_key, ctx.idempotency_key) == (1, 3, None, "", "")
    result = NodeResult(True)
    assert (result.output, result.error, result.tokens_used, result.error_type) == ({}, None, 0, None)


def test_result_summary_is_short_local_text() -> None:
    spec = NodeSpec(id="n", name="Writer")
    assert NodeResult(False, error="boom\nbang").to_summary(spec) == "Writer: failed: boom bang"
    assert NodeResult(True).to_summary() == "done, no output"
    summary = NodeResult(True, output={"report": "x" * 9000, "n": 3}).to_summary()
    assert "report" in summary
    assert "n = 3" in summary
    assert len(summary) < 500


async def test_protocol_reports_missing_inputs() -> None:
    class Nothing(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            return NodeResult(True)

    ctx = context({"a": 1, "b": None}, {"c": None}, input_keys=["a", "b", "c", "d"])
    messages = Nothing().validate_input(ctx)
    assert len(messages) == 2
    assert "'b'" in messages[0]
    assert "'d'" in messages[1]


# --- functions ----------------------------------------------------------------------------------------------------


async def test_function_gets_its_declared_keys_from_the_state() -> None:
    ctx = context({"x": 2, "y": 3, "z": None}, {"result": "raw"}, input_keys=["x", "y", "z", "gone"])
    result = await FunctionNode(lambda x, y, z: (x, y, z)).execute(ctx)
    assert result.output == {"result": (2, 3, None)}


async def test_function_finds_a_declared_key_in_the_input_when_the_state_has_none() -> None:
    result = await FunctionNode(lambda x: x).execute(context({}, {"x": 5}, input_keys=["x"]))
    assert result.output == {"result": 5}


async def test_function_without_input_keys_gets_the_input_data() -> None:
    result = await FunctionNode(lambda **given: given).execute(context({"s": 1}, {"x": 2, "result": 3}))
    assert result.output == {"result": {"x": 2, "result": 3}}


async def test_function_writes_its_first_output_key() -> None:
    ctx = context(output_keys=["a", "b"])
    assert (await FunctionNode(lambda: 7).execute(ctx)).output == {"result": 7}
    assert state_of(ctx) == {"a": 7}


async def test_function_spreads_a_dict_over_declared_keys() -> None:
    ctx = context(output_keys=["a", "b", "c"])
    result = await FunctionNode(lambda: {"a": 1, "b": None, "other": 3}).execute(ctx)
    assert result.output == {"result": {"a": 1, "b": None, "other": 3}, "a": 1, "b": None}
    assert state_of(ctx) == {"a": 1, "b": None}


async def test_function_keeps_a_dict_without_declared_keys_whole() -> None:
    ctx = context(output_keys=["a"])
    assert (await FunctionNode(lambda: {"other": 3}).execute(ctx)).output == {"result": {"other": 3}}
    assert state_of(ctx) == {"a": {"other": 3}}


async def test_function_may_be_async_and_a_sync_one_runs_in_the_loop_thread() -> None:
    async def double(x: int) -> int:
        return x * 2

    assert (await FunctionNode(double).execute(context({}, {"x": 4}))).output == {"result": 8}
    thread = await FunctionNode(threading.get_ident).execute(context())
    assert thread.output == {"result": threading.get_ident()}


@pytest.mark.parametrize(("error", "text"), [(ValueError("no"), "no"), (KeyError(), "KeyError")])
async def test_function_that_raises_is_a_failed_result(error: Exception, text: str) -> None:
    ctx = context()
    result = await FunctionNode(MagicMock(side_effect=error, __name__="f")).execute(ctx)
    assert (result.success, result.error, result.error_type) == (False, text, type(error).__name__)
    assert ctx.runtime.outcomes[0]["success"] is False
    assert ctx.runtime.outcomes[0]["error"] == text


@pytest.mark.parametrize("error", [LeaseLost("run_1", 1), StorageError("full"), asyncio.CancelledError()])
async def test_function_does_not_hide_errors_that_are_not_its_own(error: BaseException) -> None:
    with pytest.raises(type(error)):
        await FunctionNode(MagicMock(side_effect=error, __name__="f")).execute(context())


async def test_function_may_not_write_what_its_memory_refuses() -> None:
    ctx = context(output_keys=["a"])
    ctx.memory = SharedMemory().with_permissions([], ["b"])
    result = await FunctionNode(lambda: 1).execute(ctx)
    assert result.error_type == "PermissionError"


async def test_decision_and_outcome_are_recorded_in_short() -> None:
    ctx = context(output_keys=["a"])
    await FunctionNode(lambda: "x" * 10_000).execute(ctx)
    (decision,), (outcome,) = ctx.runtime.decisions, ctx.runtime.outcomes
    assert decision["node_id"] == "n"
    assert decision["chosen"] in [option["id"] for option in decision["options"]]
    assert (outcome["decision_id"], outcome["success"]) == ("dec_0", True)
    assert len(outcome["result"]) <= 200
    assert len(outcome["summary"]) <= 200


@pytest.mark.parametrize("runtime", [MagicMock(), object()])
async def test_any_runtime_will_do(runtime: Any) -> None:
    ctx = context()
    ctx.runtime = runtime
    assert (await FunctionNode(lambda: 1).execute(ctx)).success


# --- language models ----------------------------------------------------------------------------------------------


def asked(reply: Any = "ok") -> tuple[ScriptedLLM, list[Any]]:
    """A model that answers ``reply``, and the list it fills with what it was asked: (user text, system)."""
    questions: list[Any] = []

    def script(messages: Any, system: Any, tools: Any) -> Any:
        questions.append((messages[0]["content"], system))
        return reply

    return ScriptedLLM(script), questions


async def test_llm_missing() -> None:
    result = await LLMNode().execute(context())
    assert (result.success, result.error) == (False, "LLM not available")


async def test_llm_reply_is_the_result_and_goes_to_the_one_output_key() -> None:
    llm, _ = asked(LLMResponse("hello", "m", input_tokens=3, output_tokens=4))
    ctx = context(llm=llm, output_keys=["greeting"])
    result = await LLMNode().execute(ctx)
    assert result.output == {"result": "hello", "greeting": "hello"}
    assert result.tokens_used == 7
    assert state_of(ctx) == {"greeting": "hello"}
    assert ctx.runtime.outcomes[0]["tokens_used"] == 7


async def test_llm_message_and_prompt() -> None:
    llm, questions = asked()
    ctx = context(
        {"topic": "cats", "style": {"tone": "dry"}, "empty": None},
        llm=llm,
        input_keys=["topic", "style", "empty"],
        system_prompt='About {topic}, {{topic}}, {other}, {} and {"json": {topic}} in {style}.',
    )
    ctx.goal_context = "GOAL"
    await LLMNode().execute(ctx)
    assert questions == [
        (
            'topic: cats\nstyle: {"tone": "dry"}',
            'About cats, {{topic}}, {other}, {} and {"json": cats} in {"tone": "dry"}.\n\nGOAL',
        )
    ]


@pytest.mark.parametrize("keys", [[], ["unset"]])
async def test_llm_message_falls_back_to_the_input_data(keys: list[str]) -> None:
    llm, questions = asked()
    await LLMNode().execute(context({}, {"q": "why"}, llm=llm, input_keys=keys))
    assert questions == [('{"q": "why"}', "")]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"a": 1, "b": "x"}', {"a": 1, "b": "x"}),
        ('```json\n{"a": [1], "b": null}\n```', {"a": [1], "b": None}),
        ('Sure: {"a": 1, "b": 2} as asked.', {"a": 1, "b": 2}),
        ('{"a": 1}', {"a": 1, "b": "from input"}),
        ('{"b": 2}', {"a": '{"b": 2}', "b": 2}),
        ("no json", {"a": "no json", "b": "no json"}),
        ("[1, 2]", {"a": "[1, 2]", "b": "[1, 2]"}),
    ],
)
async def test_llm_several_output_keys(reply: str, expected: dict[str, Any]) -> None:
    ctx = context({}, {"b": "from input"}, llm=ScriptedLLM([reply]), output_keys=["a", "b"])
    result = await LLMNode().execute(ctx)
    assert result.output == {"result": reply, **expected}
    assert state_of(ctx) == expected


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"report": {"x": 1}}', {"x": 1}),
        ('```\n{"report": "text"}\n```', "text"),
        ('{"report": 1, "more": 2}', '{"report": 1, "more": 2}'),
        ('{"other": 1}', '{"other": 1}'),
        ('See {"report": 1}', 'See {"report": 1}'),
        ("plain", "plain"),
    ],
)
async def test_llm_one_output_key(reply: str, value: Any) -> None:
    ctx = context(llm=ScriptedLLM([reply]), output_keys=["report"])
    assert (await LLMNode().execute(ctx)).output == {"result": reply, "report": value}


async def test_llm_with_tools_runs_them() -> None:
    used: list[ToolUse] = []

    def run(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "42")

    llm = ScriptedLLM([ToolUse("t1", "ask", {"q": 1}), "done"])
    ctx = context(llm=llm)
    ctx.available_tools = [Tool("ask", "asks")]
    result = await LLMNode(run).execute(ctx)
    assert result.output == {"result": "done"}
    assert [use.name for use in used] == ["ask"]
    assert llm.calls == 2


async def test_llm_async_tool_executor_runs_in_the_loop() -> None:
    here = threading.get_ident()

    async def run(use: ToolUse) -> ToolResult:
        await asyncio.sleep(0)
        return ToolResult(use.id, str(threading.get_ident() == here))

    def script(messages: Any, system: Any, tools: Any) -> Any:
        return ToolUse("t", "ask", {}) if len(messages) == 1 else messages[-1]["content"][0]["content"]

    ctx = context(llm=ScriptedLLM(script))
    ctx.available_tools = [Tool("ask", "asks")]
    assert (await LLMNode(run).execute(ctx)).output == {"result": "True"}


@pytest.mark.parametrize("with_tools", [True, False])
async def test_llm_double_may_be_a_mock(with_tools: bool) -> None:
    llm, executor = MagicMock(), MagicMock()
    for method in (llm.complete, llm.complete_with_tools):
        method.return_value = MagicMock(content="hi", input_tokens=1, output_tokens=2)
    ctx = context(llm=llm)
    ctx.available_tools = [Tool("t", "d")]
    result = await LLMNode(executor if with_tools else None).execute(ctx)
    assert (result.output, result.tokens_used) == ({"result": "hi"}, 3)
    called, other = (llm.complete_with_tools, llm.complete) if with_tools else (llm.complete, llm.complete_with_tools)
    called.assert_called_once()
    other.assert_not_called()
    expected = {"messages", "system", "tools", "tool_executor"} if with_tools else {"messages", "system"}
    assert set(called.call_args.kwargs) == expected
    if with_tools:
        given = called.call_args.kwargs["tool_executor"]
        assert given == executor  # guarded: a thread that nobody waits for calls no further tool
        given("use")
        executor.assert_called_once_with("use")


async def test_llm_does_not_block_the_event_loop() -> None:
    loop, asking, answer = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def script(messages: Any, system: Any, tools: Any) -> str:
        loop.call_soon_threadsafe(asking.set)
        assert answer.wait(10)
        return "done"

    task = asyncio.create_task(LLMNode().execute(context(llm=ScriptedLLM(script))))
    await asking.wait()  # returns only because the model waits in another thread
    answer.set()
    assert (await task).success


async def test_llm_errors() -> None:
    ctx = context(llm=ScriptedLLM([ConnectionError("down"), LeaseLost("run_1", 1)]))
    result = await LLMNode().execute(ctx)
    assert (result.success, result.error, result.error_type) == (False, "down", "ConnectionError")
    assert ctx.runtime.outcomes[0]["success"] is False
    with pytest.raises(LeaseLost):
        await LLMNode().execute(ctx)


# --- routers ------------------------------------------------------------------------------------------------------


ROUTES = {"urgent": "u", "urgent reply": "ur", "success": "s", "failure": "f", "error": "e", "default": "d"}


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ("urgent", "u"),
        ("urgent reply", "ur"),  # exact before contained
        ("most urgent replying", "u"),
        (True, "s"),
        (False, "f"),
        ("a success", "s"),
        (ValueError("x"), "e"),
        (None, "d"),
        (1, "d"),
        ("calm", "d"),
    ],
)
@pytest.mark.parametrize("place", ["input", "state"])
async def test_router_by_value(value: Any, target: str, place: str) -> None:
    given = {"route_on": value}
    ctx = context(
        given if place == "state" else {},
        given if place == "input" else {},
        node_type="router",
        routes=ROUTES,
        input_keys=["something_else"],
    )
    result = await RouterNode().execute(ctx)
    assert (result.success, result.next_node, result.output) == (True, target, {})
    assert result.route_reason
    assert ctx.runtime.outcomes[0]["success"] is True


async def test_router_default_matches_in_its_place() -> None:
    ctx = context({}, {"route_on": "very urgent"}, routes={"default": "d", "urgent": "u"})
    assert (await RouterNode().execute(ctx)).next_node == "d"


@pytest.mark.parametrize("routes", [{"yes": "y"}, {}])
async def test_router_without_a_match_fails_clearly(routes: dict[str, str]) -> None:
    ctx = context({}, {"route_on": "maybe"}, routes=routes)
    result = await RouterNode().execute(ctx)
    assert not result.success
    assert result.next_node is None
    assert "maybe" in str(result.error)
    assert "default" in str(result.error)
    assert ctx.runtime.outcomes[0]["success"] is False


async def test_router_reads_a_memory_without_peek() -> None:
    class Plain:
        def read(self, key: str) -> Any:
            raise PermissionError(key)

        def write(self, key: str, value: Any) -> None:
            raise AssertionError

        def read_all(self) -> dict[str, Any]:
            return {}

    ctx = context(routes={"default": "d"})
    ctx.memory = Plain()
    assert (await RouterNode().execute(ctx)).next_node == "d"


@pytest.mark.parametrize(
    ("reply", "target"),
    [
        ('{"chosen": "urgent", "reasoning": "on fire"}', "u"),
        ('I say {"chosen": "urgent", "reasoning": "on fire"}.', "u"),
        ('{"chosen": "unheard of"}', "d"),
        ('{"chosen": ["urgent"]}', "d"),
        ("urgent", "d"),
        (ConnectionError("down"), "d"),
    ],
)
async def test_router_by_model(reply: Any, target: str) -> None:
    ctx = context({"mail": "help"}, llm=ScriptedLLM([reply]), system_prompt="Triage.", routes=ROUTES)
    result = await RouterNode().execute(ctx)
    assert (result.success, result.next_node) == (True, target)
    if target == "u":
        assert result.route_reason == "on fire"
        assert result.tokens_used > 0


async def test_router_by_model_asks_with_input_and_routes() -> None:
    llm, questions = asked('{"chosen": "urgent"}')
    ctx = context({"mail": "help"}, llm=llm, system_prompt="Triage {mail}.", routes=ROUTES, input_keys=["mail"])
    await RouterNode().execute(ctx)
    ((user, system),) = questions
    assert "mail: help" in user
    assert "- urgent reply" in user
    assert system == "Triage help."


async def test_router_by_model_without_default_or_lease() -> None:
    ctx = context(llm=ScriptedLLM(["?", LeaseLost("run_1", 1)]), system_prompt="Triage.", routes={"urgent": "u"})
    assert "no known route" in str((await RouterNode().execute(ctx)).error)
    with pytest.raises(LeaseLost):
        await RouterNode().execute(ctx)


# --- text and JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        (" [1, 2] ", [1, 2]),
        ("42", 42),
        ('"word"', "word"),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("Here:\n```\nnot json\n```\n```json\n[1]\n```", [1]),
        ('so {"a": {"b": 1}} it is', {"a": {"b": 1}}),
        ("so [1, {}] it is", [1, {}]),
        ("nothing", None),
        ("{broken", None),
        ("NaN", None),
        ("[" * 100_000, None),
        ("9" * 5000, None),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_parse_json_reply(text: Any, value: Any) -> None:
    assert parse_json_reply(text) == value


def test_parse_json_object_and_braces() -> None:
    assert parse_json_object('[1] and {"a": 1}') == {"a": 1}
    assert parse_json_object('see {"a": 1}', in_prose=False) is None
    assert parse_json_object('```json\n{"a": 1}\n```', in_prose=False) == {"a": 1}
    assert widest_braces("x {a {b} } y") == "{a {b} }"
    assert widest_braces("} {") is None


def test_fill_placeholders() -> None:
    assert fill_placeholders("{a}{b} {{a}} {c} {a", {"a": "{b}", "b": 1}) == "{b}1 {{a}} {c} {a"
    assert fill_placeholders("{x.y} {a.b}", {"a.b": True}) == "{x.y} True"
    assert fill_placeholders("{a}", {}) == "{a}"


def test_text_of_is_the_same_in_every_process() -> None:
    assert text_of({"s": {"b", "a", "c"}, "é": (1, None)}) == '{"s": ["a", "b", "c"], "é": [1, null]}'
    assert text_of({(1, 2): 3}) == "{(1, 2): 3}"
    assert text_of(2.5) == "2.5"


@pytest.mark.parametrize(
    "value",
    ["x " * 5000, {str(i): i for i in range(5000)}, list(range(5000)), b"x" * 5000, 1 << 20_000, object(), {}],
    ids=str.split("text dict list bytes int object empty"),
)
def test_summaries_are_short(value: Any) -> None:
    summary = summary_of(value)
    assert 0 < len(summary) <= 200
    assert "\n" not in summary


def test_shorten() -> None:
    assert shorten("a\n  b") == "a b"
    assert shorten("abcdef", 4) == "abc…"
    assert len(shorten("a " * 4000, 100)) <= 100
