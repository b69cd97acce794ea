"""What the tests of plans share whose steps run graphs that wait: a plan of such steps, over a store."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.plan import Plan, PlanExecutionResult
from framework.graph.recovery import Recovered, woken_runs
from framework.runtime.core import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord

GOAL = Goal(id="g", name="G", description="d")

Body = Callable[[NodeContext], Awaitable[Any]]


class Node(NodeProtocol):
    """A node that is one async function; what it returns is its output ``y``."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        return NodeResult(True, {f"{ctx.node_id}_y": await self._body(ctx)})


def graph_of(graph_id: str, *kinds: str, pause: bool = False) -> GraphSpec:
    """A graph of one node, called as the graph, or that pauses after it."""
    kind = kinds[0] if kinds else "function"
    node = NodeSpec(id=graph_id, node_type=kind, max_retries=1, output_keys=[f"{graph_id}_y"])
    return GraphSpec(
        id=graph_id, goal_id="g", entry_node=graph_id, nodes=[node], edges=[], pause_nodes=[graph_id] * pause
    )


def plan_of(*steps: str | dict[str, Any]) -> Plan:
    """A plan whose steps each run the graph of their name, or as given."""
    made = [
        each if isinstance(each, dict) else {"id": each, "action": {"action_type": "sub_graph", "graph_id": each}}
        for each in steps
    ]
    return Plan.from_json({"id": "p", "goal_id": "g", "steps": made})


class House:
    """Plans in one store. ``bodies`` are the graphs' nodes by name; ``None`` is a person's."""

    def __init__(self, store: Storage, *, concurrency: int = 1, llm: Any = None, **config: Any) -> None:
        self.store = store
        self.manager = CheckpointManager(store, CheckpointConfig(**{"sleep_in_process_seconds": 0.0, **config}))
        self.llm = llm
        self.inner = GraphExecutor(Runtime(MemoryStorage()), llm=llm, checkpoint_manager=self.manager)
        self.executor = FlexibleGraphExecutor(
            Runtime(MemoryStorage()),
            llm=llm,
            config=ExecutorConfig(max_concurrency=concurrency, retry_delay_seconds=0),
            checkpoint_manager=self.manager,
        )

    def graph(self, graph_id: str, body: Body | None, *, executor: Any = None, pause: bool = False) -> None:
        """Let steps run a graph of one node."""
        spec = graph_of(graph_id, "human_input" if body is None else "function", pause=pause)
        if body is not None:
            self.inner.register_node(graph_id, Node(body))
        self.executor.register_graph(graph_id, spec, GOAL, executor or self.inner)

    async def run(
        self, plan: Plan | None = None, budget: RunBudget | None = None, **context: Any
    ) -> PlanExecutionResult:
        """Call the plan's run."""
        return await self.executor.execute_plan(plan, GOAL, context or None, run_id="r", budget=budget)

    async def recover(self) -> list[Recovered[PlanExecutionResult]]:
        """What a worker does at one look."""

        async def resume(run: RunRecord) -> PlanExecutionResult:
            return await self.executor.execute_plan(None, GOAL, run_id=run.run_id)

        return await self.manager.recover(resume)

    def woken(self) -> list[str]:
        """The ids of the runs that a worker would resume now."""
        return [run.run_id for run in woken_runs(self.store)]

    def record(self, run_id: str = "r") -> RunRecord:
        """A run as the store has it."""
        found = self.store.find_run(run_id)
        assert found is not None
        return found

    def is_due(self, seconds: float) -> bool:
        """Whether the plan's run will be due in so many seconds."""
        return "r" in {run.run_id for run in self.store.list_due(time.time() + seconds)}
