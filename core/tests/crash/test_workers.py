"""Workers in processes of their own: each crashed run is resumed by exactly one, soon, and nothing alive is taken."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.checkpoints import parse_log
from tests.crash.worker_kit import PATIENCE_SECONDS, Fleet, fleet_on, until
from tests.postgres_server import running_postgres

BACKENDS = ["sqlite", "file", "postgres"]


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    backend = request.param
    if backend == "postgres":
        url = request.getfixturevalue("postgres_url")
    else:
        url = f"sqlite:///{tmp_path}/runs.db" if backend == "sqlite" else f"file://{tmp_path}/store"
    with fleet_on(tmp_path, url) as made:
        yield made


ON_DATABASES = ["sqlite", "postgres"]
on_each = pytest.mark.parametrize("fleet", BACKENDS, indirect=True)


def waits_on(chosen: str) -> pytest.MarkDecorator:
    """For tests that wait for leases to end: on one backend, and on the others in the slow tests."""
    return pytest.mark.parametrize(
        "fleet",
        [chosen, *(pytest.param(other, marks=pytest.mark.slow) for other in BACKENDS if other != chosen)],
        indirect=True,
    )


@pytest.mark.parametrize(
    ("fleet", "count"),
    [
        *((backend, 40) for backend in ON_DATABASES),
        *(pytest.param(backend, 200, marks=pytest.mark.slow) for backend in ON_DATABASES),
    ],
    indirect=["fleet"],
)
def test_eight_workers_on_many_crashed_runs(fleet: Fleet, count: int) -> None:
    runs = [f"run-{number:03}" for number in range(count)]
    dead = fleet.crash(*runs)
    workers = [fleet.start("work") for _ in range(8)]
    fleet.wait_until_completed(len(runs))
    for worker in workers:
        assert fleet.end(worker) == 128 + signal.SIGTERM
    resumed = [each for each in fleet.events() if each["pid"] != dead]
    assert Counter((each["run"], each["node"]) for each in resumed) == Counter(itertools.product(runs, "bc"))
    owners = {run: {each["pid"] for each in resumed if each["run"] == run} for run in runs}
    assert all(len(pids) == 1 for pids in owners.values()), "each was resumed by exactly one"
    assert {node for each in fleet.events(pid=dead) if (node := each["node"])} == {"a", "b"}


@on_each
def test_a_worker_restarted_under_the_same_name_takes_nothing_that_is_alive(fleet: Fleet) -> None:
    """Of the same host, with the same arguments: as a supervisor restarts one of several."""
    alive = fleet.start("start", runs=["alive"], grace=0)
    fleet.expect(alive, "ready")
    fleet.crash("left")
    for _ in range(2):
        worker = fleet.start("work", interval=0.1)
        fleet.expect(worker, "looking")
        fleet.wait_until_completed(1)
        assert fleet.end(worker) == 128 + signal.SIGTERM
        taken = {each["run"] for process in fleet.processes[2:] for each in fleet.events(pid=process.pid)}
        assert taken == {"left"}
    assert fleet.record("alive").state is RunState.RUNNING
    assert fleet.record("alive").token == 1
    assert fleet.end(alive) == 128 + signal.SIGTERM


@waits_on("postgres")
def test_failover_takes_a_lease_and_one_poll_at_most(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """From another machine, which only has the lease to go by."""
    lease, poll = 1.5, 0.5
    owner = fleet.start("start", runs=["r"], elsewhere="there", config={"lease_seconds": lease})
    fleet.expect(owner, "ready")
    worker = fleet.start("work", interval=poll, config={"lease_seconds": lease})
    fleet.expect(worker, "looking")
    renewed = fleet.record("r").lease_until
    until(lambda: fleet.record("r").lease_until > renewed)
    killed = time.clock_gettime(time.CLOCK_MONOTONIC)
    owner.kill()
    fleet.wait_until_completed(1)
    [taken] = [each for each in fleet.events(pid=worker.pid) if each["node"] == "b"]
    took = taken["at"] - killed
    with capsys.disabled():
        print(f"\nfailover on {fleet.url.partition(':')[0]}: {took:.2f} s (lease {lease} s, poll {poll} s)")
    assert took <= 5 * (lease + poll), "the machine may be loaded"
    assert fleet.end(worker) == 128 + signal.SIGTERM


@waits_on("file")
def test_a_clock_that_jumps_in_a_worker_changes_nothing(fleet: Fleet) -> None:
    """Hours ahead it takes nothing that is alive; hours behind it keeps its run, and loses it when it dies."""
    behind = fleet.start("start", runs=["r"], elsewhere="there", clock=-7200, config={"lease_seconds": 0.6})
    fleet.expect(behind, "ready")
    ahead = fleet.start("work", clock=7200, interval=0.1)
    fleet.expect(ahead, "looking")
    first = fleet.record("r").lease_until
    for _ in range(3):
        until(lambda first=first: fleet.record("r").lease_until > first)  # type: ignore[misc]
        first = fleet.record("r").lease_until
        assert fleet.record("r").token == 1
    behind.kill()
    fleet.wait_until_completed(1)
    assert {each["pid"] for each in fleet.events() if each["node"] == "c"} == {ahead.pid}
    assert fleet.end(ahead) == 128 + signal.SIGTERM


@waits_on("sqlite")
def test_a_node_that_blocks_for_several_leases_keeps_its_run(fleet: Fleet) -> None:
    busy = fleet.start("start", runs=["r"], elsewhere="there", block=2.5, config={"lease_seconds": 0.5})
    fleet.expect(busy, "ready")
    worker = fleet.start("work", interval=0.05)
    fleet.expect(worker, "looking")
    output, errors = busy.communicate(timeout=PATIENCE_SECONDS)
    assert output == "[true]\n", errors
    assert fleet.record("r").token == 1
    assert not fleet.events(pid=worker.pid)
    assert fleet.end(worker) == 128 + signal.SIGTERM


@on_each
def test_a_zombie_is_stopped_in_the_middle_of_its_step(fleet: Fleet) -> None:
    """Its heartbeat finds out what its commit would: nothing waits for the step to end."""
    zombie = fleet.start("start", runs=["r"], elsewhere="there", config={"lease_seconds": 0.6})
    fleet.expect(zombie, "ready")
    zombie.send_signal(signal.SIGSTOP)
    worker = fleet.start("work", interval=0.1)
    fleet.expect(worker, "looking")
    fleet.wait_until_completed(1)
    before = fleet.record("r")
    zombie.send_signal(signal.SIGCONT)
    fleet.expect(zombie, "LeaseLost")
    zombie.communicate(timeout=PATIENCE_SECONDS)
    assert zombie.returncode == 0
    assert fleet.record("r") == before
    assert not fleet.events("end", pid=zombie.pid)[1:], "b never ended there"
    assert fleet.end(worker) == 128 + signal.SIGTERM


@on_each
def test_a_stopped_worker_lets_go_and_the_next_takes_up_at_once(fleet: Fleet) -> None:
    """Of another machine, so that only a release frees the run before its long lease ends."""
    fleet.crash("r", config={"lease_seconds": 1.0})  # which the other machine has to wait for
    first = fleet.start("work", interval=0.1, hold=True, elsewhere="there", grace=0, config={"lease_seconds": 3600})
    fleet.expect(first, "looking")
    fleet.expect(first, "ready")
    assert fleet.end(first) == 128 + signal.SIGTERM
    record = fleet.record("r")
    assert (record.state, record.owner) == (RunState.CRASHED, None)
    second = fleet.start("work", interval=0.1)
    fleet.wait_until_completed(1)
    assert fleet.record("r").recovery_attempts == 0
    assert fleet.end(second) == 128 + signal.SIGTERM


def test_a_database_that_is_restarted_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """Workers ask again until it answers; runs in flight end or go on, and all are finished, each step once."""
    runs = [f"run-{number:02}" for number in range(40)]
    with running_postgres() as server, fleet_on(tmp_path, server.new_database()) as fleet:
        dead = fleet.crash(*runs)
        workers = [fleet.start("work", interval=0.2, pause=0.2, config={"lease_seconds": 2.0}) for _ in range(2)]
        for worker in workers:
            fleet.expect(worker, "looking")
        until(lambda: len(fleet.events("end")) > len(runs) + 5)
        server.restart("immediate")
        until(lambda: len(fleet.events("end")) > len(runs) + 20)
        server.stop()
        back = time.monotonic() + 3.0  # longer than the leases
        until(lambda: time.monotonic() > back)
        server.start()
        fleet.wait_until_completed(len(runs))
        finished = Counter((each["run"], each["node"]) for each in fleet.events("end") if each["pid"] != dead)
        assert set(finished) == set(itertools.product(runs, "bc"))
        with open_storage(fleet.url) as storage:
            for run_id in runs:
                steps = [record["node"] for record in parse_log(storage.read_log(run_id)) if record["kind"] == "step"]
                assert steps == ["a", "b", "c"], "each was committed once"
