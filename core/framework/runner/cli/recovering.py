"""``surefoot recover``: find the runs whose process died or that are due, and resume them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from framework._secrets import mask, masked_traceback
from framework.errors import LeaseLost, RunBusy, SurefootError
from framework.graph.cancelling import LEFT, cancel_if_asked, lets_go, was_asked_to_stop
from framework.graph.executor import ExecutionResult
from framework.graph.readable import plain_json
from framework.graph.run_events import RunEvent
from framework.runner.cli.agents import Choices, folder_of, load_agent
from framework.runner.cli.app import Command
from framework.runner.cli.exits import CommandError, Exit, message_of
from framework.runner.cli.inputs import agent_folder
from framework.runner.cli.output import Column, Styled
from framework.runner.cli.progress import tell_at_once
from framework.runner.cli.running import EVERY, Stopped, ended_by_agent, run_to_end
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import agent_of, all_runs, command_for, facts_of, is_of_folder, open_store
from framework.runner.cli.text import counted, shortened
from framework.runner.runner import MAX_RECOVERY_ATTEMPTS
from framework.runner.waking import woken_runs
from framework.schemas.checkpoint import CheckpointConfig, ExecutorType
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.records import RunRecord

_ASKED = "it was asked to stop before its process ended"
_TAKEN = "another process took it"

INTERRUPTED = "interrupted"
"""The outcome of a run that was going on when this process was stopped: the next one takes it up."""

_INTERVAL_SECONDS = 5.0
_LONGEST_WAIT_SECONDS = 300.0
"""A run that cannot be taken up is tried again ever less often, but at least this often."""


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


@dataclass(frozen=True, slots=True)
class _Missed:
    """A run that could not be taken up: its last commit and owner then, what came of it, how many times in a row, and
    until when (of the monotonic clock, in seconds) it is left alone."""

    of: tuple[int, int]
    found: Recovered
    times: int
    until: float


@dataclass(slots=True)
class _Recovery:
    """Looks for crashed runs, and paused ones that can go on, in one store and resumes them, at most ``parallel`` at
    once."""

    settings: Settings
    storage: Storage
    folder: Path | None
    parallel: int
    interval: float = _INTERVAL_SECONDS
    missed: dict[str, _Missed] = field(default_factory=dict)
    """Runs that could not be taken up, by id."""

    def to_resume(self) -> list[RunRecord]:
        """Runs that nobody works on though they are not finished, oldest first, then paused ones that have what they
        waited for; those that were tried before come last. Parts of others are none, and neither are those that were
        tried just now."""
        found = [
            run
            for run in all_runs(self.storage, [RunState.CRASHED, RunState.RUNNING])
            if run.state is RunState.CRASHED and run.parent_run_id is None and self._is_due(run) and self._is_ours(run)
        ]
        found.reverse()
        found += [run for run in woken_runs(self.storage) if self._is_due(run) and self._is_ours(run)]
        return sorted(found, key=lambda run: run.run_id in self.missed)

    def _is_due(self, run: RunRecord) -> bool:
        missed = self.missed.get(run.run_id)
        return missed is None or missed.of != (run.sequence, run.token) or time.monotonic() >= missed.until

    def _is_ours(self, run: RunRecord) -> bool:
        return self.folder is None or is_of_folder(run, self.folder)

    def foretell(self, run: RunRecord) -> Recovered:
        """The run as it is, and what would become of it if not resumed."""
        asked = run.state is RunState.CRASHED and was_asked_to_stop(self.storage, run)
        why = f"{_ASKED}; would be cancelled" if asked else None
        return Recovered(run.run_id, agent_of(run), run.state.value, error=why)

    async def resume(self, runs: Sequence[RunRecord], tell: Callable[[Recovered], None]) -> list[Recovered]:
        """Resume ``runs``; ``tell`` hears of each as it ends, but not twice in a row the same of one that could not be
        taken up. Cancelled, it leaves those under way to the next process, and tells which these are."""
        free = asyncio.Semaphore(self.parallel)

        async def one(run: RunRecord) -> Recovered:
            async with free:
                try:
                    found = await self._resume(run)
                except asyncio.CancelledError:
                    tell(await asyncio.to_thread(self._left, run))
                    raise
            if self._is_news(run, found):
                tell(found)
            return found

        # Not a TaskGroup: it would cancel the runs without saying why, and they would not be let go.
        tasks = [asyncio.create_task(one(run)) for run in runs]
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for each in ended:
            if isinstance(each, BaseException):
                raise each
        return [each for each in ended if isinstance(each, Recovered)]

    def _is_news(self, run: RunRecord, found: Recovered) -> bool:
        """Note when a run that could not be taken up is tried again; whether there is something to say of it."""
        before = self.missed.pop(run.run_id, None)
        if found.outcome not in ("busy", "failed", "skipped"):
            return True
        of = (run.sequence, run.token)
        times = before.times + 1 if before is not None and before.of == of else 1
        wait = min(self.interval * 2 ** min(times - 1, 10), max(_LONGEST_WAIT_SECONDS, self.interval))
        self.missed[run.run_id] = _Missed(of, found, times, time.monotonic() + wait)
        return before is None or before.found != found

    def _left(self, run: RunRecord) -> Recovered:
        """What a stop makes of a run: its last step may have been ending it."""
        now = self.storage.find_run(run.run_id)
        if now is not None and now.state is RunState.COMPLETED:
            return Recovered(run.run_id, agent_of(run), "completed")
        return Recovered(run.run_id, agent_of(run), INTERRUPTED, error="left to the next process")

    async def _resume(self, run: RunRecord) -> Recovered:
        agent = agent_of(run)
        try:
            crashed = run.state is RunState.CRASHED
            if crashed and await asyncio.to_thread(
                cancel_if_asked, self.storage, run, CheckpointConfig().lease_seconds
            ):
                return Recovered(run.run_id, agent, "cancelled", error=_ASKED)
        except RunBusy:
            return Recovered(run.run_id, agent, "busy", error=_TAKEN)
        except SurefootError as error:
            return Recovered(run.run_id, agent, "failed", error=mask(message_of(error)))
        if run.executor_type != ExecutorType.GRAPH.value:
            return Recovered(run.run_id, agent, "skipped", error="executes a plan; its own program resumes it")
        try:
            if crashed and run.recovery_attempts >= MAX_RECOVERY_ATTEMPTS:
                crashes = await asyncio.to_thread(self._crashes, run)
                if crashes > MAX_RECOVERY_ATTEMPTS:
                    problem = f"ended its process {crashes} times in a row; `surefoot resume` still takes it up"
                    return Recovered(run.run_id, agent, "skipped", error=problem)
            folder = folder_of(run, str(self.folder) if self.folder is not None else None)
            async with load_agent(self.settings, folder, Choices(), self.storage, facts_of(run)) as runner:
                remove = runner.runtime.add_listener(self._progress(folder.name))
                try:
                    result = await runner.resume(run.run_id)
                finally:
                    remove()
        except (RunBusy, LeaseLost):
            return Recovered(run.run_id, agent, "busy", error=_TAKEN)
        except CommandError as error:
            return Recovered(run.run_id, agent, "skipped", error=str(error))
        except SystemExit as error:
            return Recovered(run.run_id, agent, "failed", error=mask(ended_by_agent(error)))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if lets_go(error) or (task is not None and task.cancelling()):
                raise
            return Recovered(run.run_id, agent, "failed", error="the agent's own code cancelled the run")
        except Exception as error:
            # The agent's code may raise anything while it is loaded; that must not keep the other runs from going on.
            if self.settings.debug:
                self.settings.screen.note(masked_traceback(error).rstrip())
            return Recovered(run.run_id, agent, "failed", error=mask(_said(error)))
        return _ended(run.run_id, agent, result)

    def _crashes(self, run: RunRecord) -> int:
        """How often the run's process ended in the middle of it, without the times when it was let go."""
        records = (each for row in self.storage.read_log(run.run_id) for each in plain_json(row.record))
        return run.recovery_attempts + 1 - sum(1 for each in records if each.get("kind") == LEFT)

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
@click.option("--watch", is_flag=True, help="Keep looking, until Ctrl-C or SIGTERM.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=_INTERVAL_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="With --watch: how long to wait between two looks.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Resume at most N runs (at each look).")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many runs go on at once.",
)
@click.option("--dry-run", is_flag=True, help="Only list the runs that it would take up.")
@click.pass_obj
def recover(
    settings: Settings,
    agent: str | None,
    watch: bool,
    interval: float,
    limit: int | None,
    parallel: int,
    dry_run: bool,
) -> int:
    """Find the runs whose process died, or that are due, and resume them after their last finished steps.

    A paused run is due when its sleep is over, or when it was sent what a node of it waits for. Others that paused,
    failed or were stopped are left alone: `surefoot resume` goes on with those. One that was asked
    to stop (`surefoot runs cancel`) before its process died is cancelled instead. A stop of this command (Ctrl-C,
    SIGTERM) leaves the runs that it has taken up to the next one. Exit code 1 when a run could not be recovered, 3 when
    one paused.
    """
    folder = agent_folder(agent) if agent is not None else None
    with open_store(settings, create=watch) as storage:
        recovery = _Recovery(settings, storage, folder, parallel, interval)
        if dry_run:
            _show(settings, [recovery.foretell(run) for run in recovery.to_resume()[:limit]])
            return Exit.DONE
        if watch:
            return _watch(settings, recovery, agent, limit)
        runs = recovery.to_resume()[:limit]
        results: list[Recovered] = []
        try:
            with settings.screen.agent_prints_aside():
                run_to_end(lambda: recovery.resume(runs, results.append), tell_at_once, leaving=EVERY)
        except Stopped as stop:
            _show(settings, results)
            _tell_stop(settings, stop, results, agent)
            return stop.code
        _show(settings, results)
        return _code(results)


def _watch(settings: Settings, recovery: _Recovery, agent: str | None, limit: int | None) -> int:
    screen = settings.screen
    screen.note(
        f"Looking for crashed runs, and for those that are due, every {recovery.interval:g} s. Ctrl-C ends this."
    )
    seen: list[Recovered] = []

    def tell(found: Recovered) -> None:
        if screen.json or found.outcome == INTERRUPTED:
            seen.append(found)
        if not screen.json:
            screen.say(screen.state(found.outcome), f"  {found.run_id}", f"  {found.error}" if found.error else "")

    async def forever() -> None:
        while True:
            await recovery.resume((await asyncio.to_thread(recovery.to_resume))[:limit], tell)
            await asyncio.sleep(recovery.interval)

    try:
        with screen.agent_prints_aside():
            run_to_end(forever, tell_at_once, leaving=EVERY)
    except Stopped as stop:
        if screen.json:
            _show(settings, seen)
        _tell_stop(settings, stop, seen, agent)
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


def _show(settings: Settings, results: Sequence[Recovered]) -> None:
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
            Column("problem", grow=True),
        ]
        rows = [
            (
                screen.state(each.outcome),
                each.run_id,
                each.agent or "-",
                str(each.steps_executed),
                str(each.steps_recovered),
                shortened(each.error or "", 300),
            )
            for each in results
        ]
        screen.table(columns, rows)
        screen.note(f"{counted(len(results), 'run')}.")


def _code(results: Sequence[Recovered]) -> int:
    outcomes = {each.outcome for each in results}
    if outcomes & {"failed", "skipped"}:
        return Exit.FAILED
    return Exit.PAUSED if "paused" in outcomes else Exit.DONE
