"""What the tests of run views share: runs of a graph that end in every way, over a given store."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.node import NodeSpec
from framework.graph.run_view import RunView, StepView, view_run
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage
from tests import forks
from tests.graph.executor_kit import GOAL, MinimalRuntime, edge, graph_of

CORE = Path(__file__).resolve().parents[2]
RUN_ID = "run-1"


def letter() -> GraphSpec:
    """Drafts a letter, asks a person, and sends it in up to two attempts."""
    return graph_of(
        NodeSpec(id="draft", node_type="function", input_keys=["to"], output_keys=["text"], max_retries=1),
        NodeSpec(id="ask", node_type="human_input", input_keys=["text"], output_keys=["approved", "by"]),
        NodeSpec(id="send", node_type="function", output_keys=["sent"], max_retries=2, retry_delay_seconds=0),
        edges=[edge("draft", "ask", "on_success"), edge("ask", "send", "on_success")],
    )


def spread() -> GraphSpec:
    """A fan-out of three branches that meet again."""
    return graph_of(
        NodeSpec(id="begin", node_type="function", fan_out=True, join_node="end", max_retries=1),
        *(NodeSpec(id=name, node_type="function", output_keys=[f"{name}_out"], max_retries=1) for name in "abc"),
        NodeSpec(id="end", node_type="function", output_keys=["done"], max_retries=1),
        edges=[
            *(edge("begin", name, "on_success") for name in "abc"),
            *(edge(name, "end", "on_success") for name in "abc"),
        ],
        terminal_nodes=["end"],
    )


def executor_for(storage: Storage, functions: Mapping[str, Any], **config: Any) -> GraphExecutor:
    manager = CheckpointManager(storage, CheckpointConfig(**{"retention_strategy": "all", **config}))
    executor = GraphExecutor(runtime=MinimalRuntime(), checkpoint_manager=manager)
    for node_id, function in functions.items():
        executor.register_function(node_id, function)
    return executor


async def execute(
    storage: Storage,
    graph: GraphSpec,
    functions: Mapping[str, Any],
    input_data: dict[str, Any] | None = None,
    run_id: str = RUN_ID,
    **config: Any,
) -> ExecutionResult:
    return await executor_for(storage, functions, **config).execute(graph, GOAL, input_data, run_id=run_id)


async def cancelled_when(
    ready: asyncio.Event,
    storage: Storage,
    graph: GraphSpec,
    functions: Mapping[str, Any],
    **config: Any,
) -> None:
    """Execute, and cancel once ``ready`` is set."""
    task = asyncio.create_task(execute(storage, graph, functions, **config))
    await ready.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def by_key(view: RunView) -> dict[str, StepView]:
    return {step.key: step for step in view.steps}


def standings(view: RunView) -> dict[str, str]:
    return {step.key: step.status for step in view.steps}


def checked(storage: Storage, run_id: str = RUN_ID, **arguments: Any) -> RunView:
    """The view, after making sure that looking changed nothing."""
    before = storage.find_run(run_id)
    rows = list(storage.read_log(run_id))
    view = view_run(storage, run_id, **arguments)
    assert storage.find_run(run_id) == before
    assert list(storage.read_log(run_id)) == rows
    return view


CRASHING = """
import asyncio, os, sys
from framework.storage.backend import open_storage
from tests.graph.run_view_kit import execute, letter, spread

url, shape, end = sys.argv[1:]

def die(**_):
    if end == "exit":
        os._exit(9)
    print("in", flush=True)
    sys.stdin.read()

functions = {"draft": lambda **_: "text", "send": die}
if shape == "spread":
    functions = {"begin": lambda **_: {}, "a": lambda **_: 1, "b": die, "c": die, "end": lambda **_: 1}
given = {"to": "x", "approved": True, "by": "me"} if shape == "letter" else {}
asyncio.run(execute(open_storage(url), letter() if shape == "letter" else spread(), functions, given))
"""


def crash(url: str, shape: str) -> None:
    """A run in a process of its own that ends by ``os._exit`` in the middle of a step."""
    done = forks.run(_program(url, shape, "exit"), env=_environment(), cwd=CORE, timeout=50, check=False)
    assert done.returncode == 9


def start_and_wait_inside(url: str, shape: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own that stays inside a step until it is killed."""
    process = forks.Popen(
        _program(url, shape, "wait"), env=_environment(), cwd=CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"in"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _program(url: str, shape: str, end: str) -> list[str]:
    return [sys.executable, "-c", CRASHING, url, shape, end]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CORE)}
