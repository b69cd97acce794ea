"""Questions about past runs, asked of real stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from framework.builder import BuilderQuery
from framework.errors import CorruptData
from framework.schemas.decision import Decision, DecisionType, Option, Outcome
from framework.schemas.run import Run, RunStatus
from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage

START = datetime(2026, 1, 1)
OPTIONS = [
    Option(id="a", description="use the cache", action_type="x"),
    Option(id="b", description="ask again", action_type="x"),
]


def make_run(
    name: str, outcomes: list[tuple[str, str | None]], status: RunStatus = RunStatus.COMPLETED, minute: int = 0
) -> Run:
    """A run with one decision per (node, error); no error is a success."""
    run = Run(id=f"run_{name}", goal_id="goal", started_at=START + timedelta(minutes=minute))
    for number, (node, error) in enumerate(outcomes):
        run.add_decision(
            Decision(
                id=f"dec_{number}",
                node_id=node,
                intent=f"do {node}",
                options=OPTIONS,
                chosen_option_id="a",
                decision_type=DecisionType.PATH_CHOICE,
                outcome=Outcome(success=error is None, error=error, tokens_used=10, latency_ms=100),
            )
        )
    if status is not RunStatus.RUNNING:
        run.complete(status)
        run.completed_at = run.started_at + timedelta(seconds=1)
    return run


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    opened: Storage = FileStorage(tmp_path) if request.param == "file" else MemoryStorage()
    with opened:
        yield opened


@pytest.fixture
def query(store: Storage) -> BuilderQuery:
    return BuilderQuery(store)


def test_a_path_is_a_file_store(tmp_path: Path) -> None:
    FileStorage(tmp_path).save_run(make_run("1", []))
    for path in (tmp_path, str(tmp_path)):
        run = BuilderQuery(path).get_full_run("run_1")
        assert run is not None


def test_looking_up(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("new", [("a", None)], minute=1))
    store.save_run(make_run("old", [("a", None), ("b", None)]))
    summary = query.get_run_summary("run_old")
    assert summary is not None
    assert summary.decision_count == 2
    assert [each.run_id for each in query.list_runs_for_goal("goal")] == ["run_old", "run_new"]
    assert [line[:5] for line in query.get_decision_trace("run_old")] == ["✓ [a]", "✓ [b]"]
    assert (query.get_run_summary("run_x"), query.get_full_run("run_x")) == (None, None)
    assert (query.list_runs_for_goal("other"), query.get_decision_trace("run_x")) == ([], [])


def test_recent_failures_are_newest_first(store: Storage, query: BuilderQuery) -> None:
    for minute, name in enumerate("bac"):
        store.save_run(make_run(name, [], RunStatus.FAILED, minute))
    store.save_run(make_run("good", [], minute=9))
    assert [each.run_id for each in query.get_recent_failures()] == ["run_c", "run_a", "run_b"]
    assert [each.run_id for each in query.get_recent_failures(limit=1)] == ["run_c"]


def test_why_a_run_failed(store: Storage, query: BuilderQuery) -> None:
    run = make_run("1", [("a", None), ("b", "timed out"), ("c", "no input")], RunStatus.FAILED)
    run.decisions[1].active_constraints = ["no_retry"]
    run.add_problem("critical", "step b failed", suggested_fix="raise the timeout")
    store.save_run(run)
    analysis = query.analyze_failure("run_1")
    assert analysis is not None
    assert (analysis.run_id, analysis.failure_point, analysis.root_cause) == ("run_1", "[b] do b", "timed out")
    assert len(analysis.decision_chain) == 2
    assert analysis.problems == ["[critical] step b failed"]
    suggestions = "\n".join(analysis.suggestions)
    for part in ("'ask again'", "no input context", "no_retry", "raise the timeout"):
        assert part in suggestions
    assert "use the cache" not in suggestions
    assert "Root cause: timed out" in str(analysis)


def test_a_run_that_failed_in_or_without_a_decision(store: Storage, query: BuilderQuery) -> None:
    run = make_run("1", [("a", None), ("b", None)], RunStatus.FAILED)
    run.decisions[1].outcome = None
    run.add_problem("critical", "killed", root_cause="out of memory")
    store.save_run(run)
    analysis = query.analyze_failure("run_1")
    assert analysis is not None
    assert (analysis.failure_point, analysis.root_cause) == ("[b] do b", "out of memory")

    store.save_run(make_run("2", [("a", None)], RunStatus.FAILED))
    analysis = query.analyze_failure("run_2")
    assert analysis is not None
    assert analysis.failure_point == "Unknown"
    assert analysis.root_cause.startswith("Unknown")
    assert len(analysis.decision_chain) == 1


def test_only_failed_runs_are_analysed(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("a", "tolerated")]))
    assert query.analyze_failure("run_1") is None
    assert query.analyze_failure("run_x") is None


def test_patterns(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("a", None), ("b", "timed out"), ("c", None)]))
    store.save_run(make_run("2", [("a", None), ("b", "timed out")], RunStatus.FAILED))
    store.save_run(make_run("3", [("a", "no input"), ("b", None)], RunStatus.FAILED))
    store.save_run(make_run("4", [], RunStatus.RUNNING))
    patterns = query.find_patterns("goal")
    assert patterns is not None
    assert (patterns.goal_id, patterns.run_count, patterns.ended_count) == ("goal", 4, 3)
    assert patterns.success_rate == pytest.approx(1 / 3), "a run that is still going is no failure"
    assert patterns.common_failures == [("timed out", 2), ("no input", 1)]
    assert patterns.problematic_nodes == [("b", 2 / 3), ("a", 1 / 3)]
    assert patterns.decision_patterns["decision_type_distribution"] == {"path_choice": 7}
    assert "2 x timed out" in str(patterns)
    assert query.find_patterns("other") is None


def test_suggested_improvements(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("b", "timed out")], RunStatus.FAILED))
    store.save_run(make_run("2", [("b", "timed out")], RunStatus.FAILED))
    suggestions = query.suggest_improvements("goal")
    assert [(each["type"], each["target"], each["priority"]) for each in suggestions] == [
        ("node_improvement", "b", "high"),
        ("error_handling", "timed out", "medium"),
        ("architecture", "goal", "high"),
    ]
    assert all(each["reason"] and each["recommendation"] for each in suggestions)
    assert query.suggest_improvements("other") == []


def test_nothing_to_improve(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("a", None)]))
    store.save_run(make_run("2", [], RunStatus.RUNNING))
    assert query.suggest_improvements("goal") == []


def test_comparing_runs(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("a", None), ("b", None)]))
    store.save_run(make_run("2", [("a", None), ("c", "x"), ("c", "x")], RunStatus.FAILED))
    comparison = query.compare_runs("run_1", "run_2")
    assert comparison["run_1"] == {"id": "run_1", "status": "completed", "decisions": 2, "success_rate": 1.0}
    assert comparison["run_2"]["status"] == "failed"
    assert comparison["differences"] == [
        "Status: completed and failed.",
        "Number of decisions: 2 and 3.",
        "Decision 1 is the first that differs: [b] chose 'a', [c] chose 'a'.",
        "Nodes only in the first run: b.",
        "Nodes only in the second run: c.",
    ]
    assert query.compare_runs("run_1", "run_1")["differences"] == []
    assert "'run_x'" in query.compare_runs("run_x", "run_1")["error"]


def test_how_a_node_performs(store: Storage, query: BuilderQuery) -> None:
    store.save_run(make_run("1", [("a", None), ("b", None)]))
    store.save_run(make_run("2", [("a", "x"), ("a", None)]))
    assert query.get_node_performance("a") == {
        "node_id": "a",
        "total_decisions": 3,
        "success_rate": pytest.approx(2 / 3),
        "avg_latency_ms": 100.0,
        "total_tokens": 30,
        "decision_type_distribution": {"path_choice": 3},
    }
    assert query.get_node_performance("x")["total_decisions"] == 0


def test_a_damaged_run_is_left_out_of_the_analysis(
    store: Storage, query: BuilderQuery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_run(make_run("1", []))
    store.save_run(make_run("2", []))
    load_run = store.load_run

    def damaged(run_id: str) -> Run | None:
        if run_id == "run_1":
            raise CorruptData("its checksum does not match")
        return load_run(run_id)

    monkeypatch.setattr(store, "load_run", damaged)
    with caplog.at_level(logging.WARNING):
        assert [each.run_id for each in query.list_runs_for_goal("goal")] == ["run_2"]
    assert "run_1" in caplog.text
    with pytest.raises(CorruptData):
        query.get_full_run("run_1")
