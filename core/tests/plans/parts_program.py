"""The program that the tests of waiting sub-graphs kill: ``python parts_program.py '<json>'``.

The argument holds ``url``, ``ledger``, ``what`` (``start`` or ``recover``), ``wait`` (``sleep``, ``wait``, ``ask``,
``person`` or nothing), and maybe ``kill``, ``seconds`` and ``max_tokens``. The plan's step ``s`` runs a graph of two
nodes that ask a model twice; ``one`` waits in between, or a person is asked after it. Each question is a line of the
ledger, which the store knows nothing of. ``kill`` is ``part`` (the part is paused, and the plan has not committed
that), ``plan`` (both are paused), or a point of ``framework._faults`` with the number of the time that it is reached.
Prints what came of the run as one line of JSON, ``null`` when there was nothing to recover.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

from framework import _faults
from framework.graph.budget import RunBudget
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.plan import Plan
from framework.graph.plan_run import PlanRun
from framework.graph.run_session import RunSession
from framework.llm.provider import LLMResponse
from framework.llm.scripted import ScriptedLLM
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

GOAL = Goal(id="g", name="G", description="d")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(kill: str) -> None:
    point, _, number = kill.partition(":")
    reached: Counter[str] = Counter()

    def hook(at: str) -> None:
        reached[at] += 1
        if at == point and reached[at] == int(number):
            die()

    async def hold(*args: Any) -> None:
        die()

    ended = RunSession.end

    async def end(session: RunSession, *args: Any, **keywords: Any) -> None:
        await ended(session, *args, **keywords)
        if session.run_id == "r":
            die()

    if kill == "part":
        PlanRun._hold = hold  # type: ignore[method-assign, assignment]  # noqa: SLF001
    elif kill == "plan":
        RunSession.end = end  # type: ignore[method-assign, assignment]
    else:
        _faults.install(hook)


class Node(NodeProtocol):
    """Asks a model, then waits if it is the one that does."""

    def __init__(self, wait: str, seconds: float) -> None:
        self._wait = wait
        self._seconds = seconds

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await ctx.llm.acomplete([{"role": "user", "content": f"{ctx.node_id} before"}], max_tokens=4)
        answer: Any = None
        if self._wait == "sleep":
            await ctx.sleep(self._seconds)
        elif self._wait == "wait":
            answer = await ctx.wait_for("go")
        elif self._wait == "ask":
            answer = await ctx.ask("Which?", int)
        await ctx.llm.acomplete([{"role": "user", "content": f"{ctx.node_id} after {answer}"}], max_tokens=4)
        return NodeResult(True, {ctx.node_id: answer})


async def main(
    url: str,
    ledger: str,
    what: str,
    wait: str,
    kill: str = "",
    seconds: float = 0.0,
    max_tokens: int | None = None,
) -> Any:
    if kill:
        kill_at(kill)
    file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def model(messages: list[Any], *_: Any) -> LLMResponse:
        os.write(file, f"{messages[0]['content']}\n".encode())
        return LLMResponse("said", "m", input_tokens=6, output_tokens=4, cost=0.5)

    with open_storage(url) as storage:
        manager = CheckpointManager(storage, CheckpointConfig(sleep_in_process_seconds=0.0))
        nodes = [NodeSpec(id=each, node_type="function", max_retries=1, output_keys=[each]) for each in ("one", "two")]
        graph = GraphSpec(
            id="s",
            goal_id="g",
            entry_node="one",
            nodes=nodes,
            edges=[EdgeSpec(id="e", source="one", target="two", condition=EdgeCondition.ON_SUCCESS)],
            pause_nodes=["one"] if wait == "person" else [],
        )
        inner = GraphExecutor(Runtime(MemoryStorage()), llm=ScriptedLLM(model), checkpoint_manager=manager)
        inner.register_node("one", Node(wait, seconds))
        inner.register_node("two", Node("", 0.0))
        executor = FlexibleGraphExecutor(
            Runtime(MemoryStorage()), config=ExecutorConfig(retry_delay_seconds=0), checkpoint_manager=manager
        )
        executor.register_graph("s", graph, GOAL, inner)
        plan = Plan.from_json(
            {"id": "p", "goal_id": "g", "steps": [{"id": "s", "action": {"action_type": "sub_graph", "graph_id": "s"}}]}
        )
        budget = RunBudget(max_tokens=max_tokens) if max_tokens is not None else None
        if what == "start":
            result: Any = await executor.execute_plan(plan, GOAL, run_id="r", budget=budget)
        else:
            found = await manager.recover(lambda run: executor.execute_plan(None, GOAL, run_id=run.run_id))
            if not found:
                return None
            [one] = found
            result = one.result
            assert result is not None, one.error
        return {
            "run_id": result.run_id,
            "status": result.status.value,
            "error_type": result.error_type,
            "tokens": result.total_tokens,
            "one": result.results.get("one"),
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(**json.loads(sys.argv[1])))), flush=True)
