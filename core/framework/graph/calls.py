"""Calls of what a program brings: functions, tools and models, sync or async; a sync one runs in a thread."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from framework.llm.threads import StepThreads, call

__all__ = ["KEY", "StepThreads", "call", "takes_key", "tokens_of", "tool_takes_key"]

KEY = "idempotency_key"
"""The parameter by which a function or a tool asks for its call's key."""


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
