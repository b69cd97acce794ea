"""Three steps of which none is committed before the run ends: ``python uncommitted_program.py <store> <ledger> <config>
<base> <die>``. The first comes to ``base``; the others ask once each. With ``die`` the process ends in the third one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage


class Base:
    def __init__(self, base: int) -> None:
        self.base = base

    async def execute(self, ctx: NodeContext) -> NodeResult:
        return NodeResult(True, {"base": self.base})


class Asks:
    """Asks without saying for what, so that only what the step is given can tell."""

    def __init__(self, name: str, ledger: Path, dies: bool) -> None:
        self.name, self.ledger, self.dies = name, ledger, dies

    async def execute(self, ctx: NodeContext) -> NodeResult:
        base = ctx.memory.read("base")

        def ask() -> str:
            with self.ledger.open("a") as file:
                file.write(f"{self.name}={base}\n")
            return f"{self.name} of {base}"

        answer = await ctx.call("ask", ask)
        if self.dies:
            os._exit(9)
        return NodeResult(True, {self.name: answer})


async def main(url: str, ledger: str, config: str, base: str, die: str) -> None:
    nodes = {
        "a": Base(int(base)),
        "b": Asks("b", Path(ledger), False),
        "c": Asks("c", Path(ledger), bool(die)),
    }
    specs = [
        NodeSpec(id="a", output_keys=["base"], max_retries=1),
        NodeSpec(id="b", input_keys=["base"], output_keys=["b"], max_retries=1),
        NodeSpec(id="c", input_keys=["base"], output_keys=["c"], max_retries=1),
    ]
    edges = [EdgeSpec(id=f"{one}{two}", source=one, target=two) for one, two in ("ab", "bc")]
    graph = GraphSpec(id="graph", goal_id="goal", entry_node="a", nodes=specs, edges=edges)
    with open_storage(url) as storage:
        executor = GraphExecutor(
            Runtime(MemoryStorage()),
            node_registry=nodes,
            checkpoint_manager=CheckpointManager(storage, CheckpointConfig.model_validate(json.loads(config))),
        )
        result = await executor.execute(graph, Goal(id="goal", name="Goal", description="Go."), {}, run_id="run")
    print(json.dumps([result.success, result.output.get("b"), result.output.get("c")]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
