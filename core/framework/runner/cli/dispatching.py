"""``surefoot dispatch``: give a request to that agent of a folder which can handle it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from framework.runner.cli.agents import Choices, Job, load_agent
from framework.runner.cli.app import Command, model_option
from framework.runner.cli.commands_folders import agents_in
from framework.runner.cli.exits import CommandError, not_found, usage_error
from framework.runner.cli.inputs import AGENT_FILE, input_options, read_input, with_user
from framework.runner.cli.output import Column
from framework.runner.cli.settings import Settings, quiet_option
from framework.runner.cli.stores import open_store


class _Dispatch(Command):
    """Takes several names after one ``-a``, as the first version of this command did: ``-a writer editor``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_by_one(args)))


def _one_by_one(args: Sequence[str]) -> Iterator[str]:
    """``-a x y`` as ``-a x -a y``. The folder of the agents may stand last: a folder that has some is no name."""
    names = False
    for place, word in enumerate(args):
        if word.startswith("-"):
            names = False
            yield word
        elif place and args[place - 1] in ("-a", "--agents"):
            names = True
            yield word
        elif names and not any(Path(word).expanduser().glob(f"*/{AGENT_FILE}")):
            yield from ("-a", word)
        else:
            names = False
            yield word


@click.command("dispatch", cls=_Dispatch)
@click.argument("agents_dir", default="exports")
@input_options
@click.option("--intent", metavar="TEXT", help="What the request is for; helps to choose the agent.")
@click.option("-a", "--agents", "names", multiple=True, metavar="NAME", help="Only these agents: -a writer editor.")
@model_option()
@click.option("--mock", is_flag=True, help="Fill every output with made-up values; no model is asked.")
@quiet_option("No progress; stdout has the short JSON of `surefoot run --quiet`.")
@click.pass_obj
def dispatch(
    settings: Settings,
    agents_dir: str,
    input_text: str | None,
    input_file: str | None,
    intent: str | None,
    names: tuple[str, ...],
    mock: bool,
    quiet: bool,
) -> int:
    """Give a request to the agent in AGENTS_DIR that can handle it best, and run that agent.

    The choice is made by the words that the request and the agents' descriptions share, or with --model by asking that
    model.
    """
    request = read_input(input_text, input_file)
    if request is None:
        raise usage_error('dispatch needs the request: -i \'{"request": "..."}\', or -f FILE.')
    folder, ranking = choose(settings, Path(agents_dir).expanduser(), request, intent, names, mock)
    screen = settings.screen
    if not quiet and not screen.json:
        columns = [Column("agent"), Column("fit"), Column("why", grow=True)]
        screen.table(columns, [(each["agent"], each["level"], each["reasoning"]) for each in ranking])
        screen.say("")
    choices = Choices(mock=mock)
    with open_store(settings, create=True) as storage:
        runner = load_agent(settings, folder, choices, storage)
        data = with_user(runner.graph, request)
        job = Job(settings, runner, storage, quiet=quiet, given=frozenset(data), extra={"handled_by": folder.name})
        return job.carry_out(lambda agent: agent.run(data))


def choose(
    settings: Settings,
    directory: Path,
    request: Mapping[str, Any],
    intent: str | None,
    names: tuple[str, ...],
    mock: bool = False,
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the agent that fits best, and how well each fits, best first.

    Raises ``CommandError`` when there is no agent, one of ``names`` is unknown, or none can handle the request.
    """
    found = {each["name"]: each for each in agents_in(directory)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise not_found(f"There is no agent {unknown[0]!r} in {directory}; it has: {', '.join(found) or 'none'}.")
    readable = {name: each for name, each in found.items() if each["error"] is None and (not names or name in names)}
    if not readable:
        raise not_found(f"There are no agents to choose from in {directory}. `surefoot list {directory}` shows why.")
    asked = {**request, **({"intent": intent} if intent else {})}
    ranking = _ranking(settings, {name: Path(each["path"]) for name, each in readable.items()}, asked, mock)
    best = ranking[0]
    if best["level"] == "cannot_handle" and len(ranking) > 1:
        raise CommandError(
            f"None of the agents in {directory} can handle this request: {best['reasoning']}. Name one with -a NAME, "
            "or say more with --intent."
        )
    return Path(readable[best["agent"]]["path"]), ranking


def _ranking(
    settings: Settings, folders: Mapping[str, Path], asked: Mapping[str, Any], mock: bool
) -> list[dict[str, Any]]:
    import asyncio  # noqa: PLC0415 - together with what follows

    from framework.llm.choose import provider_for  # noqa: PLC0415 - only when a model is to choose

    llm = provider_for(settings.model) if settings.model is not None and not mock else None

    async def assess() -> list[dict[str, Any]]:
        answers = []
        for name, folder in folders.items():
            async with load_agent(settings, folder, Choices(mock=mock), None) as runner:
                answer = await runner.can_handle(asked, llm)
            fit = {"agent": name, "level": answer.level.value, "reasoning": answer.reasoning}
            answers.append({**fit, "confidence": answer.confidence})
        return sorted(answers, key=lambda each: (-each["confidence"], each["agent"]))

    with settings.screen.agent_prints_aside():
        return asyncio.run(assess())
