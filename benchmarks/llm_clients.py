"""What the vendors' clients cost: their import, and a streamed reply beside a whole one.

Usage: ``python benchmarks/llm_clients.py [--rounds N]``. Needs the extras ``openai`` and ``anthropic``, and ``llmock``
(of the extra ``dev``), which it starts on a free port. Prints Markdown, as docs/adr/0010-language-models.md gives it:
medians over the rounds; streamed and whole replies take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

from framework.llm import AnthropicProvider, OpenAIProvider
from framework.llm.sdk import SDKProvider

WORDS = 800
ASK = [{"role": "user", "content": "Say it."}]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {rounds} rounds.\n")
    print("| client | import (s) | streamed: wall (ms) | CPU (ms) | whole: wall (ms) | CPU (ms) |")
    print("|---|--:|--:|--:|--:|--:|")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("llmock")), "serve", "--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url)
        for llm in (
            OpenAIProvider("gpt-4o-mini", api_key="unused", base_url=f"{url}/v1"),
            AnthropicProvider("unused", base_url=f"{url}/anthropic"),
        ):
            streamed, whole = asyncio.run(replies(llm, url, rounds))
            cells = " | ".join(f"{1000 * value:.1f}" for value in (*streamed, *whole))
            seconds = import_seconds(llm.package, rounds)
            print(f"| {llm.package} {metadata.version(llm.package)} | {seconds:.2f} | {cells} |")
    finally:
        server.terminate()
        server.wait()


def import_seconds(package: str, rounds: int) -> float:
    """The median import time, each in a process of its own."""
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    return statistics.median(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(rounds)
    )


async def replies(llm: SDKProvider, url: str, rounds: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median seconds and CPU seconds of a streamed reply and of a whole one."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    client = await llm._async_client()
    request = llm._request(list(ASK), "", (), 4096, None, llm.model)
    whole = {name: value for name, value in request.items() if name not in ("stream", "stream_options")}
    for _ in range(rounds + 1):
        for stream in (True, False):
            say(url, " ".join(f"word{number}" for number in range(WORDS)))
            wall, cpu = time.perf_counter(), time.process_time()
            if stream:
                await llm.acomplete(messages=ASK)
            else:
                await llm._open(client, whole)
            found[stream].append((time.perf_counter() - wall, time.process_time() - cpu))
    await llm.aclose()
    return medians(found[True][1:]), medians(found[False][1:])  # without the first, which opens the connection


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The median of the first parts, and of the second ones."""
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs)


def say(url: str, text: str) -> None:
    """Script the next reply."""
    call(f"{url}/_llmock/scenario", {"behaviors": [{"type": "reply", "text": text}]})


def call(url: str, body: Any) -> None:
    """POST a JSON body."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        answer.read()


def wait_for(url: str) -> None:
    """Return when the server answers."""
    for _ in range(200):
        try:
            return call(f"{url}/_llmock/reset", {})
        except urllib.error.URLError:
            time.sleep(0.05)
    raise SystemExit("llmock does not answer")


if __name__ == "__main__":
    main()
