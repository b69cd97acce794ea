"""The turns of an attempt's calls: where each is made, what is recorded of it, and when it may go on.

See ``replay`` for the rules. This is their other half: tasks and threads, waiting, and how long.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn

from framework.errors import BudgetExceeded, RunError
from framework.graph import journal_rows as rows_of
from framework.graph.journal_lanes import Place, here, place_now
from framework.graph.journal_rows import POLICIES, Policy, Row
from framework.graph.journal_spec import Call, StepJournal, hash_of
from framework.graph.replay import CallKey, Lane, Replay
from framework.graph.suspension import Suspended, Waiting
from framework.graph.time_limit import TimeLimit
from framework.llm import threads

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Parts:
    """What an attempt that makes calls keeps; most make none.

    ``rows`` are those not used yet. ``lost`` are unknown effects of a way that was left. ``unfinished`` are calls in
    flight, ``held`` those of them that wait for their turn. ``unlisted`` are calls that no durable row tells of,
    ``intents`` effects begun here and not ended. ``refused`` says that an unknown effect was met. ``damaged`` counts
    rows that cannot be read, and may have been intents of effects; ``dropped`` those records that were told of.
    ``given`` was given its answer and has not gone on with it yet. ``got`` is how many answers the attempt has,
    ``furthest`` how many an earlier process had on its way through it.
    ``leaving`` are those that are to be told that the step is suspended, each with the call that it is made in, and
    ``quiet`` the futures they wait for.
    """

    replay: Replay[Row] = field(default_factory=Replay)
    rows: dict[int, Row] = field(default_factory=dict)
    lost: dict[CallKey, Row] = field(default_factory=dict)
    counted: frozenset[int] = frozenset()
    unfinished: dict[Call, None] = field(default_factory=dict)
    held: list[Call] = field(default_factory=list)
    unlisted: dict[int, Call] = field(default_factory=dict)
    void: list[int] = field(default_factory=list)
    intents: dict[int, Row] = field(default_factory=dict)
    refused: bool = False
    damaged: int = 0
    dropped: int = 0
    idle: Future[None] | None = None
    given: Call | None = None
    got: int = 0
    furthest: int = 0
    leaving: dict[object, Call | None] = field(default_factory=dict)
    quiet: list[Future[None]] = field(default_factory=list)

    def unknown(self) -> list[Row]:
        """Effects of which nothing says how they ended, those in flight too."""
        unused = filter(rows_of.is_lost_effect, tuple(self.rows.values()))
        return [*self.lost.values(), *self.intents.values(), *unused]


IN_FLIGHT_SECONDS = 30.0
"""How often it is told that an attempt waits for calls that other tasks of it are still making; and how long a failed
one waits for them, or one whose time limit is used up."""

LEAVE_SECONDS = 600.0
"""How long a task that suspends its step waits, without a time limit, for what other tasks are making. Not for ever: it
may hold a lock that one of these needs. As long as the clients of models wait for a reply unless they are told."""


class Turns:
    """The calls in flight of one attempt. They may come from any task and thread of it."""

    def __init__(self, of: StepJournal) -> None:
        self.of = of
        self.step = of.step
        self.problems: list[str] = []
        """What to tell of, such as that replay ended. Whoever drives the attempt reports and clears it."""
        self._task: object = None
        self._closed = False
        self._error: BaseException | None = None
        self._waits: list[Waiting] = []
        self._parts: Parts | None = None
        self._moved = 0.0
        self.limit: TimeLimit | None = None
        """The time limit under which the attempt works, if there is one, its own or one around."""
        self._lock = threading.Lock()

    def suspend(self, waiting: Waiting) -> NoReturn:
        """Let go of the process until ``waiting`` is over. Before the node is told, it is to be waited for ``left``."""
        with self._lock:
            self._waits.append(waiting)
            if self._parts is not None:  # other waits count as well, in whatever order they were recorded
                self._advance(self._parts)
        self._let_go(Suspended(self._waits))
        raise Suspended([waiting])

    @property
    def is_suspended(self) -> bool:
        """Whether the step is being suspended: whatever else waits now need not stay in the process."""
        return bool(self._waits)

    async def left(self) -> None:
        """Wait until nothing but waits is in flight: before a task hears that the step is suspended.

        A task group then stops its other tasks: what they were about to wait for would be lost, and what was being made
        would be paid for and not recorded. The time limit of the step ends this like any other work of it; without one
        it ends after ``LEAVE_SECONDS``.
        """
        with self._lock:
            token, future = self._leave()
        until = time.monotonic() + LEAVE_SECONDS if self._patience() is None else None
        try:
            while future is not None:
                if not await self._done(future, until - time.monotonic() if until is not None else None):
                    return  # what is in flight then is waited for by `over`, if it was not stopped
                await asyncio.sleep(0)  # the task whose call was the last may go on to another one
                with self._lock:
                    future = self._unquiet()
        finally:
            with self._lock:
                self._is_gone(token)

    def left_blocking(self) -> None:
        """``left`` for synchronous code. In the thread of an event loop it does not wait, since nothing could go on."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            return
        with self._lock:
            token, future = self._leave()
        begun = told = time.monotonic()
        until = begun + LEAVE_SECONDS if self._patience() is None else math.inf
        try:
            while future is not None and not self._closed and (seconds := until - time.monotonic()) > 0:
                threads.check_wanted()
                with suppress(TimeoutError):
                    future.result(min(seconds, 0.1))
                    with self._lock:
                        future = self._unquiet()
                if time.monotonic() - told >= IN_FLIGHT_SECONDS:
                    told = time.monotonic()
                    self._tell_in_flight()
        finally:
            with self._lock:
                self._is_gone(token)

    def _patience(self) -> float | None:
        """How many seconds more this attempt, which is suspended, waits for what is in flight: as its time limit
        allows, but long enough for what is nearly done. ``None`` is until it ends."""
        left = self.limit.left() if self.limit is not None else None
        return max(left, IN_FLIGHT_SECONDS) if left is not None else None

    async def _done(self, future: Future[None], seconds: float | None) -> bool:
        """Wait for ``future``, and tell now and then for what; ``False`` when it is not done in so many seconds."""
        until = time.monotonic() + seconds if seconds is not None else math.inf
        waiter = asyncio.wrap_future(future)
        try:
            while True:
                left = until - time.monotonic()
                done, _ = await asyncio.wait({waiter}, timeout=max(0.0, min(left, IN_FLIGHT_SECONDS)))
                if done or left <= IN_FLIGHT_SECONDS:
                    return bool(done)
                self._tell_in_flight()
        finally:
            waiter.cancel()

    def _in_flight(self) -> str:
        """The names of the calls in flight."""
        with self._lock:
            unfinished = list(self._parts.unfinished) if self._parts is not None else []
        return ", ".join(sorted({call.key.name for call in unfinished}))

    def _tell_in_flight(self) -> None:
        logger.warning(
            "Step %r of run %r is over or suspended, and waits for calls that it is still making, to record them: %s. "
            "NodeSpec.timeout_seconds limits how long.",
            self.step,
            self.of.run_id,
            self._in_flight(),
        )

    def _leave(self) -> tuple[object, Future[None] | None]:
        parts = self._parts
        if parts is None:
            return None, None
        place, token = place_now.get(), object()
        outer = place.call if place is not None and place.journal is self else None
        parts.leaving[token] = outer if outer in parts.unfinished else None
        self._tell_quiet(parts)
        return token, self._unquiet()

    def _is_gone(self, token: object) -> None:
        if self._parts is not None:
            self._parts.leaving.pop(token, None)

    def _unquiet(self) -> Future[None] | None:
        """What is done when nothing but waits is in flight; ``None`` when that is so now."""
        parts = self._parts
        if parts is None or self._is_quiet(parts):
            return None
        future: Future[None] = Future()
        parts.quiet.append(future)
        return future

    @staticmethod
    def _is_quiet(parts: Parts) -> bool:
        around: set[Call] = set()
        for call in parts.leaving.values():
            while call is not None and call not in around:
                around.add(call)
                call = call.outer
        return all(call in around for call in parts.unfinished)

    def _tell_quiet(self, parts: Parts) -> None:
        if not parts.quiet or not self._is_quiet(parts):
            return
        waiting, parts.quiet = parts.quiet, []
        for future in waiting:
            with suppress(InvalidStateError):  # nobody waits for it any more
                future.set_result(None)

    def also_waits(self, waiting: Waiting) -> None:
        """When the step is being suspended: it waits for this as well."""
        with self._lock:
            if self._waits:
                self._waits.append(waiting)

    async def meet(self, kind: str, name: str, request: str, policy: Policy = "rerun", key: str | None = None) -> Call:
        """Begin a call: give it its number, its key and what is recorded of it, once it is its turn. To be followed by
        ``end``. ``key`` is its idempotency key, where that is not to be one of its own."""
        call = self._arrived(kind, name, request, policy, key)
        try:
            await self._its_turn(call)
        except BaseException:
            self.end(call)
            raise
        return call

    def _arrived(self, kind: str, name: str, request: str, policy: Policy, key: str | None = None) -> Call:
        if policy not in POLICIES:
            raise ValueError(f"Call {name!r}: the policy is {policy!r}; it is one of {', '.join(POLICIES)}.")
        with self._lock:
            parts = self._parts
            if parts is None:
                parts = self._parts = Parts()
            place = place_now.get()
            place = place if place is not None and place.journal is self else None
            outer = place.call if place is not None and place.call in parts.unfinished else None
            self._check_open(kind, name, outer)
            if outer is not None:
                if kind != "call":
                    self._check_may_wait(outer, name)
                # Of its own in each call around it, which may be answered as a whole the next time.
                request = hash_of(f"{outer.idempotency_key}\0{request}".encode())
            place, lane, loose = self._lane(parts, place, outer, name, request)
            arrival = parts.replay.arrive(lane, name, request, self.of.last + 1)
            if arrival.found is None:
                self.of.last += 1
            if place is not None:
                place_now.set(replace(place, at=lane.count))
            self._note_left(parts, name)
            key = key or f"{self.of.key}/{name}#{arrival.key.request[:12]}#{arrival.key.occurrence}"
            call = Call(self.step, arrival, kind, policy, key, parts.replay.after(self.of.ended), outer, loose)
            parts.unfinished[call] = None
            self._hold(parts, call)
        if self.limit is not None:
            self.limit.look()
        return call

    def works(self) -> bool:
        """Whether calls are in flight that are neither waits nor around one."""
        with self._lock:
            unfinished = list(self._parts.unfinished) if self._parts is not None else []
        around = _around(call for call in unfinished if call.kind != "call")
        return any(call.kind == "call" and call not in around for call in unfinished)

    def _check_open(self, kind: str, name: str, outer: Call | None) -> None:
        """Raise when no call is begun any more. One inside a call in flight, which is to be finished, still is, unless
        the run is lost; of a used up budget the gate refuses its new questions to models."""
        if self._closed:
            raise RunError(self.of.run_id, f"Call {name!r}: this attempt of step {self.step!r} is over.")
        if self._error is not None and (outer is None or not isinstance(self._error, BudgetExceeded)):
            raise self._error  # a run that is lost, or whose store fails, asks nothing more of the world
        if self._waits and kind == "call" and outer is None:
            raise Suspended(self._waits)

    def _check_may_wait(self, outer: Call, name: str) -> None:
        each: Call | None = outer
        while each is not None and each.policy == "rerun":
            each = each.outer
        if each is not None:
            raise RunError(
                self.of.run_id,
                f"{name!r} inside call {each.key.name!r}, whose policy is {each.policy!r}: the process may go away "
                "while it waits, and the call would have begun without an outcome. Wait before or after that call, or "
                'give it the policy "rerun" if it may be begun again.',
            )

    def _lane(
        self, parts: Parts, place: Place | None, outer: Call | None, name: str, request: str
    ) -> tuple[Place | None, Lane, bool]:
        """Where a call is made here now: the place from which further ones go on, its lane, and whether nobody misses
        the call when it does not come again."""
        me, replay = here(), parts.replay
        if place is not None and place.call is not None and outer is None:
            return None, replay.alone(name, request), True  # begun in a call that is over, and answered as a whole
        if place is None and me is not self._task:
            return None, replay.alone(name, request), False
        lane = place.lane if place is not None and place.lane is not None else replay.root
        if place is None:
            place = Place(self, lane, 0, me)
        elif place.owner is not me:
            lane = replay.branch(lane, place.at, name, request)
        return replace(place, lane=lane, owner=me), lane, False

    def _hold(self, parts: Parts, call: Call) -> None:
        """Let a call wait for its turn, which may be now."""
        call.turn = None if parts.replay.is_empty else Future()
        parts.held.append(call)
        self._advance(parts)

    def _advance(self, parts: Parts) -> None:
        """Let go on whose turn it is; what happens in between may be what others waited for."""
        self._moved = time.monotonic()
        moved = True
        while moved and parts.given is None:  # one after the other: tasks are to go on in the order of their answers
            moved = False
            for call in tuple(parts.held):
                turn = parts.replay.turn(call.arrival)
                if turn == "wait" and self._waits and call.kind != "call":
                    turn = "answer" if call.arrival.is_answered else "make"
                if turn == "wait":
                    continue
                parts.held.remove(call)
                moved = True
                if turn == "answer":
                    call.row = parts.replay.give(call.arrival)
                    parts.got = max(parts.got + 1, rows_of.got_of(call.row))  # with those inside it
                    parts.rows.pop(call.number, None)
                    call.answered = True
                    parts.given = call if call.turn is not None else None
                elif not call.arrival.made:
                    self._make(parts, call)
                if call.turn is not None:
                    call.turn.set_result(None)
                if parts.given is not None:
                    break

    def _taken(self, call: Call) -> None:
        """The task or thread of a call goes on, or ends."""
        parts = self._parts
        if parts is not None and parts.given is call:
            parts.given = None
            self._advance(parts)

    def _make(self, parts: Parts, call: Call) -> None:
        arrival = call.arrival
        parts.replay.make(arrival, self.of.last + 1)
        self.of.last = max(self.of.last, arrival.number)
        if arrival.found is not None:
            call.row = parts.rows.pop(call.number, None)
        elif (lost := parts.lost.get(call.key)) is not None:
            call.row, call.settles = lost, lost["n"]
        call.assumed = bool(call.row and call.row.get("assumed"))
        if call.row is None and call.policy != "rerun" and parts.damaged:
            # One of the rows that cannot be read may be its intent: whether it took effect is not known.
            parts.damaged -= 1
            call.assumed = True
        parts.unlisted[call.number] = call

    async def _its_turn(self, call: Call) -> None:
        if call.turn is None:
            return
        turn = asyncio.wrap_future(call.turn)
        while not (await asyncio.wait({turn}, timeout=self._patience_left()))[0]:
            self._relax()
        error = turn.result()
        call.turn = None
        with self._lock:
            self._taken(call)
        if error is not None:
            raise error

    def _its_turn_blocking(self, call: Call) -> None:
        if call.turn is None:
            return
        while True:
            try:
                error = call.turn.result(self._patience_left())
                break
            except TimeoutError:
                self._relax()
        call.turn = None
        with self._lock:
            self._taken(call)
        if error is not None:
            raise error
        threads.check_wanted()

    def _patience_left(self) -> float:
        return max(0.0, self._moved + self.of.patience_seconds - time.monotonic())

    def _relax(self) -> None:
        """Recorded calls did not come for a while, with nothing else happening: see ``Replay.relax``."""
        with self._lock:
            parts = self._parts
            assert parts is not None
            if self._patience_left() > 0 or not parts.held:
                return
            self._moved = time.monotonic()
            if parts.given is not None:  # it cannot go on, as while a call blocks the event loop
                parts.given = None
                self._advance(parts)
                return
            blocked = _around(parts.held)
            if any(
                call.arrival.made and call not in blocked and parts.replay.holds_answers(call.arrival)
                for call in parts.unfinished
            ):
                return  # one that is being made takes as long as it takes, and what is recorded inside it may come
            parts.replay.relax([call.arrival for call in parts.held])
            self._note_left(parts, parts.held[0].key.name)
            self._advance(parts)

    def _let_go(self, error: BaseException, *, lost: bool = False) -> None:
        """Calls that wait for their turn are not made any more. Unless the run is ``lost``, what is in flight is
        finished: a call that was made is recorded, and those inside one have their turn."""
        turns: list[tuple[Future[BaseException | None], bool]] = []
        with self._lock:
            held = self._parts.held if self._parts is not None else []
            for call in tuple(held):
                was_made = call.arrival.made and not lost
                if lost or was_made or call.outer is None:
                    held.remove(call)
                    if call.turn is not None:
                        turns.append((call.turn, was_made))
        for turn, was_made in turns:
            turn.set_result(None if was_made else error)

    def _note_left(self, parts: Parts, name: str) -> None:
        """What replay has dropped: the step went another way than recorded, and it counts no more."""
        dropped = parts.replay.dropped[parts.dropped :]
        if not dropped:
            return
        told = parts.dropped > 0
        parts.dropped += len(dropped)
        parts.void.extend(each.number for each in dropped)
        unsure = []
        for each in dropped:
            row = parts.rows.pop(each.number, None)
            if row is not None and rows_of.is_lost_effect(row):
                parts.lost[each.key] = row
                unsure.append(rows_of.call_id(self.step, each.number))
        if told and not unsure:
            return
        first = dropped[0]
        recorded = f"{rows_of.call_id(self.step, first.number)!r} ({first.key.name})"
        self.problems.append(
            f"Step {self.step!r} took another way than before: at the call {name!r} its journal has the call "
            f"{recorded}, which did not come again so. What may depend on it is made anew.{unsure_text(unsure)}"
        )

    def end(self, call: Call) -> None:
        """The call is over, whatever came of it."""
        with self._lock:
            parts = self._parts
            assert parts is not None
            parts.unfinished.pop(call, None)
            if call in parts.held:
                parts.held.remove(call)
            if parts.given is call:
                parts.given = None
            if (not self._waits or call.outer is not None) and not self._closed:
                parts.replay.ended(call.arrival)
                self._note_left(parts, call.key.name)
            self._advance(parts)
            self._tell_quiet(parts)
            if not parts.unfinished and parts.idle is not None and not parts.idle.done():
                parts.idle.set_result(None)
        if self.limit is not None:
            self.limit.look()


def _around(calls: Iterable[Call]) -> set[Call]:
    """The calls that these are made in."""
    around: set[Call] = set()
    for call in calls:
        outer = call.outer
        while outer is not None and outer not in around:
            around.add(outer)
            outer = outer.outer
    return around


def unsure_text(ids: list[str]) -> str:
    """What to say of effects that are unknown, by the ids of their calls."""
    return f" Whether these took effect before is not known: {', '.join(ids)}." if ids else ""
