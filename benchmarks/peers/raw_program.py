"""The floors: one append with fdatasync, one SQLite commit, or one PostgreSQL commit for each step."""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

from measure import Given, Watch, blob, leave, main, message


def sqlite_store(given: Given) -> sqlite3.Connection:
    connection = sqlite3.connect(given.folder / "raw.db", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, body BLOB)")
    return connection


def writer(given: Given) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """A function that makes one text durable, and one that closes what it writes to."""
    if "append" in given.options:
        handle = os.open(given.folder / "raw.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

        def append(body: str) -> None:
            os.write(handle, body.encode() + b"\n")
            os.fdatasync(handle)

        return append, lambda: os.close(handle)
    if given.url is not None:
        import psycopg

        connection = psycopg.connect(given.url, autocommit=True)
        connection.execute("CREATE TABLE IF NOT EXISTS rows (id BIGSERIAL PRIMARY KEY, body BYTEA)")
        return lambda body: connection.execute(
            "INSERT INTO rows (body) VALUES (%s)", (body.encode(),)
        ), connection.close
    store = sqlite_store(given)

    def commit(body: str) -> None:
        store.execute("BEGIN IMMEDIATE")
        store.execute("INSERT INTO rows (body) VALUES (?)", (body,))
        store.execute("COMMIT")

    return commit, store.close


def one_row_each(given: Given, watch: Watch) -> int:
    """Every step: one row of 1 KB."""
    commit, close = writer(given)
    with watch.measured():
        for number in range(given.steps):
            commit(message(number))
    close()
    return given.steps


def waiting(given: Given, watch: Watch) -> int:
    """Every step: 50 ms of waiting, then one row of 1 KB. A disk and caches that have been idle are slower."""
    commit, close = writer(given)

    async def steps() -> None:
        with watch.measured():
            for number in range(given.steps):
                await asyncio.sleep(0.05)
                commit(message(number))

    asyncio.run(steps())
    close()
    return given.steps


def large(given: Given, watch: Watch) -> int:
    """The 5 MB value once, then a small row for each step; only the steps are measured."""
    commit, close = writer(given)
    commit(blob())
    with watch.measured():
        for number in range(given.steps):
            commit(str(number))
    close()
    return given.steps


def concurrent(given: Given, watch: Watch) -> int:
    """Group commit: every run hands its row to one committer thread and waits until it is durable.

    The thread puts all rows that wait into one transaction.
    """
    commit, close = group_writer(given)
    waiting: queue.SimpleQueue[tuple[str, asyncio.Future[None]] | None] = queue.SimpleQueue()

    def tell(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            future.set_result(None)

    def committer(loop: asyncio.AbstractEventLoop) -> None:
        while (first := waiting.get()) is not None:
            group = [first]
            while not waiting.empty():
                following = waiting.get()
                if following is None:
                    raise SystemExit("the runs ended before their rows were written")
                group.append(following)
            commit([body for body, _ in group])
            loop.call_soon_threadsafe(tell, [future for _, future in group])

    async def one(loop: asyncio.AbstractEventLoop) -> None:
        for number in range(given.steps):
            durable: asyncio.Future[None] = loop.create_future()
            waiting.put((message(number), durable))
            await durable

    async def everything() -> None:
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=committer, args=(loop,))
        thread.start()
        with watch.measured():
            await asyncio.gather(*(one(loop) for _ in range(given.runs)))
        waiting.put(None)
        thread.join()

    asyncio.run(everything())
    close()
    return given.steps * given.runs


def group_writer(given: Given) -> tuple[Callable[[list[str]], Any], Callable[[], Any]]:
    """A function that makes several texts durable in one transaction, and one that closes what it writes to."""
    if given.url is not None:
        import psycopg

        connection = psycopg.connect(given.url)
        connection.execute("CREATE TABLE IF NOT EXISTS rows (id BIGSERIAL PRIMARY KEY, body BYTEA)")
        connection.commit()

        def insert(bodies: list[str]) -> None:
            rows = [(body.encode(),) for body in bodies]
            connection.cursor().executemany("INSERT INTO rows (body) VALUES (%s)", rows)
            connection.commit()

        return insert, connection.close
    store = sqlite_store(given)

    def commit(bodies: list[str]) -> None:
        store.execute("BEGIN IMMEDIATE")
        store.executemany("INSERT INTO rows (body) VALUES (?)", [(body,) for body in bodies])
        store.execute("COMMIT")

    return commit, store.close


def prepare(given: Given, watch: Watch) -> int:
    """What ``resume`` reads: a row for each step."""
    return one_row_each(given, watch)


def resume(given: Given, watch: Watch) -> int:
    """Open the store and read every row."""
    with watch.measured():
        if given.url is not None:
            import psycopg

            with psycopg.connect(given.url) as connection:
                rows: list[Any] = connection.execute("SELECT body FROM rows ORDER BY id").fetchall()
        else:
            rows = sqlite_store(given).execute("SELECT body FROM rows ORDER BY id").fetchall()
    if len(rows) != given.steps:
        raise SystemExit(f"{len(rows)} rows, not {given.steps}")
    leave(watch, 1, given.folder)
    return 1


if __name__ == "__main__":
    main(
        {
            "small": one_row_each,
            "conversation": one_row_each,
            "large": large,
            "concurrent": concurrent,
            "call": one_row_each,
            "waiting": waiting,
            "prepare": prepare,
            "resume": resume,
        }
    )
