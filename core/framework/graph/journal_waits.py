"""Durable sleeps, waits for messages and questions inside a step; see ``NodeContext.sleep`` ..."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from framework.errors import RunError
from framework.graph.answer_schema import Expected
from framework.graph.journal import AttemptJournal, Call, request_hash
from framework.graph.journal_rows import Row
from framework.graph.run_commits import wait_for as until_done
from framework.graph.suspension import Waiting
from framework.storage import codec
from framework.storage.records import Message


async def sleep(journal: AttemptJournal, seconds: float) -> None:
    """See ``NodeContext.sleep``."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"sleep: seconds is {seconds!r}; it has to be a number, 0 or more.")
    of = journal.of
    if of.store is None:
        await asyncio.sleep(seconds)
        return
    call = journal.meet("sleep", "sleep", request_hash(float(seconds), "seconds"))
    try:
        if call.row is None:
            until = of.clock() + seconds
            await journal.recorded(call, "done", answer=None, until=until)
        else:
            until = call.row["until"]
        left = until - of.clock()
        if left > of.sleep_in_process_seconds:
            journal.suspend(Waiting("sleep", call.id, until=until))
        if left > 0:
            await asyncio.sleep(left)
    finally:
        journal.end(call)


async def wait_for(journal: AttemptJournal, name: str, timeout_seconds: float | None = None) -> Any:
    """See ``NodeContext.wait_for``."""
    if not name:
        raise ValueError(f"wait_for: the name is {name!r}; it has to be a text that is not empty.")
    if timeout_seconds is not None and not (math.isfinite(timeout_seconds) and timeout_seconds >= 0):
        raise ValueError(f"wait_for: timeout_seconds is {timeout_seconds!r}; it has to be 0 or more, or None.")
    call = journal.meet("wait", f"wait_for:{name}", request_hash([name, timeout_seconds], "wait_for"))
    waiting = Waiting("signal", call.id, name=name, message=f"signal:{name}")
    return await _await_message(journal, call, waiting, Expected(None), timeout_seconds)


async def ask(journal: AttemptJournal, question: str, schema: Any = None) -> Any:
    """See ``NodeContext.ask``."""
    expected = Expected(schema)
    call = journal.meet("ask", "ask", request_hash([question, expected.schema], "ask"))
    # By what it asks, not by its number: the same question in another attempt has the same answer.
    name = f"{journal.step}/q{call.key.request[:8]}" + (f".{call.key.occurrence}" if call.key.occurrence > 1 else "")
    waiting = Waiting("answer", call.id, name, f"answer:{name}", question=question, schema=expected.schema)
    return await _await_message(journal, call, waiting, expected, None)


async def _await_message(
    journal: AttemptJournal, call: Call, waiting: Waiting, expected: Expected, timeout_seconds: float | None
) -> Any:
    of = journal.of
    try:
        if of.store is None:
            raise RunError(
                "",
                f"A node that {waiting.text} needs a run with checkpoints, which pauses meanwhile: give the executor "
                "a checkpoint_manager.",
            )
        more: dict[str, Any] = {"to": waiting.name}
        if waiting.question is not None:
            more |= {"question": waiting.question, "schema": waiting.schema}
        if call.row is None:
            if timeout_seconds is not None:
                more["until"] = of.clock() + timeout_seconds
            await journal.recorded(call, "waiting", **more)
        elif call.answered:
            return _awaited(call.row, waiting, expected)
        elif "until" in call.row:
            more["until"] = call.row["until"]
        until: float | None = more.get("until")
        message = await _message(journal, waiting.message, until)
        if message is None and until is not None:
            left = until - of.clock()
            if 0 < left <= of.sleep_in_process_seconds:
                await asyncio.sleep(left)
                message = await _message(journal, waiting.message, until)
                left = 0.0
            if message is None and left <= 0:
                await journal.recorded(call, "timed_out", answer=None, **more)
                raise _timed_out(waiting)
        if message is None:
            journal.suspend(
                Waiting(
                    waiting.kind,
                    waiting.call,
                    waiting.name,
                    waiting.message,
                    until,
                    waiting.question,
                    waiting.schema,
                )
            )
        answer = codec.decode(message.body)
        value = expected.taken(answer, waiting.name)
        await journal.recorded(call, "done", answer=answer, **more)
        return value
    finally:
        journal.end(call)


def _awaited(row: Row, waiting: Waiting, expected: Expected) -> Any:
    if row["state"] == "timed_out":
        raise _timed_out(waiting)
    return expected.taken(row["answer"], waiting.name)


async def _message(journal: AttemptJournal, name: str, until: float | None) -> Message | None:
    """The message of this name, unless it came too late."""
    assert journal.of.store is not None
    for message in await until_done(journal.of.store.read_messages()):
        if message.name == name and (until is None or message.sent_at <= until):
            return message
    return None


def _timed_out(waiting: Waiting) -> TimeoutError:
    return TimeoutError(f"No message {waiting.name!r} came in time.")
