"""The small rules of checkpointing: how a checkpoint is named, when one is due, what a configuration keeps."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.records import Retention


def checkpoint_id(run_id: str, node_id: str, sequence: int | None = None) -> str:
    """A new checkpoint's id: run, node, time in microseconds, and what makes it unique whatever the clock does."""
    now = datetime.now(UTC)
    # Not strftime, which takes as long as the rest of a checkpoint.
    stamp = (
        f"{now.year:04d}{now.month:02d}{now.day:02d}{now.hour:02d}{now.minute:02d}{now.second:02d}{now.microsecond:06d}"
    )
    unique = uuid4().hex[:8] if sequence is None else f"{sequence:06d}"
    return f"ckpt_{run_id}_{node_id[:400]}_{stamp}_{unique}"


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
