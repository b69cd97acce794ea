"""An unknown effect keeps its step from ending, whatever way the step took; and what is lost asks nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from framework.errors import LeaseLost, StorageError, UnknownEffect
from framework.graph.node import NodeContext
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from framework.storage.records import JournalWrite, Write
from tests.journal.journal_kit import Bench


class World:
    """Payments that reached the outside."""

    def __init__(self) -> None:
        self.paid: list[float] = []
        self.hangs = False

    async def pay(self, amount: float) -> str:
        self.paid.append(amount)
        if self.hangs:
            await asyncio.Event().wait()
        return f"paid {amount}"


def state_of(bench: Bench) -> RunState:
    record = bench.storage.find_run("run")
    assert record is not None
    return record.state


def unknown(bench: Bench) -> list[str]:
    return [call.id for call in bench.manager.journal("run") if call.state == "unknown"]


async def test_a_payment_that_timed_out_inside_the_node_is_asked_about_before_the_step_ends() -> None:
    world, bench = World(), Bench(MemoryStorage())
    world.hangs = True

    async def body(ctx: NodeContext) -> str:
        try:
            async with asyncio.timeout(0.01):
                return str(await ctx.call("pay", world.pay, 100.0, policy="ask"))
        except TimeoutError:
            return "gave up"

    await bench.run(body)
    assert state_of(bench) is RunState.PAUSED
    [call] = unknown(bench)
    bench.manager.settle("run", call, skip=True)
    result = await bench.run(body)
    assert result.success
    assert world.paid == [100.0], "the settled payment is not made again"


async def test_a_step_that_takes_another_way_does_not_leave_its_unknown_payment_behind() -> None:
    world, bench = World(), Bench(MemoryStorage())
    world.hangs = True
    amount = 101.0

    async def body(ctx: NodeContext) -> str:
        return str(await ctx.call("pay", world.pay, amount, policy="ask"))

    task = asyncio.create_task(bench.run(body))
    while not world.paid:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.hangs, amount = False, 102.0
    await bench.run(body)
    assert state_of(bench) is RunState.PAUSED
    [call] = unknown(bench)
    bench.manager.settle("run", call, done="it went through")
    assert (await bench.run(body)).success
    assert world.paid == [101.0, 102.0], "each amount was paid once"


async def test_a_node_that_swallows_the_policy_fail_does_not_succeed() -> None:
    world, bench = World(), Bench(MemoryStorage())
    world.hangs = True

    async def body(ctx: NodeContext) -> str:
        try:
            return str(await ctx.call("pay", world.pay, 1.0, policy="fail"))
        except UnknownEffect:
            return "never mind"

    task = asyncio.create_task(bench.run(body))
    while not world.paid:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.hangs = False
    result = await bench.run(body)
    assert not result.success
    assert "pay" in str(result.error)
    assert world.paid == [1.0]


async def test_an_effect_whose_outcome_cannot_be_stored_is_not_made_again_by_a_retry() -> None:
    world, bench = World(), Bench(MemoryStorage())

    async def pay(amount: float) -> object:
        world.paid.append(amount)
        return object()

    async def body(ctx: NodeContext) -> str:
        return str(await ctx.call("pay", pay, 5.0, policy="ask"))

    await bench.run(body, attempts=3)
    assert world.paid == [5.0]
    assert state_of(bench) is RunState.PAUSED
    [call] = unknown(bench)
    bench.manager.settle("run", call, done="receipt 5")
    assert (await bench.run(body, attempts=3)).output["value"] == "receipt 5"
    assert world.paid == [5.0]


class Refusing(MemoryStorage):
    """Refuses journal rows from the third on, and keeps the size of each."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error
        self.sizes: list[int] = []

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for each in commits:
            if isinstance(each, JournalWrite):
                self.sizes += [len(row.record) for row in each.rows]
                if self.error is not None and len(self.sizes) > 2:
                    outcomes.append(self.error)
                    continue
            outcomes += super().commit([each])
        return outcomes


@pytest.mark.parametrize("error", [StorageError("The disk is full."), LeaseLost("run", 1)])
async def test_after_a_refused_row_nothing_more_reaches_the_outside(error: Exception) -> None:
    world, bench = World(), Bench(Refusing(error))

    async def body(ctx: NodeContext) -> str:
        for amount in range(10):
            try:
                await ctx.call("pay", world.pay, float(amount))
            except Exception:  # noqa: BLE001 - as a node may
                continue
        return "done"

    outcome: Any = (await asyncio.gather(bench.run(body), return_exceptions=True))[0]
    assert isinstance(outcome, LeaseLost) or not outcome.success
    assert world.paid == [0.0, 1.0, 2.0]


async def test_rows_of_many_concurrent_calls_stay_small() -> None:
    storage = Refusing(None)

    async def body(ctx: NodeContext) -> int:
        calls = [ctx.call("n", lambda number=number: number) for number in range(300)]
        return sum(await asyncio.gather(*calls))

    result = await Bench(storage).run(body)
    assert result.output["value"] == sum(range(300))
    # One row lists the calls that began with it; each of them is listed once.
    assert sum(storage.sizes) < 300 * 500
