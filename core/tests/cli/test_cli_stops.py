"""``recover`` among agents that fail, and stops of it: no run is lost to the next look, and none keeps another back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.graph.cancelling import LET_GO
from framework.graph.run_events import RunEvent
from framework.runner.cli import recovering
from framework.runner.cli.agents import Choices, folder_of, load_agent
from framework.runner.cli.exits import CommandError
from framework.runner.cli.running import Loop
from framework.runner.cli.settings import Settings
from framework.runner.runner import AgentRunner
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from tests.cli.cli_kit import Done, Site, Started

Here = Callable[..., Done]
Start = Callable[..., Started]

GIVEN = {"place": "hill", "buyer": "Ada"}
INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')
KEYS = "keys of house by plan of hill for Ada"


def leave(site: Site, agent: Path, run_id: str, **options: Any) -> None:
    """A run that a process let go while it was building."""

    async def go() -> None:
        inside = asyncio.Event()

        def watch(event: RunEvent) -> None:
            if event.kind == "step_started" and event.node_id == "build":
                inside.set()

        with open_storage(site.url) as storage:
            async with AgentRunner.load(agent, storage=storage, **options) as runner:
                runner.runtime.add_listener(watch)
                task = asyncio.create_task(runner.run(GIVEN, run_id=run_id))
                await inside.wait()
                task.cancel(LET_GO)
                await asyncio.gather(task, return_exceptions=True)

    os.environ["HOLD"] = "build"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            asyncio.run(go())
    finally:
        del os.environ["HOLD"]


def outcomes(done: Done) -> dict[str, str]:
    return {each["run_id"]: each["outcome"] for each in done.document["recovered"]}


def state_of(site: Site, run_id: str) -> RunState:
    with open_storage(site.url) as storage:
        record = storage.find_run(run_id)
    assert record is not None
    return record.state


# --- agents that fail -------------------------------------------------------------------------------------------------


def test_an_agent_whose_code_raises_anything_fails_alone(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = site.make_agent("bad")
    leave(site, bad, "bad-1")
    leave(site, site.agent, "house-1")

    def load(settings: Settings, folder: Path, *rest: Any) -> AgentRunner:
        if folder.name == "bad":
            raise KeyError("MY_ENDPOINT_NAME")
        return load_agent(settings, folder, *rest)

    monkeypatch.setattr(recovering, "load_agent", load)
    done = here("recover", "-o", "json")
    assert done.code == 1
    assert outcomes(done) == {"bad-1": "failed", "house-1": "completed"}
    assert done.document["recovered"][0]["error"] == "KeyError: 'MY_ENDPOINT_NAME'"
    assert state_of(site, "bad-1") is RunState.CRASHED


def test_an_agent_that_ends_the_process_fails_alone(here: Here, site: Site) -> None:
    other = site.make_agent("other")
    leave(site, other, "other-1")
    leave(site, site.agent, "house-1")
    (other / "nodes.py").write_text(
        "import sys\nasync def build(plan): sys.exit(3)\n"
        "NODES = {'survey': lambda place: place, 'build': build, 'hand_over': lambda house: house}\n"
    )
    done = here("recover", "-o", "json")
    assert done.code == 1
    assert outcomes(done) == {"other-1": "failed", "house-1": "completed"}
    assert "sys.exit(3)" in done.document["recovered"][0]["error"]


def test_a_step_among_many_that_ends_the_process_is_met_by_who_waits_for_it() -> None:
    async def ends() -> None:
        raise SystemExit(3)

    async def meets() -> str:
        task = asyncio.create_task(ends())
        try:
            await task
        except SystemExit as error:
            return f"met {error}"
        return "not met"

    with Loop() as loop:
        assert loop.run(meets) == "met 3"
        with pytest.raises(CommandError, match=r"sys.exit\(3\)"):
            loop.run(ends)


def test_a_run_whose_agent_cannot_be_told_keeps_no_other_back(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(site, site.agent, "house-1")
    leave(site, site.agent, "house-2")
    real = folder_of

    def unreadable(record: Any, given: str | None) -> Path:
        if record.run_id == "house-1":
            raise RuntimeError("cannot be read")
        return real(record, given)

    monkeypatch.setattr(recovering, "folder_of", unreadable)
    assert outcomes(here("recover", "-o", "json")) == {"house-1": "failed", "house-2": "completed"}


def test_a_run_that_could_not_be_taken_up_is_tried_again_and_told_of_once(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(site, site.agent, "house-1")
    tries: list[str] = []

    def load(settings: Settings, folder: Path, *rest: Any) -> AgentRunner:
        tries.append(folder.name)
        if len(tries) < 4:
            raise OSError("no network" if len(tries) < 3 else "no disk")
        os.kill(os.getpid(), signal.SIGINT)  # it loads, and the watching ends
        return load_agent(settings, folder, *rest)

    monkeypatch.setattr(recovering, "load_agent", load)
    done = here("recover", "--watch", "--interval", "0.1")
    assert len(tries) == 4
    told = [line for line in done.out.splitlines() if "failed" in line]
    assert ["no network" in told[0], "no disk" in told[1], len(told)] == [True, True, 2]


def test_runs_of_another_folder_of_the_same_name_are_left_alone(here: Here, site: Site) -> None:
    (site.folder / "theirs").mkdir()
    theirs = site.make_agent("theirs/builder")
    leave(site, theirs, "theirs-1")
    leave(site, site.agent, "ours-1")
    done = here("recover", "--agent", site.agent, "-o", "json")
    assert outcomes(done) == {"ours-1": "completed"}
    theirs.rename(site.folder / "gone")
    assert outcomes(here("recover", "--agent", site.agent, "-o", "json")) == {"theirs-1": "completed"}


def test_being_let_go_does_not_count_as_crashing(here: Here, site: Site) -> None:
    """As by one deploy after another during a long step."""
    for _ in range(CheckpointConfig().max_recovery_attempts + 2):
        leave(site, site.agent, "house-1")
    with open_storage(site.url) as storage:
        record = storage.find_run("house-1")
        assert record is not None
        assert record.recovery_attempts == 0
    assert outcomes(here("recover", "-o", "json")) == {"house-1": "completed"}


# --- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [(), ("--watch", "--interval", "0.1")], ids=["once", "watching"])
def test_a_stopped_recovery_leaves_its_runs_to_the_next(
    here: Here, site: Site, started: Start, number: int, words: tuple[str, ...]
) -> None:
    leave(site, site.agent, "house-1")
    running = started("recover", *words, HOLD="build")
    running.wait_for("holding")
    running.signal(number)
    done = running.end()
    assert done.code == 128 + number
    assert "Left to the next process, their finished steps kept: house-1." in done.err
    assert "  surefoot recover\n" in done.err
    assert "  surefoot resume house-1\n" in done.err
    assert "interrupted" in done.out
    assert state_of(site, "house-1") is RunState.CRASHED
    assert outcomes(here("recover", "-o", "json")) == {"house-1": "completed"}


def test_a_run_that_ends_while_it_is_being_stopped_gives_its_result(here: Here, site: Site) -> None:
    (site.agent / "nodes.py").write_text(
        "import os, signal\n"
        "async def hand_over(house, buyer):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return f'keys of {house}'\n"
        "NODES = {'survey': lambda place: place, 'build': lambda plan: plan, 'hand_over': hand_over}\n"
    )
    done = here("run", site.agent, *INPUT, "--run-id", "house-1", "-o", "json")
    assert state_of(site, "house-1") is RunState.COMPLETED
    assert done.code == 0
    assert done.document["output"]["keys"] == "keys of hill"


# --- what is recorded with a run --------------------------------------------------------------------------------------


def test_the_endpoint_that_was_recorded_is_used_again(here: Here, site: Site) -> None:
    url = "http://127.0.0.1:9/v1"
    facts = {"base_url": url}
    assert load_agent(Settings(), site.agent, Choices(), None, facts).base_url == url
    other = Choices(base_url="http://127.0.0.1:8/v1")
    assert load_agent(Settings(), site.agent, other, None, facts).base_url == other.base_url
    leave(site, site.agent, "house-1", base_url=url)
    used: list[str | None] = []

    def load(*arguments: Any) -> AgentRunner:
        runner = load_agent(*arguments)
        used.append(runner.base_url)
        return runner

    with pytest.MonkeyPatch.context() as patch:
        for module in ("recovering", "commands_agent", "forking"):
            patch.setattr(f"framework.runner.cli.{module}.load_agent", load)
        assert here("fork", "house-1", "--resume", "-q").code == 0
        assert here("recover").code == 0
        assert here("resume", "house-1").code == 0
    assert used == [url] * 3
