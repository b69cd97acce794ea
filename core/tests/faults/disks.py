"""Disks that are full or broken, at every single write: the run goes on or fails clearly, and nothing is lost.

The worker's own system calls fail (see ``syscalls``), so SQLite's writes, made in C, are met as well as Python's. A
fault is put before the n-th write or sync below the store's folder, for each n of a whole life in turn, and lasts for
one call, for some, or to the end. Then there is space again, and another process goes on.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.bench import Case, Lab, Life
from tests.faults.syscalls import NAMES, SYNCS, WRITES, Call, Decide, Verdict, run_watched
from tests.faults.work import WORKS

RUNS_A_STORE = 10


def is_stores(call: Call, folder: str) -> bool:
    """Whether the call is about a file of the store, and not about a ledger or a pipe."""
    return call.path is not None and call.path.startswith(folder)


class Faulty:
    """Fails the calls of one kind from the ``first``-th on, ``count`` of them."""

    def __init__(self, folder: str, names: frozenset[str], error: int, first: int, count: int) -> None:
        self._folder = folder
        self._names = names
        self._error = error
        self._range = range(first, first + count)
        self.seen = 0
        self.failed: Counter[str] = Counter()

    def __call__(self, call: Call) -> Verdict:
        if call.name not in self._names or not is_stores(call, self._folder):
            return None
        self.seen += 1
        if self.seen not in self._range:
            return None
        self.failed[call.name] += 1
        return self._error


def _folder_of(url: str) -> str:
    return url.removeprefix("sqlite:///").removeprefix("file://")


def fill_disks(lab: Lab, backend: str, size: int) -> None:
    """``size`` writes that find the disk full: each in turn, over both works."""
    _each_in_turn(lab, backend, size, WRITES | NAMES, errno.ENOSPC)


def break_syncs(lab: Lab, backend: str, size: int) -> None:
    """``size`` syncs that fail with an input/output error."""
    _each_in_turn(lab, backend, size, SYNCS, errno.EIO)


def _each_in_turn(lab: Lab, backend: str, size: int, names: frozenset[str], error: int) -> None:
    rng = lab.rng
    url = lab.new_store(backend)
    numbers = _numbers(lab, backend, names, size)
    for number, (work, first) in enumerate(numbers):
        if number and number % RUNS_A_STORE == 0:
            lab.drop_store(url)
            url = lab.new_store(backend)
        count = rng.choice((1, 1, 3, 10**9))
        case = Case(lab, url, work, f"run-{number}")
        faulty = Faulty(_folder_of(url), names, error, first, count)
        case.story.append(f"{errno.errorcode[error]} at call {first}, {count} times")
        run_with_fault(case, faulty)
        lab.notes.update({f"{name} failed": failed for name, failed in faulty.failed.items()})
        case.check()
        case.finish()
    lab.drop_store(url)


def run_with_fault(case: Case, decide: Decide, make: Callable[[Life], Life] = lambda life: life) -> None:
    """One life whose calls ``decide`` may fail: it succeeds, or says clearly what went wrong."""
    worker, _ = run_watched(make(case.next_life()).run, case.lab.errors, decide)
    result = worker.result()
    if result is None:
        case.fail("a worker was killed that nobody killed")
    elif "raised" in result or not result["success"]:
        kind, text = result.get("raised", "a failed run"), result.get("text") or result["error"]
        case.lab.notes["failed clearly"] += 1
        if not is_clear(kind, str(text), case.url):
            case.fail(f"an unclear failure: {kind}: {text}")
    else:
        case.lab.notes["went on"] += 1
        case.result = result


def is_clear(kind: str, text: str, url: str) -> bool:
    """Whether a failure says that the store was the matter, and which."""
    where = Path(_folder_of(url)).name if not url.startswith("postgresql:") else ""
    return kind in ("StorageError", "a failed run", "LeaseLost") and where in text


def _numbers(lab: Lab, backend: str, names: frozenset[str], size: int) -> list[tuple[str, int]]:
    """Which call of which work is to fail: all of a life's in turn, as many of them as asked for."""
    found: list[tuple[str, int]] = []
    for work in WORKS:
        url = lab.new_store(backend)
        counting = Faulty(_folder_of(url), names, 0, 1, 0)
        case = Case(lab, url, work, "count")
        worker, _ = run_watched(case.next_life().run, lab.errors, counting)
        case.take(worker.result())
        case.ledger.unlink()
        lab.drop_store(url)
        found += [(work, number) for number in range(1, counting.seen + 1)]
    order = random.Random(lab.seed)  # the same in each task, so that tasks take other parts of it
    order.shuffle(found)
    start = int(lab.name.rpartition("/")[2]) * size
    return [found[(start + index) % len(found)] for index in range(size)]
