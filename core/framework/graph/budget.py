"""``RunBudget``: how many tokens and how much money a run may take, over all the processes that work on it;
``BudgetGate``, which lets its questions to models out; and ``PartAccount``, by which parts of a run count with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from framework.errors import BudgetExceeded, CostUnknown
from framework.graph.spending import NOTHING, Spent


@dataclass(frozen=True, slots=True)
class RunBudget:
    """Limits of one run; ``None`` is no limit. ``max_cost`` is in US dollars; it cannot be kept where a model's price
    is not known, so after the first reply without a price the next question raises ``CostUnknown``.

    Looked at before each step and before each question to a model. What counts is the run's totals, the journaled
    questions of steps that are not finished, and for those in flight an estimate: a question goes out beside others
    only if all of them fit, else it waits for them. One that goes out alone may take more than is left, so the run goes
    over its limits by one question at most, as far as estimates hold (see ``BudgetGate``). What the sub-graphs of a
    plan take counts in the same way. Raises ``ValueError`` for a limit below zero.
    """

    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_tokens", self.max_tokens), ("max_cost", self.max_cost)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"RunBudget: {name} is {limit!r}; it has to be 0 or more, or None for no limit.")

    def check(self, run_id: str, tokens: int, cost: float) -> None:
        """Raise ``BudgetExceeded`` when as much as this has been used up."""
        problem = self.problem(tokens, cost)
        if problem is not None:
            raise BudgetExceeded(run_id, problem)

    def problem(self, tokens: int, cost: float) -> str | None:
        """What of the budget is used up by this, ``None`` while something is left."""
        spent: list[str] = []
        if self.max_tokens is not None and tokens >= self.max_tokens:
            spent.append(f"{tokens:,} of max_tokens={self.max_tokens:,} tokens are used up")
        if self.max_cost is not None and cost >= self.max_cost:
            spent.append(f"${cost:.6g} of max_cost=${self.max_cost:.6g} are used up")
        return " and ".join(spent) or None

    def holds(self, tokens: int, cost: float) -> bool:
        """Whether as much as this is within the limits."""
        return (self.max_tokens is None or tokens <= self.max_tokens) and (
            self.max_cost is None or cost <= self.max_cost
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the run's record."""
        limits = {"max_tokens": self.max_tokens, "max_cost": self.max_cost}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunBudget:
        """What ``to_json`` wrote."""
        return cls(plain.get("max_tokens"), plain.get("max_cost"))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a question may take before its reply is there; ``None`` where nothing tells."""

    tokens: int | None = None
    cost: float | None = None


class Room(Future[None]):
    """Done when a question to a model that waits for room in the budget may look again.

    Blocking code in an event loop's thread cannot wait for it, as what it waits for may need that loop: there
    ``result`` raises ``BudgetExceeded``.
    """

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    def result(self, timeout: float | None = None) -> None:
        """As of any future."""
        if not self.done() and _in_an_event_loop():
            raise BudgetExceeded(
                self._run_id,
                "what is left may be taken by the questions in flight, and blocking code in an event loop cannot wait "
                "for them (ask with `await ctx.llm.acomplete(...)`)",
            )
        super().result(timeout)


@dataclass(slots=True)
class BudgetGate:
    """Lets the questions of one run to models out, from any task and thread of it.

    ``totals`` are what the run has spent without those in flight. An estimate is the question's length and its
    ``max_tokens``, which the model keeps, or without that the most that any question took so far; the first goes alone.
    Nothing is refused while questions are in flight, so that what they come to is recorded. A question inside
    another one (by a tool of a provider that does not give one turn at a time) belongs to that one and never waits.
    ``whole`` is the account of a run that is a part of another: a question has to fit into what both have left.
    ``unpriced`` is a model that the run has asked, in this process or before, and whose price is not known.
    """

    run_id: str
    budget: RunBudget
    totals: Callable[[], Spent]
    whole: PartAccount | None = None
    unpriced: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _out: dict[object, Estimate] = field(default_factory=dict)
    _waiting: list[Room] = field(default_factory=list)
    _most: Spent | None = None
    _dearest: float | None = None

    def enter(
        self, characters: int, max_tokens: int | None, inside: bool
    ) -> Generator[Future[None], None, Callable[[], None]]:
        """Wait until a question may go out; what is returned has to be called once it is over and counted.

        ``characters`` is its length, ``max_tokens`` the most that its reply may have, when that is known; ``inside``
        says that it is made inside another one. Yields futures to be waited for. Raises ``BudgetExceeded``,
        ``CostUnknown``.
        """
        over = yield from self._enter(characters, max_tokens, inside)
        if self.whole is None:
            return over
        # From the inside out: what holds a place here waits for others there only while these are in flight.
        try:
            over_there = yield from self.whole.enter(characters, max_tokens, inside)
        except BaseException:
            over()
            raise

        def both_over() -> None:
            over()
            over_there()

        return both_over

    @property
    def limits_cost(self) -> bool:
        """Whether the price of a question has to be known."""
        return self.budget.max_cost is not None or (self.whole is not None and self.whole.limits_cost)

    def _enter(
        self, characters: int, max_tokens: int | None, inside: bool
    ) -> Generator[Future[None], None, Callable[[], None]]:
        while True:
            with self._lock:
                estimate = self._estimate(characters, max_tokens)
                if self._may_go(estimate, inside):
                    place = object()
                    if not inside:
                        self._out[place] = estimate
                    return lambda: self._leave(place)
                room = Room(self.run_id)
                self._waiting.append(room)
            try:
                yield room
            finally:
                with self._lock:
                    if room in self._waiting:
                        self._waiting.remove(room)

    def _estimate(self, characters: int, max_tokens: int | None) -> Estimate:
        if max_tokens is not None:
            tokens = characters // _CHARACTERS_PER_TOKEN + max_tokens
            return Estimate(tokens, self._dearest * tokens if self._dearest is not None else None)
        return Estimate(self._most.tokens, self._most.cost) if self._most is not None else Estimate()

    def _may_go(self, estimate: Estimate, inside: bool) -> bool:
        spent = self.totals()
        alone = not self._out
        problem = self.budget.problem(spent.tokens, spent.cost)
        if alone or inside:
            if problem is not None:
                raise BudgetExceeded(self.run_id, problem)
            if self.unpriced is not None and self.budget.max_cost is not None:
                raise CostUnknown(self.run_id, self.unpriced, self.budget.max_cost)
            return True
        if problem is not None:
            return False
        all_of_them = [*self._out.values(), estimate]
        tokens = [each.tokens for each in all_of_them]
        costs = [each.cost for each in all_of_them]
        if (self.budget.max_tokens is not None and None in tokens) or (
            self.budget.max_cost is not None and None in costs
        ):
            return False
        return self.budget.holds(
            spent.tokens + sum(each or 0 for each in tokens), spent.cost + sum(each or 0.0 for each in costs)
        )

    def _leave(self, place: object) -> None:
        with self._lock:
            self._out.pop(place, None)
            waiting, self._waiting = self._waiting, []
        for room in waiting:
            if room.set_running_or_notify_cancel():
                room.set_result(None)

    def saw(self, taken: Spent, unpriced: str | None) -> None:
        """A reply came and took this; ``unpriced`` is its model when its price is not known."""
        with self._lock:
            most = self._most or NOTHING
            self._most = Spent(max(most.tokens, taken.tokens), 0, 0, max(most.cost, taken.cost))
            if taken.tokens:
                # Output costs more than input: what a question takes at most, at the dearest rate seen.
                self._dearest = max(self._dearest or 0.0, taken.cost / taken.tokens)
            if unpriced is not None:
                self.unpriced = unpriced
        if self.whole is not None:
            self.whole.saw(taken, unpriced)


@dataclass(slots=True)
class PartAccount:
    """What one attempt of a step takes by the runs that are its work: those of a plan step's sub-graph.

    ``counted`` is what the whole's totals have of such a run already, ``stored`` what its store has of it, until it
    goes on here. ``gate`` and ``check`` are the whole's, ``None`` when it has no budget. ``refused`` is what the whole
    refused a part.
    """

    counted: Spent = NOTHING
    stored: Spent = NOTHING
    gate: BudgetGate | None = None
    check_whole: Callable[[], None] | None = None
    refused: BudgetExceeded | None = None
    resumed: bool = False
    """Whether the run goes on here, so that its totals have what is ``counted``."""
    _totals: list[Callable[[], Spent]] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, runs that begin are parts: those of this task, of tasks and of threads that it starts."""
        token = _part.set(self)
        try:
            yield
        finally:
            with suppress(ValueError):  # a coroutine that is closed from outside ends in another context
                _part.reset(token)

    def attach(self, totals: Callable[[], Spent], *, resumed: bool) -> None:
        """A run is a part: ``totals`` is what it has spent, from any thread, ``resumed`` that it began before."""
        self.resumed = self.resumed or resumed
        self._totals.append(totals)

    @property
    def uncounted(self) -> Spent:
        """What the parts have taken that the whole's totals do not have."""
        spent = NOTHING
        for totals in tuple(self._totals):
            spent += totals()
        before = self.counted
        if self.resumed or not self._totals:  # until a run that goes on has taken up what it was, the store knows
            spent = Spent(max(spent.tokens, self.stored.tokens), 0, 0, max(spent.cost, self.stored.cost))
        else:
            before = NOTHING
        return Spent(
            max(0, spent.tokens - before.tokens), 0, 0, round(max(0.0, spent.cost - before.cost), _COST_DIGITS)
        )

    @property
    def is_limited(self) -> bool:
        """Whether the whole has a budget."""
        return self.gate is not None

    @property
    def limits_cost(self) -> bool:
        """As of the whole's gate."""
        return self.gate is not None and self.gate.limits_cost

    def check(self) -> None:
        """Raise ``BudgetExceeded`` when the whole has used up its budget."""
        if self.check_whole is not None:
            try:
                self.check_whole()
            except BudgetExceeded as error:
                self.refused = error
                raise

    def enter(
        self, characters: int, max_tokens: int | None, inside: bool
    ) -> Generator[Future[None], None, Callable[[], None]]:
        """As ``BudgetGate.enter`` of the whole."""
        if self.gate is None:
            return lambda: None
        try:
            return (yield from self.gate.enter(characters, max_tokens, inside))
        except BudgetExceeded as error:
            self.refused = error
            raise

    def saw(self, taken: Spent, unpriced: str | None) -> None:
        """As ``BudgetGate.saw`` of the whole."""
        if self.gate is not None:
            self.gate.saw(taken, unpriced)


_part: ContextVar[PartAccount | None] = ContextVar("surefoot_part", default=None)


@contextmanager
def part_account() -> Iterator[PartAccount | None]:
    """The account of a run that begins here, when it is a part of another run; ``None`` for any other.

    Runs that its own nodes begin inside are no parts: what they take is what these nodes say.
    """
    account = _part.get()
    token = _part.set(None)
    try:
        yield account
    finally:
        with suppress(ValueError):
            _part.reset(token)


_COST_DIGITS = 12
"""As costs are stored."""


_CHARACTERS_PER_TOKEN = 3
"""Fewer than any usual text has, so that estimates are rather too high."""


def _in_an_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
