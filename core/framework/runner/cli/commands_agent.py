"""``surefoot run`` and ``surefoot resume``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from framework.graph.budget import RunBudget
from framework.runner.cli.agents import Choices, Job, folder_of, load_agent
from framework.runner.cli.app import Command, model_option
from framework.runner.cli.exits import usage_error
from framework.runner.cli.inputs import agent_folder, check_run_id, input_options, missing_input, read_input, with_user
from framework.runner.cli.retention_options import chosen_policy, retention_option, swept
from framework.runner.cli.settings import Settings, quiet_option
from framework.runner.cli.stores import RESUMABLE, facts_of, find_run, open_store
from framework.schemas.run import RunState

_SIGNALLED = 128
"""Exit codes from here on say that a signal stopped the command, and nobody waits for more."""


def _budget(max_tokens: int | None, max_cost: float | None) -> RunBudget | None:
    return RunBudget(max_tokens, max_cost) if (max_tokens, max_cost) != (None, None) else None


class _OutputType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """``table``, ``json``, or, as in the first version of this command, a file for the result."""

    name = "table|json|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in ("table", "json") else Path(value)


def _keep_output(ctx: click.Context, param: click.Parameter, value: str | Path | None) -> Path | None:
    if isinstance(value, str):
        ctx.ensure_object(Settings).output = value
        return None
    return value


def _run_options(command: Any) -> Any:
    """What ``run`` and ``resume`` share."""
    for option in (
        click.option(
            "-o",
            "--output",
            "output_path",
            type=_OutputType(),
            callback=_keep_output,
            help="table or json, as everywhere; anything else is taken as the FILE of --output-file.",
        ),
        quiet_option("No progress; stdout has the short JSON of --output-file."),
        click.option(
            "-O",
            "--output-file",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write success, steps_executed, output, error and paused_at to FILE as JSON.",
        ),
        click.option(
            "--allow-change", is_flag=True, help="Go on with the agent as it is now, though it changed since the start."
        ),
        click.option("--base-url", metavar="URL", help="An OpenAI-compatible endpoint to use instead of the vendor's."),
        click.option(
            "--max-cost",
            type=click.FloatRange(min=0),
            metavar="USD",
            help="Fail the run when it has cost this much, over all its processes, as far as prices are known.",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=0),
            metavar="N",
            help="Fail the run when it has used up N tokens, over all its processes.",
        ),
        model_option(),
        click.option("--mock", is_flag=True, help="Fill every output with made-up values; no model is asked."),
    ):
        command = option(command)
    return input_options(command)


@click.command("run", cls=Command)
@click.argument("agent")
@click.option("--run-id", metavar="ID", help="The run's id. One that exists goes on, or gives its result.")
@click.option("--no-checkpoints", is_flag=True, help="Keep nothing: the run cannot be resumed or looked at.")
@retention_option
@_run_options
@click.pass_obj
def run(
    settings: Settings,
    agent: str,
    run_id: str | None,
    no_checkpoints: bool,
    retention: str | None,
    input_text: str | None,
    input_file: str | None,
    mock: bool,
    base_url: str | None,
    allow_change: bool,
    max_tokens: int | None,
    max_cost: float | None,
    output_file: Path | None,
    output_path: Path | None,
    quiet: bool,
) -> int:
    """Run the AGENT in a folder (the one with its agent.json).

    Every finished step is kept, so a run that fails, is stopped or killed goes on with `surefoot resume latest`.
    """
    if no_checkpoints and run_id is not None:
        raise usage_error("--run-id names a run to go on with, which --no-checkpoints does not keep; give one of them.")
    if no_checkpoints and retention is not None:
        raise usage_error("--retention is about the store, which --no-checkpoints does not use; give one of them.")
    if run_id is not None:
        check_run_id(run_id)
    policy = None if no_checkpoints else chosen_policy(retention)
    budget = _budget(max_tokens, max_cost)
    choices = Choices(mock=mock, base_url=base_url, allow_change=allow_change)
    folder = agent_folder(agent)
    given = read_input(input_text, input_file)
    target = _writable(output_file or output_path)
    storage = None if no_checkpoints else open_store(settings, create=True)
    try:
        known = storage.find_run(run_id) if storage is not None and run_id is not None else None
        runner = load_agent(settings, folder, choices, storage, facts_of(known) if known is not None else None)
        data = with_user(runner.graph, given or {}) if known is None else (given or {})
        lacking = missing_input(runner.graph, data) if known is None and not quiet else []
        if lacking:
            settings.screen.warning(f"The first node reads {', '.join(lacking)}, which the input does not have.")
        job = Job(
            settings=settings,
            runner=runner,
            storage=storage,
            run_id=run_id,
            quiet=quiet,
            output_file=target,
            given=frozenset(data),
            input=data,
            resume_words=choices.words(settings),
        )
        if storage is None:
            return job.carry_out(lambda agent: agent.run(data, run_id=run_id, budget=budget))
        with swept(storage, policy) as sweeps:
            code = job.carry_out(lambda agent: agent.run(data, run_id=run_id, budget=budget))
            if sweeps is not None and code < _SIGNALLED:
                sweeps.at_least_once()
            return code
    finally:
        if storage is not None:
            storage.close()


@click.command("resume", cls=Command)
@click.argument("run_id", metavar="RUN")
@click.option("--agent", metavar="PATH", help="The agent's folder, when it is not where it was.")
@_run_options
@click.pass_obj
def resume(
    settings: Settings,
    run_id: str,
    agent: str | None,
    input_text: str | None,
    input_file: str | None,
    mock: bool,
    base_url: str | None,
    allow_change: bool,
    max_tokens: int | None,
    max_cost: float | None,
    output_file: Path | None,
    output_path: Path | None,
    quiet: bool,
) -> int:
    """Go on with RUN after its last finished step.

    RUN is an id, the beginning of one, or `latest`: the newest run that can go on. A paused run takes its answer as
    input: `surefoot resume latest -i '{"approved": true}'`. Of a completed run the result is shown; nothing runs.
    """
    budget = _budget(max_tokens, max_cost)
    choices = Choices(mock=mock, base_url=base_url, allow_change=allow_change)
    given = read_input(input_text, input_file)
    target = _writable(output_file or output_path)
    with open_store(settings) as storage:
        record = find_run(storage, run_id, latest=RESUMABLE)
        folder = folder_of(record, agent)
        if run_id != record.run_id and not quiet:
            settings.screen.note(f"Run {record.run_id} ({record.state.value}) of {folder.name}.")
        runner = load_agent(settings, folder, choices, storage, facts_of(record))
        if record.state is RunState.COMPLETED and not quiet:
            settings.screen.note(f"Run {record.run_id} is completed: this is its result, nothing runs.")
        moved = ("--agent", str(folder)) if agent is not None else ()
        job = Job(
            settings=settings,
            runner=runner,
            storage=storage,
            run_id=record.run_id,
            quiet=quiet,
            output_file=target,
            input=given or {},
            resume_words=(*choices.words(settings), *moved),
        )
        return job.carry_out(lambda agent: agent.resume(record.run_id, given, budget=budget))


def _writable(path: Path | None) -> Path | None:
    """``path``, after making sure that a result can be written there: a run may be long, and cost money."""
    if path is None:
        return None
    if path.is_dir():
        raise usage_error(f"--output-file {path} is a folder; name a file.")
    place = path if path.exists() else path.absolute().parent
    if not place.exists():
        raise usage_error(f"--output-file {path}: there is no folder {place}.")
    if not os.access(place, os.W_OK):
        raise usage_error(f"--output-file {path} cannot be written: no permission for {place}.")
    return path
