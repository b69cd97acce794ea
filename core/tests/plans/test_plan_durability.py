"""Durable plans: resumed from the store alone, revised with finished work kept, limits that survive, small rows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.errors import DefinitionChanged, LeaseLost, ResumeError, RunBusy, RunNotFound, StorageError
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.plan import (
    ExecutionStatus,
    Judgment,
    JudgmentAction,
    Plan,
    PlanExecutionResult,
    PlanStep,
    StepStatus,
)
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from framework.storage import codec
from tests.plans.plan_kit import GOAL, Places, chain, plan, step


async def test_a_run_is_started_resumed_and_returned_by_the_same_call(places: Places) -> None:
    places.broken = {3}
    result = await places.process().execute_plan(chain(), GOAL, {"k": [1]}, run_id="r")
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert places.calls == [1, 1, 3, 3, 3]
    assert result.checkpoint_id is not None
    places.broken = set()
    work = chain()
    again = await places.process().execute_plan(work, GOAL, {"k": [1]}, run_id="r")
    assert again.status is ExecutionStatus.COMPLETED
    assert places.calls == [1, 1, 3, 3, 3, 3], "finished steps do not run again"
    assert again.results == {"k": [1], "result": 3, "one": 1, "two": 1}
    assert (again.run_id, again.steps_recovered, again.resumed_from) == ("r", 2, result.checkpoint_id)
    assert again.completed_steps == ["a", "b", "c"]
    assert work.context == {"a": {"result": 1, "one": 1}, "b": {"result": 1, "two": 1}, "c": {"result": 3}}
    assert work.steps[0].result == {"result": 1}
    stored = await places.process().execute_plan(chain(), GOAL, run_id="r")
    assert (stored.status, stored.results, stored.completed_steps) == (
        again.status,
        again.results,
        again.completed_steps,
    )
    assert stored.steps_executed == again.steps_executed == 6
    assert len(places.calls) == 6


async def test_the_plan_may_come_from_the_store(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    stored = await places.process().stored_plan("r")
    assert [each.status.value for each in stored.steps] == ["completed", "completed", "failed"]
    assert "no 3" in str(stored.steps[2].error)
    assert stored.steps[2].attempts == 3
    places.broken = set()
    result = await places.process().execute_plan(None, GOAL, run_id="r")
    assert (result.status, places.calls[-1]) == (ExecutionStatus.COMPLETED, 3)
    with pytest.raises(RunNotFound):
        await places.process().execute_plan(None, GOAL, run_id="other")
    with pytest.raises(ValueError, match="run_id"):
        await places.process().execute_plan(None, GOAL)


async def test_a_changed_plan_is_refused_with_what_changed(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    changed = plan(*chain().steps[:2], step("d", "b", args={"x": 4}))
    with pytest.raises(DefinitionChanged, match="step 'c' was removed") as refused:
        await places.process().execute_plan(changed, GOAL, run_id="r")
    assert refused.value.changes == ["step 'c' was removed", "step 'd' was added"]
    assert "replan=True" in str(refused.value)
    found = places.store.find_run("r")
    assert found is not None
    assert (found.state, found.owner) == (RunState.FAILED, None), "a refused call leaves the run as it was"


async def test_a_new_revision_keeps_finished_steps_that_did_not_change(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    revised = plan(
        step("a", args={"x": 1}, expected_outputs=["one"]),
        step("b", "a", args={"x": 22}, expected_outputs=["two"]),
        step("d", "b", args={"x": "$two"}, expected_outputs=["four"]),
        context={"hint": "new"},
    )
    places.calls.clear()
    result = await places.process().execute_plan(revised, GOAL, run_id="r", replan=True)
    assert result.status is ExecutionStatus.COMPLETED
    assert places.calls == [22, 22], "b changed and runs again, a did not"
    assert result.results == {"hint": "new", "one": 1, "two": 22, "four": 22, "result": 22}
    assert (result.revision, revised.revision) == (2, 2)
    with pytest.raises(ResumeError, match="completed"):
        await places.process().execute_plan(chain(), GOAL, run_id="r", replan=True)
    for work in (None, revised, chain()):
        again = await places.process().execute_plan(work, GOAL, run_id="r")
        assert (again.results, again.revision, again.completed_steps) == (result.results, 2, ["a", "b", "d"])
    other = chain()
    other.id = "another plan"
    with pytest.raises(DefinitionChanged):
        await places.process().execute_plan(other, GOAL, run_id="r")


async def test_a_revised_plan_is_the_one_a_later_process_finds(places: Places) -> None:
    places.broken = {3, 4}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    second = plan(*chain().steps[:2], step("d", "b", args={"x": 4}))
    result = await places.process().execute_plan(second, GOAL, run_id="r", replan=True)
    assert result.feedback_context["revision"] == 2
    with pytest.raises(DefinitionChanged, match="step 'd' was removed"):
        await places.process().execute_plan(chain(), GOAL, run_id="r")
    places.broken = set()
    assert (await places.process().execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert places.calls[-1] == 4


async def test_the_idempotency_key_is_that_of_the_step_not_of_the_revision(places: Places) -> None:
    keys: list[str] = []

    def work(idempotency_key: str, x: Any = None) -> Any:
        keys.append(idempotency_key)
        if x == "fail":
            raise RuntimeError("no")
        return x

    def process() -> FlexibleGraphExecutor:
        executor = places.process()
        executor.register_function("work", work)
        return executor

    same, changed = step("a", args={"x": "fail"}, max_retries=2), step("b", args={"x": 1})
    await process().execute_plan(plan(changed, same), GOAL, run_id="r")
    changed.action.function_args = {"x": 2}
    await process().execute_plan(plan(changed, same), GOAL, run_id="r", replan=True)
    assert keys == ["r/b", "r/a", "r/a", "r/b#2", "r/a", "r/a"]
    back = plan(step("c"), step("a", args={"x": 0}))
    await process().execute_plan(back, GOAL, run_id="r", replan=True)
    assert keys[6:] == ["r/c", "r/a#2"]


async def test_a_step_that_was_removed_and_comes_back_runs_again(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    without = plan(step("x", args={"x": 3}))
    await places.process().execute_plan(without, GOAL, run_id="r", replan=True)
    places.broken = set()
    places.calls.clear()
    back = plan(step("a", args={"x": 100}), step("y", "b"))
    result = await places.process().execute_plan(back, GOAL, run_id="r", replan=True)
    assert (result.status, result.revision, places.calls) == (ExecutionStatus.COMPLETED, 3, [100, None])


async def test_everything_about_a_step_is_kept(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    steps = await places.process().stored_steps("r")
    assert list(steps) == ["a", "b", "c"]
    kept = steps["c"].model_dump()
    assert (kept["status"], kept["attempts"], kept["revision"]) == ("failed", 3, 1)
    assert kept["judgment"]["rule_matched"] == "max_retries_fail"
    assert "no 3" in kept["feedback"]
    assert steps["a"].model_dump()["completed_at"] is not None


async def test_a_run_taken_over_meanwhile_is_left_to_its_new_owner(places: Places) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> int:
        started.set()
        await go_on.wait()
        return 1

    executor = places.process()
    executor.register_function("wait", wait)
    task = asyncio.create_task(executor.execute_plan(plan(step("a", call="wait")), GOAL, run_id="r"))
    await started.wait()
    places.store.claim_run("r", "somebody else", 30, lambda owner: False)
    go_on.set()
    with pytest.raises(LeaseLost):
        await task
    assert places.store.read_log("r") == []
    executor.runtime.end_run.assert_not_called()


async def test_a_new_revision_may_build_on_steps_it_no_longer_lists(places: Places) -> None:
    places.broken = {3}
    await places.process().execute_plan(chain(), GOAL, run_id="r")
    rest = plan(step("d", "b", args={"x": "$a.one"}))
    result = await places.process().execute_plan(rest, GOAL, run_id="r", replan=True)
    assert (result.status, places.calls[-1]) == (ExecutionStatus.COMPLETED, 1)
    assert rest.context["a"] == {"result": 1, "one": 1}


async def test_retry_budgets_and_feedback_survive_a_crash(places: Places) -> None:
    """The first process is gone after its second attempt; the next one has one left."""
    seen: list[tuple[int, str | None]] = []
    gate = asyncio.Event()

    async def flaky(feedback: str | None) -> None:
        seen.append((len(seen) + 1, feedback))
        if len(seen) == 3:
            gate.set()
            await asyncio.Event().wait()
        raise RuntimeError(f"failure {len(seen)}")

    def work() -> Plan:
        return plan(step("a", call="flaky", max_retries=4))

    first = places.process()
    first.register_function("flaky", flaky)
    task = asyncio.create_task(first.execute_plan(work(), GOAL, run_id="r"))
    await gate.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    second = places.process()
    second.register_function("flaky", flaky)
    result = await second.execute_plan(work(), GOAL, run_id="r")
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert seen == [(1, None), (2, "failure 1"), (3, "failure 2"), (4, "failure 2"), (5, "failure 4")]
    assert result.steps_executed == 4, "the attempt in flight is counted once"


async def test_the_total_limit_survives(places: Places) -> None:
    places.broken = {1}
    for _ in range(2):
        result = await places.process(max_total_steps=2).execute_plan(chain(), GOAL, run_id="r")
        assert result.status is ExecutionStatus.FAILED
        assert "max_total_steps=2" in str(result.error)
    assert places.calls == [1, 1]
    places.broken = set()
    assert (await places.process().execute_plan(chain(), GOAL, run_id="r")).status is ExecutionStatus.COMPLETED


async def test_new_context_is_written_over_the_old(places: Places) -> None:
    def work() -> Plan:
        return plan(step("a", args={"x": "$n"}), step("b", "a", args={"x": "$m"}))

    result = await places.process().execute_plan(work(), GOAL, {"n": 1}, run_id="r")
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "$m" in str(result.feedback)
    result = await places.process().execute_plan(work(), GOAL, {"n": 1, "m": 2}, run_id="r")
    assert (result.status, places.calls) == (ExecutionStatus.COMPLETED, [1, 2])


async def test_outputs_that_cannot_be_stored_fail_their_step(places: Places) -> None:
    executor = places.process()
    executor.register_function("odd", lambda: {"made": object()})
    result = await executor.execute_plan(
        plan(step("a", expected_outputs=["n"]), step("b", "a", call="odd")), GOAL, run_id="r"
    )
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "state.result.made" in str(result.feedback)
    assert result.results == {"result": None, "n": None}
    executor = places.process()
    executor.register_function("odd", lambda: {"made": 1})
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert result.results == {"result": {"made": 1}, "n": None}


async def test_one_owner_at_a_time(places: Places) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> int:
        started.set()
        await go_on.wait()
        return 1

    first = places.process()
    first.register_function("wait", wait)
    task = asyncio.create_task(first.execute_plan(plan(step("a", call="wait")), GOAL, run_id="r"))
    await started.wait()
    with pytest.raises(RunBusy):
        await places.process().execute_plan(None, GOAL, run_id="r")
    go_on.set()
    assert (await task).status is ExecutionStatus.COMPLETED


async def test_the_run_of_a_graph_is_no_plan(places: Places) -> None:
    executor = places.process()
    graph = GraphSpec(id="x", goal_id="g", entry_node="n", nodes=[NodeSpec(id="n", node_type="human_input")])
    await GraphExecutor(MagicMock(spec=Runtime), checkpoint_manager=executor.checkpoint_manager).execute(
        graph, GOAL, run_id="graph"
    )
    with pytest.raises(ResumeError, match="not the run of a plan"):
        await executor.execute_plan(chain(), GOAL, run_id="graph")


async def test_what_cannot_be_stored_at_the_start_is_a_failed_result(places: Places) -> None:
    result = await places.process().execute_plan(chain(), GOAL, {"client": object()}, run_id="r")
    assert result.status is ExecutionStatus.FAILED
    assert "state.client" in str(result.error)
    assert places.store.find_run("r") is None


@pytest.mark.parametrize(
    "config", [{"durability": "async"}, {"durability": "exit"}, {"save_frequency": "every_n_nodes", "n_nodes": 2}]
)
async def test_fewer_commits_come_to_the_same(places: Places, config: dict[str, Any]) -> None:
    result = await places.process(config).execute_plan(chain(), GOAL, run_id="r")
    assert result.status is ExecutionStatus.COMPLETED
    stored = await places.process(config).execute_plan(None, GOAL, run_id="r")
    assert stored.results == result.results
    assert stored.completed_steps == ["a", "b", "c"]


async def test_steps_that_were_not_committed_run_again(places: Places) -> None:
    config = {"save_frequency": "every_n_nodes", "n_nodes": 2}
    started = asyncio.Event()

    async def wait() -> int:
        started.set()
        await asyncio.Event().wait()
        return 1

    first = places.process(config)
    first.register_function("wait", wait)
    work = [step("a", args={"x": 1}), step("b", args={"x": 2}), step("c", args={"x": 3}), step("d", call="wait")]
    task = asyncio.create_task(first.execute_plan(plan(*work), GOAL, run_id="r"))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    second = places.process(config)
    second.register_function("wait", lambda: 4)
    result = await second.execute_plan(None, GOAL, run_id="r")
    assert result.status is ExecutionStatus.COMPLETED
    assert result.completed_steps == ["a", "b", "c", "d"]
    assert places.calls[:3] == [1, 2, 3]


async def test_rows_do_not_grow_with_results_or_history(places: Places) -> None:
    count = 40
    work = plan(
        *(step(f"s{n:02}", args={"x": "y" * 20_000 + str(n)}, expected_outputs=[f"o{n}"]) for n in range(count))
    )
    config = {"retention_strategy": "all"}
    result = await places.process(config).execute_plan(work, GOAL, run_id="r")
    assert result.status is ExecutionStatus.COMPLETED
    rows = list(places.store.read_checkpoint_rows("r"))
    assert len(rows) == count
    assert max(len(row.body) for row in rows) < min(len(row.body) for row in rows) + 100 < 700
    chunks = places.store.read_chunks("r", rows[0].sequence)
    stored = sum(len(chunk.data) for chunk in chunks)
    definition = count * 20_000  # the plan holds the arguments
    assert stored < definition + 3 * count * 20_000
    assert [row.sequence for row in rows] == sorted((row.sequence for row in rows), reverse=True)


async def test_a_failed_run_resumes_without_steps_in_flight_lost(places: Places) -> None:
    """Two run at once and one fails: what the other one finished is kept."""
    places.broken = {"bad"}
    work = plan(step("good", args={"x": "good"}), step("bad", args={"x": "bad"}), step("end", "good", "bad"))
    result = await places.process(max_concurrency=2).execute_plan(work, GOAL, run_id="r")
    assert (result.status, result.completed_steps) == (ExecutionStatus.NEEDS_REPLAN, ["good"])
    places.broken = set()
    places.calls.clear()
    again: PlanExecutionResult = await places.process(max_concurrency=2).execute_plan(None, GOAL, run_id="r")
    assert again.status is ExecutionStatus.COMPLETED
    assert places.calls == ["bad", None]
    assert work.steps[0].status is StepStatus.COMPLETED


async def test_disabled_checkpointing_writes_nothing(places: Places) -> None:
    executor = places.process({"enabled": False})
    assert (await executor.execute_plan(chain(), GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert places.store.find_run("r") is None


async def test_a_run_without_a_name_gets_one_and_can_be_resumed_by_it(places: Places, tmp_path: Path) -> None:
    executor = places.process()
    executor.runtime = Runtime(tmp_path / "records")
    places.broken = {3}
    result = await executor.execute_plan(chain(), GOAL)
    assert str(result.run_id).startswith("run_")
    places.broken = set()
    again = await places.process().execute_plan(None, GOAL, run_id=result.run_id)
    assert (again.status, again.steps_recovered) == (ExecutionStatus.COMPLETED, 2)


@pytest.mark.parametrize("policy", ["stop", "continue"])
async def test_a_commit_that_fails(places: Places, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    executor = places.process({"on_commit_error": policy})
    commit, calls = places.store.commit, 0

    def failing(commits: Any) -> Any:
        nonlocal calls
        calls += 1
        return [StorageError("disk full")] * len(commits) if calls == 2 else commit(commits)

    monkeypatch.setattr(places.store, "commit", failing)
    result = await executor.execute_plan(chain(), GOAL, run_id="r")
    if policy == "stop":
        assert result.status is ExecutionStatus.FAILED
        assert "disk full" in str(result.error)
        assert places.calls == [1, 1]
        result = await places.process().execute_plan(None, GOAL, run_id="r")
        assert places.calls == [1, 1, 1, 3], "the step whose commit failed runs again"
    assert result.status is ExecutionStatus.COMPLETED
    stored = await places.process().execute_plan(None, GOAL, run_id="r")
    assert stored.results == result.results == {"result": 3, "one": 1, "two": 1}
    assert stored.completed_steps == ["a", "b", "c"]


# --- what else a run has --------------------------------------------------------------------------------------------


async def test_metadata_is_recorded_with_the_run(places: Places) -> None:
    await places.process().execute_plan(chain(), GOAL, run_id="r", metadata={"agent_name": "rivers", "mock": True})
    found = places.store.find_run("r")
    assert found is not None
    assert codec.decode(found.header)["metadata"] == {"agent_name": "rivers", "mock": True}
    refused = await places.process().execute_plan(chain(), GOAL, run_id="s", metadata={"x": object()})
    assert refused.status is ExecutionStatus.FAILED
    assert "metadata.x" in str(refused.error)


async def test_tokens_of_the_judge_are_durable(places: Places) -> None:
    class Counts:
        async def evaluate(self, step: PlanStep, result: Any, goal: Goal, context: Any = None) -> Judgment:
            action = JudgmentAction.RETRY if step.attempts == 1 else JudgmentAction.ACCEPT
            return Judgment(action=action, reasoning="counted", context={"tokens_used": 10 * step.attempts})

    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    executor = places.process()
    executor.judge = Counts()
    executor.register_function("hang", forever)
    task = asyncio.create_task(executor.execute_plan(plan(step("a"), step("h", call="hang")), GOAL, run_id="r"))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    executor = places.process()
    executor.register_function("hang", lambda: 1)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, result.total_tokens) == (ExecutionStatus.COMPLETED, 30)
    assert (await executor.stored_steps("r"))["a"].tokens == 30


async def test_a_run_is_cancelled_from_outside(places: Places) -> None:
    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    executor = places.process()
    executor.register_function("hang", forever)
    task = asyncio.create_task(executor.execute_plan(plan(step("h", call="hang")), GOAL, run_id="r"))
    await started.wait()
    other = places.process()
    assert other.checkpoint_manager is not None
    assert await asyncio.to_thread(other.checkpoint_manager.cancel, "r") is False
    result = await asyncio.wait_for(task, 20)
    assert (result.status, result.feedback) == (ExecutionStatus.ABORTED, "cancelled on request")
    found = places.store.find_run("r")
    assert found is not None
    assert (found.state, found.owner) == (RunState.CANCELLED, None)
    executor.register_function("hang", lambda: 1)
    assert (await executor.execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
