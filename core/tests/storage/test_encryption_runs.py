"""Real runs on an encrypted store: killed, resumed, forked; what they said is nowhere on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.storage.backend import open_storage
from tests.storage.conftest import Python
from tests.storage.test_encryption import BACKENDS, RING

PROGRAM = """
    import asyncio, json, sys
    from framework.graph import EdgeSpec, Goal, GraphExecutor, GraphSpec, NodeSpec
    from framework.graph.checkpoint_manager import CheckpointManager
    from framework.runtime import Runtime
    from framework.storage.backend import open_storage
    from framework.storage.encryption import KeyRing
    from framework.testing import install_faults_from_environment

    url, ledger = sys.argv[1:]
    names = ["one", "two", "three"]
    nodes = [NodeSpec(id=name, node_type="function", output_keys=[name]) for name in names]
    edges = [EdgeSpec(id=f"{a}-{b}", source=a, target=b) for a, b in zip(names, names[1:])]
    graph = GraphSpec(
        id="g", goal_id="g", entry_node="one", terminal_nodes=["three"], nodes=nodes, edges=edges
    )
    goal = Goal(id="g", name="g", description="say zanzibar-7731")

    def body(name):
        def say(**state):
            with open(ledger, "a") as file:
                file.write(name + "\\n")
            return f"zanzibar-7731 by {name}"
        return say

    install_faults_from_environment()
    with open_storage(url, KeyRing([("k1", b"1" * 32), ("k2", b"2" * 32)])) as storage:
        executor = GraphExecutor(runtime=Runtime(storage), checkpoint_manager=CheckpointManager(storage))
        for name in names:
            executor.register_function(name, body(name))
        done = asyncio.run(executor.execute(graph, goal, {"place": "zanzibar-7731"}, run_id="r1"))
        print(json.dumps([done.success, done.steps_recovered, done.output["three"]]))
"""


@pytest.mark.parametrize("url", BACKENDS[:2], ids=["sqlite", "files"])
def test_a_killed_run_goes_on(url: str, tmp_path: Path, python: Python) -> None:
    url, ledger = url.format(tmp_path), tmp_path / "ledger"
    python(PROGRAM, url, ledger, env={"SUREFOOT_FAULT": "commit.after:1"}, code=-9)
    python(PROGRAM, url, ledger, env={"SUREFOOT_FAULT": "commit.after:1"}, code=-9)
    assert json.loads(python(PROGRAM, url, ledger)) == [True, 2, "zanzibar-7731 by three"]
    assert ledger.read_text().split() == ["one", "two", "three"]
    with open_storage(url, RING) as store:
        assert store.verify().ok
        document = store.load_run("r1")
        assert document is not None
        assert document.goal_description == "say zanzibar-7731"
    searched = [path for path in tmp_path.rglob("*") if path.is_file() and path != ledger]
    assert len(searched) >= 1
    for path in searched:
        assert b"zanzibar" not in path.read_bytes(), path
