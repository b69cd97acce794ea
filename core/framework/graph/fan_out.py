"""The static shape of a fan-out: which branches it has, what each may visit, and where they meet. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Links = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Shape:
    """A graph reduced to ids. A terminal node has no links: a run that reaches it stops there.

    ``links`` holds every edge and route; ``forward`` leaves out on_failure edges. ``order`` is declaration order.
    """

    order: Sequence[str]
    links: Links
    forward: Links


def distances(links: Links, start: str, stop: str) -> dict[str, int]:
    """Fewest links from ``start`` to each node it reaches, itself included, never going on from ``stop``."""
    found = {start: 0}
    waiting = deque([start])
    while waiting:
        node = waiting.popleft()
        if node == stop:
            continue
        for target in links.get(node, ()):
            if target not in found:
                found[target] = found[node] + 1
                waiting.append(target)
    return found


def nearest_join(shape: Shape, source: str, heads: Sequence[str]) -> str | None:
    """The node where the branches ``heads`` of ``source`` meet, or None.

    A node that all branches reach without a failure is preferred over one they share only as their error handler, and
    any node over ``source`` itself, which every branch of a loop reaches again.
    """
    for links in (shape.forward, shape.links):
        join = _nearest(shape.order, [distances(links, head, source) for head in heads], source)
        if join is not None:
            return join
    return None


def _nearest(order: Sequence[str], reached: Sequence[dict[str, int]], source: str) -> str | None:
    if not reached:
        return None
    common = set(reached[0]).intersection(*reached[1:])
    candidates = [node for node in order if node in common and node != source]
    if not candidates:
        return source if source in common else None
    # min() keeps the first of equals, so ties go to the node declared first.
    return min(candidates, key=lambda node: (max(way[node] for way in reached), sum(way[node] for way in reached)))


def regions(shape: Shape, source: str, heads: Sequence[str], join: str | None) -> dict[str, set[str]]:
    """Per head, the nodes its branch may visit before the join, without passing through ``source`` again."""
    return {head: _region(shape.links, head, {source, join}) for head in heads}


def _region(links: Links, head: str, borders: set[str | None]) -> set[str]:
    found: set[str] = set()
    waiting = [head]
    while waiting:
        node = waiting.pop()
        if node in borders or node in found:
            continue
        found.add(node)
        waiting.extend(links.get(node, ()))
    return found
