"""The model of an agent: whether it needs one, which it gets, and what is missing for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from framework.errors import AgentFileError, SurefootError
from framework.graph.builtin_nodes import FunctionNode
from framework.graph.edge import EdgeCondition, GraphSpec
from framework.graph.node_base import NodeSpec

logger = logging.getLogger(__name__)


class AgentModel:
    """The provider for one agent: the one given, else one made for ``name`` when first needed, and closed with it.

    ``make`` is the folder's own way to make it; a mock, or a ``base_url`` that the caller names, goes before it. A run
    that was started with another name or ``base_url`` gets a provider for those.
    """

    def __init__(self, name: str, base_url: str | None, mock: bool, given: Any) -> None:
        self.name = name
        self.base_url = base_url
        self.given = given
        self.make: Callable[[str], Any] | None = None
        self._mock = mock
        self._made: dict[tuple[str, str | None], Any] = {}
        self._making = threading.Lock()

    def provider(
        self, graph: GraphSpec, registry: Mapping[str, Any], name: str | None = None, base_url: str | None = None
    ) -> Any:
        """What the graph's nodes ask; ``None`` when they ask nothing. ``name``, ``base_url`` go before the agent's own.

        Node objects may ask a model, which nobody can tell: they get one when it can be made, and ``None`` otherwise.
        Raises what making a provider raises, and ``AgentFileError`` for whatever the folder's own way raises.
        """
        if self.given is not None:
            return self.given
        needed = needs_model(graph, registry)
        if not needed and not may_use_model(registry):
            return None
        wanted = (name or self.name, base_url or self.base_url)
        with self._making:
            if wanted not in self._made:
                try:
                    self._made[wanted] = self._make(*wanted)
                except (SurefootError, ValueError, ImportError) as error:
                    if needed:
                        raise
                    if isinstance(error, AgentFileError):
                        logger.warning("The agent's node objects get no model: %s", error)
                    return None
            return self._made[wanted]

    def _make(self, name: str, base_url: str | None) -> Any:
        # Only agents that ask a model pay for these imports.
        if self._mock:
            from framework.llm.mock import MockLLM  # noqa: PLC0415

            return MockLLM()
        if self.make is not None and base_url is None:
            return self.make(name)
        from framework.llm.choose import provider_for  # noqa: PLC0415

        return provider_for(name, base_url=base_url)

    def missing_credentials(self, graph: GraphSpec, registry: Mapping[str, Any]) -> list[str]:
        """Environment variables that have to be set before the agent can ask its model."""
        if self._mock or self.given is not None or (self.make is not None and self.base_url is None):
            return []
        if not needs_model(graph, registry):
            return []
        from framework.llm.choose import missing_key  # noqa: PLC0415 - only agents that ask a model pay for it

        variable = missing_key(self.name, self.base_url)
        return [variable] if variable is not None else []

    def close(self) -> None:
        """Close the providers that were made here; a later run makes others."""
        made, self._made = self._made, {}
        for each in made.values():
            close = getattr(each, "close", None)
            if callable(close):
                close()

    async def aclose(self) -> None:
        """As `close`, with the connections of this event loop."""
        made, self._made = self._made, {}
        for each in made.values():
            aclose = getattr(each, "aclose", None)
            if callable(aclose):
                await aclose()


def needs_model(graph: GraphSpec, registry: Mapping[str, Any]) -> bool:
    """Whether something of the graph asks a language model."""
    return any(_asks(node) for node in graph.nodes if node.id not in registry) or any(
        edge.condition is EdgeCondition.LLM_DECIDE for edge in graph.edges
    )


def may_use_model(registry: Mapping[str, Any]) -> bool:
    """Whether something registered is given a model and may ask it: a node object, which we cannot look into."""
    return any(not isinstance(node, FunctionNode) for node in registry.values())


def _asks(node: NodeSpec) -> bool:
    if node.node_type == "router":
        return bool(node.system_prompt)
    return node.node_type not in ("function", "human_input")
