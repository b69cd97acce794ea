"""The settings of MCP servers: what mcp_servers.json may say, checked, with values from the environment filled in."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from framework._secrets import (
    is_secret_name,
    register_named,
    register_secret,
    register_server_header,
    register_server_setting,
    register_url,
)
from framework.errors import ToolError
from framework.llm.provider import ToolPolicy

logger = logging.getLogger(__name__)

Transport: TypeAlias = Literal["stdio", "http", "sse"]

_TRANSPORTS: Mapping[str, Transport] = {
    "stdio": "stdio",
    "http": "http",
    "streamable_http": "http",
    "streamable-http": "http",
    "sse": "sse",
}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class ServerConfig:
    """One MCP server, ready to connect to. What may hold secrets is left out of the ``repr``.

    A "stdio" server is a process of its own: ``command`` with ``args``, ``env`` (beside a few harmless variables such
    as PATH) and ``cwd``. An "http" one (streamable HTTP) or "sse" one (the older transport) is at ``url``, asked with
    ``headers``. ``timeout_seconds`` limits one call, ``connect_timeout_seconds`` the start.
    """

    name: str
    transport: Transport
    command: str = ""
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_seconds: float = 60.0
    connect_timeout_seconds: float = 30.0
    policies: Mapping[str, ToolPolicy] = field(default_factory=dict)
    """By the server's own name of a tool: what becomes of its calls that were cut off."""


class _Entry(BaseModel):
    """The shape of one entry. Other keys are tolerated, and named in a warning."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    name: str = Field(min_length=1)
    transport: str | None = None
    type: str | None = None
    command: str | None = None
    args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    timeout_seconds: float = Field(default=60.0, gt=0)
    connect_timeout_seconds: float = Field(default=30.0, gt=0)
    policies: dict[str, ToolPolicy] = Field(default_factory=dict)


class ServerEntry(dict[str, Any]):
    """An entry of a file: a dict that knows its ``place`` there, for messages, and the ``folder`` of the file."""

    def __init__(self, entry: Mapping[str, Any], place: str, folder: Path) -> None:
        super().__init__(entry)
        self.place = place
        self.folder = folder


def read_mcp_servers(path: str | Path) -> list[ServerEntry]:
    """The entries of an mcp_servers.json, for `ToolRegistry.register_mcp_server`; none when there is no such file.

    Either ``{"servers": [{"name": ..., ...}]}`` or ``{"mcpServers": {name: {...}}}``. Raises `ToolError` for a file
    that cannot be read or holds neither. What the entries say is checked when they are registered.
    """
    file = Path(path).resolve()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except json.JSONDecodeError as error:
        raise ToolError(f"{file}:{error.lineno}: this is no JSON: {error.msg} (column {error.colno}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{file}: cannot be read: {error}.") from error
    servers = content.get("servers") if isinstance(content, dict) else None
    named = content.get("mcpServers") if isinstance(content, dict) else None
    placed: list[tuple[str, Any, dict[str, Any]]]
    if isinstance(servers, list):
        placed = [(f"servers[{number}]", entry, {}) for number, entry in enumerate(servers)]
    elif isinstance(named, dict):
        placed = [(f"mcpServers.{name}", entry, {"name": name}) for name, entry in named.items()]
    else:
        raise ToolError(f'{file}: expected {{"servers": [...]}}, a list of servers under the key "servers".')
    for place, entry, _ in placed:
        if not isinstance(entry, dict):
            raise ToolError(f"{file}: {place}: expected an object with a server's settings, not {json.dumps(entry)}.")
    return [ServerEntry({**name, **entry}, f"{file}: {place}", file.parent) for place, entry, name in placed]


def server_config(entry: Any, environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Check an entry and fill in ``${VARIABLE}`` and ``${VARIABLE:-default}`` from the environment.

    Secrets among its values are registered, so that no message shows them. A stdio server of a file runs in the file's
    folder, and a relative ``cwd`` is relative to that. Raises `ToolError` naming the place and the key.
    """
    place, folder = (entry.place, entry.folder) if isinstance(entry, ServerEntry) else ("", None)
    if not isinstance(entry, Mapping):
        raise ToolError(_at(place, "", f"expected an object with the settings of a server, not {entry!r}"))
    try:
        given = _Entry.model_validate(dict(entry))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ToolError(_at(place, ".".join(map(str, first["loc"])), first["msg"])) from None
    if given.model_extra:
        logger.warning("%s", _at(place, "", f"unknown keys are ignored: {', '.join(sorted(given.model_extra))}"))
    transport = _transport(given, place)
    fill = _filler(os.environ if environment is None else environment, place)
    env = {key: fill(f"env.{key}", value) for key, value in given.env.items()}
    headers = {key: fill(f"headers.{key}", value) for key, value in given.headers.items()}
    for key, value in env.items():
        register_server_setting(key, value)
    for key, value in headers.items():
        register_server_header(key, value)
    url = fill("url", given.url or "")
    register_url(url)
    args = tuple(fill(f"args[{number}]", value) for number, value in enumerate(given.args))
    _register_options(args)
    return ServerConfig(
        name=given.name,
        transport=transport,
        command=_command(fill("command", given.command or "")),
        args=args,
        env=env,
        cwd=_cwd(fill("cwd", given.cwd) if given.cwd else None, folder),
        url=url,
        headers=headers,
        timeout_seconds=given.timeout_seconds,
        connect_timeout_seconds=given.connect_timeout_seconds,
        policies=given.policies,
    )


def _transport(given: _Entry, place: str) -> Transport:
    said = given.transport or given.type
    if said is None:
        said = "stdio" if given.command else "http"
    transport = _TRANSPORTS.get(said.lower())
    if transport is None:
        raise ToolError(_at(place, "transport", f"{said!r} is none of stdio, http, streamable_http, sse"))
    if transport == "stdio" and not given.command:
        raise ToolError(_at(place, "command", "is missing: the program that a stdio server is"))
    if transport != "stdio" and not given.url:
        raise ToolError(_at(place, "url", f"is missing: where the {transport} server is"))
    return transport


def _filler(environment: Mapping[str, str], place: str) -> Callable[[str, str], str]:
    def fill(key: str, text: str) -> str:
        def value(found: re.Match[str]) -> str:
            name, otherwise = found.group(1), found.group(2)
            known = environment.get(name)
            if known is None and otherwise is None:
                raise ToolError(_at(place, key, f"the environment variable {name} is not set; export it and try again"))
            filled = known if known is not None else otherwise
            if is_secret_name(name):
                register_secret(filled)
            return filled

        return _VARIABLE.sub(value, text)

    return fill


def _register_options(args: tuple[str, ...]) -> None:
    """Register ``--api-key VALUE`` and ``--api-key=VALUE``, and what a URL has of secrets."""
    for number, each in enumerate(args):
        register_named("", each)
        option, equals, value = each.partition("=")
        if option.startswith("-") and is_secret_name(option):
            register_secret(value if equals else (args[number + 1] if number + 1 < len(args) else None))


def _command(command: str) -> str:
    # The interpreter that runs this program has the packages of its environment, whichever `python` PATH finds first.
    return sys.executable if command in ("python", "python3") and sys.executable else command


def _cwd(cwd: str | None, folder: Path | None) -> str | None:
    if folder is None:
        return cwd
    return str(folder / cwd) if cwd else str(folder)


def _at(place: str, key: str, problem: str) -> str:
    where = ".".join(filter(None, (place, key))) if place else key
    return f"{where}: {problem}." if where else f"{problem}."
