"""A run as data: its state in the store, and the record of its decisions and problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import Field, computed_field

from framework.schemas.decision import ComputingDocument, Decision, Document, Outcome


class RunState(str, Enum):
    """Where a durable run stands. ``crashed`` is never stored: it is a running run whose owner is gone."""

    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    COMPLETED = "completed"
    CRASHED = "crashed"


class RunStatus(str, Enum):
    """How a ``Run`` document says a run stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STUCK = "stuck"
    CANCELLED = "cancelled"


def milliseconds_between(start: datetime, end: datetime) -> int:
    """Whole milliseconds from ``start`` to ``end``, never negative. Next to an aware value a naive one is local."""
    if (start.tzinfo is None) != (end.tzinfo is None):
        start, end = start.astimezone(), end.astimezone()
    return max(0, int((end - start).total_seconds() * 1000))


def number_of(identifier: str, prefix: str) -> int | None:
    """The ``n`` of an identifier ``<prefix><n>``, or ``None`` for any other text."""
    digits = identifier.removeprefix(prefix)
    return int(digits) if digits != identifier and digits.isascii() and digits.isdigit() else None


class Problem(Document):
    """Something that went wrong in a run. ``severity`` is ``critical``, ``warning`` or any other word."""

    id: str
    severity: str
    description: str
    root_cause: str | None = None
    decision_id: str | None = None
    suggested_fix: str | None = None
    timestamp: datetime = Field(default_factory=datetime.now)


class RunMetrics(ComputingDocument):
    """Counts and totals over the decisions of a run. ``edges_traversed`` is kept for readers and stays empty."""

    total_decisions: int = 0
    successful_decisions: int = 0
    failed_decisions: int = 0
    total_tokens: int = 0
    total_latency_ms: int = 0
    nodes_executed: list[str] = Field(default_factory=list)
    edges_traversed: list[str] = Field(default_factory=list)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def success_rate(self) -> float:
        """Successful decisions as a share of all, 0.0 when there are none."""
        return self.successful_decisions / self.total_decisions if self.total_decisions else 0.0

    def count(self, outcome: Outcome, times: int = 1) -> None:
        """Add one outcome to the counts and totals; ``times=-1`` takes it out again."""
        if outcome.success:
            self.successful_decisions += times
        else:
            self.failed_decisions += times
        self.total_tokens += times * outcome.tokens_used
        self.total_latency_ms += times * outcome.latency_ms

    def add(self, earlier: RunMetrics) -> None:
        """Add what was counted before these began."""
        self.total_decisions += earlier.total_decisions
        self.successful_decisions += earlier.successful_decisions
        self.failed_decisions += earlier.failed_decisions
        self.total_tokens += earlier.total_tokens
        self.total_latency_ms += earlier.total_latency_ms
        self.nodes_executed[:] = dict.fromkeys([*earlier.nodes_executed, *self.nodes_executed])


class Run(ComputingDocument):
    """The record of one run: what was decided, what came of it, what went wrong."""

    id: str
    goal_id: str
    started_at: datetime = Field(default_factory=datetime.now)
    status: RunStatus = RunStatus.RUNNING
    completed_at: datetime | None = None
    decisions: list[Decision] = Field(default_factory=list)
    problems: list[Problem] = Field(default_factory=list)
    metrics: RunMetrics = Field(default_factory=RunMetrics)
    narrative: str = ""
    goal_description: str = ""
    input_data: dict[str, Any] = Field(default_factory=dict)
    output_data: dict[str, Any] = Field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def duration_ms(self) -> int:
        """Milliseconds from start to completion; 0 until the run is complete."""
        return 0 if self.completed_at is None else milliseconds_between(self.started_at, self.completed_at)

    def add_decision(self, decision: Decision) -> None:
        """Append a decision and count it, its node and its outcome if it already has one."""
        self.decisions.append(decision)
        self.metrics.total_decisions += 1
        if decision.node_id not in self.metrics.nodes_executed:
            self.metrics.nodes_executed.append(decision.node_id)
        if decision.outcome is not None:
            self.metrics.count(decision.outcome)

    def record_outcome(self, decision_id: str, outcome: Outcome) -> bool:
        """Set the outcome of a decision, in place of an earlier one, and bring the metrics up to date.

        Returns whether the run has a decision of this id; if not, nothing changes.
        """
        # From the newest back: outcomes follow soon after their decision.
        decision = next((known for known in reversed(self.decisions) if known.id == decision_id), None)
        if decision is None:
            return False
        if decision.outcome is not None:
            self.metrics.count(decision.outcome, -1)
        decision.outcome = outcome
        self.metrics.count(outcome)
        return True

    def add_problem(
        self,
        severity: str,
        description: str,
        decision_id: str | None = None,
        root_cause: str | None = None,
        suggested_fix: str | None = None,
    ) -> str:
        """Append a problem; returns its id, ``prob_<n>``."""
        last = number_of(self.problems[-1].id, "prob_") if self.problems else None
        number = len(self.problems) if last is None else max(last + 1, len(self.problems))
        problem = Problem(
            id=f"prob_{number}",
            severity=severity,
            description=description,
            root_cause=root_cause,
            decision_id=decision_id,
            suggested_fix=suggested_fix,
        )
        self.problems.append(problem)
        return problem.id

    def begin_again(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Take the start time and the problems of earlier ``events``, all that going on needs of them; the number of
        the next decision. ``replay(events, problems=False)`` then gives the rest, at any later time."""
        started_at: datetime | None = None
        first: str | None = None
        found: list[Problem] = []
        last = -1
        for event in events:
            try:
                if "run" in event:
                    mine = event["run"]["id"] == self.id  # else this is a fork, which starts when it starts
                    started_at = datetime.fromisoformat(event["run"]["started_at"]) if mine else self.started_at
                kind = event.get("kind")
                if kind == "decision":
                    number = number_of(event["decision"]["id"], "dec_")
                    if number is not None and number > last:
                        last = number
                    if first is None:
                        first = event["decision"]["timestamp"]
                elif kind == "problem":
                    found.append(Problem.model_validate(event.get("problem")))
            except (AttributeError, KeyError, TypeError, ValueError):  # told of by ``replay``
                continue
        if started_at is None and first is not None:
            started_at = datetime.fromisoformat(first)
        self.started_at = started_at or self.started_at
        unique = {problem.id: problem for problem in reversed(found)}
        self.problems.extend(sorted(unique.values(), key=lambda known: number_of(known.id, "prob_") or 0))
        return last + 1

    def replay(self, events: Sequence[Mapping[str, Any]], *, problems: bool = True) -> list[str]:
        """Add the decisions and outcomes of ``events``, as recorded by ``Runtime.recording``, and the start time and
        the ``problems``.

        Events come in the order of their commits, in which concurrent branches overtake each other; the record is
        brought back into the order in which it was made. The start time is that of the original start, or of the first
        decision if the event that told it is lost. Returns a line for each event that could not be used.
        """
        decisions: dict[str, Decision] = {}
        outcomes: list[tuple[str, Outcome]] = []
        unused: list[str] = []
        if problems:
            self.begin_again(events)
        for position, event in enumerate(events):
            kind = event.get("kind")
            try:
                if "run" in event:
                    datetime.fromisoformat(event["run"]["started_at"])
                if kind == "decision":
                    decision = Decision.model_validate(event.get("decision"))
                    decisions.setdefault(decision.id, decision)
                elif kind == "outcome":
                    outcomes.append((str(event.get("decision_id")), Outcome.model_validate(event.get("outcome"))))
                elif kind == "problem":
                    Problem.model_validate(event.get("problem"))
                else:
                    unused.append(f"event {position} is of the unknown kind {kind!r}")
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # pydantic's is a ValueError
                unused.append(f"event {position} is not a valid {kind} ({type(error).__name__})")
        for decision_id, outcome in outcomes:
            if decision_id in decisions:
                decisions[decision_id].outcome = outcome
            elif not self.record_outcome(decision_id, outcome):
                unused.append(f"an outcome is of {decision_id!r}, which is not among the decisions")
        for decision in sorted(decisions.values(), key=lambda known: number_of(known.id, "dec_") or 0):
            self.add_decision(decision)
        return unused

    def complete(self, status: RunStatus, narrative: str = "", at: datetime | None = None) -> None:
        """Set the final status and the time (now); without a ``narrative`` one is written from the record."""
        self.status = status
        # The zone of the start, if it has one, so that the two values of one document compare.
        self.completed_at = at or datetime.now(self.started_at.tzinfo)
        self.narrative = narrative or self._narrate()

    def _narrate(self) -> str:
        how = {RunStatus.COMPLETED: "completed successfully", RunStatus.STUCK: "got stuck"}
        metrics = self.metrics
        sentences = [
            f"Run {how.get(self.status, self.status.value)}.",
            f"{_count(metrics.total_decisions, 'decision')}: {metrics.successful_decisions} successful, "
            f"{metrics.failed_decisions} failed.",
        ]
        critical = [problem.description for problem in self.problems if problem.severity == "critical"]
        if critical:
            sentences.append(f"{_count(len(critical), 'critical problem')}: {'; '.join(critical)}.")
        warnings = sum(problem.severity == "warning" for problem in self.problems)
        if warnings:
            sentences.append(f"{_count(warnings, 'warning')}.")
        failed = [known.intent for known in self.decisions if known.outcome is not None and not known.outcome.success]
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            sentences.append(f"Unsuccessful: {'; '.join(failed[:3])}{more}.")
        return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class RunSummary(Document):
    """A run in brief, for listings and analysis."""

    run_id: str
    goal_id: str
    status: RunStatus
    duration_ms: int
    decision_count: int
    success_rate: float
    problem_count: int
    narrative: str
    key_decisions: list[str] = Field(default_factory=list)
    critical_problems: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    successes: list[str] = Field(default_factory=list)

    @classmethod
    def from_run(cls, run: Run) -> RunSummary:
        """The summary of ``run`` as it is now: at most 5 key decisions (not successful, or judged above 0.8) and the
        summaries of at most 3 successes."""
        key = [
            decision.summary_for_builder()
            for decision in run.decisions
            if not decision.was_successful
            or (decision.evaluation is not None and decision.evaluation.outcome_quality > 0.8)
        ]
        successes = [
            decision.outcome.summary
            for decision in run.decisions
            if decision.outcome is not None and decision.outcome.success and decision.outcome.summary
        ]
        return cls(
            run_id=run.id,
            goal_id=run.goal_id,
            status=run.status,
            duration_ms=run.duration_ms,
            decision_count=run.metrics.total_decisions,
            success_rate=run.metrics.success_rate,
            problem_count=len(run.problems),
            narrative=run.narrative,
            key_decisions=key[:5],
            critical_problems=[problem.description for problem in run.problems if problem.severity == "critical"],
            warnings=[problem.description for problem in run.problems if problem.severity == "warning"],
            successes=successes[:3],
        )
