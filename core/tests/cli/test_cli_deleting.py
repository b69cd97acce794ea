"""Deleting runs that change meanwhile: what was taken up or ended since it was listed is left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.errors import RunBusy, StorageError
from framework.graph.cancelling import cancel_run
from framework.runner.cli.deleting import _choose, _delete
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage
from framework.storage.contract import accept, commit, new_run
from framework.storage.ownership import effective_state, new_owner, retire
from framework.storage.records import RunRecord
from framework.storage.sqlite import SQLiteStorage

RUN_ID = "run-1"


@pytest.fixture(params=["sqlite", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    opened: Storage = SQLiteStorage(tmp_path / "r.db") if request.param == "sqlite" else FileStorage(tmp_path / "r")
    with opened:
        yield opened


def record(storage: Storage) -> RunRecord:
    found = storage.find_run(RUN_ID)
    assert found is not None
    return found


def crashed(storage: Storage) -> None:
    """A run that failed, was taken up again, and whose owner then died with its lease."""
    storage.open_run(new_run(RUN_ID), "first", 600)
    accept(storage, commit(1, RUN_ID, 1, state=RunState.FAILED, error="why", release=True))
    owner = new_owner()
    storage.claim_run(RUN_ID, owner, 600)
    retire(owner)
    assert effective_state(record(storage)) is RunState.CRASHED


def test_a_dead_owners_run_is_deleted(storage: Storage) -> None:
    crashed(storage)
    chosen = _choose(storage, [RUN_ID], [], None)
    assert _delete(storage, chosen) == [RUN_ID]
    assert storage.find_run(RUN_ID) is None


def test_a_delete_that_fails_after_it_took_the_lease_leaves_the_run_crashed_with_its_error(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed(storage)
    chosen = _choose(storage, [RUN_ID], [], None)
    delete = storage.delete_run

    def failing(run_id: str, *, force: bool = False) -> bool:
        if record(storage).owner is None:
            raise StorageError("the disk is gone")
        return delete(run_id)

    monkeypatch.setattr(storage, "delete_run", failing)
    with pytest.raises(StorageError, match="disk is gone"):
        _delete(storage, chosen)
    assert (record(storage).state, record(storage).error) == (RunState.CRASHED, "why")


def test_a_run_that_was_ended_meanwhile_stays_as_it_is(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed(storage)
    chosen = _choose(storage, [RUN_ID], [], None)

    def ended_meanwhile(run_id: str, *, force: bool = False) -> bool:
        monkeypatch.undo()
        cancel_run(storage, run_id, 30)
        raise RunBusy(run_id, "somebody", 1.0)

    monkeypatch.setattr(storage, "delete_run", ended_meanwhile)
    assert _delete(storage, chosen) == []
    assert chosen.staying == [(RUN_ID, "it has been taken up meanwhile")]
    assert record(storage).state is RunState.CANCELLED
