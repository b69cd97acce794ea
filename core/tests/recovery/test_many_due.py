"""Runs that are due and that nobody here can resume, however many there are, hide none that can be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from framework.graph import recovery
from framework.graph.recovery import recoverable_runs, woken_runs
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.contract_journal import pause
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from tests.plans.parts_kit import House, plan_of

MANY = 60


class Counting(MemoryStorage):
    """Counts what is asked of it."""

    asked = 0

    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        self.asked += 1
        return super().list_due(now, limit, after)

    def list_runs(
        self, states: Sequence[RunState] | None = None, *, limit: int = 100, before: RunRecord | None = None
    ) -> list[RunRecord]:
        self.asked += 1
        return super().list_runs(states, limit=limit, before=before)

    def find_run(self, run_id: str) -> RunRecord | None:
        self.asked += 1
        return super().find_run(run_id)

    def due(self, run_id: str, at: float, **fields: Any) -> None:
        self.open_run(new_run(run_id, **fields), "me", 60)
        accept(self, pause(run_id, at))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_PAGE", 10)
    monkeypatch.setattr(recovery, "_MOST_WOKEN", 20)
    monkeypatch.setattr(recovery, "_MOST_ASKED_FOR", 5)


def is_mine(run: RunRecord) -> bool:
    return run.run_id.startswith("mine")


def test_due_runs_of_a_program_that_is_down_hide_none_of_another() -> None:
    store = Counting()
    for number in range(MANY):
        store.due(f"down-{number}", number)
    store.due("mine-2", MANY + 2)
    store.due("mine-1", MANY + 1)
    assert {run.run_id for run in woken_runs(store, is_ours=is_mine)} == {"mine-1", "mine-2"}
    assert {run.run_id for run in recoverable_runs(store, is_ours=is_mine)} == {"mine-1", "mine-2"}


def test_a_look_takes_the_longest_due_and_reads_no_further() -> None:
    store = Counting()
    for number in range(MANY):
        store.due(f"mine-{number:02}", 1000.0 - number)
    found = {run.run_id for run in woken_runs(store, is_ours=is_mine)}
    assert found == {f"mine-{number}" for number in range(MANY - 20, MANY)}
    assert store.asked == 2


def test_parts_that_nobody_waits_for_hide_no_run_and_cost_a_few_queries() -> None:
    store = Counting()
    for number in range(MANY):
        store.open_run(new_run(f"plan-{number}"), "me", 60)
        accept(store, commit(1, f"plan-{number}", 1, state=RunState.FAILED, release=True))
        store.due(f"plan-{number}/nap#1", number, parent_run_id=f"plan-{number}")
    store.due("mine", MANY)
    store.asked = 0
    assert [run.run_id for run in woken_runs(store)] == ["mine"]
    pages = MANY // 10 + 1
    assert store.asked <= 2 * pages + 5, "not one for each part"


async def test_a_plan_is_woken_by_its_part_beside_those_that_failed_plans_left() -> None:
    later = [0.0]
    house = House(Counting(clock=lambda: time.time() + later[0]), concurrency=2)

    async def nap(ctx: Any) -> int:
        await ctx.sleep(3600)
        return 1

    house.graph("nap", nap)
    await house.run(plan_of("nap"))
    for number in range(7):
        store: Any = house.store
        store.open_run(new_run(f"p{number}"), "me", 60)
        accept(store, commit(1, f"p{number}", 1, state=RunState.FAILED, release=True))
        store.due(f"p{number}/nap#1", 1.0, parent_run_id=f"p{number}")
    assert house.woken() == []
    later[0] = 7200.0
    assert "r/nap#1" in [run.run_id for run in house.store.list_due()]
    assert house.woken() == ["r"]
