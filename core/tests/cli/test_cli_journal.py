"""Calls, waits and effects inside a step, as the real command shows them, answers them and wakes their runs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest

from tests.cli.cli_kit import Done, Site, Started

Start = Callable[..., Started]

NODES = """
import asyncio, os
from typing import Annotated
from pydantic import AfterValidator, Field
from framework.graph.node import NodeProtocol, NodeResult
from framework.llm.provider import LLMResponse

def ledger(text):
    with open(os.environ["LEDGER"], "a") as file:
        file.write(text + "\\n")

def even(number):
    if number % 2:
        raise ValueError("it is odd")
    return number

def look(place):
    ledger("look")
    return f"plan of {place}"

def pay(amount, idempotency_key):
    ledger("pay:" + idempotency_key.replace(" ", ""))
    if os.environ.get("HOLD") == "pay":
        import threading
        print("holding", flush=True)
        threading.Event().wait()
    return f"receipt for {amount}"

class Survey(NodeProtocol):
    async def execute(self, ctx):
        return NodeResult(True, {"plan": await ctx.call("look", look, ctx.memory.read("place"))})

class Build(NodeProtocol):
    async def execute(self, ctx):
        kind = os.environ.get("KIND", "ask")
        seen = await ctx.call("look", look, "the site")
        if kind == "sleep":
            await ctx.sleep(float(os.environ.get("SLEEP", "3600")))
            value = "rested"
        elif kind == "twice":
            value = [await ctx.wait_for("go"), await ctx.wait_for("go")]
        elif kind == "even":
            value = await ctx.ask("Which number?", Annotated[int, Field(ge=0), AfterValidator(even)])
        elif kind == "signal":
            value = await ctx.wait_for("go")
        elif kind == "pay":
            value = await ctx.call("pay", pay, 10, policy="ask")
        else:
            value = await ctx.ask("Which colour?", {"type": "string"})
        return NodeResult(True, {"house": f"{seen}: {value}"})

async def hand_over(house, buyer): return f"keys of {house}"

NODES = {"survey": Survey(), "build": Build(), "hand_over": hand_over}
"""

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}', "--run-id", "house-1")


@pytest.fixture
def built(site: Site) -> Site:
    """The site with an agent whose node ``build`` makes calls and waits, as KIND says."""
    site.make_agent(nodes=NODES)
    return site


def looks(site: Site) -> int:
    return site.ledger().count("look")


def shown(call: Callable[..., Done], run: str = "house-1") -> dict[str, object]:
    document = call("runs", "show", run, "-o", "json").document
    assert isinstance(document, dict)
    return document


def test_a_question_is_shown_answered_and_never_asked_twice(built: Site) -> None:
    paused = built.call("run", built.agent, *INPUT)
    assert paused.code == 3
    assert "an answer to: Which colour?" in paused.out
    view = built.call("runs", "show", "house-1", "-o", "json").document
    [waiting] = view["resume"]["waiting"]
    assert (waiting["kind"], waiting["question"], view["resume"]["verdict"]) == ("answer", "Which colour?", "waits")
    assert [(each["name"], each["state"]) for each in view["calls"]] == [("look", "done"), ("ask", "waiting")]
    command = f"surefoot runs send house-1 '{waiting['name']}' '<JSON>'"
    screen = built.call("runs", "show", "house-1")
    assert command in screen.out
    assert command in paused.out
    assert "surefoot resume house-1" in paused.out

    for wrong, code in (("<JSON>", 2), ("7", 1)):
        refused = built.call("runs", "send", "house-1", waiting["name"], wrong)
        assert refused.code == code
        assert len(refused.err.splitlines()) == 1, refused.err
    assert built.call("recover").out == "No run has crashed, and none is due.\n"
    sent = built.call("runs", "send", "latest", waiting["name"], '"red"', "-o", "json")
    assert (sent.code, sent.document["resume_command"]) == (0, "surefoot resume house-1")
    again = built.call("runs", "send", "house-1", waiting["name"], '"blue"')
    assert again.code == 1
    assert "answered before" in again.err
    assert shown(built.call)["resume"]["verdict"] == "goes_on"  # type: ignore[index]
    done = built.call("recover", "-o", "json")
    assert (done.code, [each["outcome"] for each in done.document["recovered"]]) == (0, ["completed"])
    result = built.call("resume", "house-1", "-q").document
    assert result["output"]["keys"] == "keys of plan of the site: red"
    assert looks(built) == 2
    late = built.call("runs", "send", "house-1", "go", "1")
    assert late.code == 1
    assert "completed" in late.err


def test_a_signal_may_come_first_and_one_for_no_run_is_told(built: Site) -> None:
    assert built.call("runs", "send", "nobody", "go", "1").code == 4
    assert built.call("run", built.agent, *INPUT, KIND="signal").code == 3
    screen = built.call("runs", "show", "house").out
    assert "the signal go" in screen
    assert "surefoot runs send house-1 go '<JSON>'" in screen
    assert built.call("runs", "send", "house", "go", '{"at": 7}').code == 0
    result = built.call("resume", "house-1", "-q", KIND="signal").document
    assert result["output"]["house"] == "plan of the site: {'at': 7}"


def test_which_wait_a_signal_is_for_can_be_said(built: Site) -> None:
    assert built.call("run", built.agent, *INPUT, KIND="twice").code == 3
    assert built.call("runs", "send", "house-1", "go", "1").code == 0
    early = built.call("runs", "send", "house-1", "go", "2")
    assert early.code == 1
    assert "occurrence=2" in early.err
    paused = built.call("resume", "house-1", KIND="twice")
    assert paused.code == 3
    assert "the signal go (number 2)" in paused.out
    assert "surefoot runs send house-1 go '<JSON>' --occurrence 2" in paused.out
    late = built.call("runs", "send", "house-1", "go", "7", "--occurrence", "1")
    assert late.code == 1
    assert "first one counts" in late.err
    assert built.call("runs", "send", "house-1", "go", "2", "--occurrence", "0").code == 2
    assert built.call("runs", "send", "house-1", "build#1/q01234567", "2", "--occurrence", "1").code == 2
    assert built.call("runs", "send", "house-1", "go", "2", "--occurrence", "2").code == 0
    result = built.call("resume", "house-1", "-q", KIND="twice").document
    assert result["output"]["house"] == "plan of the site: [1, 2]"


def test_an_answer_that_the_node_refuses_is_shown_and_asked_again(built: Site) -> None:
    assert built.call("run", built.agent, *INPUT, KIND="even").code == 3
    [waiting] = shown(built.call)["resume"]["waiting"]  # type: ignore[index]
    assert built.call("runs", "send", "house-1", waiting["name"], "-4").code == 1, "the schema says so"
    assert built.call("runs", "send", "house-1", waiting["name"], "3").code == 0, "only the node knows"
    done = built.call("recover", "-o", "json", KIND="even")
    assert [each["outcome"] for each in done.document["recovered"]] == ["paused"], done.err
    screen = built.call("runs", "show", "house-1").out
    assert "the last one was refused" in screen
    assert "it is odd" in " ".join(screen.split())
    assert f"surefoot runs send house-1 '{waiting['name']}' '<JSON>'" in screen
    assert built.call("recover", KIND="even").out == "No run has crashed, and none is due.\n"
    assert built.call("runs", "send", "house-1", waiting["name"], "4").code == 0
    result = built.call("resume", "house-1", "-q", KIND="even").document
    assert result["output"]["house"] == "plan of the site: 4"
    assert looks(built) == 2


def test_a_run_that_sleeps_is_let_go_and_not_woken_before_it_is_due(built: Site) -> None:
    paused = built.call("run", built.agent, *INPUT, KIND="sleep", SLEEP="3600")
    assert paused.code == 3
    assert "build#1: sleeps until" in paused.out
    assert built.call("recover", KIND="sleep").out == "No run has crashed, and none is due.\n"
    [waiting] = shown(built.call)["resume"]["waiting"]  # type: ignore[index]
    assert waiting["kind"] == "sleep"
    assert "T" in waiting["until"]
    assert built.call("recover", "--dry-run", "-o", "json").document == {"recovered": []}
    early = built.call("resume", "house-1", KIND="sleep")  # it is no harm, and no answer
    assert early.code == 3
    assert "sleeps until" in early.out
    assert looks(built) == 2


def test_a_watching_recover_wakes_a_run_that_is_due(built: Site, started: Start) -> None:
    assert built.call("run", built.agent, *INPUT, KIND="sleep", SLEEP="5.5").code == 3
    watching = started("recover", "--watch", "--interval", "0.1", KIND="sleep", SLEEP="5.5")
    watching.wait_for("hand_over")
    watching.signal(signal.SIGINT)
    assert watching.end().code == 130
    assert built.call("resume", "house-1", "-q").document["output"]["house"] == "plan of the site: rested"
    assert looks(built) == 2


def test_an_effect_that_was_in_flight_is_unknown_until_it_is_settled(built: Site, started: Start) -> None:
    running = started("run", built.agent, *INPUT, KIND="pay", HOLD="pay")
    running.wait_for("holding")
    assert "is running" in built.call("runs", "settle", "house-1", "build#1/2", "--redo").err
    running.kill()
    view = shown(built.call)
    [unknown] = view["resume"]["unknown"]  # type: ignore[index]
    assert {each["id"]: each["state"] for each in view["calls"]}[unknown] == "unknown"  # type: ignore[attr-defined]
    screen = built.call("runs", "show", "house-1").out
    assert f"surefoot runs settle house-1 '{unknown}' --done '<JSON>'" in screen
    assert "1 recorded call answered from the journal, the effect of 1 call unknown" in screen

    paused = built.call("resume", "house-1", KIND="pay")
    assert paused.code == 3
    assert f"surefoot runs settle house-1 '{unknown}' --done '<JSON>'" in paused.out
    assert built.call("runs", "settle", "house-1", unknown).code == 2
    assert built.call("runs", "settle", "house-1", unknown, "--redo", "--skip").code == 2
    assert built.call("runs", "settle", "house-1", unknown, "--done", "x").code == 2
    missing = built.call("runs", "settle", "house-1", "build#1/77", "--redo")
    assert missing.code == 4
    assert unknown in missing.err
    known = built.call("runs", "settle", "house-1", "build#1/1", "--redo")
    assert known.code == 1
    assert "'done'" in known.err
    settled = built.call("runs", "settle", "house-1", unknown, "--done", '"receipt 17"', "-o", "json")
    assert settled.document == {
        "run_id": "house-1",
        "call": unknown,
        "action": "done",
        "resume_command": "surefoot resume house-1",
    }
    assert built.call("runs", "settle", "house-1", unknown, "--skip").code == 1
    assert shown(built.call)["resume"]["unknown"] == []  # type: ignore[index]
    result = built.call("resume", "house-1", "-q", KIND="pay").document
    assert result["output"]["house"] == "plan of the site: receipt 17"
    assert [each for each in built.ledger() if each.startswith("pay")] == ["pay:" + _key(view, unknown)]
    assert looks(built) == 2


def _key(view: dict[str, object], call: str) -> str:
    calls = view["calls"]
    assert isinstance(calls, list)
    return str(next(each["key"] for each in calls if each["id"] == call))


def test_an_effect_can_be_settled_right_after_the_crash(built: Site, started: Start) -> None:
    """The process is gone, its lease is not: nobody has to wait for that."""
    running = started("run", built.agent, *INPUT, KIND="pay", HOLD="pay")
    running.wait_for("holding")
    running.kill()
    [unknown] = shown(built.call)["resume"]["unknown"]  # type: ignore[index]
    assert built.call("runs", "settle", "house-1", unknown, "--redo").code == 0
    done = built.call("recover", "-o", "json", KIND="pay")
    assert [each["outcome"] for each in done.document["recovered"]] == ["completed"], done.err
    [first, second] = [each for each in built.ledger() if each.startswith("pay")]
    assert first == second


def test_a_budget_ends_a_run_and_a_larger_one_goes_on(built: Site) -> None:
    for wrong in (("--max-tokens", "-1"), ("--max-cost", "much")):
        assert built.call("run", built.agent, *INPUT, *wrong).code == 2
    over = built.call("run", built.agent, *INPUT, "--max-tokens", "0", KIND="signal")
    assert over.code == 1
    assert "max_tokens=0" in over.out
    assert looks(built) == 0
    still = built.call("resume", "house-1", KIND="signal")  # the budget is the run's, not the process's
    assert still.code == 1
    assert built.call("resume", "house-1", "--max-tokens", "10", "--max-cost", "0.5", KIND="signal").code == 3
    assert looks(built) == 2


def test_the_document_of_a_paused_run_says_what_it_waits_for(built: Site) -> None:
    before = time.time()
    document = built.call("run", built.agent, *INPUT, "-o", "json", KIND="signal").document
    assert [(each["kind"], each["name"]) for each in document["waits_for"]] == [("signal", "go")]
    assert document["answer_commands"] == ["surefoot runs send house-1 go '<JSON>'"]
    assert document["asks_for"] == []
    exported = built.call("runs", "export", "house-1").document
    assert [each["state"] for each in exported["journal"]] == ["done", "waiting"]
    assert exported["journal"][0]["answer"] == "plan of the site"
    bare = built.call("runs", "export", "house-1", "--no-values").out
    assert "plan of the site" not in json.dumps(json.loads(bare)["journal"])
    assert exported["journal"][0]["at"] >= before
