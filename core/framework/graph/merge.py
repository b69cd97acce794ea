"""How the writes of concurrent branches become one state at their join. Pure; the same whichever branch was faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.errors import BranchConflict
from framework.graph.edge import GraphSpec
from framework.graph.memory import PIPE_KEY

LOCAL = ""
"""In ``BranchWrites.writers``: the value is an input mapped for one branch, not something to merge."""


@dataclass(frozen=True, slots=True)
class BranchWrites:
    """What one branch wrote: values by key, and by key the node that wrote it last (``LOCAL`` for mapped inputs)."""

    head: str
    values: Mapping[str, Any]
    writers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Write:
    node: str
    head: str
    value: Any


def append_only_keys(graph: GraphSpec) -> frozenset[str]:
    """The keys that the graph or one of its nodes declares append-only."""
    return frozenset(graph.append_only_keys).union(*(node.append_only_keys for node in graph.nodes))


def merge(graph: GraphSpec, base: Mapping[str, Any], branches: Sequence[BranchWrites]) -> dict[str, Any]:
    """The values to write to the state around the branches, by key.

    A key that one branch wrote is taken as it is. One that several wrote is combined when it is declared: tails of
    append-only keys are joined, reducers applied, both in the order of the branches' first nodes. Otherwise raises
    ``BranchConflict`` naming the two nodes.
    """
    declared_pipe = any(PIPE_KEY in node.output_keys for node in graph.nodes)
    append_only = append_only_keys(graph)
    writes: dict[str, list[_Write]] = {}
    for branch in branches:
        for key, value in branch.values.items():
            writer = branch.writers.get(key, branch.head)
            if writer == LOCAL or (key == PIPE_KEY and not declared_pipe and key not in graph.reducers):
                continue
            writes.setdefault(key, []).append(_Write(writer, branch.head, value))
    merged: dict[str, Any] = {}
    for key, made in writes.items():
        if len(made) == 1:
            merged[key] = made[0].value
            continue
        ordered = sorted(made, key=lambda write: write.head)
        if key in graph.reducers:
            merged[key] = _REDUCERS[graph.reducers[key]](key, base.get(key), ordered)
        elif key in append_only:
            merged[key] = _append(key, base.get(key), ordered)
        else:
            raise BranchConflict(key, made[0].node, made[1].node)
    return merged


def _refuse(key: str, writes: Sequence[_Write]) -> BranchConflict:
    return BranchConflict(key, writes[0].node, writes[1].node)


def _append(key: str, base: Any, writes: Sequence[_Write]) -> Any:
    """``base`` and then what each branch added after it; lists and texts only."""
    kinds = {type(write.value) for write in writes} | ({type(base)} if base is not None else set())
    if len(kinds) != 1 or not kinds <= {list, str}:
        raise _refuse(key, writes)
    result: Any = base if base is not None else next(iter(kinds))()
    length = len(result)
    for write in writes:
        if write.value[:length] != (base if base is not None else write.value[:0]):
            raise _refuse(key, writes)
        result = result + write.value[length:]
    return result


def _sum(key: str, base: Any, writes: Sequence[_Write]) -> Any:
    """``base`` plus each branch's change to it."""
    start = 0 if base is None else base
    try:
        return start + sum(write.value - start for write in writes)
    except TypeError:
        raise _refuse(key, writes) from None


def _extreme(choose: Callable[[list[Any]], Any]) -> Callable[[str, Any, Sequence[_Write]], Any]:
    def reduce(key: str, base: Any, writes: Sequence[_Write]) -> Any:
        try:
            return choose([write.value for write in writes])
        except TypeError:
            raise _refuse(key, writes) from None

    return reduce


def _merge_dicts(key: str, base: Any, writes: Sequence[_Write]) -> Any:
    """``base`` with each branch's new and changed entries; two branches that set one entry differently conflict."""
    if not all(isinstance(write.value, dict) for write in writes) or not isinstance(base or {}, dict):
        raise _refuse(key, writes)
    start: dict[Any, Any] = base or {}
    result = dict(start)
    setters: dict[Any, _Write] = {}
    for write in writes:
        for name, value in write.value.items():
            if name in start and start[name] == value:
                continue
            earlier = setters.get(name)
            if earlier is not None and result[name] != value:
                raise BranchConflict(f"{key}.{name}", earlier.node, write.node)
            setters[name] = write
            result[name] = value
    return result


def _union(key: str, base: Any, writes: Sequence[_Write]) -> Any:
    """All members, each once; for sets, and for lists in order of first appearance."""
    values = [*([base] if base is not None else []), *(write.value for write in writes)]
    if all(isinstance(value, (set, frozenset)) for value in values):
        return type(values[0])().union(*values)
    if not all(isinstance(value, list) for value in values):
        raise _refuse(key, writes)
    result: list[Any] = []
    for value in values:
        result.extend(item for item in value if item not in result)
    return result


_REDUCERS: dict[str, Callable[[str, Any, Sequence[_Write]], Any]] = {
    "append": _append,
    "sum": _sum,
    "min": _extreme(min),
    "max": _extreme(max),
    "merge": _merge_dicts,
    "union": _union,
}
