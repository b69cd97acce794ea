"""One background thread with an event loop, for async work that callers in any thread or loop ask for."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_open: weakref.WeakSet[LoopThread] = weakref.WeakSet()


class LoopThread:
    """An event loop in a daemon thread, started by the first use and ended by ``close`` or when the program ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``coroutine`` in the loop. Cancelling the future cancels the coroutine's task."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._started())

    def run(self, awaitable: Awaitable[T]) -> T:
        """The result of ``awaitable``, waiting for it here. Called in the loop's own thread, by a coroutine that runs
        there, it would wait for itself; so the awaitable then gets a thread of its own.
        """
        if threading.current_thread() is not self._thread:
            return self.submit(_awaited(awaitable)).result()
        other = LoopThread(self.name)
        try:
            return other.run(awaitable)
        finally:
            other.close()

    async def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of ``coroutine`` for a caller in any event loop; cancelling the wait cancels the work."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def close(self) -> None:
        """Cancel what still runs, and end the thread and its loop. May be called again, and the thread used again."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        _open.discard(self)
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name=self.name, daemon=True)
                self._thread.start()
                _open.add(self)
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


@atexit.register
def _close_all() -> None:
    for each in list(_open):
        each.close()
