"""SIGKILL at each call of a step in turn; the outside is a server that counts what reached it, by idempotency key."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.journal_rows import CallRecord
from framework.storage.backend import open_storage
from tests import forks

HERE = Path(__file__).parent
CORE = HERE.parents[1]
AGENT_CALLS = 25


@dataclass
class World:
    """The server, one store, and the processes that work on its run one after the other."""

    port: int
    folder: Path
    work: str = "agent"
    backend: str = "sqlite"
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    before: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = len(self._came())

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/runs.db" if self.backend == "sqlite" else f"file://{self.folder}/store"

    def start(self, die_at: int = 0) -> subprocess.Popen[str]:
        arguments = {
            "url": self.url,
            "port": self.port,
            "work": self.work,
            "die_at": die_at,
            "seed": self.seed,
            "config": self.config,
        }
        return forks.Popen(
            [sys.executable, str(HERE / "journal_program.py"), json.dumps(arguments)],
            env={**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def live(self, die_at: int = 0) -> dict[str, Any] | None:
        """One process from start to end; its result, ``None`` when it was killed. Checks what it repeated."""
        process = self.start(die_at)
        output, errors = process.communicate(timeout=50)
        counts = self.counts()
        repeated = {key: counts[key] for key, count in self.finished.items() if counts[key] != count}
        assert not repeated, f"finished calls were made again: {repeated}"
        if process.returncode == -signal.SIGKILL:
            self.finished = {each.key: counts[each.key] for each in self.journal() if each.state in ("done", "failed")}
            return None
        assert process.returncode == 0, errors
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def journal(self) -> list[CallRecord]:
        with open_storage(self.url) as storage:
            return CheckpointManager(storage).journal("run") if storage.find_run("run") is not None else []

    def counts(self) -> Counter[str]:
        """How often each key reached the server."""
        return Counter(each["key"] for each in self._came()[self.before :])

    def whats(self) -> dict[str, set[str]]:
        """The keys under which each thing was asked for."""
        found: dict[str, set[str]] = {}
        for each in self._came()[self.before :]:
            found.setdefault(f"{each['what']} {each['body']}".strip(), set()).add(each["key"])
        return found

    def _came(self) -> list[dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/")
            came: list[dict[str, str]] = json.loads(connection.getresponse().read())
            return came
        finally:
            connection.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    process = forks.Popen(
        [sys.executable, str(HERE / "journal_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.communicate("", timeout=10)


@pytest.fixture
def make_world(port: int, tmp_path: Path) -> Callable[..., World]:
    made: list[World] = []

    def make(work: str, **options: Any) -> World:
        made.append(World(port, tmp_path / f"world{len(made)}", work, **options))
        return made[-1]

    return make


def check_agent(world: World, result: dict[str, Any] | None) -> None:
    assert result is not None
    assert result["success"], result["error"]
    assert result["tokens"] == 5 * 15, "questions answered from the journal count once"
    assert all(len(keys) == 1 for keys in world.whats().values()), "a call that was made again had another key"
    assert len(world.counts()) == AGENT_CALLS
    assert world.journal() == []


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_step_killed_at_each_of_its_calls_in_turn(make_world: Callable[..., World], backend: str) -> None:
    """Each process but the last dies in the first call that none had made before it; so each has got further."""
    world = make_world("agent", backend=backend)
    for number in range(AGENT_CALLS):
        assert world.live(die_at=1 if number == 0 else 2) is None
        assert len(world.finished) == number
    check_agent(world, world.live())
    assert set(world.counts().values()) == {2}, "each call was in flight at one kill, and reached the outside twice"


@pytest.mark.parametrize("at", [1, 7, 20, 25])
def test_one_kill_repeats_one_call(make_world: Callable[..., World], at: int) -> None:
    world = make_world("agent")
    assert world.live(die_at=at) is None
    assert len(world.finished) == at - 1
    check_agent(world, world.live())
    assert sorted(world.counts().values()) == [1] * 24 + [2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
def test_one_kill_at_every_place(make_world: Callable[..., World], backend: str) -> None:
    for at in range(1, AGENT_CALLS + 1):
        world = make_world("agent", backend=backend)
        assert world.live(die_at=at) is None
        check_agent(world, world.live())
        assert sorted(world.counts().values()) == [1] * 24 + [2]


def concurrent_calls(make_world: Callable[..., World], seed: int, backend: str = "sqlite") -> None:
    """Kills at random requests of a step whose calls are concurrent; `World.live` checks what is repeated."""
    order = random.Random(seed)
    world = make_world("concurrent", backend=backend)
    kills = 0
    while True:
        world.seed = order.randrange(10**6)
        result = world.live(die_at=order.randrange(2, 16))
        if result is not None:
            break
        kills += 1
        assert kills < 40
    assert result["success"], result["error"]
    assert len(result["value"]) == 24
    assert len(set(result["value"])) == 24, "two calls were given one answer"
    # Of each round's seven calls two ask what another one asks: these have two keys.
    for what, keys in world.whats().items():
        assert len(keys) == (2 if what[-1] in "01" else 1), what
    assert sum(world.counts().values()) <= 24 + 7 * kills


@pytest.mark.parametrize("seed", range(3))
def test_concurrent_calls_killed_at_random(make_world: Callable[..., World], seed: int) -> None:
    concurrent_calls(make_world, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("seed", range(100, 115))
def test_concurrent_calls_killed_at_random_at_length(make_world: Callable[..., World], seed: int, backend: str) -> None:
    concurrent_calls(make_world, seed, backend)


SHAPES = {"background": 8, "group": 8, "completed": 8, "threads": 8, "handled": 6}
PAUSED = {"paused tasks": 11, "paused threads": 11}
"""How many calls each makes; in the latter, tasks and threads come in another order in each process."""


def shape_killed(world: World, *die_at: int) -> None:
    """One process is killed at each of these requests of its own; then one comes to the end."""
    kills = 0
    for at in die_at:
        world.seed += 1
        if (result := world.live(at)) is not None:
            break
        kills += 1
    else:
        result = world.live()
    assert result is not None
    assert result["success"], result["error"]
    calls = (SHAPES | PAUSED)[world.work]
    assert len(set(result["value"])) == len(result["value"]) == calls, "two calls were given one answer"
    counts = world.counts()
    # At most three calls are in flight at a time here; `World.live` has seen that no finished one was made again.
    assert sum(counts.values()) <= calls + 3 * kills
    assert max(counts.values()) <= 1 + kills
    alike = 3 if world.work in PAUSED else 2
    assert all(len(keys) == (alike if what == "hello" else 1) for what, keys in world.whats().items()), "another key"
    assert world.journal() == []


@pytest.mark.parametrize("work", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_steps_of_many_shapes_killed(make_world: Callable[..., World], work: str, seed: int) -> None:
    chance = random.Random(seed)
    calls = SHAPES[work]
    shape_killed(make_world(work), *((chance.randrange(2, calls),) if seed else (3, 3, 3)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("work", SHAPES)
def test_steps_of_many_shapes_killed_at_every_place(make_world: Callable[..., World], work: str, backend: str) -> None:
    for at in range(1, SHAPES[work] + 1):
        shape_killed(make_world(work, backend=backend), at)
    chance = random.Random(work + backend)
    for _ in range(3):
        shape_killed(make_world(work, backend=backend), *(chance.randrange(1, 6) for _ in range(4)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["sqlite", "file"])
@pytest.mark.parametrize("work", PAUSED)
def test_tasks_in_another_order_killed_at_every_place(
    make_world: Callable[..., World], work: str, backend: str
) -> None:
    chance = random.Random(work + backend)
    for at in range(1, PAUSED[work] + 1):
        shape_killed(make_world(work, backend=backend, seed=100 * at), at)
    for seed in range(10):
        deaths = (chance.randrange(2, 8) for _ in range(4))
        shape_killed(make_world(work, backend=backend, seed=10_000 + 100 * seed), *deaths)


def test_an_effect_in_flight_at_a_kill_waits_to_be_settled(make_world: Callable[..., World]) -> None:
    world = make_world("booking")
    assert world.live(die_at=4) is None
    for _ in range(2):
        result = world.live()
        assert result is not None
        assert result["paused_at"] == "step"
    (unknown,) = [each for each in world.journal() if each.state == "unknown"]
    assert (unknown.name, world.counts()[unknown.key]) == ("tool:book", 1)
    with open_storage(world.url) as storage:
        CheckpointManager(storage).settle("run", unknown.id, done="it is booked")
    result = world.live()
    check_agent(world, result)
    assert result is not None
    assert "it is booked" in result["value"]
    assert set(world.counts().values()) == {1}


def test_a_sleep_goes_on_after_the_end_of_its_process(make_world: Callable[..., World]) -> None:
    world = make_world("sleeping", seed=1200, config={"sleep_in_process_seconds": 60})
    began = time.monotonic()
    process = world.start()
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "sleeping"
    while not world.journal():
        assert time.monotonic() - began < 30
    process.kill()
    process.communicate()
    (sleep,) = world.journal()
    assert sleep.until is not None
    while time.time() < sleep.until - 0.2:  # so that what is left is far from all of it
        time.sleep(0.01)
    result = world.live()
    assert result is not None
    assert result["success"], result["error"]
    assert time.time() >= sleep.until
    assert result["value"] < 1.2, "the second process slept only what was left"


def test_a_long_sleep_lets_the_process_go_and_the_run_is_due_then(make_world: Callable[..., World]) -> None:
    world = make_world("sleeping", seed=800, config={"sleep_in_process_seconds": 0})
    result = world.live()
    assert result is not None
    assert result["paused_at"] == "step"
    with open_storage(world.url) as storage:
        deadline = time.monotonic() + 30
        while not storage.list_due():
            assert time.monotonic() < deadline
    result = world.live()
    assert result is not None
    assert result["success"], result["error"]
    assert result["value"] < 0.8
