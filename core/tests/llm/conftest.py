"""Real server processes: ``llmock serve``, which speaks both vendors' protocols and fails as it is told to, and one
that answers with given bytes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from framework.llm.anthropic import AnthropicProvider
from framework.llm.openai import OpenAIProvider

KEY = "sk-secret-0123456789abcdef"


@dataclass(frozen=True)
class Server:
    """The running server. What is queued is consumed by the requests that follow."""

    url: str

    def queue(self, *behaviors: dict[str, Any]) -> None:
        """Say how the next requests are answered."""
        self._call("/_llmock/scenario", {"behaviors": list(behaviors)})

    def reply(self, text: str, **more: Any) -> None:
        self.queue({"type": "reply", "text": text, **more})

    def call_tools(self, *calls: tuple[str, dict[str, Any]]) -> None:
        self.queue({"type": "reply", "tool_calls": [{"name": name, "arguments": given} for name, given in calls]})

    def requests(self) -> list[dict[str, Any]]:
        """Every request since the reset, oldest first."""
        answer = self._call("/_llmock/requests")
        found: list[dict[str, Any]] = answer["requests"] if isinstance(answer, dict) else answer
        return found

    def verdict(self) -> list[str]:
        """What the server holds against its client: waits cut short, useless retries, half replies that were used."""
        findings = self._call("/_llmock/verdict")["findings"]
        return [each["code"] for each in findings if each["severity"] == "error"]

    def reset(self) -> None:
        self._call("/_llmock/reset", {})

    def openai(self, **more: Any) -> OpenAIProvider:
        return OpenAIProvider("gpt-4o-mini", api_key=KEY, base_url=f"{self.url}/v1", **{"timeout_seconds": 5, **more})

    def anthropic(self, **more: Any) -> AnthropicProvider:
        return AnthropicProvider(KEY, base_url=f"{self.url}/anthropic", **{"timeout_seconds": 5, **more})

    def _call(self, path: str, body: Any = None) -> Any:
        return call(self.url + path, body)


@dataclass(frozen=True)
class RawServer:
    """A server that answers with given bytes."""

    url: str

    def answer(self, *answers: dict[str, Any]) -> None:
        """Say what the next requests get: ``{"status", "headers", "body"}`` each."""
        call(f"{self.url}/_queue", list(answers))

    def stream(self, *events: Any, names: bool = False) -> dict[str, Any]:
        """An answer of server-sent events; ``names`` gives each the name of its type, as Anthropic does."""
        lines = [(f"event: {event['type']}\n" if names else "") + f"data: {json.dumps(event)}\n\n" for event in events]
        return {"body": "".join(lines)}

    def seen(self) -> list[dict[str, Any]]:
        """The bodies of the requests so far."""
        found: list[dict[str, Any]] = call(f"{self.url}/_seen")
        return found


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="session")
def server_process() -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("llmock"), "serve", "--port", str(port), "--log-level", "warning"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLMOCK_")}
    process = subprocess.Popen(
        [*map(str, command), "--response-style", "echo"], env=environment, stdout=subprocess.DEVNULL
    )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                server.reset()
                break
            except OSError:
                assert process.poll() is None, "llmock ended"
                assert time.monotonic() < deadline, "llmock did not start"
                time.sleep(0.02)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)


@pytest.fixture
def server(server_process: Server) -> Server:
    server_process.reset()
    return server_process


@pytest.fixture(scope="session")
def raw_process() -> Iterator[RawServer]:
    program = Path(__file__).with_name("raw_server.py")
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield RawServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.communicate(timeout=10)


@pytest.fixture
def raw(raw_process: RawServer) -> RawServer:
    raw_process.answer()
    return raw_process
