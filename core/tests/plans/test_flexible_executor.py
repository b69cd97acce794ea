"""Plans without a checkpoint manager: what each ending looks like, and that no file is written."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor, execute_plan
from framework.graph.goal import Goal
from framework.graph.judge import HybridJudge
from framework.graph.plan import (
    ActionSpec,
    ApprovalDecision,
    ApprovalRequest,
    ApprovalResult,
    EvaluationRule,
    ExecutionStatus,
    Judgment,
    JudgmentAction,
    Plan,
    PlanExecutionResult,
    PlanStep,
    StepStatus,
)
from framework.graph.worker_actions import StepExecutionResult
from framework.llm.provider import LLMResponse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

GOAL = Goal(id="g", name="G", description="d")
AT_ONCE = {"retry_delay_seconds": 0.0}


def step(step_id: str, *needs: str, call: str = "work", **fields: Any) -> PlanStep:
    args = fields.pop("args", {})
    action = ActionSpec.model_validate({"action_type": "function", "function_name": call, "function_args": args})
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def plan(*steps: PlanStep, **fields: Any) -> Plan:
    return Plan(id="p", goal_id="g", description="d", steps=list(steps), **fields)


class Bench:
    """An executor over a mock runtime, whose function ``work`` notes each call."""

    def __init__(self, **config: Any) -> None:
        self.calls: list[Any] = []
        self.runtime = MagicMock(spec=Runtime)
        self.runtime.start_run.return_value = "run_1"
        settings = ExecutorConfig(**{**AT_ONCE, **config})
        self.executor = FlexibleGraphExecutor(self.runtime, config=settings)
        self.executor.register_function("work", self.work)
        self.executor.register_function("fail", self.fail)

    def work(self, x: Any = None) -> Any:
        self.calls.append(x)
        return x

    def fail(self, x: Any = None) -> Any:
        self.calls.append(x)
        raise RuntimeError(f"no {x}")

    async def run(self, work: Plan, context: dict[str, Any] | None = None) -> PlanExecutionResult:
        result = await self.executor.execute_plan(work, GOAL, context)
        assert self.runtime.end_run.call_count == self.runtime.start_run.call_count, "every run is closed"
        return result


async def test_steps_run_in_list_order_once_their_dependencies_are_done() -> None:
    bench = Bench()
    work = plan(
        step("c", "a", "b", args={"x": "$a.result"}, expected_outputs=["end"]),
        step("b", args={"x": "bee"}),
        step("a", args={"x": "ay"}, expected_outputs=["first"]),
    )
    result = await bench.run(work, {"given": 1})
    assert result.status is ExecutionStatus.COMPLETED
    assert bench.calls == ["bee", "ay", "ay"]
    assert result.results == {"given": 1, "result": "ay", "first": "ay", "end": "ay"}
    assert result.completed_steps == ["c", "b", "a"]
    assert result.steps_executed == 3
    assert work.context == {
        "b": {"result": "bee"},
        "a": {"result": "ay", "first": "ay"},
        "c": {"result": "ay", "end": "ay"},
    }
    assert work.steps[0].result == {"result": "ay"}
    assert all(each.status is StepStatus.COMPLETED and each.completed_at for each in work.steps)
    assert bench.runtime.start_run.call_args.kwargs["input_data"] == {"plan_id": "p", "revision": 1}
    assert bench.runtime.end_run.call_args.kwargs["success"] is True


async def test_the_callers_context_is_not_changed() -> None:
    bench = Bench()
    context = {"rows": [1]}
    result = await bench.run(plan(step("a", args={"x": "$rows"}), context={"more": 2}), context)
    assert context == {"rows": [1]}
    assert result.results == {"rows": [1], "more": 2, "result": [1]}


async def test_an_empty_plan_is_complete() -> None:
    assert (await Bench().run(plan())).status is ExecutionStatus.COMPLETED


async def test_a_plan_in_progress_goes_on_with_its_outputs_under_their_names() -> None:
    bench = Bench()
    done = step("a", status=StepStatus.COMPLETED, result={"n": 5}, attempts=1)
    crashed = step("b", "a", args={"x": "$n"}, status=StepStatus.IN_PROGRESS)
    result = await bench.run(plan(done, crashed, context={"a": {"n": 5}}))
    assert (result.status, bench.calls) == (ExecutionStatus.COMPLETED, [5])
    assert result.results == {"n": 5, "result": 5}


async def test_a_failing_step_is_tried_again_and_then_sent_back_to_the_planner() -> None:
    bench = Bench()
    work = plan(step("a", call="fail", args={"x": 1}, max_retries=2), step("b", "a"), step("c", args={"x": "later"}))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert bench.calls == [1, 1], "nothing new starts once a step has failed"
    assert work.steps[0].status is StepStatus.FAILED
    assert work.steps[0].attempts == 2
    assert "no 1" in str(result.feedback)
    assert [each["id"] for each in result.feedback_context["failed_steps"]] == ["a"]
    assert work.steps[1].status is StepStatus.PENDING
    assert bench.runtime.end_run.call_args.kwargs["success"] is False


@pytest.mark.parametrize(("said", "attempts"), [({}, 4), ({"max_retries": 1}, 1), ({"max_retries": 5}, 5)])
async def test_steps_that_say_nothing_take_the_retries_of_the_configuration(
    said: dict[str, int], attempts: int
) -> None:
    bench = Bench(max_retries_per_step=4)
    await bench.run(plan(step("a", call="fail", **said)))
    assert len(bench.calls) == attempts


async def test_a_step_that_succeeds_in_its_last_attempt_is_accepted() -> None:
    bench = Bench()
    result = await bench.run(plan(step("a", max_retries=1)))
    assert result.status is ExecutionStatus.COMPLETED


async def test_feedback_of_the_judge_reaches_the_next_attempt() -> None:
    seen: list[str] = []

    def answer(messages: Any, system: Any, tools: Any) -> str:
        seen.append(messages[0]["content"])
        return "thin" if len(seen) == 1 else "long enough"

    judge = HybridJudge(
        rules=[
            EvaluationRule(
                id="short",
                description="too short",
                condition="len(result.outputs.response) < 6",
                action=JudgmentAction.RETRY,
                feedback_template="only {result[outputs][response]}, write more",
            )
        ]
    )
    runtime = MagicMock(spec=Runtime)
    config = ExecutorConfig(retry_delay_seconds=0)
    executor = FlexibleGraphExecutor(runtime, llm=ScriptedLLM(answer), judge=judge, config=config)
    work = Plan.from_json({"steps": [{"id": "a", "action": {"action_type": "llm_call", "prompt": "write"}}]})
    result = await executor.execute_plan(work, GOAL)
    assert (result.status, result.steps_executed) == (ExecutionStatus.COMPLETED, 2)
    assert "only thin, write more" not in seen[0]
    assert "only thin, write more" in seen[1]
    assert "Retry plan step a" in [call.kwargs["intent"] for call in runtime.decide.call_args_list]


async def test_refused_code_needs_a_person_and_may_run_again_later() -> None:
    bench = Bench()
    work = Plan.from_json({"steps": [{"id": "a", "action": {"action_type": "code_execution", "code": "import os"}}]})
    result = await bench.run(work)
    assert result.status is ExecutionStatus.NEEDS_ESCALATION
    assert "import" in str(result.feedback)
    assert work.steps[0].status is StepStatus.PENDING


async def test_unknown_dependencies_and_circles_are_stuck() -> None:
    result = await Bench().run(plan(step("a"), step("b", "nowhere"), step("c", "d"), step("d", "c")))
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert result.completed_steps == ["a"]
    assert "no step 'nowhere'" in str(result.feedback)
    assert "'c' needs 'd'" in str(result.feedback)


async def test_ids_that_are_not_unique_are_refused() -> None:
    result = await Bench().executor.execute_plan(plan(step("a"), step("a")), GOAL)
    assert result.status is ExecutionStatus.FAILED
    assert "'a' is used more than once" in str(result.error)


async def test_the_total_limit_is_a_failure_that_names_it() -> None:
    bench = Bench(max_total_steps=3)
    work = plan(step("a"), step("b", call="fail", max_retries=9), step("c"))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.FAILED
    assert "max_total_steps=3" in str(result.error)
    assert (result.steps_executed, result.completed_steps) == (3, ["a"])


async def test_a_step_that_takes_too_long_is_a_timeout() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    bench = Bench(timeout_seconds=0.02)
    bench.executor.register_function("forever", forever)
    result = await bench.run(plan(step("a", call="forever", max_retries=2)))
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "timed out after 0.02 s" in str(result.feedback)
    assert result.steps_executed == 2


async def test_ready_steps_run_together_up_to_the_limit() -> None:
    running = most = 0

    async def together(x: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        return x

    for limit in (1, 3):
        bench = Bench(max_concurrency=limit)
        bench.executor.register_function("together", together)
        most = 0
        work = plan(*(step(f"s{n}", call="together", args={"x": n}, expected_outputs=[f"o{n}"]) for n in range(7)))
        result = await bench.run(work)
        assert most == limit
        assert result.results == {"result": 6, **{f"o{n}": n for n in range(7)}}


async def test_the_context_does_not_depend_on_which_step_was_faster() -> None:
    async def later(x: int, turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return x

    outcomes = []
    for turns in ([0, 30, 60], [60, 30, 0], [30, 0, 60]):
        bench = Bench(max_concurrency=3)
        bench.executor.register_function("later", later)
        work = plan(*(step(f"s{n}", call="later", args={"x": n, "turns": turns[n]}) for n in range(3)))
        result = await bench.run(work)
        outcomes.append((result.results, {name: work.context[name] for name in sorted(work.context)}))
    assert outcomes == [({"result": 2}, {"s0": {"result": 0}, "s1": {"result": 1}, "s2": {"result": 2}})] * 3


async def test_when_one_fails_those_in_flight_are_finished() -> None:
    async def slow() -> str:
        for _ in range(40):
            await asyncio.sleep(0)
        return "done"

    bench = Bench(max_concurrency=2, max_retries_per_step=1)
    bench.executor.register_function("slow", slow)
    work = plan(step("slow", call="slow"), step("bad", call="fail"), step("next"))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert result.completed_steps == ["slow"]
    assert work.steps[2].status is StepStatus.PENDING


async def test_a_judge_that_raises_fails_the_run_with_what_was_done() -> None:
    bench = Bench()

    class Broken(HybridJudge):
        async def evaluate(self, step: PlanStep, *rest: Any, **more: Any) -> Any:
            if step.id == "b":
                raise RuntimeError("judge is out")
            return await HybridJudge().evaluate(step, *rest, **more)

    bench.executor.judge = Broken()
    work = plan(step("a"), step("b"))
    result = await bench.run(work)
    assert (result.status, result.completed_steps) == (ExecutionStatus.FAILED, ["a"])
    assert "judge is out" in str(result.error)
    assert work.steps[1].status is StepStatus.PENDING


async def test_a_judge_that_returns_no_judgement_fails_the_run() -> None:
    bench = Bench()
    bench.executor.judge = MagicMock()
    bench.executor.judge.evaluate = AsyncMock(return_value=None)
    result = await bench.run(plan(step("a")))
    assert (result.status, bench.calls) == (ExecutionStatus.FAILED, [None])
    assert "it returned NoneType, not a Judgment" in str(result.error)


class Judge:
    """Accepts, and says what it has used; or never comes to an end."""

    def __init__(self, tokens: Any = 0, hangs: bool = False) -> None:
        self.tokens, self.hangs = tokens, hangs

    async def evaluate(self, *_: Any, **__: Any) -> Judgment:
        if self.hangs:
            await asyncio.Event().wait()
        return Judgment(action=JudgmentAction.ACCEPT, reasoning="fine", context={"tokens_used": self.tokens})


async def test_a_judge_that_takes_too_long_is_left_to_a_person() -> None:
    bench = Bench(timeout_seconds=0.02)
    bench.executor.judge = Judge(hangs=True)
    work = plan(step("a"))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.NEEDS_ESCALATION
    assert "no judgement within 0.02 s" in str(result.feedback)
    assert work.steps[0].status is StepStatus.PENDING


@pytest.mark.parametrize(("tokens", "counted"), [(7, 7), (0, 0), (-1, 0), ("7", 0), (True, 0)])
async def test_tokens_of_the_judge_count(tokens: Any, counted: int) -> None:
    bench = Bench()
    bench.executor.judge = Judge(tokens)
    assert (await bench.run(plan(step("a"), step("b")))).total_tokens == 2 * counted


async def test_tokens_of_the_default_judge_count() -> None:
    llm = ScriptedLLM([LLMResponse("ACTION: accept\nCONFIDENCE: 1", "m", input_tokens=3, output_tokens=4)])
    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), llm=llm, judge=HybridJudge(llm))
    executor.register_function("work", lambda x=None: x)
    assert (await executor.execute_plan(plan(step("a")), GOAL)).total_tokens == 7


@pytest.mark.parametrize("durable", [False, True])
async def test_names_that_are_no_texts_are_a_failed_result(durable: bool) -> None:
    bench = Bench()
    if durable:
        bench.executor.checkpoint_manager = CheckpointManager(open_storage("memory://"))
    odd: Any = {1: "one"}
    result = await bench.executor.execute_plan(plan(step("a")), GOAL, odd)
    assert result.status is ExecutionStatus.FAILED
    assert "the context: the name 1 is a int" in str(result.error)
    work = plan(step("a"))
    work.context[2] = "two"  # type: ignore[index]
    assert "the name 2" in str((await bench.executor.execute_plan(work, GOAL)).error)
    worker = MagicMock()
    worker.execute = AsyncMock(return_value=StepExecutionResult(True, outputs={3: "three"}))  # type: ignore[dict-item]
    bench.executor.worker = worker
    result = await bench.executor.execute_plan(plan(step("a")), GOAL)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert "the outputs of step 'a': the name 3" in str(result.feedback)


async def test_what_happens_is_told_to_those_who_watch() -> None:
    runtime = Runtime(MemoryStorage())
    told: list[Any] = []
    runtime.add_listener(told.append)
    executor = FlexibleGraphExecutor(runtime, config=ExecutorConfig(retry_delay_seconds=0, max_retries_per_step=2))
    executor.checkpoint_manager = CheckpointManager(open_storage("memory://"))
    fails = [True, False, True, True]

    def flaky() -> None:
        if fails.pop(0):
            raise RuntimeError("no")

    executor.register_function("work", lambda x=None: x)
    executor.register_function("flaky", flaky)
    work = plan(step("a"), step("b", "a", call="flaky"), step("c", "b", call="flaky"))
    result = await executor.execute_plan(work, GOAL, run_id="r")
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert [(each.kind, each.node_id, each.attempt) for each in told] == [
        ("run_started", None, 0),
        ("step_started", "a", 1),
        ("step_finished", "a", 1),
        ("step_started", "b", 1),
        ("attempt_failed", "b", 1),
        ("step_finished", "b", 2),
        ("step_started", "c", 1),
        ("attempt_failed", "c", 1),
        ("step_failed", "c", 2),
        ("run_ended", None, 0),
    ]
    assert {each.run_id for each in told} == {"r"}
    assert (told[2].step, told[-1].detail) == ("a#1", "failed")
    assert "no" in told[-2].error
    assert "'c'" in told[-1].error
    told.clear()
    fails = [False]
    await executor.execute_plan(None, GOAL, run_id="r")
    assert [(each.kind, each.detail) for each in told] == [
        ("run_resumed", "2 steps recovered"),
        ("step_started", None),
        ("step_finished", None),
        ("run_ended", "completed"),
    ]


# --- approvals ------------------------------------------------------------------------------------------------------


def answers(decision: str, **fields: Any) -> ApprovalResult:
    return ApprovalResult(decision=ApprovalDecision(decision), **fields)


async def test_without_a_callback_the_plan_waits_and_goes_on_with_one() -> None:
    bench = Bench()
    work = plan(step("a", requires_approval=True, approval_message="sure?", args={"x": 1}), step("b"))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert (bench.calls, work.steps[0].status) == ([], StepStatus.AWAITING_APPROVAL)
    assert [each.approval_message for each in result.pending_approvals] == ["sure?"]
    bench.executor.set_approval_callback(lambda request: answers("approve"))
    assert (await bench.run(work)).status is ExecutionStatus.COMPLETED
    assert bench.calls == [1, None]


async def test_what_is_asked_has_the_resolved_arguments() -> None:
    bench = Bench()
    asked: list[ApprovalRequest] = []

    async def later(request: ApprovalRequest) -> ApprovalResult:
        asked.append(request)
        return answers("approve")

    bench.executor.set_approval_callback(later)
    await bench.run(plan(step("a", requires_approval=True, inputs={"x": "$who"})), {"who": "Ada"})
    assert asked[0].context == {"x": "Ada"}
    assert asked[0].action_details["function_name"] == "work"
    assert asked[0].action_type == "function"
    assert "Ada" in str(asked[0].preview)


async def test_a_modified_step_runs_as_modified_and_the_plan_stays_as_it_is() -> None:
    bench = Bench()
    bench.executor.register_function("both", lambda **kw: bench.calls.append(kw))
    changes = {"tool_args": {"b": 2}, "inputs": {"c": 3}}
    bench.executor.set_approval_callback(lambda request: answers("modify", modifications=changes))
    action = ActionSpec.model_validate({"action_type": "tool_use", "tool_name": "both", "tool_args": {"a": 1, "b": 1}})
    work = plan(PlanStep(id="a", description="", action=action, requires_approval=True))
    assert (await bench.run(work)).status is ExecutionStatus.COMPLETED
    assert bench.calls == [{"a": 1, "b": 2, "c": 3}]
    assert work.steps[0].action.tool_args == {"a": 1, "b": 1}


async def test_a_rejected_step_skips_exactly_its_dependents() -> None:
    bench = Bench()
    bench.executor.set_approval_callback(lambda request: answers("reject", reason="too dear"))
    work = plan(step("a", requires_approval=True), step("b", "a"), step("c", "b"), step("d"), step("e", "d"))
    result = await bench.run(work)
    assert result.status is ExecutionStatus.REJECTED
    assert [each.status.value for each in work.steps] == ["rejected", "skipped", "skipped", "completed", "completed"]
    assert work.steps[0].error == "too dear"
    assert "'a'" in str(result.feedback)
    assert "'b', 'c'" in str(result.feedback)


async def test_an_abort_ends_the_run_at_once() -> None:
    bench = Bench()
    bench.executor.set_approval_callback(lambda request: answers("abort", reason="stop it"))
    result = await bench.run(plan(step("a"), step("b", requires_approval=True), step("c")))
    assert (result.status, result.completed_steps) == (ExecutionStatus.ABORTED, ["a"])
    assert "stop it" in str(result.feedback)


@pytest.mark.parametrize(
    ("callback", "why"),
    [(lambda request: None, "returned NoneType, not an ApprovalResult"), (lambda request: 1 / 0, "ZeroDivisionError")],
)
async def test_a_callback_that_does_not_answer_leaves_the_step_waiting(callback: Any, why: str) -> None:
    bench = Bench()
    bench.executor.set_approval_callback(callback)
    work = plan(step("a"), step("b", requires_approval=True, args={"x": 2}))
    result = await bench.run(work)
    assert (result.status, result.completed_steps) == (ExecutionStatus.AWAITING_APPROVAL, ["a"])
    assert (work.steps[1].status, work.steps[1].attempts) == (StepStatus.AWAITING_APPROVAL, 0)
    assert why in str(result.feedback)
    assert why in str(bench.runtime.report_problem.call_args_list)
    assert [each.step_id for each in result.pending_approvals] == ["b"]
    bench.executor.set_approval_callback(lambda request: answers("approve"))
    assert (await bench.run(work)).status is ExecutionStatus.COMPLETED
    assert bench.calls == [None, 2]


async def test_a_step_that_lacks_data_is_not_asked_about() -> None:
    bench = Bench()
    bench.executor.set_approval_callback(lambda request: pytest.fail("asked"))
    result = await bench.run(plan(step("a", requires_approval=True, inputs={"x": "$nothing"})))
    assert result.status is ExecutionStatus.NEEDS_REPLAN


# --- the surroundings -----------------------------------------------------------------------------------------------


async def test_a_runtime_that_offers_the_least() -> None:
    class Least:
        def start_run(self, *, goal_id: str, goal_description: str, input_data: dict[str, Any]) -> str:
            return "run_least"

        def end_run(self, *, success: bool, narrative: str, output_data: dict[str, Any]) -> None: ...

        def report_problem(self, *, severity: str, description: str) -> str:
            return "prob_0"

    result = await execute_plan(plan(step("a", call="none", max_retries=1)), GOAL, Least())
    assert (result.status, result.run_id) == (ExecutionStatus.NEEDS_REPLAN, "run_least")


async def test_no_files_without_a_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = Bench()
    result = await bench.run(plan(step("a")))
    assert (result.checkpoint_id, result.resumed_from) == (None, None)
    assert os.listdir(tmp_path) == []


async def test_the_real_runtime_records_a_waiting_run_as_closed(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    result = await execute_plan(plan(step("a", requires_approval=True)), GOAL, runtime)
    run = runtime.storage.load_run(str(result.run_id))
    assert run is not None
    assert run.completed_at is not None


async def test_cancelling_is_passed_on_and_closes_the_run() -> None:
    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    bench = Bench(max_concurrency=2)
    bench.executor.register_function("forever", forever)
    work = plan(step("a", call="forever"), step("b"))
    task = asyncio.create_task(bench.executor.execute_plan(work, GOAL))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.runtime.end_run.call_count == 1
    assert (work.steps[0].status, work.steps[0].attempts) == (StepStatus.PENDING, 0)


def test_tools_may_be_a_list_or_a_dict() -> None:
    tool = MagicMock()
    tool.name = "t"
    assert FlexibleGraphExecutor(MagicMock(), tools=[tool]).tools == {"t": tool}
    assert FlexibleGraphExecutor(MagicMock(), tools={"t": tool}).tools == {"t": tool}
