"""``AgentRunner``: an agent from a folder, run, resumed and looked at, with everything it needs made when needed."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from framework._secrets import mask_error, masked_traceback, place_of, register_named, register_url
from framework.errors import CorruptData, ResumeError, StorageError, SurefootError, UnknownType
from framework.graph.budget import RunBudget
from framework.graph.builtin_nodes import FunctionNode
from framework.graph.cancelling import LET_GO
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.recovery import Recovered, recover_runs
from framework.graph.run_messages import CANCELLED_ON_REQUEST
from framework.runner import agent_info, capability
from framework.runner.agent_file import AGENT_FILE, load_agent_export, read_agent_file
from framework.runner.agent_folder import SERVERS_FILE, connect_servers, load_code
from framework.runner.agent_info import AgentInfo, ValidationResult
from framework.runner.agent_model import AgentModel
from framework.runner.agent_runs import LATEST, AgentRuns, facts_of
from framework.runner.node_functions import is_node, policy_of
from framework.runner.places import default_storage_url, documents_dir
from framework.runner.protocol import AgentMessage, CapabilityResponse
from framework.runner.tool_registry import ToolRegistry
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig, CheckpointMetadata
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage, open_storage
from framework.storage.encryption_keys import KeyRing
from framework.storage.memory import MemoryStorage
from framework.storage.records import RunRecord
from framework.storage.sweeping_background import Sweeping, start_sweeping

if TYPE_CHECKING:
    from framework.llm.provider import Tool, ToolPolicy

logger = logging.getLogger(__name__)

__all__ = ["DEFAULT_MODEL", "AgentInfo", "AgentRunner", "ValidationResult", "load_agent_export"]

DEFAULT_MODEL = "claude-haiku-4-5-20251001"
KEPT_CHECKPOINTS = 100
"""How many checkpoints of a run stay when the runner chooses: enough for a diff and a fork."""


class AgentRunner:
    """Runs one agent: its graph and goal, its functions, tools and model, and the store of its runs.

    Checkpointing is off unless ``storage``, ``checkpoint_config`` or ``checkpoint_manager`` is given; then every run
    is durable and can be resumed. ``storage`` is a store, or the URL of one that the runner opens and closes; without
    one the configuration's checkpoints go to `places.default_storage_url`. ``llm`` is used for every node; without
    one a provider for ``model`` (behind ``base_url``) is made when a node needs it, and in ``mock_mode`` one that
    answers by itself. A run is recorded with the endpoint it was started at, without user, password and query, and goes
    on there (with its model) unless the runner is given another. Run documents (decisions, problems) go to the storage,
    else to the directory ``storage_path``.

    With ``recover_on_start`` the agent's crashed and due runs are taken up, one after the other: in the background of
    ``async with runner:``, else before its first run, which waits for them. What came of them is in ``recovered``; the
    end of the block leaves those that are not over to the next process.

    One runner may run the agent any number of times at once, in one event loop.
    """

    def __init__(
        self,
        agent_path: str | Path,
        graph: GraphSpec,
        goal: Goal,
        mock_mode: bool = False,
        storage_path: str | Path | None = None,
        model: str = DEFAULT_MODEL,
        *,
        llm: Any = None,
        base_url: str | None = None,
        storage: Storage | str | None = None,
        checkpoint_config: CheckpointConfig | None = None,
        checkpoint_manager: CheckpointManager | None = None,
        recover_on_start: bool = False,
    ) -> None:
        self.recover_on_start = recover_on_start
        self.recovered: list[ExecutionResult] = []
        """What came of the runs that ``recover_on_start`` found, as they end."""
        self._recovering: asyncio.Task[None] | None = None
        self._under_recovery: dict[str, asyncio.Future[None]] = {}
        self._entered = False
        self.agent_path = Path(agent_path)
        self.graph = graph
        self.goal = goal
        self.mock_mode = mock_mode
        self.model = model
        self.base_url = base_url
        register_url(base_url)
        self._model_is_chosen = model != DEFAULT_MODEL
        self._folder = Path(os.path.abspath(self.agent_path))  # a link to a folder keeps its own name
        self.name = self._folder.name or graph.id
        self.warnings: list[str] = []
        self.tool_registry = ToolRegistry()
        self.node_registry: dict[str, Any] = {}
        self.approval_callback: Callable[..., Any] | None = None
        self._storage_path = Path(storage_path) if storage_path is not None else None
        self._model = AgentModel(model, base_url, mock_mode, llm)
        self._runtime: Runtime | None = None
        self._documents: Storage | None = None
        self._has_servers = False
        self._preparing = threading.Lock()
        self._has_tools_module = False
        self._owns_storage = False
        self._sweeping: Sweeping | None = None
        self.checkpoint_manager = self._manager(storage, checkpoint_config, checkpoint_manager)
        self.storage = self.checkpoint_manager.storage if self.checkpoint_manager is not None else None

    def _manager(
        self, storage: Storage | str | None, config: CheckpointConfig | None, manager: CheckpointManager | None
    ) -> CheckpointManager | None:
        if manager is not None:
            if storage is not None or config is not None:
                raise ValueError(
                    "Give AgentRunner a checkpoint_manager, or a storage and a checkpoint_config, not both."
                )
            return manager
        if storage is None and config is None:
            return None
        if storage is None or isinstance(storage, str):
            register_named("", storage)
            storage = open_storage(storage or default_storage_url(), KeyRing.from_environment())
            self._owns_storage = True
        kept = CheckpointConfig(retention_strategy="prune_old", max_checkpoints_per_run=KEPT_CHECKPOINTS)
        return CheckpointManager(storage, config or kept)

    @classmethod
    def load(
        cls,
        agent_path: str | Path,
        mock_mode: bool = False,
        storage_path: str | Path | None = None,
        model: str | None = None,
        *,
        llm: Any = None,
        base_url: str | None = None,
        storage: Storage | str | None = None,
        checkpoint_config: CheckpointConfig | None = None,
        checkpoint_manager: CheckpointManager | None = None,
        recover_on_start: bool = False,
    ) -> Self:
        """The agent of a folder: ``agent.json``, and when there are such files the functions of ``nodes.py``, the
        tools (and functions) of ``tools.py``, the model that ``provider(model)`` of ``llm.py`` returns, and the servers
        of ``mcp_servers.json``, which are connected to later.

        ``model`` defaults to the ``default_model`` of the file. Raises ``AgentNotFound`` (a ``FileNotFoundError``)
        without an agent.json, ``AgentFileError`` or ``ToolError`` for a file that cannot be understood or executed,
        ``StorageError``.
        """
        folder = Path(agent_path)
        if folder.name == AGENT_FILE and folder.is_file():
            folder = folder.parent
        read = read_agent_file(folder)
        runner = cls(
            folder,
            read.graph,
            read.goal,
            mock_mode,
            storage_path,
            model or read.graph.default_model or DEFAULT_MODEL,
            llm=llm,
            base_url=base_url,
            storage=storage,
            checkpoint_config=checkpoint_config,
            checkpoint_manager=checkpoint_manager,
            recover_on_start=recover_on_start,
        )
        runner._model_is_chosen = model is not None
        try:
            runner.warnings += read.warnings
            runner._add_folder(folder)
        except BaseException:
            runner.cleanup()
            raise
        return runner

    def _add_folder(self, folder: Path) -> None:
        code = load_code(folder, self.tool_registry)
        self._has_tools_module = code.has_tools
        self._model.make = code.provider
        for node_id, value in code.nodes.items():
            if self.graph.get_node(node_id) is None:
                self.warnings.append(f"{code.origin[node_id]}: there is no node {node_id!r} in the graph")
            elif is_node(value):
                self.register_node(node_id, value)
            else:
                self.register_function(node_id, value, policy=policy_of(value))
        self._has_servers = (folder / SERVERS_FILE).is_file()

    # --- what the agent is made of --------------------------------------------------------------------------------

    def register_function(
        self, node_id: str, func: Callable[..., Any], *, effects: bool = False, policy: ToolPolicy | None = None
    ) -> None:
        """Use a function, sync or async, for the node ``node_id``; see `GraphExecutor.register_function`."""
        self.node_registry[node_id] = FunctionNode(func, effects=effects, policy=policy)

    def register_node(self, node_id: str, implementation: Any) -> None:
        """Use an object with ``execute(ctx)`` for the node ``node_id``."""
        self.node_registry[node_id] = implementation

    def register_tool(
        self, name: str, tool: Tool | Callable[..., Any], executor: Callable[[dict[str, Any]], Any] | None = None
    ) -> None:
        """Add a tool: a function, whose signature gives its schema, or a ``Tool`` with its ``executor(arguments)``.

        A function given with an executor only describes the tool; the executor runs it. Raises ``ValueError`` for a
        ``Tool`` without an executor.
        """
        if callable(tool):
            self.tool_registry.register_function(tool, name=name)
            if executor is not None:
                self.tool_registry.register(name, self.tool_registry.get_tools()[name], executor)
        elif executor is not None:
            self.tool_registry.register(name, tool, executor)
        else:
            raise ValueError(f"Tool {name!r} needs an executor: a function that is given the arguments as one dict.")

    def register_tools_from_module(self, module_path: str | Path) -> int:
        """Add the tools of a Python file; how many. Raises ``ToolError``."""
        return self.tool_registry.discover_from_module(module_path)

    def register_mcp_server(self, name: str, transport: str, **config: Any) -> int:
        """Connect to an MCP server and add its tools; how many. A failure is logged as a warning and gives 0."""
        return self.tool_registry.register_mcp_server({"name": name, "transport": transport, **config})

    def set_approval_callback(self, callback: Callable[..., Any] | None) -> None:
        """Keep ``callback`` for whoever asks people; executors of graphs are given it."""
        self.approval_callback = callback

    @property
    def runtime(self) -> Runtime:
        """What records decisions and problems; made on first use, and so is the directory it writes to."""
        if self._runtime is None:
            storage = self.storage
            if storage is None:
                storage = self._documents = self._document_store()
            self._runtime = Runtime(storage)
        return self._runtime

    def _document_store(self) -> Storage:
        if self._storage_path is not None:
            return FileStorage(self._storage_path)
        try:
            return FileStorage(documents_dir(self.name))
        except StorageError as error:
            # Nobody asked for these documents; a read-only machine must not keep the agent from running.
            logger.warning(
                "Run documents of agent %r are kept in memory only, unless storage_path is given: %s", self.name, error
            )
            return MemoryStorage()

    # --- running --------------------------------------------------------------------------------------------------

    async def run(
        self,
        input_data: Mapping[str, Any] | None = None,
        session_state: Mapping[str, Any] | None = None,
        entry_point_id: str | None = None,
        *,
        run_id: str | None = None,
        budget: RunBudget | None = None,
    ) -> ExecutionResult:
        """Run the agent and return what came of it; see `GraphExecutor.execute`, which this prepares.

        With ``recover_on_start`` a run that is being recovered is waited for; outside of ``async with`` all of them.

        With checkpointing and a ``run_id`` the same call starts, resumes or returns. ``entry_point_id`` is the name of
        an entry point, or the id of an asynchronous one, at which a new run begins. ``budget`` limits the run's tokens
        and cost over all its processes, and replaces the one recorded with it. What the agent lacks (a function,
        a key, an extra) is a failed result that says so, and nothing ran. Raises what ``execute`` raises, and
        ``ResumeError`` for a ``run_id`` of another agent.
        """
        recovering = self._start_recovery()
        if recovering is not None and not recovering.done() and not self._entered:
            try:
                await asyncio.shield(recovering)
            except asyncio.CancelledError as error:
                recovering.cancel(*error.args)
                await asyncio.wait([recovering])
                raise
        named = run_id or (session_state or {}).get("run_id")
        under_way = self._under_recovery.get(named) if isinstance(named, str) else None
        if under_way is not None:
            await asyncio.shield(under_way)
        return await self._run(input_data, session_state, entry_point_id, run_id=run_id, budget=budget)

    async def _run(
        self,
        input_data: Mapping[str, Any] | None = None,
        session_state: Mapping[str, Any] | None = None,
        entry_point_id: str | None = None,
        *,
        run_id: str | None = None,
        budget: RunBudget | None = None,
    ) -> ExecutionResult:
        state = dict(session_state or {})
        if entry_point_id is not None:
            node_id = self._entry_node(entry_point_id)
            if node_id is None:
                known = ", ".join([*self.graph.entry_points, *(each.id for each in self.graph.async_entry_points)])
                problem = f"Agent {self.name!r} has no entry point {entry_point_id!r}; known: {known or 'none'}."
                return ExecutionResult(False, error=problem, run_id=run_id)
            state = {key: value for key, value in state.items() if key not in ("paused_at", "resume_from")}
            state["next_node"] = node_id
        lacks = list(agent_info.missing_functions(self.graph, self.node_registry))
        if lacks:
            return ExecutionResult(False, error=" ".join(lacks), run_id=run_id)
        llm = None
        recorded = await self._recorded(run_id or state.get("run_id"))
        if recorded is None or recorded.state is not RunState.COMPLETED:
            model, base_url = self._endpoint(recorded)
            try:
                llm = await asyncio.to_thread(self._model.provider, self.graph, self.node_registry, model, base_url)
            except Exception as error:  # noqa: BLE001 - a client of any make may raise anything for a setting
                problem = f"Agent {self.name!r} needs the model {model!r}: {mask_error(error)}"
                return ExecutionResult(False, error=problem, run_id=run_id)
            if self._has_servers:
                await asyncio.to_thread(self._connect)
        self._sweep()
        executor = GraphExecutor(
            runtime=self.runtime,
            llm=llm,
            tools=list(self.tool_registry.get_tools().values()),
            tool_executor=self.tool_registry.get_executor().acall,
            node_registry=self.node_registry,
            approval_callback=self.approval_callback,
            checkpoint_manager=self.checkpoint_manager,
        )
        return await executor.execute(
            self.graph,
            self.goal,
            dict(input_data or {}),
            state or None,
            run_id=run_id,
            metadata=self._metadata() if self._is_durable() else None,
            budget=budget,
        )

    def _sweep(self) -> None:
        """Begin to apply the configuration's retention to the store, in the background, until `cleanup`."""
        manager = self.checkpoint_manager
        if manager is None or manager.config.retention is None or manager.config.retention.is_empty:
            return
        with self._preparing:
            if self._sweeping is None:
                self._sweeping = start_sweeping(manager.storage, manager.config.retention)

    def _endpoint(self, recorded: RunRecord | None) -> tuple[str, str | None]:
        """Model and base URL for a run: those it was started with go before what this runner was not told."""
        if recorded is not None and self.base_url is None:
            try:
                facts = facts_of(recorded)
            except (CorruptData, UnknownType):
                return self.model, None  # the executor meets the same header, and says what it means for the run
            if facts.base_url is not None:
                model = self.model if self._model_is_chosen else facts.model
                return model or self.model, facts.base_url
        return self.model, self.base_url

    async def resume(
        self,
        run_id: str = LATEST,
        input_data: Mapping[str, Any] | None = None,
        *,
        budget: RunBudget | None = None,
    ) -> ExecutionResult:
        """Go on with a run after its last checkpoint: the one named, or this agent's newest unfinished one.

        A completed run's stored result is returned and nothing runs. ``input_data`` is written over the state, such as
        the answer a paused run waits for; ``budget`` replaces the run's. Raises ``RunNotFound``, ``ResumeError``
        without checkpointing and for a run of another agent, and what ``execute`` raises: ``RunBusy``,
        ``DefinitionChanged`` with what changed.
        """
        found = await asyncio.to_thread(self._own_runs(run_id).find, run_id)
        return await self.run(input_data, run_id=found.run_id, budget=budget)

    async def recover(
        self, limit: int | None = None, *, failed: bool = False, concurrency: int = 1
    ) -> list[ExecutionResult]:
        """Resume this agent's runs whose process is gone, oldest first, then its paused ones that can go on by
        themselves, and then, with ``failed``, those that failed; at most ``limit``, at most ``concurrency`` at once.

        A paused run can when its sleep is over, or when it was sent what a node of it waits for. A run that another
        process takes first is left to it. One that was asked to stop before its process ended is cancelled instead: a
        failed result with the error "cancelled on request". One that cannot be resumed is a failed result that says
        why, and so is one that has ended its process too often in a row (``CheckpointConfig.max_recovery_attempts``,
        ``error_type`` "recovery"): its record says so, and ``resume`` still takes it up. Raises ``ResumeError`` without
        checkpointing, ``StorageError``.
        """
        own, storage = self._own_runs("all"), self._store("all")
        runs = (await asyncio.to_thread(own.recoverable, failed=failed))[:limit]
        assert self.checkpoint_manager is not None
        lease = self.checkpoint_manager.config.lease_seconds
        ended = await recover_runs(storage, runs, self._recover_one, concurrency=concurrency, lease_seconds=lease)
        return [result for each in ended if (result := _as_result(each)) is not None]

    async def _recover_one(self, run: RunRecord) -> ExecutionResult:
        return await self._run(run_id=run.run_id)

    def _start_recovery(self) -> asyncio.Task[None] | None:
        """Recover in the background, once, where that is asked for."""
        if self._recovering is None and self.recover_on_start and self._is_durable():
            self._recovering = asyncio.create_task(self._recover_at_start())
        return self._recovering

    async def _recover_at_start(self) -> None:
        own, storage = self._own_runs("all"), self._store("all")
        try:
            runs = await asyncio.to_thread(own.recoverable)
        except SurefootError as error:
            logger.error("The runs of agent %r were not recovered: %s", self.name, mask_error(error))
            return
        assert self.checkpoint_manager is not None
        lease = self.checkpoint_manager.config.lease_seconds
        try:
            for run in runs:  # one after the other: whoever starts an agent has other work for it
                self._under_recovery[run.run_id] = asyncio.get_running_loop().create_future()
            for run in runs:
                try:
                    [found] = await recover_runs(storage, [run], self._recover_one, lease_seconds=lease)
                    self.recovered += [result] if (result := _as_result(found)) is not None else []
                except Exception as error:
                    trace = masked_traceback(error)
                    logger.error("Run %r of agent %r was not recovered:\n%s", run.run_id, self.name, trace)
                finally:
                    self._under_recovery.pop(run.run_id).set_result(None)
        finally:
            for waiting in self._under_recovery.values():
                waiting.cancel()
            self._under_recovery.clear()

    def _entry_node(self, entry_point_id: str) -> str | None:
        entry = self.graph.get_async_entry_point(entry_point_id)
        return entry.entry_node if entry is not None else self.graph.entry_points.get(entry_point_id)

    async def _recorded(self, run_id: object) -> RunRecord | None:
        """The run as recorded, if it is: a completed one needs no model. Raises ``ResumeError`` if it is not ours."""
        if not isinstance(run_id, str) or not run_id or self.storage is None or not self._is_durable():
            return None
        try:
            found = await asyncio.to_thread(self.storage.find_run, run_id)
        except StorageError:
            return None  # the executor meets the same error, and says what it means for the run
        if found is not None:
            await asyncio.to_thread(self._own_runs(run_id).check_own, found)
        return found

    def _is_durable(self) -> bool:
        return self.checkpoint_manager is not None and self.checkpoint_manager.config.enabled

    def _connect(self) -> None:
        """Connect to the folder's MCP servers, once. A run that comes meanwhile waits until all have their tools."""
        with self._preparing:
            if self._has_servers:
                self.warnings += connect_servers(self.agent_path, self.tool_registry)
                self._has_servers = False

    def _metadata(self) -> dict[str, Any]:
        place = place_of(self.base_url) if self.base_url is not None else None
        return {
            "agent_path": str(self._folder),
            "agent_name": self.name,
            "model": self.model,
            "mock": self.mock_mode,
            **({"base_url": place} if place is not None else {}),
        }

    # --- runs in the store ----------------------------------------------------------------------------------------

    def runs(self, states: Sequence[RunState] | None = None, limit: int = 100) -> list[RunRecord]:
        """At most ``limit`` runs of this agent, newest first; ``states`` filters. Raises ``ResumeError`` without a
        store."""
        found = self._own_runs("all").each(states)
        return [run for run, _ in zip(found, range(limit), strict=False)]

    def checkpoints(self, run_id: str) -> list[CheckpointMetadata]:
        """The run's retained checkpoints, oldest first; ``latest`` is the newest unfinished run.

        Raises ``RunNotFound``, ``StorageError``, ``ResumeError`` without a store or for a run of another agent.
        """
        run = self._own_runs(run_id).find(run_id)
        return self._store(run_id).list_checkpoints(run.run_id)

    def list_checkpoints(self, run_id: str) -> list[CheckpointMetadata]:
        """The same as `checkpoints`."""
        return self.checkpoints(run_id)

    def fork(
        self,
        run_id: str,
        at: int | str | None = None,
        changes: Mapping[str, Any] | None = None,
        new_run_id: str | None = None,
    ) -> str:
        """A new run that begins at a checkpoint of another, with ``changes`` to its state; its id. `resume` runs it.

        ``at`` is a checkpoint's sequence or id, by default the newest. The original stays as it is. Durable on return.
        Raises what `CheckpointManager.fork` raises, and ``ResumeError`` without a store or for another agent's run.
        """
        run = self._own_runs(run_id).find(run_id)
        assert self.checkpoint_manager is not None
        return self.checkpoint_manager.fork(run.run_id, at, changes, new_run_id)

    def _store(self, run_id: str) -> Storage:
        if self.storage is None or not self._is_durable():
            raise ResumeError(
                run_id,
                f"Agent {self.name!r} keeps no runs: give AgentRunner a storage, such as storage='sqlite:///runs.db'.",
            )
        return self.storage

    def _own_runs(self, run_id: str) -> AgentRuns:
        return AgentRuns(self._store(run_id), self.name, self.graph.id, self._folder)

    # --- looking at it --------------------------------------------------------------------------------------------

    def info(self) -> AgentInfo:
        """The agent as plain data."""
        return agent_info.describe(self.graph, self.goal, self._has_tools_module)

    def validate(self, connect: bool = True) -> ValidationResult:
        """Whether the agent can run, and what to look at. With ``connect`` its MCP servers are asked for their tools;
        without, tools that they may have are not called missing."""
        if connect:
            self._connect()
        errors = [*self.graph.validate(), *agent_info.missing_functions(self.graph, self.node_registry)]
        warnings = list(self.warnings)
        if not self.goal.success_criteria:
            warnings.append("the goal has no success criteria")
        missing = (
            []
            if self._has_servers
            else [name for name in agent_info.required_tools(self.graph) if not self.tool_registry.has_tool(name)]
        )
        if missing:
            warnings.append(f"no tool is registered as {', '.join(missing)}; nodes run without it")
        credentials = self._model.missing_credentials(self.graph, self.node_registry)
        warnings += [f"{name} is not set, and the model {self.model!r} needs it" for name in credentials]
        return ValidationResult(not errors, errors, warnings, missing, credentials)

    async def can_handle(self, request: Mapping[str, Any], llm: Any = None) -> CapabilityResponse:
        """How well this agent can handle ``request``: as ``llm`` (else the runner's own) says, else by the words that
        the request shares with the agent's descriptions. Never raises for what a model does."""
        return await capability.assess(self.info(), request, llm if llm is not None else self._model.given)

    async def receive_message(self, message: AgentMessage) -> AgentMessage:
        """Do what a message of another agent asks, and answer it: requests and handoffs are run."""
        return await capability.answer(self, message)

    # --- the end --------------------------------------------------------------------------------------------------

    def cleanup(self) -> None:
        """End MCP servers, and close what the runner itself opened. May be called again."""
        sweeping, self._sweeping = self._sweeping, None
        if sweeping is not None:
            sweeping.stop()
        self.tool_registry.cleanup()
        self._model.close()
        self._runtime = None
        documents, self._documents = self._documents, None
        if documents is not None:
            documents.close()
        if self._owns_storage and self.storage is not None:
            self.storage.close()

    async def cleanup_async(self) -> None:
        """As `cleanup`, without blocking the event loop. What is being recovered is left to the next process."""
        recovering, self._recovering = self._recovering, None
        if recovering is not None and not recovering.done():
            recovering.cancel(LET_GO)
            await asyncio.wait([recovering])
        await self._model.aclose()
        await asyncio.to_thread(self.cleanup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    async def __aenter__(self) -> Self:
        self._entered = True
        self._start_recovery()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cleanup_async()


def _as_result(found: Recovered[ExecutionResult]) -> ExecutionResult | None:
    """What came of a recovered run as a result; ``None`` for one that another process took."""
    if found.outcome == "busy":
        return None
    if found.result is not None:
        return found.result
    error = CANCELLED_ON_REQUEST if found.outcome == "cancelled" else found.error
    return ExecutionResult(False, error=error, run_id=found.run_id)
