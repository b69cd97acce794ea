"""Changing the keys of a store: all is encrypted anew, whatever stops it, while runs go on; then a key may go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.errors import KeyNotFound, NotEncrypted, StorageError
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.contract import Writer, accept, commit, new_run, snapshot
from framework.storage.encryption import EncryptedStorage, KeyRing, appearance
from framework.storage.encryption_rotation import Progress, count_keys, encrypt_plain
from framework.storage.records import Content
from tests.storage.conftest import Python, make
from tests.storage.test_encryption import BACKENDS, NEW, OLD, RING, fill

FIRST = KeyRing([OLD])


@pytest.fixture(params=["sqlite", "files", "memory", "postgresql"])
def inner(request: pytest.FixtureRequest) -> Iterator[Storage]:
    """Every backend, as it is below the encryption."""
    with make(request.param, request)._factory() as store:
        yield store


def everything(store: Storage) -> list[object]:
    """All that a store says of the runs."""
    found: list[object] = []
    for run_id in ("r1", "r2"):
        found += [snapshot(store, run_id), store.read_messages(run_id), store.load_run(run_id)]
        found.append(store.definition(f"f of {run_id}"))
    return found


def test_everything_has_the_newest_key_and_says_the_same(inner: Storage) -> None:
    before = EncryptedStorage(inner, FIRST)
    for run_id in ("r1", "r2"):
        fill(before, run_id)
    said, counts = everything(before), before.count_keys()
    assert counts.keys() == {"k1"}
    store = EncryptedStorage(inner, RING)
    with pytest.raises(StorageError, match=rf"Key 'k1' is still needed: {counts['k1']} contents"):
        RING.without("k1", store.count_keys())
    steps: list[Progress] = []
    done = store.rotate_keys(steps.append)
    assert (done.replaced, done.damage) == (counts["k1"], ())
    assert (steps[0].runs_done, steps[-1].runs_done, steps[-1].runs) == (0, 2, 2)
    assert store.count_keys() == {"k2": counts["k1"]}
    assert everything(store) == said
    assert store.rotate_keys().replaced == 0
    alone = RING.without("k1", store.count_keys())
    assert alone.ids == ("k2",)
    assert everything(EncryptedStorage(inner, alone)) == said
    with pytest.raises(KeyNotFound, match="'k2'"):
        EncryptedStorage(inner, FIRST).find_run("r1")
    assert store.verify().ok


def test_the_newest_key_cannot_be_dropped() -> None:
    with pytest.raises(StorageError, match="newest"):
        RING.without("k2", {})
    with pytest.raises(StorageError, match="no key 'k9'"):
        RING.without("k9", {})


def test_what_is_stopped_in_the_middle_reads_as_before_and_goes_on(inner: Storage) -> None:
    store = EncryptedStorage(inner, FIRST)
    for run_id in ("r1", "r2"):
        fill(store, run_id)
    said, total = everything(store), store.count_keys()["k1"]
    both = EncryptedStorage(inner, RING)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.runs_done == 1:
            raise Stop

    with pytest.raises(Stop):
        both.rotate_keys(stop)
    counts = both.count_keys()
    assert min(counts["k1"], counts["k2"]) > 0
    assert counts.total() == total
    assert everything(both) == said
    assert both.rotate_keys().replaced == counts["k1"]
    assert both.count_keys() == {"k2": total}
    assert everything(both) == said


KILLED = """
    import os, signal, sys
    from framework.storage.backend import open_storage
    from framework.storage import encryption_rotation as rotation
    from framework.storage.encryption import KeyRing

    rotation._BATCH_CONTENTS = 3
    store = open_storage(sys.argv[1], KeyRing([("k1", b"1" * 32), ("k2", b"2" * 32)]))
    replace, left = store.inner.replace_contents, int(sys.argv[2])

    def counted(changes):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(changes)

    store.inner.replace_contents = counted
    store.rotate_keys()
    print("done")
"""


@pytest.mark.parametrize("url", BACKENDS[:2], ids=["sqlite", "files"])
def test_a_kill_in_the_middle_loses_nothing(url: str, tmp_path: Path, python: Python) -> None:
    url = url.format(tmp_path)
    with open_storage(url, FIRST) as store:
        for run_id in ("r1", "r2"):
            fill(store, run_id)
        said = everything(store)
    for batch in (2, 4, 3):
        python(KILLED, url, batch, code=-9)
        with open_storage(url, RING) as store:
            assert isinstance(store, EncryptedStorage)
            assert everything(store) == said
            assert min(store.count_keys()[each] for each in ("k1", "k2")) > 0
            assert store.verify().ok
    assert python(KILLED, url, -1) == "done\n"
    with open_storage(url, KeyRing([NEW])) as store:
        assert everything(store) == said


def test_runs_go_on_meanwhile(inner: Storage) -> None:
    """A writer that commits, prunes and journals with the old key all the time loses nothing, nor does the rotation."""
    old, both = EncryptedStorage(inner, FIRST), EncryptedStorage(inner, RING)
    writing, stop = threading.Event(), threading.Event()
    failures: list[Exception] = []
    writer = Writer(old, state={"n": 0})

    def write() -> None:
        number = 0
        try:
            while not stop.is_set() or number < 5:
                number += 1
                writer.write({"n": number, "list": list(range(number))})
                writing.set()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert writing.wait(30)
        for _ in range(5):
            both.rotate_keys()
    finally:
        stop.set()
        thread.join(30)
    assert not failures
    # A writer that still had the old key leaves contents of it: they are counted, and the next rotation has them.
    both.rotate_keys()
    assert both.count_keys().keys() == {"k2"}
    assert both.verify().ok


def test_damage_keeps_its_key_and_is_told(inner: Storage) -> None:
    store = EncryptedStorage(inner, FIRST)
    fill(store, "r1")
    found = next(each for each in inner.read_contents("r1") if each.place.kind == "message")
    inner.replace_contents([(found, found.data[:-1] + bytes([found.data[-1] ^ 1]))])
    done = EncryptedStorage(inner, RING).rotate_keys()
    assert [damage.problem for damage in done.damage] == [
        "Message 'one' of run 'r1' does not decrypt: it was altered, or is not in its place."
    ]
    assert count_keys(inner)["k1"] == 1


def test_a_key_that_is_missing_stops_it(inner: Storage) -> None:
    fill(EncryptedStorage(inner, FIRST), "r1")
    before = list(inner.read_contents("r1"))
    with pytest.raises(KeyNotFound, match="'k1'"):
        EncryptedStorage(inner, KeyRing([NEW])).rotate_keys()
    assert list(inner.read_contents("r1")) == before


def test_what_changed_meanwhile_is_not_overwritten(inner: Storage) -> None:
    store = EncryptedStorage(inner, RING)
    fill(store, "r1")
    read: list[Content] = [each for each in inner.read_contents("r1") if each.place.kind == "error"]
    accept(store, commit(4, "r1", state=RunState.FAILED, error="newer"))
    stale = [(each, b"stale") for each in read if not each.place.sequence]
    assert inner.replace_contents(stale) == 0
    record = store.find_run("r1")
    assert record is not None
    assert record.error == "newer"


# --- a store that was plain -------------------------------------------------------------------------------------------


def test_a_plain_store_is_encrypted_as_a_whole(inner: Storage) -> None:
    for run_id in ("r1", "r2"):
        fill(inner, run_id)
    said = everything(inner)
    assert (appearance(inner), set(count_keys(inner))) == ("plain", {""})
    encrypt_plain(inner, RING)
    assert (appearance(inner), set(count_keys(inner))) == ("encrypted", {"k2"})
    assert everything(EncryptedStorage(inner, RING)) == said


def test_an_unfinished_encryption_is_told_and_goes_on(inner: Storage) -> None:
    for run_id in ("r1", "r2"):
        fill(inner, run_id)
    said = everything(inner)
    stop: Callable[[Progress], None] = _stop_at_the_second
    with pytest.raises(InterruptedError):
        encrypt_plain(inner, RING, stop)
    assert appearance(inner) == "mixed"
    with pytest.raises(NotEncrypted, match="did not finish"):
        EncryptedStorage(inner, RING)
    encrypt_plain(inner, RING)
    assert everything(EncryptedStorage(inner, RING)) == said


def _stop_at_the_second(progress: Progress) -> None:
    if progress.runs_done == 1:
        raise InterruptedError


def test_a_store_in_use_is_not_encrypted(inner: Storage) -> None:
    inner.open_run(new_run(), "me", 60)
    with pytest.raises(StorageError, match="'run_1' is running"):
        encrypt_plain(inner, RING)
    assert appearance(inner) == "plain"
