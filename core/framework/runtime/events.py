"""Who watches runs live, and telling them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from framework._secrets import masked_traceback
from framework.graph.run_events import RunEvent

logger = logging.getLogger(__name__)

Listener = Callable[[RunEvent], None]


class EventHub:
    """The listeners of one runtime. Adding and removing is safe from any thread, also while events are told."""

    def __init__(self) -> None:
        # Replaced as a whole, never changed: `emit` goes over the tuple it found.
        self._listeners: tuple[Listener, ...] = ()

    @property
    def watched(self) -> bool:
        """Whether there is any listener."""
        return bool(self._listeners)

    def add(self, callback: Listener) -> Callable[[], None]:
        """Tell ``callback`` of events until what is returned is called; calling that twice is harmless."""

        def listener(event: RunEvent) -> None:
            callback(event)

        def remove() -> None:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

        self._listeners = (*self._listeners, listener)
        return remove

    def emit(self, event: RunEvent) -> None:
        """Tell every listener in the order they were added. One that raises is logged; it never fails a run."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # it is the user's
                trace = masked_traceback(error)
                logger.error("A listener of run %r failed at %s:\n%s", event.run_id, event.kind, trace)
