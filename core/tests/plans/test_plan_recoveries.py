"""Plans whose process ends without a word again and again: what is counted, and when the run is given up."""

from __future__ import annotations

import asyncio
from typing import Any

from framework.graph.plan import ExecutionStatus, Plan, PlanStep
from framework.schemas.run import RunState
from tests.plans.plan_kit import GOAL, Places, plan, step


def crash(places: Places) -> None:
    """Leave the run as a process does that ends without a word."""
    run = places.store.claim_run("r", "somebody", 30, lambda owner: False)
    places.store.release_lease("r", run.token)
    found = places.store.find_run("r")
    assert found is not None
    assert found.state is RunState.CRASHED


async def hang(places: Places, work: Plan | None, end: str = "crash", **settings: Any) -> None:
    """A process that ends while the function ``hang`` of the plan runs."""
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    executor = places.process(**settings)
    executor.register_function("hang", hang)
    task = asyncio.create_task(executor.execute_plan(work, GOAL, run_id="r"))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done(), task.result()
    if end == "crash":
        crash(places)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def hanging(*others: PlanStep) -> Plan:
    return plan(step("h", call="hang"), *others)


async def test_crashes_in_a_row_are_counted_and_end_the_run(places: Places) -> None:
    work = hanging(step("z", args={"x": 9}))
    for _ in range(3):
        await hang(places, work, max_recovery_attempts=2)
    result = await places.process(max_recovery_attempts=2).execute_plan(None, GOAL, run_id="r")
    assert result.status is ExecutionStatus.FAILED
    assert "3 times in a row" in str(result.error)
    assert "'h'" in str(result.error)
    assert (result.attempts_interrupted, result.steps_executed) == (3, 0)
    assert (await places.process().stored_steps("r"))["h"].model_dump()["interrupted"] == 3
    for _ in range(2):  # called again, the count begins anew
        await hang(places, None, max_recovery_attempts=2)
    executor = places.process(max_recovery_attempts=2)
    executor.register_function("hang", lambda: 1)
    done = await executor.execute_plan(None, GOAL, run_id="r")
    assert (done.status, done.attempts_interrupted) == (ExecutionStatus.COMPLETED, 5)
    assert (await places.process().execute_plan(None, GOAL, run_id="r")).attempts_interrupted == 5


async def test_whatever_is_committed_between_crashes_is_progress(places: Places) -> None:
    """A judged attempt is, too, though it is no checkpoint."""
    work = plan(step("a", args={"x": "bad"}, max_retries=9), step("h", "a", call="hang"))
    places.broken = {"bad"}
    for turn in range(4):
        executor = places.process(max_recovery_attempts=1, retry_delay_seconds=1000.0)
        failed = asyncio.Event()
        executor.runtime.report_problem.side_effect = lambda failed=failed, **_: failed.set()
        task = asyncio.create_task(executor.execute_plan(work if turn == 0 else None, GOAL, run_id="r"))
        await failed.wait()
        while len(places.store.read_log("r")) < 2 * turn + 1:
            await asyncio.sleep(0)
        crash(places)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    places.broken = set()
    executor = places.process(max_recovery_attempts=1)
    executor.register_function("hang", lambda: 1)
    assert (await executor.execute_plan(None, GOAL, run_id="r")).status is ExecutionStatus.COMPLETED
    assert places.calls == ["bad"] * 5


async def test_cut_off_attempts_count_against_the_limit_of_all(places: Places) -> None:
    for _ in range(2):
        await hang(places, hanging(), max_total_steps=2)
    result = await places.process(max_total_steps=2).execute_plan(None, GOAL, run_id="r")
    assert result.status is ExecutionStatus.FAILED
    assert "max_total_steps=2 attempts (2 of them cut off by crashes)" in str(result.error)


async def test_a_cancellation_is_no_crash(places: Places) -> None:
    for _ in range(3):
        await hang(places, hanging(), end="cancel", max_recovery_attempts=0, max_total_steps=1)
    executor = places.process(max_recovery_attempts=0, max_total_steps=1)
    executor.register_function("hang", lambda: 1)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, result.attempts_interrupted) == (ExecutionStatus.COMPLETED, 0)


async def test_steps_that_wait_for_a_person_are_not_cut_off(places: Places) -> None:
    work = plan(step("ask", requires_approval=True), step("h", call="hang"), step("z"))
    await hang(places, work, max_concurrency=2)
    executor = places.process(max_concurrency=2)
    executor.register_function("hang", lambda: 1)
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert {key: each.model_dump()["interrupted"] for key, each in (await executor.stored_steps("r")).items()} == {
        "ask": 0,
        "h": 1,
        "z": 0,
    }
