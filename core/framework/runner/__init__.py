"""Agents from folders: load, run, resume and look at them. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.runner.agent_file import load_agent_export
    from framework.runner.agent_info import AgentInfo, ValidationResult
    from framework.runner.node_functions import node_function
    from framework.runner.orchestrator import AgentOrchestrator
    from framework.runner.protocol import (
        AgentMessage,
        CapabilityLevel,
        CapabilityResponse,
        MessageType,
        OrchestratorResult,
        RegisteredAgent,
    )
    from framework.runner.runner import AgentRunner
    from framework.runner.tool_registry import ToolRegistry, tool

_HOMES = {
    "AgentInfo": "agent_info",
    "AgentMessage": "protocol",
    "AgentOrchestrator": "orchestrator",
    "AgentRunner": "runner",
    "CapabilityLevel": "protocol",
    "CapabilityResponse": "protocol",
    "MessageType": "protocol",
    "OrchestratorResult": "protocol",
    "RegisteredAgent": "protocol",
    "ToolRegistry": "tool_registry",
    "ValidationResult": "agent_info",
    "load_agent_export": "agent_file",
    "node_function": "node_functions",
    "tool": "tool_registry",
}

__all__ = [
    "AgentInfo",
    "AgentMessage",
    "AgentOrchestrator",
    "AgentRunner",
    "CapabilityLevel",
    "CapabilityResponse",
    "MessageType",
    "OrchestratorResult",
    "RegisteredAgent",
    "ToolRegistry",
    "ValidationResult",
    "load_agent_export",
    "node_function",
    "tool",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
