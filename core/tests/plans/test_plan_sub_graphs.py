"""Steps that run graphs: runs of their own, children of the plan's run, resumed where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.judge import HybridJudge
from framework.graph.node import NodeSpec
from framework.graph.plan import EvaluationRule, ExecutionStatus, JudgmentAction, Plan
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from framework.storage.backend import open_storage

GOAL = Goal(id="g", name="G", description="d")


def graph(pause: bool = False) -> GraphSpec:
    kind: dict[str, Any] = {"node_type": "function", "max_retries": 1}
    nodes = [
        NodeSpec(id="one", input_keys=["x"], output_keys=["y"], **kind),
        NodeSpec(id="two", input_keys=["y"], output_keys=["z"], **kind),
    ]
    edge = EdgeSpec(id="e", source="one", target="two", condition=EdgeCondition.ON_SUCCESS)
    return GraphSpec(id="sub", goal_id="g", entry_node="one", nodes=nodes, edges=[edge], pause_nodes=["one"] * pause)


def plan() -> Plan:
    sub = {"id": "s", "action": {"action_type": "sub_graph", "graph_id": "sub"}, "inputs": {"x": 1}, "max_retries": 2}
    return Plan.from_json({"steps": [sub]})


class House:
    """A plan executor and a graph executor over one runtime and one store."""

    def __init__(self, path: Path, *, pause: bool = False, durable: bool = True) -> None:
        self.calls: list[str] = []
        self.fails = 0
        self.store = open_storage(f"sqlite:///{path}/runs.db")
        manager = CheckpointManager(self.store) if durable else None
        self.runtime = Runtime(path / "runs")
        inner = GraphExecutor(self.runtime, checkpoint_manager=manager)
        inner.register_function("one", self.one)
        inner.register_function("two", self.two)
        config = ExecutorConfig(retry_delay_seconds=0)
        self.executor = FlexibleGraphExecutor(self.runtime, config=config, checkpoint_manager=manager)
        self.executor.register_graph("sub", graph(pause), GOAL, inner)

    def one(self, x: int) -> int:
        self.calls.append("one")
        return x + 1

    def two(self, y: int) -> int:
        self.calls.append("two")
        if self.fails:
            self.fails -= 1
            raise RuntimeError("not now")
        return y + 1


async def test_a_sub_graph_is_a_durable_child_run(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.fails = 1
    result = await house.executor.execute_plan(plan(), GOAL, run_id="p")
    assert result.status is ExecutionStatus.COMPLETED
    assert house.calls == ["one", "two", "two"], "the second attempt goes on where the child run was"
    child = house.store.find_run("p/s#1")
    assert child is not None
    assert (child.parent_run_id, child.state) == ("p", RunState.COMPLETED)
    assert result.results["z"] == 3
    record = house.runtime.storage.load_run("p")
    assert record is not None
    assert {decision.node_id for decision in record.decisions} == {"s"}, "the child's decisions are the child's"
    house.store.close()


async def test_a_child_goes_on_in_another_process(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.fails = 2
    assert (await house.executor.execute_plan(plan(), GOAL, run_id="p")).status is ExecutionStatus.NEEDS_REPLAN
    house.store.close()
    other = House(tmp_path)
    result = await other.executor.execute_plan(None, GOAL, run_id="p")
    assert (result.status, other.calls) == (ExecutionStatus.COMPLETED, ["two"])
    other.store.close()


async def test_a_result_that_was_not_good_enough_is_made_anew(tmp_path: Path) -> None:
    house = House(tmp_path)
    rule = EvaluationRule(
        id="twice",
        description="once more",
        condition="step.attempts < 2",
        action=JudgmentAction.RETRY,
        feedback_template="again",
    )
    house.executor.judge = HybridJudge(rules=[rule])
    result = await house.executor.execute_plan(plan(), GOAL, run_id="p")
    assert result.status is ExecutionStatus.COMPLETED
    assert house.calls == ["one", "two", "one", "two"]
    assert house.store.find_run("p/s#2") is not None
    house.store.close()


async def test_a_changed_step_has_a_run_of_its_own(tmp_path: Path) -> None:
    house = House(tmp_path)
    fails = {"id": "t", "action": {"function_name": "missing"}, "max_retries": 1}
    first = plan()
    first.steps.append(Plan.from_json({"steps": [fails]}).steps[0])
    assert (await house.executor.execute_plan(first, GOAL, run_id="p")).status is ExecutionStatus.NEEDS_REPLAN
    changed = plan()
    changed.steps[0].inputs = {"x": 10}
    result = await house.executor.execute_plan(changed, GOAL, run_id="p", replan=True)
    assert (result.status, result.results["z"]) == (ExecutionStatus.COMPLETED, 12)
    assert house.store.find_run("p/s#2") is not None
    house.store.close()


async def test_a_paused_child_needs_a_person_and_then_goes_on(tmp_path: Path) -> None:
    house = House(tmp_path, pause=True)
    result = await house.executor.execute_plan(plan(), GOAL, run_id="p")
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert "p/s#1" in str(result.feedback)
    result = await house.executor.execute_plan(plan(), GOAL, run_id="p")
    assert (result.status, house.calls) == (ExecutionStatus.COMPLETED, ["one", "two"])
    house.store.close()


async def test_without_a_manager_a_sub_graph_is_just_run(tmp_path: Path) -> None:
    house = House(tmp_path, durable=False)
    result = await house.executor.execute_plan(plan(), GOAL)
    assert (result.status, result.results["z"]) == (ExecutionStatus.COMPLETED, 3)
    assert house.store.list_runs() == []
    house.store.close()
