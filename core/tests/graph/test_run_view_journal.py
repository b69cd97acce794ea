"""What a view says of the calls inside a step, and of what the step waits for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.plan import ActionSpec, Plan, PlanStep
from framework.graph.run_view import RunView, as_json, view_run
from framework.graph.worker_node import WorkerNode
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.runtime import Runtime
from framework.storage.memory import MemoryStorage
from framework.storage.records import JournalRow
from tests.graph.executor_kit import GOAL


class Sleeps(NodeProtocol):
    async def execute(self, ctx: NodeContext) -> NodeResult:
        await ctx.call("look", lambda: {"password": "a-password-of-somebody", "seen": 1})
        await ctx.sleep(3600)
        return NodeResult(True)


async def slept(storage: MemoryStorage) -> None:
    manager = CheckpointManager(storage)
    executor = GraphExecutor(Runtime(storage), node_registry={"work": Sleeps()}, checkpoint_manager=manager)
    graph = GraphSpec(id="g", goal_id="goal", entry_node="work", nodes=[NodeSpec(id="work")], edges=[])
    assert (await executor.execute(graph, GOAL, {}, run_id="r")).paused_at == "work"


async def test_a_sleep_is_waited_for_until_it_is_due() -> None:
    storage = MemoryStorage()
    await slept(storage)
    view = view_run(storage, "r")
    assert [(each.id, each.kind, each.state) for each in view.calls] == [
        ("work#1/1", "call", "done"),
        ("work#1/2", "sleep", "waiting"),
    ]
    assert "a-password" not in str(view.calls[0].answer)
    [waiting] = view.resume.waiting
    assert (view.resume.verdict, waiting.kind, waiting.step) == ("waits", "sleep", "work#1")
    assert view.resume.summary.startswith("It waits: 'work#1' sleeps until ")
    assert as_json(view)["calls"][1]["until"].endswith("Z")
    due = view_run(storage, "r", clock=lambda: time.time() + 3601)
    assert (due.resume.verdict, due.resume.waiting) == ("goes_on", ())
    [again] = due.resume.again
    assert again.why == (
        "what it waited for has come; runs again, from its start; 2 recorded calls answered from the journal"
    )


async def test_damage_in_the_journal_is_told_and_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    await slept(storage)
    rows = storage.read_journal("r")
    broken = [JournalRow(rows[0].step, rows[0].number, b"\x00no json"), *rows[1:]]
    monkeypatch.setattr(storage, "read_journal", lambda *_, **__: broken)
    view = view_run(storage, "r")
    assert [line for line in view.damage if "journal row work#1/1" in line]
    assert [each.id for each in view.calls] == ["work#1/2"]
    assert view.resume.verdict == "waits"


async def test_a_plans_step_waits_for_its_effect_to_be_settled() -> None:
    storage = MemoryStorage()
    began = asyncio.Event()

    async def hang(use: ToolUse) -> ToolResult:
        began.set()
        await asyncio.Event().wait()
        raise AssertionError

    def executor() -> FlexibleGraphExecutor:
        made = FlexibleGraphExecutor(Runtime(storage), checkpoint_manager=CheckpointManager(storage))
        tool = Tool("pay", "Pays.", {"type": "object", "properties": {}}, effects=True)
        made.worker = WorkerNode(made.runtime, tools=[tool], tool_executor=hang)
        return made

    action: Any = ActionSpec.model_validate({"action_type": "tool_use", "tool_name": "pay"})
    step = PlanStep(id="buy", description="buys", action=action)
    plan = Plan(id="p", goal_id="goal", description="Buy", steps=[step])
    task = asyncio.create_task(executor().execute_plan(plan, GOAL, run_id="r"))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cancelled = view_run(storage, "r")
    assert cancelled.resume.unknown == ("buy#1/1",)
    assert "the effect of 1 call unknown" in cancelled.resume.again[0].why

    await executor().execute_plan(None, GOAL, run_id="r")
    assert summary(view_run(storage, "r")) == ("waits", "waiting", ["settle"], ("buy#1/1",))
    CheckpointManager(storage).settle("r", "buy#1/1", skip=True)
    settled = view_run(storage, "r")
    assert summary(settled) == ("goes_on", "waiting", [], ())
    assert [each.step for each in settled.resume.again] == ["buy"]


def summary(view: RunView) -> tuple[str, str, list[str], tuple[str, ...]]:
    kinds: list[str] = [each.kind for each in view.resume.waiting]
    return view.resume.verdict, view.steps[0].status, kinds, view.resume.unknown
