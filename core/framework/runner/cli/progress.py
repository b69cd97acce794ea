"""Progress of a run while it goes on: finished steps as lines on stderr and, in a terminal, what is running below."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from framework._secrets import mask
from framework.graph.run_events import RunEvent
from framework.runner.cli.output import Cell, Screen, Styled, style_of
from framework.runner.cli.text import counted, duration, money, shortened, tokens

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

_DIM = "bright_black"
_WIDEST_NAME = 28
_MOST_SHOWN = 8
"""Running steps shown at once; a wide fan-out is summed up."""


@dataclass
class _Running:
    """A step that has begun."""

    label: str
    since: float
    attempt: int = 1
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """What earlier processes did of the run: its finished steps in order, their tokens and cost in USD."""

    steps: tuple[str, ...] = ()
    tokens: int = 0
    cost: float = 0.0


class Progress:
    """Shows the events of one run. Give it to ``Runtime.add_listener``; use it as a context manager around the run.

    ``names`` are those of the graph's nodes, which are aligned. ``quiet`` shows nothing. Nothing it does can fail a
    run, also when nobody reads stderr any more.
    """

    def __init__(
        self,
        screen: Screen,
        title: str,
        *,
        quiet: bool = False,
        before: Before | None = None,
        names: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._screen = screen
        self._title = title
        self._quiet = quiet
        self._before = before or Before()
        self._clock = clock
        self._began = clock()
        self._running: dict[str, _Running] = {}
        self._width = min(max([10, *map(len, names)]), _WIDEST_NAME)
        self._notice: str | None = None
        self._live: Live | None = None
        self.run_id: str | None = None
        """The run's id, known once it has started."""
        self.steps = 0
        """Steps finished by this process."""
        self.tokens = self._before.tokens
        self.cost = self._before.cost

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if not self._quiet and self._screen.errors_to_terminal:
            from rich.live import Live

            self._live = Live(
                _Footer(self), console=self._screen.err, refresh_per_second=8, transient=True, redirect_stdout=True
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):  # the terminal was closed
                live.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since this process began with the run."""
        return self._clock() - self._began

    def notice(self, text: str) -> None:
        """Show that the run was asked to stop. Made for signal handlers, which must not touch a buffered stream: in a
        terminal another thread draws it, else it goes straight to the file."""
        self._notice = text
        if self._live is None and not self._quiet:
            tell_at_once(text)

    # --- events -----------------------------------------------------------------------------------------------------

    def __call__(self, event: RunEvent) -> None:
        """Take up one event."""
        if self.run_id is not None and event.run_id != self.run_id:
            return  # a run inside this one: its step is what is shown
        handle = getattr(self, f"_on_{event.kind}", None)
        if handle is not None:
            handle(event)

    def _on_run_started(self, event: RunEvent) -> None:
        self.run_id = event.run_id
        self._line(Styled(self._title, "bold"), "  ", Styled(event.run_id, _DIM))

    def _on_run_resumed(self, event: RunEvent) -> None:
        self._on_run_started(event)
        kept = self._before.steps
        if kept:
            self._line(*self._marked("kept"), f"{counted(len(kept), 'step')} kept: ", Styled(_path(kept), _DIM))
        else:
            self._line(*self._marked("kept"), "no step was finished: it goes on from its start")

    def _on_step_started(self, event: RunEvent) -> None:
        self._running[event.step or ""] = _Running(_label(event), self._clock())

    def _on_attempt_failed(self, event: RunEvent) -> None:
        step = self._running.get(event.step or "")
        if step is not None:
            step.attempt = event.attempt + 1
            step.tokens += event.tokens
        reason = shortened(mask(event.error or "no reason given"), 300)
        self._told((*self._marked("warning"), *self._named(event)), f"attempt {event.attempt} failed: {reason}")

    def _on_step_finished(self, event: RunEvent) -> None:
        step = self._ended(event)
        seconds = self._clock() - step.since if step is not None else event.latency_ms / 1000
        facts = [duration(seconds)]
        if event.tokens:
            facts.append(tokens(event.tokens))
        if event.cost:
            facts.append(money(event.cost))
        if event.attempt > 1:
            facts.append(f"attempt {event.attempt}")
        self._line(*self._marked("completed"), *self._named(event), Styled("  ".join(facts), _DIM))

    def _on_step_failed(self, event: RunEvent) -> None:
        self._ended(event)
        reason = shortened(mask(event.error or "failed"), 500)
        self._told((*self._marked("failed"), *self._named(event)), Styled(reason, style_of("failed")))

    def _ended(self, event: RunEvent) -> _Running | None:
        """Count a step that is over; what was known of it while it ran."""
        self.steps += 1
        self.tokens += event.tokens
        self.cost += event.cost
        return self._running.pop(event.step or "", None)

    def _on_run_ended(self, event: RunEvent) -> None:
        self._running.clear()
        if event.tokens:
            self.tokens = event.tokens
        if event.cost:
            self.cost = event.cost

    # --- lines ------------------------------------------------------------------------------------------------------

    def _marked(self, state: str) -> tuple[Cell, ...]:
        return "  ", Styled(self._screen.mark(state), style_of(state)), " "

    def _named(self, event: RunEvent) -> tuple[Cell, ...]:
        label = _label(event)
        return label.ljust(self._width), "  "

    def _line(self, *parts: Cell) -> None:
        if not self._quiet:
            self._screen.note(*parts)

    def _told(self, parts: Sequence[Cell], text: Cell) -> None:
        if not self._quiet:
            self._screen.hanging(parts, text)

    def footer(self) -> list[tuple[Cell, ...]]:
        """What is going on now, for the lower end of a terminal: the running steps, then the sums."""
        now = self._clock()
        running = list(self._running.values())
        lines: list[tuple[Cell, ...]] = []
        for step in running[:_MOST_SHOWN]:
            attempt = f"  attempt {step.attempt}" if step.attempt > 1 else ""
            lines.append(
                (
                    *self._marked("running"),
                    Styled(step.label.ljust(self._width), style_of("running")),
                    "  ",
                    Styled(duration(now - step.since) + attempt, _DIM),
                )
            )
        if len(running) > _MOST_SHOWN:
            lines.append((Styled(f"    and {len(running) - _MOST_SHOWN} more", _DIM),))
        spent = [counted(self.steps + len(self._before.steps), "step")]
        used = self.tokens + sum(step.tokens for step in running)
        if used:
            spent.append(tokens(used))
        if self.cost:
            spent.append(money(self.cost))
        spent.append(duration(self.elapsed))
        lines.append((Styled("  " + "  ".join(spent), _DIM),))
        if self._notice is not None:
            lines.append((Styled(f"  {self._notice}", "yellow"),))
        return lines


class _Footer:
    """The live part of the screen; drawn anew several times a second."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for line in self._progress.footer():
            text = Text(no_wrap=True, overflow="ellipsis", end="")
            for part in line:
                cell = part if isinstance(part, Styled) else Styled(part)
                text.append(cell.text, cell.style)
            text.truncate(options.max_width, overflow="ellipsis")
            yield text
            yield Text("")


def tell_at_once(text: str) -> None:
    """Write a line to stderr's file itself, as a signal handler may."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{text}\n".encode())


def _label(event: RunEvent) -> str:
    """The step as people say it: its node, with the visit when it is not the first."""
    step = event.step or event.node_id or ""
    name, mark, visit = step.rpartition(":")[2].rpartition("#")
    if not mark:
        return event.node_id or step
    return event.node_id or name if visit == "1" else f"{event.node_id or name} #{visit}"


def _path(steps: tuple[str, ...]) -> str:
    """``plan, search ×3, ..., write``: repeats together, and the middle of a long path left out."""
    parts: list[list[Any]] = []
    for step in steps:
        if parts and parts[-1][0] == step:
            parts[-1][1] += 1
        else:
            parts.append([step, 1])
    texts = [name if count == 1 else f"{name} x{count}" for name, count in parts]
    if len(texts) > 10:
        texts = [*texts[:4], "...", *texts[-4:]]
    return ", ".join(texts)
