"""Agent folders for tests, and the two-step agent most of them use."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from framework.runner import AgentRunner

GOAL = {
    "id": "greet",
    "name": "Greet",
    "description": "Greet somebody.",
    "success_criteria": [{"id": "c", "description": "d"}],
}


def function(node_id: str, reads: str = "", writes: str = "", **fields: Any) -> dict[str, Any]:
    """A function node that reads and writes the keys named."""
    return {
        "id": node_id,
        "node_type": "function",
        "input_keys": reads.split(),
        "output_keys": writes.split(),
        **fields,
    }


def edge(source: str, target: str, **fields: Any) -> dict[str, Any]:
    """An edge, with the loader's own condition."""
    return {"id": f"{source}-{target}", "source": source, "target": target, **fields}


def chain(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A graph of nodes one after the other."""
    ids = [node["id"] for node in nodes]
    edges = [edge(*pair) for pair in pairwise(ids)]
    return {"id": "greeting", "goal_id": "greet", "entry_node": ids[0], "nodes": list(nodes), "edges": edges, **fields}


def write_agent(folder: Path, graph: dict[str, Any], *, goal: Any = GOAL, **files: str) -> Path:
    """A folder with an agent.json, and ``files`` by name: ``nodes`` is nodes.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agent.json").write_text(json.dumps({"graph": graph, "goal": goal}), encoding="utf-8")
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


HELLO = chain(function("hello", "name", "greeting"), function("shout", "greeting", "loud"))
NODES = """
from framework.runner import node_function

@node_function("hello")
def hello(name):
    return f"hello {name}"

async def shout(greeting):
    return greeting.upper()

NODES = {"shout": shout}
"""
LLM_NODE = {"id": "write", "node_type": "llm_generate", "input_keys": ["topic"], "output_keys": ["text"]}


class Counting:
    """Functions of a two-step agent, counted; ``fail`` makes the second one raise."""

    def __init__(self, runner: AgentRunner, fail: bool = False) -> None:
        self.calls: list[str] = []
        self.fail = fail
        runner.register_function("hello", self.hello)
        runner.register_function("shout", self.shout)

    def hello(self, name: str) -> str:
        self.calls.append("hello")
        return f"hello {name}"

    def shout(self, greeting: str) -> str:
        self.calls.append("shout")
        if self.fail:
            raise ValueError("no voice")
        return greeting.upper()


def bare(tmp_path: Path, name: str = "bare", **graph: Any) -> Path:
    """The same agent without code, and with one attempt a node."""
    nodes = [function("hello", "name", "greeting"), function("shout", "greeting", "loud", max_retries=1)]
    return write_agent(tmp_path / name, {**chain(*nodes), **graph})
