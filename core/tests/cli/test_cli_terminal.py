"""The command in a real terminal: live progress, Ctrl-C at the keyboard, narrow screens, the shell, no colours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from tests.cli.cli_kit import PATIENCE_SECONDS, Site

INPUT = ["-i", '{"place": "hill", "buyer": "Ada"}']
KEYS = "keys of house by plan of hill for Ada"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\r")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """Starts commands in terminals of a size, and ends what is left."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.children: list[Any] = []

    def start(self, *words: object, columns: int = 80, **variables: str) -> Any:
        command = self.site.command(*words)
        environment = self.site.environment(TERM="xterm-256color", **variables)
        child = pexpect.spawn(
            command[0],
            command[1:],
            cwd=str(self.site.folder),
            env=environment,
            dimensions=(24, columns),
            encoding="utf-8",
            timeout=PATIENCE_SECONDS,
        )
        self.children.append(child)
        return child

    def screen(self, *words: object, columns: int = 80, **variables: str) -> tuple[int, str]:
        """Runs a command to its end: exit code, and all that it wrote, control codes included."""
        child = self.start(*words, columns=columns, **variables)
        return self.ended(child)

    @staticmethod
    def ended(child: Any) -> tuple[int, str]:
        written = (child.before if isinstance(child.before, str) else "") + child.read()
        child.close()
        return child.exitstatus, written


def text_of(written: str) -> list[str]:
    """What was written without its control codes, line by line."""
    return [line.rstrip() for line in _CONTROL.sub("", written).split("\n")]


@pytest.fixture
def terminal(site: Site) -> Iterator[Terminal]:
    made = Terminal(site)
    yield made
    for child in made.children:
        child.close(force=True)


@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.slow)])
def test_a_run_shows_live_progress_and_leaves_its_lines(terminal: Terminal, columns: int) -> None:
    child = terminal.start("run", terminal.site.agent, *INPUT, columns=columns, FLAKY="build", HOLD="hand_over")
    child.expect("holding")
    child.expect("hand_over")  # drawn by the live part while the step is under way
    child.expect(r"2 steps  \d")
    child.kill(9)
    child.expect(pexpect.EOF)
    code, written = terminal.screen("resume", "latest", columns=columns)
    assert code == 0
    lines = text_of(written)
    assert any("2 steps kept: survey, build" in line for line in lines)
    assert any(line.startswith("status") and "completed" in line for line in lines)
    assert any(KEYS in line for line in lines)
    assert _COLOUR.search(written)
    assert "\x1b[?25h" in written  # the cursor is shown again
    assert terminal.site.ledger() == ["survey", "build", "build", "hand_over", "hand_over"]


def test_ctrl_c_at_the_keyboard_stops_the_run_and_shows_how_to_go_on(terminal: Terminal) -> None:
    child = terminal.start("run", terminal.site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    child.expect("holding")
    child.sendintr()
    child.expect("Stopped by Ctrl-C.")
    code, written = terminal.ended(child)
    assert code == 130
    assert "surefoot resume house-1" in "\n".join(text_of(written))
    assert "Traceback" not in written
    code, written = terminal.screen("resume", "house-1")
    assert code == 0
    assert terminal.site.ledger() == ["survey", "build", "build", "hand_over"]


def test_closing_the_terminal_releases_the_run(terminal: Terminal) -> None:
    child = terminal.start("run", terminal.site.agent, *INPUT, "--run-id", "house-1", HOLD="build")
    child.expect("holding")
    child.ptyproc.fileobj.close()
    assert child.ptyproc.wait() == 129
    with open_storage(terminal.site.url) as storage:
        record = storage.find_run("house-1")
        assert record is not None
        assert (record.state, record.owner) == (RunState.CRASHED, None)
    assert terminal.site.call("resume", "latest", "-q").document["output"]["keys"] == KEYS


@pytest.mark.parametrize("columns", [40, *(pytest.param(more, marks=pytest.mark.slow) for more in (80, 60))])
def test_tables_fit_the_terminal(terminal: Terminal, columns: int) -> None:
    site = terminal.site
    site.make_agent("a-house-for-everybody-and-their-animals", description="Builds houses " * 10)
    for words in (("info", site.agent), ("list", "."), ("doctor", "--no-verify")):
        code, written = terminal.screen(*words, columns=columns)
        assert code == 0
        assert max(len(line) for line in text_of(written)) <= columns


@pytest.mark.parametrize("how", ["option", "variable"])
def test_no_colours_when_they_are_not_wanted(terminal: Terminal, how: str) -> None:
    if how == "variable":
        terminal.site.variables["NO_COLOR"] = "1"
    words = ["--no-color"] if how == "option" else []
    code, written = terminal.screen("info", terminal.site.agent, *words)
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", written)


def test_the_shell_talks_at_a_terminal_and_ctrl_c_ends_a_run_but_not_the_shell(terminal: Terminal) -> None:
    terminal.site.make_agent(pause_nodes=["build"])
    child = terminal.start("shell", terminal.site.agent)
    child.expect("builder> ")
    child.sendline("hill")
    child.expect(r"builder \(build\)> ")
    child.sendline("Ada")
    child.expect(KEYS)
    child.expect("builder> ")
    child.sendintr()
    child.expect("builder> ")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_the_shell_goes_on_after_a_run_was_stopped(terminal: Terminal) -> None:
    child = terminal.start("shell", terminal.site.agent, HOLD="build")
    child.expect("builder> ")
    child.sendline("hill")
    child.expect("holding")
    child.sendintr()
    child.expect("Stopped by Ctrl-C")
    child.expect("builder> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_values_cannot_steer_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    nodes = """
NODES = {"survey": lambda place: "\\x1b]0;stolen title\\x07\\x1b[2J", "build": lambda plan: plan,
         "hand_over": lambda house, buyer: house}
"""
    terminal.site.make_agent(nodes=nodes)
    code, written = terminal.screen("run", terminal.site.agent, *INPUT)
    assert code == 0
    assert "\x1b]0;" not in written
    assert "\x1b[2J" not in written
    assert "stolen title" in written
