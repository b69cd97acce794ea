"""`AgentOrchestrator`: who gets a request, and what agents say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.llm.litellm import LiteLLMProvider
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentMessage, AgentOrchestrator, AgentRunner, CapabilityLevel, MessageType
from framework.runner.orchestrator import UnknownAgent
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import chain, function, write_agent

ECHO = "NODES = {'echo': lambda text: NAME + ' got ' + text}\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)


def agent(tmp_path: Path, name: str, description: str, nodes: str = ECHO, reads: str = "text") -> Path:
    graph = chain(
        {**function("start", "", "seen")},
        function("echo", reads, "answer"),
        id=f"{name}-graph",
        description=description,
    )
    goal = {"id": name, "description": description}
    code = f"NAME = {name!r}\n{nodes}NODES['start'] = lambda **_: True\n"
    return write_agent(tmp_path / name, graph, goal=goal, nodes=code)


@pytest.fixture
def two(tmp_path: Path) -> AgentOrchestrator:
    orchestrator = AgentOrchestrator()
    orchestrator.register("mail", agent(tmp_path, "mail", "Answers mails and letters."))
    orchestrator.register("sums", agent(tmp_path, "sums", "Adds numbers on invoices."), ["taxes"], 2)
    return orchestrator


async def test_a_request_goes_to_the_agent_whose_words_it_uses(two: AgentOrchestrator) -> None:
    result = await two.dispatch({"text": "a letter to answer"})
    assert result.success, result.error
    assert result.handled_by == ["mail"]
    assert result.results["mail"]["output"]["answer"] == "mail got a letter to answer"
    assert [message.type for message in result.messages] == [MessageType.REQUEST, MessageType.RESPONSE]
    assert (await two.dispatch({"text": "two invoices"})).handled_by == ["sums"]
    assert (await two.dispatch({"text": "hm"}, intent="answer mails")).handled_by == ["mail"]


async def test_a_declared_capability_counts(two: AgentOrchestrator) -> None:
    assert (await two.dispatch({"text": "my taxes for the year, please, and the mail"})).handled_by == ["sums"]


async def test_a_request_nobody_can_handle_is_an_error_that_says_why(two: AgentOrchestrator) -> None:
    result = await two.dispatch({"text": "book trains"})
    assert not result.success
    assert result.handled_by == []
    assert "mail: no shared words" in (result.error or "")
    empty = await AgentOrchestrator().dispatch({"text": "x"})
    assert "None is registered" in (empty.error or "")


async def test_equal_answers_are_decided_by_priority_then_by_registration(tmp_path: Path) -> None:
    with AgentOrchestrator() as orchestrator:
        for name, priority in (("one", 0), ("two", 5), ("three", 5)):
            orchestrator.register(name, agent(tmp_path, name, "Answers letters."), priority=priority)
        assert (await orchestrator.dispatch({"text": "answer letters"})).handled_by == ["two"]


async def test_a_model_decides_when_there_is_one(tmp_path: Path) -> None:
    asked: list[str] = []

    def script(messages: list[Any], system: str | None, tools: list[Any]) -> str:
        prompt = messages[-1]["content"]
        asked.append(prompt)
        return '{"level": "best_fit"}' if "sums-graph" in prompt else '{"level": "cannot_handle"}'

    orchestrator = AgentOrchestrator(llm=ScriptedLLM(script))
    orchestrator.register("mail", agent(tmp_path, "mail", "Answers letters."))
    orchestrator.register("sums", agent(tmp_path, "sums", "Adds numbers."))
    assert (await orchestrator.dispatch({"text": "answer letters"})).handled_by == ["sums"]
    assert len(asked) == 2


async def test_a_failing_agent_is_a_failed_result_and_nobody_else_is_tried(tmp_path: Path) -> None:
    broken = "def echo(text):\n    raise ValueError('no ink')\nNODES = {'echo': echo}\n"
    orchestrator = AgentOrchestrator()
    folder = agent(tmp_path, "broken", "Answers letters.", broken)
    text = (folder / "agent.json").read_text().replace('"id": "echo"', '"id": "echo", "max_retries": 1')
    (folder / "agent.json").write_text(text)
    orchestrator.register("broken", folder, priority=1)
    orchestrator.register("spare", agent(tmp_path, "spare", "Answers letters."))
    result = await orchestrator.dispatch({"text": "answer letters"})
    assert (result.success, result.handled_by) == (False, ["broken"])
    assert "no ink" in (result.error or "")
    assert all(message.to_agent != "spare" for message in orchestrator.get_message_log())


async def test_an_agent_that_raises_answers_with_its_error(two: AgentOrchestrator, tmp_path: Path) -> None:
    class Busy(AgentRunner):
        async def receive_message(self, message: AgentMessage) -> AgentMessage:
            from framework.errors import RunBusy

            raise RunBusy("r", "somebody", 3)

    two.register_runner("busy", Busy.load(agent(tmp_path, "busy", "Busy.")))
    reply = await two.relay("mail", "busy", {})
    assert (reply.from_agent, reply.content["success"]) == ("busy", False)
    assert "running elsewhere" in reply.content["error"]


async def test_relay_and_broadcast_are_logged(two: AgentOrchestrator) -> None:
    reply = await two.relay("mail", "sums", {"text": "1"}, intent="add")
    assert reply.content["output"]["answer"] == "sums got 1"
    assert (reply.from_agent, reply.to_agent, reply.intent) == ("sums", "mail", "add")
    replies = await two.broadcast("mail", {"text": "all"})
    assert list(replies) == ["sums"]
    assert set(await two.broadcast(None, {"text": "all"})) == {"mail", "sums"}
    log = two.get_message_log()
    assert len(log) == 8
    assert log[1].parent_id == log[0].id
    two.clear_message_log()
    assert two.get_message_log() == []
    with pytest.raises(UnknownAgent, match="known: mail, sums"):
        await two.relay(None, "nobody", {})


def test_agents_are_listed_and_names_are_unique(two: AgentOrchestrator, tmp_path: Path) -> None:
    listed = two.list_agents()
    assert [each["name"] for each in listed] == ["mail", "sums"]
    assert listed[1] == {
        "name": "sums",
        "description": "Adds numbers on invoices.",
        "capabilities": ["taxes"],
        "priority": 2,
    }
    with pytest.raises(ValueError, match="'mail' already"):
        two.register("mail", tmp_path / "mail")


async def test_cleanup_ends_only_what_was_loaded_here(tmp_path: Path) -> None:
    own = AgentRunner.load(agent(tmp_path, "own", "Own."), storage="memory://")
    with AgentOrchestrator() as orchestrator:
        orchestrator.register_runner("own", own)
        orchestrator.register("loaded", agent(tmp_path, "loaded", "Loaded."), storage="memory://")
        loaded = orchestrator._agents["loaded"].runner
    assert loaded.storage is not None
    assert loaded.storage.closed
    assert isinstance(own.storage, MemoryStorage)
    assert not own.storage.closed
    assert orchestrator.list_agents() == []


def test_a_reply_goes_back_and_names_its_message() -> None:
    message = AgentMessage(from_agent="a", to_agent="b", intent="ask")
    reply = message.reply("b", {"x": 1}, MessageType.CAPABILITY_RESPONSE)
    assert (reply.from_agent, reply.to_agent, reply.parent_id, reply.intent) == ("b", "a", message.id, "ask")
    assert reply.type is MessageType.CAPABILITY_RESPONSE
    assert not reply.requires_response
    assert message.id != AgentMessage().id


def test_the_words_of_the_enums() -> None:
    assert [each.value for each in MessageType] == (
        "request response handoff broadcast capability_check capability_response".split()
    )
    assert [each.value for each in CapabilityLevel] == "cannot_handle uncertain can_handle best_fit".split()


# --- the model it makes itself ----------------------------------------------------------------------------------------


class FakeLiteLLM(ScriptedLLM):
    """Stands for LiteLLM's provider, which is an extra."""

    def __init__(self, model: str) -> None:
        super().__init__(lambda messages, system, tools: '{"level": "best_fit", "confidence": 1.0, "reasoning": "r"}')
        self.made_for = model


async def test_a_provider_of_litellm_is_made_for_the_model_and_asked_when_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.runner.orchestrator.LiteLLMProvider", FakeLiteLLM)
    with AgentOrchestrator(model="claude-x") as orchestrator:
        assert (orchestrator._model, orchestrator._llm.made_for) == ("claude-x", "claude-x")
        orchestrator.register("mail", agent(tmp_path, "mail", "Answers mails."))
        assert (await orchestrator.dispatch({"text": "book trains"})).handled_by == []  # by words, as there is no key
        monkeypatch.setenv("ANTHROPIC_API_KEY", "k" * 20)
        assert (await orchestrator.dispatch({"text": "book trains"})).handled_by == ["mail"]
    assert AgentOrchestrator(model="")._llm is None
    given = ScriptedLLM([])
    assert AgentOrchestrator(given)._llm is given


def test_it_is_made_with_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(LiteLLMProvider, "__init__", lambda self, *args, **named: made.append((args, named)))
    assert isinstance(AgentOrchestrator()._llm, LiteLLMProvider)
    assert made == [((), {"model": "claude-haiku-4-5-20251001"})]


def test_without_litellm_there_is_an_orchestrator_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.llm.litellm.is_installed", lambda: False)
    assert AgentOrchestrator()._llm is None
