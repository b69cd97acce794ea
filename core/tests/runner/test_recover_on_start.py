"""``AgentRunner(recover_on_start=True)``, and what its runs look like from outside while their process is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from framework.graph.node import NodeContext, NodeProtocol, NodeResult
from framework.runner import AgentRunner
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import Counting, bare


async def left_behind(storage: MemoryStorage, folder: Path, *run_ids: str) -> None:
    """Runs of the agent whose process vanished."""
    with AgentRunner.load(folder, storage=storage) as runner:
        Counting(runner, fail=True)
        for run_id in run_ids:
            await runner.run({"name": run_id}, run_id=run_id)
            storage.claim_run(run_id, "gone", 1e-9)


async def test_in_a_block_it_recovers_in_the_background(tmp_path: Path) -> None:
    storage, folder = MemoryStorage(), bare(tmp_path)
    await left_behind(storage, folder, "a", "b")
    async with AgentRunner.load(folder, storage=storage, recover_on_start=True) as runner:
        Counting(runner)
        result = await runner.run({"name": "new"}, run_id="new")
        assert result.success
        again = await runner.run(run_id="b")  # waits for the recovery, and is given its result
        assert (again.success, again.steps_recovered) == (True, 2)
        assert {each.run_id for each in runner.recovered} == {"a", "b"}
    assert {run.run_id for run in storage.list_runs([RunState.COMPLETED])} == {"a", "b", "new"}


async def test_outside_of_a_block_the_first_run_waits_for_it(tmp_path: Path) -> None:
    storage, folder = MemoryStorage(), bare(tmp_path)
    await left_behind(storage, folder, "a", "b")
    with AgentRunner.load(folder, storage=storage, recover_on_start=True) as runner:
        Counting(runner)
        assert (await runner.run({"name": "new"}, run_id="new")).success
        assert [(each.run_id, each.success) for each in runner.recovered] == [("a", True), ("b", True)]
        await left_behind(storage, folder, "later")
        await runner.run({"name": "other"}, run_id="other")
        assert len(runner.recovered) == 2, "once, at its start"


class Hangs(NodeProtocol):
    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.begun.set()
        await asyncio.Event().wait()
        return NodeResult(True)


async def test_the_end_of_the_block_leaves_the_rest_to_the_next_process(tmp_path: Path) -> None:
    storage, folder = MemoryStorage(), bare(tmp_path)
    await left_behind(storage, folder, "a", "b")
    node = Hangs()
    async with AgentRunner.load(folder, storage=storage, recover_on_start=True) as runner:
        Counting(runner)
        runner.register_node("shout", node)
        await node.begun.wait()
    for run_id in "ab":
        record = storage.find_run(run_id)
        assert record is not None
        assert (record.state, record.error) == (RunState.CRASHED, record.error)
    with AgentRunner.load(folder, storage=storage) as runner:
        Counting(runner)
        assert [each.success for each in await runner.recover(concurrency=2)] == [True, True]


async def test_without_a_store_nothing_is_recovered(tmp_path: Path) -> None:
    async with AgentRunner.load(bare(tmp_path), recover_on_start=True) as runner:
        Counting(runner)
        assert (await runner.run({"name": "you"})).success
        assert runner.recovered == []


async def test_failed_runs_are_recovered_when_asked_for(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage) as runner:
        counting = Counting(runner, fail=True)
        await runner.run({"name": "you"}, run_id="r")
        assert await runner.recover() == []
        counting.fail = False
        [result] = await runner.recover(failed=True)
        assert (result.run_id, result.success) == ("r", True)


async def test_a_run_whose_process_is_gone_is_listed_as_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage) as runner:
        Counting(runner, fail=True)
        for run_id in ("alive", "dead"):
            await runner.run({"name": "you"}, run_id=run_id)
            storage.claim_run(run_id, run_id, 3600)
        monkeypatch.setattr("framework.storage.ownership.is_alive", lambda owner: owner == "alive")
        assert [(run.run_id, run.state.value) for run in runner.runs()] == [("dead", "crashed"), ("alive", "running")]
        assert [run.run_id for run in runner.runs([RunState.CRASHED])] == ["dead"]
        assert [run.run_id for run in runner.runs([RunState.RUNNING])] == ["alive"]
