"""What a run does when its commits are refused, its store goes away, or its process is told to stop."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import RunNotFound, StorageError
from framework.graph.node import NodeContext, NodeResult
from framework.runtime import Runtime
from framework.schemas.run import RunState, RunStatus
from framework.storage.memory import MemoryStorage
from framework.storage.records import Write
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent


class Unreliable(MemoryStorage):
    """Refuses commits, each with the chance ``rate``; with ``answers_lost`` it makes them and says it did not."""

    def __init__(self, seed: int = 0, rate: float = 0.0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.rate = rate
        self.answers_lost = False
        self.commits = 0

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self.commits += 1
        if self.random.random() >= self.rate:
            return super().commit(commits)
        if self.answers_lost:
            super().commit(commits)
        raise StorageError("The disk is full; free some space and resume.")

    def delete_run(self, run_id: str, *, force: bool = False) -> bool:
        raise StorageError("The store is read-only.")


def fan_out(agent: Agent, seed: int) -> None:
    """Six branches of two steps, which take their turns by chance."""
    order = random.Random(seed)

    async def work(ctx: NodeContext) -> dict[str, Any]:
        for _ in range(order.randrange(8)):
            await asyncio.sleep(0)
        head = ctx.node_id.removesuffix("x")
        return {f"of_{head}": [*(ctx.memory.read(f"of_{head}") or []), ctx.node_id]}

    agent.node("fan", fan_out=True)
    for index in range(6):
        agent.node(f"b{index}", work)
        agent.node(f"b{index}x", work)
        agent.chain("fan", f"b{index}", f"b{index}x")
    for index in range(6):
        agent.chain(f"b{index}x", "join")
    agent.chain("join", "end")


# --- A: on_commit_error="continue" --------------------------------------------------------------------------------


@pytest.mark.parametrize("answers_lost", [False, True])
@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_no_step_is_lost_when_concurrent_commits_fail(
    quick: Agent, durability: str, answers_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.graph.run_session._LAST_DELAY_SECONDS", 0.0)
    fan_out(quick, 0)
    quick.config |= {"on_commit_error": "continue", "durability": durability, "retention_strategy": "all"}
    for seed in range(25):
        storage = quick.storage = Unreliable(seed, 0.3)
        storage.answers_lost = answers_lost
        first = await quick.run({"in": seed})
        assert first.success
        storage.rate = 0.0
        second = await quick.run({"in": seed})
        assert sorted(second.path) == sorted(quick.nodes), seed
        assert second.output == first.output
        assert storage.verify("run-1").ok


async def test_no_checkpoint_holds_half_a_step(quick: Agent) -> None:
    """What a refused commit carried is made up for while another branch is in the middle of its step."""
    storage = quick.storage = Unreliable()
    quick.config |= {"on_commit_error": "continue", "retention_strategy": "all"}
    wrote, carried = asyncio.Event(), asyncio.Event()

    async def slow(ctx: NodeContext) -> None:
        ctx.memory.write("half", 1)
        wrote.set()
        await carried.wait()
        ctx.memory.write("half", 2)

    async def fast(ctx: NodeContext) -> dict[str, Any]:
        await wrote.wait()
        storage.rate = 1.0 if ctx.node_id == "fast" else 0.0
        return {ctx.node_id: 1}

    async def last(ctx: NodeContext) -> None:
        carried.set()

    quick.node("fan", fan_out=True)
    quick.node("slow", slow)
    quick.node("fast", fast)
    quick.node("again", fast)
    quick.node("last", last)
    quick.chain("fan", "slow", "join")
    quick.chain("fan", "fast", "again", "last", "join")
    assert (await quick.run()).output["half"] == 2
    halves = []
    for found in storage.list_checkpoints("run-1"):
        values = {}
        for chunk in storage.read_chunks("run-1", found.sequence):
            values[chunk.key.rpartition("\x00")[2]] = chunk.data
        halves.append(values.get("half"))
    assert b"1" not in halves
    assert halves[-1] == b"2"


async def test_the_last_commit_is_tried_a_bounded_number_of_times(
    quick: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.graph.run_session._LAST_DELAY_SECONDS", 0.0)
    storage = quick.storage = Unreliable(rate=1.0)
    quick.config["on_commit_error"] = "continue"
    quick.chain("a", "b")
    assert (await quick.run()).success
    assert storage.commits < 12
    assert quick.state() is RunState.CRASHED
    assert quick.record().owner is None
    assert any("end of the run could not be recorded" in told for told in quick.runtime.told("warning"))


# --- B: every n nodes ---------------------------------------------------------------------------------------------


async def test_every_n_nodes_is_due_at_the_next_quiet_moment(quick: Agent) -> None:
    """Three branches of one step: at the join step 4 is done, past the multiple of 3 that was not quiet."""
    quick.config |= {"save_frequency": "every_n_nodes", "n_nodes": 3, "retention_strategy": "all"}
    quick.node("start", fan_out=True)
    started = asyncio.Barrier(3) if hasattr(asyncio, "Barrier") else None

    async def together(ctx: NodeContext) -> None:
        if started is not None:
            await started.wait()

    for name in ("b0", "b1", "b2"):
        quick.node(name, together)
        quick.chain("start", name, "join")
    quick.chain("join", "start")
    quick.options["max_steps"] = 50
    assert not (await quick.run()).success
    assert quick.storage is not None
    saved = [found.step_number for found in quick.storage.list_checkpoints("run-1")]
    assert len(saved) >= 10
    assert max(after - before for before, after in pairwise(saved)) <= 5


async def test_without_fan_outs_commits_fall_on_multiples(quick: Agent) -> None:
    quick.config |= {"save_frequency": "every_n_nodes", "n_nodes": 4, "retention_strategy": "all"}
    quick.node("loop")
    quick.edge("loop", "loop")
    for limit in (10, 21):
        quick.options["max_steps"] = limit
        await quick.run()
    assert quick.storage is not None
    saved = [found.step_number for found in quick.storage.list_checkpoints("run-1")]
    assert saved == [4, 8, 10, 12, 16, 20, 21], "and where an execution ended"


# --- C: on_success="delete" ---------------------------------------------------------------------------------------


async def test_a_run_that_cannot_be_removed_is_completed_all_the_same(quick: Agent) -> None:
    quick.storage = Unreliable()
    quick.config["on_success"] = "delete"
    quick.chain("a", "b")
    result = await quick.run()
    assert result.success
    assert result.error is None
    assert quick.state() is RunState.COMPLETED
    assert any("was not removed" in told and "read-only" in told for told in quick.runtime.told("warning"))


# --- F: told to stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_node_that_stops_the_process_leaves_its_run_resumable(
    quick: Agent, kind: type[BaseException], durability: str
) -> None:
    runtime = quick.runtime = Runtime(MemoryStorage())
    quick.config["durability"] = durability
    quick.node("a")
    quick.node("b", lambda ctx: _raise(kind("stop")))
    quick.chain("a", "b", "c")
    with pytest.raises(kind):
        asyncio.run(quick.run())
    assert runtime.current_run is None
    document = runtime.storage.load_run("run-1")
    assert document is not None
    assert document.status is RunStatus.CANCELLED
    assert quick.state() is RunState.CANCELLED
    quick.work["b"] = lambda ctx: {}
    result = asyncio.run(quick.run())
    assert quick.ran == ["b#1", "c#1"]
    assert result.path == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_so_does_a_branch(quick: Agent, kind: type[BaseException]) -> None:
    runtime = quick.runtime = Runtime(MemoryStorage())

    async def hang(ctx: NodeContext) -> None:
        await asyncio.Event().wait()

    quick.node("fan", fan_out=True)
    quick.node("a", hang)
    quick.node("b", lambda ctx: _raise(kind("stop")))
    quick.chain("fan", "a", "join")
    quick.chain("fan", "b", "join")
    with pytest.raises(kind):
        asyncio.run(quick.run())
    assert runtime.current_run is None
    assert quick.state() is RunState.CANCELLED


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("fans_out", [False, True])
def test_a_closed_coroutine_leaves_nothing_active(quick: Agent, fans_out: bool) -> None:
    runtime = quick.runtime = Runtime(MemoryStorage())
    waiting = asyncio.Event()

    async def hang(ctx: NodeContext) -> None:
        waiting.set()
        await asyncio.Event().wait()

    quick.node("a", fan_out=fans_out)
    quick.node("b", hang)
    quick.node("c", hang)
    quick.chain("a", "b")
    if fans_out:
        quick.chain("a", "c")
    else:
        quick.chain("b", "c")

    async def main() -> None:
        coroutine = quick.run()
        driver = asyncio.create_task(_drive(coroutine))
        await waiting.wait()
        driver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driver
        coroutine.close()  # raises GeneratorExit where it waits

    asyncio.run(main())
    gc.collect()
    assert runtime.current_run is None
    assert quick.state() in (RunState.CRASHED, RunState.RUNNING)
    quick.work |= {"b": lambda ctx: {}, "c": lambda ctx: {}}
    assert asyncio.run(quick.run()).success


def test_a_closed_run_without_checkpoints_says_so_in_its_document(plain: Agent) -> None:
    """Nobody goes on with it, so it must not stand there as running for ever."""
    storage = MemoryStorage()
    runtime = plain.runtime = Runtime(storage)
    waiting = asyncio.Event()

    async def hang(ctx: NodeContext) -> None:
        waiting.set()
        await asyncio.Event().wait()

    plain.node("a", hang)

    async def main() -> None:
        coroutine = plain.run()
        driver = asyncio.create_task(_drive(coroutine))
        await waiting.wait()
        driver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driver
        coroutine.close()

    asyncio.run(main())
    gc.collect()
    assert runtime.current_run is None
    document = storage.load_run("run-1")
    assert document is not None
    assert document.status is RunStatus.CANCELLED


async def _drive(coroutine: Any) -> None:
    """Run ``coroutine`` in this task. A cancellation is not passed on: it leaves the coroutine where it waits."""

    class Steps:
        def __await__(self) -> Any:
            while True:
                yield coroutine.send(None)

    await Steps()


async def test_a_cancelled_runs_document_says_so(quick: Agent) -> None:
    runtime = quick.runtime = Runtime(MemoryStorage())
    began = asyncio.Event()

    async def hang(ctx: NodeContext) -> None:
        began.set()
        await asyncio.Event().wait()

    quick.node("a", hang)
    await quick.cancelled_when(began)
    document = runtime.storage.load_run("run-1")
    assert document is not None
    assert document.status is RunStatus.CANCELLED
    assert runtime.current_run is None


async def test_runtimes_without_a_status_are_told_of_a_failure(quick: Agent) -> None:
    began = asyncio.Event()

    async def hang(ctx: NodeContext) -> None:
        began.set()
        await asyncio.Event().wait()

    quick.node("a", hang)
    await quick.cancelled_when(began)
    assert [(end["success"], end["narrative"]) for end in quick.runtime.ended] == [(False, "cancelled")]


# --- G: the store goes away ---------------------------------------------------------------------------------------


class Emptied(MemoryStorage):
    """Knows no run any more once ``gone`` is set."""

    gone = False

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        return [RunNotFound(each.run_id) for each in commits] if self.gone else super().commit(commits)


@pytest.mark.parametrize("policy", ["stop", "continue"])
async def test_a_run_that_vanished_from_its_store_is_told_of(
    quick: Agent, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.graph.run_session._LAST_DELAY_SECONDS", 0.0)
    storage = quick.storage = Emptied()
    quick.config["on_commit_error"] = policy
    quick.node("a")
    quick.node("b", lambda ctx: setattr(storage, "gone", True))
    quick.chain("a", "b", "c")
    result = await quick.run()
    assert result.success is (policy == "continue")
    told = quick.runtime.told("critical" if policy == "stop" else "warning")
    assert any("vanished from the store" in each for each in told)


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_database_deleted_underneath_is_told_of(quick: Agent, tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "runs.db"
    with SQLiteStorage(path) as storage:
        quick.storage = storage

        def remove(ctx: NodeContext) -> NodeResult:
            path.rename(tmp_path / "away.db")
            if replaced:
                SQLiteStorage(path).close()
            return NodeResult(True)

        quick.node("a")
        quick.node("b", remove)
        quick.chain("a", "b", "c")
        result = await quick.run()
    assert not result.success
    assert "was deleted or replaced while open" in (result.error or "")
