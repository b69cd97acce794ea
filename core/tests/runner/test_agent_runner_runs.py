"""Durable runs of `AgentRunner`: resumed, recovered, forked, and kept apart from those of other agents."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from framework.errors import DefinitionChanged, ResumeError, RunBusy, RunNotFound, StorageError
from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.crash_loops import is_given_up
from framework.graph.node import NodeContext, NodeProtocol, NodeResult
from framework.graph.run_messages import cancel_name
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentRunner
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import HELLO, LLM_NODE, NODES, Counting, bare, chain, function, write_agent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of the test's own, and no keys."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("SUREFOOT_STORAGE", "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


async def test_a_failed_run_resumes_after_its_last_step(tmp_path: Path) -> None:
    with AgentRunner.load(bare(tmp_path), storage=f"sqlite:///{tmp_path}/runs.db") as runner:
        counting = Counting(runner, fail=True)
        failed = await runner.run({"name": "you"}, run_id="r")
        assert not failed.success
        assert counting.calls == ["hello", "shout"]
        assert runner.runs()[0].state is RunState.FAILED
        counting.fail = False
        result = await runner.resume()
        assert (result.run_id, result.success, result.steps_recovered) == ("r", True, 1)
        assert counting.calls == ["hello", "shout", "shout"]
        assert [each.sequence for each in runner.checkpoints("r")][-1] >= 2
        assert runner.list_checkpoints("r") == runner.checkpoints("r")
        again = await runner.resume("r")
        assert again.output == result.output
        assert counting.calls == ["hello", "shout", "shout"]
        with pytest.raises(RunNotFound, match="no unfinished run"):
            await runner.resume("latest")
    assert runner.storage is not None
    assert runner.storage.closed


async def test_a_completed_run_needs_no_model_to_give_its_result(tmp_path: Path) -> None:
    folder = write_agent(tmp_path / "a", chain(LLM_NODE))
    storage = MemoryStorage()
    with AgentRunner.load(folder, storage=storage, llm=ScriptedLLM(["done"])) as runner:
        await runner.run({"topic": "t"}, run_id="r")
    with AgentRunner.load(folder, storage=storage) as runner:
        assert (await runner.resume("r")).output["text"] == "done"
        assert not (await runner.run({"topic": "t"}, run_id="s")).success


async def test_a_paused_run_goes_on_with_the_answer(tmp_path: Path) -> None:
    ask = {"id": "ask", "node_type": "human_input", "output_keys": ["greeting"]}
    folder = write_agent(tmp_path / "a", chain(ask, function("shout", "greeting", "loud")))
    with AgentRunner.load(folder, storage=MemoryStorage()) as runner:
        runner.register_function("shout", lambda greeting: greeting.upper())
        paused = await runner.run(run_id="r")
        assert paused.paused_at == "ask"
        result = await runner.resume("latest", {"greeting": "moin"})
        assert result.output["loud"] == "MOIN"


async def test_a_paused_run_goes_on_by_its_session_state_without_a_store(tmp_path: Path) -> None:
    graph = {**HELLO, "pause_nodes": ["hello"], "entry_points": {"hello_resume": "shout"}}
    with AgentRunner.load(write_agent(tmp_path / "a", graph, nodes=NODES)) as runner:
        paused = await runner.run({"name": "you"})
        assert paused.paused_at == "hello"
        result = await runner.run({"input": "yes"}, paused.session_state)
        assert result.path == ["shout"]
        assert result.output["loud"] == "HELLO YOU"


async def test_a_changed_agent_is_refused_with_what_changed(tmp_path: Path) -> None:
    storage = MemoryStorage()
    folder = bare(tmp_path)
    with AgentRunner.load(folder, storage=storage) as runner:
        Counting(runner, fail=True)
        await runner.run({"name": "you"}, run_id="r")
    data = json.loads((folder / "agent.json").read_text())
    data["graph"]["nodes"][1]["output_keys"] = ["louder"]
    (folder / "agent.json").write_text(json.dumps(data))
    with AgentRunner.load(folder, storage=storage) as runner:
        calls = Counting(runner).calls
        with pytest.raises(DefinitionChanged, match=r"node 'shout': output_keys \['loud'\] -> \['louder'\]"):
            await runner.resume("latest")
        assert calls == []
    config = CheckpointConfig(definition_change="allow")
    with AgentRunner.load(folder, storage=storage, checkpoint_config=config) as runner:
        Counting(runner)
        assert (await runner.resume()).output["louder"] == "HELLO YOU"


async def test_latest_is_the_newest_unfinished_run_of_this_agent_alone(tmp_path: Path) -> None:
    storage = MemoryStorage()
    one, two = (AgentRunner.load(bare(tmp_path, name), storage=storage) for name in ("one", "two"))
    for runner, run_id, fail in ((one, "a", True), (one, "b", True), (one, "c", False), (two, "d", True)):
        Counting(runner, fail)
        await runner.run({"name": run_id}, run_id=run_id)
    Counting(one)
    assert [run.run_id for run in one.runs()] == ["c", "b", "a"]
    assert [run.run_id for run in one.runs(limit=1)] == ["c"]
    assert [run.run_id for run in one.runs([RunState.FAILED])] == ["b", "a"]
    assert (await one.resume()).run_id == "b"
    assert (await one.resume()).run_id == "a"
    with pytest.raises(RunNotFound):
        await one.resume()
    with pytest.raises(RunNotFound, match="'nowhere'"):
        await one.resume("nowhere")
    assert [run.run_id for run in two.runs()] == ["d"]


async def test_more_runs_than_a_page_are_found(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage) as runner:
        counting = Counting(runner, fail=True)
        await runner.run({"name": "first"}, run_id="first")
        counting.fail = False
        for number in range(105):
            await runner.run({"name": "x"}, run_id=f"r{number}")
        assert len(runner.runs(limit=1000)) == 106
        counting.calls.clear()
        assert (await runner.resume()).run_id == "first"
        assert counting.calls == ["shout"]


async def test_what_is_recorded_with_a_run(tmp_path: Path) -> None:
    from framework.storage import codec

    with AgentRunner.load(bare(tmp_path), storage=MemoryStorage(), mock_mode=True, model="m") as runner:
        Counting(runner)
        await runner.run({"name": "you"}, run_id="r")
        header = codec.decode(runner.runs()[0].header)
    assert header["metadata"] == {
        "agent_path": str(tmp_path / "bare"),
        "agent_name": "bare",
        "model": "m",
        "mock": True,
    }


@pytest.mark.parametrize("store", ["sqlite:///{}/runs.db", "file://{}/runs"])
async def test_a_fork_is_a_run_of_this_agent_and_leaves_the_original_as_it_was(tmp_path: Path, store: str) -> None:
    with AgentRunner.load(bare(tmp_path), storage=store.format(tmp_path)) as runner:
        calls = Counting(runner).calls
        original = await runner.run({"name": "you"}, run_id="r")
        first = runner.checkpoints("r")[0]
        assert runner.fork("r", at=first.sequence, changes={"greeting": "moin"}, new_run_id="f") == "f"
        assert [run.run_id for run in runner.runs([RunState.PAUSED])] == ["f"]
        assert [each.id.startswith("ckpt_f_hello_") for each in runner.checkpoints("f")] == [True]
        forked = await runner.resume()
        assert (forked.run_id, forked.output["loud"]) == ("f", "MOIN")
        assert calls == ["hello", "shout", "shout"]
        assert (await runner.resume("r")).output == original.output
        with pytest.raises(RunNotFound):
            runner.fork("nowhere")


async def test_a_run_that_is_running_is_busy(tmp_path: Path) -> None:
    async with AgentRunner.load(bare(tmp_path), storage=MemoryStorage()) as runner:
        started, go_on = asyncio.Event(), asyncio.Event()

        async def hello(name: str) -> str:
            started.set()
            await go_on.wait()
            return name

        Counting(runner)
        runner.register_function("hello", hello)
        running = asyncio.create_task(runner.run({"name": "you"}, run_id="r"))
        await started.wait()
        with pytest.raises(RunBusy):
            await runner.resume("latest")
        assert await runner.recover() == []
        go_on.set()
        assert (await running).success


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, "prune_old"), ({"checkpoint_config": CheckpointConfig()}, "latest_only")],
)
def test_the_runner_keeps_the_last_checkpoints_unless_told_otherwise(
    tmp_path: Path, options: dict[str, Any], kept: str
) -> None:
    with AgentRunner.load(bare(tmp_path), storage=MemoryStorage(), **options) as runner:
        assert runner.checkpoint_manager is not None
        assert runner.checkpoint_manager.config.retention_strategy == kept
        assert runner.checkpoint_manager.config.max_checkpoints_per_run == 100


async def test_a_configuration_alone_uses_the_default_store(tmp_path: Path, home: Path) -> None:
    async with AgentRunner.load(bare(tmp_path), checkpoint_config=CheckpointConfig()) as runner:
        Counting(runner)
        await runner.run({"name": "you"}, run_id="r")
    with open_storage(f"sqlite:///{home}/surefoot/runs.db") as storage:
        assert [run.run_id for run in storage.list_runs()] == ["r"]


async def test_a_given_manager_is_used_and_its_storage_left_open(tmp_path: Path) -> None:
    manager = CheckpointManager(MemoryStorage())
    with AgentRunner.load(bare(tmp_path), checkpoint_manager=manager) as runner:
        assert runner.checkpoint_manager is manager
        assert runner.storage is manager.storage
    assert not manager.storage.closed
    with pytest.raises(ValueError, match="not both"):
        AgentRunner.load(bare(tmp_path), checkpoint_manager=manager, storage=MemoryStorage())


async def test_a_disabled_configuration_keeps_nothing_and_resumes_nothing(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage, checkpoint_config=CheckpointConfig(enabled=False)) as runner:
        Counting(runner)
        assert (await runner.run({"name": "you"}, run_id="r")).success
        with pytest.raises(ResumeError):
            await runner.resume("r")
    assert storage.list_runs() == []


def test_a_storage_that_was_opened_is_closed_when_loading_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = MemoryStorage()
    monkeypatch.setattr("framework.runner.runner.open_storage", lambda url, keys: opened)
    folder = write_agent(tmp_path / "a", HELLO, nodes="1 / 0")
    with pytest.raises(ValueError, match=r"nodes\.py:1: ZeroDivisionError"):
        AgentRunner.load(folder, storage="memory://")
    assert opened.closed


async def test_cleanup_may_be_called_again_and_a_closed_store_says_so(tmp_path: Path) -> None:
    runner = AgentRunner.load(bare(tmp_path), storage="memory://")
    Counting(runner)
    await runner.cleanup_async()
    runner.cleanup()
    with pytest.raises(StorageError):
        await runner.resume("r")


async def test_a_run_that_keeps_crashing_is_not_recovered_for_ever(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage) as runner:
        counting = Counting(runner, fail=True)
        await runner.run({"name": "you"}, run_id="r")
        counting.fail = False
        assert runner.checkpoint_manager is not None
        for _ in range(runner.checkpoint_manager.config.max_recovery_attempts + 1):
            storage.claim_run("r", "somebody", 1e-9)
        ran = list(counting.calls)
        [result] = await runner.recover()
        assert (result.success, result.error_type) == (False, "recovery")
        assert "ended its process 6 times in a row" in (result.error or "")
        assert "'shout'" in (result.error or "")
        assert counting.calls == ran
        record = storage.find_run("r")
        assert record is not None
        assert (record.state, record.error, record.owner) == (RunState.FAILED, result.error, None)
        assert is_given_up(record)
        assert await runner.recover() == []
        assert await runner.recover(failed=True) == [], "it is for a person"
        assert (await runner.resume("r")).success


async def test_recover_cancels_a_run_that_was_asked_to_stop_before_it_crashed(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage) as runner:
        counting = Counting(runner, fail=True)
        await runner.run({"name": "you"}, run_id="r")
        ran = list(counting.calls)
        token = storage.claim_run("r", "somebody", 1e-9).token
        storage.send("r", cancel_name(token), b"null")
        [result] = await runner.recover()
        assert (result.run_id, result.success, result.error) == ("r", False, "cancelled on request")
        assert counting.calls == ran
        assert runner.runs()[0].state is RunState.CANCELLED
        assert await runner.recover() == []
        counting.fail = False
        assert (await runner.resume("r")).success


async def test_recover_resumes_crashed_runs_of_this_agent_oldest_first(tmp_path: Path) -> None:
    storage = MemoryStorage()
    one, two = (AgentRunner.load(bare(tmp_path, name), storage=storage) for name in ("one", "two"))
    for runner, run_id in ((one, "a"), (one, "b"), (one, "failed"), (two, "c")):
        Counting(runner, fail=True)
        await runner.run({"name": run_id}, run_id=run_id)
    for run_id in "abc":
        storage.claim_run(run_id, "somebody", 1e-9)
    calls = Counting(one).calls
    assert [result.run_id for result in await one.recover(limit=1)] == ["a"]
    assert [result.run_id for result in await one.recover()] == ["b"]
    assert await one.recover() == []
    assert calls == ["shout", "shout"]


class Waits(NodeProtocol):
    """Sleeps, or waits for a signal when it was told to."""

    def __init__(self) -> None:
        self.for_signal = False

    async def execute(self, ctx: NodeContext) -> NodeResult:
        if self.for_signal:
            return NodeResult(True, {"greeting": await ctx.wait_for("go")})
        await ctx.sleep(0.2)
        return NodeResult(True, {"greeting": "rested"})


async def test_recover_wakes_runs_that_are_due_or_answered_and_no_other(tmp_path: Path) -> None:
    config = CheckpointConfig(sleep_in_process_seconds=0)
    storage = MemoryStorage()
    with AgentRunner.load(bare(tmp_path), storage=storage, checkpoint_config=config) as runner:
        Counting(runner)
        node = Waits()
        runner.register_node("hello", node)
        assert runner.checkpoint_manager is not None
        assert (await runner.run({"name": "you"}, run_id="sleeper")).paused_at == "hello"
        node.for_signal = True
        for name in ("waiting", "answered"):
            assert (await runner.run({"name": "you"}, run_id=name)).paused_at == "hello"
        runner.checkpoint_manager.send("waiting", "other", 1)  # not what it waits for
        runner.checkpoint_manager.send("answered", "go", "went")
        [answered] = [each for each in await runner.recover() if each.run_id == "answered"]
        assert answered.output["greeting"] == "went"
        node.for_signal = False
        for _ in range(200):
            found = await runner.recover()
            if found or storage.find_run("sleeper").state is RunState.COMPLETED:  # type: ignore[union-attr]
                break
            await asyncio.sleep(0.01)
        assert [(each.run_id, each.output["greeting"]) for each in found] == [("sleeper", "rested")]
        assert [run.run_id for run in runner.runs([RunState.PAUSED])] == ["waiting"]
        assert await runner.recover() == []


async def test_a_budget_is_the_runs_and_a_larger_one_lets_it_go_on(tmp_path: Path) -> None:
    with AgentRunner.load(bare(tmp_path), storage=MemoryStorage()) as runner:
        counting = Counting(runner)
        over = await runner.run({"name": "you"}, run_id="r", budget=RunBudget(max_cost=0.0))
        assert (over.success, over.error_type) == (False, "budget")
        assert not (await runner.resume("r")).success
        assert counting.calls == []
        assert (await runner.resume("r", budget=RunBudget(max_cost=1.0))).success
