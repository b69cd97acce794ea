"""``llm.py`` of an agent's folder: which model its nodes ask, and when another goes before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import AgentFileError
from framework.graph.node import NodeContext, NodeResult
from framework.llm import ScriptedLLM
from framework.runner import AgentRunner
from framework.storage.memory import MemoryStorage

AGENT = """
{"graph": {"id": "a", "entry_node": "n", "nodes": [{"id": "n", "node_type": "llm_generate", "output_keys": ["said"]}]},
 "goal": {"id": "g", "description": "Say it."}}
"""
MODEL = """
from framework.llm import ScriptedLLM

def provider(model):
    return ScriptedLLM(lambda messages, system, tools: f"the folder's {model}")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    agent = tmp_path / "agent"
    agent.mkdir()
    (agent / "agent.json").write_text(AGENT)
    return agent


async def said(runner: AgentRunner) -> object:
    async with runner:
        return (await runner.run({"x": 1})).output.get("said")


async def test_the_folders_own_model_is_asked_with_the_name_that_was_chosen(folder: Path) -> None:
    (folder / "llm.py").write_text(MODEL)
    assert await said(AgentRunner.load(folder, model="some-model")) == "the folder's some-model"
    assert AgentRunner.load(folder).validate().missing_credentials == []


async def test_a_given_model_and_the_mock_go_before_it(folder: Path) -> None:
    (folder / "llm.py").write_text(MODEL)
    assert await said(AgentRunner.load(folder, llm=ScriptedLLM(["the caller's"]))) == "the caller's"
    mocked = await said(AgentRunner.load(folder, mock_mode=True))
    assert mocked is not None
    assert "folder" not in str(mocked)


async def test_without_it_a_missing_key_is_named(folder: Path) -> None:
    async with AgentRunner.load(folder) as runner:
        result = await runner.run({"x": 1})
    assert not result.success
    assert "ANTHROPIC_API_KEY" in str(result.error)
    assert AgentRunner.load(folder).validate().missing_credentials == ["ANTHROPIC_API_KEY"]


def test_a_file_without_the_function_is_refused_with_its_name(folder: Path) -> None:
    (folder / "llm.py").write_text("model = 1\n")
    with pytest.raises(AgentFileError, match=r"llm\.py.*provider\(model\)"):
        AgentRunner.load(folder)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os\n    return os.environ['NO_SUCH_ENDPOINT_NAME']", "llm.py:3: KeyError: 'NO_SUCH_ENDPOINT_NAME'"),
        ("return 1 / 0", "llm.py:2: ZeroDivisionError"),
        ("raise SystemExit(3)", "llm.py:2: SystemExit: 3"),
        ("raise ValueError", "llm.py:2: ValueError"),
        ("return None", "llm.py: provider(model) returned a NoneType, which has no complete()"),
    ],
)
@pytest.mark.parametrize("declared", ["def", "async def"])
async def test_whatever_it_does_wrong_is_a_failed_result_with_file_and_line(
    folder: Path, declared: str, body: str, said: str
) -> None:
    (folder / "llm.py").write_text(f"{declared} provider(model):\n    {body}\n")
    if declared == "async def":
        said = "llm.py: provider(model) returned a coroutine"
    async with AgentRunner.load(folder, storage=MemoryStorage()) as runner:
        result = await runner.run({"x": 1}, run_id="r")
        assert not result.success
        assert f"{folder}/{said}" in (result.error or "")
        assert runner.runs() == []  # nothing ran


async def test_one_agent_whose_model_cannot_be_made_does_not_stop_the_recovery(folder: Path) -> None:
    storage = MemoryStorage()
    (folder / "llm.py").write_text(
        "from framework.llm import ScriptedLLM\n\ndef provider(m):\n    return ScriptedLLM([])\n"
    )
    async with AgentRunner.load(folder, storage=storage) as runner:
        for run_id in ("a", "b"):
            await runner.run({"x": 1}, run_id=run_id)
            storage.claim_run(run_id, "somebody", 1e-9)
    (folder / "llm.py").write_text("def provider(model):\n    raise KeyError('MY_ENDPOINT')\n")
    async with AgentRunner.load(folder, storage=storage) as runner:
        results = await runner.recover()
    assert [(each.run_id, each.success) for each in results] == [("a", False), ("b", False)]
    assert all("llm.py:2: KeyError: 'MY_ENDPOINT'" in (each.error or "") for each in results)


async def test_node_objects_go_without_a_model_that_cannot_be_made_and_the_log_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "llm.py").write_text("def provider(model):\n    return {}['endpoint']\n")

    class Node:
        async def execute(self, ctx: NodeContext) -> NodeResult:
            return NodeResult(success=True, output={"said": str(ctx.llm)})

    runner = AgentRunner.load(folder)
    runner.register_node("n", Node())
    assert await said(runner) == "None"
    assert "llm.py:2: KeyError: 'endpoint'" in caplog.text
