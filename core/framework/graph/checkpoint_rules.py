"""The small rules of checkpointing: how a checkpoint is named, when one is due, what a configuration keeps."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache
from uuid import uuid4

from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.records import Retention


def checkpoint_id(run_id: str, node_id: str, sequence: int | None = None) -> str:
    """A new checkpoint's id: run, node, time in microseconds, and what makes it unique whatever the clock does."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    unique = uuid4().hex[:8] if sequence is None else f"{sequence:06d}"
    return f"ckpt_{run_id}_{node_id[:400]}_{_stamp(seconds)}{nanoseconds // 1000:06d}_{unique}"


@lru_cache(maxsize=2)
def _stamp(seconds: int) -> str:
    """A second since the epoch as digits of UTC. One serves many checkpoints."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%d%H%M%S}"


def retention_of(config: CheckpointConfig) -> Retention:
    """The storage's rule for a configuration's strategy."""
    if config.retention_strategy == "all":
        return Retention(None)
    return Retention(1 if config.retention_strategy == "latest_only" else config.max_checkpoints_per_run)


def is_due(config: CheckpointConfig, step_number: int) -> bool:
    """Whether a checkpoint is due after step ``step_number``, counted from 1."""
    if not config.enabled:
        return False
    return config.save_frequency == "every_node" or step_number % config.n_nodes == 0
