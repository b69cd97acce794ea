"""Runs as data: counting, completion, replay of events, summaries, and their JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from framework.schemas import Decision, DecisionEvaluation, Outcome, Problem, Run, RunState, RunSummary
from framework.schemas.run import RunMetrics, RunStatus, milliseconds_between


def decided(number: int, node: str = "n", **outcome: object) -> Decision:
    decision = Decision(id=f"dec_{number}", node_id=node, intent=f"intent {number}")
    if outcome:
        decision.outcome = Outcome.model_validate(outcome)
    return decision


def make_run(*decisions: Decision) -> Run:
    run = Run(id="run_1", goal_id="goal")
    for decision in decisions:
        run.add_decision(decision)
    return run


def test_states_and_statuses() -> None:
    assert {state.value for state in RunState} == {"running", "paused", "failed", "cancelled", "completed", "crashed"}
    assert {status.value for status in RunStatus} == {"running", "completed", "failed", "stuck", "cancelled"}


def test_decisions_and_their_nodes_are_counted() -> None:
    run = make_run(decided(0, "a"), decided(1, "b"), decided(2, "a"))
    assert run.metrics.total_decisions == 3
    assert run.metrics.nodes_executed == ["a", "b"]
    assert run.metrics.success_rate == 0.0


def test_outcomes_are_counted_and_totalled() -> None:
    run = make_run(decided(0), decided(1))
    assert run.record_outcome("dec_0", Outcome(success=True, tokens_used=5, latency_ms=20))
    assert run.record_outcome("dec_1", Outcome(success=False, tokens_used=1, latency_ms=2))
    metrics = run.metrics
    assert (metrics.successful_decisions, metrics.failed_decisions) == (1, 1)
    assert (metrics.total_tokens, metrics.total_latency_ms, metrics.success_rate) == (6, 22, 0.5)


def test_a_second_outcome_replaces_the_first_in_the_metrics_too() -> None:
    run = make_run(decided(0, success=False, tokens_used=5))
    assert run.metrics.failed_decisions == 1
    run.record_outcome("dec_0", Outcome(success=True, tokens_used=2))
    assert (run.metrics.successful_decisions, run.metrics.failed_decisions, run.metrics.total_tokens) == (1, 0, 2)


def test_an_outcome_of_an_unknown_decision_changes_nothing() -> None:
    run = make_run(decided(0))
    before = run.model_copy(deep=True)
    assert not run.record_outcome("dec_9", Outcome(success=True))
    assert run == before


def test_problem_ids_continue_after_the_last() -> None:
    run = make_run()
    assert [run.add_problem("warning", "w"), run.add_problem("critical", "c")] == ["prob_0", "prob_1"]
    run.problems = [Problem(id="prob_7", severity="warning", description="from before")]
    assert run.add_problem("warning", "w") == "prob_8"
    run.problems.append(Problem(id="named by somebody", severity="warning", description="x"))
    assert run.add_problem("warning", "w") == "prob_3"


@pytest.mark.parametrize("zone", [None, UTC])
def test_duration_is_zero_until_complete(zone: object) -> None:
    run = Run(id="r", goal_id="g")
    run.started_at = datetime.now(UTC if zone else None) - timedelta(milliseconds=1500)
    assert run.duration_ms == 0
    run.complete(RunStatus.COMPLETED)
    assert 1500 <= run.duration_ms < 60_000


def test_durations_survive_mixed_and_backward_times() -> None:
    aware = datetime.now(UTC)
    assert milliseconds_between(aware, datetime.now() + timedelta(seconds=1)) in range(1000, 60_000)
    assert milliseconds_between(datetime.now() - timedelta(seconds=1), aware) in range(500, 60_000)
    assert milliseconds_between(aware, aware - timedelta(seconds=1)) == 0


def test_narratives() -> None:
    run = make_run(*(decided(number, success=False) for number in range(4)), decided(4, success=True))
    run.add_problem("critical", "the disk is full")
    run.add_problem("warning", "slow")
    run.complete(RunStatus.FAILED)
    assert run.narrative == (
        "Run failed. 5 decisions: 1 successful, 4 failed. 1 critical problem: the disk is full. 1 warning. "
        "Unsuccessful: intent 0; intent 1; intent 2 and 1 more."
    )
    run = make_run()
    run.complete(RunStatus.COMPLETED)
    assert run.narrative == "Run completed successfully. 0 decisions: 0 successful, 0 failed."
    assert run.status is RunStatus.COMPLETED
    run.complete(RunStatus.STUCK)
    assert "got stuck" in run.narrative
    run.complete(RunStatus.CANCELLED, narrative="Stopped by Ann.")
    assert run.narrative == "Stopped by Ann."


def test_json_round_trip_with_computed_fields() -> None:
    run = make_run(decided(0, success=True, result={"x": [1]}), decided(1))
    run.add_problem("warning", "w", decision_id="dec_0")
    run.complete(RunStatus.COMPLETED)
    text = run.model_dump_json()
    written = json.loads(text)
    assert written["metrics"]["success_rate"] == 0.5
    assert {"duration_ms", "metrics"} <= written.keys()

    written["duration_ms"] = 10**9
    loaded = Run.model_validate(written)
    assert loaded == run
    assert loaded.duration_ms == run.duration_ms
    assert loaded.model_dump_json() == text


def test_computed_fields_of_metrics_do_not_come_back() -> None:
    metrics = RunMetrics.model_validate({"total_decisions": 2, "successful_decisions": 1, "success_rate": 1.0})
    assert metrics.success_rate == 0.5
    assert metrics.model_extra == {}


def test_replay_restores_the_order_of_making_and_the_metrics() -> None:
    original = make_run(decided(0, "a", success=True, tokens_used=3), decided(1, "b", success=False), decided(2, "a"))
    original.add_problem("warning", "first")
    original.add_problem("warning", "second")
    events: list[dict[str, object]] = []
    for position in (2, 0, 1):  # concurrent branches commit in another order than they decided
        decision = original.decisions[position]
        events.append({"kind": "decision", "decision": decision.model_dump(mode="json", exclude={"outcome"})})
        if decision.outcome is not None:
            outcome = decision.outcome.model_dump(mode="json")
            events.append({"kind": "outcome", "decision_id": decision.id, "outcome": outcome})
    events += [{"kind": "problem", "problem": each.model_dump(mode="json")} for each in reversed(original.problems)]

    replayed = make_run()
    assert replayed.replay(json.loads(json.dumps(events))) == []
    assert replayed.decisions == original.decisions
    assert replayed.problems == original.problems
    assert replayed.metrics == original.metrics


def test_replay_says_what_it_could_not_use() -> None:
    run = make_run()
    unused = run.replay(
        [
            {"kind": "song"},
            {"kind": "decision", "decision": {"id": "dec_0"}},
            {"kind": "outcome", "decision_id": "dec_0", "outcome": {"success": True}},
            {"kind": "problem"},
            {"kind": "problem", "run": 3},
            {"kind": "problem", "run": {"id": "run_1"}},
            {"kind": "problem", "problem": {"id": "prob_0", "severity": "warning", "description": "kept"}},
        ]
    )
    assert len(unused) == 6
    assert "unknown kind 'song'" in unused[0]
    assert [problem.description for problem in run.problems] == ["kept"]


def test_summary() -> None:
    decisions = [decided(number, success=True, summary=f"did {number}") for number in range(4)]
    decisions[0].evaluation = DecisionEvaluation(outcome_quality=0.9)
    run = make_run(*decisions, *(decided(number, success=False) for number in range(4, 10)))
    run.add_problem("critical", "c")
    run.add_problem("warning", "w")
    run.complete(RunStatus.FAILED, "It failed.")
    summary = RunSummary.from_run(run)
    assert (summary.run_id, summary.goal_id, summary.status) == ("run_1", "goal", RunStatus.FAILED)
    assert (summary.decision_count, summary.success_rate, summary.problem_count) == (10, 0.4, 2)
    assert (summary.critical_problems, summary.warnings, summary.narrative) == (["c"], ["w"], "It failed.")
    assert summary.successes == ["did 0", "did 1", "did 2"]
    assert len(summary.key_decisions) == 5
    assert "intent 0" in summary.key_decisions[0]
    assert RunSummary.model_validate_json(summary.model_dump_json()) == summary
