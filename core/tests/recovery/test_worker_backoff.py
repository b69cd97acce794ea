"""Which runs a worker leaves alone, for how long, and that it forgets those that are no more. Its clock is a number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from framework.errors import ResumeError, StorageError
from framework.graph.recovery import Recovered
from framework.runner.recovery import Worker
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.records import RunRecord
from tests.recovery.workers_kit import Fickle, crashed, finishing

ELSEWHERE = "another machine/boot/1/owner"
INTERVAL = 10.0


class Elsewhere(Fickle):
    """A store whose clock is the worker's; another process holds ``held``, which is due."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self._clock = lambda: self.now
        self.tried: list[str] = []

    def hold(self, run_id: str, lease_seconds: float = 30.0) -> RunRecord:
        self.open_run(new_run(run_id), ELSEWHERE, lease_seconds)
        accept(self, commit(1, run_id, token=1, state=RunState.PAUSED, wake_at=1.0))
        found = self.find_run(run_id)
        assert found is not None
        assert found.owner == ELSEWHERE
        return found

    def worker(self, concurrency: int = 1) -> Worker[str]:
        finish = finishing(self, [])

        async def resume(run: RunRecord) -> str:
            self.tried.append(run.run_id)
            return await finish(run)

        return Worker(self, resume, concurrency=concurrency, interval=INTERVAL, clock=lambda: self.now)


@pytest.fixture
def store() -> Iterator[Elsewhere]:
    with Elsewhere() as made:
        yield made


async def filled(worker: Worker[str], is_time: bool) -> list[str]:
    """The runs that are taken up when it is time to look, or when a run has ended; they have ended, too."""
    await worker._fill(is_time)
    taken = [run.run_id for run in worker.active]
    await worker._settle()
    return taken


async def test_a_run_that_another_holds_is_tried_once_a_poll(store: Elsewhere) -> None:
    store.hold("held")
    worker = store.worker()
    for _ in range(3):
        assert await filled(worker, True) == ["held"]
        for _ in range(4):
            assert await filled(worker, False) == [], "other runs have ended meanwhile"
        store.now += INTERVAL / 5
        assert await filled(worker, True) == [], "the store told of work"
        store.now += INTERVAL * 0.75
    assert store.tried == ["held"] * 3


async def test_it_is_taken_up_once_it_is_released_or_has_gone_on(store: Elsewhere) -> None:
    held = store.hold("held")
    worker = store.worker()
    assert await filled(worker, True) == ["held"]
    accept(store, commit(2, "held", token=held.token, state=RunState.PAUSED, wake_at=2.0))
    assert await filled(worker, False) == ["held"]
    assert await filled(worker, False) == []
    store.release_lease("held", held.token)
    assert await filled(worker, False) == ["held"]
    ended = store.find_run("held")
    assert ended is not None
    assert ended.state is RunState.COMPLETED


async def test_it_is_taken_over_at_the_first_poll_after_its_lease_though_there_is_no_room_at_polls(
    store: Elsewhere,
) -> None:
    store.hold("held", INTERVAL)
    worker = store.worker()
    assert await filled(worker, True) == ["held"]
    crashed(store, "long")
    await worker._fill(False)
    assert [run.run_id for run in worker.active] == ["long"]
    store.now += INTERVAL + 1
    await worker._fill(True)
    await worker._settle()
    assert store.tried == ["held", "long"]
    assert await filled(worker, False) == ["held"]
    ended = store.find_run("held")
    assert ended is not None
    assert ended.state is RunState.COMPLETED


async def test_runs_that_others_finished_or_deleted_are_forgotten(store: Elsewhere) -> None:
    async def resume(run: RunRecord) -> str:
        raise ResumeError(run.run_id, "no")

    worker = Worker(store, resume, concurrency=2, interval=INTERVAL, clock=lambda: store.now)
    store.open_run(new_run("stays"), "gone", 0)
    for number in range(40):
        crashed(store, f"r{number}")
        await filled(worker, True)
        store.delete_run(f"r{number}", force=True)
        store.now += INTERVAL
    assert set(worker._backoff.missed) <= {"stays", "r38", "r39"}
    assert worker._backoff.missed["stays"].times >= 4, "one that is there still is left alone for ever longer"


async def test_one_that_is_tried_again_is_not_forgotten_meanwhile(store: Elsewhere) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    go_on.set()

    async def resume(run: RunRecord) -> str:
        begun.set()
        store.claim_run(run.run_id, "me", 600)
        await go_on.wait()
        last = commit(run.sequence + 1, run.run_id, run.token + 1, state=RunState.FAILED, error="no", release=True)
        accept(store, last)
        return "done"

    worker = Worker(store, resume, concurrency=2, interval=INTERVAL, failed=True, clock=lambda: store.now)
    crashed(store, "bad")
    assert await filled(worker, True) == ["bad"]
    store.now += 2 * INTERVAL
    begun.clear()
    go_on.clear()
    await worker._fill(True)
    await begun.wait()
    await worker._fill(True)  # a look that does not find it, for it is running
    go_on.set()
    await worker._settle()
    assert worker._backoff.missed["bad"].times == 2


async def test_what_became_of_a_run_is_told_though_the_store_goes_away_then(caplog: pytest.LogCaptureFixture) -> None:
    class Away(Elsewhere):
        def find_run(self, run_id: str) -> RunRecord | None:
            if self.away:
                raise StorageError("the database is away")
            return super().find_run(run_id)

    with Away() as store:
        crashed(store, "r")
        told: list[Recovered[str]] = []
        finish = finishing(store, [])

        async def resume(run: RunRecord) -> str:
            result = await finish(run)
            store.away = True
            return result

        worker = Worker(store, resume, tell=lambda run, found: told.append(found))
        with caplog.at_level(logging.DEBUG, "framework.runner.recovery"):
            assert await filled(worker, True) == ["r"]
        assert told == [Recovered("r", "resumed", "done")]
        assert caplog.text == ""
