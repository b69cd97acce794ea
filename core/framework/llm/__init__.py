"""Language models: the provider interface and the scripted provider, each imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.llm.provider import LLMProvider, LLMResponse, Tool, ToolResult, ToolUse
    from framework.llm.scripted import ScriptedLLM

__all__ = ["LLMProvider", "LLMResponse", "ScriptedLLM", "Tool", "ToolResult", "ToolUse"]

_HOMES = {
    "LLMProvider": "framework.llm.provider",
    "LLMResponse": "framework.llm.provider",
    "ScriptedLLM": "framework.llm.scripted",
    "Tool": "framework.llm.provider",
    "ToolResult": "framework.llm.provider",
    "ToolUse": "framework.llm.provider",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
