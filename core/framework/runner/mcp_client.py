"""Connections to MCP servers, through the official ``mcp`` package; all of them live in one background thread.

A connection is opened and closed by a task of its own, its keeper, because the package's context managers must be left
by the task that entered them. Calls come from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote

from framework._secrets import mask
from framework.errors import ToolError, ToolOutcomeUnknown
from framework.graph.calls import KEY
from framework.graph.journal import tool_key
from framework.llm.provider import Tool, ToolResult
from framework.runner.loop_thread import LoopThread
from framework.runner.mcp_config import ServerConfig
from framework.runner.tool_schema import to_json

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0
"""How long ``close`` waits for servers to end. The package itself asks, terminates and kills within some 6 seconds."""

KEY_IN_META = "idempotency_key"
"""Under this name the ``_meta`` of a call has its idempotency key."""

_IN_A_HEADER = "".join(map(chr, range(0x21, 0x7F)))  # others, which a run's id may have, are percent-encoded
_MAX_PAGES = 100
_TOOL_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_MAX_NAME = 64  # what the models' providers take


@dataclass(frozen=True)
class RemoteTool:
    """A tool of an MCP server; ``call(arguments)`` may be awaited in any event loop."""

    tool: Tool
    call: Callable[[dict[str, Any]], Awaitable[Any]]


class McpServers:
    """The MCP servers of a tool registry."""

    def __init__(self) -> None:
        self._loop = LoopThread("surefoot mcp")
        self._servers: list[_Server] = []
        self._closed = False

    def connect(self, config: ServerConfig) -> list[RemoteTool]:
        """Start or reach a server and return its tools, blocking until it has answered.

        Raises `ToolError` when that fails; then nothing of it is left running.
        """
        # Here and not in the loop, whose other servers would wait for half a second of importing.
        _import_mcp()
        server = _Server(config)
        listed = self._loop.submit(server.open()).result()
        self._servers.append(server)
        _warn_of_unknown(config, [name for name, _ in listed])
        return [self._remote(server, name, tool) for name, tool in listed]

    def _remote(self, server: _Server, name: str, tool: Tool) -> RemoteTool:
        async def call(arguments: dict[str, Any]) -> Any:
            if self._closed:
                raise _closed_error(server.config)
            key = str(arguments[KEY]) if KEY in arguments else tool_key(name, arguments)
            return await self._loop.wait(server.call(name, arguments, key))

        policy = server.config.policies.get(name)
        return RemoteTool(tool if policy is None else replace(tool, policy=policy), call)

    def close(self) -> None:
        """End the servers' processes and the connections. May be called again; later calls of tools give an error."""
        self._closed = True
        servers, self._servers = self._servers, []
        if servers:
            self._loop.submit(_close_all(servers)).result()
        self._loop.close()


def _import_mcp() -> None:
    try:
        import mcp  # noqa: F401 - the rest of this module imports from it
    except ImportError as error:
        raise ToolError("the package `mcp` is not installed. Install it with: pip install 'surefoot[mcp]'") from error


def _warn_of_unknown(config: ServerConfig, names: list[str]) -> None:
    """Tell of policies for tools that the server does not have: whoever wrote them relies on them."""
    for name in sorted(set(config.policies) - set(names)):
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"its tools are {', '.join(sorted(names)) or 'none'}."
        logger.warning(
            "MCP server %r: policies names a tool %r that it does not have, so %r counts for none; %s",
            config.name,
            name,
            config.policies[name],
            hint,
        )


def _closed_error(config: ServerConfig) -> ToolError:
    return ToolError(f"MCP server {config.name!r} was closed together with its tool registry.")


async def _close_all(servers: list[_Server]) -> None:
    await asyncio.gather(*(each.close() for each in servers))


class _Server:
    """One server and its present connection. Everything here runs in the background thread's loop."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._opening = asyncio.Lock()
        self._connection: _Connection | None = None
        self._calls: set[asyncio.Task[Any] | None] = set()
        self._closed = False

    async def open(self) -> list[tuple[str, Tool]]:
        connection = await self._connected()
        return connection.tools

    async def _connected(self) -> _Connection:
        """The connection, opened anew, with one attempt, when the last one has ended."""
        async with self._opening:
            if self._closed:
                raise _closed_error(self.config)
            if self._connection is not None and self._connection.is_open:
                return self._connection
            if self._connection is not None:
                logger.warning("MCP server %r had ended; it is started again", self.config.name)
                await self._connection.close()
                self._connection = None
            self._connection = await _Connection.open(self.config)
            return self._connection

    async def call(self, name: str, arguments: dict[str, Any], key: str | None = None) -> Any:
        """What the tool answered, as `_value` says; ``key`` is the call's idempotency key, which the server is told.

        Raises `ToolError` naming the server and the tool.
        """
        task = asyncio.current_task()
        self._calls.add(task)
        try:
            return await self._call(name, arguments, key)
        finally:
            self._calls.discard(task)

    async def _call(self, name: str, arguments: dict[str, Any], key: str | None) -> Any:
        from mcp import MCPError

        try:
            connection = await self._connected()
        except ToolError as error:
            raise self._failed(name, f"the server cannot be reached: {str(error).rstrip('.')}") from error
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit) as timer:
                meta: Any = {KEY_IN_META: key} if key is not None else None
                return _value(await connection.client.call_tool(name, arguments, meta=meta))
        except TimeoutError as error:
            said = f"gave no answer within {limit:g} s and was told to stop" if timer.expired() else f"failed: {error}"
            raise self._unknown(name, f"{said}. What it did until then is unknown") from None
        except MCPError as error:
            if await connection.is_lost(error):
                raise self._unknown(
                    name,
                    f"the server ended or cannot be reached ({error.message}). What the call did is unknown; the next "
                    "call starts or reaches the server again",
                ) from None
            raise self._failed(name, f"refused: {error.message}") from None
        except (RuntimeError, ValueError) as error:  # an answer that breaks the protocol or the tool's own schema
            raise self._failed(name, f"its answer cannot be used: {error}") from error

    def _failed(self, tool: str, problem: str) -> ToolError:
        return ToolError(self._said(tool, problem))

    def _unknown(self, tool: str, problem: str) -> ToolOutcomeUnknown:
        return ToolOutcomeUnknown(self._said(tool, problem))

    def _said(self, tool: str, problem: str) -> str:
        return mask(f"Tool {tool!r} of MCP server {self.config.name!r}: {problem}.")

    async def close(self) -> None:
        async with self._opening:
            self._closed = True
            if self._connection is not None:
                await self._connection.close()
                self._connection = None
        # Each is told that the connection has ended; stopping the loop before that would look like a cancellation.
        if calls := {task for task in self._calls if task is not None}:
            await asyncio.wait(calls, timeout=CLOSE_SECONDS)


class _Connection:
    """One session with a server, from its opening by `open` until it ends by itself or by `close`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.tools: list[tuple[str, Tool]] = []
        self._client: Client | None = None
        self._ending = asyncio.Event()
        self._stderr = _Stderr(config.name)
        self._keeper: asyncio.Task[None] | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None
        return self._client

    @property
    def is_open(self) -> bool:
        return self._keeper is not None and not self._keeper.done() and not self._ending.is_set()

    @classmethod
    async def open(cls, config: ServerConfig) -> _Connection:
        """Connect and list the tools. Raises `ToolError`, with what the server wrote on its stderr."""
        connection = cls(config)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection._keeper = asyncio.create_task(connection._keep(ready), name=f"mcp server {config.name}")
        try:
            await ready
        except asyncio.CancelledError:
            await connection.close()
            raise
        except Exception as error:  # the package, the system or the server: whatever it is, the server is not there
            await connection.close()
            raise ToolError(mask(f"{_reason(config, error)}.{connection._stderr.last_words()}")) from error
        return connection

    async def is_lost(self, error: Any) -> bool:
        """Whether an error means that the connection is of no use any more; it is then ended."""
        from mcp.types import CONNECTION_CLOSED

        # A session the server has forgotten is answered with HTTP 404, which the package tells in words only.
        forgotten = "session" in error.message.lower()
        transports_own = self.config.transport != "stdio" and _is_transport_error(error)
        if self.is_open and error.code != CONNECTION_CLOSED and not forgotten and not transports_own:
            return False
        await self.close()
        return True

    async def close(self) -> None:
        """End the session and, for a stdio server, its process."""
        self._ending.set()
        keeper = self._keeper
        if keeper is None or keeper.done():
            return
        await asyncio.wait([keeper], timeout=CLOSE_SECONDS)
        if not keeper.done():
            logger.warning("MCP server %r did not end within %g s and is given up", self.config.name, CLOSE_SECONDS)
            keeper.cancel()
            await asyncio.wait([keeper], timeout=CLOSE_SECONDS)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Enter the connection, wait until it shall end, and leave it."""
        try:
            async with AsyncExitStack() as stack:
                # Not anyio's: its scopes would have to be left in the order they were entered in.
                async with asyncio.timeout(self.config.connect_timeout_seconds):
                    await self._enter(stack)
                if not ready.done():
                    ready.set_result(None)
                await self._ending.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)
            else:
                logger.info("MCP server %r: the connection ended: %s", self.config.name, mask(str(_leaf(error))))
        finally:
            self._ending.set()
            if not ready.done():
                ready.cancel()

    async def _enter(self, stack: AsyncExitStack) -> None:
        try:
            from mcp import Client
        except ImportError as error:
            raise ToolError(
                "the package `mcp` is not installed. Install it with: pip install 'surefoot[mcp]'"
            ) from error
        transport = self._watched(self._transport(stack))
        self._client = await stack.enter_async_context(Client(transport, cache=None))
        self._stderr.parent_done()
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor)
            self.tools += [(each.name, _tool(each)) for each in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                return
        raise ToolError(f"its list of tools has more than {_MAX_PAGES} pages")

    def _transport(self, stack: AsyncExitStack) -> Any:
        config = self.config
        if config.transport == "stdio":
            from mcp import StdioServerParameters, stdio_client

            parameters = StdioServerParameters(
                command=config.command, args=list(config.args), env=dict(config.env), cwd=config.cwd
            )
            stack.callback(self._stderr.close)
            return stdio_client(parameters, errlog=self._stderr.open())
        if config.transport == "sse":
            from mcp.client.sse import sse_client
            from mcp.shared._httpx_utils import create_mcp_http_client

            def client(headers: Any = None, timeout: Any = None, auth: Any = None) -> Any:
                return _keyed(create_mcp_http_client(headers, timeout, auth))

            return sse_client(
                config.url,
                headers=dict(config.headers),
                sse_read_timeout=max(300.0, config.timeout_seconds),
                httpx_client_factory=client,
            )
        return _http(config)

    @asynccontextmanager
    async def _watched(self, transport: Any) -> AsyncIterator[tuple[Any, Any]]:
        """``transport`` whose end, seen as the end of what it reads, ends this connection too."""
        import anyio

        async with transport as (read, write):
            send, receive = anyio.create_memory_object_stream[Any](0)

            async def relay() -> None:
                try:
                    async with send:
                        async for message in read:
                            await send.send(message)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    pass  # this side is being closed
                finally:
                    self._ending.set()

            async with anyio.create_task_group() as tasks, receive:
                tasks.start_soon(relay)
                try:
                    yield receive, write
                finally:
                    tasks.cancel_scope.cancel()


def _keyed(client: Any) -> Any:
    """The HTTP client ``client``, which sends the idempotency key in a message's ``_meta`` as a header too."""

    async def add_header(request: Any) -> None:
        # The package sends the headers of its client with every request; whose message this is only its body tells.
        if request.method != "POST" or KEY_IN_META.encode() not in request.content:
            return
        message = json.loads(request.content)
        params = message.get("params") if isinstance(message, dict) else None
        key = (params.get("_meta") or {}).get(KEY_IN_META) if isinstance(params, dict) else None
        if isinstance(key, str):
            request.headers["Idempotency-Key"] = quote(key, safe=_IN_A_HEADER)

    client.event_hooks["request"].append(add_header)
    return client


@asynccontextmanager
async def _http(config: ServerConfig) -> AsyncIterator[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    timeout = httpx2.Timeout(30.0, read=max(300.0, config.timeout_seconds))
    async with (
        _keyed(httpx2.AsyncClient(headers=dict(config.headers), timeout=timeout)) as http_client,
        streamable_http_client(config.url, http_client=http_client) as streams,
    ):
        yield streams


class _Stderr:
    """What a stdio server writes on its stderr: logged line by line at the level INFO, the last lines kept."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._lines: deque[str] = deque(maxlen=8)
        self._writer: TextIO | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> TextIO:
        """The end of a pipe that the server's process is given."""
        reader, writer = os.pipe()
        self._writer = os.fdopen(writer, "w")
        self._thread = threading.Thread(
            target=self._read, args=(reader,), name=f"stderr of mcp server {self._server}", daemon=True
        )
        self._thread.start()
        return self._writer

    def parent_done(self) -> None:
        """Close this process's own copy of the end, once the server has its."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def close(self) -> None:
        self.parent_done()
        if self._thread is not None:
            # A process that the server left behind may hold the pipe open for ever; the thread is then a daemon.
            self._thread.join(timeout=1.0)

    def last_words(self) -> str:
        """The end of what the server wrote, for a message."""
        words = " | ".join(self._lines)
        return f" It wrote: {words[-500:]}" if words else ""

    def _read(self, reader: int) -> None:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = mask(line.rstrip())
                if text:
                    self._lines.append(text)
                    logger.info("MCP server %r says: %s", self._server, text)


def _tool(listed: Any) -> Tool:
    # A tool that does not say that it only reads may change things: so the protocol has it.
    effects = listed.annotations is None or listed.annotations.read_only_hint is not True
    return Tool(
        name=_TOOL_NAME.sub("_", listed.name)[:_MAX_NAME],
        description=listed.description or listed.title or listed.name,
        parameters=dict(listed.input_schema),
        effects=effects,
    )


def _value(result: CallToolResult) -> Any:
    """The value of an answer: its structured content, else its text, else a dict with its blocks as JSON.

    An answer that says it is an error becomes a `ToolResult` with ``is_error``.
    """
    blocks = [each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in result.content]
    texts = [each["text"] for each in blocks if each.get("type") == "text"]
    only_text = len(texts) == len(blocks)
    if result.is_error:
        said: Any = "\n".join(texts) if only_text and texts else blocks or result.structured_content
        return ToolResult("", to_json({"error": said or "the tool failed and said nothing"}), is_error=True)
    if result.structured_content is not None:
        structured = result.structured_content
        return structured if only_text else {"structured": structured, "content": blocks}
    if only_text:
        return "\n".join(texts)
    return {"content": blocks}


def _is_transport_error(error: Any) -> bool:
    """Whether an error over HTTP is the transport's own rather than the server's answer."""
    from mcp.types import INTERNAL_ERROR

    return bool(error.code == INTERNAL_ERROR)


def _reason(config: ServerConfig, error: BaseException) -> str:
    cause = _leaf(error)
    if isinstance(cause, ToolError):
        return str(cause).rstrip(".")
    if isinstance(cause, TimeoutError):
        return f"it gave no answer within {config.connect_timeout_seconds:g} s"
    if config.transport == "stdio":
        if isinstance(cause, FileNotFoundError):
            return f"the program {config.command!r} or the folder {config.cwd or '.'!r} does not exist"
        return f"{config.command!r} does not work as a server: {str(cause) or type(cause).__name__}"
    return f"{config.url} cannot be used as a server: {str(cause) or type(cause).__name__}"


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
