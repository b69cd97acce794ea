"""One visit of a node: its attempts, with time limits, back-off and a budget that survives restarts."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from framework._secrets import mask
from framework.errors import BudgetExceeded, UnknownEffect
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeResult, NodeSpec, is_infrastructure_error
from framework.graph.node_errors import failed_result
from framework.graph.spending import NOTHING, Spent
from framework.graph.suspension import Suspended
from framework.graph.time_limit import limit_for
from framework.llm.threads import GOES_ON, NOT_BEGUN, StepThreads

if TYPE_CHECKING:
    from framework.graph.journal import AttemptJournal

# Of all runs in this process, so that a resumed run too waits for what an earlier attempt left running.
_threads = StepThreads()
_RESULT = tuple((each.name, each.default) for each in fields(NodeResult))
_NAMES = tuple(name for name, _ in _RESULT)
_values_of = attrgetter(*_NAMES)


@dataclass(frozen=True, slots=True)
class Visit:
    """What the attempts of a visit came to: the last result, what that attempt took (``last``), and what all attempts
    of this process took (``spent``). One that failed ``unsettled`` has an effect that is unknown, with the policy
    ``fail``: the run ends there, as on any way on the effect would be forgotten."""

    result: NodeResult
    attempts: int
    last: Spent = NOTHING
    spent: Spent = NOTHING
    unsettled: bool = False

    def also(self, spent: Spent) -> Visit:
        """With what was spent after the last attempt, such as by asking a model for the way on."""
        return self if spent is NOTHING else replace(self, last=self.last + spent, spent=self.spent + spent)

    @property
    def error(self) -> str:
        """The node's error with the pinned count of attempts."""
        return f"failed after {self.attempts} attempts: {self.result.error or 'no reason given'}"


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed and will be followed by another."""

    attempt: int
    error: str
    spent: Spent
    delay_seconds: float


def max_attempts(spec: NodeSpec) -> int:
    """Attempts in total; 0 behaves as 1."""
    return max(1, spec.max_retries)


def delay_before(spec: NodeSpec, attempt: int, chance: float, retry_after: float | None = None) -> float:
    """Seconds to wait before ``attempt`` of a node: see ``backoff_seconds``.

    What the provider asked for, ``retry_after``, comes first, at most ``retry_after_max_seconds`` of it; the back-off
    is added, so that many nodes that were told the same do not all come back at once.
    """
    delay = backoff_seconds(spec.retry_delay_seconds, spec.retry_max_delay_seconds, attempt, chance)
    return delay + min(max(retry_after or 0.0, 0.0), spec.retry_after_max_seconds)


def backoff_seconds(first: float, longest: float, attempt: int, chance: float) -> float:
    """Seconds to wait before ``attempt`` (2, 3 ...): exponential with full jitter in its upper half.

    ``chance`` in 0..1 spreads retries of many runs apart (Brooker, "Exponential Backoff And Jitter", AWS 2015).
    """
    ceiling = min(longest, first * 2.0 ** min(attempt - 2, 30))
    return ceiling * (0.5 + chance / 2)


def should_retry(spec: NodeSpec, result: NodeResult) -> bool:
    """Whether this failure is worth another attempt.

    ``retry_on`` decides by the error's type and names or by words of its message; when it is empty, any error is, but
    for one that is known to be permanent. A permanent one is retried only when ``retry_on`` names it.
    """
    named = any(word == result.error_type or word in result.error_names for word in spec.retry_on)
    if named or result.transient is False:
        return named
    if not spec.retry_on:
        return True
    error = (result.error or "").lower()
    return any(word.lower() in error for word in spec.retry_on if word)


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
    step: object = None,
) -> Visit:
    """Attempt the node until it succeeds or its budget is used up.

    ``failed_before`` attempts were made by earlier processes. Writes of a failed attempt are taken back; changes it
    made inside containers are not (they are shared by reference). Cancellation passes through, writes taken back, and
    so does `Suspended`, also after a last attempt that failed with an effect unknown. The journal of the last attempt
    is left open, for what follows a success.
    An attempt is not begun while a thread of an earlier one of the same ``step`` (a key; None: of this visit) asks a
    model or runs a tool, so no effect overlaps with its own repetition.
    """
    step = step if step is not None else object()
    limit = max_attempts(spec)
    attempt = min(failed_before + 1, limit)
    total = NOTHING
    while True:
        snapshot = memory.snapshot()
        ctx = context(attempt)
        journal = ctx.journal
        if journal is not None:
            await journal.begin()
        if attempt == failed_before + 1:
            for message in await _invalid(implementation, ctx):
                on_invalid(message)
        try:
            if journal is None:
                result = await _attempt(spec, implementation, ctx, step)
            else:
                result = await _journaled(spec, implementation, ctx, step, journal)
        except BaseException:
            memory.roll_back(snapshot)
            raise
        spent = Spent.of_result(result)
        if journal is not None:
            spent = journal.of_attempt(spent)
        total += spent
        if result.success:
            return Visit(result, attempt, spent, total)
        memory.roll_back(snapshot)
        last = attempt >= limit or not should_retry(spec, result)
        if journal is not None:
            try:
                await journal.failed(last=last)
            except UnknownEffect as error:
                return Visit(_naming(error, result), attempt, spent, total, unsettled=True)
        if last:
            return Visit(result, attempt, spent, total)
        delay = delay_before(spec, attempt + 1, chance(), result.retry_after)
        await on_failed(FailedAttempt(attempt, result.error or "no reason given", spent, delay))
        await asyncio.sleep(delay)
        attempt += 1


def _naming(unknown: UnknownEffect, result: NodeResult) -> NodeResult:
    """The failed result with the call whose effect is unknown, first: nothing goes on before that is known."""
    found = failed_result(unknown)
    if result.error and result.error != found.error:
        found.error = f"{found.error} The attempt ended with: {result.error}"
    return found


async def _invalid(implementation: Any, ctx: NodeContext) -> list[str]:
    """What the node says of its input. Only reported: the node runs all the same, and says itself what it lacks."""
    validate = getattr(implementation, "validate_input", None)
    if validate is None:
        return []
    try:
        messages = validate(ctx)
        if type(messages) is not list and inspect.isawaitable(messages):
            messages = await messages
        return [messages] if isinstance(messages, str) else [str(message) for message in messages or ()]
    except Exception as error:  # a node's own check may raise anything; it is reported like its messages
        return [f"validate_input raised {type(error).__name__}: {error}"]


async def _journaled(
    spec: NodeSpec, implementation: Any, ctx: NodeContext, step: object, journal: AttemptJournal
) -> NodeResult:
    """One attempt whose calls are journaled. A step that waits is suspended, whatever its node made of that."""
    try:
        result = await _attempt(spec, implementation, ctx, step)
    except Suspended:
        await journal.over()
        raise
    except BaseExceptionGroup as group:  # a task group passes it on in one
        if group.split(Suspended)[0] is None:
            journal.close()
            raise
        await journal.over()
        raise
    except BudgetExceeded as error:
        await journal.stop(error)  # what is in flight is paid for
        raise
    except BaseException:
        journal.close()
        raise
    await journal.over()
    if result.success:
        try:
            await journal.settled()
        except UnknownEffect as error:
            return failed_result(error)
    return result


async def _attempt(spec: NodeSpec, implementation: Any, ctx: NodeContext, step: object) -> NodeResult:
    """One attempt; whatever it raises, but for cancellation and the end of the process, is a failed result."""
    limit = limit_for(spec.timeout_seconds)
    try:
        if limit is None:
            result = await _executed(implementation, ctx, step)
        else:
            if ctx.journal is not None:
                ctx.journal.limit, limit.works = limit, ctx.journal.works
            async with limit:
                result = await _executed(implementation, ctx, step)
    except Exception as error:  # a node may raise anything; it is recorded, retried and reported, not hidden
        if isinstance(error, TimeoutError) and limit is not None and limit.expired():
            text = f"timed out after {spec.timeout_seconds:g} s"
            if (said := str(error.__cause__ or "")) in (GOES_ON, NOT_BEGUN):
                text = f"{text}; {said}"
            return NodeResult(False, error=text, error_type="timeout", error_names=("timeout", "TimeoutError"))
        if is_infrastructure_error(error):
            raise
        return failed_result(error)
    return _checked(spec, result)


async def _executed(implementation: Any, ctx: NodeContext, step: object) -> Any:
    await _threads.earlier(step)
    with _threads.working_on(step):
        return await implementation.execute(ctx)


def _checked(spec: NodeSpec, returned: Any) -> NodeResult:
    """What the node returned, as a `NodeResult` that is safe to use; anything else is a failed one that says so."""
    problem = ""
    if not hasattr(returned, "success") or not isinstance(getattr(returned, "output", ""), dict | None):
        problem = f"returned {type(returned).__name__}, not a NodeResult with a dict as its output"
    else:
        # A class of the node's own may lack what has a default.
        values: dict[str, Any] = (
            dict(zip(_NAMES, _values_of(returned), strict=True))
            if type(returned) is NodeResult
            else {name: getattr(returned, name, default) for name, default in _RESULT}
        )
        values["error"] = mask(str(values["error"])) if values["error"] else values["error"]
        try:
            values["tokens_used"] = int(values["tokens_used"] or 0)
            values["latency_ms"] = int(values["latency_ms"] or 0)
            values["output_tokens"], values["cost"] = int(values["output_tokens"] or 0), float(values["cost"] or 0)
            values["output"] = values["output"] or {}
            return NodeResult(**values)
        except (TypeError, ValueError, OverflowError) as error:
            problem = f"returned tokens, latency_ms or cost that are no numbers ({error})"
    return NodeResult(False, error=f"node {spec.id!r} {problem}", error_type="invalid_result")
