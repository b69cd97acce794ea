"""JSON out of a model's reply: plain, inside a fenced block, or in the middle of prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)
_UNPARSED = object()


def parse_json_reply(text: object) -> object | None:
    """The JSON value in ``text``: the whole text, else the first fenced block that parses, else the widest ``{...}``
    or ``[...]``. None when there is none, or when ``text`` is not a str.
    """
    for candidate in _candidates(text):
        value = _load(candidate)
        if value is not _UNPARSED:
            return value
    return None


def parse_json_object(text: object, *, in_prose: bool = True) -> dict[str, Any] | None:
    """The JSON object in ``text``, looked for as `parse_json_reply` does; other JSON values are passed over.

    With ``in_prose=False`` only the whole text or a fenced block that is the whole text counts.
    """
    for candidate in _candidates(text) if in_prose else _whole(text):
        value = _load(candidate)
        if isinstance(value, dict):
            return value
    return None


def widest_braces(text: str, opening: str = "{", closing: str = "}") -> str | None:
    """From the first ``opening`` to the last ``closing``, both included; None when there is no such part."""
    start, end = text.find(opening), text.rfind(closing)
    return text[start : end + 1] if 0 <= start < end else None


def _whole(text: object) -> Iterator[str]:
    if isinstance(text, str):
        yield text
        fenced = _FENCE.fullmatch(text.strip())
        if fenced:
            yield fenced.group(1)


def _candidates(text: object) -> Iterator[str]:
    if not isinstance(text, str):
        return
    yield text
    for match in _FENCE.finditer(text):
        yield match.group(1)
    spans = [span for span in (widest_braces(text), widest_braces(text, "[", "]")) if span is not None]
    yield from sorted(spans, key=len, reverse=True)


def _load(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _UNPARSED


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
