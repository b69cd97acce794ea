"""Threads for calls that block: models, tools and functions of others. One thread for each call, none of a pool.

A thread cannot be stopped. One that nobody waits for any more, because of a time limit or a cancellation, would fill a
pool; here it is only told so, by its `Watch`, and ends before the next thing that it would begin.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

GOES_ON = "its thread cannot be stopped and goes on; the next attempt waits for its end"
NOT_BEGUN = "an earlier attempt still runs in its thread, so this one was not begun"


class Abandoned(BaseException):
    """Raised inside a thread that goes on although nobody waits for it.

    No `Exception`: a program that turns what a tool raises into a result must not go on all the same.
    """


class Watch:
    """Whether somebody still waits for one call in a thread. May be shared between threads."""

    def __init__(self) -> None:
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._waits: set[Future[Any]] = set()

    def give_up(self) -> None:
        """Nobody waits any more: what the thread itself waits for in an event loop is cancelled."""
        with self._lock:
            self._given_up.set()
            waits = list(self._waits)
        for each in waits:
            each.cancel()

    def check(self) -> None:
        """Raise `Abandoned` when nobody waits any more. To be called before anything is begun."""
        if self._given_up.is_set():
            raise Abandoned("nobody waits for this call any more: its attempt timed out or was cancelled")

    def sleep(self, seconds: float) -> None:
        """Wait, blocking; raises `Abandoned` as soon as nobody waits any more."""
        self._given_up.wait(seconds)
        self.check()

    def result_of(self, begin: Callable[[], Future[Any]]) -> Any:
        """The result of the future that ``begin`` gives, blocking; it is cancelled when nobody waits any more."""
        with self._lock:
            self.check()
            future = begin()
            self._waits.add(future)
        try:
            return future.result()
        except CancelledError:
            self.check()
            # What it was is cancelled by something else, such as the end of its own task: no error of a tool.
            raise asyncio.CancelledError("what this thread waited for was cancelled") from None
        finally:
            with self._lock:
                self._waits.discard(future)


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("surefoot_watch", default=None)
_step: contextvars.ContextVar[tuple[StepThreads, object] | None] = contextvars.ContextVar("surefoot_step", default=None)


def check_wanted() -> None:
    """Raise `Abandoned` in a thread of this module that nobody waits for any more; elsewhere do nothing."""
    watch = _watch.get()
    if watch is not None:
        watch.check()


def pause(seconds: float) -> None:
    """``time.sleep``, which in a thread of this module ends with `Abandoned` once nobody waits any more."""
    watch = _watch.get()
    if watch is None:
        time.sleep(seconds)
    else:
        watch.sleep(seconds)


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a thread ended. An exception is kept as a value, since a future takes not every one (``StopIteration``)."""

    value: Any = None
    error: BaseException | None = None


class _Working:
    """The block of ``StepThreads.working_on``. A class, as each attempt of each step enters one."""

    __slots__ = ("_now", "_token")

    def __init__(self, threads: StepThreads, key: object) -> None:
        self._now = (threads, key)

    def __enter__(self) -> None:
        self._token = _step.set(self._now)

    def __exit__(self, *raised: object) -> None:
        with suppress(ValueError):  # a coroutine that is closed from outside ends in another context
            _step.reset(self._token)


class StepThreads:
    """The threads that work on steps: an attempt never begins while a thread of an earlier one still runs.

    The wait for a thread may be given up; the thread goes on, and the next attempt of its step waits here until it has
    ended, so that no effect overlaps with its own repetition. Any number of event loops may share an instance.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, set[Future[_Ended]]] = {}

    def is_running(self, key: object) -> bool:
        """Whether a thread works on the step of this key, waited for or not."""
        with self._lock:
            return key in self._running

    async def call(self, key: object, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns, awaited if need be; begun once no earlier thread of ``key`` runs any more.

        ``None`` as ``key`` belongs to no step and waits for nothing. When this is cancelled while a thread runs, the
        ``asyncio.CancelledError`` says so in its text.
        """
        await self.earlier(key)
        if _is_async(function):
            return await function(*args, **kwargs)
        value = await self.run(key, functools.partial(function, *args, **kwargs))
        return await value if inspect.isawaitable(value) else value

    async def earlier(self, key: object) -> None:
        """Wait until no thread of ``key`` runs any more."""
        while True:
            with self._lock:
                running = list(self._running.get(key, ()))
            if not running:
                return
            try:
                await asyncio.wrap_future(running[0])
            except asyncio.CancelledError as error:
                error.args = (NOT_BEGUN,)
                raise

    def working_on(self, key: object) -> _Working:
        """Count the threads that `in_thread` begins inside, in this task, as threads of the step ``key``."""
        return _Working(self, key)

    async def run(self, key: object, function: Callable[[], Any], watch: Watch | None = None) -> Any:
        """What ``function`` returns in a thread of its own, begun at once; ``watch`` is told when this is cancelled."""
        watch = watch or Watch()
        thread = self._start(key, function, watch)
        try:
            ended = await asyncio.wrap_future(thread)
        except asyncio.CancelledError as error:
            if not thread.done():
                error.args = (GOES_ON,)
            raise
        finally:
            if not thread.done():
                watch.give_up()
        if ended.error is not None:
            raise ended.error
        return ended.value

    def _start(self, key: object, function: Callable[[], Any], watch: Watch) -> Future[_Ended]:
        ended: Future[_Ended] = Future()
        ended.set_running_or_notify_cancel()  # from here it cannot be cancelled, as a thread cannot
        context = contextvars.copy_context()
        context.run(_watch.set, watch)
        run = functools.partial(context.run, function)
        # A thread of its own, none of a pool: those that nobody waits for any more would fill that. No daemon: what it
        # does to the world is not cut off in the middle when the program ends.
        thread = threading.Thread(target=_work, args=(run, ended), name="surefoot step")
        if key is not None:
            with self._lock:
                self._running.setdefault(key, set()).add(ended)
            ended.add_done_callback(functools.partial(self._forget, key))
        try:
            thread.start()
        except BaseException:  # the system has no room for another thread
            self._forget(key, ended)
            raise
        return ended

    def _forget(self, key: object, ended: Future[_Ended]) -> None:
        with self._lock:
            running = self._running.get(key, set())
            running.discard(ended)
            if not running:
                self._running.pop(key, None)


async def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``function`` returns, awaited if need be, without blocking the loop; for what is no step's work."""
    return await StepThreads().call(None, function, *args, **kwargs)


async def in_thread(function: Callable[..., Any], *args: Any, watch: Watch | None = None, **kwargs: Any) -> Any:
    """What ``function`` returns in a thread of its own; inside a step's attempt (`StepThreads.working_on`) one of its.

    Cancelling this gives up the wait: ``watch`` is told, and the thread ends before the next thing that it would begin.
    """
    threads, key = _step.get() or (StepThreads(), None)
    return await threads.run(key, functools.partial(function, *args, **kwargs), watch)


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _work(function: Callable[[], Any], ended: Future[_Ended]) -> None:
    try:
        outcome = _Ended(value=function())
    except SystemExit as error:  # it ends its thread, never the program around it
        exited = RuntimeError(f"it called sys.exit({error.code!r})")
        exited.__cause__ = error
        outcome = _Ended(error=exited)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
        outcome = _Ended(error=error)
    ended.set_result(outcome)
