"""One SQLite file with 100,000 runs and 5 million checkpoints: what listing, resuming and pruning cost as it grows.

``make bench-scale`` runs it, in some minutes; ``--runs 1000`` is for a look. The rows are those of real runs: a
graph of ``--steps`` steps is executed once for each way a run can end, and its commits are written again under other
ids through the store's own interface, many in one transaction. Every operation is measured several times at each
size, on another run each time, through the same interface that the command line uses.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeResult, NodeSpec
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.records import NO_TOKEN, Commit, NewRun, Retention, RunRecord, Write
from framework.storage.sqlite import SQLiteStorage

GOAL = Goal(id="scale", name="scale", description="measure")
ENDINGS = (RunState.COMPLETED, RunState.FAILED, RunState.PAUSED)
"""Every fifth run has failed, every tenth is paused, the others are completed; see ``ending_of``."""
BATCH = 2_000
"""Commits in one transaction while the file is filled."""
REPEATS = 15


@dataclass(frozen=True)
class Template:
    """A run that was executed, as the writes that would make it again."""

    run: NewRun
    commits: Sequence[Commit]


class Step:
    """Adds one message of about 200 bytes; the last step ends the run as asked."""

    def __init__(self, steps: int, ending: RunState) -> None:
        self._steps = steps
        self._ending = ending

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return []

    async def execute(self, ctx: NodeContext) -> NodeResult:
        number = (ctx.memory.read("n") or 0) + 1
        if number == self._steps and self._ending is RunState.FAILED:
            return NodeResult(False, error="the service was away")
        messages = [*(ctx.memory.read("messages") or []), f"{number:<200}"]
        return NodeResult(True, output={"n": number, "messages": messages})


def graph_of(steps: int, ending: RunState) -> GraphSpec:
    """One node that follows itself, and a last one, in front of which a paused run stops."""

    def edge(name: str, target: str, condition: str) -> EdgeSpec:
        return EdgeSpec(
            id=name,
            source="work",
            target=target,
            condition=EdgeCondition.CONDITIONAL,
            condition_expr=condition,
            input_mapping={"n": "n"},
        )

    return GraphSpec(
        id=f"scale-{ending.value}",
        goal_id=GOAL.id,
        entry_node="work",
        max_steps=steps + 100,
        nodes=[NodeSpec(id="work"), NodeSpec(id="last", max_retries=0)],
        edges=[edge("again", "work", f"n < {steps - 1}"), edge("then", "last", f"n >= {steps - 1}")],
        pause_nodes=["last"] if ending is RunState.PAUSED else [],
        append_only_keys=["messages"],
    )


def executor_of(store: SQLiteStorage, steps: int, ending: RunState, step: Step | None = None) -> GraphExecutor:
    manager = CheckpointManager(store, CheckpointConfig(retention_strategy="all"))
    node = step or Step(steps, ending)
    return GraphExecutor(Runtime(store), node_registry={"work": node, "last": node}, checkpoint_manager=manager)


class Recording(SQLiteStorage):
    """A store that keeps what it is given to write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.opened: list[NewRun] = []
        self.commits: list[Commit] = []

    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        self.opened.append(new)
        return super().open_run(new, owner, lease_seconds)

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self.commits += [each for each in commits if isinstance(each, Commit)]
        return super().commit(commits)


def template_of(folder: Path, steps: int, ending: RunState) -> Template:
    """Execute a run and take its rows."""
    with Recording(folder / f"{ending.value}.db") as store:
        execution = executor_of(store, steps, ending).execute(graph_of(steps, ending), GOAL, {}, run_id="template")
        result = asyncio.run(execution)
        record = store.find_run("template")
        if record is None or record.state is not ending:
            raise SystemExit(f"the template is {record and record.state}, not {ending}: {result.error}")
        # What the owner of a lease wrote is written again by nobody in particular.
        return Template(store.opened[0], [replace(commit, token=NO_TOKEN, release=False) for commit in store.commits])


def ending_of(number: int) -> RunState:
    if number % 10 == 0:
        return RunState.PAUSED
    return RunState.FAILED if number % 5 == 1 else RunState.COMPLETED


def id_of(number: int) -> str:
    return f"run-{number:07d}"


def fill(
    store: SQLiteStorage, templates: dict[RunState, Template], first: int, last: int, say: Callable[[str], None]
) -> int:
    """Write the runs ``first`` to ``last`` (not included); the number of checkpoints they have."""
    checkpoints = 0
    waiting: list[Commit] = []

    def flush() -> None:
        refused = [error for error in store.commit(waiting) if error is not None]
        if refused:
            raise SystemExit(f"a commit was refused: {refused[0]}")
        waiting.clear()

    for number in range(first, last):
        template = templates[ending_of(number)]
        run_id = id_of(number)
        store.open_run(replace(template.run, run_id=run_id))
        for commit in template.commits:
            named = f"{run_id}-{commit.sequence}" if commit.checkpoint_id else None
            waiting.append(replace(commit, run_id=run_id, checkpoint_id=named))
            checkpoints += named is not None
        if len(waiting) >= BATCH:
            flush()
            say(f"filling: {number + 1:,} runs")
    flush()
    return checkpoints


@dataclass
class Operation:
    """Something an operator or a program asks of the store; ``prepare`` is not measured."""

    name: str
    run: Callable[[int], Any]
    """Called with the number of a run that nothing was done to yet."""
    ending: RunState | None = None
    """Which runs it is asked of; ``None`` for any."""
    expect: Callable[[Any], bool] = bool


def operations(store: SQLiteStorage, runs: int, steps: int) -> list[Operation]:
    def page(number: int) -> Any:
        return store.list_runs(limit=100)

    def far(number: int) -> Any:
        return store.list_runs(limit=100, before=store.find_run(id_of(runs // 100)))

    def crashed(number: int) -> Any:
        return store.list_runs([RunState.CRASHED], limit=100)

    def resumed(number: int) -> Any:
        """From the call to the body of the next step."""
        reached: list[float] = []

        class Reached(Step):
            async def execute(self, ctx: NodeContext) -> NodeResult:
                reached.append(time.perf_counter())
                return NodeResult(False, error="again")

        executor = executor_of(store, steps, RunState.FAILED, Reached(steps, RunState.FAILED))
        graph = graph_of(steps, RunState.FAILED)
        began = time.perf_counter()
        result = asyncio.run(executor.execute(graph, GOAL, {}, run_id=id_of(number)))
        if not reached:
            raise SystemExit(f"{id_of(number)} was not resumed: {result.error}")
        return reached[0] - began

    return [
        Operation("list the newest 100", page, expect=lambda rows: len(rows) == 100),
        Operation("list 100 of the oldest percent", far, expect=lambda rows: len(rows) > 0),
        Operation("list the newest failed", lambda number: store.list_runs([RunState.FAILED], limit=100)),
        Operation("list crashed (none)", crashed, expect=lambda rows: rows == []),
        Operation("list due (none)", lambda number: store.list_due(limit=100), expect=lambda rows: rows == []),
        Operation("find a run", lambda number: store.find_run(id_of(number))),
        Operation("find by the beginning of an id", lambda number: store.find_runs(id_of(number)[:-2], limit=100)),
        Operation("list a run's checkpoints", lambda number: store.list_checkpoints(id_of(number))),
        Operation("start a run, one step, end", lambda number: _start(store, number)),
        Operation("resume, to the next step", resumed, RunState.FAILED),
        Operation("prune a run to 10", lambda number: store.prune(id_of(number), Retention(10)), RunState.COMPLETED),
        Operation("delete a run", lambda number: store.delete_run(id_of(number)), RunState.COMPLETED),
    ]


def _start(store: SQLiteStorage, number: int) -> bool:
    executor = executor_of(store, 1, RunState.COMPLETED)
    graph = graph_of(1, RunState.COMPLETED)
    return asyncio.run(executor.execute(graph, GOAL, {}, run_id=f"new-{number}-{time.time_ns()}")).success


def measure(store: SQLiteStorage, runs: int, steps: int, rng: random.Random, used: set[int]) -> dict[str, float]:
    """Median seconds of each operation; every time on another run, in another part of the file.

    ``used`` are those that were asked of before, at a smaller size: some of them are deleted, others resumed or pruned.
    """
    numbers = iter([number for number in rng.sample(range(runs), min(runs, 2000)) if number not in used])
    found: dict[str, float] = {}
    for operation in operations(store, runs, steps):
        seconds = []
        for number in _fitting(numbers, operation.ending, REPEATS):
            used.add(number)
            began = time.perf_counter()
            answer = operation.run(number)
            took = time.perf_counter() - began
            if not operation.expect(answer):
                raise SystemExit(f"{operation.name}: an answer that cannot be right: {answer!r}")
            seconds.append(answer if isinstance(answer, float) else took)
        found[operation.name] = statistics.median(seconds)
    return found


def _fitting(numbers: Iterator[int], ending: RunState | None, count: int) -> Iterator[int]:
    for number in numbers:
        if ending in (None, ending_of(number)):
            yield number
            count -= 1
            if not count:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="runs in the end (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="checkpoints of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which runs are asked for")
    parser.add_argument("--folder", type=Path, help="where the file goes, about 30 KB for a run of 50 steps")
    given = parser.parse_args()
    sizes = [size for size in (given.runs // 100, given.runs // 10, given.runs) if size >= 1000]
    if not sizes:
        parser.error("--runs: at least 1000")
    began = time.monotonic()

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{time.monotonic() - began:5.0f} s  {what:<40}", end="", file=sys.stderr, flush=True)

    columns: list[dict[str, float]] = []
    used: set[int] = set()
    facts: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="surefoot-scale-", dir=given.folder) as folder:
        templates = {ending: template_of(Path(folder), given.steps, ending) for ending in ENDINGS}
        path = Path(folder) / "runs.db"
        written = checkpoints = 0
        for size in sizes:
            with SQLiteStorage(path) as store:
                checkpoints += fill(store, templates, written, size, say)
            written = size
            say(f"measuring at {size:,} runs")
            opening = time.perf_counter()
            with SQLiteStorage(path) as store:
                opened = time.perf_counter() - opening
                found = measure(store, size, given.steps, random.Random(given.seed), used)
                columns.append({"open the store": opened, **found})
            facts.append((f"{size:,}", f"{checkpoints:,}", f"{os.path.getsize(path) / 1e9:.2f} GB"))
        free = shutil.disk_usage(folder).free
    say("done")
    print(file=sys.stderr)
    print(f"seed {given.seed}, {REPEATS} of each, {given.steps} steps a run, {free / 1e9:.0f} GB free at the end\n")
    rows = [["runs", *(fact[0] for fact in facts)], ["checkpoints", *(fact[1] for fact in facts)]]
    rows.append(["the file", *(fact[2] for fact in facts)])
    rows += [[name, *(f"{column[name] * 1e3:.2f} ms" for column in columns)] for name in columns[0]]
    for number, row in enumerate(rows):
        print(f"| {row[0]:<32}|" + "|".join(f"{cell:>14} " for cell in row[1:]) + "|")
        if not number:
            print(f"|{'-' * 33}|" + "|".join("-" * 14 + ":" for _ in row[1:]) + "|")


if __name__ == "__main__":
    main()
