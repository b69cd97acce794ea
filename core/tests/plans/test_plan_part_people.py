"""Steps whose graphs wait for people: what answers them, what reaches them, and what leaves them as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest

from framework.errors import MessageRefused
from framework.graph import plan_parts
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.node import NodeContext, NodeSpec
from framework.graph.plan import ApprovalDecision, ApprovalResult, ExecutionStatus, Plan, PlanExecutionResult
from framework.graph.plan_parts import PlanParts
from framework.graph.recovery import Recovered
from framework.schemas.run import RunState
from framework.storage import heartbeat
from framework.storage.backend import Storage
from framework.storage.memory import MemoryStorage
from tests.plans.parts_kit import GOAL, Body, House, Node, plan_of

COMPLETED, WAITS = ExecutionStatus.COMPLETED, ExecutionStatus.AWAITING_APPROVAL


@pytest.fixture
def memory() -> Iterator[Storage]:
    with MemoryStorage() as made:
        yield made


def add_graph(house: House, bodies: Mapping[str, Body], edges: str, *, pause: str = "") -> None:
    """Let steps run a graph ``s`` of these nodes; it fans out at ``top`` and pauses after ``pause``."""
    for name, body in bodies.items():
        house.inner.register_node(name, Node(body))
    spec = GraphSpec(
        id="s",
        goal_id="g",
        entry_node=next(iter(bodies)),
        nodes=[
            NodeSpec(id=name, node_type="function", max_retries=1, output_keys=[f"{name}_y"], fan_out=name == "top")
            for name in bodies
        ],
        edges=[
            EdgeSpec(id=each, source=each.split(">")[0], target=each.split(">")[1], condition=EdgeCondition.ON_SUCCESS)
            for each in edges.split()
        ],
        pause_nodes=[pause] if pause else [],
    )
    house.executor.register_graph("s", spec, GOAL, house.inner)


def function(name: str, **more: Any) -> dict[str, Any]:
    """A plan's step that calls the function of its name."""
    return {"id": name, "action": {"action_type": "function", "function_name": name}, **more}


def resumed(recovered: list[Recovered[PlanExecutionResult]]) -> PlanExecutionResult:
    [one] = recovered
    assert one.result is not None
    return one.result


class Asking:
    """A graph ``s`` that pauses for a person after its first node; ``made`` is what its nodes did."""

    def __init__(self, house: House) -> None:
        self.made: list[str] = []
        add_graph(house, {"before": self.note("before"), "after": self.note("after")}, "before>after", pause="before")

    def note(self, what: str) -> Body:
        async def body(ctx: NodeContext) -> str:
            self.made.append(what)
            return what

        return body


# --- who answers ------------------------------------------------------------------------------------------------------


async def test_a_settlement_of_the_plans_own_answers_no_person_of_a_part(memory: Storage) -> None:
    house = House(memory, concurrency=2)
    asking = Asking(house)

    def pay() -> None:
        raise TimeoutError("no reply")

    house.executor.register_function("pay", pay, effects=True)
    assert (await house.run(plan_of("s", function("pay")))).status is WAITS
    house.manager.settle("r", "pay#1/1", done="receipt")
    result = resumed(await house.recover())
    assert (result.status, result.completed_steps) == (WAITS, ["pay"])
    assert asking.made == ["before"]
    assert (await house.run()).status is COMPLETED, "the next call is a person's"
    assert asking.made == ["before", "after"]


async def test_an_approval_of_another_step_answers_no_person_of_a_part(memory: Storage) -> None:
    house = House(memory, concurrency=2)
    asking = Asking(house)
    house.executor.register_function("f", lambda: 5)
    assert (await house.run(plan_of("s", function("f", requires_approval=True)))).status is WAITS
    await house.executor.answer_approval("r", "f", ApprovalResult(decision=ApprovalDecision.APPROVE))
    result = await house.run()
    assert (result.status, result.completed_steps) == (WAITS, ["f"])
    assert asking.made == ["before"]
    assert (await house.run()).status is COMPLETED
    assert asking.made == ["before", "after"]


# --- what a part is given ---------------------------------------------------------------------------------------------


class Priced:
    """A plan whose step ``s`` is given ``x``, the price, and whose step ``w`` writes another price while ``s`` waits:
    for a signal in its branch ``a``, and for a person after ``b`` in the other, where ``c`` follows."""

    def __init__(self, store: Storage, **step: Any) -> None:
        self.house = House(store, concurrency=2)
        self.seen: list[Any] = []

        async def nothing(ctx: NodeContext) -> None: ...

        async def a(ctx: NodeContext) -> Any:
            return await ctx.wait_for("go")

        async def c(ctx: NodeContext) -> Any:
            self.seen.append((ctx.memory.read("x"), ctx.memory.read("note")))

        async def w() -> int:
            while (part := store.find_run("r/s#1")) is None or part.state is not RunState.PAUSED:
                await asyncio.sleep(0)
            return 2

        add_graph(self.house, {"top": nothing, "a": a, "b": nothing, "c": c}, "top>a top>b b>c", pause="b")
        self.house.executor.register_function("w", w)
        held = {"id": "s", "action": {"action_type": "sub_graph", "graph_id": "s"}, **step}
        writes = {**function("w"), "expected_outputs": ["price"]}
        self.plan = Plan.from_json(
            {
                "id": "p",
                "goal_id": "g",
                "context": {"price": 1, "said": "-"},
                "steps": [{"inputs": {"x": "$price", "note": "$said"}, **held}, writes],
            }
        )


async def test_a_part_keeps_the_inputs_it_began_with(memory: Storage) -> None:
    priced = Priced(memory)
    result = await priced.house.run(priced.plan)
    assert (result.status, result.results["price"]) == (WAITS, 2)
    priced.house.manager.send("r", "go", 1)
    assert resumed(await priced.house.recover()).status is WAITS
    assert priced.seen == [], "another price is no person's answer"
    assert (await priced.house.run()).status is COMPLETED
    assert priced.seen == [(1, "-")]


async def test_the_node_that_asks_is_named_and_not_the_one_that_waits(memory: Storage) -> None:
    priced = Priced(memory)
    text = str((await priced.house.run(priced.plan)).feedback)
    assert "waits for the signal 'go'" in text
    assert "asks a person for input at 'b'" in text


async def test_a_branch_that_pauses_after_its_last_node_asks_too(memory: Storage) -> None:
    house = House(memory)

    async def nothing(ctx: NodeContext) -> None: ...

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    add_graph(house, {"top": nothing, "a": waits, "b": nothing}, "top>a top>b", pause="b")
    text = str((await house.run(plan_of("s"))).feedback)
    assert "waits for the signal 'go'" in text
    assert "asks a person for input at 'b'" in text


async def test_a_part_is_given_what_the_plans_caller_brings(memory: Storage) -> None:
    """Its other inputs stay as they were."""
    priced = Priced(memory)
    await priced.house.run(priced.plan)
    priced.house.manager.send("r", "go", 1)
    assert (await priced.house.run(said="yes")).status is COMPLETED
    assert priced.seen == [(1, "yes")]


async def test_a_part_that_failed_is_given_what_the_caller_brings(memory: Storage) -> None:
    house = House(memory)
    seen = []

    async def body(ctx: NodeContext) -> Any:
        seen.append(ctx.memory.read("x"))
        if len(seen) < 3:
            raise ValueError("no such price")
        return "sold"

    add_graph(house, {"n": body}, "")
    step = {
        "id": "s",
        "action": {"action_type": "sub_graph", "graph_id": "s"},
        "inputs": {"x": "$price"},
        "max_retries": 2,
    }
    result = await house.run(plan_of(step), price=1)
    assert result.status is ExecutionStatus.NEEDS_REPLAN
    assert (await house.run(price=7)).status is COMPLETED
    assert seen == [1, 1, 7]


async def test_a_part_is_given_what_a_person_approved(memory: Storage) -> None:
    """Its step's arguments have changed, so that somebody is asked again: what runs is what was approved."""
    priced = Priced(memory, requires_approval=True)
    shown = []

    def approve(request: Any) -> ApprovalResult:
        shown.append(request.context["x"])
        return ApprovalResult(decision=ApprovalDecision.APPROVE)

    priced.house.executor.approval_callback = approve
    await priced.house.run(priced.plan)
    priced.house.manager.send("r", "go", 1)
    await priced.house.recover()
    await priced.house.run()
    assert shown == [1, 2]
    assert priced.seen == [(2, "-")]


# --- a part that is cancelled -----------------------------------------------------------------------------------------


def counted_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often plans have looked whether a step that they hold may go on; they look all the time."""
    looks: list[str] = []
    look: Callable[..., Awaitable[bool]] = PlanParts.may_go_on

    async def may_go_on(self: PlanParts, step: Any, waits: Any) -> bool:
        found = await look(self, step, waits)
        looks.append(step.id)
        return found

    monkeypatch.setattr(PlanParts, "may_go_on", may_go_on)
    monkeypatch.setattr(plan_parts, "LOOK_SECONDS", 0.001)
    return looks


async def test_a_held_part_that_is_cancelled_stays_so_until_the_plan_is_called(
    memory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, looks = House(memory, concurrency=2), counted_looks(monkeypatch)
    begun, states = [], []

    async def asks(ctx: NodeContext) -> Any:
        begun.append(ctx.node_id)
        return await ctx.ask("Which?", int)

    async def works(ctx: NodeContext) -> Any:
        while "s" not in looks:  # the plan holds it
            await asyncio.sleep(0)
        assert house.manager.cancel("r/s#1")
        before = len(looks)
        while len(looks) < before + 3:
            await asyncio.sleep(0)
        states.append(house.record("r/s#1").state)

    house.graph("s", asks)
    house.graph("t", works)
    result = await house.run(plan_of("s", "t"))
    assert (result.status, begun, states) == (WAITS, ["s"], [RunState.CANCELLED])
    assert "Step 's': run 'r/s#1' was cancelled; it goes on when the plan is called" in str(result.feedback)
    result = await house.run()
    assert (result.status, house.record("r/s#1").state) == (WAITS, RunState.PAUSED)
    assert "'Which?'" in str(result.feedback)


async def test_a_plan_that_is_woken_leaves_a_cancelled_part(memory: Storage) -> None:
    house = House(memory, concurrency=2)

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for(f"{ctx.node_id} may go")

    house.graph("s", waits)
    house.graph("t", waits)
    await house.run(plan_of("s", "t"))
    house.manager.cancel("r/s#1")
    house.manager.send("r", "t may go", 1)
    result = resumed(await house.recover())
    assert (result.status, result.completed_steps) == (WAITS, ["t"])
    assert "'r/s#1' was cancelled" in str(result.feedback)
    assert house.record("r/s#1").state is RunState.CANCELLED
    assert "'s may go'" in str((await house.run()).feedback)
    house.manager.send("r", "s may go", 2)
    assert (await house.run()).results["s_y"] == 2


async def test_a_crash_of_the_plan_does_not_undo_that_a_part_was_cancelled(memory: Storage) -> None:
    house = House(memory, concurrency=2)
    left = asyncio.Event()

    async def asks(ctx: NodeContext) -> Any:
        return await ctx.ask("Which?", int)

    async def works(ctx: NodeContext) -> Any:
        if not left.is_set():
            left.set()
            await asyncio.Event().wait()
        return "worked"

    house.graph("s", asks)
    house.graph("t", works)
    task = asyncio.create_task(house.run(plan_of("s", "t")))
    await left.wait()
    while (part := memory.find_run("r/s#1")) is None or part.state is not RunState.PAUSED:
        await asyncio.sleep(0)
    while not list(memory.read_checkpoint_rows("r", limit=1)):  # it is held
        await asyncio.sleep(0)
    house.manager.cancel("r/s#1")
    for run_id in ("r", "r/t#1"):  # as a process does that ends without a word
        run = memory.claim_run(run_id, "somebody", 30, lambda owner: False)
        memory.release_lease(run_id, run.token)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert house.record().state is RunState.CRASHED
    result = resumed(await house.recover())
    assert (result.status, result.completed_steps) == (WAITS, ["t"])
    assert house.record("r/s#1").state is RunState.CANCELLED


async def test_a_part_that_is_cancelled_as_it_works_holds_its_step(
    memory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.01)
    house = House(memory)
    begun = []

    async def works(ctx: NodeContext) -> Any:
        begun.append(ctx.node_id)
        if len(begun) == 1:
            await asyncio.to_thread(house.manager.cancel, "r/s#1")
            await asyncio.Event().wait()
        return "worked"

    house.graph("s", works)
    result = await house.run(plan_of("s"))
    assert (result.status, begun) == (WAITS, ["s"])
    assert "'r/s#1' was cancelled" in str(result.feedback)
    result = await house.run()
    assert (result.status, begun) == (COMPLETED, ["s", "s"])


# --- what reaches a part ----------------------------------------------------------------------------------------------


async def test_the_plan_takes_a_value_for_a_branch_while_the_part_works(memory: Storage) -> None:
    house = House(memory)
    taken = []

    async def nothing(ctx: NodeContext) -> None: ...

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    async def works(ctx: NodeContext) -> Any:
        while not any(call.kind == "wait" for call in house.manager.journal("r/s#1")):
            await asyncio.sleep(0)
        with pytest.raises(MessageRefused, match=r"Open: 'go' \(run 'r/s#1'\)"):
            house.manager.send("r", "stop", 7)
        house.manager.send("r", "go", 7)
        taken.append(house.record("r/s#1").state)

    add_graph(house, {"top": nothing, "a": waits, "b": works}, "top>a top>b")
    result = await house.run(plan_of("s"))
    assert (result.status, taken) == (COMPLETED, [RunState.RUNNING])
    assert result.results["a_y"] == 7


async def test_the_plan_takes_a_value_for_a_part_that_waits_in_the_process(memory: Storage) -> None:
    house = House(memory, sleep_in_process_seconds=60.0)

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go", timeout_seconds=30)

    house.graph("s", waits)
    task = asyncio.create_task(house.run(plan_of("s")))
    while memory.find_run("r/s#1") is None or not house.manager.journal("r/s#1"):
        await asyncio.sleep(0)
    house.manager.send("r", "go", 7)
    assert (await task).results["s_y"] == 7


async def test_what_a_revised_plan_left_takes_no_value(memory: Storage) -> None:
    """Its part still waits, but nothing of the plan does."""
    house = House(memory, concurrency=2)

    async def waits(ctx: NodeContext) -> Any:
        return await ctx.wait_for("go")

    async def sends(ctx: NodeContext) -> Any:
        with pytest.raises(MessageRefused, match="None waits for a value"):
            house.manager.send("r", "go", 1)

    house.graph("s", waits)
    house.graph("t", sends)
    await house.run(plan_of("s"))
    result = await house.executor.execute_plan(plan_of("t"), GOAL, run_id="r", replan=True)
    assert result.status is COMPLETED


async def test_a_settlement_reaches_the_part_whose_call_has_the_id_of_one_of_the_plans(memory: Storage) -> None:
    house = House(memory, keep_journal=True)

    async def fails() -> None:
        raise TimeoutError("no reply")

    async def pays(ctx: NodeContext) -> Any:
        return await ctx.call("pay", fails, policy="ask")

    house.inner.register_node("pay", Node(pays))
    add_graph(house, {"pay": pays}, "")
    house.executor.register_function("pay", lambda: "paid", effects=True)
    shop = {"id": "shop", "action": {"action_type": "sub_graph", "graph_id": "s"}, "dependencies": ["pay"]}
    assert (await house.run(plan_of(function("pay"), shop))).status is WAITS
    assert [call.id for call in house.manager.journal("r")] == ["pay#1/1"]
    house.manager.settle("r", "pay#1/1", done="by hand")
    result = resumed(await house.recover())
    assert (result.status, result.results["pay_y"]) == (COMPLETED, "by hand")
    with pytest.raises(MessageRefused):
        house.manager.settle("r", "pay#1/1", done="again")
