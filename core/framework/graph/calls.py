"""Calls of what a program brings: functions, tools and models, sync or async; a sync one runs in a thread."""

from __future__ import annotations

from typing import Any

from framework.llm.threads import StepThreads, call

__all__ = ["StepThreads", "call", "tokens_of"]


def tokens_of(response: Any) -> int:
    """What a model's reply cost, input and output together; 0 for one that does not say."""
    counts = (getattr(response, "input_tokens", 0), getattr(response, "output_tokens", 0))
    return sum(count for count in counts if isinstance(count, int))
