"""Waiting workers are told of work by PostgreSQL: at once, each of them, also after the connection broke."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from framework.schemas.run import RunState
from framework.storage import postgres_listen
from framework.storage.contract import accept, commit, new_run
from framework.storage.memory import MemoryStorage
from framework.storage.postgres import PostgresStorage
from tests.postgres_proxy import PostgresProxy
from tests.postgres_server import PostgresServer

LONG = 20.0
"""Seconds; less than the time after which a silent connection is asked whether it still is one."""


@pytest.fixture
def store(postgres_url: str) -> Iterator[PostgresStorage]:
    with PostgresStorage(postgres_url) as made:
        yield made


@pytest.fixture
def worker(postgres_url: str, store: PostgresStorage) -> Iterator[PostgresStorage]:
    """Another handle, which listens already and has heard all there is."""
    with PostgresStorage(postgres_url) as made:
        assert made.wait_for_work(LONG), "whoever begins to listen is to look"
        yield made


def pause(store: PostgresStorage, wake_at: float | None = None) -> None:
    store.open_run(new_run(), "me", 600)
    accept(store, commit(1, token=1, state=RunState.PAUSED, wake_at=wake_at, release=wake_at is None))


OCCASIONS: dict[str, Callable[[PostgresStorage], object]] = {
    "a run that nobody holds": lambda store: store.open_run(new_run("new")),
    "a message": lambda store: store.send("run_1", "answer", b"yes"),
    "a lease given up": lambda store: store.release_lease("run_2", 1),
    "a commit that gives the lease up": lambda store: accept(store, commit(1, "run_2", 1, release=True)),
    "a time to wake at": lambda store: accept(
        store, commit(1, "run_2", 1, state=RunState.PAUSED, wake_at=5.0, release=True)
    ),
    "a fork": lambda store: store.fork_run("run_1", 1, b"{}", commit(2, "fork", state=RunState.PAUSED)),
}


@pytest.mark.parametrize("occasion", OCCASIONS)
def test_workers_are_told(occasion: str, store: PostgresStorage, worker: PostgresStorage) -> None:
    pause(store)
    store.open_run(new_run("run_2"), "me", 600)
    while worker.wait_for_work(0.3):  # what the lines above gave notice of
        pass
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[bool] = pool.submit(worker.wait_for_work, LONG)
        OCCASIONS[occasion](store)
        assert waiting.result()
    assert not worker.wait_for_work(0.2), "once"


def test_a_notice_that_came_before_counts(store: PostgresStorage, worker: PostgresStorage) -> None:
    store.open_run(new_run())
    assert worker.wait_for_work(LONG)
    assert not worker.wait_for_work(0.2)


def test_ordinary_commits_tell_nobody(store: PostgresStorage, worker: PostgresStorage) -> None:
    store.open_run(new_run(), "me", 600)
    accept(store, commit(1, token=1), commit(2, token=1))
    store.renew_lease("run_1", 1, 600)
    accept(store, commit(3, token=1, state=RunState.COMPLETED, release=True))
    assert not worker.wait_for_work(0.3)


def test_all_threads_and_handles_are_told(store: PostgresStorage, worker: PostgresStorage, postgres_url: str) -> None:
    with PostgresStorage(postgres_url) as other, ThreadPoolExecutor(4) as pool:
        assert other.wait_for_work(LONG)
        while worker.wait_for_work(0):
            pass
        waiting = [pool.submit(handle.wait_for_work, LONG) for handle in (worker, worker, worker, other)]
        while worker._listener.waiting < 3:
            time.sleep(0.001)
        store.open_run(new_run())
        assert all(one.result() for one in waiting)


def test_other_schemas_hear_nothing(worker: PostgresStorage, postgres_database: str) -> None:
    with PostgresStorage(f"{postgres_database}?schema=elsewhere") as other:
        other.open_run(new_run(f"run_{time.monotonic_ns()}"))
        assert not worker.wait_for_work(0.3)


def test_waiting_ends_when_it_is_to_stop(store: PostgresStorage, worker: PostgresStorage) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        stopped = pool.submit(worker.wait_for_work, LONG, stop)
        stop.set()
        assert not stopped.result(5)
        closed = pool.submit(worker.wait_for_work, LONG)
        worker.close()
        assert not closed.result(5)


def test_a_broken_connection_counts_as_a_notice(store: PostgresStorage, postgres_url: str) -> None:
    with PostgresProxy(postgres_url) as proxy, PostgresStorage(proxy.url) as worker:
        assert worker.wait_for_work(LONG)
        assert not worker.wait_for_work(0.2)
        proxy.cut_all()
        assert worker.wait_for_work(LONG), "something may have been missed"
        assert not worker.wait_for_work(0.2)
        proxy.refuse = True
        proxy.cut_all()
        assert not worker.wait_for_work(0.5), "the database is away, which is no error here"
        store.open_run(new_run())
        proxy.refuse = False
        assert worker.wait_for_work(LONG)


def test_a_silent_connection_is_asked_whether_it_is_one(
    store: PostgresStorage, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_listen, "ASK_SECONDS", 0.0)
    with PostgresProxy(postgres_url) as proxy, PostgresStorage(proxy.url) as worker:
        assert worker.wait_for_work(LONG)
        before = proxy.round_trips
        assert not worker.wait_for_work(0.5)
        assert proxy.round_trips > before
        store.open_run(new_run())
        assert worker.wait_for_work(LONG), "also when the notice comes with the answer"


def test_listening_elsewhere_or_not_at_all(store: PostgresStorage, postgres: PostgresServer, postgres_url: str) -> None:
    """A pooler of transactions passes no notices on, so the URL may name another place for them."""
    with PostgresProxy(postgres_url) as pooler:
        pooler.cut_request = lambda data: b"LISTEN" in data
        with PostgresStorage(f"{pooler.url}&listen=127.0.0.1:{postgres.port}") as worker:
            assert worker.wait_for_work(LONG)
            store.open_run(new_run())
            assert worker.wait_for_work(LONG)
        connections = pooler.connections
        with PostgresStorage(f"{pooler.url}&listen=no") as deaf:
            assert not deaf.wait_for_work(0.2)
            assert pooler.connections == connections + 1


def test_a_store_without_notices_waits() -> None:
    with MemoryStorage() as store:
        stop = threading.Event()
        started = time.monotonic()
        assert not store.wait_for_work(0.05)
        assert time.monotonic() - started >= 0.05
        stop.set()
        assert not store.wait_for_work(LONG, stop)
        assert not store.wait_for_work(-1)
