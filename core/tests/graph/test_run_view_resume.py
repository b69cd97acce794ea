"""What a view says a resume would do is what a resume does: stopped anywhere, and then gone on with."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.run_view import RunView
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of
from tests.graph.run_view_kit import RUN_ID, checked


class Body:
    """Notes every step that starts; the ``stop_at``-th hangs, after telling ``hanging``."""

    def __init__(self, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.started: list[str] = []
        self.hanging = asyncio.Event()
        self._stop_at = stop_at
        self._fail_at = fail_at

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.started.append(ctx.step_key)
        number = len(self.started)
        if number == self._stop_at:
            self.hanging.set()
            await asyncio.Event().wait()
        if number == self._fail_at:
            return NodeResult(success=False, error="down")
        await asyncio.sleep(0)
        rounds = int(ctx.memory.read("rounds") or 0) + 1 if ctx.node_id == "loop" else None
        return NodeResult(success=True, output={f"{ctx.node_id}_done": 1, **({"rounds": rounds} if rounds else {})})


def shape() -> GraphSpec:
    """A loop of three rounds, then a fan-out of a chain, a nested fan-out and a single node, and an end."""
    names = "loop split a1 a2 nested n1 n2 nend c end last".split()
    nodes = [NodeSpec(id=name, node_type="custom", max_retries=1) for name in names]
    by_id = {node.id: node for node in nodes}
    by_id["split"].fan_out, by_id["split"].join_node = True, "end"
    by_id["nested"].fan_out, by_id["nested"].join_node = True, "nend"
    pairs = "split-a1 a1-a2 a2-end split-nested nested-n1 nested-n2 n1-nend n2-nend nend-end split-c c-end end-last"
    split = [pair.split("-") for pair in pairs.split()]
    edges = [edge(source, target, "on_success") for source, target in split]
    edges.append(edge("loop", "loop", "conditional", condition_expr="rounds < 3", priority=1))
    edges.append(edge("loop", "split", "conditional", condition_expr="rounds >= 3"))
    return graph_of(*nodes, edges=edges)


STEPS = 13


def executor_over(storage: Storage, body: Body, **config: Any) -> GraphExecutor:
    executor = GraphExecutor(
        runtime=MinimalRuntime(), checkpoint_manager=CheckpointManager(storage, CheckpointConfig(**config))
    )
    for node in shape().nodes:
        executor.register_node(node.id, body)
    return executor


async def check(storage: Storage, view: RunView) -> None:
    """Go on, and compare what ran with what the view said."""
    said = {each.step for each in view.resume.again} | set(view.resume.first)
    body = Body()
    result = await executor_over(storage, body).execute(shape(), GOAL, run_id=RUN_ID)
    assert result.success
    assert said <= set(body.started[: len(said)]), (view.resume, body.started)
    assert not set(view.resume.kept) & set(body.started)
    assert len(set(view.resume.kept) | set(body.started)) == STEPS
    assert checked(storage).resume.verdict == "nothing"
    assert {step.status for step in checked(storage).steps} == {"done"}


@pytest.mark.parametrize("retention", ["latest_only", "all"])
@pytest.mark.parametrize("stop_at", range(1, STEPS + 1))
async def test_a_run_cancelled_at_any_step(stop_at: int, retention: str) -> None:
    with MemoryStorage() as storage:
        body = Body(stop_at=stop_at)
        executor = executor_over(storage, body, retention_strategy=retention)
        task = asyncio.create_task(executor.execute(shape(), GOAL, run_id=RUN_ID))
        await body.hanging.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        view = checked(storage, definition=shape())
        assert (view.state, view.resume.verdict) == (RunState.CANCELLED, "goes_on")
        hung = body.started[stop_at - 1]
        assert hung in {each.step for each in view.resume.again}
        # Everything that had started is either kept or named as running again.
        assert set(body.started) == set(view.resume.kept) | {
            each.step for each in view.resume.again if each.step in body.started
        }
        await check(storage, view)


# In its later rounds a failed loop goes on: its edges are conditions, which a failure may fulfil as well.
@pytest.mark.parametrize("fail_at", [1, *range(4, STEPS + 1)])
async def test_a_run_that_failed_at_any_step(fail_at: int) -> None:
    with MemoryStorage() as storage:
        body = Body(fail_at=fail_at)
        result = await executor_over(storage, body).execute(shape(), GOAL, run_id=RUN_ID)
        assert not result.success
        view = checked(storage)
        failed = body.started[fail_at - 1]
        assert {step.key for step in view.steps if step.status == "failed"} == {failed}
        assert [each.step for each in view.resume.again if each.certain] == [failed]
        await check(storage, view)


@pytest.mark.parametrize("stop_at", range(2, STEPS + 1, 3))
async def test_with_fewer_commits_fewer_steps_are_kept_and_the_view_knows(stop_at: int) -> None:
    with MemoryStorage() as storage:
        body = Body(stop_at=stop_at)
        executor = executor_over(storage, body, save_frequency="every_n_nodes", n_nodes=2)
        task = asyncio.create_task(executor.execute(shape(), GOAL, run_id=RUN_ID))
        await body.hanging.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await check(storage, checked(storage))
