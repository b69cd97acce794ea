"""Whose run it is: agents that share a store, copies of an agent, and agents that have been moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.errors import DefinitionChanged, ResumeError, RunNotFound
from framework.runner import AgentRunner
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import Counting, bare, chain, function, write_agent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


async def crashed(folder: Path, storage: MemoryStorage, run_id: str) -> AgentRunner:
    """An agent one of whose runs lost its process after the first step."""
    runner = AgentRunner.load(folder, storage=storage)
    Counting(runner, fail=True)
    await runner.run({"name": run_id}, run_id=run_id)
    storage.claim_run(run_id, "somebody", 1e-9)
    Counting(runner)
    return runner


async def test_two_copies_of_an_agent_leave_each_others_runs_alone(tmp_path: Path) -> None:
    storage = MemoryStorage()
    mine = await crashed(bare(tmp_path / "mine"), storage, "m")
    yours = await crashed(bare(tmp_path / "yours"), storage, "y")
    assert [run.run_id for run in mine.runs()] == ["m"]
    assert [result.run_id for result in await mine.recover()] == ["m"]
    with pytest.raises(RunNotFound, match="no unfinished run"):
        await mine.resume("latest")
    # Who names the run and the copy wants it to go on there.
    assert (await mine.resume("y")).success
    assert [run.run_id for run in yours.runs()] == ["y"]


async def test_an_agent_that_was_moved_keeps_its_runs(tmp_path: Path) -> None:
    storage = MemoryStorage()
    await crashed(bare(tmp_path / "before"), storage, "r")
    shutil.move(tmp_path / "before", tmp_path / "after")
    runner = AgentRunner.load(tmp_path / "after" / "bare", storage=storage)
    Counting(runner)
    assert [(each.run_id, each.success) for each in await runner.recover()] == [("r", True)]


async def test_a_link_to_the_folder_is_the_same_agent(tmp_path: Path) -> None:
    storage = MemoryStorage()
    await crashed(bare(tmp_path), storage, "r")
    (tmp_path / "link").symlink_to(tmp_path / "bare")
    runner = AgentRunner.load(tmp_path / "link", storage=storage)
    assert [run.run_id for run in runner.runs()] == ["r"]


@pytest.mark.parametrize(
    "use",
    [
        lambda runner: runner.resume("r"),
        lambda runner: runner.run({"name": "x"}, run_id="r"),
        lambda runner: runner.checkpoints("r"),
        lambda runner: runner.fork("r"),
    ],
)
@pytest.mark.parametrize("same_graph", [True, False])
async def test_a_run_of_another_agent_is_refused_by_its_id(
    tmp_path: Path, use: Callable[[AgentRunner], object], same_graph: bool
) -> None:
    storage = MemoryStorage()
    await crashed(bare(tmp_path, "theirs", **({} if same_graph else {"id": "another-graph"})), storage, "r")
    config = CheckpointConfig(definition_change="allow")
    runner = AgentRunner.load(bare(tmp_path, "mine"), storage=storage, checkpoint_config=config)
    calls = Counting(runner).calls
    with pytest.raises(ResumeError, match="Run 'r' belongs to agent 'theirs'.*not to agent 'mine'"):
        result = use(runner)
        if hasattr(result, "__await__"):
            await result
    assert calls == []
    assert [run.run_id for run in storage.list_runs()] == ["r"]


async def test_an_agent_that_changed_its_graph_meets_the_change_not_a_stranger(tmp_path: Path) -> None:
    storage = MemoryStorage()
    folder = bare(tmp_path)
    await crashed(folder, storage, "r")
    write_agent(folder, chain(function("hello", "name", "greeting"), function("shout", "", "loud"), id="renamed"))
    runner = AgentRunner.load(folder, storage=storage)
    Counting(runner)
    with pytest.raises(DefinitionChanged):
        await runner.resume("r")
