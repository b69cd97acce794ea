"""One run, several processes: one owns it, the others are told so; a stale owner changes nothing."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, open_storage
from framework.storage.records import LogRow, RunRecord
from framework.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from tests.crash.conftest import Lab, Reference

BACKENDS = ["sqlite", "file"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_two_processes_one_runs_and_the_other_is_told(
    make_lab: Callable[..., Lab], expected: Reference, backend: str
) -> None:
    lab = make_lab(backend=backend)
    both = [lab.start(hold="node.before:3") for _ in range(2)]
    for process in both:
        lab.expect(process, "ready")
    said = [lab.expect(process, "held") for process in both]
    assert sorted(line[:7] for line in said) == ["held", '{"busy"'], said
    winner, loser = both if said[0] == "held" else reversed(both)
    loser.communicate()
    assert f"/{winner.pid}/" in said[both.index(loser)]
    result = lab.finish(winner)
    assert {event["pid"] for event in lab.events()} == {winner.pid}
    lab.check_finished(expected, result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_sigkill_nobody_waits_for_the_lease(
    make_lab: Callable[..., Lab], expected: Reference, backend: str
) -> None:
    lab = make_lab(backend=backend, config={"lease_seconds": 3600.0})
    assert lab.live(fault="node.inside:7").result is None
    life = lab.live()
    assert life.result is not None
    assert "busy" not in life.result
    lab.check_nothing_repeated()
    lab.check_finished(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_owner_is_replaced_and_changes_nothing_when_it_wakes(
    make_lab: Callable[..., Lab], expected: Reference, backend: str
) -> None:
    lab = make_lab(backend=backend, config={"lease_seconds": 0.6})
    stopped = lab.start(hold="node.inside:6")
    lab.expect(stopped, "ready")
    lab.expect(stopped, "held")
    _stop(lab, stopped)
    taker = lab.start(hold="node.inside:3")
    lab.expect(taker, "ready")
    while lab.expect(taker, "held") != "held":  # it exists, so only the end of its lease frees the run
        taker.communicate()
        assert _run(lab).state in (RunState.RUNNING, RunState.CRASHED)
        taker = lab.start(hold="node.inside:3")
        lab.expect(taker, "ready")
    before = _log(lab)

    stopped.send_signal(signal.SIGCONT)
    refused = lab.finish(stopped)
    assert refused["raised"] == "LeaseLost", refused
    assert _log(lab) == before
    assert _run(lab).state is RunState.RUNNING

    result = lab.finish(taker)
    first, second = lab.started(stopped.pid), lab.started(taker.pid)
    assert set(first) & set(second) == {first[-1]}, "only the step in flight runs again"
    lab.check_finished(expected, result)


def test_a_lease_is_renewed_while_a_node_works(make_lab: Callable[..., Lab], expected: Reference) -> None:
    lab = make_lab(config={"lease_seconds": 2.0})
    owner = lab.start(hold="node.inside:2")
    lab.expect(owner, "ready")
    lab.expect(owner, "held")
    first = _run(lab).lease_until
    deadline = time.monotonic() + 20
    while _run(lab).lease_until <= first:
        assert _run(lab).state is RunState.RUNNING
        assert time.monotonic() < deadline, "the lease was not renewed"
        time.sleep(0.02)
    assert "busy" in (lab.live().result or {})
    lab.check_finished(expected, lab.finish(owner))


def _stop(lab: Lab, process: subprocess.Popen[str]) -> None:
    """Stop a process while it is not writing, such as renewing its lease: nobody could write until it went on."""
    with open_storage(lab.url) as storage:
        if isinstance(storage, FileStorage):
            with storage._run_lock(lab.run_id, "stop the owner of"):
                process.send_signal(signal.SIGSTOP)
        else:
            assert isinstance(storage, SQLiteStorage)
            with storage._write("stop the owner"):
                process.send_signal(signal.SIGSTOP)


def _run(lab: Lab) -> RunRecord:
    with open_storage(lab.url) as storage:
        run = storage.find_run(lab.run_id)
        assert run is not None
        return run


def _log(lab: Lab) -> list[LogRow]:
    with open_storage(lab.url) as storage:
        return storage.read_log(lab.run_id)
