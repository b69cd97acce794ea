"""DBOS: a workflow of steps. What a step returns is stored; the state lives in the workflow function."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from dbos import DBOS, DBOSConfig, SetWorkflowID
from measure import Given, Watch, blob, leave, main, message

ON_STEP: list[Any] = []
"""Called with the number of each step, in the workloads that watch for one."""


@DBOS.step()
def text_of(number: int) -> str:
    for watcher in ON_STEP:
        watcher(number)
    return message(number)


@DBOS.step()
async def text_of_async(number: int) -> str:
    return message(number)


@DBOS.step()
def number_of(number: int) -> int:
    return number


@DBOS.step()
def large_value() -> str:
    return blob()


@DBOS.step()
def waited(number: int) -> str:
    time.sleep(0.05)
    return message(number)


@DBOS.workflow()
def replacing(steps: int) -> int:
    for number in range(steps):
        text_of(number)
    return steps


@DBOS.workflow()
async def replacing_async(steps: int) -> int:
    for number in range(steps):
        await text_of_async(number)
    return steps


@DBOS.workflow()
def conversing(steps: int) -> int:
    messages: list[str] = []
    for number in range(steps):
        messages.append(text_of(number))
    return len(messages)


WATCHES: list[Watch] = []


@DBOS.workflow()
def with_large(steps: int) -> int:
    value = large_value()
    WATCHES[0].start()
    for number in range(steps):
        number_of(number)
    WATCHES[0].stop()
    return steps if value else 0


@DBOS.workflow()
def waiting(steps: int) -> int:
    for number in range(steps):
        waited(number)
    return steps


def launch(given: Given) -> None:
    DBOS(config=config_of(given))
    DBOS.launch()


def config_of(given: Given) -> DBOSConfig:
    url = given.url or f"sqlite:///{given.folder}/dbos.sqlite"
    return {
        "name": "bench",
        "system_database_url": url,
        "log_level": "ERROR",
        "console_log_level": "ERROR",
        "application_version": "1",
        "executor_id": "bench",
    }


def loop(workflow: Any) -> Any:
    def workload(given: Given, watch: Watch) -> int:
        launch(given)
        with watch.measured():
            done = workflow(given.steps)
        if done != given.steps:
            raise SystemExit(f"{done} steps, not {given.steps}")
        DBOS.destroy()
        return given.steps

    return workload


def large(given: Given, watch: Watch) -> int:
    WATCHES.append(watch)
    launch(given)
    if with_large(given.steps) != given.steps:
        raise SystemExit("the workflow stopped early")
    DBOS.destroy()
    return given.steps


def concurrent(given: Given, watch: Watch) -> int:
    launch(given)

    async def everything() -> None:
        with watch.measured():
            handles = [await DBOS.start_workflow_async(replacing_async, given.steps) for _ in range(given.runs)]
            done = await asyncio.gather(*(handle.get_result() for handle in handles))
        if any(each != given.steps for each in done):
            raise SystemExit("a run stopped early")

    asyncio.run(everything())
    DBOS.destroy()
    return given.steps * given.runs


def prepare(given: Given, watch: Watch) -> int:
    def die(number: int) -> None:
        if number == given.steps:
            leave(watch, given.steps, given.folder)

    ON_STEP.append(die)
    launch(given)
    with watch.measured(), SetWorkflowID("bench"):
        conversing(given.steps + 1)
    raise SystemExit("the run was not stopped")


def resume(given: Given, watch: Watch) -> int:
    """DBOS recovers by itself when it is launched."""
    began = time.perf_counter()

    def reached(number: int) -> None:
        watch.seconds = time.perf_counter() - began
        if number != given.steps:
            os.write(2, b"resumed at the wrong place\n")
            os._exit(1)
        leave(watch, 1, given.folder)

    ON_STEP.append(reached)
    launch(given)
    time.sleep(60)
    raise SystemExit("nothing was resumed")


if __name__ == "__main__":
    main(
        {
            "small": loop(replacing),
            "conversation": loop(conversing),
            "large": large,
            "concurrent": concurrent,
            "call": loop(replacing),
            "prepare": prepare,
            "resume": resume,
            "waiting": loop(waiting),
        }
    )
