"""Large values compressed above the store: smaller, the same when read, by any store, and damage is found."""

from __future__ import annotations

import asyncio
import builtins
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import CorruptData, StorageError
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.graph.run_view import view_run
from framework.runtime import Runtime
from framework.schemas.checkpoint import Checkpoint, ExecutorType
from framework.storage import codec
from framework.storage.backend import open_storage
from framework.storage.chunks import Chunk, Op
from framework.storage.compression import MIN_BYTES, pack, unpack
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, Write
from framework.storage.sqlite import SQLiteStorage

PROSE = "What a finished step has cost is never paid again. " * 400


@given(st.sampled_from(["set", "append"]), st.text(max_size=40), st.integers(1, 400))
def test_a_chunk_comes_back_as_it_was(op: Op, text: str, times: int) -> None:
    chunk = Chunk("key", op, codec.encode(text * times).strip(b'"'))
    packed = pack(chunk)
    assert unpack(packed) == chunk
    assert packed is chunk or len(packed.data) <= 0.9 * len(chunk.data)
    assert unpack(chunk) == chunk, "what is not compressed is never taken for compressed"


@pytest.mark.parametrize("size", [0, 10, MIN_BYTES - 1])
def test_small_chunks_stay_as_they_are(size: int) -> None:
    chunk = Chunk("key", "set", b"x" * size)
    assert pack(chunk) is chunk


def test_what_does_not_shrink_stays_as_it_is() -> None:
    chunk = Chunk("key", "set", bytes(random.Random(7).choices(range(33, 126), k=100_000)))
    assert len(pack(chunk).data) >= 0.75 * len(chunk.data)
    noise = Chunk("key", "set", random.Random(7).randbytes(100_000))
    assert pack(noise) is noise


class Watched(MemoryStorage):
    """Notes the sizes of the chunks that it is given, as a store that encrypts them would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.compression = "zstd"
        self.sizes: dict[str, list[int]] = {}

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        for one in commits:
            for chunk in one.chunks if isinstance(one, Commit) else ():
                self.sizes.setdefault(chunk.key, []).append(len(chunk.data))
        return super().commit(commits)


GOAL = Goal(id="goal", name="goal", description="a run with large values")


def graph(nodes: int, max_steps: int = 100) -> GraphSpec:
    names = [f"n{number}" for number in range(nodes)]
    return GraphSpec(
        id="graph",
        goal_id="goal",
        entry_node="n0",
        max_steps=max_steps,
        nodes=[NodeSpec(id=name, node_type="function") for name in names],
        edges=[
            EdgeSpec(id=f"e{number}", source=names[number], target=names[number + 1]) for number in range(nodes - 1)
        ],
    )


def grow(ctx: NodeContext) -> dict[str, Any]:
    return {"pages": [*(ctx.memory.read("pages") or []), PROSE], "notes": (ctx.memory.read("notes") or "") + PROSE}


async def run(storage: Any, steps: int) -> Any:
    executor = GraphExecutor(Runtime(storage), checkpoint_manager=CheckpointManager(storage))

    class Node:
        def validate_input(self, ctx: NodeContext) -> list[str]:
            return []

        async def execute(self, ctx: NodeContext) -> Any:
            return NodeResult(True, output=grow(ctx))

    for number in range(6):
        executor.register_node(f"n{number}", Node())
    return await executor.execute(graph(6, steps), GOAL, {"seed": PROSE * 20}, run_id="run-1")


async def test_a_run_s_large_values_are_stored_compressed_and_restored() -> None:
    storage = Watched()
    stopped = await run(storage, 3)
    assert not stopped.success
    assert max(storage.sizes["pages"]) < len(PROSE) / 5
    assert max(storage.sizes["notes"]) < len(PROSE) / 5
    [seed] = [chunk for chunk in storage.read_chunks("run-1", 0) if chunk.key == "seed"]
    assert len(seed.data) < len(PROSE)
    finished = await run(storage, 100)
    assert finished.success
    assert finished.output["pages"] == [PROSE] * 6
    assert finished.output["notes"] == PROSE * 6
    assert finished.output["seed"] == PROSE * 20
    assert finished.steps_recovered == 3
    assert storage.verify().ok
    checkpoint = storage.load_latest_checkpoint("run-1")
    assert checkpoint is not None
    assert checkpoint.memory_snapshot["pages"] == [PROSE] * 6
    name = CheckpointManager(storage).fork("run-1", changes={"pages": []})
    fork = storage.load_latest_checkpoint(name)
    assert fork is not None
    assert (fork.memory_snapshot["pages"], fork.memory_snapshot["notes"]) == ([], PROSE * 6)
    storage.close()


@pytest.mark.parametrize("first", ["zstd", None], ids=["compressed", "plain"])
def test_a_store_reads_both_whatever_it_writes(first: Any, tmp_path: Path) -> None:
    def save(compression: Any, number: int) -> None:
        with SQLiteStorage(tmp_path / "runs.db", compression=compression) as store:
            memory = {"text": PROSE + str(number), "log": [PROSE] * number, "n": number}
            store.save_checkpoint(
                Checkpoint(id=f"c{number}", run_id="run-1", executor_type=ExecutorType.GRAPH, memory_snapshot=memory)
            )
            found = store.load_latest_checkpoint("run-1")
            assert found is not None
            assert found.memory_snapshot == memory
            assert store.verify().ok

    second = None if first else "zstd"
    for number, compression in enumerate([first, second, first, second]):
        save(compression, number)


def test_damage_in_a_compressed_chunk_is_found() -> None:
    packed = pack(Chunk("key", "set", codec.encode(PROSE)))
    for data in (packed.data[:-5], packed.data[:4], packed.data[:4] + b"\xff" * 20, packed.data[:20] + b"x" * 20):
        with pytest.raises(CorruptData, match="key 'key'"):
            unpack(Chunk("key", "set", data))


def test_a_size_that_no_store_takes_is_not_believed() -> None:
    # A frame that says it holds 2**40 bytes.
    data = b"\x28\xb5\x2f\xfd" + b"\xe0" + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(CorruptData, match="1099511627776"):
        unpack(Chunk("key", "set", data))


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SQLiteStorage(tmp_path / "runs.db", compression="zstd") as store:
        store.save_checkpoint(
            Checkpoint(id="c", run_id="run-1", executor_type=ExecutorType.GRAPH, memory_snapshot={"text": PROSE})
        )
    import_ = builtins.__import__

    def missing(name: str, *given: Any, **named: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return import_(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StorageError, match=r"surefoot\[zstd\]"):
        SQLiteStorage(tmp_path / "other.db", compression="zstd")
    with SQLiteStorage(tmp_path / "runs.db") as store:
        with pytest.raises(StorageError, match=r"key 'text'.*surefoot\[zstd\]") as raised:
            store.load_latest_checkpoint("run-1")
        assert not isinstance(raised.value, CorruptData), "it is not damaged, and no older one may be used for it"


def test_a_compression_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="'gzip'"):
        SQLiteStorage(tmp_path / "runs.db", compression="gzip")  # type: ignore[arg-type]
    assert not (tmp_path / "runs.db").exists()


def test_a_url_asks_for_it_and_the_store_s_own_url_does_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    with open_storage(f"{url}?compression=zstd") as store:
        assert (store.compression, store.url) == ("zstd", f"{url}?compression=zstd")
        memory = {"text": PROSE}
        store.save_checkpoint(
            Checkpoint(id="c", run_id="run-1", executor_type=ExecutorType.GRAPH, memory_snapshot=memory)
        )
        assert len(store.read_chunks("run-1", 1)[0].data) < len(PROSE) / 5
    with open_storage(url) as store:
        assert (store.compression, store.url) == (None, url)
        found = store.load_latest_checkpoint("run-1")
        assert found is not None
        assert found.memory_snapshot == memory


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///{0}/runs.db?compression=gzip", "compression 'gzip' is not known; write compression=zstd"),
        ("sqlite:///{0}/runs.db?compression=zstd&mode=ro", "are not known"),
        ("sqlite:///{0}/runs.db?compression=zstd#x", "are not known"),
        ("sqlite:///{0}/runs.db?compression=zstd&compression=zstd", "are not known"),
        ("file://{0}/runs?compression=zstd", "are not known"),
        ("memory://?compression=zstd", "are not known"),
    ],
    ids=["gzip", "two", "fragment", "twice", "file", "memory"],
)
def test_a_url_with_other_options_is_refused(url: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=says):
        open_storage(url.format(tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_the_library_a_run_is_shown_as_one_that_cannot_be_read_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view and a resume say what to install; no older checkpoint is used, and nothing is removed."""
    path = tmp_path / "runs.db"
    with SQLiteStorage(path, compression="zstd") as store:
        asyncio.run(run(store, 3))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with SQLiteStorage(path) as store:
        view = view_run(store, "run-1")
        assert view.resume.verdict == "refused"
        assert "surefoot[zstd]" in view.resume.refusals[0]
        before = store.find_run("run-1")
        resumed = asyncio.run(run(store, 100))
        assert not resumed.success
        assert "surefoot[zstd]" in resumed.error
        assert store.find_run("run-1") == before
        with pytest.raises(StorageError, match=r"surefoot\[zstd\]"):
            store.verify()
