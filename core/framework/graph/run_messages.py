"""What reaches a running run from outside: messages left for it in the store, and the request to cancel it.

The committer looks for messages about once a second and hands them over to the run's event loop. A request to cancel is
a message too, addressed to one owner by its fencing token: whoever resumes the run later has another token, so an old
request never cancels it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from framework._secrets import masked_traceback
from framework.errors import RunError
from framework.storage.records import Message

logger = logging.getLogger(__name__)

T = TypeVar("T")

LET_GO = "surefoot: let the run go"
"""Say this when the process is to end and not the run: ``task.cancel(LET_GO)`` on a task that executes one.

The executor finishes the commit under way, releases the lease and records no end, then raises ``CancelledError`` as for
any cancellation. The run stands as after a crash, without anything to wait for: the next process that looks for crashed
runs takes it up at once. Without checkpoints there is nothing to take up, and the run's record ends as cancelled."""

CANCELLED_ON_REQUEST = "cancelled on request"
"""The error of a run that was cancelled by ``CheckpointManager.cancel``."""

_CANCEL = "surefoot.cancel/"


class CancelRequested(Exception):
    """The run's cancellation was asked for, and its work has been stopped. It never leaves the executors."""


def cancel_name(token: int) -> str:
    """The name of the message that asks the owner with this fencing token to stop."""
    return f"{_CANCEL}{token}"


class Inbox:
    """The messages to one run in this process. Made, and used, in the event loop that drives the run."""

    def __init__(self, run_id: str, token: int) -> None:
        self.cancel_requested = asyncio.Event()
        self._run_id = run_id
        self._cancel = cancel_name(token)
        self._loop = asyncio.get_running_loop()
        self._seen: dict[str, Message] = {}
        self._listeners: dict[object, Callable[[Message], None]] = {}
        self._stop: Callable[[str | None], None] | None = None
        self._error: RunError | None = None

    def tell(self, listener: Callable[[T], None]) -> Callable[[T], None]:
        """``listener``, to be called from any thread: it runs in the run's event loop."""

        def told(value: T) -> None:
            self.call(lambda: listener(value))

        return told

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the run's event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            logger.debug("something for run %r came after its event loop was closed", self._run_id)

    def stop(self, error: RunError | None) -> None:
        """Stop what runs inside ``stoppable``: it raises ``error`` then, ``CancelRequested`` for ``None``."""
        self._error = self._error or error
        self.cancel_requested.set()
        if self._stop is not None:
            self._stop(None)

    def let_go(self) -> bool:
        """Cancel the task that runs the block of ``stoppable``, if one does, as ``LET_GO`` says; in the loop."""
        if self._stop is not None:
            self._stop(LET_GO)
        return self._stop is not None

    def deliver(self, messages: Sequence[Message]) -> None:
        """Take messages over from any thread; those known already are passed over."""
        self.call(lambda: self._take(messages))

    def _take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.name in self._seen:
                continue
            self._seen[message.name] = message
            if message.name == self._cancel:
                self.stop(None)
            if message.name.startswith(_CANCEL):
                continue
            for listener in list(self._listeners.values()):
                self._tell(listener, message)

    def _tell(self, listener: Callable[[Message], None], message: Message) -> None:
        try:
            listener(message)
        except Exception as error:  # a listener of anybody's: one that fails must not keep the others from hearing
            where, trace = (message.name, self._run_id), masked_traceback(error)
            logger.error("A listener to messages failed at message %r to run %r:\n%s", *where, trace)

    def on_message(self, listener: Callable[[Message], None]) -> Callable[[], None]:
        """Tell ``listener`` each message once: those that came already at once. Call the result to stop it."""
        key = object()
        self._listeners[key] = listener
        for message in list(self._seen.values()):
            if not message.name.startswith(_CANCEL):
                self._tell(listener, message)

        def remove() -> None:
            self._listeners.pop(key, None)

        return remove

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Run a block of the current task until cancellation is requested; see ``RunSession.stoppable``."""
        if self.cancel_requested.is_set():
            raise self._error or CancelRequested
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        stopped = False

        def stop(message: str | None) -> None:
            nonlocal stopped
            stopped = stopped or message is None
            task.cancel(message)

        self._stop = stop
        try:
            yield
        except asyncio.CancelledError:
            # As asyncio.timeout does: ours only if nobody else wants this task to end.
            if stopped and task.uncancel() <= before:
                raise (self._error or CancelRequested()) from None
            raise
        except BaseException:
            if stopped:
                task.uncancel()
            raise
        else:
            if stopped:
                task.uncancel()
        finally:
            self._stop = None


def public(messages: Sequence[Message]) -> list[Message]:
    """The messages without the library's own requests."""
    return [message for message in messages if not message.name.startswith(_CANCEL)]
