"""Why a reply ended, in the words of any provider: whether it is known to be no whole answer. Pure."""

from __future__ import annotations

from typing import Any, Literal

_WORDS: dict[str, Literal["length", "refusal", "iterations"]] = {
    "max_tokens": "length",
    "length": "length",
    "max_output_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
    "content_filter": "refusal",
    "max_iterations": "iterations",
}


def stopped_short(response: Any) -> Literal["length", "refusal", "iterations"] | None:
    """What kept a reply from being whole: the limit of its length, a refusal of the model or its provider's filter, or
    the limit of a tool loop. None for a whole one, and for one that does not say why it ended."""
    reason = getattr(response, "stop_reason", None)
    return _WORDS.get(reason) if isinstance(reason, str) else None
