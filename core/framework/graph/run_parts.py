"""The small parts of a graph's execution: how it ends, why it cannot go on, and what it needs of its executor."""

from __future__ import annotations

import types
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from framework._secrets import mask
from framework.errors import UnstorableValue
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeSpec
from framework.graph.planner import Step
from framework.schemas.run import RunState
from framework.storage import codec


class NodeSource(Protocol):
    """What a run needs of the executor that started it."""

    def implementation_of(self, spec: NodeSpec) -> Any: ...

    def context_for(self, spec: NodeSpec, memory: SharedMemory) -> NodeContext:
        """A new context each time: the run completes it."""
        ...


@types.coroutine
def let_others_run() -> Generator[None, None, None]:
    """Suspend once, so that nodes that never wait can still be cancelled and timed out from outside.

    Not ``asyncio.sleep(0)``: that belongs to back-off, and programs replace it.
    """
    yield


def unstorable(output: Any) -> str | None:
    """Why what a node put out cannot be stored, ``None`` when it can."""
    try:
        codec.encode(output, "output")
    except UnstorableValue as problem:
        return str(problem)
    return None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the run cannot go on. ``step`` is the one that failed, when it was one."""

    error: str
    step: Step | None = None
    error_type: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How an execution ended."""

    state: RunState
    error: str | None = None
    error_type: str | None = None

    def __post_init__(self) -> None:
        if self.error:
            object.__setattr__(self, "error", mask(self.error))
