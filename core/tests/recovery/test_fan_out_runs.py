"""Fan-outs: branches at the same time, one result whichever is faster, and what a failure leaves of the others."""

from __future__ import annotations

import asyncio
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest

from framework.graph.node import NodeContext, NodeResult
from framework.schemas.run import RunState
from framework.storage.checkpoints import parse_log
from framework.storage.records import LogRow

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent, Turns, Work

NAMES = ("left", "middle", "right")


def fan(agent: Agent, work: dict[str, Work], *, policy: str = "fail_fast", join: bool = True) -> None:
    """A fan-out to the nodes of ``work``, which meet at ``join``."""
    agent.node("fan", fan_out=True, fan_out_policy=policy)
    for name, body in work.items():
        agent.node(name, body)
        agent.edge("fan", name)
    if join:
        agent.node("join", lambda ctx: {"joined": sorted(ctx.memory.read_all())})
        for name in work:
            agent.edge(name, "join")


async def test_branches_run_at_the_same_time(agent: Agent) -> None:
    barrier = asyncio.Barrier(3)

    async def meet(ctx: NodeContext) -> dict[str, Any]:
        await barrier.wait()  # nobody passes unless all three are running
        return {ctx.node_id: 1}

    fan(agent, dict.fromkeys(NAMES, meet))
    async with asyncio.timeout(10):
        result = await agent.run()
    assert result.success
    assert result.path == ["fan", *NAMES, "join"]
    assert result.output["joined"] == sorted(NAMES)


@pytest.mark.parametrize("order", list(permutations(NAMES)), ids="-".join)
async def test_the_result_does_not_depend_on_who_is_faster(
    quick: Agent, turns: type[Turns], order: tuple[str, ...]
) -> None:
    turn = turns(order)

    async def body(ctx: NodeContext) -> NodeResult:
        await turn(ctx.node_id)
        ctx.memory.write("log", [*ctx.memory.read("log"), ctx.node_id])
        ctx.memory.write("text", ctx.memory.read("text") + ctx.node_id[0])
        ctx.memory.write("sum", ctx.memory.read("sum") + len(ctx.node_id))
        ctx.memory.write("best", len(ctx.node_id))
        ctx.memory.write("by_name", {**ctx.memory.read("by_name"), ctx.node_id: len(ctx.node_id)})
        ctx.memory.write("seen", ctx.memory.read("seen") | {ctx.node_id})
        return NodeResult(True, {f"{ctx.node_id}_out": 1, "result": ctx.node_id}, tokens_used=1)

    fan(quick, dict.fromkeys(NAMES, body))
    quick.options["append_only_keys"] = ["log"]
    quick.options["reducers"] = {"sum": "sum", "best": "max", "by_name": "merge", "seen": "union", "text": "append"}
    given = {"log": ["start"], "text": "s", "sum": 1, "best": 0, "by_name": {"start": 0}, "seen": {"start"}}
    result = await quick.run(given)
    assert result.error is None
    assert {key: result.output[key] for key in given} == {
        "log": ["start", "left", "middle", "right"],
        "text": "slmr",
        "sum": 16,
        "best": 6,
        "by_name": {"start": 0, "left": 4, "middle": 6, "right": 5},
        "seen": {"start", "left", "middle", "right"},
    }
    assert result.path == ["fan", *NAMES, "join"]
    assert result.total_tokens == 3
    assert list(result.output["by_name"]) == ["start", *NAMES]
    assert "result" not in result.output, "what every node writes stays in its branch"


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]], ids="-".join)
async def test_two_writers_of_one_key_are_an_error_that_names_them(
    quick: Agent, turns: type[Turns], order: tuple[str, ...]
) -> None:
    turn = turns(order)

    async def body(ctx: NodeContext) -> dict[str, Any]:
        await turn(ctx.node_id)
        return {"verdict": ctx.node_id} if ctx.node_id != "middle" else {}

    fan(quick, dict.fromkeys(NAMES, body))
    result = await quick.run()
    assert not result.success
    for word in ("'left'", "'right'", "'verdict'"):
        assert word in (result.error or "")
    assert quick.ran == ["fan#1", *(f"/fan#1.{index}:{name}#1" for index, name in enumerate(NAMES))]
    again = await quick.run()
    assert again.error == result.error
    assert quick.ran == []

    quick.options["reducers"] = {"verdict": "min"}
    quick.config["definition_change"] = "allow"
    again = await quick.run()
    assert again.success
    assert again.output["verdict"] == "left"
    assert quick.ran == ["join#1"]


async def test_a_branch_does_not_see_what_another_changes_in_place(quick: Agent) -> None:
    changed = asyncio.Event()

    async def change(ctx: NodeContext) -> dict[str, Any]:
        ctx.memory.read("shared")["deep"].append("changed")
        ctx.input_data["rows"].append("mine")
        changed.set()
        return {}

    async def look(ctx: NodeContext) -> dict[str, Any]:
        await changed.wait()
        return {"saw": list(ctx.memory.read("shared")["deep"]), "input": list(ctx.input_data["rows"])}

    fan(quick, {"left": change, "right": look})
    quick.work["fan"] = lambda ctx: {"rows": ["r"]}
    result = await quick.run({"shared": {"deep": ["original"]}})
    assert result.error is None
    assert result.output["saw"] == ["original"]
    assert result.output["input"] == ["r"]
    assert result.output["shared"] == {"deep": ["original", "changed"]}, "what one branch changed counts as written"


async def test_changes_in_place_in_two_branches_conflict(quick: Agent) -> None:
    fan(quick, dict.fromkeys(("left", "right"), lambda ctx: ctx.memory.read("shared").append(ctx.node_id)))
    result = await quick.run({"shared": []})
    assert not result.success
    assert "'shared'" in (result.error or "")


async def test_branches_that_never_meet_end_the_run(agent: Agent) -> None:
    fan(agent, {"left": lambda ctx: {"l": 1}, "right": lambda ctx: {"r": 1}}, join=False)
    result = await agent.run()
    assert result.output == {"l": 1, "r": 1}
    assert result.path == ["fan", "left", "right"]
    assert agent.state() is RunState.COMPLETED
    assert agent.storage is not None
    assert agent.storage.verify().ok
    stored = await agent.run()
    assert agent.ran == []
    assert stored.output == result.output


async def test_mapped_values_reach_their_own_branch_and_the_join(quick: Agent) -> None:
    quick.node("fan", lambda ctx: {"parts": ["p", "q"]}, fan_out=True)
    for name in ("left", "right"):
        quick.node(name, lambda ctx: {f"{ctx.node_id}_saw": ctx.memory.read("part"), "summary": ctx.node_id * 2})
    quick.node("join", lambda ctx: {"got": [ctx.memory.read("from_left"), ctx.memory.read("from_right")]})
    quick.edge("fan", "left", input_mapping={"part": "topic"})
    quick.edge("fan", "right", input_mapping={"part": "parts"})
    quick.edge("left", "join", input_mapping={"from_left": "left_saw"})
    quick.edge("right", "join", input_mapping={"from_right": "right_saw"})
    quick.options["reducers"] = {"summary": "max"}
    result = await quick.run({"topic": "t"})
    assert result.error is None
    assert (result.output["left_saw"], result.output["right_saw"]) == ("t", ["p", "q"])
    assert result.output["got"] == ["t", ["p", "q"]]
    assert "part" not in result.output, "an input of one branch is not something to merge"


async def test_nested_fan_outs_and_a_loop_in_a_branch(agent: Agent) -> None:
    agent.node("fan", fan_out=True)
    agent.node("inner", fan_out=True)
    agent.node("turn", lambda ctx: {"turns": (ctx.memory.read("turns") or 0) + 1})
    for name in ("in1", "in2", "in2b", "inner_join"):
        agent.node(name, lambda ctx: {f"{ctx.node_id}_out": 1})
    agent.node("join", lambda ctx: {"all": sorted(ctx.memory.read_all())})
    agent.edge("fan", "inner")
    agent.edge("fan", "turn")
    agent.edge("turn", "turn", "conditional", condition_expr="turns < 3", priority=1)
    agent.edge("turn", "join")
    agent.edge("inner", "in1")
    agent.edge("inner", "in2")
    agent.chain("in2", "in2b", "inner_join", "join")
    agent.edge("in1", "inner_join")
    result = await agent.run()
    assert result.path == ["fan", "inner", "in1", "in2", "in2b", "inner_join", "turn", "turn", "turn", "join"]
    assert result.output["all"] == ["in1_out", "in2_out", "in2b_out", "inner_join_out", "turns"]
    assert result.output["turns"] == 3


async def test_a_fan_out_in_a_loop_fans_out_each_time(agent: Agent) -> None:
    agent.node("fan", fan_out=True)
    for name in ("left", "right"):
        agent.node(name, lambda ctx: {f"{ctx.node_id}_n": (ctx.memory.read(f"{ctx.node_id}_n") or 0) + 1})
        agent.edge("fan", name)
        agent.edge(name, "join")
    agent.node("join")
    agent.node("end")
    agent.edge("join", "end", "conditional", condition_expr="left_n >= 3", priority=1)
    agent.edge("join", "fan")
    result = await agent.run()
    assert result.path == [*["fan", "left", "right", "join"] * 3, "end"]
    assert (result.output["left_n"], result.output["right_n"]) == (3, 3)


# --- failures -----------------------------------------------------------------------------------------------------


async def test_fail_fast_stops_the_siblings_and_keeps_the_finished_ones(agent: Agent) -> None:
    release = asyncio.Event()
    repaired: list[bool] = []

    async def fails(ctx: NodeContext) -> NodeResult:
        if repaired:
            return NodeResult(True, {"fixed": 1})
        await release.wait()
        return NodeResult(False, error="broken")

    async def hangs(ctx: NodeContext) -> dict[str, Any]:
        if not repaired:
            await asyncio.Event().wait()
        return {"hung": 1}

    def after(ctx: NodeContext) -> dict[str, Any]:
        release.set()
        return {"second": 1}

    fan(agent, {"left": fails, "middle": hangs, "right": lambda ctx: {"first": 1}})
    agent.edges = [edge for edge in agent.edges if edge.source != "right"]
    agent.node("right2", after)
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x1", "source": "right", "target": "right2"}))
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x2", "source": "right2", "target": "join"}))
    async with asyncio.timeout(10):
        first = await agent.run()
    assert "broken" in (first.error or "")
    assert first.path == ["fan", "right", "right2", "left"]
    repaired.append(True)
    second = await agent.run()
    assert sorted(agent.ran) == ["/fan#1.0:left#1", "/fan#1.1:middle#1", "join#1"]
    assert second.success
    assert second.path == ["fan", "left", "middle", "right", "right2", "join"]
    assert second.output["joined"] == ["first", "fixed", "hung", "second"]


async def test_finish_siblings_lets_them_get_to_the_join(agent: Agent) -> None:
    repaired: list[bool] = []
    failed = asyncio.Event()

    def fails(ctx: NodeContext) -> NodeResult:
        failed.set()
        return NodeResult(bool(repaired), {}, error="broken")

    async def waits(ctx: NodeContext) -> dict[str, Any]:
        await failed.wait()
        return {f"{ctx.node_id}_done": 1}

    fan(agent, {"left": fails, "right": waits}, policy="finish_siblings")
    agent.edges = [edge for edge in agent.edges if edge.source != "right"]
    agent.node("right2", waits)
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x1", "source": "right", "target": "right2"}))
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x2", "source": "right2", "target": "join"}))
    first = await agent.run()
    assert not first.success
    assert first.path == ["fan", "right", "right2", "left"]
    repaired.append(True)
    second = await agent.run()
    assert agent.ran == ["/fan#1.0:left#1", "join#1"]
    assert second.output["joined"] == ["right2_done", "right_done"]


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")], ids="-".join)
async def test_of_two_failed_siblings_each_runs_once_and_the_error_is_always_the_same(
    quick: Agent, turns: type[Turns], order: tuple[str, ...]
) -> None:
    turn = turns(order)

    async def fails(ctx: NodeContext) -> NodeResult:
        await turn(ctx.node_id)
        return NodeResult(False, error=f"{ctx.node_id} is broken")

    fan(quick, {"left": fails, "right": fails}, policy="finish_siblings")
    async with asyncio.timeout(10):
        result = await quick.run()
    assert sorted(quick.ran) == ["/fan#1.0:left#1", "/fan#1.1:right#1", "fan#1"]
    assert "left is broken" in (result.error or "")
    assert result.path == ["fan", "left", "right"]
    assert len(quick.runtime.told("critical")) == 2


async def test_a_failure_edge_in_a_branch_is_the_branchs_own_way(agent: Agent) -> None:
    fan(agent, {"left": lambda ctx: NodeResult(False, error="broken"), "right": lambda ctx: {"right": 1}})
    agent.node("repair", lambda ctx: {"repaired": 1})
    agent.edge("left", "repair", "on_failure")
    agent.edge("repair", "join")
    result = await agent.run()
    assert result.success
    assert result.path == ["fan", "left", "repair", "right", "join"]
    assert result.output["joined"] == ["repaired", "right"]


async def test_a_cancelled_fan_out_keeps_what_was_finished(agent: Agent) -> None:
    done = asyncio.Event()
    hang = [True]

    async def slow(ctx: NodeContext) -> dict[str, Any]:
        if hang:
            await asyncio.Event().wait()
        return {"slow": 1}

    async def next_one(ctx: NodeContext) -> dict[str, Any]:
        done.set()
        if hang:
            await asyncio.Event().wait()
        return {"next": 1}

    fan(agent, {"left": slow, "right": lambda ctx: {"quick": 1}})
    agent.edges = [edge for edge in agent.edges if edge.source != "right"]
    agent.node("right2", next_one)
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x1", "source": "right", "target": "right2"}))
    agent.edges.append(agent.edges[0].model_copy(update={"id": "x2", "source": "right2", "target": "join"}))
    await agent.cancelled_when(done)
    assert agent.state() is RunState.CANCELLED
    hang.clear()
    result = await agent.run()
    assert sorted(agent.ran) == ["/fan#1.0:left#1", "/fan#1.1:right2#1", "join#1"]
    assert result.output["joined"] == ["next", "quick", "slow"]


async def test_each_step_of_a_branch_is_a_commit_of_its_own(agent: Agent) -> None:
    barrier = asyncio.Barrier(2)

    async def meet(ctx: NodeContext) -> dict[str, Any]:
        await barrier.wait()
        return {ctx.node_id: 1}

    fan(agent, {"left": meet, "right": meet})
    agent.config["retention_strategy"] = "all"
    await agent.run()
    assert agent.storage is not None
    records = parse_log(agent.storage.read_log("run-1"))
    assert [record["sequence"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]
    assert [found.sequence for found in agent.storage.list_checkpoints("run-1")] == [1, 2, 3, 4]
    assert agent.storage.verify("run-1").ok


async def test_a_step_waits_for_the_commit_it_follows_not_for_its_siblings(
    quick: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sibling that ends while a commit is under way must not start what follows that commit."""
    assert quick.storage is not None
    durable: list[str] = []
    commit = quick.storage.commit

    def slowly(commits: Any) -> Any:
        import time

        time.sleep(0.02)
        outcomes = commit(commits)
        durable.extend(record["node"] for each in commits for record in parse_log_records(each.record))
        return outcomes

    def parse_log_records(data: bytes) -> list[dict[str, Any]]:
        return [record for record in parse_log([LogRow(0, data, None)]) if record["kind"] == "step"]

    monkeypatch.setattr(quick.storage, "commit", slowly)
    seen: dict[str, list[str]] = {}

    def body(ctx: NodeContext) -> None:
        seen[ctx.node_id] = list(durable)

    fan(quick, dict.fromkeys(NAMES, body), join=False)
    for name in NAMES:
        quick.node(f"{name}2", body)
        quick.edge(name, f"{name}2")
    assert (await quick.run()).success
    for name in NAMES:
        assert name in seen[f"{name}2"]


async def test_a_fan_out_without_a_manager_is_the_same(plain: Agent, quick: Agent) -> None:
    results = []
    for each in (plain, quick):
        fan(each, {name: lambda ctx: {f"{ctx.node_id}_out": ctx.step_key} for name in NAMES})
        results.append(await each.run({"topic": "t"}))
    assert results[0].output == results[1].output
    assert results[0].path == results[1].path


async def test_the_step_budget_holds_for_branches(quick: Agent) -> None:
    fan(quick, dict.fromkeys(NAMES, lambda ctx: {}))
    quick.options["max_steps"] = 3
    result = await quick.run()
    assert not result.success
    assert "max_steps=3" in (result.error or "")
    assert result.steps_executed == 3
    assert result.path == ["fan", "left", "middle"]


async def test_an_inner_branch_may_go_straight_to_the_outer_join(agent: Agent) -> None:
    """outer -> (inner -> (x, y), z); x goes to the inner join, y past it to the outer one."""
    agent.node("outer", fan_out=True)
    agent.node("inner", fan_out=True, join_node="meet")
    for node_id in ("x", "y", "z", "meet", "end"):
        agent.node(node_id, lambda ctx: {f"{ctx.node_id}_done": 1})
    for source, target in (("outer", "inner"), ("outer", "z"), ("inner", "x"), ("inner", "y")):
        agent.edge(source, target)
    agent.edge("x", "meet", condition="conditional", condition_expr="meet_x")
    agent.edge("x", "end")
    agent.edge("y", "meet", condition="conditional", condition_expr="meet_y")
    agent.edge("y", "end")
    agent.edge("z", "end")
    agent.edge("meet", "end")
    for meet_x, meet_y in ((True, False), (False, False), (True, True)):
        run_id = f"run {meet_x} {meet_y}"
        result = await agent.run({"meet_x": meet_x, "meet_y": meet_y}, run_id=run_id)
        assert result.success, result.error
        nodes = [key.rpartition(":")[2] for key in agent.ran]
        assert nodes.count("end#1") == 1
        assert nodes.count("meet#1") == int(meet_x or meet_y)
        assert result.output["x_done"] == result.output["y_done"] == result.output["z_done"] == 1
