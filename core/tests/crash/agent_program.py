"""The program that the crash tests kill: one agent run over a store, run as ``python agent_program.py '<json>'``.

The argument holds ``url``, ``run_id``, ``ledger``, ``config`` (a ``CheckpointConfig``) and ``pace`` (seconds a body
waits). Prints ``ready`` before it executes, and the result as one line of JSON. Every body's start and end goes to the
ledger, which the store knows nothing of. ``SUREFOOT_FAULT=point:n`` ends the process by SIGKILL when it reaches that
point of ``framework._faults`` for the n-th time; ``node.inside`` is the middle of a node's body. ``SUREFOOT_HOLD``
makes it print ``held`` there and wait for a line of input.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from framework import _faults
from framework.errors import RunBusy, SurefootError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import FunctionNode, NodeContext, NodeProtocol, NodeResult, NodeSpec, RouterNode
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import codec
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage

TOPIC = {"topic": "rivers", "limit": 3}
INSIDE = "node.inside"

_reached: Counter[str] = Counter()


def install_faults() -> None:
    """Have this process killed, or held, where the environment says."""
    kill, hold = (_place(name) for name in ("SUREFOOT_FAULT", "SUREFOOT_HOLD"))

    def hook(reached: str) -> None:
        _reached[reached] += 1
        if (reached, _reached[reached]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if (reached, _reached[reached]) == hold:
            print("held", flush=True)
            sys.stdin.readline()

    _faults.install(hook)


def _place(name: str) -> tuple[str, int] | None:
    point, _, number = os.environ.get(name, "").partition(":")
    if not point:
        return None
    if point not in (*_faults.POINTS, INSIDE):
        raise SystemExit(f"There is no fault point {point!r}.")
    return point, int(number)


class Ledger:
    """Says outside the store what really ran. One line an event, durable before the body goes on."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, event: str, ctx: NodeContext) -> None:
        line = {"event": event, "run": ctx.run_id, "step": ctx.step_key, "attempt": ctx.attempt, "pid": os.getpid()}
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)


class Body(NodeProtocol):
    """A node whose every attempt is in the ledger."""

    def __init__(self, ledger: Ledger, pace: float, work: Callable[[NodeContext], NodeResult] | NodeProtocol) -> None:
        self._ledger = ledger
        self._pace = pace
        self._work = work

    async def execute(self, ctx: NodeContext) -> NodeResult:
        self._ledger.note("start", ctx)
        await asyncio.sleep(self._pace)
        _faults.reach(INSIDE)
        if isinstance(self._work, NodeProtocol):
            result = await self._work.execute(ctx)
        else:
            result = self._work(ctx)
        self._ledger.note("end", ctx)
        return result


def _trace(ctx: NodeContext) -> None:
    """Append to the append-only key, and add to the summed one."""
    ctx.memory.write("trace", [*(ctx.memory.read("trace") or []), ctx.step_key])
    ctx.memory.write("score", (ctx.memory.read("score") or 0) + len(ctx.node_id))


def plan(ctx: NodeContext) -> NodeResult:
    _trace(ctx)
    due = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
    output = {"due": due, "pair": (1, "two"), "tags": {"a", "b"}, "notes": [], "plan": f"on {ctx.input_data['topic']}"}
    return NodeResult(True, output, tokens_used=11)


def flaky(ctx: NodeContext) -> NodeResult:
    """Fails in its first attempt, whichever process makes it."""
    _trace(ctx)
    if ctx.attempt == 1:
        return NodeResult(False, error="not yet", tokens_used=5)
    return NodeResult(True, {f"{ctx.node_id}_attempt": ctx.attempt}, tokens_used=7)


def gather(ctx: NodeContext) -> NodeResult:
    """The loop's body: changes a list in place and counts its rounds."""
    notes = ctx.memory.read("notes")
    notes.append(f"note {len(notes)} on {ctx.memory.read('subject')}: " + "x" * 40)
    return NodeResult(True, {"round": len(notes)}, tokens_used=len(notes))


def check(round: int, limit: int) -> dict[str, Any]:
    return {"enough": round >= limit, "route_on": "deep"}


def risky(ctx: NodeContext) -> NodeResult:
    ctx.memory.write("half_done", True)
    raise RuntimeError("the source is gone")


def worker(ctx: NodeContext) -> NodeResult:
    _trace(ctx)
    return NodeResult(True, {f"{ctx.node_id}_out": f"{ctx.step_key} of {ctx.memory.read('plan')}"}, tokens_used=3)


def rounds(ctx: NodeContext) -> NodeResult:
    """The end of a loop inside a branch."""
    _trace(ctx)
    return NodeResult(True, {"b_rounds": (ctx.memory.read("b_rounds") or 0) + 1}, tokens_used=3)


def finish(ctx: NodeContext) -> NodeResult:
    state = ctx.memory.read_all()
    return NodeResult(True, {"report": [f"{key}={state[key]}" for key in sorted(state) if key.endswith("_out")]})


WORK: dict[str, Callable[[NodeContext], NodeResult]] = {
    "plan": plan,
    "flaky": flaky,
    "gather": gather,
    "risky": risky,
    "repair": worker,
    "spread": worker,
    "a1": worker,
    "b1": worker,
    "b2": flaky,
    "b3": rounds,
    "c1": worker,
    "c2": worker,
    "c3": worker,
    "c4": worker,
    "c_join": worker,
    "merge": worker,
    "finish": finish,
}


def build_graph() -> GraphSpec:
    """Loop, conditions, router, failure edge, retries, two fan-outs one inside the other, and their joins."""
    special: dict[str, dict[str, Any]] = {
        "flaky": {"max_retries": 3},
        "b2": {"max_retries": 3},
        "risky": {"max_retries": 2},
        "check": {"node_type": "function", "input_keys": ["round", "limit"], "output_keys": ["enough", "route_on"]},
        "gate": {"node_type": "router", "routes": {"deep": "risky", "default": "finish"}},
        "spread": {"fan_out": True},
        "c1": {"fan_out": True},
    }
    ids = [*WORK, "check", "gate"]
    nodes = [
        NodeSpec.model_validate({"id": each, "node_type": "custom", "retry_delay_seconds": 0, **special.get(each, {})})
        for each in ids
    ]
    ways: list[dict[str, Any]] = [
        {"source": "plan", "target": "flaky", "input_mapping": {"subject": "topic"}},
        {"source": "flaky", "target": "gather"},
        {"source": "gather", "target": "check"},
        {"source": "check", "target": "gate", "condition": "conditional", "condition_expr": "enough", "priority": 1},
        {"source": "check", "target": "gather"},
        {"source": "risky", "target": "spread", "condition": "on_success"},
        {"source": "risky", "target": "repair", "condition": "on_failure"},
        {"source": "repair", "target": "spread"},
        {"source": "spread", "target": "a1", "input_mapping": {"part": "pair"}},
        {"source": "spread", "target": "b1", "input_mapping": {"part": "tags"}},
        {"source": "spread", "target": "c1"},
        {"source": "a1", "target": "merge"},
        {"source": "b1", "target": "b2"},
        {"source": "b2", "target": "b3"},
        {"source": "b3", "target": "b2", "condition": "conditional", "condition_expr": "b_rounds < 2", "priority": 1},
        {"source": "b3", "target": "merge"},
        {"source": "c1", "target": "c2"},
        {"source": "c1", "target": "c3"},
        {"source": "c2", "target": "c_join"},
        {"source": "c3", "target": "c4"},
        {"source": "c4", "target": "c_join"},
        {"source": "c_join", "target": "merge"},
        {"source": "merge", "target": "finish"},
    ]
    return GraphSpec(
        id="crash-test",
        goal_id="goal",
        entry_node="plan",
        terminal_nodes=["finish"],
        nodes=nodes,
        edges=[
            EdgeSpec(**{"id": f"e{index}", "condition": EdgeCondition.ON_SUCCESS, **way})
            for index, way in enumerate(ways)
        ],
        append_only_keys=["trace"],
        reducers={"score": "sum"},
    )


async def execute(url: str, run_id: str, ledger: str, config: dict[str, Any], pace: float) -> dict[str, Any]:
    """Run or resume the agent and return its result as plain data."""
    with open_storage(url) as storage:
        executor = GraphExecutor(
            runtime=Runtime(MemoryStorage()),
            checkpoint_manager=CheckpointManager(storage, CheckpointConfig.model_validate(config)),
        )
        book = Ledger(ledger)
        for node_id, work in WORK.items():
            executor.register_node(node_id, Body(book, pace, work))
        executor.register_node("check", Body(book, pace, FunctionNode(check)))
        executor.register_node("gate", Body(book, pace, RouterNode()))
        goal = Goal(id="goal", name="Rivers", description="Write about rivers.")
        print("ready", flush=True)
        try:
            result = await executor.execute(build_graph(), goal, dict(TOPIC), run_id=run_id)
        except RunBusy as error:
            return {"busy": error.owner}
        except SurefootError as error:
            return {"raised": type(error).__name__, "text": str(error)}
        return {
            "success": result.success,
            "error": result.error,
            "output": codec.encode(dict(sorted(result.output.items())), "output").decode(),
            "path": result.path,
            "steps": result.steps_executed,
            "tokens": result.total_tokens,
            "recovered": result.steps_recovered,
            "resumed_from": result.resumed_from,
        }


def main() -> None:
    arguments = json.loads(sys.argv[1])
    install_faults()
    print(json.dumps(asyncio.run(execute(**arguments))), flush=True)


if __name__ == "__main__":
    main()
