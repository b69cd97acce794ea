"""What a run keeps of the steps in flight: their journals, what they wait for, and what is left of the run's budget."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.errors import UnstorableValue
from framework.graph.budget import BudgetGate, RunBudget
from framework.graph.journal import AttemptJournal, StepJournal, request_hash
from framework.graph.journal_llm import JournaledLLM
from framework.graph.node_base import NodeContext
from framework.graph.run_session import RunSession
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Waiting, wake_at


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
    counts yet.
    """

    run_id: str
    session: RunSession | None
    budget: RunBudget | None = None
    _open: dict[str, _Open] = field(default_factory=dict)
    _left: dict[str, Spent] = field(default_factory=dict)
    _gate: BudgetGate | None = None

    def __post_init__(self) -> None:
        if self.session is not None:
            self._left = self.session.journal_spent

    @property
    def unfinished(self) -> Spent:
        """What steps that are not finished have spent."""
        total = NOTHING
        for spent in (*self._left.values(), *(each.journal.spent for each in tuple(self._open.values()))):
            total += spent
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

    def open(self, step: str, key: str, totals: Any, given: Callable[[], Any] | None = None) -> None:
        """A visit of the step ``step`` begins; ``totals`` is what has the run's ``spent``, and ``given`` says what the
        step is given: its input and the state."""
        if self.session is None and self.budget is None:
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
        if self.budget is not None:
            if self._gate is None:
                self._gate = BudgetGate(self.run_id, self.budget, lambda: totals.spent + self.unfinished)
            journal.before_model = self._gate
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
        """What the record of a failed attempt of the step says besides: up to which call it counts what calls took."""
        found = self._open.get(step)
        return {"journaled": [step, found.journal.counted]} if found is not None and found.journal.counted else {}

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


@dataclass(slots=True)
class Waits:
    """What held steps wait for, by step key; those that wait for a person's input only are not in it."""

    by_step: dict[str, tuple[Waiting, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a run's position."""
        return {step: [each.to_json() for each in waits] for step, waits in self.by_step.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Waits:
        """What ``to_json`` wrote."""
        return cls({step: tuple(map(Waiting.from_json, waits)) for step, waits in plain.items()})

    async def over(self, session: RunSession) -> list[str]:
        """The steps that can go on: something that they wait for is over. In order of their keys."""
        if not self.by_step:
            return []
        messages = {message.name for message in await session.messages()}
        now = time.time()
        return sorted(
            step for step, waits in self.by_step.items() if any(each.is_over(messages, now) for each in waits)
        )

    async def woken(self, session: RunSession, held: Collection[str]) -> list[str]:
        """Those of the ``held`` steps that can go on, now or so soon that the process stays and sleeps until then."""
        over = [step for step in await self.over(session) if step in held]
        due = self.wake_at(held)
        if over or not self.is_due_soon(session, due):
            return over
        assert due is not None
        await asyncio.sleep(max(0.0, due - time.time()))
        return [step for step in await self.over(session) if step in held]

    @staticmethod
    def is_due_soon(session: RunSession, due: float | None) -> bool:
        """Whether a run that is ``due`` then need not pause for it."""
        return due is not None and due - time.time() <= session.config.sleep_in_process_seconds

    def wake_at(self, held: Iterable[str]) -> float | None:
        """When a run that holds these steps is due: the earliest time of all that they wait for, ``None`` without any.

        Others of them may wait for a person; what is due goes on without."""
        return wake_at(each for step in held for each in self.by_step.get(step, ()))
