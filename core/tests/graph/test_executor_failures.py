"""`GraphExecutor` without checkpoints: retries and their back-off, failures, exceptions, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock, patch

import pytest

from framework.graph.attempts import delay_before
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from tests.graph.executor_kit import MinimalRuntime, PlainNode, edge, failing, graph_of, returning, run


@pytest.fixture(autouse=True)
def sleep() -> Iterator[AsyncMock]:
    """No back-off is waited for; what would have been slept is in the mock's calls."""
    with patch("asyncio.sleep", new_callable=AsyncMock) as mock:
        yield mock


class Flaky(NodeProtocol):
    """Fails so many times, then succeeds; keeps the attempt numbers it was given."""

    def __init__(self, times: int, error: Exception | None = None, **output: Any) -> None:
        self.times = times
        self.error = error
        self.output = output
        self.attempts: list[int] = []
        self.limits: set[int] = set()

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.attempts.append(ctx.attempt)
        self.limits.add(ctx.max_attempts)
        if len(self.attempts) <= self.times:
            if self.error is not None:
                raise self.error
            return NodeResult(False, error=f"no luck {len(self.attempts)}", tokens_used=10, latency_ms=3)
        return NodeResult(True, self.output, tokens_used=1, latency_ms=2)


def seconds(sleep: AsyncMock) -> list[float]:
    return [call.args[0] for call in sleep.await_args_list]


# --- attempts ---


@pytest.mark.parametrize(
    ("max_retries", "failures", "attempts", "success"),
    [
        (3, 0, 1, True),
        (3, 2, 3, True),
        (3, 3, 3, False),
        (0, 0, 1, True),
        (0, 1, 1, False),
        (-1, 1, 1, False),
        (1, 1, 1, False),
        (2, 1, 2, True),
        (10, 9, 10, True),
        (10, 10, 10, False),
    ],
)
async def test_max_retries_counts_attempts_in_total(
    max_retries: int, failures: int, attempts: int, success: bool, sleep: AsyncMock
) -> None:
    node = Flaky(failures, result="there")
    spec = NodeSpec(id="n", max_retries=max_retries, output_keys=["result"])
    result = await run(graph_of(spec, terminal_nodes=["n"]), {"n": node}, {})
    assert result.success is success
    assert node.attempts == list(range(1, attempts + 1))
    assert node.limits == {max(1, max_retries)}
    assert sleep.await_count == attempts - 1
    assert (result.path, result.steps_executed) == (["n"], 1)
    if success:
        assert result.output == {"result": "there"}
    else:
        assert result.error is not None
        assert f"failed after {attempts} attempts" in result.error
        assert f"no luck {attempts}" in result.error


async def test_three_attempts_are_the_default() -> None:
    node = Flaky(99)
    result = await run(graph_of(NodeSpec(id="n")), {"n": node})
    assert node.attempts == [1, 2, 3]
    assert "failed after 3 attempts" in (result.error or "")


async def test_tokens_and_latency_of_every_attempt_count() -> None:
    spec = NodeSpec(id="n", max_retries=3)
    won = await run(graph_of(spec), {"n": Flaky(2)})
    assert (won.total_tokens, won.total_latency_ms) == (21, 8)
    lost = await run(graph_of(spec), {"n": Flaky(3)})
    assert (lost.total_tokens, lost.total_latency_ms) == (30, 9)


async def test_waits_between_attempts_double_within_their_jitter_up_to_the_ceiling(sleep: AsyncMock) -> None:
    spec = NodeSpec(id="n", max_retries=8, retry_delay_seconds=0.2, retry_max_delay_seconds=3.0)
    await run(graph_of(spec), {"n": Flaky(99)})
    ceilings = [0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0]
    waits = seconds(sleep)
    assert len(waits) == len(ceilings)
    for wait, ceiling in zip(waits, ceilings, strict=True):
        assert ceiling / 2 <= wait <= ceiling


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_the_wait_before_an_attempt_never_shrinks_and_never_overflows(chance: float) -> None:
    spec = NodeSpec(id="n")
    waits = [delay_before(spec, attempt, chance) for attempt in range(2, 2000)]
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.1 + 0.1 * chance)
    assert waits[-1] == pytest.approx(15 + 15 * chance)


async def test_runs_do_not_all_wait_alike(sleep: AsyncMock) -> None:
    for _ in range(5):
        await run(graph_of(NodeSpec(id="n", max_retries=2)), {"n": Flaky(1)})
    assert len(set(seconds(sleep))) > 1


async def test_no_wait_is_asked_for_with_a_delay_of_zero(sleep: AsyncMock) -> None:
    await run(graph_of(NodeSpec(id="n", retry_delay_seconds=0)), {"n": Flaky(2)})
    assert seconds(sleep) == [0, 0]


async def test_each_failed_attempt_is_a_warning_and_the_last_is_critical() -> None:
    runtime = MinimalRuntime()
    await run(graph_of(NodeSpec(id="n", max_retries=3)), {"n": Flaky(3)}, runtime=runtime)
    assert [severity for severity, _ in runtime.problems] == ["warning", "warning", "critical"]
    assert "no luck 1" in runtime.problems[0][1]
    assert "failed after 3 attempts" in runtime.problems[-1][1]
    assert [ended["success"] for ended in runtime.ended] == [False]


async def test_the_budget_is_per_visit_when_an_edge_leads_back() -> None:
    class EveryOther:
        def __init__(self) -> None:
            self.attempts: list[int] = []

        async def execute(self, ctx: NodeContext) -> NodeResult:
            self.attempts.append(ctx.attempt)
            return NodeResult(ctx.attempt == 2, {"n": len(self.attempts)}, error="not yet")

    node = EveryOther()
    edges = [edge("n", "n", "conditional", condition_expr="n < 6")]
    result = await run(graph_of(NodeSpec(id="n", max_retries=2), edges=edges), {"n": node})
    assert result.success
    assert node.attempts == [1, 2] * 3
    assert result.path == ["n"] * 3


async def test_retry_on_lets_only_named_failures_be_retried(sleep: AsyncMock) -> None:
    spec = NodeSpec(id="n", max_retries=3, retry_on=["ConnectionError", "rate limit"])
    for error, attempts in ((ValueError("broken"), 1), (ConnectionError("gone"), 3), (RuntimeError("Rate limit"), 3)):
        node = Flaky(9, error)
        result = await run(graph_of(spec), {"n": node})
        assert len(node.attempts) == attempts
        assert f"failed after {attempts} attempts" in (result.error or "")


# --- exceptions and results that are none ---


async def test_an_exception_is_a_failed_attempt() -> None:
    node = Flaky(2, RuntimeError("boom"), x=1)
    result = await run(graph_of(NodeSpec(id="n")), {"n": node})
    assert result.success
    assert node.attempts == [1, 2, 3]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), TimeoutError("boom"), LookupError("boom")])
async def test_exhausted_by_exceptions_everything_so_far_is_kept(error: Exception) -> None:
    runtime = MinimalRuntime()
    start = PlainNode(lambda ctx: NodeResult(True, {"x": 1}, tokens_used=4, latency_ms=6))
    result = await run(graph_of("a", NodeSpec(id="n")), {"a": start, "n": Flaky(9, error)}, {"i": 0}, runtime=runtime)
    assert not result.success
    assert "failed after 3 attempts" in (result.error or "")
    assert "boom" in (result.error or "")
    assert (result.path, result.steps_executed) == (["a", "n"], 2)
    assert result.output == {"i": 0, "x": 1}
    assert (result.total_tokens, result.total_latency_ms) == (4, 6)
    assert runtime.problems[-1][0] == "critical"
    assert runtime.ended[0]["success"] is False
    assert runtime.ended[0]["output_data"] == {"i": 0, "x": 1}


async def test_an_exception_without_a_text_is_named_by_its_type() -> None:
    result = await run(graph_of("n"), {"n": Flaky(9, ZeroDivisionError())})
    assert "ZeroDivisionError" in (result.error or "")


async def test_a_failure_without_a_reason_still_says_what_failed() -> None:
    result = await run(graph_of("n"), {"n": PlainNode(lambda ctx: NodeResult(False))})
    assert "'n' failed after 1 attempts" in (result.error or "")


@pytest.mark.parametrize(
    "returned",
    [
        None,
        {"x": 1},
        "text",
        NodeResult(True, output="text"),  # type: ignore[arg-type]
        NodeResult(True, output=["x"]),  # type: ignore[arg-type]
        NodeResult(True, tokens_used="many"),  # type: ignore[arg-type]
        NodeResult(True, latency_ms=float("nan")),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_node_result_is_a_failed_attempt(returned: Any) -> None:
    node = PlainNode(lambda ctx: returned)
    result = await run(graph_of(NodeSpec(id="n", max_retries=2)), {"n": node}, {"i": 0})
    assert not result.success
    assert "failed after 2 attempts" in (result.error or "")
    assert (result.output, result.path) == ({"i": 0}, ["n"])


async def test_a_result_of_another_class_with_the_same_fields_is_accepted() -> None:
    node = AsyncMock()
    node.execute.return_value = SimpleNamespace(success=True, output={"x": 1})
    float_latency = NodeResult(True, output=None, latency_ms=12.7)  # type: ignore[arg-type]
    result = await run(graph_of("a", "b"), {"a": node, "b": PlainNode(lambda ctx: float_latency)})
    assert result.success
    assert (result.output, result.total_latency_ms) == ({"x": 1}, 12)


async def test_an_object_that_is_no_node_fails_the_run() -> None:
    result = await run(graph_of("n"), {"n": object()})
    assert "execute" in (result.error or "")
    assert result.path == ["n"]


async def test_a_mock_is_a_node() -> None:
    node = MagicMock()
    node.execute = AsyncMock(side_effect=[NodeResult(False, error="once"), NodeResult(True, {"x": 1})])
    result = await run(graph_of(NodeSpec(id="n")), {"n": node})
    assert result.output == {"x": 1}
    assert node.execute.await_count == 2


async def test_an_attempt_past_its_time_limit_failed() -> None:
    class Endless:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            await asyncio.Event().wait()
            raise AssertionError

    spec = NodeSpec(id="n", max_retries=1, timeout_seconds=0.001)
    result = await run(graph_of(spec), {"n": Endless()})
    assert "timed out after 0.001 s" in (result.error or "")


# --- what a failed attempt leaves behind ---


async def test_writes_of_a_failed_attempt_are_taken_back() -> None:
    def behave(ctx: NodeContext) -> NodeResult:
        seen = ctx.memory.read("half")
        ctx.memory.write("half", ctx.attempt)
        ctx.memory.write("kept", "changed")
        return NodeResult(ctx.attempt == 3, {"seen": seen}, error="again")

    result = await run(graph_of(NodeSpec(id="n")), {"n": PlainNode(behave)}, {"kept": "original"})
    assert result.output == {"kept": "changed", "half": 3, "seen": None}
    failed = await run(graph_of(NodeSpec(id="n", max_retries=2)), {"n": PlainNode(behave)}, {"kept": "original"})
    assert failed.output == {"kept": "original"}


async def test_each_attempt_gets_the_same_input_whatever_an_earlier_one_did_to_it() -> None:
    runtime, seen = MagicMock(spec=["start_run", "end_run", "report_problem"]), []

    def behave(ctx: NodeContext) -> NodeResult:
        seen.append(ctx.input_data.pop("i", None))
        return NodeResult(len(seen) == 2, error="again")

    given = {"i": 0}
    await run(graph_of(NodeSpec(id="n")), {"n": PlainNode(behave)}, given, runtime=runtime)
    assert seen == [0, 0]
    assert given == {"i": 0}
    assert runtime.start_run.call_args.kwargs["input_data"] == {"i": 0}


async def test_the_output_of_a_failure_reaches_the_state_nowhere() -> None:
    bad = PlainNode(lambda ctx: NodeResult(False, {"partial": 1}, error="bad"))
    result = await run(graph_of("a", "b"), {"a": bad, "b": returning(ok=1)})
    assert result.output == {"ok": 1}


# --- on_failure and what follows a failure ---


async def test_on_failure_leads_on_and_the_run_can_still_succeed() -> None:
    runtime = MinimalRuntime()
    edges = [edge("a", "b", "on_success"), edge("a", "rescue", "on_failure")]
    nodes = {"a": Flaky(9), "b": returning(), "rescue": returning(saved=True)}
    spec = NodeSpec(id="a", max_retries=2)
    result = await run(graph_of(spec, "b", "rescue", edges=edges), nodes, {"i": 0}, runtime=runtime)
    assert result.success
    assert result.error is None
    assert (result.path, result.steps_executed) == (["a", "rescue"], 2)
    assert result.output == {"i": 0, "saved": True}
    assert result.total_tokens == 20
    assert "critical" in dict(runtime.problems)
    assert runtime.ended[0]["success"] is True


@pytest.mark.parametrize(
    ("condition", "expression", "follows"),
    [
        ("always", None, True),
        ("on_failure", None, True),
        ("on_success", None, False),
        ("conditional", "i == 0", True),
        ("conditional", "i == 1", False),
        ("conditional", None, True),
        ("llm_decide", None, False),
    ],
)
async def test_which_edges_hold_after_a_failure(condition: str, expression: str | None, follows: bool) -> None:
    edges = [edge("a", "b", condition, condition_expr=expression)]
    result = await run(graph_of("a", "b", edges=edges), {"a": failing(), "b": returning()}, {"i": 0})
    assert result.success is follows
    assert result.path == (["a", "b"] if follows else ["a"])


async def test_a_failing_terminal_node_fails_the_run_or_takes_its_on_failure_edge() -> None:
    plain = graph_of("a", terminal_nodes=["a"])
    assert not (await run(plain, {"a": failing()})).success
    edges = [edge("a", "rescue", "on_failure")]
    caught = graph_of("a", "rescue", edges=edges, terminal_nodes=["a", "rescue"])
    result = await run(caught, {"a": failing(), "rescue": returning()})
    assert result.success
    assert result.path == ["a", "rescue"]


async def test_a_failed_pause_node_takes_its_on_failure_edge_and_does_not_pause() -> None:
    edges = [edge("a", "rescue", "on_failure")]
    graph = graph_of("a", "rescue", edges=edges, pause_nodes=["a"])
    result = await run(graph, {"a": failing(), "rescue": returning()})
    assert result.success
    assert (result.path, result.paused_at) == (["a", "rescue"], None)


async def test_the_mapping_of_an_on_failure_edge_reads_the_state() -> None:
    edges = [edge("a", "b", "on_failure", input_mapping={"again": "task"})]
    result = await run(graph_of("a", "b", edges=edges), {"a": failing(), "b": returning()}, {"task": "t"})
    assert result.output == {"task": "t", "again": "t"}


async def test_next_node_of_a_failed_result_is_ignored() -> None:
    lost = PlainNode(lambda ctx: NodeResult(False, error="bad", next_node="b"))
    result = await run(graph_of("a", "b", edges=[edge("a", "b", "on_success")]), {"a": lost, "b": returning()})
    assert not result.success
    assert result.path == ["a"]


async def test_a_caught_failure_does_not_hide_the_later_end_of_the_run() -> None:
    runtime = MinimalRuntime()
    edges = [edge("a", "b", "on_failure"), edge("b", "b")]
    result = await run(
        graph_of("a", "b", edges=edges, max_steps=3), {"a": failing(), "b": returning()}, runtime=runtime
    )
    assert not result.success
    critical = [description for severity, description in runtime.problems if severity == "critical"]
    assert len(critical) == 2
    assert "max_steps" in critical[-1]


# --- cancellation and errors around the nodes ---


async def test_cancellation_passes_through_and_the_run_is_ended_as_failed() -> None:
    runtime, started = MinimalRuntime(), asyncio.Event()

    class Waiting:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            ctx.memory.write("half", 1)
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    task = asyncio.create_task(run(graph_of("a", "n"), {"a": returning(x=1), "n": Waiting()}, runtime=runtime))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [ended] = runtime.ended
    assert ended["success"] is False
    assert ended["output_data"] == {"x": 1}


async def test_cancellation_that_a_node_raises_is_no_success_either() -> None:
    def give_up(ctx: NodeContext) -> NodeResult:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run(graph_of("n"), {"n": PlainNode(give_up)})


async def test_cancellation_during_a_back_off_makes_no_further_attempt(sleep: AsyncMock) -> None:
    sleep.side_effect = asyncio.CancelledError
    runtime, node = MinimalRuntime(), Flaky(9)
    with pytest.raises(asyncio.CancelledError):
        await run(graph_of(NodeSpec(id="n")), {"n": node}, runtime=runtime)
    assert node.attempts == [1]
    assert [ended["success"] for ended in runtime.ended] == [False]


async def test_an_error_outside_of_any_node_is_a_failed_result_with_what_was_done() -> None:
    class BrokenTool:
        @property
        def name(self) -> str:
            raise RuntimeError("tool list is broken")

    runtime = MinimalRuntime()
    result = await run(graph_of("n"), {"n": returning()}, {"i": 0}, runtime=runtime, tools=[BrokenTool()])
    assert not result.success
    assert "tool list is broken" in (result.error or "")
    assert result.output == {"i": 0}
    assert [severity for severity, _ in runtime.problems] == ["critical"]
    assert [ended["success"] for ended in runtime.ended] == [False]


@pytest.mark.parametrize("broken", ["report_problem", "end_run"])
async def test_a_runtime_that_cannot_record_does_not_change_the_result(broken: str) -> None:
    runtime = MagicMock(spec=["start_run", "end_run", "report_problem"])
    runtime.start_run.return_value = "run"
    getattr(runtime, broken).side_effect = OSError("disk full")
    won = await run(graph_of(NodeSpec(id="n")), {"n": Flaky(2, x=1)}, runtime=runtime)
    assert (won.success, won.output) == (True, {"x": 1})
    lost = await run(graph_of(NodeSpec(id="n")), {"n": Flaky(9)}, runtime=runtime)
    assert "failed after 3 attempts" in (lost.error or "")
    assert runtime.end_run.call_count == 2
