"""What users give a run: JSON objects from the command line, a file or stdin, and ``key=value`` pairs."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from framework.graph.edge import GraphSpec
from framework.runner.cli.exits import not_found, usage_error

AGENT_FILE = "agent.json"


def read_input(text: str | None, file: str | None) -> dict[str, Any] | None:
    """The input given with ``--input`` or ``--input-file``; ``-`` reads stdin. ``None`` when neither was given.

    Raises ``CommandError`` (usage).
    """
    if text is not None and file is not None:
        raise usage_error("--input and --input-file were both given; give the run one input.")
    if file is not None:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise usage_error(f"--input-file {file}: {getattr(error, 'strerror', None) or error}.") from error
        return parse_object(text, "--input-file")
    if text == "-":
        text = sys.stdin.read()
    return None if text is None else parse_object(text, "--input")


def parse_object(text: str, where: str) -> dict[str, Any]:
    """``text`` as a JSON object. Raises ``CommandError`` (usage) that says where it is not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise usage_error(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Write an object in single "
            """quotes, such as '{"topic": "tides"}'."""
        ) from None
    if not isinstance(value, dict):
        raise usage_error(f"{where} is a JSON object with the input's keys, not {json.dumps(value)[:60]}.")
    return value


def parse_pair(pair: str, where: str) -> tuple[str, Any]:
    """``key=JSON``; what is no JSON and does not look like it is a text, as in ``topic=tides``.

    Raises ``CommandError`` (usage).
    """
    key, mark, text = pair.partition("=")
    key = key.strip()
    if not mark or not key:
        raise usage_error(f"{where} {pair!r} is not key=value, such as topic=tides or limit=3.")
    try:
        return key, json.loads(text)
    except json.JSONDecodeError as error:
        if text.strip()[:1] in ("{", "[", '"'):
            raise usage_error(f"{where} {key}: the value is not JSON: {error.msg} at column {error.colno}.") from None
        return key, text


def agent_folder(given: str) -> Path:
    """The folder of an agent that a user named, absolute; its ``agent.json`` may be named as well.

    Raises ``CommandError`` (not found) that says what is there instead.
    """
    path = Path(given).expanduser()
    if path.name == AGENT_FILE and path.is_file():
        path = path.parent
    if (path / AGENT_FILE).is_file():
        return path.absolute()
    if path.is_dir():
        inside = sorted(each.parent.name for each in path.glob(f"*/{AGENT_FILE}"))
        more = f" It has folders with agents: {', '.join(inside[:5])}." if inside else ""
        raise not_found(f"{given} is no agent: it has no {AGENT_FILE}.{more}")
    parent = path.parent
    names = sorted(each.parent.name for each in parent.glob(f"*/{AGENT_FILE}")) if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3)
    meant = f" Did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""
    raise not_found(f"There is no agent at {given}: no such folder.{meant} `surefoot list DIR` shows agents.")


def check_run_id(run_id: str, option: str = "--run-id") -> None:
    """Raise ``CommandError`` (usage) for an id that no command could name again."""
    if run_id == "latest":
        raise usage_error(f"{option} latest cannot be an id: to commands it means the newest run.")
    if not run_id.strip() or run_id != run_id.strip() or not run_id.isprintable() or run_id.startswith("-"):
        raise usage_error(
            f"{option} {run_id!r} cannot be an id: use characters that can be typed and seen, without a space or line "
            "at either end and no - at the beginning, such as order-17."
        )


def with_user(graph: GraphSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The input of a new run, with ``user_id`` from the environment when the first node wants one."""
    first = graph.get_node(graph.entry_node)
    user = os.environ.get("USER")
    if first is not None and "user_id" in first.input_keys and "user_id" not in given and user:
        return {**given, "user_id": user}
    return dict(given)


def missing_input(graph: GraphSpec, given: Mapping[str, Any]) -> list[str]:
    """What the first node reads and the input does not have. It may do without; people rarely mean it to."""
    first = graph.get_node(graph.entry_node)
    return [key for key in (first.input_keys if first is not None else ()) if key not in given]


def input_options(command: Any) -> Any:
    """``-i/--input`` and ``-f/--input-file``, for commands that give a run input."""
    command = click.option(
        "-f", "--input-file", "input_file", metavar="FILE", help="Read the input from a JSON file (- for stdin)."
    )(command)
    return click.option("-i", "--input", "input_text", metavar="JSON", help="The input, a JSON object (- for stdin).")(
        command
    )
