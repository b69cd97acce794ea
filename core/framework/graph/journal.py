"""The journal of a step: what its calls came to, durable before the step sees it, and given again after a crash.

A *call* is one question to a model, one tool call, one ``ctx.call``, sleep or wait inside a step. Its outcome is a row
in the store, gone with the commit of the step. A step that starts again after a crash makes its calls again and is
given the recorded outcomes (see ``replay`` for which); an effect that had begun and has none is *unknown*, and the
call's policy decides: ``rerun`` (with the same idempotency key), ``ask`` (wait until somebody settles it) or ``fail``.

``StepJournal`` is one visit's, ``AttemptJournal`` what one attempt of it uses. Neither knows what kind of run the step
belongs to. Without a store calls only run, and nothing is written.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

from framework.errors import RunError, RunNotFound, StorageError, SurefootError, UnknownEffect, UnstorableValue
from framework.graph import journal_rows as rows_of
from framework.graph.journal_rows import POLICIES, Policy, Row
from framework.graph.replay import Begun, CallKey, Replay
from framework.graph.run_commits import wait_for
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Suspended, Waiting
from framework.llm import threads
from framework.storage import codec
from framework.storage.interface import MAX_VALUE_BYTES
from framework.storage.records import JournalRow, Message

logger = logging.getLogger(__name__)

T = TypeVar("T")

IN_FLIGHT_SECONDS = 30.0
"""How long an attempt that is over waits for calls that other tasks of it are still making."""

_around: ContextVar[Call | None] = ContextVar("surefoot_call", default=None)


def current_idempotency_key() -> str | None:
    """The idempotency key of the call that is being made, for code deep inside it: a tool's HTTP client that sends it
    as the ``Idempotency-Key`` header, say. ``None`` outside a call."""
    call = _around.get()
    return call.idempotency_key if call is not None else None


def request_hash(request: Any, path: str) -> str:
    """A hash of what a call asks. Raises ``UnstorableValue`` naming the path, which begins with ``path``."""
    return _hash(codec.encode(request, path))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


class JournalStore(Protocol):
    """The run's side: where rows go and messages come from. Futures are done when it is durable, or hold the error."""

    @property
    def run_id(self) -> str: ...

    @property
    def stops_on_error(self) -> bool:
        """Whether a refused row ends the run; otherwise it is reported and the run goes on without it."""

    def write_journal(self, rows: Sequence[JournalRow]) -> Future[None]: ...

    def read_journal(self, step: str) -> Future[list[JournalRow]]: ...

    def read_messages(self) -> Future[list[Message]]: ...


@dataclass(frozen=True, slots=True)
class CallSpec:
    """How a call is recorded: its policy, its value as data and back, and what a model's reply took.

    ``settled`` makes the data of a call that a person settled, of "done" or "skip" and the value given. ``before`` is
    called before the call is really made, not when it is answered from the journal.
    """

    policy: Policy = "rerun"
    to_plain: Callable[[Any], Any] = lambda value: value
    from_plain: Callable[[Any], Any] = lambda plain: plain
    spent: Callable[[Any], Spent] | None = None
    settled: Callable[[str, Any], Any] = lambda action, value: value
    before: Callable[[], None] | None = None


@dataclass(eq=False, slots=True)
class Call:
    """A call that is being made. ``where`` is the task or thread it is made from."""

    journal: AttemptJournal
    number: int
    key: CallKey
    quiet: bool
    kind: str
    policy: Policy
    idempotency_key: str
    outer: Call | None = None
    row: Row | None = None
    answered: bool = False
    settles: int | None = None
    where: object = None
    begun: list[list[Any]] = field(default_factory=list)
    void: list[int] = field(default_factory=list)
    """What its row tells of other calls; the row that takes the place of an intent has to tell it again."""

    @property
    def id(self) -> str:
        """Its id within the run; of a lost effect that one's."""
        number = self.number if self.settles is None else self.settles
        return rows_of.call_id(self.journal.step, number)

    def listed(self) -> list[Any]:
        """Its entry in another call's row."""
        outer = self.outer.number if self.outer is not None else None
        return [self.number, self.key.name, self.key.request, self.key.occurrence, self.quiet, outer]


@dataclass(slots=True)
class StepJournal:
    """What all attempts of one visit share.

    ``key`` is the step's idempotency key. ``must_load`` says that the store may have rows of it. ``before_model`` is
    called before each question to a model that is really asked, and may raise.
    """

    step: str
    key: str
    store: JournalStore | None = None
    must_load: bool = False
    keep_on_retry: bool = False
    sleep_in_process_seconds: float = 5.0
    before_model: Callable[[], None] | None = None
    clock: Callable[[], float] = field(default_factory=lambda: time.time)
    last: int = 0
    written: bool = False
    """Whether the store may have rows of the step."""
    spent: Spent = NOTHING
    """What questions to models took that no record of the run counts yet."""

    @property
    def run_id(self) -> str:
        """The run's id, empty when it has no store."""
        return self.store.run_id if self.store is not None else ""


class AttemptJournal:
    """The calls of one attempt. Calls may come from any task and thread of it.

    An executor calls ``begin``, then lets the node work, then ``failed``, ``over`` or ``close``.
    """

    def __init__(self, of: StepJournal) -> None:
        self.of = of
        self.step = of.step
        self.problems: list[str] = []
        """What to tell of, such as that replay ended. Whoever drives the attempt reports and clears it."""
        self.spent = NOTHING
        """What the questions to models of this attempt took, those answered from the journal too."""
        self.counted = NOTHING
        """The part of what this attempt's answers took that an earlier attempt's record counts already."""
        self._task: object = None
        self._closed = False
        self._error: BaseException | None = None
        self._waits: list[Waiting] = []
        self._parts: _Parts | None = None
        self._lock = threading.Lock()

    @property
    def records(self) -> bool:
        """Whether there is a store to record in."""
        return self.of.store is not None

    # --- of the executor ----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take up what is recorded; the calling task is the step's own. Raises ``StorageError``, ``CodecError``."""
        self._task = asyncio.current_task()
        of = self.of
        if of.store is None or not of.must_load:
            return
        stored = await wait_for(of.store.read_journal(of.step))
        found = rows_of.fold(rows_of.parse(stored))
        of.last, of.spent = max(of.last, found.last), found.spent
        of.must_load, of.written = False, bool(stored)
        self._parts = _Parts(Replay(found.calls), dict(found.rows), dict(found.lost), found.counted)

    async def over(self) -> None:
        """The node returned or raised: raise ``Suspended`` if it waits, or a store's error that it may have hidden."""
        if self._waits:
            await self._others_in_flight()
            self._closed = True
            raise Suspended(self._waits)
        if self._error is not None:
            self._closed = True
            raise self._error

    async def settled(self) -> None:
        """The node succeeded: raise ``Suspended`` while an effect is unknown that it has not met again, so that the
        step does not end before somebody says what came of it; ``UnknownEffect`` when its policy is ``fail``."""
        of, parts = self.of, self._parts
        if of.store is None or parts is None:
            return
        unknown = [*parts.lost.values(), *parts.intents.values(), *filter(rows_of.is_lost_effect, parts.rows.values())]
        if not unknown:
            return
        said = {message.name for message in await wait_for(of.store.read_messages())}
        open_rows = [row for row in unknown if rows_of.settle_message(self.step, row) not in said]
        for row in open_rows:
            if row.get("policy") == "fail":
                raise UnknownEffect(of.run_id, rows_of.call_id(self.step, row["n"]), row["name"])
        if open_rows:
            self._closed = True
            raise Suspended([_to_settle(self.step, row) for row in open_rows])

    async def failed(self) -> None:
        """The attempt failed by itself: the next one begins with an empty journal, but for unknown effects.

        Durable on return. Raises ``StorageError``, ``LeaseLost``.
        """
        await self._others_in_flight()
        self._closed = True
        of = self.of
        if of.store is None or not of.written:
            return
        parts = self._parts
        unsure = parts is not None and (
            bool(parts.intents or parts.lost) or any(map(rows_of.is_lost_effect, parts.rows.values()))
        )
        # An unknown effect that made the attempt fail keeps the rest as well: it goes on once that is settled.
        keeps = of.keep_on_retry or (parts is not None and parts.refused)
        with self._lock:
            of.last += 1
            mark = {"kind": "mark", "cleared": not keeps}
        of.spent = NOTHING
        of.must_load = keeps or unsure
        await self._durable(of.store.write_journal([JournalRow(of.step, of.last, codec.encode(mark, "mark"))]))

    def close(self) -> None:
        """Take no more calls and record nothing any more, as when the attempt was cancelled or its step is done."""
        self._closed = True

    def take_problems(self) -> list[str]:
        """The problems so far, which are forgotten by this."""
        problems, self.problems = self.problems, []
        return problems

    def of_attempt(self, reported: Spent) -> Spent:
        """What the attempt took: as its node reports, but at least its questions to models, each counted once."""
        if self.spent is NOTHING and self.counted is NOTHING:
            return reported
        return Spent(
            max(reported.tokens - self.counted.tokens, self.spent.tokens),
            reported.latency_ms,
            max(reported.output_tokens - self.counted.output_tokens, self.spent.output_tokens),
            max(reported.cost - self.counted.cost, self.spent.cost),
        )

    async def _others_in_flight(self) -> None:
        """Wait for calls that other tasks are making: what they come to is still recorded."""
        parts = self._parts
        if parts is None:
            return
        with self._lock:
            if not parts.unfinished:
                return
            parts.idle = Future()
        try:
            async with asyncio.timeout(IN_FLIGHT_SECONDS):
                await asyncio.wrap_future(parts.idle)
        except TimeoutError:
            names = ", ".join(sorted({call.key.name for call in parts.unfinished.values()}))
            self.problems.append(f"Step {self.step!r} is over, but calls that it had begun still run: {names}.")

    # --- calls --------------------------------------------------------------------------------------------------

    async def call(self, name: str, request: str, make: Callable[[str], Awaitable[T]], spec: CallSpec) -> T:
        """The outcome of a call: recorded, or made now by ``make(idempotency key)`` and durable on return.

        Raises what ``make`` raises, which is not recorded: the call runs again when the step does. Raises ``Suspended``
        and ``UnknownEffect`` for an effect that had begun before a crash, ``UnstorableValue`` for an outcome that has
        no stored form, ``StorageError``, ``LeaseLost``.
        """
        call = self.meet("call", name, request, spec.policy)
        try:
            work = self._work(call, spec)
            item = next(work)
            while True:
                try:
                    if isinstance(item, Future):
                        sent: Any = await wait_for(item)
                    else:
                        token = _around.set(call)
                        call.where = _here()
                        try:
                            sent = await make(call.idempotency_key)
                        finally:
                            _around.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised inside the work, which raises it again
                    item = work.throw(error)
                else:
                    item = work.send(sent)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            self.end(call)

    def call_blocking(self, name: str, request: str, make: Callable[[str], T], spec: CallSpec) -> T:
        """``call`` for synchronous code, in any thread. It blocks, also while the outcome is being made durable."""
        call = self.meet("call", name, request, spec.policy)
        try:
            work = self._work(call, spec)
            item = next(work)
            while True:
                try:
                    if isinstance(item, Future):
                        sent: Any = item.result()
                    else:
                        token = _around.set(call)
                        call.where = _here()
                        try:
                            sent = make(call.idempotency_key)
                        finally:
                            _around.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised inside the work, which raises it again
                    item = work.throw(error)
                else:
                    item = work.send(sent)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            self.end(call)

    def _work(self, call: Call, spec: CallSpec) -> Generator[Future[Any] | None, Any, Any]:
        """One call from start to end: yields futures to be waited for, and ``None`` where the call is to be made."""
        if call.answered:
            assert call.row is not None
            self._count(rows_of.spent_of(call.row), call.number)
            return spec.from_plain(call.row["answer"])
        lost = call.row is not None and rows_of.is_lost_effect(call.row)
        if lost and spec.policy != "rerun":
            settlement = yield from self._settlement(call)
            if settlement["action"] != "redo":
                plain = spec.settled(settlement["action"], settlement.get("value"))
                yield from self._record(call, "done", answer=plain)
                return spec.from_plain(plain)
        if spec.before is not None:
            spec.before()
        if spec.policy != "rerun":
            yield from self._record(call, "intent")
        try:
            value = yield None
        except Exception as error:
            if spec.policy != "rerun" and not isinstance(error, StorageError) and self._error is None:
                # Its caller knows what happened, so it is no unknown effect; it runs again when the step does.
                yield from self._record(call, "failed", error=f"{type(error).__name__}: {error}"[:500])
            raise
        # An effect whose outcome cannot be stored has happened all the same: its intent stays, so it is not repeated.
        plain = spec.to_plain(value)
        taken = spec.spent(value) if spec.spent is not None else NOTHING
        yield from self._record(call, "done", answer=plain, **taken.record())
        self.of.spent += taken
        self._count(taken, call.number)
        return value

    def _settlement(self, call: Call) -> Generator[Future[Any], Any, Mapping[str, Any]]:
        """What somebody said of an unknown effect. Raises ``Suspended`` or ``UnknownEffect`` when nobody did."""
        store, parts = self.of.store, self._parts
        assert store is not None
        assert parts is not None
        assert call.row is not None
        name = rows_of.settle_message(self.step, call.row)
        messages: list[Message] = yield store.read_messages()
        found = next((message for message in messages if message.name == name), None)
        if found is not None:
            settlement: Mapping[str, Any] = codec.decode(found.body)
            return settlement
        parts.refused = True
        parts.intents[call.number] = call.row  # a node may swallow what is raised here
        if call.policy == "fail":
            raise UnknownEffect(store.run_id, call.id, call.key.name)
        self.suspend(_to_settle(self.step, call.row))

    def _count(self, taken: Spent, number: int) -> None:
        if taken is NOTHING:
            return
        with self._lock:
            if self._parts is not None and number in self._parts.counted:
                self.counted += taken
            else:
                self.spent += taken

    def suspend(self, waiting: Waiting) -> NoReturn:
        """Let go of the process until ``waiting`` is over."""
        with self._lock:
            self._waits.append(waiting)
        raise Suspended([waiting])

    # --- one call's place ---------------------------------------------------------------------------------------

    def meet(self, kind: str, name: str, request: str, policy: Policy = "rerun") -> Call:
        """Begin a call: give it its number, its key and what is recorded of it."""
        if policy not in POLICIES:
            raise ValueError(f"Call {name!r}: the policy is {policy!r}; it is one of {', '.join(POLICIES)}.")
        outer = self._outer()
        if outer is not None:
            # Of its own in each call around it, which may be answered as a whole the next time.
            request = _hash(f"{outer.idempotency_key}\0{request}".encode())
        with self._lock:
            if self._closed:
                raise RunError(self.of.run_id, f"Call {name!r}: this attempt of step {self.step!r} is over.")
            if self._error is not None:
                raise self._error  # a run that is lost, or whose store fails, asks nothing more of the world
            if self._waits and kind == "call":
                raise Suspended(self._waits)
            parts = self._parts
            if parts is None:
                parts = self._parts = _Parts()
            replay = parts.replay
            key = replay.key_of(name, request)
            quiet = self._is_quiet(parts, outer)
            had_left = replay.left
            found = replay.meet(key, quiet)
            if replay.left and not had_left:
                self._left(parts, name)
            idempotency_key = f"{self.of.key}/{name}#{key.request[:12]}#{key.occurrence}"
            call = Call(self, 0, key, quiet, kind, policy, idempotency_key, outer)
            if found is not None:
                call.number, call.row = found.number, parts.rows.pop(found.number, None)
                call.answered = found.answer is not None
            else:
                self.of.last += 1
                call.number = self.of.last
                lost = parts.lost.get(key)
                if lost is not None:
                    call.row, call.settles = lost, lost["n"]
            if not call.answered:
                parts.unlisted[call.number] = call
            parts.unfinished[call.number] = call
        return call

    def _outer(self) -> Call | None:
        """The call of this attempt around the one that is being made."""
        outer = _around.get()
        if outer is None or outer.journal is not self or self._parts is None:
            return None
        return outer if outer.number in self._parts.unfinished else None

    def _is_quiet(self, parts: _Parts, outer: Call | None) -> bool:
        """Whether the order of this call and all others is certain: see ``replay``.

        Inside another call: made where that one is made, while nothing else is unfinished.
        """
        around = 0
        place = self._task
        if outer is not None:
            place = outer.where
            each: Call | None = outer
            while each is not None:
                if not each.quiet:
                    return False
                around, each = around + 1, each.outer
        return len(parts.unfinished) == around and _here() is place

    def _left(self, parts: _Parts, name: str) -> None:
        """The step went another way than recorded: what is recorded after this point is given up."""
        first = parts.replay.dropped[0]
        parts.void.extend(each.number for each in parts.replay.dropped)
        unsure = []
        for each in parts.replay.dropped:
            row = parts.rows.pop(each.number, None)
            if row is not None and rows_of.is_lost_effect(row):
                parts.lost[each.key] = row
                unsure.append(rows_of.call_id(self.step, each.number))
        recorded = f"{rows_of.call_id(self.step, first.number)!r} ({first.key.name})"
        text = (
            f"Step {self.step!r} took another way than before: where its journal has the call {recorded}, it made the "
            f"call {name!r} with another request. From there on its calls are made anew."
        )
        if unsure:
            text += f" Whether these took effect before is not known: {', '.join(unsure)}."
        self.problems.append(text)

    def end(self, call: Call) -> None:
        """The call is over, whatever came of it."""
        with self._lock:
            parts = self._parts
            assert parts is not None
            parts.unfinished.pop(call.number, None)
            if not parts.unfinished and parts.idle is not None and not parts.idle.done():
                parts.idle.set_result(None)

    # --- rows ---------------------------------------------------------------------------------------------------

    async def recorded(self, call: Call, state: str, **more: Any) -> None:
        """Write a call's row; durable on return. Raises ``StorageError``, ``LeaseLost``, ``UnstorableValue``."""
        for future in self._record(call, state, **more):
            await wait_for(future)

    def _record(self, call: Call, state: str, **more: Any) -> Generator[Future[Any], Any, None]:
        """Write a call's row; yields the future of its being durable, unless there is no store."""
        of, parts = self.of, self._parts
        assert parts is not None
        store = of.store
        if store is None:
            parts.unlisted.clear()
            return
        with self._lock:
            if self._closed:
                return  # a thread that nobody waits for any more: its attempt is over, another may have begun
            row: Row = {
                "kind": call.kind,
                "name": call.key.name,
                "request": call.key.request,
                "occ": call.key.occurrence,
                "quiet": call.quiet,
                "policy": call.policy,
                "state": state,
                "key": call.idempotency_key,
                "at": self._now(call),
                **more,
            }
            if call.outer is not None:
                row["in"] = call.outer.number
            listed = [each for number, each in parts.unlisted.items() if number != call.number]
            void = list(parts.void)
            call.begun += [each.listed() for each in listed]
            call.void += void
            if call.begun:
                row["begun"] = call.begun
            if call.void:
                row["void"] = call.void
            if call.settles is not None:
                row["settled"] = [call.settles]
            of.written = True
            future = store.write_journal([JournalRow(of.step, call.number, _encoded(row, call.key.name))])
            if state == "intent":
                parts.intents[call.number] = {**row, "n": call.number}
            else:
                parts.intents.pop(call.number, None)
            # Rows are written in their order: those that follow need not list the same calls again.
            for each in (call, *listed):
                parts.unlisted.pop(each.number, None)
        try:
            yield future
        except (SurefootError, OSError) as error:
            with self._lock:
                parts.unlisted |= {each.number: each for each in (call, *listed)}
            self._refused(error)
            return
        with self._lock:
            parts.void = [number for number in parts.void if number not in void]
            if call.settles is not None:
                parts.lost.pop(call.key, None)

    def _now(self, call: Call) -> float:
        """When a row is written; later than the row it replaces, as it names this time of beginning an effect."""
        before = call.row["at"] + 1e-6 if call.row is not None and "at" in call.row else 0.0
        return round(max(self.of.clock(), before), 6)

    def _refused(self, error: Exception) -> None:
        """A row was not written. Raises, unless the run is to go on without."""
        store = self.of.store
        assert store is not None
        if isinstance(error, StorageError) and not store.stops_on_error:
            self.problems.append(f"A call of step {self.step!r} was not recorded and the run goes on: {error}")
            return
        if isinstance(error, RunNotFound):
            error = StorageError(f"Run {store.run_id!r} vanished from the store while it was going on: it was deleted.")
        self._error = error
        raise error

    async def _durable(self, future: Future[None]) -> None:
        try:
            await wait_for(future)
        except (SurefootError, OSError) as error:
            self._refused(error)


@dataclass(slots=True)
class _Parts:
    """What an attempt that makes calls keeps; most make none.

    ``rows`` are those not used yet. ``lost`` are unknown effects of a way that was left. ``unlisted`` are calls that no
    durable row tells of, ``intents`` effects begun here and not ended. ``refused`` says that an unknown effect was met.
    """

    replay: Replay[Row] = field(default_factory=Replay)
    rows: dict[int, Row] = field(default_factory=dict)
    lost: dict[CallKey, Row] = field(default_factory=dict)
    counted: frozenset[int] = frozenset()
    unfinished: dict[int, Call] = field(default_factory=dict)
    unlisted: dict[int, Call] = field(default_factory=dict)
    void: list[int] = field(default_factory=list)
    intents: dict[int, Row] = field(default_factory=dict)
    refused: bool = False
    idle: Future[None] | None = None


def _to_settle(step: str, row: Row) -> Waiting:
    """What a run waits for whose effect is unknown."""
    call_id = rows_of.call_id(step, row["n"])
    question = f"{row['name']} had begun, and nothing says how it ended; whether it took effect is not known"
    return Waiting("settle", call_id, name=call_id, message=rows_of.settle_message(step, row), question=question)


def _here() -> object:
    """The task that runs now, else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else threading.current_thread()


def _encoded(row: Row, name: str) -> bytes:
    what = f"the answer of call {name!r}"
    try:
        data = codec.encode(row, "row")
    except UnstorableValue as error:
        raise UnstorableValue(error.path.replace("row.answer", what, 1), error.problem) from None
    if len(data) > MAX_VALUE_BYTES:
        problem = (
            f"has {len(data):,} bytes; a store takes at most {MAX_VALUE_BYTES:,} (MAX_VALUE_BYTES) in one value. Keep "
            "such data in a file or an object store, and return its name"
        )
        raise UnstorableValue(what, problem)
    return data


async def in_thread(function: Callable[..., T], *args: Any, watch: threads.Watch | None = None, **keywords: Any) -> T:
    """``function`` in a thread of its step, as the place where the present call is made."""

    def run() -> T:
        call = _around.get()
        if call is not None:
            call.where = _here()
        return function(*args, **keywords)

    result: T = await threads.in_thread(run, watch=watch)
    return result


__all__ = ["AttemptJournal", "Begun", "CallSpec", "JournalStore", "StepJournal", "current_idempotency_key"]
