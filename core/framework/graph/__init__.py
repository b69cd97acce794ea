"""Graphs and their execution: goals, nodes, edges, the executor and its checkpoints.

Names are imported when first used: the executor needs the storage, a specification does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.graph.budget import RunBudget
    from framework.graph.code_sandbox import CodeSandbox, safe_eval, safe_exec
    from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
    from framework.graph.executor import ExecutionResult, GraphExecutor
    from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
    from framework.graph.goal import Constraint, Goal, GoalStatus, SuccessCriterion
    from framework.graph.judge import HybridJudge, create_default_judge
    from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
    from framework.graph.plan import (
        ActionSpec,
        ActionType,
        ApprovalDecision,
        ApprovalRequest,
        ApprovalResult,
        EvaluationRule,
        ExecutionStatus,
        Judgment,
        JudgmentAction,
        Plan,
        PlanExecutionResult,
        PlanStep,
        StepStatus,
        load_export,
    )
    from framework.graph.worker_node import StepExecutionResult, WorkerNode

_HOMES = {
    "ActionSpec": "plan",
    "ActionType": "plan",
    "ApprovalDecision": "plan",
    "ApprovalRequest": "plan",
    "ApprovalResult": "plan",
    "CodeSandbox": "code_sandbox",
    "Constraint": "goal",
    "EdgeCondition": "edge",
    "EdgeSpec": "edge",
    "EvaluationRule": "plan",
    "ExecutionResult": "executor",
    "ExecutionStatus": "plan",
    "ExecutorConfig": "flexible_executor",
    "FlexibleGraphExecutor": "flexible_executor",
    "Goal": "goal",
    "GoalStatus": "goal",
    "GraphExecutor": "executor",
    "GraphSpec": "edge",
    "HybridJudge": "judge",
    "Judgment": "plan",
    "JudgmentAction": "plan",
    "NodeContext": "node",
    "NodeProtocol": "node",
    "NodeResult": "node",
    "NodeSpec": "node",
    "RunBudget": "budget",
    "Plan": "plan",
    "PlanExecutionResult": "plan",
    "PlanStep": "plan",
    "StepExecutionResult": "worker_node",
    "StepStatus": "plan",
    "SuccessCriterion": "goal",
    "WorkerNode": "worker_node",
    "create_default_judge": "judge",
    "load_export": "plan",
    "safe_eval": "code_sandbox",
    "safe_exec": "code_sandbox",
}

__all__ = [
    "ActionSpec",
    "ActionType",
    "ApprovalDecision",
    "ApprovalRequest",
    "ApprovalResult",
    "CodeSandbox",
    "Constraint",
    "EdgeCondition",
    "EdgeSpec",
    "EvaluationRule",
    "ExecutionResult",
    "ExecutionStatus",
    "ExecutorConfig",
    "FlexibleGraphExecutor",
    "Goal",
    "GoalStatus",
    "GraphExecutor",
    "GraphSpec",
    "HybridJudge",
    "Judgment",
    "JudgmentAction",
    "NodeContext",
    "NodeProtocol",
    "NodeResult",
    "NodeSpec",
    "Plan",
    "PlanExecutionResult",
    "PlanStep",
    "RunBudget",
    "StepExecutionResult",
    "StepStatus",
    "SuccessCriterion",
    "WorkerNode",
    "create_default_judge",
    "load_export",
    "safe_eval",
    "safe_exec",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'framework.graph' has no attribute {name!r}")
    return getattr(import_module(f"framework.graph.{home}"), name)
