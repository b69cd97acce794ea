"""What a container held when it was last stored, so that one that still holds the same need not be encoded again.

A shadow keeps the very objects that a list or dict held, and the same of the lists and dicts inside. Texts, numbers and
the like cannot change under their identity; so a container whose items are the same objects in the same order, down to
its leaves, is stored as the same bytes, whoever holds it and whatever they did to it. To look costs a comparison of two
addresses for each item, a small part of writing it out. Pure.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from framework.graph.memory import IMMUTABLE

_DEPTH = 8
"""Levels of containers that are followed; what is nested deeper is encoded again each time."""

_NESTED = frozenset({list, dict})
_KNOWN = IMMUTABLE | _NESTED
_KEYS = frozenset({str})


class Shadow:
    """What one list or dict held. Make it with ``shadow_of``."""

    __slots__ = ("_children", "_items", "_keys", "_kind")

    def __init__(
        self, kind: type[Any], keys: tuple[str, ...], items: list[Any], children: list[tuple[int, Shadow]]
    ) -> None:
        self._kind = kind
        self._keys = keys
        self._items = items
        self._children = children

    def __len__(self) -> int:
        return len(self._items)

    def is_same(self, value: Any) -> bool:
        """Whether ``value`` holds what this one's did, no more and no less."""
        return type(value) is self._kind and len(value) == len(self._items) and self._holds(value)

    def begins(self, value: Any) -> bool:
        """Whether ``value`` is a list that begins with all that this one's held, more or not."""
        return type(value) is list and self._kind is list and len(value) >= len(self._items) and self._holds(value)

    def _holds(self, value: Any) -> bool:
        items = value
        if self._kind is dict:
            if not all(map(is_, value, self._keys)):
                return False
            items = value.values()
        if not all(map(is_, items, self._items)):
            return False
        # The containers inside are the same objects; whether they hold the same is another question.
        return all(child.is_same(self._items[index]) for index, child in self._children)

    def grown(self, tail: list[Any]) -> Shadow | None:
        """The shadow of its list with ``tail`` at the end; ``None`` when there is none of the tail."""
        more = shadow_of(tail)
        if more is None:
            return None
        start = len(self._items)
        children = [*self._children, *((start + index, child) for index, child in more._children)]
        return Shadow(list, (), self._items + more._items, children)


def shadow_of(value: Any, depth: int = _DEPTH) -> Shadow | None:
    """The shadow of a list or dict; ``None`` when it is neither, or holds what may change unseen."""
    kind = type(value)
    if kind is list:
        keys, items = (), list(value)
    elif kind is dict and set(map(type, value)) <= _KEYS:
        keys, items = tuple(value), list(value.values())
    else:
        return None
    kinds = set(map(type, items))
    if kinds <= IMMUTABLE:
        return Shadow(kind, keys, items, [])
    if not kinds <= _KNOWN or depth <= 1:
        return None
    children = []
    for index, item in enumerate(items):
        if type(item) in _NESTED:
            child = shadow_of(item, depth - 1)
            if child is None:
                return None
            children.append((index, child))
    return Shadow(kind, keys, items, children)
