"""Functions of the program as calls of their step's journal: those of ``ctx.call``, and those that are a whole step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framework.graph.calls import KEY, takes_key
from framework.graph.journal import AttemptJournal, CallSpec, StepJournal, in_thread, request_hash
from framework.graph.journal_llm import JournaledLLM
from framework.graph.journal_rows import POLICIES, Policy
from framework.graph.node_base import NodeContext
from framework.llm.tool_loop import is_async


def journal_of(ctx: NodeContext) -> AttemptJournal:
    """The attempt's journal; without a checkpoint manager one that records nothing, but knows the calls' keys."""
    if ctx.journal is None:
        ctx.journal = AttemptJournal(StepJournal(ctx.step_key, ctx.idempotency_key))
    return ctx.journal


def keyed_llm(ctx: NodeContext) -> Any:
    """The attempt's model without a checkpoint manager, so that its tool calls have keys; nothing is recorded."""
    return JournaledLLM(ctx.llm, journal_of(ctx))


async def call(
    ctx: NodeContext,
    name: str,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    policy: Policy | None,
) -> Any:
    """See ``NodeContext.call``."""
    if not name:
        raise ValueError(f"ctx.call: the name is {name!r}; it has to be a text that is not empty.")
    if not callable(fn):
        raise TypeError(f"ctx.call({name!r}): {type(fn).__name__} cannot be called; give the function, not its value.")
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"ctx.call({name!r}): policy is {policy!r}; it is one of {', '.join(POLICIES)}.")
    asks_key = KEY not in kwargs and takes_key(fn)
    journal = journal_of(ctx)
    if not journal.records and not asks_key:
        return await _run(fn, *args, **kwargs)

    async def make(key: str) -> Any:
        return await _run(fn, *args, **kwargs, **({KEY: key} if asks_key else {}))

    named = {key: value for key, value in kwargs.items() if key != KEY}
    request = request_hash([list(args), dict(sorted(named.items()))], f"the arguments of ctx.call({name!r})")
    return await journal.call(name, request, make, CallSpec(policy or "rerun"))


async def call_function(
    journal: AttemptJournal, name: str, function: Callable[..., Any], arguments: Mapping[str, Any], policy: Policy
) -> Any:
    """A function that is all that its step does, with effects: a call of the journal, with the step's own key.

    A sync one runs in the event loop's thread. Raises as ``AttemptJournal.call``, and what ``function`` raises.
    """

    async def make(key: str) -> Any:
        value = function(**arguments)
        return await value if inspect.isawaitable(value) else value

    given = {key: value for key, value in sorted(arguments.items()) if key != KEY}
    request = request_hash(given, f"the arguments of function {name!r}")
    return await journal.call(f"function:{name}", request, make, CallSpec(policy, key=journal.of.key))


async def _run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_async(fn):
        return await fn(*args, **kwargs)
    value = await in_thread(fn, *args, **kwargs)
    return await value if inspect.isawaitable(value) else value
