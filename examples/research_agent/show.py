"""What the demo looks like: a board of the graph, live in a terminal and as lines in a pipe, and the account."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from agent import KINDS
from claims import Facts
from ledger import Bill, bill
from observe import View, node_of, visit_of
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns used at most: a wider terminal gets no wider table."""

INDENT = "   "

_CELL = 16
_ROWS: dict[str, Sequence[str]] = {
    "start": ("intake", "plan", "triage", "dispatch"),
    **{kind: (f"search_{kind}", f"assess_{kind}") for kind in KINDS},
    "join": ("compare", "review", "follow_up"),
    "report": ("write_report", "check_sources", "publish"),
}


class Screen:
    """The terminal, or whatever stands in for it."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=False)
        if self.console.width > WIDTH:
            self.console.width = WIDTH
        utf8 = not self.console.options.ascii_only
        names = ("done", "running", "cut", "kept", "waiting", "yes", "no")
        self.marks = dict(zip(names, "✔▸✗↺·✔✗" if utf8 else "v>xr.vx", strict=True))
        self.is_live = sys.stdout.isatty() and not self.console.is_dumb_terminal
        self._phase = 0

    def title(self, text: str) -> None:
        """The first lines."""
        self.console.print(Text(text, style="bold"))
        marks = self.marks
        legend = f"{marks['done']} done  {marks['running']} running  {marks['cut']} cut off  "
        self.console.print(Text(f"{legend}{marks['kept']} recovered, not run again", style="dim"))

    def phase(self, text: str) -> None:
        """What happens next."""
        self._phase += 1
        self.console.print()
        self.console.print(Text.assemble((f"{self._phase}  ", "bold cyan"), (text, "bold")))

    def say(self, text: str, style: str = "") -> None:
        """A sentence, indented below its phase."""
        for line in textwrap.wrap(text, self.console.width - len(INDENT), break_on_hyphens=False):
            self.console.print(Text(INDENT + line, style=style))

    def error(self, text: str) -> None:
        """Something that ends the demo."""
        self.console.print(Text(text, style="bold red"))

    def board(self, recovered: Iterable[str] = ()) -> Board:
        """A board of the run; ``recovered`` are the steps an earlier process finished."""
        return Board(self, list(recovered))

    def table(self, facts: Facts) -> None:
        """The four columns of the account."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold")
        table.add_column("")
        for heading in ("before kill", "recovered", "run after", "undisturbed run"):
            table.add_column(heading, justify="right")
        columns = [bill(facts.before.entries), facts.kept, bill(facts.later_entries), bill(facts.reference.entries)]
        done = len(facts.before.committed)
        steps = [done, facts.result["steps_recovered"], len(facts.after.committed) - done]
        table.add_row("steps done", *(f"{count}" for count in (*steps, len(facts.reference.committed))))
        table.add_row("LLM calls paid", *(f"{each.calls}" for each in columns))
        table.add_row("tokens paid", *(f"{each.tokens:,}" for each in columns))
        table.add_row("invented money", *(_money(each) for each in columns))
        table.add_row("tool calls", *(f"{each.tools}" for each in columns))
        self.console.print()
        self.console.print(Padding(table, (0, 0, 0, len(INDENT)), expand=False))
        self.console.print()

    def account(self, facts: Facts) -> None:
        """The table in words."""
        self.say("recovered + run after = undisturbed run", "dim")
        kept, again = facts.kept, facts.repeated
        self.say(
            f"Not paid twice: {_counted(kept.calls, 'LLM call')}, {kept.tokens:,} tokens, {_money(kept)}.", "bold green"
        )
        self.say("A run from scratch would have paid them again.")
        twice = ", ".join(visit_of(step) for step in facts.ran_twice)
        if facts.ran_twice:
            self.say(f"Ran twice, because in flight at the kill: {twice}.")
        if facts.replayed:
            self.say(f"Of their finished calls, {_counted(facts.replayed, 'LLM call')} came from the journal.")
        if again.calls:
            calls = _counted(again.calls, "LLM call")
            self.say(f"Paid again: {calls} ({again.tokens:,} tokens, {_money(again)}), in flight at the kill.")

    def verdicts(self, verdicts: Iterable[tuple[str, bool]]) -> None:
        """What was checked, and how it came out."""
        for claim, holds in verdicts:
            mark = (f"{self.marks['yes']} ", "green") if holds else (f"{self.marks['no']} NOT TRUE: ", "bold red")
            self.console.print(Text.assemble(INDENT, mark, claim))

    def code(self, code: str) -> None:
        """A call or command, never wrapped by us: that would break it for who copies it."""
        self.console.print(Text(INDENT + code, style="cyan"), soft_wrap=True)


class Board:
    """The state of each node, redrawn in a terminal; in a pipe one line per committed step."""

    def __init__(self, screen: Screen, recovered: Sequence[str]) -> None:
        self._screen = screen
        self._recovered = list(recovered)
        self._told = len(recovered)
        self._started = time.monotonic()
        self._live = Live(console=screen.console, auto_refresh=False, transient=False) if screen.is_live else None
        self._view = View()

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, view: View, *, since: int = 0) -> None:
        """Show the run as it is now; ``since`` entries of the ledger belong to earlier processes."""
        if view == self._view:
            return
        self._view = view
        if self._live is not None:
            self._live.update(self._draw(view, since, cut=False), refresh=True)
            return
        for number, step in enumerate(view.committed[self._told :], self._told + 1):
            seconds = time.monotonic() - self._started
            self._screen.console.print(f"   {seconds:5.1f} s  step {number:2} committed: {visit_of(step)}")
        self._told = len(view.committed)

    def close(self, view: View, *, since: int = 0, cut: bool = False) -> None:
        """Show the run for the last time; with ``cut`` the process is gone, and what was running is marked so."""
        self.update(view, since=since)
        drawing = self._draw(view, since, cut=cut)
        if self._live is not None:
            self._live.update(drawing, refresh=True)
        else:
            self._screen.console.print(drawing)

    def _draw(self, view: View, since: int, *, cut: bool) -> Group:
        marks: dict[str, list[str]] = {}
        for step in view.committed:
            marks.setdefault(node_of(step), []).append("kept" if step in self._recovered else "done")
        begun = {entry["step"] for entry in view.entries[since:] if entry["kind"] == "body"}
        for step in view.in_flight:
            if step in begun:
                marks.setdefault(node_of(step), []).append("cut" if cut else "running")
        lines = [self._row(label, nodes, marks) for label, nodes in _ROWS.items()]
        paid = bill(view.entries[since:])
        committed = _counted(len(view.committed) - len(self._recovered), "step")
        account = f"{committed} committed, {_counted(paid.calls, 'LLM call')}, {paid.tokens:,} tokens, {_money(paid)}"
        lines.append(Text(f"{INDENT}this process: {account}", style="dim"))
        return Group(*lines)

    def _row(self, label: str, nodes: Sequence[str], marks: dict[str, list[str]]) -> Text:
        line = Text(f"   {label:<13}", style="dim")
        for node in nodes:
            name = node.removesuffix(f"_{label}")
            states = marks.get(node, ["waiting"])
            width = len(name) + sum(2 for _ in states)
            line.append(name, _STYLES[states[-1]])
            for state in states:
                line.append(f" {self._screen.marks[state]}", _STYLES[state])
            line.append(" " * max(2, _CELL - width))
        line.rstrip()
        return line


_STYLES = {
    "done": "not dim green",
    "kept": "not dim cyan",
    "running": "not dim bold yellow",
    "cut": "not dim bold red",
    "waiting": "dim",
}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _money(paid: Bill) -> str:
    return f"${paid.usd:.4f}"
