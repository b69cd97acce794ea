"""Any graph, stopped at any commits, comes to what the undisturbed run comes to, and repeats nothing committed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
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
from framework.storage.contract import snapshot
from framework.storage.memory import MemoryStorage
from framework.storage.records import Write

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

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for commit in commits:
            if self._luck.random() < self._share:
                outcomes.append(StorageError("this commit is refused"))
            else:
                outcomes += super().commit([commit])
        return outcomes

    def committed(self, run_id: str) -> set[str]:
        if self.find_run(run_id) is None:
            return set()
        return {
            Step(record["node"], record["visit"], record.get("branch", "")).key
            for record in parse_log(self.read_log(run_id))
            if record["kind"] == "step"
        }


def run(graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float) -> list[Any]:
    """What the run comes to over all its processes: its pauses and its end."""
    luck = random.Random(order)
    with Stopping(luck, share) as storage:
        return run_in(storage, graph, seed, config, luck)


def run_in(
    storage: Stopping, graph: GraphSpec, seed: int, config: CheckpointConfig, luck: random.Random, run_id: str = "r"
) -> list[Any]:
    endings: list[Any] = []
    for _ in range(ROUNDS):
        body = Body(graph, seed, luck)
        before = storage.committed(run_id)
        executor = GraphExecutor(
            runtime=Runtime(MemoryStorage()),
            checkpoint_manager=CheckpointManager(storage, config),
            node_registry={node.id: body for node in graph.nodes},
        )
        result = asyncio.run(executor.execute(graph, GOAL, {"saw": set()}, run_id=run_id))
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


def joined_after_a_pause() -> GraphSpec:
    """A pause in a branch, and a join whose node fails once: that attempt was forgotten when the run stopped next."""
    ways = [("n0", "n3"), ("n1", "n1"), ("n2", "n4"), ("n3", "n1"), ("n3", "n2"), ("n4", "n1")]
    # The names decide what a body does, so the edges keep those of the example that was found.
    names = ["e0", "e3", "e4", "e6", "e7", "e8"]
    edges = [
        EdgeSpec.model_validate(
            {
                "id": name,
                "source": way[0],
                "target": way[1],
                "condition": "conditional",
                "condition_expr": f"{name} == 1",
            }
        )
        for name, way in zip(names, ways, strict=True)
    ]
    return GraphSpec(
        id="g",
        goal_id="goal",
        entry_node="n0",
        nodes=[
            NodeSpec(id=f"n{n}", node_type="custom", fan_out=n == 3, max_retries=2, retry_delay_seconds=0)
            for n in range(5)
        ],
        edges=edges,
        pause_nodes=["n4"],
        append_only_keys=["log"],
        reducers={"sum": "sum", "last": "max", "saw": "union", "given": "max", **dict.fromkeys(names, "max")},
    )


def stop(graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float) -> None:
    logging.getLogger("framework").setLevel(logging.CRITICAL)
    undisturbed = run(graph, seed, CheckpointConfig(), 0, 0.0)
    assert run(graph, seed, config, order, share) == undisturbed


def fork_anywhere(graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float) -> None:
    logging.getLogger("framework").setLevel(logging.CRITICAL)
    undisturbed = run(graph, seed, CheckpointConfig(), 0, 0.0)
    luck = random.Random(order)
    with Stopping(luck, share) as storage:
        manager = CheckpointManager(storage)
        run_in(storage, graph, seed, config.model_copy(update={"retention_strategy": "all"}), luck)
        before = snapshot(storage, "r")
        kept = [row.sequence for row in storage.read_checkpoint_rows("r")]
        for at in luck.sample(kept, min(4, len(kept))):
            fork = manager.fork("r", at)
            assert snapshot(storage, "r") == before
            endings = run_in(storage, graph, seed, config, luck, fork)
            # Of pauses it tells those that were not answered before.
            assert endings == undisturbed[-len(endings) :]
            assert snapshot(storage, "r") == before
        storage.delete_run("r")
        assert storage.verify().ok


def drawn(examples: int) -> settings:
    ignored = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(deadline=None, max_examples=examples, suppress_health_check=ignored)


STOPPED = (graphs(), st.integers(0, 10**6), configs, st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.2]))
FORKED = (graphs(), st.integers(0, 10**6), configs, st.integers(0, 10**6), st.sampled_from([0.0, 0.1]))


@drawn(25)
@example(joined_after_a_pause(), 72922, CheckpointConfig(retention_strategy="all"), 1647, 0.2)
@given(*STOPPED)
def test_the_same_end_however_often_it_is_stopped(
    graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float
) -> None:
    stop(graph, seed, config, order, share)


@drawn(15)
@given(*FORKED)
def test_a_fork_at_any_checkpoint_comes_to_the_same_end(
    graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float
) -> None:
    fork_anywhere(graph, seed, config, order, share)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@drawn(1000)
@given(*STOPPED)
def test_the_same_end_at_length(
    graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float
) -> None:
    stop(graph, seed, config, order, share)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@drawn(1000)
@given(*FORKED)
def test_a_fork_at_any_checkpoint_at_length(
    graph: GraphSpec, seed: int, config: CheckpointConfig, order: int, share: float
) -> None:
    fork_anywhere(graph, seed, config, order, share)
