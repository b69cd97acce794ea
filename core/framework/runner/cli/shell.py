"""``surefoot shell``: an agent, line by line. Every line starts a run, or answers the one that is paused."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framework.runner.cli.agents import Choices, Job, load_agent
from framework.runner.cli.app import Command, model_option
from framework.runner.cli.commands_folders import agents_in
from framework.runner.cli.dispatching import choose
from framework.runner.cli.exits import Exit, message_of, not_found, usage_error
from framework.runner.cli.inputs import agent_folder, parse_object, parse_pair, with_user
from framework.runner.cli.output import Column, Styled
from framework.runner.cli.retention_options import chosen_policy, retention_option, swept
from framework.runner.cli.running import Loop
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import open_store
from framework.schemas.run import RunState
from framework.storage.backend import Storage

if TYPE_CHECKING:
    from framework.graph.edge import GraphSpec
    from framework.runner.runner import AgentRunner

_HELP = """Write the input as JSON, as key=value pairs, or as plain text, which goes to the agent's first input key.
An answer may be yes or no, which are true and false; "no" in quotes is the text.
/info   the agent          /nodes  its nodes
/reset  forget the paused run and start anew
/quit   leave (also Ctrl-D)"""


def parse_line(line: str, key: str) -> dict[str, Any]:
    """What a line of the shell gives: a JSON object, ``key=value`` pairs, else a text under ``key``.

    Raises ``CommandError`` for what begins like JSON and is none.
    """
    if line.startswith("{"):
        return parse_object(line, "The line")
    with contextlib.suppress(ValueError):  # an unclosed quote: it is a sentence
        words = shlex.split(line)
        if words and all(mark and name.isidentifier() for name, mark, _ in (word.partition("=") for word in words)):
            return dict(parse_pair(word, "The line:") for word in words)
    return {key: line}


_YES = {"yes": True, "y": True, "true": True, "no": False, "n": False, "false": False}


def parse_answer(line: str, asked: Sequence[str]) -> dict[str, Any]:
    """What a line answers to a pause that asked for these keys: as ``parse_line``, and a plain yes or no is true or
    false: as a text, even "no" would count as a yes. ``"no"`` in quotes is the text.

    Raises ``CommandError``.
    """
    if len(line) > 1 and line[0] == line[-1] == '"':
        with contextlib.suppress(ValueError):
            return {asked[0] if asked else "input": json.loads(line)}
    data = parse_line(line, asked[0] if asked else "input")
    if line.startswith("{"):
        return data
    return {
        key: _YES.get(value.strip().lower(), value) if isinstance(value, str) and key in asked else value
        for key, value in data.items()
    }


def first_key(graph: GraphSpec) -> str:
    """The key that plain text goes to when a run starts: the first that the entry node reads, else ``input``."""
    node = graph.get_node(graph.entry_node)
    return node.input_keys[0] if node is not None and node.input_keys else "input"


class _Shell:
    """One conversation: the agents that were loaded, and the run that waits for an answer."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        folder: Path | None,
        directory: Path,
        choices: Choices,
        approve: bool,
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._folder = folder
        self._directory = directory
        self._choices = choices
        self._approve = approve
        self._runners: dict[Path, AgentRunner] = {}
        self._paused: Job | None = None
        self._loop = Loop()

    def talk(self) -> None:
        """Read lines until there are no more."""
        screen = self._settings.screen
        with self._loop:
            try:
                if self._folder is not None:
                    self._runner(self._folder)
                screen.note(Styled("/help shows what can be written; /quit leaves.", "bright_black"))
                while (line := self._read()) is not None:
                    if line.strip() in ("/quit", "/exit", "/q"):
                        return
                    try:
                        self._take(line.strip())
                    except Exception as error:
                        if self._settings.debug:
                            raise
                        screen.error(message_of(error))
            finally:
                for runner in self._runners.values():
                    self._loop.run(runner.cleanup_async)

    def _read(self) -> str | None:
        interactive = sys.stdin.isatty()
        name = self._folder.name if self._folder is not None else "surefoot"
        waiting = f" ({self._paused.ended.result.paused_at})" if self._paused and self._paused.ended else ""
        try:
            if not interactive:
                return sys.stdin.readline() or None
            return input(f"{name}{waiting}> ")
        except EOFError:
            self._settings.screen.note("")
            return None
        except KeyboardInterrupt:
            self._settings.screen.note("")
            return ""

    def _take(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self._run(line)
        elif line == "/reset":
            self._paused = None
            self._settings.screen.note("The next line starts a new run.")
        elif line in ("/info", "/nodes"):
            self._show(nodes=line == "/nodes")
        elif line == "/help":
            self._settings.screen.note(_HELP)
        else:
            raise usage_error(f"There is no {line.split(maxsplit=1)[0]} here. {_HELP.splitlines()[0]}")

    def _run(self, line: str) -> None:
        if self._paused is not None and self._paused.ended is not None:
            asked = self._paused.ended.asked_for()
            data = parse_answer(line, asked)
            run_id = self._paused.run_id or ""
            job = Job(self._settings, self._paused.runner, self._storage, run_id, input=data, loop=self._loop)
            job.carry_out(lambda agent: agent.resume(run_id, data))
        else:
            folder = self._folder
            if folder is None:
                request = parse_line(line, "request")
                folder, _ = choose(self._settings, self._directory, request, None, (), self._choices.mock)
                folder = folder.absolute()
                self._settings.screen.note(f"{folder.name} takes this.")
            runner = self._runner(folder)
            data = with_user(runner.graph, parse_line(line, first_key(runner.graph)))
            job = Job(self._settings, runner, self._storage, given=frozenset(data), loop=self._loop)
            job.carry_out(lambda agent: agent.run(data))
        self._paused = None
        if job.ended is not None and job.ended.state is RunState.PAUSED:
            job.run_id = job.ended.result.run_id
            self._paused = job

    def _runner(self, folder: Path) -> AgentRunner:
        if folder not in self._runners:
            runner = load_agent(self._settings, folder, self._choices, self._storage)
            if self._approve and sys.stdin.isatty():
                runner.set_approval_callback(self._ask)
            self._runners[folder] = runner
        return self._runners[folder]

    def _ask(self, request: Any) -> Any:
        """Answers an approval request at the terminal."""
        from framework.graph.plan import ApprovalDecision, ApprovalResult  # noqa: PLC0415 - only agents that ask

        what = getattr(request, "approval_message", None) or getattr(request, "step_description", None) or str(request)
        approved = self._settings.screen.confirm(f"{what} Approve?")
        return ApprovalResult(decision=ApprovalDecision.APPROVE if approved else ApprovalDecision.REJECT)

    def _show(self, *, nodes: bool) -> None:
        screen = self._settings.screen
        if self._folder is None:
            _show_agents(self._settings, self._directory)
            return
        info = self._runner(self._folder).info()
        if nodes:
            columns = [Column("node"), Column("type"), Column("reads", grow=True), Column("writes", grow=True)]
            rows = [
                (each["id"], each["type"], ", ".join(each["input_keys"]) or "-", ", ".join(each["output_keys"]) or "-")
                for each in info.nodes
            ]
            screen.table(columns, rows)
            return
        screen.fields(
            [
                ("agent", info.name),
                ("description", info.description or "-"),
                ("goal", info.goal_description or info.goal_name or "-"),
                ("begins at", info.entry_node),
                ("plain text goes to", first_key(self._runner(self._folder).graph)),
            ]
        )


def _show_agents(settings: Settings, directory: Path) -> None:
    rows = [(each["name"], each["error"] or each["description"]) for each in agents_in(directory)]
    settings.screen.table([Column("agent"), Column("description", grow=True)], rows)


def _pick(settings: Settings, directory: Path) -> Path:
    """The agent that the user chooses of a folder; the only one when there is just one."""
    found = [each for each in agents_in(directory) if each["error"] is None]
    if not found:
        raise not_found(f"There are no agents in {directory}. Name one: surefoot shell AGENT.")
    if len(found) > 1:
        names = ", ".join(each["name"] for each in found)
        if not sys.stdin.isatty():
            raise usage_error(f"{directory} has several agents: {names}. Name one as AGENT, or use --multi.")
        _show_agents(settings, directory)
        name = click.prompt("Agent", type=click.Choice([each["name"] for each in found]), err=True, show_choices=False)
        found = [each for each in found if each["name"] == name]
    return Path(found[0]["path"]).absolute()


@click.command("shell", cls=Command)
@click.argument("agent", required=False)
@click.option("--agents-dir", default="exports", show_default=True, metavar="DIR", help="Where to look without AGENT.")
@click.option("--multi", is_flag=True, help="Give each line to the agent of DIR that can handle it.")
@click.option("--no-approve", is_flag=True, help="Do not ask for approvals at the terminal.")
@model_option()
@click.option("--base-url", metavar="URL", help="An OpenAI-compatible endpoint to use instead of the vendor's.")
@click.option("--mock", is_flag=True, help="Fill every output with made-up values; no model is asked.")
@retention_option
@click.pass_obj
def shell(
    settings: Settings,
    agent: str | None,
    agents_dir: str,
    multi: bool,
    no_approve: bool,
    base_url: str | None,
    mock: bool,
    retention: str | None,
) -> int:
    """Talk to an AGENT line by line. A run that pauses takes the next line as its answer.

    Lines are JSON, key=value pairs, or plain text for the agent's first input key; /help shows the rest.
    """
    if settings.json:
        raise usage_error("The shell is for people; for JSON use surefoot run AGENT -o json.")
    if multi and agent is not None:
        raise usage_error("--multi chooses the agent for each line; leave AGENT out, or --multi.")
    policy = chosen_policy(retention)
    directory = Path(agents_dir).expanduser()
    if multi:
        agents_in(directory)
        folder = None
    else:
        folder = agent_folder(agent) if agent is not None else _pick(settings, directory)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # line editing and history, where the system has it
            import readline  # noqa: F401, PLC0415
    with open_store(settings, create=True) as storage, swept(storage, policy):
        _Shell(settings, storage, folder, directory, Choices(mock=mock, base_url=base_url), not no_approve).talk()
    return Exit.DONE
