"""``surefoot recover``: find the runs whose process died or that are due, and resume them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from framework._secrets import mask, masked_traceback
from framework.errors import LeaseLost, RunBusy, SurefootError
from framework.graph import recovery, stopping
from framework.graph.cancelling import LET_GO, lets_go, was_asked_to_stop
from framework.graph.executor import ExecutionResult
from framework.graph.recovery import recover_run, recoverable_runs
from framework.graph.run_events import RunEvent
from framework.runner.cli.agents import Choices, folder_of, load_agent
from framework.runner.cli.app import Command
from framework.runner.cli.exits import CommandError, Exit, message_of, usage_error
from framework.runner.cli.inputs import agent_folder
from framework.runner.cli.output import Column, Styled
from framework.runner.cli.progress import tell_at_once
from framework.runner.cli.retention_options import chosen_policy, policy_text, removed, retention_option, swept
from framework.runner.cli.running import EVERY, Stopped, ended_by_agent, run_to_end
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import agent_of, command_for, facts_of, is_of_folder, open_store
from framework.runner.cli.text import counted, shortened
from framework.runner.recovery import INTERVAL_SECONDS, Worker
from framework.schemas.checkpoint import CheckpointConfig, ExecutorType
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.records import RunRecord
from framework.storage.retention_records import SweepReport

_ASKED = "it was asked to stop before its process ended"
_TAKEN = "another process took it"

INTERRUPTED = "interrupted"
"""The outcome of a run that was going on when this process was stopped: the next one takes it up."""

_MOST_SHOWN = 1000
"""With --watch and -o json: the last outcomes, in the one document at the end."""

_NOT_TAKEN_UP = ("busy", "failed", "skipped")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of one run that was taken up. ``outcome``: completed, paused, failed; cancelled (that had been asked
    for before its process ended); busy (another process took it); skipped; interrupted (by a stop: left to the next
    process)."""

    run_id: str
    agent: str | None
    outcome: str
    steps_recovered: int = 0
    steps_executed: int = 0
    error: str | None = None


class Told:
    """What was told last of runs that could not be taken up, the newest ``_MOST_SHOWN`` of them: a worker lives for
    months, and others finish or delete what it could not take up."""

    def __init__(self) -> None:
        self._last: dict[str, Recovered] = {}

    def is_new(self, found: Recovered) -> bool:
        """Whether ``found`` is to be told: not when it is the same again of a run that could not be taken up."""
        before = self._last.pop(found.run_id, None)
        if found.outcome not in _NOT_TAKEN_UP:
            return True
        self._last[found.run_id] = found
        if len(self._last) > _MOST_SHOWN:
            del self._last[next(iter(self._last))]
        return before != found


@dataclass(slots=True)
class _Recovery:
    """Looks for crashed runs, and paused ones that can go on, in one store and resumes them, at most ``concurrency`` at
    once. ``tell`` hears of each as it ends."""

    settings: Settings
    storage: Storage
    folder: Path | None
    concurrency: int
    failed: bool = False
    max_attempts: int | None = None
    tell: Callable[[Recovered], None] = lambda found: None

    def to_resume(self) -> list[RunRecord]:
        """Runs that nobody works on though they are not finished, oldest first, then paused ones that have what they
        waited for, then, if asked, failed ones. Parts of others are none."""
        return recoverable_runs(self.storage, failed=self.failed, is_ours=self.is_ours)

    def is_ours(self, run: RunRecord) -> bool:
        """Whether the run is of the agent that was named, if one was."""
        return self.folder is None or is_of_folder(run, self.folder)

    def foretell(self, run: RunRecord) -> Recovered:
        """The run as it is, and what would become of it if not resumed."""
        asked = run.state is RunState.CRASHED and was_asked_to_stop(self.storage, run)
        why = f"{_ASKED}; would be cancelled" if asked else run.error if run.state is RunState.FAILED else None
        return Recovered(run.run_id, agent_of(run), run.state.value, error=mask(why) if why else None)

    async def resume(self, runs: Sequence[RunRecord]) -> None:
        """Resume ``runs``. Cancelled, it leaves those under way to the next process, and tells which these are."""
        free = asyncio.Semaphore(self.concurrency)

        async def one(run: RunRecord) -> None:
            async with free:
                if stopping.is_asked():
                    raise asyncio.CancelledError(LET_GO)
                found = await recover_run(self.storage, run, self.execute, CheckpointConfig().lease_seconds)
                self.tell(self.in_words(run, found))

        # Not a TaskGroup: it would cancel the runs without saying why, and they would not be let go.
        tasks = [asyncio.create_task(one(run)) for run in runs]
        try:
            ended = await asyncio.gather(*map(asyncio.shield, tasks), return_exceptions=True)
        except asyncio.CancelledError as error:
            for task in tasks:
                task.cancel(*error.args)
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for each in ended:
            if isinstance(each, BaseException):
                raise each

    def in_words(self, run: RunRecord, found: recovery.Recovered[Recovered]) -> Recovered:
        """What came of a run, as it is shown."""
        if found.result is not None:
            return found.result
        errors = {"cancelled": _ASKED, "busy": _TAKEN}
        said = errors.get(found.outcome, found.error)
        return Recovered(run.run_id, agent_of(run), found.outcome, error=mask(said) if said else None)

    def _left(self, run: RunRecord) -> Recovered:
        """What a stop makes of a run: its last step may have been ending it."""
        now = self.storage.find_run(run.run_id)
        if now is not None and now.state is RunState.COMPLETED:
            return Recovered(run.run_id, agent_of(run), "completed")
        return Recovered(run.run_id, agent_of(run), INTERRUPTED, error="left to the next process")

    async def execute(self, run: RunRecord) -> Recovered:
        """Resume one run with the agent it was started with. Raises ``RunBusy``, ``LeaseLost``, and ``CancelledError``
        when this command is being stopped, of which it tells."""
        agent = agent_of(run)
        if run.executor_type != ExecutorType.GRAPH.value:
            return Recovered(run.run_id, agent, "skipped", error="executes a plan; its own program resumes it")
        try:
            folder = folder_of(run, str(self.folder) if self.folder is not None else None)
            async with load_agent(self.settings, folder, Choices(), self.storage, facts_of(run)) as runner:
                manager = runner.checkpoint_manager
                if self.max_attempts is not None and manager is not None:
                    limit = {"max_recovery_attempts": self.max_attempts}
                    manager.config = manager.config.model_copy(update=limit)
                remove = runner.runtime.add_listener(self._progress(folder.name))
                try:
                    result = await runner.resume(run.run_id)
                finally:
                    remove()
        except (RunBusy, LeaseLost):
            raise
        except CommandError as error:
            return Recovered(run.run_id, agent, "skipped", error=str(error))
        except SystemExit as error:
            return Recovered(run.run_id, agent, "failed", error=mask(ended_by_agent(error)))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if lets_go(error) or (task is not None and task.cancelling()):
                self.tell(await asyncio.to_thread(self._left, run))
                raise
            return Recovered(run.run_id, agent, "failed", error="the agent's own code cancelled the run")
        except Exception as error:
            # The agent's code may raise anything while it is loaded; that must not keep the other runs from going on.
            if self.settings.debug:
                self.settings.screen.note(masked_traceback(error).rstrip())
            return Recovered(run.run_id, agent, "failed", error=mask(_said(error)))
        return _ended(run.run_id, agent, result)

    def _progress(self, agent: str) -> Callable[[RunEvent], None]:
        """Plain lines, each with its run: several may go on at once."""
        screen = self.settings.screen

        def tell(event: RunEvent) -> None:
            at = Styled(f"  {event.run_id}  ", "bright_black")
            if event.kind == "run_resumed":
                screen.note(at, f"{agent}: goes on, {event.detail or 'from its start'}")
            elif event.kind == "step_finished":
                screen.note(at, Styled(screen.mark("completed"), "green"), f" {event.node_id}")
            elif event.kind in ("attempt_failed", "step_failed"):
                reason = shortened(mask(event.error or ""), 200)
                screen.note(at, Styled(screen.mark("failed"), "red"), f" {event.node_id}: {reason}")

        return tell


def _said(error: Exception) -> str:
    if isinstance(error, SurefootError | OSError):
        return message_of(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _ended(run_id: str, agent: str | None, result: ExecutionResult) -> Recovered:
    outcome = "paused" if result.paused_at is not None else "completed" if result.success else "failed"
    error = mask(result.error) if result.error else None
    return Recovered(run_id, agent, outcome, result.steps_recovered, result.steps_executed, error)


@click.command("recover", cls=Command)
@click.option("--agent", metavar="PATH", help="Only runs of this agent, with its folder as it is here.")
@click.option("--watch", is_flag=True, help="Keep looking, until Ctrl-C or SIGTERM: a worker.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=INTERVAL_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="With --watch: how long to wait between two looks, at most.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Resume at most N runs, then end.")
@click.option(
    "--concurrency",
    "--parallel",
    "concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many runs go on at once.",
)
@click.option("--failed", is_flag=True, help="Failed runs as well, but not those that crashed too often.")
@click.option(
    "--max-attempts",
    type=click.IntRange(min=0),
    metavar="N",
    help="How often in a row a run goes on after its process vanished, with nothing finished in between; then it "
    "fails. Default: 5.",
)
@retention_option
@click.option("--dry-run", is_flag=True, help="Only list the runs that it would take up; nothing is removed either.")
@click.pass_obj
def recover(
    settings: Settings,
    agent: str | None,
    watch: bool,
    interval: float,
    limit: int | None,
    concurrency: int,
    failed: bool,
    max_attempts: int | None,
    retention: str | None,
    dry_run: bool,
) -> int:
    """Find the runs whose process died, or that are due, and resume them after their last finished steps.

    A paused run is due when its sleep is over, or when it was sent what a node of it waits for. Others that paused,
    and those that were stopped, are left alone: `surefoot resume` goes on with those. One that was asked to stop
    (`surefoot runs cancel`) before its process died is cancelled instead, and one that has ended its process again and
    again fails. SIGTERM lets the runs that it has taken up go on to their next commit, within $SUREFOOT_GRACE_SECONDS
    (5), Ctrl-C does not; either leaves them to the next process. With --retention it removes finished runs as well:
    with --watch about every ten minutes, else once. Exit code 1 when a run could not be recovered, 3 when
    one paused.
    """
    if watch and limit is not None:
        raise usage_error("--watch looks for ever, --limit ends after N runs: give one of them.")
    folder = agent_folder(agent) if agent is not None else None
    policy = chosen_policy(retention)
    with open_store(settings, create=watch) as storage:
        found = _Recovery(settings, storage, folder, concurrency, failed, max_attempts)
        if dry_run:
            _show(settings, [found.foretell(run) for run in found.to_resume()[:limit]])
            return Exit.DONE
        if watch:
            return _watch(settings, found, agent, interval, policy, policy_text(retention))
        runs = found.to_resume()[:limit]
        results: list[Recovered] = []
        found.tell = results.append
        try:
            with swept(storage, policy) as sweeps:
                with settings.screen.agent_prints_aside():
                    run_to_end(lambda: found.resume(runs), tell_at_once, leaving=EVERY)
                if sweeps is not None:
                    sweeps.at_least_once()
        except Stopped as stop:
            _show(settings, results)
            _tell_stop(settings, stop, results, agent)
            return stop.code
        _show(settings, results)
        return _code(results)


def _watch(
    settings: Settings,
    work: _Recovery,
    agent: str | None,
    interval: float,
    policy: RetentionPolicy | None,
    rule: str,
) -> int:
    """``rule`` is what was written for the ``policy``."""
    screen = settings.screen
    kinds = "crashed, due and failed runs" if work.failed else "crashed and due runs"
    at_once = f", {work.concurrency} at once" if work.concurrency > 1 else ""
    screen.note(f"Looking for {kinds} every {interval:g} s{at_once}. Ctrl-C ends this.")
    if policy is not None and not policy.is_empty:
        screen.note(f"Finished runs are removed by {rule}.")
    left: list[Recovered] = []
    seen: deque[Recovered] = deque(maxlen=_MOST_SHOWN)
    told = Told()

    def tell(found: Recovered) -> None:
        if found.outcome == INTERRUPTED:
            left.append(found)
        if not told.is_new(found):
            return
        seen.append(found)
        if not screen.json and found.outcome != "busy":
            more = found.error or f"{counted(found.steps_executed, 'step')}, {found.steps_recovered} kept"
            screen.say(screen.state(found.outcome), f"  {found.run_id}", Styled(f"  {more}", "bright_black"))

    def problem(text: str | None) -> None:
        if text is None:
            screen.note("The store answers again.")
        else:
            screen.warning(f"{text} Asking again, ever less often, until it answers.")

    def swept_once(report: SweepReport) -> None:
        if what := removed(report):
            screen.note(f"Retention removed {what}.")

    work.tell = tell
    worker = Worker(
        work.storage,
        work.execute,
        concurrency=work.concurrency,
        interval=interval,
        failed=work.failed,
        is_ours=work.is_ours,
        tell=lambda run, found: tell(work.in_words(run, found)),
        problem=problem,
        is_missed=lambda found: (found.result or found).outcome in _NOT_TAKEN_UP,
    )
    try:
        with swept(work.storage, policy, swept_once), screen.agent_prints_aside():
            run_to_end(worker.run, tell_at_once, leaving=EVERY)
    except Stopped as stop:
        if screen.json:
            _show(settings, seen)
        _tell_stop(settings, stop, left, agent)
        return stop.code
    raise AssertionError("watching ended by itself")


def _tell_stop(settings: Settings, stop: Stopped, results: Sequence[Recovered], agent: str | None) -> None:
    """Say which runs are left to the next process, and what takes them up."""
    screen = settings.screen
    left = [each.run_id for each in results if each.outcome == INTERRUPTED]
    stopped = Styled(f"Stopped by {stop.by}.", "yellow")
    if not left:
        screen.note(stopped, " No run was going on.")
        return
    screen.note(stopped, f" Left to the next process, their finished steps kept: {', '.join(left)}. Go on with:")
    only = ("--agent", agent) if agent is not None else ()
    screen.note("  ", Styled(command_for(settings, "recover", *only), "bold"), wrap=False)
    if len(left) == 1:
        screen.note("  ", Styled(command_for(settings, "resume", left[0]), "bold"), wrap=False)


def _show(settings: Settings, results: Collection[Recovered]) -> None:
    screen = settings.screen
    if screen.json:
        screen.document({"recovered": [asdict(each) for each in results]})
    elif not results:
        screen.say("No run has crashed, and none is due.")
    else:
        columns = [
            Column("outcome"),
            Column("run"),
            Column("agent", drop=1),
            Column("steps", right=True, drop=2),
            Column("kept", right=True, drop=3),
        ]
        rows = [
            (
                screen.state(each.outcome),
                each.run_id,
                each.agent or "-",
                str(each.steps_executed),
                str(each.steps_recovered),
            )
            for each in results
        ]
        screen.table(columns, rows)
        for each in results:
            if each.error:
                screen.say(Styled(f"{each.run_id}: ", "bold"), each.error)
        screen.note(f"{counted(len(results), 'run')}.")


def _code(results: Sequence[Recovered]) -> int:
    outcomes = {each.outcome for each in results}
    if outcomes & {"failed", "skipped"}:
        return Exit.FAILED
    return Exit.PAUSED if "paused" in outcomes else Exit.DONE
