"""Views of damaged runs: what is damaged is said, what is whole is shown, and what a resume would do is true."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.errors import CorruptData, ResumeError
from framework.graph.node import NodeSpec
from framework.graph.run_view import diff_checkpoints, export_run, find_checkpoint, view_run
from framework.schemas.run import RunState
from framework.storage.contract import accept, commit, new_run
from framework.storage.memory import MemoryStorage
from framework.storage.ownership import new_owner, retire
from framework.storage.records import Damage, Message
from framework.storage.sqlite import SQLiteStorage
from tests.graph.executor_kit import edge, graph_of
from tests.graph.run_view_kit import RUN_ID, checked, execute, standings


def damage(path: Path, table: str, where: str) -> None:
    """Change stored rows as a bad disk would."""
    column = {"checkpoints": "body", "chunks": "data", "steps": "record"}[table]
    with sqlite3.connect(path) as db:
        assert db.execute(f"UPDATE {table} SET {column} = CAST({column} AS BLOB) || x'20' WHERE {where}").rowcount > 0
    db.close()


def down(**_: object) -> None:
    raise ConnectionError("down")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of four steps of which the last failed."""
    functions = {"a": lambda **_: 1, "b": lambda **_: 2, "c": lambda **_: 3, "d": down}
    with SQLiteStorage(tmp_path / "runs.db") as storage:
        asyncio.run(execute(storage, graph_of("a", "b", "c", "d"), functions, {"given": "x"}))
    return tmp_path / "runs.db"


def test_steps_after_a_damaged_checkpoint_are_said_to_run_again(path: Path) -> None:
    damage(path, "checkpoints", "sequence = 3")
    with SQLiteStorage(path) as storage:
        view = checked(storage)
        resume = view.resume
        assert (resume.verdict, resume.sequence) == ("goes_on", 2)
        assert resume.kept == ("a#1", "b#1")
        assert resume.lost == ("c#1",)
        assert "c#1" in {each.step for each in resume.again}
        assert any("checkpoint" in line and "checksum" in line for line in view.damage)
        # It is as said: an executor keeps the two and runs the third again.
        ran: list[str] = []
        functions = {name: lambda name=name, **_: ran.append(name) for name in "abcd"}
        result = asyncio.run(execute(storage, graph_of("a", "b", "c", "d"), functions))
        assert (result.success, ran) == (True, ["c", "d"])


def test_a_damaged_state_is_passed_over_like_a_damaged_checkpoint(path: Path) -> None:
    damage(path, "chunks", "sequence = 3")
    with SQLiteStorage(path) as storage:
        view = checked(storage)
        assert (view.resume.sequence, view.resume.lost) == (2, ("c#1",))
        assert view.checkpoints == 3


def test_without_a_readable_checkpoint_a_resume_is_refused(path: Path) -> None:
    damage(path, "checkpoints", "1")
    with SQLiteStorage(path) as storage:
        view = checked(storage)
        assert view.resume.verdict == "refused"
        assert "no checkpoint of it can be read" in view.resume.refusals[0].lower()
        assert (view.resume.kept, view.resume.again, view.resume.lost) == ((), (), ())
        assert (view.state, view.input) == (RunState.FAILED, {"given": "x"})
        with pytest.raises(ResumeError):
            asyncio.run(execute(storage, graph_of("a", "b", "c", "d"), dict.fromkeys("abcd", down)))


def test_a_damaged_log_row_is_left_out_and_told(path: Path) -> None:
    damage(path, "steps", "sequence = 2")
    with SQLiteStorage(path) as storage:
        view = checked(storage)
        assert "b#1" not in standings(view)
        assert {"a#1", "c#1"} <= set(standings(view))
        assert any("log row 2" in line for line in view.damage)


def test_a_damaged_initial_state_and_a_missing_definition_do_not_hide_the_rest(path: Path) -> None:
    damage(path, "chunks", "sequence = 0")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute("UPDATE definitions SET fingerprint = 'other'")
    db.close()
    with SQLiteStorage(path) as storage:
        view = checked(storage)
        assert standings(view)["c#1"] == "done"
        assert any("definition" in line for line in view.damage)
        assert any("initial state" in line for line in view.damage)
        exported = export_run(storage, RUN_ID)
        assert len(exported["damage"]) >= 2
        assert [row["sequence"] for row in exported["log"]] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(path: Path) -> None:
    damage(path, "checkpoints", "sequence = 2")
    with SQLiteStorage(path) as storage:
        with pytest.raises(CorruptData, match="Checkpoint 2"):
            find_checkpoint(storage, RUN_ID, 2)
        with pytest.raises(CorruptData):
            diff_checkpoints(storage, RUN_ID, 1, 2)
        row = find_checkpoint(storage, RUN_ID, 3)
        assert row is not None


def test_a_run_that_goes_on_while_it_is_looked_at_is_never_taken_for_damaged(tmp_path: Path) -> None:
    rounds = 120
    graph = graph_of(
        NodeSpec(id="count", node_type="function", output_keys=["n"], max_retries=1),
        edges=[edge("count", "count", "conditional", condition_expr=f"n < {rounds}")],
        max_steps=rounds + 1,
    )
    counted = iter(range(1, rounds + 1))
    with SQLiteStorage(tmp_path / "runs.db") as storage, SQLiteStorage(tmp_path / "runs.db") as other:
        work = execute(storage, graph, {"count": lambda **_: next(counted)}, retention_strategy="latest_only")
        thread = threading.Thread(target=asyncio.run, args=[work])
        thread.start()
        views = []
        while thread.is_alive():
            if other.find_run(RUN_ID) is not None:
                views.append(view_run(other, RUN_ID))
        thread.join()
        assert views
        assert {view.resume.verdict for view in views} <= {"busy", "nothing"}
        assert not any(view.damage or view.resume.lost for view in views)
        assert len(view_run(other, RUN_ID).steps) == rounds


@pytest.mark.parametrize("ends_at", [1, 2, 4, 5, 6])
def test_a_run_that_ends_while_it_is_looked_at_is_seen_as_it_ended(ends_at: int) -> None:
    """It commits at every look, and completes at one of them: also at the last that is taken for one that goes on."""
    owner = new_owner()
    looks = 0

    class Beside(MemoryStorage):
        def read_messages(self, run_id: str, on_damage: Callable[[Damage], None] | None = None) -> list[Message]:
            nonlocal looks
            looks += 1
            if looks <= ends_at:
                end: dict[str, Any] = {"state": RunState.COMPLETED, "release": True} if looks == ends_at else {}
                accept(self, commit(looks, RUN_ID, 1, **end))
                if end:
                    retire(owner)  # as an executor does with its last commit
            return super().read_messages(run_id, on_damage)

    with Beside() as storage:
        storage.open_run(new_run(RUN_ID, definition=b"{}"), owner, 60)
        view = view_run(storage, RUN_ID)
        expected = (RunState.RUNNING, "busy") if ends_at == 6 else (RunState.COMPLETED, "nothing")
        assert (view.state, view.resume.verdict) == expected
    retire(owner)


def test_a_completed_run_whose_last_checkpoint_is_damaged_is_refused_and_not_run_again(tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as storage:
        asyncio.run(execute(storage, graph_of("a", "b"), {"a": lambda **_: 1, "b": lambda **_: 2}))
    damage(tmp_path / "runs.db", "checkpoints", "sequence = 2")
    with SQLiteStorage(tmp_path / "runs.db") as storage:
        view = checked(storage)
        assert (view.state, view.resume.verdict, view.resume.again) == (RunState.COMPLETED, "refused", ())
        assert "its result is not known" in view.resume.summary
        with pytest.raises(ResumeError):
            asyncio.run(execute(storage, graph_of("a", "b"), {"a": lambda **_: 1, "b": lambda **_: 2}))
