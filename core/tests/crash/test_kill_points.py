"""SIGKILL at every named point, in a process of its own; fresh processes go on until the run is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from framework import _faults

if TYPE_CHECKING:
    from tests.crash.conftest import Lab, Reference

# Which time a point is reached the first process ends, and the one after it. The run has 25 steps; the second kill
# falls among the branches.
KILLS = dict.fromkeys((*_faults.POINTS, "node.inside"), (4, 12)) | {"branch.between": (2, 5)}
REACHED_AT_LEAST = dict.fromkeys(KILLS, 25) | {"branch.between": 11, "retention": 24}

BACKENDS = ["sqlite", "file"]
# Where the kind of store makes a difference; the others are slow tests on files.
IN_THE_STORE = ("commit.before", "commit.inside", "commit.after", "retention")


@pytest.mark.parametrize(
    ("point", "backend"),
    [
        *((point, "sqlite") for point in KILLS),
        *((point, "file") for point in IN_THE_STORE),
        *(pytest.param(point, "file", marks=pytest.mark.slow) for point in KILLS if point not in IN_THE_STORE),
    ],
)
def test_a_run_killed_twice_is_the_undisturbed_run(
    make_lab: Callable[..., Lab], expected: Reference, backend: str, point: str
) -> None:
    lab = make_lab(backend=backend)
    for number in KILLS[point]:
        life = lab.live(fault=f"{point}:{number}")
        assert life.result is None, f"{point} was not reached {number} times"
    assert lab.live().result is not None
    lab.check_nothing_repeated()
    lab.check_finished(expected, call_again=backend == "sqlite")


@pytest.mark.parametrize("point", ["node.before", "commit.after"])
def test_a_kill_before_anything_is_done(make_lab: Callable[..., Lab], expected: Reference, point: str) -> None:
    lab = make_lab()
    for _ in range(2):
        assert lab.live(fault=f"{point}:1").result is None
    assert lab.live().result is not None
    lab.check_nothing_repeated()
    lab.check_finished(expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("point", KILLS)
def test_each_time_a_point_is_reached(
    make_lab: Callable[..., Lab], expected: Reference, backend: str, point: str
) -> None:
    for number in range(1, REACHED_AT_LEAST[point] + 1, 3):
        lab = make_lab(backend=backend)
        assert lab.live(fault=f"{point}:{number}").result is None
        assert lab.live().result is not None
        lab.check_nothing_repeated()
        lab.check_finished(expected, call_again=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_every_single_step(make_lab: Callable[..., Lab], expected: Reference, backend: str) -> None:
    """A run that is killed in every process, after one step each, still gets to its end."""
    lab = make_lab(backend=backend)
    while lab.live(fault="commit.after:1").result is None:
        assert len(lab.lives) < 60
    lab.check_nothing_repeated()
    lab.check_finished(expected)
