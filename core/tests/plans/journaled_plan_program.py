"""The program that the tests of journaled plans kill: ``python journaled_plan_program.py '<json>'``.

The argument holds ``url``, ``ledger`` and ``work``, and maybe ``kill``, ``keep``, ``max_tokens`` and ``concurrency``.
``work`` is ``pay`` (a tool with effects), ``function`` (a function as that tool), ``think`` (questions to a model) or
``look`` (a tool without effects). Every call that reaches the outside is a line of the ledger, which the store knows
nothing of. ``kill`` is a point of ``framework._faults`` with the number of the time that it is reached, as
``routing:1``, or ``inside:1``: within a tool, after its effect. Prints what came of the run as one line of JSON.
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
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.judge import HybridJudge
from framework.graph.plan import Plan
from framework.llm.provider import LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

RUN_ID = "r"
GOAL = Goal(id="g", name="Pay", description="Pay what is owed.")
ACCEPT = "ACTION: accept\nCONFIDENCE: 1\nREASONING: good\nFEEDBACK: none"

_reached: Counter[str] = Counter()


class Outside:
    """What the plan calls; all of it notes each call in the ledger."""

    def __init__(self, ledger: str) -> None:
        self._file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, call: str, key: str = "") -> None:
        os.write(self._file, json.dumps([call, key]).encode() + b"\n")
        os.fsync(self._file)

    def model(self, messages: list[Any], system: str | None, tools: list[Tool]) -> LLMResponse:
        asked = str(messages[0]["content"]).splitlines()[0]
        self.note(f"asked {asked}")
        return LLMResponse(f"said to {asked}", "m", input_tokens=7, output_tokens=3, cost=0.25)

    def judge(self, messages: list[Any], system: str | None, tools: list[Tool]) -> LLMResponse:
        step = str(messages[0]["content"]).partition("# Step: ")[2].splitlines()[0]
        self.note(f"judged {step}")
        return LLMResponse(ACCEPT, "j", input_tokens=3, output_tokens=2, cost=0.125)

    def tool(self, use: ToolUse) -> ToolResult:
        key = use.input.get("idempotency_key", "")
        self.note(f"{use.name} {use.input['amount']}", key)
        _faults.reach("inside")
        return ToolResult(use.id, json.dumps({"receipt": f"receipt of {use.input['amount']}"}))

    def pay(self, amount: int, idempotency_key: str) -> dict[str, Any]:
        self.note(f"pay {amount}", idempotency_key)
        _faults.reach("inside")
        return {"receipt": (amount, "paid")}


def build_plan(work: str) -> Plan:
    actions: dict[str, Any]
    if work == "think":
        actions = {f"think{n}": {"action_type": "llm_call", "prompt": f"Think{n}."} for n in (1, 2, 3)}
    else:
        name = "look" if work == "look" else "pay"
        actions = {"pay": {"action_type": "tool_use", "tool_name": name, "tool_args": {"amount": 5}}}
    steps = [{"id": name, "description": name, "action": action} for name, action in actions.items()]
    return Plan.from_json({"id": "p", "goal_id": "g", "steps": steps})


def kill_at(kill: str) -> None:
    point, _, number = kill.partition(":")

    def hook(reached: str) -> None:
        _reached[reached] += 1
        if reached == point and _reached[reached] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    _faults.install(hook)


async def execute(
    url: str,
    ledger: str,
    work: str,
    kill: str = "",
    keep: bool = False,
    max_tokens: int | None = None,
    concurrency: int = 1,
) -> dict[str, Any]:
    if kill:
        kill_at(kill)
    outside = Outside(ledger)
    amount = {"amount": {"type": "integer"}}
    keyed = {"type": "object", "properties": {**amount, "idempotency_key": {"type": "string"}}}
    tools = [
        Tool("pay", "Pays.", keyed, effects=True),
        Tool("look", "Looks.", {"type": "object", "properties": amount}),
    ]
    with open_storage(url) as storage:
        executor = FlexibleGraphExecutor(
            Runtime(MemoryStorage()),
            llm=ScriptedLLM(outside.model, delay_seconds=0.02),  # longer than to be answered from the journal
            tools=tools,
            tool_executor=outside.tool,
            functions={"pay": outside.pay} if work == "function" else {},
            judge=HybridJudge(llm=ScriptedLLM(outside.judge)),
            config=ExecutorConfig(max_concurrency=concurrency, retry_delay_seconds=0),
            checkpoint_manager=CheckpointManager(storage, CheckpointConfig(keep_journal=keep)),
        )
        budget = RunBudget(max_tokens=max_tokens) if max_tokens is not None else None
        result = await executor.execute_plan(build_plan(work), GOAL, run_id=RUN_ID, budget=budget)
        return {
            "status": result.status.value,
            "feedback": result.feedback,
            "error_type": result.error_type,
            "receipt": result.results.get("receipt"),
            "result": result.results.get("result"),
            "tokens": result.total_tokens,
            "cost": result.total_cost,
            "executed": result.steps_executed,
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(execute(**json.loads(sys.argv[1])))), flush=True)
