"""Questions inside steps: what is asked once more, tasks that wait, and processes killed around an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from framework.errors import MessageRefused
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.node import NodeContext
from framework.graph.run_view import view_run
from framework.storage.backend import open_storage
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from tests import forks
from tests.journal.journal_kit import Bench, Quiet, loop_graph, question_of


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves, for the steps and for the store."""
    made = Clock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


# --- questions ------------------------------------------------------------------------------------------------------


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("it is odd")
        return value


async def asks_for_an_even_one(ctx: NodeContext) -> Any:
    before = await ctx.call("before", _count)
    return [before, (await ctx.ask("Which?", Even)).number]


_counted: list[str] = []


async def _count() -> str:
    _counted.append("x")
    return "once"


async def test_an_answer_that_only_the_node_can_refuse_opens_the_question_again() -> None:
    _counted.clear()
    bench = Bench(MemoryStorage())
    assert (await bench.run(asks_for_an_even_one)).paused_at == "a"
    question = question_of(bench)
    for wrong in (3, 5):
        bench.manager.send("run", question, {"number": wrong})
        with pytest.raises(MessageRefused, match="answered before"):
            bench.manager.send("run", question, {"number": 4})
        result = await bench.run(asks_for_an_even_one)
        assert (result.success, result.paused_at) == (True, "a"), result.error
        view = view_run(bench.storage, "run")
        [waiting] = view.resume.waiting
        assert (waiting.name, view.resume.verdict) == (question, "waits")
        assert "it is odd" in (waiting.refused or "")
        assert "the last answer was refused" in view.resume.summary
        assert any("asks 'Which?' once more" in text for _, text in bench.runtime.problems)
    bench.manager.send("run", question, {"number": 4})
    assert (await bench.run(asks_for_an_even_one)).output["value"] == ["once", 4]
    assert len(_counted) == 1


async def test_a_program_that_asks_for_less_by_now_asks_again_rather_than_fail() -> None:
    """The answer was recorded, the process ended, and the next version of the program has another validator."""
    bench = Bench(MemoryStorage())
    limit = [10]

    class Small(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def _is_small(cls, value: int) -> int:
            if value > limit[0]:
                raise ValueError("too large")
            return value

    async def body(ctx: NodeContext) -> Any:
        number = (await ctx.ask("Which?", Small)).number
        await ctx.wait_for("go")
        return number

    assert (await bench.run(body)).paused_at == "a"
    question = question_of(bench)
    bench.manager.send("run", question, {"number": 9})
    assert (await bench.run(body)).paused_at == "a"
    limit[0] = 5
    bench.manager.send("run", "go", 1)
    assert (await bench.run(body)).paused_at == "a"
    assert question_of(bench) == question
    bench.manager.send("run", question, {"number": 4})
    assert (await bench.run(body)).output["value"] == 4


async def test_the_same_question_twice_in_a_step_is_two_questions() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        both = await asyncio.gather(ctx.ask("Which?", int), ctx.ask("Which?", int))
        return [*both, await ctx.ask("Which?", int)]

    assert (await bench.run(body)).paused_at == "a"
    first, second = [call.answers_to or "" for call in bench.manager.journal("run")]
    assert first != second
    bench.manager.send("run", second, 2)
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", first, 1)
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", question_of(bench), 3)
    assert (await bench.run(body)).output["value"] == [1, 2, 3]


async def test_the_same_question_in_another_visit_is_another_question() -> None:
    answers: list[Any] = []

    async def body(ctx: NodeContext) -> bool:
        answer = await ctx.ask("Which?", int)
        if answer not in answers:
            answers.append(answer)
        return len(answers) < 2

    graph = loop_graph()
    bench = Bench(MemoryStorage())
    questions = []
    for number in (1, 2):
        assert (await bench.run(body, Quiet(), graph=graph)).paused_at == "a"
        questions.append(question_of(bench))
        bench.manager.send("run", questions[-1], number)
        for old in questions[:-1]:
            with pytest.raises(MessageRefused, match="answered before"):
                bench.manager.send("run", old, 7)
    assert (await bench.run(body, Quiet(), graph=graph)).success
    assert answers == [1, 2]
    assert len(set(questions)) == 2


async def test_a_question_that_its_step_gave_up_takes_no_answer() -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        return ctx.input_data.get("answer") or await ctx.ask("Which?", int)

    async def other(ctx: NodeContext) -> Any:
        return await ctx.wait_for("other")

    assert (await bench.run(body, other)).paused_at == "a"
    question = question_of(bench)
    assert (await bench.run(body, other, input_data={"answer": 42})).paused_at == "b"
    with pytest.raises(MessageRefused, match="no such open question"):
        bench.manager.send("run", question, 1)
    assert bench.storage.read_messages("run") == []


@pytest.mark.parametrize("kind", ["ask", "signal", "sleep"])
async def test_a_fork_of_a_run_that_waits_asks_for_itself(kind: str, clock: Clock) -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        if kind == "sleep":
            await ctx.sleep(100)
            return 7
        first = await ctx.wait_for("go")
        return [first, await (ctx.ask("Which?", int) if kind == "ask" else ctx.wait_for("go"))]

    assert (await bench.run(body)).paused_at == "a"
    if kind != "sleep":
        bench.manager.send("run", "go", "the original's")
        assert (await bench.run(body)).paused_at == "a"
    fork = bench.manager.fork("run", new_run_id="fork")
    assert view_run(bench.storage, fork).resume.verdict == "goes_on"
    assert (await bench.run(body, run_id=fork)).paused_at == "a"
    if kind == "sleep":
        assert bench.storage.find_run(fork).wake_at == clock.now + 100  # type: ignore[union-attr]
        return
    bench.manager.send(fork, "go", "the fork's")
    assert (await bench.run(body, run_id=fork)).paused_at == "a"
    [open_one] = [call for call in bench.manager.journal(fork) if call.state == "waiting"]
    bench.manager.send(fork, open_one.answers_to or "", 7)
    assert (await bench.run(body, run_id=fork)).output["value"] == ["the fork's", 7]
    assert (await bench.run(body)).paused_at == "a", "the original waits on"


# --- tasks of a node ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["gather", "group", "background"])
async def test_everything_that_tasks_of_a_node_wait_for_is_waited_for(way: str, clock: Clock) -> None:
    bench = Bench(MemoryStorage())

    async def body(ctx: NodeContext) -> Any:
        waits = [ctx.sleep(100), ctx.wait_for("x", timeout_seconds=200), ctx.ask("Which?", int), ctx.sleep(50)]
        if way == "gather":
            return (await asyncio.gather(*waits))[1:3]
        if way == "group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(each) for each in waits]
            return [task.result() for task in tasks][1:3]
        background = [asyncio.create_task(each) for each in waits[:-1]]
        await asyncio.sleep(0)
        await waits[-1]
        return [await task for task in background][1:3]

    def waiting() -> list[str]:
        checkpoint = bench.storage.load_latest_checkpoint("run")
        assert checkpoint is not None
        return sorted(each["kind"] for each in checkpoint.position["waits"]["a#1"])

    assert (await bench.run(body)).paused_at == "a"
    assert waiting() == ["answer", "signal", "sleep", "sleep"]
    assert bench.storage.find_run("run").wake_at == clock.now + 50  # type: ignore[union-attr]
    clock.now += 51
    assert (await bench.run(body)).paused_at == "a"
    assert bench.storage.find_run("run").wake_at == 1_000_100.0  # type: ignore[union-attr]
    bench.manager.send("run", "x", "signal")
    assert (await bench.run(body)).paused_at == "a"
    bench.manager.send("run", question_of(bench), 7)
    assert (await bench.run(body)).paused_at == "a"
    clock.now += 100
    assert (await bench.run(body)).output["value"] == ["signal", 7]


# --- processes that are killed --------------------------------------------------------------------------------------

PROGRAM = Path(__file__).with_name("waits_program.py")


def _live(url: str, first: str, die_at: str = "") -> str:
    """One process that works on the run until it pauses or ends; its last line, "killed" when it was."""
    done = forks.run(
        [sys.executable, str(PROGRAM), url, first, die_at],
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    if done.returncode == -signal.SIGKILL:
        return "killed"
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "die_at"),
    [("wait", "claim"), *((kind, at) for kind in ("ask", "wait") for at in ("waiting", "taken", "done", "returned"))],
)
def test_an_answer_survives_a_kill_between_its_arrival_and_the_steps_commit(
    kind: str, die_at: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    before = die_at in ("claim", "waiting")
    if before:
        assert _live(url, kind, die_at) == "killed"
    assert _live(url, kind) == "paused"
    with open_storage(url) as storage:
        name = _answer(storage, 1)
    if not before:
        assert _live(url, kind, die_at) == "killed"
        with open_storage(url) as storage, pytest.raises(MessageRefused, match="answered before|first one|over"):
            CheckpointManager(storage).send("run", name, 9)
    assert _live(url, kind) == "paused"
    with open_storage(url) as storage:
        _answer(storage, 2)
    assert _live(url, kind) == "[1, 2]"


def _answer(storage: Storage, value: int) -> str:
    manager = CheckpointManager(storage)
    [waiting] = [call for call in manager.journal("run") if call.state == "waiting"]
    manager.send("run", waiting.answers_to or "", value)
    return waiting.answers_to or ""
