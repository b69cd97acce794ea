"""What agents say to each other: messages, and how well one can handle a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from framework.runner.runner import AgentRunner


class MessageType(str, Enum):
    """What a message is for."""

    REQUEST = "request"
    RESPONSE = "response"
    HANDOFF = "handoff"
    BROADCAST = "broadcast"
    CAPABILITY_CHECK = "capability_check"
    CAPABILITY_RESPONSE = "capability_response"


class CapabilityLevel(str, Enum):
    """How well an agent can handle a request, from not at all to best."""

    CANNOT_HANDLE = "cannot_handle"
    UNCERTAIN = "uncertain"
    CAN_HANDLE = "can_handle"
    BEST_FIT = "best_fit"


@dataclass
class AgentMessage:
    """One message. ``from_agent`` and ``to_agent`` are names; ``None`` is the orchestrator, or everybody.

    ``parent_id`` is the message this one answers.
    """

    id: str = field(default_factory=lambda: str(uuid4()))
    type: MessageType = MessageType.REQUEST
    from_agent: str | None = None
    to_agent: str | None = None
    intent: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    requires_response: bool = True
    parent_id: str | None = None
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    metadata: dict[str, Any] = field(default_factory=dict)

    def reply(self, from_agent: str, content: dict[str, Any], type: MessageType = MessageType.RESPONSE) -> AgentMessage:
        """The answer to this message, from ``from_agent`` to its sender."""
        return AgentMessage(
            type=type,
            from_agent=from_agent,
            to_agent=self.from_agent,
            intent=self.intent,
            content=content,
            requires_response=False,
            parent_id=self.id,
        )


@dataclass
class CapabilityResponse:
    """How well an agent can handle a request. ``confidence`` is from 0 to 1."""

    agent_name: str
    level: CapabilityLevel
    confidence: float
    reasoning: str
    estimated_steps: int | None = None
    dependencies: list[str] = field(default_factory=list)

    def can_handle(self) -> bool:
        """Whether the agent should be considered at all."""
        return self.level in (CapabilityLevel.CAN_HANDLE, CapabilityLevel.BEST_FIT)


@dataclass
class OrchestratorResult:
    """What became of a request. ``handled_by`` names the agents in the order they worked; ``results`` is by name."""

    success: bool
    handled_by: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    messages: list[AgentMessage] = field(default_factory=list)
    error: str | None = None


@dataclass
class RegisteredAgent:
    """An agent as an orchestrator knows it. ``capabilities`` are words it is good for; higher ``priority`` first."""

    name: str
    runner: AgentRunner
    description: str = ""
    capabilities: list[str] = field(default_factory=list)
    priority: int = 0
