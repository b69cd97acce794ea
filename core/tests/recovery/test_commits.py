"""When commits are made, what happens when one fails, and what they cost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import StorageError
from framework.graph.node import NodeContext, NodeResult
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent, Work


class Flaky(MemoryStorage):
    """Refuses commits of chosen sequences, once for each time they are named, and can be slow."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.refuse: list[int] = []
        self.delay_seconds = 0.0
        self.sizes: list[int] = []

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self.calls += 1
        if self.delay_seconds:
            time.sleep(self.delay_seconds)
        outcomes: list[Exception | None] = []
        for commit in commits:
            if isinstance(commit, Commit) and commit.sequence in self.refuse:
                self.refuse.remove(commit.sequence)
                outcomes.append(StorageError("The disk is full; free some space and resume."))
            else:
                outcomes += super().commit([commit])
        self.sizes.extend(
            len(each.record)
            + len(each.log or b"")
            + len(each.checkpoint or b"")
            + sum(len(chunk.data) for chunk in each.chunks)
            for each in commits
            if isinstance(each, Commit)
        )
        return outcomes


@pytest.fixture
def flaky(quick: Agent) -> Flaky:
    storage = Flaky()
    quick.storage = storage
    return storage


def steps(agent: Agent, *names: str) -> None:
    for name in names:
        agent.node(
            name, lambda ctx: {f"{ctx.node_id}_out": ctx.step_key, "all": [*ctx.memory.read("all"), ctx.node_id]}
        )
    agent.chain(*names)


def at_sequences(agent: Agent) -> list[tuple[int, str]]:
    assert agent.storage is not None
    return [(found.step_number, found.node_id) for found in agent.storage.list_checkpoints("run-1")]


async def test_retention_latest_only_keeps_one(agent: Agent) -> None:
    steps(agent, "a", "b", "c")
    await agent.run({"all": []})
    assert at_sequences(agent) == [(3, "c")]


async def test_retention_all_keeps_every_one(agent: Agent) -> None:
    agent.config["retention_strategy"] = "all"
    steps(agent, "a", "b", "c")
    await agent.run({"all": []})
    assert at_sequences(agent) == [(1, "a"), (2, "b"), (3, "c")]
    assert agent.storage is not None
    snapshots = [agent.storage.load_checkpoint("run-1", found.id) for found in agent.storage.list_checkpoints("run-1")]
    assert [found.memory_snapshot["all"] for found in snapshots if found] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert [found.execution_path for found in snapshots if found] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert [found.next_node_id for found in snapshots if found] == ["b", "c", None]


async def test_retention_prune_old_keeps_the_newest(agent: Agent) -> None:
    agent.config |= {"retention_strategy": "prune_old", "max_checkpoints_per_run": 2}
    steps(agent, "a", "b", "c", "d")
    await agent.run({"all": []})
    assert at_sequences(agent) == [(3, "c"), (4, "d")]


async def test_every_n_nodes_commits_each_nth_step(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.config |= {"save_frequency": "every_n_nodes", "n_nodes": 2, "retention_strategy": "all"}
    steps(agent, "a", "b", "c")
    agent.node("d", fails_once())
    agent.edge("c", "d")
    first = await agent.run({"all": []})
    assert first.path == ["a", "b", "c", "d"]
    assert at_sequences(agent) == [(2, "b"), (3, "c")], "the failed ending commits what was waiting"
    result = await agent.run()
    assert agent.ran == ["d#1"]
    assert result.path == ["a", "b", "c", "d"]
    assert result.output["all"] == ["a", "b", "c"]


async def test_between_commits_retries_are_not_logged_ahead(agent: Agent) -> None:
    """A retry after uncommitted steps must not leave them in the log without their checkpoint."""
    agent.config |= {"save_frequency": "every_n_nodes", "n_nodes": 5}
    agent.node("a")
    agent.node("b", lambda ctx: NodeResult(ctx.attempt == 2, error="once"), max_retries=2)
    agent.node("c", lambda ctx: _die())
    agent.chain("a", "b", "c")

    def _die() -> None:
        raise StorageError("the store is gone")  # nothing more can be committed, as after a kill

    assert not (await agent.run()).success
    assert agent.state() is RunState.CRASHED
    agent.work["c"] = lambda ctx: {}
    result = await agent.run()
    assert agent.ran == ["a#1", "b#1", "b#1", "c#1"]
    assert result.path == ["a", "b", "c"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("frequency", [{}, {"save_frequency": "every_n_nodes", "n_nodes": 3}])
async def test_every_durability_ends_with_everything_durable(
    agent: Agent, fails_once: Callable[[], Work], durability: str, frequency: dict[str, Any]
) -> None:
    agent.config |= {"durability": durability, **frequency}
    steps(agent, "a", "b")
    agent.node("c", fails_once(), max_retries=1)
    agent.node("e", lambda ctx: NodeResult(ctx.attempt == 2, {"e_out": ctx.attempt}, error="once"), max_retries=2)
    agent.chain("b", "c", "e")
    assert not (await agent.run({"all": []})).success
    result = await agent.run()
    assert agent.ran == ["c#1", "e#1", "e#1"]
    assert result.path == ["a", "b", "c", "e"]
    assert result.output["e_out"] == 2
    stored = await agent.run()
    assert agent.ran == []
    assert (stored.path, stored.output) == (result.path, result.output)
    assert agent.storage is not None
    assert agent.storage.verify("run-1").ok


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_cancelled_run_is_durable_up_to_the_step_in_flight(agent: Agent, durability: str) -> None:
    began = asyncio.Event()
    agent.config["durability"] = durability
    steps(agent, "a", "b")

    async def hang(ctx: NodeContext) -> None:
        if not began.is_set():
            began.set()
            await asyncio.Event().wait()

    agent.node("c", hang)
    agent.edge("b", "c")
    await agent.cancelled_when(began, {"all": []})
    assert agent.state() is RunState.CANCELLED
    result = await agent.run()
    assert agent.ran == ["c#1"]
    assert result.path == ["a", "b", "c"]


async def test_sync_means_durable_before_the_next_node(flaky: Flaky, quick: Agent) -> None:
    seen: list[int] = []
    quick.node("a", lambda ctx: seen.append(flaky.calls))
    quick.node("b", lambda ctx: seen.append(flaky.calls))
    quick.node("c", lambda ctx: seen.append(flaky.calls))
    quick.chain("a", "b", "c")
    await quick.run()
    assert seen == [0, 1, 2]


# --- commits that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_a_failed_commit_stops_the_run_which_can_go_on(flaky: Flaky, quick: Agent, durability: str) -> None:
    quick.config["durability"] = durability
    flaky.refuse = [2]
    steps(quick, "a", "b", "c", "d")
    first = await quick.run({"all": []})
    assert not first.success
    assert "disk is full" in (first.error or "")
    assert any("disk is full" in text for text in quick.runtime.told("critical"))
    assert quick.state() is RunState.CRASHED
    assert quick.record().owner is None
    result = await quick.run({"all": []})
    assert quick.ran == ["b#1", "c#1", "d#1"]
    assert result.success
    assert result.path == ["a", "b", "c", "d"]
    assert result.output["all"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("durability", "refuse"),
    [("sync", [2]), ("sync", [1, 1, 1]), ("sync", [2, 4]), ("async", [2]), ("async", [1]), ("async", [2, 4])],
)
async def test_the_run_goes_on_without_a_failed_commit_if_it_may(
    flaky: Flaky, quick: Agent, durability: str, refuse: list[int], fails_once: Callable[[], Work]
) -> None:
    quick.config |= {"on_commit_error": "continue", "durability": durability}
    flaky.refuse = list(refuse)
    steps(quick, "a", "b", "c", "d", "e")
    quick.node("f", fails_once())
    quick.edge("e", "f")
    first = await quick.run({"all": []})
    assert first.path == ["a", "b", "c", "d", "e", "f"]
    assert any("disk is full" in text for text in quick.runtime.told("warning"))
    result = await quick.run({"all": []})
    assert quick.ran == ["f#1"], "a later commit carried what the failed ones did"
    assert result.path == ["a", "b", "c", "d", "e", "f"]
    assert result.output["all"] == ["a", "b", "c", "d", "e"]
    assert flaky.verify("run-1").ok


async def test_a_failed_commit_in_a_fan_out_is_made_up_for(flaky: Flaky, quick: Agent) -> None:
    quick.config["on_commit_error"] = "continue"
    flaky.refuse = [2, 2]
    quick.node("fan", fan_out=True)
    for name in ("left", "right"):
        quick.node(name, lambda ctx: {f"{ctx.node_id}_out": 1})
        quick.edge("fan", name)
        quick.edge(name, "join")
    quick.node("join", lambda ctx: {"joined": sorted(ctx.memory.read_all())})
    result = await quick.run()
    assert result.success
    assert result.output["joined"] == ["left_out", "right_out"]
    stored = await quick.run()
    assert quick.ran == []
    assert stored.output == result.output
    assert stored.path == ["fan", "left", "right", "join"]
    assert flaky.verify("run-1").ok


async def test_a_failed_last_commit_leaves_the_run_to_be_finished(flaky: Flaky, quick: Agent) -> None:
    flaky.refuse = [2]
    steps(quick, "a", "b")
    assert not (await quick.run({"all": []})).success
    result = await quick.run({"all": []})
    assert quick.ran == ["b#1"]
    assert result.success


async def test_a_run_may_be_removed_when_it_completes(agent: Agent) -> None:
    agent.config["on_success"] = "delete"
    steps(agent, "a", "b")
    assert (await agent.run({"all": []})).success
    assert agent.storage is not None
    assert agent.storage.find_run("run-1") is None
    await agent.run({"all": []})
    assert agent.ran == ["a#1", "b#1"], "the same id starts anew"


# --- cost ---------------------------------------------------------------------------------------------------------


async def test_a_slow_commit_does_not_block_the_event_loop(flaky: Flaky, quick: Agent) -> None:
    flaky.delay_seconds = 0.2
    quick.chain("a", "b")
    ticks = 0
    task = asyncio.create_task(quick.run())
    while not task.done():
        ticks += 1
        await asyncio.sleep(0.005)
    assert (await task).success
    assert flaky.calls == 2
    assert ticks > 20


async def test_changes_in_place_are_caught(agent: Agent) -> None:
    """Whoever was handed a container may change it later, in any step."""
    kept: list[Any] = []

    def first(ctx: NodeContext) -> dict[str, Any]:
        made = {"deep": [1]}
        kept.append(made)
        return {"made": made}

    agent.config["retention_strategy"] = "all"
    agent.node("a", first)
    agent.node("b", lambda ctx: kept[0]["deep"].append(2))
    agent.node("c", lambda ctx: ctx.memory.read("made")["deep"].append(3))
    agent.node("d", lambda ctx: ctx.memory.read_all()["made"]["deep"].append(4))
    agent.chain("a", "b", "c", "d")
    await agent.run()
    assert agent.storage is not None
    found = [agent.storage.load_checkpoint("run-1", each.id) for each in agent.storage.list_checkpoints("run-1")]
    assert [each.memory_snapshot["made"]["deep"] for each in found if each] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


async def test_a_restored_value_changed_in_place_is_caught(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("a", lambda ctx: {"rows": [1]})
    agent.node("b", fails_once())
    agent.node("c", lambda ctx: ctx.memory.read("rows").append(2))
    agent.node("d", fails_once())
    agent.chain("a", "b", "c", "d")
    for _ in range(3):
        result = await agent.run()
    assert result.output["rows"] == [1, 2]


async def test_three_thousand_steps_keep_commits_small(flaky: Flaky, quick: Agent) -> None:
    quick.node("loop", lambda ctx: {"n": (ctx.memory.read("n") or 0) + 1})
    quick.node("end")
    quick.edge("loop", "end", "conditional", condition_expr="n >= 3000", priority=1)
    quick.edge("loop", "loop")
    quick.options |= {"max_steps": 4000, "append_only_keys": ["messages"]}
    quick.work["loop"] = _talk
    result = await quick.run({"messages": []})
    assert result.success
    assert len(result.path) == 3001
    assert flaky.sizes[2990] <= flaky.sizes[10] + 20, "numbers have grown by a few digits"
    assert max(flaky.sizes) < 2 * flaky.sizes[10]
    assert len(flaky.sizes) == 3001


def _talk(ctx: NodeContext) -> dict[str, Any]:
    ctx.memory.read("messages").append("m" * 100)
    return {"n": (ctx.memory.read("n") or 0) + 1}


async def test_a_commit_of_one_run_does_not_wait_in_the_loops_thread(flaky: Flaky, quick: Agent) -> None:
    threads: set[int] = set()
    commit = flaky.commit

    def noted(commits: Sequence[Write]) -> list[Exception | None]:
        threads.add(threading.get_ident())
        return commit(commits)

    flaky.commit = noted  # type: ignore[method-assign]
    quick.chain("a", "b")
    await quick.run()
    assert len(threads) == 1
    assert threading.get_ident() not in threads
