"""Definitions of a ``FileStorage``: kept while a run may need them, removed by ``compact`` when none does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.errors import StorageError
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage
from framework.storage.contract import accept, commit, new_run


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


def test_no_run_is_accepted_or_forked_while_definitions_are_removed(store: FileStorage, tmp_path: Path) -> None:
    with FileStorage(tmp_path / "store", busy_seconds=0.05) as other:
        with store._definition_lock():
            with pytest.raises(StorageError, match="Another process"):
                other.open_run(new_run("b2", fingerprint="b"))
            with pytest.raises(StorageError, match="Another process"):
                other.fork_run("b1", 1, b"{}", commit(2, "b2", state=RunState.PAUSED))
        assert other.open_run(new_run("b2", fingerprint="b")).fingerprint == "b"
    assert store.verify().ok
