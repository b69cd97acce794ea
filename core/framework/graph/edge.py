"""Graphs as data: edges with their conditions, and the graph that nodes and edges make up."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from framework._secrets import mask
from framework.errors import ExpressionError
from framework.graph import fan_out, graph_checks
from framework.graph.expressions import compile_expression
from framework.graph.json_reply import parse_json_object
from framework.graph.node_base import NodeSpec, is_infrastructure_error
from framework.graph.spending import NOTHING, Spent
from framework.graph.text import summary_of
from framework.llm.calls import ask

logger = logging.getLogger(__name__)

REDUCERS = frozenset(graph_checks.REDUCER_NAMES)
"""Names `GraphSpec.reducers` may use to combine what concurrent branches wrote to one key."""


class EdgeCondition(str, Enum):
    """When an edge may be followed."""

    ALWAYS = "always"
    ON_SUCCESS = "on_success"
    ON_FAILURE = "on_failure"
    CONDITIONAL = "conditional"
    LLM_DECIDE = "llm_decide"


class EdgeSpec(BaseModel):
    """A way from node ``source`` to node ``target``. Higher ``priority`` is tried first. Unknown fields are kept.

    ``input_mapping`` maps the key to write to the key to read, looked up in the source's output, then in the state.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    source: str
    target: str
    condition: EdgeCondition = EdgeCondition.ALWAYS
    condition_expr: str | None = None
    input_mapping: dict[str, str] = Field(default_factory=dict)
    priority: int = 0
    description: str = ""

    def should_traverse(
        self,
        source_success: bool,
        source_output: Mapping[str, Any],
        memory: Mapping[str, Any],
        llm: Any = None,
        goal: Any = None,
        source_node_name: str | None = None,
        target_node_name: str | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> bool:
        """Whether this edge may be followed after its source ended. Never raises because of the condition.

        A condition that cannot be evaluated counts as false; an llm_decide edge without a usable answer follows
        ``source_success``. Either is told to ``on_warning`` as one sentence, or logged when there is none.
        ``llm_decide`` calls ``llm.complete`` and blocks until it answers.
        """
        warn = on_warning or logger.warning
        match self.condition:
            case EdgeCondition.ALWAYS:
                return True
            case EdgeCondition.ON_SUCCESS:
                return source_success
            case EdgeCondition.ON_FAILURE:
                return not source_success
            case EdgeCondition.CONDITIONAL:
                return self._condition_holds(source_output, memory, warn)
            case EdgeCondition.LLM_DECIDE:
                if llm is None or goal is None:
                    return source_success
                prompt = self._question(source_success, source_output, memory, source_node_name, target_node_name)
                try:
                    response = llm.complete(messages=_messages(goal, prompt), system=_SYSTEM)
                except Exception as error:  # noqa: BLE001 - is a warning, or is raised again there
                    return self._not_decided(error, source_success, warn)
                return self._decision(response, source_success, warn)

    async def decide(
        self,
        source_success: bool,
        source_output: Mapping[str, Any],
        memory: Mapping[str, Any],
        llm: Any,
        goal: Any,
        source_node_name: str | None = None,
        target_node_name: str | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> tuple[bool, Spent]:
        """`should_traverse` of an llm_decide edge without blocking the event loop, and what asking took."""
        if goal is None:
            return source_success, NOTHING
        warn = on_warning or logger.warning
        prompt = self._question(source_success, source_output, memory, source_node_name, target_node_name)
        try:
            response = await ask(llm, messages=_messages(goal, prompt), system=_SYSTEM, json_schema=_DECISION)
        except Exception as error:  # noqa: BLE001 - is a warning, or is raised again there
            return self._not_decided(error, source_success, warn), NOTHING
        return self._decision(response, source_success, warn), Spent.of_reply(response)

    def map_inputs(self, source_output: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
        """What following this edge writes to the state: all of ``source_output``, or the mapped keys that exist."""
        if not self.input_mapping:
            return dict(source_output)
        mapped: dict[str, Any] = {}
        for target, source in self.input_mapping.items():
            if source in source_output:
                mapped[target] = source_output[source]
            elif source in memory:
                mapped[target] = memory[source]
        return mapped

    def _condition_holds(
        self, output: Mapping[str, Any], memory: Mapping[str, Any], warn: Callable[[str], None]
    ) -> bool:
        if not (self.condition_expr or "").strip():
            return True
        names: dict[str, Any] = {"output": output, "memory": memory, "result": output.get("result")}
        # Both are only read, key by key: neither a large state nor one that loads its values lazily is copied.
        namespace = ChainMap(cast(dict[str, Any], memory), names)
        try:
            return compile_expression(self.condition_expr or "").test(namespace)
        except ExpressionError as error:
            warn(f"{self._label()}: its condition {self.condition_expr!r} counts as false: {error}")
            return False

    def _decision(self, response: Any, source_success: bool, warn: Callable[[str], None]) -> bool:
        proceed = (parse_json_object(response.content) or {}).get("proceed")
        if not isinstance(proceed, bool):
            warn(f"{self._label()}: no true or false 'proceed' in the model's answer; following the node's success.")
            return source_success
        return proceed

    def _not_decided(self, error: Exception, source_success: bool, warn: Callable[[str], None]) -> bool:
        # Contract: a model that fails must not fail the run. Errors of our own store are not the model's.
        if is_infrastructure_error(error):
            raise error
        text = mask(f"{type(error).__name__}: {error}")
        warn(f"{self._label()}: the model failed ({text}); following the node's success.")
        return source_success

    def _question(
        self,
        source_success: bool,
        output: Mapping[str, Any],
        memory: Mapping[str, Any],
        source_name: str | None,
        target_name: str | None,
    ) -> str:
        lines = [
            f"Node {source_name or self.source!r} {'succeeded' if source_success else 'failed'}.",
            f"Should the workflow go on to node {target_name or self.target!r}?",
        ]
        if self.description:
            lines.append(f"About this step: {self.description}")
        lines += ["Output of the node:", *_listing(output), "State:", *_listing(memory)]
        lines.append('Answer with JSON: {"proceed": true or false, "reasoning": "one sentence"}')
        return "\n".join(lines)

    def _label(self) -> str:
        return f"Edge {self.id!r} ({self.source} -> {self.target})"


_SYSTEM = "You decide whether an agent's workflow takes one step. Answer only with the JSON object asked for."

_DECISION = {
    "type": "object",
    "properties": {"proceed": {"type": "boolean"}, "reasoning": {"type": "string"}},
    "required": ["proceed", "reasoning"],
    "additionalProperties": False,
}


def _messages(goal: Any, prompt: str) -> list[dict[str, Any]]:
    context = goal.to_prompt_context() if hasattr(goal, "to_prompt_context") else str(goal)
    return [{"role": "user", "content": f"{context}\n\n{prompt}"}]


def _listing(values: Mapping[str, Any]) -> list[str]:
    # Sorted: a state restored from a checkpoint may have another order, and the question must stay the same.
    return [f"- {key}: {summary_of(values[key])}" for key in sorted(values, key=str)] or ["- (empty)"]


class AsyncEntryPointSpec(BaseModel):
    """A further entry that an outside event may start at. `GraphSpec.validate` checks the two closed lists."""

    model_config = ConfigDict(extra="allow")

    id: str
    name: str
    entry_node: str
    trigger_type: str = "manual"
    trigger_config: dict[str, Any] = Field(default_factory=dict)
    isolation_level: str = "shared"
    priority: int = 0
    max_concurrent: int = 10


class GraphSpec(BaseModel):
    """A whole graph. Unknown fields are kept. `validate` says what is wrong with it; constructing it does not."""

    model_config = ConfigDict(extra="allow")

    id: str
    goal_id: str
    version: str = "1.0.0"
    entry_node: str
    entry_points: dict[str, str] = Field(default_factory=dict)
    async_entry_points: list[AsyncEntryPointSpec] = Field(default_factory=list)
    terminal_nodes: list[str] = Field(default_factory=list)
    pause_nodes: list[str] = Field(default_factory=list)
    nodes: list[NodeSpec] = Field(default_factory=list)
    edges: list[EdgeSpec] = Field(default_factory=list)
    memory_keys: list[str] = Field(default_factory=list)
    default_model: str = "claude-haiku-4-5-20251001"
    max_tokens: int = 1024
    max_steps: int = 100
    max_retries_per_node: int = 3
    description: str = ""
    created_by: str = ""
    append_only_keys: list[str] = Field(default_factory=list)
    """State keys that only ever grow at their end; concurrent branches may all append to them."""
    reducers: dict[str, str] = Field(default_factory=dict)
    """State key -> name in `REDUCERS`: how values that concurrent branches wrote to the key become one."""

    def get_node(self, node_id: str) -> NodeSpec | None:
        """The node with this id, or None."""
        return next((node for node in self.nodes if node.id == node_id), None)

    def get_outgoing_edges(self, node_id: str) -> list[EdgeSpec]:
        """The edges that leave the node, highest priority first, in declaration order among equals."""
        return sorted((edge for edge in self.edges if edge.source == node_id), key=lambda edge: -edge.priority)

    def get_incoming_edges(self, node_id: str) -> list[EdgeSpec]:
        """The edges that lead to the node, in declaration order."""
        return [edge for edge in self.edges if edge.target == node_id]

    def has_async_entry_points(self) -> bool:
        """Whether there is at least one asynchronous entry point."""
        return bool(self.async_entry_points)

    def get_async_entry_point(self, entry_point_id: str) -> AsyncEntryPointSpec | None:
        """The asynchronous entry point with this id, or None."""
        return next((entry for entry in self.async_entry_points if entry.id == entry_point_id), None)

    def get_entry_point(self, session_state: Mapping[str, Any] | None = None) -> str:
        """The node to start at: ``entry_node``, or the position that ``session_state`` names.

        A position is any of ``paused_at``, ``resume_from`` and ``next_node`` that is not None. Raises ValueError when
        a position is named and none leads to a node of this graph: starting over would repeat finished work.
        """
        state = session_state or {}
        named = {key: state[key] for key in ("paused_at", "resume_from", "next_node") if state.get(key) is not None}
        if not named:
            return self.entry_node
        paused_at, resume_from, next_node = (named.get(key) for key in ("paused_at", "resume_from", "next_node"))
        ids = {node.id for node in self.nodes}
        own_entry = f"{paused_at}_resume"
        if paused_at is not None and resume_from in ids and resume_from != own_entry:
            return str(resume_from)  # an explicit next node wins over the pause node's resume entry point
        if paused_at in self.pause_nodes and own_entry in self.entry_points:
            return self.entry_points[own_entry]
        if resume_from in self.entry_points:
            return self.entry_points[resume_from]
        for node_id in (resume_from, next_node):
            if node_id in ids:
                return str(node_id)
        listing = ", ".join(f"{key}={value!r}" for key, value in named.items())
        raise ValueError(
            f"Graph {self.id!r} cannot continue from {listing}: it leads to no node of this graph. Set next_node to a "
            "node id, or add an entry point for it"
            + (f", such as {own_entry!r}" if paused_at is not None else "")
            + "; to start over, pass a session_state without a position."
        )

    def validate(self) -> list[str]:  # type: ignore[override]  # pydantic's own `validate` is a deprecated classmethod
        """Everything wrong with this graph, one message per problem; an empty list means it is valid."""
        return graph_checks.problems_of(self)

    def shape(self) -> fan_out.Shape:
        """This graph reduced to ids and links, as `framework.graph.fan_out` uses it. Computed on each call."""
        links: dict[str, list[str]] = {node.id: [] for node in self.nodes}
        forward: dict[str, list[str]] = {node.id: [] for node in self.nodes}
        ended = set(self.terminal_nodes)
        for edge in self.edges:
            if edge.source in links and edge.target in links and edge.source not in ended:
                links[edge.source].append(edge.target)
                if edge.condition is not EdgeCondition.ON_FAILURE:
                    forward[edge.source].append(edge.target)
        for node in self.nodes:
            targets = [] if node.id in ended else [target for target in node.routes.values() if target in links]
            links[node.id] += targets
            forward[node.id] += targets
        return fan_out.Shape(order=list(links), links=links, forward=forward)

    def branch_heads(self, node_id: str) -> list[str]:
        """The first node of each branch of a fan-out node: targets of its edges that are not on_failure, once each."""
        ids = {node.id for node in self.nodes}
        edges = (edge for edge in self.get_outgoing_edges(node_id) if edge.condition is not EdgeCondition.ON_FAILURE)
        return list(dict.fromkeys(edge.target for edge in edges if edge.target in ids))

    def join_of(self, node_id: str) -> str | None:
        """Where the branches of the fan-out node ``node_id`` meet; None when they never do, or it does not fan out.

        That is its ``join_node``, else the nearest node all its branches reach: smallest longest way, then smallest
        sum of ways, then first declared. A node reached only through on_failure edges is taken only when there is no
        other, and ``node_id`` itself last. Raises ValueError for an unknown id.
        """
        node = self._known(node_id)
        if not node.fan_out:
            return None
        return node.join_node or fan_out.nearest_join(self.shape(), node_id, self.branch_heads(node_id))

    def branch_region(self, node_id: str) -> dict[str, set[str]]:
        """Per head of the fan-out node ``node_id``, the nodes its branch may visit before the join.

        A head that is the join itself has an empty region. Raises ValueError for an unknown id.
        """
        self._known(node_id)
        return fan_out.regions(self.shape(), node_id, self.branch_heads(node_id), self.join_of(node_id))

    def _known(self, node_id: str) -> NodeSpec:
        node = self.get_node(node_id)
        if node is None:
            raise ValueError(f"Graph {self.id!r} has no node {node_id!r}.")
        return node
