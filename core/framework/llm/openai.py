"""OpenAI's chat completions over the vendor's client; other endpoints that speak the protocol by ``base_url``."""

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

_OWN_ENDPOINT = "https://api.openai.com"


class OpenAIProvider(SDKProvider):
    """``model`` at OpenAI, or at the OpenAI-compatible endpoint ``base_url`` (else OPENAI_BASE_URL).

    ``api_key`` (else OPENAI_API_KEY) may be missing only with another endpoint than OpenAI's. ``timeout_seconds`` is
    the longest silence: a reply may take longer as long as it keeps coming (what only keeps the connection alive is
    silence too), unless there are ``total_timeout_seconds``. ``request_retries`` bounds how often one request inside a
    tool loop is made again. ``max_tokens`` is the longest reply that nodes ask for which do not say themselves. Further
    ``client_options`` go to the client: ``organization``, ``default_headers`` ...
    Raises ValueError without a key, ImportError without the client.
    """

    package: ClassVar[str] = "openai"
    vendor: ClassVar[str] = "OpenAI"
    refusable: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "response_format": ("response_format", "json_schema", "structured output"),
        "stream_options": ("stream_options",),
        "max_completion_tokens": ("max_completion_tokens",),
        "max_tokens": ("max_tokens",),
    }

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout_seconds: float = 60.0,
        connect_timeout_seconds: float = 10.0,
        max_tokens: int = MAX_TOKENS,
        total_timeout_seconds: float | None = None,
        request_retries: int = 2,
        **client_options: Any,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self._is_own = base_url is None or base_url.startswith(_OWN_ENDPOINT)
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if not key:
            if self._is_own:
                raise ValueError(
                    "OpenAIProvider needs a key: pass api_key, or set the environment variable OPENAI_API_KEY."
                )
            key = "none"  # the client wants one; servers of one's own often do not
        super().__init__(
            model,
            api_key=key,
            base_url=base_url,
            timeout_seconds=timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            max_tokens=max_tokens,
            total_timeout_seconds=total_timeout_seconds,
            request_retries=request_retries,
            client_options=client_options,
        )

    def _new_client(self, sdk: Any, *, is_async: bool, **options: Any) -> Any:
        return (sdk.AsyncOpenAI if is_async else sdk.OpenAI)(**options)

    def _open(self, client: Any, request: dict[str, Any]) -> Any:
        return client.chat.completions.create(**request)

    def _request(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None,
        model: str,
    ) -> dict[str, Any]:
        talk: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for message in messages:
            talk += translated(message)
        request: dict[str, Any] = {"model": model, "messages": talk, "stream": True}
        # The newer name is the only one that OpenAI's reasoning models take; other servers may know only the older.
        newer = self._refuses(model, "max_tokens") or (
            self._is_own and not self._refuses(model, "max_completion_tokens")
        )
        request["max_completion_tokens" if newer else "max_tokens"] = max_tokens
        if not self._refuses(model, "stream_options"):
            request["stream_options"] = {"include_usage": True}
        if tools:
            request["tools"] = [tool_to_openai_format(tool) for tool in tools]
        if json_schema is not None and not self._refuses(model, "response_format"):
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": dict(json_schema), "strict": is_strict(json_schema)},
            }
        return request

    def _forgo(self, option: str, model: str) -> bool:
        # One of the two names of the token limit has to stay: a reply without any limit is nobody's wish.
        names = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        return not (option in names and self._refuses(model, names[option])) and super()._forgo(option, model)

    def _collector(self, model: str, request: Mapping[str, Any]) -> Collector:
        return _Chunks(model)


def tool_to_openai_format(tool: Tool) -> dict[str, Any]:
    """The tool as OpenAI's protocol describes one."""
    parameters = {"type": "object", "properties": {}, **tool.parameters}
    if isinstance(parameters["properties"], dict):
        # A schema of any list needs no `items`, but this protocol asks for them.
        parameters["properties"] = {
            name: {"items": {}, **schema} if isinstance(schema, dict) and schema.get("type") == "array" else schema
            for name, schema in parameters["properties"].items()
        }
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


class _Call:
    """One tool call that is still arriving."""

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments = ""


class _Chunks:
    """A reply in pieces: text, tool calls by index, why it stopped, and last of all the tokens."""

    def __init__(self, model: str) -> None:
        self._asked_model = model
        self._model = model
        self._id: str | None = None
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._finish: str | None = None
        self._usage: Any = None

    def add(self, event: Any) -> bool:
        self._id = getattr(event, "id", None) or self._id
        self._model = getattr(event, "model", None) or self._model
        usage = getattr(event, "usage", None)
        self._usage = usage or self._usage
        brought = usage is not None
        for choice in (getattr(event, "choices", None) or ())[:1]:
            finish = getattr(choice, "finish_reason", None)
            self._finish = finish or self._finish
            delta: Any = getattr(choice, "delta", None)
            # Also what is not used, such as the thoughts that some servers send in fields of their own.
            fields = {**vars(delta), **(getattr(delta, "model_extra", None) or {})} if delta is not None else {}
            said = [value for name, value in fields.items() if name != "role"]
            brought = brought or finish is not None or any(said)
            if getattr(delta, "content", None):
                self._text.append(delta.content)
            if getattr(delta, "refusal", None):
                self._refusal.append(delta.refusal)
            for piece in getattr(delta, "tool_calls", None) or ():
                self._add_call(piece)
        return brought

    def add_body(self, body: Mapping[str, Any]) -> None:
        whole = json.loads(json.dumps(body), object_hook=lambda part: SimpleNamespace(**part))
        for choice in whole.choices:
            choice.delta = choice.message
            for index, call in enumerate(getattr(choice.message, "tool_calls", None) or ()):
                call.index = index
        self.add(whole)

    def _add_call(self, piece: Any) -> None:
        given = getattr(piece, "index", None)
        index = given if isinstance(given, int) else max(self._calls, default=0)
        call = self._calls.get(index)
        if call is not None and piece.id and call.id and piece.id != call.id:
            # Some servers number every call 0, each with an id of its own.
            index = max(self._calls) + 1
            call = None
        if call is None:
            call = self._calls.setdefault(index, _Call())
        call.id = piece.id or call.id
        if piece.function is not None:
            call.name += piece.function.name or ""
            call.arguments += piece.function.arguments or ""

    def turn(self) -> Turn:
        if self._finish is None:
            raise LLMUnavailable(
                f"OpenAI ({self._asked_model}) broke off: the reply ended without a finish reason, after "
                f"{sum(map(len, self._text))} characters. It is not used."
            )
        text = "".join(self._text)
        calls = [(call.id, call.name, call.arguments) for call in self._calls.values()]
        uses, refused, asked = read_calls(calls, text)
        stop = self._finish
        if self._refusal and not text:
            text, stop = "".join(self._refusal), "refusal"
        return Turn(self._response(text, stop, uses), tuple(uses), refused, asked)

    def _response(self, text: str, stop: str, uses: list[ToolUse]) -> LLMResponse:
        tokens_in = tokens_out = 0
        cost = None
        if self._usage is not None:
            tokens_in, tokens_out = count_of(self._usage, "prompt_tokens"), count_of(self._usage, "completion_tokens")
            cached = count_of(getattr(self._usage, "prompt_tokens_details", None), "cached_tokens")
            cost = cost_of_call(self._model, tokens_in, tokens_out, cached)
        return LLMResponse(
            content=text,
            model=self._model,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            stop_reason=stop,
            raw_response=list(uses) if uses else {"id": self._id, "finish_reason": self._finish},
            cost=cost,
        )


def count_of(usage: Any, name: str) -> int:
    """A number of tokens that a reply tells; 0 when it does not tell it, or as something else than a number."""
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else 0


def read_calls(
    calls: Sequence[tuple[str | None, str, str]], text: str
) -> tuple[list[ToolUse], dict[str, ToolResult], Message]:
    """The tool calls of a reply from (id, name, arguments as JSON): as data, those that cannot be run, and the reply as
    the next request repeats it."""
    uses: list[ToolUse] = []
    refused: dict[str, ToolResult] = {}
    for number, (call_id, name, given) in enumerate(calls):
        use_id = call_id or f"call_{number}"
        arguments, problem = parse_arguments(name, given)
        uses.append(ToolUse(use_id, name, arguments))
        if problem is not None:
            refused[use_id] = ToolResult(use_id, problem, is_error=True)
    said: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    said += [{"type": "tool_use", "id": use.id, "name": use.name, "input": use.input} for use in uses]
    return uses, refused, {"role": "assistant", "content": said}


def translated(message: Message) -> list[dict[str, Any]]:
    """A message with content blocks as OpenAI's protocol says it; tool results are messages of their own there."""
    role, content = message["role"], message["content"]
    if isinstance(content, str) or content is None:
        return [dict(message)]
    calls, results, rest = [], [], []
    for block in content:
        kind = block.get("type")
        if kind == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result":
            text = str(block["content"])
            if block.get("is_error") and not text.lower().startswith("error"):
                text = f"Error: {text}"  # this protocol has no other way to say so
            results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        else:
            rest.append(dict(block))
    told: list[dict[str, Any]] = [*results]
    texts = [block["text"] for block in rest if block.get("type") == "text"]
    body: Any = "\n".join(texts) if len(texts) == len(rest) else rest
    if calls:
        told.append({"role": role, "content": body or None, "tool_calls": calls})
    elif rest:
        told.append({"role": role, "content": body})
    return told
