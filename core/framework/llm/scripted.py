"""A deterministic language model for tests and demos: it says what a script says, and counts what that would cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from framework.errors import SurefootError
from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolExecutor, ToolUse

Reply: TypeAlias = str | LLMResponse | ToolUse | Sequence[ToolUse] | Exception
"""Text, a ready response, one or more tool calls, or an exception to raise."""

Script: TypeAlias = Sequence[Reply] | Callable[[list[Message], str | None, list[Tool]], Reply]
"""Replies in order, or a function of ``(messages, system, tools)`` that returns the next one."""


class ScriptExhausted(SurefootError, LookupError):
    """The model was called more often than its script has replies."""


@dataclass(frozen=True)
class ScriptedCall:
    """One answered call, as the ledger is told about it. ``number`` counts from 1."""

    number: int
    messages: list[Message]
    system: str | None
    content: str
    tool_calls: tuple[ToolUse, ...]
    input_tokens: int
    output_tokens: int
    cost_usd: float


class ScriptedLLM(LLMProvider):
    """A provider that needs no network. Thread-safe; concurrent calls take the script's replies as they come.

    ``script`` is a list of replies or a function (see `Script`). ``usd_per_million_input_tokens`` and
    ``usd_per_million_output_tokens`` are invented prices. ``ledger`` is told about each call once it is answered and
    before the caller has it, so a count outside this process misses none. ``delay_seconds`` is slept, blocking, per
    call. ``calls``, ``input_tokens``, ``output_tokens`` and ``cost_usd`` are totals over all answered calls.
    """

    def __init__(
        self,
        script: Script,
        *,
        model: str = "scripted",
        usd_per_million_input_tokens: float = 3.0,
        usd_per_million_output_tokens: float = 15.0,
        ledger: Callable[[ScriptedCall], None] | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        self.model = model
        self.calls = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self._script = script if callable(script) else list(script)
        self._prices = (usd_per_million_input_tokens / 1e6, usd_per_million_output_tokens / 1e6)
        self._ledger = ledger
        self._delay_seconds = delay_seconds
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def cost_usd(self) -> float:
        """What all answered calls would have cost."""
        return self._cost(self.input_tokens, self.output_tokens)

    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int = 1024,
    ) -> LLMResponse:
        """The next reply. Tool calls give a response with stop_reason "tool_use" and the calls as ``raw_response``.

        Raises ScriptExhausted after the last reply, and the exception when the reply is one.
        """
        response, _ = self._turn(list(messages), system, list(tools or ()))
        return response

    def complete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: ToolExecutor,
        max_iterations: int = 10,
    ) -> LLMResponse:
        """Replies until one calls no tool, each tool call run by ``tool_executor`` and its result told to the script.

        Raises what `complete` and ``tool_executor`` raise.
        """
        talk = list(messages)
        input_tokens = output_tokens = 0
        for _ in range(max_iterations):
            response, uses = self._turn(talk, system, list(tools))
            input_tokens += response.input_tokens
            output_tokens += response.output_tokens
            if not uses:
                return LLMResponse(
                    content=response.content,
                    model=response.model,
                    input_tokens=input_tokens,
                    output_tokens=output_tokens,
                    stop_reason=response.stop_reason,
                    raw_response=response.raw_response,
                )
            talk = [*talk, _asked(uses), _answered(uses, tool_executor)]
        return LLMResponse(
            content=f"Stopped after {max_iterations} calls that all asked for tools.",
            model=self.model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            stop_reason="max_iterations",
        )

    def _turn(
        self, messages: list[Message], system: str | None, tools: list[Tool]
    ) -> tuple[LLMResponse, tuple[ToolUse, ...]]:
        reply = self._next_reply(messages, system, tools)
        if self._delay_seconds > 0:
            time.sleep(self._delay_seconds)
        if isinstance(reply, Exception):
            raise reply
        uses: tuple[ToolUse, ...] = ()
        if isinstance(reply, LLMResponse):
            response = reply
        else:
            content = reply if isinstance(reply, str) else ""
            if not isinstance(reply, str):
                uses = (reply,) if isinstance(reply, ToolUse) else tuple(reply)
            response = LLMResponse(
                content=content,
                model=self.model,
                input_tokens=_tokens(system or "") + sum(_tokens(message.get("content")) for message in messages),
                output_tokens=_tokens(content) + sum(_tokens(use.name) + _tokens(use.input) for use in uses),
                stop_reason="tool_use" if uses else "end_turn",
                raw_response=list(uses) if uses else None,
            )
        self._count(messages, system, response, uses)
        return response, uses

    def _next_reply(self, messages: list[Message], system: str | None, tools: list[Tool]) -> Reply:
        if callable(self._script):
            return self._script(messages, system, tools)
        with self._lock:
            number, self._taken = self._taken, self._taken + 1
        if number >= len(self._script):
            raise ScriptExhausted(
                f"ScriptedLLM {self.model!r} was called {number + 1} times, but its script has {len(self._script)} "
                "replies. Add replies, or pass a function that answers any call."
            )
        return self._script[number]

    def _count(
        self, messages: list[Message], system: str | None, response: LLMResponse, uses: tuple[ToolUse, ...]
    ) -> None:
        with self._lock:
            self.calls += 1
            self.input_tokens += response.input_tokens
            self.output_tokens += response.output_tokens
            call = ScriptedCall(
                number=self.calls,
                messages=messages,
                system=system,
                content=response.content,
                tool_calls=uses,
                input_tokens=response.input_tokens,
                output_tokens=response.output_tokens,
                cost_usd=self._cost(response.input_tokens, response.output_tokens),
            )
            # Inside the lock: a ledger that appends to a file need not be thread-safe itself.
            if self._ledger is not None:
                self._ledger(call)

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        return input_tokens * self._prices[0] + output_tokens * self._prices[1]


def _tokens(value: Any) -> int:
    """An estimate that is the same everywhere: words, plus one for every six characters of the longer ones."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
    return sum(1 + (len(word) - 1) // 6 for word in text.split())


def _asked(uses: tuple[ToolUse, ...]) -> Message:
    calls = [{"type": "tool_use", "id": use.id, "name": use.name, "input": use.input} for use in uses]
    return {"role": "assistant", "content": calls}


def _answered(uses: tuple[ToolUse, ...], tool_executor: ToolExecutor) -> Message:
    results = [tool_executor(use) for use in uses]
    content = [
        {
            "type": "tool_result",
            "tool_use_id": result.tool_use_id,
            "content": result.content,
            "is_error": result.is_error,
        }
        for result in results
    ]
    return {"role": "user", "content": content}
