"""What the workers of the fault suite do: a graph and a plan, small and with all that can be interrupted in them.

The graph has a retry, a loop, a fan-out with a branch of two steps, and calls that go through the journal, some of
them at once. The plan has parallel steps and a retry. Every body, every call to the outside and every commit is
written into a ledger that the store knows nothing of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from framework import _faults
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.plan import Plan
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import codec
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from tests.faults.ledger import Ledger

WORKS = ("graph", "plan")
GOAL = Goal(id="goal", name="Rivers", description="Write about rivers.")
TOPIC = {"topic": "rivers"}
MOST_RECOVERIES = 10_000

NODE_INSIDE = "node.inside"
CALL_INSIDE = "call.inside"
POINTS = (*_faults.POINTS, NODE_INSIDE, CALL_INSIDE)
"""Where a worker may be ended or stopped: the library's points, and the middle of a body and of a call."""


async def run_work(work: str, store: Storage, run_id: str, ledger: Ledger, pace: float, lease: float) -> dict[str, Any]:
    """Start or resume the run; its result as plain data, the same for every undisturbed or disturbed run."""
    # It may be killed without end at one step, which is what the limit of recoveries is there to stop.
    manager = CheckpointManager(store, CheckpointConfig(lease_seconds=lease, max_recovery_attempts=MOST_RECOVERIES))
    with MemoryStorage() as documents:
        runtime = Runtime(documents)
        bodies = _Bodies(ledger, pace)
        return await (_graph if work == "graph" else _plan)(runtime, manager, bodies, run_id)


class _Bodies:
    """The functions of both works."""

    def __init__(self, ledger: Ledger, pace: float) -> None:
        self._ledger = ledger
        self._pace = pace

    async def enter(self, step: str, attempt: int) -> None:
        self._ledger.started(step, attempt)
        await asyncio.sleep(self._pace)
        _faults.reach(NODE_INSIDE)

    async def outside(self, what: str, idempotency_key: str) -> str:
        """A service that is paid for each call."""
        self._ledger.called(what, idempotency_key)
        await asyncio.sleep(self._pace)
        _faults.reach(CALL_INSIDE)
        return f"{what} is done"

    async def call(self, ctx: NodeContext, what: str) -> str:
        value: str = await ctx.call("outside", self.outside, what)
        self._ledger.answered(what)
        return value


# --- the graph ------------------------------------------------------------------------------------------------------


class _Node(NodeProtocol):
    def __init__(self, bodies: _Bodies, work: Callable[[_Bodies, NodeContext], Any]) -> None:
        self._bodies = bodies
        self._work = work

    async def execute(self, ctx: NodeContext) -> NodeResult:
        await self._bodies.enter(ctx.step_key, ctx.attempt)
        ctx.memory.write("trace", [*(ctx.memory.read("trace") or []), ctx.step_key])
        output = await self._work(self._bodies, ctx)
        if isinstance(output, str):
            return NodeResult(False, error=output, tokens_used=5)
        return NodeResult(True, output, tokens_used=7)


async def _begin(bodies: _Bodies, ctx: NodeContext) -> Any:
    return {"plan": await bodies.call(ctx, f"plan {ctx.input_data['topic']}"), "notes": []}


async def _flaky(bodies: _Bodies, ctx: NodeContext) -> Any:
    return "not yet" if ctx.attempt == 1 else {"tries": ctx.attempt}


async def _gather(bodies: _Bodies, ctx: NodeContext) -> Any:
    notes = ctx.memory.read("notes")
    notes.append(f"note {len(notes)} " + "x" * 200)
    return {"round": len(notes)}


async def _both(bodies: _Bodies, ctx: NodeContext) -> Any:
    told = await asyncio.gather(*(bodies.call(ctx, f"{ctx.step_key} part {number}") for number in range(3)))
    return {f"{ctx.node_id}_out": sorted(told)}


async def _one(bodies: _Bodies, ctx: NodeContext) -> Any:
    return {f"{ctx.node_id}_out": [await bodies.call(ctx, f"{ctx.step_key} {turn}") for turn in range(2)]}


async def _plain(bodies: _Bodies, ctx: NodeContext) -> Any:
    return {f"{ctx.node_id}_out": f"{ctx.step_key} of {ctx.memory.read('plan')}"}


_NODES = {
    "begin": _begin,
    "flaky": _flaky,
    "gather": _gather,
    "spread": _plain,
    "a1": _both,
    "b1": _plain,
    "b2": _flaky,
    "c1": _one,
    "merge": _plain,
    "finish": _one,
}
_WAYS: tuple[dict[str, Any], ...] = (
    {"source": "begin", "target": "flaky"},
    {"source": "flaky", "target": "gather"},
    {
        "source": "gather",
        "target": "spread",
        "condition": EdgeCondition.CONDITIONAL,
        "condition_expr": "round >= 2",
        "priority": 1,
    },
    {"source": "gather", "target": "gather"},
    {"source": "spread", "target": "a1"},
    {"source": "spread", "target": "b1"},
    {"source": "spread", "target": "c1"},
    {"source": "a1", "target": "merge"},
    {"source": "b1", "target": "b2"},
    {"source": "b2", "target": "merge"},
    {"source": "c1", "target": "merge"},
    {"source": "merge", "target": "finish"},
)


def build_graph() -> GraphSpec:
    """12 steps, 14 attempts, 8 calls."""
    special: dict[str, dict[str, Any]] = {"spread": {"fan_out": True}}
    nodes = [
        NodeSpec.model_validate({"id": each, "node_type": "custom", "retry_delay_seconds": 0, **special.get(each, {})})
        for each in _NODES
    ]
    edges = [
        EdgeSpec(**{"id": f"e{number}", "condition": EdgeCondition.ON_SUCCESS, **way})
        for number, way in enumerate(_WAYS)
    ]
    return GraphSpec(
        id="faults",
        goal_id="goal",
        entry_node="begin",
        terminal_nodes=["finish"],
        nodes=nodes,
        edges=edges,
        append_only_keys=["trace"],
        reducers={"tries": "max"},
    )


async def _graph(runtime: Runtime, manager: CheckpointManager, bodies: _Bodies, run_id: str) -> dict[str, Any]:
    executor = GraphExecutor(runtime=runtime, checkpoint_manager=manager)
    for node_id, work in _NODES.items():
        executor.register_node(node_id, _Node(bodies, work))
    result = await executor.execute(build_graph(), GOAL, dict(TOPIC), run_id=run_id)
    return {
        "success": result.success,
        "error": result.error,
        "output": codec.encode(dict(sorted(result.output.items())), "output").decode(),
        "path": list(result.path),
        "steps": result.steps_executed,
        "tokens": result.total_tokens,
    }


# --- the plan -------------------------------------------------------------------------------------------------------


def build_plan() -> Plan:
    """6 steps, of which up to three run at once, and 7 attempts."""

    def step(name: str, function: str, *after: str, **args: Any) -> dict[str, Any]:
        action = {"action_type": "function", "function_name": function, "function_args": {"name": name, **args}}
        return {"id": name, "action": action, "dependencies": list(after), "max_retries": 3}

    steps = [
        step("begin", "part", given="$topic"),
        step("p1", "part", "begin", given="$begin.result.by"),
        step("p2", "flaky", "begin", given="$begin.result.notes"),
        step("p3", "part", "begin", given="three"),
        step("p4", "part", "p1", given="$p1.result.by"),
        step("end", "part", "p2", "p3", "p4", given=["$p2.result", "$p3.result", "$p4.result"]),
    ]
    return Plan.from_json({"id": "faults", "goal_id": "goal", "description": "rivers", "steps": steps})


async def _plan(runtime: Runtime, manager: CheckpointManager, bodies: _Bodies, run_id: str) -> dict[str, Any]:
    async def part(name: str, given: Any) -> Any:
        await bodies.enter(name, 1)
        return {"by": name, "given": given, "notes": ["x" * 200]}

    async def flaky(name: str, given: Any, feedback: str | None) -> Any:
        """Fails in its first attempt, whichever process makes it."""
        await bodies.enter(name, 1 if feedback is None else 2)
        if feedback is None:
            raise RuntimeError("not yet")
        return {"by": name, "given": given}

    config = ExecutorConfig(max_concurrency=3, retry_delay_seconds=0, max_recovery_attempts=MOST_RECOVERIES)
    executor = FlexibleGraphExecutor(runtime, config=config, checkpoint_manager=manager)
    executor.register_function("part", part)
    executor.register_function("flaky", flaky)
    result = await executor.execute_plan(build_plan(), GOAL, dict(TOPIC), run_id=run_id)
    return {
        "success": result.status.value == "completed",
        "error": result.error,
        "output": codec.encode(dict(sorted(result.results.items())), "results").decode(),
        "path": sorted(result.completed_steps),
        "steps": result.steps_executed,
        "tokens": 0,
    }
