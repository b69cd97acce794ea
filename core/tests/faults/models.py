"""The model in the suite: every state of larger models, and the adversary at length on every real store."""

from __future__ import annotations

import random
from contextlib import ExitStack

from framework.storage.backend import Storage
from framework.storage.contract import ManualClock
from framework.storage.memory import MemoryStorage
from tests.faults.bench import Lab, open_at
from tests.faults.lease_machine import TICK_SECONDS, LeaseMachine, adversary
from tests.faults.lease_model import BROKEN, Limits, Rules, explore
from tests.faults.processes import run_apart

MODELS = (
    Limits(workers=2, steps=2, tokens=3, lease=2),
    Limits(workers=3, steps=2, tokens=2, lease=1),
    Limits(workers=3, steps=1, tokens=3, lease=1),
    Limits(workers=2, steps=3, tokens=3, lease=2),
    Limits(workers=3, steps=2, tokens=3, lease=1),
)
STEPS = 150


def check_models(lab: Lab, backend: str, size: int) -> None:
    """``size`` of the models, each with all of its states; and each broken rule must be found."""
    first = int(lab.name.rpartition("/")[2]) * size
    for limits in MODELS[first : first + size]:
        explored = explore(Rules(), limits)
        lab.count += 1
        lab.notes["states"] += explored.states
        lab.notes["transitions"] += explored.transitions
        if explored.wrong is not None:
            lab.violation(f"{lab.name}: {limits}: {explored.wrong}: {explored.counterexample}")
        if explored.stuck:
            lab.violation(f"{lab.name}: {limits}: the run cannot be completed from {explored.stuck[0]}")
    for name, rules in BROKEN.items():
        if explore(rules, Limits()).wrong is None:
            lab.violation(f"{lab.name}: the broken rule {name} was not found")


def drive_stores(lab: Lab, backend: str, size: int) -> None:
    """``size`` times: three workers on a store, and an adversary who chooses what happens next."""
    for number in range(size):
        url = "" if backend == "memory" else lab.new_store(backend)
        seed = f"{lab.seed}/{lab.name}/{number}"
        wrong = run_apart(lambda url=url, seed=seed: drive(url, seed), lab.errors)  # type: ignore[misc]
        lab.count += 1
        if wrong is not None:
            lab.violation(f"{lab.name}: seed {seed}: {wrong}")
        if url:
            lab.drop_store(url)


def drive(url: str, seed: str) -> str | None:
    """In a process of its own: what was wrong."""
    clock = ManualClock()
    with ExitStack() as stack:
        handles: list[Storage] = []
        if not url:
            handles = [stack.enter_context(MemoryStorage(clock=clock))] * 3
        else:
            handles = [open_at(url, clock) for _ in range(3)]
            stack.callback(lambda: [handle.close() for handle in handles])

        def reopen(number: int) -> None:
            if url:
                handles[number].close()
                handles[number] = open_at(url, clock)

        machine = LeaseMachine(handles, lambda: clock.advance(TICK_SECONDS), reopen)
        choose = adversary(random.Random(seed))
        try:
            for _ in range(STEPS):
                if not machine.step(choose):
                    break
        except AssertionError as error:
            return str(error)
    return None
