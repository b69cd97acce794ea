"""The journals of a plan's steps in flight: what one attempt asks models and tools, and what its judge asks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from framework.errors import UnstorableValue
from framework.graph.budget import PartAccount, RunBudget
from framework.graph.goal import Goal
from framework.graph.journal import AttemptJournal, CallSpec, in_thread, request_hash
from framework.graph.journal_llm import JournaledLLM
from framework.graph.judge import HybridJudge
from framework.graph.plan import Judgment, PlanStep
from framework.graph.plan_outcomes import positive, spent_on
from framework.graph.run_journals import RunJournals
from framework.graph.run_opening import Restored
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Waiting
from framework.graph.worker_actions import StepExecutionResult
from framework.llm.tool_loop import is_async

# A judge is shown how long the work took, which is never the same twice: a question is the same without it.
_LATENCY = re.compile(r'("latency_ms": )\d+')


@dataclass(slots=True)
class PlanJournals(RunJournals):
    """The journals of one plan's steps in flight, by the keys of their visits. Without a session or a budget no step
    has one."""

    def attempt(self, key: str, idempotency_key: str, totals: Any) -> AttemptJournal | None:
        """The journal of the next attempt of the step's visit ``key``; ``totals`` is what has the run's ``spent``."""
        if key not in self._open:
            self.open(key, idempotency_key, totals, lambda: dict(totals.state.memory.view()))
        found = self._open.get(key)
        if found is None:
            return None
        found.attempt = AttemptJournal(found.journal)
        return found.attempt

    def only_of(self, unfinished: Iterable[str]) -> None:
        """Journals that were kept of other visits than these are only to be read: totals count what they spent."""
        if self.session is not None and self.session.config.keep_journal:
            self.forget(set(self._left) - set(unfinished))


class _JudgeModel(JournaledLLM):
    """The judge's model in an attempt's journal."""

    def _request(self, asked: Mapping[str, Any], way: str) -> str:
        messages = [_without_latency(message) for message in asked["messages"]]
        return super()._request({**asked, "messages": messages, "judges": True}, way)


def _without_latency(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _LATENCY.sub(r"\1", content)} if isinstance(content, str) else dict(message)


def journaled_judge(judge: Any, attempt: AttemptJournal | None) -> Any:
    """``judge`` as it judges one attempt: a ``HybridJudge`` asks its model through the attempt's journal, and of any
    other judge each judgement is a call, whatever it asks. A ``HybridJudge`` without a model asks nothing."""
    kind = type(judge)
    if attempt is None:
        return judge
    if not issubclass(kind, HybridJudge) or (judge.llm is None and kind.evaluate is not HybridJudge.evaluate):
        return _JournaledJudge(judge, attempt) if attempt.records else judge
    if judge.llm is None:
        return judge
    model = _JudgeModel(judge.llm, attempt, attempt.of.before_model)
    # Its own state, all of it and shared, since it may judge other steps at the same time; only the model differs. A
    # property of the class comes before what the object holds.
    view: Any = object.__new__(type(kind.__name__, (kind,), {"llm": property(lambda self: model)}))
    view.__dict__ = judge.__dict__
    return view


class _JournaledJudge:
    """A judge of a program's own, each of whose judgements is a call of the attempt's journal."""

    def __init__(self, judge: Any, attempt: AttemptJournal) -> None:
        self._judge = judge
        self._attempt = attempt

    async def evaluate(
        self, step: PlanStep, result: Mapping[str, Any], goal: Goal, context: Mapping[str, Any]
    ) -> Judgment:
        """What the judge says; what it is asked may be what has no stored form: then it is asked, and not recorded."""

        async def make(key: str) -> Judgment:
            evaluate = self._judge.evaluate
            if is_async(evaluate):
                judgment = await evaluate(step, result, goal, context)
            else:
                judgment = await in_thread(evaluate, step, result, goal, context)
                judgment = await judgment if inspect.isawaitable(judgment) else judgment
            if not isinstance(judgment, Judgment):
                raise TypeError(f"it returned {type(judgment).__name__}, not a Judgment")
            return judgment

        asked = step.model_dump(mode="json", exclude={"started_at", "completed_at"})
        seen = {name: value for name, value in result.items() if name != "latency_ms"}
        try:
            request = request_hash([asked, seen, goal.id, dict(context)], "the judge is asked")
        except UnstorableValue:
            return await make("")
        return await self._attempt.call("judge", request, make, _JUDGED)


def _spent_on(judgment: Judgment) -> Spent:
    tokens, cost = spent_on(judgment)
    return Spent(tokens, 0, 0, cost) if tokens or cost else NOTHING


_JUDGED = CallSpec(
    to_plain=lambda judgment: judgment.model_dump(mode="json"), from_plain=Judgment.model_validate, spent=_spent_on
)


def with_spent(result: StepExecutionResult, attempt: AttemptJournal) -> StepExecutionResult:
    """The result with the tokens and dollars that it reports, but at least its attempt's questions to models, each
    counted once: with ``keep_journal_on_retry`` one may have been counted in an earlier attempt."""
    spent = attempt.of_attempt(Spent(result.tokens_used, 0, 0, result.cost))
    if (spent.tokens, spent.cost) == (result.tokens_used, result.cost):
        return result
    return replace(result, tokens_used=spent.tokens, cost=spent.cost)


def with_part(result: StepExecutionResult, part: PartAccount) -> StepExecutionResult:
    """The result with at least what the runs inside have taken: of one that was cut off nobody else tells."""
    taken = part.uncounted
    if taken.tokens <= result.tokens_used and taken.cost <= positive(result.cost):
        return result
    tokens, cost = max(result.tokens_used, taken.tokens), max(float(positive(result.cost)), taken.cost)
    return replace(result, tokens_used=tokens, cost=cost)


def waiting_for(held: Mapping[str, Collection[Waiting]]) -> str:
    """What held steps wait for, by step id: calls that a person has to settle, and what runs of sub-graphs wait for."""
    waits = [(step, each) for step, listed in held.items() for each in listed]
    texts = [f"Step {step!r}: run {each.run!r} {each.text}" for step, each in waits if each.run]
    own = [each for _, each in waits if not each.run]
    if own:
        calls = ", ".join(repr(each.call) for each in own)
        whats = "; ".join(each.question or each.text for each in own)
        how = "CheckpointManager.settle: done, redo or skip"
        texts.insert(0, f"Waiting for call {calls} to be settled ({how}): {whats}")
    return ". ".join(texts)


def recorded_budget(found: Restored | None) -> RunBudget | None:
    """The budget that the run was last given."""
    if found is None:
        return None
    given = [found.header.get("budget"), *(each.get("budget") for each in (*found.records, *found.later))]
    last = next((plain for plain in reversed(given) if plain is not None), None)
    return RunBudget.from_json(last) if last is not None else None
