"""Read-only analysis of past runs, for whoever builds and improves an agent."""

from framework.builder.query import BuilderQuery, FailureAnalysis, PatternAnalysis

__all__ = ["BuilderQuery", "FailureAnalysis", "PatternAnalysis"]
