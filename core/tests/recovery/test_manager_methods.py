"""The manager's own methods, for callers who manage checkpoints themselves."""

from __future__ import annotations

import re
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.node import SharedMemory
from framework.schemas.checkpoint import CheckpointConfig, ExecutorType
from framework.storage.backend import Storage
from framework.storage.memory import MemoryStorage


def memory_of(**values: Any) -> SharedMemory:
    memory = SharedMemory()
    for key, value in values.items():
        memory.write(key, value)
    return memory


def test_a_manager_saves_and_restores(storage: Storage) -> None:
    manager = CheckpointManager(storage)
    assert manager.config == CheckpointConfig()
    assert manager.storage is storage
    first = manager.save_checkpoint("run_123", "node_1", memory_of(a=1, pair=(1, {2})))
    assert first is not None
    assert "ckpt_run_123_node_1" in first
    assert re.search(r"_\d{20}_", first), "the time is there in microseconds"
    assert manager.restore_from_checkpoint("run_123") == ({"a": 1, "pair": (1, {2})}, "node_1")
    second = manager.save_checkpoint(
        "run_123", "node_2", memory_of(a=2), metadata={"next_node_id": "node_3", "step_number": 2, "total_tokens": 9}
    )
    assert manager.restore_from_checkpoint("run_123") == ({"a": 2}, "node_3")
    checkpoint = manager.get_checkpoint("run_123")
    assert checkpoint is not None
    assert (checkpoint.id, checkpoint.step_number, checkpoint.total_tokens) == (second, 2, 9)
    assert [found.id for found in manager.list_checkpoints("run_123")] == [second], "latest_only keeps one"
    assert manager.delete_checkpoints("run_123") == 1
    assert manager.get_checkpoint("run_123") is None
    assert manager.restore_from_checkpoint("run_123") == (None, None)
    assert manager.list_checkpoints("run_123") == []
    assert manager.delete_checkpoints("run_123") == 0


def test_an_empty_memory_is_restored_too(storage: Storage) -> None:
    manager = CheckpointManager(storage)
    manager.save_checkpoint("r", "node_1", SharedMemory())
    assert manager.restore_from_checkpoint("r") == ({}, "node_1")


def test_a_manager_of_plans_names_steps(storage: Storage) -> None:
    manager = CheckpointManager(storage)
    manager.save_checkpoint("r", "step_1", memory_of(a=1), executor_type=ExecutorType.FLEXIBLE)
    checkpoint = manager.get_checkpoint("r")
    assert checkpoint is not None
    assert (checkpoint.current_node_id, checkpoint.current_step_id, checkpoint.node_id) == (None, "step_1", "step_1")


@pytest.mark.parametrize("options", [{"enabled": False}, {"auto_recovery": False}])
def test_switches_of_a_manager(storage: Storage, options: dict[str, bool]) -> None:
    CheckpointManager(storage).save_checkpoint("r", "node_1", memory_of(a=1))
    manager = CheckpointManager(storage, CheckpointConfig.model_validate(options))
    assert manager.restore_from_checkpoint("r") == (None, None)
    assert manager.get_checkpoint("r") is not None
    saved = manager.save_checkpoint("r", "node_2", memory_of(a=2))
    assert (saved is None) == (not manager.config.enabled)


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"save_frequency": "every_n_nodes", "n_nodes": 3}, [3, 6]),
        ({"enabled": False}, []),
    ],
)
def test_when_checkpoints_are_due(options: dict[str, Any], due: list[int]) -> None:
    with MemoryStorage() as memory:
        manager = CheckpointManager(memory, CheckpointConfig.model_validate(options))
        assert [step for step in range(1, 7) if manager.should_checkpoint(step)] == due


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"retention_strategy": "all"}, 7),
        ({}, 1),
        ({"retention_strategy": "prune_old", "max_checkpoints_per_run": 3}, 3),
    ],
)
def test_retention_of_saved_checkpoints(storage: Storage, options: dict[str, Any], kept: int) -> None:
    manager = CheckpointManager(storage, CheckpointConfig.model_validate(options))
    ids = [manager.save_checkpoint("r", "node", memory_of(n=n)) for n in range(7)]
    assert len(set(ids)) == 7, "saved within a microsecond or not, ids differ"
    assert [found.id for found in manager.list_checkpoints("r")] == ids[-kept:]
    for checkpoint_id, n in zip(ids[-kept:], range(7 - kept, 7), strict=True):
        assert manager.restore_from_checkpoint("r", checkpoint_id) == ({"n": n}, "node")


def test_what_cannot_be_saved_leaves_the_earlier_checkpoint(storage: Storage) -> None:
    manager = CheckpointManager(storage)
    good = manager.save_checkpoint("r", "node_1", memory_of(a=1))
    assert manager.save_checkpoint("r", "node_2", memory_of(a=object())) is None
    assert manager.save_checkpoint("", "node_2", memory_of(a=2)) is None
    assert manager.save_checkpoint("nul\x00", "node_2", memory_of(a=2)) is None
    assert manager.get_checkpoint("nul\x00") is None
    assert manager.list_checkpoints("nul\x00") == []
    assert manager.delete_checkpoints("nul\x00") == 0
    assert [found.id for found in manager.list_checkpoints("r")] == [good]


@pytest.mark.parametrize("node_id", ["a/b", "../x", "n" * 900, "ä"])
def test_strange_node_ids_are_saved(storage: Storage, node_id: str) -> None:
    manager = CheckpointManager(storage)
    assert manager.save_checkpoint("r", node_id, memory_of(a=1)) is not None
    assert manager.restore_from_checkpoint("r") == ({"a": 1}, node_id)


def test_two_managers_share_a_store(storage: Storage) -> None:
    one, other = (CheckpointManager(storage, CheckpointConfig(retention_strategy="all")) for _ in range(2))
    ids = [manager.save_checkpoint("r", "node", memory_of(n=n)) for n, manager in enumerate([one, other, one])]
    assert [found.id for found in other.list_checkpoints("r")] == ids
