"""What commands write: tables, fields and JSON on stdout; notes, questions and errors on stderr.

Colours, marks and fitting widths are for terminals. In a pipe there are plain lines without control codes, nothing is
cut off, and rich is not even imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from framework._secrets import mask
from framework.runner.cli.text import clean, width_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP = 2
_LEAST = 12
"""Columns of a table that ``grow`` are never made narrower than this many cells."""


class Styled(NamedTuple):
    """A text and how it looks in a terminal: a rich style such as ``bold red``."""

    text: str
    style: str = ""


Cell = str | Styled


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. In a terminal too narrow for all, those with the highest ``drop`` go first (0: never), and
    those that ``grow`` are cut with an ellipsis; ``middle``: there, for ids that differ at their ends."""

    title: str
    right: bool = False
    drop: int = 0
    grow: bool = False
    middle: bool = False


# By the values of RunState, whose module would bring pydantic along, and by what else is marked.
_STATES: dict[str, tuple[str, str, str]] = {
    "completed": ("✓", "+", "green"),
    "running": ("●", "*", "cyan"),
    "paused": ("‖", "=", "yellow"),
    "failed": ("✗", "x", "red"),
    "crashed": ("!", "!", "bold red"),
    "cancelled": ("○", "o", "bright_black"),
    "recovered": ("↻", "@", "blue"),
    "interrupted": ("○", "o", "yellow"),
    "kept": ("↻", "@", "blue"),
    "again": ("→", ">", "magenta"),
    "warning": ("!", "!", "yellow"),
    "unknown": ("?", "?", "bold yellow"),
    "off": ("-", "-", "bright_black"),
}


def style_of(state: str) -> str:
    """The colour that means ``state``, the same everywhere."""
    return _STATES[state][2] if state in _STATES else ""


class Screen:
    """Where a command writes. ``json`` says that stdout carries one document: everything else goes to stderr then.
    ``short`` says that the document is the short one of ``--quiet``."""

    def __init__(self, *, json: bool = False, no_color: bool = False, short: bool = False) -> None:
        self.json = json
        self.short = short
        self.no_color = no_color or bool(os.environ.get("NO_COLOR"))
        # As they are now: while an agent runs, what its code prints is led elsewhere (see `agent_prints_aside`).
        self._stdout = sys.stdout
        self._stderr = sys.stderr
        self._answered = False

    # --- what is there to write to --------------------------------------------------------------------------------

    @cached_property
    def is_terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return _is_terminal(self._stdout)

    @cached_property
    def errors_to_terminal(self) -> bool:
        """Whether stderr is a terminal: only then is there live progress."""
        return _is_terminal(self._stderr)

    @cached_property
    def out(self) -> Console:
        """A rich console on stdout; for terminals."""
        return self._console(self._stdout)

    @cached_property
    def err(self) -> Console:
        """A rich console on stderr; for terminals."""
        return self._console(self._stderr)

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        return Console(file=stream, no_color=self.no_color, highlight=False, markup=False, emoji=False, soft_wrap=False)

    @contextlib.contextmanager
    def agent_prints_aside(self) -> Iterator[None]:
        """Lead what the agent's own code prints to stderr: stdout is for the command's answer.

        Known secrets in it are masked. Other processes that the agent starts, and code that writes to file 1 itself,
        write to stderr as well; that is not masked. While the screen shows progress, prints appear above it.
        """
        live = sys.stdout if sys.stdout is not self._stdout else None  # rich's, which writes above what is live
        printed = _Masked(live if live is not None and not isinstance(live, _Masked) else self._stderr)
        errors = _Masked(sys.stderr) if not isinstance(sys.stderr, _Masked) else sys.stderr
        with self._file_one_aside(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            try:
                yield
            finally:
                printed.flush()
                errors.flush()

    @contextlib.contextmanager
    def _file_one_aside(self) -> Iterator[None]:
        """While it lasts, file 1 is what file 2 is, and this screen's stdout a copy of what file 1 was."""
        before = self._stdout
        try:
            is_ours = before.fileno() == 1
            errors = self._stderr.fileno()
        except (OSError, ValueError):  # closed, or no file at all
            is_ours = False
        if not is_ours:
            yield
            return
        before.flush()
        kept = os.dup(1)
        mine = os.fdopen(kept, "w", encoding=before.encoding, errors="backslashreplace")
        try:
            os.dup2(errors, 1)
            self._use(mine)
            yield
        finally:
            os.dup2(kept, 1)
            self._use(before)
            mine.close()  # closed also when its reader is gone, which this raises

    def _use(self, stream: TextIO) -> None:
        self._stdout = stream
        self.__dict__.pop("out", None)  # a console keeps its stream

    @cached_property
    def unicode(self) -> bool:
        """Whether both streams can show the marks of ``mark``."""
        return _is_utf8(self._stdout) and _is_utf8(self._stderr)

    def mark(self, state: str) -> str:
        """One character that stands for a run's or step's state."""
        known = _STATES.get(state)
        return " " if known is None else known[0] if self.unicode else known[1]

    def state(self, state: str, text: str | None = None) -> Styled:
        """A state with its mark and colour, as in ``✓ completed``."""
        return Styled(f"{self.mark(state)} {text or state}", style_of(state))

    # --- stdout ---------------------------------------------------------------------------------------------------

    def document(self, data: Any) -> None:
        """Write the command's one JSON document to stdout."""
        self._answered = True
        text = json.dumps(jsonable(data), indent=2, ensure_ascii=not _is_utf8(self._stdout))
        self._stdout.write(text + "\n")

    def say(self, *parts: Cell, wrap: bool = True) -> None:
        """Write one line to stdout (to stderr when stdout carries a document).

        A terminal shows it in several when it is too long, broken between words. With ``wrap=False`` the terminal
        breaks it as it likes, and what is copied from there is one line again: for commands to copy.
        """
        if self.json:
            self.note(*parts, wrap=wrap)
        else:
            self._line(self._stdout, parts, terminal=self.is_terminal, wrap=wrap)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table to stdout: as wide as the terminal at most, or in a pipe as wide as it needs to be."""
        texts = [[_styled(cell) for cell in row] for row in rows]
        chosen = list(range(len(columns)))
        widths = [
            max([width_of(column.title), *(width_of(row[index].text) for row in texts)])
            for index, column in enumerate(columns)
        ]
        if self.is_terminal:
            chosen, widths = _fit(columns, widths, self.out.width)
        header = [Styled(columns[index].title.upper(), "bold") for index in chosen]
        for line in [header, *([row[index] for index in chosen] for row in texts)]:
            parts: list[Cell] = []
            for place, (index, cell) in enumerate(zip(chosen, line, strict=True)):
                text = _cut(cell.text, widths[index], "…" if self.unicode else "~", middle=columns[index].middle)
                space = " " * (widths[index] - width_of(text))
                last = place == len(line) - 1
                if columns[index].right:
                    parts += [space, Styled(text, cell.style)]
                else:
                    parts += [Styled(text, cell.style), "" if last else space]
                parts.append("" if last else " " * _GAP)
            self.say(*parts, wrap=False)

    def fields(self, pairs: Iterable[tuple[Cell, Cell]], indent: int = 0, width: int = 0) -> None:
        """Write ``name  value`` lines to stdout, values aligned; further lines of a value stand under its first.

        ``width`` is the least width of the names.
        """
        rows = [
            (name if isinstance(name, Styled) else Styled(name, "bright_black"), _styled(value))
            for name, value in pairs
        ]
        width = max([width, *(width_of(name.text) for name, _ in rows)]) + _GAP
        lead = " " * indent
        if self.is_terminal and self.out.width - indent - width < _LEAST * 2:
            for name, value in rows:  # too narrow for two columns
                self.say(lead, name, wrap=False)
                for line in self._wrapped(value.text, indent + _GAP):
                    self.say(lead, " " * _GAP, Styled(line, value.style), wrap=False)
            return
        for name, value in rows:
            lines = self._wrapped(value.text, indent + width)
            space = " " * (width - width_of(name.text))
            self.say(lead, name, space, Styled(lines[0], value.style), wrap=False)
            for line in lines[1:]:
                self.say(lead, " " * width, Styled(line, value.style), wrap=False)

    def _wrapped(self, text: str, used: int) -> list[str]:
        return _wrap(text, self.out, used) if self.is_terminal else clean(text).split("\n")

    # --- stderr ---------------------------------------------------------------------------------------------------

    def note(self, *parts: Cell, wrap: bool = True) -> None:
        """Write one line to stderr; ``wrap`` as in ``say``. When nobody reads it any more, nothing happens: what is
        told there must not fail a run."""
        with contextlib.suppress(OSError):
            self._line(self._stderr, parts, terminal=self.errors_to_terminal, wrap=wrap)

    def hanging(self, parts: Sequence[Cell], text: Cell) -> None:
        """Write ``parts`` and ``text`` to stderr; further lines of the text stand under its first."""
        last = _styled(text)
        used = sum(width_of(_styled(part).text) for part in parts)
        lines = _wrap(last.text, self.err, used) if self.errors_to_terminal else clean(last.text).split("\n")
        self.note(*parts, Styled(lines[0], last.style), wrap=False)
        for line in lines[1:]:
            self.note(" " * used, Styled(line, last.style), wrap=False)

    def warning(self, text: str) -> None:
        """Write ``warning: ...`` to stderr."""
        self.note(Styled("warning: ", "yellow"), mask(text))

    def error(self, text: str, trace: BaseException | None = None, *, kind: str = "", code: int = 1) -> None:
        """Write ``error: ...`` to stderr, its secrets masked, and with ``trace`` where it came from.

        A line that is indented is a command to copy, and not broken. When stdout is to carry a document and has none
        yet, it becomes ``{"error": ...}``, or ``{"success": false, "error": ...}`` with ``--quiet``.
        """
        text = mask(text)
        if trace is not None:
            self.note(mask("".join(traceback.format_exception(trace)).rstrip()))
        first, *rest = text.split("\n") if self.errors_to_terminal else [text]
        self.note(Styled("error: ", "bold red"), first)
        for line in rest:
            self.note(line, wrap=not line.startswith("  "))
        if self.short and not self._answered:
            self.document({"success": False, "error": text})
        elif self.json and not self._answered:
            self.document({"error": text, "kind": kind, "exit_code": int(code)})

    def confirm(self, question: str) -> bool:
        """Ask a yes/no question on the terminal; no by default. Without a terminal the answer is no."""
        if not (_is_terminal(sys.stdin) and self.errors_to_terminal):
            return False
        import click  # noqa: PLC0415 - keeps this module free of the command line's parser

        return click.confirm(clean(question), default=False, err=True)

    # --- lines ----------------------------------------------------------------------------------------------------

    def _line(self, stream: TextIO, parts: Sequence[Cell], *, terminal: bool, wrap: bool) -> None:
        texts = [_styled(part) for part in parts]
        if not terminal:
            stream.write("".join(clean(part.text) for part in texts).rstrip(" ") + "\n")
            stream.flush()
            return
        from rich.text import Text

        console = self.out if stream is self._stdout else self.err
        line = Text()
        for part in texts:
            line.append(_kept_together(clean(part.text)), part.style)
        for broken in _broken(line, console, console.width) if wrap else [line]:
            broken.plain = broken.plain.replace(_NO_BREAK, " ")  # of the same length: the styles stay in their places
            console.print(broken, soft_wrap=True)


class _Masked(io.TextIOBase):
    """A text stream that masks known secrets on their way to another, line by line. Whatever else is asked of it, such
    as its ``buffer``, is the other's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""
        self._writing = threading.RLock()

    def write(self, text: str) -> int:
        with self._writing:
            head, mark, tail = (self._line + text).rpartition("\n")
            self._line = tail
            if mark:
                self._stream.write(mask(head + mark))
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        with self._writing:
            line, self._line = self._line, ""
            if line:
                self._stream.write(mask(line))
            self._stream.flush()

    def close(self) -> None:
        """Nothing: the other stream is not the agent's to close."""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _wrap(text: str, console: Console, used: int) -> list[str]:
    """``text`` in lines that fit beside ``used`` cells, broken between words."""
    from rich.text import Text

    room = max(console.width - used, _LEAST)
    lines = _kept_together(clean(text)).split("\n")
    broken = [part.plain.rstrip() for line in lines for part in _broken(Text(line), console, room)]
    return [line.replace(_NO_BREAK, " ") for line in broken]


def _broken(line: Text, console: Console, room: int) -> list[Text]:
    """``line`` in lines of at most ``room`` cells. A command that is longer gets one to itself, and is not broken."""
    found: list[Text] = []
    end = 0
    for command in _COMMAND.finditer(line.plain):
        if len(command[0]) > room:
            found += _folded(line[end : command.start()], console, room)
            found.append(line[command.start() : command.end()])
            end = command.end()
            end += len(line.plain[end:]) - len(line.plain[end:].lstrip(" "))
    return [*found, *_folded(line[end:], console, room)] or [line]


def _folded(text: Text, console: Console, room: int) -> list[Text]:
    return list(text.wrap(console, room)) if text.plain.strip() else []


_COMMAND = re.compile(r"`[^`\n]+`")
_NO_BREAK = "\ue000"  # for private use: of no text


def _kept_together(text: str) -> str:
    """``text`` with its `commands` as one word each, so that no line breaks in one: they are there to be copied."""
    return _COMMAND.sub(lambda found: found[0].replace(" ", _NO_BREAK), text)


def _styled(cell: Cell) -> Styled:
    return cell if isinstance(cell, Styled) else Styled(cell)


def _fit(columns: Sequence[Column], widths: list[int], room: int) -> tuple[list[int], list[int]]:
    """Which columns are shown in ``room`` cells, and how wide each of all is."""
    chosen = list(range(len(columns)))
    widths = list(widths)

    def needed(*, least: bool) -> int:
        each = [min(widths[i], _LEAST) if least and columns[i].grow else widths[i] for i in chosen]
        return sum(each) + _GAP * (len(chosen) - 1)

    while needed(least=True) > room:
        droppable = [index for index in chosen if columns[index].drop]
        if not droppable:
            break
        chosen.remove(max(droppable, key=lambda index: (columns[index].drop, index)))
    while (over := needed(least=False) - room) > 0:
        # Those that are made for it first; in a very narrow terminal whichever is the widest.
        growing = [index for index in chosen if columns[index].grow and widths[index] > _LEAST]
        least = _LEAST if growing else _LEAST // 2
        growing = growing or [index for index in chosen if widths[index] > least]
        if not growing:
            break
        widest = max(growing, key=lambda index: widths[index])
        widths[widest] = max(least, widths[widest] - over)
    return chosen, widths


def _cut(text: str, width: int, ellipsis: str, *, middle: bool = False) -> str:
    text = " ".join(clean(text).split("\n"))
    if width_of(text) <= width:
        return text
    end = ""
    if middle:  # two thirds of it from the end, where ids have what tells them apart
        while text and width_of(text[-1] + end) <= (width - 1) * 2 // 3:
            text, end = text[:-1], text[-1] + end
    while text and width_of(text) > width - 1 - width_of(end):
        text = text[:-1]
    return text + ellipsis + end


def jsonable(value: Any) -> Any:
    """``value`` as JSON data: times as ISO 8601, bytes as base64, unknown objects as their ``repr``."""
    from pydantic_core import to_jsonable_python  # noqa: PLC0415 - only commands that answer in JSON need it

    return _finite(to_jsonable_python(value, bytes_mode="base64", fallback=repr))


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity; they become texts."""
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, dict):
        return {key: _finite(item) for key, item in data.items()}
    return [_finite(item) for item in data] if isinstance(data, list) else data
