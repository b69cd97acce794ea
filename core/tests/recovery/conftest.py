"""A small agent for the recovery tests: a graph in few words, nodes that say what ran, and a store to go on from."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from framework.storage.sqlite import SQLiteStorage

Work = Callable[[NodeContext], Any]
RUN_ID = "run-1"
GOAL = Goal(id="goal", name="Goal", description="Reach the end.")


class SimpleRuntime:
    """The least a runtime offers: three methods with keyword arguments."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []
        self.problems: list[tuple[str, str]] = []

    def start_run(self, *, goal_id: str, goal_description: str, input_data: dict[str, Any]) -> str:
        self.started.append({"goal_id": goal_id, "goal_description": goal_description, "input_data": input_data})
        return f"run_{len(self.started)}"

    def end_run(self, *, success: bool, narrative: str, output_data: dict[str, Any]) -> None:
        self.ended.append({"success": success, "narrative": narrative, "output_data": output_data})

    def report_problem(self, *, severity: str, description: str) -> str:
        self.problems.append((severity, description))
        return f"prob_{len(self.problems)}"

    def told(self, severity: str) -> list[str]:
        """The problems of one severity."""
        return [description for known, description in self.problems if known == severity]


class Node(NodeProtocol):
    """Runs one function of the context; what it returns, unless a result, is the output."""

    def __init__(self, agent: Agent, work: Work) -> None:
        self._agent = agent
        self._work = work

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self._agent.ran.append(ctx.step_key)
        self._agent.contexts.append(ctx)
        value = self._work(ctx)
        if inspect.isawaitable(value):
            value = await value
        return value if isinstance(value, NodeResult) else NodeResult(True, value or {})


class Agent:
    """A graph under construction, and its executions; each by an executor of its own, as in a new process."""

    def __init__(self, storage: Storage | None) -> None:
        self.storage = storage
        self.runtime: Any = SimpleRuntime()
        self.config: dict[str, Any] = {}
        self.nodes: dict[str, NodeSpec] = {}
        self.work: dict[str, Work] = {}
        self.edges: list[EdgeSpec] = []
        self.options: dict[str, Any] = {}
        self.ran: list[str] = []
        self.contexts: list[NodeContext] = []
        self.llm: Any = None

    def node(self, node_id: str, work: Work | None = None, **fields: Any) -> None:
        """A node; without ``work`` it does nothing, unless its type has a built-in implementation."""
        spec = {"max_retries": 1, "retry_delay_seconds": 0, "node_type": "custom", **fields}
        self.nodes[node_id] = NodeSpec.model_validate({"id": node_id, **spec})
        if work is not None or spec["node_type"] == "custom":
            self.work[node_id] = work or (lambda ctx: {})

    def edge(self, source: str, target: str, condition: str = "on_success", **fields: Any) -> None:
        self.edges.append(
            EdgeSpec.model_validate(
                {"id": f"e{len(self.edges)}", "source": source, "target": target, "condition": condition, **fields}
            )
        )

    def chain(self, *node_ids: str) -> None:
        """Edges from each node to the next; nodes not known yet are made."""
        for node_id in node_ids:
            if node_id not in self.nodes:
                self.node(node_id)
        for source, target in pairwise(node_ids):
            self.edge(source, target)

    @property
    def graph(self) -> GraphSpec:
        return GraphSpec.model_validate(
            {
                "id": "graph",
                "goal_id": "goal",
                "entry_node": next(iter(self.nodes)),
                "nodes": list(self.nodes.values()),
                "edges": self.edges,
                **self.options,
            }
        )

    def executor(self) -> GraphExecutor:
        manager = None
        if self.storage is not None:
            manager = CheckpointManager(self.storage, CheckpointConfig.model_validate(self.config))
        executor = GraphExecutor(runtime=self.runtime, llm=self.llm, checkpoint_manager=manager)
        for node_id, work in self.work.items():
            executor.register_node(node_id, Node(self, work))
        return executor

    async def run(
        self,
        input_data: dict[str, Any] | None = None,
        session_state: dict[str, Any] | None = None,
        run_id: str | None = RUN_ID,
    ) -> ExecutionResult:
        """Execute, and start a new list of what ``ran``."""
        self.ran = []
        self.contexts = []
        return await self.executor().execute(self.graph, GOAL, input_data, session_state, run_id=run_id)

    async def cancelled_when(self, ready: asyncio.Event, input_data: dict[str, Any] | None = None) -> None:
        """Execute and cancel once ``ready`` is set."""
        task = asyncio.create_task(self.run(input_data))
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def record(self, run_id: str = RUN_ID) -> RunRecord:
        assert self.storage is not None
        record = self.storage.find_run(run_id)
        assert record is not None
        return record

    def state(self) -> RunState:
        return self.record().state


class Turns:
    """Lets concurrent bodies finish in a chosen order. A body asks ``await turns(name)`` before it ends."""

    def __init__(self, order: Sequence[str]) -> None:
        self._events = {name: asyncio.Event() for name in order}
        self._order = list(order)
        self._begun: set[str] = set()
        self.everybody = asyncio.Event()

    async def __call__(self, name: str) -> None:
        """Return when all have begun and it is this one's turn; ``done`` lets the next one go."""
        self._begun.add(name)
        if self._begun == set(self._order):
            self.everybody.set()
            self._events[self._order[0]].set()
        await self._events[name].wait()
        following = self._order[self._order.index(name) + 1 :]
        if following:
            # The next one goes on once this one's step is over and its commit, too, had time to be made.
            asyncio.get_running_loop().call_later(0.02, self._events[following[0]].set)


def fail_once() -> Work:
    """A body that fails the first time it is called in this test, as for a reason that has gone away since."""
    calls: list[str] = []

    def work(ctx: NodeContext) -> NodeResult:
        calls.append(ctx.step_key)
        if len(calls) == 1:
            return NodeResult(False, error="the service is down")
        return NodeResult(True, {f"{ctx.node_id}_done": True})

    return work


@pytest.fixture
def fails_once() -> Callable[[], Work]:
    return fail_once


@pytest.fixture
def turns() -> type[Turns]:
    return Turns


@pytest.fixture
def simple_runtime() -> SimpleRuntime:
    return SimpleRuntime()


@pytest.fixture(params=["memory", "sqlite", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Each kind of store."""
    opened: Storage
    if request.param == "memory":
        opened = MemoryStorage()
    elif request.param == "sqlite":
        opened = SQLiteStorage(tmp_path / "runs.db")
    else:
        opened = FileStorage(tmp_path / "store")
    with opened:
        yield opened


@pytest.fixture
def agent(storage: Storage) -> Agent:
    """An agent over each kind of store."""
    return Agent(storage)


@pytest.fixture
def quick() -> Iterator[Agent]:
    """An agent over a store in memory: for what does not depend on the kind of store."""
    with MemoryStorage() as opened:
        yield Agent(opened)


@pytest.fixture
def plain() -> Agent:
    """An agent without a checkpoint manager."""
    return Agent(None)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="framework")


@pytest.fixture
def agent_over() -> type[Agent]:
    """Makes an agent over any store."""
    return Agent
