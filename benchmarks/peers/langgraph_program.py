"""LangGraph: a StateGraph with one node that follows itself, and its functional API for calls inside a run."""

from __future__ import annotations

import asyncio
import operator
import os
import time
from contextlib import AsyncExitStack, ExitStack
from typing import Annotated, Any, TypedDict

from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from measure import Given, Watch, blob, leave, main, message

CONFIG: dict[str, Any] = {"configurable": {"thread_id": "bench"}}


def extend(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Small(TypedDict):
    n: int
    text: str


class Conversation(TypedDict):
    n: int
    messages: Annotated[list[str], operator.add]


class Deltas(TypedDict):
    n: int
    messages: Annotated[list[str], DeltaChannel(extend)]


class Large(TypedDict):
    n: int
    blob: str


def saver_of(given: Given, stack: ExitStack) -> Any:
    if "no-store" in given.options:
        return None
    if given.url is not None:
        saver = stack.enter_context(PostgresSaver.from_conn_string(given.url))
        saver.setup()
        return saver
    return stack.enter_context(SqliteSaver.from_conn_string(str(given.folder / "langgraph.db")))


def graph_of(state: Any, step: Any, last: int, saver: Any) -> Any:
    graph = StateGraph(state)
    graph.add_node("work", step)
    graph.add_edge(START, "work")
    graph.add_conditional_edges("work", lambda now: "work" if now["n"] < last else END, ["work", END])
    return graph.compile(checkpointer=saver)


def options_of(given: Given) -> dict[str, Any]:
    config = {**CONFIG, "recursion_limit": given.steps + 10}
    if "no-store" in given.options:
        return {"config": config}
    return {"config": config, "durability": "async" if "async" in given.options else "sync"}


def replace(state: Any) -> dict[str, Any]:
    return {"n": state["n"] + 1, "text": message(state["n"])}


def append(state: Any) -> dict[str, Any]:
    return {"n": state["n"] + 1, "messages": [message(state["n"])]}


def wait(state: Any) -> dict[str, Any]:
    time.sleep(0.05)
    return replace(state)


def loop(state: Any, step: Any) -> Any:
    def workload(given: Given, watch: Watch) -> int:
        shape = Deltas if state is Conversation and "delta" in given.options else state
        with ExitStack() as stack:
            graph = graph_of(shape, step, given.steps, saver_of(given, stack))
            with watch.measured():
                final = graph.invoke({"n": 0}, **options_of(given))
        if final["n"] != given.steps:
            raise SystemExit(f"{final['n']} steps, not {given.steps}")
        return given.steps

    return workload


def large(given: Given, watch: Watch) -> int:
    """The value is stored with the run's input, before the measured steps; no step touches it."""

    def count(state: Any) -> dict[str, Any]:
        if state["n"] == 0:
            watch.start()
        return {"n": state["n"] + 1}

    with ExitStack() as stack:
        graph = graph_of(Large, count, given.steps, saver_of(given, stack))
        graph.invoke({"n": 0, "blob": blob()}, **options_of(given))
        watch.stop()
    return given.steps


def concurrent(given: Given, watch: Watch) -> int:
    async def everything() -> None:
        async with AsyncExitStack() as stack:
            if given.url is not None:
                saver: Any = await stack.enter_async_context(AsyncPostgresSaver.from_conn_string(given.url))
                await saver.setup()
            else:
                path = str(given.folder / "langgraph.db")
                saver = await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(path))

            async def step(state: Any) -> dict[str, Any]:
                return replace(state)

            graph = graph_of(Small, step, given.steps, saver)

            def one(index: int) -> Any:
                config = {"configurable": {"thread_id": f"bench-{index}"}, "recursion_limit": given.steps + 10}
                return graph.ainvoke({"n": 0}, config=config, durability="sync")

            with watch.measured():
                finals = await asyncio.gather(*(one(index) for index in range(given.runs)))
        if any(final["n"] != given.steps for final in finals):
            raise SystemExit("a run stopped early")

    asyncio.run(everything())
    return given.steps * given.runs


def call(given: Given, watch: Watch) -> int:
    @task
    def answer(number: int) -> str:
        return message(number)

    with ExitStack() as stack:

        @entrypoint(checkpointer=saver_of(given, stack))
        def calls(steps: int) -> int:
            with watch.measured():
                for number in range(steps):
                    answer(number).result()
            return steps

        calls.invoke(given.steps, CONFIG, durability="sync")
    return given.steps


def prepare(given: Given, watch: Watch) -> int:
    def dying(state: Any) -> dict[str, Any]:
        if state["n"] == given.steps:
            leave(watch, given.steps, given.folder)
        return append(state)

    with ExitStack() as stack:
        shape = Deltas if "delta" in given.options else Conversation
        graph = graph_of(shape, dying, given.steps + 1, saver_of(given, stack))
        with watch.measured():
            graph.invoke({"n": 0}, **options_of(given))
    raise SystemExit("the run was not stopped")


def resume(given: Given, watch: Watch) -> int:
    began = 0.0

    def reached(state: Any) -> dict[str, Any]:
        watch.seconds = time.perf_counter() - began
        if state["n"] != given.steps or len(state["messages"]) != given.steps:
            os.write(2, b"resumed at the wrong place\n")
            os._exit(1)
        leave(watch, 1, given.folder)
        return {}

    with ExitStack() as stack:
        began = time.perf_counter()
        shape = Deltas if "delta" in given.options else Conversation
        graph = graph_of(shape, reached, given.steps + 1, saver_of(given, stack))
        graph.invoke(None, **options_of(given))
    raise SystemExit("nothing was resumed")


if __name__ == "__main__":
    main(
        {
            "small": loop(Small, replace),
            "conversation": loop(Conversation, append),
            "large": large,
            "concurrent": concurrent,
            "call": call,
            "prepare": prepare,
            "resume": resume,
            "waiting": loop(Small, wait),
        }
    )
