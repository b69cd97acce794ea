"""Nothing that a step does, and nothing that is kept in memory, grows with the run's history."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from framework.graph.node import NodeContext
from framework.graph.run_commits import MAX_UNDER_WAY
from framework.runtime import Runtime
from framework.storage import codec
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent


def loop(agent: Agent, steps: int, work: Any) -> None:
    """A node that follows itself until ``n`` is ``steps``."""
    agent.node("work", work)
    agent.edge("work", "work", "conditional", condition_expr=f"n < {steps}", input_mapping={"n": "n"})
    agent.options = {"max_steps": steps, "append_only_keys": ["messages"]}


@pytest.mark.parametrize("retention", ["latest_only", "prune_old", "all"])
async def test_a_late_step_does_what_an_early_one_did(
    quick: Agent, retention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements and virtual machine steps of SQLite, and bytes encoded, at step 20 and at step 400."""
    store = quick.storage = SQLiteStorage(tmp_path / "runs.db")
    quick.config = {"retention_strategy": retention, "max_checkpoints_per_run": 10}
    statements: list[str] = []
    encoded = 0
    costs: list[tuple[int, int, int]] = []
    store._db.set_trace_callback(statements.append)
    ticks = 0

    def tick() -> int:
        nonlocal ticks
        ticks += 1
        return 0

    store._db.set_progress_handler(tick, 10)
    encode = codec.encode

    def counted(value: Any, path: str = "value") -> bytes:
        nonlocal encoded
        data = encode(value, path)
        encoded += len(data)
        return data

    monkeypatch.setattr(codec, "encode", counted)

    def work(ctx: NodeContext) -> dict[str, Any]:
        nonlocal encoded, ticks
        costs.append((len(statements), ticks, encoded))
        statements.clear()
        encoded = ticks = 0
        number = (ctx.memory.read("n") or 0) + 1
        messages = ctx.memory.read("messages") or []
        messages.append(f"{number:<1000}")
        return {"n": number, "messages": messages}

    loop(quick, 410, work)
    assert (await quick.run()).success
    store.close()
    early, late = costs[20:30], costs[400:410]
    for what, least in ((0, 2), (1, 6), (2, 100)):
        first, last = (sorted(cost[what] for cost in some)[len(some) // 2] for some in (early, late))
        assert last <= first * 1.1 + least, (what, early, late)


async def growth(agent: Agent, first: int, last: int) -> float:
    """Bytes by which Python's memory grew per step between two steps."""
    sizes: dict[int, int] = {}

    def work(ctx: NodeContext) -> dict[str, Any]:
        agent.ran.clear()  # the test's own notes
        agent.contexts.clear()
        number = (ctx.memory.read("n") or 0) + 1
        if number in (first, last):
            gc.collect()
            sizes[number] = tracemalloc.get_traced_memory()[0]
        return {"n": number, "text": f"{number:<500}"}

    loop(agent, last, work)
    tracemalloc.start()
    try:
        result = await agent.run()
    finally:
        tracemalloc.stop()
    assert result.success
    assert len(result.path) == last
    return (sizes[last] - sizes[first]) / (last - first)


async def test_a_run_keeps_a_reference_for_each_step_and_no_more(quick: Agent) -> None:
    with MemoryStorage() as store:
        quick.storage, quick.runtime = store, Runtime(store)
        assert await growth(quick, 400, 1_400) < 50


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_memory_is_flat_over_100_000_steps(quick: Agent) -> None:
    with MemoryStorage() as store:
        quick.storage, quick.runtime = store, Runtime(store)
        assert await growth(quick, 1_000, 100_000) < 12  # the path of the result is 8 of them


async def test_a_store_that_is_slower_than_its_run_holds_it_up(quick: Agent) -> None:
    """Under async durability a run goes on ahead of its commits, but not without end."""
    gate, entered = threading.Event(), threading.Event()
    groups: list[int] = []

    class Slow(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            if any(isinstance(one, Commit) for one in commits):
                groups.append(len(commits))
                entered.set()
                assert gate.wait(20)
            return super().commit(commits)

    steps = 0

    def work(ctx: NodeContext) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        return {"n": steps}

    with Slow() as store:
        quick.storage = store
        quick.config = {"durability": "async"}
        loop(quick, 300, work)
        running = asyncio.create_task(quick.run())
        seen = -1
        while steps != seen or not entered.is_set() or steps <= MAX_UNDER_WAY:  # until it goes no further
            seen = steps
            for _ in range(20):
                await asyncio.sleep(0)
        assert steps == MAX_UNDER_WAY + 1
        assert not running.done()
        gate.set()
        assert (await running).success
    assert steps == 300
    assert sum(groups) == 300
