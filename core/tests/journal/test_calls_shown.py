"""How calls are shown between processes: settled ones whose step has not gone on, sleeps that are not over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.errors import MessageRefused
from framework.graph.node import NodeContext
from framework.graph.run_view import view_run
from framework.storage.memory import MemoryStorage
from tests.journal.journal_kit import Bench


async def pays_and_waits(ctx: NodeContext) -> Any:
    async def pay() -> None:
        raise TimeoutError("no answer")

    try:
        await ctx.call("pay", pay, policy="ask")
    except TimeoutError:
        await ctx.ask("Did it arrive?", bool)
    return "done"


async def sleeps(ctx: NodeContext) -> Any:
    await ctx.sleep(3600)


def shown(bench: Bench) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = [(call.kind, call.state) for call in bench.manager.journal("run")]
    assert [(call.kind, call.state) for call in view_run(bench.storage, "run").calls] == listed
    return listed


@pytest.mark.parametrize("how", [{"done": 1}, {"redo": True}, {"skip": True}], ids=["done", "redo", "skip"])
async def test_a_settled_call_is_shown_as_settled_and_is_settled_once(how: dict[str, Any]) -> None:
    bench = Bench(MemoryStorage())
    await bench.run(pays_and_waits)
    assert shown(bench) == [("call", "unknown"), ("ask", "waiting")]
    bench.manager.settle("run", "a#1/1", **how)
    assert shown(bench) == [("call", "settled"), ("ask", "waiting")]
    with pytest.raises(MessageRefused, match="'a#1/1' .* this call was settled before; the first word counts"):
        bench.manager.settle("run", "a#1/1", skip=True)


async def test_what_a_resume_would_do_tells_of_a_settled_call() -> None:
    bench, begun = Bench(MemoryStorage()), asyncio.Event()

    async def hangs(ctx: NodeContext) -> Any:
        async def pay() -> None:
            begun.set()
            await asyncio.Event().wait()

        await ctx.call("pay", pay, policy="ask")

    task = asyncio.create_task(bench.run(hangs))
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bench.manager.settle("run", "a#1/1", skip=True)
    [again] = view_run(bench.storage, "run").resume.again
    assert "1 call taken as settled" in again.why


class Late(MemoryStorage):
    """What two people leave at the same moment: the second has not seen the first's."""

    blind = False

    def read_messages(self, *args: Any, **keywords: Any) -> Any:
        if self.blind:
            self.blind = False
            return []
        return super().read_messages(*args, **keywords)


async def test_of_two_settlements_at_the_same_moment_the_second_is_refused_as_clearly() -> None:
    storage = Late()
    bench = Bench(storage)
    await bench.run(pays_and_waits)
    bench.manager.settle("run", "a#1/1", skip=True)
    storage.blind = True
    with pytest.raises(MessageRefused, match="'a#1/1' .* settled before"):
        bench.manager.settle("run", "a#1/1", redo=True)


async def test_a_sleep_that_is_not_over_is_shown_as_waiting() -> None:
    bench = Bench(MemoryStorage(), sleep_in_process_seconds=0)
    await bench.run(sleeps)
    assert shown(bench) == [("sleep", "waiting")]


async def test_a_sleep_that_is_over_is_shown_as_done() -> None:
    bench = Bench(MemoryStorage())

    async def wakes(ctx: NodeContext) -> Any:
        await ctx.sleep(0)
        return await ctx.ask("Awake?", bool)

    await bench.run(wakes)
    assert shown(bench) == [("sleep", "done"), ("ask", "waiting")]
