"""What a run keeps of the steps in flight: their journals, and what is left of the run's budget."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from framework.errors import UnstorableValue
from framework.graph.budget import BudgetGate, PartAccount, RunBudget
from framework.graph.journal import AttemptJournal, StepJournal, request_hash
from framework.graph.journal_llm import JournaledLLM
from framework.graph.node_base import NodeContext
from framework.graph.run_session import RunSession
from framework.graph.spending import NOTHING, Spent
from framework.llm.prices import cost_of_call


@dataclass(slots=True)
class _Open:
    """A step in flight: its journal and that of its last attempt."""

    journal: StepJournal
    attempt: AttemptJournal | None = None
    number: int = 1
    llm: Any = None


@dataclass(slots=True)
class RunJournals:
    """The journals of one run's steps in flight. Without a session or a budget no step has one, and nothing is done.

    ``spent`` of the run are its own totals; ``unfinished`` is what questions to models took in steps that no total
    counts yet. ``whole`` is the account of a run that is a part of another.
    """

    run_id: str
    session: RunSession | None
    budget: RunBudget | None = None
    whole: PartAccount | None = None
    _open: dict[str, _Open] = field(default_factory=dict)
    _left: dict[str, Spent] = field(default_factory=dict)
    _parts: dict[str, PartAccount] = field(default_factory=dict)
    _gate: BudgetGate | None = None
    _unpriced: str | None = None

    def __post_init__(self) -> None:
        if self.session is not None:
            self._left = self.session.journal_spent
            self._unpriced = self.session.unpriced

    @property
    def unfinished(self) -> Spent:
        """What steps that are not finished have spent."""
        total = NOTHING
        for spent in (*self._left.values(), *(each.journal.spent for each in tuple(self._open.values()))):
            total += spent
        for part in tuple(self._parts.values()):
            total += part.uncounted
        return total

    def forget(self, finished: Iterable[str]) -> None:
        """These steps are finished, and in the run's totals; a journal that was kept of them is only to be read."""
        for step in finished:
            self._left.pop(step, None)

    def check(self, spent: Spent) -> None:
        """Raise ``BudgetExceeded`` when the run, with these totals, has used up its budget."""
        if self.budget is not None:
            total = spent + self.unfinished
            self.budget.check(self.run_id, total.tokens, total.cost)
        if self.whole is not None:
            self.whole.check()

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget, of the run or of the one that it is a part of."""
        return self.budget is not None or (self.whole is not None and self.whole.is_limited)

    def _gate_of(self, totals: Any) -> BudgetGate | None:
        if self._gate is None and self.is_limited:
            budget = self.budget or RunBudget()
            # Somebody may have registered the price since.
            known = self._unpriced is None or cost_of_call(self._unpriced, 0, 0) is not None
            unpriced = None if known else self._unpriced
            self._gate = BudgetGate(self.run_id, budget, lambda: totals.spent + self.unfinished, self.whole, unpriced)
        return self._gate

    def unpriced(self) -> dict[str, Any]:
        """What the next record of the run says besides: a model that was asked and whose price is not known. Once, as
        a later process looks through all records; until then the journals of unfinished steps tell."""
        found = self._gate.unpriced if self._gate is not None else None
        if found is None or found == self._unpriced:
            return {}
        self._unpriced = found
        return {"unpriced": found}

    def part(self, step: str, counted: Spent, totals: Any, stored: Spent = NOTHING) -> PartAccount:
        """A new account of what runs inside an attempt of the step ``step`` take, until ``part_counted``. ``counted``
        and ``stored`` are what the totals, and the store, have of them; ``totals`` is what has the run's ``spent``."""
        if stored is NOTHING and step in self._parts:
            stored = self._parts[step].stored
        account = self._parts[step] = PartAccount(counted, stored, self._gate_of(totals))
        if self.is_limited:
            account.check_whole = lambda: self.check(totals.spent)
        return account

    def part_of(self, step: str) -> PartAccount | None:
        """The account that was made for the step and is not counted yet."""
        return self._parts.get(step)

    def part_counted(self, step: str) -> None:
        """What runs inside the step have taken is in the run's totals now."""
        self._parts.pop(step, None)

    def open(self, step: str, key: str, totals: Any, given: Callable[[], Any] | None = None) -> None:
        """A visit of the step ``step`` begins; ``totals`` is what has the run's ``spent``, and ``given`` says what the
        step is given: its input and the state."""
        if self.session is None and not self.is_limited:
            return
        journal = StepJournal(step, key, spent=self._left.pop(step, NOTHING))
        if self.session is not None:
            config = self.session.config
            journal.store = self.session
            journal.must_load = self.session.has_journal(step)
            journal.keep_on_retry = config.keep_journal_on_retry
            journal.sleep_in_process_seconds = config.sleep_in_process_seconds
            journal.counted = journal.last = self.session.journal_counted.get(step, 0)
            if given is not None:
                journal.given = _Given(given)
                journal.rewound = self.session.rewound
                journal.unsure = journal.rewound or self.session.has_uncommitted
                if journal.unsure:
                    journal.given()  # now, before the step can change it
        journal.before_model = self._gate_of(totals)
        self._open[step] = _Open(journal)

    def attach(self, step: str, ctx: NodeContext) -> NodeContext:
        """Give the context of the next attempt its journal; the same context."""
        found = self._open.get(step)
        if found is None:
            return ctx
        found.attempt = AttemptJournal(found.journal)
        ctx.journal, found.number = found.attempt, ctx.attempt
        if ctx.llm is not None:
            ctx.llm = found.llm = JournaledLLM(ctx.llm, found.attempt, found.journal.before_model)
        return ctx

    def llm_of(self, step: str, otherwise: Any) -> Any:
        """The model as the step's last attempt had it, for the way on from there."""
        found = self._open.get(step)
        return found.llm if found is not None and found.attempt is not None else otherwise

    def attempt_of(self, step: str) -> int:
        """The number of the step's last attempt, from 1."""
        found = self._open.get(step)
        return found.number if found is not None else 1

    def take_problems(self, step: str) -> list[str]:
        """What the journal has to tell of the step."""
        found = self._open.get(step)
        return found.attempt.take_problems() if found is not None and found.attempt is not None else []

    def counted(self, step: str, *, failed: bool = False) -> None:
        """What the visit has spent is in the run's totals now; of one that ``failed`` its record counts all calls."""
        found = self._open.get(step)
        if found is not None:
            found.journal.spent = NOTHING
            if failed:
                found.journal.counted = found.journal.last

    def counting(self, step: str) -> dict[str, Any]:
        """What the record of a failed attempt of the step says besides: up to which call it counts what calls took, and
        as of ``unpriced``."""
        found = self._open.get(step)
        counted = found.journal.counted if found is not None else 0
        return ({"journaled": [step, counted]} if counted else {}) | self.unpriced()

    async def afresh(self, step: str, llm: Any, visit: Any) -> Any:
        """The model for the way on from a step that failed, in a journal that begins afresh; ``None`` without one.

        Of a node that succeeded itself the journal becomes as that of any failed attempt first."""
        found = self._open.get(step)
        if found is None or found.attempt is None:
            return None
        if visit.result.success:
            await found.attempt.failed()
        if llm is None:
            return None
        found.attempt = AttemptJournal(found.journal)
        await found.attempt.begin()
        found.journal.spent += visit.last  # which the run's totals take up together with what this way takes
        return JournaledLLM(llm, found.attempt, found.journal.before_model)

    def close(self, step: str, *, finished: bool) -> None:
        """The visit is over. One that is not ``finished`` has spent what a later one will count."""
        found = self._open.pop(step, None)
        if found is None:
            return
        if found.attempt is not None:
            found.attempt.close()
        if not finished and found.journal.spent is not NOTHING:
            self._left[step] = found.journal.spent


class _Given:
    """The hash of what a step is given, made when it is first asked for and then kept. One is made for each visit."""

    __slots__ = ("_given", "_hash")

    def __init__(self, given: Callable[[], Any]) -> None:
        self._given: Callable[[], Any] | None = given
        self._hash = ""

    def __call__(self) -> str:
        if self._given is not None:
            self._hash = _hash_of(self._given)
            self._given = None
        return self._hash


def _hash_of(given: Callable[[], Any]) -> str:
    try:
        return request_hash(given(), "given")
    except UnstorableValue:  # which is equal to nothing else
        return uuid.uuid4().hex
