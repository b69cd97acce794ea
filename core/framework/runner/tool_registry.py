"""The tools of an agent: Python functions, modules and MCP servers, under one name each, and the call of one."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from framework._secrets import SecretFilter, mask, mask_value, masked_traceback, register_environment, register_secret
from framework.errors import ToolError
from framework.graph.calls import KEY, tool_takes_key
from framework.graph.journal import tool_key
from framework.graph.journal_failures import leaves_unknown
from framework.graph.node_base import is_infrastructure_error
from framework.llm.provider import AsyncToolExecutor, Tool, ToolPolicy, ToolResult, ToolUse
from framework.llm.threads import in_thread
from framework.runner.folder_code import load_modules
from framework.runner.loop_thread import LoopThread
from framework.runner.mcp_client import McpServers
from framework.runner.mcp_config import read_mcp_servers, server_config
from framework.runner.tool_schema import InvalidArguments, Signature, check_arguments, to_json

__all__ = ["RegisteredTool", "SecretFilter", "ToolCaller", "ToolRegistry", "register_secret", "tool"]

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "_surefoot_tool"


@dataclass(frozen=True)
class _Marked:
    """What the decorator `tool` says of a function."""

    name: str | None
    description: str | None
    effects: bool
    policy: ToolPolicy | None = None


@overload
def tool(description: Function) -> Function: ...
@overload
def tool(
    description: str | None = None,
    name: str | None = None,
    *,
    effects: bool | None = None,
    read_only: bool = False,
    policy: ToolPolicy | None = None,
) -> Callable[[Function], Function]: ...
def tool(
    description: Any = None,
    name: str | None = None,
    *,
    effects: bool | None = None,
    read_only: bool = False,
    policy: ToolPolicy | None = None,
) -> Any:
    """Mark a function, sync or async, as a tool that `ToolRegistry.discover_from_module` finds: ``@tool`` or
    ``@tool(...)``. The function itself is returned unchanged.

    ``description`` is what the model reads, the docstring otherwise; ``name`` the function's own otherwise.
    ``effects=True`` says that a call changes something outside, ``read_only=True`` that none does (as without either).
    ``policy`` says what becomes of a call that was cut off, "rerun", "ask" or "fail", whatever ``effects`` is. Raises
    `ToolError` when both are said.
    """
    if effects and read_only:
        raise ToolError("@tool: a tool has effects or is read only, not both.")

    def mark(function: Function) -> Function:
        setattr(function, _MARK, _Marked(name, None if callable(description) else description, bool(effects), policy))
        return function

    return mark(description) if callable(description) else mark


@dataclass(frozen=True)
class RegisteredTool:
    """A tool and what runs it: ``executor(arguments)`` returns its value, or an awaitable of it."""

    tool: Tool
    executor: Callable[[dict[str, Any]], Any]
    session_parameters: bool = False
    """Whether values of the session's context are passed for parameters of their names."""


class ToolRegistry:
    """Tools by name. Registering is for the set-up of a program; calling may happen in many threads and loops at once.

    ``cleanup()`` ends the MCP servers' processes and connections; as a context manager it does so at the end of the
    block, and the end of the program does so in any case.
    """

    def __init__(self) -> None:
        self._tools: dict[str, RegisteredTool] = {}
        self._session: dict[str, Any] = {}
        self._loop = LoopThread("surefoot async tools")
        self._servers: McpServers | None = None
        register_environment()

    def register(self, name: str, tool: Tool, executor: Callable[[dict[str, Any]], Any]) -> None:
        """Add a tool, or put it in the place of an earlier one of its name.

        ``executor`` takes the arguments as one dict and returns the value, or is async. Raises `ToolError` when it
        cannot be called.
        """
        if not callable(executor):
            raise ToolError(f"Tool {name!r}: its executor is a {type(executor).__name__}, which cannot be called.")
        self._tools[name] = RegisteredTool(tool if tool.name == name else replace(tool, name=name), executor)

    def register_function(
        self,
        func: Callable[..., Any],
        name: str | None = None,
        description: str | None = None,
        *,
        effects: bool | None = None,
        policy: ToolPolicy | None = None,
    ) -> None:
        """Add a function, sync or async, as a tool; its parameters' schema is read from its signature.

        What is not given here is taken from the decorator `tool`, then from the function itself. Raises `ToolError`
        for a function whose signature cannot be read.
        """
        marked = _marked(func) or _Marked(None, None, False)
        called = name or marked.name or str(getattr(func, "__name__", type(func).__name__))
        signature = Signature.of(func, called)
        text = description or marked.description or inspect.getdoc(func) or f"Runs {called}."
        made = Tool(
            called,
            text,
            signature.schema,
            marked.effects if effects is None else effects,
            # What is said here of effects comes before the decorator's policy.
            policy if policy is not None or effects is not None else marked.policy,
        )
        self.register(called, made, _FunctionExecutor(signature))

    def discover_from_module(self, module_path: str | Path) -> int:
        """Run a Python file and add its tools; how many. A file that does not exist has 0.

        See `add_module`. Raises `AgentFileError`, with file and line, for a file that fails while it runs.
        """
        path = Path(module_path)
        if not path.is_file():
            return 0
        return self.add_module(load_modules(path.parent, [path.stem])[path.stem])

    def add_module(self, module: ModuleType) -> int:
        """Add the tools of a module that is loaded already; how many.

        These are the functions decorated with `tool` and the dict ``TOOLS`` of `Tool` objects or functions by name,
        whose `Tool` objects are run by the module's function ``tool_executor(tool_use)``. Raises `ToolError` when it
        holds something else; then none of them is added.
        """
        file = str(getattr(module, "__file__", None) or module.__name__)
        before = dict(self._tools)
        try:
            names = self._add_declared(file, getattr(module, "TOOLS", None), getattr(module, "tool_executor", None))
            for each in vars(module).values():
                marked = _marked(each)
                if marked is not None:
                    self.register_function(each)
                    names.add(marked.name or each.__name__)
        except BaseException:
            self._tools.clear()
            self._tools.update(before)
            raise
        return len(names)

    def _add_declared(self, path: str, declared: Any, execute: Any) -> set[str]:
        if declared is None:
            return set()
        if not isinstance(declared, Mapping):
            raise ToolError(f"{path}: TOOLS is a {type(declared).__name__}; it must be a dict of tools by name.")
        for name, each in declared.items():
            if isinstance(each, Tool):
                if not callable(execute):
                    raise ToolError(
                        f"{path}: TOOLS has a Tool {name!r}, but nothing runs it. Define tool_executor(tool_use) "
                        "in this file, or decorate a function with @tool instead."
                    )
                self.register(name, each, _ModuleExecutor(name, execute))
            elif callable(each):
                self.register_function(each, name=name)
            else:
                raise ToolError(f"{path}: TOOLS[{name!r}] is a {type(each).__name__}; it must be a Tool or a function.")
        return set(declared)

    def get_tools(self) -> dict[str, Tool]:
        """The tools by name. Parameters that the session's context fills are left out of what the model is told."""
        return {name: self._told(each) for name, each in self._tools.items()}

    def _told(self, registered: RegisteredTool) -> Tool:
        tool = registered.tool
        properties = tool.parameters.get("properties")
        if not registered.session_parameters or not isinstance(properties, dict):
            return tool
        kept = {key: schema for key, schema in properties.items() if key not in self._session}
        if len(kept) == len(properties):
            return tool
        parameters = {**tool.parameters, "properties": kept}
        if "required" in parameters:
            parameters["required"] = [key for key in parameters["required"] if key in kept]
        return replace(tool, parameters=parameters)

    def get_registered_names(self) -> list[str]:
        """The names of the tools, in the order in which they were registered."""
        return list(self._tools)

    def has_tool(self, name: str) -> bool:
        """Whether a tool has this name."""
        return name in self._tools

    def get_executor(self) -> ToolCaller:
        """What runs a call, ``(ToolUse) -> ToolResult``: see `ToolCaller`. It knows tools that are registered later."""
        return ToolCaller(self)

    def get_async_executor(self) -> AsyncToolExecutor:
        """What the executors of graphs and plans are given: as `get_executor`, but for an async tool it returns an
        awaitable, so that the tool runs in the caller's event loop and is cancelled with its step.
        """
        return ToolCaller(self).begin

    def set_session_context(self, **context: Any) -> None:
        """Values passed to every later call of an MCP tool that has parameters of these names, whatever the model says
        for them. They replace those set before; without arguments there are none.
        """
        self._session = dict(context)

    def register_mcp_server(self, cfg: Mapping[str, Any]) -> int:
        """Connect to an MCP server and add its tools; how many, 0 after a failure, which is logged as a warning.

        ``cfg`` is one entry of mcp_servers.json: see docs/how-to/tools-and-mcp.md. A tool whose name is taken is added
        as ``<server>_<tool>``, with a warning.
        """
        said = dict(cfg).get("name")
        named = f" {said!r}" if isinstance(said, str) else ""
        try:
            config = server_config(cfg)
            if self._servers is None:
                self._servers = McpServers()
            found = self._servers.connect(config)
        except ToolError as error:
            logger.warning("MCP server%s is not used: %s", named, mask(str(error)))
            return 0
        return sum(self._add_remote(config.name, each.tool, each.call) for each in found)

    def _add_remote(self, server: str, remote: Tool, executor: Callable[[dict[str, Any]], Any]) -> bool:
        name = remote.name
        if name in self._tools:
            longer = f"{server}_{name}"
            if longer in self._tools:
                logger.warning("MCP server %r: tool %r is left out, %r is taken as well", server, name, longer)
                return False
            logger.warning("MCP server %r: there is a tool %r already; its own is called %r", server, name, longer)
            name = longer
        self._tools[name] = RegisteredTool(replace(remote, name=name), executor, session_parameters=True)
        return True

    def load_mcp_config(self, path: str | Path) -> int:
        """Connect to every server of an mcp_servers.json and add their tools; how many tools there are.

        What is wrong in the file, or with a server, is logged as a warning that names the file and the key or server.
        """
        try:
            entries = read_mcp_servers(path)
        except ToolError as error:
            logger.warning("%s", mask(str(error)))
            return 0
        return sum(map(self.register_mcp_server, entries))

    def cleanup(self) -> None:
        """End the MCP servers' processes and connections; cancel async tools that still run. May be called again."""
        servers, self._servers = self._servers, None
        if servers is not None:
            servers.close()
        self._loop.close()

    def __enter__(self) -> ToolRegistry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cleanup()

    def arguments_for(self, registered: RegisteredTool, given: Any) -> dict[str, Any]:
        """The arguments of a call, checked as far as the tool's own executor does not. Raises `InvalidArguments`."""
        if not isinstance(given, Mapping):
            raise InvalidArguments(f"the arguments must be a JSON object, not a {type(given).__name__}")
        arguments = dict(given)
        if registered.session_parameters and self._session:
            properties = registered.tool.parameters.get("properties") or {}
            arguments.update({key: value for key, value in self._session.items() if key in properties})
        if KEY not in arguments and tool_takes_key(registered.tool):
            key = tool_key(registered.tool.name, arguments)
            if key is not None:
                arguments[KEY] = key  # a model's calls have it already; here it is the program's own
        if not isinstance(registered.executor, _FunctionExecutor):
            check_arguments(registered.tool.parameters, arguments)
        return arguments


class ToolCaller:
    """Runs the tools of a registry, in three ways that differ only in how an async tool is waited for.

    A call never raises for what a model or a tool does wrong: an unknown tool, arguments that do not fit and an
    exception become a result with ``is_error`` and the JSON text ``{"error": ...}``. An error of the run's own store is
    raised. Text stays as it is; any other value becomes JSON. Known secrets are masked in all of it.
    """

    def __init__(self, registry: ToolRegistry) -> None:
        self._registry = registry

    def __call__(self, use: ToolUse) -> ToolResult:
        """Run a call and wait for it. An async tool runs in the registry's own event loop, in a background thread."""
        result = self.begin(use)
        return result if isinstance(result, ToolResult) else self._registry._loop.run(result)

    async def acall(self, use: ToolUse) -> ToolResult:
        """Run a call without blocking the event loop: a sync tool in a worker thread, an async one in this loop.

        Cancelling it cancels an async tool; the thread of a sync one ends with its call.
        """
        registered = self._registry._tools.get(use.name)
        if registered is not None and _is_async(registered.executor):
            result = self.begin(use)
        else:
            result = await in_thread(self.begin, use)
        return result if isinstance(result, ToolResult) else await result

    def begin(self, use: ToolUse) -> ToolResult | Awaitable[ToolResult]:
        """Run a sync tool here and now, or return an awaitable of what an async one does."""
        registered = self._registry._tools.get(use.name)
        if registered is None:
            known = ", ".join(self._registry._tools) or "none"
            return _error(use, f"There is no tool {use.name!r}; known: {known}")
        handled = sys.exception()
        try:
            value = registered.executor(self._registry.arguments_for(registered, use.input))
        except Exception as error:  # noqa: BLE001 - becomes the result, or is raised again there
            return _raised(use, error, handled)
        return _finished_later(use, value) if inspect.isawaitable(value) else _finished(use, value)


class _FunctionExecutor:
    """Calls a function with arguments checked and converted by its signature."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def __call__(self, arguments: dict[str, Any]) -> Any:
        positional, named = self.signature.bind(arguments)
        return self.signature.function(*positional, **named)


class _ModuleExecutor:
    """Calls a module's ``tool_executor(tool_use)``, sync or async, and reads the JSON of its answer."""

    def __init__(self, name: str, execute: Callable[[ToolUse], Any]) -> None:
        self.name = name
        self.execute = execute

    def __call__(self, arguments: dict[str, Any]) -> Any:
        answer = self.execute(ToolUse(id=f"call_{self.name}", name=self.name, input=arguments))
        return self._later(answer) if inspect.isawaitable(answer) else self._read(answer)

    async def _later(self, answer: Awaitable[Any]) -> Any:
        return self._read(await answer)

    def _read(self, answer: Any) -> Any:
        """The value of an answer. Text that is no JSON is not lost: it is returned beside an error that says so."""
        if not isinstance(answer, ToolResult) or answer.is_error:
            return answer
        if not answer.content:
            return {}
        try:
            return json.loads(answer.content)
        except (ValueError, RecursionError) as error:
            return {
                "error": f"Tool {self.name!r} answered with text that is no JSON: {error}",
                "raw_content": answer.content,
            }


def _is_async(executor: Callable[..., Any]) -> bool:
    function: Any = executor.signature.function if isinstance(executor, _FunctionExecutor) else executor
    function = function.execute if isinstance(function, _ModuleExecutor) else function
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _marked(candidate: Any) -> _Marked | None:
    marked = getattr(candidate, _MARK, None) if callable(candidate) else None
    return marked if isinstance(marked, _Marked) else None


async def _finished_later(use: ToolUse, value: Awaitable[Any]) -> ToolResult:
    handled = sys.exception()
    try:
        return _finished(use, await value)
    except Exception as error:  # noqa: BLE001 - becomes the result, or is raised again there
        return _raised(use, error, handled)


def _finished(use: ToolUse, value: Any) -> ToolResult:
    if isinstance(value, ToolResult):
        return ToolResult(use.id, mask(str(value.content)), value.is_error, value.outcome_unknown)
    if isinstance(value, str):
        return ToolResult(use.id, mask(value))
    try:
        # Masked as a value first, so that a number becomes text and not broken JSON; then as the text it is.
        return ToolResult(use.id, mask(to_json(mask_value(value))))
    except ValueError as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        problem = f"Tool {use.name!r} returned a {kind} that is no JSON: {error}"
        return _error(use, problem, raw_content=str(value))


def _raised(use: ToolUse, error: Exception, handled: BaseException | None) -> ToolResult:
    if is_infrastructure_error(error):
        raise error
    if isinstance(error, InvalidArguments):
        return _error(use, f"Invalid arguments for tool {use.name!r}: {error}")
    logger.debug("Tool %r failed:\n%s", use.name, masked_traceback(error))
    said = str(error)
    # A ToolError already says what happened; the type of any other is often half of what there is to know.
    text = said if isinstance(error, ToolError) else ": ".join(filter(None, (type(error).__name__, said)))
    return replace(_error(use, text), outcome_unknown=leaves_unknown(error, handled))


def _error(use: ToolUse, message: str, **more: Any) -> ToolResult:
    return ToolResult(use.id, mask(to_json(mask_value({"error": message, **more}))), is_error=True)
