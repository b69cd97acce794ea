"""Agent Framework: two executors that hand a number to each other, with its file checkpoints."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from agent_framework import Executor, FileCheckpointStorage, WorkflowBuilder, WorkflowContext, handler
from measure import Given, Watch, blob, leave, main, message


class Work(Executor):
    """One step: does ``step`` to the shared state and hands the next number on, until ``last``."""

    def __init__(self, name: str, step: Any, last: int) -> None:
        super().__init__(id=name)
        self._step = step
        self._last = last

    @handler
    async def work(self, number: int, ctx: WorkflowContext[int, int]) -> None:
        await self._step(number, ctx)
        if number + 1 < self._last:
            await ctx.send_message(number + 1)
        else:
            await ctx.yield_output(number + 1)


async def replace(number: int, ctx: Any) -> None:
    ctx.set_state("text", message(number))


async def append(number: int, ctx: Any) -> None:
    ctx.set_state("messages", [*(ctx.get_state("messages") or []), message(number)])


async def wait(number: int, ctx: Any) -> None:
    await asyncio.sleep(0.05)
    await replace(number, ctx)


def workflow_of(given: Given, step: Any, last: int, folder: str = "checkpoints") -> Any:
    first, second = Work("first", step, last), Work("second", step, last)
    store = None if "no-store" in given.options else FileCheckpointStorage(given.folder / folder)
    given_to_builder = {"max_iterations": last + 10, "checkpoint_storage": store, "output_from": [first, second]}
    builder = WorkflowBuilder(start_executor=first, name="bench", **given_to_builder)
    return builder.add_edge(first, second).add_edge(second, first).build()


async def run(workflow: Any, last: int, **given: Any) -> None:
    outputs = (await workflow.run(**given)).get_outputs()
    if list(outputs) != [last]:
        raise SystemExit(f"ended with {outputs!r}, not {last}")


def loop(step: Any) -> Any:
    def workload(given: Given, watch: Watch) -> int:
        async def timed() -> None:
            workflow = workflow_of(given, step, given.steps)
            with watch.measured():
                await run(workflow, given.steps, message=0)

        asyncio.run(timed())
        return given.steps

    return workload


def large(given: Given, watch: Watch) -> int:
    value = blob()

    async def keep(number: int, ctx: Any) -> None:
        if number == 0:
            ctx.set_state("blob", value)
            watch.start()

    asyncio.run(run(workflow_of(given, keep, given.steps), given.steps, message=0))
    watch.stop()
    return given.steps


def concurrent(given: Given, watch: Watch) -> int:
    async def everything() -> None:
        workflows = [workflow_of(given, replace, given.steps, f"checkpoints-{index}") for index in range(given.runs)]
        with watch.measured():
            await asyncio.gather(*(run(workflow, given.steps, message=0) for workflow in workflows))

    asyncio.run(everything())
    return given.steps * given.runs


def prepare(given: Given, watch: Watch) -> int:
    async def dying(number: int, ctx: Any) -> None:
        if number == given.steps:
            leave(watch, given.steps, given.folder)
        await append(number, ctx)

    async def timed() -> None:
        with watch.measured():
            await workflow_of(given, dying, given.steps + 1).run(message=0)

    asyncio.run(timed())
    raise SystemExit("the run was not stopped")


def resume(given: Given, watch: Watch) -> int:
    """It does not find its run by itself: the newest checkpoint is asked for first."""
    began: list[float] = []

    async def reached(number: int, ctx: Any) -> None:
        watch.seconds = time.perf_counter() - began[0]
        if number != given.steps or len(ctx.get_state("messages")) != given.steps:
            os.write(2, b"resumed at the wrong place\n")
            os._exit(1)
        leave(watch, 1, given.folder)

    async def timed() -> None:
        began.append(time.perf_counter())
        workflow = workflow_of(given, reached, given.steps + 1)
        newest = await FileCheckpointStorage(given.folder / "checkpoints").get_latest(workflow_name="bench")
        if newest is None:
            raise SystemExit("no checkpoint was found")
        await workflow.run(checkpoint_id=newest.checkpoint_id)

    asyncio.run(timed())
    raise SystemExit("nothing was resumed")


if __name__ == "__main__":
    main(
        {
            "small": loop(replace),
            "conversation": loop(append),
            "large": large,
            "concurrent": concurrent,
            "prepare": prepare,
            "resume": resume,
            "waiting": loop(wait),
        }
    )
