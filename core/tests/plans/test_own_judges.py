"""A judge of a program's own is asked once for one result, however often the process ends after it has answered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.graph.journal import AttemptJournal, StepJournal
from framework.graph.plan import ActionSpec, Judgment, JudgmentAction, PlanStep
from framework.graph.plan_journals import journaled_judge
from tests.journal.journal_kit import Rows
from tests.plans.plan_kit import GOAL


class Own:
    def __init__(self) -> None:
        self.asked = 0

    def evaluate(self, step: Any, result: Any, goal: Any, context: Any) -> Judgment:
        self.asked += 1
        return Judgment(action=JudgmentAction.RETRY, reasoning=f"asked {self.asked} times")


class OwnAsync(Own):
    async def evaluate(self, step: Any, result: Any, goal: Any, context: Any) -> Judgment:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().evaluate(step, result, goal, context)


@pytest.mark.parametrize("kind", [Own, OwnAsync])
async def test_its_judgement_is_recorded_and_answered_again(kind: type[Own]) -> None:
    judge, rows = kind(), Rows()
    step = PlanStep(id="s", description="s", action=ActionSpec.model_validate({"action_type": "tool_use"}))
    said = []
    for latency in (3, 700):
        journal = AttemptJournal(StepJournal("s#1", "r/s", rows, must_load=True))
        await journal.begin()
        result = {"success": True, "outputs": {"x": 1}, "latency_ms": latency}
        said.append(await journaled_judge(judge, journal).evaluate(step, result, GOAL, {"a": 1}))
    assert said[0] == said[1]
    assert judge.asked == 1
