"""An encrypted store: nothing is readable in its files, and nothing altered, moved or plain is believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framework.errors import CorruptData, KeyNotFound, NotEncrypted, StorageError, SurefootError
from framework.schemas.checkpoint import Checkpoint, ExecutorType
from framework.schemas.decision import Decision
from framework.schemas.run import Run, RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.chunks import Chunk
from framework.storage.contract import accept, commit, journal, new_run
from framework.storage.documents import document_bytes
from framework.storage.encryption import EncryptedStorage, KeyRing
from framework.storage.memory import MemoryStorage
from framework.storage.records import Content, Damage, Place, Retention
from framework.storage.sealed import is_sealed
from tests.storage.conftest import make

MARKER = "zanzibar-7731"
OLD, NEW = ("k1", b"1" * 32), ("k2", b"2" * 32)
RING = KeyRing([OLD, NEW])
KINDS = ["chunk", "checkpoint", "definition", "document", "error", "header", "journal", "log", "message", "record"]
BACKENDS = ["sqlite:///{}/runs.db", "file://{}/runs", "memory://"]


@pytest.fixture(params=["sqlite", "files", "memory", "postgresql"])
def inner(request: pytest.FixtureRequest) -> Iterator[Storage]:
    """Every backend, as it is below the encryption."""
    with make(request.param, request)._factory() as store:
        yield store


def fill(store: Storage, run_id: str) -> None:
    """A run with the marker in a content of every kind; two checkpoints that differ."""
    secret = b'"%s of %s"' % (MARKER.encode(), run_id.encode())
    listed = b"[%s]" % secret
    told = b'{"v": 1, "told": %s}' % secret
    new = new_run(run_id, chunks=[Chunk("input", "set", secret)], header=b'{"told": %s}' % secret)
    store.open_run(replace(new, definition=b'{"told": %s}' % secret, fingerprint=f"f of {run_id}"))
    for sequence in (1, 2):
        chunks = [Chunk("a", "set" if sequence == 1 else "append", listed if sequence == 1 else secret)]
        record = b'[{"kind": "step", "node": %s}]' % secret
        accept(store, commit(sequence, run_id, record=record, log=listed, checkpoint=told, chunks=chunks))
    accept(store, journal(("s", 1, told), ("s", 2, told), run_id=run_id))
    store.send(run_id, "one", secret)
    store.send(run_id, "two", secret)
    document = Run(id=run_id, goal_id="goal", narrative=MARKER, input_data={"told": MARKER}, goal_description=MARKER)
    document.add_decision(Decision(id="dec_0", node_id="node", intent=MARKER))
    document.add_problem("critical", MARKER)
    store.save_run(document)
    accept(store, commit(3, run_id, state=RunState.FAILED, error=f"{MARKER} of {run_id}"))


@pytest.fixture
def store(inner: Storage) -> EncryptedStorage:
    made = EncryptedStorage(inner, RING)
    fill(made, "r1")
    fill(made, "r2")
    return made


def contents(inner: Storage, kind: str) -> list[Content]:
    """The stored contents of a kind, of runs in order."""
    of_runs = [content for run_id in ("r1", "r2") for content in inner.read_contents(run_id)]
    found = [each for each in [*of_runs, *inner.read_contents(None)] if each.place.kind == kind]
    return sorted(found, key=lambda each: each.place)


def put(inner: Storage, kind: str, data: Callable[[list[Content]], list[bytes]]) -> None:
    """Let ``data`` make other bytes of those stored, as somebody does who can write to the store and its checksums."""
    found = contents(inner, kind)
    changes = list(zip(found, data(found), strict=True))
    changed = [(content, new) for content, new in changes if new != content.data]
    assert changed
    assert inner.replace_contents(changed) == len(changed)


def _reads(store: Storage, run_id: str, tell: Callable[[Damage], None]) -> list[Callable[[], Any]]:
    return [
        lambda: store.find_run(run_id),
        lambda: store.read_log(run_id, on_damage=tell),
        lambda: list(store.read_checkpoint_rows(run_id, tell)),
        lambda: store.find_checkpoint_row(run_id, "ckpt_1"),
        lambda: [store.read_chunks(run_id, sequence) for sequence in (0, 1, 2)],
        lambda: store.read_messages(run_id, tell),
        lambda: store.read_journal(run_id, on_damage=tell),
        lambda: store.load_run(run_id),
        lambda: store.definition(f"f of {run_id}"),
    ]


def read(store: Storage) -> list[str]:
    """What is told of damage and errors when everything of both runs is read."""
    told: list[Damage] = []
    problems: list[str] = []
    for run_id in ("r1", "r2"):
        for one in _reads(store, run_id, told.append):
            try:
                one()
            except CorruptData as error:
                problems.append(str(error))
    return problems + [damage.problem for damage in told]


# --- nothing is readable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", BACKENDS[:2], ids=["sqlite", "files"])
def test_no_content_is_in_the_files(url: str, tmp_path: Path) -> None:
    with open_storage(url.format(tmp_path), RING) as store:
        fill(store, "r1")
        store.save_checkpoint(
            Checkpoint(id="c", run_id="saved", executor_type=ExecutorType.GRAPH, memory_snapshot={"k": MARKER})
        )
        store.fork_run("r1", 2, b'{"told": "%s"}' % MARKER.encode(), commit(3, "fork", state=RunState.PAUSED))
        while_open = _bytes_of(tmp_path)
        loaded = store.load_latest_checkpoint("saved")
        assert loaded is not None
        assert loaded.memory_snapshot == {"k": MARKER}
    for data in (while_open, _bytes_of(tmp_path)):
        assert b"goal_1" in data  # what is searched is what was written
        assert MARKER.encode() not in data
        assert b"zanzibar" not in data


def _bytes_of(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_plain_stores_hold_what_is_searched_for(inner: Storage, tmp_path: Path) -> None:
    fill(inner, "r1")  # so the search above would find it
    if inner.url.startswith(("sqlite", "file")):
        assert _bytes_of(tmp_path).count(MARKER.encode()) >= len(KINDS)


def test_equal_values_look_different_and_unchanged_ones_are_stored_once(inner: Storage) -> None:
    store = EncryptedStorage(inner, RING)
    for number, state in enumerate([{"big": "x" * 1000, "n": 1}, {"big": "x" * 1000, "n": 2}]):
        store.save_checkpoint(
            Checkpoint(id=f"c{number}", run_id="r1", executor_type=ExecutorType.GRAPH, memory_snapshot=state)
        )
    chunks = [content.place[2:4] for content in inner.read_contents("r1") if content.place.kind == "chunk"]
    assert sorted(chunks) == [(1, "big"), (1, "n"), (2, "n")]
    sealed = [content.data for content in inner.read_contents("r1")]
    assert len(set(sealed)) == len(sealed)


# --- nothing altered is believed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_contents_that_change_places_are_damage(kind: str, store: EncryptedStorage, inner: Storage) -> None:
    assert read(store) == []

    def swapped(found: list[Content]) -> list[bytes]:
        if kind != "document":
            return [content.data for content in reversed(found)]
        shells = [Run.model_validate_json(content.data) for content in found]  # each names its own run
        swap = zip(shells, reversed(shells), strict=True)
        return [document_bytes(one.model_copy(update={"input_data": other.input_data})) for one, other in swap]

    put(inner, kind, swapped)
    problems = read(store)
    assert problems
    assert all("altered, or is not in its place" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["chunk", "checkpoint", "journal", "log", "message", "record"])
def test_contents_that_change_places_in_their_run_are_damage(
    kind: str, store: EncryptedStorage, inner: Storage
) -> None:
    def swapped(found: list[Content]) -> list[bytes]:
        mine = [content for content in found if content.place.run_id == "r1" and content.place.sequence < 3]
        first, second = mine[:2]
        swap = {first.place: second.data, second.place: first.data}
        return [swap.get(content.place, content.data) for content in found]

    put(inner, kind, swapped)
    assert any("not in its place" in problem for problem in read(store))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_contents_are_refused(kind: str, store: EncryptedStorage, inner: Storage, tmp_path: Path) -> None:
    with MemoryStorage() as plain:
        fill(plain, "r1")
        fill(plain, "r2")
        wanted = {
            (content.place.run_id, content.place.sequence, content.place.op): content.data
            for content in contents(plain, kind)
        }

    def injected(found: list[Content]) -> list[bytes]:
        if kind == "error":  # files keep it beside the commit as well
            return [MARKER.encode() for _ in found]
        return [wanted[each.place.run_id, each.place.sequence, each.place.op] for each in found]

    put(inner, kind, injected)
    assert any("is not encrypted" in problem for problem in read(store))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("document", "error")])
def test_no_bit_can_be_flipped(kind: str, store: EncryptedStorage, inner: Storage) -> None:
    start = 2 + len("k2") + 4  # after the version, the key's id and its check
    for position in (0, start, start + 11, start + 12, -17, -16, -1):
        before = contents(inner, kind)

        def flipped(found: list[Content], position: int = position) -> list[bytes]:
            data = bytearray(found[0].data)
            data[position] ^= 1
            return [bytes(data), *(content.data for content in found[1:])]

        put(inner, kind, flipped)
        assert read(store), f"a flipped bit of byte {position} was not noticed"
        after = contents(inner, kind)
        undone = [(new, old.data) for old, new in zip(before, after, strict=True) if new != old]
        assert inner.replace_contents(undone) == 1
    assert read(store) == []


def test_what_is_looked_up_is_bound_to_what_is_encrypted(store: EncryptedStorage, inner: Storage) -> None:
    shell = inner.load_run("r1")
    assert shell is not None
    inner.save_run(shell.model_copy(update={"goal_id": "another"}))
    with pytest.raises(CorruptData, match="altered, or is not in its place"):
        store.load_run("r1")


def test_the_newest_whole_checkpoint_is_used_and_kept(inner: Storage) -> None:
    store = EncryptedStorage(inner, RING)
    for number in range(4):
        store.save_checkpoint(
            Checkpoint(id=f"c{number}", run_id="r1", executor_type=ExecutorType.GRAPH, memory_snapshot={"n": number})
        )
    last = [each for each in inner.read_contents("r1") if each.place.kind == "checkpoint"]
    newest = [each for each in last if each.place.sequence > 2]
    assert inner.replace_contents([(each, each.data[:-1] + bytes([each.data[-1] ^ 1])) for each in newest]) == 2
    told: list[Damage] = []
    loaded = store.load_latest_checkpoint("r1", told.append)
    assert loaded is not None
    assert loaded.memory_snapshot == {"n": 1}
    assert [damage.sequence for damage in told] == [4, 3]
    assert not store.verify().ok
    assert store.prune("r1", Retention(1)) == 1
    assert [row.sequence for row in store.read_checkpoint_rows("r1")] == [2]


# --- keys that are wrong or missing -----------------------------------------------------------------------------------


WRONG = [
    pytest.param(KeyRing([OLD]), "key 'k2', which the key ring lacks; it has k1", id="unknown"),
    pytest.param(KeyRing([("k2", b"x" * 32)]), "another key than the one that the key ring has as 'k2'", id="other"),
]


@pytest.mark.parametrize(("ring", "says"), WRONG)
def test_a_wrong_key_is_no_damage(ring: KeyRing, says: str, store: EncryptedStorage, inner: Storage) -> None:
    with pytest.raises(KeyNotFound, match=f"These are not the keys of the store .*{says}"):
        EncryptedStorage(inner, ring)
    wrong = EncryptedStorage(MemoryStorage(), ring)
    wrong.inner = inner  # as of a process that had opened the store before the first run was in it
    before = list(inner.read_contents("r1"))
    told: list[Damage] = []
    calls: list[Callable[[], Any]] = [
        lambda: wrong.find_run("r1"),
        lambda: wrong.claim_run("r1", "me", 60),
        lambda: wrong.list_runs(),
        lambda: wrong.find_runs("r"),
        lambda: wrong.load_latest_checkpoint("r1", told.append),
        lambda: wrong.load_checkpoint("r1", "ckpt_1"),
        lambda: wrong.list_checkpoints("r1"),
        lambda: wrong.read_log("r1", 0, told.append),
        lambda: wrong.read_messages("r1", told.append),
        lambda: wrong.read_journal("r1", None, told.append),
        lambda: wrong.prune("r1", Retention(1)),
        lambda: wrong.fork_run("r1", 2, b"{}", commit(3, "fork", state=RunState.PAUSED)),
        lambda: wrong.load_run("r1"),
        lambda: wrong.definition("f of r1"),
        lambda: wrong.open_run(new_run("r3", fingerprint="f of r1")),
        lambda: wrong.verify(),
        lambda: wrong.save_checkpoint(Checkpoint(id="c", run_id="r1", executor_type=ExecutorType.GRAPH)),
    ]
    for call in calls:
        with pytest.raises(KeyNotFound, match=says) as caught:
            call()
        assert caught.value.key_id == "k2"
    assert told == []
    assert list(inner.read_contents("r1")) == before
    record = inner.find_run("r1")
    assert record is not None
    assert (record.owner, record.token, inner.find_run("r3")) == (None, 0, None)
    assert read(store) == []


@pytest.mark.parametrize(("ring", "says"), WRONG)
def test_a_wrong_key_is_refused_by_documents_alone(ring: KeyRing, says: str, inner: Storage) -> None:
    """As of a runtime that keeps no checkpoints."""
    EncryptedStorage(inner, RING).save_run(Run(id="d1", goal_id="g"))
    with pytest.raises(KeyNotFound, match=f"These are not the keys of the store .*{says}") as caught:
        EncryptedStorage(inner, ring)
    assert caught.value.key_id == "k2"
    assert EncryptedStorage(inner, RING).load_run("d1") is not None
    other = KeyRing([OLD, ("k3", b"3" * 32)])
    wrong = EncryptedStorage(MemoryStorage(), other)
    wrong.inner = inner  # as of a process that had opened the store before the first document was in it
    wrong.save_run(Run(id="d2", goal_id="g"))
    assert EncryptedStorage(inner, other).load_run("d2") is not None, "one that can be read is enough"
    assert EncryptedStorage(inner, RING).load_run("d1") is not None


def test_an_encrypted_store_does_not_open_without_keys(tmp_path: Path) -> None:
    for url in (each.format(tmp_path) for each in BACKENDS[:2]):
        with open_storage(url, RING) as store:
            store.open_run(new_run())
        with pytest.raises(KeyNotFound, match="is encrypted, and no keys were given.*SUREFOOT_ENCRYPTION_KEYS"):
            open_storage(url)


def test_a_plain_store_does_not_open_with_keys(tmp_path: Path) -> None:
    for url in (each.format(tmp_path) for each in BACKENDS[:2]):
        with open_storage(url) as store:
            store.open_run(new_run())
        with pytest.raises(NotEncrypted, match="surefoot storage encrypt"):
            open_storage(url, RING)
    with open_storage(f"sqlite:///{tmp_path}/documents.db") as store:
        store.save_run(Run(id="r", goal_id="g"))
    with pytest.raises(NotEncrypted):
        open_storage(f"sqlite:///{tmp_path}/documents.db", RING)


def test_reading_past_the_encryption_is_no_damage(store: EncryptedStorage, inner: Storage) -> None:
    # A program that was handed the store below must not take encrypted checkpoints for damaged ones.
    told: list[Damage] = []
    with pytest.raises(KeyNotFound, match="no keys were given"):
        inner.load_latest_checkpoint("r1", told.append)
    assert told == []
    assert inner.verify().ok


# --- key rings --------------------------------------------------------------------------------------------------------


KEY_A, KEY_B = "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE=", "YmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmI"


def test_rings_are_read_from_texts(tmp_path: Path) -> None:
    text = f"a:{KEY_A},b:{KEY_B}"
    assert KeyRing.from_text(text).ids == ("a", "b")
    assert KeyRing.from_text(text).newest == "b"
    assert KeyRing.from_text(f"# old\na:{KEY_A}  # 2024\n\n b:{KEY_B}\n").lines() == f"a:{KEY_A}\nb:{KEY_B}=\n"
    assert KeyRing.from_environment({}) is None
    assert KeyRing.from_environment({"SUREFOOT_ENCRYPTION_KEYS": " "}) is None
    made = KeyRing.from_environment({"SUREFOOT_ENCRYPTION_KEYS": text})
    assert made is not None
    assert made.ids == ("a", "b")
    file = tmp_path / "keys"
    file.write_text(made.lines())
    file.chmod(0o600)
    from_file = KeyRing.from_environment({"SUREFOOT_ENCRYPTION_KEY_FILE": str(file)})
    assert from_file is not None
    assert from_file.lines() == made.lines()
    with pytest.raises(StorageError, match="Both SUREFOOT_ENCRYPTION_KEYS and"):
        KeyRing.from_environment({"SUREFOOT_ENCRYPTION_KEYS": text, "SUREFOOT_ENCRYPTION_KEY_FILE": str(file)})


@pytest.mark.parametrize(
    "text",
    ["", "#", KEY_A, f":{KEY_A}", f"a b:{KEY_A}", f"a:{KEY_A[:-4]}", f"a:{KEY_A}x", "a:****", f"a:{KEY_A},a:{KEY_B}",
     f"a:{KEY_A},b", f"{'a' * 33}:{KEY_A}", f"é:{KEY_A}"],
    ids=["empty", "comment", "no-id", "empty-id", "space", "short", "long", "no-base64", "twice", "no-key", "long-id",
         "letters"],
)  # fmt: skip
def test_rings_that_cannot_be_read_say_so_without_a_key(text: str) -> None:
    with pytest.raises(StorageError, match="the place") as caught:
        KeyRing.from_text(text, "the place")
    assert KEY_A[:12] not in str(caught.value)
    assert KEY_B[:12] not in str(caught.value)


def test_rings_take_only_keys() -> None:
    rings: list[list[Any]] = [[], [("a", b"x" * 31)], [("a", "x" * 32)], [("", b"x" * 32)], [("a", b"x" * 32)] * 2]
    for keys in rings:
        with pytest.raises(StorageError):
            KeyRing(keys)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644], ids=oct)
def test_key_files_are_private(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"a:{KEY_A}")
    file.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        KeyRing.from_file(file)


def test_key_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        KeyRing.from_file(tmp_path / "none")
    (tmp_path / "binary").write_bytes(os.urandom(32) + b"\xff")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(StorageError, match="not text"):
        KeyRing.from_file(tmp_path / "binary")


def test_rings_show_no_keys(store: EncryptedStorage) -> None:
    import copy
    import pickle

    for shown in (repr(RING), str(RING), repr(store), repr(store._sealer)):
        assert "1111" not in shown
        assert "b'" not in shown
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="keys must not end up in files"):
            take(RING)


def test_keys_are_masked_in_what_is_logged() -> None:
    from framework._secrets import forget_secrets, mask

    try:
        KeyRing.from_text(f"a:{KEY_A}")
        assert KEY_A not in mask(f"somebody logs {KEY_A}")
    finally:
        forget_secrets()


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with MemoryStorage() as inner, pytest.raises(SurefootError, match=r"pip install 'surefoot\[encryption\]'"):
        EncryptedStorage(inner, RING)


def test_contents_are_bound_to_all_of_their_place() -> None:
    from framework.storage.encryption_seal import Sealer, key_of

    sealer = Sealer(RING)
    place = Place("chunk", "r", 1, "ab", "set")
    sealed = sealer.seal(place, b"data")
    assert is_sealed(sealed)
    assert key_of(sealed) == "k2"
    assert sealer.open(place, sealed) == b"data"
    others = [
        place._replace(kind="record"),
        place._replace(run_id="r2"),
        place._replace(sequence=2),
        place._replace(key="a", op="bset"),  # the same letters, divided differently
        place._replace(op="append"),
    ]
    for other in others:
        with pytest.raises(CorruptData):
            sealer.open(other, sealed)
    for cut in range(len(sealed)):
        with pytest.raises(CorruptData):
            sealer.open(place, sealed[:cut])
