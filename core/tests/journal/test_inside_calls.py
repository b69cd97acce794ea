"""Calls made inside a call in flight: it is finished, whatever the step's other tasks come to meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from framework.graph import journal_rows
from framework.graph.budget import RunBudget
from framework.graph.journal import AttemptJournal, CallSpec, request_hash
from framework.graph.journal_rows import Policy
from framework.graph.node import NodeContext
from framework.graph.suspension import Suspended, Waiting
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.storage.memory import MemoryStorage
from framework.storage.records import JournalRow
from tests.journal.journal_kit import Bench, Crash, Life, Outside, Rows, question_of


def said(messages: Any, *_: Any) -> LLMResponse:
    return LLMResponse("said", "m", input_tokens=6, output_tokens=4, cost=0.5)


async def until_suspended(ctx: NodeContext) -> None:
    """Until another task of the step waits."""
    assert ctx.journal is not None
    while not ctx.journal.is_suspended:
        await asyncio.sleep(0)


@pytest.mark.parametrize("group", [False, True], ids=["gather", "group"])
@pytest.mark.parametrize("policy", ["ask", "fail", "rerun"])
async def test_an_effect_goes_on_with_its_own_calls_beside_a_question(policy: Policy, group: bool) -> None:
    bench, log = Bench(MemoryStorage()), list[str]()

    async def body(ctx: NodeContext) -> Any:
        async def ship() -> str:
            await ctx.call("label", log.append, "label")
            log.append("shipped")
            await until_suspended(ctx)
            await ctx.call("track", log.append, "track", policy="ask")
            return str((await ctx.llm.acomplete([{"role": "user", "content": "thank them"}])).content)

        shipping, asking = ctx.call("ship", ship, policy=policy), ctx.ask("How many?", int)
        if not group:
            return await asyncio.gather(shipping, asking)
        async with asyncio.TaskGroup() as tasks:
            both = [tasks.create_task(shipping), tasks.create_task(asking)]
        return [each.result() for each in both]

    result = await bench.run(body, llm=ScriptedLLM(said))
    assert (result.paused_at, log) == ("a", ["label", "shipped", "track"]), result.error
    assert {call.name: call.state for call in bench.manager.journal("run")}["ship"] == "done"
    bench.manager.send("run", question_of(bench), 3)
    result = await bench.run(body, llm=ScriptedLLM([]))
    assert (result.output["value"], log) == (["said", 3], ["label", "shipped", "track"]), result.error


async def test_an_effect_in_a_thread_asks_its_model_beside_a_sleep() -> None:
    bench, log, sleeps = Bench(MemoryStorage(), sleep_in_process_seconds=0), list[str](), threading.Event()

    async def body(ctx: NodeContext) -> Any:
        def send_mail() -> str:
            log.append("connected")
            assert sleeps.wait(20)
            text = str(ctx.llm.complete([{"role": "user", "content": "write it"}]).content)
            log.append("sent")
            return text

        async def nap() -> None:
            async def told() -> None:
                await until_suspended(ctx)
                sleeps.set()

            telling = asyncio.create_task(told())
            try:
                await ctx.sleep(3600)
            finally:
                await telling

        return (await asyncio.gather(ctx.call("mail", send_mail, policy="ask"), nap()))[0]

    result = await bench.run(body, llm=ScriptedLLM(said))
    assert (result.paused_at, log) == ("a", ["connected", "sent"]), result.error
    states = {call.name: call.state for call in bench.manager.journal("run")}
    assert states == {"mail": "done", "sleep": "waiting", "llm": "done"}


class Whole:
    """A provider that does not give turns: its conversations are one call each. Told when its step waits."""

    model = "m"

    def __init__(self) -> None:
        self.asked = 0
        self.ctx: NodeContext | None = None

    async def acomplete_with_tools(
        self, messages: Any, system: str, tools: Any, tool_executor: Any, **more: Any
    ) -> LLMResponse:
        for number in range(3):
            self.asked += 1
            assert self.ctx is not None
            await until_suspended(self.ctx)
            await tool_executor(ToolUse(f"u{number}", "look", {"number": number}))
        return LLMResponse("done", "m", input_tokens=60, output_tokens=40, cost=1.0)

    complete = acomplete = complete_with_tools = acomplete_with_tools


async def test_a_whole_conversation_is_finished_and_recorded_beside_a_question() -> None:
    bench, provider, used = Bench(MemoryStorage()), Whole(), list[Any]()

    async def look(use: ToolUse) -> ToolResult:
        used.append(use.input["number"])
        return ToolResult(use.id, "seen")

    async def body(ctx: NodeContext) -> Any:
        provider.ctx = ctx
        tool = Tool("look", "Looks.", {"type": "object", "properties": {"number": {}}})
        talk = ctx.llm.acomplete_with_tools([{"role": "user", "content": "look"}], "", [tool], look)
        reply, number = await asyncio.gather(talk, ctx.ask("How many?", int))
        return [reply.content, number]

    result = await bench.run(body, llm=provider)
    assert (result.paused_at, provider.asked, used) == ("a", 3, [0, 1, 2]), result.error
    bench.manager.send("run", question_of(bench), 3)
    result = await bench.run(body, llm=provider)
    assert (result.output["value"], provider.asked, used) == (["done", 3], 3, [0, 1, 2]), result.error


@pytest.mark.parametrize("policy", ["ask", "rerun"])
async def test_beside_a_used_up_budget_all_but_new_questions_go_on(policy: Policy) -> None:
    bench, log = Bench(MemoryStorage()), list[str]()

    async def body(ctx: NodeContext) -> Any:
        refused = asyncio.Event()

        async def ship() -> str:
            log.append("shipped")
            await refused.wait()
            for _ in range(3):  # until the step is over but for this
                await asyncio.sleep(0)
            await ctx.call("track", log.append, "track")
            return "on its way"

        async def talk() -> None:
            try:
                for number in range(3):
                    await ctx.llm.acomplete([{"role": "user", "content": str(number)}], max_tokens=4)
            finally:
                refused.set()

        return (await asyncio.gather(ctx.call("ship", ship, policy=policy), talk()))[0]

    result = await bench.run(body, llm=ScriptedLLM(said), budget=RunBudget(max_tokens=15))
    assert (result.error_type, log) == ("budget", ["shipped", "track"])
    assert {call.name: call.state for call in bench.manager.journal("run")}["ship"] == "done"
    result = await bench.run(body, llm=ScriptedLLM(said), budget=RunBudget(max_tokens=150))
    assert (result.output["value"], log) == ("on its way", ["shipped", "track"]), result.error


@pytest.mark.parametrize("error", [ValueError("no such address"), None], ids=["failed", "refused"])
async def test_beside_a_used_up_budget_an_effect_that_fails_is_known_to_have(error: Exception | None) -> None:
    """One that was refused a question of its own is not: what it had done by then is not known."""
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        refused = asyncio.Event()

        async def ship() -> None:
            await refused.wait()
            for _ in range(3):
                await asyncio.sleep(0)
            if error is not None:
                raise error
            await ctx.llm.acomplete([{"role": "user", "content": "one more"}])

        async def talk() -> None:
            try:
                for number in range(3):
                    await ctx.llm.acomplete([{"role": "user", "content": str(number)}], max_tokens=4)
            finally:
                refused.set()

        return (await asyncio.gather(ctx.call("ship", ship, policy="ask"), talk()))[0]

    llm = ScriptedLLM(said)
    result = await bench.run(body, llm=llm, budget=RunBudget(max_tokens=15))
    state = {call.name: call.state for call in bench.manager.journal("run")}["ship"]
    assert (result.error_type, state, llm.calls) == ("budget", "failed" if error is not None else "unknown", 2)


# --- while recorded calls are given out -----------------------------------------------------------------------------


async def suspended(life: Life) -> None:
    """A task of the step waits, and the step is being suspended."""
    with pytest.raises(Suspended):
        life.journal.suspend(Waiting("sleep", "n#1/9", until=1e12))


def asks(journal: AttemptJournal, name: str, make: Any, policy: Policy = "rerun") -> Any:
    return journal.call(name, request_hash(name, "what"), make, CallSpec(policy))


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "works"])
async def test_a_call_made_again_is_not_held_up_by_a_record_of_another_task_that_does_not_come(waits: bool) -> None:
    """Before what is recorded inside the call, that task was answered; the step is suspended, or the task is gone."""
    rows, outside = Rows(), Outside()
    crashes = True

    async def work(life: Life) -> Any:
        begun = asyncio.Event()

        async def outer(key: str) -> str:
            await begun.wait()
            first = await life.call("first")
            if crashes:
                raise Crash
            return f"{first}, {await life.call('second')}"

        async def other() -> None:
            if crashes:
                await life.call("before")
            elif waits:
                await suspended(life)
            begun.set()

        return (await asyncio.gather(asks(life.journal, "outer", outer), other()))[0]

    with pytest.raises(Crash):
        await Life(rows, outside).run(work)
    crashes = False
    life = Life(rows, outside, patience_seconds=0.01)
    assert await asyncio.wait_for(life.run(work), 20) is not None
    assert outside.reached["second"] == 1


async def test_an_effect_that_was_made_is_recorded_when_its_step_waits_before_it_could_be() -> None:
    """What it came to is told after what is recorded of other tasks, and they are not to come again."""
    rows, outside = Rows(), Outside()
    crashes = True

    async def work(life: Life) -> Any:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def outer(key: str) -> str:
            if crashes:
                await begun.wait()
                await life.call("inside")
                raise Crash
            ended.set()
            return outside.answer("effect", key)

        async def other() -> None:
            if crashes:
                await life.call("before")
                begun.set()
                return
            await ended.wait()
            for _ in range(5):  # until the effect waits for its turn to be recorded
                await asyncio.sleep(0)
            await suspended(life)

        return await asyncio.gather(asks(life.journal, "outer", outer), other())

    with pytest.raises(Crash):
        await Life(rows, outside).run(work)
    crashes = False
    life = Life(rows, outside, patience_seconds=1e9)
    await asyncio.wait_for(life.run(work), 20)
    with pytest.raises(Suspended):
        await life.journal.over()
    stored = [JournalRow("n#1", number, record) for number, record in sorted(rows.rows.items())]
    states = {each.name: each.state for each in journal_rows.describe("n#1", journal_rows.parse(stored), running=False)}
    assert states["outer"] == "done"
