"""A completed run whose result is damaged is refused, never answered with an older result nor executed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from framework.errors import ResumeError
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.postgres import PostgresStorage
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

Part = Literal["checkpoint", "state", "record", "checkpoint and record", "all"]
PARTS: tuple[Part, ...] = ("checkpoint", "state", "checkpoint and record", "all")

_COLUMNS: dict[str, tuple[str, str]] = {
    "checkpoint": ("checkpoints", "crc = crc + 1"),
    "state": ("chunks", "data = data || '1'"),
    "record": ("steps", "crc = crc + 1"),
}


def run_sql(store: Storage, statement: str) -> None:
    """Change rows of a store behind its back."""
    if isinstance(store, PostgresStorage):
        for table in ("checkpoints", "chunks", "steps"):
            statement = statement.replace(f" {table}", f" {{schema}}.{table}")
        assert store._database.query("change rows", statement.replace("'1'", "'1'::bytea") + " RETURNING 1")
    else:
        assert isinstance(store, SQLiteStorage)
        assert store._db.execute(statement).rowcount > 0


def newest_file(store: FileStorage) -> Path:
    """The file of the last commit."""
    [path] = (store.base_path / "checkpoints/by_run/run-1").glob("*_000003.json")
    return path


def damage_last(store: Storage, part: Part) -> None:
    """Change bytes of a store's last commit, as a bad disk would. A file has all parts of a commit under one sum."""
    if isinstance(store, FileStorage):
        path = newest_file(store)
        whole = path.read_bytes()
        found = {"checkpoint": b'"has_log"', "state": b'"c_out"', "record": b'"node"'}
        path.write_bytes(whole[: len(whole) // 2] if part not in found else whole.replace(found[part], b'"changed"'))
        assert path.read_bytes() != whole
        return
    for name, (table, change) in _COLUMNS.items():
        if name in part or part == "all":
            run_sql(store, f"UPDATE {table} SET {change} WHERE sequence = 3")


def remove_last(store: Storage, tables: Sequence[str]) -> None:
    """Take the rows of a store's last commit away, as somebody's hand would."""
    if isinstance(store, FileStorage):
        newest_file(store).unlink()
        return
    for table in tables:
        run_sql(store, f"DELETE FROM {table} WHERE sequence = 3")


@pytest.fixture(params=["memory", "sqlite", "files", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Every kind of store."""
    store: Storage
    if request.param == "postgresql":
        store = PostgresStorage(request.getfixturevalue("postgres_url"))
    elif request.param == "files":
        store = FileStorage(tmp_path)
    else:
        store = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "runs.db")
    with store:
        yield store


@pytest.fixture
def completed(agent_over: Callable[[Storage], Agent], opened: Storage) -> Agent:
    agent = agent_over(opened)
    agent.config["retention_strategy"] = "all"
    for name in ("a", "b", "c"):
        agent.node(name, lambda ctx: {f"{ctx.node_id}_out": 1})
    agent.chain("a", "b", "c")
    return agent


@pytest.mark.parametrize("part", PARTS)
async def test_a_completed_run_with_a_damaged_last_commit_is_refused(completed: Agent, part: Part) -> None:
    assert (await completed.run()).success
    assert completed.storage is not None
    damage_last(completed.storage, part)
    await refused(completed)


@pytest.mark.parametrize("tables", [["checkpoints"], ["checkpoints", "steps", "chunks"]], ids=["checkpoint", "all"])
async def test_a_completed_run_whose_last_checkpoint_is_gone_is_refused(completed: Agent, tables: list[str]) -> None:
    assert (await completed.run()).success
    assert completed.storage is not None
    remove_last(completed.storage, tables)
    await refused(completed)


async def test_a_completed_run_whose_checkpoints_were_deleted_is_refused(completed: Agent) -> None:
    assert (await completed.run()).success
    assert completed.storage is not None
    assert completed.storage.delete_checkpoints("run-1") == 3
    await refused(completed)


async def refused(completed: Agent) -> None:
    """The run is complete before and after, nothing runs, and the error tells each damage once."""
    before = completed.record()
    assert before.state is RunState.COMPLETED
    for _ in range(2):
        with pytest.raises(ResumeError, match="is complete, but") as caught:
            await completed.run()
        assert completed.ran == []
        assert completed.record() == before
    listing = str(caught.value).partition("Damaged: ")[2].partition(" Restore")[0].split("; ")
    assert len(set(listing)) == len(listing)
    assert ".." not in str(caught.value)


async def test_a_damaged_log_row_of_a_completed_run_leaves_its_result(completed: Agent) -> None:
    """The result is in the checkpoint; the log has the path. In a file both are under one checksum."""
    first = await completed.run()
    assert completed.storage is not None
    if isinstance(completed.storage, FileStorage):
        damage_last(completed.storage, "record")
        await refused(completed)
        return
    damage_last(completed.storage, "record")
    again = await completed.run()
    assert (again.success, again.output, again.path) == (True, first.output, ["a", "b"])
    assert completed.ran == []
