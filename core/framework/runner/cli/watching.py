"""``surefoot runs watch``: follow a run that another process runs, by what its store says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from framework._secrets import mask, mask_value
from framework.errors import SurefootError
from framework.graph.resume_outlook import owner_in_words
from framework.graph.run_view import RunView, StepView, as_json, view_run
from framework.runner.cli.app import Command
from framework.runner.cli.exits import CommandEnds, Exit, not_found
from framework.runner.cli.output import Cell, Styled
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import find_run, open_store
from framework.runner.cli.text import clock_time, counted, duration, money, shortened
from framework.runner.cli.view_screens import next_command, standing, took
from framework.schemas.run import RunState
from framework.storage.backend import Storage
from framework.storage.ownership import effective_state

_INTERVAL_SECONDS = 0.5
_CODES = {RunState.COMPLETED: Exit.DONE, RunState.PAUSED: Exit.PAUSED}
_DIM = "bright_black"


@click.command("watch", cls=Command, short_help="Follow a run until it ends.")
@click.argument("run_id", metavar="RUN")
@click.option(
    "--interval",
    type=click.FloatRange(0.05),
    default=_INTERVAL_SECONDS,
    show_default=True,
    help="Seconds between looks.",
)
@click.pass_obj
def watch(settings: Settings, run_id: str, interval: float) -> int:
    """Follow a run until it ends: every finished step, and how it came out.

    Ctrl-C stops the watching, not the run. The exit code says how the run ended: 0 completed, 1 failed, cancelled or
    crashed, 3 paused.
    """
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        if effective_state(record) is RunState.RUNNING:
            owner = owner_in_words(record.owner) if record.owner else "nobody"
            screen.note(f"Watching run {record.run_id} ({owner}); Ctrl-C stops the watching only.")
        shown: set[tuple[str, str, int]] = set()
        try:
            for view in _views(storage, record.run_id, lambda: time.sleep(interval)):
                for step in view.steps:
                    _show(settings, step, shown)
        except KeyboardInterrupt:
            screen.note("Stopped watching; the run is as it was.")
            raise CommandEnds(130) from None
    if screen.json:
        screen.document(
            {
                "run_id": view.run_id,
                "state": view.state.value,
                "error": mask(view.error) if view.error else None,
                "steps": mask_value(as_json(view.steps)),
                "total_tokens": view.total_tokens,
                "cost": view.cost,
            }
        )
    else:
        _show_end(settings, view)
    return _CODES.get(view.state, Exit.FAILED)


def _views(storage: Storage, run_id: str, wait: Callable[[], Any]) -> Iterator[RunView]:
    """The run whenever it has moved, the last time when nobody runs it any more."""
    seen: tuple[int, RunState] | None = None
    while True:
        record = storage.find_run(run_id)
        if record is None:
            raise not_found(f"Run {run_id!r} is gone: it was deleted while it was being watched.")
        state = effective_state(record)
        if (record.sequence, state) != seen:
            seen = (record.sequence, state)
            view = view_run(storage, run_id)
            yield view
            if view.state is not RunState.RUNNING:
                return
        wait()


def _show(settings: Settings, step: StepView, shown: set[tuple[str, str, int]]) -> None:
    """A line for each step that is over and each attempt that failed, once."""
    screen = settings.screen
    # The last attempt of a failed step is the run's error, which is said at the end.
    failed = step.failed_attempts[:-1] if step.status == "failed" else step.failed_attempts
    for attempt in failed:
        key = (step.key, "attempt", attempt.sequence)
        if key not in shown and step.status not in ("done", "handled"):
            screen.say(
                screen.state("warning", f"{step.key}"),
                f"  attempt {attempt.number} failed: {mask(shortened(attempt.error, 200))}",
            )
        shown.add(key)
    if step.status in ("done", "handled", "skipped", "rejected"):
        key = (step.key, step.status, step.sequence or 0)
        if key in shown:
            return
        shown.add(key)
        mark = standing(screen, step)
        parts: list[Cell] = [Styled(f"{screen.mark(_MARKS[step.status])} {step.key}", mark.style)]
        facts = [took(step.latency_ms)] if step.latency_ms else []
        facts += [counted(step.tokens, "token")] if step.tokens else []
        facts += [money(step.cost)] if step.cost else []
        facts += [f"attempt {step.attempts}"] if step.attempts > 1 else []
        facts += [step.status] if step.status in ("skipped", "rejected") else []
        if step.finished_at is not None:
            parts.insert(0, Styled(f"{clock_time(step.finished_at)[11:]}  ", _DIM))
        parts.append(Styled(f"  {', '.join(facts)}" if facts else "", _DIM))
        if step.error:
            parts.append(Styled(f"  {mask(shortened(step.error, 200))}", "yellow"))
        screen.say(*parts)


_MARKS = {"done": "completed", "handled": "warning", "skipped": "off", "rejected": "failed"}


def _show_end(settings: Settings, view: RunView) -> None:
    screen = settings.screen
    took = duration(view.updated_at - view.created_at)
    facts = [counted(sum(step.status in ("done", "handled") for step in view.steps), "step"), took]
    facts += [counted(view.total_tokens, "token")] if view.total_tokens else []
    facts += [money(view.cost)] if view.cost else []
    screen.say(
        screen.state(view.state.value, f"{view.run_id} {view.state.value}"), Styled(f"  {', '.join(facts)}", _DIM)
    )
    if view.error:
        screen.say(Styled(mask(view.error), "red"))
    try:
        command = next_command(settings, view)
    except SurefootError:
        command = None
    if command is not None and view.state is not RunState.COMPLETED:
        screen.say(Styled("go on with", "bold"))
        screen.say("  ", Styled(command, "cyan"), wrap=False)
