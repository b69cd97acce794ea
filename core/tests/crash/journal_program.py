"""The program that the journal's crash tests kill: one step with many calls, ``python journal_program.py '<json>'``.

The argument holds ``url`` (the store), ``port`` (the outside), ``work`` (a function below), ``die_at`` (the number of
the request of this process at which it is killed, 0 for none), ``seed`` and ``config``. Prints the result as JSON.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.journal import CallSpec, current_idempotency_key, request_hash
from framework.graph.node import LLMNode, NodeContext, NodeResult, NodeSpec
from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolResult, ToolUse
from framework.llm.tool_loop import Turn
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

TURNS = 5
TOOLS_A_TURN = 5
LOOK = Tool("look", "Looks.", {"type": "object", "properties": {"at": {"type": "string"}}})
BOOK = Tool("book", "Books.", {"type": "object", "properties": {"at": {"type": "string"}}}, effects=True)


class Outside:
    """Requests to the server; the ``die_at``-th of this process is its last."""

    def __init__(self, port: int, die_at: int) -> None:
        self._port = port
        self._die_at = die_at
        self._numbers = itertools.count(1)

    def reach(self, what: str, body: str = "") -> int:
        headers = {"Idempotency-Key": current_idempotency_key() or ""}
        if next(self._numbers) == self._die_at:
            headers["X-Die"] = str(os.getpid())
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("POST", f"/{what}", body.encode(), headers)
            number: int = json.loads(connection.getresponse().read())["number"]
            return number
        finally:
            connection.close()


class RemoteLLM(LLMProvider):
    """A model at the server: calls tools in its first turns and then says what it was told."""

    def __init__(self, outside: Outside, tool: str) -> None:
        self._outside = outside
        self._tool = tool

    def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
        raise NotImplementedError("the node has tools")

    def complete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        raise NotImplementedError("asked turn by turn")

    def turn(self, messages: Sequence[Message], system: str | None, tools: Sequence[Tool]) -> Turn:
        turn = sum(message["role"] == "assistant" for message in messages)
        number = self._outside.reach("llm", str(turn))
        if turn + 1 < TURNS:
            uses = tuple(
                ToolUse(f"{turn}.{each}", self._tool, {"at": f"{turn}.{each}"}) for each in range(TOOLS_A_TURN)
            )
            return Turn(LLMResponse("", "remote", 10, 5, "tool_use"), uses)
        told = [part["content"] for message in messages[1:] if message["role"] == "user" for part in message["content"]]
        return Turn(LLMResponse(f"{number}: {' '.join(told)}", "remote", 10, 5, "end_turn"))


def agent(outside: Outside, tool: str = "look") -> tuple[Any, Any]:
    """20 tool calls and 5 questions to a model."""

    def run(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, str(outside.reach(f"tool/{use.input['at']}")))

    return LLMNode(run), RemoteLLM(outside, tool)


class Calls:
    """A node of one's own, as an async function."""

    def __init__(self, body: Callable[[NodeContext], Any]) -> None:
        self._body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        return NodeResult(True, {"value": await self._body(ctx)})


def concurrent(outside: Outside, seed: int) -> Calls:
    """Rounds of concurrent calls, each time in another order, with a call of the step itself after each."""
    order = random.Random(seed)

    async def body(ctx: NodeContext) -> list[int]:
        async def one(what: str, spins: int) -> int:
            for _ in range(spins):
                await asyncio.sleep(0)
            number: int = await ctx.call("get", outside.reach, what)
            return number

        numbers = []
        for turn in range(3):
            whats = [f"{turn}.{each % 5}" for each in range(7)]
            order.shuffle(whats)
            numbers += sorted(await asyncio.gather(*(one(what, order.randrange(5)) for what in whats)))
            numbers.append(await ctx.call("get", outside.reach, f"{turn}.then"))
        return numbers

    return Calls(body)


async def _background(ctx: NodeContext, outside: Outside) -> list[int]:
    """The step's own calls beside a task that is awaited at the end."""

    async def row(name: str) -> list[int]:
        return [await ctx.call("get", outside.reach, f"{name}.{each}") for each in range(4)]

    task = asyncio.create_task(row("task"))
    own = await row("own")
    return [*own, *await task]


async def _group(ctx: NodeContext, outside: Outside) -> list[int]:
    async def row(name: str) -> list[int]:
        return [await ctx.call("get", outside.reach, f"{name}.{each}") for each in range(2)]

    found: list[int] = []
    for turn in range(2):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(row(f"{turn}{name}")) for name in "ab"]
        found += [number for task in tasks for number in task.result()]
    return found


async def _completed(ctx: NodeContext, outside: Outside) -> list[int]:
    """What is done first is stored first; two at a time."""
    room = asyncio.Semaphore(2)

    async def page(number: int) -> int:
        async with room:
            found: int = await ctx.call("get", outside.reach, f"page.{number}")
            return found

    stored = []
    for done in asyncio.as_completed([asyncio.create_task(page(each)) for each in range(4)]):
        number = await done
        stored += [number, await ctx.call("get", outside.reach, f"store.{number}")]
    return stored


async def _threads(ctx: NodeContext, outside: Outside) -> list[int]:
    """Threads that each make calls that block, with the step's own around."""
    journal = ctx.journal
    assert journal is not None

    def get(what: str) -> int:
        return journal.call_blocking("get", request_hash(what, "what"), lambda key: outside.reach(what), CallSpec())

    def row(name: str) -> list[int]:
        return [get("hello"), get(f"{name}.1"), get(f"{name}.2")]

    first = await ctx.call("get", outside.reach, "first")
    rows = await asyncio.gather(*(asyncio.to_thread(row, name) for name in "ab"))
    return [first, *rows[0], *rows[1], await ctx.call("get", outside.reach, "last")]


def paused(outside: Outside, seed: int, in_threads: bool) -> Calls:
    """Three tasks or threads that begin by the same call, each after a pause of its own; another one each time."""
    chance = random.Random(seed)

    async def body(ctx: NodeContext) -> list[int]:
        journal = ctx.journal
        assert journal is not None

        def get(what: str) -> int:
            return journal.call_blocking("get", request_hash(what, "what"), lambda key: outside.reach(what), CallSpec())

        def thread(name: str, pause: float) -> list[int]:
            time.sleep(pause)
            return [get("hello"), get(f"{name}.1"), get(f"{name}.2")]

        async def task(name: str, pause: float) -> list[int]:
            await asyncio.sleep(pause)
            return [await ctx.call("get", outside.reach, what) for what in ("hello", f"{name}.1", f"{name}.2")]

        first = await ctx.call("get", outside.reach, "first")
        pauses = {name: chance.uniform(0, 0.02) for name in "abc"}
        rows = [asyncio.to_thread(thread, *each) if in_threads else task(*each) for each in pauses.items()]
        found = [number for row in await asyncio.gather(*rows) for number in row]
        return [first, *found, await ctx.call("get", outside.reach, "last")]

    return Calls(body)


async def _handled(ctx: NodeContext, outside: Outside) -> list[int]:
    """A call that raises, which the step handles by other calls."""

    def refuses() -> None:
        raise ValueError(str(outside.reach("refused")))

    found = [await ctx.call("get", outside.reach, "before")]
    try:
        await ctx.call("get", refuses)
    except ValueError as error:
        found.append(int(str(error)))
    for each in range(4):
        found.append(await ctx.call("get", outside.reach, f"after.{each}"))
    return found


SHAPES = {
    "background": _background,
    "group": _group,
    "completed": _completed,
    "threads": _threads,
    "handled": _handled,
}


def sleeping(seconds: float) -> Calls:
    async def body(ctx: NodeContext) -> float:
        began = time.monotonic()
        print("sleeping", flush=True)
        await ctx.sleep(seconds)
        return time.monotonic() - began

    return Calls(body)


async def execute(url: str, port: int, work: str, die_at: int, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    outside = Outside(port, die_at)
    llm: Any = None
    node: Any
    if work == "agent":
        node, llm = agent(outside)
    elif work == "booking":
        node, llm = agent(outside, "book")
    elif work in SHAPES:
        shape = SHAPES[work]
        node = Calls(lambda ctx: shape(ctx, outside))
    elif work in ("paused tasks", "paused threads"):
        node = paused(outside, seed, work == "paused threads")
    elif work == "concurrent":
        node = concurrent(outside, seed)
    else:
        node = sleeping(seed / 1000)
    with open_storage(url) as storage:
        executor = GraphExecutor(
            Runtime(MemoryStorage()),
            llm,
            [LOOK, BOOK],
            None,
            {"step": node},
            checkpoint_manager=CheckpointManager(storage, CheckpointConfig.model_validate(config)),
        )
        spec = NodeSpec(id="step", tools=["look", "book"], output_keys=["value"], max_retries=1)
        graph = GraphSpec(id="journal", goal_id="goal", entry_node="step", nodes=[spec], edges=[])
        result = await executor.execute(graph, Goal(id="goal", name="Goal", description="Go."), {}, run_id="run")
    return {
        "success": result.success,
        "error": result.error,
        "value": result.output.get("value"),
        "paused_at": result.paused_at,
        "tokens": result.total_tokens,
    }


def main() -> None:
    print(json.dumps(asyncio.run(execute(**json.loads(sys.argv[1])))), flush=True)


if __name__ == "__main__":
    main()
