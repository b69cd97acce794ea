"""`GraphExecutor` without checkpoints: the way a run takes, what it carries, where it stops, pauses and resumes."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.llm.provider import Tool
from framework.llm.scripted import ScriptedLLM
from tests.graph.executor_kit import GOAL, MinimalRuntime, PlainNode, edge, failing, graph_of, returning, run

# --- the constructor and the shape of a result ---


def test_the_constructor_keeps_what_it_is_given() -> None:
    runtime, llm, manager = MinimalRuntime(), ScriptedLLM([]), MagicMock()
    tools, registry = [Tool("t", "a tool")], {"n": returning()}

    def tool_executor(use: Any) -> Any:
        return use

    def approve(request: Any) -> bool:
        return bool(request)

    executor = GraphExecutor(runtime, llm, tools, tool_executor, registry, approve, manager)
    assert executor.runtime is runtime
    assert executor.llm is llm
    assert executor.tools == tools
    assert executor.tool_executor is tool_executor
    assert executor.node_registry is registry
    assert executor.approval_callback is approve
    assert executor.checkpoint_manager is manager
    assert GraphExecutor(runtime).checkpoint_manager is None
    assert GraphExecutor(runtime).node_registry == {}


def test_a_result_has_the_defaults_of_the_contract() -> None:
    result = ExecutionResult(success=True)
    assert (result.output, result.error, result.steps_executed, result.total_tokens) == ({}, None, 0, 0)
    assert (result.total_latency_ms, result.path, result.paused_at, result.session_state) == (0, [], None, {})


async def test_one_node_runs_and_its_run_is_started_and_ended_by_keywords() -> None:
    runtime = MinimalRuntime()
    node = PlainNode(lambda ctx: NodeResult(success=True, output={"result": 123}, tokens_used=5, latency_ms=7))
    result = await run(graph_of("n"), {"n": node}, {"q": 1}, runtime=runtime)
    assert result.success
    assert result.error is None
    assert result.output == {"q": 1, "result": 123}
    assert (result.path, result.steps_executed) == (["n"], 1)
    assert (result.total_tokens, result.total_latency_ms) == (5, 7)
    assert result.paused_at is None
    assert result.session_state == {}
    assert result.run_id == "run-1"
    assert runtime.started == [{"goal_id": "goal", "goal_description": "Get it done", "input_data": {"q": 1}}]
    assert [ended["success"] for ended in runtime.ended] == [True]
    assert runtime.ended[0]["output_data"] == result.output
    assert runtime.problems == []


async def test_an_invalid_graph_fails_before_a_run_is_started() -> None:
    runtime = MinimalRuntime()
    graph = graph_of("n", entry_node="missing")
    result = await run(graph, {"n": returning()}, runtime=runtime)
    assert not result.success
    assert result.error is not None
    assert result.error.startswith("Invalid graph")
    assert "missing" in result.error
    assert (runtime.started, runtime.ended) == ([], [])


# --- what a node is given ---


async def test_the_input_wins_over_the_memory_of_the_session() -> None:
    node = returning()
    result = await run(graph_of("n"), {"n": node}, {"a": "input"}, {"memory": {"a": "session", "b": "session"}})
    assert result.output == {"a": "input", "b": "session"}
    assert node.contexts[0].input_data == {"a": "input"}


@pytest.mark.parametrize("session_state", [None, {}, {"memory": None}, {"memory": {}}])
async def test_an_empty_session_starts_at_the_entry_node(session_state: dict[str, Any] | None) -> None:
    result = await run(graph_of("a", "b"), {"a": returning(), "b": returning()}, None, session_state)
    assert result.path == ["a", "b"]


async def test_the_first_node_gets_the_callers_input_and_the_next_the_previous_output() -> None:
    nodes = {"a": returning(x=1), "b": returning(y=2), "c": returning()}
    await run(graph_of("a", "b", "c"), nodes, {"start": 0})
    assert [node.contexts[0].input_data for node in nodes.values()] == [{"start": 0}, {"x": 1}, {"y": 2}]


async def test_a_context_carries_spec_goal_model_and_only_the_nodes_own_tools() -> None:
    node, llm = returning(), ScriptedLLM([])
    tools = [Tool("search", "find"), Tool("write", "put")]
    spec = NodeSpec(id="n", tools=["write", "unknown"], max_retries=4)
    runtime = MinimalRuntime()
    await run(graph_of(spec), {"n": node}, runtime=runtime, llm=llm, tools=tools)
    ctx = node.contexts[0]
    assert ctx.runtime is runtime
    assert (ctx.node_id, ctx.node_spec) == ("n", spec)
    assert ctx.llm is llm
    assert [tool.name for tool in ctx.available_tools] == ["write"]
    assert ctx.goal is GOAL
    assert "Get it done" in ctx.goal_context
    assert (ctx.attempt, ctx.max_attempts) == (1, 4)


async def test_the_memory_of_a_context_is_scoped_to_the_nodes_keys() -> None:
    spec = NodeSpec(id="n", input_keys=["a"], output_keys=["b"])
    node = PlainNode(lambda ctx: NodeResult(True, {"seen": sorted(ctx.memory.read_all())}))
    result = await run(graph_of(spec), {"n": node}, {"a": 1, "secret": 2})
    assert result.output["seen"] == ["a"]
    memory = node.contexts[0].memory
    with pytest.raises(PermissionError):
        memory.read("secret")
    with pytest.raises(PermissionError):
        memory.write("a", 3)


async def test_a_registered_implementation_wins_over_the_node_type() -> None:
    llm = ScriptedLLM([])
    types = ("llm_tool_use", "llm_generate", "router", "function", "human_input", "anything")
    specs = [NodeSpec(id=kind, node_type=kind) for kind in types]
    result = await run(graph_of(*specs), {kind: returning() for kind in types}, llm=llm)
    assert result.path == list(types)
    assert llm.calls == 0


async def test_register_node_adds_an_implementation() -> None:
    executor = GraphExecutor(MinimalRuntime())
    executor.register_node("n", returning(x=1))
    result = await executor.execute(graph_of("n"), GOAL)
    assert result.output == {"x": 1}


@pytest.mark.parametrize("answer", [["a is missing"], "a is missing"])
async def test_what_validate_input_says_is_reported_and_the_node_runs_all_the_same(answer: Any) -> None:
    class Complaining(PlainNode):
        def validate_input(self, ctx: NodeContext) -> Any:
            return answer

    runtime = MinimalRuntime()
    result = await run(graph_of("n"), {"n": Complaining(returning(x=1).behaviour)}, runtime=runtime)
    assert result.success
    [(severity, description)] = runtime.problems
    assert severity == "warning"
    assert "a is missing" in description


async def test_a_validate_input_that_returns_nothing_or_is_missing_or_async_is_accepted() -> None:
    class Silent(PlainNode):
        def validate_input(self, ctx: NodeContext) -> Any:
            return None

    class Waiting(PlainNode):
        async def validate_input(self, ctx: NodeContext) -> list[str]:  # type: ignore[override]
            return []

    class Bare:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            return NodeResult(True)

    runtime, quiet = MinimalRuntime(), returning().behaviour
    nodes = {"a": Silent(quiet), "b": Waiting(quiet), "c": Bare()}
    result = await run(graph_of("a", "b", "c"), nodes, runtime=runtime)
    assert result.success
    assert runtime.problems == []


async def test_a_validate_input_that_raises_is_a_warning() -> None:
    class Broken(PlainNode):
        def validate_input(self, ctx: NodeContext) -> list[str]:
            raise KeyError("which")

    runtime = MinimalRuntime()
    result = await run(graph_of("n"), {"n": Broken(returning().behaviour)}, runtime=runtime)
    assert result.success
    assert [severity for severity, _ in runtime.problems] == ["warning"]


# --- edges ---


async def test_the_first_edge_that_holds_by_priority_is_taken_and_only_that() -> None:
    edges = [edge("a", "low"), edge("a", "high", priority=10), edge("a", "no", "on_failure", priority=20)]
    nodes = {name: returning() for name in ("a", "low", "high", "no")}
    result = await run(graph_of("a", "low", "high", "no", edges=edges), nodes)
    assert result.path == ["a", "high"]


async def test_edges_of_one_priority_are_tried_in_the_order_they_are_declared() -> None:
    edges = [edge("a", "second", "on_success"), edge("a", "third")]
    nodes = {name: returning() for name in ("a", "second", "third")}
    assert (await run(graph_of("a", "third", "second", edges=edges), nodes)).path == ["a", "second"]


async def test_without_an_edge_that_holds_the_run_ends_well() -> None:
    edges = [edge("a", "b", "on_failure"), edge("a", "b", "conditional", condition_expr="x > 5")]
    result = await run(graph_of("a", "b", edges=edges), {"a": returning(x=1), "b": returning()})
    assert result.success
    assert result.path == ["a"]


@pytest.mark.parametrize(("score", "target"), [(85, "good"), (80, "bad")])
@pytest.mark.parametrize("expression", ["score > 80", "output.score > 80", "output['score'] > 80", "memory.score > 80"])
async def test_a_condition_sees_what_the_node_has_just_returned(expression: str, score: int, target: str) -> None:
    edges = [edge("a", "good", "conditional", condition_expr=expression, priority=1), edge("a", "bad")]
    nodes = {"a": returning(score=score), "good": returning(), "bad": returning()}
    result = await run(graph_of("a", "good", "bad", edges=edges), nodes)
    assert result.path == ["a", target]


async def test_a_condition_sees_the_whole_memory_whatever_the_node_may_read() -> None:
    spec = NodeSpec(id="a", input_keys=["k"], output_keys=["x"])
    edges = [edge("a", "b", "conditional", condition_expr="other == 3")]
    result = await run(graph_of(spec, "b", edges=edges), {"a": returning(x=1), "b": returning()}, {"k": 1, "other": 3})
    assert result.path == ["a", "b"]


@pytest.mark.parametrize("expression", ["nonsense(", "unknown_name > 1", "__import__('os')", "().__class__", "x > 'a'"])
async def test_a_condition_that_cannot_be_evaluated_is_false_and_a_warning(expression: str) -> None:
    runtime = MinimalRuntime()
    edges = [edge("a", "b", "conditional", condition_expr=expression)]
    result = await run(graph_of("a", "b", edges=edges), {"a": returning(x=1), "b": returning()}, runtime=runtime)
    assert result.success
    assert result.path == ["a"]
    assert [severity for severity, _ in runtime.problems] == ["warning"]


async def test_input_mapping_renames_from_output_then_memory_and_drops_what_is_missing() -> None:
    mapping = {"text": "draft", "from_input": "topic", "nothing": "absent"}
    nodes = {"a": returning(draft="d", topic="new"), "b": returning()}
    result = await run(graph_of("a", "b", edges=[edge("a", "b", input_mapping=mapping)]), nodes, {"topic": "old"})
    assert result.output == {"topic": "new", "draft": "d", "text": "d", "from_input": "new"}
    assert nodes["b"].contexts[0].input_data == {"draft": "d", "topic": "new"}


async def test_input_mapping_is_written_whatever_the_permissions() -> None:
    spec = NodeSpec(id="a", output_keys=["x"])
    nodes = {"a": returning(x=1), "b": returning()}
    result = await run(graph_of(spec, "b", edges=[edge("a", "b", input_mapping={"elsewhere": "x"})]), nodes)
    assert result.output == {"x": 1, "elsewhere": 1}


async def test_next_node_wins_over_the_edges_and_maps_nothing() -> None:
    jump = PlainNode(lambda ctx: NodeResult(True, {"x": 1}, next_node="c"))
    edges = [edge("a", "b", input_mapping={"mapped": "x"}), edge("b", "c")]
    nodes = {"a": jump, "b": returning(), "c": returning()}
    result = await run(graph_of("a", "b", "c", edges=edges), nodes)
    assert result.path == ["a", "c"]
    assert result.output == {"x": 1}


async def test_an_empty_next_node_means_the_edges() -> None:
    runtime = MinimalRuntime()
    nodes = {"a": PlainNode(lambda ctx: NodeResult(True, next_node="")), "b": returning()}
    assert (await run(graph_of("a", "b"), nodes, runtime=runtime)).path == ["a", "b"]
    assert runtime.problems == []


async def test_a_next_node_that_does_not_exist_fails_the_run() -> None:
    runtime = MinimalRuntime()
    lost = PlainNode(lambda ctx: NodeResult(True, next_node="nowhere"))
    edges = [edge("a", "b"), edge("a", "b", "on_failure", priority=1)]
    result = await run(graph_of("a", "b", edges=edges), {"a": lost, "b": returning()}, {"k": 1}, runtime=runtime)
    assert not result.success
    assert result.error is not None
    assert "nowhere" in result.error
    assert (result.path, result.steps_executed, result.output) == (["a"], 1, {"k": 1})
    assert [severity for severity, _ in runtime.problems] == ["critical"]


async def test_llm_decide_asks_the_model_and_follows_success_without_one() -> None:
    edges = [edge("a", "b", "llm_decide", priority=1), edge("a", "c")]
    nodes = {name: returning() for name in ("a", "b", "c")}
    graph = graph_of("a", "b", "c", edges=edges)
    no, yes = ScriptedLLM(['{"proceed": false}']), ScriptedLLM(['{"proceed": true, "reasoning": "fine"}'])
    assert (await run(graph, nodes, llm=no)).path == ["a", "c"]
    assert (await run(graph, nodes, llm=yes)).path == ["a", "b"]
    assert (await run(graph, nodes)).path == ["a", "b"]
    assert (no.calls, yes.calls) == (1, 1)


# --- where a run stops ---


async def test_a_terminal_node_stops_the_run_and_its_output_is_kept() -> None:
    nodes = {"a": returning(x=1), "b": PlainNode(lambda ctx: NodeResult(True, {"y": 2}, next_node="c")), "c": failing()}
    result = await run(graph_of("a", "b", "c", terminal_nodes=["b"]), nodes, {"i": 0})
    assert result.success
    assert result.path == ["a", "b"]
    assert result.output == {"i": 0, "x": 1, "y": 2}


async def test_a_loop_counts_each_visit_and_ends_when_its_condition_does() -> None:
    counter = PlainNode(lambda ctx: NodeResult(True, {"n": (ctx.memory.read("n") or 0) + 1}, tokens_used=2))
    edges = [edge("a", "a", "conditional", condition_expr="n < 4", priority=1), edge("a", "end")]
    result = await run(graph_of("a", "end", edges=edges), {"a": counter, "end": returning()})
    assert result.path == ["a", "a", "a", "a", "end"]
    assert (result.steps_executed, result.total_tokens) == (5, 8)


async def test_reaching_max_steps_is_a_failure_that_names_the_limit() -> None:
    runtime = MinimalRuntime()
    graph = graph_of("a", edges=[edge("a", "a")], max_steps=7)
    result = await run(graph, {"a": returning(x=1)}, runtime=runtime)
    assert not result.success
    assert result.error is not None
    assert "max_steps" in result.error
    assert "7" in result.error
    assert (result.path, result.steps_executed) == (["a"] * 7, 7)
    assert result.output == {"x": 1}
    assert [ended["success"] for ended in runtime.ended] == [False]
    assert [severity for severity, _ in runtime.problems] == ["critical"]


async def test_a_run_of_exactly_max_steps_succeeds() -> None:
    nodes = {"a": returning(), "b": returning()}
    assert (await run(graph_of("a", "b", max_steps=2), nodes)).success
    assert (await run(graph_of("a", "b", max_steps=2, terminal_nodes=["b"]), nodes)).success
    assert not (await run(graph_of("a", "b", max_steps=1), nodes)).success


# --- pause and resume ---


def asking() -> GraphSpec:
    return graph_of("a", "ask", "b", pause_nodes=["ask"])


async def test_a_pause_node_runs_then_pauses_with_everything_a_resume_needs() -> None:
    runtime = MinimalRuntime()
    nodes = {"a": returning(x=1), "ask": returning(question="why?"), "b": returning(done=True)}
    result = await run(asking(), nodes, {"i": 0}, runtime=runtime)
    assert result.success
    assert result.paused_at == "ask"
    assert result.path == ["a", "ask"]
    assert result.output == {"i": 0, "x": 1, "question": "why?"}
    assert result.session_state == {
        "paused_at": "ask",
        "resume_from": "ask_resume",
        "memory": result.output,
        "next_node": "b",
    }
    assert [ended["success"] for ended in runtime.ended] == [True]
    assert not nodes["b"].contexts

    resumed = await run(asking(), nodes, {"answer": "because"}, result.session_state)
    assert resumed.success
    assert resumed.path == ["b"]
    assert resumed.output == {"i": 0, "x": 1, "question": "why?", "answer": "because", "done": True}
    assert nodes["b"].contexts[0].input_data == {"answer": "because"}


async def test_a_resume_goes_to_the_entry_point_of_the_pause_node() -> None:
    graph = graph_of("a", "ask", "b", "onward", pause_nodes=["ask"], entry_points={"ask_resume": "onward"})
    nodes = {name: returning() for name in ("a", "ask", "b", "onward")}
    paused = await run(graph, nodes)
    assert (await run(graph, nodes, None, paused.session_state)).path == ["onward"]


async def test_the_next_node_of_a_pause_is_the_one_its_edges_or_its_own_choice_lead_to() -> None:
    edges = [edge("ask", "no", "conditional", condition_expr="n > 5", priority=9), edge("ask", "yes")]
    graph = graph_of("ask", "no", "yes", edges=edges, pause_nodes=["ask"])
    assert (await run(graph, {"ask": returning(n=1)})).session_state["next_node"] == "yes"
    assert (await run(graph, {"ask": returning(n=9)})).session_state["next_node"] == "no"
    chooser = PlainNode(lambda ctx: NodeResult(True, next_node="no"))
    assert (await run(graph, {"ask": chooser})).session_state["next_node"] == "no"


async def test_a_pause_comes_before_the_end_and_nothing_runs_after_it() -> None:
    nodes = {"a": returning(), "ask": returning(x=1)}
    graph = graph_of("a", "ask", pause_nodes=["ask"], terminal_nodes=["ask"])
    paused = await run(graph, nodes)
    assert paused.paused_at == "ask"
    assert paused.session_state["next_node"] is None
    resumed = await run(graph, nodes, {"answer": 1}, paused.session_state)
    assert resumed.success
    assert (resumed.path, resumed.output) == ([], {"x": 1, "answer": 1})


async def test_a_failed_pause_node_does_not_pause() -> None:
    result = await run(asking(), {"a": returning(), "ask": failing(), "b": failing("b too")})
    assert result.paused_at is None
    assert not result.success
    edges = [edge("ask", "b", "on_success")]
    result = await run(graph_of("ask", "b", edges=edges, pause_nodes=["ask"]), {"ask": failing(), "b": returning()})
    assert not result.success
    assert (result.paused_at, result.session_state, result.path) == (None, {}, ["ask"])


@pytest.mark.parametrize(
    ("session_state", "path"),
    [
        ({"resume_from": "b"}, ["b", "c"]),
        ({"resume_from": "late"}, ["c"]),
        ({"paused_at": "a", "resume_from": "a_resume", "next_node": "c"}, ["c"]),
        ({"paused_at": "b", "resume_from": "b_resume", "next_node": None}, ["c"]),
        ({"paused_at": None, "resume_from": None, "next_node": None}, ["a", "b", "c"]),
        ({"next_node": "b"}, ["b", "c"]),
    ],
)
async def test_a_session_names_where_to_start(session_state: dict[str, Any], path: list[str]) -> None:
    entries = {"late": "c", "b_resume": "c"}
    graph = graph_of("a", "b", "c", pause_nodes=["b"], entry_points=entries, terminal_nodes=["c"])
    graph.pause_nodes = ["b"] if session_state.get("paused_at") == "b" else []
    result = await run(graph, {name: returning() for name in "abc"}, None, {"memory": {}, **session_state})
    assert result.path == path


@pytest.mark.parametrize("session_state", [{"resume_from": "gone"}, {"paused_at": "gone", "next_node": "gone too"}])
async def test_a_position_that_no_longer_exists_is_an_error_and_nothing_starts_over(
    session_state: dict[str, Any],
) -> None:
    runtime, node = MinimalRuntime(), returning()
    result = await run(graph_of("a"), {"a": node}, None, session_state, runtime=runtime)
    assert not result.success
    assert result.error is not None
    assert "gone" in result.error
    assert (node.contexts, runtime.started) == ([], [])


async def test_a_resume_changes_neither_the_session_nor_the_input() -> None:
    session: dict[str, Any] = {"memory": {"a": 1}, "resume_from": "b"}
    given = {"x": 1}
    await run(graph_of("a", "b"), {"a": returning(), "b": returning(a=2, x=2)}, given, session)
    assert session == {"memory": {"a": 1}, "resume_from": "b"}
    assert given == {"x": 1}
