"""`AgentRunner` on real folders: what it runs, resumes, recovers and says about an agent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from framework.errors import ResumeError, StorageError
from framework.graph.node import NodeContext, NodeResult
from framework.llm.provider import Tool, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentMessage, AgentRunner, CapabilityLevel, MessageType
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import HELLO, LLM_NODE, NODES, Counting, bare, chain, function, write_agent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of the test's own, and no keys."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("SUREFOOT_STORAGE", "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    return write_agent(tmp_path / "hello", HELLO, nodes=NODES)


def files_of(folder: Path) -> list[Path]:
    """Every file below ``folder`` that is no byte code."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


# --- loading and running ----------------------------------------------------------------------------------------------


async def test_a_folder_is_loaded_and_run(hello: Path) -> None:
    async with AgentRunner.load(hello) as runner:
        result = await runner.run({"name": "you"})
    assert result.success
    assert result.output["loud"] == "HELLO YOU"
    assert result.path == ["hello", "shout"]
    assert (runner.name, runner.graph.id, runner.goal.id) == ("hello", "greeting", "greet")
    assert runner.checkpoint_manager is None
    assert runner.storage is None


@pytest.mark.parametrize("form", ["str", "file", "relative"])
async def test_a_folder_may_be_named_in_other_ways(hello: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hello)
    paths: dict[str, str | Path] = {"str": str(hello), "file": hello / "agent.json", "relative": "."}
    path = paths[form]
    with AgentRunner.load(path, storage=MemoryStorage()) as runner:
        assert runner.name == "hello"
        await runner.run({"name": "you"}, run_id="r")
        assert [run.run_id for run in runner.runs()] == ["r"]


def test_a_folder_without_an_agent_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"agent\.json"):
        AgentRunner.load(tmp_path)


async def test_without_a_storage_run_documents_go_to_the_data_directory_and_nothing_else_is_written(
    hello: Path, home: Path
) -> None:
    before = files_of(hello)
    async with AgentRunner.load(hello) as runner:
        assert not files_of(home)
        result = await runner.run({"name": "you"})
        with pytest.raises(ResumeError, match="storage="):
            await runner.resume()
        with pytest.raises(ResumeError):
            runner.runs()
    assert result.checkpoint_id is None
    with FileStorage(home / "surefoot" / "storage" / "hello") as documents:
        assert documents.list_all_runs() == [result.run_id]
        assert documents.list_runs() == []
    assert files_of(hello) == before


async def test_run_documents_go_where_storage_path_says(hello: Path, tmp_path: Path, home: Path) -> None:
    async with AgentRunner.load(hello, storage_path=tmp_path / "documents") as runner:
        result = await runner.run({"name": "you"})
    assert result.run_id is not None
    assert any(result.run_id in str(path) for path in files_of(tmp_path / "documents"))
    assert not files_of(home)


async def test_an_agent_runs_where_nothing_can_be_written(
    hello: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    async with AgentRunner.load(hello) as runner:
        assert (await runner.run({"name": "you"})).success
    assert "storage_path" in caplog.text
    async with AgentRunner.load(hello, storage_path=tmp_path / "file") as runner:
        with pytest.raises(StorageError):
            await runner.run({"name": "you"})


async def test_with_a_storage_run_documents_go_there(hello: Path, home: Path) -> None:
    storage = MemoryStorage()
    async with AgentRunner.load(hello, storage=storage) as runner:
        result = await runner.run({"name": "you"}, run_id="r")
    assert result.checkpoint_id is not None
    assert storage.list_all_runs() == ["r"]
    assert not storage.closed
    assert not files_of(home)


async def test_registered_functions_nodes_and_tools_are_used(tmp_path: Path) -> None:
    class Node:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            return NodeResult(True, {"loud": ctx.memory.read("greeting") + "!"})

        def validate_input(self, ctx: NodeContext) -> list[str]:
            return []

    runner = AgentRunner.load(bare(tmp_path))
    runner.register_function("hello", lambda name: f"hi {name}")
    runner.register_node("shout", Node())
    runner.register_tool("add", lambda a, b: a + b)
    runner.register_tool("plain", Tool("plain", "A tool."), lambda arguments: arguments)
    assert runner.tool_registry.get_registered_names() == ["add", "plain"]
    assert (await runner.run({"name": "you"})).output["loud"] == "hi you!"
    with pytest.raises(ValueError, match="executor"):
        runner.register_tool("plain", Tool("plain", "A tool."))
    # The function says what the tool is, the executor runs it.
    runner.register_tool("double", lambda number: None, lambda arguments: arguments["number"] * 2)
    assert runner.tool_registry.get_tools()["double"].parameters["required"] == ["number"]
    assert runner.tool_registry.get_executor()(ToolUse("1", "double", {"number": "x"})).content == "xx"
    runner.cleanup()


@pytest.mark.parametrize("mock", [False, True])
async def test_a_missing_function_is_named_before_anything_runs(tmp_path: Path, mock: bool) -> None:
    with AgentRunner.load(bare(tmp_path), mock_mode=mock, storage=MemoryStorage()) as runner:
        called: list[str] = []
        runner.register_function("hello", called.append)
        result = await runner.run({"name": "you"}, run_id="r")
        assert not result.success
        assert "register_function('shout', ...)" in (result.error or "")
        assert "@node_function('shout')" in (result.error or "")
        assert called == []
        assert runner.runs() == []
        assert not runner.validate().valid


async def test_a_tool_of_the_folder_is_called_by_the_model(tmp_path: Path) -> None:
    node = {**LLM_NODE, "node_type": "llm_tool_use", "tools": ["weather"]}
    tools = "from framework.runner import tool\n\n@tool\nasync def weather(city: str):\n    return f'rain in {city}'\n"
    told: list[Any] = []

    def script(messages: list[Any], system: str | None, offered: list[Tool]) -> Any:
        assert [each.name for each in offered] == ["weather"]
        if len(messages) == 1:
            return ToolUse("1", "weather", {"city": "Ulm"})
        told.append(messages[-1]["content"][0]["content"])
        return "take an umbrella"

    folder = write_agent(tmp_path / "a", chain(node), tools=tools)
    with AgentRunner.load(folder, llm=ScriptedLLM(script)) as runner:
        assert runner.info().has_tools_module
        assert runner.info().required_tools == ["weather"]
        result = await runner.run({"topic": "weather"})
    assert result.output["text"] == "take an umbrella"
    assert told == ["rain in Ulm"]


async def test_mock_mode_fills_every_output_key_and_runs_local_functions(tmp_path: Path) -> None:
    node = {**LLM_NODE, "output_keys": ["title", "text"]}
    folder = write_agent(tmp_path / "a", chain(node, function("count", "text", "words")))
    with AgentRunner.load(folder, mock_mode=True) as runner:
        runner.register_function("count", lambda text: len(text.split()))
        result = await runner.run({"topic": "rivers"})
    assert result.success
    assert isinstance(result.output["title"], str)
    assert result.output["words"] == len(result.output["text"].split())


async def test_a_missing_key_is_one_line_and_nothing_ran(tmp_path: Path) -> None:
    folder = write_agent(tmp_path / "a", chain(function("first"), LLM_NODE))
    called: list[str] = []
    with AgentRunner.load(folder, model="claude-haiku-4-5-20251001") as runner:
        runner.register_function("first", lambda **_: called.append("first"))
        result = await runner.run()
        found = runner.validate()
    assert not result.success
    assert "ANTHROPIC_API_KEY" in (result.error or "")
    assert "\n" not in (result.error or "")
    assert called == []
    assert found.missing_credentials == ["ANTHROPIC_API_KEY"]
    assert found.valid


async def test_no_model_is_made_for_an_agent_that_asks_none(hello: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.llm.choose.provider_for", lambda *_, **__: pytest.fail("a provider was made"))
    with AgentRunner.load(hello) as runner:
        assert (await runner.run({"name": "you"})).success
        assert runner.validate().missing_credentials == []


async def test_a_node_object_is_given_a_model_when_there_is_one_and_runs_without(tmp_path: Path) -> None:
    class Node:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            return NodeResult(True, {"model": getattr(ctx.llm, "model", None)})

        def validate_input(self, ctx: NodeContext) -> list[str]:
            return []

    folder = write_agent(tmp_path / "a", chain(function("only")))
    for mock, model in ((True, "mock"), (False, None)):
        with AgentRunner.load(folder, mock_mode=mock) as runner:
            runner.register_node("only", Node())
            assert (await runner.run()).output["model"] == model


async def test_the_model_is_that_of_the_call_else_of_the_file(tmp_path: Path) -> None:
    folder = write_agent(tmp_path / "a", chain(LLM_NODE, default_model="gpt-4o-mini"))
    assert AgentRunner.load(folder).model == "gpt-4o-mini"
    assert AgentRunner.load(folder, model="claude-sonnet-4-5").model == "claude-sonnet-4-5"
    assert AgentRunner.load(folder).validate().missing_credentials == ["OPENAI_API_KEY"]


async def test_an_entry_point_is_where_a_run_begins(tmp_path: Path) -> None:
    folder = bare(
        tmp_path,
        entry_points={"again": "shout", "shout": "hello"},
        async_entry_points=[{"id": "hook", "name": "Hook", "entry_node": "shout"}],
    )
    with AgentRunner.load(folder) as runner:
        calls = Counting(runner).calls
        for name in ("again", "hook"):
            result = await runner.run({"greeting": "moin"}, entry_point_id=name)
            assert result.output["loud"] == "MOIN"
        assert calls == ["shout", "shout"]
        assert (await runner.run({"greeting": "moin"}, None, "again")).output["loud"] == "MOIN"  # by place, too
        result = await runner.run({"greeting": "moin"}, entry_point_id="nowhere")
        assert not result.success
        assert "'nowhere'; known: again, shout, hook" in (result.error or "")


async def test_overlapping_runs_of_one_runner_do_not_meet(tmp_path: Path) -> None:
    async with AgentRunner.load(bare(tmp_path), storage=MemoryStorage()) as runner:
        met = asyncio.Barrier(5)

        async def hello(name: str) -> str:
            await met.wait()
            return name

        runner.register_function("hello", hello)
        runner.register_function("shout", lambda greeting: greeting.upper())
        names = [f"n{number}" for number in range(5)]
        results = await asyncio.gather(*(runner.run({"name": name}, run_id=name) for name in names))
        assert [result.output["loud"] for result in results] == ["N0", "N1", "N2", "N3", "N4"]
        assert sorted(run.run_id for run in runner.runs([RunState.COMPLETED])) == names


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_info_describes_the_agent(hello: Path) -> None:
    info = AgentRunner.load(hello).info()
    assert (info.name, info.goal_name, info.node_count, info.edge_count) == ("greeting", "Greet", 2, 1)
    assert info.nodes[0]["id"] == "hello"
    assert info.nodes[0]["type"] == "function"
    assert info.nodes[0]["input_keys"] == ["name"]
    assert info.edges == [{"id": "hello-shout", "source": "hello", "target": "shout", "condition": "on_success"}]
    assert info.success_criteria == [{"id": "c", "description": "d", "metric": "", "target": ""}]
    assert (info.has_tools_module, info.is_multi_entry_point, info.required_tools) == (False, False, [])


def test_a_good_agent_is_valid_without_warnings(hello: Path) -> None:
    found = AgentRunner.load(hello).validate()
    assert found.valid
    assert (found.errors, found.warnings, found.missing_tools, found.missing_credentials) == ([], [], [], [])


def test_validate_says_all_that_is_wrong(tmp_path: Path) -> None:
    node = {"id": "b", "type": "llm_tool_use", "tools": ["search", "mail"]}
    graph = {**chain(function("a"), node), "terminal_nodes": ["gone"]}
    folder = write_agent(tmp_path / "a", graph, goal={"id": "g"}, nodes="NODES = {'c': print}")
    (folder / "mcp_servers.json").write_text('{"servers": [{"name": "broken", "transport": "stdio"}]}')
    with AgentRunner.load(folder) as runner:
        found = runner.validate(connect=False)
        assert found.missing_tools == []
        assert not any("broken" in text for text in found.warnings)
        found = runner.validate()
        again = runner.validate()
    assert not found.valid
    assert any("'gone'" in text for text in found.errors)
    assert any("register_function('a'" in text for text in found.errors)
    assert found.missing_tools == ["mail", "search"]
    for part in ("graph.nodes[1].type", "no node 'c'", "success criteria", "search", "broken", "ANTHROPIC_API_KEY"):
        assert sum(part in text for text in found.warnings) == 1, part
    assert again == found


async def test_a_server_that_cannot_be_reached_is_a_warning_and_the_agent_runs(hello: Path) -> None:
    servers = [{"name": "gone", "transport": "stdio", "command": "/nowhere/at/all"}]
    (hello / "mcp_servers.json").write_text(json.dumps({"servers": servers}))
    async with AgentRunner.load(hello) as runner:
        results = await asyncio.gather(runner.run({"name": "you"}), runner.run({"name": "me"}))
        assert [result.success for result in results] == [True, True]
        assert sum("gone" in text for text in runner.validate().warnings) == 1


# --- between agents ---------------------------------------------------------------------------------------------------


async def test_can_handle_by_words_and_by_the_input_it_needs(hello: Path) -> None:
    runner = AgentRunner.load(hello)
    assert (await runner.can_handle({"text": "please greet somebody"})).level is CapabilityLevel.CAN_HANDLE
    assert (
        await runner.can_handle({"text": "greetings: greet invoices, taxes, trains"})
    ).level is CapabilityLevel.UNCERTAIN
    assert (await runner.can_handle({"text": "book a train"})).level is CapabilityLevel.CANNOT_HANDLE
    assert (await runner.can_handle({"name": "you"})).level is CapabilityLevel.CAN_HANDLE


async def test_can_handle_asks_the_model_when_there_is_one(hello: Path) -> None:
    reply = '{"level": "best_fit", "confidence": 0.8, "reasoning": "it greets", "estimated_steps": 2}'
    runner = AgentRunner.load(hello)
    found = await runner.can_handle({"text": "x"}, ScriptedLLM([reply]))
    assert (found.level, found.confidence, found.reasoning, found.estimated_steps) == (
        CapabilityLevel.BEST_FIT,
        0.8,
        "it greets",
        2,
    )


@pytest.mark.parametrize("reply", ["no idea", '{"level": "perhaps"}', RuntimeError("down")])
async def test_a_model_that_does_not_say_leaves_it_to_the_words(hello: Path, reply: Any) -> None:
    found = await AgentRunner.load(hello).can_handle({"text": "greet somebody"}, ScriptedLLM([reply]))
    assert found.level is CapabilityLevel.CAN_HANDLE
    assert "shared words" in found.reasoning


async def test_messages_are_answered(hello: Path) -> None:
    runner = AgentRunner.load(hello)
    request = AgentMessage(from_agent="other", content={"name": "you"})
    reply = await runner.receive_message(request)
    assert (reply.type, reply.parent_id, reply.to_agent) == (MessageType.RESPONSE, request.id, "other")
    assert reply.content["success"]
    assert reply.content["output"]["loud"] == "HELLO YOU"
    handoff = AgentMessage(
        type=MessageType.HANDOFF, from_agent="other", content={"context": {"name": "me"}, "reason": "too hard"}
    )
    output = (await runner.receive_message(handoff)).content["output"]
    assert (output["loud"], output["_handoff_from"], output["_handoff_reason"]) == ("HELLO ME", "other", "too hard")
    check = AgentMessage(type=MessageType.CAPABILITY_CHECK, content={"name": "you"})
    reply = await runner.receive_message(check)
    assert (reply.type, reply.content["level"]) == (MessageType.CAPABILITY_RESPONSE, "can_handle")
    reply = await runner.receive_message(AgentMessage(type=MessageType.RESPONSE))
    assert not reply.content["success"]
