"""What Zstandard saves and costs by the size of a value, as docs/adr/0016-compression.md gives it.

Usage: ``python benchmarks/compression.py [--rounds N]``, with the package zstandard installed. The values are pieces of
this project's own program text and documentation, of messages as JSON made of the latter, and of base64 of noise. Each
piece is compressed by itself, with a context of its own, as the store does. Prints a Markdown table: the part that is
left, over all pieces; and microseconds, each piece's best of the rounds (what the machine does besides only adds to it)
and the median over the pieces.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import zstandard

from framework.storage.compression import LEVEL

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 1 << 20)
LEVELS = (1, 3, 6)
TIMED = "program text"
"""What the times and the other levels are measured on: there is enough of it for pieces of 1 MB."""
MOST_PIECES = 40
IMPORT_RUNS = 20


def text_of(*patterns: str) -> str:
    """The files below the project's root that match, one after the other."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def messages_of(prose: str) -> str:
    """A conversation whose messages are the paragraphs of a text, as JSON."""
    paragraphs = [paragraph for paragraph in prose.split("\n\n") if paragraph.strip()]
    return json.dumps(
        [
            {"role": ("user", "assistant")[number % 2], "content": paragraph, "id": f"msg_{number:05}"}
            for number, paragraph in enumerate(paragraphs)
        ],
        ensure_ascii=False,
    )


def pieces_of(data: bytes, size: int) -> list[bytes]:
    """Pieces of one size, spread over ``data``; none when it is shorter than one."""
    whole = [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
    step = max(1, len(whole) // MOST_PIECES)
    return whole[::step][:MOST_PIECES]


def compress(piece: bytes, level: int) -> bytes:
    """One piece, as the store compresses it."""
    packed: bytes = zstandard.ZstdCompressor(level=level).compress(piece)
    return packed


def decompress(packed: bytes) -> bytes:
    """The piece again."""
    data: bytes = zstandard.ZstdDecompressor().decompress(packed)
    return data


def left(pieces: Sequence[bytes], level: int) -> float:
    """The part of the pieces that is left."""
    return sum(len(compress(piece, level)) for piece in pieces) / sum(map(len, pieces))


def microseconds(function: Callable[[bytes], bytes], pieces: Sequence[bytes], rounds: int) -> float:
    """What one call takes."""
    best = [float("inf")] * len(pieces)
    for _ in range(rounds):
        for place, piece in enumerate(pieces):
            began = time.perf_counter()
            function(piece)
            best[place] = min(best[place], time.perf_counter() - began)
    return statistics.median(best) * 1e6


def import_milliseconds() -> float:
    """The time ``import zstandard`` takes in a new process, without its start."""
    code = "import time; t = time.perf_counter(); import zstandard; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(IMPORT_RUNS)
    ]
    return statistics.median(float(run.stdout) for run in runs) * 1e3


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    prose = text_of("docs/**/*.md", "*.md")
    noise = random.Random(1).randbytes(2 << 20)
    kinds = {
        TIMED: text_of("core/framework/**/*.py", "core/tests/**/*.py").encode(),
        "prose": prose.encode(),
        "messages as JSON": messages_of(prose).encode(),
        "base64 of noise": base64.b64encode(noise),
    }
    by_kind = {name: {size: pieces_of(data, size) for size in SIZES} for name, data in kinds.items()}

    def row(title: str, kind: str, cell: Callable[[list[bytes]], str]) -> None:
        cells = [cell(pieces) if (pieces := by_kind[kind][size]) else "" for size in SIZES]
        print(f"| {title} | {' | '.join(cells)} |")

    def shown_left(level: int, pieces: list[bytes]) -> str:
        return f"{left(pieces, level):.2f}"

    def shown_time(level: int, pieces: list[bytes]) -> str:
        return f"{microseconds(partial(compress, level=level), pieces, rounds):,.0f}"

    def shown_reading(pieces: list[bytes]) -> str:
        return f"{microseconds(decompress, [compress(piece, LEVEL) for piece in pieces], rounds):,.0f}"

    print("| | " + " | ".join(f"{size >> 10} KB" if size < 1 << 20 else f"{size >> 20} MB" for size in SIZES) + " |")
    print("|---|" + "--:|" * len(SIZES))
    for kind in kinds:
        row(f"{kind}, level {LEVEL}", kind, partial(shown_left, LEVEL))
    for level in LEVELS:
        if level != LEVEL:
            row(f"{TIMED}, level {level}", TIMED, partial(shown_left, level))
    for level in LEVELS:
        row(f"microseconds, level {level} ({TIMED})", TIMED, partial(shown_time, level))
    row("microseconds to read back", TIMED, shown_reading)
    print(f"\n`import zstandard`: {import_milliseconds():.0f} ms.")
    print(
        f"zstandard {metadata.version('zstandard')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {rounds} rounds."
    )


if __name__ == "__main__":
    main()
