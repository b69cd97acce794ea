"""Loading an agent for a command, and running it with progress, signals and a summary at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework._secrets import register_url
from framework.graph.executor import ExecutionResult
from framework.graph.readable import masked_state
from framework.graph.run_view import RunView, view_run
from framework.runner.cli.exits import CommandError, not_found
from framework.runner.cli.inputs import agent_folder
from framework.runner.cli.output import Styled
from framework.runner.cli.progress import Before, Progress
from framework.runner.cli.results import Outcome, full_document, short_document, show, write_file
from framework.runner.cli.running import Loop, Stopped, run_to_end
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import command_for, facts_of
from framework.runner.cli.text import shown_url
from framework.runner.cli.view_screens import answer_commands
from framework.schemas.checkpoint import CheckpointConfig, ExecutorType
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.records import RunRecord

if TYPE_CHECKING:
    from framework.runner.runner import AgentRunner


@dataclass(frozen=True, slots=True)
class Choices:
    """How an agent is loaded: options of the commands that run one."""

    mock: bool = False
    base_url: str | None = None
    allow_change: bool = False

    def words(self, settings: Settings) -> tuple[str, ...]:
        """The options that the command to go on needs again. The model and ``--mock`` are recorded with the run, and so
        is the endpoint, but not what its URL has of passwords: those are shown as ``***``."""
        return ("--base-url", shown_url(self.base_url)) if self.base_url else ()


def checkpoint_config(choices: Choices) -> CheckpointConfig:
    """How runs of the command line are kept: with enough checkpoints for comparing and forking."""
    from framework.runner.runner import KEPT_CHECKPOINTS  # noqa: PLC0415 - after the arguments have been checked

    return CheckpointConfig(
        retention_strategy="prune_old",
        max_checkpoints_per_run=KEPT_CHECKPOINTS,
        definition_change="allow" if choices.allow_change else "refuse",
    )


def load_agent(
    settings: Settings, folder: Path, choices: Choices, storage: Storage | None, facts: Mapping[str, Any] | None = None
) -> AgentRunner:
    """The agent in ``folder``, its runs kept in ``storage``; ``facts`` of a run it goes on with fill in what the
    command line leaves open. What the folder's own code prints while it is imported goes to stderr."""
    from framework.runner.runner import AgentRunner  # noqa: PLC0415 - after the arguments have been checked

    known = facts or {}
    register_url(choices.base_url)
    model = settings.model or known.get("model")
    base_url = choices.base_url or known.get("base_url")
    with settings.screen.agent_prints_aside():
        return AgentRunner.load(
            folder,
            mock_mode=choices.mock or bool(known.get("mock")),
            model=model if isinstance(model, str) else None,
            base_url=base_url if isinstance(base_url, str) else None,
            storage=storage,
            checkpoint_config=checkpoint_config(choices) if storage is not None else None,
        )


def folder_of(record: RunRecord, given: str | None) -> Path:
    """The agent folder that a run goes on with: ``given`` by the user, else the one recorded with it.

    Raises ``CommandError`` when there is none, or it is not there any more.
    """
    if record.executor_type != ExecutorType.GRAPH.value:
        raise CommandError(
            f"Run {record.run_id!r} executes a plan, not an agent folder; resume it from the program that started it."
        )
    if given is not None:
        return agent_folder(given)
    recorded = facts_of(record).get("agent_path")
    if not isinstance(recorded, str):
        raise CommandError(
            f"Run {record.run_id!r} was started by a program of its own, not from an agent folder; resume it there, or "
            "name the folder that has its agent: --agent PATH."
        )
    if not (Path(recorded) / "agent.json").is_file():
        raise not_found(
            f"The agent of run {record.run_id!r} is not at {recorded} any more; say where it is now: --agent PATH."
        )
    return Path(recorded)


def remarks_on_input(view: RunView, given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What to say of input that is given to a run that exists: warnings, and the keys that are not used at all."""
    comparable = masked_state(dict(given))  # as the view shows the original input
    new = [key for key, value in comparable.items() if key not in view.input or view.input[key] != value]
    if not new:
        return [], []
    if view.state is RunState.COMPLETED:
        unused = f"the input {', '.join(new)} is not used"
        return [f"Run {view.run_id} is completed: its stored result is shown, and {unused}."], new
    asked = [key for each in view.resume.waiting for key in each.keys]
    unasked = [key for key in new if key not in asked]
    if not asked or not unasked:
        return [], []
    return [not_asked(unasked, asked)], []


def not_asked(unasked: Sequence[str], asked: Sequence[str]) -> str:
    """What is said of an answer's keys that nobody asked for."""
    return (
        f"The run waits for {', '.join(asked)}; it did not ask for {', '.join(unasked)}, which goes to its state too."
    )


@dataclass(slots=True)
class Job:
    """One execution by a command. ``resume_words`` follow ``surefoot resume RUN`` in the command to go on, ``extra``
    is added to the JSON that it answers with, ``input`` is what a run that exists is given. With a ``loop`` it runs
    there, and the agent is not closed afterwards."""

    settings: Settings
    runner: AgentRunner
    storage: Storage | None
    run_id: str | None = None
    quiet: bool = False
    output_file: Path | None = None
    given: frozenset[str] = frozenset()
    resume_words: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    loop: Loop | None = None
    ignored: list[str] = field(default_factory=list)
    """Keys of the input that were not used, as the run was completed before."""
    ended: Outcome | None = None
    """What the execution came to, once it has."""

    def carry_out(self, work: Callable[[AgentRunner], Awaitable[ExecutionResult]]) -> int:
        """Run ``work`` with progress, write what came of it, and return the exit code.

        Raises what the library raises: ``RunBusy``, ``DefinitionChanged``, ``StorageError`` ...
        """
        screen = self.settings.screen
        found = _view(self.storage, self.run_id)
        before = Before() if found is None else Before(found.path, found.total_tokens, found.cost)
        warnings, self.ignored = remarks_on_input(found, self.input) if found is not None else ([], [])
        for text in warnings:
            screen.warning(text)
        names = [node.id for node in self.runner.graph.nodes]
        progress = Progress(screen, self.runner.agent_path.name, quiet=self.quiet, before=before, names=names)
        remove = self.runner.runtime.add_listener(progress)

        async def worked() -> ExecutionResult:
            try:
                return await work(self.runner)
            except asyncio.CancelledError:
                # The last step may have ended the run while it was being stopped: then there is a result to give.
                run_id = progress.run_id or self.run_id
                if run_id is None or not await asyncio.to_thread(_is_completed, self.storage, run_id):
                    raise
                return await self.runner.resume(run_id)

        async def whole() -> ExecutionResult:
            if self.loop is not None:
                return await worked()
            async with self.runner:
                return await worked()

        run = self.loop.run if self.loop is not None else run_to_end
        try:
            with progress, screen.agent_prints_aside():
                result = run(whole, progress.notice)
        except Stopped as stop:
            return self._stopped(stop, progress)
        finally:
            remove()
        return self._ended(result, progress)

    def _command(self, run_id: str) -> tuple[str, ...]:
        words = ["surefoot", "resume", run_id, *self.resume_words]
        return (*words, *(["--storage", shown_url(self.settings.storage)] if self.settings.storage else []))

    def _ended(self, result: ExecutionResult, progress: Progress) -> int:
        view = _view(self.storage, result.run_id)
        outcome = Outcome(
            result=result,
            graph=self.runner.graph,
            seconds=progress.elapsed,
            cost=view.cost if view is not None else progress.cost,
            kept=self.storage is not None and view is not None,
            command=self._command(result.run_id or ""),
            given=self.given | frozenset(view.input if view is not None else ()),
            stored=view.state if view is not None else None,
            waits_for=tuple(key for each in view.resume.waiting for key in each.keys) if view is not None else (),
            ignored=tuple(self.ignored),
            waits=view.resume.waiting if view is not None else (),
            answers=tuple(answer_commands(self.settings, view)) if view is not None else (),
            unknown=view.resume.unknown if view is not None else (),
        )
        self.ended = outcome
        if self.output_file is not None:
            write_file(self.output_file, result)
        screen = self.settings.screen
        if self.quiet:
            screen.document({**self.extra, **short_document(result)})
        elif screen.json:
            screen.document({**self.extra, **full_document(outcome)})
        elif not result.success and view is None and progress.run_id is None:
            screen.error(result.error or "The run was not started.")
        else:
            show(screen, outcome)
            if self.output_file is not None:
                screen.note(f"Written to {self.output_file}.")
        return outcome.code

    def _stopped(self, stop: Stopped, progress: Progress) -> int:
        run_id = progress.run_id or self.run_id
        view = _view(self.storage, run_id)
        command = command_for(self.settings, "resume", view.run_id, *self.resume_words) if view is not None else None
        screen = self.settings.screen
        why = f"stopped by {stop.by}"
        if self.quiet:
            steps = view.steps_taken if view is not None else progress.steps
            screen.document({"success": False, "steps_executed": steps, "output": {}, "error": why})
        elif screen.json:
            screen.document(
                {
                    "run_id": run_id,
                    "status": view.state.value if view is not None else RunState.CANCELLED.value,
                    "success": False,
                    "error": why,
                    "resume_command": command,
                    "exit_code": stop.code,
                }
            )
        if view is None:
            screen.note(Styled(f"Stopped by {stop.by}.", "yellow"), " Nothing of this run was kept.")
        else:
            steps = len([step for step in view.steps if step.status in ("done", "handled")])
            kept = "its finished step is kept" if steps == 1 else f"its {steps} finished steps are kept"
            left = " It is left to the next process, which `surefoot recover` is, too." if stop.let_go else ""
            screen.note(Styled(f"Stopped by {stop.by}.", "yellow"), f" Run {view.run_id}: {kept}.{left} Go on with:")
            screen.note("  ", Styled(command or "", "bold"), wrap=False)
        return stop.code


def _view(storage: Storage | None, run_id: str | None) -> RunView | None:
    if storage is None or run_id is None or storage.find_run(run_id) is None:
        return None
    return view_run(storage, run_id)


def _is_completed(storage: Storage | None, run_id: str) -> bool:
    found = storage.find_run(run_id) if storage is not None else None
    return found is not None and found.state is RunState.COMPLETED
