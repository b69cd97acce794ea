"""Sleeps, waits and questions inside steps, and effects that somebody has to settle: the run pauses and goes on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from pydantic import BaseModel

from framework.errors import MessageRefused, RunNotFound
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from tests.graph.executor_kit import edge, graph_of
from tests.journal.journal_kit import Bench, Node


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves, for the steps and for the store."""
    made = Clock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


def record_of(bench: Bench) -> RunRecord:
    record = bench.storage.find_run("run")
    assert record is not None
    return record


async def sleeper(ctx: NodeContext) -> str:
    order = [await ctx.call("before", _tick)]
    await ctx.sleep(3600)
    order.append(await ctx.call("after", _tick))
    return ",".join(order)


_ticks: list[str] = []


async def _tick() -> str:
    _ticks.append("x")
    return str(len(_ticks))


async def test_a_long_sleep_pauses_the_run_until_it_is_due(clock: Clock) -> None:
    _ticks.clear()
    bench = Bench(MemoryStorage())
    began = clock.now
    result = await bench.run(sleeper)
    assert (result.paused_at, result.success) == ("a", True)
    record = record_of(bench)
    assert (record.state, record.wake_at) == (RunState.PAUSED, began + 3600)
    clock.now += 3000
    assert [each.run_id for each in bench.storage.list_due(clock.now)] == []
    assert (await bench.run(sleeper)).paused_at == "a", "called too early it only waits on"
    assert record_of(bench).wake_at == began + 3600
    assert _ticks == ["x"]
    clock.now += 600
    assert [each.run_id for each in bench.storage.list_due(clock.now)] == ["run"]
    result = await bench.run(sleeper)
    assert result.output["value"] == "1,2", result.error
    assert record_of(bench).wake_at is None


async def test_a_sleep_that_is_due_soon_is_slept_in_the_process() -> None:
    async def body(ctx: NodeContext) -> str:
        await ctx.sleep(0.05)
        return "awake"

    began = time.monotonic()
    result = await Bench(MemoryStorage()).run(body)
    assert result.output["value"] == "awake"
    assert time.monotonic() - began >= 0.05
    bench = Bench(MemoryStorage(), sleep_in_process_seconds=0)
    assert (await bench.run(body)).paused_at == "a"


async def test_sleeps_of_wrong_lengths_are_refused() -> None:
    async def body(ctx: NodeContext) -> None:
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="seconds"):
                await ctx.sleep(wrong)

    assert (await Bench(MemoryStorage()).run(body)).success


async def waiter(ctx: NodeContext) -> Any:
    return {"got": await ctx.wait_for("approval")}


async def test_a_wait_is_answered_once_the_message_is_there() -> None:
    bench = Bench(MemoryStorage())
    for _ in range(2):
        result = await bench.run(waiter)
        assert result.paused_at == "a"
        assert result.run_id == "run"
    (call,) = bench.manager.journal("run")
    assert (call.kind, call.answers_to, call.state) == ("wait", "approval", "waiting")
    bench.manager.send("run", "approval", {"by": "Ann"})
    with pytest.raises(MessageRefused):
        bench.manager.send("run", "approval", {"by": "Bob"})
    assert (await bench.run(waiter)).output["value"] == {"got": {"by": "Ann"}}
    for name in ("approval", "other"):
        with pytest.raises(MessageRefused):
            bench.manager.send("run", name, 1)
    with pytest.raises(RunNotFound):
        bench.manager.send("nobody", "approval", 1)


async def test_a_value_may_be_sent_before_anybody_waits() -> None:
    bench = Bench(MemoryStorage())

    async def first(ctx: NodeContext) -> str:
        bench.manager.send("run", "approval", "early")
        return "x"

    result = await bench.run(first, waiter)
    assert result.output["value"] == {"got": "early"}


async def test_a_wait_that_timed_out_stays_so_and_the_late_answer_is_refused(clock: Clock) -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> str:
        try:
            return str(await ctx.wait_for("approval", timeout_seconds=100))
        except TimeoutError:
            await ctx.wait_for("second")
            return "too late"

    assert (await bench.run(body)).paused_at == "a"
    assert record_of(bench).wake_at == clock.now + 100
    clock.now += 101
    with pytest.raises(MessageRefused, match="too late"):
        bench.manager.send("run", "approval", "yes")
    assert (await bench.run(body)).paused_at == "a"
    with pytest.raises(MessageRefused, match="too late"):
        bench.manager.send("run", "approval", "yes")
    bench.manager.send("run", "second", 1)
    assert (await bench.run(body)).output["value"] == "too late"


class Verdict(BaseModel):
    approved: bool
    note: str = ""


async def asker(ctx: NodeContext) -> Any:
    verdict = await ctx.ask("Send it?", Verdict)
    return [type(verdict).__name__, verdict.approved]


async def test_a_question_takes_one_answer_that_fits() -> None:
    bench = Bench(MemoryStorage())
    assert (await bench.run(asker)).paused_at == "a"
    (call,) = bench.manager.journal("run")
    assert (call.question, call.state) == ("Send it?", "waiting")
    question = call.answers_to
    assert question is not None
    with pytest.raises(MessageRefused, match="'approved'"):
        bench.manager.send("run", question, {"note": "x"})
    with pytest.raises(MessageRefused, match="Open: a#1/q"):
        bench.manager.send("run", "a#1/q01234567", True)
    bench.manager.send("run", question, {"approved": True})
    with pytest.raises(MessageRefused, match="answered before"):
        bench.manager.send("run", question, {"approved": False})
    assert (await bench.run(asker)).output["value"] == ["Verdict", True]
    with pytest.raises(MessageRefused):
        bench.manager.send("run", question, {"approved": False})


async def test_an_answer_counts_for_the_next_attempt_too() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        answer = await ctx.ask("Which?", {"type": "string", "enum": ["a", "b"]})
        if ctx.attempt == 1:
            raise RuntimeError("after the answer")
        return answer

    assert (await bench.run(body, attempts=2)).paused_at == "a"
    question = bench.manager.journal("run")[0].answers_to or ""
    with pytest.raises(MessageRefused, match="not one of 'a', 'b'"):
        bench.manager.send("run", question, "c")
    bench.manager.send("run", question, "b")
    assert (await bench.run(body, attempts=2)).output["value"] == "b"


@pytest.mark.parametrize("way", ["gather", "group", "swallow"])
async def test_a_suspension_is_not_lost_in_what_a_node_does_with_its_tasks(way: str) -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        if way == "gather":
            return await asyncio.gather(ctx.wait_for("x"), ctx.wait_for("y"), ctx.call("z", _tick))
        if way == "group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ctx.wait_for(name)) for name in "xy"]
            return [task.result() for task in tasks]
        try:
            x = await ctx.wait_for("x")
        except BaseException:  # noqa: BLE001 - what a careless node does
            x = "swallowed"
        return [x, await ctx.wait_for("y")]

    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", "x", 1)
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", "y", 2)
    result = await bench.run(body)
    assert result.output["value"][:2] == [1, 2], result.error


async def test_all_that_concurrent_tasks_wait_for_is_known(clock: Clock) -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return await asyncio.gather(ctx.sleep(100), ctx.sleep(50), ctx.wait_for("x"))

    for _ in range(2):
        assert (await bench.run(body)).paused_at == "a"
        assert record_of(bench).wake_at == 1_000_050.0
    checkpoint = bench.storage.load_latest_checkpoint("run")
    assert checkpoint is not None
    assert sorted(each["kind"] for each in checkpoint.position["waits"]["a#1"]) == ["signal", "sleep", "sleep"]


async def test_other_steps_of_the_run_go_on_while_one_waits(clock: Clock) -> None:
    done: list[str] = []

    async def start(ctx: NodeContext) -> str:
        return "go"

    async def sleeps(ctx: NodeContext) -> str:
        await ctx.sleep(50)
        done.append("slept")
        return "b"

    async def works(ctx: NodeContext) -> str:
        for number in range(5):
            await ctx.call("work", _done_later, number)
        done.append("worked")
        return "c"

    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        NodeSpec(id="b", output_keys=["b"]),
        NodeSpec(id="c", output_keys=["c"]),
        NodeSpec(id="d"),
        edges=[edge("a", "b"), edge("a", "c"), edge("b", "d"), edge("c", "d")],
    )

    async def end(ctx: NodeContext) -> str:
        return "end"

    nodes = [Quiet(start), Quiet(sleeps), Quiet(works), Quiet(end)]
    bench = Bench(MemoryStorage())
    result = await bench.run(*nodes, graph=graph)
    assert result.paused_at == "b"
    assert done == ["worked"]
    assert record_of(bench).wake_at == clock.now + 50
    clock.now += 60
    result = await bench.run(*nodes, graph=graph)
    assert result.success, result.error
    assert result.paused_at is None
    assert done == ["worked", "slept"]
    assert result.path[-1] == "d"


class Quiet:
    """A node that is one async function and puts nothing out."""

    def __init__(self, body: Any) -> None:
        self.body = body

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await self.body(ctx)
        return NodeResult(True)


async def _done_later(number: int) -> int:
    await asyncio.sleep(0)
    return number


async def test_new_input_lets_a_waiting_step_start_again() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return ctx.input_data.get("answer") or await ctx.wait_for("x")

    assert (await bench.run(body)).paused_at == "a"
    result = await bench.run(body, input_data={"answer": 42})
    assert result.output["value"] == 42


@pytest.mark.parametrize(("how", "value"), [("done", "sent"), ("redo", "made 2"), ("skip", None)])
async def test_an_unknown_effect_pauses_the_run_until_it_is_settled_once(how: str, value: Any) -> None:
    made: list[str] = []

    async def send() -> str:
        made.append("x")
        if len(made) == 1:
            raise asyncio.CancelledError
        return f"made {len(made)}"

    async def body(ctx: NodeContext) -> Any:
        return [await ctx.call("send", send, policy="ask")]

    bench = Bench(MemoryStorage())
    await bench.cancelled(body)
    assert (await bench.run(body)).paused_at == "a"
    (call,) = bench.manager.journal("run")
    assert (call.id, call.state) == ("a#1/1", "unknown")
    with pytest.raises(ValueError, match="exactly one"):
        bench.manager.settle("run", call.id)
    with pytest.raises(MessageRefused, match="a#1/1"):
        bench.manager.settle("run", "a#1/7", skip=True)
    choice: dict[str, Any] = {"done": "sent"} if how == "done" else {how: True}
    bench.manager.settle("run", call.id, **choice)
    with pytest.raises(MessageRefused):
        bench.manager.settle("run", call.id, redo=True)
    result = await bench.run(body)
    assert result.output["value"] == [value], result.error
    assert len(made) == (2 if how == "redo" else 1)
    with pytest.raises(MessageRefused, match="completed"):
        bench.manager.settle("run", call.id, skip=True)


async def test_the_policy_fail_fails_the_run_each_time_until_it_is_settled() -> None:
    made: list[str] = []

    async def send() -> str:
        made.append("x")
        raise asyncio.CancelledError

    async def body(ctx: NodeContext) -> Any:
        return [await ctx.call("send", send, policy="fail")]

    bench = Bench(MemoryStorage())
    await bench.cancelled(body)
    for _ in range(2):
        result = await bench.run(body, attempts=3)
        assert not result.success
        assert "a#1/1" in (result.error or "")
    assert len(made) == 1
    bench.manager.settle("run", "a#1/1", done="it was sent")
    assert (await bench.run(body)).output["value"] == ["it was sent"]


async def test_the_same_call_again_does_not_start_a_step_that_still_waits() -> None:
    bench = Bench(MemoryStorage())
    node = Node(waiter)
    for _ in range(3):
        assert (await bench.run(node, input_data={"topic": "rivers"})).paused_at == "a"
    assert node.attempts == 1
    bench.manager.send("run", "approval", "yes")
    assert (await bench.run(node, input_data={"topic": "rivers"})).output["value"] == {"got": "yes"}
    assert node.attempts == 2


async def test_attempts_are_counted_on_over_a_wait() -> None:
    """A step that sleeps in its second attempt has no more attempts than it had."""
    seen: list[int] = []

    async def body(ctx: NodeContext) -> None:
        seen.append(ctx.attempt)
        if ctx.attempt == 2:
            await ctx.sleep(0.02)
        raise RuntimeError("no good")

    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        NodeSpec(id="b", max_retries=3, retry_delay_seconds=0),
        edges=[edge("a", "b")],
    )

    async def start(ctx: NodeContext) -> None:
        return None

    for config in ({}, {"sleep_in_process_seconds": 0}):
        seen.clear()
        bench = Bench(MemoryStorage(), **config)
        result = await bench.run(Quiet(start), Quiet(body), graph=graph)
        while result.paused_at is not None:
            result = await bench.run(Quiet(start), Quiet(body), graph=graph)
        assert not result.success
        assert seen in ([1, 2, 3], [1, 2, 2, 3])


async def test_an_effect_in_flight_when_its_attempt_ran_out_of_time_is_unknown() -> None:
    made: list[str] = []

    async def send() -> str:
        made.append("x")
        await asyncio.Event().wait()
        return "never"

    async def body(ctx: NodeContext) -> Any:
        return [await ctx.call("send", send, policy="ask")]

    graph = graph_of(NodeSpec(id="a", max_retries=3, retry_delay_seconds=0, timeout_seconds=0.05))
    bench = Bench(MemoryStorage())
    assert (await bench.run(body, graph=graph)).paused_at == "a"
    assert len(made) == 1, "the next attempt does not send it once more"
    (unknown,) = bench.manager.journal("run")
    bench.manager.settle("run", unknown.id, done="it went out")
    assert (await bench.run(body, graph=graph)).output["value"] == ["it went out"]


@pytest.mark.parametrize("what", ["time", "message"])
async def test_a_wait_that_is_over_when_the_other_steps_are_done_needs_no_pause(clock: Clock, what: str) -> None:
    bench = Bench(MemoryStorage())
    waiting = asyncio.Event()
    order: list[str] = []

    async def nothing(ctx: NodeContext) -> None:
        order.append(ctx.node_id)

    async def waits(ctx: NodeContext) -> None:
        waiting.set()
        await (ctx.sleep(50) if what == "time" else ctx.wait_for("go"))
        order.append("waited")

    async def works(ctx: NodeContext) -> None:
        await waiting.wait()
        while "waits" not in (await _position(bench)):
            await asyncio.sleep(0.001)
        if what == "time":
            clock.now += 60
        else:
            bench.manager.send("run", "go", 1)
        order.append("worked")

    graph = graph_of(
        NodeSpec(id="a", fan_out=True),
        *(NodeSpec(id=each, max_retries=1) for each in "bcd"),
        edges=[edge("a", "b"), edge("a", "c"), edge("b", "d"), edge("c", "d")],
    )
    result = await bench.run(Quiet(nothing), Quiet(waits), Quiet(works), Quiet(nothing), graph=graph)
    assert result.success, result.error
    assert result.paused_at is None
    assert order == ["a", "worked", "waited", "d"]
    record = record_of(bench)
    assert (record.state, record.wake_at) == (RunState.COMPLETED, None)


async def _position(bench: Bench) -> dict[str, Any]:
    checkpoint = await asyncio.to_thread(bench.storage.load_latest_checkpoint, "run")
    return checkpoint.position if checkpoint is not None else {}
