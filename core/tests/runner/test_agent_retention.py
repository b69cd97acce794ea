"""`AgentRunner` applies its configuration's retention to the store while it lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.runner import AgentRunner
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.contract_retention import ended
from framework.storage.memory import MemoryStorage
from framework.storage.sweeping_background import Sweeping, start_sweeping
from tests.runner.agent_kit import Counting, bare


async def test_a_runner_sweeps_from_its_first_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Sweeping] = []

    def at_once(storage: MemoryStorage, policy: RetentionPolicy) -> Sweeping:
        started.append(start_sweeping(storage, policy, chance=lambda: 0.0))
        return started[-1]

    monkeypatch.setattr("framework.runner.runner.start_sweeping", at_once)
    config = CheckpointConfig(retention=RetentionPolicy(keep_failed=0))
    with MemoryStorage() as storage:
        ended(storage, "old", RunState.FAILED)
        with AgentRunner.load(bare(tmp_path), storage=storage, checkpoint_config=config) as runner:
            Counting(runner)
            assert started == []
            for run_id in ("r1", "r2"):
                assert (await runner.run({"name": "you"}, run_id=run_id)).success
            (sweeping,) = started
            while sweeping.last is None:
                sweeping._thread.join(0.01)
            assert storage.find_run("old") is None
            assert storage.find_run("r1") is not None
        assert not sweeping._thread.is_alive()


async def test_without_a_policy_nothing_is_swept(tmp_path: Path) -> None:
    with MemoryStorage() as storage:
        for config in (None, CheckpointConfig(), CheckpointConfig(retention=RetentionPolicy())):
            with AgentRunner.load(bare(tmp_path), storage=storage, checkpoint_config=config) as runner:
                Counting(runner)
                assert (await runner.run({"name": "you"})).success
                assert runner._sweeping is None
