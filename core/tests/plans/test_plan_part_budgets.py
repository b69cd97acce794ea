"""A plan's budget counts what its sub-graphs take, while they do, and over restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.errors import LLMUnavailable
from framework.graph.budget import RunBudget
from framework.graph.executor import GraphExecutor
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeContext
from framework.graph.plan import ExecutionStatus
from framework.graph.run_view import view_run
from framework.llm.provider import LLMResponse
from framework.llm.scripted import ScriptedLLM
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.memory import MemoryStorage
from tests.plans.parts_kit import GOAL, House, graph_of, plan_of

COMPLETED, WAITS = ExecutionStatus.COMPLETED, ExecutionStatus.AWAITING_APPROVAL
FAILED = ExecutionStatus.FAILED


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    made = MemoryStorage() if request.param == "memory" else open_storage(f"sqlite:///{tmp_path}/runs.db")
    with made:
        yield made


@pytest.fixture
def memory() -> Iterator[Storage]:
    with MemoryStorage() as made:
        yield made


class Model(ScriptedLLM):
    """Answers each question with 10 tokens for 0.5 dollars, and knows how many it answers at once at most. The first
    answers come when so many are asked at once as ``together`` says."""

    def __init__(self, cost: float | None = 0.5, together: int = 1) -> None:
        super().__init__(lambda *_: LLMResponse("said", "m", input_tokens=6, output_tokens=4, cost=cost))
        self.asked = self.at_once = self.most_at_once = 0
        self._together, self._full = together, asyncio.Event()

    async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.asked >= self._together:
            self._full.set()
        try:
            await self._full.wait()
            for _ in range(50):  # in which one more would be asked
                await asyncio.sleep(0)
            return await super().acomplete(*args, **keywords)
        finally:
            self.at_once -= 1


def asks(times: int, *, together: bool = False) -> Any:
    async def body(ctx: NodeContext) -> str:
        async def one(number: int) -> None:
            await ctx.llm.acomplete([{"role": "user", "content": f"Say {number}."}], max_tokens=4)

        if together:
            await asyncio.gather(*map(one, range(times)))
        else:
            for number in range(times):
                await one(number)
        return "asked"

    return body


async def test_a_graph_is_stopped_where_the_plan_s_budget_ends(store: Storage) -> None:
    house = House(store, llm=Model())
    house.graph("s", asks(5))
    result = await house.run(plan_of("s"), RunBudget(max_tokens=25))
    assert (result.status, result.error_type) == (FAILED, "budget")
    assert "The budget of run 'r' is used up: 30 of max_tokens=25" in str(result.error)
    assert (house.llm.asked, result.total_tokens, result.total_cost) == (3, 30, 1.5)
    assert view_run(store, "r").total_tokens == 30
    assert house.record("r/s#1").state is RunState.FAILED
    again = await house.run()
    assert (again.status, again.error_type, house.llm.asked) == (FAILED, "budget", 3), "the budget is the run's"
    result = await house.run(budget=RunBudget(max_tokens=100))
    assert (result.status, result.total_tokens, result.total_cost) == (COMPLETED, 50, 2.5)
    assert house.llm.asked == 5, "nothing is paid for twice"
    assert view_run(store, "r").total_tokens == 50


async def test_max_cost_reaches_a_graph_too(memory: Storage) -> None:
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    result = await house.run(plan_of("s"), RunBudget(max_cost=1.0))
    assert (result.error_type, result.total_cost, house.llm.asked) == ("budget", 1.0, 2)


async def test_a_model_without_a_price_ends_a_plan_with_max_cost(memory: Storage) -> None:
    house = House(memory, llm=Model(cost=None))
    house.graph("s", asks(5))
    result = await house.run(plan_of("s"), RunBudget(max_cost=1.0))
    assert (result.error_type, house.llm.asked) == ("budget", 1)
    assert "what model 'm' costs is not known" in str(result.error)


async def test_questions_of_graphs_share_what_is_left(memory: Storage) -> None:
    """Each of nine at once is estimated at 17 tokens, so five of them fit."""
    house = House(memory, concurrency=3, llm=Model(together=5))
    for name in "stu":
        house.graph(name, asks(3, together=True))
    result = await house.run(plan_of(*"stu"), RunBudget(max_tokens=95))
    assert (result.status, result.total_tokens) == (COMPLETED, 90)
    assert house.llm.most_at_once == 5


async def test_a_budget_used_up_by_one_graph_stops_the_others(memory: Storage) -> None:
    house = House(memory, concurrency=2, llm=Model())
    house.graph("s", asks(50))
    house.graph("t", asks(50))
    result = await house.run(plan_of("s", "t"), RunBudget(max_tokens=100))
    assert (result.error_type, result.total_tokens, house.llm.asked) == ("budget", 100, 10)
    result = await house.run(budget=RunBudget(max_tokens=2000))
    assert (result.status, result.total_tokens, house.llm.asked) == (COMPLETED, 1000, 100)


async def test_a_graph_that_waits_has_counted_what_it_took(store: Storage) -> None:
    house = House(store, llm=Model())

    async def body(ctx: NodeContext) -> str:
        await asks(2)(ctx)
        await ctx.wait_for("go")
        await ctx.llm.acomplete([{"role": "user", "content": "Now."}], max_tokens=4)
        return "asked"

    house.graph("s", body)
    result = await house.run(plan_of("s"), RunBudget(max_tokens=30))
    assert (result.status, result.total_tokens) == (WAITS, 20)
    assert view_run(store, "r").total_tokens == 20
    for _ in range(2):
        assert (await house.run()).total_tokens == 20
    house.manager.send("r", "go", 1)
    result = await house.run()
    assert (result.status, result.total_tokens, house.llm.asked) == (COMPLETED, 30, 3)
    assert view_run(store, "r").total_tokens == 30


async def crashed(house: House, after: int, budget: RunBudget | None = None, *steps: Any) -> None:
    """Leave the plan and its part as a process does that ends after so many answers."""
    task = asyncio.create_task(house.run(plan_of(*(steps or ("s",))), budget))
    while house.llm.asked < after + 1:
        await asyncio.sleep(0)
    for run_id in ("r", "r/s#1"):
        run = house.store.claim_run(run_id, "somebody", 30, lambda owner: False)
        house.store.release_lease(run_id, run.token)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_a_graph_took_before_a_crash_counts(store: Storage) -> None:
    """Neither the part's nor the plan's checkpoints have counted it: it is in the part's journal alone."""
    house = House(store, llm=Model())
    house.graph("s", asks(5))
    await crashed(house, 3, RunBudget(max_tokens=40))
    assert house.record().state is RunState.CRASHED
    later = House(store, llm=Model())
    later.graph("s", asks(5))
    result = await later.run()
    assert (result.error_type, result.total_tokens, later.llm.asked) == ("budget", 40, 1)
    result = await later.run(budget=RunBudget(max_tokens=50))
    assert (result.status, result.total_tokens, later.llm.asked) == (COMPLETED, 50, 2)


async def test_it_counts_before_the_graph_goes_on(memory: Storage) -> None:
    """The plan's first step now is another one, which must not spend what the graph has spent."""
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    await crashed(house, 3)
    later = House(memory, llm=Model())
    later.graph("s", asks(5))
    later.executor.register_function("f", lambda: 1)
    action = {"action_type": "llm_call", "prompt": "Say."}
    first = {"id": "a", "action": action}
    second = {"id": "s", "action": {"action_type": "sub_graph", "graph_id": "s"}, "dependencies": ["a"]}
    result = await later.executor.execute_plan(
        plan_of(first, second), GOAL, run_id="r", replan=True, budget=RunBudget(max_tokens=30)
    )
    assert (result.error_type, result.total_tokens, later.llm.asked) == ("budget", 30, 0)


async def test_a_graph_that_failed_before_its_first_checkpoint_counts_once(memory: Storage) -> None:
    llm = ScriptedLLM([LLMResponse("said", "m", input_tokens=10, cost=0.5), LLMUnavailable("gone"), "said", "said"])
    house = House(memory, llm=llm)
    house.executor.judge = HybridJudge()

    async def body(ctx: NodeContext) -> str:
        for number in range(2):
            await ctx.llm.acomplete([{"role": "user", "content": f"Say {number}."}])
        return "asked"

    house.graph("s", body)
    result = await house.run(plan_of("s"))
    assert (result.status, result.total_tokens) == (COMPLETED, llm.input_tokens + llm.output_tokens)


async def test_what_a_graph_took_that_ran_too_long_counts(memory: Storage) -> None:
    house = House(memory, llm=Model())
    house.executor.config.timeout_seconds = 0.2

    async def body(ctx: NodeContext) -> None:
        await asks(2)(ctx)
        await asyncio.Event().wait()

    house.graph("s", body)
    step = {"id": "s", "action": {"action_type": "sub_graph", "graph_id": "s"}, "max_retries": 1}
    result = await house.run(plan_of(step))
    assert (result.status, result.total_tokens) == (ExecutionStatus.NEEDS_REPLAN, 20)
    assert view_run(memory, "r").total_tokens == 20


async def test_graphs_without_a_store_count_while_they_run(memory: Storage) -> None:
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    plain = GraphExecutor(Runtime(MemoryStorage()), llm=house.llm, node_registry=house.inner.node_registry)
    house.executor.register_graph("s", graph_of("s"), GOAL, plain)
    result = await house.run(plan_of("s"), RunBudget(max_tokens=25))
    assert (result.error_type, result.total_tokens, house.llm.asked) == ("budget", 30, 3)
    result = await house.run(budget=RunBudget(max_tokens=1000))
    assert (result.status, result.total_tokens) == (COMPLETED, 80), "it began anew"


async def test_a_plan_without_a_store_limits_its_graphs(memory: Storage) -> None:
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    house.executor.checkpoint_manager = None
    result = await house.executor.execute_plan(plan_of("s"), GOAL, budget=RunBudget(max_tokens=25))
    assert (result.error_type, result.total_tokens) == ("budget", 30)


async def test_a_sub_graph_executor_of_ones_own_is_limited_too(memory: Storage) -> None:
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    del house.executor.worker.resources.sub_graphs["s"]

    async def execute(graph_id: str, inputs: Any, context: Any) -> Any:
        return await house.inner.execute(graph_of(graph_id), GOAL, inputs)

    house.executor.worker.resources.sub_graph_executor = execute
    result = await house.run(plan_of("s"), RunBudget(max_tokens=25))
    assert (result.error_type, result.total_tokens, house.llm.asked) == ("budget", 30, 3)


async def test_a_plan_inside_a_plan_is_a_part_of_it(memory: Storage) -> None:
    """By an executor of one's own; and the graph of the inner plan is a part of both."""
    house = House(memory, llm=Model())
    house.graph("s", asks(5))
    inner = house.executor

    async def execute(graph_id: str, inputs: Any, context: Any) -> Any:
        result = await inner.execute_plan(plan_of("s"), GOAL, run_id="inner")
        assert result.error_type == "budget"
        result_ = type("Outcome", (), {})()
        result_.success, result_.output, result_.error = False, {}, result.error
        result_.total_tokens, result_.total_cost = result.total_tokens, result.total_cost
        return result_

    outer = House(memory, llm=Model())
    outer.executor.worker.resources.sub_graph_executor = execute
    result = await outer.run(plan_of("o"), RunBudget(max_tokens=25))
    assert (result.error_type, result.total_tokens, house.llm.asked) == ("budget", 30, 3)
    assert "run 'r'" in str(result.error)
