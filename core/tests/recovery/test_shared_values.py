"""One object under two keys, values handed to branches, and inputs brought again: the same live and restored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import ResumeError, RunNotFound
from framework.graph.builtin_nodes import FunctionNode
from framework.graph.node import NodeContext
from framework.schemas.run import RunState

if TYPE_CHECKING:
    from .conftest import Agent, Work


def chunk_bytes(agent: Agent, key: str) -> int:
    """Bytes stored of a key's newest state."""
    assert agent.storage is not None
    return sum(
        len(chunk.data) for chunk in agent.storage.read_chunks("run-1", agent.record().sequence) if chunk.key == key
    )


def append(ctx: NodeContext) -> dict[str, Any]:
    ctx.memory.read("items").append("y")
    return {}


@pytest.mark.parametrize("interrupted", [False, True])
async def test_one_object_under_two_keys_stays_one(
    agent: Agent, fails_once: Callable[[], Work], interrupted: bool
) -> None:
    agent.node("make", lambda ctx: FunctionNode(lambda: ["x"]).execute(ctx), output_keys=["items"])
    agent.node("between", fails_once() if interrupted else None)
    agent.node("grow", append)
    agent.chain("make", "between", "grow")
    result = await agent.run()
    if interrupted:
        assert not result.success
        result = await agent.run()
    assert result.success
    assert result.output["items"] == ["x", "y"]
    assert result.output["result"] == ["x", "y"]


async def test_a_returned_value_is_stored_once(agent: Agent) -> None:
    text = "long " * 1000

    def make(ctx: NodeContext) -> Any:
        return FunctionNode(lambda: {"messages": [text], "n": 1}).execute(ctx)

    agent.node("make", make, output_keys=["messages", "n"])
    await agent.run()
    assert chunk_bytes(agent, "messages") > len(text)
    assert chunk_bytes(agent, "result") < 200


async def test_a_reference_is_written_out_when_its_target_changes(agent: Agent, fails_once: Callable[[], Work]) -> None:
    shared = ["kept"]
    agent.node("make", lambda ctx: {"a": shared, "b": shared})
    agent.node("change", lambda ctx: {"a": ["new"]})
    agent.node("last", fails_once())
    agent.chain("make", "change", "last")
    await agent.run()
    result = await agent.run()
    assert (result.output["a"], result.output["b"]) == (["new"], ["kept"])


async def test_restored_and_changed_through_either_key(agent: Agent, fails_once: Callable[[], Work]) -> None:
    def change(ctx: NodeContext) -> dict[str, Any]:
        ctx.memory.read("b").append(2)
        return {}

    shared = [1]
    agent.node("make", lambda ctx: {"a": shared, "b": shared})
    agent.node("stop", fails_once())
    agent.node("change", change)
    agent.node("stop again", fails_once())
    agent.chain("make", "stop", "change", "stop again")
    await agent.run()
    await agent.run()
    result = await agent.run()
    assert result.success
    assert (result.output["a"], result.output["b"]) == ([1, 2], [1, 2])


async def test_branches_that_only_read_do_not_conflict(plain: Agent) -> None:
    class Client:
        name = "no equality of its own"

    plain.node("fan", fan_out=True)
    for node_id in ("left", "right"):
        plain.node(node_id, lambda ctx: {f"{ctx.node_id}_saw": ctx.memory.read("client").name})
        plain.edge("fan", node_id)
        plain.edge(node_id, "join")
    plain.node("join")
    result = await plain.run({"client": Client()})
    assert result.success, result.error
    assert result.output["left_saw"] == result.output["right_saw"] == Client.name


async def test_what_a_node_writes_again_is_merged_at_the_join(agent: Agent) -> None:
    agent.node("fan", lambda ctx: {"given": 5}, fan_out=True)
    agent.node("left", lambda ctx: {"k": 5})
    agent.node("right")
    agent.node("join")
    agent.edge("fan", "left", input_mapping={"k": "given"})
    agent.edge("fan", "right")
    agent.edge("left", "join")
    agent.edge("right", "join")
    result = await agent.run()
    assert result.success, result.error
    assert result.output["k"] == 5


async def test_the_input_of_branches_is_not_copied_into_the_checkpoint(agent: Agent) -> None:
    agent.config = {"retention_strategy": "all"}
    agent.node("fan", lambda ctx: {"big": ["x" * 1000] * 100}, fan_out=True)
    agent.node("join")
    for index in range(4):
        agent.node(f"b{index}", lambda ctx: {f"{ctx.node_id}_len": len(ctx.input_data["big"])})
        agent.edge("fan", f"b{index}")
        agent.edge(f"b{index}", "join")
    result = await agent.run()
    assert result.success, result.error
    assert result.output["b3_len"] == 100
    assert agent.storage is not None
    assert max(len(row.body) for row in agent.storage.read_checkpoint_rows("run-1")) < 10_000


async def test_the_last_checkpoint_row_is_as_small_as_the_first(quick: Agent) -> None:
    quick.config = {"retention_strategy": "all"}
    quick.options = {"max_steps": 500}
    quick.chain(*(f"node{index:03}" for index in range(300)))
    await quick.run()
    assert quick.storage is not None
    sizes = [len(row.body) for row in quick.storage.read_checkpoint_rows("run-1")]
    assert len(sizes) == 300
    assert max(sizes) < 1.3 * min(sizes)


async def test_the_same_input_again_changes_nothing_even_if_it_is_not_equal_to_itself(
    agent: Agent, fails_once: Callable[[], Work]
) -> None:
    agent.node("one", lambda ctx: {"x": "advanced"})
    agent.node("two", fails_once())
    agent.chain("one", "two")
    given = {"x": float("nan")}
    await agent.run(given)
    result = await agent.run(given)
    assert result.output["x"] == "advanced"


async def test_an_old_session_state_opens_no_later_pause(agent: Agent) -> None:
    agent.options = {"pause_nodes": ["first", "second"]}
    agent.node("begin", lambda ctx: {"total": 1})
    agent.node("first")
    agent.node("more", lambda ctx: {"total": 100})
    agent.node("second")
    agent.node("pay", lambda ctx: {"paid": ctx.memory.read("total")})
    agent.chain("begin", "first", "more", "second", "pay")
    first = await agent.run()
    second = await agent.run()
    assert (first.paused_at, second.paused_at) == ("first", "second")
    with pytest.raises(ResumeError, match="gone on"):
        await agent.run(session_state=first.session_state, run_id=None)
    assert agent.state() is RunState.PAUSED
    result = await agent.run(session_state=second.session_state, run_id=None)
    assert result.output["paid"] == 100


async def test_a_refused_resume_leaves_the_run_paused(agent: Agent) -> None:
    agent.options = {"pause_nodes": ["ask"]}
    agent.chain("ask", "act")
    await agent.run()
    agent.nodes["other"] = agent.nodes.pop("act").model_copy(update={"id": "other"})
    agent.work["other"] = agent.work.pop("act")
    agent.edges[0].target = "other"
    agent.config = {"definition_change": "allow"}
    with pytest.raises(ResumeError, match="'act'"):
        await agent.run()
    assert agent.state() is RunState.PAUSED


async def test_the_fan_out_node_of_live_branches_must_still_be_there(
    agent: Agent, fails_once: Callable[[], Work]
) -> None:
    agent.node("fan", fan_out=True)
    agent.node("left", fails_once())
    agent.node("right")
    agent.node("join")
    for node_id in ("left", "right"):
        agent.edge("fan", node_id)
        agent.edge(node_id, "join")
    await agent.run()
    del agent.nodes["fan"], agent.work["fan"]
    agent.edges = [edge for edge in agent.edges if edge.source != "fan"]
    agent.edge("left", "right")
    agent.config = {"definition_change": "allow"}
    with pytest.raises(ResumeError, match="'fan'"):
        await agent.run()


async def test_the_session_state_of_a_pause_among_branches_needs_its_own_store(agent: Agent, quick: Agent) -> None:
    for each in (agent, quick):
        each.options = {"pause_nodes": ["left"]}
        each.node("fan", fan_out=True)
        each.node("left", lambda ctx: {"l": 1})
        each.node("after left")
        each.node("right", lambda ctx: {"r": 1})
        each.node("join")
        for source, target in (("fan", "left"), ("fan", "right"), ("left", "after left"), ("after left", "join")):
            each.edge(source, target)
        each.edge("right", "join")
    paused = await agent.run()
    assert paused.paused_at == "left"
    state = {**paused.session_state, "run_id": "unknown here"}
    with pytest.raises(RunNotFound, match="unknown here"):
        await quick.run(session_state=state, run_id=None)
    assert quick.ran == []


@pytest.mark.parametrize(
    ("state", "name"),
    [({"memory": "abc"}, "memory"), ({"memory": [1]}, "memory"), ({"resume_from": {}}, "resume_from"), ([1], "dict")],
)
async def test_a_malformed_session_state_is_named(plain: Agent, state: Any, name: str) -> None:
    plain.node("a")
    result = await plain.run(session_state=state)
    assert not result.success
    assert name in (result.error or "")
    assert plain.ran == []


async def test_nodes_that_never_wait_can_be_timed_out(plain: Agent) -> None:
    plain.options = {"max_steps": 200_000}
    plain.node("spin")
    plain.edge("spin", "spin", "always")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(plain.run(), 0.05)
    assert len(plain.ran) < 200_000
