"""Checkpoints as data: what a checkpoint holds, its listing entry, and the configuration of checkpointing."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from framework.schemas.retention import RetentionPolicy

FORMAT_VERSION = 2
"""Version of the stored form of a checkpoint; a reader refuses a newer one."""


class ExecutorType(str, Enum):
    """Which executor wrote a checkpoint."""

    GRAPH = "graph"
    FLEXIBLE = "flexible"


class CheckpointStatus(str, Enum):
    """What the run was doing when the checkpoint was committed."""

    IN_PROGRESS = "in_progress"
    PAUSED = "paused"
    FAILED = "failed"
    COMPLETED = "completed"


class CheckpointConfig(BaseModel):
    """How a run is checkpointed. Unknown options are refused, so a typo cannot switch anything off silently."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    save_frequency: Literal["every_node", "every_n_nodes"] = "every_node"
    n_nodes: int = Field(default=1, ge=1, description="With every_n_nodes: commit after each n-th step.")
    auto_recovery: bool = Field(default=True, description="Gates restore_from_checkpoint only.")
    max_checkpoints_per_run: int = Field(default=100, ge=1, description="How many prune_old keeps.")
    retention_strategy: Literal["all", "latest_only", "prune_old"] = "latest_only"

    retention: RetentionPolicy | None = Field(
        default=None,
        description="Which finished runs of the whole store are kept, applied in the background by processes that live "
        "long (AgentRunner, `surefoot recover --watch`). Beside the strategy, which is applied with each commit.",
    )

    durability: Literal["sync", "async", "exit"] = Field(
        default="sync",
        description="sync: a commit is durable before the next step starts. async: commits are made in order "
        "while the next step runs, all durable before execute() returns. exit: one commit when execute() ends.",
    )
    on_commit_error: Literal["stop", "continue"] = Field(
        default="stop",
        description="stop: a commit that fails ends the run, resumable from the last good checkpoint. continue: "
        "the run goes on, with a warning problem; steps since the last good checkpoint would run again.",
    )
    definition_change: Literal["refuse", "allow"] = Field(
        default="refuse", description="Whether a run may resume with a definition other than its own."
    )
    on_success: Literal["keep", "delete"] = Field(
        default="keep",
        description="keep: retention decides. delete: the run and its checkpoints are removed once it completes; "
        "the same run_id would then start anew.",
    )
    lease_seconds: float = Field(
        default=30.0, gt=0, description="How long a silent owner keeps a run; renewed in the background."
    )
    max_recovery_attempts: int = Field(
        default=5,
        ge=0,
        description="How often in a row a run of a graph goes on after its process vanished, without a finished step, "
        "attempt or call inside a step in between; then it fails. Plans have ExecutorConfig.max_recovery_attempts.",
    )
    keep_journal: bool = Field(
        default=False, description="Whether a step's journal stays after its commit, for audit; else it goes with it."
    )
    keep_journal_on_retry: bool = Field(
        default=False,
        description="Whether an attempt after one that failed by itself is answered from the journal too. By default "
        "only a crash, a cancellation or a pause keeps it.",
    )
    sleep_in_process_seconds: float = Field(
        default=5.0,
        ge=0,
        description="The longest sleep inside a node for which the process stays; for a longer one the run pauses.",
    )


class StepRecord(BaseModel):
    """One committed step, or one plan step's standing: what a listing shows and a resume needs."""

    model_config = ConfigDict(extra="allow")

    step_id: str
    visit: int = 1
    branch: str = ""
    status: str = "completed"
    attempts: int = 1
    error: str | None = None
    tokens: int = 0
    latency_ms: int = 0
    cost: float = 0.0


class CheckpointMetadata(BaseModel):
    """A checkpoint without its state: one line of a listing."""

    model_config = ConfigDict(extra="allow")

    id: str
    run_id: str
    executor_type: ExecutorType
    node_id: str
    created_at: datetime
    step_number: int
    total_tokens: int
    total_latency_ms: int
    total_cost: float = 0.0
    sequence: int = 0
    status: CheckpointStatus = CheckpointStatus.IN_PROGRESS


class Checkpoint(BaseModel):
    """The durable record "these steps are done, this is the state, do these next".

    ``memory_snapshot`` is the whole state by key. ``next_node_id`` is what a resume runs first; ``None`` with status
    ``completed`` or ``paused`` says that nothing follows. Ordered within its run by ``sequence``, never by the clock.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    run_id: str
    executor_type: ExecutorType
    created_at: datetime = Field(default_factory=datetime.now)
    current_node_id: str | None = None
    current_step_id: str | None = None
    next_node_id: str | None = None
    memory_snapshot: dict[str, Any] = Field(default_factory=dict)
    execution_path: list[str] = Field(default_factory=list)
    step_number: int = 0
    total_tokens: int = 0
    total_latency_ms: int = 0
    total_cost: float = Field(default=0.0, description="US dollars, as far as prices are known.")
    context: dict[str, Any] = Field(default_factory=dict)

    format_version: int = FORMAT_VERSION
    sequence: int = Field(default=0, description="Position in the run's log; 0 lets the store assign the next.")
    status: CheckpointStatus = CheckpointStatus.IN_PROGRESS
    goal_id: str | None = None
    definition_id: str | None = Field(default=None, description="Id of the graph or plan.")
    fingerprint: str | None = Field(default=None, description="Content hash of the graph or plan.")
    input_data: dict[str, Any] | None = Field(default=None, description="The run's original input, when known.")
    position: dict[str, Any] = Field(
        default_factory=dict, description="The planner's position: next steps, visits, branches."
    )
    steps: dict[str, StepRecord] = Field(default_factory=dict, description="Per-step standing, by step id.")
    digest: str | None = Field(default=None, description="Integrity digest of the stored state, hexadecimal.")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def node_id(self) -> str:
        """The node or plan step this checkpoint follows."""
        return self.current_node_id or self.current_step_id or "unknown"

    def to_metadata(self) -> CheckpointMetadata:
        """The listing entry of this checkpoint."""
        return CheckpointMetadata(
            id=self.id,
            run_id=self.run_id,
            executor_type=self.executor_type,
            node_id=self.node_id,
            created_at=self.created_at,
            step_number=self.step_number,
            total_tokens=self.total_tokens,
            total_latency_ms=self.total_latency_ms,
            total_cost=self.total_cost,
            sequence=self.sequence,
            status=self.status,
        )

    def to_session_state(self) -> dict[str, Any]:
        """A ``session_state`` that ``GraphExecutor.execute`` accepts to go on from here.

        ``context`` is merged at top level but never over the keys that say where and with what to go on.
        """
        node = self.current_node_id or self.current_step_id
        return {
            **self.context,
            "paused_at": node,
            "resume_from": self.next_node_id or node,
            "next_node": self.next_node_id,
            "memory": dict(self.memory_snapshot),
            "execution_path": list(self.execution_path),
            "checkpoint_id": self.id,
            "run_id": self.run_id,
        }
