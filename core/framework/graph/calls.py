"""Calls of what a program brings: functions, tools and models, sync or async; a sync one runs in a thread."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from framework.llm.provider import ToolPolicy
from framework.llm.threads import StepThreads, call

__all__ = ["KEY", "StepThreads", "call", "policy_for", "takes_key", "tokens_of", "tool_takes_key"]

KEY = "idempotency_key"
"""The parameter by which a function or a tool asks for its call's key."""


def policy_for(name: str, effects: bool, policy: ToolPolicy | None) -> ToolPolicy:
    """What becomes of calls of the function ``name`` that were cut off: its policy, else "ask" when it has effects and
    "rerun" when not. Raises ``ValueError`` for another policy."""
    if policy not in (None, "rerun", "ask", "fail"):
        raise ValueError(f"Function {name!r}: policy is {policy!r}; it is one of rerun, ask, fail.")
    return policy or ("ask" if effects else "rerun")


def takes_key(function: Callable[..., Any]) -> bool:
    """Whether a function asks for its call's idempotency key: it has a parameter ``idempotency_key``."""
    try:
        return KEY in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable that does not tell
        return False


def tool_takes_key(tool: Any) -> bool:
    """Whether a tool asks for its call's idempotency key: its schema has a property ``idempotency_key``."""
    properties = tool.parameters.get("properties")
    return isinstance(properties, dict) and KEY in properties


def tokens_of(response: Any) -> int:
    """What a model's reply cost, input and output together; 0 for one that does not say."""
    counts = (getattr(response, "input_tokens", 0), getattr(response, "output_tokens", 0))
    return sum(count for count in counts if isinstance(count, int))
