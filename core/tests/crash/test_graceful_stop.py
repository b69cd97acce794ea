"""SIGTERM on real processes: a run stops at its next commit, is released, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from framework.runner.stopping import graceful_stop
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.checkpoints import parse_log
from framework.storage.records import RunRecord
from tests import forks

CORE = Path(__file__).parents[2]
PATIENCE_SECONDS = 50

PROGRAM = """
import asyncio, sys, time
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.executor import GraphExecutor
from framework.runner.stopping import graceful_stop
from framework.runtime import Runtime
from framework.storage import ownership
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from tests.crash.worker_program import GOAL, graph

async def main():
    with open_storage(sys.argv[1]) as storage:
        executor = GraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=CheckpointManager(storage))
        executor.register_function("a", lambda **_: {})
        executor.register_function("b", b)
        executor.register_function("c", c)
        async with graceful_stop(GRACE) as stop:
            result = await executor.execute(graph(), GOAL, run_id="r")
            print("done", result.success, stop.asked, flush=True)
        print("after", flush=True)

async def c(**_):
    print("in c", flush=True)
    await asyncio.Event().wait()
"""

RUN = """
asyncio.run(main())
"""


class Program:
    """A user's program on a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder}/runs.db"
        self.process: subprocess.Popen[str] | None = None

    def start(self, node: str, grace: float) -> subprocess.Popen[str]:
        source = PROGRAM.replace("GRACE", repr(grace)) + textwrap.dedent(node) + RUN
        self.process = forks.Popen(
            [sys.executable, "-c", source, self.url],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == "in b", self.process.communicate()[1]
        return self.process

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        assert self.process is not None
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert "Traceback" not in errors, errors
        return self.process.returncode, output

    def record(self) -> RunRecord:
        with open_storage(self.url) as storage:
            found = storage.find_run("r")
        assert found is not None
        return found

    def steps(self) -> list[str]:
        with open_storage(self.url) as storage:
            return [record.get("node") or record["kind"] for record in parse_log(storage.read_log("r"))]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def released(program: Program) -> None:
    """The run is free for the next process at once, and that is no crash."""
    record = program.record()
    assert (record.state, record.owner, record.error) == (RunState.CRASHED, None, None)
    with open_storage(program.url) as storage:
        assert storage.claim_run("r", "next", 60).recovery_attempts == 0


def test_a_step_in_flight_ends_and_is_committed(program: Program) -> None:
    program.start(
        """
        async def b(**_):
            print("in b", flush=True)
            await asyncio.sleep(0.5)
            return {"b": 1}
        """,
        grace=30,
    )
    assert program.end() == (128 + signal.SIGTERM, "")
    assert program.steps() == ["a", "b", "let_go"]
    released(program)


def test_a_step_that_takes_longer_than_the_grace_is_cut(program: Program) -> None:
    program.start(
        """
        async def b(**_):
            print("in b", flush=True)
            await asyncio.Event().wait()
        """,
        grace=0.2,
    )
    assert program.end() == (128 + signal.SIGTERM, "")
    assert program.steps() == ["a", "let_go"]
    released(program)


def test_a_step_that_blocks_the_loop_is_ended_with_the_process(program: Program) -> None:
    program.start(
        """
        async def b(**_):
            print("in b", flush=True)
            time.sleep(1000)
        """,
        grace=0.2,
    )
    began = time.monotonic()
    assert program.end()[0] == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20, "the grace and a few seconds"
    assert program.steps() == ["a"]
    released(program)


def test_a_second_signal_ends_the_process_at_once(program: Program) -> None:
    process = program.start(
        """
        async def b(**_):
            print("in b", flush=True)
            while True:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    print("not now", flush=True)
        """,
        grace=0,
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "not now\n"
    code, _ = program.end()
    assert code == 128 + signal.SIGTERM
    assert program.record().state is RunState.RUNNING, "a crash, which the next process sees"


def test_a_run_that_ends_while_it_is_being_stopped_gives_its_result(program: Program) -> None:
    program.start(
        """
        async def b(**_):
            print("in b", flush=True)
            await asyncio.sleep(0.3)
            return {}

        async def c(**_):
            return {}

        whole = graph

        def graph():
            found = whole()
            return found.model_copy(
                update={"terminal_nodes": ["b"], "edges": found.edges[:1], "nodes": found.nodes[:2]}
            )
        """,
        grace=30,
    )
    assert program.end() == (0, "done True True\nafter\n")
    assert program.record().state is RunState.COMPLETED


def test_it_is_for_the_main_thread() -> None:
    async def enter() -> None:
        async with graceful_stop():
            raise AssertionError("it was entered")

    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread of the program only"):
        pool.submit(asyncio.run, enter()).result()


async def test_a_block_that_nobody_stops_leaves_everything_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with graceful_stop() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
        await asyncio.sleep(0)
    assert not stop.asked
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(TimeoutError):  # a cancellation that is not its own passes through
        async with asyncio.timeout(0.01), graceful_stop():
            await asyncio.Event().wait()
