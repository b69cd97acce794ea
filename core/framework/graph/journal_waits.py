"""Durable sleeps, waits for messages and questions inside a step; see ``NodeContext.sleep`` ..."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from framework.errors import MessageRefused, RunError
from framework.graph import journal_slots as slots
from framework.graph.answer_schema import Expected
from framework.graph.journal import AttemptJournal, Call, JournalStore, request_hash
from framework.graph.run_commits import wait_for as until_done
from framework.graph.suspension import Suspended, Waiting
from framework.graph.time_limit import waiting as waits_in_process
from framework.storage import codec
from framework.storage.records import JournalRow, Message

P = ParamSpec("P")
T = TypeVar("T")

LOOK_SECONDS = 0.5
"""How often a wait that stays in the process looks for its message."""


def _last_to_leave(
    wait: Callable[Concatenate[AttemptJournal, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[AttemptJournal, P], Coroutine[Any, Any, T]]:
    """A wait that tells nobody that the step is suspended while other calls are in flight."""

    @functools.wraps(wait)
    async def waited(journal: AttemptJournal, /, *args: P.args, **keywords: P.kwargs) -> T:
        try:
            return await wait(journal, *args, **keywords)
        except Suspended:
            await journal.left()
            raise

    return waited


@_last_to_leave
async def sleep(journal: AttemptJournal, seconds: float) -> None:
    """See ``NodeContext.sleep``."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"sleep: seconds is {seconds!r}; it has to be a number, 0 or more.")
    of = journal.of
    if of.store is None:
        with waits_in_process(journal.limit):
            await asyncio.sleep(seconds)
        return
    call = await journal.meet("sleep", "sleep", request_hash(float(seconds), "seconds"))
    try:
        until = call.row["until"] if call.row is not None else of.clock() + seconds
        waiting = Waiting("sleep", call.id, until=until)
        with _told_when_stopped(journal, waiting):
            if call.row is None:
                await journal.recorded(call, "done", answer=None, until=until)
            left = until - of.clock()
            if left > (of.sleep_in_process_seconds if not journal.is_suspended else 0):
                journal.suspend(waiting)
            if left > 0:
                with waits_in_process(journal.limit):
                    await asyncio.sleep(left)
    finally:
        journal.end(call)


@_last_to_leave
async def wait_for(journal: AttemptJournal, name: str, timeout_seconds: float | None = None) -> Any:
    """See ``NodeContext.wait_for``."""
    if not name:
        raise ValueError(f"wait_for: the name is {name!r}; it has to be a text that is not empty.")
    if slots.QUESTION.search(name):
        raise ValueError(f"wait_for: the name {name!r} is like the ids of questions (shop#1/q01234567); take another.")
    if timeout_seconds is not None and not (math.isfinite(timeout_seconds) and timeout_seconds >= 0):
        raise ValueError(f"wait_for: timeout_seconds is {timeout_seconds!r}; it has to be 0 or more, or None.")
    of = journal.of
    call = await journal.meet("wait", f"wait_for:{name}", request_hash([name, timeout_seconds], "wait_for"))
    try:
        store = _store_of(journal, f"waits for the signal {name!r}")
        row = call.row
        if row is not None and call.answered:
            if row["state"] == "timed_out":
                raise _timed_out(name)
            return row["answer"]
        place = _Place(row["occurrence"]) if row is not None else await _place(journal, store, call, name)
        occurrence = place.occurrence
        message = slots.signal_message(name, occurrence)
        until: float | None = None
        if timeout_seconds is not None:
            until = row["until"] if row is not None else of.clock() + timeout_seconds
        more: dict[str, Any] = {"to": name, "occurrence": occurrence} | ({"until": until} if until is not None else {})
        waiting = Waiting("signal", call.id, name, message, until, occurrence=occurrence)
        with _told_when_stopped(journal, waiting):
            if place.stopped is not None:
                raise place.stopped
            if place.row is not None:
                await journal.durable(store.write_journal([place.row]))
            found = await _message(store, message)
            if found is None and row is None:
                await journal.recorded(call, "waiting", **more)
                found = await _message(store, message)
            left = until - of.clock() if until is not None else math.inf
            if found is None and left > (of.sleep_in_process_seconds if not journal.is_suspended else 0):
                journal.suspend(waiting)
            if found is None:
                with waits_in_process(journal.limit):
                    found = await _come(store, message, left)
            if found is None:
                found = await _close(journal, store, message)
            if found.body == slots.CLOSED:
                await journal.recorded(call, "timed_out", answer=None, **more)
                raise _timed_out(name)
            value = codec.decode(found.body)
            await journal.recorded(call, "done", answer=value, **more)
            return value
    finally:
        journal.end(call)


@_last_to_leave
async def ask(journal: AttemptJournal, question: str, schema: Any = None) -> Any:
    """See ``NodeContext.ask``."""
    expected = Expected(schema)
    call = await journal.meet("ask", "ask", request_hash([question, expected.schema], "ask"))
    # By what it asks, not by its number: the same question in another attempt has the same answer.
    name = f"{journal.step}/q{call.key.request[:8]}" + (f".{call.key.occurrence}" if call.key.occurrence > 1 else "")
    try:
        store = _store_of(journal, f"asks {question!r}")
        row = call.row
        refused: list[Any] = list(row.get("refused", ())) if row is not None else []
        if row is not None and call.answered:
            try:
                return expected.taken(row["answer"], name)
            except ValueError as error:  # the program asks for something else by now
                refused.append([row["answer"], str(error)])
                row = None
                _tell_refused(journal, question, str(error))
        to = {"to": name, "question": question, "schema": expected.schema}
        waiting = Waiting("answer", call.id, name, question=question, schema=expected.schema)
        with _told_when_stopped(journal, waiting):
            while True:
                # An answer that was refused stays where it is; the next one has a name of its own.
                waiting = replace(
                    waiting,
                    message=slots.answer_message(name, len(refused) + 1),
                    refused=refused[-1][1] if refused else None,
                )
                more: dict[str, Any] = to | ({"refused": refused} if refused else {})
                found = await _message(store, waiting.message)
                if found is None and row is None:
                    await journal.recorded(call, "waiting", **more)
                    found = await _message(store, waiting.message)
                if found is None:
                    journal.suspend(waiting)
                answer = codec.decode(found.body)
                try:
                    value = expected.taken(answer, name)
                except ValueError as error:
                    refused = [*refused, [answer, str(error)]]
                    row = None
                    _tell_refused(journal, question, str(error))
                    continue
                await journal.recorded(call, "done", answer=answer, **more)
                return value
    finally:
        journal.end(call)


def _tell_refused(journal: AttemptJournal, question: str, why: str) -> None:
    journal.problems.append(
        f"Step {journal.step!r} asks {question!r} once more, since it cannot take the answer: {why}"
    )


def _store_of(journal: AttemptJournal, what: str) -> JournalStore:
    if journal.of.store is None:
        raise RunError(
            "",
            f"A node that {what} needs a run with checkpoints, which pauses meanwhile: give the executor a "
            "checkpoint_manager.",
        )
    return journal.of.store


@dataclass(frozen=True, slots=True)
class _Place:
    """Which wait of its name one is in the run, from 1; ``row`` is to be written when that is new. ``stopped`` says
    that the task was to end meanwhile."""

    occurrence: int
    row: JournalRow | None = None
    stopped: asyncio.CancelledError | None = None


async def _place(journal: AttemptJournal, store: JournalStore, call: Call, name: str) -> _Place:
    claims = slots.claims_of(store)
    stopped: asyncio.CancelledError | None = None
    if not claims.loaded:
        reading = store.read_journal(slots.SIGNALS)
        try:
            await until_done(reading)
        except asyncio.CancelledError as error:  # which waited for the reading to be done
            stopped = error
        claims.load(reading.result())
    wait = f"{journal.step}/{call.key.request}.{call.key.occurrence}"
    return _Place(*claims.take(name, wait, journal.step), stopped)


async def _message(store: JournalStore, name: str) -> Message | None:
    return next((each for each in await until_done(store.read_messages()) if each.name == name), None)


async def _come(store: JournalStore, name: str, seconds: float) -> Message | None:
    """The message, as soon as it is there; ``None`` when it does not come in so many seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    found: Message | None = None
    while found is None and (left := until - loop.time()) > 0:
        await asyncio.sleep(min(left, LOOK_SECONDS))
        found = await _message(store, name)
    return found


async def _close(journal: AttemptJournal, store: JournalStore, name: str) -> Message:
    """Take the place of the message that did not come; what came at the last moment counts."""
    try:
        await until_done(store.leave_message(name, slots.CLOSED))
    except MessageRefused:
        found = await _message(store, name)
        if found is None:
            raise
        return found
    return Message(store.run_id, name, slots.CLOSED, journal.of.clock())


@contextmanager
def _told_when_stopped(journal: AttemptJournal, waiting: Waiting) -> Iterator[None]:
    """A task group stops its other tasks when one suspends the step: what they wait for counts all the same."""
    try:
        yield
    except asyncio.CancelledError:
        journal.also_waits(waiting)
        raise


def _timed_out(name: str) -> TimeoutError:
    return TimeoutError(f"No message {name!r} came in time.")
