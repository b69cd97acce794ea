"""A process that lost its run does not write the run's document over that of the new owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult
from framework.graph.plan import ActionSpec, ActionType, ExecutionStatus, Plan, PlanStep
from framework.runtime import Runtime
from framework.schemas.run import Run, RunStatus
from framework.storage.backend import Storage
from framework.storage.contract import new_run
from framework.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

RUN_ID = "run-1"


def document(storage: Storage) -> Run:
    """The run's document, which must be there."""
    found = storage.load_run(RUN_ID)
    assert found is not None
    return found


class Seen:
    """Tells with which tokens documents are saved, by status."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saved: list[tuple[str, int]] = []
        save = storage.save_run

        def seen(run: Run, token: int = 0) -> None:
            self.saved.append((run.status.value, token))
            save(run, token)

        monkeypatch.setattr(storage, "save_run", seen)


async def test_a_late_end_of_a_failed_run_leaves_the_document_of_who_completed_it(
    agent: Agent, agent_over: type[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = agent.storage
    assert storage is not None
    agent.runtime = Runtime(storage)
    agent.node("a", lambda ctx: NodeResult(False, error="down"))
    other = agent_over(storage)
    other.runtime = Runtime(storage)
    other.node("a", lambda ctx: {"done": True})
    save = storage.save_run
    late: list[Run] = []

    def stalls(run: Run, token: int = 0) -> None:
        if run.status is RunStatus.FAILED and not late:
            # The run has failed and is released; this process stands still until somebody else has completed it.
            late.append(run)
            assert asyncio.run(other.run()).success
            assert document(storage).status is RunStatus.COMPLETED
        save(run, token)

    monkeypatch.setattr(storage, "save_run", stalls)
    result = await agent.run()
    assert not result.success
    assert [run.status for run in late] == [RunStatus.FAILED]
    assert document(storage).status is RunStatus.COMPLETED
    assert storage.get_runs_by_status("failed") == []


@pytest.mark.parametrize("known", [True, False], ids=["same store", "another store"])
def test_a_late_start_leaves_the_document_of_who_followed(
    storage: Storage, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The save at the start is made in a thread, while the run goes on: it may come after another owner's last."""
    if known:
        storage.open_run(new_run(RUN_ID), "first", 60)
        storage.release_lease(RUN_ID, 1)
        storage.claim_run(RUN_ID, "second", 60)
    first, second = Runtime(storage), Runtime(storage)
    saves: list[Callable[[], None]] = []
    with first.deferring_saves(saves):
        first.start_run("goal", run_id=RUN_ID)
    first.fence_run(RUN_ID, 1)
    second.start_run("goal", run_id=RUN_ID)
    second.fence_run(RUN_ID, 2)
    second.end_run(True, "all done", run_id=RUN_ID)
    with caplog.at_level("WARNING", logger="framework"):
        for save in saves:
            save()
    refused = [record.getMessage() for record in caplog.records if "another owner" in record.getMessage()]
    assert len(refused) == known
    # A store that knows of no lease has nobody to ask.
    assert document(storage).status is (RunStatus.COMPLETED if known else RunStatus.RUNNING)


def test_a_run_that_is_not_active_is_not_fenced(caplog: pytest.LogCaptureFixture) -> None:
    with MemoryStorage() as storage, caplog.at_level("WARNING", logger="framework"):
        Runtime(storage).fence_run(RUN_ID, 1)
    assert "fence_run: run 'run-1' is not active here" in caplog.text


@pytest.mark.parametrize("run_id", [RUN_ID, None], ids=["named", "unnamed"])
async def test_every_document_of_a_graph_run_is_saved_with_its_token(
    quick: Agent, run_id: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick.storage is not None
    seen = Seen(quick.storage, monkeypatch)
    quick.runtime = Runtime(quick.storage)
    failing = [True]

    def once(ctx: NodeContext) -> NodeResult:
        return NodeResult(not failing.pop() if failing else True, error="down")

    quick.node("a", once)
    first = await quick.run(run_id=run_id)
    # A run that the runtime names has a record before it has an owner.
    assert seen.saved == [("running", 0 if run_id is None else 1), ("failed", 1)]
    seen.saved.clear()
    assert (await quick.run(run_id=first.run_id)).success
    assert seen.saved == [("running", 2), ("completed", 2)]


async def test_every_document_of_a_plan_run_is_saved_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    action = ActionSpec(action_type=ActionType.FUNCTION, function_name="work")
    steps = [PlanStep(id="a", description="a", action=action, expected_outputs=["out"])]
    goal = Goal(id="goal", name="Goal", description="Reach the end.")
    with MemoryStorage() as storage:
        seen = Seen(storage, monkeypatch)
        for expected in ("failed", "completed"):
            executor = FlexibleGraphExecutor(
                Runtime(storage),
                functions={"work": partial(int, "1" if expected == "completed" else "none")},
                checkpoint_manager=CheckpointManager(storage),
            )
            plan = Plan(id="plan", goal_id="goal", description="one step", steps=steps, context={})
            result = await executor.execute_plan(plan, goal, {}, run_id=RUN_ID)
            assert (result.status is ExecutionStatus.COMPLETED) == (expected == "completed"), result
        assert [token for _, token in seen.saved] == [1, 1, 2, 2]
        assert document(storage).status is RunStatus.COMPLETED
