"""Runs the agent in one process: starts the run, goes on with it, or shows its stored result.

    python examples/research_agent/run.py

The store is ``research.db`` unless --storage names another. Stop the program whenever you like (Ctrl-C, kill -9) and
give the same command again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import GOAL, QUESTION, build_executor, build_graph
from ledger import Ledger

from framework.errors import SurefootError
from framework.graph.executor import ExecutionResult
from framework.storage.backend import open_storage


def main() -> int:
    """Exit code 0: the run is completed; 1: it failed or was refused; 130: interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--storage", default="sqlite:///research.db", metavar="URL")
    parser.add_argument("--run-id", default="mine", metavar="ID")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="append what is done and paid to this file")
    parser.add_argument("--seed", type=int, default=0, help="changes how long each model call takes")
    parser.add_argument("--pace", type=float, default=1.0, metavar="X", help="0: at once, 2: twice as slow")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if not options.json:
        print(f"Process {os.getpid()}, run {options.run_id!r} in {options.storage}")
    try:
        result = asyncio.run(run(options))
    except SurefootError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept: give the same command again.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(asdict(result), default=str))
    else:
        report(result)
    return 0 if result.success else 1


async def run(options: argparse.Namespace) -> ExecutionResult:
    """Start, resume or return the run."""
    with open_storage(options.storage) as storage:
        ledger = Ledger(options.ledger, options.run_id, None if options.json else tell)
        executor = build_executor(storage, ledger, seed=options.seed, pace=options.pace)
        return await executor.execute(build_graph(), GOAL, {"question": QUESTION}, run_id=options.run_id)


def tell(entry: dict[str, Any]) -> None:
    """Print what begins, as it begins."""
    if entry["kind"] == "body":
        print(f"  {entry['node']}", flush=True)


def report(result: ExecutionResult) -> None:
    """Print a result for a person."""
    if not result.success:
        print(f"Failed: {result.error}")
        return
    print(f"{result.steps_executed} steps, of which {result.steps_recovered} were recovered and not run again")
    print(f"Path: {' > '.join(result.path)}")
    print(f"Answer: {result.output['answer']}")


if __name__ == "__main__":
    sys.exit(main())
