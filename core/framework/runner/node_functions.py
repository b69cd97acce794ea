"""The functions and node objects a folder brings for its nodes: ``NODES`` and ``@node_function``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from framework.errors import AgentFileError
from framework.graph.calls import policy_for
from framework.llm.provider import ToolPolicy

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__surefoot_nodes__"
_POLICY = "__surefoot_policy__"


def node_function(*node_ids: str, effects: bool = False, policy: ToolPolicy | None = None) -> Callable[[F], F]:
    """Mark a function of ``nodes.py`` or ``tools.py`` as what the nodes with these ids run; it stays what it was.

    Without an id it is the node of the function's own name. ``effects`` says that it changes something outside,
    ``policy`` what becomes of a call that was cut off, in all nodes that run it: see `FunctionNode`. Raises
    ``TypeError`` when the decorator is used without its brackets, ``ValueError`` for another policy.
    """
    if any(not isinstance(node_id, str) for node_id in node_ids):
        raise TypeError('Write @node_function("node id") or @node_function(), with brackets.')

    def mark(function: F) -> F:
        earlier = getattr(function, _MARK, ())
        setattr(function, _MARK, (*earlier, *(node_ids or (function.__name__,))))
        if effects or policy is not None:
            setattr(function, _POLICY, policy_for(function.__name__, effects, policy))
        return function

    return mark


def is_node(value: object) -> bool:
    """Whether ``value`` is a node object: anything with an ``execute`` method. A class is none."""
    return not isinstance(value, type) and callable(getattr(value, "execute", None))


def nodes_of(module: ModuleType, file: str) -> dict[str, Any]:
    """Node id -> function or node object, from the module's ``NODES`` and its marked functions.

    Raises ``AgentFileError`` when something cannot be a node, or two things claim the same one.
    """
    found: dict[str, Any] = {}
    listed = vars(module).get("NODES", {})
    if not isinstance(listed, Mapping):
        raise AgentFileError(file, "NODES is a dict of node id -> function or node object, not " + _kind(listed))
    for node_id, value in listed.items():
        if not isinstance(node_id, str):
            raise AgentFileError(file, f"NODES has the key {node_id!r}; node ids are texts")
        if isinstance(value, type) or not (is_node(value) or callable(value)):
            advice = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
            raise AgentFileError(
                file,
                f"NODES[{node_id!r}] is a function or an object with an execute method, not {_kind(value)}{advice}",
            )
        found[node_id] = value
    for value in vars(module).values():
        for node_id in _marks(value):
            if found.setdefault(node_id, value) is not value:
                raise AgentFileError(file, f"node {node_id!r} has two functions; keep one of them")
    return found


def policy_of(function: Callable[..., Any]) -> ToolPolicy | None:
    """The policy that ``function`` is marked with, however it came to its node."""
    policy: ToolPolicy | None = getattr(function, "__dict__", {}).get(_POLICY)
    return policy


def _marks(value: object) -> tuple[str, ...]:
    # Only plain attributes count: a mock, or an object that answers every name, marks nothing.
    marks = getattr(value, "__dict__", {}).get(_MARK, ()) if callable(value) else ()
    return marks if isinstance(marks, tuple) else ()


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
