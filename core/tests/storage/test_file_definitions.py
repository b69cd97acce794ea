"""Definitions of a ``FileStorage``: kept while a run may need them, removed by ``compact`` when none does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from framework.errors import StorageError
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage
from framework.storage.contract import accept, commit, new_run
from framework.storage.file_definitions import _Named
from framework.storage.records import RunRecord


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStorage]:
    """A store with three runs, two of them of one definition."""
    with FileStorage(tmp_path / "store", busy_seconds=0.05) as opened:
        for run_id, fingerprint in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            opened.open_run(new_run(run_id, fingerprint=fingerprint))
            accept(opened, commit(1, run_id, state=RunState.PAUSED))
        yield opened


def kept(store: FileStorage) -> list[str]:
    return [name for name in ("a", "b") if store.definition(name) is not None]


def test_compact_removes_definitions_that_no_run_has(store: FileStorage) -> None:
    store.delete_run("a1")
    store.delete_run("b1")
    assert kept(store) == ["a", "b"]
    assert store.compact() > 0
    assert kept(store) == ["a"]
    assert store.verify().ok
    store.open_run(new_run("b2", fingerprint="b"))
    store.compact()
    assert kept(store) == ["a", "b"]


def test_a_fork_keeps_the_definition_of_a_run_that_is_gone(store: FileStorage) -> None:
    store.fork_run("b1", 1, b"{}", commit(2, "b2", state=RunState.PAUSED))
    store.delete_run("b1")
    store.compact()
    assert kept(store) == ["a", "b"]


def test_nothing_is_removed_while_a_record_cannot_be_read(store: FileStorage) -> None:
    store.delete_run("b1")
    (store.base_path / "executions" / "a1.json").write_text("torn")
    store.compact()
    assert kept(store) == ["a", "b"], "b may be what the torn record names"


def test_who_wants_a_definition_waits_until_it_is_removed(store: FileStorage, tmp_path: Path) -> None:
    with FileStorage(tmp_path / "store", busy_seconds=0.05) as other:
        with store._holding("remove", store._definition("b")):
            with pytest.raises(StorageError, match="Another process"):
                other.open_run(new_run("b2", fingerprint="b"))
            with pytest.raises(StorageError, match="Another process"):
                other.fork_run("b1", 1, b"{}", commit(2, "b2", state=RunState.PAUSED))
            other.open_run(new_run("a3", fingerprint="a"))
            other.fork_run("a1", 1, b"{}", commit(2, "a4", state=RunState.PAUSED))
        assert other.open_run(new_run("b2", fingerprint="b")).fingerprint == "b"
    assert store.verify().ok


def test_those_that_somebody_is_about_to_use_stay_and_hold_nothing_up(store: FileStorage, tmp_path: Path) -> None:
    store.open_run(new_run("c1", fingerprint="c"))
    for run_id in ("b1", "c1"):
        store.delete_run(run_id)
    # Many that accept and delete runs always leave one that is at it.
    with FileStorage(tmp_path / "store") as other, other._holding("use", other._definition("b", shared=True)):
        assert store.compact() > 0
    assert kept(store) == ["a", "b"]
    assert store.definition("c") is None
    store.compact()
    assert kept(store) == ["a"]


def test_a_run_accepted_since_the_first_look_keeps_its_definition(
    store: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.open_run(new_run("c1", fingerprint="c"))
    for run_id in ("b1", "c1"):
        store.delete_run(run_id)
    read: list[Path] = []
    looks: list[set[Path]] = []
    named, read_record = store._named, store._read_record

    def look(known: Mapping[str, _Named]) -> Mapping[str, _Named] | None:
        read.clear()
        found = named(known)
        looks.append({path.relative_to(store.base_path) for path in read})
        if len(looks) == 1:
            with FileStorage(tmp_path / "store") as other:
                other.open_run(new_run("b2", fingerprint="b"))
        return found

    def remembered(path: Path) -> RunRecord | None:
        read.append(path)
        return read_record(path)

    monkeypatch.setattr(store, "_named", look)
    monkeypatch.setattr(store, "_read_record", remembered)
    store.compact()
    assert kept(store) == ["a", "b"]
    assert store.definition("c") is None
    records = Path("executions")
    assert looks == [{records / "a1.json", records / "a2.json"}, {records / "b2.json"}], "others wait for what is new"
