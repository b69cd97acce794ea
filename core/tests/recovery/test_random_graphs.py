"""Any graph, stopped at any commits, comes to what the undisturbed run comes to, and repeats nothing committed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from framework.errors import StorageError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.planner import Step
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.checkpoints import parse_log
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit

GOAL = Goal(id="goal", name="Goal", description="Get to the end.")
MAX_VISITS = 2
MAX_DEPTH = 2
ROUNDS = 200


@st.composite
def graphs(draw: st.DrawFn) -> GraphSpec:
    names = [f"n{index}" for index in range(draw(st.integers(3, 5)))]
    name = st.sampled_from(names)
    fanning = draw(st.sets(name, max_size=2))
    ways = [(each, target) for each in names for target in draw(st.lists(name, min_size=1, max_size=3, unique=True))]
    graph = GraphSpec(
        id="g",
        goal_id="goal",
        entry_node="n0",
        max_steps=100_000,
        nodes=[
            NodeSpec(id=each, node_type="custom", fan_out=each in fanning, max_retries=2, retry_delay_seconds=0)
            for each in names
        ],
        edges=[
            EdgeSpec.model_validate(
                {
                    "id": f"e{index}",
                    "source": source,
                    "target": target,
                    "condition": "conditional",
                    "condition_expr": f"e{index} == 1",
                    "input_mapping": draw(st.sampled_from([{}, {"given": "last"}])),
                }
            )
            for index, (source, target) in enumerate(ways)
        ],
        terminal_nodes=draw(st.lists(name, max_size=1)),
        pause_nodes=draw(st.lists(name, max_size=1)),
        append_only_keys=["log"],
        reducers={
            "sum": "sum",
            "last": "max",
            "saw": "union",
            "given": "max",
            **{f"e{index}": "max" for index in range(len(ways))},
        },
    )
    assume(not graph.validate())
    return graph


@dataclass
class Body(NodeProtocol):
    """A node that decides by ``seed`` and its step, whichever process asks, and takes its time by ``pace``."""

    graph: GraphSpec
    seed: int
    pace: random.Random
    ran: list[tuple[str, int]] = field(default_factory=list)

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.ran.append((ctx.step_key, ctx.attempt))
        for _ in range(self.pace.randrange(4)):
            await asyncio.sleep(0)
        rng = random.Random(f"{self.seed}/{ctx.step_key}")
        memory = ctx.memory
        memory.write("log", [*(memory.read("log") or []), ctx.step_key])
        if rng.random() < 0.15 and ctx.attempt == 1:
            return NodeResult(False, error="once", tokens_used=100)
        memory.write("sum", (memory.read("sum") or 0) + 1)
        if isinstance(memory.read("saw"), set):
            memory.read("saw").add(f"{ctx.node_id} was given {memory.read('given')}")
        visit = int(ctx.step_key.rpartition("#")[2])
        over = visit >= MAX_VISITS or ctx.step_key.rpartition(":")[0].count("/") >= MAX_DEPTH
        ways = {edge.id: int(not over and rng.random() < 0.9) for edge in self.graph.get_outgoing_edges(ctx.node_id)}
        return NodeResult(True, {**ways, "last": ctx.step_key}, tokens_used=1)


class Stopping(MemoryStorage):
    """Refuses some commits, by ``luck``; the executor then stops as it would at a kill."""

    def __init__(self, luck: random.Random, share: float) -> None:
        super().__init__()
        self._luck = luck
        self._share = share

    def commit(self, commits: Sequence[Commit]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for commit in commits:
            if self._luck.random() < self._share:
                outcomes.append(StorageError("this commit is refused"))
            else:
                outcomes += super().commit([commit])
        return outcomes

    def committed(self) -> set[str]:
        if self.find_run("r") is None:
            return set()
        return {
            Step(record["node"], record["visit"], record.get("branch", "")).key
            for record in parse_log(self.read_log("r"))
            if record["kind"] == "step"
        }


def run(graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float) -> list[Any]:
    """What the run comes to over all its processes: its pauses and its end."""
    luck = random.Random(order)
    endings: list[Any] = []
    with Stopping(luck, share) as storage:
        for _ in range(ROUNDS):
            body = Body(graph, seed, luck)
            before = storage.committed()
            executor = GraphExecutor(
                runtime=Runtime(MemoryStorage()),
                checkpoint_manager=CheckpointManager(storage, config),
                node_registry={node.id: body for node in graph.nodes},
            )
            result = asyncio.run(executor.execute(graph, GOAL, {"saw": set()}, run_id="r"))
            assert not {step for step, _ in body.ran} & before, "a committed step ran again"
            assert len(set(body.ran)) == len(body.ran)
            # A pause is told again when the call that was to go on came to nothing before its first commit.
            if result.success and comparable(result) not in endings[-1:]:
                endings.append(comparable(result))
            if result.success and result.paused_at is None:
                assert storage.verify().ok
                return endings
            assert result.success or "refused" in (result.error or ""), result.error
    raise AssertionError(f"not finished after {ROUNDS} processes")


def comparable(result: ExecutionResult) -> tuple[Any, ...]:
    return (
        result.paused_at,
        dict(sorted(result.output.items())),
        result.path,
        result.steps_executed,
        result.total_tokens,
        result.session_state.get("next_node"),
    )


configs = st.builds(
    CheckpointConfig,
    retention_strategy=st.sampled_from(["all", "latest_only", "prune_old"]),
    max_checkpoints_per_run=st.integers(1, 3),
    durability=st.sampled_from(["sync", "sync", "async"]),
    save_frequency=st.sampled_from(["every_node", "every_node", "every_n_nodes"]),
    n_nodes=st.integers(1, 3),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graphs(), st.integers(0, 10**6), configs, st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.2]))
def test_the_same_end_however_often_it_is_stopped(
    graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float
) -> None:
    logging.getLogger("framework").setLevel(logging.CRITICAL)
    undisturbed = run(graph, seed, CheckpointConfig(), 0, 0.0)
    assert run(graph, seed, config, order, share) == undisturbed
