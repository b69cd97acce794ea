"""Workers of the ownership tests: ``python worker_program.py '<json>'`` with ``mode``, ``url`` and ``ledger``.

``start``: begins ``runs`` (ids) and prints ``ready`` once each is inside its node ``b``, where it stays. ``work``: a
worker that resumes what it finds, until SIGTERM. ``elsewhere`` gives its owners the name of another machine, so that
only their leases tell; ``clock`` moves this process's clock by so many seconds, ``block`` has ``b`` block the event
loop for so long, ``pause`` has it wait so long, ``hold`` for ever. Every body notes itself in the ledger, which the
store knows nothing of.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from framework.errors import LeaseLost
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.runner.recovery import Worker
from framework.runner.stopping import graceful_stop
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import ownership
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord

GOAL = Goal(id="goal", name="Goal", description="Reach the end.")


def graph() -> GraphSpec:
    """a, b, c, one after the other."""
    nodes = [NodeSpec(id=each, node_type="custom", retry_delay_seconds=0) for each in "abc"]
    edges = [
        EdgeSpec(id=f"e{source}", source=source, target=target, condition=EdgeCondition.ON_SUCCESS)
        for source, target in ("ab", "bc")
    ]
    return GraphSpec(id="g", goal_id="goal", entry_node="a", terminal_nodes=["c"], nodes=nodes, edges=edges)


class Body(NodeProtocol):
    """Says in the ledger that it began, and that it ended."""

    def __init__(self, program: Program, node_id: str) -> None:
        self._program = program
        self._node_id = node_id

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self._program.note("start", ctx)
        if self._node_id == "b":
            await self._program.inside_b()
        self._program.note("end", ctx)
        return NodeResult(True, {self._node_id: os.getpid()})


class Program:
    """One process and what it was told."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self._ledger = os.open(told["ledger"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._inside = 0

    def note(self, event: str, ctx: NodeContext) -> None:
        at = time.clock_gettime(time.CLOCK_MONOTONIC)
        line = {"event": event, "run": ctx.run_id, "node": ctx.node_id, "pid": os.getpid(), "at": at}
        os.write(self._ledger, json.dumps(line).encode() + b"\n")

    async def inside_b(self) -> None:
        self._inside += 1
        if self._inside == len(self.told.get("runs", ["one"])):
            print("ready", flush=True)
        if self.told.get("pause"):
            await asyncio.sleep(self.told["pause"])
        if self.told.get("block"):
            time.sleep(self.told["block"])  # noqa: ASYNC251 - this is what a bad node does
        elif self.told["mode"] == "start" or self.told.get("hold"):
            await asyncio.Event().wait()

    def executor(self, manager: CheckpointManager) -> GraphExecutor:
        made = GraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=manager)
        for node_id in "abc":
            made.register_node(node_id, Body(self, node_id))
        return made

    async def main(self) -> None:
        with open_storage(self.told["url"]) as storage:
            manager = CheckpointManager(storage, CheckpointConfig.model_validate(self.told.get("config", {})))
            executor = self.executor(manager)
            if self.told["mode"] == "start":
                runs = [executor.execute(graph(), GOAL, run_id=each) for each in self.told["runs"]]
                async with graceful_stop(self.told.get("grace", 5.0)):
                    try:
                        ended = await asyncio.gather(*runs)
                    except LeaseLost:
                        print("LeaseLost", flush=True)
                        return
                    print(json.dumps([each.success for each in ended]), flush=True)
                return

            async def resume(run: RunRecord) -> ExecutionResult:
                return await executor.execute(graph(), GOAL, run_id=run.run_id)

            worker = Worker(
                storage,
                resume,
                concurrency=self.told.get("concurrency", 4),
                interval=self.told.get("interval", 0.5),
                problem=lambda text: print("back" if text is None else "away", flush=True),
            )
            async with graceful_stop(self.told.get("grace", 5.0)):
                print("looking", flush=True)
                await worker.run()


def main() -> None:
    told = json.loads(sys.argv[1])
    if told.get("elsewhere"):
        ownership._place = lambda: f"{told['elsewhere']}/boot/1"  # type: ignore[assignment]
    if told.get("clock"):
        real, by = time.time, float(told["clock"])
        time.time = lambda: real() + by
    asyncio.run(Program(told).main())


if __name__ == "__main__":
    main()
