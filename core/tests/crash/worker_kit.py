"""Starts processes of ``worker_program`` on one store, and reads what they did from the ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.records import RunRecord
from tests import forks

PROGRAM = Path(__file__).with_name("worker_program.py")
CORE = Path(__file__).parents[2]
PATIENCE_SECONDS = 50.0


@dataclass
class Fleet:
    """Processes on one store. Those that are left are killed at the end."""

    folder: Path
    url: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def start(self, mode: str, **told: Any) -> subprocess.Popen[str]:
        arguments = {"mode": mode, "url": self.url, "ledger": str(self.ledger), **told}
        process = forks.Popen(
            [sys.executable, str(PROGRAM), json.dumps(arguments)],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def crash(self, *runs: str, **told: Any) -> int:
        """Runs whose process is killed while each is inside ``b``; the process's number."""
        process = self.start("start", runs=list(runs), **told)
        self.expect(process, "ready")
        process.kill()
        process.wait(PATIENCE_SECONDS)
        return process.pid

    def expect(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline().strip()
        assert said == line, (said, process.stderr.read() if process.poll() is not None else "")

    def end(self, process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code."""
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Traceback" not in errors, errors
        return process.returncode

    def events(self, event: str = "start", pid: int | None = None) -> list[dict[str, Any]]:
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        read = [json.loads(line) for line in lines]
        return [each for each in read if each["event"] == event and pid in (None, each["pid"])]

    def record(self, run_id: str) -> RunRecord:
        with open_storage(self.url) as storage:
            found = storage.find_run(run_id)
        assert found is not None
        return found

    def wait_until_completed(self, count: int) -> None:
        with open_storage(self.url) as storage:
            until(lambda: len(storage.list_runs([RunState.COMPLETED], limit=count)) == count)
            report = storage.verify()
            assert report.ok, report.damage


def until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Return once it holds. What is waited for happens in another process, so nothing here could be awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@contextmanager
def fleet_on(folder: Path, url: str) -> Iterator[Fleet]:
    """A fleet whose processes are gone at the end."""
    fleet = Fleet(folder, url)
    try:
        yield fleet
    finally:
        for process in fleet.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
