"""What an executor asks of a runtime, and how it asks runtimes that offer less (test doubles among them)."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any, Protocol
from uuid import uuid4

from framework._secrets import mask, masked_traceback
from framework.graph.run_events import RunEvent, RunEventKind
from framework.schemas.run import RunStatus

logger = logging.getLogger(__name__)


class SupportsRuns(Protocol):
    """The least a runtime offers. ``framework.runtime.Runtime`` offers more, used when it is there."""

    def start_run(self, *, goal_id: str, goal_description: str, input_data: dict[str, Any]) -> str: ...

    def end_run(self, *, success: bool, narrative: str, output_data: dict[str, Any]) -> None: ...

    def report_problem(self, *, severity: str, description: str) -> str: ...


def new_run_id() -> str:
    """A run id as the runtime makes them, for runtimes that return none."""
    return f"run_{datetime.now():%Y%m%d_%H%M%S}_{uuid4().hex[:8]}"


class RuntimePort:
    """One execution's access to its runtime. Keyword calls only; nothing here raises for what a runtime lacks."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._run_id = ""
        self._token: int | None = None
        self._saves: list[Callable[[], None]] = []
        self._saving: asyncio.Task[None] | None = None

    async def start(
        self,
        goal: Any,
        input_data: dict[str, Any],
        run_id: str | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Start a run, or go on recording ``run_id`` after the ``earlier`` events of other processes; its id.

        Cancelled meanwhile, the record is ended as cancelled before this raises.
        """
        arguments: dict[str, Any] = {
            "goal_id": goal.id,
            "goal_description": goal.description,
            "input_data": input_data,
        }
        if run_id is not None and _accepts(self._runtime.start_run, "run_id"):
            arguments["run_id"] = run_id
            if earlier and _accepts(self._runtime.start_run, "earlier"):
                arguments["earlier"] = earlier
        with self._deferring():
            started = self._runtime.start_run(**arguments)
        if run_id is None:
            run_id = started if isinstance(started, str) and started else new_run_id()
        self._run_id = run_id
        self._fence()
        if earlier:
            # The record of the process before is there; nobody needs to wait until it says that the run goes on.
            self._saving = self._start_saving()
            return run_id
        try:
            await self._save()
        except asyncio.CancelledError:
            await self.end(False, "cancelled", {}, cancelled=True)
            raise
        return run_id

    def fence(self, token: int) -> None:
        """This process owns the run, by this fencing token: where supported, the record is saved only while no other
        owner has followed. To be called before ``start``, or after it for a run that it named."""
        self._token = token
        if self._run_id:
            self._fence()

    def _fence(self) -> None:
        fence = getattr(self._runtime, "fence_run", None)
        if fence is not None and self._token is not None:
            fence(run_id=self._run_id, token=self._token)

    async def end(self, success: bool, narrative: str, output_data: dict[str, Any], *, cancelled: bool = False) -> None:
        """End the run's record. A runtime that fails to is logged: what the run came to stands all the same."""
        arguments: dict[str, Any] = {"success": success, "narrative": mask(narrative), "output_data": output_data}
        if cancelled and _accepts(self._runtime.end_run, "status"):
            arguments["status"] = RunStatus.CANCELLED
        with self._deferring():
            try:
                self._runtime.end_run(**arguments)
            except Exception as error:  # any runtime may be plugged in
                logger.error("The runtime failed to end its record of a run:\n%s", masked_traceback(error))
        await self._save()

    def end_now(self, narrative: str) -> None:
        """End the run's record as cancelled, where nothing can be waited for: its coroutine is being closed, from any
        context, so only a runtime that ends a run by its id is asked to."""
        if not _accepts(self._runtime.end_run, "run_id"):
            return
        arguments: dict[str, Any] = {
            "success": False,
            "narrative": narrative,
            "output_data": {},
            "run_id": self._run_id,
        }
        if _accepts(self._runtime.end_run, "status"):
            arguments["status"] = RunStatus.CANCELLED
        with self._deferring():
            try:
                self._runtime.end_run(**arguments)
            except Exception as error:  # any runtime may be plugged in
                logger.error("The runtime failed to end its record of a run:\n%s", masked_traceback(error))
        saves, self._saves = self._saves, []
        _run_all(saves)

    def _deferring(self) -> AbstractContextManager[Any]:
        return _manager(self._runtime, "deferring_saves", self._saves)

    async def _save(self) -> None:
        """Do in a thread what the runtime put off. A cancellation waits for it: what comes later is saved later."""
        cancelled: asyncio.CancelledError | None = None
        while self._saves or self._saving is not None:
            saving = self._saving = self._saving or self._start_saving()
            while not saving.done():
                try:
                    await asyncio.wait([saving])
                except asyncio.CancelledError as error:
                    cancelled = error
            saving.result()
            self._saving = None
        if cancelled is not None:
            raise cancelled

    def _start_saving(self) -> asyncio.Task[None]:
        saves, self._saves = self._saves, []
        return asyncio.ensure_future(asyncio.to_thread(_run_all, saves))

    def abandon(self, run_id: str) -> None:
        """Forget the run's record without saving it, where supported; another process owns the run now."""
        self._saves.clear()
        abandon = getattr(self._runtime, "abandon_run", None)
        if abandon is not None:
            abandon(run_id=run_id)

    def problem(self, severity: str, description: str) -> None:
        """Report a problem of the current run; a runtime that fails to is logged, with the problem.

        Known secrets in the description are masked.
        """
        description = mask(description)
        try:
            self._runtime.report_problem(severity=severity, description=description)
        except Exception as error:  # any runtime may be plugged in
            trace = masked_traceback(error)
            logger.error("The runtime failed to record the %s problem: %s\n%s", severity, description, trace)

    def emit(self, kind: RunEventKind, **fields: Any) -> None:
        """Tell the runtime's listeners of something (``fields`` are those of ``RunEvent``), where there are any."""
        if getattr(self._runtime, "has_listeners", False) is True:
            if fields.get("error"):
                fields["error"] = mask(str(fields["error"]))
            self._runtime.emit(RunEvent(kind=kind, run_id=self._run_id, **fields))

    def decided(self, intent: str, chosen: str, reasoning: str, node_id: str) -> None:
        """Record a decision that is its own outcome, where supported."""
        decide = getattr(self._runtime, "decide", None)
        if decide is None:
            return
        option = {"id": chosen, "description": intent, "action_type": chosen}
        decision_id = decide(intent=intent, options=[option], chosen=chosen, reasoning=reasoning, node_id=node_id)
        record = getattr(self._runtime, "record_outcome", None)
        if record is not None:
            record(decision_id=decision_id, success=True, summary=reasoning)

    def recording(self, sink: list[dict[str, Any]]) -> AbstractContextManager[Any]:
        """While open, decisions and problems made in this task are also added to ``sink``, where supported."""
        return _manager(self._runtime, "recording", sink)


_NO_MANAGER = nullcontext()


def _manager(runtime: Any, name: str, argument: Any) -> AbstractContextManager[Any]:
    method = getattr(runtime, name, None)
    if method is None:
        return _NO_MANAGER
    manager = method(argument)
    # A mock has every method, and what those return is often no context manager.
    return manager if isinstance(manager, AbstractContextManager) else _NO_MANAGER


def _run_all(saves: Sequence[Callable[[], None]]) -> None:
    """Make the saves in order. One that fails is logged, as the runtime itself logs what its store does."""
    for save in saves:
        try:
            save()
        except Exception as error:  # any runtime may be plugged in
            logger.error("The runtime failed to save its record of a run:\n%s", masked_traceback(error))


def _accepts(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
