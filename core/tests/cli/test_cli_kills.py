"""The command is killed, stopped and crowded in the middle of a run; the next one goes on, and nothing is repeated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable

import pytest

from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from tests.cli.cli_kit import Site, Started

Start = Callable[..., Started]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')
KEYS = "keys of house by plan of hill for Ada"


def test_a_killed_run_goes_on_at_once_and_no_finished_step_runs_again(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, HOLD="hand_over")
    running.wait_for("holding")
    assert running.kill() == -signal.SIGKILL
    resumed = site.call("resume", "latest", "-o", "json")
    assert resumed.code == 0
    assert resumed.document["output"]["keys"] == KEYS
    assert resumed.document["steps_recovered"] == 2
    assert site.ledger() == ["survey", "build", "hand_over", "hand_over"]


def test_a_run_killed_again_and_again_still_ends_with_every_step_done_once(site: Site, started: Start) -> None:
    for node in ("survey", "build", "hand_over"):
        words = ("run", site.agent, *INPUT) if node == "survey" else ("resume", "latest")
        running = started(*words, HOLD=node)
        running.wait_for("holding")
        running.kill()
    assert KEYS in site.call("resume", "latest").out
    assert site.ledger() == ["survey", "survey", "build", "build", "hand_over", "hand_over"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_releases_its_lease_and_says_how_to_go_on(site: Site, started: Start, number: int) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    running.wait_for("holding")
    running.signal(number)
    done = running.end()
    assert done.code == 128 + number
    assert "Traceback" not in done.err
    assert "its finished step is kept" in done.err
    assert "surefoot resume house-1" in done.err
    assert done.out == ""
    with open_storage(site.url) as storage:
        record = storage.find_run("house-1")
    assert record is not None
    assert record.owner is None
    if number == signal.SIGINT:  # a person meant this run
        assert record.state is RunState.CANCELLED
        resumed = site.call("resume", "house-1", "-q")
    else:  # the process was to end, not the run
        assert record.state is RunState.CRASHED
        assert "left to the next process" in done.err
        recovered = site.call("recover", "-o", "json")
        assert [each["outcome"] for each in recovered.document["recovered"]] == ["completed"]
        resumed = site.call("resume", "house-1", "-q")
    assert resumed.document["output"]["keys"] == KEYS
    assert site.ledger() == ["survey", "build", "build", "hand_over"]


def test_a_stopped_run_in_json_mode_answers_with_the_document(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", "-o", "json", HOLD="build")
    running.wait_for("holding")
    running.signal(signal.SIGTERM)
    done = running.end()
    document = done.document
    assert document["status"] == "crashed"  # nobody works on it, and whoever looks for such runs takes it up
    assert document["exit_code"] == done.code == 143
    assert document["resume_command"] == "surefoot resume house-1"


def test_a_second_signal_ends_a_run_that_does_not_stop(site: Site, started: Start) -> None:
    stubborn = """
import asyncio, os
async def survey(place):
    print("holding", flush=True)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            print("not now", flush=True)
NODES = {"survey": survey, "build": lambda plan: plan, "hand_over": lambda house: house}
"""
    site.make_agent(nodes=stubborn)
    running = started("run", site.agent, *INPUT, "--run-id", "house-1")
    running.wait_for("holding")
    running.signal(signal.SIGINT)
    running.wait_for("not now")
    running.signal(signal.SIGINT)
    assert running.end().code == 130
    site.make_agent()  # its code, not its graph: the run goes on
    assert site.call("resume", "house-1", "-q").code == 0


def test_a_stop_does_not_wait_for_a_model_call_in_a_thread(site: Site, started: Start) -> None:
    waiting = """
import asyncio, threading
async def survey(place):
    print("holding", flush=True)
    await asyncio.to_thread(threading.Event().wait)
NODES = {"survey": survey, "build": lambda plan: plan, "hand_over": lambda house: house}
"""
    site.make_agent(nodes=waiting)
    running = started("run", site.agent, *INPUT)
    running.wait_for("holding")
    running.signal(signal.SIGTERM)
    assert running.end().code == 143


def test_a_run_that_is_running_elsewhere_exits_5_and_is_left_alone(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    running.wait_for("holding")
    for words in (("resume", "house-1"), ("run", site.agent, "--run-id", "house-1")):
        busy = site.call(*words)
        assert busy.code == 5
        assert "is running elsewhere" in busy.err
        assert len(busy.err.splitlines()) == 1
    nothing = site.call("resume", "latest")
    assert nothing.code == 4
    assert "the unfinished ones are running" in nothing.err
    assert site.call("recover", "-o", "json").document == {"recovered": []}
    running.kill()
    assert site.ledger() == ["survey", "build"]


def test_a_run_that_somebody_cancels_ends_and_can_go_on(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    running.wait_for("holding")
    asked = site.call("runs", "cancel", "house-1", "--yes")
    assert asked.code == 0, asked.err
    done = running.end()
    assert done.code == 1
    assert "cancelled" in done.out.splitlines()[0]
    assert "surefoot resume house-1" in done.out
    assert site.call("resume", "house-1", "-q").document["success"] is True


def test_recover_resumes_every_crashed_run_and_only_those(site: Site, started: Start) -> None:
    for name in ("house-1", "house-2"):
        running = started("run", site.agent, *INPUT, "--run-id", name, HOLD="build")
        running.wait_for("holding")
        running.kill()
    site.call("run", site.agent, *INPUT, "--run-id", "failed-1", FAIL="survey")
    listed = site.call("recover", "--dry-run", "-o", "json").document["recovered"]
    assert [each["run_id"] for each in listed] == ["house-1", "house-2"]
    done = site.call("recover", "--parallel", "2")
    assert done.code == 0
    rows = sorted(line.split()[1:3] for line in done.out.splitlines()[1:])
    assert rows == [["completed", "house-1"], ["completed", "house-2"]]
    assert site.ledger().count("build") == 4
    assert site.call("recover").out == "No run has crashed, and none is due.\n"


def test_recover_says_what_it_could_not_recover_and_goes_on_with_the_rest(site: Site, started: Start) -> None:
    other = site.make_agent("other")
    for name, agent in (("gone-1", other), ("house-1", site.agent)):
        running = started("run", agent, *INPUT, "--run-id", name, HOLD="build")
        running.wait_for("holding")
        running.kill()
    (other / "agent.json").unlink()
    done = site.call("recover", "-o", "json")
    assert done.code == 1
    outcomes = {each["run_id"]: each["outcome"] for each in done.document["recovered"]}
    assert outcomes == {"gone-1": "skipped", "house-1": "completed"}


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the process is stopped with SIGSTOP")
def test_recover_cancels_a_run_that_was_asked_to_stop_and_did_not_live_to_do_it(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    running.wait_for("holding")
    running.signal(signal.SIGSTOP)
    assert "was asked to stop" in site.call("runs", "cancel", "house-1", "--yes").out
    running.kill()
    [foretold] = site.call("recover", "--dry-run", "-o", "json").document["recovered"]
    assert (foretold["outcome"], foretold["error"]) == (
        "crashed",
        "it was asked to stop before its process ended; would be cancelled",
    )
    done = site.call("recover")
    assert done.code == 0
    row, problem = [line for line in done.out.splitlines() if "house-1" in line]
    assert "cancelled" in row
    assert problem.startswith("house-1: ")
    assert "asked to stop before its process ended" in done.out
    assert site.ledger() == ["survey", "build"], "nothing ran again"
    [run] = site.call("runs", "list", "-o", "json").document["runs"]
    assert run["state"] == "cancelled"
    assert site.call("recover").out == "No run has crashed, and none is due.\n"
    assert site.call("resume", "house-1", "-q").document["success"] is True


def test_recover_watches_until_it_is_stopped(site: Site, started: Start) -> None:
    watching = started("recover", "--watch", "--interval", "0.1", "-o", "json")
    watching.wait_for("Looking for crashed")
    running = started("run", site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    running.wait_for("holding")
    running.kill()
    watching.wait_for("hand_over")
    watching.signal(signal.SIGINT)
    done = watching.end()
    assert done.code == 130
    assert [each["run_id"] for each in done.document["recovered"]] in ([], ["house-1"])
    assert site.call("resume", "house-1", "-q").document["success"] is True
    assert site.ledger() == ["survey", "build", "build", "hand_over"]


def test_a_reader_who_goes_away_does_not_stop_the_run(site: Site) -> None:
    # As in `surefoot run ... 2>&1 | head -1`: both streams end after the first line, the run does not.
    shell = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | head -1', "bash", *site.command("run", site.agent, *INPUT)],
        capture_output=True,
        text=True,
        cwd=site.folder,
        env=site.environment(),
    )
    assert len(shell.stdout.splitlines()) == 1
    assert shell.stderr == ""
    assert site.ledger() == ["survey", "build", "hand_over"]
    assert site.call("resume", "run_", "-q").document["output"]["keys"] == KEYS


def test_a_table_whose_reader_goes_away_ends_quietly(site: Site) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        site.command("info", site.agent), stdout=write, stderr=subprocess.PIPE, cwd=site.folder, env=site.environment()
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_any_moment_never_repeats_a_finished_step(site: Site, started: Start, seed: int) -> None:
    chance = random.Random(seed)
    order = ["survey", "build", "hand_over"]
    words: tuple[object, ...] = ("run", site.agent, *INPUT, "--run-id", "house-1")
    for _ in range(20):
        life = started(*words, PACE="0.1")
        try:
            # A moment anywhere between the import of the library and the last commit.
            done = life.process.wait(timeout=chance.uniform(0.2, 1.5))
        except subprocess.TimeoutExpired:
            life.kill()
        else:
            assert done == 0
            break
    assert site.call("run", site.agent, *INPUT, "--run-id", "house-1", "-q").document["output"]["keys"] == KEYS
    # A step that is finished never runs again, so the ledger never goes back to an earlier one.
    places = [order.index(node) for node in site.ledger()]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2}
