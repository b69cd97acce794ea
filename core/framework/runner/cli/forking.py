"""``surefoot fork``, which is also ``surefoot runs fork``: a new run from a checkpoint of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from framework.graph.checkpoint_manager import CheckpointManager
from framework.runner.cli.agents import Choices, Job, folder_of, load_agent
from framework.runner.cli.app import Command, model_option
from framework.runner.cli.exits import Exit, usage_error
from framework.runner.cli.inputs import check_run_id, parse_pair
from framework.runner.cli.output import Cell, Styled
from framework.runner.cli.settings import Settings, quiet_option
from framework.runner.cli.stores import command_for, facts_of, find_run, open_store


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """What both commands that fork are called with: names as on the command line."""

    at: str | None
    changes: tuple[str, ...]
    new_run_id: str | None
    resume: bool
    agent: str | None
    mock: bool
    base_url: str | None
    allow_change: bool
    quiet: bool


def fork_run(settings: Settings, run_id: str, options: ForkOptions) -> int:
    """Fork a run, say so, and with ``resume`` run the fork; the exit code."""
    choices = Choices(mock=options.mock, base_url=options.base_url, allow_change=options.allow_change)
    if not options.resume and (options.quiet or settings.model is not None or choices != Choices()):
        raise usage_error(
            "--quiet, --mock, --model, --base-url and --allow-change say how the fork runs; add --resume."
        )
    if options.new_run_id is not None:
        check_run_id(options.new_run_id)
    values = dict(parse_pair(pair, "--set") for pair in options.changes)
    at, agent = options.at, options.agent
    place = int(at) if at is not None and at.isdecimal() else at
    screen = settings.screen
    with open_store(settings) as storage:
        record = find_run(storage, run_id)
        folder = folder_of(record, agent) if options.resume else None
        manager = CheckpointManager(storage)
        made = manager.fork(record.run_id, at=place, changes=values or None, new_run_id=options.new_run_id)
        command = command_for(settings, "resume", made)
        if folder is not None:
            if not options.quiet:
                screen.note(f"Run {made} was forked from {record.run_id}.")
            runner = load_agent(settings, folder, choices, storage, facts_of(record))
            moved = ("--agent", str(folder)) if agent is not None else ()
            words = (*choices.words(settings), *moved)
            job = Job(settings, runner, storage, made, quiet=options.quiet, resume_words=words)
            return job.carry_out(lambda each: each.resume(made))
        if screen.json:
            lineage = {"run_id": record.run_id, "at": place}
            screen.document(
                {"run_id": made, "forked_from": lineage, "changed": sorted(values), "resume_command": command}
            )
            return Exit.DONE
        pairs: list[tuple[Cell, Cell]] = [("new run", made), ("forked from", record.run_id)]
        pairs.append(("at", "its newest checkpoint" if place is None else f"checkpoint {place}"))
        if values:
            pairs.append(("changed", ", ".join(sorted(values))))
        screen.fields(pairs)
        screen.say("")
        screen.say(Styled("run it with", "bold"))
        screen.say(f"  {command}", wrap=False)
    return Exit.DONE


def fork_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument and options of a fork, for both commands: ``RUN`` and a ``ForkOptions``."""

    @wraps(command)
    def collected(settings: Settings, run_id: str, **given: Any) -> Any:
        return command(settings, run_id, ForkOptions(**given))

    for option in (
        quiet_option("With --resume: no progress; stdout has the short JSON of `surefoot run --quiet`."),
        click.option("--allow-change", is_flag=True, help="With --resume: go on though the agent has changed."),
        click.option("--base-url", metavar="URL", help="With --resume: an OpenAI-compatible endpoint to use."),
        model_option(),
        click.option("--mock", is_flag=True, help="With --resume: made-up values; no model is asked."),
        click.option("--agent", metavar="PATH", help="With --resume: the agent's folder, when it is not where it was."),
        click.option("--resume", is_flag=True, help="Run the new run at once."),
        click.option("--run-id", "new_run_id", metavar="ID", help="The new run's id."),
        click.option(
            "--set", "changes", multiple=True, metavar="KEY=JSON", help="Change a value of the state. Repeatable."
        ),
        click.option(
            "--at", metavar="SEQ|CHECKPOINT", help="The checkpoint to begin at, by number or id. Default: the newest."
        ),
        click.argument("run_id", metavar="RUN"),
    ):
        collected = option(collected)
    return collected


@click.command("fork", cls=Command)
@click.pass_obj
@fork_options
def fork(settings: Settings, run_id: str, options: ForkOptions) -> int:
    """Start a new run from a checkpoint of RUN, perhaps with other values. RUN itself stays as it is.

    `surefoot checkpoints list RUN` shows where it can begin.
    """
    return fork_run(settings, run_id, options)
