"""The pure planner of plans: what is ready, what is blocked, how a plan stands, and what makes two plans the same."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from framework.graph.plan import ActionSpec, ActionType, ExecutionStatus, Plan, PlanStep, StepStatus
from framework.graph.plan_planner import (
    blocked_by_rejection,
    canonical,
    cut_off,
    dependents,
    describe_changes,
    fingerprint,
    problems_of,
    problems_of_names,
    ranks,
    ready_steps,
    request_id,
    standstill,
)


def step(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    action = ActionSpec(action_type=ActionType.FUNCTION, function_name="f")
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def plan(*steps: PlanStep) -> Plan:
    return Plan(id="p", goal_id="g", description="", steps=list(steps))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans without circles, listed in any order."""
    count = draw(st.integers(0, 9))
    steps = [
        step(f"s{n}", *draw(st.sets(st.sampled_from([f"s{i}" for i in range(n)])) if n else st.just(set())))
        for n in range(count)
    ]
    return plan(*draw(st.permutations(steps)))


@given(plans())
def test_the_order_is_that_of_running_one_step_at_a_time(work: Plan) -> None:
    order = ranks(work)
    ran = []
    while ready := ready_steps(work):
        ready[0].status = StepStatus.COMPLETED
        ran.append(ready[0].id)
    assert work.is_complete()
    assert sorted(order, key=lambda step_id: order[step_id]) == ran
    assert standstill(work).status is ExecutionStatus.COMPLETED


@given(plans(), st.data())
def test_a_rejection_blocks_exactly_what_needs_it(work: Plan, data: st.DataObject) -> None:
    if not work.steps:
        return
    rejected = data.draw(st.sampled_from(work.steps))
    rejected.status = StepStatus.REJECTED
    blocked = blocked_by_rejection(work)
    assert blocked == dependents(work, rejected.id)
    for each in blocked:
        each.status = StepStatus.SKIPPED
    while ready := ready_steps(work):
        ready[0].status = StepStatus.COMPLETED
    assert all(each.status is not StepStatus.PENDING for each in work.steps)
    assert standstill(work).status is ExecutionStatus.REJECTED


@given(plans())
def test_the_identity_does_not_depend_on_wording_budgets_and_standing(work: Plan) -> None:
    before = canonical(work)
    again = Plan.from_json(work.model_dump_json())
    for each in again.steps:
        each.description, each.max_retries, each.status, each.result = "other", 9, StepStatus.COMPLETED, {"x": 1}
    assert canonical(again) == before
    assert fingerprint(canonical(again)) == fingerprint(before)
    assert describe_changes(before, canonical(again)) == []


def test_changes_are_told_step_by_step() -> None:
    old = plan(step("a"), step("b", "a"), step("c"))
    new = plan(step("a"), step("b"), step("d"))
    new.steps[0].action.function_args = {"x": 1}
    assert describe_changes(canonical(old), canonical(new)) == [
        "step 'a': function_args None -> {'x': 1}",
        "step 'b': dependencies ['a'] -> None",
        "step 'c' was removed",
        "step 'd' was added",
    ]
    assert describe_changes(canonical(old), canonical(plan(*reversed(old.steps)))) == ["the order of the steps changed"]
    many = describe_changes(canonical(plan()), canonical(plan(*(step(f"s{n}") for n in range(40)))))
    assert many[-1] == "... and 10 more"


def test_steps_of_earlier_revisions_count_as_done() -> None:
    work = plan(step("b", "a"))
    assert ready_steps(work) == []
    assert standstill(work).status is ExecutionStatus.NEEDS_REPLAN
    assert ready_steps(work, {"a"}) == work.steps


def test_impossible_ids() -> None:
    assert problems_of(plan(step("a"), step("b"))) == []
    assert len(problems_of(plan(step("a"), step("a"), step(""), step("x\x00"), step("y" * 300)))) == 4


def test_a_request_is_bound_to_step_revision_arguments_and_asking() -> None:
    base = (step("a"), 1, b"{}", 0)
    ids = {
        request_id(*base),
        request_id(step("b"), 1, b"{}", 0),
        request_id(step("a", expected_outputs=["x"]), 1, b"{}", 0),
        request_id(step("a"), 2, b"{}", 0),
        request_id(step("a"), 1, b'{"x":1}', 0),
        request_id(step("a"), 1, b"{}", 1),
    }
    assert len(ids) == 6
    assert request_id(*base) == request_id(step("a"), 1, b"{}", 0)


def test_what_a_crash_may_have_cut_off_are_the_first_that_may_run_at_once() -> None:
    work = plan(step("done", status=StepStatus.COMPLETED), step("a"), step("ask"), step("b", "done"), step("c", "a"))
    assert cut_off(work, 1, ()) == ["a"]
    assert cut_off(work, 2, {"ask"}) == ["a"], "one that waits holds its place"
    assert cut_off(work, 9, {"ask"}) == ["a", "b"]
    assert cut_off(work, 9, (), {"nothing"}) == ["a", "ask", "b"]


def test_names_that_are_no_texts_are_found() -> None:
    assert problems_of_names({"a": {1: 2}}, "here") == []
    assert problems_of_names([1], "here") == []
    [line] = problems_of_names({"a": 1, (1, 2): 3}, "the context")
    assert line == "the context: the name (1, 2) is a tuple, not a text; write '(1, 2)'"
    work = plan(step("a", status=StepStatus.COMPLETED, result={"x": 1}), step("b"))
    work.context = {"a": {4: 5}, "b": {6: 7}, 8: 9}  # type: ignore[dict-item]
    work.steps[1].inputs = {None: 1}  # type: ignore[dict-item]
    assert [line.partition(" is a")[0] for line in problems_of(work)] == [
        "the plan's context: the name 8",
        "the outputs of step 'a': the name 4",
        "the inputs of step 'b': the name None",
    ]
