"""What comes while a run works: values for waits in the process, and words for who is not asked (any more)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.errors import MessageRefused
from framework.graph.node import NodeContext
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from tests.journal.journal_kit import Bench, question_of


async def test_a_wait_in_the_process_takes_its_value_when_it_comes() -> None:
    bench = Bench(MemoryStorage(), sleep_in_process_seconds=50)

    async def body(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go", timeout_seconds=40)

    task = asyncio.create_task(bench.run(body))
    while bench.storage.find_run("run") is None or not bench.manager.journal("run"):
        await asyncio.sleep(0.001)
    bench.manager.send("run", "go", 17)
    async with asyncio.timeout(10):
        assert (await task).output["value"] == 17


async def test_names_that_nobody_waits_for_are_refused() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return await ctx.ask("Pay?", bool)

    await bench.run(body)
    question = question_of(bench)
    for name in ("a#1/qbad", question + "0", "b:a#2/17"):
        with pytest.raises(MessageRefused, match=f"no such open question. Open: {question}"):
            bench.manager.send("run", name, True)
    with pytest.raises(ValueError, match="the name is ''"):
        bench.manager.send("run", "", True)
    assert bench.storage.read_messages("run") == []


async def test_a_cancelled_run_refuses_values_until_it_is_resumed() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return await ctx.ask("Pay?", bool), await ctx.wait_for("go")

    await bench.run(body)
    question = question_of(bench)
    assert bench.manager.cancel("run")
    for name in (question, "go"):
        with pytest.raises(MessageRefused, match="cancelled.*resume"):
            bench.manager.send("run", name, True)
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", question, True)
    bench.manager.send("run", "go", 1)
    assert (await bench.run(body)).success


async def test_a_failed_run_keeps_a_signal_and_refuses_an_answer_to_what_is_open_no_more() -> None:
    bench = Bench(MemoryStorage())
    fails: bool | None = False

    async def body(ctx: NodeContext) -> Any:
        if fails:
            raise ValueError("no")
        return await ctx.wait_for("go") if fails is None else await ctx.ask("Pay?", bool)

    await bench.run(body)
    question, fails = question_of(bench), True
    assert not (await bench.run(body, input_data={"x": 1})).success
    record = bench.storage.find_run("run")
    assert record is not None
    assert record.state is RunState.FAILED
    with pytest.raises(MessageRefused, match="no such open question"):
        bench.manager.send("run", question, True)
    bench.manager.send("run", "go", "kept")
    fails = None
    assert (await bench.run(body)).output["value"] == "kept"


@pytest.mark.parametrize("swallows", [True, False])
async def test_an_effect_that_became_unknown_is_not_tried_again(swallows: bool) -> None:
    bench, paid = Bench(MemoryStorage()), [0]

    async def pay() -> str:
        paid[0] += 1
        raise TimeoutError("no answer in time")

    async def body(ctx: NodeContext) -> Any:
        for number in range(3):
            try:
                return await ctx.call("pay", pay, policy="ask")
            except TimeoutError:
                if not swallows and number == 1:
                    raise
        return None

    result = await bench.run(body)
    assert (result.paused_at, paid) == ("a", [1])
    [call] = [each for each in bench.manager.journal("run") if each.state == "unknown"]
    bench.manager.settle("run", call.id, done="receipt")
    assert (await bench.run(body)).output["value"] == "receipt"
    assert paid == [1]


async def test_a_payment_under_another_number_waits_for_the_one_that_is_unknown() -> None:
    bench, paid, attempt = Bench(MemoryStorage()), list[str](), "attempt-1"
    stands = asyncio.Event()

    async def pay(what: str) -> str:
        paid.append(what)
        if what == "attempt-1":
            stands.set()
            await asyncio.Event().wait()
        return f"paid {what}"

    async def body(ctx: NodeContext) -> Any:
        return await ctx.call("pay", pay, attempt, policy="ask")

    task = asyncio.create_task(bench.run(body))
    await stands.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    attempt = "attempt-2"
    assert (await bench.run(body)).paused_at == "a"
    assert paid == ["attempt-1"], "nothing more is paid while the first is not known"
    [call] = [each for each in bench.manager.journal("run") if each.state == "unknown"]
    bench.manager.settle("run", call.id, redo=True)
    assert (await bench.run(body)).output["value"] == "paid attempt-2"
    assert paid == ["attempt-1", "attempt-2"]
