"""Which JSON codec: orjson, msgspec and the standard library side by side, as docs/adr/0003-orjson.md gives it.

Usage: ``python benchmarks/codec_choice.py [--rounds N]``. A library that is not installed is left out; the table needs
``pip install orjson msgspec pydantic``. Prints a Markdown table: times are medians over the rounds, the libraries
taking turns within each round, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

IMPORT_RUNS = 20


@dataclass(frozen=True, slots=True)
class Codec:
    """A library under test. ``encode`` returns bytes, as a store needs them."""

    name: str
    module: str
    version: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _encode_with_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def codecs() -> list[Codec]:
    """The libraries that are installed."""
    found = [Codec("json (stdlib)", "json", platform.python_version(), _encode_with_json, json.loads)]
    try:
        orjson = importlib.import_module("orjson")
        found.insert(0, Codec("orjson", "orjson", metadata.version("orjson"), orjson.dumps, orjson.loads))
    except ImportError:
        print("orjson is not installed; left out.", file=sys.stderr)
    try:
        msgspec = importlib.import_module("msgspec.json")
        encoder, decoder = msgspec.Encoder(), msgspec.Decoder()
        found.insert(1, Codec("msgspec", "msgspec.json", metadata.version("msgspec"), encoder.encode, decoder.decode))
    except ImportError:
        print("msgspec is not installed; left out.", file=sys.stderr)
    return found


def small_value() -> dict[str, Any]:
    """A state of about 1 KB: what a small step commits."""
    return {
        "question": "Which of the three suppliers can deliver 400 units before the 14th?",
        "score": 0.8231,
        "attempt": 2,
        "done": False,
        "parent": None,
        "sources": [
            {"url": f"https://example.org/{number}", "title": f"Result {number}", "rank": number} for number in range(8)
        ],
        "notes": "Délai confirmé par téléphone — 客户已确认。 " * 8,
    }


def large_value() -> list[dict[str, Any]]:
    """About 5 MB of messages and numbers: a long conversation with its retrieved passages."""
    rng = random.Random(1)
    words = ["alpha", "beta", "größer", "delta", "prix", "数据", "checkpoint", "run", "token", "state"]
    return [
        {
            "id": number,
            "role": rng.choice(["user", "assistant", "tool"]),
            "content": " ".join(rng.choices(words, k=120)),
            "embedding": [rng.uniform(-1, 1) for _ in range(8)],
            "meta": {"tokens": rng.randrange(4000), "cached": rng.random() < 0.5, "cost": None},
        }
        for number in range(5000)
    ]


def seconds(function: Callable[[Any], Any], argument: Any, repeat: int) -> float:
    """The time of one call, over ``repeat`` calls in a row."""
    started = time.perf_counter()
    for _ in range(repeat):
        function(argument)
    return (time.perf_counter() - started) / repeat


def measure(found: list[Codec], value: Any, repeat: int, rounds: int) -> dict[str, tuple[float, float, int]]:
    """Per library: seconds to encode, seconds to decode, bytes."""
    encoded = {codec.name: codec.encode(value) for codec in found}
    times: dict[str, tuple[list[float], list[float]]] = {codec.name: ([], []) for codec in found}
    for _ in range(rounds):
        for codec in found:
            times[codec.name][0].append(seconds(codec.encode, value, repeat))
            times[codec.name][1].append(seconds(codec.decode, encoded[codec.name], repeat))
    return {
        name: (statistics.median(encode), statistics.median(decode), len(encoded[name]))
        for name, (encode, decode) in times.items()
    }


def import_seconds(module: str, before: str = "") -> float:
    """The time ``import module`` takes in a new process that has run ``before``, neither start nor that counted."""
    code = f"import time\n{before}\nt = time.perf_counter()\nimport {module}\nprint(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(IMPORT_RUNS)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def outcome(codec: Codec, value: Any) -> str:
    """What becomes of a value: its JSON, and whether it comes back as it was."""
    try:
        data = codec.encode(value)
    except (TypeError, ValueError, OverflowError) as error:
        return f"refused ({type(error).__name__})"
    shown = data.decode() if len(data) <= 24 else f"{data[:12].decode()}…"
    try:
        same = repr(codec.decode(data)) == repr(value)  # NaN is equal to nothing, itself included
    except ValueError:
        return f"`{shown}`, cannot be read back"
    return f"`{shown}`, {'equal' if same else 'altered'}"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    found = codecs()
    small = measure(found, small_value(), 5000, rounds)
    large = measure(found, large_value(), 1, rounds)
    rows: list[tuple[str, Callable[[Codec], str]]] = [
        ("encode 1 KB dict (µs)", lambda c: f"{small[c.name][0] * 1e6:.2f}"),
        ("decode 1 KB dict (µs)", lambda c: f"{small[c.name][1] * 1e6:.2f}"),
        ("its bytes", lambda c: f"{small[c.name][2]:,}"),
        ("encode 5 MB list of dicts (ms)", lambda c: f"{large[c.name][0] * 1e3:.1f}"),
        ("decode 5 MB list of dicts (ms)", lambda c: f"{large[c.name][1] * 1e3:.1f}"),
        ("its bytes", lambda c: f"{large[c.name][2]:,}"),
        ("import, alone (ms)", lambda c: f"{import_seconds(c.module) * 1e3:.1f}"),
        ("import, after pydantic (ms)", lambda c: f"{import_seconds(c.module, 'import pydantic.main') * 1e3:.1f}"),
        ("`float('nan')`", lambda c: outcome(c, float("nan"))),
        ("`float('inf')`", lambda c: outcome(c, float("inf"))),
        ("`2**63 - 1`", lambda c: outcome(c, 2**63 - 1)),
        ("`2**64 - 1`", lambda c: outcome(c, 2**64 - 1)),
        ("`2**64`", lambda c: outcome(c, 2**64)),
        ("`10**40`", lambda c: outcome(c, 10**40)),
        ("`(1, 2)`", lambda c: outcome(c, (1, 2))),
        ("`{1: 2}`", lambda c: outcome(c, {1: 2})),
        ("lone surrogate", lambda c: outcome(c, "\ud800")),
    ]
    print("| | " + " | ".join(f"{codec.name} {codec.version}" for codec in found) + " |")
    print("|---|" + "--:|" * len(found))
    for title, cell in rows:
        print(f"| {title} | " + " | ".join(cell(codec) for codec in found) + " |")
    print(f"\nPython {platform.python_version()}, {platform.system()} {platform.machine()}, {rounds} rounds.")


if __name__ == "__main__":
    main()
