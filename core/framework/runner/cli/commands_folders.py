"""``surefoot info``, ``validate`` and ``list``: looking at agent folders without running anything."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from framework.errors import SurefootError
from framework.runner.cli.agents import Choices, load_agent
from framework.runner.cli.app import Command, model_option
from framework.runner.cli.exits import Exit, message_of, not_found
from framework.runner.cli.inputs import AGENT_FILE, agent_folder
from framework.runner.cli.output import Cell, Column, Screen, Styled
from framework.runner.cli.settings import Settings
from framework.runner.cli.text import counted, shortened


@click.command("info", cls=Command)
@click.argument("agent")
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.pass_obj
def info(settings: Settings, agent: str, as_json: bool) -> int:
    """Show an AGENT: its goal, nodes, edges and tools. Its code is loaded; no node runs."""
    if as_json:
        settings.output = "json"
    folder = agent_folder(agent)
    with load_agent(settings, folder, Choices(), None) as runner:
        found = runner.info()
    screen = settings.screen
    if screen.json:
        screen.document({**asdict(found), "agent_path": str(folder)})
        return Exit.DONE
    screen.say(Styled(found.name, "bold"), f"  {found.description}" if found.description else "")
    goal = ": ".join(part for part in (found.goal_name, found.goal_description) if part)
    screen.fields(
        [
            ("folder", str(folder)),
            ("goal", goal or "-"),
            ("begins at", found.entry_node or "-"),
            ("ends at", ", ".join(found.terminal_nodes) or "-"),
            ("tools", ", ".join(found.required_tools) or "-"),
        ]
    )
    screen.say("")
    reads, writes = Column("reads", grow=True), Column("writes", grow=True)
    screen.table(
        [Column("node"), Column("type"), reads, writes, Column("tools", drop=1)],
        [
            (
                node["id"],
                node["type"],
                ", ".join(node["input_keys"]) or "-",
                ", ".join(node["output_keys"]) or "-",
                ", ".join(node.get("tools") or ()) or "-",
            )
            for node in found.nodes
        ],
    )
    if found.edges:
        screen.say("")
        screen.table(
            [Column("from"), Column("to"), Column("when"), Column("edge", drop=1)],
            [(edge["source"], edge["target"], edge["condition"], edge["id"]) for edge in found.edges],
        )
    for title, entries in (("success criteria", found.success_criteria), ("constraints", found.constraints)):
        if entries:
            screen.say("")
            screen.say(Styled(title, "bold"))
            screen.fields([(entry["id"], entry["description"]) for entry in entries], indent=2)
    return Exit.DONE


@click.command("validate", cls=Command)
@click.argument("agent")
@click.option("--no-connect", is_flag=True, help="Do not start or ask the agent's MCP servers.")
@model_option()
@click.pass_obj
def validate(settings: Settings, agent: str, no_connect: bool) -> int:
    """Check an AGENT: its graph, its functions and tools, and the keys it needs. Exit code 1 when it cannot run."""
    folder = agent_folder(agent)
    screen = settings.screen
    with load_agent(settings, folder, Choices(), None) as runner:
        found = runner.validate(connect=not no_connect)
    if screen.json:
        screen.document({**asdict(found), "agent_path": str(folder)})
        return Exit.DONE if found.valid else Exit.FAILED
    for text in found.errors:
        screen.say(Styled(f"{screen.mark('failed')} ", "red"), text)
    for text in found.warnings:
        screen.say(Styled(f"{screen.mark('warning')} ", "yellow"), text)
    if found.valid:
        also = f", with {counted(len(found.warnings), 'warning')}" if found.warnings else ""
        screen.say(Styled(f"{screen.mark('completed')} ", "green"), f"{folder.name} can run{also}.")
    else:
        screen.say(f"{folder.name} cannot run: {counted(len(found.errors), 'error')}.")
    return Exit.DONE if found.valid else Exit.FAILED


@click.command("list", cls=Command)
@click.argument("directory", default="exports")
@click.pass_obj
def list_agents(settings: Settings, directory: str) -> int:
    """List the agents in DIRECTORY: its folders with an agent.json. Without one: ./exports."""
    found = agents_in(Path(directory).expanduser())
    screen = settings.screen
    if screen.json:
        screen.document({"directory": str(Path(directory).absolute()), "agents": found})
    elif not found:
        screen.say(f"There are no agents in {directory}: none of its folders has an {AGENT_FILE}.")
    else:
        _show_agents(screen, found)
    return Exit.DONE


def _show_agents(screen: Screen, found: list[dict[str, Any]]) -> None:
    rows: list[tuple[Cell, ...]] = []
    for each in found:
        if each["error"] is not None:
            rows.append((each["path"], "-", Styled(shortened(each["error"], 300), "red")))
        else:
            rows.append((each["path"], str(each["nodes"]), shortened(each["description"], 300)))
    screen.table([Column("agent"), Column("nodes", right=True, drop=1), Column("description", grow=True)], rows)


def agents_in(directory: Path) -> list[dict[str, Any]]:
    """The agents in a folder by name: path, name, nodes, description and, of one that cannot be read, ``error``.

    Only ``agent.json`` is read, no code is loaded. Raises ``CommandError`` when there is no such folder.
    """
    from framework.runner.agent_file import read_agent_file  # noqa: PLC0415 - after the arguments have been checked

    if not directory.is_dir():
        raise not_found(f"There is no folder {directory}. Name the one that has your agents: surefoot list DIR.")
    folders = sorted({path.parent for pattern in (AGENT_FILE, f"*/{AGENT_FILE}") for path in directory.glob(pattern)})
    found = []
    for folder in folders:
        entry: dict[str, Any] = {"path": str(folder), "name": folder.name, "nodes": 0, "description": "", "error": None}
        try:
            read = read_agent_file(folder)
        except (SurefootError, OSError, ValueError) as error:
            entry["error"] = message_of(error)
        else:
            entry["nodes"] = len(read.graph.nodes)
            entry["description"] = read.graph.description or read.goal.description or read.goal.name
        found.append(entry)
    return found
