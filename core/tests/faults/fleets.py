"""Several processes on the same runs: claims race, workers are killed and stopped at any time, clocks jump.

Each worker goes round the runs and works on whichever it is given. Half of the workers of a fleet pass for processes
of other machines, of which only the lease tells whether they live.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import SurefootError
from framework.storage import ownership
from tests.faults.bench import Case, Lab, now, open_at
from tests.faults.ledger import Ledger
from tests.faults.processes import Worker, spawn
from tests.faults.work import WORKS, run_work

LEASE_SECONDS = 0.4
PAUSE_SECONDS = 0.01
MOST_SECONDS = 90.0
HOUR = 3600.0
EXPECTED = frozenset(("RunBusy", "LeaseLost", "CommitConflict", "RunExists"))
"""What a worker may be told that another one was faster."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker of a fleet, until all runs are complete."""

    number: int
    url: str
    runs: Sequence[tuple[str, str, Path]]
    lease: float
    pace: float
    elsewhere: bool
    seed: str
    clock: Callable[[], float] | None

    def run(self) -> dict[str, Any]:
        """In the worker: what it was told, counted, and the results of the runs that it saw completed."""
        rng = random.Random(self.seed)
        if self.elsewhere:
            place = f"host-{self.number}/-/-"
            vars(ownership)["_place"] = lambda: place
        if self.clock is not None and self.url.startswith("postgresql:"):
            # A store in files is given the clock. It also compares times of the system's with those of files, which
            # cannot be off for one process alone.
            time.time = self.clock
        told: dict[str, int] = {}
        wrong: list[str] = []
        done: dict[str, Any] = {}
        # A database has a clock of its own.
        with open_at(self.url, None if self.url.startswith("postgresql:") else self.clock) as store:
            ledgers = {run_id: Ledger(path, self.number) for run_id, _, path in self.runs}
            for run_id, ledger in ledgers.items():
                ledger.watch(store, run_id)
            while len(done) < len(self.runs):
                open_runs = [each for each in self.runs if each[0] not in done]
                for run_id, work, _ in rng.sample(open_runs, len(open_runs)):
                    try:
                        result = asyncio.run(run_work(work, store, run_id, ledgers[run_id], self.pace, self.lease))
                    except SurefootError as error:
                        name = type(error).__name__
                        told[name] = told.get(name, 0) + 1
                        if name not in EXPECTED:
                            wrong.append(f"{run_id}: {name}: {error}")
                            done[run_id] = None
                        continue
                    done[run_id] = result
                    if not result["success"]:
                        wrong.append(f"{run_id}: {result['error']}")
                time.sleep(PAUSE_SECONDS)
        return {"told": told, "wrong": wrong}


class SharedClock:
    """A machine's clock, which jumps for all processes at once; each may be off by some hours of its own."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._real = time.time

    def jump(self, seconds: float) -> None:
        self._memory[:] = struct.pack("d", self._offset() + seconds)

    def _offset(self) -> float:
        return float(struct.unpack("d", self._memory[:])[0])

    def ahead(self, seconds: float) -> Callable[[], float]:
        """This clock as seen by a process that is so much ahead."""
        return lambda: self._real() + self._offset() + seconds


@dataclass(slots=True)
class Fleet:
    """Workers over a few runs of one store."""

    lab: Lab
    url: str
    size: int
    cases: list[Case]
    clock: SharedClock | None = None
    skewed: bool = False
    lease: float = LEASE_SECONDS
    members: int = 0
    alive: dict[int, Worker] = field(default_factory=dict)

    def start(self) -> None:
        self.members += 1
        number, rng = self.members, self.lab.rng
        off = rng.choice((0.0, 0.0, 5 * HOUR, -5 * HOUR)) if self.skewed else 0.0
        member = Member(
            number,
            self.url,
            [(case.run_id, case.work, case.ledger) for case in self.cases],
            self.lease,
            rng.choice((0.0, 0.001, 0.005)),
            # A clock that jumps makes leases last for hours; then only who can see that the owner is dead goes on.
            elsewhere=self.clock is None and number % 2 == 0,
            seed=f"{self.lab.seed}/{self.lab.name}/{self.cases[0].run_id}/{number}",
            clock=None if self.clock is None else self.clock.ahead(off),
        )
        self.alive[number] = spawn(member.run, self.lab.errors)

    def until_done(self, kills: int, stops: int) -> None:
        """Disturb the workers at random until all have seen all runs completed; then check every run."""
        lab, rng = self.lab, self.lab.rng
        for _ in range(self.size):
            self.start()
        begun = now()
        stopped: dict[int, float] = {}
        while self.alive:
            time.sleep(rng.uniform(0.0, 0.03))
            for number in [number for number, worker in self.alive.items() if worker.wait(0)]:
                self._ended(number)
            for number in [number for number, until in stopped.items() if until < now()]:
                del stopped[number]
                if number in self.alive:
                    self.alive[number].signal(signal.SIGCONT)
            if now() - begun > MOST_SECONDS:
                self._give_up()
            awake = [number for number in self.alive if number not in stopped]
            if awake and kills and rng.random() < 0.4:
                kills -= 1
                self._kill(rng.choice(awake))
            elif awake and stops and rng.random() < 0.3:
                stops -= 1
                number = rng.choice(awake)
                self.alive[number].signal(signal.SIGSTOP)
                stopped[number] = now() + self.lease * rng.uniform(0.5, 2.0)
                lab.notes["stopped and continued"] += 1
            elif self.clock is not None and rng.random() < 0.3:
                self.clock.jump(rng.choice((-3, -1, 1, 3)) * HOUR)
                lab.notes["jumps of the clock"] += 1
        for case in self.cases:
            case.story.append(f"{self.members} workers")
            case.finish()

    def _kill(self, number: int) -> None:
        worker = self.alive.pop(number)
        worker.kill()
        worker.close()
        if worker.killed:
            self.lab.kills += 1
        self.start()

    def _ended(self, number: int) -> None:
        result = self.alive.pop(number).result()
        for text in result["wrong"]:
            self.lab.violation(f"{self.lab.name}: worker {number}: {text}")
        self.lab.notes.update({f"told {name}": count for name, count in result["told"].items()})

    def _give_up(self) -> None:
        self.lab.violation(f"{self.lab.name}: the runs were not complete after {MOST_SECONDS:.0f} s")
        for worker in self.alive.values():
            worker.kill()
            worker.close()
        self.alive.clear()


def _cases(lab: Lab, url: str, count: int, lease: float) -> list[Case]:
    return [Case(lab, url, lab.rng.choice(WORKS), f"run-{number}", lease=lease) for number in range(count)]


def race(lab: Lab, backend: str, size: int, workers: int) -> None:
    """``size`` times, so many workers at once."""
    for _ in range(size):
        url = lab.new_store(backend)
        fleet = Fleet(lab, url, workers, _cases(lab, url, lab.rng.randint(2, 6), LEASE_SECONDS))
        fleet.until_done(kills=lab.rng.randint(0, 2 * workers), stops=lab.rng.randint(0, workers))
        lab.drop_store(url)


def race_two(lab: Lab, backend: str, size: int) -> None:
    """Two processes on the same runs."""
    race(lab, backend, size, 2)


def race_eight(lab: Lab, backend: str, size: int) -> None:
    """Eight processes on the same runs."""
    race(lab, backend, size, 8)


def jump_clocks(lab: Lab, backend: str, size: int) -> None:
    """Three workers whose clocks are hours off and jump. A database's own clock must not care."""
    for _ in range(size):
        url = lab.new_store(backend)
        clock = SharedClock()
        lease = 5.0 if backend == "postgres" else LEASE_SECONDS
        fleet = Fleet(lab, url, 3, _cases(lab, url, 3, lease), clock, skewed=True, lease=lease)
        fleet.until_done(kills=lab.rng.randint(0, 6), stops=0)
        if backend == "postgres" and lab.notes["told LeaseLost"]:
            lab.violation(f"{lab.name}: a worker lost its lease to the clock of another one")
        lab.drop_store(url)
