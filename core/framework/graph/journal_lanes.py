"""Where a call is made: in which task or thread of a step, begun by which other one, and inside which call.

A ``ContextVar`` carries it: a new task, and a thread of ``asyncio.to_thread`` or of this library, begins with a copy of
what its beginner had then. A thread that copies no context, such as one of a ``ThreadPoolExecutor``, has none.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from framework.graph.replay import Lane
from framework.llm import threads

T = TypeVar("T")


class _Call(Protocol):
    @property
    def idempotency_key(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the code that runs now stands: in a ``lane`` of the attempt whose journal is ``journal``, after ``at`` of
    the lane's calls; ``None`` is the step's own. ``owner`` is the task or thread whose lane it is: another one that has
    this began from there. ``call`` is the call around it."""

    journal: object
    lane: Lane | None
    at: int
    owner: object
    call: Any = None


place_now: ContextVar[Place | None] = ContextVar("surefoot_place", default=None)


def here() -> object:
    """The task that runs now, else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else threading.current_thread()


def current_idempotency_key() -> str | None:
    """The idempotency key of the call that is being made, for code deep inside it: a tool's HTTP client that sends it
    as the ``Idempotency-Key`` header, say. ``None`` outside a call."""
    place = place_now.get()
    if place is None or place.call is None:
        return None
    call: _Call = place.call
    return call.idempotency_key


async def in_thread(function: Callable[..., T], *args: Any, watch: threads.Watch | None = None, **keywords: Any) -> T:
    """``function`` in a thread of its step, which goes on as the task that waits for it: in its lane."""

    def run() -> T:
        place = place_now.get()
        if place is not None and place.call is not None:
            place_now.set(replace(place, owner=here()))
        return function(*args, **keywords)

    result: T = await threads.in_thread(run, watch=watch)
    return result
