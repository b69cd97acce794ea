"""What a durable step costs: time and bytes beside raw SQLite, in one interleaved session on this machine.

Run it with ``make bench-quick``; ``.venv/bin/python benchmarks/steps.py --help`` lists what can be varied.
Milliseconds are this machine's: compare only figures of one run. Every figure is the median of the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import math
import os
import queue
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, NewRun, Write
from framework.storage.sqlite import SQLiteStorage

GOAL = Goal(id="bench", name="bench", description="measure")


class QuietRuntime:
    """A runtime that records nothing, so that only the executor and the store are measured."""

    def start_run(self, **given: Any) -> str:
        return "run_bench"

    def end_run(self, **given: Any) -> None:
        return None

    def report_problem(self, **given: Any) -> str:
        return ""


class SmallState:
    """Each step replaces one value of 1 KB."""

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        number = (ctx.memory.read("n") or 0) + 1
        return NodeResult(True, output={"n": number, "text": f"{number:<1024}"})


class Conversation(SmallState):
    """Each step appends one message of 1 KB."""

    async def execute(self, ctx: NodeContext) -> NodeResult:
        number = (ctx.memory.read("n") or 0) + 1
        messages = ctx.memory.read("messages") or []
        messages.append(os.urandom(512).hex())
        return NodeResult(True, output={"n": number, "messages": messages})


def loop_graph(until: int, append_only: list[str], max_steps: int | None = None) -> GraphSpec:
    """One node that follows itself until ``until`` visits are done."""
    return GraphSpec(
        id="bench",
        goal_id=GOAL.id,
        entry_node="work",
        max_steps=max_steps or until,
        nodes=[NodeSpec(id="work")],
        edges=[
            EdgeSpec(
                id="again",
                source="work",
                target="work",
                condition=EdgeCondition.CONDITIONAL,
                condition_expr=f"n < {until}",
                input_mapping={"n": "n"},
            )
        ],
        append_only_keys=append_only,
    )


def run_ours(
    path: Path | None, steps: int, node: SmallState, append_only: list[str], config: CheckpointConfig | None = None
) -> tuple[float, int]:
    """Seconds per step and bytes stored; ``path`` ``None`` runs without a manager."""
    store = None if path is None else SQLiteStorage(path)
    manager = None if store is None else CheckpointManager(store, config or CheckpointConfig())
    executor = GraphExecutor(QuietRuntime(), node_registry={"work": node}, checkpoint_manager=manager)
    graph = loop_graph(steps, append_only)
    began = time.perf_counter()
    result = asyncio.run(executor.execute(graph, GOAL, {}, run_id="bench"))
    seconds = time.perf_counter() - began
    if not result.success or result.steps_executed != steps:
        raise SystemExit(f"the benchmark run failed: {result.error}")
    if store is not None:
        store.close()
    return seconds / steps, stored_bytes(path)


def run_calls(path: Path, calls: int) -> tuple[float, int]:
    """Seconds per ``ctx.call`` of a trivial async function, one after the other inside one step, and bytes stored."""
    seconds: list[float] = []

    async def trivial(number: int) -> int:
        return number

    class Calls(SmallState):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            began = time.perf_counter()
            for number in range(calls):
                await ctx.call("trivial", trivial, number)
            seconds.append(time.perf_counter() - began)
            return NodeResult(True, output={"n": 1})

    with SQLiteStorage(path) as store:
        manager = CheckpointManager(store, CheckpointConfig(keep_journal=True))
        executor = GraphExecutor(QuietRuntime(), node_registry={"work": Calls()}, checkpoint_manager=manager)
        result = asyncio.run(executor.execute(loop_graph(1, []), GOAL, {}, run_id="bench"))
        if not result.success or len(manager.journal("bench")) != calls:
            raise SystemExit(f"the benchmark run failed: {result.error}")
    return seconds[0] / calls, stored_bytes(path)


def run_raw(path: Path, steps: int) -> tuple[float, int]:
    """Seconds per commit and bytes stored of one 1 KB row in each SQLite transaction (WAL, FULL)."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, body BLOB)")
    body = os.urandom(512).hex()
    began = time.perf_counter()
    for _ in range(steps):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO rows (body) VALUES (?)", (body,))
        connection.execute("COMMIT")
    seconds = time.perf_counter() - began
    connection.close()
    return seconds / steps, stored_bytes(path)


def run_commit(path: Path, steps: int) -> tuple[float, int]:
    """Seconds per call of ``SQLiteStorage.commit`` and bytes stored: what a small step commits, and nothing else."""
    given: list[Commit] = []

    class Noting(MemoryStorage):
        def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
            given.extend(one for one in commits if isinstance(one, Commit))
            return super().commit(commits)

    with Noting() as noting:
        executor = GraphExecutor(
            QuietRuntime(), node_registry={"work": SmallState()}, checkpoint_manager=CheckpointManager(noting)
        )
        asyncio.run(executor.execute(loop_graph(steps, []), GOAL, {}, run_id="bench"))
    with SQLiteStorage(path) as store:
        store.open_run(NewRun("bench", "graph", "bench", "bench", b"{}", b"{}"), "bench", 3600)
        began = time.perf_counter()
        for one in given:
            refused = store.commit([one])[0]
            if refused is not None:
                raise SystemExit(f"the benchmark's commit was refused: {refused}")
        seconds = time.perf_counter() - began
    return seconds / steps, stored_bytes(path)


class Unread(SmallState):
    """The first step leaves a value of 5 MB that no step reads; each replaces one of 1 KB."""

    def __init__(self, value: Any) -> None:
        self._value = value

    async def execute(self, ctx: NodeContext) -> NodeResult:
        result = await super().execute(ctx)
        if result.output["n"] == 1:
            result.output["value"] = self._value()
        return result


def run_unchanged(path: Path, steps: int, value: Any) -> tuple[float, int]:
    """Seconds per step and bytes stored of a run with a value of 5 MB.

    Not timed are the step that writes it, the next one, which is handed it as its input, and the two commits after
    which it is certain that nobody holds it.
    """
    reached: list[float] = []

    class Timed(Unread):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            reached.append(time.perf_counter())
            return await super().execute(ctx)

    run_ours(path, steps, Timed(value), [])
    late = reached[5:]
    return (late[-1] - late[0]) / (len(late) - 1), stored_bytes(path)


def large_text() -> str:
    return os.urandom(2_500_000).hex()


def large_list() -> list[dict[str, Any]]:
    return [{"id": number, "text": os.urandom(500).hex()} for number in range(5_000)]


def run_many(path: Path, runs: int, steps: int) -> tuple[float, int]:
    """Seconds per step, over all, of ``runs`` concurrent runs of one executor, and bytes stored."""

    async def all_of_them(executor: GraphExecutor) -> float:
        graph = loop_graph(steps, [])
        began = time.perf_counter()
        results = await asyncio.gather(
            *(executor.execute(graph, GOAL, {}, run_id=f"bench-{number}") for number in range(runs))
        )
        seconds = time.perf_counter() - began
        if not all(result.success for result in results):
            raise SystemExit("the benchmark runs failed")
        return seconds

    with SQLiteStorage(path) as store:
        manager = CheckpointManager(store)
        seconds = asyncio.run(
            all_of_them(GraphExecutor(QuietRuntime(), node_registry={"work": SmallState()}, checkpoint_manager=manager))
        )
    return seconds / runs / steps, stored_bytes(path)


def run_many_raw(path: Path, tasks: int, rows: int) -> tuple[float, int]:
    """The same of bare rows: tasks hand each row to a thread, which commits all that wait in one transaction."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, body BLOB)")
    body = os.urandom(512).hex()
    waiting: queue.SimpleQueue[asyncio.Future[None] | None] = queue.SimpleQueue()

    def finish(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            future.set_result(None)

    def work(loop: asyncio.AbstractEventLoop) -> None:
        while True:
            first = waiting.get()
            if first is None:
                return
            group = [first]
            while not waiting.empty() and (one := waiting.get()) is not None:
                group.append(one)
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO rows (body) VALUES (?)", [(body,)] * len(group))
            connection.execute("COMMIT")
            loop.call_soon_threadsafe(finish, group)

    async def one_of_them(loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(rows):
            future: asyncio.Future[None] = loop.create_future()
            waiting.put(future)
            await future

    async def all_of_them() -> float:
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=work, args=(loop,))
        thread.start()
        began = time.perf_counter()
        await asyncio.gather(*(one_of_them(loop) for _ in range(tasks)))
        seconds = time.perf_counter() - began
        waiting.put(None)
        thread.join()
        return seconds

    seconds = asyncio.run(all_of_them())
    connection.close()
    return seconds / tasks / rows, stored_bytes(path)


def print_growth(folder: Path) -> None:
    """The bytes of stores that hold conversations of several lengths, and the exponent of their growth."""
    lengths = (50, 200, 800, 3200)
    empty = folder / "empty.db"
    SQLiteStorage(empty).close()
    print(f"\nbytes stored per byte of messages of 1 KB (an empty store takes {stored_bytes(empty)})\n")
    print(f"{'retention':<30}" + "".join(f"{length:>9}" for length in lengths) + f"{'exponent':>10}")
    strategies: dict[str, dict[str, Any]] = {
        "latest_only": {"retention_strategy": "latest_only"},
        "prune_old, 100 checkpoints": {"retention_strategy": "prune_old", "max_checkpoints_per_run": 100},
        "all": {"retention_strategy": "all"},
    }
    for name, fields in strategies.items():
        sizes = []
        for length in lengths:
            path = folder / f"{length}-{len(fields)}-{name}.db"
            run_ours(path, length, Conversation(), ["messages"], CheckpointConfig.model_validate(fields))
            sizes.append(stored_bytes(path))
        exponent = math.log(sizes[-1] / sizes[0]) / math.log(lengths[-1] / lengths[0])
        ratios = "".join(f"{size / length / 1024:>9.2f}" for size, length in zip(sizes, lengths, strict=True))
        print(f"{name:<30}{ratios}{exponent:>10.2f}")


def run_resume(path: Path, steps: int) -> tuple[float, int]:
    """Seconds from opening the store to the next step's body, of a conversation of ``steps`` messages."""
    reached: list[float] = []

    class Timed(Conversation):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            reached.append(time.perf_counter())
            return await super().execute(ctx)

    async def execute(limit: int, node: Conversation) -> None:
        with SQLiteStorage(path) as store:
            executor = GraphExecutor(
                QuietRuntime(), node_registry={"work": node}, checkpoint_manager=CheckpointManager(store)
            )
            # The first run stops at its step limit, the second, with one step more, goes on.
            await executor.execute(loop_graph(steps + 1, ["messages"], limit), GOAL, {}, run_id="bench")

    asyncio.run(execute(steps, Conversation()))
    began = time.perf_counter()
    asyncio.run(execute(steps + 1, Timed()))
    if len(reached) != 1:
        raise SystemExit(f"the resumed run executed {len(reached)} steps, not 1")
    return reached[0] - began, 0


def run_import() -> tuple[float, int]:
    """Seconds of ``import framework`` over those of an empty program."""

    def once(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return once("import framework") - once("pass"), 0


def stored_bytes(path: Path | None) -> int:
    """Size of a store's files once its log is folded in."""
    if path is None:
        return 0
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats")
    parser.add_argument("--growth", action="store_true", help="also the bytes of conversations of 50 to 3200 messages")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores go (default: a temporary folder)")
    given = parser.parse_args()
    steps: int = given.steps
    counts = {"5 MB text unchanged": 50, "5 MB list of dicts unchanged": 50, "50 concurrent: raw, grouped": 5000}
    counts["50 concurrent runs"] = 2000
    work: dict[str, Callable[[Path], tuple[float, int]]] = {
        "raw SQLite commit": lambda path: run_raw(path, steps),
        "durable step, 1 KB replaced": lambda path: run_ours(path, steps, SmallState(), []),
        "  its commit alone": lambda path: run_commit(path, steps),
        "durable step, 1 KB appended": lambda path: run_ours(path, steps, Conversation(), []),
        "  with the key append-only": lambda path: run_ours(path, steps, Conversation(), ["messages"]),
        "5 MB text unchanged": lambda path: run_unchanged(path, 50, large_text),
        "5 MB list of dicts unchanged": lambda path: run_unchanged(path, 50, large_list),
        "50 concurrent: raw, grouped": lambda path: run_many_raw(path, 50, 100),
        "50 concurrent runs": lambda path: run_many(path, 50, 40),
        "a journaled call": lambda path: run_calls(path, steps),
        "step without a manager": lambda path: run_ours(None, steps, SmallState(), []),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    sizes: dict[str, int] = {}
    resumes: list[float] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for repeat in range(given.repeats):
            for index, (name, run) in enumerate(work.items()):
                print(f"\r{repeat + 1}/{given.repeats} {name:<30}", end="", file=sys.stderr, flush=True)
                seconds, sizes[name] = run(Path(folder) / f"{repeat}-{index}.db")
                times[name].append(seconds)
            resumes.append(run_resume(Path(folder) / f"{repeat}-resume.db", 800)[0])
            imports.append(run_import()[0])
        growth = io.StringIO()
        if given.growth:
            with contextlib.redirect_stdout(growth):
                print_growth(Path(folder))
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    raw = statistics.median(times["raw SQLite commit"])
    print(f"{steps} steps, median of {given.repeats}; SQLite {sqlite3.sqlite_version}, WAL, synchronous=FULL\n")
    print(f"{'':<30}{'ms/step':>9}{'x raw':>8}{'bytes/step':>12}")
    for name, measured in times.items():
        seconds = statistics.median(measured)
        print(f"{name:<30}{seconds * 1e3:>9.3f}{seconds / raw:>8.2f}{sizes[name] / counts.get(name, steps):>12.0f}")
    print(
        f"\nresume at 800 messages: {statistics.median(resumes) * 1e3:.1f} ms from opening the store to the next step"
    )
    print(growth.getvalue(), end="")
    print(f"import framework: {statistics.median(imports) * 1e3:.0f} ms over an empty program")


if __name__ == "__main__":
    main()
