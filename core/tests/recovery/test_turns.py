"""Between two steps of a run other tasks have a turn, so that one whose nodes never wait can be stopped at any time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.sqlite import SQLiteStorage
from tests.recovery.conftest import GOAL, SimpleRuntime

STEPS = 12
CONFIGS: dict[str, dict[str, Any]] = {
    "each": {},
    "some": {"save_frequency": "every_n_nodes", "n_nodes": 5},
    "last": {"durability": "exit"},
    "async": {"durability": "async"},
}


class Noting:
    """A node that never waits, and notes how many turns others have had."""

    def __init__(self) -> None:
        self.turns = 0
        self.seen: list[int] = []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.seen.append(self.turns)
        return NodeResult(True, output={"n": len(self.seen)})

    async def count(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


async def turns(manager: CheckpointManager | None) -> list[int]:
    """How many turns others have had before each step."""
    node = Noting()
    graph = GraphSpec(
        id="g",
        goal_id=GOAL.id,
        entry_node="work",
        nodes=[NodeSpec(id="work")],
        edges=[EdgeSpec(id="again", source="work", target="work")],
        max_steps=STEPS,
    )
    other = asyncio.create_task(node.count())
    executor = GraphExecutor(SimpleRuntime(), node_registry={"work": node}, checkpoint_manager=manager)
    result = await executor.execute(graph, GOAL, {}, run_id="run-1")
    other.cancel()
    assert result.steps_executed == STEPS
    return node.seen


async def test_without_a_manager_others_have_a_turn_after_each_step() -> None:
    seen = await turns(None)
    assert len(set(seen)) == STEPS


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in the thread"])
async def test_others_have_a_turn_after_each_step_whether_it_is_committed_or_not(
    at_once: bool, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.storage.committer.AT_ONCE_SECONDS", 60.0 if at_once else 0.0)
    with SQLiteStorage(tmp_path / "runs.db") as storage:
        seen = await turns(CheckpointManager(storage, CheckpointConfig.model_validate(CONFIGS[config])))
    assert len(set(seen)) == STEPS
