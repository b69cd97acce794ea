"""`GraphExecutor` with the built-in node types: functions, language models with tools, routers, people."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.llm.provider import LLMProvider, LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from tests.graph.executor_kit import GOAL, MinimalRuntime, PlainNode, edge, graph_of, returning, run


async def run_functions(
    graph: GraphSpec, functions: dict[str, Callable[..., Any]], input_data: dict[str, Any] | None = None
) -> ExecutionResult:
    executor = GraphExecutor(MinimalRuntime())
    for node_id, function in functions.items():
        executor.register_function(node_id, function)
    return await executor.execute(graph, GOAL, input_data)


def function(node_id: str, inputs: str = "", outputs: str = "", **fields: Any) -> NodeSpec:
    fields = {"max_retries": 1, "node_type": "function", **fields}
    return NodeSpec(id=node_id, input_keys=inputs.split(), output_keys=outputs.split(), **fields)


# --- functions ---


async def test_a_chain_of_functions_is_called_with_the_declared_keys() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    async def double(total: int) -> int:
        return 2 * total

    graph = graph_of(function("add", "a b", "total"), function("double", "total", "doubled"))
    result = await run_functions(graph, {"add": add, "double": double}, {"a": 2, "b": 3})
    assert result.success, result.error
    assert result.output == {"a": 2, "b": 3, "total": 5, "doubled": 10, "result": 10}


async def test_a_function_is_called_with_keys_that_an_edge_mapped() -> None:
    graph = graph_of(function("a", "x"), function("b", "y", "z"), edges=[edge("a", "b", input_mapping={"y": "result"})])
    result = await run_functions(graph, {"a": lambda x: x + 1, "b": lambda y: y * 10}, {"x": 1})
    assert result.output == {"x": 1, "result": 20, "y": 2, "z": 20}


async def test_pass_through_keeps_result_for_the_next_function() -> None:
    graph = graph_of(function("a", "x"), function("b", "result", "end"))
    result = await run_functions(graph, {"a": lambda x: x + 1, "b": lambda result: result * 10}, {"x": 1})
    assert result.output["end"] == 20


async def test_a_function_without_input_keys_gets_what_came_before() -> None:
    graph = graph_of(function("a"), function("b"))
    result = await run_functions(graph, {"a": lambda **given: sorted(given), "b": lambda result: result}, {"q": 1})
    assert result.output["result"] == ["q"]


async def test_a_returned_dict_is_spread_over_the_declared_output_keys() -> None:
    graph = graph_of(function("a", "", "x y"), function("b", "x y", "sum"))
    result = await run_functions(graph, {"a": lambda: {"x": 1, "y": 2, "z": 3}, "b": lambda x, y: x + y})
    assert (result.output["x"], result.output["y"], result.output["sum"]) == (1, 2, 3)
    assert "z" not in result.output


async def test_a_condition_sees_the_result_of_a_function() -> None:
    edges = [edge("a", "big", "conditional", condition_expr="result > 10", priority=1), edge("a", "small")]
    graph = graph_of(function("a", "n"), function("big"), function("small"), edges=edges)
    functions: dict[str, Callable[..., Any]] = {
        "a": lambda n: n * 2,
        "big": lambda **given: "big",
        "small": lambda **given: "small",
    }
    assert (await run_functions(graph, functions, {"n": 6})).path == ["a", "big"]
    assert (await run_functions(graph, functions, {"n": 5})).path == ["a", "small"]


async def test_an_exception_of_a_function_is_retried_and_then_fails_the_run() -> None:
    calls: list[int] = []

    def broken(n: int) -> int:
        calls.append(n)
        raise ValueError("bad number")

    spec = function("a", "n", max_retries=3, retry_delay_seconds=0)
    result = await run_functions(graph_of(spec), {"a": broken}, {"n": 4})
    assert not result.success
    assert "failed after 3 attempts" in (result.error or "")
    assert "bad number" in (result.error or "")
    assert calls == [4, 4, 4]


async def test_a_function_node_nobody_registered_fails_at_once_and_says_so() -> None:
    runtime = MinimalRuntime()
    result = await run(graph_of(function("a", max_retries=3)), {}, runtime=runtime, llm=ScriptedLLM([]))
    assert not result.success
    assert "register" in (result.error or "")
    assert "'a'" in (result.error or "")
    assert result.path == ["a"]
    assert [ended["success"] for ended in runtime.ended] == [False]


# --- permissions ---


async def test_reading_what_was_not_declared_is_a_failed_attempt() -> None:
    nosy = PlainNode(lambda ctx: NodeResult(True, {"x": ctx.memory.read("secret")}))
    spec = NodeSpec(id="n", input_keys=["a"], max_retries=2, retry_delay_seconds=0)
    result = await run(graph_of(spec), {"n": nosy}, {"a": 1, "secret": 2})
    assert not result.success
    assert "failed after 2 attempts" in (result.error or "")
    assert "secret" in (result.error or "")


async def test_writing_what_was_not_declared_is_a_failed_attempt_and_writes_nothing() -> None:
    def behave(ctx: NodeContext) -> NodeResult:
        ctx.memory.write("mine", 1)
        ctx.memory.write("yours", 1)
        return NodeResult(True)

    result = await run(graph_of(NodeSpec(id="n", output_keys=["mine"], max_retries=1)), {"n": PlainNode(behave)})
    assert not result.success
    assert "yours" in (result.error or "")
    assert result.output == {}


async def test_no_declared_keys_mean_no_restriction() -> None:
    def behave(ctx: NodeContext) -> NodeResult:
        ctx.memory.write("anything", ctx.memory.read("q"))
        return NodeResult(True)

    assert (await run(graph_of("n"), {"n": PlainNode(behave)}, {"q": 1})).output == {"q": 1, "anything": 1}


# --- language models ---


async def test_an_llm_node_asks_the_model_and_counts_its_tokens() -> None:
    seen: list[tuple[Any, Any]] = []

    def script(messages: list[Any], system: str | None, tools: list[Tool]) -> LLMResponse:
        seen.append((messages[-1]["content"], system))
        return LLMResponse("a reply", "m", input_tokens=11, output_tokens=4)

    spec = NodeSpec(
        id="n", node_type="llm_generate", input_keys=["topic"], output_keys=["text"],
        system_prompt='On {topic}. Answer like {"a": {}}.',
    )  # fmt: skip
    result = await run(graph_of(spec), {}, {"topic": "rain"}, llm=ScriptedLLM(script))
    assert result.success
    assert result.output == {"topic": "rain", "text": "a reply", "result": "a reply"}
    assert result.total_tokens == 15
    [(message, system)] = seen
    assert "topic: rain" in message
    assert system is not None
    assert 'On rain. Answer like {"a": {}}.' in system
    assert "Get it done" in system


async def test_several_output_keys_are_read_from_a_json_reply() -> None:
    llm = ScriptedLLM(['Here:\n```json\n{"title": "T", "score": 90}\n```'])
    spec = NodeSpec(id="n", output_keys=["title", "score"])
    edges = [edge("n", "good", "conditional", condition_expr="score > 80")]
    result = await run(graph_of(spec, "good", edges=edges), {"good": returning()}, llm=llm)
    assert result.path == ["n", "good"]
    assert (result.output["title"], result.output["score"]) == ("T", 90)


async def test_tools_are_called_through_the_tool_executor() -> None:
    used: list[ToolUse] = []

    def call(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "42")

    llm = ScriptedLLM([ToolUse("1", "search", {"q": "x"}), "the answer is 42"])
    spec = NodeSpec(id="n", tools=["search"], output_keys=["answer"])
    tools = [Tool("search", "find"), Tool("other", "not for this node")]
    result = await run(graph_of(spec), {}, {"q": "x"}, llm=llm, tools=tools, tool_executor=call)
    assert result.output["answer"] == "the answer is 42"
    assert [use.name for use in used] == ["search"]
    assert llm.calls == 2


@pytest.mark.parametrize("as_object", [False, True])
async def test_an_async_tool_executor_runs_in_the_event_loop(as_object: bool) -> None:
    threads: list[threading.Thread] = []

    async def answer(use: ToolUse) -> ToolResult:
        threads.append(threading.current_thread())
        return ToolResult(use.id, "ok")

    class Answering:
        async def __call__(self, use: ToolUse) -> ToolResult:
            return await answer(use)

    call = Answering() if as_object else answer
    llm = ScriptedLLM([ToolUse("1", "t", {}), "done"])
    spec = NodeSpec(id="n", tools=["t"])
    result = await run(graph_of(spec), {}, llm=llm, tools=[Tool("t", "")], tool_executor=call)
    assert result.success, result.error
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("node_type", ["llm_tool_use", "llm_generate", "something_else"])
async def test_which_node_types_are_given_tools(node_type: str) -> None:
    llm = MagicMock(spec=LLMProvider)
    llm.complete.return_value = llm.complete_with_tools.return_value = LLMResponse("r", "m")
    spec = NodeSpec(id="n", node_type=node_type, tools=["t"])
    result = await run(graph_of(spec), {}, llm=llm, tools=[Tool("t", "")], tool_executor=MagicMock())
    assert result.output == {"result": "r"}
    assert llm.complete_with_tools.call_count == (0 if node_type == "llm_generate" else 1)
    assert llm.complete.call_count == (1 if node_type == "llm_generate" else 0)
    called = llm.complete if node_type == "llm_generate" else llm.complete_with_tools
    assert called.call_args.args == ()
    assert {"messages", "system"} <= set(called.call_args.kwargs)


async def test_without_a_model_an_llm_node_fails() -> None:
    result = await run(graph_of("n"), {})
    assert not result.success
    assert "LLM not available" in (result.error or "")


async def test_a_model_that_fails_is_retried() -> None:
    llm = ScriptedLLM([ConnectionError("down"), "up again"])
    spec = NodeSpec(id="n", output_keys=["text"], retry_delay_seconds=0)
    result = await run(graph_of(spec), {}, llm=llm)
    assert result.output["text"] == "up again"


async def test_no_second_model_is_ever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-key")
    llm = ScriptedLLM(["no json at all"])
    spec = NodeSpec(id="n", input_keys=["a", "b", "c"], output_keys=["x", "y"])
    result = await run(graph_of(spec), {}, {"a": 1, "b": 2, "c": 3}, llm=llm)
    assert (result.output["x"], result.output["y"]) == ("no json at all", "no json at all")
    assert llm.calls == 1


# --- routers ---


def routing(routes: dict[str, str], **fields: Any) -> tuple[GraphSpec, dict[str, Any]]:
    fields = {"max_retries": 1, "node_type": "router", "routes": routes, **fields}
    targets = list(dict.fromkeys(routes.values()))
    router = NodeSpec(id="route", **fields)
    return graph_of(router, *targets, edges=[]), {target: returning(at=target) for target in targets}


@pytest.mark.parametrize(
    ("value", "target"),
    [("alpha", "a"), ("the beta way", "b"), (True, "yes"), (False, "no"), (ValueError("x"), "err"), ("?", "other")],
)
async def test_a_router_follows_the_route_its_value_matches(value: Any, target: str) -> None:
    routes = {"alpha": "a", "beta": "b", "success": "yes", "failure": "no", "error": "err", "default": "other"}
    graph, nodes = routing(routes)
    result = await run(graph, nodes, {"route_on": value})
    assert result.path == ["route", target]
    assert result.output == {"route_on": value, "at": target}


async def test_a_router_reads_its_value_from_the_state_whatever_its_input_keys_are() -> None:
    graph, nodes = routing({"x": "a", "default": "b"}, input_keys=["unrelated"])
    graph.nodes.insert(0, NodeSpec(id="first", max_retries=1))
    graph.entry_node = "first"
    graph.edges.append(edge("first", "route"))
    nodes["first"] = returning(unrelated=1)
    result = await run(graph, nodes, {"route_on": "x"})
    assert result.path == ["first", "route", "a"]


async def test_a_router_without_a_matching_route_or_default_fails_clearly() -> None:
    runtime = MinimalRuntime()
    graph, nodes = routing({"x": "a"})
    result = await run(graph, nodes, {"route_on": "nothing like it!"}, runtime=runtime)
    assert not result.success
    assert "route" in (result.error or "")
    assert "default" in (result.error or "")
    assert result.path == ["route"]
    assert runtime.problems[-1][0] == "critical"


async def test_a_router_that_fails_may_be_caught() -> None:
    graph, nodes = routing({"x": "a"})
    graph.nodes.append(NodeSpec(id="rescue", max_retries=1))
    graph.edges.append(edge("route", "rescue", "on_failure"))
    result = await run(graph, {**nodes, "rescue": returning()}, {"route_on": "?"})
    assert result.success
    assert result.path == ["route", "rescue"]


@pytest.mark.parametrize(
    ("reply", "target"),
    [
        ('{"chosen": "left", "reasoning": "shorter"}', "l"),
        ('{"chosen": "up"}', "d"),
        ("no json", "d"),
        (ConnectionError("down"), "d"),
    ],
)
async def test_a_router_with_a_prompt_asks_the_model_and_falls_back_to_default(reply: Any, target: str) -> None:
    graph, nodes = routing({"left": "l", "right": "r", "default": "d"}, system_prompt="Where to?")
    result = await run(graph, nodes, {"q": 1}, llm=ScriptedLLM([reply]))
    assert result.path == ["route", target]


async def test_a_route_to_a_node_that_does_not_exist_makes_the_graph_invalid() -> None:
    graph, nodes = routing({"x": "a"})
    graph.nodes[0].routes["y"] = "nowhere"
    result = await run(graph, nodes, {"route_on": "x"})
    assert (result.error or "").startswith("Invalid graph")


async def test_routes_count_as_ways_to_a_node_and_may_end_or_pause_the_run() -> None:
    graph, nodes = routing({"x": "a", "default": "b"})
    graph.terminal_nodes, graph.pause_nodes = ["a"], ["b"]
    assert (await run(graph, nodes, {"route_on": "x"})).path == ["route", "a"]
    paused = await run(graph, nodes, {"route_on": "-"})
    assert (paused.path, paused.paused_at) == (["route", "b"], "b")


# --- people ---


def person(**fields: Any) -> NodeSpec:
    return NodeSpec(**{"id": "ask", "node_type": "human_input", **fields})


async def test_a_person_nobody_stands_in_for_pauses_the_run_and_no_model_is_asked() -> None:
    llm = ScriptedLLM([])
    graph = graph_of("a", person(output_keys=["answer"]), "b")
    nodes = {"a": returning(question="?"), "b": returning(done=1)}
    paused = await run(graph, nodes, llm=llm)
    assert paused.success
    assert paused.paused_at == "ask"
    assert (paused.path, paused.output) == (["a"], {"question": "?"})
    assert llm.calls == 0

    still = await run(graph, nodes, None, paused.session_state)
    assert still.paused_at == "ask"
    answered = await run(graph, nodes, {"answer": "yes"}, still.session_state)
    assert answered.paused_at is None
    assert answered.path == ["ask", "b"]
    assert answered.output == {"question": "?", "answer": "yes", "done": 1}


async def test_an_answer_that_is_there_already_is_not_asked_for() -> None:
    result = await run(graph_of(person(output_keys=["answer"]), "b"), {"b": returning()}, {"answer": "yes"})
    assert result.path == ["ask", "b"]


async def test_a_person_without_output_keys_is_passed_by_any_resume() -> None:
    graph = graph_of(person(), "b")
    paused = await run(graph, {"b": returning()})
    assert paused.paused_at == "ask"
    assert (await run(graph, {"b": returning()}, None, paused.session_state)).path == ["ask", "b"]


async def test_a_person_in_the_pause_nodes_is_waited_for_once() -> None:
    edges = [edge("ask", "b", "conditional", condition_expr="answer == 'yes'", priority=1), edge("ask", "c")]
    graph = graph_of(person(output_keys=["answer"]), "b", "c", edges=edges, pause_nodes=["ask"])
    nodes = {"b": returning(), "c": returning()}
    paused = await run(graph, nodes)
    assert paused.paused_at == "ask"
    assert (await run(graph, nodes, {"answer": "yes"}, paused.session_state)).path == ["ask", "b"]
    assert (await run(graph, nodes, {"answer": "no"}, paused.session_state)).path == ["ask", "c"]


async def test_a_person_after_a_pause_is_asked_in_turn() -> None:
    graph = graph_of("a", person(), "b", pause_nodes=["a"])
    nodes = {"a": returning(), "b": returning()}
    first = await run(graph, nodes)
    assert (first.paused_at, first.session_state["next_node"]) == ("a", "ask")
    second = await run(graph, nodes, None, first.session_state)
    assert (second.paused_at, second.path) == ("ask", [])
    assert (await run(graph, nodes, None, second.session_state)).path == ["ask", "b"]


async def test_somebody_registered_for_a_person_is_used() -> None:
    result = await run(graph_of(person(output_keys=["answer"])), {"ask": returning(answer="automatic")})
    assert (result.paused_at, result.output) == (None, {"answer": "automatic"})
