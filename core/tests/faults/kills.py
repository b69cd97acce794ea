"""SIGKILL anywhere: at random moments, at random points of the library, and at random system calls.

Every life but the last of a run is killed; the next one resumes it. Moments are drawn over a whole life, from the fork
to after the store is closed, as measured by the lives that were not killed in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.faults.bench import Case, Lab, at_point, die, integrity, now
from tests.faults.processes import run_apart, spawn
from tests.faults.syscalls import kill_at, run_watched
from tests.faults.work import POINTS, WORKS

RUNS_A_STORE = 4
MOST_LIVES = 40
"""After so many kills of one run it is left to finish, so that each run's end is seen."""


@dataclass(slots=True)
class _Measured:
    """How long a life takes that is not killed, and how many system calls it makes; of the work's first life."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def kill_runs(lab: Lab, backend: str, kills: int) -> None:
    """Runs, one after the other, until there were ``kills`` kills."""
    measured = _Measured()
    number = 0
    while lab.kills < kills:
        url = lab.new_store(backend)
        for _ in range(RUNS_A_STORE):
            number += 1
            work = lab.rng.choice(WORKS)
            case = Case(lab, url, work, f"run-{number}", pace=lab.rng.choice((0.0, 0.0, 0.0005, 0.002)))
            _kill_until_it_ends(case, kills, measured)
            case.finish()
            if lab.kills >= kills:
                break
        if backend == "sqlite":
            path = url.removeprefix("sqlite:///")
            said = run_apart(lambda path=path: integrity(path), lab.errors)  # type: ignore[misc]
            if said != "ok":
                lab.violation(f"{lab.name}: SQLite finds its file broken: {said}")
        lab.drop_store(url)


def _kill_until_it_ends(case: Case, kills: int, measured: _Measured) -> None:
    lab, rng = case.lab, case.lab.rng
    # How far the lives of this run get: some never beyond their start, some nearly to the end.
    reach = rng.choice((0.25, 0.5, 1.0, 1.2))
    while case.result is None and lab.kills < kills and case.lives < MOST_LIVES:
        how = rng.choices(("moment", "point", "call"), (5, 2, 3))[0]
        if how == "point":
            point, number = rng.choice(POINTS), rng.randint(1, 10)
            case.story.append(f"{point}:{number}")
            worker = case.start(fault=at_point(point, number, die))
        elif how == "call":
            number = rng.randint(1, max(2, int(reach * measured.calls.get(case.work, 300))))
            case.story.append(f"call {number}")
            worker, made = run_watched(case.next_life().run, lab.errors, kill_at(number))
            if case.lives == 1 and not worker.killed:
                measured.calls[case.work] = made
        else:
            moment = rng.uniform(0.0, reach) * measured.seconds.get(case.work, 0.08)
            case.story.append(f"after {moment * 1000:.1f} ms")
            begun = now()
            worker = spawn(case.next_life().run, lab.errors)
            if not worker.wait(moment):
                worker.kill()
            if case.lives == 1 and not worker.killed:
                measured.seconds[case.work] = now() - begun
            elif case.lives == 1 and moment > measured.seconds.get(case.work, 0.08):
                measured.seconds[case.work] = moment * 1.2  # the machine has become slower
        case.take(worker.result())
        if worker.killed:
            lab.kills += 1
            lab.notes[f"killed at a {how}"] += 1
            case.check()
        else:
            lab.notes["ended before its kill"] += 1
            if case.result is None:
                return
