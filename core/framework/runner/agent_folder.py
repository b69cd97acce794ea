"""What an agent's folder brings beside its ``agent.json``: functions for nodes, tools, a model, and MCP servers."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import AgentFileError
from framework.runner.folder_code import load_modules, origin
from framework.runner.node_functions import nodes_of
from framework.runner.tool_registry import ToolRegistry

NODES_MODULE = "nodes"
TOOLS_MODULE = "tools"
MODEL_MODULE = "llm"
SERVERS_FILE = "mcp_servers.json"
_ASKING = ("complete", "acomplete", "complete_with_tools", "acomplete_with_tools")


@dataclass(frozen=True)
class FolderCode:
    """``nodes`` is node id -> function or node object, ``origin`` the file each is from. ``provider`` makes the model
    the nodes ask, given a model's name."""

    has_tools: bool
    nodes: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    provider: Callable[[str], Any] | None = None


def load_code(folder: Path, registry: ToolRegistry) -> FolderCode:
    """Run the folder's ``tools.py``, ``nodes.py`` and ``llm.py``, add the tools to ``registry``, and return the rest.

    Raises ``AgentFileError`` or ``ToolError``, naming the file and the line of whatever a file raises.
    """
    modules = load_modules(folder, [TOOLS_MODULE, NODES_MODULE, MODEL_MODULE])
    nodes: dict[str, Any] = {}
    files: dict[str, str] = {}
    if TOOLS_MODULE in modules:
        registry.add_module(modules[TOOLS_MODULE])
    provider = None
    if MODEL_MODULE in modules:
        file = str(folder / f"{MODEL_MODULE}.py")
        function = getattr(modules.pop(MODEL_MODULE), "provider", None)
        if not callable(function):
            raise AgentFileError(file, "it has no function provider(model), which returns the model the nodes ask")
        provider = _checked(function, folder, file)
    for name, module in modules.items():
        file = str(folder / f"{name}.py")
        for node_id, value in nodes_of(module, file).items():
            # The same function may be seen in both files: one imports it from the other.
            if nodes.setdefault(node_id, value) is not value:
                raise AgentFileError(file, f"node {node_id!r} has a function in {files[node_id]} already; keep one")
            files.setdefault(node_id, file)
    return FolderCode(TOOLS_MODULE in modules, nodes, files, provider)


def _checked(function: Callable[[str], Any], folder: Path, file: str) -> Callable[[str], Any]:
    """``provider`` of the folder's llm.py, whatever it does wrong an ``AgentFileError`` with file and line."""

    def provider(model: str) -> Any:
        try:
            made = function(model)
        except (Exception, SystemExit) as error:  # a file of the user's may raise anything
            raise AgentFileError(*origin(error, folder, Path(file))) from error
        if any(callable(getattr(made, name, None)) for name in _ASKING):
            return made
        if inspect.iscoroutine(made):
            made.close()  # it will never be awaited, and Python would complain of that instead
        raise AgentFileError(
            file, f"provider(model) returned a {type(made).__name__}, which has no complete(); return an LLMProvider"
        )

    return provider


def connect_servers(folder: Path, registry: ToolRegistry) -> list[str]:
    """Connect to the servers of the folder's ``mcp_servers.json`` and add their tools; what went wrong, as warnings."""
    collected = _Collected()
    log = logging.getLogger("framework.runner")
    log.addHandler(collected)
    try:
        registry.load_mcp_config(folder / SERVERS_FILE)
    finally:
        log.removeHandler(collected)
    return collected.messages


class _Collected(logging.Handler):
    """The warnings that this thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.messages.append(record.getMessage())
