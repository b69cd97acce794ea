"""A lease that is lost, or may have ended: what runs is stopped, and no further step begins."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from framework.errors import LeaseLost, RunError, StorageError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.node import NodeContext
from framework.graph.plan import Plan
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from tests.plans.plan_kit import GOAL as PLAN_GOAL
from tests.plans.plan_kit import plan, step
from tests.recovery.conftest import RUN_ID, Agent, SimpleRuntime

SHORT = {"lease_seconds": 0.3}


def take_over(storage: Storage) -> int:
    """Another owner's claim, as when the lease has ended; its token."""
    return storage.claim_run(RUN_ID, "another", 60, lambda owner: False).token


class Endless:
    """A body that waits for ever, and says whether it was cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cancelled = False

    async def __call__(self, *_: Any) -> dict[str, Any]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return {}


async def test_a_graph_that_lost_its_lease_stops_in_the_middle_of_a_step(agent: Agent) -> None:
    body = Endless()
    agent.config = SHORT
    agent.node("a")
    agent.node("b", body)
    agent.chain("a", "b", "c")
    running = asyncio.create_task(agent.run())
    await body.begun.wait()
    assert agent.storage is not None
    token = take_over(agent.storage)
    before = agent.storage.read_log(RUN_ID)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(running, 20)
    assert body.cancelled
    assert agent.ran == ["a#1", "b#1"]
    assert agent.storage.read_log(RUN_ID) == before
    record = agent.record()
    assert (record.state, record.owner, record.token) == (RunState.RUNNING, "another", token)
    assert agent.runtime.ended == []


async def test_a_plan_that_lost_its_lease_stops_in_the_middle_of_a_step(storage: Storage) -> None:
    body = Endless()
    manager = CheckpointManager(storage, CheckpointConfig.model_validate(SHORT))
    executor = FlexibleGraphExecutor(SimpleRuntime(), checkpoint_manager=manager)
    executor.register_function("hang", body)
    work: Plan = plan(step("h", call="hang"))
    running = asyncio.create_task(executor.execute_plan(work, PLAN_GOAL, run_id=RUN_ID))
    await body.begun.wait()
    take_over(storage)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(running, 20)
    assert body.cancelled
    record = storage.find_run(RUN_ID)
    assert record is not None
    assert (record.state, record.owner) == (RunState.RUNNING, "another")


async def test_a_step_that_swallows_its_cancellation_is_the_last(quick: Agent) -> None:
    lost = asyncio.Event()

    async def stubborn(ctx: NodeContext) -> dict[str, Any]:
        lost.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return {"b": "as if nothing had happened"}
        return {}

    quick.config = {**SHORT, "durability": "exit"}
    quick.node("b", stubborn)
    quick.chain("b", "c")
    running = asyncio.create_task(quick.run())
    await lost.wait()
    assert quick.storage is not None
    take_over(quick.storage)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(running, 20)
    assert quick.ran == ["b#1"]


class Away(MemoryStorage):
    """A store whose leases cannot be renewed for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.away = threading.Event()
        self.asked = threading.Semaphore(0)

    def renew_leases(self, leases: Sequence[tuple[str, int]], lease_seconds: float) -> list[RunError | None]:
        self.asked.release()
        if self.away.is_set():
            raise StorageError("the database is away")
        return super().renew_leases(leases, lease_seconds)


@pytest.fixture
def away() -> Away:
    return Away()


def past_the_lease(store: Away) -> None:
    """Return when the run's lease has ended, by renewals that failed for longer than it lasts."""
    for _ in range(16):  # the first after a third of the lease, then each after a twelfth
        assert store.asked.acquire(timeout=20)


@pytest.mark.parametrize(
    "config",
    [{"durability": "exit"}, {}, {"save_frequency": "every_n_nodes", "n_nodes": 5}],
    ids=["exit", "sync", "every_n"],
)
async def test_no_step_begins_while_the_lease_may_have_ended(away: Away, config: dict[str, Any]) -> None:
    with away:
        agent = Agent(away)
        agent.config = {**SHORT, **config}

        async def outlive(ctx: NodeContext) -> dict[str, Any]:
            away.away.set()
            await asyncio.to_thread(past_the_lease, away)
            return {}

        agent.node("a", outlive)
        agent.chain("a", "b")
        running = asyncio.create_task(agent.run())
        for _ in range(2):
            await asyncio.to_thread(past_the_lease, away)
        assert agent.ran == ["a#1"], "b did not begin"
        away.away.clear()  # nobody took the run meanwhile: it goes on
        result = await asyncio.wait_for(running, 20)
        assert result.success
        assert result.path == ["a", "b"]
        assert "no step begins" in agent.runtime.told("warning")[0]


async def test_a_run_that_another_took_while_the_store_was_away_is_lost(away: Away) -> None:
    with away:
        agent = Agent(away)
        agent.config = {**SHORT, "durability": "exit"}

        async def outlive(ctx: NodeContext) -> dict[str, Any]:
            away.away.set()
            await asyncio.to_thread(past_the_lease, away)
            take_over(away)
            away.away.clear()
            return {}

        agent.node("a", outlive)
        agent.chain("a", "b")
        with pytest.raises(LeaseLost):
            await asyncio.wait_for(agent.run(), 20)
        assert agent.ran == ["a#1"]


async def test_a_renewal_in_time_holds_nothing_up(away: Away) -> None:
    with away:
        agent = Agent(away)
        agent.config = SHORT

        async def work(ctx: NodeContext) -> dict[str, Any]:
            away.away.set()
            assert await asyncio.to_thread(away.asked.acquire, True, 20)
            away.away.clear()
            return {}

        agent.node("a", work)
        agent.chain("a", "b")
        assert (await asyncio.wait_for(agent.run(), 20)).success
        assert agent.runtime.told("warning") == []
