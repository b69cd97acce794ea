"""Cancelling that fails or is killed in the middle, that was asked of an owner who died, and that has parts to end."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import ResumeError, RunBusy, RunNotFound, StorageError
from framework.graph import cancelling
from framework.graph.cancelling import cancel_if_asked, cancel_run
from framework.graph.node import NodeResult
from framework.graph.run_messages import CANCELLED_ON_REQUEST, cancel_name
from framework.graph.run_opening import Definition, Restored, open_run
from framework.runtime import Runtime
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState, RunStatus
from framework.storage.backend import FileStorage, Storage
from framework.storage.contract import accept, commit, new_run
from framework.storage.memory import MemoryStorage
from framework.storage.ownership import effective_state, new_owner, retire
from framework.storage.records import RunRecord
from framework.storage.sqlite import SQLiteStorage
from framework.testing import clear_faults, install_fault
from tests import forks

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

CORE = Path(__file__).parents[2]
RUN_ID = "run-1"
ENDED = [(RunState.FAILED, "the line is down"), (RunState.PAUSED, None)]


@pytest.fixture(autouse=True)
def _faults() -> Iterator[None]:
    yield
    clear_faults()


@pytest.fixture(params=["sqlite", "file"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    store: Storage = (
        SQLiteStorage(tmp_path / "runs.db") if request.param == "sqlite" else FileStorage(tmp_path / "runs")
    )
    with store:
        yield store


def record(storage: Storage, run_id: str = RUN_ID) -> RunRecord:
    found = storage.find_run(run_id)
    assert found is not None
    return found


def ended(storage: Storage, state: RunState, error: str | None, run_id: str = RUN_ID, **fields: Any) -> RunRecord:
    """A run that ended so."""
    storage.open_run(new_run(run_id, **fields), "somebody", 60)
    accept(storage, commit(1, run_id, 1, state=state, error=error, release=True))
    return record(storage, run_id)


def left_by_a_dead_owner(storage: Storage, run_id: str = RUN_ID, **fields: Any) -> RunRecord:
    """A run whose owner's process is gone and whose lease is not over."""
    owner = new_owner()
    storage.open_run(new_run(run_id, **fields), owner, 600)
    retire(owner)
    return record(storage, run_id)


def fail() -> None:
    raise StorageError("the disk is gone")


# --- in the middle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "error"), ENDED)
@pytest.mark.parametrize("point", ["commit.before", "commit.inside"])
def test_a_cancel_that_fails_leaves_the_run_as_it_was(
    storage: Storage, state: RunState, error: str | None, point: str
) -> None:
    before = ended(storage, state, error)
    install_fault(point, action=fail)
    with pytest.raises(StorageError, match="disk is gone"):
        cancel_run(storage, RUN_ID, 30)
    assert record(storage) == before
    assert cancel_run(storage, RUN_ID, 30)
    assert record(storage).state is RunState.CANCELLED


KILLED = """
    import sys
    from framework.graph.cancelling import cancel_run
    from framework.storage.backend import open_storage
    from framework.testing import install_faults_from_environment

    install_faults_from_environment()
    cancel_run(open_storage(sys.argv[1]), "run-1", 600)
"""


CLAIMED = """
    import sys
    from framework.storage.backend import open_storage
    from framework.storage.ownership import new_owner

    open_storage(sys.argv[1]).claim_run("run-1", new_owner(), 600)
"""


def program(text: str, url: str, **variables: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(CORE), **variables}
    return forks.run([sys.executable, "-c", textwrap.dedent(text), url], env=environment, timeout=50).returncode


def killed_at(fault: str, url: str) -> None:
    assert program(KILLED, url, SUREFOOT_FAULT=fault) == -9


@pytest.mark.parametrize(("state", "error"), ENDED)
@pytest.mark.parametrize("point", ["commit.before", "commit.inside"])
def test_a_cancel_that_is_killed_leaves_the_run_as_it_was(
    durable: Storage, state: RunState, error: str | None, point: str
) -> None:
    before = ended(durable, state, error)
    killed_at(point, durable.url)
    assert record(durable) == before
    assert cancel_run(durable, RUN_ID, 30)


@pytest.mark.parametrize("fault", ["commit.before:2", "commit.inside"])
def test_a_cancel_that_is_killed_after_it_took_a_dead_owners_lease_loses_no_error(durable: Storage, fault: str) -> None:
    ended(durable, RunState.FAILED, "the line is down")
    assert program(CLAIMED, durable.url) == 0
    killed_at(fault, durable.url)
    left = record(durable)
    assert (effective_state(left), left.sequence) == (RunState.CRASHED, 1)
    assert durable.claim_run(RUN_ID, "next", 0, lambda owner: False).error == "the line is down"
    assert record(durable).error == "the line is down"
    assert cancel_run(durable, RUN_ID, 30)
    assert record(durable).error == CANCELLED_ON_REQUEST


def test_a_run_that_is_opened_while_its_owner_commits_is_not_claimed_before_it_is_known(storage: Storage) -> None:
    """The one who opens it is killed, or refuses what it finds, after it lost the race: the run stays as it was."""
    new = new_run(RUN_ID, fingerprint="f")
    storage.open_run(new, "somebody", 60)
    accept(storage, commit(1, RUN_ID, 1, state=RunState.RUNNING))
    storage.release_lease(RUN_ID, 1)
    looks: list[RunState] = []

    def check(restored: Restored) -> None:
        looks.append(restored.found)
        if len(looks) > 1:
            raise ResumeError(RUN_ID, "not like this")
        accept(storage, commit(2, RUN_ID, 0, state=RunState.FAILED, error="the line is down"))

    definition = Definition("graph", ExecutorType.GRAPH, "goal", "f", {}, lambda old, new: [], check=check)
    with pytest.raises(ResumeError, match="not like this"):
        open_run(storage, new, "me", 60, definition, False)
    assert looks == [RunState.CRASHED, RunState.FAILED]
    after = record(storage)
    assert (after.state, after.error, after.owner) == (RunState.FAILED, "the line is down", None)


# --- the run's document ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["load_run", "commit"])
async def test_the_document_of_a_run_that_was_resumed_at_once_is_left_alone(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    agent.node("a", lambda ctx: NodeResult(False, error="broken"))
    storage = agent.storage
    assert storage is not None
    agent.runtime = Runtime(storage)
    await agent.run()
    agent.work["a"] = lambda ctx: {"a": 1}
    original = getattr(storage, point)

    def resumed_meanwhile(*args: Any) -> Any:
        result = original(*args)
        monkeypatch.undo()
        asyncio.run(agent.run())
        return result

    monkeypatch.setattr(storage, point, resumed_meanwhile)
    assert await asyncio.to_thread(cancel_run, storage, RUN_ID, 30)
    assert agent.state() is RunState.COMPLETED
    document = storage.load_run(RUN_ID)
    assert document is not None
    assert document.status is RunStatus.COMPLETED


# --- asked of an owner who died ---------------------------------------------------------------------------------------


def test_a_crashed_run_that_was_asked_to_stop_is_cancelled_instead_of_recovered(storage: Storage) -> None:
    crashed = left_by_a_dead_owner(storage)
    assert not cancel_if_asked(storage, crashed, 30)
    assert record(storage) == crashed
    storage.send(RUN_ID, cancel_name(crashed.token), b"null")
    assert cancel_if_asked(storage, crashed, 30)
    after = record(storage)
    assert (after.state, after.error, after.owner) == (RunState.CANCELLED, CANCELLED_ON_REQUEST, None)


def test_a_request_is_not_for_who_took_the_run_up_since(storage: Storage) -> None:
    crashed = left_by_a_dead_owner(storage)
    storage.send(RUN_ID, cancel_name(crashed.token), b"null")
    owner = new_owner()
    storage.claim_run(RUN_ID, owner, 600, lambda other: False)
    with pytest.raises(RunBusy):
        cancel_if_asked(storage, crashed, 30)
    retire(owner)  # it dies as well; the request was not its
    with pytest.raises(RunBusy):
        cancel_if_asked(storage, crashed, 30)
    accept(storage, commit(1, RUN_ID, 0, state=RunState.FAILED, error="e"))
    with pytest.raises(RunBusy):
        cancel_if_asked(storage, crashed, 30)
    assert (record(storage).state, record(storage).error) == (RunState.FAILED, "e")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_unfinished_parts_of_a_cancelled_run_are_cancelled_too(storage: Storage) -> None:
    ended(storage, RunState.PAUSED, None)
    ended(storage, RunState.PAUSED, None, "child", parent_run_id=RUN_ID)
    left_by_a_dead_owner(storage, "grandchild", parent_run_id="child")
    ended(storage, RunState.FAILED, "why", "failed", parent_run_id=RUN_ID)
    ended(storage, RunState.COMPLETED, None, "completed", parent_run_id=RUN_ID)
    ended(storage, RunState.PAUSED, None, "stranger")
    assert cancel_run(storage, RUN_ID, 30)
    states = {run.run_id: run.state.value for run in storage.list_runs()}
    assert states == {
        RUN_ID: "cancelled",
        "child": "cancelled",
        "grandchild": "cancelled",
        "failed": "failed",
        "completed": "completed",
        "stranger": "paused",
    }


def test_parts_that_a_failing_cancel_left_are_cancelled_by_the_next(storage: Storage) -> None:
    ended(storage, RunState.PAUSED, None)
    ended(storage, RunState.PAUSED, None, "child", parent_run_id=RUN_ID)
    install_fault("commit.before", 2, fail)
    with pytest.raises(StorageError):
        cancel_run(storage, RUN_ID, 30)
    assert (record(storage).state, record(storage, "child").state) == (RunState.CANCELLED, RunState.PAUSED)
    assert cancel_run(storage, RUN_ID, 30)
    assert record(storage, "child").state is RunState.CANCELLED


def test_parts_of_a_run_that_is_only_asked_to_stop(storage: Storage) -> None:
    """Its owner ends those it runs itself; the others have nobody else."""
    owner = new_owner()
    storage.open_run(new_run(RUN_ID), owner, 600)
    storage.open_run(new_run("running", parent_run_id=RUN_ID), owner, 600)
    ended(storage, RunState.PAUSED, None, "paused", parent_run_id=RUN_ID)
    assert not cancel_run(storage, RUN_ID, 30)
    retire(owner)
    assert storage.read_messages("running") == []
    assert record(storage, "paused").state is RunState.CANCELLED


def test_many_runs_are_looked_through_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancelling, "_PAGE", 2)
    with MemoryStorage() as storage:
        ended(storage, RunState.PAUSED, None)
        for number in range(5):
            ended(storage, RunState.PAUSED, None, f"child-{number}", parent_run_id=RUN_ID)
        assert cancel_run(storage, RUN_ID, 30)
        assert {run.state for run in storage.list_runs()} == {RunState.CANCELLED}


def test_what_cannot_be_cancelled_says_so(storage: Storage) -> None:
    with pytest.raises(RunNotFound):
        cancel_run(storage, "nobody", 30)
    ended(storage, RunState.COMPLETED, None)
    with pytest.raises(ResumeError, match="completed"):
        cancel_run(storage, RUN_ID, 30)
