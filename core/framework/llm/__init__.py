"""Language models: the provider interface and the providers, each imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.llm.anthropic import AnthropicProvider
    from framework.llm.choose import key_variable, provider_for
    from framework.llm.litellm import LiteLLMProvider
    from framework.llm.mock import MockLLM
    from framework.llm.openai import OpenAIProvider
    from framework.llm.provider import LLMProvider, LLMResponse, Tool, ToolResult, ToolUse
    from framework.llm.scripted import ScriptedLLM

__all__ = [
    "AnthropicProvider",
    "LLMProvider",
    "LLMResponse",
    "LiteLLMProvider",
    "MockLLM",
    "OpenAIProvider",
    "ScriptedLLM",
    "Tool",
    "ToolResult",
    "ToolUse",
    "key_variable",
    "provider_for",
]

_HOMES = {
    "AnthropicProvider": "framework.llm.anthropic",
    "LLMProvider": "framework.llm.provider",
    "LLMResponse": "framework.llm.provider",
    "LiteLLMProvider": "framework.llm.litellm",
    "MockLLM": "framework.llm.mock",
    "OpenAIProvider": "framework.llm.openai",
    "ScriptedLLM": "framework.llm.scripted",
    "Tool": "framework.llm.provider",
    "ToolResult": "framework.llm.provider",
    "ToolUse": "framework.llm.provider",
    "key_variable": "framework.llm.choose",
    "provider_for": "framework.llm.choose",
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
