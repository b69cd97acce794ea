"""Surefoot: agent runs that survive. No finished step is lost, repeated or paid for twice.

Names are imported when first used, so ``import framework`` loads no LLM, web or database client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.builder.query import BuilderQuery
    from framework.llm.anthropic import AnthropicProvider
    from framework.llm.provider import LLMProvider
    from framework.runner.orchestrator import AgentOrchestrator
    from framework.runner.runner import AgentRunner
    from framework.runtime.core import Runtime
    from framework.schemas.decision import Decision, DecisionEvaluation, Option, Outcome
    from framework.schemas.run import Problem, Run, RunSummary

__version__ = "0.1.0"

_HOMES = {
    "AgentOrchestrator": "framework.runner.orchestrator",
    "AgentRunner": "framework.runner.runner",
    "AnthropicProvider": "framework.llm.anthropic",
    "BuilderQuery": "framework.builder.query",
    "Decision": "framework.schemas.decision",
    "DecisionEvaluation": "framework.schemas.decision",
    "LLMProvider": "framework.llm.provider",
    "Option": "framework.schemas.decision",
    "Outcome": "framework.schemas.decision",
    "Problem": "framework.schemas.run",
    "Run": "framework.schemas.run",
    "RunSummary": "framework.schemas.run",
    "Runtime": "framework.runtime.core",
}

__all__ = [
    "AgentOrchestrator",
    "AgentRunner",
    "AnthropicProvider",
    "BuilderQuery",
    "Decision",
    "DecisionEvaluation",
    "LLMProvider",
    "Option",
    "Outcome",
    "Problem",
    "Run",
    "RunSummary",
    "Runtime",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'framework' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
