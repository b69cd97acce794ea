"""What a piece of code costs in the sandbox, and how much memory its two processes take at most under memory bombs.

Usage: ``python benchmarks/sandbox.py [--rounds N]``. Needs the extra ``sandbox``; memory is read from /proc, so on
Linux only. Prints Markdown, as docs/adr/0008-code-sandbox.md gives it: times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

from framework.graph.code_sandbox import CodeSandbox

BOMBS = {
    "`x = x + x`, doubling a list": "x = [0]\nwhile True:\n    x = x + x",
    "a dict that grows": "x = {}\ni = 0\nwhile True:\n    x[i] = 'a' * 1000\n    i += 1",
    "`'a' * n` near the limit, 20 times": "x = [('a' * 10**7) for _ in range(20)]\nwhile True:\n    pass",
    **{
        f"`a = [a] * 10`, {turns} times, then read": (
            f"a = ['x' * 100] * 10\nfor _ in range({turns}):\n    a = [a] * 10\nresult = a"
        )
        for turns in (5, 6, 7, 9)
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores\n"
    )
    sandbox = CodeSandbox(timeout_seconds=5)
    sandbox.execute("result = 1")
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        if not sandbox.execute("result = 1").success:
            raise SystemExit("the sandbox does not work here: install the extra 'sandbox'")
        times.append(time.perf_counter() - started)
    print(f"one piece of code: {statistics.median(times) * 1000:.0f} ms\n")
    if sys.platform != "linux":
        return
    print(f"| code, limit {sandbox.max_memory_bytes >> 20} MB | process between | interpreter | ended after | as |")
    print("|---|--:|--:|--:|---|")
    for name, code in {"`result = 1`": "result = 1", **BOMBS}.items():
        started = time.perf_counter()
        peaks, error = _peaks(sandbox, code)
        seconds = time.perf_counter() - started
        shown = " | ".join(f"{peak / 1024:.0f} MB" for peak in peaks)
        print(f"| {name} | {shown} | {seconds:.1f} s | {error} |")


def _peaks(sandbox: CodeSandbox, code: str) -> tuple[tuple[int, int], str]:
    """The most resident memory of the process between and of the interpreter, in kB, and the kind of error."""
    errors: list[str] = []
    work = threading.Thread(target=lambda: errors.append((sandbox.execute(code).error or "no error").partition(":")[0]))
    work.start()
    host, interpreter = 0, 0
    while work.is_alive():
        for child in _children(os.getpid()):
            host = max(host, _peak_kb(child))
            interpreter = max([interpreter, *(_peak_kb(grandchild) for grandchild in _children(child))])
        time.sleep(0.0005)
    return (host, interpreter), errors[0]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def _peak_kb(pid: int) -> int:
    """The high-water mark; the kernel keeps it, so what is missed is at most what comes after the last look."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
