"""The model of lease, fence and commit: every state of it is right, and every mistake in it would be found."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.storage.backend import FileStorage, Storage
from framework.storage.contract import ManualClock
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write
from framework.storage.sqlite import SQLiteStorage
from tests.faults.lease_machine import RUN, TICK_SECONDS, LeaseMachine, adversary
from tests.faults.lease_model import BROKEN, Limits, Rules, explore

FOUND = {
    "commit_checks_token": "a commit by token 1 is made although token 2 was given since",
    "token_grows": "token 1 is given a second time",
    "store_clock": "a run is taken from an owner whose lease has not passed",
    "commit_checks_sequence": "step 1 is committed after 1 steps",
    "claim_is_atomic": "token 1 is given a second time",
    "claim_checks_sequence": "step 1 runs again, which was committed when its worker claimed the run",
    "release_checks_token": "a run is taken from an owner whose lease has not passed",
    "renew_checks_token": "a stale owner keeps the run from others",
    "durable_before_answer": "a confirmed commit is lost",
}


@pytest.mark.parametrize(
    "limits", [Limits(workers=2, steps=2, tokens=3, lease=2), Limits(workers=3, steps=2, tokens=2, lease=1)], ids=str
)
def test_every_state_of_the_model_is_right(limits: Limits) -> None:
    explored = explore(Rules(), limits)
    assert explored.wrong is None, explored.counterexample
    assert explored.stuck == [], "from every state the run can still be completed"
    assert explored.states > 20_000, "it is not the model that it was"


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    explored = explore(BROKEN[rule], Limits())
    assert explored.wrong == FOUND[rule]
    assert len(explored.counterexample) <= 12, "the shortest way to it"


# --- the real stores under the same adversary -----------------------------------------------------------------------


def _memory(folder: Path, clock: ManualClock) -> Storage:
    return MemoryStorage(clock=clock)


def _sqlite(folder: Path, clock: ManualClock) -> Storage:
    return SQLiteStorage(folder / "runs.db", clock=clock)


def _files(folder: Path, clock: ManualClock) -> Storage:
    return FileStorage(folder, clock=clock)


@contextmanager
def machine(opener: Callable[[Path, ManualClock], Storage]) -> Iterator[LeaseMachine]:
    """Three workers on a new store. One in memory has one handle, and cannot be opened again."""
    clock = ManualClock()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = opener(folder, clock)
        shared = isinstance(first, MemoryStorage)
        handles = [first, *(first if shared else opener(folder, clock) for _ in range(2))]
        stack.callback(lambda: [handle.close() for handle in handles])

        def reopen(number: int) -> None:
            if not shared:
                handles[number].close()
                handles[number] = opener(folder, clock)

        yield LeaseMachine(handles, lambda: clock.advance(TICK_SECONDS), reopen)


@pytest.mark.parametrize("opener", [_memory, _sqlite, _files], ids=["memory", "sqlite", "files"])
def test_the_stores_do_as_the_model(opener: Callable[[Path, ManualClock], Storage]) -> None:
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def explored(data: Any) -> None:
        with machine(opener) as under_test:
            for _ in range(data.draw(st.integers(1, 40))):
                under_test.step(lambda possible: data.draw(st.sampled_from(possible)))

    explored()


# --- and it finds stores that are wrong -----------------------------------------------------------------------------


class _CommitsForAnybody(MemoryStorage):
    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        record = self.find_run(RUN)
        token = 0 if record is None else record.token
        return super().commit([replace(one, token=token) if isinstance(one, Commit) else one for one in commits])


class _ReleasesForAnybody(MemoryStorage):
    def release_lease(self, run_id: str, token: int) -> None:
        record = self.find_run(run_id)
        super().release_lease(run_id, token if record is None else record.token)


class _RenewsForAnybody(MemoryStorage):
    def renew_lease(self, run_id: str, token: int, lease_seconds: float) -> None:
        record = self.find_run(run_id)
        super().renew_lease(run_id, token if record is None else record.token, lease_seconds)


class _ClaimsWhatWentOn(MemoryStorage):
    def claim_run(
        self, run_id: str, owner: str, lease_seconds: float, is_alive: Any = None, sequence: Any = None
    ) -> Any:
        return super().claim_run(run_id, owner, lease_seconds, is_alive, None)


class _ByItsOwnClock(MemoryStorage):
    def claim_run(
        self, run_id: str, owner: str, lease_seconds: float, is_alive: Any = None, sequence: Any = None
    ) -> Any:
        return super().claim_run(run_id, owner, lease_seconds, lambda holder: False, sequence)


@pytest.mark.parametrize(
    "wrong", [_CommitsForAnybody, _ReleasesForAnybody, _RenewsForAnybody, _ClaimsWhatWentOn, _ByItsOwnClock]
)
def test_a_wrong_store_is_found(wrong: type[MemoryStorage]) -> None:
    def many() -> None:
        for seed in range(60):
            with machine(lambda folder, clock: wrong(clock=clock)) as under_test:
                choose = adversary(random.Random(seed))
                for _ in range(60):
                    under_test.step(choose)

    with pytest.raises(AssertionError, match="after \\["):
        many()
