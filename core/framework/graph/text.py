"""Values as text: what prompts show a model, and the short summaries that go into logs and messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

SUMMARY_CHARS = 200
_NAMES_SHOWN = 12


def text_of(value: Any) -> str:
    """``value`` as a prompt shows it: text as it is, containers as JSON, anything else by ``str``.

    The same value gives the same text in every process, so a repeated model call can be recognised as the same call.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        try:
            return json.dumps(value, ensure_ascii=False, default=_plain)
        except (TypeError, ValueError, RecursionError):  # keys that are not text, or a value that contains itself
            return str(value)
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # the order of a set differs between processes
    return str(value)


def shorten(text: str, limit: int = SUMMARY_CHARS) -> str:
    """``text`` in one line of at most ``limit`` characters, cut at the end."""
    line = " ".join(text[: limit * 4].split())
    return line if len(line) <= limit and len(text) <= limit * 4 else line[: limit - 1] + "…"


def summary_of(value: Any, limit: int = SUMMARY_CHARS) -> str:
    """At most ``limit`` characters that say what ``value`` is. Never builds the text of a whole container."""
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, Mapping):
        if not value:
            return "empty dict"
        names = ", ".join(shorten(str(key), 40) for _, key in zip(range(_NAMES_SHOWN), value, strict=False))
        more = ", …" if len(value) > _NAMES_SHOWN else ""
        return shorten(f"{type(value).__name__} with {len(value)} keys: {names}{more}", limit)
    if isinstance(value, (list, tuple, set, frozenset, bytes)):
        unit = "bytes" if isinstance(value, bytes) else "items"
        return f"{type(value).__name__} of {len(value)} {unit}"
    if value is None or isinstance(value, (bool, float)):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 512 else f"int of {value.bit_length()} bits"
    return f"a {type(value).__name__}"


def fill_placeholders(template: str, values: Mapping[str, Any]) -> str:
    """``template`` with each ``{key}`` of ``values`` replaced by its text; every other brace stays as it is.

    ``{{key}}`` is another tool's notation and is left alone. Replaced text is not searched again.
    """
    if not values:
        return template
    keys = "|".join(re.escape(key) for key in sorted(values, key=len, reverse=True))
    pattern = re.compile(r"\{\{[^{}]*\}\}|\{(" + keys + r")\}")

    def replacement(match: re.Match[str]) -> str:
        key = match.group(1)
        return match.group(0) if key is None else text_of(values[key])

    return pattern.sub(replacement, template)
