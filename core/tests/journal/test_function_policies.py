"""Functions that are whole steps, of graphs and plans: what becomes of a call whose process ended meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from framework.errors import StorageError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.flexible_executor import FlexibleGraphExecutor
from framework.graph.journal import current_idempotency_key
from framework.graph.node import FunctionNode, NodeSpec
from framework.graph.plan import ActionSpec, ExecutionStatus
from framework.graph.run_view import view_run
from framework.llm.provider import Tool, ToolPolicy, ToolUse
from framework.runner.node_functions import node_function, policy_of
from framework.runner.runner import AgentRunner
from framework.runner.tool_registry import ToolRegistry
from framework.runtime.core import Runtime
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write
from tests import forks
from tests.graph.executor_kit import graph_of
from tests.journal.function_program import Process
from tests.journal.journal_kit import GOAL, Bench, Quiet, loop_graph
from tests.plans.plan_kit import Places, plan, step

CORE = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("function_program.py")
URL = "memory://"


class Bank:
    """Payments that reached the outside; one may hang, as the process does that is to end in it."""

    def __init__(self) -> None:
        self.paid: list[tuple[float, str]] = []
        self.inside: list[str | None] = []
        self.hangs = False
        self.breaks: list[Exception] = []

    async def pay(self, euros: float = 5.0, *, idempotency_key: str) -> str:
        self.paid.append((euros, idempotency_key))
        self.inside.append(current_idempotency_key())
        if self.hangs:
            await asyncio.Event().wait()
        if self.breaks:
            raise self.breaks.pop()
        return f"receipt {len(self.paid)}"


async def cut_off(bank: Bank, work: Callable[[], Any]) -> None:
    """Cancel what ``work`` begins while it pays."""
    bank.hangs = True
    task = asyncio.ensure_future(work())
    while not bank.paid:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bank.hangs = False


def settle(bench: Bench, **how: Any) -> None:
    [call] = [call for call in bench.manager.journal("run") if call.state == "unknown"]
    bench.manager.settle("run", call.id, **how)


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "value", "times"),
    [({"done": "receipt 17"}, "receipt 17", 1), ({"redo": True}, "receipt 2", 2), ({"skip": True}, None, 1)],
)
async def test_a_payment_that_was_cut_off_is_asked_about(how: dict[str, Any], value: Any, times: int) -> None:
    bank, bench = Bank(), Bench(MemoryStorage())
    node = FunctionNode(bank.pay, effects=True)
    await cut_off(bank, lambda: bench.run(node))
    paused = await bench.run(node)
    assert (paused.paused_at, len(bank.paid)) == ("a", 1)
    view = view_run(bench.storage, "run")
    assert [(each.kind, each.name) for each in view.resume.waiting] == [("settle", "a#1/1")]
    [call] = bench.manager.journal("run")
    assert (call.name, call.state, call.policy, call.key) == ("function:a", "unknown", "ask", bank.paid[0][1])
    settle(bench, **how)
    result = await bench.run(node)
    assert result.success, result.error
    assert (result.output["result"], len(bank.paid)) == (value, times)
    assert len({key for _, key in bank.paid}) == 1, "made again under the same key"
    assert bank.inside == [key for _, key in bank.paid], "what code deep inside is told is the same key"
    assert bench.manager.journal("run") == []


async def test_a_function_that_says_nothing_is_called_again_and_not_journaled() -> None:
    bank, bench = Bank(), Bench(MemoryStorage(), keep_journal=True)
    node = FunctionNode(bank.pay)
    await cut_off(bank, lambda: bench.run(node))
    result = await bench.run(node)
    assert (result.success, [key for _, key in bank.paid]) == (True, ["run/a#1"] * 2)
    assert bench.manager.journal("run") == []


async def test_each_tool_that_such_a_function_calls_has_a_key_of_its_own_the_same_in_each_attempt() -> None:
    paid: list[str] = []

    def pay(euros: int, idempotency_key: str) -> str:
        paid.append(idempotency_key)
        return "paid"

    with ToolRegistry() as tools:
        tools.register_function(pay)
        execute = tools.get_executor()

        def three_payments() -> str:
            results = [execute(ToolUse("id", "pay", {"euros": euros})) for euros in (5, 7, 5)]
            assert not any(result.is_error for result in results), results
            if len(paid) == 3:
                raise RuntimeError("the first attempt fails")
            return "done"

        graph = GraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=CheckpointManager(MemoryStorage()))
        graph.register_function("a", three_payments)
        spec = graph_of(NodeSpec(id="a", node_type="function", max_retries=2))
        assert (await graph.execute(spec, GOAL, {}, run_id="g")).success
        assert len(paid) == 6
        assert len(set(paid)) == 3
        assert paid[:3] == paid[3:]
        assert (await graph.execute(spec, GOAL, {}, run_id="other")).success
        assert not {*paid[:6]} & {*paid[6:]}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", ["function", "tool_use"])
async def test_code_deep_inside_a_step_without_a_policy_is_told_its_key(kind: str, recorded: bool) -> None:
    seen: list[Any] = []

    class Inner(Quiet):
        async def execute(self, ctx: Any) -> Any:
            seen.append(current_idempotency_key())
            return await super().execute(ctx)

    def deep() -> None:
        seen.append(current_idempotency_key())

    async def pay(idempotency_key: str) -> str:
        deep()
        await asyncio.gather(asyncio.to_thread(deep), asyncio.create_task(asyncio.to_thread(deep)))
        if recorded:  # another run, in it
            await asyncio.create_task(Bench(MemoryStorage()).run(Inner()))
        deep()
        return idempotency_key

    manager = CheckpointManager(MemoryStorage()) if recorded else None
    within = [None] if recorded else []
    graph = GraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=manager)
    graph.register_function("a", pay)
    spec = graph_of(NodeSpec(id="a", node_type="function"))
    result = await graph.execute(spec, GOAL, {}, run_id="g" if recorded else None)
    key = result.output["result"]
    assert key.endswith("/a#1")
    assert seen == [key, key, key, *within, key]
    seen.clear()
    executor = FlexibleGraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=manager)
    executor.register_function("pay", pay)
    name = {"function": "function_name", "tool_use": "tool_name"}[kind]
    one = step("a").model_copy(update={"action": ActionSpec.model_validate({"action_type": kind, name: "pay"})})
    done = await executor.execute_plan(plan(one), GOAL, run_id="p" if recorded else None)
    assert done.status is ExecutionStatus.COMPLETED, done.error
    assert seen == [seen[0], seen[0], seen[0], *within, seen[0]]
    assert seen[0].endswith("/a")
    assert current_idempotency_key() is None


async def test_with_fail_the_step_fails_until_it_is_settled() -> None:
    bank, bench = Bank(), Bench(MemoryStorage())
    node = FunctionNode(bank.pay, policy="fail")
    await cut_off(bank, lambda: bench.run(node, attempts=3))
    for _ in range(2):
        result = await bench.run(node, attempts=3)
        assert not result.success
        assert "'a#1/1'" in str(result.error)
        record = bench.storage.find_run("run")
        assert record is not None
        assert (record.state, len(bank.paid)) == (RunState.FAILED, 1)
    settle(bench, done="receipt 17")
    assert (await bench.run(node)).output["result"] == "receipt 17"


async def test_rerun_comes_before_effects() -> None:
    bank, bench = Bank(), Bench(MemoryStorage())
    node = FunctionNode(bank.pay, effects=True, policy="rerun")
    await cut_off(bank, lambda: bench.run(node))
    assert (await bench.run(node)).output["result"] == "receipt 2"


async def test_what_it_returned_is_durable_before_the_step_commits() -> None:
    bank, storage = Bank(), MemoryStorage()
    bench, node = Bench(storage), FunctionNode(bank.pay, effects=True)
    commit = storage.commit

    def refusing(writes: Sequence[Write]) -> list[Exception | None]:
        if any(isinstance(each, Commit) for each in writes):
            raise StorageError("the disk is gone")
        return commit(writes)

    with patch.object(storage, "commit", refusing):
        assert not (await bench.run(node)).success
    assert [call.state for call in bench.manager.journal("run")] == ["done"]
    assert ((await bench.run(node)).output["result"], len(bank.paid)) == ("receipt 1", 1)


async def test_one_that_runs_into_the_time_limit_of_its_node_is_asked_about() -> None:
    bank, bench = Bank(), Bench(MemoryStorage())
    bank.hangs = True
    spec = NodeSpec(id="a", timeout_seconds=0.02, retry_delay_seconds=0, max_retries=3)
    node = FunctionNode(bank.pay, effects=True)
    result = await bench.run(node, graph=graph_of(spec))
    assert (result.paused_at, len(bank.paid)) == ("a", 1)


@pytest.mark.parametrize(("error", "times"), [(ValueError("no such account"), 2), (TimeoutError("no answer"), 1)])
async def test_what_it_raises_is_an_outcome_unless_it_leaves_that_open(error: Exception, times: int) -> None:
    bank, bench = Bank(), Bench(MemoryStorage())
    bank.breaks = [error]
    result = await bench.run(FunctionNode(bank.pay, effects=True), attempts=2)
    assert (result.paused_at, len(bank.paid)) == (None if times == 2 else "a", times)


async def test_each_visit_has_a_key_and_a_call_of_its_own() -> None:
    keys: list[str] = []

    def again(idempotency_key: str, **given: Any) -> dict[str, Any]:
        keys.append(idempotency_key)
        return {"value": len(keys) < 3}

    bench = Bench(MemoryStorage(), keep_journal=True)
    result = await bench.run(FunctionNode(again, effects=True), Quiet(), graph=loop_graph())
    assert (result.success, keys) == (True, ["run/a#1", "run/a#2", "run/a#3"])
    assert [(call.id, call.key, call.state) for call in bench.manager.journal("run")] == [
        (f"a#{visit}/1", f"run/a#{visit}", "done") for visit in (1, 2, 3)
    ]


async def test_a_sync_function_runs_in_the_event_loop_with_its_declared_keys() -> None:
    seen: list[Any] = []

    def book(room: int, idempotency_key: str) -> dict[str, Any]:
        asyncio.get_running_loop()
        seen.append((room, idempotency_key))
        return {"booking": room * 10, "other": 1}

    bench = Bench(MemoryStorage())
    spec = NodeSpec(id="a", node_type="function", input_keys=["room"], output_keys=["booking"])
    node = FunctionNode(book, policy="ask")
    result = await bench.run(node, graph=graph_of(spec), input_data={"room": 7})
    assert (result.output["booking"], seen) == (70, [(7, "run/a#1")])


async def test_without_a_checkpoint_manager_it_is_only_called() -> None:
    bank = Bank()
    executor = GraphExecutor(Runtime(open_storage(URL)))
    executor.register_function("a", bank.pay, effects=True)
    result: ExecutionResult = await executor.execute(graph_of(NodeSpec(id="a", node_type="function")), GOAL)
    assert (result.output["result"], len(bank.paid), bank.inside) == ("receipt 1", 1, [bank.paid[0][1]])


def test_a_policy_is_checked_where_it_is_declared() -> None:
    for declare in (
        lambda: FunctionNode(print, policy="never"),  # type: ignore[arg-type]
        lambda: GraphExecutor(None).register_function("a", print, policy="never"),  # type: ignore[arg-type]
        lambda: FlexibleGraphExecutor(None).register_function("a", print, policy="never"),  # type: ignore[arg-type]
        lambda: node_function("a", policy="never")(test_a_policy_is_checked_where_it_is_declared),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="policy is 'never'; it is one of rerun, ask, fail"):
            declare()


NODES = """
from framework.runner import node_function

@node_function("pay", effects=True)
def pay(): return 1

@node_function("look")
def look(): return 2

NODES = {"again": pay}
"""


def test_functions_of_a_folder_declare_it_with_their_decorator(tmp_path: Path) -> None:
    (tmp_path / "nodes.py").write_text(NODES)
    nodes = [{"id": name, "node_type": "function"} for name in ("pay", "look", "again")]
    graph = {"id": "g", "goal_id": "g", "entry_node": "pay", "nodes": nodes, "edges": []}
    goal = {"id": "g", "name": "G", "description": "d"}
    (tmp_path / "agent.json").write_text(json.dumps({"graph": graph, "goal": goal}))
    with AgentRunner.load(tmp_path) as runner:
        assert {name: node.policy for name, node in runner.node_registry.items()} == {
            "pay": "ask",
            "look": "rerun",
            "again": "ask",
        }
    assert policy_of(print) is None


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["function", "tool_use"])
@pytest.mark.parametrize(
    ("how", "value", "times"),
    [({"done": "receipt 17"}, "receipt 17", 1), ({"redo": True}, "receipt 2", 2), ({"skip": True}, None, 1)],
)
async def test_a_function_step_of_a_plan_is_asked_about(kind: str, how: dict[str, Any], value: Any, times: int) -> None:
    bank, places = Bank(), Places(URL)
    executor = places.process()
    executor.register_function("pay", bank.pay, effects=True)
    action = {"function": {"function_name": "pay"}, "tool_use": {"tool_name": "pay"}}[kind]
    work = plan(step("a"))
    work.steps[0].action = work.steps[0].action.model_validate({"action_type": kind, **action})
    await cut_off(bank, lambda: executor.execute_plan(work, GOAL, run_id="run"))
    paused = await executor.execute_plan(None, GOAL, run_id="run")
    assert (paused.status, len(bank.paid)) == (ExecutionStatus.AWAITING_APPROVAL, 1)
    manager = CheckpointManager(places.store)
    [call] = manager.journal("run")
    name = {"function": "function:pay", "tool_use": "tool:pay"}[kind]
    assert (call.name, call.state, call.policy, call.key) == (name, "unknown", "ask", bank.paid[0][1])
    manager.settle("run", call.id, **how)
    result = await executor.execute_plan(None, GOAL, run_id="run")
    assert (result.status, result.results["result"], len(bank.paid)) == (ExecutionStatus.COMPLETED, value, times)
    assert bank.inside == [key for _, key in bank.paid]
    assert len(set(bank.paid)) == 1


async def test_a_function_step_that_says_nothing_is_called_again() -> None:
    bank, places = Bank(), Places(URL)
    executor = places.process({"keep_journal": True})
    executor.register_function("pay", bank.pay, effects=True)
    executor.register_function("pay", bank.pay)  # the last one counts
    await cut_off(bank, lambda: executor.execute_plan(plan(step("a", call="pay")), GOAL, run_id="run"))
    result = await executor.execute_plan(None, GOAL, run_id="run")
    assert (result.results["result"], len(bank.paid)) == ("receipt 2", 2)
    assert CheckpointManager(places.store).journal("run") == []


@pytest.mark.parametrize("policy", [None, "rerun"])
async def test_of_a_function_that_says_nothing_the_tool_of_its_name_does(policy: ToolPolicy | None) -> None:
    bank, places = Bank(), Places(URL)
    executor = places.process()
    executor.register_tool(Tool("pay", "Pays.", effects=True))
    executor.register_function("pay", bank.pay, policy=policy)
    work = plan(step("a"))
    work.steps[0].action = work.steps[0].action.model_validate({"action_type": "tool_use", "tool_name": "pay"})
    await cut_off(bank, lambda: executor.execute_plan(work, GOAL, run_id="run"))
    result = await executor.execute_plan(None, GOAL, run_id="run")
    expected = ExecutionStatus.AWAITING_APPROVAL if policy is None else ExecutionStatus.COMPLETED
    assert (result.status, len(bank.paid)) == (expected, 1 if policy is None else 2)


async def test_with_fail_a_function_step_fails_until_it_is_settled() -> None:
    bank, places = Bank(), Places(URL)
    executor = places.process()
    executor.register_function("pay", bank.pay, policy="fail")
    await cut_off(bank, lambda: executor.execute_plan(plan(step("a", call="pay")), GOAL, run_id="run"))
    failed = await executor.execute_plan(None, GOAL, run_id="run")
    assert failed.status is not ExecutionStatus.COMPLETED
    assert "'a#1/1'" in str(failed.error or failed.feedback)
    manager = CheckpointManager(places.store)
    manager.settle("run", "a#1/1", done="receipt 17")
    done = await executor.execute_plan(None, GOAL, run_id="run")
    assert (done.status, done.results["result"], len(bank.paid)) == (ExecutionStatus.COMPLETED, "receipt 17", 1)


# --- a process that is killed ---------------------------------------------------------------------------------------


async def test_payments_of_a_process_that_was_killed_are_asked_about_and_not_made_again(tmp_path: Path) -> None:
    url, ledger = f"sqlite:///{tmp_path}/runs.db", tmp_path / "ledger"
    killed, _ = await asyncio.to_thread(program, str(PROGRAM), url, str(ledger))
    assert killed == -signal.SIGKILL
    assert sorted(ledger.read_text().splitlines()) == ["graph/pay#1", "plan/pay"]
    with open_storage(url) as storage:
        process = Process(storage, ledger, dies=False)
        graph, carried = await process.both()
        assert (graph.paused_at, carried.status) == ("pay", ExecutionStatus.AWAITING_APPROVAL)
        for run_id, key in (("graph", "graph/pay#1"), ("plan", "plan/pay")):
            [call] = process.manager.journal(run_id)
            assert (call.state, call.name, call.key) == ("unknown", "function:pay", key)
        code, screen = await asyncio.to_thread(program, "-m", "framework", "runs", "show", "plan", "--storage", url)
        assert code == 0
        assert "runs settle plan 'pay#1/1' --done" in screen
        settle = ("-m", "framework", "runs", "settle", "graph", "pay#1/1", "--done", '"receipt 17"', "--storage", url)
        assert (await asyncio.to_thread(program, *settle))[0] == 0
        process.manager.settle("plan", "pay#1/1", redo=True)
        graph, carried = await process.both()
        assert (graph.output["result"], carried.results["result"]) == ("receipt 17", "receipt 3")
    assert ledger.read_text().splitlines()[2:] == ["plan/pay"]


def program(*words: str) -> tuple[int, str]:
    """A Python program in a process of its own: how it ended, and what it said."""
    environment = {**os.environ, "PYTHONPATH": str(CORE)}
    done = forks.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout + done.stderr
