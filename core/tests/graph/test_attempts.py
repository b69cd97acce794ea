"""One visit of a node: attempts, back-off, time limits, and what a failed attempt leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import LeaseLost, StorageError
from framework.graph.attempts import FailedAttempt, Visit, delay_before, max_attempts, run_visit, should_retry
from framework.graph.memory import SharedMemory
from framework.graph.node import NodeContext, NodeResult, NodeSpec


class Body:
    """A node whose attempts do what is given, one after another; the last one again and again."""

    def __init__(self, *acts: Callable[[NodeContext], Any]) -> None:
        self.acts = acts
        self.attempts: list[int] = []

    async def execute(self, ctx: NodeContext) -> Any:
        self.attempts.append(ctx.attempt)
        value = self.acts[min(len(self.attempts), len(self.acts)) - 1](ctx)
        return await value if asyncio.iscoroutine(value) else value


def fail(ctx: NodeContext) -> NodeResult:
    return NodeResult(False, error="no", tokens_used=2, latency_ms=5)


def succeed(ctx: NodeContext) -> NodeResult:
    return NodeResult(True, {"x": 1}, tokens_used=3, latency_ms=7)


def boom(ctx: NodeContext) -> NodeResult:
    raise ValueError("boom")


class Visiting:
    """Calls ``run_visit`` and keeps what it tells."""

    def __init__(self) -> None:
        self.memory = SharedMemory()
        self.failed: list[FailedAttempt] = []
        self.invalid: list[str] = []

    async def __call__(self, body: Any, failed_before: int = 0, **fields: Any) -> Visit:
        spec = NodeSpec.model_validate({"id": "n", "retry_delay_seconds": 1, **fields})

        def context(attempt: int) -> NodeContext:
            return NodeContext(None, "n", spec, self.memory, attempt=attempt, max_attempts=max_attempts(spec))

        async def on_failed(attempt: FailedAttempt) -> None:
            self.failed.append(attempt)

        return await run_visit(
            spec,
            body,
            self.memory,
            context,
            failed_before=failed_before,
            on_failed=on_failed,
            on_invalid=self.invalid.append,
            chance=lambda: 1.0,
        )


@pytest.fixture
def visit() -> Visiting:
    return Visiting()


@pytest.fixture
def sleep() -> Iterator[AsyncMock]:
    with patch("asyncio.sleep", AsyncMock()) as mock:
        yield mock


async def test_the_first_success_ends_the_visit(visit: Visiting, sleep: AsyncMock) -> None:
    body = Body(fail, boom, succeed)
    made = await visit(body, max_retries=5)
    assert made.result.output == {"x": 1}
    assert (made.attempts, made.spent.tokens, made.spent.latency_ms) == (3, 5, 12)
    assert body.attempts == [1, 2, 3]
    assert [(each.attempt, each.error, each.spent.tokens, each.delay_seconds) for each in visit.failed] == [
        (1, "no", 2, 1.0),
        (2, "boom", 0, 2.0),
    ]
    assert [call.args for call in sleep.await_args_list] == [(1.0,), (2.0,)]


async def test_the_last_failure_ends_the_visit(visit: Visiting, sleep: AsyncMock) -> None:
    made = await visit(Body(fail), max_retries=3)
    assert not made.result.success
    assert made.error == "failed after 3 attempts: no"
    assert len(visit.failed) == 2, "the last one is the visit's result"
    assert made.spent.tokens == 6


@pytest.mark.parametrize(("retries", "expected"), [(0, 1), (-3, 1), (1, 1), (2, 2)])
async def test_no_retries_are_one_attempt(visit: Visiting, sleep: AsyncMock, retries: int, expected: int) -> None:
    assert (await visit(Body(fail), max_retries=retries)).attempts == expected


@pytest.mark.parametrize(("before", "expected"), [(0, [1, 2, 3]), (2, [3]), (3, [3]), (7, [3])])
async def test_attempts_of_earlier_processes_count(
    visit: Visiting, sleep: AsyncMock, before: int, expected: list[int]
) -> None:
    body = Body(fail)
    await visit(body, before, max_retries=3)
    assert body.attempts == expected


async def test_writes_of_a_failed_attempt_are_taken_back(visit: Visiting, sleep: AsyncMock) -> None:
    seen: list[Any] = []

    def dirty(ctx: NodeContext) -> NodeResult:
        seen.append(ctx.memory.read("half"))
        ctx.memory.write("half", 1)
        return NodeResult(False, error="no")

    await visit(Body(dirty), max_retries=2)
    assert seen == [None, None]
    assert visit.memory.read_all() == {}


@pytest.mark.parametrize(
    ("retry_on", "act", "attempts"),
    [
        ([], boom, 3),
        (["ValueError"], boom, 3),
        (["boom"], boom, 3),
        (["BOOM"], boom, 3),
        (["KeyError"], boom, 1),
        ([""], boom, 1),
        (["timeout"], fail, 1),
    ],
)
async def test_retry_on_chooses_what_is_retried(
    visit: Visiting, sleep: AsyncMock, retry_on: list[str], act: Callable[[NodeContext], Any], attempts: int
) -> None:
    assert (await visit(Body(act), max_retries=3, retry_on=retry_on)).attempts == attempts


async def test_an_attempt_has_its_time(visit: Visiting) -> None:
    async def forever(ctx: NodeContext) -> NodeResult:
        ctx.memory.write("half", 1)
        await asyncio.Event().wait()
        raise AssertionError

    made = await visit(Body(forever, succeed), max_retries=2, timeout_seconds=0.02, retry_delay_seconds=0)
    assert made.attempts == 2
    assert made.result.success
    assert visit.failed[0].error == "timed out after 0.02 s"
    assert visit.memory.read("half") is None


async def test_a_timeout_of_the_nodes_own_is_its_own(visit: Visiting) -> None:
    def act(ctx: NodeContext) -> NodeResult:
        raise TimeoutError("upstream")

    made = await visit(Body(act), max_retries=1, timeout_seconds=5)
    assert (made.result.error, made.result.error_type) == ("upstream", "TimeoutError")


async def test_cancellation_passes_and_takes_writes_back(visit: Visiting) -> None:
    began = asyncio.Event()

    async def forever(ctx: NodeContext) -> NodeResult:
        ctx.memory.write("half", 1)
        began.set()
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(visit(Body(forever), max_retries=3))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert visit.memory.read_all() == {}
    assert visit.failed == []


@pytest.mark.parametrize("error", [StorageError("full"), LeaseLost("r", 1), KeyboardInterrupt()])
async def test_errors_of_the_store_are_no_failures_of_the_node(visit: Visiting, error: BaseException) -> None:
    def act(ctx: NodeContext) -> NodeResult:
        ctx.memory.write("half", 1)
        raise error

    body = Body(act)
    if isinstance(error, KeyboardInterrupt):
        # The loop itself would stop at it, so it is raised without one.
        with pytest.raises(KeyboardInterrupt):
            visit(body, max_retries=3).send(None)
    else:
        with pytest.raises(type(error)):
            await visit(body, max_retries=3)
    assert body.attempts == [1]
    assert visit.memory.read_all() == {}


@pytest.mark.parametrize("returned", [None, "text", {"success": True}, NodeResult(True, "text"), NodeResult(True, [1])])  # type: ignore[arg-type]
async def test_what_is_no_result_is_a_failure_that_says_so(visit: Visiting, returned: Any) -> None:
    made = await visit(Body(lambda ctx: returned), max_retries=1)
    assert not made.result.success
    assert made.result.error_type == "invalid_result"
    assert "'n'" in made.error


async def test_validation_is_told_once_and_never_stops_the_node(visit: Visiting, sleep: AsyncMock) -> None:
    body: Any = Body(fail, succeed)
    body.validate_input = lambda ctx: ["a is missing", "b is missing"]
    assert (await visit(body, max_retries=2)).result.success
    assert visit.invalid == ["a is missing", "b is missing"]

    def broken(ctx: NodeContext) -> list[str]:
        raise RuntimeError("no check")

    body.validate_input = broken
    visit.invalid.clear()
    await visit(body, max_retries=1)
    assert visit.invalid == ["validate_input raised RuntimeError: no check"]


@given(st.integers(2, 2000), st.floats(0, 1), st.floats(0, 1e6), st.floats(0, 1e6))
def test_back_off_is_bounded_and_grows(attempt: int, chance: float, first: float, longest: float) -> None:
    spec = NodeSpec(id="n", retry_delay_seconds=first, retry_max_delay_seconds=longest)
    delay = delay_before(spec, attempt, chance)
    assert 0 <= delay <= longest
    assert delay <= delay_before(spec, attempt + 1, chance)
    assert delay_before(spec, attempt, 0.0) <= delay <= delay_before(spec, attempt, 1.0)
    assert delay >= min(longest, first) / 2


def test_should_retry_needs_no_error_text() -> None:
    assert should_retry(NodeSpec(id="n"), NodeResult(False))
    assert not should_retry(NodeSpec(id="n", retry_on=["timeout"]), NodeResult(False))
