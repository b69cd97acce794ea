"""Sweeps in the background of a process that lives long: one thread, at times of its own, until it is stopped."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from framework.errors import SurefootError
from framework.schemas.retention import RetentionPolicy
from framework.storage.retention_records import SweepReport

if TYPE_CHECKING:
    from framework.storage.interface import Storage

logger = logging.getLogger(__name__)

EVERY_SECONDS = 600.0
"""How long after a sweep the next one begins, when nothing else is said."""

_LONGEST_FIRST_WAIT = 60.0
_JITTER = 0.1


class Sweeping:
    """Sweeps of one store, from ``start_sweeping`` to ``stop``; also a context manager that stops.

    ``last`` is what the last sweep did, ``None`` before the first has ended.
    """

    def __init__(
        self,
        storage: Storage,
        policy: RetentionPolicy,
        every: float,
        *,
        chance: Callable[[], float],
        on_sweep: Callable[[SweepReport], None] | None,
    ) -> None:
        self._storage = storage
        self._policy = policy
        self._every = every
        self._chance = chance
        self._on_sweep = on_sweep
        self._stop = threading.Event()
        self.last: SweepReport | None = None
        self._thread = threading.Thread(target=self._work, name="surefoot-sweeping", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = 10.0) -> bool:
        """End it after the step under way, which takes milliseconds; whether it has ended within ``timeout`` seconds.

        Call it before the store is closed. What is left to do is done by the next sweep, of whatever process.
        """
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _work(self) -> None:
        wait = self._chance() * min(self._every, _LONGEST_FIRST_WAIT)
        while not self._stop.wait(wait) and not self._is_over():
            try:
                self._tell(self._storage.sweep(self._policy, stop=self._stop))
            except SurefootError as error:
                if self._is_over():
                    return
                logger.warning("The store was not swept; it is tried again in %.0f s: %s", self._every, error)
            wait = self._every * (1 + _JITTER * (2 * self._chance() - 1))

    def _is_over(self) -> bool:
        return self._storage.closed

    def _tell(self, report: SweepReport) -> None:
        self.last = report
        if report.runs or report.checkpoints:
            logger.info(
                "Retention removed %d runs, %d parts of runs and %d old checkpoints.",
                report.runs,
                report.parts,
                report.checkpoints,
            )
        if report.over_bytes:
            logger.warning(
                "The store holds %d bytes more than max_total_bytes; what is left is pinned, unfinished or needed.",
                report.over_bytes,
            )
        if self._on_sweep is not None:
            self._on_sweep(report)


def start_sweeping(
    storage: Storage,
    policy: RetentionPolicy,
    every: float = EVERY_SECONDS,
    *,
    chance: Callable[[], float] = random.random,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> Sweeping:
    """Apply ``policy`` to ``storage`` now and then in a thread; call ``stop`` of what it returns before closing it.

    The first sweep begins within ``every`` seconds, at most a minute, and each further one ``every`` seconds, give or
    take a tenth, after the one before: several processes at one store do not sweep at the same moment, and if they do,
    share the work. ``chance`` gives numbers from 0 to 1. A sweep that fails is logged, and tried again. ``on_sweep`` is
    told of each, in that thread. Raises ``ValueError`` unless ``every`` is above 0.
    """
    if not every > 0:
        raise ValueError(f"every is in seconds and above 0, not {every!r}.")
    return Sweeping(storage, policy, every, chance=chance, on_sweep=on_sweep)
