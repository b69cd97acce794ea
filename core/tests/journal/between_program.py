"""A run whose process ends between two writes: ``python between_program.py <store> <die>``.

Its node asks a model and fails by itself, and succeeds in its third attempt. With ``die`` "record" the process ends
when the journal says that the first attempt failed, before the record of that attempt; with "" it does not. Prints what
the run took and how often the model was asked, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.run_session import RunSession
from framework.llm.provider import LLMProvider, LLMResponse
from framework.runtime import Runtime
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage


class Model(LLMProvider):
    """Takes 10 tokens for each question."""

    def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
        print("asked", flush=True)
        return LLMResponse("yes", "a model", 7, 3, "end_turn")

    def complete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        raise NotImplementedError("it has no tools")


class Node:
    async def execute(self, ctx: NodeContext) -> NodeResult:
        reply = await asyncio.to_thread(ctx.llm.complete, [{"role": "user", "content": "Well?"}])
        if ctx.attempt < 3:
            return NodeResult(False, error="not yet")
        return NodeResult(True, {"value": reply.content})


async def main(url: str, die: str) -> None:
    if die == "record":

        async def dies(*args: Any) -> None:
            os._exit(9)

        RunSession.attempt_failed = dies  # type: ignore[method-assign, assignment]
    with open_storage(url) as storage:
        executor = GraphExecutor(
            Runtime(MemoryStorage()),
            Model(),
            node_registry={"a": Node()},
            checkpoint_manager=CheckpointManager(storage),
        )
        spec = NodeSpec(id="a", output_keys=["value"], max_retries=3, retry_delay_seconds=0)
        graph = GraphSpec(id="graph", goal_id="goal", entry_node="a", nodes=[spec], edges=[])
        result = await executor.execute(graph, Goal(id="goal", name="Goal", description="Go."), {}, run_id="run")
        record = storage.find_run("run")
        assert record is not None
    print(json.dumps({"success": result.success, "tokens": result.total_tokens, "error": result.error}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
