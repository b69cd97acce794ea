"""A disk that is full and a store that cannot be written: a clear error, and the earlier checkpoints stay good."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.storage.backend import open_storage
from tests import forks

CORE = Path(__file__).parents[2]
NOBODY = 65534

PROGRAM = """
import asyncio, logging, os, resource, signal, sys
import framework.storage.sqlite
from framework.errors import StorageError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.runtime import Runtime
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
url, run_id, limit, user = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
logging.disable(logging.CRITICAL)
ids = ["a", "b", "c"]
nodes = [NodeSpec(id=each, node_type="function", output_keys=[each], max_retries=1) for each in ids]
edges = [EdgeSpec(id=f"{a}{b}", source=a, target=b, condition="on_success") for a, b in zip(ids, ids[1:])]
graph = GraphSpec(id="g", goal_id="goal", entry_node="a", nodes=nodes, edges=edges)

def run(url):
    runtime = Runtime(MemoryStorage())
    executor = GraphExecutor(runtime=runtime, checkpoint_manager=CheckpointManager(open_storage(url)))
    executor.register_function("a", lambda **_: print("ran a") or "small")
    executor.register_function("b", lambda **_: print("ran b") or "x" * 2_000_000)
    executor.register_function("c", lambda **_: print("ran c") or "end")
    result = asyncio.run(executor.execute(graph, Goal(id="goal", name="G", description="d"), {}, run_id=run_id))
    print("success" if result.success else f"error: {result.error}")

if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if user:
    run("memory://")  # imports what it needs, which the other user may not be able to read
    os.setegid(user)
    os.seteuid(user)
print("begin")
try:
    run(url)
except StorageError as error:
    print(f"raised: {error}")
"""


def run_program(url: str, *, run_id: str = "r", max_bytes: int = 0, user: int = 0) -> list[str]:
    """The lines that the program above prints, in a process that may write ``max_bytes`` to a file."""
    done = forks.run(
        [sys.executable, "-c", PROGRAM, url, run_id, str(max_bytes), str(user)],
        env={**os.environ, "PYTHONPATH": str(CORE)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines[lines.index("begin") + 1 :]


@pytest.fixture(params=["sqlite", "file"])
def url(request: pytest.FixtureRequest, folder: Path) -> str:
    return f"sqlite:///{folder}/runs.db" if request.param == "sqlite" else f"file://{folder}/store"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may get to, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoints_stay(url: str) -> None:
    lines = run_program(url, max_bytes=1_000_000)
    assert lines[:2] == ["ran a", "ran b"]
    assert lines[2].startswith("error: "), lines
    assert re.search("full|space|too large|size", lines[2]), lines
    with open_storage(url) as storage:
        assert storage.verify("r").ok
        checkpoint = storage.load_latest_checkpoint("r")
        assert checkpoint is not None
        assert checkpoint.execution_path == ["a"]
        assert checkpoint.memory_snapshot["a"] == "small"
    assert run_program(url) == ["ran b", "ran c", "success"]


def test_a_store_that_cannot_be_written_is_a_clear_error(url: str, folder: Path) -> None:
    """Where we are root, to whom everything is permitted, the program becomes another user."""
    assert run_program(url)[-1] == "success"
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    lines = run_program(url, run_id="other", user=NOBODY if os.geteuid() == 0 else 0)
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert len(lines) == 1, lines
    assert re.match("(error|raised): ", lines[0])
    assert re.search("read-only|readonly|permission|not be written|cannot write", lines[0], re.IGNORECASE), lines
    assert str(folder) in lines[0]
    with open_storage(url) as storage:
        assert storage.verify().ok
        assert [run.run_id for run in storage.list_runs()] == ["r"]
