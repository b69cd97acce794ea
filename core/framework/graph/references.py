"""References in a plan: values that start with ``$`` and stand for what the context or an earlier step holds.

``$name`` is a name of the context, or all outputs of a step of that id. ``$step_id.key`` is one output, and further
parts go into dicts and lists (``$fetch.rows.0.title``). ``$$text`` is the literal ``$text``; text after a ``$`` that
cannot be a name (``$5 a month``) is itself. Lists and dicts are searched at any depth.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from framework.graph.memory import IMMUTABLE

logger = logging.getLogger(__name__)

_REFERENCE = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")
_MISSING = object()


class MissingReference(LookupError):
    """A reference names nothing that exists."""

    def __init__(self, reference: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)[:20]) or "none"
        super().__init__(f"Nothing is known under the reference {reference!r}. Known names: {names}.")
        self.reference = reference


def resolve(value: Any, context: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> Any:
    """``value`` with every reference in it replaced by a copy of what it stands for.

    ``context`` holds names, ``outputs`` the outputs of finished steps by step id. A whole name is looked up in the
    context first, a dotted reference in the outputs first. Raises ``MissingReference``.
    """
    if isinstance(value, str):
        return _resolve_text(value, context, outputs or {})
    if isinstance(value, Mapping):
        return {key: resolve(item, context, outputs) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(resolve(item, context, outputs) for item in value)
    return value


def call_arguments(
    declared: Mapping[str, Any], inputs: Mapping[str, Any], context: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a tool or function is called with: the action's arguments overlaid by the resolved ``inputs``, with
    references to each other, the context and earlier steps. What is approved and what is run both come from here.

    Raises ``MissingReference``.
    """
    # An argument that is a reference itself is no target: {"x": "$x"} means the context's x.
    plain = {name: value for name, value in declared.items() if not (isinstance(value, str) and value.startswith("$"))}
    scope = ChainMap(dict(inputs), plain, dict(context))
    resolved = {name: resolve(value, scope, outputs) for name, value in declared.items() if name not in inputs}
    return {**resolved, **inputs}


def own_copy(value: Any) -> tuple[Any, bool]:
    """A copy that shares nothing with ``value``, and whether it is one; some values (clients, locks) have no copy."""
    if type(value) in IMMUTABLE:
        return value, True
    try:
        return copy.deepcopy(value), True
    except Exception as error:  # any class may refuse to be copied, each in its own way
        logger.debug("%s cannot be copied and is shared: %s", type(value).__name__, error)
        return value, False


def _resolve_text(text: str, context: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
    if not text.startswith("$"):
        return text
    name = text[1:]
    if name.startswith("$"):
        return name
    for scope in (context, outputs):
        if name in scope:
            return own_copy(scope[name])[0]
    if _REFERENCE.fullmatch(name) is None:
        return text
    head, *path = name.split(".")
    for scope in (outputs, context):
        if path and head in scope:
            found = _walk(scope[head], path)
            if found is not _MISSING:
                return own_copy(found)[0]
    raise MissingReference(text, {*context, *outputs})


def _walk(value: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value
