"""Burr: an application of one action, with its SQLite persister."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from burr.core import ApplicationBuilder, State, action
from burr.core.persistence import SQLitePersister
from burr.integrations.persisters.b_aiosqlite import AsyncSQLitePersister
from measure import Given, Watch, blob, leave, main, message


@action(reads=["n"], writes=["n", "text"])
def replace(state: State) -> State:
    return state.update(n=state["n"] + 1, text=message(state["n"]))


@action(reads=["n"], writes=["n", "text"])
async def replace_async(state: State) -> State:
    return state.update(n=state["n"] + 1, text=message(state["n"]))


@action(reads=["n"], writes=["n", "messages"])
def append(state: State) -> State:
    return state.append(messages=message(state["n"])).update(n=state["n"] + 1)


@action(reads=["n"], writes=["n"])
def count(state: State) -> State:
    return state.update(n=state["n"] + 1)


@action(reads=["n"], writes=["n", "text"])
def wait(state: State) -> State:
    time.sleep(0.05)
    return state.update(n=state["n"] + 1, text=message(state["n"]))


def persister_of(given: Given) -> SQLitePersister:
    persister = SQLitePersister(str(given.folder / "burr.db"))
    persister.initialize()
    return persister


def builder_of(step: Any, app_id: str = "bench") -> Any:
    builder = ApplicationBuilder().with_actions(work=step).with_transitions(("work", "work"))
    return builder.with_identifiers(app_id=app_id)


def loop(step: Any, data: Any = lambda: {"n": 0}) -> Any:
    def workload(given: Given, watch: Watch) -> int:
        builder = builder_of(step).with_entrypoint("work").with_state(**data())
        if "no-store" not in given.options:
            builder = builder.with_state_persister(persister_of(given))
        application = builder.build()
        with watch.measured():
            for _ in range(given.steps):
                application.step()
        if application.state["n"] != given.steps:
            raise SystemExit(f"{application.state['n']} steps, not {given.steps}")
        return given.steps

    return workload


def concurrent(given: Given, watch: Watch) -> int:
    async def everything() -> None:
        persister = await AsyncSQLitePersister.from_values(str(given.folder / "burr.db"))
        await persister.initialize()
        builders = [builder_of(replace_async, f"bench-{index}") for index in range(given.runs)]
        applications = [
            await builder.with_entrypoint("work").with_state(n=0).with_state_persister(persister).abuild()
            for builder in builders
        ]

        async def one(application: Any) -> None:
            for _ in range(given.steps):
                await application.astep()

        with watch.measured():
            await asyncio.gather(*(one(application) for application in applications))
        await persister.cleanup()
        if any(application.state["n"] != given.steps for application in applications):
            raise SystemExit("a run stopped early")

    asyncio.run(everything())
    return given.steps * given.runs


def prepare(given: Given, watch: Watch) -> int:
    loop(append, lambda: {"n": 0, "messages": []})(given, watch)
    leave(watch, given.steps, given.folder)
    return given.steps


def resume(given: Given, watch: Watch) -> int:
    began = 0.0

    @action(reads=["n", "messages"], writes=["n"])
    def reached(state: State) -> State:
        watch.seconds = time.perf_counter() - began
        if state["n"] != given.steps or len(state["messages"]) != given.steps:
            os.write(2, b"resumed at the wrong place\n")
            os._exit(1)
        leave(watch, 1, given.folder)
        return state

    began = time.perf_counter()
    persister = persister_of(given)
    builder = builder_of(reached).initialize_from(
        persister, resume_at_next_action=True, default_state={"n": 0}, default_entrypoint="work"
    )
    builder.with_state_persister(persister).build().step()
    raise SystemExit("nothing was resumed")


if __name__ == "__main__":
    main(
        {
            "small": loop(replace),
            "conversation": loop(append, lambda: {"n": 0, "messages": []}),
            "large": loop(count, lambda: {"n": 0, "blob": blob()}),
            "concurrent": concurrent,
            "prepare": prepare,
            "resume": resume,
            "waiting": loop(wait),
        }
    )
