"""What passes the approval gate: what was shown, while the run goes on, on an answer that can be used."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.errors import ApprovalError
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.plan import (
    ActionSpec,
    ApprovalRequest,
    ApprovalResult,
    ExecutionStatus,
    Judgment,
    JudgmentAction,
    PlanStep,
    StepStatus,
)
from framework.graph.plan_planner import canonical, request_id
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from tests.plans.gate_kit import GOAL, Bench, answer, plan, step


@pytest.mark.parametrize("kind", ["function", "tool_use"])
@pytest.mark.parametrize(
    ("args", "inputs"),
    [({"to": "bob", "cc": "$to"}, {}), ({"x": "$missing"}, {"x": 1}), ({"x": 1}, {"x": 2}), ({}, {"x": "$who"})],
)
async def test_what_is_shown_is_what_is_called(kind: str, args: dict[str, Any], inputs: dict[str, Any]) -> None:
    bench = Bench().always(answer("approve"))
    if kind == "function":
        bench.functions()
    result = await bench.executor.execute_plan(
        plan(step("a", args, inputs=inputs, kind=kind)), GOAL, {"to": "alice", "who": "carol"}
    )
    assert result.status is ExecutionStatus.COMPLETED
    shown = bench.asked[0].action_details["function_args" if kind == "function" else "tool_args"]
    assert bench.calls == [shown]


@pytest.mark.parametrize("durable", [False, True])
async def test_a_step_nobody_can_be_asked_about_is_not_run(durable: bool) -> None:
    bench = Bench(durable=durable).functions().always(answer("approve"))
    the_plan = plan(step("a", {"x": "$missing"}))
    result = await bench.executor.execute_plan(the_plan, GOAL, run_id="r" if durable else None)
    assert (result.status, bench.calls, bench.asked) == (ExecutionStatus.NEEDS_REPLAN, [], [])
    assert the_plan.steps[0].status is StepStatus.FAILED
    assert "$missing" in str(the_plan.steps[0].error)


async def test_a_custom_worker_is_not_reached_by_a_step_nobody_was_asked_about() -> None:
    bench = Bench()
    worker = MagicMock()
    bench.executor.worker = worker
    await bench.executor.execute_plan(plan(step("a", {"x": "$missing"})), GOAL)
    worker.execute.assert_not_called()


@pytest.mark.parametrize("durable", [False, True])
async def test_nothing_runs_after_an_abort(durable: bool) -> None:
    bench = Bench(durable=durable, concurrency=2).functions()
    aborted = asyncio.Event()

    async def callback(request: ApprovalRequest) -> ApprovalResult:
        if request.step_id == "a":
            return answer("abort")
        await aborted.wait()
        return answer("approve")

    bench.executor.set_approval_callback(callback)
    asyncio.get_running_loop().call_later(0.1, aborted.set)
    the_plan = plan(step("a", {"pay": 1}), step("b", {"pay": 2}))
    result = await bench.executor.execute_plan(the_plan, GOAL, run_id="r" if durable else None)
    assert (result.status, bench.calls) == (ExecutionStatus.ABORTED, [])
    assert [each.status for each in the_plan.steps] == [StepStatus.PENDING, StepStatus.PENDING]
    assert the_plan.steps[1].attempts == 0
    if durable:  # the answer that came too late is kept: only the aborted step is asked about again
        bench.always(answer("approve"))
        result = await bench.executor.execute_plan(None, GOAL, run_id="r")
        assert result.status is ExecutionStatus.COMPLETED
        assert [request.step_id for request in bench.asked] == ["a"]


BAD = [
    {"tool_args": "oops"},
    {"function_args": None},
    {"inputs": [1]},
    {"inputs": {1: 2}},
    {"prompt": 5},
    {"colour": "red"},
    {"inputs": {"x": object()}},
]


@pytest.mark.parametrize("changes", BAD)
async def test_an_unusable_answer_is_refused_and_another_taken(changes: dict[str, Any]) -> None:
    bench = Bench(durable=True).functions()
    await bench.executor.execute_plan(plan(step("a", {"x": 1})), GOAL, run_id="r")
    with pytest.raises(ApprovalError, match="Nothing was stored"):
        await bench.executor.answer_approval("r", "a", answer("modify", modifications=changes))
    await bench.executor.answer_approval("r", "a", answer("approve"))
    result = await bench.executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, bench.calls) == (ExecutionStatus.COMPLETED, [{"x": 1}])


@pytest.mark.parametrize("changes", BAD)
async def test_an_unusable_answer_of_a_callback_fails_the_step(changes: dict[str, Any]) -> None:
    bench = Bench(durable=True).functions().always(answer("modify", modifications=changes))
    the_plan = plan(step("a", {"x": 1}))
    result = await bench.executor.execute_plan(the_plan, GOAL, run_id="r")
    assert bench.calls == []
    assert result.status in (ExecutionStatus.NEEDS_REPLAN, ExecutionStatus.NEEDS_ESCALATION)
    assert "unusable" in str(the_plan.steps[0].error)


_IDENTITY = """
from tests.plans.gate_kit import plan, step
from framework.graph.plan_planner import canonical, fingerprint, request_id
a = step("a", {"x": {"alpha", "beta", "gamma", "delta"}, "y": {(1, 2): 3, "z": 4}})
print(fingerprint(canonical(plan(a))), request_id(a, 1, b"", 0))
"""


def test_what_an_answer_is_bound_to_is_the_same_in_every_process() -> None:
    found = set()
    for seed in ("1", "2", "3"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", _IDENTITY], env=env, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_a_plan_that_no_store_takes_has_an_identity_too() -> None:
    given = step("a", {"x": {(1, 2): object()}})
    assert canonical(plan(given)) == canonical(plan(given))
    assert request_id(given, 1, b"", 0) != request_id(step("a"), 1, b"", 0)


@pytest.mark.parametrize("kind", ["function", "tool_use"])
async def test_a_modified_argument_wins_over_an_input(kind: str) -> None:
    name = "function_args" if kind == "function" else "tool_args"
    bench = Bench().always(answer("modify", modifications={name: {"to": "carol"}}))
    if kind == "function":
        bench.functions()
    the_plan = plan(step("a", {"to": "bob"}, inputs={"to": "alice", "amount": 1}, kind=kind))
    await bench.executor.execute_plan(the_plan, GOAL)
    assert bench.calls == [{"to": "carol", "amount": 1}]
    assert the_plan.steps[0].inputs == {"to": "alice", "amount": 1}


class EscalatesOnce:
    def __init__(self) -> None:
        self.judged = 0

    async def evaluate(self, *_: Any, **__: Any) -> Judgment:
        self.judged += 1
        action = JudgmentAction.ESCALATE if self.judged == 1 else JudgmentAction.ACCEPT
        return Judgment(action=action, reasoning="look at it")


class FailsOnce(EscalatesOnce):
    async def evaluate(self, *_: Any, **__: Any) -> Judgment:
        self.judged += 1
        if self.judged == 1:
            raise RuntimeError("no judge")
        return Judgment(action=JudgmentAction.ACCEPT, reasoning="fine")


@pytest.mark.parametrize("judge", [EscalatesOnce, FailsOnce])
async def test_an_answer_is_used_up_by_the_execution(judge: type[EscalatesOnce]) -> None:
    bench = Bench(durable=True, judge=judge()).functions()
    await bench.executor.execute_plan(plan(step("a", {"pay": 1})), GOAL, run_id="r")
    await bench.executor.answer_approval("r", "a", answer("approve"))
    await bench.executor.execute_plan(None, GOAL, run_id="r")
    assert len(bench.calls) == 1
    result = await bench.executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, len(bench.calls)) == (ExecutionStatus.AWAITING_APPROVAL, 1)
    await bench.executor.answer_approval("r", "a", answer("approve"))
    result = await bench.executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, len(bench.calls)) == (ExecutionStatus.COMPLETED, 2)


@pytest.mark.parametrize(
    ("kind", "changes", "taken"),
    [
        ("function", {"tool_args": {"x": 2}}, "inputs and function_args"),
        ("tool_use", {"function_args": {"x": 2}}, "inputs and tool_args"),
        ("function", {"prompt": "please"}, "inputs and function_args"),
        ("function", {"inputs": {"x": 2}, "code": "x = 1"}, "inputs and function_args"),
    ],
)
@pytest.mark.parametrize("by_callback", [False, True])
async def test_only_what_the_step_takes_can_be_modified(
    kind: str, changes: dict[str, Any], taken: str, by_callback: bool
) -> None:
    bench = Bench(durable=True).functions()
    the_plan = plan(step("a", {"x": 1}, kind=kind))
    if by_callback:
        bench.always(answer("modify", modifications=changes))
        result = await bench.executor.execute_plan(the_plan, GOAL, run_id="r")
        assert result.status is ExecutionStatus.NEEDS_REPLAN
        assert f"only {taken}" in str(the_plan.steps[0].error)
    else:
        await bench.executor.execute_plan(the_plan, GOAL, run_id="r")
        with pytest.raises(ApprovalError, match=f"only {taken}"):
            await bench.executor.answer_approval("r", "a", answer("modify", modifications=changes))
        assert len(await bench.executor.pending_approvals("r")) == 1
    assert bench.calls == []


async def test_a_prompt_can_be_modified_where_there_is_one() -> None:
    prompts: list[str] = []

    def model(messages: Any, system: Any, tools: Any) -> str:
        prompts.append(messages[0]["content"])
        return "fine"

    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), llm=ScriptedLLM(model))
    executor.set_approval_callback(lambda request: answer("modify", modifications={"prompt": "write less"}))
    action = ActionSpec.model_validate({"action_type": "llm_call", "prompt": "write"})
    asking = PlanStep(id="a", description="", action=action, requires_approval=True)
    assert (await executor.execute_plan(plan(asking), GOAL)).status is ExecutionStatus.COMPLETED
    assert prompts == ["write less"]


async def test_a_decision_that_is_none_is_no_abort() -> None:
    unchecked: Any = {"decision": "approve", "modifications": {}}
    bench = Bench().functions().always(ApprovalResult.model_construct(**unchecked))
    the_plan = plan(step("a", {"x": 1}))
    result = await bench.executor.execute_plan(the_plan, GOAL)
    assert (result.status, bench.calls) == (ExecutionStatus.NEEDS_REPLAN, [])
    assert "not an ApprovalDecision" in str(the_plan.steps[0].error)


@pytest.mark.parametrize(
    ("code", "names", "status"),
    [
        ("import os", None, ExecutionStatus.NEEDS_ESCALATION),
        ("x = (", None, ExecutionStatus.NEEDS_REPLAN),
        ("x = hash(1)", {"len"}, ExecutionStatus.NEEDS_ESCALATION),
    ],
)
async def test_nobody_is_asked_about_code_that_will_be_refused(
    code: str, names: set[str] | None, status: ExecutionStatus
) -> None:
    bench = Bench().always(answer("approve"))
    bench.executor.worker.resources.sandbox = CodeSandbox(safe_builtins=names)
    action = ActionSpec.model_validate({"action_type": "code_execution", "code": code})
    the_plan = plan(PlanStep(id="c", description="", action=action, requires_approval=True))
    result = await bench.executor.execute_plan(the_plan, GOAL)
    assert (result.status, bench.asked) == (status, [])
    assert "Refused, so nobody was asked" in str(the_plan.steps[0].error)
