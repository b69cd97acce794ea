"""Runs that wait for somebody: pause nodes, questions to a person, and going on with the answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from framework.graph.node import NodeContext, NodeResult
from framework.schemas.run import RunState

if TYPE_CHECKING:
    from framework.graph.executor import ExecutionResult
    from tests.recovery.conftest import Agent


def paused_chain(agent: Agent) -> None:
    agent.node("ask", lambda ctx: {"question": "really?"})
    agent.node("act", lambda ctx: {"acted_on": ctx.memory.read("answer"), "given": ctx.input_data.get("answer")})
    agent.chain("ask", "act", "end")
    agent.options["pause_nodes"] = ["ask"]


def check_paused(result: ExecutionResult) -> None:
    assert result.success
    assert result.paused_at == "ask"
    assert result.path == ["ask"]
    assert result.session_state["paused_at"] == "ask"
    assert result.session_state["resume_from"] == "ask_resume"
    assert result.session_state["next_node"] == "act"
    assert result.session_state["memory"] == {"question": "really?"}
    assert result.output == {"question": "really?"}


async def test_a_paused_run_goes_on_where_its_edges_led(agent: Agent) -> None:
    paused_chain(agent)
    check_paused(await agent.run())
    assert agent.state() is RunState.PAUSED
    assert agent.record().owner is None
    result = await agent.run({"answer": "yes"})
    assert agent.ran == ["act#1", "end#1"]
    assert result.paused_at is None
    assert result.path == ["ask", "act", "end"]
    assert result.output == {"question": "really?", "answer": "yes", "acted_on": "yes", "given": "yes"}
    assert agent.state() is RunState.COMPLETED


async def test_a_paused_run_goes_on_at_its_resume_entry_point(agent: Agent) -> None:
    paused_chain(agent)
    agent.node("hear", lambda ctx: {"heard": ctx.input_data["answer"]})
    agent.edge("hear", "end")
    agent.options["entry_points"] = {"ask_resume": "hear"}
    assert (await agent.run()).paused_at == "ask"
    result = await agent.run({"answer": "no"})
    assert agent.ran == ["hear#1", "end#1"]
    assert result.path == ["ask", "hear", "end"]
    assert result.output["heard"] == "no"


async def test_the_session_state_of_a_pause_goes_on_in_its_own_run(agent: Agent) -> None:
    paused_chain(agent)
    paused = await agent.run(run_id=None)
    result = await agent.run({"answer": "yes"}, paused.session_state, run_id=None)
    assert result.run_id == paused.run_id
    assert result.path == ["ask", "act", "end"]
    assert result.output["acted_on"] == "yes"


async def test_the_session_state_of_a_pause_goes_on_without_a_manager(plain: Agent) -> None:
    paused_chain(plain)
    paused = await plain.run(run_id=None)
    check_paused(paused)
    result = await plain.run({"answer": "yes"}, paused.session_state, run_id=None)
    assert plain.ran == ["act#1", "end#1"]
    assert result.output["acted_on"] == "yes"


async def test_the_session_state_of_a_pause_goes_on_in_another_store(agent: Agent, plain: Agent) -> None:
    """The run is not known there: it becomes a new one that begins where the session state says."""
    paused_chain(agent)
    paused_chain(plain)
    paused = await plain.run(run_id=None)
    result = await agent.run({"answer": "yes"}, paused.session_state)
    assert agent.ran == ["act#1", "end#1"]
    assert result.output["acted_on"] == "yes"


async def test_a_pause_at_the_end_pauses_and_then_is_over(agent: Agent) -> None:
    agent.chain("a", "ask")
    agent.options["pause_nodes"] = ["ask"]
    agent.options["terminal_nodes"] = ["ask"]
    paused = await agent.run()
    assert paused.paused_at == "ask"
    assert paused.session_state["next_node"] is None
    result = await agent.run()
    assert agent.ran == []
    assert result.success
    assert result.paused_at is None
    assert result.path == ["a", "ask"]
    assert agent.state() is RunState.COMPLETED


async def test_a_pause_node_that_fails_does_not_pause(agent: Agent) -> None:
    paused_chain(agent)
    agent.work["ask"] = lambda ctx: NodeResult(False, error="no question")
    result = await agent.run()
    assert not result.success
    assert result.paused_at is None
    assert agent.state() is RunState.FAILED


async def test_a_loop_pauses_each_time(agent: Agent) -> None:
    agent.node("ask", lambda ctx: {"asked": (ctx.memory.read("asked") or 0) + 1})
    agent.node("end")
    agent.edge("ask", "end", "conditional", condition_expr="asked == 3", priority=1)
    agent.edge("ask", "ask")
    agent.options["pause_nodes"] = ["ask"]
    for count in (1, 2, 3):
        result = await agent.run({"answer": count})
        assert result.paused_at == "ask"
        assert result.output["asked"] == count
    result = await agent.run({"answer": 4})
    assert result.path == ["ask", "ask", "ask", "end"]
    assert result.steps_executed == 4


async def test_a_question_to_a_person_waits_for_its_answer(agent: Agent) -> None:
    agent.node("draft", lambda ctx: {"draft": "text"})
    agent.node("review", node_type="human_input", output_keys=["approval"])
    agent.node("send", lambda ctx: {"sent": ctx.memory.read("approval")})
    agent.chain("draft", "review", "send")
    first = await agent.run()
    assert (first.success, first.paused_at, first.path) == (True, "review", ["draft"])
    again = await agent.run()
    assert agent.ran == []
    assert again.paused_at == "review", "nobody has answered yet"
    assert agent.state() is RunState.PAUSED
    result = await agent.run({"approval": "ok"})
    assert agent.ran == ["send#1"]
    assert result.path == ["draft", "review", "send"]
    assert result.output["sent"] == "ok"


async def test_a_question_without_keys_is_answered_by_going_on(agent: Agent) -> None:
    agent.node("wait", node_type="human_input")
    agent.chain("wait", "end")
    assert (await agent.run()).paused_at == "wait"
    result = await agent.run()
    assert result.path == ["wait", "end"]


async def test_a_question_asks_no_model(quick: Agent) -> None:
    def refuse(**arguments: object) -> None:
        raise AssertionError("a model was asked")

    quick.llm = type("Model", (), {"complete": staticmethod(refuse), "complete_with_tools": staticmethod(refuse)})()
    quick.node("wait", node_type="human_input", output_keys=["answer"])
    quick.chain("wait", "end")
    assert (await quick.run()).paused_at == "wait"
    assert quick.runtime.problems == []


# --- inside a fan-out ---------------------------------------------------------------------------------------------


def branches_with_pause(agent: Agent, *, pause_comes_last: bool) -> None:
    agent.node("fan", fan_out=True)
    agent.node("ask", lambda ctx: {"question": 1})
    agent.node("other", lambda ctx: {"other": 1})
    agent.node("other2", lambda ctx: {"other2": 1})
    agent.node("join", lambda ctx: {"all": sorted(ctx.memory.read_all())})
    agent.edge("fan", "ask")
    agent.edge("fan", "other")
    agent.chain("other", "other2", "join")
    if pause_comes_last:
        agent.edge("ask", "join")
    else:
        agent.node("act", lambda ctx: {"acted_on": ctx.memory.read("answer")})
        agent.chain("ask", "act", "join")
    agent.options["pause_nodes"] = ["ask"]


async def test_a_pause_in_a_branch_lets_the_others_get_to_the_join(agent: Agent) -> None:
    branches_with_pause(agent, pause_comes_last=False)
    paused = await agent.run()
    assert paused.paused_at == "ask"
    assert paused.session_state["next_node"] == "act"
    assert paused.path == ["fan", "ask", "other", "other2"]
    assert agent.state() is RunState.PAUSED
    result = await agent.run({"answer": "yes"})
    assert agent.ran == ["/fan#1.0:act#1", "join#1"]
    assert result.path == ["fan", "ask", "act", "other", "other2", "join"]
    assert result.output["acted_on"] == "yes"
    assert result.output["other2"] == 1


async def test_a_pause_at_the_end_of_a_branch_holds_the_join_back(agent: Agent) -> None:
    branches_with_pause(agent, pause_comes_last=True)
    paused = await agent.run()
    assert paused.paused_at == "ask"
    assert "join#1" not in agent.ran
    assert agent.state() is RunState.PAUSED
    result = await agent.run()
    assert agent.ran == ["join#1"]
    assert result.path == ["fan", "ask", "other", "other2", "join"]
    assert result.output["question"] == 1
    assert agent.state() is RunState.COMPLETED


async def test_a_pause_in_the_last_branch_without_a_join(agent: Agent) -> None:
    agent.node("fan", fan_out=True)
    agent.node("ask", lambda ctx: {"question": 1})
    agent.node("other", lambda ctx: {"other": 1})
    agent.edge("fan", "ask")
    agent.edge("fan", "other")
    agent.options["pause_nodes"] = ["ask"]
    assert (await agent.run()).paused_at == "ask"
    result = await agent.run()
    assert agent.ran == []
    assert result.output == {"question": 1, "other": 1}
    assert (await agent.run()).output == {"question": 1, "other": 1}


async def test_two_branches_that_pause_are_one_pause_whichever_is_faster(agent: Agent) -> None:
    for first, second in (("left", "right"), ("right", "left")):
        gate = asyncio.Event()

        async def slow(ctx: NodeContext, gate: asyncio.Event = gate) -> dict[str, int]:
            await gate.wait()
            return {f"{ctx.node_id}_done": 1}

        async def fast(ctx: NodeContext, gate: asyncio.Event = gate) -> dict[str, int]:
            asyncio.get_running_loop().call_later(0.02, gate.set)
            return {f"{ctx.node_id}_done": 1}

        agent.nodes, agent.edges = {}, []
        agent.node("fan", fan_out=True)
        agent.node("left")
        agent.node("right")
        agent.work |= {first: fast, second: slow}
        agent.edge("fan", "left")
        agent.edge("fan", "right")
        agent.edge("left", "join")
        agent.edge("right", "join")
        agent.node("join")
        agent.options["pause_nodes"] = ["left", "right"]
        paused = await agent.run(run_id=f"{first}-first")
        assert (paused.paused_at, paused.path) == ("left", ["fan", "left", "right"])
        result = await agent.run(run_id=f"{first}-first")
        assert agent.ran == ["join#1"]
        assert result.output == {"left_done": 1, "right_done": 1}


async def test_a_question_in_a_branch_waits_while_the_others_go_on(agent: Agent) -> None:
    agent.node("fan", fan_out=True)
    agent.node("review", node_type="human_input", output_keys=["approval"])
    agent.node("other", lambda ctx: {"other": 1})
    agent.node("join", lambda ctx: {"joined": ctx.memory.read("approval")})
    for source, target in (("fan", "review"), ("fan", "other"), ("review", "join"), ("other", "join")):
        agent.edge(source, target)
    paused = await agent.run()
    assert paused.paused_at == "review"
    assert agent.ran == ["fan#1", "/fan#1.1:other#1"]
    result = await agent.run({"approval": "ok"})
    assert agent.ran == ["join#1"]
    assert result.path == ["fan", "review", "other", "join"]
    assert result.output["joined"] == "ok"


@pytest.mark.parametrize("times", [1, 3])
async def test_a_pause_survives_calls_that_bring_nothing_new(agent: Agent, times: int) -> None:
    agent.node("a")
    agent.node("review", node_type="human_input", output_keys=["x", "y"])
    agent.chain("a", "review", "end")
    await agent.run()
    for _ in range(times):
        assert (await agent.run({"x": 1})).paused_at == "review"
    result = await agent.run({"y": 2})
    assert result.path == ["a", "review", "end"]
    assert result.output == {"x": 1, "y": 2}


async def test_a_pause_that_nobody_was_told_of_is_told_first(agent: Agent) -> None:
    """One branch pauses, another fails: the call that goes on repairs the one and still pauses for the other."""
    repaired: list[bool] = []
    asked = asyncio.Event()

    async def fails(ctx: NodeContext) -> NodeResult:
        await asked.wait()
        return NodeResult(bool(repaired), {"right": 1}, error="broken")

    def ask(ctx: NodeContext) -> dict[str, int]:
        asyncio.get_running_loop().call_later(0.02, asked.set)
        return {"question": 1}

    agent.node("fan", fan_out=True)
    agent.node("ask", ask)
    agent.node("right", fails)
    agent.node("act")
    agent.edge("fan", "ask")
    agent.edge("fan", "right")
    agent.chain("ask", "act", "join")
    agent.edge("right", "join")
    agent.options["pause_nodes"] = ["ask"]
    first = await agent.run()
    assert (first.success, first.paused_at) == (False, None)
    repaired.append(True)
    second = await agent.run()
    assert agent.ran == ["/fan#1.1:right#1"]
    assert (second.success, second.paused_at, second.session_state["next_node"]) == (True, "ask", "act")
    third = await agent.run()
    assert agent.ran == ["/fan#1.0:act#1", "join#1"]
    assert third.paused_at is None
