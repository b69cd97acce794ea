"""What the providers over a vendor's client share: clients per event loop, streamed requests, refused options, errors.

Each request is streamed and put together here, so a reply that stalls ends by the read timeout, and one that breaks off
is an error: a reply counts only when the provider said why it stopped. The clients' own retries are off: retries belong
to the node, where they are counted, recorded and survive a restart.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from framework._secrets import register_header, register_named, register_secret
from framework.errors import LLMRefused, LLMUnavailable
from framework.llm.failures import reported, translate
from framework.llm.prices import price_of
from framework.llm.provider import (
    AsyncToolExecutor,
    LLMProvider,
    LLMResponse,
    Message,
    Tool,
    ToolExecutor,
)
from framework.llm.refusals import refused_option
from framework.llm.silence import Silence
from framework.llm.tool_loop import Conversation, Patience, Turn, talk, talk_async

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Longest reply that this library asks a provider for when nobody says how long."""


class Collector(Protocol):
    """Puts a streamed reply together."""

    def add(self, event: Any) -> bool:
        """Take the next event of the stream; whether it brought something of the reply."""

    def add_body(self, body: Mapping[str, Any]) -> None:
        """Take the whole reply, from a server that does not stream."""

    def turn(self) -> Turn:
        """The whole reply. Raises LLMUnavailable when it broke off."""


class SDKProvider(LLMProvider):
    """A provider over a vendor's client. Thread-safe; async calls may come from any number of event loops.

    An async client belongs to its event loop and is closed when that loop ends its work (as ``asyncio.run`` does), or
    by `aclose`; the synchronous one by `close`. Both are made on first use, again after they were closed.
    """

    supports_json_schema: ClassVar[bool] = True
    supports_model: ClassVar[bool] = True
    package: ClassVar[str]
    vendor: ClassVar[str]
    refusable: ClassVar[Mapping[str, tuple[str, ...]]]
    """The options of a request that can be left out when the endpoint does not know them, and what they are called."""

    def __init__(
        self,
        model: str,
        *,
        api_key: str,
        base_url: str | None,
        timeout_seconds: float,
        connect_timeout_seconds: float,
        max_tokens: int,
        total_timeout_seconds: float | None,
        request_retries: int,
        client_options: Mapping[str, Any],
    ) -> None:
        if find_spec(self.package) is None:
            raise ImportError(
                f"{type(self).__name__} needs the package {self.package!r}. "
                f'Install it with: pip install "surefoot[{self.package}]"'
            )
        price_of(model)  # a file of prices that cannot be used is said now, not after the first paid call
        register_secret(api_key)
        register_named("base_url", base_url)
        for name, value in (client_options.get("default_headers") or {}).items():
            register_header(str(name), value if isinstance(value, str) else None)
        self.model = model
        self.base_url = base_url
        self.timeout_seconds = timeout_seconds
        self.connect_timeout_seconds = connect_timeout_seconds
        self.max_tokens = max_tokens
        self.total_timeout_seconds = total_timeout_seconds
        self.patience = Patience(request_retries)
        self._api_key = api_key
        self._options = dict(client_options)
        self._refused: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()
        self._client: Any = None
        self._async_clients: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]] = {}

    def __repr__(self) -> str:
        host = urlsplit(self.base_url).hostname if self.base_url else None
        return f"{type(self).__name__}(model={self.model!r}{f', host={host!r}' if host else ''})"

    # --- asking -------------------------------------------------------------------------------------------------

    def complete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int | None = 1024,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """Ask once. Tool calls give a response that has the calls, a list of `ToolUse`, as ``raw_response``.

        ``max_tokens`` None means the provider's own, which is what graphs and plans ask for that do not say how many.
        A ``json_schema`` the endpoint cannot take is left out.
        Raises `LLMError`: LLMRateLimited, LLMTimeout, LLMUnavailable, LLMRefused.
        """
        return self._turn(list(messages), system, tools or (), max_tokens, json_schema, model).response

    def complete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: ToolExecutor,
        max_iterations: int = 10,
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """Ask until the model calls no tool. Calls of one reply are run one after the other, in its order.

        A call of a tool that was not offered, or with arguments that are no JSON object, is not run: the model is told
        so. A request that fails in a way that passes after tools were called is made again, see `Patience`.
        ``max_tokens`` None means the provider's own. Raises `LLMError`, and what ``tool_executor`` raises.
        """
        conversation = Conversation(messages, model or self.model, max_iterations, tools)
        return talk(
            conversation,
            lambda talked: self._turn(talked, system, tools, max_tokens, json_schema, model),
            tool_executor,
            self.patience,
        )

    async def acomplete(
        self,
        messages: Sequence[Message],
        system: str | None = "",
        tools: Sequence[Tool] | None = None,
        max_tokens: int | None = 1024,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """`complete` without blocking the event loop. Cancelling it closes the connection."""
        turn = await self._turn_async(list(messages), system, tools or (), max_tokens, json_schema, model)
        return turn.response

    async def acomplete_with_tools(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        tool_executor: AsyncToolExecutor,
        max_iterations: int = 10,
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> LLMResponse:
        """`complete_with_tools` without blocking the event loop; ``tool_executor`` may be async."""
        return await talk_async(
            Conversation(messages, model or self.model, max_iterations, tools),
            lambda talked: self._turn_async(talked, system, tools, max_tokens, json_schema, model),
            tool_executor,
            self.patience,
        )

    def turn(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> Turn:
        """One reply of `complete_with_tools`, with the tool calls it makes. Raises `LLMError`."""
        return self._turn(list(messages), system, tools, max_tokens, json_schema, model)

    async def aturn(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> Turn:
        """`turn` without blocking the event loop."""
        return await self._turn_async(list(messages), system, tools, max_tokens, json_schema, model)

    def _turn(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None,
        json_schema: Mapping[str, Any] | None,
        model: str | None,
    ) -> Turn:
        name = model or self.model
        left_out = set[str]()
        while True:
            request = self._request(messages, system, tools, max_tokens or self.max_tokens, json_schema, name)
            collector, silence = self._collector(name, request), self._silence(name)
            try:
                with self._open(self._sync_client(), request) as stream:
                    silence.listen_to(stream.response)
                    if _is_json(stream.response):
                        self._add_body(collector, stream.response.read(), name)
                    else:
                        for event in stream:
                            if collector.add(event):
                                silence.heard()
                return collector.turn()
            except Exception as error:
                self._give_way(error, request, name, left_out)

    async def _turn_async(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int | None,
        json_schema: Mapping[str, Any] | None,
        model: str | None,
    ) -> Turn:
        name = model or self.model
        left_out = set[str]()
        while True:
            request = self._request(messages, system, tools, max_tokens or self.max_tokens, json_schema, name)
            client = await self._async_client()
            collector, silence = self._collector(name, request), self._silence(name)
            try:
                async with await self._open(client, request) as stream:
                    silence.listen_to(stream.response)
                    if _is_json(stream.response):
                        self._add_body(collector, await stream.response.aread(), name)
                    else:
                        async for event in stream:
                            if collector.add(event):
                                silence.heard()
                return collector.turn()
            except Exception as error:
                self._give_way(error, request, name, left_out)

    def _silence(self, model: str) -> Silence:
        return Silence(f"{self.vendor} ({model})", self.timeout_seconds, self.total_timeout_seconds)

    def _add_body(self, collector: Collector, data: bytes, model: str) -> None:
        """Take the whole reply of a server that was asked to stream and does not."""
        body = json.loads(data)
        if isinstance(body, dict) and body.get("error"):
            raise reported(body["error"], f"{self.vendor} ({model})")
        try:
            collector.add_body(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LLMUnavailable(
                f"{self.vendor} ({model}) sent a reply that cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _give_way(self, error: Exception, request: Mapping[str, Any], model: str, left_out: set[str]) -> None:
        """Return when asking again without an option that was refused may help; raise what the error means otherwise.

        What a model refused is remembered, so that it is refused once only. Whether asking again can help is told by
        what *this* request held (``left_out`` is what earlier ones of it lost): another one, made at the same time,
        may have been refused the same before.
        """
        translated = translate(error, f"{self.vendor} ({model})")
        if translated is None:
            raise error
        if isinstance(translated, LLMRefused) and translated.status in (400, 422):
            option = refused_option(str(translated), getattr(error, "body", None), request, self.refusable)
            if option is not None and option not in left_out and self._forgo(option, model):
                left_out.add(option)
                return
        if translated is error:
            raise error
        raise translated from error

    def _forgo(self, option: str, model: str) -> bool:
        """Leave ``option`` out of requests from now on; False when it cannot be."""
        with self._lock:
            refused = self._refused.get(model, frozenset())
            self._refused[model] = refused | {option}
        if option not in refused:
            logger.warning(
                "%s (%s) does not take the option %r; it is left out from now on.", self.vendor, model, option
            )
        return True

    def _refuses(self, model: str, option: str) -> bool:
        """Whether this endpoint refused ``option`` for this model before."""
        return option in self._refused.get(model, ())

    # --- what a vendor's module says ----------------------------------------------------------------------------

    @abstractmethod
    def _request(
        self,
        messages: list[Message],
        system: str | None,
        tools: Sequence[Tool],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None,
        model: str,
    ) -> dict[str, Any]:
        """The keyword arguments of the client's call."""

    @abstractmethod
    def _open(self, client: Any, request: dict[str, Any]) -> Any:
        """Begin the call: the stream, or for an async client an awaitable that gives it."""

    @abstractmethod
    def _collector(self, model: str, request: Mapping[str, Any]) -> Collector:
        """What puts the reply to ``request`` together."""

    @abstractmethod
    def _new_client(self, sdk: Any, *, is_async: bool, **options: Any) -> Any:
        """A client of the vendor's package ``sdk``."""

    # --- clients ------------------------------------------------------------------------------------------------

    def _make(self, *, is_async: bool) -> Any:
        sdk = import_module(self.package)  # slow the first time: up to a second
        timeout = sdk.Timeout(self.timeout_seconds, connect=min(self.connect_timeout_seconds, self.timeout_seconds))
        options = {"max_retries": 0, "timeout": timeout, "api_key": self._api_key, **self._options}
        if self.base_url is not None:
            options["base_url"] = self.base_url
        return self._new_client(sdk, is_async=is_async, **options)

    def _sync_client(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._make(is_async=False)
            return self._client

    async def _async_client(self) -> Any:
        """This event loop's client; made in a thread, as importing and TLS settings take their time."""
        loop = asyncio.get_running_loop()
        if loop in self._async_clients:
            return self._async_clients[loop][0]
        client = await asyncio.to_thread(lambda: self._make(is_async=True))
        if loop in self._async_clients:  # another call of this loop was faster
            await client.close()
            return self._async_clients[loop][0]
        keeper = self._keep(loop, client)
        await anext(keeper)
        for each in [each for each in self._async_clients if each.is_closed()]:
            self._async_clients.pop(each, None)
        self._async_clients[loop] = client, keeper
        return client

    async def _keep(self, loop: asyncio.AbstractEventLoop, client: Any) -> AsyncGenerator[None, None]:
        """Closes the client when the loop shuts down its asynchronous generators, as asyncio.run does at its end."""
        try:
            yield
        finally:
            self._async_clients.pop(loop, None)
            await client.close()

    def close(self) -> None:
        """Close the synchronous client's connections. To be called when no other thread is asking."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, and the synchronous client's."""
        kept = self._async_clients.get(asyncio.get_running_loop())
        if kept is not None:
            await kept[1].aclose()
        await asyncio.to_thread(self.close)


def _is_json(response: Any) -> bool:
    return str(response.headers.get("content-type", "")).lower().startswith("application/json")
