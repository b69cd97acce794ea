"""What a view says of the runs of plans: their steps, the approvals they wait for, and what a resume would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.plan import ActionSpec, ApprovalDecision, ApprovalResult, Plan, PlanStep
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.sqlite import SQLiteStorage
from tests.graph.executor_kit import GOAL, MinimalRuntime
from tests.graph.run_view_kit import RUN_ID, by_key, checked, standings


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    opened: Storage = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "runs.db")
    with opened:
        yield opened


def step(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    arguments = {"x": fields.pop("x", step_id)}
    action = ActionSpec.model_validate({"action_type": "function", "function_name": "work", "function_args": arguments})
    return PlanStep(id=step_id, description=f"the {step_id}", action=action, dependencies=list(needs), **fields)


def plan(*steps: PlanStep) -> Plan:
    return Plan(id="p", goal_id="g", description="d", steps=list(steps))


def campaign() -> Plan:
    return plan(
        step("draft", expected_outputs=["draft"]),
        step("publish", "draft", x="$draft", requires_approval=True, approval_message="publish it?"),
        step("tell", "publish"),
        step("archive", "draft"),
    )


def executor_over(storage: Storage, work: Any = lambda x=None: x) -> FlexibleGraphExecutor:
    executor = FlexibleGraphExecutor(
        MinimalRuntime(),
        config=ExecutorConfig(retry_delay_seconds=0, max_retries_per_step=2),
        checkpoint_manager=CheckpointManager(storage, CheckpointConfig(retention_strategy="all")),
    )
    executor.register_function("work", work)
    return executor


async def test_a_plan_that_waits_for_an_approval(storage: Storage) -> None:
    await executor_over(storage).execute_plan(campaign(), GOAL, run_id=RUN_ID)
    view = checked(storage)
    assert (view.kind, view.state, view.definition_id, view.revision) == ("plan", RunState.PAUSED, "p", 1)
    # With one step at a time, one that waits for its answer keeps the others from overtaking it.
    assert standings(view) == {"draft": "done", "publish": "waiting", "tell": "later", "archive": "next"}
    assert [(each.kind, each.step, each.question) for each in view.resume.waiting] == [
        ("approval", "publish", "publish it?")
    ]
    request = (await executor_over(storage).pending_approvals(RUN_ID))[0]
    assert view.resume.waiting[0].request_id == request.request_id
    assert view.resume.kept == ("draft",)
    assert by_key(view)["tell"].needs == ("publish",)
    assert by_key(view)["draft"].description == "the draft"


async def test_an_answer_given_from_outside_lets_the_step_run_next(storage: Storage) -> None:
    executor = executor_over(storage)
    await executor.execute_plan(campaign(), GOAL, run_id=RUN_ID)
    await executor.answer_approval(RUN_ID, "publish", ApprovalResult(decision=ApprovalDecision.APPROVE))
    view = checked(storage)
    assert standings(view)["publish"] == "next"
    assert (view.resume.waiting, view.resume.verdict) == ((), "goes_on")
    await executor.execute_plan(None, GOAL, run_id=RUN_ID)
    view = checked(storage)
    assert set(standings(view).values()) == {"done"}
    assert view.resume.verdict == "nothing"


async def test_a_rejected_step_and_what_needs_it(storage: Storage) -> None:
    executor = executor_over(storage)
    await executor.execute_plan(campaign(), GOAL, run_id=RUN_ID)
    await executor.answer_approval(RUN_ID, "publish", ApprovalResult(decision=ApprovalDecision.REJECT, reason="no"))
    await executor.execute_plan(None, GOAL, run_id=RUN_ID)
    assert standings(checked(storage)) == {
        "draft": "done",
        "publish": "rejected",
        "tell": "skipped",
        "archive": "done",
    }


async def test_a_failed_step_shows_its_attempts_and_is_tried_afresh(storage: Storage) -> None:
    def work(x: Any = None) -> Any:
        if x == "bad":
            raise ConnectionError("the line is down")
        return x

    await executor_over(storage, work).execute_plan(plan(step("good"), step("bad", "good")), GOAL, run_id=RUN_ID)
    view = checked(storage)
    assert view.state is RunState.FAILED
    bad = by_key(view)["bad"]
    assert (bad.status, bad.attempts) == ("failed", 2)
    assert "the line is down" in (bad.error or "")
    assert [(each.step, each.certain) for each in view.resume.again] == [("bad", True)]
    assert view.resume.kept == ("good",)


async def test_a_changed_plan_is_told_with_its_difference(storage: Storage) -> None:
    await executor_over(storage).execute_plan(campaign(), GOAL, run_id=RUN_ID)
    changed = campaign()
    changed.steps.append(step("more", "archive"))
    view = checked(storage, definition=changed)
    assert view.resume.verdict == "refused"
    assert any("more" in line for line in view.resume.changes)
    assert checked(storage, definition=campaign()).resume.changes == ()


async def test_a_plan_whose_values_this_program_cannot_rebuild_is_shown_all_the_same(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.storage import codec

    class Money:
        pass

    codec.register(Money, name="tests.Money", to_plain=lambda value: {"cents": 5}, from_plain=lambda plain: Money())
    work = {"draft": Money()}
    await executor_over(storage, lambda x=None: work.get(x, x)).execute_plan(campaign(), GOAL, run_id=RUN_ID)
    monkeypatch.delitem(codec._by_name, "tests.Money")
    view = checked(storage)
    assert standings(view)["draft"] == "done"
    assert [each.step for each in view.resume.waiting] == ["publish"]
    assert any("tests.Money" in line for line in view.not_rebuilt)
    assert next(each.type for each in view.state_keys if each.key == "draft") == "Money"
