"""``WorkerNode``: does the work of one attempt of a plan's step, whatever its action, and records what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from framework._secrets import masked_traceback
from framework.graph.calls import policy_for
from framework.graph.code_sandbox import CodeSandbox
from framework.graph.node_base import is_infrastructure_error
from framework.graph.plan import PlanStep
from framework.graph.references import MissingReference, resolve
from framework.graph.text import shorten, summary_of
from framework.graph.worker_actions import (
    ACTIONS,
    AttemptInfo,
    Resources,
    StepExecutionResult,
    SubGraph,
    Work,
    failure,
    parse_llm_json_response,
    raised,
)
from framework.llm.provider import Tool, ToolPolicy

logger = logging.getLogger(__name__)

__all__ = ["AttemptInfo", "StepExecutionResult", "WorkerNode", "parse_llm_json_response", "tools_by_name"]


class WorkerNode:
    """Does the work of steps. One worker serves any number of plans at once.

    Functions and synchronous models and tools run in threads. ``sub_graph_executor(graph_id, inputs, context)`` runs
    graphs that are not registered here; what it returns has ``success, output, error, total_tokens``.
    """

    def __init__(
        self,
        runtime: Any,
        llm: Any = None,
        tools: Mapping[str, Tool] | Iterable[Tool] | None = None,
        tool_executor: Callable[..., Any] | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        sub_graph_executor: Callable[..., Any] | None = None,
        sandbox: CodeSandbox | None = None,
    ) -> None:
        self.runtime = runtime
        self.resources = Resources(
            llm=llm,
            tools=tools_by_name(tools),
            tool_executor=tool_executor,
            functions=dict(functions or {}),
            sub_graph_executor=sub_graph_executor,
            sandbox=sandbox if sandbox is not None else CodeSandbox(),
        )

    @property
    def llm(self) -> Any:
        """The model that llm_call steps ask."""
        return self.resources.llm

    @property
    def tools(self) -> dict[str, Tool]:
        """The tools by name."""
        return self.resources.tools

    @property
    def tool_executor(self) -> Callable[..., Any] | None:
        """What runs the tools."""
        return self.resources.tool_executor

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The registered functions by name."""
        return self.resources.functions

    @property
    def sub_graph_executor(self) -> Callable[..., Any] | None:
        """What runs graphs that are not registered."""
        return self.resources.sub_graph_executor

    @property
    def sandbox(self) -> CodeSandbox:
        """Where code steps run."""
        return self.resources.sandbox

    def register_function(
        self, name: str, function: Callable[..., Any], *, effects: bool = False, policy: ToolPolicy | None = None
    ) -> None:
        """Let steps call ``function``, sync or async, under ``name``; see `FlexibleGraphExecutor.register_function`."""
        declared = policy_for(name, effects, policy)
        self.resources.functions[name] = function
        self.resources.policies.pop(name, None)
        if effects or policy is not None:  # else a tool of this name may say what it does
            self.resources.policies[name] = declared

    def register_tool(self, tool: Tool) -> None:
        """Let steps use ``tool``."""
        self.resources.tools[tool.name] = tool

    def register_graph(self, graph_id: str, graph: Any, goal: Any, executor: Any) -> None:
        """Let steps run ``graph`` on ``executor`` (a ``GraphExecutor``), as a run of its own."""
        self.resources.sub_graphs[graph_id] = SubGraph(graph, goal, executor)

    async def execute(
        self,
        step: PlanStep,
        context: Mapping[str, Any],
        *,
        outputs: Mapping[str, Any] | None = None,
        info: AttemptInfo | None = None,
    ) -> StepExecutionResult:
        """One attempt of ``step``; a failed result for whatever goes wrong, an exception only for the run's own store.

        ``context`` holds names, ``outputs`` the outputs of finished steps by step id; neither is changed, and what
        the work is given of them are copies. ``info`` is what the attempt may know besides. When this is cancelled,
        as by a time limit, a thread that does the work goes on; the next attempt of the step in ``info.run_id`` by this
        worker begins once it has ended, and the text of the ``asyncio.CancelledError`` tells what is waited for.
        """
        kind = step.action.action_type
        info = info if info is not None else AttemptInfo()
        outputs = outputs if outputs is not None else {}
        decision_id = self._decide(step, info)
        started = time.perf_counter()
        try:
            inputs = resolve(step.inputs, context, outputs)
            result = await ACTIONS[kind](self.resources, Work(step, inputs, context, outputs, info))
        except MissingReference as error:
            result = failure(error.at_step(step.id), "missing_data", kind.value)
        except Exception as error:  # noqa: BLE001 - becomes the failed result, or is raised again there
            result = raised(error, "exception", kind.value)
        result.latency_ms = int((time.perf_counter() - started) * 1000)
        self._record(step, decision_id, result)
        return result

    def _decide(self, step: PlanStep, info: AttemptInfo) -> Any:
        """The id of the recorded decision; ``None`` when it could not be recorded."""
        decide = getattr(self.runtime, "decide", None)
        if decide is None:
            return ""
        kind = step.action.action_type.value
        try:
            return decide(
                intent=f"Execute plan step {step.id}: {shorten(step.description, 120)}",
                options=[{"id": kind, "description": f"Do it by {kind}", "action_type": kind}],
                chosen=kind,
                reasoning=f"The plan says so; attempt {info.number}",
                node_id=step.id,
            )
        except Exception as error:  # a runtime may raise anything, and the step does not depend on it
            if is_infrastructure_error(error):
                raise
            trace = masked_traceback(error)
            logger.warning("The decision to run step %r could not be recorded:\n%s", step.id, trace)
            return None

    def _record(self, step: PlanStep, decision_id: Any, result: StepExecutionResult) -> None:
        record = getattr(self.runtime, "record_outcome", None)
        if record is None or decision_id is None:
            return
        try:
            short = shorten("; ".join(f"{key} = {summary_of(value, 60)}" for key, value in result.outputs.items()))
            record(
                decision_id=decision_id,
                success=result.success,
                result=short or None,
                error=shorten(result.error) if result.error else None,
                summary=short,
                tokens_used=result.tokens_used,
                latency_ms=result.latency_ms,
            )
        except Exception as error:  # the work is done and paid for: a note that fails must not undo it
            if is_infrastructure_error(error):
                raise
            trace = masked_traceback(error)
            logger.warning("The outcome of step %r could not be recorded; it is kept:\n%s", step.id, trace)


def tools_by_name(tools: Mapping[str, Tool] | Iterable[Tool] | None) -> dict[str, Tool]:
    """Tools given as a dict or a list, by name."""
    if tools is None:
        return {}
    return dict(tools) if isinstance(tools, Mapping) else {tool.name: tool for tool in tools}
