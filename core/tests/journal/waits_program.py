"""A run of one node that asks and waits, in a process of its own; it may kill itself at a point of a wait.

Arguments: the store's URL, what it does first ("ask" or "wait"), and at which point of that it ends, or "". Prints
"paused" or the node's value.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from framework.graph import journal_waits
from framework.graph.journal import AttemptJournal, Call
from framework.graph.node import NodeContext
from framework.graph.run_session import RunSession
from framework.storage.backend import open_storage
from framework.storage.records import JournalRow, Message
from tests.journal.journal_kit import Bench

URL, KIND, POINT = sys.argv[1:]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def body(ctx: NodeContext) -> Any:
    async def one(kind: str) -> Any:
        value = await (ctx.ask("Which?", int) if kind == "ask" else ctx.wait_for("go"))
        if kind == KIND and POINT == "returned":
            die()
        return value

    return [await one(KIND), await one("wait" if KIND == "ask" else "ask")]


def prepare() -> None:
    """Have the process end at the point that was asked for."""
    recorded, message, write = AttemptJournal.recorded, journal_waits._message, RunSession.write_journal

    async def record(journal: AttemptJournal, call: Call, state: str, **more: Any) -> None:
        await recorded(journal, call, state, **more)
        if (call.kind, state) == (KIND, POINT):
            die()

    async def read(store: Any, name: str) -> Message | None:
        found = await message(store, name)
        if found is not None and POINT == "taken" and name.startswith("signal" if KIND == "wait" else "answer"):
            die()
        return found

    def written(session: RunSession, rows: Sequence[JournalRow], **more: Any) -> Future[None]:
        future = write(session, rows, **more)
        if POINT == "claim" and rows[0].step == "signals":
            future.result()
            die()
        return future

    for owner, name, made in (
        (AttemptJournal, "recorded", record),
        (journal_waits, "_message", read),
        (RunSession, "write_journal", written),
    ):
        setattr(owner, name, made)


async def main() -> None:
    with open_storage(URL) as storage:
        result = await Bench(storage).run(body)
    assert result.success, result.error
    print("paused" if result.paused_at else result.output["value"])


prepare()
asyncio.run(main())
