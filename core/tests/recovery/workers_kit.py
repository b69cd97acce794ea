"""Runs to take up, an executor that completes them, and a store that is away when told so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from framework.errors import StorageError
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord


def crashed(store: Storage, *run_ids: str, parent: str | None = None) -> None:
    for run_id in run_ids:
        store.open_run(new_run(run_id, parent_run_id=parent), "gone", 0)


def ended(store: Storage, run_id: str, state: RunState, error: str | None = None, wake_at: float | None = None) -> None:
    store.open_run(new_run(run_id))
    accept(store, commit(1, run_id, state=state, error=error, wake_at=wake_at))


def finishing(store: Storage, done: list[str]) -> Callable[[RunRecord], Awaitable[str]]:
    """Resumes a run as an executor does: claims it, and completes it."""

    async def resume(run: RunRecord) -> str:
        claimed = store.claim_run(run.run_id, "me", 60)
        await asyncio.sleep(0)
        last = commit(claimed.sequence + 1, run.run_id, claimed.token, state=RunState.COMPLETED, release=True)
        accept(store, last)
        done.append(run.run_id)
        return "done"

    return resume


class Fickle(MemoryStorage):
    """A store that is away when told so; waiting for work takes no time, and is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.waited: list[float] = []
        self.on_wait: Callable[[int], None] = lambda number: None

    def list_runs(self, *arguments: Any, **named: Any) -> list[RunRecord]:
        if self.away:
            raise StorageError("the database is away")
        return super().list_runs(*arguments, **named)

    def wait_for_work(self, timeout: float, stop: threading.Event | None = None) -> bool:
        self.waited.append(timeout)
        self.on_wait(len(self.waited))
        return False
