"""What a plan's models cost, added up over attempts, judges, sub-graphs and processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from framework.errors import LLMUnavailable
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeSpec
from framework.graph.plan import ActionSpec, EvaluationRule, ExecutionStatus, Judgment, JudgmentAction, PlanStep
from framework.graph.run_view import view_run
from framework.graph.worker_node import StepExecutionResult, WorkerNode
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.backend import Storage, open_storage
from framework.storage.checkpoints import parse_log
from framework.storage.memory import MemoryStorage
from tests.plans.plan_kit import GOAL, Places, plan, step


def ask(step_id: str, *needs: str, **fields: Any) -> PlanStep:
    action = ActionSpec.model_validate({"action_type": "llm_call", "prompt": "Say."})
    return PlanStep(id=step_id, description=step_id, action=action, dependencies=list(needs), **fields)


def reply(text: str = "said", cost: float | None = 0.1, tokens: int = 1) -> LLMResponse:
    return LLMResponse(text, "m", input_tokens=tokens, cost=cost)


def again_while(condition: str) -> HybridJudge:
    rule = EvaluationRule(id="again", description="again", condition=condition, action=JudgmentAction.RETRY)
    return HybridJudge(rules=[rule])


def asking(places: Places, *replies: Any, **settings: Any) -> FlexibleGraphExecutor:
    executor = places.process(**settings)
    executor.worker = WorkerNode(executor.runtime, llm=ScriptedLLM(list(replies)), functions={"work": places.work})
    return executor


def body(places: Places) -> dict[str, Any]:
    found: Any = codec.decode(next(iter(places.store.read_checkpoint_rows("r"))).body)
    assert isinstance(found, dict)
    return found


async def test_cost_is_added_up_like_tokens(places: Places) -> None:
    """0.1 + 0.2 is stored as 0.3; a reply without a price adds nothing."""
    executor = asking(places, reply(cost=0.1), reply(cost=0.2), reply(cost=None))
    executor.judge = again_while("step.id == 'a' and step.attempts < 2")
    result = await executor.execute_plan(plan(ask("a"), ask("b", "a")), GOAL, run_id="r")
    assert (result.status, result.total_tokens, result.total_cost) == (ExecutionStatus.COMPLETED, 3, 0.3)
    steps = await executor.stored_steps("r")
    assert (steps["a"].cost, steps["b"].cost) == (0.3, 0.0)
    assert body(places)["cost"] == 0.3
    returned = await places.process().execute_plan(None, GOAL, run_id="r")
    assert (returned.total_cost, returned.total_tokens) == (0.3, 3)
    view = view_run(places.store, "r")
    assert view.cost == 0.3
    assert [round(each.cost, 9) for each in view.steps] == [0.3, 0.0]


async def crash_after_an_attempt(store: Storage, task: asyncio.Task[Any]) -> None:
    """Leave the run as a process does that ends without a word, once a failed attempt is durable."""
    while not any(each.get("kind") == "attempt" for each in parse_log(store.read_log("r"))):
        await asyncio.sleep(0)
    run = store.claim_run("r", "somebody", 30, lambda owner: False)
    store.release_lease("r", run.token)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_cost_of_failed_attempts_survives_a_crash(places: Places) -> None:
    """An attempt after the last checkpoint is in the log alone."""
    executor = asking(places, reply(cost=0.25), reply(cost=0.5), retry_delay_seconds=1000.0)
    executor.judge = again_while("step.id == 'b' and step.attempts < 2")
    failed = asyncio.Event()
    executor.runtime.report_problem.side_effect = lambda **_: failed.set()
    task = asyncio.create_task(executor.execute_plan(plan(ask("a"), ask("b", "a")), GOAL, run_id="r"))
    await failed.wait()
    await crash_after_an_attempt(places.store, task)
    assert view_run(places.store, "r").cost == 0.75
    executor = asking(places, reply(cost=1.0))
    result = await executor.execute_plan(None, GOAL, run_id="r")
    assert (result.status, result.total_cost) == (ExecutionStatus.COMPLETED, 1.75)
    assert (await executor.stored_steps("r"))["b"].cost == 1.5


@pytest.mark.parametrize("action", [JudgmentAction.ESCALATE, JudgmentAction.REPLAN])
async def test_cost_of_a_step_that_ends_the_run(places: Places, action: JudgmentAction) -> None:
    executor = asking(places, reply(cost=0.5))
    executor.judge = HybridJudge(rules=[EvaluationRule(id="no", description="no", condition="true", action=action)])
    result = await executor.execute_plan(plan(ask("a")), GOAL, run_id="r")
    assert result.total_cost == 0.5
    view = view_run(places.store, "r")
    assert (view.cost, view.steps[0].cost) == (0.5, 0.5)
    result = await asking(places, reply(cost=0.25)).execute_plan(None, GOAL, run_id="r")
    assert (result.status, result.total_cost) == (ExecutionStatus.COMPLETED, 0.75)


async def test_a_run_without_cost_says_nothing_of_it(places: Places) -> None:
    await places.process().execute_plan(plan(step("a", args={"x": 1})), GOAL, run_id="r")
    records = parse_log(places.store.read_log("r"))
    assert [record["node"] for record in records] == ["a"]
    assert not any(key in record for record in records for key in ("cost", "child_cost", "child_tokens"))
    assert "cost" not in body(places)


@pytest.mark.parametrize(
    ("cost", "counted"), [(0.5, 0.5), (2, 2.0), (0, 0), (-1, 0), ("7", 0), (True, 0), (float("nan"), 0)]
)
async def test_cost_of_a_judge_of_ones_own(cost: Any, counted: float) -> None:
    class Judge:
        async def evaluate(self, *_: Any, **__: Any) -> Judgment:
            return Judgment(action=JudgmentAction.ACCEPT, reasoning="fine", context={"cost": cost})

    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), judge=Judge())
    executor.register_function("work", lambda x=None: x)
    assert (await executor.execute_plan(plan(step("a")), GOAL)).total_cost == counted


@pytest.mark.parametrize(("cost", "counted"), [(0.5, 0.5), (None, 0), (-1.0, 0), (float("nan"), 0)])
async def test_cost_that_a_worker_of_ones_own_says(cost: Any, counted: float) -> None:
    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime))
    executor.worker = MagicMock()
    executor.worker.execute = AsyncMock(return_value=StepExecutionResult(True, cost=cost))
    result = await executor.execute_plan(plan(step("a")), GOAL)
    assert (result.status, result.total_cost) == (ExecutionStatus.COMPLETED, counted)


async def test_cost_of_the_default_judge_is_durable(places: Places) -> None:
    accept = "ACTION: accept\nCONFIDENCE: 1"
    executor = places.process()
    executor.judge = HybridJudge(ScriptedLLM([reply(accept, cost=0.01), reply(accept, cost=None)]))
    result = await executor.execute_plan(plan(step("a"), step("b")), GOAL, run_id="r")
    assert (result.total_cost, result.total_tokens) == (0.01, 2)
    steps = await executor.stored_steps("r")
    judgments: list[Any] = [steps[each].model_dump()["judgment"]["context"] for each in ("a", "b")]
    assert judgments == [{"tokens_used": 1, "cost": 0.01}, {"tokens_used": 1}]


async def test_those_who_watch_are_told_the_cost() -> None:
    runtime = Runtime(MemoryStorage())
    told: list[Any] = []
    runtime.add_listener(told.append)
    llm = ScriptedLLM([reply(cost=0.25), reply(cost=0.5), reply(cost=1.0)])
    escalate = EvaluationRule(
        id="no", description="no", condition="step.id == 'b'", action=JudgmentAction.ESCALATE, priority=1
    )
    judge = again_while("step.attempts < 2")
    judge.add_rule(escalate)
    executor = FlexibleGraphExecutor(runtime, llm=llm, judge=judge, config=ExecutorConfig(retry_delay_seconds=0))
    await executor.execute_plan(plan(ask("a"), ask("b", "a")), GOAL)
    assert [(each.kind, each.cost, each.tokens) for each in told if each.cost] == [
        ("attempt_failed", 0.25, 1),
        ("step_finished", 0.5, 1),
        ("step_failed", 1.0, 1),
        ("run_ended", 1.75, 3),
    ]


async def test_rules_see_the_cost(places: Places) -> None:
    executor = asking(places, reply(cost=2.0), reply(cost=0.5))
    executor.judge = again_while("result.cost > 1")
    result = await executor.execute_plan(plan(ask("a")), GOAL, run_id="r")
    assert (result.steps_executed, result.total_cost) == (2, 2.5)


async def test_calls_before_the_one_that_failed_are_paid() -> None:
    """A function that asks a model in a loop of its own: the error knows what the finished calls took."""
    llm = ScriptedLLM([ToolUse("1", "look", {}), LLMUnavailable("gone")])

    def research() -> None:
        question = [{"role": "user", "content": "Look."}]
        llm.complete_with_tools(question, None, [Tool("look", "looks")], lambda use: ToolResult(use.id, "seen"))

    executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), functions={"work": research})
    result = await executor.execute_plan(plan(step("a", max_retries=1)), GOAL)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert llm.cost_usd > 0
    assert (result.total_tokens, result.total_cost) == (llm.input_tokens + llm.output_tokens, round(llm.cost_usd, 12))


# --- sub-graphs -----------------------------------------------------------------------------------------------------


async def test_cost_of_a_sub_graph() -> None:
    for success, cost, counted in ((True, 0.5, 0.5), (False, 0.5, 0.5), (True, None, 0.0)):
        answer = SimpleNamespace(success=success, output={}, error=None, total_tokens=4, total_cost=cost)
        worker = WorkerNode(MagicMock(spec=Runtime), sub_graph_executor=lambda *_, answer=answer: answer)
        action = ActionSpec.model_validate({"action_type": "sub_graph", "graph_id": "g"})
        result = await worker.execute(PlanStep(id="s", description="s", action=action), {})
        assert (result.cost, result.tokens_used) == (counted, 4)


class House:
    """A plan whose one step runs a graph of two nodes that each ask a model."""

    def __init__(self, path: Path, *replies: Any, durable: bool = True) -> None:
        self.store = open_storage(f"sqlite:///{path}/runs.db")
        self.llm = ScriptedLLM(list(replies))
        runtime = Runtime(MemoryStorage())
        manager = CheckpointManager(self.store)
        kind: dict[str, Any] = {"node_type": "llm_generate", "max_retries": 1}
        one = NodeSpec(id="one", output_keys=["y"], **kind)
        two = NodeSpec(id="two", output_keys=["z"], **kind)
        edge = EdgeSpec(id="e", source="one", target="two", condition=EdgeCondition.ON_SUCCESS)
        graph = GraphSpec(id="sub", goal_id="g", entry_node="one", nodes=[one, two], edges=[edge])
        inner = GraphExecutor(runtime, llm=self.llm, checkpoint_manager=manager if durable else None)
        config = ExecutorConfig(retry_delay_seconds=0)
        self.executor = FlexibleGraphExecutor(runtime, config=config, checkpoint_manager=manager)
        self.executor.register_graph("sub", graph, GOAL, inner)

    async def run(self, max_retries: int = 3) -> Any:
        action = ActionSpec.model_validate({"action_type": "sub_graph", "graph_id": "sub"})
        work = plan(PlanStep(id="s", description="s", action=action, max_retries=max_retries))
        return await self.executor.execute_plan(work, GOAL, run_id="r")


async def test_a_sub_graph_that_goes_on_is_not_counted_twice(tmp_path: Path) -> None:
    gone = LLMUnavailable("gone")
    house = House(tmp_path, reply(cost=0.25), gone, gone, reply(cost=0.5))
    result = await house.run()
    assert (result.status, result.total_cost, result.total_tokens) == (ExecutionStatus.COMPLETED, 0.75, 2)
    child = view_run(house.store, "r/s#1")
    assert child.cost == 0.75
    house.store.close()


async def test_nor_in_another_process(tmp_path: Path) -> None:
    house = House(tmp_path, reply(cost=0.25), LLMUnavailable("gone"))
    result = await house.run(max_retries=1)
    assert (result.status, result.total_cost) == (ExecutionStatus.NEEDS_REPLAN, 0.25)
    house.store.close()
    house = House(tmp_path, reply(cost=0.5))
    result = await house.run(max_retries=1)
    assert (result.status, result.total_cost, result.total_tokens) == (ExecutionStatus.COMPLETED, 0.75, 2)
    run = house.store.find_run("r")
    assert run is not None
    assert run.state is RunState.COMPLETED
    house.store.close()


async def test_nor_after_a_crash(tmp_path: Path) -> None:
    house = House(tmp_path, reply(cost=0.25), LLMUnavailable("gone"))
    house.executor.config.retry_delay_seconds = house.executor.config.retry_max_delay_seconds = 1000.0
    await crash_after_an_attempt(house.store, asyncio.create_task(house.run()))
    house.store.close()
    house = House(tmp_path, reply(cost=0.5))
    result = await house.run()
    assert (result.status, result.total_cost, result.total_tokens) == (ExecutionStatus.COMPLETED, 0.75, 2)
    house.store.close()


async def test_a_sub_graph_that_begins_anew_each_time_counts_each_time(tmp_path: Path) -> None:
    house = House(tmp_path, reply(cost=0.25), LLMUnavailable("gone"), reply(cost=0.25), reply(cost=0.5), durable=False)
    result = await house.run()
    assert (result.status, result.total_cost, result.total_tokens) == (ExecutionStatus.COMPLETED, 1.0, 3)
    house.store.close()


async def test_a_sub_graph_that_was_not_good_enough_is_a_new_one(tmp_path: Path) -> None:
    """Of which nothing has been counted yet, when it fails and goes on."""
    house = House(tmp_path, *(reply(cost=0.25) for _ in range(3)), LLMUnavailable("gone"), reply(cost=0.25))
    house.executor.judge = again_while("step.attempts < 2")
    result = await house.run()
    assert (result.status, result.total_cost, result.total_tokens) == (ExecutionStatus.COMPLETED, 1.0, 4)
    house.store.close()
