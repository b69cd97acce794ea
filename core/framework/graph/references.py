"""References in a plan: values that start with ``$`` and stand for what the context or an earlier step holds.

``$name`` is a name of the context, or all outputs of a step of that id; ``$step.key`` is one output. Further parts go
into dicts and lists: ``.key``, ``.0``, ``[0]``, ``[-1]``, ``["any key"]``. ``${name}`` is the same in braces, with the
parts in them or after them: ``${step.key}``, ``${step}.key``. Names and ids that exist are matched first, the longest
one wins, so any of them can be written, whatever it is made of: ``$step 1.x``, ``${a.b}["c"]``. Lists and dicts are
searched at any depth.

What names nothing that exists fails when it can only be a reference: when a letter, ``_`` or ``{`` follows the ``$``,
or a name that begins with a digit and has a letter, ``_`` or ``[`` in it (``$1_fetch.x``, ``$1.title``). Other text is
itself: ``$5``, ``$5.00 a month``, ``$ 5``, ``$(date)``. So is text of several words that does not begin with a known
name and is not in braces: ``$100k budget``, ``$HOME is not set``. ``$$text`` is always the literal ``$text``.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from framework.graph.memory import IMMUTABLE
from framework.graph.text import shorten

logger = logging.getLogger(__name__)

_PART = re.compile(
    r"""\.(?P<key>[\w-]+)
    | \[ \s* (?: (?P<index>-?[0-9]{1,18})
        | "(?P<double>(?:[^"\\]|\\.)*)"
        | '(?P<single>(?:[^'\\]|\\.)*)'
        | “(?P<curly>[^”]*)”
    ) \s* \]""",
    re.VERBOSE | re.DOTALL,
)
_DIGIT_NAME = re.compile(r"\d[\w-]*(?:\.[\w-]+|\[)*")
_HEAD = re.compile(r"[\w-]+")
_LETTER = re.compile(r"[^\W\d]|\[")
_MISSING = object()
_NAMES_SHOWN = 20


class MissingReference(LookupError):
    """A reference names nothing that exists."""

    def __init__(self, reference: str, known: Iterable[str], detail: str = "") -> None:
        shown = shorten(reference, 100)
        super().__init__(
            f"Nothing is known under the reference {shown!r}{detail}. Known names: {_listed(known)}. "
            f"For the text itself write {'$' + shown!r}."
        )
        self.reference = reference

    def at_step(self, step_id: str) -> str:
        """What to tell whoever made the plan: the message, and the step that has the reference."""
        return f"Step {step_id!r}: {self}"


def resolve(value: Any, context: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> Any:
    """``value`` with every reference in it replaced by a copy of what it stands for.

    ``context`` holds names, ``outputs`` the outputs of finished steps by step id. A whole name is looked up in the
    context first, one with further parts in the outputs first. Raises ``MissingReference``.
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
    # An argument that is or holds a reference itself is no target: {"x": "$x"} means the context's x.
    plain = {name: value for name, value in declared.items() if not _holds_reference(value)}
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


def _holds_reference(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("$")
    if isinstance(value, Mapping):
        return any(_holds_reference(item) for item in value.values())
    return type(value) in (list, tuple) and any(_holds_reference(item) for item in value)


def _resolve_text(text: str, context: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
    if not text.startswith("$"):
        return text
    name = text[1:]
    if name.startswith("$"):
        return name
    for head, path in _readings(name, {*context, *outputs}):
        # The longest name that exists is the one that is meant, whether or not the rest leads anywhere.
        scopes = (outputs, context) if path else (context, outputs)
        found = [scope[head] for scope in scopes if head in scope]
        for value in found:
            target = _walk(value, path)
            if target is not _MISSING:
                return own_copy(target)[0]
        raise MissingReference(text, {*context, *outputs}, _what_is_there(head, found[0]))
    if _can_only_be_a_reference(name) and not _is_prose(name, {*context, *outputs}):
        raise MissingReference(text, {*context, *outputs})
    return text


def _readings(name: str, known: Collection[str]) -> Iterator[tuple[str, list[str | int]]]:
    """The known names that text after a ``$`` may begin with, and the parts that follow, the best reading first."""
    if name.startswith("{"):
        for end in (place for place in range(len(name) - 1, 1, -1) if name[place] == "}"):
            after = _path(name[end + 1 :])
            if after is not None:
                yield from ((head, [*path, *after]) for head, path in _splits(name[1:end], known))
    yield from _splits(name, known)


def _splits(name: str, known: Collection[str]) -> Iterator[tuple[str, list[str | int]]]:
    for place in (len(name), *(place for place in range(len(name) - 1, 0, -1) if name[place] in ".[")):
        if name[:place] in known:
            path = _path(name[place:])
            if path is not None:
                yield name[:place], path


def _path(text: str) -> list[str | int] | None:
    """The parts in ``text``, keys as texts and indexes as numbers; ``None`` when it is something else."""
    parts: list[str | int] = []
    place = 0
    while place < len(text):
        match = _PART.match(text, place)
        if match is None:
            return None
        kind = match.lastgroup or ""
        part = match[kind]
        if kind in ("double", "single"):
            part = re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL)
        parts.append(int(part) if kind == "index" else part)
        place = match.end()
    return parts


def _walk(value: Any, path: list[str | int]) -> Any:
    for part in path:
        if isinstance(value, Mapping):
            keys = [key for key in (part, str(part)) if key in value]
            if not keys:
                return _MISSING
            value = value[keys[0]]
        elif isinstance(value, (list, tuple)):
            index = _index(part)
            if index is None or not -len(value) <= index < len(value):
                return _MISSING
            value = value[index]
        else:
            return _MISSING
    return value


def _index(part: str | int) -> int | None:
    if isinstance(part, int):
        return part
    return int(part) if part.isdecimal() and len(part) <= 18 else None


def _can_only_be_a_reference(name: str) -> bool:
    first = name[:1]
    if first.isalpha() or first in ("_", "{"):
        return True
    match = _DIGIT_NAME.match(name)
    return match is not None and _LETTER.search(match[0]) is not None


def _is_prose(name: str, known: Collection[Any]) -> bool:
    """Whether text after a ``$`` is words that have nothing to do with any known name: a reference to something that
    is missing is one word and the parts that follow it, or begins with a name that there is."""
    if name.startswith("{") or len(name.split()) < 2:
        return False
    head = _HEAD.match(name)
    if head is not None and _path(name[head.end() :]) is not None:  # $nope["any key"]
        return False
    names = [each for each in map(str, known) if each and name.startswith(each)]
    return all(_HEAD.match(name, len(each)) is not None for each in names)


def _what_is_there(head: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f": {head!r} has {_listed(value)}"
    if isinstance(value, (list, tuple)):
        return f": {head!r} is a list of {len(value)}"
    return f": {head!r} is a {type(value).__name__}"


def _listed(names: Iterable[Any]) -> str:
    texts = sorted(shorten(str(name), 60) for name in names)
    more = f" and {len(texts) - _NAMES_SHOWN} more" if len(texts) > _NAMES_SHOWN else ""
    return (", ".join(texts[:_NAMES_SHOWN]) or "none") + more
