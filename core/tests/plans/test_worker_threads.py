"""Threads of steps: what becomes of one that nobody waits for any more, and that no step ever has two."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.plan import ActionSpec, ExecutionStatus, Judgment, JudgmentAction, Plan, PlanStep
from framework.graph.worker_node import AttemptInfo, WorkerNode
from framework.llm.provider import Tool
from framework.runtime.core import Runtime


def step(kind: str, **action: Any) -> PlanStep:
    spec = ActionSpec.model_validate({"action_type": kind, **action})
    return PlanStep(id="s", description="work", action=spec)


def worker(**parts: Any) -> WorkerNode:
    return WorkerNode(MagicMock(spec=Runtime), **parts)


class Slow:
    """A function that returns when it is let go, and knows how many of its calls ran at once."""

    def __init__(self) -> None:
        self.began, self.calls, self.at_once, self._inside = threading.Semaphore(0), 0, 0, 0
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, x: Any = None) -> int:
        with self._lock:
            self.calls += 1
            number = self.calls
            self._inside += 1
            self.at_once = max(self.at_once, self._inside)
        self.began.release()
        try:
            assert self.go.wait(30)
            return number
        finally:
            with self._lock:
                self._inside -= 1


@contextmanager
def slow_function() -> Iterator[Slow]:
    slow = Slow()
    try:
        yield slow
    finally:
        slow.go.set()


async def begun(slow: Slow) -> None:
    assert await asyncio.to_thread(slow.began.acquire, timeout=30)


async def cancelled(attempt: asyncio.Task[Any]) -> str:
    """Stop the wait for an attempt, as a time limit does; what the error says."""
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await attempt
    return str(caught.value)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


FUNCTION = step("function", function_name="f")
RUN = AttemptInfo(run_id="r")


async def test_the_next_attempt_waits_for_the_thread_of_the_one_before() -> None:
    with slow_function() as slow:
        node = worker(functions={"f": slow})
        first = asyncio.create_task(node.execute(FUNCTION, {}, info=RUN))
        await begun(slow)
        assert "goes on" in await cancelled(first)
        assert node.resources.threads.is_running(("r", "s"))

        second = asyncio.create_task(node.execute(FUNCTION, {}, info=RUN))
        await turns()
        assert slow.calls == 1, "it waits"
        assert "an earlier attempt still runs" in await cancelled(second)

        third = asyncio.create_task(node.execute(FUNCTION, {}, info=RUN))
        await turns()
        slow.go.set()
        assert (await third).outputs == {"result": 2}
        assert (slow.calls, slow.at_once) == (2, 1)
        assert not node.resources.threads.is_running(("r", "s"))


async def test_a_time_limit_tells_why() -> None:
    async def expire(limit: asyncio.Timeout, *, at_work: bool) -> None:
        if at_work:
            await begun(slow)
        await turns()
        limit.reschedule(0)

    with slow_function() as slow:
        node = worker(functions={"f": slow})
        for words in ("cannot be stopped and goes on", "an earlier attempt still runs"):
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(None) as limit:
                    expiry = asyncio.create_task(expire(limit, at_work=slow.calls == 0))
                    await node.execute(FUNCTION, {}, info=RUN)
            await expiry
            assert words in str(caught.value.__cause__)
        assert slow.calls == 1


async def test_a_plan_whose_step_is_late_retries_it_without_an_overlap() -> None:
    class Patient:
        """Lets the function go after the second attempt, which could not begin."""

        async def evaluate(self, step: PlanStep, result: Any, goal: Goal, context: Any = None) -> Judgment:
            kinds.append(result["error_type"])
            if len(kinds) == 2:
                slow.go.set()
            action = JudgmentAction.ACCEPT if result["success"] else JudgmentAction.RETRY
            return Judgment(action=action, reasoning="")

    kinds: list[str | None] = []
    with slow_function() as slow:
        config = ExecutorConfig(timeout_seconds=0.1, retry_delay_seconds=0, max_retries_per_step=20)
        judge: Any = Patient()
        executor = FlexibleGraphExecutor(MagicMock(spec=Runtime), functions={"f": slow}, judge=judge, config=config)
        plan = Plan.from_json({"steps": [{"id": "s", "action": {"function_name": "f"}}]})
        result = await executor.execute_plan(plan, Goal(id="g", name="G", description="d"))
    assert result.status is ExecutionStatus.COMPLETED
    assert kinds[:2] == ["timeout", "timeout"]
    assert kinds[-1] is None
    assert (slow.calls, slow.at_once) == (2, 1)


@pytest.mark.parametrize("kind", ["tool function", "tool", "model", "sub-graph", "code", "async after sync"])
async def test_no_kind_of_work_overlaps_with_its_own_earlier_attempt(kind: str) -> None:
    with slow_function() as slow:

        async def later(**_: Any) -> int:
            return slow(None)

        sandbox = MagicMock()
        sandbox.execute = lambda *_: SimpleNamespace(success=True, result=slow(), variables={})
        node = worker(
            functions={"f": slow},
            tools=[Tool("t", "")],
            tool_executor=slow,
            llm=SimpleNamespace(complete=lambda **_: SimpleNamespace(content=str(slow()))),
            sub_graph_executor=lambda *_: SimpleNamespace(success=True, output={"result": slow()}, error=None),
            sandbox=sandbox,
        )
        work = {
            "tool function": step("tool_use", tool_name="f"),
            "tool": step("tool_use", tool_name="t"),
            "model": step("llm_call", prompt="x"),
            "sub-graph": step("sub_graph", graph_id="g"),
            "code": step("code_execution", code="result = 1"),
        }.get(kind, FUNCTION)
        first = asyncio.create_task(node.execute(work, {}, info=RUN))
        await begun(slow)
        await cancelled(first)
        if kind == "async after sync":
            node.register_function("f", later)
        second = asyncio.create_task(node.execute(work, {}, info=RUN))
        await turns()
        assert slow.calls == 1
        slow.go.set()
        assert (await second).outputs["result"] == 2
        assert slow.at_once == 1


async def test_other_steps_other_runs_and_runs_without_an_id_wait_for_nothing() -> None:
    with slow_function() as slow:
        node = worker(functions={"f": slow})
        other = FUNCTION.model_copy(update={"id": "other"})
        attempts = []
        for work, info in ((FUNCTION, RUN), (other, RUN), (FUNCTION, AttemptInfo(run_id="r2")), (FUNCTION, None)):
            attempts.append(asyncio.create_task(node.execute(work, {}, info=info)))
        attempts.append(asyncio.create_task(node.execute(FUNCTION, {})))
        for _ in attempts:
            await begun(slow)
        slow.go.set()
        assert all(result.success for result in await asyncio.gather(*attempts))
        assert slow.at_once == len(attempts)


async def test_the_arguments_are_taken_before_the_wait() -> None:
    """What was approved is what is run, whatever changes the context while an earlier thread is waited for."""
    seen: list[Any] = []
    with slow_function() as slow:
        node = worker(functions={"f": slow, "look": lambda value: seen.append(value)})
        first = asyncio.create_task(node.execute(FUNCTION, {}, info=RUN))
        await begun(slow)
        await cancelled(first)
        context = {"x": [1]}
        look = step("function", function_name="look", function_args={"value": "$x"})
        second = asyncio.create_task(node.execute(look, context, info=RUN))
        await turns()
        context["x"].append(2)
        slow.go.set()
        await second
    assert seen == [[1]]


@pytest.mark.parametrize(
    ("error", "text"),
    [(StopIteration("no more"), "StopIteration"), (SystemExit(3), "sys.exit(3)"), (ValueError("bad"), "bad")],
)
async def test_whatever_a_function_raises_in_its_thread_is_a_result(error: BaseException, text: str) -> None:
    def fail() -> None:
        raise error

    result = await worker(functions={"f": fail}).execute(FUNCTION, {}, info=RUN)
    assert result.error_type == "function_exception"
    assert text in str(result.error)


async def test_a_function_in_a_thread_sees_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    result = await worker(functions={"f": variable.get}).execute(FUNCTION, {}, info=RUN)
    assert result.outputs == {"result": 7}


async def test_a_system_without_room_for_a_thread_fails_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    node = worker(functions={"f": lambda: 1})
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        result = await node.execute(FUNCTION, {}, info=RUN)
    assert "can't start new thread" in str(result.error)
    assert (await node.execute(FUNCTION, {}, info=RUN)).success
