"""Signals: which value is whose, and what comes too early or too late."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framework.errors import MessageRefused
from framework.graph import journal_slots as slots
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.run_view import view_run
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import edge, graph_of
from tests.journal.journal_kit import Bench, Quiet, loop_graph, question_of


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves, for the steps and for the store."""
    made = Clock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


def looping(times: int) -> tuple[GraphSpec, Callable[[NodeContext], Any], list[Any]]:
    """A graph whose first node waits for "go" in each of its visits."""
    got: list[Any] = []

    async def body(ctx: NodeContext) -> bool:
        value = await ctx.wait_for("go")
        got.append([ctx.step_key, value])
        return len({each[0] for each in got}) < times

    return loop_graph(), body, got


async def test_each_visit_takes_a_value_of_its_own() -> None:
    graph, body, got = looping(3)
    bench = Bench(MemoryStorage())
    for number in (1, 2, 3):
        assert (await bench.run(body, Quiet(), graph=graph)).paused_at == "a"
        bench.manager.send("run", "go", f"value {number}")
        with pytest.raises(MessageRefused, match=r"the first one counts.*occurrence="):
            bench.manager.send("run", "go", "once more")
        with pytest.raises(MessageRefused, match="first one counts"):
            bench.manager.send("run", "go", "once more", occurrence=number)
    assert (await bench.run(body, Quiet(), graph=graph)).success
    assert got == [[f"a#{number}", f"value {number}"] for number in (1, 2, 3)]


async def test_values_may_come_early_for_waits_that_are_yet_to_come() -> None:
    graph, body, got = looping(3)
    bench = Bench(MemoryStorage())

    async def first(ctx: NodeContext) -> None:
        bench.manager.send("run", "go", "one")
        with pytest.raises(MessageRefused, match="occurrence=2"):
            bench.manager.send("run", "go", "two")
        bench.manager.send("run", "go", "three", occurrence=3)

    before = graph_of(NodeSpec(id="c"), *graph.nodes, edges=[edge("c", "a"), *graph.edges])
    bodies = (body, Quiet(), first)
    assert (await bench.run(*bodies, graph=before)).paused_at == "a"
    [waiting] = view_run(bench.storage, "run").resume.waiting
    assert (waiting.name, waiting.occurrence) == ("go", 2)
    bench.manager.send("run", "go", "two")
    assert (await bench.run(*bodies, graph=before)).success
    assert got == [["a#1", "one"], ["a#2", "two"], ["a#3", "three"]]


async def test_a_late_value_for_an_answered_wait_is_refused_once_its_step_is_done() -> None:
    bench = Bench(MemoryStorage())

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    async def other(ctx: NodeContext) -> Any:
        return await ctx.wait_for("stop")

    assert (await bench.run(waits, other)).paused_at == "a"
    bench.manager.send("run", "go", 1)
    assert (await bench.run(waits, other)).paused_at == "b"
    assert [call.step for call in bench.manager.journal("run")] == ["b#1"]
    with pytest.raises(MessageRefused, match=r"too late; wait number 1 .* is over.*occurrence=2"):
        bench.manager.send("run", "go", 2)
    assert [each.name for each in bench.storage.read_messages("run")] == ["signal:1:go"]


async def test_a_late_value_for_a_wait_that_timed_out_is_refused_once_its_step_is_done(clock: Clock) -> None:
    bench = Bench(MemoryStorage())

    async def waits(ctx: NodeContext) -> Any:
        try:
            return await ctx.wait_for("go", timeout_seconds=100)
        except TimeoutError:
            return "nobody"

    async def again(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    async def between(ctx: NodeContext) -> Any:
        return await ctx.wait_for("next")

    assert (await bench.run(waits, between, again)).paused_at == "a"
    clock.now += 101
    with pytest.raises(MessageRefused, match="too late"):
        bench.manager.send("run", "go", "late")
    assert (await bench.run(waits, between, again)).paused_at == "b"
    for occurrence in (None, 1):
        with pytest.raises(MessageRefused, match="timed out"):
            bench.manager.send("run", "go", "late", occurrence=occurrence)
    bench.manager.send("run", "next", 1)
    assert (await bench.run(waits, between, again)).paused_at == "c", "the late value is not the next wait's"
    bench.manager.send("run", "go", "in time")
    assert (await bench.run(waits, between, again)).output["value"] == "in time"


async def test_a_value_that_came_at_the_last_moment_is_not_dropped(clock: Clock) -> None:
    """Whoever was told that it was sent: it counts, though the run looks only after the time is over."""
    bench = Bench(MemoryStorage())

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go", timeout_seconds=100)

    assert (await bench.run(waits)).paused_at == "a"
    clock.now += 99
    bench.manager.send("run", "go", "just so")
    clock.now += 1000
    assert (await bench.run(waits)).output["value"] == "just so"


class Slow(MemoryStorage):
    """A store in which a sender looks, and something else happens before it leaves its message."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], None] | None = None

    def send(self, run_id: str, name: str, body: bytes) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        super().send(run_id, name, body)


async def test_a_wait_that_times_out_while_a_value_is_on_its_way_has_one_outcome(clock: Clock) -> None:
    """The sender has looked, the wait was open; then the run closes it, and then the sender's message comes."""
    store = Slow()
    bench = Bench(store)

    async def waits(ctx: NodeContext) -> Any:
        try:
            return await ctx.wait_for("go", timeout_seconds=100)
        except TimeoutError:
            return await ctx.wait_for("other")

    assert (await bench.run(waits)).paused_at == "a"

    def the_run_wakes_up() -> None:
        clock.now += 200
        woken = threading.Thread(target=lambda: asyncio.run(_run(bench, waits)))
        woken.start()
        woken.join(20)
        assert not woken.is_alive()

    store.meanwhile = the_run_wakes_up
    with pytest.raises(MessageRefused, match="over"):
        bench.manager.send("run", "go", "crossed")
    assert [call.state for call in bench.manager.journal("run")] == ["timed_out", "waiting"]


async def _run(bench: Bench, *bodies: Any) -> ExecutionResult:
    return await bench.run(*bodies)


@pytest.mark.parametrize("scheme", ["memory", "sqlite", "file"])
async def test_of_senders_at_once_one_wins(scheme: str, tmp_path: Path) -> None:
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/runs.db", "file": f"file://{tmp_path}/runs"}
    with open_storage(urls[scheme]) as storage:
        bench = Bench(storage)

        async def waits(ctx: NodeContext) -> Any:
            return [await ctx.wait_for("go"), await ctx.ask("Which?", int)]

        assert (await bench.run(waits)).paused_at == "a"
        won = await _race(bench, "go")
        assert (await bench.run(waits)).paused_at == "a"
        also = await _race(bench, question_of(bench))
        assert (await bench.run(waits)).output["value"] == [won, also]


async def _race(bench: Bench, name: str) -> int:
    """Send from four threads at once; the one value that was taken."""
    barrier = threading.Barrier(4)

    def send(number: int) -> int | None:
        barrier.wait()
        try:
            bench.manager.send("run", name, number)
        except MessageRefused:
            return None
        return number

    results = await asyncio.gather(*(asyncio.to_thread(send, number) for number in range(4)))
    [won] = [each for each in results if each is not None]
    return won


async def test_waits_of_one_name_in_one_gather_take_one_value_each() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return await asyncio.gather(*(ctx.wait_for("vote") for _ in range(3)))

    assert (await bench.run(body)).paused_at == "a"
    for value in "xyz":
        bench.manager.send("run", "vote", value)
    with pytest.raises(MessageRefused, match="first one counts"):
        bench.manager.send("run", "vote", "w")
    assert sorted((await bench.run(body)).output["value"]) == ["x", "y", "z"]


async def test_all_attempts_of_a_step_wait_for_the_same_value() -> None:
    bench = Bench(MemoryStorage())
    seen: list[Any] = []

    async def body(ctx: NodeContext) -> Any:
        seen.append(await ctx.wait_for("go"))
        if len(seen) == 1:
            raise RuntimeError("after the value")
        return await ctx.wait_for("go")

    assert (await bench.run(body, attempts=2)).paused_at == "a"
    bench.manager.send("run", "go", 1)
    assert (await bench.run(body, attempts=2)).paused_at == "a"
    assert seen == [1, 1]
    bench.manager.send("run", "go", 2)
    assert (await bench.run(body, attempts=2)).output["value"] == 2


async def test_a_failed_run_takes_a_value_for_the_wait_it_will_come_to_again() -> None:
    bench = Bench(MemoryStorage())
    fail = [True]

    async def body(ctx: NodeContext) -> Any:
        async def other() -> None:
            if fail:
                raise RuntimeError("no good")

        task = asyncio.create_task(ctx.wait_for("go"))
        try:
            await ctx.call("other", other)
        except RuntimeError:
            task.cancel()
            raise
        return await task

    async def first(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    assert (await bench.run(first, body)).paused_at == "a"
    bench.manager.send("run", "go", 0)
    assert (await bench.run(first, body)).error is not None
    assert bench.storage.find_run("run").state is RunState.FAILED  # type: ignore[union-attr]
    fail.clear()
    bench.manager.send("run", "go", "for the second", occurrence=2)
    assert (await bench.run(first, body)).output["value"] == "for the second"


async def test_a_wait_that_its_step_gave_up_takes_nothing_any_more() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return ctx.input_data.get("answer") or await ctx.wait_for("go")

    async def other(ctx: NodeContext) -> Any:
        return await ctx.wait_for("other")

    assert (await bench.run(body, other)).paused_at == "a"
    assert (await bench.run(body, other, input_data={"answer": 42})).paused_at == "b"
    for occurrence in (None, 1):
        with pytest.raises(MessageRefused, match="too late"):
            bench.manager.send("run", "go", 1, occurrence=occurrence)
    assert bench.storage.read_messages("run") == []


async def test_names_of_signals_and_ids_of_questions_are_kept_apart() -> None:
    bench = Bench(MemoryStorage())
    odd = ("order/q0123abcd", "1:go", "go#2", "signal:1:x", "a\nb")

    async def body(ctx: NodeContext) -> Any:
        with pytest.raises(ValueError, match="ids of questions"):
            await ctx.wait_for("a#1/q0123abcd")
        return [await ctx.wait_for(name) for name in odd]

    for name in odd:
        assert (await bench.run(body)).paused_at == "a"
        bench.manager.send("run", name, name)
    assert (await bench.run(body)).output["value"] == list(odd)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="occurrence"):
            bench.manager.send("run", "go", 1, occurrence=wrong)
    with pytest.raises(ValueError, match="occurrence"):
        bench.manager.send("run", "a#1/q0123abcd", 1, occurrence=1)


def test_a_message_says_which_wait_it_is_for() -> None:
    assert slots.signal_of(slots.signal_message("a:b\nc", 12)) == ("a:b\nc", 12)
    assert slots.signal_of("settle:a#1/4:1") is None
    assert slots.is_answer(slots.answer_message("q", 3), "q")
    assert not slots.is_answer(slots.answer_message("qq", 1), "q")


async def test_a_damaged_claim_never_gives_a_wait_what_was_anothers() -> None:
    """The first wait had its value; what says so is damaged. The second must not be given that value."""
    store = MemoryStorage()
    bench = Bench(store)

    async def first(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    async def second(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    assert (await bench.run(first, second)).paused_at == "a"
    bench.manager.send("run", "go", "the first's")
    claims = slots.Claims()
    [row] = [each for each in store.read_journal("run") if each.step == slots.SIGNALS]
    claims.load([replace(row, record=b"")])
    occurrence, written = claims.take("go", "b#1/x", "b#1")
    assert (occurrence, written.number if written else 0) == (2, 2)
    again = slots.Claims()
    again.load([replace(row, record=b""), *([written] if written else [])])
    assert again.take("go", "b#1/x", "b#1") == (2, None)
    assert again.take("go", "c#1/x", "c#1")[0] == 3
