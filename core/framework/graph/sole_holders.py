"""Whether anybody besides the framework holds a container of the state, and so could change it in place.

A container that was written by a node is looked at again at every commit, because the node may have kept it. CPython
counts the references to each object exactly: when all there are to a list or dict, and to each one inside, are those
that the framework knows of, nobody can change it until it is handed out again, and the memory notes when it is. On
other interpreters, and without the global lock, nothing is ever taken to be held by nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from framework.graph.memory import IMMUTABLE

_NESTED = frozenset({list, dict})
_KNOWN = IMMUTABLE | _NESTED
_KEYS = frozenset({str})
_NEVER: Final = 1 << 30


def _counts_are_exact() -> bool:
    gil = getattr(sys, "_is_gil_enabled", None)
    return sys.implementation.name == "cpython" and (gil is None or bool(gil()))


class Held:
    """Something of the framework's that keeps a value, in ``value``."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def held_by_these_only(value_of: Any, key: str, others: Iterable[Mapping[str, Any]], inside: int = 0) -> bool:
    """Whether ``value_of.value`` is a list or dict that only ``value_of`` and ``others``, under ``key``, refer to.

    What is inside is held by it alone as well, each container once; and ``inside`` times by something of the
    framework's, by which certainly each of them is.
    """
    if type(value_of.value) not in _NESTED or not _EXACT:
        return False
    known = 0
    for other in others:
        if other.get(key) is value_of.value:
            known += 1
    if sys.getrefcount(value_of.value) > _ALONE + known:
        return False
    return _most_counted(value_of) <= _INSIDE + inside


def _most_counted(value_of: Any) -> int:
    """The highest count of references among the containers inside; very high when there is what may hide some."""
    most = 0
    waiting = [value_of.value]
    while waiting:
        inner = waiting.pop()
        if type(inner) is dict:
            if not set(map(type, inner)) <= _KEYS:
                return _NEVER
            items = list(inner.values())
        else:
            items = list(inner)
        kinds = set(map(type, items))
        if kinds <= IMMUTABLE:
            continue
        if not kinds <= _KNOWN:
            return _NEVER
        for item in items:
            if type(item) in _NESTED:
                most = max(most, sys.getrefcount(item))
                waiting.append(item)
    return most


# What the two functions themselves hold while they count, taken from values that certainly nobody else does.
_EXACT = _counts_are_exact()
_PROBE = Held([])
_ALONE = sys.getrefcount(_PROBE.value)
_INSIDE = max(_most_counted(Held([[]])), _most_counted(Held([{}])))
