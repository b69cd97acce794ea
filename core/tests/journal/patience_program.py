"""A conversation in which one request fails after tools were used: ``python patience_program.py URL LEDGER WHERE``.

The process is killed WHERE: "wait", before the failed request is made again; "tool", in the tool that the reply to that
asks for; or nowhere. A line in the file LEDGER is what it did outside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.errors import LLMRateLimited
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.llm.tool_loop import Patience
from framework.runtime import Runtime
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

TOOL = Tool("pay", "Pays.", {"type": "object", "properties": {"n": {"type": "integer"}}}, effects=True)


class Model(ScriptedLLM):
    """One that has patience, as the providers of real models do."""

    patience = Patience()


class Process:
    """What a process does: it begins the run, or goes on with it."""

    def __init__(self, storage: Any, ledger: Path, where: str = "") -> None:
        self.ledger, self.where = ledger, where
        self.llm = Model(self.reply)
        self.llm.patience = replace(Patience(), sleep_async=self.wait)
        node = NodeSpec(id="n", node_type="llm_tool_use", tools=["pay"], output_keys=["y"], retry_delay_seconds=0)
        self.graph = GraphSpec(id="g", goal_id="g", entry_node="n", nodes=[node], edges=[])
        self.manager = CheckpointManager(storage)

    def note(self, line: str) -> None:
        with self.ledger.open("a") as ledger:
            ledger.write(f"{line}\n")

    def done(self) -> list[str]:
        return self.ledger.read_text().splitlines() if self.ledger.exists() else []

    def reply(self, messages: list[Any], system: str | None, tools: list[Tool]) -> Any:
        used = (len(messages) - 1) // 2
        first = f"asked after {used}" not in self.done()
        self.note(f"asked after {used}")
        if used == 2 and first:
            return LLMRateLimited("busy", status=429, retry_after=7.0)
        return ToolUse(f"use {used}", "pay", {"n": used}) if used < 3 else "paid"

    async def wait(self, seconds: float) -> None:
        self.note(f"waits {seconds}")
        self.dies("wait")

    def pay(self, use: ToolUse) -> ToolResult:
        self.note(f"pays {use.input['n']}")
        if use.input["n"] == 2:
            self.dies("tool")
        return ToolResult(use.id, "paid")

    def dies(self, where: str) -> None:
        if self.where == where:
            os.kill(os.getpid(), signal.SIGKILL)

    async def execute(self) -> ExecutionResult:
        executor = GraphExecutor(
            Runtime(MemoryStorage()),
            self.llm,
            tools=[TOOL],
            tool_executor=self.pay,
            checkpoint_manager=self.manager,
        )
        goal = Goal(id="g", name="G", description="d")
        return await executor.execute(self.graph, goal, {"q": "Pay."}, run_id="r")


async def main() -> None:
    with open_storage(sys.argv[1]) as storage:
        await Process(storage, Path(sys.argv[2]), sys.argv[3]).execute()


if __name__ == "__main__":
    asyncio.run(main())
