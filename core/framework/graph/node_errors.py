"""What an exception means for a node: its failed result, by which names ``retry_on`` may mean it, and what to wait."""

from __future__ import annotations

import re

from framework._secrets import mask
from framework.errors import LLMError, UnknownEffect
from framework.graph.node_base import NodeResult
from framework.graph.worker_errors import transient_kind
from framework.llm.tool_loop import paid_before

# Only a value in quotes, as a KeyError says it, or no letter at all: such a text does not say what went wrong.
_NO_SENTENCE = re.compile(r"""'[^']*'|"[^"]*"|[\W\d_]*""")


def failed_result(error: Exception) -> NodeResult:
    """The failed result that ``error`` means, with what the finished calls before it took. Known secrets are masked."""
    own = error if isinstance(error, LLMError) else None
    name = type(error).__name__
    kind = own.kind if own is not None else transient_kind(error)
    classes = [cls.__name__ for cls in type(error).__mro__ if issubclass(cls, Exception) and cls is not Exception]
    paid = paid_before(error)
    result = NodeResult(
        success=False,
        error=_text(error),
        error_type=own.kind if own is not None else name,
        error_names=(kind, *classes) if kind is not None else tuple(classes),
        transient=own.transient if own is not None else False if isinstance(error, UnknownEffect) else None,
        retry_after=own.retry_after if own is not None else None,
    )
    if paid is not None:
        result.tokens_used, result.output_tokens = paid.input_tokens + paid.output_tokens, paid.output_tokens
        result.cost = paid.cost or 0.0
    return result


def _text(error: Exception) -> str:
    text = mask(str(error))
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if _NO_SENTENCE.fullmatch(text) else text
