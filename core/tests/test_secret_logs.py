"""What the library logs of other people's exceptions: the traceback, without secrets, also where nobody filters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework import _secrets
from framework.graph.edge import GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import ExecutionStatus, Plan
from framework.graph.run_events import RunEvent
from framework.graph.run_messages import Inbox
from framework.graph.runtime_port import RuntimePort
from framework.graph.worker_node import WorkerNode
from framework.llm.provider import Tool, ToolUse
from framework.runner.tool_registry import ToolRegistry
from framework.runtime import Runtime
from framework.runtime.events import EventHub
from framework.schemas.run import Run
from framework.storage.memory import MemoryStorage
from framework.storage.records import NO_TOKEN, Message

SECRET = "sk-very-secret-value"
GOAL = Goal(id="g", name="G", description="d")
GRAPH = {"id": "g", "goal_id": "g", "entry_node": "n", "nodes": [{"id": "n", "node_type": "function"}], "edges": []}


@pytest.fixture(autouse=True)
def _secret() -> Iterator[None]:
    _secrets.register_secret(SECRET)
    yield
    _secrets.forget_secrets()


def leak(*_: Any, **__: Any) -> Any:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ValueError(f"401 for key {SECRET}") from error


def assert_told(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of ``leak`` and its cause are in the log, as any handler would print it, and the secret is not."""
    text = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert SECRET not in text
    assert "ValueError: 401 for key ***" in text
    assert "KeyError" in text
    assert "in leak" in text


def test_a_masked_traceback_has_the_causes_and_no_secret() -> None:
    with pytest.raises(ValueError, match="401") as caught:
        leak()
    text = _secrets.masked_traceback(caught.value)
    assert SECRET not in text
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("ValueError: 401 for key ***")
    assert "KeyError: '***'" in text


async def test_a_callback_for_approvals(caplog: pytest.LogCaptureFixture) -> None:
    runtime = MagicMock(spec=Runtime)
    executor = FlexibleGraphExecutor(runtime, approval_callback=leak)
    executor.register_function("f", lambda: 1)
    plan = Plan.from_json({"steps": [{"id": "s", "action": {"function_name": "f"}, "requires_approval": True}]})
    result = await executor.execute_plan(plan, GOAL)
    assert result.status is ExecutionStatus.AWAITING_APPROVAL
    assert SECRET not in repr(result)
    assert SECRET not in repr(runtime.mock_calls)
    assert_told(caplog)


@pytest.mark.parametrize("before", [170, 185, 190])
async def test_a_long_message_is_masked_before_it_is_cut(before: int) -> None:
    def callback(_: Any) -> Any:
        raise ValueError("x" * before + " " + SECRET)

    runtime = MagicMock(spec=Runtime)
    executor = FlexibleGraphExecutor(runtime, approval_callback=callback)
    executor.register_function("f", lambda: 1)
    plan = Plan.from_json({"steps": [{"id": "s", "action": {"function_name": "f"}, "requires_approval": True}]})
    result = await executor.execute_plan(plan, GOAL)
    assert "sk-" not in repr(result) + repr(runtime.mock_calls)
    assert "xxx" in repr(runtime.mock_calls)


async def test_an_unexpected_error_of_a_graphs_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        start_run = MagicMock(return_value="r")
        end_run = MagicMock()
        report_problem = MagicMock()
        recording = leak

    executor = GraphExecutor(Broken())
    executor.register_function("n", lambda: 1)
    with pytest.raises(ValueError, match="401"):  # of the caller's own runtime, once more at the end
        await executor.execute(GraphSpec.model_validate(GRAPH), GOAL, {})
    assert_told(caplog)


async def test_an_unexpected_error_of_a_plans_run(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        start_run = MagicMock(return_value="r")
        end_run = MagicMock()
        report_problem = MagicMock()
        recording = leak

    executor = FlexibleGraphExecutor(Broken(), config=ExecutorConfig())
    executor.register_function("f", lambda: 1)
    with pytest.raises(ValueError, match="401"):
        await executor.execute_plan(Plan.from_json({"steps": [{"id": "s", "action": {"function_name": "f"}}]}), GOAL)
    assert_told(caplog)


@pytest.mark.parametrize("method", ["end_run", "report_problem"])
async def test_a_runtime_that_fails(method: str, caplog: pytest.LogCaptureFixture) -> None:
    port = RuntimePort(MagicMock(**{f"{method}.side_effect": leak}))
    if method == "end_run":
        await port.end(True, "", {})
    else:
        port.problem("warning", f"about {SECRET}")
    assert_told(caplog)


@pytest.mark.parametrize("method", ["decide", "record_outcome"])
async def test_a_runtime_that_fails_at_a_step(method: str, caplog: pytest.LogCaptureFixture) -> None:
    worker = WorkerNode(MagicMock(**{f"{method}.side_effect": leak}), functions={"f": lambda: 1})
    [step] = Plan.from_json({"steps": [{"id": "s", "action": {"function_name": "f"}}]}).steps
    assert (await worker.execute(step, {})).success
    assert_told(caplog)


def test_a_store_that_fails_to_save_the_document(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryStorage):
        def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
            leak()

    with Full() as storage:
        runtime = Runtime(storage)
        runtime.start_run(goal_id="g", goal_description="d", input_data={})
        runtime.end_run(success=True, narrative="", output_data={})
    assert_told(caplog)


def test_a_listener_to_events(caplog: pytest.LogCaptureFixture) -> None:
    listeners = EventHub()
    listeners.add(leak)
    listeners.emit(RunEvent("run_started", "r"))
    assert_told(caplog)


async def test_a_listener_to_messages(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox("r", 1)
    inbox.on_message(leak)
    inbox.deliver([Message("r", "m", b"", 0.0)])
    await asyncio.sleep(0)
    assert_told(caplog)


def test_a_tool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    registry = ToolRegistry()
    registry.register("f", Tool("f", ""), leak)
    assert registry.get_executor()(ToolUse("1", "f", {})).is_error
    assert_told(caplog)


SOURCES: Sequence[Path] = sorted((Path(__file__).parents[1] / "framework").rglob("*.py"))


def test_no_log_call_prints_a_traceback_as_it_is() -> None:
    """``exc_info`` and ``logger.exception`` reach the handlers of the program around, which need not filter."""
    found = [path.name for path in SOURCES if path.name != "_secrets.py" and "exc_info" in path.read_text("utf-8")]
    found += [path.name for path in SOURCES if "logger.exception(" in path.read_text("utf-8")]
    assert found == []
    assert len(SOURCES) > 100
