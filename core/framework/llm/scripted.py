"""A deterministic language model for tests and demos: it says what a script says, and counts what that would cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from framework.errors import SurefootError
from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolExecutor, ToolUse
from framework.llm.tool_loop import Conversation, Turn, talk

Reply: TypeAlias = str | LLMResponse | ToolUse | Sequence[ToolUse] | Exception
"""Text, a ready response, one or more tool calls, or an exception to raise."""

Script: TypeAlias = (
    Sequence[Reply] | Mapping[str, Reply | Sequence[Reply]] | Callable[[list[Message], str | None, list[Tool]], Reply]
)
"""Replies in order; or a mapping from a text that the question holds to its reply; or a function of
``(messages, system, tools)`` that returns the next reply.

The replies of a mapping and of a pure function depend on nothing but the request, so a run that is resumed by another
process gets the same ones. In a mapping, the first key found in the system prompt or the first message counts; a list
with other things than tool calls in it is one reply per turn of the tool loop: ``[ToolUse(...), "done"]``.
"""


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

    ``script`` is a list of replies, a mapping or a function (see `Script`). ``usd_per_million_input_tokens`` and
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
        self._script = script if callable(script) or isinstance(script, Mapping) else list(script)
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

        return talk(
            Conversation(messages, self.model, max_iterations, tools),
            lambda talked: self.turn(talked, system, tools),
            tool_executor,
        )

    def turn(self, messages: Sequence[Message], system: str | None, tools: Sequence[Tool]) -> Turn:
        """One reply of `complete_with_tools`, with the tool calls it makes."""
        response, uses = self._turn(list(messages), system, list(tools))
        return Turn(response, uses)

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
            response.cost = self._cost(response.input_tokens, response.output_tokens)
        self._count(messages, system, response, uses)
        return response, uses

    def _next_reply(self, messages: list[Message], system: str | None, tools: list[Tool]) -> Reply:
        if callable(self._script):
            return self._script(messages, system, tools)
        if isinstance(self._script, Mapping):
            return self._reply_to(self._script, messages, system)
        with self._lock:
            number, self._taken = self._taken, self._taken + 1
        if number >= len(self._script):
            raise ScriptExhausted(
                f"ScriptedLLM {self.model!r} was called {number + 1} times, but its script has {len(self._script)} "
                "replies. Add replies, or pass a function that answers any call."
            )
        return self._script[number]

    def _reply_to(
        self, script: Mapping[str, Reply | Sequence[Reply]], messages: list[Message], system: str | None
    ) -> Reply:
        asked = f"{system or ''}\n{messages[0].get('content') if messages else ''}"
        key = next((key for key in script if key in asked), None)
        if key is None:
            raise ScriptExhausted(
                f"ScriptedLLM {self.model!r} has no reply to {asked.strip()[:120]!r}; its script knows: "
                f'{list(script)}. Add the key "" for any other question.'
            )
        reply = script[key]
        if isinstance(reply, (str, LLMResponse, ToolUse, Exception)):
            return reply
        if all(isinstance(each, ToolUse) for each in reply):
            return cast(Sequence[ToolUse], reply)
        turn = sum(message["role"] == "assistant" for message in messages)
        if turn >= len(reply):
            raise ScriptExhausted(
                f"ScriptedLLM {self.model!r} was asked for turn {turn + 1} of {key!r}, but its script has {len(reply)}."
            )
        return cast(Reply, reply[turn])

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
