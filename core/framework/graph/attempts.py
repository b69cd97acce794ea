"""One visit of a node: its attempts, with time limits, back-off and a budget that survives restarts."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import Any

from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeResult, NodeSpec, is_infrastructure_error


@dataclass(frozen=True, slots=True)
class Visit:
    """What the attempts of a visit came to: the last result and the totals over all attempts of this process."""

    result: NodeResult
    attempts: int
    tokens: int
    latency_ms: int

    @property
    def error(self) -> str:
        """The node's error with the pinned count of attempts."""
        return f"failed after {self.attempts} attempts: {self.result.error or 'no reason given'}"


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed and will be followed by another."""

    attempt: int
    error: str
    tokens: int
    latency_ms: int
    delay_seconds: float


def max_attempts(spec: NodeSpec) -> int:
    """Attempts in total; 0 behaves as 1."""
    return max(1, spec.max_retries)


def delay_before(spec: NodeSpec, attempt: int, chance: float) -> float:
    """Seconds to wait before ``attempt`` of a node: see ``backoff_seconds``."""
    return backoff_seconds(spec.retry_delay_seconds, spec.retry_max_delay_seconds, attempt, chance)


def backoff_seconds(first: float, longest: float, attempt: int, chance: float) -> float:
    """Seconds to wait before ``attempt`` (2, 3 ...): exponential with full jitter in its upper half.

    ``chance`` in 0..1 spreads retries of many runs apart (Brooker, "Exponential Backoff And Jitter", AWS 2015).
    """
    ceiling = min(longest, first * 2.0 ** min(attempt - 2, 30))
    return ceiling * (0.5 + chance / 2)


def should_retry(spec: NodeSpec, result: NodeResult) -> bool:
    """Whether ``retry_on`` lets this failure be retried: all when empty, else by error type or words of the error."""
    if not spec.retry_on:
        return True
    error = (result.error or "").lower()
    return any(word == result.error_type or word.lower() in error for word in spec.retry_on if word)


async def run_visit(
    spec: NodeSpec,
    implementation: Any,
    memory: SharedMemory,
    context: Callable[[int], NodeContext],
    *,
    failed_before: int,
    on_failed: Callable[[FailedAttempt], Awaitable[None]],
    on_invalid: Callable[[str], None],
    chance: Callable[[], float] = random.random,
) -> Visit:
    """Attempt the node until it succeeds or its budget is used up.

    ``failed_before`` attempts were made by earlier processes. Writes of a failed attempt are taken back; changes it
    made inside containers are not (they are shared by reference). Cancellation passes through, writes taken back.
    """
    limit = max_attempts(spec)
    attempt = min(failed_before + 1, limit)
    tokens = latency_ms = 0
    while True:
        snapshot = memory.snapshot()
        ctx = context(attempt)
        if attempt == failed_before + 1:
            for message in await _invalid(implementation, ctx):
                on_invalid(message)
        try:
            result = await _attempt(spec, implementation, ctx)
        except BaseException:
            memory.roll_back(snapshot)
            raise
        used, took = int(result.tokens_used or 0), int(result.latency_ms or 0)
        tokens += used
        latency_ms += took
        if result.success:
            return Visit(result, attempt, tokens, latency_ms)
        memory.roll_back(snapshot)
        if attempt >= limit or not should_retry(spec, result):
            return Visit(result, attempt, tokens, latency_ms)
        delay = delay_before(spec, attempt + 1, chance())
        await on_failed(FailedAttempt(attempt, result.error or "no reason given", used, took, delay))
        await asyncio.sleep(delay)
        attempt += 1


async def _invalid(implementation: Any, ctx: NodeContext) -> list[str]:
    """What the node says of its input. Only reported: the node runs all the same, and says itself what it lacks."""
    validate = getattr(implementation, "validate_input", None)
    if validate is None:
        return []
    try:
        messages = validate(ctx)
        if inspect.isawaitable(messages):
            messages = await messages
        return [messages] if isinstance(messages, str) else [str(message) for message in messages or ()]
    except Exception as error:  # a node's own check may raise anything; it is reported like its messages
        return [f"validate_input raised {type(error).__name__}: {error}"]


async def _attempt(spec: NodeSpec, implementation: Any, ctx: NodeContext) -> NodeResult:
    """One attempt; whatever it raises, but for cancellation and the end of the process, is a failed result."""
    try:
        async with asyncio.timeout(spec.timeout_seconds) as limit:
            result = await implementation.execute(ctx)
    except TimeoutError as error:
        if limit.expired():
            return NodeResult(False, error=f"timed out after {spec.timeout_seconds:g} s", error_type="timeout")
        return NodeResult(False, error=_text(error), error_type=type(error).__name__)
    except Exception as error:  # a node may raise anything; it is recorded, retried and reported, not hidden
        if is_infrastructure_error(error):
            raise
        return NodeResult(False, error=_text(error), error_type=type(error).__name__)
    return _checked(spec, result)


def _checked(spec: NodeSpec, returned: Any) -> NodeResult:
    """What the node returned, as a `NodeResult` that is safe to use; anything else is a failed one that says so."""
    problem = ""
    if not hasattr(returned, "success") or not isinstance(getattr(returned, "output", ""), dict | None):
        problem = f"returned {type(returned).__name__}, not a NodeResult with a dict as its output"
    else:
        # A class of the node's own may lack what has a default.
        values: dict[str, Any] = {each.name: getattr(returned, each.name, each.default) for each in fields(NodeResult)}
        try:
            values["tokens_used"] = int(values["tokens_used"] or 0)
            values["latency_ms"] = int(values["latency_ms"] or 0)
            return NodeResult(**{**values, "output": values["output"] or {}})
        except (TypeError, ValueError, OverflowError) as error:
            problem = f"returned tokens_used or latency_ms that are no numbers ({error})"
    return NodeResult(False, error=f"node {spec.id!r} {problem}", error_type="invalid_result")


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
