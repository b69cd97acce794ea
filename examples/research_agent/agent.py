"""The agent: a graph of 19 nodes with tools, two routers, a fan-out of four branches, their join, and a loop.

intake > plan > triage > dispatch > search_<kind> > assess_<kind> > compare > review > write_report
                  |                 (four kinds of bridge at once)     ^         |         |
                  > answer_directly                                    follow_up <      check_sources > publish
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from ledger import Ledger, current_step
from library import TOOLS, call_tool
from model import build_model

from framework.graph.builtin_nodes import FunctionNode, LLMNode, RouterNode
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.llm.provider import ToolResult, ToolUse
from framework.runtime.core import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage.backend import Storage

QUESTION = "Which kind of bridge should carry a tram line over a river with a main span of 240 m?"
BODY_SECONDS = 0.1
KINDS = ("girder", "arch", "cable_stayed", "suspension")

GOAL = Goal(
    id="choose-a-bridge",
    name="Choose a bridge",
    description="Compare kinds of bridge for a crossing and recommend one, citing a document for every claim.",
)

# --- function nodes ---------------------------------------------------------------------------------------------------


def intake(question: str) -> dict[str, Any]:
    """What the question asks for, as data."""
    metres = re.search(r"(\d+) m\b", question)
    return {"span_m": int(metres.group(1)) if metres else 0, "load": "trams" if "tram" in question else "road"}


def dispatch(criteria: list[str]) -> dict[str, Any]:
    """What the branches share."""
    return {"brief": f"Look for: {', '.join(criteria)}."}


def compare(scores: dict[str, int], notes: str | None = None) -> dict[str, Any]:
    """Rank the kinds; without a note on the upkeep of the best one there is a gap."""
    ranking = sorted(scores, key=lambda kind: (-scores[kind], kind))
    return {"ranking": ranking, "best": ranking[0], "route_on": "enough" if notes else "gaps"}


def check_sources(report: str, sources: list[str], notes: str) -> dict[str, Any]:
    """Every document the report cites must have been read."""
    cited = re.findall(r"\[(\w+)\]", report)
    unread = [source for source in cited if source not in [*sources, *json.loads(notes)["sources"]]]
    if unread or not cited:
        raise ValueError(f"the report cites {cited}, of which {unread} were never read")
    return {"cited": cited}


def publish(report: str, cited: list[str]) -> dict[str, Any]:
    """The answer as the caller gets it."""
    return {"answer": report, "citations": len(cited)}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "intake": intake,
    "dispatch": dispatch,
    "compare": compare,
    "check_sources": check_sources,
    "publish": publish,
}


# --- a node of our own ------------------------------------------------------------------------------------------------


class Assess(NodeProtocol):
    """Asks the model to score what a branch found, and adds to what all branches collect."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def execute(self, ctx: NodeContext) -> NodeResult:
        findings = json.loads(ctx.memory.read(f"findings_{self.kind}"))
        given = json.dumps({"span_m": ctx.memory.read("span_m"), "findings": findings})
        messages = [{"role": "user", "content": given}]
        reply = await asyncio.to_thread(ctx.llm.complete, messages=messages, system="You assess a kind of bridge.")
        score = json.loads(reply.content)["score"]
        sources = [*(ctx.memory.read("sources") or []), *findings["sources"]]
        output = {"scores": {self.kind: score}, "sources": sources}
        return NodeResult(success=True, output=output, tokens_used=reply.input_tokens + reply.output_tokens)


# --- the graph --------------------------------------------------------------------------------------------------------


def build_graph() -> GraphSpec:
    """The definition: plain data, the same in every process."""
    tools = [tool.name for tool in TOOLS]
    nodes = [
        NodeSpec(id="intake", node_type="function", input_keys=["question"], output_keys=["span_m", "load"]),
        NodeSpec(
            id="plan",
            node_type="llm_generate",
            system_prompt="You plan a piece of research.",
            input_keys=["question", "load"],
            output_keys=["criteria", "approach"],
        ),
        NodeSpec(
            id="triage",
            node_type="router",
            system_prompt="You decide how much work a question needs.",
            input_keys=["question", "approach"],
            routes={"quick": "answer_directly", "deep": "dispatch"},
        ),
        NodeSpec(
            id="answer_directly",
            node_type="llm_generate",
            system_prompt="You answer at once.",
            input_keys=["question"],
            output_keys=["answer"],
        ),
        NodeSpec(
            id="dispatch",
            node_type="function",
            input_keys=["criteria"],
            output_keys=["brief"],
            fan_out=True,
            join_node="compare",
        ),
        NodeSpec(
            id="compare",
            node_type="function",
            input_keys=["scores", "notes"],
            output_keys=["ranking", "best", "route_on"],
        ),
        NodeSpec(
            id="review",
            node_type="router",
            input_keys=["route_on"],
            routes={"gaps": "follow_up", "enough": "write_report"},
        ),
        NodeSpec(
            id="follow_up",
            tools=tools,
            system_prompt="You research the upkeep of a bridge.\nTopic: {best} upkeep",
            input_keys=["best"],
            output_keys=["notes"],
        ),
        NodeSpec(
            id="write_report",
            node_type="llm_generate",
            system_prompt="You write a short report.",
            input_keys=["question", "ranking", "notes", "sources"],
            output_keys=["report"],
        ),
        NodeSpec(
            id="check_sources",
            node_type="function",
            input_keys=["report", "sources", "notes"],
            output_keys=["cited"],
            max_retries=1,
        ),
        NodeSpec(
            id="publish",
            node_type="function",
            input_keys=["report", "cited"],
            output_keys=["answer", "citations"],
        ),
    ]
    edges = [_edge("intake", "plan"), _edge("plan", "triage")]
    for kind in KINDS:
        nodes.append(
            NodeSpec(
                id=f"search_{kind}",
                tools=tools,
                system_prompt=f"You research a kind of bridge. {{brief}}\nTopic: {kind} span",
                input_keys=["question", "brief"],
                output_keys=[f"findings_{kind}"],
            )
        )
        nodes.append(
            NodeSpec(
                id=f"assess_{kind}",
                node_type="custom",
                input_keys=["span_m", f"findings_{kind}", "sources"],
                output_keys=["scores", "sources"],
            )
        )
        edges += [_edge("dispatch", f"search_{kind}"), _edge(f"search_{kind}", f"assess_{kind}")]
        edges.append(_edge(f"assess_{kind}", "compare"))
    edges += [_edge("compare", "review"), _edge("follow_up", "compare"), _edge("write_report", "check_sources")]
    edges.append(_edge("check_sources", "publish"))
    return GraphSpec(
        id="research-agent",
        goal_id=GOAL.id,
        entry_node="intake",
        terminal_nodes=["answer_directly", "publish"],
        nodes=nodes,
        edges=edges,
        append_only_keys=["sources"],
        reducers={"scores": "merge"},
    )


def _edge(source: str, target: str) -> EdgeSpec:
    return EdgeSpec(id=f"{source}-{target}", source=source, target=target, condition=EdgeCondition.ON_SUCCESS)


# --- everything together ----------------------------------------------------------------------------------------------


class Counted(NodeProtocol):
    """A node whose body writes into the ledger when it begins, and whose calls are written under its step.

    ``seconds`` is how long the body takes besides: a function that took no time could not be killed in the middle.
    """

    def __init__(self, node: Any, ledger: Ledger, seconds: float) -> None:
        self.node = node
        self.ledger = ledger
        self.seconds = seconds

    async def execute(self, ctx: NodeContext) -> NodeResult:
        current_step.set(ctx.step_key)
        self.ledger.write("body", node=ctx.node_id, key=ctx.idempotency_key)
        await asyncio.sleep(self.seconds)
        result: NodeResult = await self.node.execute(ctx)
        self.ledger.write("body_end", node=ctx.node_id)
        return result


def build_executor(storage: Storage, ledger: Ledger, *, seed: int = 0, pace: float = 1.0) -> GraphExecutor:
    """An executor for the graph, with durable runs in ``storage`` and everything it does counted in ``ledger``."""

    def run_tool(use: ToolUse) -> ToolResult:
        ledger.write("tool", tool=use.name)
        return call_tool(use, seconds=0.05 * pace)

    implementations: dict[str, Any] = {node_id: FunctionNode(function) for node_id, function in FUNCTIONS.items()}
    implementations |= {f"assess_{kind}": Assess(kind) for kind in KINDS}
    for spec in build_graph().nodes:
        if spec.id not in implementations:
            implementations[spec.id] = RouterNode() if spec.node_type == "router" else LLMNode(run_tool)
    return GraphExecutor(
        runtime=Runtime(storage),
        llm=build_model(ledger, seed=seed, pace=pace),
        tools=TOOLS,
        tool_executor=run_tool,
        node_registry={
            node_id: Counted(node, ledger, BODY_SECONDS * pace) for node_id, node in implementations.items()
        },
        checkpoint_manager=CheckpointManager(storage, CheckpointConfig()),
    )
