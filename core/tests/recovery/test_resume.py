"""A run that stopped goes on where it was: path, totals, visits, budgets, routes and inputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import ResumeError
from framework.graph.node import NodeContext, NodeResult
from framework.schemas.run import RunState

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent, Work


def counted(ctx: NodeContext) -> NodeResult:
    return NodeResult(True, {f"{ctx.node_id}_out": ctx.step_key}, tokens_used=10, latency_ms=3)


async def test_path_totals_and_state_go_on(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("a", counted)
    agent.node("b", counted)
    agent.node("c", fails_once())
    agent.node("d", counted)
    agent.chain("a", "b", "c", "d")
    first = await agent.run({"topic": "rivers"})
    assert (first.success, first.path, first.steps_executed) == (False, ["a", "b", "c"], 3)
    assert "failed after 1 attempts: the service is down" in (first.error or "")
    assert (first.total_tokens, first.total_latency_ms) == (20, 6)
    assert first.output == {"topic": "rivers", "a_out": "a#1", "b_out": "b#1"}
    assert agent.state() is RunState.FAILED

    second = await agent.run({"topic": "rivers"})
    assert agent.ran == ["c#1", "d#1"]
    assert second.success
    assert second.path == ["a", "b", "c", "d"]
    assert (second.steps_executed, second.steps_recovered) == (4, 2)
    assert (second.total_tokens, second.total_latency_ms) == (30, 9)
    assert second.output == {**first.output, "c_done": True, "d_out": "d#1"}
    assert second.run_id == first.run_id == "run-1"
    assert second.resumed_from == first.checkpoint_id != second.checkpoint_id
    assert agent.state() is RunState.COMPLETED


async def test_visits_and_loops_go_on(agent: Agent) -> None:
    down = [True]

    def work(ctx: NodeContext) -> NodeResult:
        rounds = (ctx.memory.read("rounds") or 0) + 1
        if rounds == 3 and down:
            down.clear()
            return NodeResult(False, error="down")
        return NodeResult(True, {"rounds": rounds})

    agent.node("loop", work)
    agent.node("check")
    agent.node("end")
    agent.edge("loop", "check")
    agent.edge("check", "end", "conditional", condition_expr="rounds >= 4", priority=1)
    agent.edge("check", "loop")
    assert not (await agent.run()).success
    assert agent.ran == ["loop#1", "check#1", "loop#2", "check#2", "loop#3"]
    result = await agent.run()
    assert agent.ran == ["loop#3", "check#3", "loop#4", "check#4", "end#1"]
    assert result.path == [*["loop", "check"] * 4, "end"]


@pytest.mark.parametrize("kind", ["returns", "raises", "times out", "returns nonsense"])
async def test_however_a_node_fails_it_is_tried_again_on_resume(quick: Agent, kind: str) -> None:
    broken = [True]

    async def work(ctx: NodeContext) -> Any:
        if not broken:
            return {"done": True}
        broken.clear()
        ctx.memory.write("half", "written")
        if kind == "raises":
            raise RuntimeError("no way")
        if kind == "times out":
            await asyncio.Event().wait()
        if kind == "returns nonsense":
            return NodeResult(True, ["no dict"])  # type: ignore[arg-type]
        return NodeResult(False, error="no way", output={"ignored": 1})

    quick.chain("a")
    quick.node("b", work, timeout_seconds=0.05)
    quick.chain("a", "b", "c")
    first = await quick.run()
    assert not first.success
    assert first.path == ["a", "b"]
    assert first.output == {}, "a failed attempt leaves nothing behind"
    assert quick.runtime.told("critical") == [first.error]
    second = await quick.run()
    assert second.success
    assert quick.ran == ["b#1", "c#1"]
    assert second.output == {"done": True}


async def test_a_cancelled_run_goes_on_with_the_node_in_flight(agent: Agent) -> None:
    began = asyncio.Event()
    slow = [True]

    async def work(ctx: NodeContext) -> dict[str, Any]:
        ctx.memory.write("half", 1)
        if slow:
            slow.clear()
            began.set()
            await asyncio.Event().wait()
        return {"whole": 1}

    agent.node("a", counted)
    agent.node("b", work)
    agent.chain("a", "b", "c")
    await agent.cancelled_when(began)
    assert agent.state() is RunState.CANCELLED
    assert agent.record().owner is None
    result = await agent.run()
    assert agent.ran == ["b#1", "c#1"]
    assert result.path == ["a", "b", "c"]
    assert result.output == {"a_out": "a#1", "half": 1, "whole": 1}


async def test_what_is_left_of_the_retry_budget_survives(agent: Agent) -> None:
    waiting = asyncio.Event()
    attempts: list[int] = []

    async def work(ctx: NodeContext) -> NodeResult:
        attempts.append(ctx.attempt)
        if ctx.attempt == 3 and not waiting.is_set():
            waiting.set()
            await asyncio.Event().wait()
        return NodeResult(False, error=f"no {ctx.attempt}", tokens_used=1)

    agent.node("a", work, max_retries=4)
    await agent.cancelled_when(waiting)
    assert attempts == [1, 2, 3]
    result = await agent.run()
    assert attempts == [1, 2, 3, 3, 4], "the third attempt was in flight, two were used up"
    assert "failed after 4 attempts: no 4" in (result.error or "")
    assert result.total_tokens == 4
    assert result.path == ["a"]

    result = await agent.run()
    assert attempts[5:] == [1, 2, 3, 4], "a failed run tries its step afresh"
    assert result.total_tokens == 8


async def test_a_siblings_commit_does_not_hide_used_attempts(agent: Agent) -> None:
    third = asyncio.Event()
    failed_twice = asyncio.Event()

    async def work(ctx: NodeContext) -> NodeResult:
        if ctx.attempt == 3:
            failed_twice.set()
            if not third.is_set():
                await asyncio.Event().wait()
        return NodeResult(False, error="no")

    async def sibling(ctx: NodeContext) -> dict[str, Any]:
        await failed_twice.wait()
        return {}

    def after(ctx: NodeContext) -> dict[str, Any]:
        third.set()
        return {}

    agent.node("fan", fan_out=True)
    agent.node("left", work, max_retries=4)
    agent.node("right", sibling)
    agent.node("right2", after)
    agent.node("join")
    for source, target in (
        ("fan", "left"),
        ("fan", "right"),
        ("right", "right2"),
        ("left", "join"),
        ("right2", "join"),
    ):
        agent.edge(source, target)
    await agent.cancelled_when(third)
    result = await agent.run()
    assert not result.success
    attempts = [ctx.attempt for ctx in agent.contexts if ctx.node_id == "left"]
    assert attempts == [3, 4]


async def test_the_step_budget_counts_all_processes(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("a")
    agent.node("b", fails_once())
    agent.node("c")
    agent.node("d")
    agent.chain("a", "b", "c", "d")
    agent.options["max_steps"] = 3
    assert not (await agent.run()).success
    result = await agent.run()
    assert not result.success
    assert "max_steps=3" in (result.error or "")
    assert result.path == ["a", "b", "c"]
    agent.options["max_steps"] = 4
    result = await agent.run()
    assert agent.ran == ["d#1"]
    assert result.success


async def test_a_router_that_failed_chooses_again(agent: Agent) -> None:
    agent.node("a", lambda ctx: {"route_on": "nowhere"})
    agent.node("router", node_type="router", routes={"left": "left", "right": "right"})
    agent.node("left")
    agent.node("right")
    agent.edge("a", "router")
    first = await agent.run()
    assert not first.success
    assert "no route" in (first.error or "")
    assert first.path == ["a", "router"]
    second = await agent.run({"route_on": "right"})
    assert second.success
    assert agent.ran == ["right#1"], "the router is the built-in one; a did not run again"
    assert second.path == ["a", "router", "right"]


async def test_a_router_that_chooses_an_unknown_node_fails_and_can_go_on(agent: Agent) -> None:
    choice = ["nobody"]
    agent.node("a", lambda ctx: NodeResult(True, {"seen": 1}, next_node=choice[0]))
    agent.node("b")
    agent.edge("a", "b")
    first = await agent.run()
    assert not first.success
    assert "nobody" in (first.error or "")
    assert first.output == {}
    choice[:] = ["b"]
    second = await agent.run()
    assert second.success
    assert second.path == ["a", "b"]


async def test_conditions_see_the_restored_state(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("score", lambda ctx: {"score": 85, "tags": {"good"}})
    agent.node("work", fails_once())
    agent.node("high")
    agent.node("low")
    agent.chain("score", "work")
    agent.edge("work", "high", "conditional", condition_expr="work_done and score > 80 and 'good' in tags", priority=1)
    agent.edge("work", "low")
    assert not (await agent.run()).success
    assert (await agent.run()).path == ["score", "work", "high"]


async def test_a_failure_edge_was_taken_for_good(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("a", lambda ctx: NodeResult(False, error="broken", tokens_used=2))
    agent.node("b", fails_once())
    agent.node("never")
    agent.edge("a", "never")
    agent.edge("a", "b", "on_failure")
    first = await agent.run()
    assert first.path == ["a", "b"]
    second = await agent.run()
    assert agent.ran == ["b#1"]
    assert second.success
    assert second.path == ["a", "b"]
    assert second.total_tokens == 2


async def test_mapped_values_are_durable_with_the_step_they_follow(
    agent: Agent, fails_once: Callable[[], Work]
) -> None:
    agent.node("a", lambda ctx: {"made": [1, 2]})
    agent.node("b", fails_once())
    agent.edge("a", "b", input_mapping={"given": "made", "copied": "topic"})
    assert not (await agent.run({"topic": "t"})).success
    result = await agent.run()
    assert result.output == {"topic": "t", "made": [1, 2], "given": [1, 2], "copied": "t", "b_done": True}


async def test_the_next_node_is_given_the_same_input_after_a_resume(
    agent: Agent, fails_once: Callable[[], Work]
) -> None:
    agent.node("first", fails_once())
    agent.node("a", lambda ctx: {"answer": 42, "rows": [{"n": 1}]})
    agent.node("b", fails_once())
    agent.chain("first", "a", "b")
    for _ in range(3):
        await agent.run({"topic": "t"})
        if "b#1" not in agent.ran:
            assert agent.contexts[0].input_data == {"topic": "t"}
        else:
            assert agent.contexts[-1].input_data == {"answer": 42, "rows": [{"n": 1}]}
    assert agent.state() is RunState.COMPLETED


@pytest.mark.parametrize(("brought", "then"), [(5, 1), (9, 9)])
async def test_input_that_differs_from_the_original_is_written_over_the_state(
    agent: Agent, fails_once: Callable[[], Work], brought: int, then: int
) -> None:
    agent.node("a", lambda ctx: {"limit": 1})
    agent.node("b", fails_once())
    agent.node("c", lambda ctx: {"saw": ctx.memory.read("limit")})
    agent.chain("a", "b", "c")
    await agent.run({"limit": 5})
    result = await agent.run({"limit": brought})
    assert (result.output["limit"], result.output["saw"]) == (then, then)


async def test_changed_input_reaches_the_failed_step(agent: Agent) -> None:
    def work(ctx: NodeContext) -> NodeResult:
        if ctx.memory.read("key") == "wrong":
            return NodeResult(False, error="wrong key")
        return NodeResult(True, {"used": ctx.memory.read("key"), "given": ctx.input_data["key"]})

    agent.node("a", work)
    assert not (await agent.run({"key": "wrong"})).success
    result = await agent.run({"key": "right"})
    assert result.success
    assert (result.output["used"], result.output["given"]) == ("right", "right")


async def test_idempotency_keys_are_the_same_in_every_attempt_and_process(quick: Agent) -> None:
    quick.node("a", lambda ctx: NodeResult(False, error="no"), max_retries=2)
    await quick.run()
    keys = [ctx.idempotency_key for ctx in quick.contexts]
    await quick.run()
    keys += [ctx.idempotency_key for ctx in quick.contexts]
    assert keys == ["run-1/a#1"] * 4
    assert [ctx.max_attempts for ctx in quick.contexts] == [2, 2]


async def test_a_run_that_stands_at_a_removed_node_is_not_resumed(quick: Agent, fails_once: Callable[[], Work]) -> None:
    quick.node("a")
    quick.node("b", fails_once())
    quick.chain("a", "b")
    await quick.run()
    quick.config["definition_change"] = "allow"
    del quick.nodes["b"]
    quick.edges.clear()
    with pytest.raises(ResumeError, match="'b'"):
        await quick.run()
