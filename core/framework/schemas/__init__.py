"""The data that runs leave behind: decisions, outcomes, runs and their summaries."""

from framework.schemas.decision import Decision, DecisionEvaluation, Option, Outcome
from framework.schemas.run import Problem, Run, RunState, RunSummary

__all__ = [
    "Decision",
    "DecisionEvaluation",
    "Option",
    "Outcome",
    "Problem",
    "Run",
    "RunState",
    "RunSummary",
]
