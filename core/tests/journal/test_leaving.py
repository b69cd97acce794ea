"""A step that is suspended leaves only when nothing but waits is in flight, so what its tasks wait for and make counts;
and calls that wait for their turn are let go whatever happens to their step."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from framework.graph import journal_turns, journal_waits
from framework.graph.journal import AttemptJournal, CallSpec, request_hash
from framework.graph.journal_slots import SIGNALS
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.suspension import Suspended
from framework.storage.memory import MemoryStorage
from framework.storage.records import JournalRow
from tests.graph.executor_kit import graph_of
from tests.journal.journal_kit import Bench, Life, Outside, Rows, question_of
from tests.journal.test_lanes import blocking, crashed


async def waits(life: Life, kind: str, *what: Any) -> Any:
    return await getattr(journal_waits, kind)(life.journal, *what)


async def test_what_sibling_tasks_do_when_one_waits_is_recorded_and_all_that_they_wait_for_counts() -> None:
    """A task group would cancel them at once."""
    began, made = asyncio.Event(), list[str]()

    async def pay() -> str:
        began.set()
        for _ in range(30):
            await asyncio.sleep(0)
        made.append("paid")
        return "receipt"

    async def pays_and_asks(ctx: NodeContext) -> list[Any]:
        return [await asyncio.wait_for(ctx.call("pay", pay, policy="ask"), 60), await ctx.ask("Which?", int)]

    async def body(ctx: NodeContext) -> Any:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(pays_and_asks(ctx))
            await began.wait()
            second = group.create_task(ctx.wait_for("go"))
        return [*first.result(), second.result()]

    bench = Bench(MemoryStorage())
    assert (await bench.run(body)).paused_at == "a"
    assert made == ["paid"]
    checkpoint = bench.storage.load_latest_checkpoint("run")
    assert checkpoint is not None
    assert sorted(each["kind"] for each in checkpoint.position["waits"]["a#1"]) == ["answer", "signal"]
    bench.manager.send("run", question_of(bench), 7)
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", "go", 8)
    assert (await bench.run(body)).output["value"] == ["receipt", 7, 8]
    assert made == ["paid"]


async def test_a_new_call_of_a_suspended_step_does_not_stop_the_others_either() -> None:
    rows, outside = Rows(), Outside()
    life, go_on = Life(rows, outside), asyncio.Event()

    async def slow() -> str:
        async def make(key: str) -> str:
            await go_on.wait()
            return outside.answer("slow", key)

        return await life.journal.call("get", request_hash("slow", ""), make, CallSpec())

    async def late() -> None:
        while not life.journal._waits:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.01, go_on.set)
        await life.call("not made any more")

    async def work(life: Life) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(slow())
            group.create_task(late())
            group.create_task(waits(life, "wait_for", "go"))

    with pytest.raises(BaseExceptionGroup) as raised:
        await life.run(work)
    assert raised.group_contains(Suspended)
    assert outside.reached == {"slow": 1}
    again = Life(rows, outside)
    await again.journal.begin()
    assert await asyncio.create_task(again.call("slow")) == "slow at 1"


async def test_what_waits_in_another_order_than_recorded_is_waited_for_all_the_same() -> None:
    """A question comes again before what had ended before it, which does not come: the step is suspended meanwhile."""
    rows, outside = Rows(), Outside()

    async def first(life: Life) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(waits(life, "sleep", 1000))
            group.create_task(waits(life, "ask", "Which?", int))

    async def again(life: Life) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(waits(life, "ask", "Which?", int))
            group.create_task(waits(life, "ask", "And?", int))
            await asyncio.sleep(0)
            group.create_task(waits(life, "sleep", 1000))

    for work, kinds in ((first, ["answer", "sleep"]), (again, ["answer", "answer", "sleep"])):
        life = Life(rows, outside, patience_seconds=30)
        with pytest.raises(BaseExceptionGroup):
            await life.run(work)
        with pytest.raises(Suspended) as suspended:
            await life.journal.over()
        assert sorted(each.kind for each in suspended.value.waits) == kinds


async def test_a_call_that_hangs_does_not_keep_a_suspended_step_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_turns, "LEAVE_SECONDS", 0.05)
    life = Life(Rows(), Outside())

    async def hangs() -> None:
        async def make(key: str) -> None:
            await asyncio.Event().wait()

        await life.journal.call("get", request_hash("hangs", ""), make, CallSpec())

    async def work(life: Life) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(hangs())
            group.create_task(waits(life, "wait_for", "go"))

    with pytest.raises(BaseExceptionGroup) as raised:
        await asyncio.wait_for(life.run(work), 20)
    assert raised.group_contains(Suspended)


# --- calls that take long ---------------------------------------------------------------------------------------------


class Slow:
    """A call that takes until it may end. It is counted."""

    def __init__(self) -> None:
        self.made = 0
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> str:
        self.made += 1
        self.begun.set()
        await self.may_end.wait()
        return f"made {self.made}"


async def beside_a_wait(ctx: NodeContext, slow: Slow) -> list[Any]:
    """A task group, which stops its other tasks as soon as one hears that the step is suspended."""
    async with asyncio.TaskGroup() as group:
        made = group.create_task(ctx.call("slow", slow))
        await slow.begun.wait()
        come = group.create_task(ctx.wait_for("go"))
    return [made.result(), come.result()]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "waits for calls that it is still making" in text]


async def test_a_call_that_takes_long_is_waited_for_and_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_turns, "IN_FLIGHT_SECONDS", 0.01)
    bench, slow = Bench(MemoryStorage()), Slow()

    async def body(ctx: NodeContext) -> Any:
        return await beside_a_wait(ctx, slow)

    task = asyncio.create_task(bench.run(body))
    await until(lambda: len(told(caplog)) > 1)
    assert not task.done()
    assert told(caplog)[0].startswith("Step 'a#1' of run 'run'")
    assert ": slow. " in told(caplog)[0]
    slow.may_end.set()
    assert (await task).paused_at == "a"
    bench.manager.send("run", "go", 17)
    assert (await bench.run(body)).output["value"] == ["made 1", 17]


async def test_a_call_that_takes_longer_than_a_task_stays_for_it_is_waited_for_after_the_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the task holds a lock that the call needs. What was gathered is not stopped."""
    monkeypatch.setattr(journal_turns, "LEAVE_SECONDS", 0.01)
    monkeypatch.setattr(journal_turns, "IN_FLIGHT_SECONDS", 0.01)
    bench, lock, made = Bench(MemoryStorage()), asyncio.Lock(), list[str]()

    async def needs_the_lock() -> str:
        async with lock:
            # Not before it was told of: what waits now is not the task that held the lock.
            await until(lambda: bool(told(caplog)))
            made.append("x")
            return "made"

    async def holds_the_lock(ctx: NodeContext) -> Any:
        async with lock:
            calls.append(asyncio.create_task(ctx.call("slow", needs_the_lock)))
            await asyncio.sleep(0)
            return await ctx.wait_for("go")

    calls: list[asyncio.Task[Any]] = []

    async def body(ctx: NodeContext) -> Any:
        return [await holds_the_lock(ctx), await calls[-1]]

    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", "go", 17)
    assert (await bench.run(body)).output["value"] == [17, "made"]
    assert made == ["x"]


async def test_the_time_limit_of_a_step_ends_the_wait_for_a_call_that_hangs() -> None:
    bench, slow = Bench(MemoryStorage()), Slow()

    async def body(ctx: NodeContext) -> Any:
        return await beside_a_wait(ctx, slow)

    graph = graph_of(NodeSpec(id="a", max_retries=1, timeout_seconds=0.2))
    result = await asyncio.wait_for(bench.run(body, graph=graph), 20)
    assert (result.paused_at, slow.made) == ("a", 1)
    slow.may_end.set()
    bench.manager.send("run", "go", 17)
    assert (await bench.run(body)).output["value"] == ["made 2", 17]


class OwnRows(Rows):
    """Those of one step; numbers of waits, which are a step of their own, are not kept."""

    def write_journal(self, rows: Sequence[JournalRow], *, progress: bool = False) -> Future[None]:
        return super().write_journal([row for row in rows if row.step != SIGNALS], progress=progress)

    def read_journal(self, step: str) -> Future[list[JournalRow]]:
        return super().read_journal(step) if step != SIGNALS else OwnRows().read_journal("")


async def test_short_waits_of_other_tasks_do_not_keep_a_suspended_step() -> None:
    """They would, one after the other, and the time limit stands still while they last."""
    life, naps = Life(OwnRows(), Outside()), list[str]()

    async def naps_on() -> None:
        while True:
            naps.append("x")
            await waits(life, "sleep", 0.01)

    async def looks_again() -> None:
        while True:
            with suppress(TimeoutError):
                await waits(life, "wait_for", "never", 0.01)

    async def work(life: Life) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(naps_on())
            group.create_task(looks_again())
            await until(lambda: len(naps) > 2)
            group.create_task(waits(life, "ask", "Go on?"))

    with pytest.raises(BaseExceptionGroup) as raised:
        await asyncio.wait_for(life.run(work), 20)
    assert raised.group_contains(Suspended)
    with pytest.raises(Suspended) as suspended:
        await life.journal.over()
    assert sorted(each.kind for each in suspended.value.waits) == ["answer", "signal", "sleep"]


async def test_a_run_is_cancelled_at_once_while_a_suspended_step_waits_for_a_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_turns, "IN_FLIGHT_SECONDS", 0.01)
    bench, slow = Bench(MemoryStorage()), Slow()

    async def body(ctx: NodeContext) -> Any:
        return await beside_a_wait(ctx, slow)

    task = asyncio.create_task(bench.run(body))
    await until(lambda: bool(told(caplog)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


@pytest.mark.parametrize("ends", ["the call", "the attempt"])
async def test_a_thread_that_is_suspended_waits_for_the_calls_of_others(
    ends: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_turns, "IN_FLIGHT_SECONDS", 0.01)
    life, slow = Life(Rows(), Outside()), Slow()
    await life.journal.begin()

    def pay(key: str) -> str:
        raise TimeoutError("no answer in time")

    def pays() -> str:
        return life.journal.call_blocking("pay", request_hash("pay", ""), pay, CallSpec("ask"))

    with pytest.raises(TimeoutError):
        await asyncio.to_thread(pays)
    making = asyncio.create_task(life.journal.call("slow", request_hash("slow", ""), lambda key: slow(), CallSpec()))
    await slow.begun.wait()
    paying = asyncio.create_task(asyncio.to_thread(pays))  # once more: whether the first took effect is not known
    await until(lambda: bool(told(caplog)))
    assert not paying.done()
    if ends == "the call":
        slow.may_end.set()
        assert await making == "made 1"
    else:
        life.journal.close()
    with pytest.raises(Suspended):
        await asyncio.wait_for(paying, 20)
    slow.may_end.set()
    await asyncio.gather(making, return_exceptions=True)


# --- calls that are held ----------------------------------------------------------------------------------------------


async def two(life: Life) -> list[str]:
    return [await life.call("a"), await life.call("b"), await life.call("c")]


async def recorded() -> Rows:
    """The journal of a step that asked a and b and was killed at c."""
    rows = Rows()
    await crashed(rows, Outside(), two, 3)
    return rows


async def until(found: Any) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def held(journal: AttemptJournal) -> int:
    return len(journal._parts.held) if journal._parts is not None else 0


async def test_a_blocking_call_on_the_event_loop_goes_on_after_the_patience() -> None:
    """No other task can run while it blocks, so what it waits for cannot come."""
    life = Life(await recorded(), Outside(), patience_seconds=0.05)

    async def work(life: Life) -> list[str]:
        own = asyncio.create_task(life.call("a"))
        answer = blocking(life, "new")
        return [answer, await own]

    assert (await asyncio.wait_for(life.run(work), 20))[0] == "new at 1"


async def test_a_blocking_call_on_the_event_loop_goes_on_while_another_task_is_to_be_told_its_answer() -> None:
    life = Life(await recorded_in_tasks(), Outside(), patience_seconds=0.05)

    async def work(life: Life) -> list[str]:
        tasks = [asyncio.create_task(life.call(each)) for each in "ba"]
        while not life.journal.of.last or life.journal._parts is None or life.journal._parts.given is None:
            await asyncio.sleep(0)
        return [blocking(life, "new"), *[await task for task in tasks]]

    answers = await asyncio.wait_for(life.run(work), 20)
    assert sorted(answer[0] for answer in answers) == ["a", "b", "n"]


async def recorded_in_tasks() -> Rows:
    async def work(life: Life) -> None:
        await asyncio.gather(life.call("a"), life.call("b"))
        await life.call("c")

    rows = Rows()
    await crashed(rows, Outside(), work, 3)
    return rows


async def test_blocking_calls_in_threads_go_on_after_the_patience() -> None:
    life = Life(await recorded(), Outside(), patience_seconds=0.05)

    async def work(life: Life) -> list[str]:
        return list(await asyncio.gather(*(asyncio.to_thread(blocking, life, f"new {each}") for each in range(3))))

    answers = await asyncio.wait_for(life.run(work), 20)
    assert sorted(answer.partition(" at")[0] for answer in answers) == ["new 0", "new 1", "new 2"]


@pytest.mark.parametrize("way", ["await", "thread"])
@pytest.mark.parametrize("how", ["close", "failed", "stop"])
async def test_a_held_call_ends_with_its_attempt(way: str, how: str) -> None:
    life = Life(await recorded(), Outside(), patience_seconds=3600)
    await life.journal.begin()
    made = asyncio.to_thread(blocking, life, "new") if way == "thread" else asyncio.create_task(life.call("new"))
    task = asyncio.ensure_future(made)
    await until(lambda: held(life.journal) == 1)
    if how == "close":
        life.journal.close()
    elif how == "failed":
        await life.journal.failed()
    else:
        await life.journal.stop(ValueError("stopped"))
    with pytest.raises((Exception, BaseException)) as raised:
        await asyncio.wait_for(task, 20)
    assert "is over" in str(raised.value) or "stopped" in str(raised.value)
    assert life.outside.calls == 0
    assert life.journal._parts is not None
    assert (held(life.journal), list(life.journal._parts.unfinished)) == (0, [])


async def test_a_held_call_that_is_cancelled_lets_the_others_go() -> None:
    life = Life(await recorded(), Outside(), patience_seconds=3600)
    await life.journal.begin()
    first = asyncio.create_task(life.call("new"))
    await until(lambda: held(life.journal) == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert held(life.journal) == 0
    async with asyncio.timeout(20):
        assert [await life.call(each) for each in "ab"] == ["a at 1", "b at 2"]


class Held:
    """A node whose second attempt to run asks something else first, so that its call is held; ``way`` is how."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.lives = 0
        self.holds = asyncio.Event()
        self.journal: AttemptJournal | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self.lives += 1
        self.loop, self.journal = asyncio.get_running_loop(), ctx.journal
        if self.lives == 1:
            await ctx.call("a", str, 1)
            self.holds.set()
            await asyncio.Event().wait()
        assert ctx.journal is not None
        ctx.journal.of.patience_seconds = 3600
        watching = asyncio.create_task(self._watch())
        try:
            if self.way == "thread":
                await asyncio.to_thread(ctx.journal.call_blocking, "b", "b", lambda key: "new", CallSpec())
            else:
                await asyncio.create_task(ctx.call("b", str, 2))
        finally:
            watching.cancel()
        return NodeResult(True, {})

    async def _watch(self) -> None:
        await until(lambda: self.journal is not None and held(self.journal) > 0)
        self.holds.set()


async def _killed_once(bench: Bench, node: Held, graph: Any) -> None:
    task = asyncio.create_task(bench.run(node, graph=graph))
    await node.holds.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    node.holds.clear()


@pytest.mark.parametrize("way", ["await", "thread"])
async def test_a_nodes_time_limit_ends_a_held_call(way: str) -> None:
    bench, node = Bench(MemoryStorage()), Held(way)
    await _killed_once(bench, node, None)
    graph = graph_of(NodeSpec(id="a", max_retries=1, timeout_seconds=0.2))
    result = await asyncio.wait_for(bench.run(node, graph=graph), 20)
    assert not result.success
    assert "timed out after 0.2 s" in (result.error or "")
    await _no_thread_is_left()


@pytest.mark.parametrize("way", ["await", "thread"])
async def test_a_run_that_is_cancelled_while_a_call_is_held_ends_at_once(way: str) -> None:
    bench, node = Bench(MemoryStorage()), Held(way)
    await _killed_once(bench, node, None)
    await asyncio.wait_for(_killed_once(bench, node, None), 20)
    await _no_thread_is_left()


async def _no_thread_is_left() -> None:
    """None waits in the journal any more."""
    await until(lambda: not any("_its_turn_blocking" in names for names in _running()))


def _running() -> list[set[str]]:
    """The names of the functions that each thread is in."""
    return [{at.f_code.co_name for at, _ in traceback.walk_stack(frame)} for frame in sys._current_frames().values()]
