"""SIGKILL at random moments, over stores, durabilities and retentions. Seeded: ``SUREFOOT_SEED`` repeats a failure."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from framework import _faults

if TYPE_CHECKING:
    from tests.crash.conftest import Lab, Reference

SEED = os.environ.get("SUREFOOT_SEED") or str(random.SystemRandom().randrange(10**9))
ROUNDS = 16
KILLS_A_ROUND = 14  # 224 in all
POINTS = (*_faults.POINTS, "node.inside")


def _config(rng: random.Random) -> dict[str, Any]:
    return {
        "durability": rng.choice(["sync", "sync", "async"]),
        "retention_strategy": rng.choice(["all", "latest_only", "prune_old"]),
        "max_checkpoints_per_run": rng.randint(1, 6),
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whenever_a_run_is_killed_it_goes_on(make_lab: Callable[..., Lab], expected: Reference, number: int) -> None:
    print(f"repeat with SUREFOOT_SEED={SEED}")
    rng = random.Random(f"{SEED}/{number}")
    kills = 0
    while kills < KILLS_A_ROUND:
        config = _config(rng)
        lab = make_lab(backend=rng.choice(["sqlite", "file"]), config=config, pace=rng.choice([0.0, 0.002, 0.006]))
        for _ in range(rng.randint(2, 7)):
            if rng.random() < 0.5:
                life = lab.live(fault=f"{rng.choice(POINTS)}:{rng.randint(1, 14)}")
            else:
                life = lab.live(kill_after_seconds=rng.uniform(0.0, 0.2))
            if life.result is not None:
                break
            kills += 1
        print(f"{lab.backend} {config}: {len(lab.lives)} processes")
        if lab.lives[-1].result is None:
            assert lab.live().result is not None
        lab.check_nothing_repeated(every_step_committed=config["durability"] == "sync")
        lab.check_finished(expected)


@pytest.mark.parametrize("backend", ["sqlite", "file"])
def test_asynchronous_commits_lose_the_end_but_never_the_order(
    make_lab: Callable[..., Lab], expected: Reference, backend: str
) -> None:
    """What was handed over and not durable runs again; what is in the store never does."""
    lab = make_lab(backend=backend, config={"durability": "async"})
    for fault in ("node.inside:9", "commit.inside:9"):
        assert lab.live(fault=fault).result is None
    assert lab.live().result is not None
    lab.check_nothing_repeated(every_step_committed=False)
    lab.check_finished(expected)


def test_with_durability_exit_a_killed_run_starts_over(make_lab: Callable[..., Lab], expected: Reference) -> None:
    lab = make_lab(config={"durability": "exit"})
    life = lab.live(fault="node.inside:20")
    assert life.result is None
    assert life.committed.steps == frozenset()
    life = lab.live()
    assert life.started[0] == ("plan#1", 1)
    lab.check_finished(expected)


@pytest.mark.parametrize("retention", ["all", "prune_old"])
def test_retention_does_not_matter_to_a_resume(
    make_lab: Callable[..., Lab], expected: Reference, retention: str
) -> None:
    lab = make_lab(config={"retention_strategy": retention, "max_checkpoints_per_run": 3})
    assert lab.live(fault="commit.inside:17").result is None
    assert lab.live().result is not None
    lab.check_nothing_repeated()
    lab.check_finished(expected)
