"""A model that needs no network and no key: it fills in what is asked for, the same in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolExecutor

_WORDS = 12


class MockLLM(LLMProvider):
    """Answers any request at once, depending on nothing but the request; used by mock runs.

    Asked with a ``json_schema`` it answers a JSON object that follows it; otherwise a line of text that quotes the
    beginning of the question. It never calls a tool. Nothing is charged: ``cost`` is 0.
    """

    supports_json_schema: ClassVar[bool] = True
    supports_model: ClassVar[bool] = True

    def __init__(self, model: str = "mock") -> None:
        self.model = model

    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int = 1024,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """The reply to the last message. ``tools``, ``max_tokens`` and ``model`` change nothing. Never raises."""
        return self._reply(messages, system, json_schema)

    def complete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: ToolExecutor,
        max_iterations: int = 10,
        max_tokens: int = 1024,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """As `complete`: no tool is called."""
        return self._reply(messages, system, json_schema)

    async def acomplete(self, *args: Any, **keywords: Any) -> LLMResponse:
        """`complete`, which never blocks."""
        return self.complete(*args, **keywords)

    async def acomplete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        """`complete_with_tools`, which never blocks."""
        return self.complete_with_tools(*args, **keywords)

    def _reply(self, messages: Sequence[Message], system: str | None, schema: Mapping[str, Any] | None) -> LLMResponse:
        question = _text(messages[-1].get("content", "")) if messages else ""
        if schema is None:
            content = f"Mock reply to: {_beginning(question)}"
        else:
            content = json.dumps(_example(schema, schema, "reply", _beginning(question)), ensure_ascii=False)
        asked = [_text(message.get("content", "")) for message in messages]
        return LLMResponse(
            content=content,
            model=self.model,
            input_tokens=sum(len(text.split()) for text in (system or "", *asked)),
            output_tokens=len(content.split()),
            stop_reason="end_turn",
            cost=0.0,
        )


def _text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def _beginning(text: str) -> str:
    words = text.split()
    return " ".join(words[:_WORDS]) + (" …" if len(words) > _WORDS else "")


def _example(schema: Any, root: Mapping[str, Any], name: str, question: str, depth: int = 0) -> Any:
    """A value that follows ``schema``, as far as types, enums and required keys go."""
    if not isinstance(schema, Mapping) or depth > 16:
        return f"Mock {name}: {question}" if depth <= 16 else None
    if "$ref" in schema:
        return _example(_referred(schema["$ref"], root), root, name, question, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return _example(schema[choice][0], root, name, question, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    match kind:
        case "object":
            properties = schema.get("properties", {})
            return {key: _example(part, root, key, question, depth + 1) for key, part in properties.items()}
        case "array":
            count = max(1, int(schema.get("minItems", 1)))
            return [_example(schema.get("items", {}), root, name, question, depth + 1)] * count
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return f"Mock {name}: {question}"


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a ``#/$defs/...`` reference points at; any value will do when it points nowhere."""
    found: Any = root
    for part in str(reference).removeprefix("#/").split("/"):
        found = found.get(part, {}) if isinstance(found, Mapping) else {}
    return found
