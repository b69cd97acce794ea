"""Progress of a run from its events alone: the lines that stay, and the part of a terminal that is drawn anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from framework import _secrets
from framework.graph.run_events import RunEvent
from framework.runner.cli.output import Screen, Styled
from framework.runner.cli.progress import Before, Progress


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_secrets() -> Iterator[None]:
    yield
    _secrets.forget_secrets()


def progress_of(clock: Clock) -> Progress:
    return Progress(Screen(), "builder", clock=clock, names=["survey", "build"])


def footer(progress: Progress) -> list[str]:
    return ["".join(part.text if isinstance(part, Styled) else part for part in line) for line in progress.footer()]


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_each_event_leaves_its_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(clock)
    progress(RunEvent("run_started", "r1"))
    progress(RunEvent("step_started", "r1", "survey#1", "survey"))
    clock.now += 1.5
    progress(RunEvent("attempt_failed", "r1", "survey#1", "survey", 1, tokens=7, error="no light\nat all"))
    clock.now += 1
    progress(RunEvent("step_finished", "r1", "survey#1", "survey", 2, tokens=1234, latency_ms=900, cost=0.0042))
    progress(RunEvent("step_started", "r1", "/survey#1.0:build#2", "build"))
    progress(RunEvent("step_failed", "r1", "/survey#1.0:build#2", "build", 3, error="no bricks"))
    assert told(capsys) == [
        "builder  r1",
        "  ! survey      attempt 1 failed: no light at all",
        "  ✓ survey      2.5 s  1,234 tokens  $0.0042  attempt 2",
        "  ✗ build #2    no bricks",
    ]
    assert (progress.run_id, progress.steps, progress.tokens) == ("r1", 2, 1234)


def test_the_footer_shows_what_runs_and_what_was_spent(clock: Clock) -> None:
    progress = progress_of(clock)
    progress(RunEvent("run_started", "r1"))
    for number in range(10):
        progress(RunEvent("step_started", "r1", f"node{number}#1", f"node{number}"))
    clock.now += 12
    progress(RunEvent("attempt_failed", "r1", "node1#1", "node1", 1, tokens=50, error="x"))
    progress(RunEvent("step_finished", "r1", "node0#1", "node0", 1, tokens=1000, cost=1.5))
    lines = footer(progress)
    assert lines[0] == "  ● node1       12 s  attempt 2"
    assert lines[8:] == ["    and 1 more", "  1 step  1,050 tokens  $1.50  12 s"]
    progress.notice("Stopping.")
    assert footer(progress)[-1] == "  Stopping."
    progress(RunEvent("run_ended", "r1", tokens=3000, cost=2.0, detail="completed"))
    assert footer(progress)[0] == "  1 step  3,000 tokens  $2.00  12 s"


def test_a_resumed_run_says_what_is_kept_and_counts_on(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    before = Before(("survey", "build", "build", "build", "paint"), tokens=500, cost=0.5)
    progress = Progress(Screen(), "builder", before=before, clock=clock)
    progress(RunEvent("run_resumed", "r1", detail="5 steps recovered"))
    assert told(capsys)[-1] == "  ↻ 5 steps kept: survey, build x3, paint"
    assert footer(progress) == ["  5 steps  500 tokens  $0.5000  0.0 s"]
    long = Progress(Screen(), "builder", before=Before(tuple(f"n{number}" for number in range(50))), clock=clock)
    long(RunEvent("run_resumed", "r1"))
    assert told(capsys)[-1] == "  ↻ 50 steps kept: n0, n1, n2, n3, ..., n46, n47, n48, n49"


def test_a_run_inside_the_run_is_not_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(clock)
    progress(RunEvent("run_started", "r1"))
    progress(RunEvent("run_started", "inner"))
    progress(RunEvent("step_finished", "inner", "x#1", "x", 1, tokens=5))
    assert told(capsys) == ["builder  r1"]
    assert (progress.run_id, progress.tokens) == ("r1", 0)


def test_secrets_and_control_codes_in_errors_are_not_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(clock)
    _secrets.register_secret("sk-very-secret-4")
    progress(RunEvent("attempt_failed", "r1", "a#1", "a", 1, error="\x1b[2J401 sk-very-secret-4"))
    assert told(capsys) == ["  ! a           attempt 1 failed: \\x1b[2J401 ***"]


def test_quiet_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Screen(), "builder", quiet=True, clock=clock) as progress:
        progress(RunEvent("run_started", "r1"))
        progress(RunEvent("step_finished", "r1", "a#1", "a", 1, tokens=5))
        progress.notice("Stopping.")
    assert told(capsys) == []
    assert progress.steps == 1
