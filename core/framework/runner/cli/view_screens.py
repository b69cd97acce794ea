"""How a run, its steps and its state look on the screen; the same in every command that shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from framework._secrets import mask
from framework.graph.resume_outlook import Waiting, owner_in_words
from framework.graph.run_view import CallView, RunView, StepView
from framework.graph.text import text_of
from framework.runner.cli.output import Cell, Column, Screen, Styled, style_of
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import command_for
from framework.runner.cli.text import ago, answer_form, clock_time, counted, duration, money, shortened, size
from framework.schemas.run import RunState
from framework.storage.retention_records import Pin

_DIM = "bright_black"

STANDINGS: dict[str, tuple[str, str]] = {
    "done": ("completed", "done"),
    "handled": ("warning", "failed, handled"),
    "failed": ("failed", "failed"),
    "running": ("running", "running"),
    "interrupted": ("unknown", "interrupted"),
    "waiting": ("paused", "waiting"),
    "next": ("again", "next"),
    "later": ("off", "later"),
    "skipped": ("off", "skipped"),
    "rejected": ("failed", "rejected"),
}
"""Each standing of a step: the state whose mark and colour it has, and its words."""

CALLS: dict[str, tuple[str, str]] = {
    "done": ("completed", "done"),
    "failed": ("failed", "failed"),
    "begun": ("again", "in flight"),
    "unknown": ("failed", "effect unknown"),
    "settled": ("again", "settled"),
    "running": ("running", "running"),
    "waiting": ("paused", "waiting"),
    "timed_out": ("warning", "timed out"),
}
"""As `STANDINGS`, of the calls inside a step."""

_MOST_STEPS = 20
_MOST_CALLS = 20
_MOST_KEYS = 12
_MOST_PROBLEMS = 5
_MOST_NAMED = 8


def standing(screen: Screen, step: StepView) -> Styled:
    """A step's standing with its mark and colour."""
    state, words = STANDINGS[step.status]
    return screen.state(state, words)


def heading(screen: Screen, title: str, more: str = "") -> None:
    """An empty line and the title of a section."""
    screen.say()
    screen.say(Styled(title, "bold"), Styled(f"  {more}" if more else "", _DIM))


def steps_table(screen: Screen, steps: Sequence[StepView], *, is_plan: bool) -> None:
    """A line per visit, or per step of a plan."""
    with_cost = any(step.cost for step in steps)
    with_tokens = any(step.tokens for step in steps)
    columns = [Column("step", grow=True), Column("status"), Column("tries", right=True, drop=3)]
    columns += [Column("tokens", right=True, drop=4)] if with_tokens else []
    columns += [Column("cost", right=True, drop=5)] if with_cost else []
    with_time = any(step.latency_ms for step in steps)
    columns += [Column("time", right=True, drop=6)] if with_time else []
    columns.append(Column("needs" if is_plan else "then", grow=True, drop=2))
    with_error = any(step.error for step in steps)
    columns += [Column("error", grow=True, drop=1)] if with_error else []
    rows: list[list[Cell]] = []
    for step in steps:
        row: list[Cell] = [step.key, standing(screen, step), str(step.attempts) if step.attempts else ""]
        row += [f"{step.tokens:,}" if step.tokens else ""] if with_tokens else []
        row += [money(step.cost) if step.cost else ""] if with_cost else []
        row += [took(step.latency_ms) if step.latency_ms else ""] if with_time else []
        row.append(", ".join(step.needs if is_plan else step.goes_to))
        row += [Styled(mask(step.error or ""), "red" if step.status == "failed" else "")] if with_error else []
        rows.append(row)
    screen.table(columns, rows)


def show_run(settings: Settings, view: RunView, *, full: bool, pins: Sequence[Pin] = ()) -> None:
    """Everything of a run: what it is, its steps, its state, its problems, and what a resume would do."""
    screen = settings.screen
    words = "failed, given up after crashing again and again" if view.given_up else view.state.value
    screen.say(Styled(view.run_id, "bold"), "  ", screen.state(view.state.value, words))
    screen.fields([*_facts(screen, view, full), *_pins(pins)])
    if view.steps:
        shown = view.steps if full else view.steps[-_MOST_STEPS:]
        hidden = len(view.steps) - len(shown)
        more = f"{counted(hidden, 'earlier one')} left out; --full shows all" if hidden else ""
        heading(screen, "Steps", more)
        steps_table(screen, shown, is_plan=view.kind == "plan")
    _calls(screen, view, full=full)
    if view.state_keys:
        heading(screen, "State", f"at checkpoint {view.resume.sequence}" if view.resume.sequence else "at the start")
        state_table(screen, [(each.key, each.type, each.bytes, each.summary) for each in view.state_keys], full=full)
    _problems(screen, view, full=full)
    _resume(settings, view)


def _facts(screen: Screen, view: RunView, full: bool) -> Iterable[tuple[str, Cell]]:
    now = time.time()
    facts = view.metadata
    if facts.get("agent_name"):
        where = f" ({facts['agent_path']})" if facts.get("agent_path") else ""
        yield "agent", f"{facts['agent_name']}{where}"
    revision = f", revision {view.revision}" if view.revision and view.revision > 1 else ""
    goal = f", goal {view.goal_id}" if view.goal_id else ""
    yield view.kind, f"{view.definition_id or 'not recorded'}{revision}{goal}"
    if facts.get("model"):
        yield "model", f"{facts['model']}{' (mock)' if facts.get('mock') else ''}"
    yield "started", f"{clock_time(view.created_at)} ({ago(now - view.created_at)})"
    yield "last change", f"{clock_time(view.updated_at)} ({ago(now - view.updated_at)})"
    if view.owner is not None:
        lease = "which is gone" if view.state is RunState.CRASHED else "alive"
        lease = f"{lease}; its lease ends in {duration(view.lease_seconds_left or 0.0)}"
        asked = "; it was asked to stop" if view.asked_to_stop else ""
        yield "owner", f"{owner_in_words(view.owner)} ({lease}{asked})"
    if view.recovery_attempts:
        yield "recovered", f"{counted(view.recovery_attempts, 'time')} in a row after a crash, with no progress since"
    if view.forked_from:
        source = view.forked_from
        yield "forked from", f"{source.get('run_id')} at checkpoint {source.get('sequence')}"
    if view.parent_run_id:
        yield "part of", view.parent_run_id
    if view.resumed_from:
        yield "began from", view.resumed_from
    for number, (key, value) in enumerate(view.input.items()):
        text = mask(text_of(value))
        yield "input" if number == 0 else "", f"{key} = {text if full else shortened(text, 100)}"
    parts = [counted(view.steps_taken, "attempt" if view.kind == "plan" else "step")]
    parts += [counted(view.total_tokens, "token")] if view.total_tokens else []
    parts += [money(view.cost)] if view.cost else []
    parts += [f"{took(view.total_latency_ms)} of work"] if view.total_latency_ms else []
    yield "so far", ", ".join(parts)
    yield "checkpoints", checkpoints_in_words(view)
    if view.error:
        text = mask(view.error if full else shortened(view.error, 600))
        is_error = view.state in (RunState.FAILED, RunState.CRASHED)
        yield ("error", Styled(text, "red")) if is_error else ("because", text)


def _pins(pins: Sequence[Pin]) -> Iterable[tuple[str, Cell]]:
    for number, pin in enumerate(pins):
        what = f"checkpoint {pin.sequence}" if pin.sequence else "the run"
        note = f": {shortened(mask(pin.note), 200)}" if pin.note else ""
        yield "pinned" if number == 0 else "", f"{what}{note}"


def took(milliseconds: int) -> str:
    """A step's time: ``12 ms``, ``1.5 s``, ``3 min``."""
    return f"{milliseconds} ms" if milliseconds < 1000 else duration(milliseconds / 1000)


def checkpoints_in_words(view: RunView) -> str:
    """``12 kept (3 to 14)``."""
    if not view.checkpoints:
        return "none kept"
    between = (
        f"{view.first_checkpoint} to {view.last_checkpoint}" if view.checkpoints > 1 else f"{view.last_checkpoint}"
    )
    return f"{view.checkpoints} kept ({between})"


def state_table(screen: Screen, rows: Sequence[tuple[str, str, int, str]], *, full: bool) -> None:
    """Key, type, size and value of each key of a state."""
    shown = rows if full else rows[:_MOST_KEYS]
    columns = [Column("key", grow=True), Column("type", drop=2), Column("size", right=True, drop=3)]
    columns.append(Column("value", grow=True, drop=1))
    screen.table(columns, [[key, kind, size(count), mask(value)] for key, kind, count, value in shown])
    if len(rows) > len(shown):
        screen.say(Styled(f"and {counted(len(rows) - len(shown), 'more key')}; --full shows all", _DIM))


def _problems(screen: Screen, view: RunView, *, full: bool) -> None:
    if view.problems:
        shown = view.problems if full else view.problems[-_MOST_PROBLEMS:]
        hidden = len(view.problems) - len(shown)
        heading(screen, "Problems", f"{hidden} earlier left out" if hidden else "")
        screen.fields(
            [(each.severity, mask(each.description if full else shortened(each.description, 300))) for each in shown]
        )
    if view.damage:
        heading(screen, "Damage")
        for line in view.damage:
            screen.say(screen.state("failed", mask(line)))
    if view.not_rebuilt:
        heading(screen, "Values of types that only the run's own program knows")
        for line in view.not_rebuilt:
            screen.say(screen.state("warning", line))


def _calls(screen: Screen, view: RunView, *, full: bool) -> None:
    """The calls of unfinished steps: those that are not simply done, and the last of the others."""
    if not view.calls:
        return
    last = {call.id for call in view.calls[-_MOST_CALLS:]}
    shown = [call for call in view.calls if full or call.id in last or call.state != "done"]
    hidden = len(view.calls) - len(shown)
    heading(screen, "Calls of unfinished steps", f"{hidden} that are done left out; --full shows all" if hidden else "")
    columns = [Column("call", grow=True), Column("name", grow=True, drop=1), Column("status")]
    with_cost = any(call.cost for call in shown)
    columns += [Column("cost", right=True, drop=3)] if with_cost else []
    columns.append(Column("detail", grow=True, drop=2))
    rows: list[list[Cell]] = []
    for call in shown:
        state, words = CALLS[call.state]
        row: list[Cell] = [call.id, call.name, screen.state(state, words)]
        row += [money(call.cost) if call.cost else ""] if with_cost else []
        row.append(mask(_detail(call, full=full)))
        rows.append(row)
    screen.table(columns, rows)


def _detail(call: CallView, *, full: bool) -> str:
    if call.kind == "sleep" and call.until is not None:
        return f"until {clock_time(call.until)}"
    if call.state in ("unknown", "settled"):
        return f"policy {call.policy}, key {call.key}"
    text = call.answer if call.answer is not None else call.question or ""
    return text if full else shortened(text, 100)


def waits_in_words(waiting: Waiting) -> str:
    """What the run waits for, for a line after "waits for"."""
    words = _waits_in_words(waiting)
    return f"{words} (run {waiting.run})" if waiting.run is not None else words


def _waits_in_words(waiting: Waiting) -> str:
    until = f" until {clock_time(waiting.until)}" if waiting.until is not None else ""
    match waiting.kind:
        case "approval":
            return f"approval of {waiting.step}: {mask(shortened(waiting.question or '', 200))}"
        case "input" if waiting.question is not None:
            return f"{waiting.step}: {waiting.question}"
        case "input":
            return f"{waiting.step}: input {', '.join(waiting.keys) or 'of any kind'}"
        case "sleep":
            return f"{waiting.step}: sleeps{until}"
        case "signal":
            which = f" (number {waiting.occurrence})" if waiting.occurrence > 1 else ""
            return f"{waiting.step}: the signal {waiting.name}{which}{until}"
        case "answer":
            text = f"{waiting.step}: an answer to: {mask(shortened(waiting.question or '', 400))}"
            refused = mask(shortened(waiting.refused, 300)) if waiting.refused else None
            return f"{text} (the last one was refused: {refused})" if refused else text
        case _:
            return f"{waiting.step}: {waiting.name} to be settled, whose effect is unknown"


def answer_commands(settings: Settings, view: RunView) -> list[str]:
    """What to type for what nodes of the run wait for: one command each, to be filled in, and for each effect that is
    unknown the one that settles it."""
    if view.resume.verdict in ("nothing", "busy", "refused"):
        return []
    waits = [each for each in view.resume.waiting if each.kind in ("signal", "answer") and each.name is not None]
    sends = [_send_command(settings, each.run or view.run_id, each) for each in waits]
    settles = [
        command_for(settings, "runs", "settle", view.run_id, call, "--done", "<JSON>") for call in view.resume.unknown
    ]
    settles += [
        command_for(settings, "runs", "settle", each.run, each.name or "", "--done", "<JSON>")
        for each in view.resume.waiting
        if each.kind == "settle" and each.run is not None
    ]
    return sends + settles


def _send_command(settings: Settings, run_id: str, waiting: Waiting) -> str:
    # Said where it could be another wait's: a command that was noted down must not answer the next one.
    which = ["--occurrence", str(waiting.occurrence)] if waiting.occurrence > 1 else []
    return command_for(settings, "runs", "send", run_id, waiting.name or "", "<JSON>", *which)


_VERDICTS = {"goes_on": "again", "waits": "paused", "nothing": "completed", "busy": "running", "refused": "failed"}


def _resume(settings: Settings, view: RunView) -> None:
    screen, resume = settings.screen, view.resume
    heading(screen, "What a resume would do")
    state = _VERDICTS[resume.verdict]
    lines: list[tuple[str, Cell]] = [(screen.mark(state), Styled(mask(resume.summary), style_of(state)))]
    if resume.verdict in ("goes_on", "waits", "refused"):
        if resume.kept:
            lines.append(("kept", Styled(_named(resume.kept), "green")))
        for why in dict.fromkeys(each.why for each in resume.again):
            steps = _named([each.step for each in resume.again if each.why == why])
            lines.append(("runs again", f"{steps}: {mask(why)}"))
        if resume.first:
            lines.append(("runs next", _named(resume.first)))
        for each in resume.waiting:
            lines.append(("waits for", waits_in_words(each)))
        named = {each.name for each in resume.waiting if each.kind == "settle"}
        for call in resume.unknown:
            if call in named:
                continue
            lines.append(("unknown", f"the effect of {call}, which was in flight when its process ended"))
    lines += [("changed", line) for line in resume.changes]
    lines += [("note", mask(line)) for line in resume.notes]
    screen.fields(lines)
    settles = bool(resume.unknown) or any(each.kind == "settle" for each in resume.waiting)
    show_answers(screen, answer_commands(settings, view), settles=settles)
    command = next_command(settings, view)
    if command is not None:
        screen.say()
        screen.say(Styled("follow it with" if resume.verdict == "busy" else "go on with", "bold"))
        screen.say("  ", Styled(command, "cyan"), wrap=False)


def show_answers(screen: Screen, commands: Sequence[str], *, settles: bool) -> None:
    """The commands that give a run what it waits for."""
    if not commands:
        return
    screen.say()
    screen.say(Styled("settle with" if settles else "answer with", "bold"))
    for each in commands:
        screen.say("  ", Styled(each, "cyan"), wrap=False)
    if settles:
        screen.say("  ", Styled("--redo instead of --done makes the call again, --skip leaves it", _DIM))


def next_command(settings: Settings, view: RunView) -> str | None:
    """What to type to have the run go on, when there is something; after `answer_commands`, if there are any."""
    resume = view.resume
    if resume.verdict in ("nothing", "refused"):
        return None
    if resume.verdict == "busy":
        return command_for(settings, "runs", "watch", view.run_id)
    approvals = [each for each in resume.waiting if each.kind == "approval"]
    if approvals:
        step = [approvals[0].step] if len(approvals) > 1 else []
        return command_for(settings, "runs", "approve", view.run_id, *step)
    if view.kind == "plan":
        return None
    keys = [key for each in resume.waiting for key in each.keys]
    if not keys:
        return command_for(settings, "resume", view.run_id)
    return command_for(settings, "resume", view.run_id, "-i", answer_form(keys))


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    return ", ".join(keys[-_MOST_NAMED:] if more else keys) + more


def value_text(value: Any, *, full: bool, limit: int = 400) -> str:
    """A readable value as it is shown: shortened to one line unless ``full``."""
    text = mask(text_of(value))
    return text if full else shortened(text, limit)
