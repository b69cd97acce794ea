"""The journal of a step: what its calls came to, durable before the step sees it, and given again after a crash.

A *call* is one question to a model, one tool call, one ``ctx.call``, sleep or wait inside a step. Its outcome, a value
or what it raised, is a row in the store, gone with the commit of the step. A step that starts again after a crash makes
its calls again and is given the recorded outcomes (see ``replay`` for which, and when); an effect that had begun and
has none is *unknown*, and the call's policy decides: ``rerun`` (with the same idempotency key), ``ask`` (wait until
somebody settles it) or ``fail``.

``StepJournal`` is one visit's, ``AttemptJournal`` what one attempt of it uses. Neither knows what kind of run the step
belongs to. Without a store calls only run, and nothing is written.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Generator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from framework.errors import BudgetExceeded, RunError, RunNotFound, StorageError, SurefootError, UnknownEffect
from framework.graph import journal_failures as failures
from framework.graph import journal_rows as rows_of
from framework.graph.budget import Room
from framework.graph.journal_lanes import Place, current_idempotency_key, here, in_thread, place_now, tool_key
from framework.graph.journal_rows import Row
from framework.graph.journal_spec import Call, CallSpec, JournalStore, StepJournal, encoded, request_hash
from framework.graph.journal_turns import IN_FLIGHT_SECONDS, Parts, Turns, unsure_text
from framework.graph.replay import Begun, Replay
from framework.graph.run_commits import wait_for
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Suspended, Waiting
from framework.llm.tool_loop import paid_before
from framework.storage import codec
from framework.storage.records import JournalRow, Message

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AttemptJournal(Turns):
    """The calls of one attempt. Calls may come from any task and thread of it.

    An executor calls ``begin``, then lets the node work, then ``failed``, ``over`` or ``close``.
    """

    def __init__(self, of: StepJournal) -> None:
        super().__init__(of)
        self.spent = NOTHING
        """What the questions to models of this attempt took, those answered from the journal too."""
        self.counted = NOTHING
        """The part of what this attempt's answers took that an earlier attempt's record counts already."""

    @property
    def records(self) -> bool:
        """Whether there is a store to record in."""
        return self.of.store is not None

    @property
    def is_replaying(self) -> bool:
        """Whether there are recorded outcomes that the step has not asked for yet."""
        parts = self._parts
        if parts is None:
            return False
        with self._lock:
            return not parts.replay.is_over

    # --- of the executor ----------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take up what is recorded; the calling task is the step's own. Raises ``StorageError``, ``CodecError``."""
        self._task = asyncio.current_task()
        place_now.set(Place(self, None, 0, self._task))
        of = self.of
        if of.store is None or not of.must_load:
            return
        stored = await wait_for(of.store.read_journal(of.step))
        rows = rows_of.parse(stored, lenient=True)
        of.must_load, of.written = False, bool(stored)
        stale = self._stale(rows)
        found = rows_of.fold(rows, of.counted, stale)
        of.last, of.ended, of.spent = max(of.last, found.last), max(of.ended, found.ended), found.spent
        self._parts = Parts(
            Replay(found.calls),
            dict(found.rows),
            dict(found.lost),
            found.counted,
            damaged=found.damaged,
            void=list(found.stale),
            furthest=found.furthest,
        )
        if stale:
            unsure = [rows_of.call_id(self.step, row["n"]) for row in found.lost.values()]
            self.problems.append(
                f"What step {self.step!r} is given is not what it was given when its journal was recorded: an earlier "
                "step, which was not committed, came to something else. Its calls are made anew." + unsure_text(unsure)
            )

    def _stale(self, rows: list[Row]) -> frozenset[int]:
        """The numbers of rows that were recorded when the step was given something else."""
        of = self.of
        if not of.rewound and not any("given" in row for row in rows):
            return frozenset()
        given = of.given() if of.given is not None else None
        calls = [row for row in rows if row["kind"] not in ("mark", "damaged")]
        return frozenset(row["n"] for row in calls if row.get("given", None if of.rewound else given) != given)

    async def over(self) -> None:
        """The node returned or raised: raise ``Suspended`` if it waits, or a store's error that it may have hidden."""
        if self._waits:
            await self._others_in_flight(self._patience())
            self._closed = True
            raise Suspended(self._waits)
        if self._error is not None:
            self._closed = True
            raise self._error

    async def settled(self) -> None:
        """No further attempt is to follow: raise ``Suspended`` while an effect is unknown that nobody has settled, so
        that the step does not end before somebody says what came of it; ``UnknownEffect`` when its policy is ``fail``.
        Those in flight are waited for first, for a while."""
        of, parts = self.of, self._parts
        if of.store is None or parts is None or not parts.unknown():
            return
        await self._others_in_flight(IN_FLIGHT_SECONDS)
        unknown = parts.unknown()
        if not unknown:
            return
        said = {message.name for message in await wait_for(of.store.read_messages())}
        open_rows = [row for row in unknown if rows_of.settle_message(self.step, row) not in said]
        for row in open_rows:
            if row.get("policy") == "fail":
                parts.refused = True
                raise UnknownEffect(of.run_id, rows_of.call_id(self.step, row["n"]), row["name"])
        if open_rows:
            self._closed = True
            raise Suspended([_to_settle(self.step, row) for row in open_rows])

    async def failed(self, *, last: bool = False) -> None:
        """The attempt failed by itself: the next one begins with an empty journal, but for unknown effects.

        Durable on return. Raises ``StorageError``, ``LeaseLost``. What the attempt took counts as unfinished until a
        record of the run says that it counts the calls up to ``of.last``, so nothing is lost if there never is one.
        When it was the ``last``, raises as ``settled``: with ``Suspended`` it has not failed yet, and goes on from its
        records; with ``UnknownEffect`` it has.
        """
        self._let_go(RunError(self.of.run_id, f"This attempt of step {self.step!r} is over."))
        await self._others_in_flight(IN_FLIGHT_SECONDS)
        self._closed = True
        unknown: UnknownEffect | None = None
        if last:
            try:
                await self.settled()
            except UnknownEffect as error:
                unknown = error
        await self._mark_failed()
        if unknown is not None:
            raise unknown

    async def _mark_failed(self) -> None:
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
            of.counted = of.last
            mark = {"kind": "mark", "cleared": not keeps}
        of.spent = NOTHING
        of.must_load = keeps or unsure or (parts is not None and parts.damaged > 0)
        await self.durable(of.store.write_journal([JournalRow(of.step, of.last, codec.encode(mark, "mark"))]))

    async def stop(self, error: Exception) -> None:
        """The attempt ends early, as when the run's budget is used up: begin no more calls, and record those in
        flight."""
        self._error = self._error or error
        self._let_go(self._error)
        await self._others_in_flight(self._patience())
        self._closed = True

    def close(self) -> None:
        """Take no more calls and record nothing any more, as when the attempt was cancelled or its step is done."""
        self._closed = True
        self._let_go(RunError(self.of.run_id, f"This attempt of step {self.step!r} is over."), lost=True)

    def take_problems(self) -> list[str]:
        """The problems so far, which are forgotten by this."""
        problems, self.problems = self.problems, []
        return problems

    def of_attempt(self, reported: Spent) -> Spent:
        """What the attempt took: as its node reports, but at least its questions to models, each counted once.

        With that of calls whose tokens no record counts and that this attempt did not make: the step took another way
        since, or the process ended before it was recorded that an earlier attempt had failed.
        """
        before = self.of.spent
        if self.spent is NOTHING and self.counted is NOTHING and before is NOTHING:
            return reported

        def taken(part: str) -> Any:
            own, counted = getattr(self.spent, part), getattr(self.counted, part)
            return max(getattr(reported, part) - counted, own) + max(getattr(before, part) - own, 0)

        return Spent(taken("tokens"), reported.latency_ms, taken("output_tokens"), taken("cost"))

    async def _others_in_flight(self, seconds: float | None) -> None:
        """Wait so long, or until they end, for calls that other tasks are making: what they come to is recorded."""
        parts = self._parts
        if parts is None:
            return
        with self._lock:
            if not parts.unfinished:
                return
            parts.idle = Future()
        if not await self._done(parts.idle, seconds):
            self.problems.append(
                f"Step {self.step!r} is over, but calls that it had begun still run, and are not recorded: "
                f"{self._in_flight()}."
            )

    # --- calls --------------------------------------------------------------------------------------------------

    async def call(self, name: str, request: str, make: Callable[[str], Awaitable[T]], spec: CallSpec) -> T:
        """The outcome of a call: recorded, or made now by ``make(idempotency key)`` and durable on return.

        Raises what ``make`` raises, which is an outcome too and raised again from the journal (see
        ``journal_failures``). Raises ``Suspended`` and ``UnknownEffect`` for an effect that had begun before a crash,
        ``UnstorableValue`` for an outcome that has no stored form, ``StorageError``, ``LeaseLost``.
        """
        try:
            return await self._call(name, request, make, spec)
        except Suspended:
            await self.left()
            raise

    async def _call(self, name: str, request: str, make: Callable[[str], Awaitable[T]], spec: CallSpec) -> T:
        call = await self.meet("call", name, request, spec.policy, spec.key)
        try:
            work = self._work(call, spec)
            item = next(work)
            while True:
                try:
                    if isinstance(item, Call):
                        sent: Any = None
                        await self._its_turn(item)
                    elif isinstance(item, Room):
                        sent = await asyncio.wrap_future(item)
                    elif isinstance(item, Future):
                        sent = await wait_for(item)
                    else:
                        token = place_now.set(self._inside(call))
                        try:
                            sent = await make(call.idempotency_key)
                        finally:
                            place_now.reset(token)
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
        try:
            return self._call_blocking(name, request, make, spec)
        except Suspended:
            self.left_blocking()
            raise

    def _call_blocking(self, name: str, request: str, make: Callable[[str], T], spec: CallSpec) -> T:
        call = self._arrived("call", name, request, spec.policy, spec.key)
        try:
            self._its_turn_blocking(call)
            work = self._work(call, spec)
            item = next(work)
            while True:
                try:
                    if isinstance(item, Call):
                        sent: Any = None
                        self._its_turn_blocking(item)
                    elif isinstance(item, Future):
                        sent = item.result()
                    else:
                        token = place_now.set(self._inside(call))
                        try:
                            sent = make(call.idempotency_key)
                        finally:
                            place_now.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised inside the work, which raises it again
                    item = work.throw(error)
                else:
                    item = work.send(sent)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            self.end(call)

    def _inside(self, call: Call) -> Place:
        assert self._parts is not None
        with self._lock:
            return Place(self, self._parts.replay.inside(call.key), 0, here(), call)

    def _work(self, call: Call, spec: CallSpec) -> Generator[Future[Any] | Call | None, Any, Any]:
        """One call from start to end: yields futures to be waited for, a call that has to wait for its turn, and
        ``None`` where the call is to be made."""
        if call.answered:
            assert call.row is not None
            self._count(rows_of.spent_of(call.row), call.number)
            if call.row["state"] == "failed":
                raise failures.error_of(call.row["error"])
            return spec.from_plain(call.row["answer"])
        if call.assumed and call.row is None and spec.policy != "rerun":
            yield from self._record(call, "intent")
            call.row = self._intent_of(call)
        lost = call.row is not None and rows_of.is_lost_effect(call.row)
        if lost and spec.policy != "rerun":
            settlement = yield from self._settlement(call)
            if settlement["action"] != "redo":
                plain = spec.settled(settlement["action"], settlement.get("value"))
                yield from self._record(call, "done", answer=plain)
                return spec.from_plain(plain)
        elif spec.policy != "rerun":
            yield from self._none_unknown(call)
        if spec.before is None:
            return (yield from self._made(call, spec))
        over = yield from spec.before(_is_inside_a_question(call))
        try:
            if self._waits and call.outer is None:  # the step was suspended while this waited
                raise Suspended(self._waits)
            return (yield from self._made(call, spec))
        finally:
            over()

    def _made(self, call: Call, spec: CallSpec) -> Generator[Future[Any] | Call | None, Any, Any]:
        """A call that is made now."""
        if spec.policy != "rerun":
            yield from self._record(call, "intent")
        handled = sys.exception()
        try:
            value = yield None
        except Exception as error:
            # After the budget was refused a call may fail for that alone; an effect in flight is known to have failed.
            ended = self._error is not None and not (spec.policy != "rerun" and isinstance(self._error, BudgetExceeded))
            if failures.is_recorded(error) and not ended:
                yield from self._last_of_recorded(call)
                if spec.policy == "rerun" or not failures.leaves_unknown(error, handled):
                    paid = paid_before(error)
                    taken = Spent.of_reply(paid) if paid is not None and spec.spent is not None else NOTHING
                    yield from self._record(call, "failed", error=failures.plain_error(error), **taken.record())
                    self._took(taken, call)
            raise
        yield from self._last_of_recorded(call)
        # An effect whose outcome cannot be stored has happened all the same: its intent stays, so it is not repeated.
        plain = spec.to_plain(value)
        taken = spec.spent(value) if spec.spent is not None else NOTHING
        yield from self._record(call, "done", answer=plain, **taken.record())
        self._took(taken, call)
        return value

    def _last_of_recorded(self, call: Call) -> Generator[Call, Any, None]:
        """One that is made before all records were used, for those inside it: what it came to is told after them."""
        parts = self._parts
        assert parts is not None
        if not parts.replay.has_unused:
            return
        with self._lock:
            parts.replay.close(call.arrival)
            self._note_left(parts, call.key.name)
            self._hold(parts, call)
        yield call

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

    def _none_unknown(self, call: Call) -> Generator[Future[Any], Any, None]:
        """An effect that nothing is recorded of is about to be made: raise ``Suspended``, or ``UnknownEffect``, when it
        may be another try of one of that name whose outcome is unknown, and which nobody has settled."""
        store, parts = self.of.store, self._parts
        if store is None or parts is None:
            return
        with self._lock:
            in_flight = {each.number for each in parts.unfinished}
            named = [row for row in parts.unknown() if row["name"] == call.key.name]
            unknown = {row["n"]: row for row in named if row["n"] not in in_flight}
        if not unknown:
            return
        messages: list[Message] = yield store.read_messages()
        said = {message.name for message in messages}
        for row in unknown.values():
            if rows_of.settle_message(self.step, row) in said:
                continue
            parts.refused = True
            if row.get("policy") == "fail":
                raise UnknownEffect(store.run_id, rows_of.call_id(self.step, row["n"]), row["name"])
            self.suspend(_to_settle(self.step, row))

    def _intent_of(self, call: Call) -> Row | None:
        return self._parts.intents.get(call.number) if self._parts is not None else None

    def _took(self, taken: Spent, call: Call) -> None:
        self.of.spent += taken
        self._count(taken, call.number)

    def _count(self, taken: Spent, number: int) -> None:
        if taken is NOTHING:
            return
        with self._lock:
            if self._parts is not None and number in self._parts.counted:
                self.counted += taken
            else:
                self.spent += taken

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
            if call.answered:  # and it comes to something else now
                call.arrival.made = True
            if self._closed:
                return  # a thread that nobody waits for any more: its attempt is over, another may have begun
            row = self._row(parts, call, state, more)
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
            # One that a process before had as well, such as a call made anew on another way, is no progress.
            further = state in rows_of.ANSWERED and parts.got > parts.furthest
            written = JournalRow(of.step, call.number, encoded(row, call.key.name))
            future = store.write_journal([written], progress=further)
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

    def _row(self, parts: Parts, call: Call, state: str, more: Mapping[str, Any]) -> Row:
        of, at = self.of, call.arrival
        is_answered = state in rows_of.ANSWERED
        of.ended += is_answered
        parts.got += is_answered
        optional = {
            "lane": at.lane,
            "idx": at.index,
            "after": call.after,
            "end": of.ended if is_answered else 0,
            "got": parts.got if is_answered and parts.got != of.ended else 0,
            "in": call.outer.number if call.outer is not None else None,
            "loose": call.loose,
            "assumed": call.assumed,
            "given": of.given() if of.unsure and of.given is not None else None,
        }
        return {
            "kind": call.kind,
            "name": call.key.name,
            "request": call.key.request,
            "occ": call.key.occurrence,
            "policy": call.policy,
            "state": state,
            "key": call.idempotency_key,
            "at": self._now(call),
            **{name: value for name, value in optional.items() if value},
            **more,
        }

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
        self._let_go(error, lost=True)
        raise error

    async def durable(self, future: Future[None]) -> None:
        """Wait until rows are durable. Raises ``StorageError``, ``LeaseLost``, as ``recorded``."""
        try:
            await wait_for(future)
        except (SurefootError, OSError) as error:
            self._refused(error)


def _is_inside_a_question(call: Call) -> bool:
    """Whether it belongs to a question to a model, which waits for it."""
    each = call.outer
    while each is not None and each.key.name != "llm":
        each = each.outer
    return each is not None


def _to_settle(step: str, row: Row) -> Waiting:
    """What a run waits for whose effect is unknown."""
    call_id = rows_of.call_id(step, row["n"])
    question = f"{row['name']} had begun, and nothing says how it ended; whether it took effect is not known"
    return Waiting("settle", call_id, name=call_id, message=rows_of.settle_message(step, row), question=question)


__all__ = [
    "AttemptJournal",
    "Begun",
    "Call",
    "CallSpec",
    "JournalStore",
    "StepJournal",
    "current_idempotency_key",
    "in_thread",
    "request_hash",
    "tool_key",
]
