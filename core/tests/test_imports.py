"""What can be imported from where, and that importing the package stays free of networks, keys and vendors' SDKs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[1]

NAMES = {
    "framework": "Runtime BuilderQuery Decision Option Outcome DecisionEvaluation Run RunSummary Problem LLMProvider "
    "AgentRunner AgentOrchestrator",
    "framework.graph": (
        "Goal SuccessCriterion Constraint GoalStatus NodeSpec NodeContext NodeResult NodeProtocol EdgeSpec "
        "EdgeCondition GraphExecutor Plan PlanStep ActionSpec ActionType StepStatus Judgment JudgmentAction "
        "EvaluationRule PlanExecutionResult ExecutionStatus load_export ApprovalDecision ApprovalRequest "
        "ApprovalResult HybridJudge create_default_judge WorkerNode StepExecutionResult FlexibleGraphExecutor "
        "ExecutorConfig CodeSandbox safe_exec safe_eval"
    ),
    "framework.graph.plan": (
        "Plan PlanStep ActionSpec ActionType StepStatus Judgment JudgmentAction EvaluationRule PlanExecutionResult "
        "ExecutionStatus ApprovalDecision ApprovalRequest ApprovalResult load_export"
    ),
    "framework.graph.code_sandbox": "CodeSandbox SandboxResult safe_exec safe_eval",
    "framework.graph.judge": "HybridJudge create_default_judge",
    "framework.graph.worker_node": "WorkerNode StepExecutionResult parse_llm_json_response",
    "framework.graph.flexible_executor": "FlexibleGraphExecutor ExecutorConfig execute_plan",
    "framework.graph.goal": "Goal GoalStatus SuccessCriterion Constraint",
    "framework.graph.node": (
        "NodeSpec SharedMemory NodeContext NodeResult NodeProtocol FunctionNode LLMNode RouterNode"
    ),
    "framework.graph.edge": "EdgeCondition EdgeSpec AsyncEntryPointSpec GraphSpec",
    "framework.graph.executor": "ExecutionResult GraphExecutor",
    "framework.graph.checkpoint_manager": "CheckpointManager",
    "framework.schemas": "Decision Option Outcome DecisionEvaluation Run RunSummary Problem",
    "framework.schemas.decision": "Decision DecisionType Option Outcome DecisionEvaluation",
    "framework.schemas.run": "Run RunStatus RunMetrics RunSummary Problem",
    "framework.schemas.checkpoint": "Checkpoint CheckpointConfig",
    "framework.runtime": "Runtime",
    "framework.runtime.core": "Runtime",
    "framework.storage": "FileStorage",
    "framework.storage.backend": "FileStorage",
    "framework.llm": "LLMProvider LLMResponse",
    "framework.llm.provider": "LLMProvider LLMResponse Tool ToolUse ToolResult",
    "framework.runner": (
        "AgentRunner AgentInfo ValidationResult ToolRegistry tool AgentOrchestrator AgentMessage MessageType "
        "CapabilityLevel CapabilityResponse OrchestratorResult RegisteredAgent load_agent_export node_function"
    ),
    "framework.builder.query": "BuilderQuery",
}
PUBLIC = [(module, name) for module, names in NAMES.items() for name in names.split()]

# What a user must not need for `import framework`, and packages that only an optional extra brings.
FOREIGN = (
    "openai anthropic litellm httpx requests aiohttp urllib3 psycopg psycopg2 asyncpg sqlalchemy fastapi starlette "
    "uvicorn mcp langgraph temporalio opentelemetry rich numpy pandas pydantic_monty"
).split()

HEAVY = ["asyncio", "pydantic", "orjson", "sqlite3", "ssl", "http.client"]
"""What the library itself needs, but not before a name of it is used."""


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after ``code``, with no keys and no user configuration."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CORE,
        env={"PYTHONPATH": str(CORE), "PATH": ""},
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_public_name_is_importable(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is not None


@pytest.mark.parametrize(
    "module", ["framework", "framework.graph", "framework.llm", "framework.runner", "framework.schemas"]
)
def test_everything_a_package_lists_exists_and_is_listed_once(module: str) -> None:
    package = import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(NAMES[module].split()) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("module", ["framework", "framework.graph", "framework.llm", "framework.runner"])
def test_a_name_that_does_not_exist_is_an_attribute_error_that_names_it(module: str) -> None:
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = import_module(module).NoSuchName
    with pytest.raises(ImportError):
        exec(f"from {module} import NoSuchName")


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("framework", "framework.runtime.core", "Runtime"),
        ("framework.runtime", "framework.runtime.core", "Runtime"),
        ("framework.storage", "framework.storage.backend", "FileStorage"),
        ("framework.graph", "framework.graph.node", "NodeSpec"),
        ("framework.graph", "framework.graph.edge", "GraphSpec"),
        ("framework", "framework.schemas.run", "Run"),
        ("framework.llm", "framework.llm.provider", "LLMProvider"),
        ("framework", "framework.runner", "AgentRunner"),
    ],
)
def test_a_name_is_the_same_object_wherever_it_is_imported_from(one: str, other: str, name: str) -> None:
    assert getattr(import_module(one), name) is getattr(import_module(other), name)


def test_importing_the_package_loads_nothing_foreign_and_nothing_heavy() -> None:
    loaded = loaded_by("import framework")
    assert not loaded & {*FOREIGN, *HEAVY}
    assert {name for name in loaded if name.startswith("framework.")} == set()


def test_importing_every_public_name_loads_nothing_foreign() -> None:
    imports = "\n".join(f"from {module} import {', '.join(names.split())}" for module, names in NAMES.items())
    assert not loaded_by(imports) & set(FOREIGN)


def test_describing_a_graph_needs_no_storage() -> None:
    loaded = loaded_by("from framework.graph import Goal, NodeSpec, EdgeSpec, GraphSpec")
    assert not {name for name in loaded if name.startswith(("framework.storage", "framework.runtime", "sqlite3"))}
