"""Anthropic's messages over the vendor's own client."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from framework.errors import LLMUnavailable
from framework.llm.json_schemas import is_strict
from framework.llm.prices import cost_of_call
from framework.llm.provider import LLMResponse, Message, Tool, ToolResult, ToolUse
from framework.llm.sdk import MAX_TOKENS, Collector, SDKProvider
from framework.llm.tool_loop import Turn, parse_arguments

_REPLY_TOOL = "reply"


class AnthropicProvider(SDKProvider):
    """``model`` at Anthropic, or at the endpoint ``base_url`` (else ANTHROPIC_BASE_URL) that speaks its protocol.

    ``api_key`` or ANTHROPIC_API_KEY is needed. ``timeout_seconds`` is the longest silence: a reply may take longer as
    long as it keeps coming (what only keeps the connection alive is silence too), unless there are
    ``total_timeout_seconds``. ``request_retries`` bounds how often one request inside a tool loop is made again.
    ``max_tokens`` is the longest reply that nodes ask for which do not say themselves. Further ``client_options`` go to
    the client: ``default_headers`` ...
    Raises ValueError without a key, ImportError without the client.
    """

    package: ClassVar[str] = "anthropic"
    vendor: ClassVar[str] = "Anthropic"
    refusable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "output_config": ("output_config", "output_format", "output format", "json_schema", "structured output"),
        "tool_choice": ("tool_choice",),
    }

    def __init__(
        self,
        api_key: str | None = None,
        model: str = "claude-haiku-4-5-20251001",
        *,
        base_url: str | None = None,
        timeout_seconds: float = 60.0,
        connect_timeout_seconds: float = 10.0,
        max_tokens: int = MAX_TOKENS,
        total_timeout_seconds: float | None = None,
        request_retries: int = 2,
        **client_options: Any,
    ) -> None:
        key = api_key or os.environ.get("ANTHROPIC_API_KEY")
        if not key:
            raise ValueError(
                "Anthropic API key required: pass api_key, or set the environment variable ANTHROPIC_API_KEY."
            )
        super().__init__(
            model,
            api_key=key,
            base_url=base_url or os.environ.get("ANTHROPIC_BASE_URL") or None,
            timeout_seconds=timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            max_tokens=max_tokens,
            total_timeout_seconds=total_timeout_seconds,
            request_retries=request_retries,
            client_options=client_options,
        )

    def _new_client(self, sdk: Any, *, is_async: bool, **options: Any) -> Any:
        return (sdk.AsyncAnthropic if is_async else sdk.Anthropic)(**options)

    def _open(self, client: Any, request: dict[str, Any]) -> Any:
        return client.messages.create(**request)

    def _request(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None,
        model: str,
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "stream": True,
        }
        if system:
            request["system"] = system
        if tools:
            request["tools"] = [_tool(tool) for tool in tools]
        if json_schema is not None:
            request |= self._structured(json_schema, model, has_tools=bool(tools))
        return request

    def _structured(self, schema: Mapping[str, Any], model: str, *, has_tools: bool) -> dict[str, Any]:
        """How a JSON reply is asked for: as structured output when the schema can be enforced, else as the arguments
        of a tool that must be called, which takes any schema but leaves no room for other tools."""
        if is_strict(schema) and not self._refuses(model, "output_config"):
            return {"output_config": {"format": {"type": "json_schema", "schema": dict(schema)}}}
        if has_tools or self._refuses(model, "tool_choice"):
            return {}
        reply = {"name": _REPLY_TOOL, "description": "Gives the reply.", "input_schema": dict(schema)}
        return {"tools": [reply], "tool_choice": {"type": "tool", "name": _REPLY_TOOL}}

    def _collector(self, model: str, request: Mapping[str, Any]) -> Collector:
        return _Events(model, reply_tool=_REPLY_TOOL if "tool_choice" in request else None)


def _tool(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}, **tool.parameters}
    return {"name": tool.name, "description": tool.description, "input_schema": schema}


class _Events:
    """A reply in events: a message begins, its blocks come piece by piece, it says why it stopped, and it ends."""

    def __init__(self, model: str, reply_tool: str | None) -> None:
        self._asked_model = model
        self._model = model
        self._reply_tool = reply_tool
        self._id: str | None = None
        self._blocks: dict[int, dict[str, Any]] = {}
        self._stop: str | None = None
        self._ended = False
        self._usage: dict[str, int] = {}

    def add(self, event: Any) -> bool:
        match event.type:
            case "message_start":
                self._id, self._model = event.message.id, event.message.model or self._model
                self._count(event.message.usage)
            case "content_block_start":
                self._blocks[event.index] = {**event.content_block.model_dump(exclude_none=True), "json": ""}
            case "content_block_delta":
                self._add_piece(self._blocks[event.index], event.delta)
            case "message_delta":
                self._stop = event.delta.stop_reason or self._stop
                self._count(event.usage)
            case "message_stop":
                self._ended = True
            case _:
                return False
        return True

    def add_body(self, body: Mapping[str, Any]) -> None:
        self._id, self._model = body.get("id"), body.get("model") or self._model
        self._blocks = {index: {**block, "json": ""} for index, block in enumerate(body["content"])}
        self._stop = body.get("stop_reason")
        self._ended = True
        self._count(SimpleNamespace(**body.get("usage") or {}))

    def _add_piece(self, block: dict[str, Any], delta: Any) -> None:
        match delta.type:
            case "text_delta":
                block["text"] = block.get("text", "") + delta.text
            case "input_json_delta":
                block["json"] += delta.partial_json
            case "thinking_delta":
                block["thinking"] = block.get("thinking", "") + delta.thinking
            case "signature_delta":
                block["signature"] = delta.signature

    def _count(self, usage: Any) -> None:
        """Counts are of the whole reply so far: a later one replaces an earlier one."""
        for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            value = getattr(usage, name, None)
            if isinstance(value, int):
                self._usage[name] = value

    def turn(self) -> Turn:
        if self._stop is None or not self._ended:
            raise LLMUnavailable(
                f"Anthropic ({self._asked_model}) broke off: the reply ended without a stop reason, after "
                f"{sum(len(block.get('text', '')) for block in self._blocks.values())} characters. It is not used."
            )
        uses: list[ToolUse] = []
        refused: dict[str, ToolResult] = {}
        said: list[dict[str, Any]] = []
        for _, block in sorted(self._blocks.items()):
            text = block.pop("json")
            if block["type"] == "tool_use":
                block["input"], problem = _input(block, text)
                uses.append(ToolUse(block["id"], block["name"], block["input"]))
                if problem is not None:
                    refused[block["id"]] = ToolResult(block["id"], problem, is_error=True)
            if block["type"] != "text" or block.get("text"):  # an empty text is refused when it is sent back
                said.append(block)
        content = "".join(block.get("text", "") for block in said if block["type"] == "text")
        if self._reply_tool is not None and uses and uses[0].name == self._reply_tool and uses[0].id not in refused:
            return Turn(self._response(json.dumps(uses[0].input, ensure_ascii=False), "end_turn", []))
        asked = {"role": "assistant", "content": said}
        return Turn(self._response(content, self._stop, uses), tuple(uses), refused, asked)

    def _response(self, content: str, stop: str, uses: list[ToolUse]) -> LLMResponse:
        read, written = (self._usage.get(f"cache_{kind}_input_tokens", 0) for kind in ("read", "creation"))
        tokens_in = self._usage.get("input_tokens", 0) + read + written  # this vendor counts them apart
        tokens_out = self._usage.get("output_tokens", 0)
        return LLMResponse(
            content=content,
            model=self._model,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            stop_reason=stop,
            raw_response=list(uses) if uses else {"id": self._id, "stop_reason": self._stop},
            cost=cost_of_call(self._model, tokens_in, tokens_out, read, written),
        )


def _input(block: Mapping[str, Any], text: str) -> tuple[dict[str, Any], str | None]:
    """A call's arguments, and what the model is told when they are no JSON object."""
    given = block.get("input")
    if not text and isinstance(given, dict):
        return given, None
    return parse_arguments(block["name"], text)
