"""``FlexibleGraphExecutor``: carries out a plan by worker and judge, and with a checkpoint manager so that nothing done
is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from framework.errors import ResumeError
from framework.graph.budget import RunBudget, part_account
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.goal import Goal
from framework.graph.judge import create_default_judge
from framework.graph.plan import (
    ApprovalRequest,
    ApprovalResult,
    EvaluationRule,
    ExecutionStatus,
    Plan,
    PlanExecutionResult,
)
from framework.graph.plan_answers import answer_approval, pending_approvals, stored_state
from framework.graph.plan_execution import PlanExecution
from framework.graph.plan_planner import problems_of, problems_of_names
from framework.graph.plan_terms import Limits
from framework.graph.worker_node import WorkerNode
from framework.llm.provider import Tool, ToolPolicy
from framework.schemas.checkpoint import StepRecord


@dataclass
class ExecutorConfig:
    """Limits of an execution; all of them hold over restarts.

    ``max_retries_per_step`` counts attempts in total, for steps that do not set ``max_retries`` themselves.
    ``max_total_steps`` counts attempts of all steps together, those that a crash of the process cut off included.
    ``max_recovery_attempts`` is how often in a row a run goes on after a crash with nothing of it made durable in
    between; then it fails. ``timeout_seconds`` limits the work of one attempt, and its judgement as much again, but
    not a person's answer; ``None`` or 0 is no limit. ``max_concurrency`` is how many ready steps run at once; 1 keeps
    the order of the list. Before attempt n the executor waits about ``retry_delay_seconds * 2**(n-2)``,
    at most ``retry_max_delay_seconds``, and up to 300 s more when a model's provider asks for it.
    ``enable_parallel_execution`` is kept for callers and means nothing.
    """

    max_retries_per_step: int = 3
    max_total_steps: int = 100
    timeout_seconds: float | None = 300
    enable_parallel_execution: bool = False
    max_concurrency: int = 1
    max_recovery_attempts: int = 5
    retry_delay_seconds: float = 0.2
    retry_max_delay_seconds: float = 30.0


class FlexibleGraphExecutor:
    """Executes plans. One executor may run any number of them at once.

    ``judge`` (by default ``create_default_judge(llm)``) decides on every result. ``approval_callback`` is asked when a
    step requires approval: it takes an ``ApprovalRequest`` and returns, or resolves to, an ``ApprovalResult``; without
    one the run waits for ``answer_approval``. With a ``checkpoint_manager`` every accepted step, every judged attempt
    and every approval is durable; without one nothing is written.
    """

    def __init__(
        self,
        runtime: Any,
        llm: Any = None,
        tools: Mapping[str, Tool] | Iterable[Tool] | None = None,
        tool_executor: Callable[..., Any] | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        judge: Any = None,
        config: ExecutorConfig | None = None,
        approval_callback: Callable[[ApprovalRequest], Any] | None = None,
        checkpoint_manager: CheckpointManager | None = None,
        *,
        sub_graph_executor: Callable[..., Any] | None = None,
        sandbox: CodeSandbox | None = None,
    ) -> None:
        self.runtime = runtime
        self.judge = judge if judge is not None else create_default_judge(llm)
        self.config = config if config is not None else ExecutorConfig()
        self.approval_callback = approval_callback
        self.checkpoint_manager = checkpoint_manager
        self.worker = WorkerNode(
            runtime,
            llm=llm,
            tools=tools,
            tool_executor=tool_executor,
            functions=functions,
            sub_graph_executor=sub_graph_executor,
            sandbox=sandbox,
        )

    @property
    def llm(self) -> Any:
        """The model that llm_call steps ask."""
        return self.worker.llm

    @property
    def tools(self) -> dict[str, Tool]:
        """The tools by name."""
        return self.worker.tools

    def register_function(
        self, name: str, function: Callable[..., Any], *, effects: bool = False, policy: ToolPolicy | None = None
    ) -> None:
        """Let steps call ``function``, sync or async, under ``name``. One that is sync runs in a thread.

        ``effects=True`` says that it changes something outside. ``policy`` says what becomes of a call that had begun
        before a crash and has no recorded outcome, whatever ``effects`` is: "rerun" (as without either) calls again,
        "ask" (as with effects) pauses the run until somebody settles it, "fail" fails the step. With the last two a
        call is recorded before it is made, and so is what it returned. Raises ``ValueError`` for another policy.
        """
        self.worker.register_function(name, function, effects=effects, policy=policy)

    def register_tool(self, tool: Tool) -> None:
        """Let steps use ``tool``."""
        self.worker.register_tool(tool)

    def register_graph(self, graph_id: str, graph: Any, goal: Any, executor: Any) -> None:
        """Let steps run ``graph`` on ``executor`` (a ``GraphExecutor``) as a run of its own.

        In a durable plan its id is ``<plan's run>/<step id>#<visit>`` and its parent the plan's run, so with a
        checkpoint manager in that executor it is durable itself and goes on where it was.
        """
        self.worker.register_graph(graph_id, graph, goal, executor)

    def add_evaluation_rule(self, rule: EvaluationRule) -> None:
        """Add a rule to the judge."""
        self.judge.add_rule(rule)

    def set_approval_callback(self, callback: Callable[[ApprovalRequest], Any] | None) -> None:
        """Ask ``callback`` for approvals from now on; ``None`` lets runs wait for ``answer_approval``."""
        self.approval_callback = callback

    async def execute_plan(
        self,
        plan: Plan | None,
        goal: Goal,
        context: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        replan: bool = False,
        metadata: Mapping[str, Any] | None = None,
        budget: RunBudget | None = None,
    ) -> PlanExecutionResult:
        """Carry out ``plan`` as far as it goes; its steps say afterwards where they stand.

        With a checkpoint manager and a ``run_id`` the same call starts, resumes or returns: an unknown id starts a
        run; a paused, crashed, cancelled or failed one goes on with its finished steps kept (after a failure, failed
        steps are tried afresh); a completed one's result is returned and nothing runs. The store says what is finished,
        not ``plan``, which may be ``None`` then. A plan that differs from the stored one is refused, or with ``replan``
        taken as the run's next revision: completed steps that did not change stay completed. ``context`` values that
        differ from the run's original ones are written over its context. ``metadata`` are small facts about a new run,
        as JSON values, kept for its life and shown where runs are listed. ``budget`` limits what the run may spend in
        all; it is recorded, and counts for later calls until one gives another. A run that has used it up fails, and
        goes on with a larger one; what sub-graphs take counts. A run whose process ended within a call with effects, of
        a tool or a function, pauses until the call is settled by ``CheckpointManager.settle``, and one whose sub-graph
        waits pauses with that.

        Whatever steps, judge and callback do is in the result. Raises ``ValueError`` without a plan or a stored one,
        ``RunBusy``, ``RunNotFound``, ``DefinitionChanged``, ``ResumeError``, ``InvalidId``, ``UnknownType`` before
        anything ran, ``LeaseLost`` when another process took the run over, and ``asyncio.CancelledError``; the
        accepted steps are durable then.
        """
        if plan is None and (run_id is None or self._manager() is None):
            raise ValueError("execute_plan without a plan needs the run_id of a stored run and a checkpoint manager.")
        problems = problems_of(plan) if plan is not None else []
        problems += problems_of_names(context, "the context")
        if problems:
            text = "Invalid plan: " + "; ".join(problems)
            return PlanExecutionResult(status=ExecutionStatus.FAILED, error=text, run_id=run_id)
        with part_account() as whole:
            execution = PlanExecution(
                self, self._manager(), plan, goal, dict(context or {}), run_id, replan, metadata, budget, whole
            )
            return await execution.run()

    async def answer_approval(
        self, run_id: str, step_id: str, answer: ApprovalResult, request_id: str | None = None
    ) -> None:
        """Store the answer to a step's approval request, from any process; durable on return.

        A run that is going on uses it within about a second, one that has paused when it goes on by
        ``execute_plan(..., run_id=run_id)``. It is used once, and only if the step, its resolved arguments and the
        plan's revision are still what was asked. ``request_id`` makes sure that the answer is to the request one has
        seen. Raises ``ApprovalError`` for a second answer, a changed request or none, modifications that the step does
        not take, and a completed run, ``RunNotFound``, ``ResumeError``, ``StorageError``.
        """
        await answer_approval(self._required(run_id), run_id, step_id, answer, request_id)

    async def pending_approvals(self, run_id: str) -> list[ApprovalRequest]:
        """The requests of a run that wait for an answer. Raises ``RunNotFound``, ``ResumeError``, ``StorageError``."""
        return await pending_approvals(self._required(run_id), run_id)

    async def stored_plan(self, run_id: str) -> Plan:
        """The plan of a run as the store has it, its steps saying where they stand. Raises as ``pending_approvals``."""
        return (await stored_state(self._required(run_id), run_id)).plan

    async def stored_steps(self, run_id: str) -> dict[str, StepRecord]:
        """What the store has of each step, by id: status, attempts, error, judgement and feedback, approval request and
        answer, the revision it was completed in. Raises as ``pending_approvals``."""
        state = await stored_state(self._required(run_id), run_id)
        return {step.id: state.full_record(step) for step in state.plan.steps}

    def _manager(self) -> CheckpointManager | None:
        manager = self.checkpoint_manager
        return manager if manager is not None and manager.config.enabled else None

    def _required(self, run_id: str) -> CheckpointManager:
        manager = self._manager()
        if manager is None:
            raise ResumeError(run_id, f"Run {run_id!r} cannot be looked up: this executor has no checkpoint manager.")
        return manager

    def limits(self) -> Limits:
        """The configuration as a run takes it."""
        config = self.config
        return Limits(
            max_total_steps=config.max_total_steps,
            max_retries_per_step=config.max_retries_per_step,
            max_recovery_attempts=config.max_recovery_attempts,
            timeout_seconds=config.timeout_seconds,
            max_concurrency=config.max_concurrency,
            retry_delay_seconds=config.retry_delay_seconds,
            retry_max_delay_seconds=config.retry_max_delay_seconds,
        )


async def execute_plan(
    plan: Plan,
    goal: Goal,
    runtime: Any,
    llm: Any = None,
    tools: Mapping[str, Tool] | Iterable[Tool] | None = None,
    tool_executor: Callable[..., Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> PlanExecutionResult:
    """Carry out ``plan`` with a ``FlexibleGraphExecutor`` of its own and without checkpoints."""
    executor = FlexibleGraphExecutor(runtime, llm=llm, tools=tools, tool_executor=tool_executor)
    return await executor.execute_plan(plan, goal, context)
