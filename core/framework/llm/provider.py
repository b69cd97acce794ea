"""What a language model provider is: one abstract class and the data that passes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""``{"role": "user" | "assistant", "content": text or a list of content blocks}``."""


@dataclass
class LLMResponse:
    """One reply of a model. Token counts are sums over every call that led to it."""

    content: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    stop_reason: str = ""
    raw_response: Any = None


@dataclass
class Tool:
    """A tool a model may call. ``parameters`` is a JSON schema of the type ``object``."""

    name: str
    description: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class ToolUse:
    """A model's request to call the tool ``name`` with the arguments ``input``; ``id`` ties the result to it."""

    id: str
    name: str
    input: dict[str, Any]


@dataclass
class ToolResult:
    """What a tool answered. ``content`` is text for the model; ``is_error`` says that the call failed."""

    tool_use_id: str
    content: str
    is_error: bool = False


ToolExecutor: TypeAlias = Callable[[ToolUse], ToolResult]


class LLMProvider(ABC):
    """A synchronous language model. Nodes call it in a worker thread, so an implementation may block.

    Callers pass every argument by keyword. ``system`` may be None and then means "no system prompt".
    """

    @abstractmethod
    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int = 1024,
    ) -> LLMResponse:
        """Ask once and return the reply. Raises whatever the provider's client raises."""

    @abstractmethod
    def complete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: ToolExecutor,
        max_iterations: int = 10,
    ) -> LLMResponse:
        """Ask, run the tools the model calls, tell it the results, and repeat until it calls none.

        Returns the last reply with the tokens of all calls summed; after ``max_iterations`` calls that all asked for
        tools, a reply whose ``stop_reason`` is ``"max_iterations"``. Raises what the client and ``tool_executor`` do.
        """
