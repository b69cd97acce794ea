"""`GraphExecutor` without checkpoints over mocks, doubles and the real `Runtime`; many runs at once; fan-out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

from framework.graph.edge import EdgeCondition, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.llm.scripted import ScriptedLLM
from framework.runtime import Runtime
from framework.schemas.run import RunStatus
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, failing, graph_of, returning, run

# --- doubles ---


def mocked_runtime() -> MagicMock:
    runtime = MagicMock(spec=Runtime)
    runtime.start_run = MagicMock(return_value="test_run_id")
    runtime.decide = MagicMock(return_value="test_decision_id")
    runtime.record_outcome = MagicMock()
    runtime.end_run = MagicMock()
    runtime.report_problem = MagicMock()
    runtime.set_node = MagicMock()
    return runtime


@pytest.mark.parametrize(
    "make", [mocked_runtime, lambda: MagicMock(spec=Runtime), lambda: Mock(spec=Runtime), MagicMock, Mock]
)
async def test_any_mock_is_a_runtime(make: Callable[[], Any]) -> None:
    runtime = make()
    graph = graph_of(NodeSpec(id="f", node_type="function"), "n", "r")
    graph.get_node("r").node_type = "router"  # type: ignore[union-attr]
    graph.get_node("r").routes = {"default": "end"}  # type: ignore[union-attr]
    graph.nodes.append(NodeSpec(id="end", node_type="llm_generate", max_retries=1))
    executor = GraphExecutor(runtime=runtime, llm=ScriptedLLM(["bye"]), node_registry={"n": returning(x=1)})
    executor.register_function("f", lambda **given: 1)
    result = await executor.execute(graph, GOAL, {})
    assert result.success, result.error
    assert result.path == ["f", "n", "r", "end"]
    runtime.start_run.assert_called_once_with(goal_id="goal", goal_description="Get it done", input_data={})
    runtime.end_run.assert_called_once()
    assert runtime.end_run.call_args.kwargs["success"] is True
    assert isinstance(result.run_id, str)


async def test_the_run_id_is_the_runtimes() -> None:
    assert (await run(graph_of("n"), {"n": returning()}, runtime=mocked_runtime())).run_id == "test_run_id"


async def test_a_failure_is_reported_to_a_mock_by_keywords() -> None:
    runtime = mocked_runtime()
    await run(graph_of("n"), {"n": failing("bad luck")}, runtime=runtime)
    assert runtime.end_run.call_args.kwargs["success"] is False
    reported = runtime.report_problem.call_args.kwargs
    assert reported["severity"] == "critical"
    assert "bad luck" in reported["description"]


async def test_a_runtime_with_only_named_parameters_is_enough() -> None:
    class Named:
        calls: list[str]

        def __init__(self) -> None:
            self.calls = []

        def start_run(self, goal_id: str, goal_description: str = "", input_data: Any = None) -> str:
            self.calls.append("start")
            return "run"

        def end_run(self, success: bool, narrative: str = "", output_data: Any = None) -> None:
            self.calls.append(f"end {success}")

        def report_problem(self, severity: str, description: str) -> str:
            self.calls.append(severity)
            return ""

    runtime = Named()
    llm = ScriptedLLM(["a"])
    result = await run(graph_of("a", "b"), {"b": failing()}, runtime=runtime, llm=llm)
    assert result.path == ["a", "b"]
    assert runtime.calls == ["start", "critical", "end False"]


# --- the real runtime ---


def files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def stored_runs(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")}


async def test_the_real_runtime_keeps_the_run_with_its_decisions_and_problems(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    executor = GraphExecutor(runtime, llm=ScriptedLLM(["reply"]), node_registry={"bad": failing("no")})
    executor.register_function("f", lambda x: x + 1)
    graph = graph_of(
        NodeSpec(id="f", node_type="function", input_keys=["x"], output_keys=["y"]),
        NodeSpec(id="m", node_type="llm_generate", output_keys=["text"]),
        "bad",
        edges=[edge("f", "m"), edge("m", "bad")],
    )
    result = await executor.execute(graph, GOAL, {"x": 1})
    assert not result.success
    assert result.run_id is not None
    assert result.run_id.startswith("run_")
    assert runtime.current_run is None
    record = runtime.storage.load_run(result.run_id)
    assert record is not None
    assert record.status is RunStatus.FAILED
    assert record.goal_id == "goal"
    assert record.input_data == {"x": 1}
    assert record.output_data["y"] == 2
    assert [(decision.id, decision.node_id) for decision in record.decisions] == [("dec_0", "f"), ("dec_1", "m")]
    assert all(decision.was_successful for decision in record.decisions)
    assert [problem.severity for problem in record.problems] == ["critical"]


async def test_a_state_that_has_no_json_form_fails_nothing(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    thing = object()
    result = await run(graph_of("n"), {"n": returning(thing=thing)}, {"callback": print}, runtime=runtime)
    assert result.success
    assert result.output["thing"] is thing
    assert result.run_id is not None
    record = runtime.storage.load_run(result.run_id)
    assert record is not None
    assert record.status is RunStatus.COMPLETED


async def test_without_a_manager_nothing_but_the_runs_document_is_written(tmp_path: Path) -> None:
    result = await run(graph_of("a", "b"), {"a": returning(x=1), "b": returning()}, runtime=Runtime(tmp_path))
    files = files_in(tmp_path)
    assert f"runs/{result.run_id}.json" in files
    assert not [name for name in files if "checkpoint" in name]
    assert result.checkpoint_id is None


async def test_a_paused_run_is_a_completed_document_and_the_resume_is_another(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    graph, nodes = graph_of("ask", "b", pause_nodes=["ask"]), {"ask": returning(), "b": returning()}
    paused = await run(graph, nodes, runtime=runtime)
    resumed = await run(graph, nodes, {"answer": 1}, paused.session_state, runtime=runtime)
    assert paused.run_id != resumed.run_id
    assert len(stored_runs(tmp_path)) == 2


async def test_a_cancelled_run_leaves_no_current_run(tmp_path: Path) -> None:
    runtime, started = Runtime(tmp_path), asyncio.Event()

    class Waiting:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    task = asyncio.create_task(run(graph_of("n"), {"n": Waiting()}, runtime=runtime))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runtime.current_run is None
    [stored] = stored_runs(tmp_path).values()
    assert stored["status"] in ("failed", "cancelled")


# --- many at once ---


class Meeting:
    """Lets every run of a group reach the same point before any goes on."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._all_here = asyncio.Event()

    async def wait(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._all_here.set()
        await self._all_here.wait()


async def test_runs_of_one_executor_and_one_runtime_do_not_mix(tmp_path: Path) -> None:
    count = 12
    runtime, meeting = Runtime(tmp_path), Meeting(count)

    class Meets(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            me = ctx.memory.read("me")
            ctx.memory.write("seen", me)
            runtime.quick_decision(f"decide for {me}", "go", "because", node_id=ctx.node_id)
            await meeting.wait()
            odd = me % 2 == 1
            return NodeResult(not odd, {"mine": ctx.memory.read("seen")}, error=f"odd {me}", tokens_used=me)

    executor = GraphExecutor(runtime, node_registry={"n": Meets(), "end": returning()})
    graph = graph_of("n", "end", edges=[edge("n", "end", "on_success")])
    results = await asyncio.gather(*(executor.execute(graph, GOAL, {"me": me}) for me in range(count)))
    assert len({result.run_id for result in results}) == count
    for me, result in enumerate(results):
        assert result.run_id is not None
        record = runtime.storage.load_run(result.run_id)
        assert record is not None
        assert record.input_data == {"me": me}
        assert [decision.intent for decision in record.decisions] == [f"decide for {me}"]
        assert result.total_tokens == me
        if me % 2:
            assert f"odd {me}" in (result.error or "")
            assert record.status is RunStatus.FAILED
            assert [f"odd {me}" in problem.description for problem in record.problems] == [True]
            assert result.output == {"me": me}
        else:
            assert result.output == {"me": me, "seen": me, "mine": me}
            assert record.status is RunStatus.COMPLETED
            assert record.problems == []
    assert runtime.current_run is None


async def test_a_node_may_execute_another_graph_on_the_same_executor(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)

    class Nests(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            inner = await executor.execute(graph_of("inner"), GOAL, {"deep": True})
            runtime.quick_decision("after the inner run", "go", "because")
            return NodeResult(inner.success, {"inner": inner.output})

    executor = GraphExecutor(runtime, node_registry={"outer": Nests(), "inner": returning(x=1)})
    result = await executor.execute(graph_of("outer"), GOAL)
    assert result.output == {"inner": {"deep": True, "x": 1}}
    assert result.run_id is not None
    record = runtime.storage.load_run(result.run_id)
    assert record is not None
    assert [decision.intent for decision in record.decisions] == ["after the inner run"]


# --- fan-out ---


def fanning(**fields: Any) -> GraphSpec:
    start = NodeSpec(id="start", fan_out=True, max_retries=1, **fields)
    left = NodeSpec(id="left", output_keys=["l"], max_retries=1)
    right = NodeSpec(id="right", output_keys=["r"], max_retries=1)
    edges = [edge("start", "left"), edge("start", "right"), edge("left", "join"), edge("right", "join")]
    return graph_of(start, left, right, "join", edges=edges)


async def test_branches_run_at_the_same_time_and_meet_at_the_join() -> None:
    meeting = Meeting(2)

    class Branch(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            key = ctx.node_spec.output_keys[0]
            seen = sorted(ctx.memory.read_all())
            await meeting.wait()
            return NodeResult(True, {key: seen}, tokens_used=3)

    join = returning(joined=True)
    nodes = {"start": returning(s=1), "left": Branch(), "right": Branch(), "join": join}
    result = await run(fanning(), nodes, {"i": 0})
    assert result.success, result.error
    assert result.output == {"i": 0, "s": 1, "l": ["i", "s"], "r": ["i", "s"], "joined": True}
    assert sorted(result.path) == ["join", "left", "right", "start"]
    assert (result.path[0], result.path[-1], result.steps_executed) == ("start", "join", 4)
    assert result.total_tokens == 6
    assert len(join.contexts) == 1
    assert join.contexts[0].input_data == {"l": ["i", "s"], "r": ["i", "s"]}


async def test_two_branches_that_wrote_the_same_key_fail_the_run() -> None:
    nodes = {"start": returning(), "left": returning(same=1), "right": returning(same=2), "join": returning()}
    result = await run(fanning(), nodes)
    assert not result.success
    assert "same" in (result.error or "")
    assert "join" not in result.path


async def test_a_failing_branch_fails_the_run_and_stops_its_sibling() -> None:
    cancelled = asyncio.Event()

    class Slow(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

    runtime = MinimalRuntime()
    left = NodeSpec(id="left", max_retries=1)
    edges = [edge("start", "left"), edge("start", "right"), edge("right", "join"), edge("left", "join", "on_success")]
    start = NodeSpec(id="start", fan_out=True)
    graph = graph_of(start, left, "right", "join", edges=edges)
    nodes = {"start": returning(s=1), "left": failing("left broke"), "right": Slow(), "join": returning()}
    result = await run(graph, nodes, runtime=runtime)
    assert not result.success
    assert "left broke" in (result.error or "")
    assert cancelled.is_set()
    assert result.output == {"s": 1}
    assert [ended["success"] for ended in runtime.ended] == [False]


async def test_only_edges_that_hold_start_a_branch() -> None:
    graph = fanning()
    graph.edges[1].condition = EdgeCondition.CONDITIONAL
    graph.edges[1].condition_expr = "s > 5"
    nodes = {"start": returning(s=1), "left": returning(l=1), "right": failing(), "join": returning()}
    result = await run(graph, nodes)
    assert result.path == ["start", "left", "join"]
    assert result.output == {"s": 1, "l": 1}


@pytest.mark.parametrize("pause_node", ["start", "left"])
async def test_a_pause_inside_a_fan_out_is_refused_as_no_session_state_could_resume_it(pause_node: str) -> None:
    runtime, graph = MinimalRuntime(), fanning()
    graph.pause_nodes = [pause_node]
    nodes = {"start": returning(s=1), "left": returning(l=1), "right": returning(r=1), "join": returning()}
    result = await run(graph, nodes, runtime=runtime)
    assert not result.success
    assert f"'{pause_node}' paused inside a fan-out" in (result.error or "")
    assert "checkpoint_manager" in (result.error or "")
    assert (result.paused_at, result.session_state) == (None, {})
    assert [ended["success"] for ended in runtime.ended] == [False]


async def test_a_pause_where_the_branches_meet_is_an_ordinary_one() -> None:
    graph = fanning()
    graph.pause_nodes = ["join"]
    nodes = {"start": returning(s=1), "left": returning(l=1), "right": returning(r=1), "join": returning()}
    result = await run(graph, nodes)
    assert result.paused_at == "join"
    assert result.output == {"s": 1, "l": 1, "r": 1}


async def test_cancelling_a_fan_out_cancels_every_branch() -> None:
    started, ended = set(), set()
    both_here = asyncio.Event()

    class Waits(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            started.add(ctx.node_id)
            if len(started) == 2:
                both_here.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.add(ctx.node_id)
            raise AssertionError

    nodes = {"start": returning(), "left": Waits(), "right": Waits(), "join": returning()}
    task = asyncio.create_task(run(fanning(), nodes))
    await both_here.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == {"left", "right"}
