"""A graph and a plan whose functions pay, in a process that is killed once both have begun to.

``python function_program.py URL LEDGER``; a line in the file LEDGER is a payment that reached the outside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.plan import ActionSpec, ActionType, Plan, PlanStep
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage, open_storage

GOAL = Goal(id="pay", name="Pay", description="Pay what is due.")
GRAPH = GraphSpec(id="pay", goal_id="pay", entry_node="pay", nodes=[NodeSpec(id="pay", node_type="function")], edges=[])
PAY = ActionSpec(action_type=ActionType.FUNCTION, function_name="pay")


def plan() -> Plan:
    return Plan(id="pay", goal_id="pay", description="d", steps=[PlanStep(id="pay", description="d", action=PAY)])


class Process:
    """What a process does: it executes the two runs, or goes on with them."""

    def __init__(self, storage: Storage, ledger: Path, *, dies: bool) -> None:
        self.ledger = ledger
        self.dies = dies
        self.runtime = Runtime(storage)
        self.manager = CheckpointManager(storage, CheckpointConfig())

    async def pay(self, idempotency_key: str) -> str:
        with self.ledger.open("a") as ledger:
            ledger.write(f"{idempotency_key}\n")
        if self.dies and len(self.ledger.read_text().splitlines()) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.dies:
            await asyncio.Event().wait()
        return f"receipt {len(self.ledger.read_text().splitlines())}"

    async def graph(self) -> Any:
        executor = GraphExecutor(self.runtime, checkpoint_manager=self.manager)
        executor.register_function("pay", self.pay, effects=True)
        return await executor.execute(GRAPH, GOAL, {}, run_id="graph")

    async def plan(self) -> Any:
        executor = FlexibleGraphExecutor(self.runtime, checkpoint_manager=self.manager)
        executor.register_function("pay", self.pay, effects=True)
        return await executor.execute_plan(plan(), GOAL, run_id="plan")

    async def both(self) -> tuple[Any, Any]:
        return await asyncio.gather(self.graph(), self.plan())


async def main() -> None:
    with open_storage(sys.argv[1]) as storage:
        await Process(storage, Path(sys.argv[2]), dies=True).both()


if __name__ == "__main__":
    asyncio.run(main())
