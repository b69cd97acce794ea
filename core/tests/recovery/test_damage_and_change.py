"""Changed definitions, damaged stores, and values that cannot be stored."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import DefinitionChanged, ResumeError
from framework.graph.node import NodeContext, NodeResult
from framework.runtime import Runtime
from framework.schemas.run import RunState
from framework.storage.memory import MemoryStorage
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent, Work


def damage(storage: object, table: str, sequences: str) -> None:
    """Flip a byte of stored rows, as a bad disk would."""
    assert isinstance(storage, SQLiteStorage)
    column = {"checkpoints": "body", "chunks": "data", "steps": "record"}[table]
    with sqlite3.connect(storage.path) as db:
        changed = db.execute(
            f"UPDATE {table} SET {column} = CAST(replace(CAST({column} AS TEXT), '{{', '[') AS BLOB) || x'20' "
            f"WHERE sequence {sequences}"
        ).rowcount
        assert changed > 0
    db.close()


@pytest.fixture
def durable(agent: Agent) -> Agent:
    """An agent over an SQLite file, with four steps of which the last fails once."""
    if not isinstance(agent.storage, SQLiteStorage) or isinstance(agent.storage, MemoryStorage):
        pytest.fail("use with the sqlite store")
    agent.config["retention_strategy"] = "all"
    for name in ("a", "b", "c"):
        agent.node(name, lambda ctx: {f"{ctx.node_id}_out": 1, "list": [*(ctx.memory.read("list") or []), ctx.node_id]})
    calls: list[int] = []

    def fails_first(ctx: NodeContext) -> NodeResult:
        calls.append(1)
        return NodeResult(len(calls) > 1, {"d_out": 1}, error="down")

    agent.node("d", fails_first)
    agent.chain("a", "b", "c", "d")
    return agent


on_sqlite = pytest.mark.parametrize("storage", ["sqlite"], indirect=True)


# --- changed definitions ------------------------------------------------------------------------------------------


async def test_a_changed_graph_is_refused_with_what_changed(agent: Agent, fails_once: Callable[[], Work]) -> None:
    agent.node("a", lambda ctx: {"score": 1})
    agent.node("b", fails_once())
    agent.edge("a", "b", "conditional", condition_expr="score > 0")
    await agent.run()
    agent.edges[0].condition_expr = "score >= 1"
    agent.node("extra")
    agent.edge("b", "extra")
    with pytest.raises(DefinitionChanged) as caught:
        await agent.run()
    assert len(caught.value.changes) == 3
    assert "edge 'e0': condition_expr 'score > 0' -> 'score >= 1'" in str(caught.value)
    assert "node 'extra' was added" in caught.value.changes
    assert "definition_change" in str(caught.value)
    assert agent.ran == []
    assert agent.state() is RunState.FAILED, "a refused run stays as it was"
    assert agent.record().owner is None

    agent.config["definition_change"] = "allow"
    result = await agent.run()
    assert result.success
    assert agent.ran == ["b#1", "extra#1"]


async def test_wording_and_budgets_may_change(quick: Agent, fails_once: Callable[[], Work]) -> None:
    quick.node("a")
    quick.node("b", fails_once())
    quick.chain("a", "b")
    await quick.run()
    quick.options |= {"max_steps": 7, "description": "better words"}
    quick.nodes["b"].max_retries = 9
    assert (await quick.run()).success


async def test_a_completed_run_gives_its_result_to_a_later_version_of_its_graph(quick: Agent) -> None:
    quick.chain("a", "b")
    first = await quick.run()
    quick.node("c")
    quick.edge("b", "c")
    again = await quick.run()
    assert (again.success, again.output, again.path) == (True, first.output, first.path)
    assert quick.ran == []


async def test_a_run_of_another_graph_is_refused_even_when_completed(quick: Agent) -> None:
    quick.chain("a", "b")
    await quick.run()
    quick.node("c")
    quick.edge("b", "c")
    quick.options |= {"id": "another"}
    with pytest.raises(DefinitionChanged):
        await quick.run()


# --- damage -------------------------------------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize(("table", "what"), [("checkpoints", "body"), ("chunks", "state")])
async def test_a_damaged_newest_checkpoint_is_passed_over_and_reported(durable: Agent, table: str, what: str) -> None:
    await durable.run()
    damage(durable.storage, table, "= 3")
    result = await durable.run()
    assert durable.ran == ["c#1", "d#1"], "only what came after the readable checkpoint runs again"
    assert result.success
    assert result.path == ["a", "b", "c", "d"]
    assert result.steps_executed == 4
    assert result.output == {"a_out": 1, "b_out": 1, "c_out": 1, "d_out": 1, "list": ["a", "b", "c"]}
    warnings = durable.runtime.told("warning")
    assert any("damaged" in text and "run-1" in text for text in warnings), warnings
    assert durable.storage is not None
    assert durable.storage.verify("run-1").ok
    assert (await durable.run()).path == ["a", "b", "c", "d"]


@on_sqlite
async def test_a_second_crash_after_a_rewind_does_not_double_the_path(durable: Agent) -> None:
    await durable.run()
    damage(durable.storage, "checkpoints", ">= 2")
    durable.work["b"] = lambda ctx: NodeResult(False, error="still down")
    await durable.run()
    durable.work["b"] = lambda ctx: {"b_out": 2}
    result = await durable.run()
    assert result.path == ["a", "b", "c", "d"]
    assert result.steps_recovered == 1


@on_sqlite
async def test_problems_are_in_the_run_record(durable: Agent) -> None:
    with MemoryStorage() as documents:
        durable.runtime = Runtime(documents)
        await durable.run()
        damage(durable.storage, "checkpoints", "= 3")
        await durable.run()
        run = documents.load_run("run-1")
        assert run is not None
        assert any("damaged" in problem.description for problem in run.problems)


@on_sqlite
async def test_without_a_readable_checkpoint_a_run_is_not_resumed(durable: Agent) -> None:
    await durable.run()
    damage(durable.storage, "checkpoints", "> 0")
    with pytest.raises(ResumeError, match="No checkpoint"):
        await durable.run()
    assert durable.ran == []
    assert durable.record().owner is None


@on_sqlite
async def test_a_completed_run_with_a_damaged_result_is_not_given_as_complete(durable: Agent) -> None:
    await durable.run()
    await durable.run()
    assert durable.state() is RunState.COMPLETED
    damage(durable.storage, "checkpoints", "= (SELECT max(sequence) FROM checkpoints)")
    with pytest.raises(ResumeError, match="complete"):
        await durable.run()
    assert durable.ran == []


@on_sqlite
async def test_a_damaged_log_row_costs_its_entry_only(durable: Agent) -> None:
    await durable.run()
    damage(durable.storage, "steps", "= 2")
    result = await durable.run()
    assert durable.ran == ["d#1"]
    assert result.success
    assert result.path == ["a", "c", "d"]
    assert any("log row 2" in text for text in durable.runtime.told("warning"))


# --- values that cannot be stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["output", "write", "in place", "key"])
async def test_an_unstorable_value_fails_its_step_at_once_and_says_where(agent: Agent, how: str) -> None:
    def work(ctx: NodeContext) -> dict[Any, Any]:
        lock = threading.Lock()
        if how == "output":
            return {"report": {"sections": [1, {"author": lock}]}}
        if how == "key":
            return {"re\x00port": 1}
        if how == "write":
            ctx.memory.write("report", {"sections": [1, {"author": lock}]})
        else:
            ctx.memory.read("report")["sections"][1]["author"] = lock
        return {}

    agent.node("a", lambda ctx: {"report": {"sections": [1, {}]}})
    agent.node("b", work, max_retries=3)
    agent.chain("a", "b", "c")
    result = await agent.run()
    assert not result.success
    assert agent.ran == ["a#1", "b#1"], "it is not tried again"
    expected = "state" if how == "key" else "state.report.sections[1].author"
    assert expected in (result.error or "")
    assert "failed after 1 attempts" in (result.error or "")
    assert agent.state() is RunState.FAILED

    agent.work["b"] = lambda ctx: {"b_out": 1}
    result = await agent.run()
    assert result.success
    assert result.output == {"report": {"sections": [1, {}]}, "b_out": 1}


async def test_an_unstorable_value_may_take_the_failure_edge(agent: Agent) -> None:
    agent.node("a", lambda ctx: {"bad": threading.Lock()})
    agent.node("repair", lambda ctx: {"repaired": 1})
    agent.edge("a", "repair", "on_failure")
    result = await agent.run()
    assert result.success
    assert result.output == {"repaired": 1}


async def test_an_unstorable_input_starts_nothing(agent: Agent) -> None:
    agent.chain("a", "b")
    result = await agent.run({"client": threading.Lock()})
    assert not result.success
    assert "state.client" in (result.error or "")
    assert agent.ran == []
    assert agent.storage is not None
    assert agent.storage.find_run("run-1") is None
    assert (await agent.run({"client": 1})).success


async def test_without_a_manager_any_value_goes(plain: Agent) -> None:
    lock = threading.Lock()
    plain.node("a", lambda ctx: {"lock": lock})
    plain.chain("a", "b")
    assert (await plain.run()).output["lock"] is lock
