"""Every variant of an exported agent loads and runs, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.llm.provider import Tool
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentRunner
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import GOAL, LLM_NODE, chain, edge, write_agent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of the test's own, and no keys."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("SUREFOOT_STORAGE", "ANTHROPIC_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown keys": ({**chain({**LLM_NODE, "colour": "red"}), "parallel_groups": []}, {"topic": "t"}),
    "legacy keys": (chain({"id": "w", "type": "llm_generate", "prompt": "Write.", "output_keys": ["text"]}), {}),
    "no descriptions": (chain({"id": "w", "output_keys": ["text"]}), {}),
    "braces in a prompt": (
        chain({**LLM_NODE, "system_prompt": 'As {"a": {}} or {{topic}} on {topic}: {'}),
        {"topic": "t"},
    ),
    "router": (
        {
            **chain({"id": "r", "node_type": "router", "routes": {"yes": "w", "default": "w"}}),
            "nodes": [
                {"id": "r", "node_type": "router", "routes": {"yes": "w", "default": "w"}},
                {"id": "w", "node_type": "llm_generate", "output_keys": ["text"]},
            ],
        },
        {"route_on": "yes"},
    ),
    "pause node": (
        {
            **chain({"id": "p", "output_keys": ["draft"]}, {"id": "w", "output_keys": ["text"]}),
            "pause_nodes": ["p"],
            "entry_points": {"start": "p", "p_resume": "w"},
        },
        {},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
async def test_a_variant_of_an_export_loads_and_runs(tmp_path: Path, name: str) -> None:
    graph, given = VARIANTS[name]
    folder = write_agent(tmp_path / "a", graph, goal={"description": "no id, no name"})
    async with AgentRunner.load(folder, mock_mode=True, storage=MemoryStorage()) as runner:
        assert runner.validate().valid
        result = await runner.run(given, run_id="r")
        if graph.get("pause_nodes"):
            assert result.paused_at == "p"
            result = await runner.resume()
    assert result.success
    assert result.output["text"]


async def test_braces_in_a_prompt_reach_the_model_as_they_are(tmp_path: Path) -> None:
    asked: list[str | None] = []

    def script(messages: list[Any], system: str | None, tools: list[Tool]) -> str:
        asked.append(system)
        return "done"

    prompt = 'Answer {"a": {}} about {topic}, not {{topic}}: {'
    folder = write_agent(tmp_path / "a", chain({**LLM_NODE, "system_prompt": prompt}), goal=GOAL)
    with AgentRunner.load(folder, llm=ScriptedLLM(script)) as runner:
        assert (await runner.run({"topic": "rivers"})).success
    assert asked[0] is not None
    assert asked[0].startswith('Answer {"a": {}} about rivers, not {{topic}}: {')


async def test_a_graph_that_cannot_run_is_a_failed_result_in_one_line(tmp_path: Path) -> None:
    graph = {**chain(LLM_NODE), "edges": [edge("write", "gone")]}
    result = await AgentRunner.load(write_agent(tmp_path / "a", graph), mock_mode=True).run()
    assert not result.success
    assert (result.error or "").startswith("Invalid graph: ")
    assert "\n" not in (result.error or "")


def test_the_loader_is_where_the_runner_is() -> None:
    from framework.runner import load_agent_export
    from framework.runner.runner import load_agent_export as same

    assert same is load_agent_export
