"""Effects of registered tools that time out or lose their connection are unknown; policies of tools; the way on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.plan import ExecutionStatus, Plan
from framework.llm.provider import Tool, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runner.mcp_client import _tool
from framework.runner.tool_registry import ToolRegistry
from framework.runtime import Runtime
from framework.storage.memory import MemoryStorage

GOAL = Goal(id="g", name="G", description="d")


async def ask_twice(registry: ToolRegistry, storage: MemoryStorage) -> ExecutionResult:
    uses: list[ToolUse | str] = [ToolUse("1", "pay", {"euros": 5}), ToolUse("2", "pay", {"euros": 5}), "done"]
    executor = GraphExecutor(
        Runtime(storage),
        llm=ScriptedLLM([*uses]),
        tools=list(registry.get_tools().values()),
        tool_executor=registry.get_async_executor(),
        checkpoint_manager=CheckpointManager(storage),
    )
    spec = NodeSpec(id="work", tools=["pay"], output_keys=["said"], retry_delay_seconds=0)
    graph = GraphSpec(id="g", goal_id="g", entry_node="work", terminal_nodes=["work"], nodes=[spec], edges=[])
    return await executor.execute(graph, GOAL, {"q": "?"}, run_id="r")


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionResetError])
async def test_a_registered_effect_that_times_out_is_unknown_and_the_run_pauses(kind: type[Exception]) -> None:
    hits: list[str] = []

    def pay(euros: int, idempotency_key: str) -> str:
        """Pay."""
        hits.append(idempotency_key)
        raise kind("no answer")

    storage = MemoryStorage()
    with ToolRegistry() as registry:
        registry.register_function(pay, effects=True)
        result = await ask_twice(registry, storage)
    assert (result.success, result.paused_at) == (True, "work")
    assert len(hits) == 1


async def test_a_policy_of_its_own_comes_before_effects() -> None:
    hits: list[int] = []

    def pay(euros: int) -> str:
        """Pay."""
        hits.append(euros)
        raise TimeoutError("no answer")

    with ToolRegistry() as registry:
        registry.register_function(pay, effects=True, policy="rerun")
        result = await ask_twice(registry, MemoryStorage())
    assert (result.paused_at, hits) == (None, [5, 5])


def test_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="one of rerun, ask, fail"):
        Tool("pay", "Pays.", policy="never")  # type: ignore[arg-type]


async def test_a_plans_tool_that_loses_its_connection_is_not_used_again() -> None:
    hits: list[int] = []

    def pay(euros: int) -> str:
        """Pay."""
        hits.append(euros)
        if len(hits) == 1:
            raise ConnectionResetError("reset")
        return "paid"

    storage = MemoryStorage()
    with ToolRegistry() as registry:
        registry.register_function(pay, effects=True)
        executor = FlexibleGraphExecutor(
            Runtime(storage),
            tools=registry.get_tools(),
            tool_executor=registry.get_async_executor(),
            config=ExecutorConfig(retry_delay_seconds=0),
            checkpoint_manager=CheckpointManager(storage),
        )
        action = {"action_type": "tool_use", "tool_name": "pay", "tool_args": {"euros": 5}}
        # The judge says "again" to a failure, whatever its kind.
        result = await executor.execute_plan(
            Plan.from_json({"steps": [{"id": "s", "action": action}]}), GOAL, run_id="p"
        )
    assert result.status is ExecutionStatus.AWAITING_APPROVAL, result
    assert hits == [5]


@pytest.mark.parametrize(
    ("hints", "effects"),
    [
        (None, True),
        (SimpleNamespace(read_only_hint=None), True),
        (SimpleNamespace(read_only_hint=False), True),
        (SimpleNamespace(read_only_hint=True), False),
    ],
    ids=["none", "unsaid", "writes", "reads"],
)
def test_a_server_tool_has_effects_unless_it_says_that_it_reads(hints: Any, effects: bool) -> None:
    listed = SimpleNamespace(name="t", description="d", title=None, input_schema={}, annotations=hints)
    assert _tool(listed).effects is effects


async def test_the_way_on_from_a_failed_node_is_asked_within_the_budget() -> None:
    storage = MemoryStorage()
    llm = ScriptedLLM(["no", '{"proceed": true}'])
    executor = GraphExecutor(Runtime(storage), llm=llm, checkpoint_manager=CheckpointManager(storage))

    class Fails:
        async def execute(self, ctx: Any) -> Any:
            await ctx.llm.acomplete(messages=[{"role": "user", "content": "?"}])
            raise RuntimeError("no")

    executor.register_node("one", Fails())
    executor.register_function("two", lambda: 1)
    nodes = [NodeSpec(id="one", max_retries=1), NodeSpec(id="two", node_type="function")]
    edge = EdgeSpec(id="e", source="one", target="two", condition=EdgeCondition.LLM_DECIDE)
    graph = GraphSpec(id="g", goal_id="g", entry_node="one", nodes=nodes, edges=[edge])
    result = await executor.execute(graph, GOAL, {}, run_id="r", budget=RunBudget(max_tokens=1))
    assert (result.success, result.error_type) == (False, "budget")
    assert llm.calls == 1
