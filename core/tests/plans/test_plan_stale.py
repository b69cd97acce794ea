"""Kept results that are made from what a new revision of the plan has changed or dropped."""

from __future__ import annotations

from framework.graph.plan import ActionSpec, ExecutionStatus, Plan, PlanStep
from tests.plans.plan_kit import GOAL, Places, plan, step


def sources(rate: int = 1) -> Plan:
    """``by_id``, ``by_name`` and ``by_code`` are made from ``a``, no dependency of theirs, and ``far`` from that."""
    code = ActionSpec.model_validate({"action_type": "code_execution", "code": "total = one + 1"})
    return plan(
        step("a", args={"x": rate}, expected_outputs=["one"]),
        step("other", args={"x": 5}, expected_outputs=["five"]),
        step("by_id", args={"x": "$a.one"}, expected_outputs=["by_id_out"]),
        step("by_name", inputs={"x": "$one"}),
        PlanStep(id="by_code", description="", action=code),
        step("far", args={"x": "$by_id_out"}),
        step("apart", "other", args={"x": "$five"}),
        step("given", args={"x": "$hint"}),
        step("bad", args={"x": "bad"}, max_retries=1),
        context={"hint": 1},
    )


async def test_kept_results_made_from_what_changed_are_listed(places: Places) -> None:
    places.broken = {"bad"}
    first = await places.process().execute_plan(sources(), GOAL, run_id="r")
    assert (len(first.completed_steps), first.stale_steps) == (8, [])
    executor = places.process()
    result = await executor.execute_plan(sources(2), GOAL, run_id="r", replan=True)
    stale = ["by_id", "by_name", "by_code", "far"]
    assert result.stale_steps == stale
    assert "'by_id', 'by_name', 'by_code', 'far'" in str(executor.runtime.report_problem.call_args_list)
    again = await places.process().execute_plan(None, GOAL, run_id="r")
    assert again.stale_steps == stale, "it holds over restarts"
    steps = await places.process().stored_steps("r")
    assert [key for key, each in steps.items() if each.model_dump()["stale"]] == stale
    # A step that runs again is not stale, what was made from it is; another context counts as well.
    revised = sources(2)
    revised.steps[2].action.function_args = {"x": "$a.result"}
    revised.context["hint"] = 2
    result = await places.process().execute_plan(revised, GOAL, run_id="r", replan=True)
    assert result.stale_steps == ["by_name", "by_code", "far", "given"]
    places.broken = set()
    done = await places.process().execute_plan(None, GOAL, run_id="r")
    assert done.status is ExecutionStatus.COMPLETED
    assert done.stale_steps == (await places.process().execute_plan(None, GOAL, run_id="r")).stale_steps
    assert done.stale_steps == ["by_name", "by_code", "far", "given"]


async def test_a_dependency_that_was_dropped_makes_stale_too(places: Places) -> None:
    places.broken = {3}
    work = plan(step("a"), step("b", "a"), step("c", "b"), step("d"), step("x", args={"x": 3}, max_retries=1))
    await places.process().execute_plan(work, GOAL, run_id="r")
    rest = plan(step("b", "a"), step("c", "b"), step("d"))
    result = await places.process().execute_plan(rest, GOAL, run_id="r", replan=True)
    assert (result.status, result.stale_steps) == (ExecutionStatus.COMPLETED, ["b", "c"])
    assert len(places.calls) == 5, "nothing ran again"
