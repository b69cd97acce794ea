"""This project's graphs: one node that follows itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

from measure import Given, Watch, blob, leave, main, message

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage, open_storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, NewRun, Write

GOAL = Goal(id="bench", name="bench", description="measure")


class QuietRuntime:
    """A runtime that records nothing, as the other programs have no record of decisions either."""

    def start_run(self, **given: Any) -> str:
        return "run_bench"

    def end_run(self, **given: Any) -> None:
        return None

    def report_problem(self, **given: Any) -> str:
        return ""


class Work:
    """A node whose body is ``step``: from the number of the step and what it reads to what it writes."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        number = ctx.memory.read("n") or 0
        return NodeResult(True, output={"n": number + 1, **await self._step(number, ctx)})


def looping(steps: int, append_only: list[str]) -> GraphSpec:
    return GraphSpec(
        id="bench",
        goal_id=GOAL.id,
        entry_node="work",
        max_steps=steps,
        nodes=[NodeSpec(id="work")],
        edges=[
            EdgeSpec(
                id="again",
                source="work",
                target="work",
                condition=EdgeCondition.CONDITIONAL,
                condition_expr=f"n < {steps}",
                input_mapping={"n": "n"},
            )
        ],
        append_only_keys=append_only,
    )


def store_of(given: Given) -> Storage:
    if given.url is not None:
        return open_storage(given.url)
    return open_storage(
        f"file://{given.folder}/store" if "files" in given.options else f"sqlite:///{given.folder}/runs.db"
    )


def config_of(given: Given) -> CheckpointConfig:
    return CheckpointConfig(
        retention_strategy="latest_only" if "latest" in given.options else "all",
        durability="async" if "async" in given.options else "sync",
    )


def executor_of(given: Given, store: Storage | None, step: Any) -> GraphExecutor:
    manager = None if store is None else CheckpointManager(store, config_of(given))
    return GraphExecutor(QuietRuntime(), node_registry={"work": Work(step)}, checkpoint_manager=manager)


async def run(executor: GraphExecutor, given: Given, run_id: str, data: dict[str, Any] | None = None) -> None:
    append_only = ["messages"] if "append-only" in given.options else []
    result = await executor.execute(looping(given.steps, append_only), GOAL, data or {}, run_id=run_id)
    if not result.success or result.steps_executed < given.steps:
        raise SystemExit(f"the run failed: {result.error}")


def loop(step: Any) -> Any:
    """A workload of ``steps`` steps of one run."""

    def workload(given: Given, watch: Watch) -> int:
        store = None if "no-store" in given.options else store_of(given)
        executor = executor_of(given, store, step)

        async def timed() -> None:
            with watch.measured():
                await run(executor, given, "bench")

        asyncio.run(timed())
        if store is not None:
            store.close()
        return given.steps

    return workload


async def replace(number: int, ctx: NodeContext) -> dict[str, Any]:
    return {"text": message(number)}


async def append(number: int, ctx: NodeContext) -> dict[str, Any]:
    messages = ctx.memory.read("messages") or []
    messages.append(message(number))
    return {"messages": messages}


async def wait(number: int, ctx: NodeContext) -> dict[str, Any]:
    await asyncio.sleep(0.05)
    return {"text": message(number)}


def large(given: Given, watch: Watch) -> int:
    """The value is stored with the run's input, before the measured steps; no step reads it."""

    async def count(number: int, ctx: NodeContext) -> dict[str, Any]:
        if number == 0:
            watch.start()
        return {}

    with store_of(given) as store:
        asyncio.run(run(executor_of(given, store, count), given, "bench", {"blob": blob()}))
        watch.stop()
    return given.steps


def concurrent(given: Given, watch: Watch) -> int:
    with store_of(given) as store:
        executor = executor_of(given, store, replace)

        async def timed() -> None:
            with watch.measured():
                await asyncio.gather(*(run(executor, given, f"bench-{index}") for index in range(given.runs)))

        asyncio.run(timed())
    return given.steps * given.runs


def call(given: Given, watch: Watch) -> int:
    """Every call's value in the journal before the node has it; all inside one step."""

    async def answer(number: int) -> str:
        return message(number)

    async def calls(number: int, ctx: NodeContext) -> dict[str, Any]:
        with watch.measured():
            for each in range(given.steps):
                await ctx.call("answer", answer, each)
        return {}

    with store_of(given) as store:
        executor = executor_of(given, store, calls)
        result = asyncio.run(executor.execute(looping(1, []), GOAL, {}, run_id="bench"))
        if not result.success:
            raise SystemExit(f"the run failed: {result.error}")
    return given.steps


def commit(given: Given, watch: Watch) -> int:
    """``Storage.commit`` alone: what the steps of ``small`` commit, written again without the executor."""
    written: list[Commit] = []

    class Noting(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            written.extend(one for one in commits if isinstance(one, Commit))
            return super().commit(commits)

    with Noting() as noting:
        asyncio.run(run(executor_of(given, noting, replace), given, "bench"))
    with store_of(given) as store:
        store.open_run(NewRun("bench", "graph", "bench", GOAL.id, b"{}", b"{}"), "bench", 3600)
        with watch.measured():
            refused = [error for one in written if (error := store.commit([one])[0]) is not None]
    if refused or len(written) < given.steps:
        raise SystemExit(f"of {len(written)} commits {len(refused)} were refused: {refused[:1]}")
    return len(written)


def prepare(given: Given, watch: Watch) -> int:
    """A conversation whose process dies inside the step after the last one."""

    async def dying(number: int, ctx: NodeContext) -> dict[str, Any]:
        if number == given.steps:
            leave(watch, given.steps, given.folder)
        return await append(number, ctx)

    with watch.measured():
        asyncio.run(_one_more(given, dying))
    raise SystemExit("the run was not stopped")


def resume(given: Given, watch: Watch) -> int:
    """From opening the store to the body of the step the other process died in."""
    began: list[float] = []

    async def reached(number: int, ctx: NodeContext) -> dict[str, Any]:
        watch.seconds = time.perf_counter() - began[0]
        if number != given.steps or len(ctx.memory.read("messages") or []) != given.steps:
            os.write(2, b"resumed at the wrong place\n")
            os._exit(1)
        leave(watch, 1, given.folder)
        return {}

    async def timed() -> None:
        began.append(time.perf_counter())
        await _one_more(given, reached)

    asyncio.run(timed())
    raise SystemExit("nothing was resumed")


async def _one_more(given: Given, step: Any) -> None:
    executor = executor_of(given, store_of(given), step)
    append_only = ["messages"] if "append-only" in given.options else []
    await executor.execute(looping(given.steps + 1, append_only), GOAL, {}, run_id="bench")


if __name__ == "__main__":
    main(
        {
            "small": loop(replace),
            "conversation": loop(append),
            "large": large,
            "concurrent": concurrent,
            "commit": commit,
            "call": call,
            "prepare": prepare,
            "resume": resume,
            "waiting": loop(wait),
        }
    )
