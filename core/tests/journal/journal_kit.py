"""What the tests of the journal share: a store in memory, attempts that crash, and short ways to run one node."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.journal import AttemptJournal, CallSpec, StepJournal, request_hash
from framework.graph.journal_rows import Policy
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.llm.provider import Tool
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.interface import Storage
from framework.storage.records import JournalRow, Message
from tests.graph.executor_kit import MinimalRuntime, edge, graph_of

GOAL = Goal(id="goal", name="Goal", description="Get it done")


class Rows:
    """A journal's store in memory; what it holds is durable."""

    def __init__(self) -> None:
        self.run_id = "run"
        self.stops_on_error = True
        self.rows: dict[int, bytes] = {}
        self.messages: list[Message] = []
        self.writes = 0
        self.progress = 0

    def write_journal(self, rows: Sequence[JournalRow], *, progress: bool = False) -> Future[None]:
        self.writes += 1
        self.progress += progress
        self.rows.update((row.number, row.record) for row in rows)
        return _done(None)

    def read_journal(self, step: str) -> Future[list[JournalRow]]:
        return _done([JournalRow(step, number, record) for number, record in sorted(self.rows.items())])

    def read_messages(self) -> Future[list[Message]]:
        return _done(list(self.messages))

    def leave_message(self, name: str, body: bytes) -> Future[None]:
        self.messages.append(Message(self.run_id, name, body, 0.0))
        return _done(None)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Crash(BaseException):
    """The process ends here: nothing of the attempt is told to anybody."""


class Outside:
    """The world: counts what reached it, by what was asked. Each answer is another one."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.keys: dict[str, set[str]] = {}
        self.crash_at: int | None = None
        self.on_crash: Callable[[], None] = lambda: None
        self.calls = 0

    def answer(self, what: str, key: str) -> str:
        self.calls += 1
        self.reached[what] += 1
        self.keys.setdefault(what, set()).add(key)
        if self.calls == self.crash_at:
            self.on_crash()
            raise Crash(what)
        return f"{what} at {self.calls}"


class Life:
    """One attempt of a step in a process of its own, over what is left in ``rows``."""

    def __init__(self, rows: Rows, outside: Outside, **options: Any) -> None:
        options.setdefault("must_load", True)
        self.step = StepJournal("n#1", "run/n#1", rows, **options)
        self.outside = outside
        self.journal = AttemptJournal(self.step)

    async def call(self, what: str, policy: Policy = "rerun", name: str = "get") -> str:
        async def make(key: str) -> str:
            await asyncio.sleep(0)
            return self.outside.answer(what, key)

        return await self.journal.call(name, request_hash(what, "what"), make, CallSpec(policy))

    async def run(self, work: Callable[[Life], Awaitable[Any]]) -> Any:
        await self.journal.begin()
        return await work(self)


Body = Callable[[NodeContext], Awaitable[Any]]


class Node:
    """A node that is one async function of its context; its value is the output ``value``."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.attempts = 0

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.attempts += 1
        return NodeResult(True, {"value": await self.body(ctx)})


class Quiet:
    """A node that does nothing and puts nothing out."""

    async def execute(self, ctx: NodeContext) -> NodeResult:
        return NodeResult(True)


def loop_graph() -> GraphSpec:
    """``a`` is visited again and again while its value is true; then comes ``b``."""
    return graph_of(
        NodeSpec(id="a", output_keys=["value"], max_retries=1),
        NodeSpec(id="b"),
        edges=[
            edge("a", "a", "conditional", condition_expr="value == True"),
            edge("a", "b", "conditional", condition_expr="value == False"),
        ],
    )


class Bench:
    """One store, and runs of one graph over it: each ``run`` is what a new process would do."""

    def __init__(self, storage: Storage, **config: Any) -> None:
        self.storage = storage
        self.config = CheckpointConfig(**config)
        self.runtime = MinimalRuntime()

    @property
    def manager(self) -> CheckpointManager:
        return CheckpointManager(self.storage, self.config)

    async def run(
        self,
        *bodies: Any,
        llm: Any = None,
        tools: Sequence[Tool] = (),
        tool_executor: Any = None,
        graph: GraphSpec | None = None,
        input_data: dict[str, Any] | None = None,
        budget: RunBudget | None = None,
        run_id: str = "run",
        attempts: int = 1,
    ) -> ExecutionResult:
        nodes = [body if hasattr(body, "execute") else Node(body) for body in bodies]
        self.runtime = MinimalRuntime()
        names = "abcdefgh"[: len(nodes)]
        if graph is None:
            specs = [NodeSpec(id=each, max_retries=attempts, retry_delay_seconds=0) for each in names]
            graph = graph_of(*specs)
        executor = GraphExecutor(
            self.runtime,
            llm,
            list(tools),
            tool_executor,
            dict(zip(names, nodes, strict=True)),
            checkpoint_manager=self.manager,
        )
        return await executor.execute(graph, GOAL, input_data, run_id=run_id, budget=budget)

    async def cancelled(self, *bodies: Any, **options: Any) -> None:
        """Run until a body sets ``stop``; then the run is cancelled, as by the end of its process."""
        task = asyncio.create_task(self.run(*bodies, **options))
        try:
            await task
        except asyncio.CancelledError:
            return
        raise AssertionError("the run was not cancelled")


def question_of(bench: Bench) -> str:
    """The id of the one question of the run that is open."""
    calls = [call for call in bench.manager.journal("run") if call.kind == "ask" and call.state == "waiting"]
    [name] = [call.answers_to for call in calls]
    assert name is not None
    return name
