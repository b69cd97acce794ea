"""Several threads and processes at one store: readers beside a writer, one winner of a claim, nobody's write lost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from framework.storage import codec
from framework.storage.backend import FileStorage, Storage
from framework.storage.checkpoints import format_digest
from framework.storage.chunks import Chunk, chain, diff
from framework.storage.contract import accept, commit, new_run
from framework.storage.postgres import PostgresStorage
from framework.storage.records import Damage, Retention
from framework.storage.sqlite import SQLiteStorage
from framework.testing import StorageUnderTest


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


def second_handle(store: Storage) -> Storage:
    if isinstance(store, SQLiteStorage):
        return SQLiteStorage(store.path)
    if isinstance(store, PostgresStorage):
        return PostgresStorage(store.url)
    assert isinstance(store, FileStorage)
    return FileStorage(store.base_path)


def test_a_reader_never_takes_retention_for_damage(durable: StorageUnderTest) -> None:
    store = durable.new()
    store.open_run(new_run(), "me", 600)
    reader = second_handle(store)
    first_written, stop = threading.Event(), threading.Event()

    def write() -> None:
        digests: dict[str, int] = {}
        old: dict[str, bytes] = {}
        sequence = 0
        while not stop.is_set():
            sequence += 1
            new = {"n": codec.encode(sequence), "grown": codec.encode(list(range(sequence % 7)))}
            chunks = diff(old, new)
            for chunk in chunks:
                digests[chunk.key] = chain(digests.get(chunk.key, 0), chunk)
            body = {"v": 1, "executor": "graph", "at": None, "status": "in_progress", "step_number": sequence}
            body |= {"digest": format_digest(digests.values()), "tokens": 0, "latency_ms": 0, "path": ["n"]}
            body["at"] = "2026-01-01T00:00:00"
            accept(
                store,
                commit(sequence, token=1, checkpoint=codec.encode(body), chunks=chunks, retention=Retention(1)),
            )
            old = new
            first_written.set()
            stop.wait(0.001)  # a writer that never pauses leaves a reader of files no moment to read in

    writer = threading.Thread(target=write)
    writer.start()
    damage: list[Damage] = []
    try:
        assert first_written.wait(20)
        for turn in range(24):
            newest = reader.load_latest_checkpoint("run_1", damage.append)
            assert newest is not None
            assert newest.memory_snapshot["n"] == newest.step_number
            if turn % 6 == 0:
                assert reader.verify("run_1").ok
    finally:
        stop.set()
        writer.join()
        reader.close()
    assert damage == []


PROGRAM = """
    import sys
    from framework.errors import RunBusy
    from framework.schemas.checkpoint import Checkpoint
    from framework.storage.backend import open_storage

    url, action, worker = sys.argv[1:]
    with open_storage(url) as store:
        if action == "claim":
            won = 0
            for number in range(10):
                try:
                    store.claim_run(f"run_{number}", worker, 600)
                    won += 1
                except RunBusy:
                    pass
            print(won)
        else:
            for number in range(8):
                store.save_checkpoint(
                    Checkpoint(id=f"c_{worker}_{number}", run_id="shared", executor_type="graph",
                               memory_snapshot={f"k{worker}": [number]})
                )
"""


def test_of_processes_that_claim_one_wins(durable: StorageUnderTest, python: Python) -> None:
    store = durable.new()
    for number in range(10):
        store.open_run(new_run(f"run_{number}"), "dead", 0)
    with ThreadPoolExecutor(3) as pool:
        won = list(pool.map(lambda worker: int(python(PROGRAM, store.url, "claim", worker)), range(3)))
    assert sum(won) == 10
    assert {record.token for record in store.list_runs()} == {2}


def test_processes_that_save_lose_nothing(durable: StorageUnderTest, python: Python) -> None:
    store = durable.new()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda worker: python(PROGRAM, store.url, "save", worker), range(2)))
    assert len(store.list_checkpoints("shared")) == 16
    for worker in range(2):
        for number in range(8):
            loaded = store.load_checkpoint("shared", f"c_{worker}_{number}")
            assert loaded is not None
            assert loaded.memory_snapshot == {f"k{worker}": [number]}
    assert store.verify().ok


def test_threads_share_a_store(durable: StorageUnderTest) -> None:
    store = durable.new()

    def work(number: int) -> None:
        store.open_run(new_run(f"run_{number}"), "me", 60)
        for sequence in range(1, 11):
            accept(store, commit(sequence, f"run_{number}", 1, chunks=[Chunk("n", "set", b"%d" % sequence)]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [record.sequence for record in store.list_runs()] == [10] * 4
    assert store.verify().ok


SENDER = """
    import sys
    from framework.errors import MessageRefused
    from framework.storage.backend import open_storage

    with open_storage(sys.argv[1]) as store:
        for number in range(10):
            store.send("run_1", f"own {sys.argv[2]} {number}", sys.argv[2].encode())
            try:
                store.send("run_1", f"shared {number}", sys.argv[2].encode())
                print(number)
            except MessageRefused:
                pass
"""


def test_processes_that_send_lose_nothing_and_one_takes_each_name(durable: StorageUnderTest, python: Python) -> None:
    store = durable.new()
    store.open_run(new_run())
    with ThreadPoolExecutor(3) as pool:
        printed = list(pool.map(lambda index: python(SENDER, store.url, index), range(3)))
    won = sorted(int(number) for lines in printed for number in lines.split())
    assert won == list(range(10)), "each shared name has one winner"
    found = store.read_messages("run_1")
    assert len({message.name for message in found}) == len(found) == 40
    for index, lines in enumerate(printed):
        shared = {f"shared {number}" for number in lines.split()}
        own = {f"own {index} {number}" for number in range(10)}
        assert {message.name for message in found if message.body == b"%d" % index} == shared | own
    assert store.count_messages(["run_1"]) == {"run_1": 40}
