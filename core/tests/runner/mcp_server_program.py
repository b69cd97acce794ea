"""An MCP server for the tests: ``stdio``, or ``http PORT_FILE`` / ``sse PORT_FILE`` on a free loopback port.

What happens inside is told by files in the folder MCP_TEST_DIR, so that the tests need not wait by the clock.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel

FOLDER = Path(os.environ["MCP_TEST_DIR"])
server = MCPServer("tests")


class Weather(BaseModel):
    city: str
    degrees: float


def told(name: str, text: str = "") -> None:
    """Leave a file for the test, whole or not at all."""
    part = FOLDER / f"{name}.{os.getpid()}.part"
    part.write_text(text)
    part.replace(FOLDER / name)


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(structured_output=False)
def greet(name: str) -> str:
    """Say hello."""
    return f"Hello, {name}"


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def weather(city: str) -> Weather:
    """The weather of a city."""
    return Weather(city=city, degrees=21.5)


@server.tool(annotations=ToolAnnotations(read_only_hint=False))
def fail(why: str) -> str:
    """Fail."""
    raise ValueError(f"failed because of {why}")


@server.tool(structured_output=False)
def refuse() -> CallToolResult:
    """Answer with an error."""
    return CallToolResult(content=[TextContent(type="text", text="not today")], is_error=True)


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """A picture and a text."""
    return ["a dot", Image(data=b"\x89PNG", format="png")]


@server.tool(structured_output=False)
def several() -> list[str]:
    """Two texts."""
    return ["one", "two"]


@server.tool(structured_output=False)
def who(session_id: str, question: str = "") -> str:
    """Which session this is."""
    return f"{session_id}:{question}"


@server.tool(structured_output=False)
def keyed(ctx: Context) -> str:
    """The idempotency key of this call, as its metadata and as its headers say it."""
    return f"{(ctx.request_context.meta or {}).get('idempotency_key')} {(ctx.headers or {}).get('idempotency-key')}"


@server.tool(structured_output=False)
def pid() -> str:
    """This process."""
    return str(os.getpid())


@server.tool(structured_output=False)
def variable(name: str) -> str:
    """A variable of this process."""
    return os.environ.get(name, "(not set)")


@server.tool(structured_output=False)
def shout(text: str) -> str:
    """Write on stderr."""
    print(text, file=sys.stderr, flush=True)
    return "shouted"


@server.tool(structured_output=False)
async def hang(name: str) -> str:
    """Never answer; say when it began and when it was cancelled."""
    told(f"{name}.began", str(os.getpid()))
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        told(f"{name}.cancelled")
        raise
    return "unreachable"


@server.tool(structured_output=False)
async def meet(name: str, other: str) -> str:
    """Answer only while the call of the other name is running too."""
    told(f"{name}.met")
    while not (FOLDER / f"{other}.met").exists():
        await anyio.sleep(0.005)
    return f"{name} met {other}"


def main() -> None:
    mode = sys.argv[1]
    if mode == "stdio":
        server.run("stdio")
        return
    import uvicorn  # a stdio server starts faster without

    app = server.streamable_http_app() if mode == "http" else server.sse_app()
    if wanted := os.environ.get("MCP_TEST_AUTH"):
        app = guarded(app, wanted)
    listening = socket.create_server(("127.0.0.1", int(os.environ.get("MCP_TEST_PORT", "0"))))
    told(sys.argv[2], str(listening.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def guarded(app: Any, wanted: str) -> Any:
    """``app``, which refuses requests without the header."""

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != wanted.encode():
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": f"not allowed: {given}".encode()})
            return
        await app(scope, receive, send)

    return checked


if __name__ == "__main__":
    main()
