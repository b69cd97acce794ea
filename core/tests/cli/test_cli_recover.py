"""``surefoot recover``: as a worker beside others, with failed runs, and with runs that are given up."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from framework.runner.cli import recovering
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.records import RunRecord
from tests.cli.cli_kit import Done, Site, Started

Start = Callable[..., Started]
Here = Callable[..., Done]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')


def record_of(site: Site, run_id: str) -> RunRecord:
    with open_storage(site.url) as storage:
        found = storage.find_run(run_id)
    assert found is not None
    return found


def crash_by_itself(site: Site) -> None:
    """An agent whose node ends the process, as a native library does."""
    nodes = (
        "import os\nasync def survey(place): return place\n"
        "async def build(plan): os._exit(139)\n"
        "NODES = {'survey': survey, 'build': build, 'hand_over': lambda house: house}\n"
    )
    site.make_agent(nodes=nodes)


def test_what_a_worker_told_is_kept_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that it could not take up, and that others have finished or deleted since."""
    monkeypatch.setattr(recovering, "_MOST_SHOWN", 3)
    told = recovering.Told()
    for number in range(10):
        failed = recovering.Recovered(f"r{number}", None, "failed", error="no")
        assert [told.is_new(failed), told.is_new(failed)] == [True, False]
    assert list(told._last) == ["r7", "r8", "r9"]
    assert told.is_new(recovering.Recovered("r9", None, "failed", error="another"))
    assert told.is_new(recovering.Recovered("r9", None, "completed"))
    assert told.is_new(recovering.Recovered("r9", None, "failed", error="another"))
    assert list(told._last) == ["r7", "r8", "r9"]


def test_a_run_that_ends_its_process_each_time_is_given_up_and_shown_so(site: Site, here: Here) -> None:
    crash_by_itself(site)
    assert site.call("run", site.agent, *INPUT, "--run-id", "r").code == 139
    for _ in range(2):
        assert site.call("recover", "--max-attempts", "2").code == 139
    listed = here("runs", "list", "-o", "json").document["runs"]
    assert [(each["state"], each["recovery_attempts"], each["given_up"]) for each in listed] == [("crashed", 2, False)]
    done = here("recover", "--max-attempts", "2", "-o", "json")
    assert done.code == 1
    [outcome] = done.document["recovered"]
    assert outcome["outcome"] == "failed"
    assert "ended its process 3 times in a row" in outcome["error"]
    assert "'build'" in outcome["error"]
    assert record_of(site, "r").state is RunState.FAILED
    listed = here("runs", "list", "-o", "json").document["runs"]
    assert [(each["state"], each["given_up"]) for each in listed] == [("failed", True)]
    assert "given up" in here("runs", "list").out
    shown = here("runs", "show", "r")
    assert "given up after crashing again and again" in shown.out
    assert here("runs", "show", "r", "-o", "json").document["given_up"] is True
    assert here("recover", "--failed").out == "No run has crashed, and none is due.\n", "it is for a person"
    site.make_agent()
    assert here("resume", "r", "-q").document["success"] is True
    assert [each["given_up"] for each in here("runs", "list", "-o", "json").document["runs"]] == [False]


def test_failed_runs_are_taken_up_when_asked_for(site: Site, here: Here) -> None:
    assert site.call("run", site.agent, *INPUT, "--run-id", "r", FAIL="build").code == 1
    assert here("recover").out == "No run has crashed, and none is due.\n"
    [told] = here("recover", "--failed", "--dry-run", "-o", "json").document["recovered"]
    assert (told["outcome"], told["run_id"]) == ("failed", "r")
    [done] = here("recover", "--failed", "-o", "json").document["recovered"]
    assert done["outcome"] == "completed"
    ledger = site.ledger()
    assert ledger.count("survey") == 1
    assert ledger[-2:] == ["build", "hand_over"]


def test_a_worker_has_no_limit(here: Here) -> None:
    done = here("recover", "--watch", "--limit", "3")
    assert done.code == 2
    assert "--watch looks for ever" in done.err


def test_sigterm_lets_the_step_in_flight_end(site: Site, started: Start) -> None:
    running = started("run", site.agent, *INPUT, "--run-id", "r", PACE="0.7", SUREFOOT_GRACE_SECONDS="30")
    running.wait_for("survey")  # it has ended, and build has begun
    running.signal(signal.SIGTERM)
    done = running.end()
    assert done.code == 128 + signal.SIGTERM
    assert "Stopping at the next commit, within 30 s (SIGTERM)" in done.err
    record = record_of(site, "r")
    assert (record.state, record.owner) == (RunState.CRASHED, None)
    finished = site.ledger()
    assert site.call("recover", "-o", "json").document["recovered"][0]["steps_recovered"] == len(finished)
    assert site.ledger() == ["survey", "build", "hand_over"], "nothing ran twice"


def test_a_worker_that_is_stopped_lets_the_steps_in_flight_end(site: Site, started: Start) -> None:
    for run_id in ("one", "two"):
        running = started("run", site.agent, *INPUT, "--run-id", run_id, HOLD="build")
        running.wait_for("holding")
        running.kill()
    words = ("recover", "--watch", "--interval", "0.1", "--concurrency", "2")
    watching = started(*words, PACE="1", SUREFOOT_GRACE_SECONDS="30")
    for _ in range(2):
        watching.wait_for("goes on")
    watching.signal(signal.SIGTERM)
    done = watching.end()
    assert done.code == 128 + signal.SIGTERM
    assert "Left to the next process" in done.err
    for run_id in ("one", "two"):
        assert record_of(site, run_id).owner is None
        assert run_id in done.err
    assert site.call("recover", "--concurrency", "2").code == 0
    ledger = sorted(site.ledger())
    assert ledger == ["build"] * 4 + ["hand_over"] * 2 + ["survey"] * 2, "each build ran again once, for its crash"


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_a_grace_that_is_no_number_is_refused(site: Site, given: str) -> None:
    done = site.call("run", site.agent, *INPUT, SUREFOOT_GRACE_SECONDS=given)
    assert done.code == 2
    assert "SUREFOOT_GRACE_SECONDS is a number of seconds" in done.err
