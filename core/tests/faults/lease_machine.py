"""The model's workers on a real store: an adversary chooses what happens next, and store and model must agree.

Each worker has a handle of its own on the store. A commit or a release that the model has on its way is held back here
in the same way, and given to the store when the adversary says so. The adversary is whoever calls `choose`: Hypothesis,
or a seeded generator in the long suite.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from framework.errors import CommitConflict, LeaseLost, RunBusy
from framework.storage.contract import commit, new_run
from framework.storage.interface import Storage
from framework.storage.records import RunRecord
from tests.faults.lease_model import NOBODY, Action, Limits, Message, Rules, State, Step, initial, steps

RUN = "run_1"
TICK_SECONDS = 1_000.0
_HELPFUL = frozenset(("read", "claim", "run and send", "made"))
LIMITS = Limits(workers=3, steps=12, tokens=40, lease=2)


@dataclass(slots=True)
class LeaseMachine:
    """``handles`` are the workers' stores; ``tick`` lets ``TICK_SECONDS`` pass by the store's clock; ``reopen`` closes
    the handle of a worker that crashed and opens it again."""

    handles: list[Storage]
    tick: Callable[[], None]
    reopen: Callable[[int], None]
    state: State = field(init=False)
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = initial(LIMITS)
        self.handles[0].open_run(new_run(RUN))

    def step(self, choose: Callable[[Sequence[Step]], Step]) -> bool:
        """Do one of the things that can happen, and compare; ``False`` when the run is complete and all is quiet."""
        possible = list(steps(self.state, Rules(), LIMITS))
        if not possible:
            return False
        chosen = choose(possible)
        self.actions.append(chosen.action)
        assert chosen.wrong is None, (chosen.wrong, self.actions)
        self._do(chosen)
        self.state = chosen.after
        self._compare()
        return True

    def _do(self, step: Step) -> None:
        action, before = step.action, self.state
        worker = before.workers[action.worker] if action.worker != NOBODY else None
        store = self.handles[max(action.worker, 0)]
        match action.name:
            case "tick":
                self.tick()
            case "crash":
                self.reopen(action.worker)
            case "claim":
                assert worker is not None
                record = store.claim_run(RUN, f"worker {action.worker}", _seconds(), None, worker.sequence)
                self._expect(record.token == step.after.token, f"the claim gave token {record.token}")
            case "busy" | "moved on":
                assert worker is not None
                expected = RunBusy if action.name == "busy" else CommitConflict
                self._raises(expected, lambda: store.claim_run(RUN, "another", _seconds(), None, worker.sequence))
            case "renew":
                assert worker is not None
                store.renew_lease(RUN, worker.token, _seconds())
            case "lease lost":
                assert worker is not None
                self._raises(LeaseLost, lambda: store.renew_lease(RUN, worker.token, _seconds()))
            case _ if action.message is not None and action.name != "lost":
                self._deliver(action.name, action.message)
            case _:
                pass  # nothing of it reaches the store

    def _deliver(self, name: str, message: Message) -> None:
        store = self.handles[message.sender]
        if message.kind == "release":
            store.release_lease(RUN, message.token)
            return
        (outcome,) = store.commit([commit(message.sequence, RUN, message.token, checkpoint_id=_name(message))])
        if name.startswith("made"):
            self._expect(outcome is None, f"{message} was refused: {outcome!r}")
        else:
            stale = message.token != self.state.token
            expected = LeaseLost if stale else CommitConflict
            self._expect(type(outcome) is expected, f"{message}: expected {expected.__name__}, found {outcome!r}")

    def _compare(self) -> None:
        """Every worker's handle must show what the model says."""
        for handle in dict.fromkeys(self.handles):
            record = handle.find_run(RUN)
            assert record is not None
            state = self.state
            self._expect(_facts(record) == (state.token, len(state.log), self._shown()), f"the store shows {record}")
            names = [row.checkpoint_id for row in handle.read_checkpoint_rows(RUN)][::-1]
            expected = [_name(Message("commit", 0, token, sequence)) for token, sequence in state.log]
            self._expect(names == expected, f"the store's commits are {names}, the model's {expected}")
        assert self.handles[-1].verify(RUN).ok

    def _shown(self) -> str:
        held = self.state.owner != NOBODY and self.state.lease > 0
        return "running" if held else "crashed"

    def _raises(self, kind: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
        except kind:
            return
        raise AssertionError(f"{kind.__name__} was not raised after {[str(each) for each in self.actions]}")

    def _expect(self, holds: bool, text: str) -> None:
        if not holds:
            raise AssertionError(f"{text}; after {[str(each) for each in self.actions]}; model: {self.state}")


def adversary(rng: random.Random) -> Callable[[Sequence[Step]], Step]:
    """A seeded choice. What gets the run on is chosen as often as all that hinders it, so that runs get somewhere."""

    def choose(possible: Sequence[Step]) -> Step:
        helpful = [step for step in possible if step.action.name in _HELPFUL]
        return rng.choice(helpful if helpful and rng.random() < 0.5 else possible)

    return choose


def _seconds() -> float:
    return LIMITS.lease * TICK_SECONDS


def _name(message: Message) -> str:
    return f"step_{message.sequence}_by_{message.token}"


def _facts(record: RunRecord) -> tuple[int, int, str]:
    return record.token, record.sequence, record.state.value
