"""Models inside runs: what their errors mean for retries, what they cost, structured replies, and resuming."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, patch

import pytest

from framework._secrets import register_secret
from framework.errors import LLMError, LLMRateLimited, LLMRefused, LLMTimeout, LLMUnavailable
from framework.graph.attempts import delay_before, should_retry
from framework.graph.builtin_nodes import LLMNode
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.node_base import NodeContext, NodeResult
from framework.graph.node_errors import failed_result
from framework.graph.worker_errors import transient_kind
from framework.llm.mock import MockLLM
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import open_storage
from framework.storage.checkpoints import parse_log

if TYPE_CHECKING:
    from pathlib import Path

    from tests.llm.conftest import Server

GOAL = Goal(id="g", name="G", description="Get it done")


@pytest.fixture
def slept() -> Iterator[list[float]]:
    """The waits before attempts, none of which is waited for."""
    waits: list[float] = []
    with patch("asyncio.sleep", AsyncMock(side_effect=waits.append)):
        yield waits


def node(node_id: str = "n", **fields: Any) -> NodeSpec:
    return NodeSpec.model_validate(
        {"id": node_id, "node_type": "llm_generate", "output_keys": ["a"], "retry_delay_seconds": 0.0, **fields}
    )


def graph(*nodes: NodeSpec, edges: list[EdgeSpec] | None = None, **fields: Any) -> GraphSpec:
    links = edges or [EdgeSpec(id=f"{a.id}-{b.id}", source=a.id, target=b.id) for a, b in pairwise(nodes)]
    return GraphSpec(id="graph", goal_id="g", entry_node=nodes[0].id, nodes=list(nodes), edges=links, **fields)


async def run(spec: GraphSpec, llm: Any, path: Path, manager: Any = None, **given: Any) -> ExecutionResult:
    executor = GraphExecutor(Runtime(path), llm, checkpoint_manager=manager, **given.pop("made", {}))
    return await executor.execute(spec, GOAL, given.pop("input_data", {"q": "?"}), **given)


# --- retries ----------------------------------------------------------------------------------------------------------


async def test_a_rate_limit_is_waited_out_as_long_as_the_provider_asks(slept: list[float], tmp_path: Path) -> None:
    llm = ScriptedLLM([LLMRateLimited("slow down", retry_after=17.0), LLMTimeout("late"), "done"])
    result = await run(graph(node()), llm, tmp_path)
    assert result.output["a"] == "done"
    assert slept == [17.0, 0.0]


async def test_a_permanent_error_fails_at_once(slept: list[float], tmp_path: Path) -> None:
    llm = ScriptedLLM([LLMRefused("no such model", status=404), "never"])
    result = await run(graph(node(max_retries=5)), llm, tmp_path)
    assert not result.success
    assert "failed after 1 attempts: no such model" in (result.error or "")
    assert slept == []


@pytest.mark.parametrize(
    ("error", "retry_on", "expected"),
    [
        (LLMRateLimited("x"), [], True),
        (LLMRateLimited("x"), ["rate_limit"], True),
        (LLMRateLimited("x"), ["LLMRateLimited"], True),
        (LLMRateLimited("x"), ["LLMError"], True),
        (LLMRateLimited("x"), ["timeout", "connection_error"], False),
        (LLMTimeout("x"), ["timeout"], True),
        (LLMUnavailable("x"), ["connection_error"], True),
        (LLMRefused("x"), [], False),
        (LLMRefused("rate_limit in the text"), ["rate_limit"], False),
        (LLMRefused("x"), ["llm_error"], True),
        (LLMRefused("x"), ["LLMRefused"], True),
        (ConnectionResetError("x"), ["connection_error"], True),
        (ConnectionResetError("x"), ["OSError"], True),
        (TimeoutError("x"), ["timeout"], True),
        (ValueError("the moon is out"), ["MOON"], True),
        (ValueError("x"), ["timeout"], False),
        (ValueError("x"), [], True),
    ],
)
def test_retry_on_knows_kinds_classes_and_words(error: Exception, retry_on: list[str], expected: bool) -> None:
    assert should_retry(node(retry_on=retry_on), failed_result(error)) is expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LLMRateLimited("x", status=429), "rate_limit"),
        (LLMTimeout("x"), "timeout"),
        (LLMUnavailable("x", status=500), "connection_error"),
        (LLMRefused("x", status=429), None),
    ],
)
def test_plans_know_the_kinds_too(error: LLMError, kind: str | None) -> None:
    assert transient_kind(error) == kind
    result = failed_result(error)
    assert (result.error_type, result.transient) == (kind or "llm_error", kind is not None)


def test_the_wait_is_bounded_and_comes_before_the_back_off() -> None:
    spec = node(retry_delay_seconds=2.0)
    assert delay_before(spec, 2, 1.0) == 2.0
    assert delay_before(spec, 2, 1.0, 10.0) == 12.0
    assert delay_before(spec, 2, 1.0, 4000.0) == 302.0
    assert delay_before(node(retry_after_max_seconds=5, retry_delay_seconds=0), 2, 1.0, 4000.0) == 5.0
    assert delay_before(spec, 2, 1.0, -3.0) == 2.0


def test_an_error_keeps_no_secret() -> None:
    register_secret("very-secret-value")
    assert failed_result(ValueError("key very-secret-value refused")).error == "key *** refused"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (KeyError('a "b"'), "KeyError: 'a \"b\"'"),
        (ValueError("boom"), "boom"),
        (ValueError(), "ValueError"),
        (OSError(5), "OSError: 5"),
        (ValueError("λάθος"), "λάθος"),
        (RuntimeError("'x' is not there"), "'x' is not there"),
    ],
)
def test_an_error_says_what_it_is_when_its_text_does_not(error: Exception, text: str) -> None:
    assert failed_result(error).error == text


# --- replies that are no whole answers --------------------------------------------------------------------------------


def short(reason: str, content: str = "Half a", **more: Any) -> LLMResponse:
    return LLMResponse(content, "m", input_tokens=10, output_tokens=5, stop_reason=reason, cost=0.5, **more)


@pytest.mark.parametrize("reason", ["length", "max_tokens", "model_context_window_exceeded"])
@pytest.mark.parametrize("fields", [{"output_keys": ["a", "b"]}, {"output_schema": {"type": "object"}}])
async def test_a_json_reply_that_was_cut_off_is_a_failed_attempt(
    tmp_path: Path, reason: str, fields: dict[str, Any]
) -> None:
    replies: list[LLMResponse | str] = [short(reason), '{"a": 1, "b": 2}']
    result = await run(graph(node(max_tokens=50, **fields)), ScriptedLLM(replies), tmp_path)
    assert result.success
    assert result.output["a"] == 1
    assert result.total_cost > 0.5  # what the cut one cost is counted
    result = await run(graph(node(max_tokens=50, max_retries=1, **fields)), ScriptedLLM([short(reason)]), tmp_path)
    assert not result.success
    assert f"cut off at the limit of 50 tokens ({reason}); raise max_tokens" in (result.error or "")
    assert (result.total_tokens, result.total_cost) == (15, 0.5)


async def test_a_text_that_was_cut_off_is_used_and_told_of(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    executor = GraphExecutor(runtime, ScriptedLLM([short("length")]))
    result = await executor.execute(graph(node()), GOAL, {"q": "?"})
    assert (result.success, result.output["a"]) == (True, "Half a")
    document = runtime.storage.load_run(result.run_id or "")
    assert document is not None
    (problem,) = document.problems
    assert problem.severity == "warning"
    assert "cut off at the limit" in problem.description


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("refusal", "refused to answer (refusal): Half a"),
        ("content_filter", "refused to answer (content_filter): Half a"),
        ("max_iterations", "limit of the tool loop (max_iterations): Half a"),
    ],
)
async def test_a_refusal_or_an_endless_loop_fails_at_once(
    slept: list[float], tmp_path: Path, reason: str, text: str
) -> None:
    llm = ScriptedLLM([short(reason), "never"])
    result = await run(graph(node(max_retries=3)), llm, tmp_path)
    assert not result.success
    assert text in (result.error or "")
    assert "failed after 1 attempts" in (result.error or "")
    assert (llm.calls, slept, result.total_tokens) == (1, [], 15)
    assert should_retry(node(retry_on=[reason]), NodeResult(False, error="x", error_names=(reason,), transient=False))


async def test_a_tool_loop_at_its_limit_fails_the_node(tmp_path: Path) -> None:
    tool, used = Tool("t", ""), list[ToolUse]()

    def call(use: ToolUse) -> ToolResult:
        used.append(use)
        return ToolResult(use.id, "r")

    llm = ScriptedLLM(lambda *_: ToolUse("1", "t", {}))
    spec = graph(node(node_type="llm_tool_use", tools=["t"]))
    result = await run(spec, llm, tmp_path, made={"tools": [tool], "tool_executor": call})
    assert not result.success
    assert "Stopped after 10 calls" in (result.error or "")
    assert len(used) == 10


@pytest.mark.parametrize("reason", ["", "end_turn", "stop", "tool_use", "stop_sequence"])
async def test_any_other_reason_is_a_whole_reply(tmp_path: Path, reason: str) -> None:
    result = await run(graph(node()), ScriptedLLM([short(reason)]), tmp_path)
    assert result.output["a"] == "Half a"


async def test_a_router_waits_for_its_model_before_it_takes_the_default(slept: list[float], tmp_path: Path) -> None:
    routes = {"yes": "y", "default": "d"}
    router = node("r", node_type="router", system_prompt="Choose.", routes=routes, output_keys=[])
    ends = [node(each, node_type="human_input", output_keys=[]) for each in "yd"]
    spec = graph(router, *ends, edges=[EdgeSpec(id="e", source="y", target="d")], max_steps=2)
    busy = LLMRateLimited("busy", retry_after=1.0)
    made = {"node_registry": {each: LLMNode() for each in "yd"}}
    result = await run(spec, ScriptedLLM([busy, '{"chosen": "yes"}', "x", "x"]), tmp_path, made=made)
    assert result.path[:2] == ["r", "y"]
    result = await run(spec, ScriptedLLM([busy, busy, busy, "x"]), tmp_path, made=made)
    assert result.path == ["r", "d"]
    assert slept == [1.0, 1.0, 1.0]
    result = await run(spec, ScriptedLLM([LLMRefused("wrong key"), "x"]), tmp_path, made=made)
    assert result.path == ["r", "d"]


# --- what it costs ----------------------------------------------------------------------------------------------------


def priced(content: str, cost: float | None) -> LLMResponse:
    return LLMResponse(content, "m", input_tokens=10, output_tokens=5, stop_reason="end_turn", cost=cost)


async def test_costs_are_recorded_with_the_steps_and_go_on_over_a_resume(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'runs.db'}")
    manager = CheckpointManager(storage, CheckpointConfig(retention_strategy="all"))

    class Broken(LLMNode):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            result = await super().execute(ctx)
            # Paid, and failed all the same.
            return NodeResult(False, error="bad", tokens_used=result.tokens_used, cost=result.cost)

    spec = graph(node("one"), node("free"), node("two", max_retries=2))
    llm = ScriptedLLM([priced("a", 0.25), priced("b", None), priced("c", 0.5), priced("c", 0.5)])
    made = {"node_registry": {"two": Broken()}}
    failed = await run(spec, llm, tmp_path, manager, run_id="r", made=made)
    assert not failed.success
    assert (failed.total_cost, failed.total_tokens) == (1.25, 60)
    checkpoints = await asyncio.to_thread(manager.list_checkpoints, "r")
    assert sorted(each.total_cost for each in checkpoints) == [0.25, 0.25]
    records = parse_log(await asyncio.to_thread(storage.read_log, "r"))
    written = {record["node"]: record for record in records if "node" in record}
    assert (written["one"]["cost"], written["one"]["output_tokens"], written["two"]["cost"]) == (0.25, 5, 0.5)
    assert "cost" not in written["free"]

    done = await run(spec, ScriptedLLM([priced("d", 1.0)]), tmp_path, manager, run_id="r")
    assert done.success
    assert (done.total_cost, done.total_tokens) == (2.25, 75)
    again = await run(spec, None, tmp_path, manager, run_id="r")
    assert again.total_cost == 2.25
    storage.close()


async def test_a_failed_node_does_not_forget_what_its_finished_calls_took(tmp_path: Path) -> None:
    def broken(use: ToolUse) -> ToolResult:
        raise OSError("disk")

    spec = graph(node(node_type="llm_tool_use", tools=["t"], max_retries=1))
    llm = ScriptedLLM([ToolUse("1", "t", {})])
    made = {"tools": [Tool("t", "T")], "tool_executor": broken}
    result = await run(spec, llm, tmp_path, made=made)
    assert "disk" in (result.error or "")
    assert result.total_tokens == llm.input_tokens + llm.output_tokens > 0
    assert result.total_cost == pytest.approx(llm.cost_usd)


async def test_asking_for_the_way_is_counted_and_does_not_block(tmp_path: Path) -> None:
    spec = graph(
        node("a"),
        node("b"),
        edges=[EdgeSpec(id="e", source="a", target="b", condition=EdgeCondition.LLM_DECIDE)],
    )

    class Async(MockLLM):
        async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
            return priced('{"proceed": true}', 0.125)

    result = await run(spec, Async(), tmp_path)
    assert result.path == ["a", "b"]
    assert (result.total_cost, result.total_tokens) == (0.375, 45)


# --- structured replies -----------------------------------------------------------------------------------------------


async def test_the_mock_runs_a_whole_graph(tmp_path: Path) -> None:
    routes = {"deep": "c", "default": "a"}
    spec = graph(
        node("a", output_keys=["x", "y"]),
        node("b", node_type="router", system_prompt="Choose.", routes=routes, output_keys=[]),
        node("c", output_keys=["z"], output_schema={"type": "object", "properties": {"n": {"type": "integer"}}}),
        edges=[EdgeSpec(id="e", source="a", target="b")],
    )
    result = await run(spec, MockLLM(), tmp_path)
    assert result.path == ["a", "b", "c"]
    assert result.output["x"].startswith("Mock x: ")
    assert result.output["z"] == {"n": 1}
    assert result.output == (await run(spec, MockLLM(), tmp_path)).output
    assert result.total_cost == 0.0


@pytest.mark.parametrize(
    ("fields", "input_data", "schema"),
    [
        ({"output_keys": ["a"]}, {}, None),
        ({"output_keys": ["a", "b"]}, {"q": 1}, ["a", "b"]),
        ({"output_keys": ["a", "b"]}, {"b": 1}, ["a"]),
        ({"output_keys": ["a"], "output_schema": {"required": ["mine"]}}, {}, ["mine"]),
    ],
)
async def test_which_schema_a_node_asks_for(
    fields: dict[str, Any], input_data: dict[str, Any], schema: list[str] | None, tmp_path: Path
) -> None:
    asked: list[Any] = []

    class Kept(MockLLM):
        def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
            asked.append(keywords)
            return LLMResponse('{"a": 1}', "m")

    await run(graph(node(**fields, model="other", max_tokens=7)), Kept(), tmp_path, input_data=input_data)
    assert (asked[0].get("json_schema") or {}).get("required") == schema
    assert (asked[0]["model"], asked[0]["max_tokens"]) == ("other", 7)


@pytest.mark.parametrize(
    ("reply", "value"),
    [('{"a": [1]}', [1]), ('{"n": 2}', {"n": 2}), ("no JSON", "no JSON"), ('so: {"n": 2}', {"n": 2})],
)
async def test_one_output_key_with_a_schema(reply: str, value: Any, tmp_path: Path) -> None:
    result = await run(graph(node(output_schema={"type": "object"})), ScriptedLLM([reply]), tmp_path)
    assert result.output["a"] == value


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
async def test_a_run_over_http_survives_what_a_provider_does(server: Server, tmp_path: Path, vendor: str) -> None:
    llm = getattr(server, vendor)(timeout_seconds=0.2)
    server.queue(
        {"type": "fail", "status": 429, "retry_after": 0.05},
        {"type": "fail", "status": 500},
        {"type": "stream_fault", "kind": "truncate", "after_chunks": 2},
        {"type": "stream_fault", "kind": "stall", "after_chunks": 2, "stall_seconds": 0.6},
    )
    for _ in range(3):  # the two broken streams take a reply each
        server.reply('{"a": 1, "b": 2}')
    spec = graph(node(output_keys=["a", "b"], max_retries=5))
    result = await run(spec, llm, tmp_path)
    assert result.success, result.error
    assert [each["status"] for each in server.requests()] == [429, 500, 200, 200, 200]
    first, second = server.requests()[:2]
    assert second["started_at"] - first["ended_at"] >= 0.05
    assert server.verdict() == []
    assert result.total_cost > 0
    await llm.aclose()


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
async def test_a_wrong_key_stops_a_run_at_once_and_is_not_shown(server: Server, tmp_path: Path, vendor: str) -> None:
    from tests.llm.conftest import KEY

    llm = getattr(server, vendor)()
    server.queue({"type": "fail", "status": 401, "message": f"Incorrect API key provided: {KEY}", "times": None})
    result = await run(graph(node()), llm, tmp_path)
    assert not result.success
    assert "Incorrect API key provided: ***" in (result.error or "")
    assert len(server.requests()) == 1
    await llm.aclose()
    assert not any(KEY in text for text in texts_under(tmp_path))


def texts_under(folder: Path) -> list[str]:
    return [file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()]
