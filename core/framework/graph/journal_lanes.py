"""Where a call is made: in which task or thread of a step, begun by which other one, and inside which call.

A ``ContextVar`` carries it: a new task, and a thread of ``asyncio.to_thread`` or of this library, begins with a copy of
what its beginner had then. A thread that copies no context, such as one of a ``ThreadPoolExecutor``, has none.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from framework.errors import UnstorableValue
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


@dataclass(slots=True)
class _WholeStep:
    """A function that is all that its step does: the step's ``key``, the ``journal`` of the place where it began, and
    how often it has called each tool with the same arguments."""

    key: str
    journal: object
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


_whole_step: ContextVar[_WholeStep | None] = ContextVar("surefoot_whole_step", default=None)


@contextmanager
def whole_step(idempotency_key: str) -> Iterator[None]:
    """Around a function that is all that its step does, and no call of the journal: code in it is told the step's
    key, and the tools it calls a key each."""
    place = place_now.get()
    journal = place.journal if place is not None else None
    token = _whole_step.set(_WholeStep(idempotency_key, journal) if idempotency_key else None)
    try:
        yield
    finally:
        _whole_step.reset(token)


def here() -> object:
    """The task that runs now, else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return task if task is not None else threading.current_thread()


def current_idempotency_key() -> str | None:
    """The idempotency key of the call that is being made, for code deep inside it: a tool's HTTP client that sends it
    as the ``Idempotency-Key`` header, say; in a function that is a whole step, the step's. ``None`` elsewhere."""
    place = place_now.get()
    if place is not None and place.call is not None:
        call: _Call = place.call
        return call.idempotency_key
    whole = _whole_step_here(place)
    return whole.key if whole is not None else None


def tool_key(name: str, arguments: Mapping[str, Any]) -> str | None:
    """The idempotency key for a call of a tool, as ``current_idempotency_key`` gives it, but that in a function which
    is a whole step each call has its own: a service that goes by the key would take two payments for one. The same
    calls have the same keys in every attempt and process; of equal ones the first, the second and so on."""
    place = place_now.get()
    if place is not None and place.call is not None:
        return current_idempotency_key()
    whole = _whole_step_here(place)
    if whole is None:
        return None
    # Describing a graph imports this module, and needs no storage.
    from framework.graph.journal_spec import hash_of, request_hash  # noqa: PLC0415

    try:
        request = request_hash(arguments, name)
    except UnstorableValue:
        request = ""  # told apart by their order alone
    with whole.lock:
        whole.asked[f"{name}\0{request}"] += 1
        number = whole.asked[f"{name}\0{request}"]
    return hash_of("\0".join((whole.key, name, request, str(number))).encode())


def _whole_step_here(place: Place | None) -> _WholeStep | None:
    whole = _whole_step.get()
    # One that runs a graph of its own is no function of that graph's nodes.
    return whole if whole is not None and whole.journal is (place.journal if place is not None else None) else None


async def in_thread(function: Callable[..., T], *args: Any, watch: threads.Watch | None = None, **keywords: Any) -> T:
    """``function`` in a thread of its step, which goes on as the task that waits for it: in its lane."""

    def run() -> T:
        place = place_now.get()
        if place is not None and place.call is not None:
            place_now.set(replace(place, owner=here()))
        return function(*args, **keywords)

    result: T = await threads.in_thread(run, watch=watch)
    return result
