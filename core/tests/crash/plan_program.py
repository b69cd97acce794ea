"""The program that the crash tests of plans kill: one plan over a store, run as ``python plan_program.py '<json>'``.

The argument holds ``url``, ``ledger``, ``mode``, ``concurrency``, and maybe ``recoveries`` (the limit of them in a
row), ``durability`` and ``hold`` (to say ready and wait for a line before the answer). ``mode`` is ``run`` (a callback
approves), ``wait`` (nobody does) or ``approve`` (stores the answer, runs nothing). Prints the result as one line of
JSON. Every start and end of a body goes to the ledger, which the store knows nothing of. ``SUREFOOT_FAULT=point:n``
ends the process by SIGKILL when it reaches that point of ``framework._faults`` for the n-th time; ``node.inside`` is
the middle of a body, ``answer.before`` and ``answer.after`` are around the answer.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

from framework import _faults
from framework.errors import ApprovalError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeSpec
from framework.graph.plan import ApprovalDecision, ApprovalRequest, ApprovalResult, ExecutionStatus, Plan
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import codec
from framework.storage.backend import Storage, open_storage
from framework.storage.memory import MemoryStorage

RUN_ID = "plan-1"
GOAL = Goal(id="goal", name="Rivers", description="Write about rivers.")

_reached: Counter[str] = Counter()


def install_faults() -> None:
    """Have this process killed where the environment says."""
    point, _, number = os.environ.get("SUREFOOT_FAULT", "").partition(":")

    def hook(reached: str) -> None:
        _reached[reached] += 1
        if reached == point and _reached[reached] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    _faults.install(hook)


class Bodies:
    """The functions of the plan, each of whose starts and ends is in the ledger."""

    def __init__(self, ledger: str) -> None:
        self._file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, event: str, step: str) -> None:
        line = {"event": event, "step": step, "pid": os.getpid()}
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)

    def begin(self, topic: str, idempotency_key: str) -> Any:
        self.note("start", idempotency_key)
        due = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
        return {"due": due, "pair": (1, "two"), "tags": {"a", "b"}, "topic": topic, "notes": ["x" * 50]}

    async def part(self, given: Any, idempotency_key: str) -> Any:
        self.note("start", idempotency_key)
        await asyncio.sleep(0)
        _faults.reach("node.inside")
        self.note("end", idempotency_key)
        return {"by": idempotency_key, "given": given}

    async def flaky(self, given: Any, feedback: str | None, idempotency_key: str) -> Any:
        """Fails in its first attempt, whichever process makes it."""
        self.note("start", f"{idempotency_key}@{2 if feedback else 1}")
        await asyncio.sleep(0)
        _faults.reach("node.inside")
        if feedback is None:
            raise RuntimeError("not yet")
        return {"given": given, "after": feedback}

    def inner(self, x: str) -> str:
        self.note("start", f"inner {x}")
        return f"{x}+"

    def ask(self, request: ApprovalRequest) -> ApprovalResult:
        self.note("ask", request.step_id)
        return ApprovalResult(decision=ApprovalDecision.APPROVE, reason="fine")


def build_plan() -> Plan:
    """Parallel steps, a retry, an approval, code, a sub-graph, and names that several steps write."""

    def call(name: str, **args: Any) -> dict[str, Any]:
        return {"action_type": "function", "function_name": name, "function_args": args}

    steps = [
        {"id": "begin", "action": call("begin", topic="$topic"), "expected_outputs": ["base"]},
        {"id": "p1", "action": call("part", given="$base.notes"), "dependencies": ["begin"]},
        {"id": "p2", "action": call("flaky", given="$base.pair"), "dependencies": ["begin"], "max_retries": 3},
        {"id": "p3", "action": call("part", given="$base.tags"), "dependencies": ["begin"]},
        {
            "id": "code",
            "action": {"action_type": "code_execution", "code": "size = len(base['notes'][0])\nresult = size + 1"},
            "dependencies": ["begin"],
        },
        {
            "id": "gate",
            "action": call("part", given="$p1.result.by"),
            "dependencies": ["p1"],
            "requires_approval": True,
            "expected_outputs": ["published"],
        },
        {
            "id": "sub",
            "action": {"action_type": "sub_graph", "graph_id": "sub"},
            "inputs": {"x": "$p3.result.by"},
            "dependencies": ["p3"],
        },
        {
            "id": "end",
            "action": call("part", given=["$p2.result", "$code.size", "$published", "$sub.z"]),
            "dependencies": ["p2", "code", "gate", "sub"],
            "expected_outputs": ["report"],
        },
    ]
    return Plan.from_json({"id": "rivers", "goal_id": "goal", "description": "rivers", "steps": steps})


def sub_graph() -> GraphSpec:
    nodes = [
        NodeSpec(id="one", node_type="function", input_keys=["x"], output_keys=["y"]),
        NodeSpec(id="two", node_type="function", input_keys=["x", "y"], output_keys=["z"]),
    ]
    edge = EdgeSpec(id="e", source="one", target="two", condition=EdgeCondition.ON_SUCCESS)
    return GraphSpec(id="sub", goal_id="goal", entry_node="one", nodes=nodes, edges=[edge])


def build_executor(
    storage: Storage, bodies: Bodies, concurrency: int, recoveries: int, durability: str
) -> FlexibleGraphExecutor:
    runtime = Runtime(MemoryStorage())
    manager = CheckpointManager(storage, CheckpointConfig.model_validate({"durability": durability}))
    config = ExecutorConfig(
        max_concurrency=concurrency, retry_delay_seconds=0, max_recovery_attempts=recoveries, max_total_steps=200
    )
    executor = FlexibleGraphExecutor(runtime, config=config, checkpoint_manager=manager)
    for name in ("begin", "part", "flaky"):
        executor.register_function(name, getattr(bodies, name))
    graphs = GraphExecutor(runtime, checkpoint_manager=manager)
    graphs.register_function("one", bodies.inner)
    graphs.register_function("two", lambda x, y: bodies.inner(y))
    executor.register_graph("sub", sub_graph(), GOAL, graphs)
    return executor


async def execute(
    url: str,
    ledger: str,
    mode: str,
    concurrency: int,
    recoveries: int = 5,
    durability: str = "sync",
    hold: bool = False,
) -> dict[str, Any]:
    """Do what ``mode`` says and return the result as plain data; a completed run is asked for a second time."""
    with open_storage(url) as storage:
        bodies = Bodies(ledger)
        executor = build_executor(storage, bodies, concurrency, recoveries, durability)
        if mode == "approve":
            [request] = await executor.pending_approvals(RUN_ID)
            answer = ApprovalResult(decision=ApprovalDecision.APPROVE)
            if hold:
                print("ready", flush=True)
                sys.stdin.readline()
            _faults.reach("answer.before")
            try:
                await executor.answer_approval(RUN_ID, request.step_id, answer, request.request_id)
            except ApprovalError as error:
                return {"refused": str(error)}
            _faults.reach("answer.after")
            return {"answered": request.step_id}
        if mode == "run":
            executor.set_approval_callback(bodies.ask)
        plan = build_plan()
        result = await executor.execute_plan(plan, GOAL, {"topic": "rivers"}, run_id=RUN_ID)
        done = result.status is ExecutionStatus.COMPLETED
        again = await executor.execute_plan(None, GOAL, run_id=RUN_ID) if done else result
        return {
            "status": result.status.value,
            "feedback": result.feedback,
            "results": codec.encode(dict(sorted(result.results.items()))).decode(),
            "again": codec.encode(dict(sorted(again.results.items()))).decode(),
            "outputs": codec.encode(dict(sorted(plan.context.items()))).decode(),
            "completed": result.completed_steps,
            "executed": result.steps_executed,
            "recovered": result.steps_recovered,
            "interrupted": result.attempts_interrupted,
            "error": result.error,
            "reached": dict(_reached),
        }


def main() -> None:
    arguments = json.loads(sys.argv[1])
    install_faults()
    print(json.dumps(asyncio.run(execute(**arguments))), flush=True)


if __name__ == "__main__":
    main()
