"""Steps whose graphs sleep, wait, ask or have unknown effects: the plan waits with them, and is woken for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.errors import MessageRefused
from framework.graph.node import NodeContext
from framework.graph.plan import ApprovalDecision, ApprovalRequest, ApprovalResult, ExecutionStatus
from framework.graph.run_view import view_run
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.checkpoints import parse_log
from framework.storage.memory import MemoryStorage
from tests.plans.parts_kit import GOAL, House, plan_of

COMPLETED, WAITS = ExecutionStatus.COMPLETED, ExecutionStatus.AWAITING_APPROVAL
FAR = 10_000.0


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    made = MemoryStorage() if request.param == "memory" else open_storage(f"sqlite:///{tmp_path}/runs.db")
    with made:
        yield made


@pytest.fixture
def memory() -> Iterator[Storage]:
    with MemoryStorage() as made:
        yield made


class Calls:
    """Bodies of nodes that note what they do."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def note(self, what: str) -> str:
        self.made.append(what)
        return what

    async def sleeps(self, ctx: NodeContext) -> Any:
        await ctx.call("before", self.note, "before")
        await ctx.sleep(FAR)
        return self.note("slept")

    async def waits(self, ctx: NodeContext) -> Any:
        await ctx.call("before", self.note, "before")
        return await ctx.wait_for("go")

    async def asks(self, ctx: NodeContext) -> Any:
        return await ctx.ask("Which?", int)

    async def works(self, ctx: NodeContext) -> Any:
        return self.note("worked")


async def test_a_step_whose_graph_waits_for_a_message_is_held(store: Storage) -> None:
    calls, house = Calls(), House(store)
    house.graph("s", calls.waits)
    result = await house.run(plan_of("s"))
    assert (result.status, house.record().state) == (WAITS, RunState.PAUSED)
    assert result.feedback is not None
    assert "'r/s#1'" in result.feedback
    assert "'go'" in result.feedback
    [waiting] = view_run(store, "r").resume.waiting
    assert (waiting.kind, waiting.name, waiting.run, waiting.step) == ("signal", "go", "r/s#1", "s#1")
    assert [step.status for step in view_run(store, "r").steps] == ["waiting"]
    assert house.woken() == []
    house.manager.send("r/s#1", "go", 7)
    assert view_run(store, "r").resume.verdict == "goes_on"
    assert house.woken() == ["r"], "the plan is woken, not its part"
    [recovered] = await house.recover()
    assert (recovered.run_id, recovered.outcome) == ("r", "resumed")
    assert recovered.result is not None
    assert (recovered.result.status, recovered.result.results["s_y"]) == (COMPLETED, 7)
    assert recovered.result.steps_executed == 1, "an attempt that waits counts for nothing"
    assert calls.made == ["before"]
    assert house.woken() == []


async def test_what_is_sent_to_the_plan_reaches_the_part(store: Storage) -> None:
    calls, house = Calls(), House(store)
    house.graph("s", calls.waits)
    house.graph("t", calls.asks)
    await house.run(plan_of("s", "t"))
    with pytest.raises(MessageRefused, match=r"'go' \(run 'r/s#1'\).*to its own run, like 'r/<step>#1'"):
        house.manager.send("r", "stop", 1)
    house.manager.send("r", "go", 7)
    with pytest.raises(MessageRefused, match="has not taken yet"):
        house.manager.send("r", "go", 8)
    assert (await house.run()).status is WAITS
    [waiting] = view_run(store, "r").resume.waiting
    assert (waiting.kind, waiting.question, waiting.run) == ("answer", "Which?", "r/t#1")
    assert waiting.name is not None
    with pytest.raises(MessageRefused, match="does not fit"):
        house.manager.send("r", waiting.name, "no number")
    house.manager.send("r", waiting.name, 4)
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert (recovered.result.status, recovered.result.results["t_y"]) == (COMPLETED, 4)


async def test_two_parts_that_wait_for_one_name_are_told_apart(memory: Storage) -> None:
    calls, house = Calls(), House(memory, concurrency=2)
    house.graph("s", calls.waits)
    house.graph("t", calls.waits)
    await house.run(plan_of("s", "t"))
    with pytest.raises(MessageRefused, match="name the one meant: 'r/s#1', 'r/t#1'"):
        house.manager.send("r", "go", 1)
    house.manager.send("r/t#1", "go", 1)
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert (recovered.result.status, recovered.result.completed_steps) == (WAITS, ["t"])
    house.manager.send("r", "go", 2)
    assert (await house.run()).results["s_y"] == 2


async def test_a_step_whose_graph_sleeps_is_due_with_it(store: Storage) -> None:
    calls, house = Calls(), House(store)
    house.graph("s", calls.sleeps)
    result = await house.run(plan_of("s"))
    assert result.status is WAITS
    assert house.woken() == []
    assert not house.is_due(FAR / 2)
    assert house.is_due(FAR + 10)
    [waiting] = view_run(store, "r").resume.waiting
    assert (waiting.kind, waiting.run) == ("sleep", "r/s#1")
    assert (await house.run()).status is WAITS, "calling again does not end the sleep"
    assert calls.made == ["before"]


async def test_the_plan_is_woken_when_its_part_is_due() -> None:
    for seconds in (0.05, 0.5, 5.0):  # of which a busy machine may take the first few before the plan can pause
        with MemoryStorage() as store:
            calls, house = Calls(), House(store)

            async def sleeps(ctx: NodeContext, calls: Calls = calls, seconds: float = seconds) -> Any:
                await ctx.call("before", calls.note, "before")
                await ctx.sleep(seconds)
                return calls.note("slept")

            house.graph("s", sleeps)
            if (await house.run(plan_of("s"))).status is COMPLETED:
                continue
            while not (woken := house.woken()):
                await asyncio.sleep(0)
            assert woken == ["r"]
            [recovered] = await house.recover()
            assert recovered.result is not None
            assert (recovered.result.status, calls.made) == (COMPLETED, ["before", "slept"])
            return
    raise AssertionError("the plan never paused")


async def test_a_question_does_not_end_because_the_plan_is_called(memory: Storage) -> None:
    house = House(memory)
    house.graph("s", Calls().asks)
    await house.run(plan_of("s"))
    for _ in range(2):
        assert (await house.run()).status is WAITS


async def test_other_steps_go_on_first(memory: Storage) -> None:
    calls, house = Calls(), House(memory, concurrency=2)
    house.graph("s", calls.waits)
    house.graph("t", calls.works)
    work = {"id": "u", "action": {"action_type": "sub_graph", "graph_id": "t"}, "dependencies": ["t"]}
    result = await house.run(plan_of("s", "t", work))
    assert (result.status, result.completed_steps) == (WAITS, ["t", "u"])


async def test_a_plan_that_still_works_hears_of_a_message_to_a_part(memory: Storage) -> None:
    calls, house = Calls(), House(memory, concurrency=2)
    taken = asyncio.Event()

    async def waits(ctx: NodeContext) -> Any:
        value = await ctx.wait_for("go")
        taken.set()
        return value

    async def works(ctx: NodeContext) -> Any:
        while house.record("r/s#1").state is not RunState.PAUSED:
            await asyncio.sleep(0)
        house.manager.send("r/s#1", "go", 7)
        await taken.wait()  # the plan does not pause meanwhile
        return calls.note("worked")

    house.graph("s", waits)
    house.graph("t", works)
    result = await house.run(plan_of("s", "t"))
    assert (result.status, result.results["s_y"]) == (COMPLETED, 7)


async def test_an_effect_of_a_part_is_settled_by_either_id(store: Storage) -> None:
    house, calls = House(store), Calls()
    fails = True

    def pay() -> str:
        calls.note("paid")
        if fails:
            raise TimeoutError("no reply")
        return "receipt"

    async def pays(ctx: NodeContext) -> Any:
        return await ctx.call("pay", pay, policy="ask")

    house.graph("s", pays)
    house.graph("t", pays)
    result = await house.run(plan_of("s", "t"))
    assert result.status is WAITS
    [waiting] = view_run(store, "r").resume.waiting
    assert (waiting.kind, waiting.name, waiting.run) == ("settle", "s#1/1", "r/s#1")
    with pytest.raises(MessageRefused, match="s#1/1 of run 'r/s#1'"):
        house.manager.settle("r", "s#1/9", redo=True)
    house.manager.settle("r", "s#1/1", done="by hand")
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert (recovered.result.status, recovered.result.results["s_y"]) == (WAITS, "by hand")
    fails = False
    house.manager.settle("r/t#1", "t#1/1", redo=True)
    result = await house.run()
    assert (result.status, result.results["t_y"]) == (COMPLETED, "receipt")
    assert calls.made == ["paid"] * 3


async def test_a_person_of_a_part_is_asked_by_the_plan(store: Storage) -> None:
    house = House(store)
    house.graph("s", None)
    assert (await house.run(plan_of("s"))).status is WAITS
    [waiting] = view_run(store, "r").resume.waiting
    assert (waiting.kind, waiting.run) == ("input", "r/s#1")
    [spec] = [each.graph for each in house.executor.worker.resources.sub_graphs.values()]
    answered = await house.inner.execute(spec, GOAL, {"s_y": "yes"}, run_id="r/s#1")
    assert answered.success
    result = await house.run()
    assert (result.status, result.results["s_y"]) == (COMPLETED, "yes")


async def test_a_plan_that_is_woken_answers_for_no_person(memory: Storage) -> None:
    """Of two steps one's person has not answered when the other's message wakes the plan."""
    calls, house = Calls(), House(memory, concurrency=2)
    house.graph("s", calls.works, pause=True)
    house.graph("t", calls.waits)
    assert (await house.run(plan_of("s", "t"))).status is WAITS
    house.manager.send("r", "go", 7)
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert (recovered.result.status, recovered.result.completed_steps) == (WAITS, ["t"])
    assert (await house.run()).status is COMPLETED, "the next call is a person's"
    assert sorted(calls.made) == ["before", "worked"]


async def test_a_crash_after_the_pause_of_a_part_answers_for_no_person(memory: Storage) -> None:
    """The part is paused, and the plan's commit that says so is lost with its process."""
    calls, house = Calls(), House(memory)
    house.graph("s", calls.works, pause=True)
    task = asyncio.create_task(house.run(plan_of("s")))
    while (part := memory.find_run("r/s#1")) is None or part.state is not RunState.PAUSED:
        await asyncio.sleep(0)
    _crash(memory, task)
    await asyncio.gather(task, return_exceptions=True)
    assert house.record().state is RunState.CRASHED
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert recovered.result.status is WAITS
    assert (await house.run()).status is COMPLETED
    assert calls.made == ["worked"]


async def test_a_plan_that_is_paused_for_something_else_is_not_woken(memory: Storage) -> None:
    calls, house = Calls(), House(memory)
    house.graph("s", calls.waits)
    await house.run(plan_of("s"))
    fails = {"id": "s", "action": {"action_type": "function", "function_name": "f"}, "requires_approval": True}
    house.executor.register_function("f", lambda: 1)
    result = await house.executor.execute_plan(plan_of(fails), GOAL, run_id="r", replan=True)
    assert result.status is WAITS
    house.manager.send("r/s#1", "go", 1)
    assert house.woken() == []


async def test_a_part_that_another_process_works_on_is_waited_for(memory: Storage) -> None:
    """Somebody resumed it by itself, or it crashed and its lease is not over."""
    calls, house = Calls(), House(memory)
    house.graph("s", calls.waits)
    await house.run(plan_of("s"))
    house.manager.send("r", "go", 7)
    run = memory.claim_run("r/s#1", "somebody", FAR, lambda owner: True)
    result = await house.run()
    assert (result.status, house.record().state) == (WAITS, RunState.PAUSED)
    assert "run 'r/s#1' is worked on by another process" in str(result.feedback)
    assert not house.is_due(FAR / 2)
    assert house.is_due(FAR + 10)
    memory.release_lease("r/s#1", run.token)
    result = await house.run()
    assert (result.status, result.results["s_y"]) == (COMPLETED, 7)


async def test_an_approval_holds_while_the_part_waits(memory: Storage) -> None:
    house = House(memory)
    house.graph("s", Calls().waits)
    asked = []

    def approve(request: ApprovalRequest) -> ApprovalResult:
        asked.append(request.step_id)
        return ApprovalResult(decision=ApprovalDecision.APPROVE)

    house.executor.approval_callback = approve
    action = {"action_type": "sub_graph", "graph_id": "s"}
    assert (await house.run(plan_of({"id": "s", "action": action, "requires_approval": True}))).status is WAITS
    [waiting] = view_run(memory, "r").resume.waiting
    assert waiting.kind == "signal"
    house.manager.send("r", "go", 7)
    [recovered] = await house.recover()
    assert recovered.result is not None
    assert (recovered.result.status, asked) == (COMPLETED, ["s"])


async def test_a_step_that_waits_leaves_one_record_and_no_attempt(memory: Storage) -> None:
    house = House(memory)
    house.graph("s", Calls().waits)
    await house.run(plan_of("s"))
    kinds = [record["kind"] for record in parse_log(memory.read_log("r"))]
    assert kinds == ["wait", "end"]
    steps = await house.executor.stored_steps("r")
    assert (steps["s"].status, steps["s"].attempts) == ("pending", 0)


def _crash(store: Storage, task: asyncio.Task[Any]) -> None:
    """Leave the plan's run as a process does that ends without a word."""
    run = store.claim_run("r", "somebody", 30, lambda owner: False)
    store.release_lease("r", run.token)
    task.cancel()
