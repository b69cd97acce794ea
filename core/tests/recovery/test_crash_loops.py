"""A run that ends its process again and again is given up; what gets somewhere, or was let go, is not counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.graph.cancelling import LET_GO
from framework.graph.crash_loops import is_given_up
from framework.graph.node import NodeContext, NodeResult
from framework.graph.run_view import view_run
from framework.schemas.run import RunState
from tests.recovery.conftest import RUN_ID, Agent


async def crash_inside(agent: Agent, begun: asyncio.Event) -> None:
    """Execute until a body waits inside; the process is gone then, without a word."""
    begun.clear()
    running = asyncio.create_task(agent.run())
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not running.done(), running.result()
    assert agent.storage is not None
    # What a killed process leaves: an owner that renews no more. Its own task then meets a lease that is lost.
    record = agent.record()
    agent.storage.renew_lease(RUN_ID, record.token, -1)
    await _vanish(agent, running, record.token)


async def _vanish(agent: Agent, running: asyncio.Task[Any], token: int) -> None:
    from framework.storage.committer import committer_of

    assert agent.storage is not None
    committer_of(agent.storage).heartbeat.drop(RUN_ID, token)
    release = agent.storage.release_lease
    commit = agent.storage.commit
    agent.storage.release_lease = lambda run_id, token: None  # type: ignore[method-assign]
    agent.storage.commit = lambda commits: [None] * len(commits)  # type: ignore[method-assign]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    agent.storage.release_lease = release  # type: ignore[method-assign]
    agent.storage.commit = commit  # type: ignore[method-assign]


def hanging(agent: Agent) -> asyncio.Event:
    begun = asyncio.Event()

    async def hang(ctx: NodeContext) -> dict[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        return {}

    agent.node("a")
    agent.node("b", hang)
    agent.chain("a", "b")
    return begun


async def test_after_so_many_crashes_in_a_row_it_fails_and_says_so(agent: Agent) -> None:
    agent.config = {"max_recovery_attempts": 2}
    begun = hanging(agent)
    for _ in range(3):  # the first time, and two recoveries
        await crash_inside(agent, begun)
    assert agent.state() is RunState.CRASHED
    result = await agent.run()
    assert (result.success, result.error_type, agent.ran) == (False, "recovery", [])
    assert "ended its process 3 times in a row" in str(result.error)
    assert "in flight: 'b'" in str(result.error)
    record = agent.record()
    assert (record.state, record.error, record.owner) == (RunState.FAILED, result.error, None)
    assert is_given_up(record)
    assert agent.storage is not None
    assert view_run(agent.storage, RUN_ID).given_up
    # Called again, as by somebody who has seen to it, the count begins anew.
    for _ in range(3):
        await crash_inside(agent, begun)
    agent.work["b"] = lambda ctx: {"b": 1}
    assert (await agent.run()).error_type == "recovery"
    assert (await agent.run()).success
    assert not is_given_up(agent.record())


async def test_a_finished_step_or_attempt_in_between_is_progress(quick: Agent) -> None:
    quick.config = {"max_recovery_attempts": 1}
    begun = asyncio.Event()

    async def hang_or_fail(ctx: NodeContext) -> NodeResult:
        if ctx.attempt <= 5 and not begun.is_set() and ctx.attempt % 2:
            return NodeResult(False, error="not yet")
        begun.set()
        await asyncio.Event().wait()
        return NodeResult(True)

    quick.node("b", hang_or_fail, max_retries=9)
    await crash_inside(quick, begun)  # attempt 1 failed, cut off in 2
    assert quick.record().recovery_attempts == 0
    await crash_inside(quick, begun)
    assert quick.record().recovery_attempts == 1
    quick.work["b"] = lambda ctx: {}
    result = await quick.run()
    assert result.error_type == "recovery"


async def test_crashes_at_other_steps_do_not_add_up(quick: Agent) -> None:
    quick.config = {"max_recovery_attempts": 1}
    begun = asyncio.Event()
    done: set[str] = set()

    async def once(ctx: NodeContext) -> dict[str, Any]:
        if ctx.node_id not in done:
            done.add(ctx.node_id)
            begun.set()
            await asyncio.Event().wait()
        return {}

    names = [f"n{number}" for number in range(6)]
    for name in names:
        quick.node(name, once)
    quick.chain(*names)
    for _ in names:
        await crash_inside(quick, begun)
    assert (await quick.run()).success


async def test_being_let_go_is_no_crash(agent: Agent) -> None:
    agent.config = {"max_recovery_attempts": 0}
    begun = hanging(agent)
    for _ in range(3):
        begun.clear()
        running = asyncio.create_task(agent.run())
        await begun.wait()
        running.cancel(LET_GO)
        await asyncio.gather(running, return_exceptions=True)
        assert (agent.state(), agent.record().recovery_attempts) == (RunState.CRASHED, 0)
    agent.work["b"] = lambda ctx: {}
    assert (await agent.run()).success


@pytest.mark.parametrize("limit", [0, 3])
async def test_the_limit_is_how_many_recoveries_there_are(quick: Agent, limit: int) -> None:
    quick.config = {"max_recovery_attempts": limit}
    begun = hanging(quick)
    for _ in range(limit + 1):
        await crash_inside(quick, begun)
    assert (await quick.run()).error_type == "recovery"
