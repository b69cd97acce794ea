"""Nodes under one name: their specification, context, result and interface, the memory, and the built-in types."""

from __future__ import annotations

from framework.graph.builtin_nodes import FunctionNode, LLMNode, RouterNode
from framework.graph.memory import SharedMemory
from framework.graph.node_base import NodeContext, NodeProtocol, NodeResult, NodeSpec

__all__ = [
    "FunctionNode",
    "LLMNode",
    "NodeContext",
    "NodeProtocol",
    "NodeResult",
    "NodeSpec",
    "RouterNode",
    "SharedMemory",
]
