"""mcp_servers.json: what it may say, and one clear line for what it may not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework import _secrets
from framework.errors import ToolError
from framework.runner.mcp_config import ServerConfig, read_mcp_servers, server_config

STDIO: dict[str, Any] = {"name": "local", "command": "serve"}


@pytest.fixture(autouse=True)
def _no_secrets() -> Iterator[None]:
    yield
    _secrets.forget_secrets()


def write(folder: Path, content: Any) -> Path:
    file = folder / "mcp_servers.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_both_shapes_of_the_file_are_read(tmp_path: Path) -> None:
    listed = read_mcp_servers(write(tmp_path, {"servers": [STDIO, {**STDIO, "name": "second"}]}))
    assert [entry["name"] for entry in listed] == ["local", "second"]
    named = read_mcp_servers(write(tmp_path, {"mcpServers": {"local": {"command": "serve"}}}))
    assert named == [STDIO]


def test_a_folder_without_the_file_has_no_servers(tmp_path: Path) -> None:
    assert read_mcp_servers(tmp_path / "mcp_servers.json") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"servers": [\n  {,\n', r"mcp_servers\.json:2: this is no JSON"),
        ([], r'mcp_servers\.json: expected \{"servers": \[\.\.\.\]\}'),
        ({"servers": {}}, r'mcp_servers\.json: expected \{"servers"'),
        ({"servers": [STDIO, "x"]}, r'mcp_servers\.json: servers\[1\]: expected an object .* not "x"'),
        ({"mcpServers": {"a": 1}}, r"mcp_servers\.json: mcpServers\.a: expected an object"),
    ],
)
def test_a_file_that_is_something_else_is_refused_in_one_line(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ToolError, match=said) as caught:
        read_mcp_servers(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"command": "x"}, "servers[0].name: Field required"),
        ({"name": "a", "transport": "stdio"}, "servers[0].command: is missing"),
        ({"name": "a", "transport": "http"}, "servers[0].url: is missing"),
        ({"name": "a"}, "servers[0].url: is missing"),
        ({"name": "a", "transport": "pigeon", "url": "x"}, "servers[0].transport: 'pigeon' is none of"),
        ({**STDIO, "args": "one two"}, "servers[0].args: Input should be a valid list"),
        ({**STDIO, "env": {"A": ["x"]}}, "servers[0].env.A: Input should be a valid string"),
        ({**STDIO, "timeout_seconds": 0}, "servers[0].timeout_seconds: Input should be greater than 0"),
        ({**STDIO, "env": {"A": "${NOT_SET_ANYWHERE}"}}, "servers[0].env.A: the environment variable NOT_SET_ANYWHERE"),
    ],
)
def test_an_entry_that_is_wrong_is_refused_with_its_key(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    file = write(tmp_path, {"servers": [entry]})
    [read] = read_mcp_servers(file)
    with pytest.raises(ToolError) as caught:
        server_config(read, {})
    assert str(caught.value).startswith(f"{file.resolve()}: {said}")
    assert "\n" not in str(caught.value)


def test_what_was_given_as_a_secret_is_not_repeated_by_a_refusal() -> None:
    with pytest.raises(ToolError) as caught:
        server_config({**STDIO, "env": {"API_KEY": ["given-as-a-secret"]}})
    assert "given-as-a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "transport"),
    [
        ({"command": "x"}, "stdio"),
        ({"url": "http://h"}, "http"),
        ({"url": "http://h", "transport": "streamable_http"}, "http"),
        ({"url": "http://h", "type": "HTTP"}, "http"),
        ({"url": "http://h", "transport": "sse"}, "sse"),
    ],
)
def test_the_transport_is_said_or_seen(given: dict[str, Any], transport: str) -> None:
    assert server_config({"name": "a", **given}).transport == transport


def test_variables_are_filled_in_everywhere() -> None:
    config = server_config(
        {
            "name": "a",
            "command": "${BIN}/serve",
            "args": ["--in", "${PLACE:-here}", "$LITERAL", "${EMPTY:-}"],
            "env": {"A": "x${N}y${N}"},
            "cwd": "${BIN}",
        },
        {"BIN": "/opt", "N": "1"},
    )
    assert (config.command, config.args) == ("/opt/serve", ("--in", "here", "$LITERAL", ""))
    assert (config.env, config.cwd) == ({"A": "x1y1"}, "/opt")


def test_python_means_this_interpreter() -> None:
    assert server_config({"name": "a", "command": "python"}).command == sys.executable
    assert server_config({"name": "a", "command": "/usr/bin/python3"}).command == "/usr/bin/python3"


def test_a_server_of_a_file_runs_in_the_files_folder(tmp_path: Path) -> None:
    inside, outside, plain = read_mcp_servers(
        write(tmp_path, {"servers": [{**STDIO, "cwd": "sub"}, {**STDIO, "cwd": "/elsewhere"}, STDIO]})
    )
    folder = tmp_path.resolve()
    assert server_config(inside).cwd == str(folder / "sub")
    assert server_config(outside).cwd == "/elsewhere"
    assert server_config(plain).cwd == str(folder)
    assert server_config(STDIO).cwd is None


def test_every_secret_among_the_settings_is_registered_and_no_repr_shows_it() -> None:
    config = server_config(
        {
            "name": "a",
            "command": "serve",
            "args": ["--api-key", "secret-one", "--token=secret-two", "--verbose", "${SOME_KEY}", "db://u:secret-8@h"],
            # What somebody gives to one server is its own business, whatever it is called.
            "env": {"PASSWORD": "secret-three", "SERVICE": "secret-nine", "DATA_DIR": "/srv/data", "ENV": "production"},
            "url": "https://me:secret-four@host/?api_key=secret-ten",
            "headers": {
                "Authorization": "Bearer secret-five",
                "X": "${SOME_TOKEN}",
                "X-Org": "secret-eleven",
                "Proxy": "Basic dTpzZWNyZXQtdHdlbHZl",
                "Accept": "text/plain",
                "Content-Type": "application/json",
            },
        },
        {"SOME_KEY": "secret-six", "SOME_TOKEN": "secret-seven"},
    )
    words = "one two three four five six seven 8 nine ten eleven twelve"
    assert _secrets.mask(" ".join(f"secret-{word}" for word in words.split())) == " ".join(["***"] * 12)
    plain = "/srv/data production text/plain application/json --verbose db://u: host"
    assert _secrets.mask(plain) == plain
    assert "secret-" not in repr(config)


def test_keys_nobody_knows_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert server_config({**STDIO, "autoApprove": [], "description": "d"}) == ServerConfig("local", "stdio", "serve")
    assert "unknown keys are ignored: autoApprove" in caplog.text
