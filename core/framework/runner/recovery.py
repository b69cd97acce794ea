"""A worker: finds the runs of a store that nobody works on though they could go on, and resumes them, for ever.

Any number of workers may share a store; each run is claimed by one of them. An idle worker asks the store a handful of
queries at each look, and a store that can tell of work (PostgreSQL) wakes it at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from framework._secrets import mask_error
from framework.errors import StorageError
from framework.graph import stopping
from framework.graph.cancelling import LET_GO
from framework.graph.recovery import Recovered, recover_run, recoverable_runs
from framework.schemas.run import RunState
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import RunRecord

T = TypeVar("T")

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
"""How long a worker waits between two looks, at most."""

_LONGEST_WAIT_SECONDS = 300.0
"""A run that cannot be taken up is tried again ever less often, but at least this often."""

_LONGEST_AWAY_SECONDS = 60.0
"""A store that cannot be reached is asked again ever less often, but at least this often."""

_SHARE_OF_LOOKS = 0.1
"""While runs of the last look are left, further looks take at most this share of a worker's time: with a backlog of
many thousands, one at the end of each run would be most of what it does."""

_CROWD = 32
"""Workers choose among this many of the oldest runs, so that many of them do not all try for the same one."""


@dataclass(frozen=True, slots=True)
class _Missed:
    """A run that could not be taken up: its last commit and owner then, how many times in a row, and until when (of the
    monotonic clock, in seconds) it is left alone."""

    of: tuple[int, int]
    times: int
    until: float


@dataclass(slots=True)
class Backoff:
    """Which runs could not be taken up, and when each is tried again."""

    interval: float = INTERVAL_SECONDS
    clock: Callable[[], float] = time.monotonic
    missed: dict[str, _Missed] = field(default_factory=dict)
    taken: dict[str, tuple[int, int, str | None]] = field(default_factory=dict)
    """Runs that another process held when they were tried since the last poll: last commit, token and owner."""
    polled_at: float = -math.inf

    def is_due(self, run: RunRecord) -> bool:
        """Whether it may be tried: it has changed since the last time, or that is long ago."""
        if self.taken.get(run.run_id) == (run.sequence, run.token, run.owner):
            return False
        missed = self.missed.get(run.run_id)
        return missed is None or missed.of != (run.sequence, run.token) or self.clock() >= missed.until

    def miss(self, run: RunRecord) -> None:
        """Note that ``run``, as it is now, could not be taken up."""
        before = self.missed.get(run.run_id)
        times = before.times + 1 if before is not None else 1
        wait = min(self.interval * 2.0 ** min(times - 1, 10), max(_LONGEST_WAIT_SECONDS, self.interval))
        self.missed[run.run_id] = _Missed((run.sequence, run.token), times, self.clock() + wait)

    def busy(self, run: RunRecord) -> None:
        """Note that another process has ``run``, as it was found: it is tried at the next poll, and before that only
        when it has been released or has gone on."""
        self.missed.pop(run.run_id, None)
        self.taken[run.run_id] = (run.sequence, run.token, run.owner)

    def poll(self) -> None:
        """Note that it is time to look again. What a store tells of many times an interval counts as few polls."""
        now = self.clock()
        if now - self.polled_at >= self.interval / 2:
            self.polled_at = now
            self.taken.clear()

    def forget(self, run_id: str) -> None:
        """Note that it was taken up."""
        self.missed.pop(run_id, None)

    def keep(self, run_ids: Collection[str]) -> None:
        """Forget what need not be left alone any longer and is not among ``run_ids``, those that are there to take up:
        others have finished or deleted it. A worker lives for months."""
        now = self.clock()
        over = [run_id for run_id, each in self.missed.items() if now >= each.until and run_id not in run_ids]
        for run_id in over:
            del self.missed[run_id]


class Worker(Generic[T]):
    """Recovers runs of ``storage`` until it is stopped, at most ``concurrency`` at once.

    ``resume`` executes a run by its id, as of ``CheckpointManager.recover``, and should handle its own errors: what it
    raises is logged, and the run tried again later, ever less often, and so is what ``is_missed``, and a run that was
    resumed and is at once one to recover again: that failed once more, say. ``tell`` hears of
    each run, as it was found, when it ends; ``problem`` of a store that cannot be reached, once, and with ``None`` once
    it can again. ``is_ours`` says which runs are looked at, ``failed`` whether failed ones are, too.

    ``interval`` is the longest time in seconds between two looks; each is a little earlier, by chance, so that workers
    that were started together do not ask together.
    """

    def __init__(
        self,
        storage: Storage,
        resume: Callable[[RunRecord], Awaitable[T]],
        *,
        concurrency: int = 1,
        interval: float = INTERVAL_SECONDS,
        failed: bool = False,
        is_ours: Callable[[RunRecord], bool] = lambda run: True,
        lease_seconds: float = 30.0,
        tell: Callable[[RunRecord, Recovered[T]], None] = lambda run, found: None,
        problem: Callable[[str | None], None] = lambda text: None,
        is_missed: Callable[[Recovered[T]], bool] = lambda found: found.outcome in ("busy", "failed"),
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if concurrency < 1 or interval <= 0:
            raise ValueError("A worker's concurrency is at least 1, and its interval more than 0 seconds.")
        self._storage = storage
        self._resume = resume
        self._concurrency = concurrency
        self._interval = interval
        self._failed = failed
        self._is_ours = is_ours
        self._lease_seconds = lease_seconds
        self._tell = tell
        self._problem = problem
        self._is_missed = is_missed
        self._random = rng or random.Random()
        self._backoff = Backoff(interval, clock)
        self._active: dict[asyncio.Task[None], RunRecord] = {}
        self._clock = clock
        self._found: list[RunRecord] = []
        self._look_took = 0.0
        self._looked_at = -math.inf
        self._halt = threading.Event()
        self._away = 0

    @property
    def active(self) -> list[RunRecord]:
        """The runs under way, as they were found."""
        return list(self._active.values())

    def stop(self) -> None:
        """Take up no more runs; ``run`` returns once those under way have ended. From any thread."""
        self._halt.set()

    async def run(self) -> None:
        """Work until ``stop``. A cancellation is said on to the runs under way: with ``LET_GO`` they are left to the
        next process at once. The same is raised when the process is being stopped (``runner.stopping``), once the runs
        under way have been let go."""
        waiting: asyncio.Task[bool] | None = None
        try:
            while not self._is_over():
                pause = await self._fill(waiting is None)
                if self._is_over():
                    break
                if waiting is None:
                    waiting = asyncio.create_task(asyncio.to_thread(self._storage_wait, pause))
                await asyncio.wait({waiting, *self._active}, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    waiting.result()
                    waiting = None
            await self._settle()
        except asyncio.CancelledError as error:
            for task in self._active:
                task.cancel(*error.args)
            await self._settle()
            raise
        finally:
            self._halt.set()
            if waiting is not None:
                await asyncio.wait([waiting])
        if stopping.is_asked():
            raise asyncio.CancelledError(LET_GO)

    def _is_over(self) -> bool:
        return self._halt.is_set() or stopping.is_asked()

    async def _settle(self) -> None:
        while self._active:
            await asyncio.wait(list(self._active))

    async def _fill(self, is_time: bool) -> float:
        """Take up runs while there is room; how long to wait then, in seconds. ``is_time`` says that the time between
        two looks is over, or that the store told of work."""
        if is_time:
            self._backoff.poll()
        free = self._concurrency - len(self._active)
        if free < 1:
            return self._interval  # a run that ends wakes it before
        pause = self._interval * self._random.uniform(0.75, 1.0)
        is_soon = self._clock() - self._looked_at < self._look_took / _SHARE_OF_LOOKS
        chosen = [] if is_time and not (is_soon and self._found) else self._chosen(free)
        if not chosen and (is_time or not is_soon):
            began = self._clock()
            try:
                self._found = await asyncio.to_thread(self._look)
            except StorageError as error:
                self._away += 1
                if self._away == 1:
                    self._problem(mask_error(error))
                wait = min(self._interval * 2.0 ** min(self._away - 1, 10), max(_LONGEST_AWAY_SECONDS, self._interval))
                return wait * self._random.uniform(0.75, 1.0)
            self._backoff.keep({run.run_id for run in (*self._found, *self._active.values())})
            self._looked_at = self._clock()
            self._look_took = self._looked_at - began
            if self._away:
                self._away = 0
                self._problem(None)
            chosen = self._chosen(free)
        for run in chosen:
            task = asyncio.create_task(self._one(run))
            self._active[task] = run
            task.add_done_callback(self._ended)
        return pause

    def _look(self) -> list[RunRecord]:
        return recoverable_runs(self._storage, failed=self._failed, is_ours=self._is_ours)

    def _chosen(self, free: int) -> list[RunRecord]:
        """Some of the oldest of the last look, which are then no more in it; those that were tried before come last."""
        under_way = {run.run_id for run in self._active.values()}
        fit = [run for run in self._found if run.run_id not in under_way and self._backoff.is_due(run)]
        new = [run for run in fit if run.run_id not in self._backoff.missed]
        crowd = new[: max(_CROWD, free)] if len(new) > free else new
        self._random.shuffle(crowd)
        again = [run for run in fit if run.run_id in self._backoff.missed]
        chosen = sorted(crowd[:free], key=lambda run: (run.created_at, run.run_id))
        chosen += again[: free - len(chosen)]
        taken = {run.run_id for run in chosen}
        self._found = [run for run in fit if run.run_id not in taken]
        return chosen

    def _storage_wait(self, seconds: float) -> bool:
        try:
            return self._storage.wait_for_work(seconds, self._halt)
        except StorageError:
            # The next look says what is wrong; until then the time passes as for any store.
            return self._halt.wait(seconds)

    async def _one(self, run: RunRecord) -> None:
        found: Recovered[T] = await recover_run(self._storage, run, self._resume, self._lease_seconds)
        if found.outcome == "busy":
            self._backoff.busy(run)
        else:
            try:
                now = await asyncio.to_thread(self._storage.find_run, run.run_id)
            except StorageError:
                now = None  # what became of the run is known and told; the next look says what is wrong
            if self._is_missed(found) or (now is not None and self._is_as_before(run, now)):
                self._backoff.miss(now or run)
            else:
                self._backoff.forget(run.run_id)
        self._tell(run, found)

    def _is_as_before(self, run: RunRecord, now: RunRecord) -> bool:
        """Whether the run is one to recover again though it was just resumed: at once, it would go round for ever."""
        state = effective_state(now)
        return (
            state is RunState.CRASHED
            or (self._failed and state is RunState.FAILED)
            or (state is run.state and now.sequence == run.sequence)
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        run = self._active.pop(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("Run %r could not be recovered: %s", run.run_id, mask_error(error))
            self._backoff.miss(run)
