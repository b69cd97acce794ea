"""Questions about past runs: why one failed, what runs of a goal have in common, what to improve."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import CorruptData
from framework.schemas.decision import Decision
from framework.schemas.run import Run, RunStatus, RunSummary
from framework.storage.backend import FileStorage, Storage

logger = logging.getLogger(__name__)

PROBLEMATIC_RATE = 0.1
"""Share of unsuccessful outcomes above which a node is worth a look."""
ACCEPTABLE_SUCCESS_RATE = 0.8
"""Share of successful runs below which the architecture is worth a look."""


@dataclass(frozen=True)
class FailureAnalysis:
    """Why a run failed. ``decision_chain`` has a line per decision, up to the one that failed."""

    run_id: str
    failure_point: str
    root_cause: str
    decision_chain: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    suggestions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"Run {self.run_id} failed at: {self.failure_point}", f"Root cause: {self.root_cause}"]
        for title, entries in (
            ("Decisions", self.decision_chain),
            ("Problems", self.problems),
            ("Suggestions", self.suggestions),
        ):
            if entries:
                lines += [f"{title}:", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


@dataclass(frozen=True)
class PatternAnalysis:
    """What the runs of a goal have in common. Rates are 0 to 1; ``success_rate`` is over the runs that have ended."""

    goal_id: str
    run_count: int
    success_rate: float
    ended_count: int = 0
    common_failures: list[tuple[str, int]] = field(default_factory=list)
    problematic_nodes: list[tuple[str, float]] = field(default_factory=list)
    decision_patterns: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Goal {self.goal_id}: {self.run_count} runs, {self.success_rate:.0%} successful"]
        if self.common_failures:
            lines += ["Common failures:", *(f"  {count} x {error}" for error, count in self.common_failures)]
        if self.problematic_nodes:
            lines += ["Problematic nodes:", *(f"  {node}: {rate:.0%} fail" for node, rate in self.problematic_nodes)]
        return "\n".join(lines)


class BuilderQuery:
    """Read-only questions to a store of ``Run`` documents. Everything is read anew at each call; nothing is written.

    ``storage_path`` is the directory of a ``FileStorage``, or a storage. Every method raises ``InvalidId`` for an id
    that no store accepts and ``StorageError`` when the store cannot be read. In questions about many runs a damaged
    document is left out, with a logged warning; a question about that run raises ``CorruptData``.
    """

    def __init__(self, storage_path: str | Path | Storage) -> None:
        self.storage: Storage = (
            FileStorage(storage_path) if isinstance(storage_path, (str, os.PathLike)) else storage_path
        )

    # --- looking up -----------------------------------------------------------------------------------------------

    def get_run_summary(self, run_id: str) -> RunSummary | None:
        """The summary of a run, or ``None``."""
        return self.storage.load_summary(run_id)

    def get_full_run(self, run_id: str) -> Run | None:
        """The whole document of a run, or ``None``."""
        return self.storage.load_run(run_id)

    def list_runs_for_goal(self, goal_id: str) -> list[RunSummary]:
        """The summaries of a goal's runs, oldest first."""
        return [RunSummary.from_run(run) for run in self._runs_of_goal(goal_id)]

    def get_recent_failures(self, limit: int = 10) -> list[RunSummary]:
        """The summaries of the ``limit`` runs that failed last, newest first."""
        failed = self._load(self.storage.get_runs_by_status(RunStatus.FAILED))
        failed.sort(key=lambda run: (run.completed_at or run.started_at).timestamp(), reverse=True)
        return [RunSummary.from_run(run) for run in failed[: max(0, limit)]]

    def get_decision_trace(self, run_id: str) -> list[str]:
        """A line per decision of a run, in order; empty when there is no such run."""
        run = self.storage.load_run(run_id)
        return [] if run is None else [decision.summary_for_builder() for decision in run.decisions]

    # --- one run --------------------------------------------------------------------------------------------------

    def analyze_failure(self, run_id: str) -> FailureAnalysis | None:
        """Why a run failed; ``None`` when there is no such run or it did not fail."""
        run = self.storage.load_run(run_id)
        if run is None or run.status is not RunStatus.FAILED:
            return None
        position = _failure_position(run.decisions)
        failed = None if position is None else run.decisions[position]
        critical = next((problem for problem in run.problems if problem.severity == "critical"), None)
        if failed is not None and failed.outcome is not None and failed.outcome.error:
            root_cause = failed.outcome.error
        elif critical is not None:
            root_cause = critical.root_cause or critical.description
        else:
            root_cause = "Unknown: no decision recorded an error and no critical problem was reported."
        return FailureAnalysis(
            run_id=run.id,
            failure_point="Unknown" if failed is None else f"[{failed.node_id}] {failed.intent}",
            root_cause=root_cause,
            decision_chain=[
                decision.summary_for_builder()
                for decision in run.decisions[: len(run.decisions) if position is None else position + 1]
            ],
            problems=[f"[{problem.severity}] {problem.description}" for problem in run.problems],
            suggestions=_suggestions(run, failed),
        )

    def compare_runs(self, run_id_1: str, run_id_2: str) -> dict[str, Any]:
        """Two runs side by side: ``run_1``, ``run_2`` and ``differences``, a line each; or ``error``."""
        first, second = self.storage.load_run(run_id_1), self.storage.load_run(run_id_2)
        if first is None or second is None:
            missing = [name for name, run in ((run_id_1, first), (run_id_2, second)) if run is None]
            return {"error": f"There is no run {' and no run '.join(map(repr, missing))} in this store."}
        return {"run_1": _brief(first), "run_2": _brief(second), "differences": _differences(first, second)}

    # --- many runs ------------------------------------------------------------------------------------------------

    def find_patterns(self, goal_id: str) -> PatternAnalysis | None:
        """What the runs of a goal have in common; ``None`` when it has none."""
        runs = self._runs_of_goal(goal_id)
        if not runs:
            return None
        ended = [run for run in runs if run.status is not RunStatus.RUNNING]
        decisions = [decision for run in runs for decision in run.decisions]
        errors = Counter(
            decision.outcome.error or "no error was given"
            for decision in decisions
            if decision.outcome is not None and not decision.outcome.success
        )
        return PatternAnalysis(
            goal_id=goal_id,
            run_count=len(runs),
            success_rate=_share(sum(run.status is RunStatus.COMPLETED for run in ended), len(ended)),
            ended_count=len(ended),
            common_failures=errors.most_common(5),
            problematic_nodes=_problematic_nodes(decisions),
            decision_patterns={
                "decision_type_distribution": _types(decisions),
                "avg_decisions_per_run": _share(len(decisions), len(runs)),
                "avg_options_per_decision": _share(sum(len(known.options) for known in decisions), len(decisions)),
            },
        )

    def suggest_improvements(self, goal_id: str) -> list[dict[str, Any]]:
        """What to improve, as dicts of ``type`` (node_improvement, error_handling, architecture), ``target``,
        ``reason``, ``recommendation`` and ``priority`` (high, medium); empty when the goal has no runs."""
        patterns = self.find_patterns(goal_id)
        if patterns is None:
            return []
        suggestions = [
            {
                "type": "node_improvement",
                "target": node,
                "reason": f"{rate:.0%} of the decisions of this node with an outcome were unsuccessful.",
                "recommendation": f"Look at the failed decisions of {node!r}: its prompt, its inputs, its tools.",
                "priority": "high" if rate > 0.3 else "medium",
            }
            for node, rate in patterns.problematic_nodes
        ]
        suggestions += [
            {
                "type": "error_handling",
                "target": error,
                "reason": f"This error occurred {count} times.",
                "recommendation": "Handle it where it occurs: retry, validate the input, or add an on_failure edge.",
                "priority": "high" if count >= 5 else "medium",
            }
            for error, count in patterns.common_failures
            if count > 1
        ]
        if patterns.ended_count and patterns.success_rate < ACCEPTABLE_SUCCESS_RATE:
            suggestions.append(
                {
                    "type": "architecture",
                    "target": goal_id,
                    "reason": f"Only {patterns.success_rate:.0%} of the runs that ended were successful.",
                    "recommendation": "Reconsider the graph: split difficult nodes, add checks and recovery paths.",
                    "priority": "high",
                }
            )
        return suggestions

    def get_node_performance(self, node_id: str) -> dict[str, Any]:
        """How a node did over all runs: counts, ``success_rate`` and ``avg_latency_ms`` of its decisions with an
        outcome, ``total_tokens``, ``decision_type_distribution``."""
        decisions = [
            decision
            for run in self._load(self.storage.get_runs_by_node(node_id))
            for decision in run.decisions
            if decision.node_id == node_id
        ]
        outcomes = [decision.outcome for decision in decisions if decision.outcome is not None]
        return {
            "node_id": node_id,
            "total_decisions": len(decisions),
            "success_rate": _share(sum(outcome.success for outcome in outcomes), len(outcomes)),
            "avg_latency_ms": _share(sum(outcome.latency_ms for outcome in outcomes), len(outcomes)),
            "total_tokens": sum(outcome.tokens_used for outcome in outcomes),
            "decision_type_distribution": _types(decisions),
        }

    # --- reading --------------------------------------------------------------------------------------------------

    def _runs_of_goal(self, goal_id: str) -> list[Run]:
        runs = self._load(self.storage.get_runs_by_goal(goal_id))
        runs.sort(key=lambda run: run.started_at.timestamp())
        return runs

    def _load(self, run_ids: Iterable[str]) -> list[Run]:
        runs = []
        for run_id in run_ids:
            try:
                run = self.storage.load_run(run_id)
            except CorruptData as error:
                logger.warning("Run %r is left out of the analysis, it cannot be read: %s", run_id, error)
                continue
            if run is not None:
                runs.append(run)
        return runs


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0


def _types(decisions: Iterable[Decision]) -> dict[str, int]:
    return dict(Counter(decision.decision_type.value for decision in decisions))


def _failure_position(decisions: Sequence[Decision]) -> int | None:
    """The first decision that failed; when none did, the last if it has no outcome: the run ended in it."""
    for position, decision in enumerate(decisions):
        if decision.outcome is not None and not decision.outcome.success:
            return position
    return len(decisions) - 1 if decisions and decisions[-1].outcome is None else None


def _suggestions(run: Run, failed: Decision | None) -> list[str]:
    suggestions = []
    if failed is not None:
        suggestions += [
            f"Consider the alternative {option.description or option.id!r} to what was chosen."
            for option in failed.options
            if option.id != failed.chosen_option_id
        ]
        if not failed.input_context:
            suggestions.append(f"The decision of [{failed.node_id}] had no input context; give it what it depends on.")
        if failed.active_constraints:
            suggestions.append(f"Review the constraints that were active: {', '.join(failed.active_constraints)}.")
    suggestions += [problem.suggested_fix for problem in run.problems if problem.suggested_fix]
    return suggestions


def _problematic_nodes(decisions: Iterable[Decision]) -> list[tuple[str, float]]:
    """Nodes whose outcomes are unsuccessful more often than ``PROBLEMATIC_RATE``, with that share, worst first."""
    total: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for decision in decisions:
        if decision.outcome is not None:
            total[decision.node_id] += 1
            failed[decision.node_id] += not decision.outcome.success
    rates = [(node, failed[node] / count) for node, count in total.items()]
    return sorted((entry for entry in rates if entry[1] > PROBLEMATIC_RATE), key=lambda entry: (-entry[1], entry[0]))


def _brief(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "status": run.status.value,
        "decisions": len(run.decisions),
        "success_rate": run.metrics.success_rate,
    }


def _differences(first: Run, second: Run) -> list[str]:
    differences = []
    if first.status is not second.status:
        differences.append(f"Status: {first.status.value} and {second.status.value}.")
    if len(first.decisions) != len(second.decisions):
        differences.append(f"Number of decisions: {len(first.decisions)} and {len(second.decisions)}.")
    for position, (one, other) in enumerate(zip(first.decisions, second.decisions, strict=False)):
        if (one.node_id, one.intent, one.chosen_option_id) != (other.node_id, other.intent, other.chosen_option_id):
            differences.append(
                f"Decision {position} is the first that differs: [{one.node_id}] chose {one.chosen_option_id!r}, "
                f"[{other.node_id}] chose {other.chosen_option_id!r}."
            )
            break
    for name, run, without in (("first", first, second), ("second", second, first)):
        alone = [node for node in run.metrics.nodes_executed if node not in without.metrics.nodes_executed]
        if alone:
            differences.append(f"Nodes only in the {name} run: {', '.join(alone)}.")
    return differences
