"""What a worker that finds nothing to do asks of PostgreSQL: as much for a thousand runs as for none."""

from __future__ import annotations

import asyncio
import threading

import pytest

from framework.runner.recovery import Worker
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.postgres import PostgresStorage
from framework.storage.records import RunRecord
from tests.postgres_proxy import PostgresProxy

LOOKS = 5
A_LOOK = 4
"""Crashed runs, running ones whose process is gone, paused ones that are due, and those with messages."""


class Counting(PostgresStorage):
    """A store whose wait for work is no wait; after ``LOOKS`` of them it stops ``worker``."""

    worker: Worker[None]
    looks = 0

    def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
        self.looks += 1
        if self.looks == LOOKS:
            self.worker.stop()
        return False


async def resume(run: RunRecord) -> None:
    raise AssertionError(f"{run.run_id} is taken up")


@pytest.mark.parametrize("count", [1, 20])
async def test_an_idle_worker_asks_four_questions_a_look(postgres_url: str, count: int) -> None:
    with PostgresProxy(postgres_url) as proxy, Counting(proxy.url) as store:
        for number in range(count):
            for state in (RunState.COMPLETED, RunState.FAILED, RunState.PAUSED):
                store.open_run(new_run(f"{state.value}-{number}"))
                accept(store, commit(1, f"{state.value}-{number}", state=state))
            store.open_run(new_run(f"elsewhere-{number}"), "somebody/else", 600)
        store.worker = Worker(store, resume)
        before, connections = proxy.round_trips, proxy.connections
        await asyncio.wait_for(store.worker.run(), 20)
        assert store.looks == LOOKS
        assert proxy.round_trips - before == A_LOOK * LOOKS
        assert proxy.connections == connections
