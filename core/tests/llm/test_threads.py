"""Calls in threads that nobody waits for any more: they begin nothing new, and no attempt overlaps with the next."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.llm.calls import ask, ask_with_tools
from framework.llm.mock import MockLLM
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.llm.threads import Abandoned, Watch, check_wanted, in_thread, pause
from framework.runtime import Runtime
from framework.storage.backend import open_storage

if TYPE_CHECKING:
    from pathlib import Path

ASK = [{"role": "user", "content": "q"}]
TOOL = Tool("send", "Sends.")
USE = ToolUse("1", "send", {})


class OwnLoop(MockLLM):
    """A synchronous provider with a tool loop of its own, which tells the model of whatever a tool raises."""

    def complete_with_tools(
        self, messages: Any, system: Any, tools: Any, tool_executor: Any, *rest: Any, **more: Any
    ) -> LLMResponse:
        for _ in range(4):
            with suppress(Exception):
                tool_executor(USE)
        return LLMResponse("done", "own")


class Tools:
    """A blocking tool that stays in its first call until it is let go, and counts who is in it at once."""

    def __init__(self) -> None:
        self.began = threading.Semaphore(0)
        self.go = threading.Event()
        self.calls = self.inside = self.at_once = 0
        self.lock = threading.Lock()

    def __call__(self, use: ToolUse) -> ToolResult:
        with self.lock:
            self.calls += 1
            self.inside += 1
            self.at_once = max(self.at_once, self.inside)
        self.began.release()
        assert self.go.wait(30)
        with self.lock:
            self.inside -= 1
        return ToolResult(use.id, "sent")

    async def entered(self) -> None:
        assert await asyncio.to_thread(self.began.acquire, timeout=30)


async def ended_threads() -> None:
    """Wait until no thread of a call runs any more."""
    for thread in [each for each in threading.enumerate() if each.name == "surefoot step"]:
        await asyncio.to_thread(thread.join, 30)


def four_calls() -> ScriptedLLM:
    return ScriptedLLM([USE, USE, USE, USE, "done"])


@pytest.mark.parametrize("make", [four_calls, OwnLoop])
async def test_a_call_that_nobody_waits_for_calls_no_further_tool(make: Any) -> None:
    tools = Tools()
    task = asyncio.create_task(ask_with_tools(make(), messages=ASK, tools=[TOOL], tool_executor=tools))
    await tools.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tools.go.set()
    await ended_threads()
    assert tools.calls == 1


async def test_the_default_async_way_calls_no_further_tool_either() -> None:
    tools = Tools()
    task = asyncio.create_task(four_calls().acomplete_with_tools(ASK, "", [TOOL], tools))
    await tools.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tools.go.set()
    await ended_threads()
    assert tools.calls == 1


@pytest.mark.parametrize("make", [four_calls, OwnLoop])
async def test_an_async_tool_is_cancelled_with_the_call(make: Any) -> None:
    began, calls, cancelled = asyncio.Event(), 0, asyncio.Event()

    async def tool(use: ToolUse) -> ToolResult:
        nonlocal calls
        calls += 1
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    task = asyncio.create_task(ask_with_tools(make(), messages=ASK, tools=[TOOL], tool_executor=tool))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(30):
        await cancelled.wait()
    await ended_threads()
    assert calls == 1


def graph(**fields: Any) -> GraphSpec:
    node = NodeSpec(id="n", tools=["send"], output_keys=["a"], retry_delay_seconds=0, **fields)
    return GraphSpec(id="g", goal_id="g", entry_node="n", nodes=[node])


async def run(path: Path, llm: Any, tools: Any, manager: Any = None, run_id: Any = None, **fields: Any) -> Any:
    executor = GraphExecutor(Runtime(path), llm, tools=[TOOL], tool_executor=tools, checkpoint_manager=manager)
    result: ExecutionResult = await executor.execute(
        graph(**fields), Goal(id="g", name="G", description="d"), {"q": 1}, run_id=run_id
    )
    return result


class AsyncLoop(MockLLM):
    """An async provider that calls a blocking tool four times."""

    def complete_with_tools(self, *args: Any, **more: Any) -> LLMResponse:
        raise AssertionError

    async def acomplete_with_tools(self, messages: Any, tool_executor: Any, **more: Any) -> LLMResponse:
        from framework.llm.tool_loop import Conversation, Turn, talk_async

        async def turn(talked: Any) -> Turn:
            done = len(talked) > 8
            return Turn(LLMResponse("done" if done else "", "m"), () if done else (USE,))

        return await talk_async(Conversation(messages, "m", 10), turn, tool_executor)


@pytest.mark.parametrize("make", [lambda: ScriptedLLM(lambda *_: USE), OwnLoop, AsyncLoop])
async def test_an_attempt_that_timed_out_does_not_overlap_with_the_next(tmp_path: Path, make: Any) -> None:
    tools = Tools()
    running = asyncio.create_task(run(tmp_path, make(), tools, max_retries=2, timeout_seconds=0.1))
    result = await running
    assert not result.success
    assert "failed after 2 attempts: timed out after 0.1 s; an earlier attempt still runs" in result.error
    tools.go.set()
    await ended_threads()
    assert (tools.calls, tools.at_once) == (1, 1)


async def test_the_next_attempt_begins_when_the_thread_of_the_one_before_has_ended(tmp_path: Path) -> None:
    tools = Tools()
    script: list[Any] = [USE, USE, "done"]
    running = asyncio.create_task(run(tmp_path, ScriptedLLM(script), tools, max_retries=9, timeout_seconds=0.2))
    await tools.entered()
    await asyncio.sleep(0.3)  # the time limit passes; there is nothing else to see of it
    assert tools.calls == 1
    tools.go.set()
    result = await running
    assert result.success
    assert (tools.calls, tools.at_once) == (2, 1)


async def test_a_resumed_run_waits_for_the_thread_of_the_cancelled_one(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'runs.db'}")
    manager, tools = CheckpointManager(storage), Tools()
    first = asyncio.create_task(run(tmp_path, four_calls(), tools, manager, "r"))
    await tools.entered()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    # The model's first reply is in the journal; the tool's answer came when nobody waited any more, so it is not.
    second = asyncio.create_task(run(tmp_path, ScriptedLLM(["done"]), tools, manager, "r"))
    asked, _ = await asyncio.wait([second], timeout=0.3)
    assert not asked
    assert tools.calls == 1
    tools.go.set()
    assert (await second).success
    assert (tools.calls, tools.at_once) == (2, 1)
    await asyncio.to_thread(storage.close)


async def test_hung_calls_do_not_use_up_the_threads_of_the_event_loop() -> None:
    go = threading.Event()

    def hang(*given: Any) -> str:
        assert go.wait(30)
        return "late"

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        hung = [asyncio.create_task(ask(ScriptedLLM(hang), messages=ASK)) for _ in range(3)]
        async with asyncio.timeout(10):
            assert await asyncio.to_thread(lambda: "free") == "free"
            assert (await ask(ScriptedLLM(["quick"]), messages=ASK)).content == "quick"
        go.set()
        assert [(await each).content for each in hung] == ["late"] * 3


async def test_a_call_inside_a_tool_of_the_same_attempt_does_not_wait_for_it(tmp_path: Path) -> None:
    async def tool(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, (await ask(ScriptedLLM(["inner"]), messages=ASK)).content)

    async with asyncio.timeout(10):
        assert (await run(tmp_path, ScriptedLLM([USE, "done"]), tool)).success


async def test_a_thread_that_nobody_waits_for_stops_waiting_itself() -> None:
    began, ended = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        began.set()
        try:
            pause(30)
        except BaseException as error:  # noqa: BLE001 - that is what is looked at
            raised.append(error)
        ended.set()

    task = asyncio.create_task(in_thread(work))
    assert await asyncio.to_thread(began.wait, 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.to_thread(ended.wait, 10)
    assert [type(each) for each in raised] == [Abandoned]


def test_elsewhere_nothing_is_abandoned() -> None:
    check_wanted()
    pause(0)
    watch = Watch()
    watch.check()
    watch.give_up()
    with pytest.raises(Abandoned, match="nobody waits"):
        watch.result_of(lambda: pytest.fail("begun"))
