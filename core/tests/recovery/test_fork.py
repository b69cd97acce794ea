"""``CheckpointManager.fork``: a new run from any kept checkpoint, with the original untouched."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from framework.errors import (
    CheckpointNotFound,
    CorruptData,
    InvalidId,
    ResumeError,
    RunExists,
    RunNotFound,
    UnstorableValue,
)
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.goal import Goal
from framework.graph.memory import SharedMemory
from framework.graph.node import NodeContext, NodeResult
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.backend import FileStorage
from framework.storage.checkpoints import parse_log
from framework.storage.contract import snapshot
from framework.storage.memory import MemoryStorage
from framework.storage.records import Retention
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

RUN_ID = "run-1"
GOAL = Goal(id="goal", name="Goal", description="Reach the end.")


def manager(agent: Agent) -> CheckpointManager:
    assert agent.storage is not None
    return CheckpointManager(agent.storage, CheckpointConfig(retention_strategy="all"))


def counting_agent(agent: Agent) -> None:
    """Five nodes, each of which adds to ``total`` and says in ``seen`` what it found."""
    agent.config["retention_strategy"] = "all"

    def work(ctx: NodeContext) -> NodeResult:
        total = (ctx.memory.read("total") or 0) + 1
        seen = [*(ctx.memory.read("seen") or []), (ctx.node_id, total)]
        return NodeResult(True, {"total": total, "seen": seen}, tokens_used=10)

    for name in "abcde":
        agent.node(name, work)
    agent.chain(*"abcde")


async def test_a_fork_goes_on_from_there_and_leaves_the_original(agent: Agent) -> None:
    counting_agent(agent)
    original = await agent.executor().execute(
        agent.graph, GOAL, {"topic": "x"}, run_id=RUN_ID, metadata={"agent_name": "counter"}
    )
    assert agent.storage is not None
    before = snapshot(agent.storage, RUN_ID)
    fork = manager(agent).fork(RUN_ID, at=2)
    record = agent.record(fork)
    header = codec.decode(record.header)
    source = parse_log(agent.storage.read_log(RUN_ID))
    checkpoint = next(each for each in agent.storage.list_checkpoints(RUN_ID) if each.sequence == 2)
    assert header["forked_from"] == {"run_id": RUN_ID, "checkpoint_id": checkpoint.id, "sequence": 2}
    assert header["metadata"] == {"agent_name": "counter"}
    assert (record.state, record.owner, record.sequence) == (RunState.PAUSED, None, 3)
    records = parse_log(agent.storage.read_log(fork))
    assert records[:2] == source[:2]
    assert (records[2]["kind"], records[2]["changed"]) == ("fork", [])
    restored = agent.storage.load_latest_checkpoint(fork)
    assert restored is not None
    assert (restored.execution_path, restored.total_tokens, restored.step_number) == (["a", "b"], 20, 2)
    assert restored.input_data == {"topic": "x"}

    result = await agent.run({"topic": "x"}, run_id=fork)
    assert agent.ran == ["c#1", "d#1", "e#1"]
    assert (result.success, result.path, result.total_tokens) == (True, original.path, original.total_tokens)
    assert (result.output, result.steps_executed) == (original.output, 5)
    keys = {ctx.idempotency_key for ctx in agent.contexts}
    assert keys == {f"{fork}/{step}" for step in agent.ran}
    assert snapshot(agent.storage, RUN_ID) == before
    assert agent.storage.verify().ok


async def test_changes_are_what_the_fork_goes_on_with(agent: Agent) -> None:
    counting_agent(agent)
    original = await agent.run({"topic": "x", "note": 1})
    assert agent.storage is not None
    fork = manager(agent).fork(RUN_ID, at=3, changes={"total": 100, "note": None, "new": {"a": (1, 2)}}, new_run_id="f")
    assert fork == "f"
    assert parse_log(agent.storage.read_log("f"))[-1]["changed"] == ["new", "note", "total"]
    result = await agent.run({"topic": "x", "note": 1}, run_id="f")
    assert agent.ran == ["d#1", "e#1"]
    assert result.output["total"] == 102
    assert result.output["seen"] == [("a", 1), ("b", 2), ("c", 3), ("d", 101), ("e", 102)]
    # The input is the original's, so the same call does not take the changed value back.
    assert (result.output["note"], result.output["new"], result.output["topic"]) == (None, {"a": (1, 2)}, "x")
    assert (await agent.run({"topic": "x", "note": 1})).output == original.output


async def test_what_shared_an_object_with_a_changed_value_keeps_it(quick: Agent) -> None:
    shared = {"deep": list(range(100))}
    other = list(range(50))
    shared["other"] = other
    quick.config["retention_strategy"] = "all"
    quick.node(
        "a", lambda ctx: {"a1": shared, "b": shared, "c": shared, "other": other, "d": {"in": other, "x": shared}}
    )
    quick.node("end", lambda ctx: {})
    quick.chain("a", "end")
    await quick.run()
    for changed in (["a1"], ["other"], ["a1", "other"], ["other", "a1"], ["b", "c"], ["a1", "b", "c"], ["d"]):
        fork = manager(quick).fork(RUN_ID, at=1, changes=dict.fromkeys(changed, "changed"))
        result = await quick.run(run_id=fork)
        expected: dict[str, Any] = {"a1": shared, "b": shared, "c": shared, "other": other}
        expected |= {"d": {"in": other, "x": shared}} | dict.fromkeys(changed, "changed")
        assert {key: result.output[key] for key in expected} == expected, changed
        same = [key for key in ("a1", "b", "c") if key not in changed]
        assert all(result.output[key] is result.output[same[0]] for key in same), changed


async def test_a_failed_run_is_forked_with_another_value(agent: Agent) -> None:
    agent.node("a", lambda ctx: {"url": "wrong"})
    agent.node("b", lambda ctx: NodeResult(ctx.memory.read("url") == "right", {"b": 1}, error="no"), max_retries=2)
    agent.chain("a", "b", "c")
    failed = await agent.run()
    assert not failed.success
    fork = manager(agent).fork(RUN_ID, changes={"url": "right"})
    result = await agent.run(run_id=fork)
    assert (result.success, agent.ran, result.path) == (True, ["b#1", "c#1"], ["a", "b", "c"])
    again = manager(agent).fork(RUN_ID)
    assert not (await agent.run(run_id=again)).success
    assert agent.ran == ["b#1", "b#1"], "the attempts that failed after the checkpoint are not the fork's"
    assert agent.state() is RunState.FAILED


async def test_an_input_of_the_next_step_is_changed_too(quick: Agent) -> None:
    got: list[Any] = []
    quick.config["retention_strategy"] = "all"
    quick.node("a", lambda ctx: {"x": 1, "y": 1})

    def keep(ctx: NodeContext) -> None:
        got.append(dict(ctx.input_data))

    quick.node("b", keep)
    quick.edge("a", "b", input_mapping={"z": "x"})
    await quick.run()
    await quick.run(run_id=manager(quick).fork(RUN_ID, at=1, changes={"x": 2, "z": 3}))
    assert [(each.get("x"), each.get("y")) for each in got] == [(1, 1), (2, 1)]


async def test_a_fork_at_a_pause_is_paused_there(agent: Agent) -> None:
    agent.node("ask", lambda ctx: {"asked": True})
    agent.node("use", lambda ctx: {"used": ctx.memory.read("answer")})
    agent.chain("ask", "use")
    agent.options["pause_nodes"] = ["ask"]
    paused = await agent.run()
    assert paused.paused_at == "ask"
    fork = manager(agent).fork(RUN_ID)
    answered = await agent.run({"answer": "from the fork"}, run_id=fork)
    assert (answered.output["used"], agent.ran) == ("from the fork", ["use#1"])
    original = await agent.run({"answer": "from the original"})
    assert (original.output["used"], agent.ran) == ("from the original", ["use#1"])


async def test_a_fork_where_a_person_waits_asks_again(agent: Agent) -> None:
    agent.node("a", lambda ctx: {"a": 1})
    agent.node("person", node_type="human_input", output_keys=["answer"])
    agent.chain("a", "person", "end")
    assert (await agent.run()).paused_at == "person"
    fork = manager(agent).fork(RUN_ID, changes={"a": 2})
    assert (await agent.run(run_id=fork)).paused_at == "person"
    result = await agent.run({"answer": "yes"}, run_id=fork)
    assert (result.success, result.output["a"], result.output["answer"]) == (True, 2, "yes")
    assert agent.state() is RunState.PAUSED


async def test_a_pause_that_nobody_was_told_of_is_told_by_the_fork(quick: Agent) -> None:
    release = asyncio.Event()

    async def slow(ctx: NodeContext) -> dict[str, Any]:
        await release.wait()
        return {"slow": 1}

    quick.config["retention_strategy"] = "all"
    quick.node("fan", fan_out=True)
    quick.node("asks", lambda ctx: {"asks": 1})
    quick.node("slow", slow)
    for name in ("asks", "slow"):
        quick.chain("fan", name)
        quick.chain(name, "join")
    quick.options["pause_nodes"] = ["asks"]
    task = asyncio.create_task(quick.run())
    assert quick.storage is not None
    while (record := quick.storage.find_run(RUN_ID)) is None or record.sequence < 2:
        await asyncio.sleep(0)
    fork = await asyncio.to_thread(manager(quick).fork, RUN_ID, 2)  # while the original runs
    release.set()
    assert (await task).paused_at == "asks"
    told = await quick.run(run_id=fork)
    assert (told.paused_at, quick.ran) == ("asks", [quick.ran[0]])
    assert quick.ran[0].endswith("slow#1")
    assert (await quick.run({"answer": 1}, run_id=fork)).success


async def test_a_pause_recorded_after_its_checkpoint_is_answered_in_the_fork(quick: Agent) -> None:
    quick.config["retention_strategy"] = "all"
    quick.node("fan", fan_out=True)
    quick.node("asks", lambda ctx: {"asks": 1})
    quick.node("slow", slowly, max_retries=1)
    for name in ("asks", "slow"):
        quick.chain("fan", name)
        quick.chain(name, "join")
    quick.options["pause_nodes"] = ["asks"]
    assert (await quick.run()).paused_at == "asks"
    fork = manager(quick).fork(RUN_ID)
    result = await quick.run({"answer": 1}, run_id=fork)
    assert (result.success, result.paused_at) == (True, None)
    early = manager(quick).fork(RUN_ID, at=2)
    told = [(await quick.run(run_id=early)).paused_at for _ in range(2)]
    assert told == ["asks", None], "told once, then answered"


async def slowly(ctx: NodeContext) -> dict[str, Any]:
    for _ in range(20):
        await asyncio.sleep(0)
    return {"slow": 1}


async def test_a_fork_inside_a_fan_out_keeps_the_branches(agent: Agent) -> None:
    agent.config["retention_strategy"] = "all"
    agent.node("fan", lambda ctx: {"base": 1}, fan_out=True)
    for name in ("x", "y"):
        agent.node(name, lambda ctx: {f"of_{ctx.node_id}": ctx.memory.read("base")})
        agent.node(f"{name}2", lambda ctx: {f"of_{ctx.node_id}": ctx.memory.read("base")})
        agent.chain("fan", name, f"{name}2", "join")
    original = await agent.run()
    for at in range(1, 6):
        fork = manager(agent).fork(RUN_ID, at=at, changes={"base": 2})
        result = await agent.run(run_id=fork)
        ran = {ctx.node_id for ctx in agent.contexts}
        assert result.success
        for name in ("x", "x2", "y", "y2"):
            assert result.output[f"of_{name}"] == (2 if name in ran else 1), (at, ran)
        assert len(result.path) == len(original.path)
        plain = await agent.run(run_id=manager(agent).fork(RUN_ID, at=at))
        assert (plain.output, plain.path) == (original.output, original.path)


async def test_retention_and_deletion_of_the_original_do_not_matter(agent: Agent) -> None:
    counting_agent(agent)
    original = await agent.run()
    fork = manager(agent).fork(RUN_ID, at=3)
    assert agent.storage is not None
    agent.storage.prune(RUN_ID, Retention(1))
    assert agent.storage.delete_run(RUN_ID)
    result = await agent.run(run_id=fork)
    assert (result.output, result.path) == (original.output, original.path)


async def test_a_fork_is_named_and_says_what_it_cannot_do(agent: Agent) -> None:
    counting_agent(agent)
    agent.config |= {"retention_strategy": "prune_old", "max_checkpoints_per_run": 2}
    await agent.run()
    forks = manager(agent)
    assert agent.storage is not None
    before = len(agent.storage.list_runs())
    with pytest.raises(RunNotFound):
        forks.fork("nobody")
    for at in (1, 3, 6, 0, "ckpt_unknown"):
        with pytest.raises(CheckpointNotFound, match=r"keeps 2, sequences 4 to 5"):
            forks.fork(RUN_ID, at=at)
    with pytest.raises(TypeError, match="sequence or id"):
        forks.fork(RUN_ID, at=1.5)  # type: ignore[arg-type]
    for taken in (RUN_ID,):
        with pytest.raises(RunExists):
            forks.fork(RUN_ID, new_run_id=taken)
    with pytest.raises(InvalidId):
        forks.fork(RUN_ID, new_run_id="")
    with pytest.raises(UnstorableValue, match=r"state\.x\[1\]"):
        forks.fork(RUN_ID, changes={"x": [1, object()]})
    for name in ("", "plan\x00plan", 1):
        with pytest.raises(UnstorableValue):
            forks.fork(RUN_ID, changes={name: 1})  # type: ignore[dict-item]
    assert len(agent.storage.list_runs()) == before
    first = agent.storage.list_checkpoints(RUN_ID)[0]
    made = forks.fork(RUN_ID, at=first.id)
    assert made.startswith("run_")
    assert codec.decode(agent.record(made).header)["forked_from"]["sequence"] == 4


async def test_a_run_without_checkpoints_cannot_be_forked(quick: Agent) -> None:
    quick.node("a", lambda ctx: NodeResult(False, error="broken"))
    await quick.run()
    with pytest.raises(CheckpointNotFound, match="keeps none"):
        manager(quick).fork(RUN_ID)


async def test_a_completed_run_forked_at_its_end_is_complete(agent: Agent) -> None:
    counting_agent(agent)
    original = await agent.run()
    result = await agent.run(run_id=manager(agent).fork(RUN_ID))
    assert (result.output, agent.ran, result.path) == (original.output, [], original.path)


async def test_a_fork_may_not_be_resumed_with_another_graph(agent: Agent) -> None:
    counting_agent(agent)
    await agent.run()
    saved = manager(agent)
    memory = SharedMemory()
    memory.write("a", 1)
    saved.save_checkpoint("by hand", "node", memory)
    fork = saved.fork("by hand")
    with pytest.raises(ResumeError, match="not started by an executor"):
        await agent.run(run_id=fork)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "column", "where"),
    [
        ("chunks", "data", "sequence = 2"),
        ("chunks", "data", "sequence = 0"),
        ("steps", "record", "sequence = 1"),
        ("checkpoints", "body", "sequence = 3"),
        ("runs", "header", "1"),
    ],
)
async def test_damage_is_found_and_not_copied(
    table: str, column: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with SQLiteStorage(tmp_path / "runs.db") as store:
        agent: Agent = request.getfixturevalue("quick")
        agent.storage = store
        counting_agent(agent)
        await agent.run({"topic": "x"})
        with closing(sqlite3.connect(tmp_path / "runs.db")) as other, other:
            damaged = f"CAST(substr({column}, 1, length({column}) - 1) || 'X' AS BLOB)"
            assert other.execute(f"UPDATE {table} SET {column} = {damaged} WHERE {where}").rowcount
        with pytest.raises(CorruptData):
            manager(agent).fork(RUN_ID, at=3, new_run_id="fork")
        assert store.find_run("fork") is None
        if table != "runs":
            assert [record.run_id for record in store.list_runs()] == [RUN_ID]


@pytest.mark.parametrize("folder", ["history", "checkpoints/by_run"])
async def test_damaged_files_are_found_and_not_copied(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with FileStorage(tmp_path / "store") as store:
        agent: Agent = request.getfixturevalue("quick")
        agent.storage = store
        counting_agent(agent)
        await agent.run({"topic": "x"})
        for path in sorted((tmp_path / "store" / folder / RUN_ID).iterdir())[:1]:
            path.write_bytes(path.read_bytes().replace(b'"sequence"', b'"sEquence"'))
        with pytest.raises(CorruptData):
            manager(agent).fork(RUN_ID, at=3, new_run_id="fork")
        assert store.find_run("fork") is None


async def test_the_newest_that_can_be_read_is_forked(quick: Agent) -> None:
    counting_agent(quick)
    await quick.run()
    assert isinstance(quick.storage, MemoryStorage)
    quick.storage._db.execute("UPDATE checkpoints SET body = 'x' WHERE sequence = 5")
    fork = manager(quick).fork(RUN_ID)
    assert codec.decode(quick.record(fork).header)["forked_from"]["sequence"] == 4
    with pytest.raises(CorruptData, match="5"):
        manager(quick).fork(RUN_ID, at=5)


# --- the original stays as it was, byte for byte --------------------------------------------------------------------


def rows_of(store: SQLiteStorage, run_id: str) -> list[Any]:
    db = store._db
    pk = db.execute("SELECT pk FROM runs WHERE run_id = ?", (run_id,)).fetchone()[0]
    rows = [tuple(row) for row in db.execute("SELECT * FROM runs WHERE pk = ?", (pk,))]
    for table in ("steps", "checkpoints", "chunks", "messages"):
        rows += [(table, *row) for row in db.execute(f"SELECT * FROM {table} WHERE run_pk = ?", (pk,))]
    return rows


async def test_the_original_is_untouched_to_the_byte(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    agent: Agent = request.getfixturevalue("quick")
    counting_agent(agent)
    with SQLiteStorage(tmp_path / "runs.db") as store:
        agent.storage = store
        await agent.run({"topic": "x"})
        before = rows_of(store, RUN_ID)
        fork = manager(agent).fork(RUN_ID, at=2, changes={"total": 7})
        await agent.run(run_id=fork)
        assert rows_of(store, RUN_ID) == before
    with FileStorage(tmp_path / "store") as files:
        agent.storage = files
        await agent.run({"topic": "x"})

        def contents() -> dict[str, bytes]:
            found = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "run-1" in str(path)]
            return {str(path): path.read_bytes() for path in found if path.suffix != ".lock"}

        kept = contents()
        assert len(kept) > 5
        fork = manager(agent).fork(RUN_ID, at=2, changes={"total": 7})
        await agent.run(run_id=fork)
        assert {path: data for path, data in contents().items() if path in kept} == kept
