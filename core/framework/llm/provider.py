"""What a language model provider is: one abstract class and the data that passes through it."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

ToolPolicy: TypeAlias = Literal["rerun", "ask", "fail"]
"""What becomes of a tool's call that was in flight when its process died: see docs/how-to/inside-a-step.md."""

Message: TypeAlias = Mapping[str, Any]
"""``{"role": "user" | "assistant", "content": text or a list of content blocks}``.

Blocks are ``{"type": "text", "text"}``, ``{"type": "tool_use", "id", "name", "input"}`` in what the assistant said, and
``{"type": "tool_result", "tool_use_id", "content", "is_error"}`` in what the user says; providers translate them.
"""


@dataclass
class LLMResponse:
    """One reply of a model. Token counts and ``cost`` are sums over every call that led to it.

    ``input_tokens`` include those read from the provider's cache. ``cost`` is in US dollars, None when no price of
    the model is known (see `framework.llm.prices`). ``stop_reason`` is the
    endpoint's own word ("end_turn", "stop", "tool_use", "tool_calls", "max_tokens", "length" ...), or "max_iterations"
    when a tool loop was stopped; `framework.llm.stops` knows those that mean an unfinished reply.
    """

    content: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    stop_reason: str = ""
    raw_response: Any = None
    cost: float | None = None


@dataclass
class Tool:
    """A tool a model may call. ``parameters`` is a JSON schema of the type ``object``.

    ``effects`` says that a call changes something outside (sends, books, pays), so that repeating it matters.
    ``policy`` says what becomes of a call that was cut off, whatever ``effects`` is; without it that is "ask" for a
    tool with effects and "rerun" for any other. Raises ``ValueError`` for another policy.
    """

    name: str
    description: str
    parameters: dict[str, Any] = field(default_factory=dict)
    effects: bool = False
    policy: ToolPolicy | None = None

    def __post_init__(self) -> None:
        if self.policy not in (None, "rerun", "ask", "fail"):
            raise ValueError(f"Tool {self.name!r}: policy is {self.policy!r}; it is one of rerun, ask, fail.")


@dataclass
class ToolUse:
    """A model's request to call the tool ``name`` with the arguments ``input``; ``id`` ties the result to it."""

    id: str
    name: str
    input: dict[str, Any]


@dataclass
class ToolResult:
    """What a tool answered. ``content`` is text for the model; ``is_error`` says that the call failed, and
    ``outcome_unknown`` that it may have taken effect all the same: no answer came in time, or the connection broke."""

    tool_use_id: str
    content: str
    is_error: bool = False
    outcome_unknown: bool = False


ToolExecutor: TypeAlias = Callable[[ToolUse], ToolResult]
"""Runs one tool call, in a thread of its own choice or the provider's."""

AsyncToolExecutor: TypeAlias = Callable[[ToolUse], ToolResult | Awaitable[ToolResult]]
"""What the async way takes: a function, which then runs in a worker thread, or an async one."""


class LLMProvider(ABC):
    """A language model. Callers pass every argument by keyword; ``system`` may be None: no system prompt.

    The synchronous methods may block; whoever must not (all of this library) calls the async ones, through
    `framework.llm.calls`. A provider that has nothing better inherits async ones that run the others in a thread.

    A class that sets ``supports_json_schema`` takes the keyword ``json_schema`` (a JSON schema of the type ``object``
    that the reply has to follow, or None) in all four methods, and one that sets ``supports_model`` the keyword
    ``model`` (a model other than the provider's own, or None).

    A class may also offer one turn of a conversation at a time: a method ``turn(messages, system, tools,
    max_tokens=None, json_schema=None, model=None)`` that returns a `framework.llm.tool_loop.Turn`, an async ``aturn``,
    or both. Then the loop of `complete_with_tools` can be driven from outside, and in a durable run each turn is
    recorded by itself.
    """

    supports_json_schema: ClassVar[bool] = False
    supports_model: ClassVar[bool] = False

    @abstractmethod
    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int = 1024,
    ) -> LLMResponse:
        """Ask once and return the reply, of at most ``max_tokens`` tokens.

        Raises an `LLMError` that says whether asking again can help; a provider of your own may raise anything.
        """

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

    async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
        """`complete` without blocking the event loop: here, in a thread of its own. The same arguments and errors.

        Cancelling it stops waiting for the thread, which itself ends with its call.
        """
        from framework.llm.threads import in_thread  # noqa: PLC0415 - asyncio, which the data above does not need

        response: LLMResponse = await in_thread(self.complete, *args, **keywords)
        return response

    async def acomplete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        """`complete_with_tools` without blocking the event loop; ``tool_executor`` may be an `AsyncToolExecutor`.

        Once it is cancelled, no further tool call begins.
        """
        from framework.llm.threads import in_thread  # noqa: PLC0415 - asyncio, which the data above does not need
        from framework.llm.tool_loop import blocking  # noqa: PLC0415 - which imports this module

        given = inspect.signature(self.complete_with_tools).bind(*args, **keywords)
        given.arguments["tool_executor"], watch = blocking(given.arguments["tool_executor"])
        call = functools.partial(self.complete_with_tools, *given.args, **given.kwargs)
        response: LLMResponse = await in_thread(call, watch=watch)
        return response
