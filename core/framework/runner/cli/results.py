"""What a run came to, as a command says it: the summary, its JSON, and how to go on."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework._secrets import mask
from framework.graph.edge import GraphSpec
from framework.graph.executor import ExecutionResult
from framework.graph.readable import masked_state
from framework.graph.resume_outlook import Waiting
from framework.graph.run_view import as_json
from framework.runner.cli.exits import CommandError, Exit
from framework.runner.cli.output import Cell, Screen, Styled, jsonable, style_of
from framework.runner.cli.text import answer_form, clean, command_line, counted, duration, money, preview
from framework.runner.cli.view_screens import show_answers, waits_in_words
from framework.schemas.run import RunState

_MOST_LINES = 12
"""Lines of one value in the summary."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An execution's end.

    ``seconds`` is this process's time and ``cost`` the run's in USD. ``kept`` says whether the run can go on from a
    store, ``stored`` the state it has there, and ``waits_for`` the keys that it waits for by what is stored.
    ``ignored`` are keys of input that a completed run was given. ``command`` are the words that go on with it,
    ``given`` the keys of its input. ``waits`` is what its nodes wait for, and ``answers`` the commands that give it to
    them; ``unknown`` are calls to be settled.
    """

    result: ExecutionResult
    graph: GraphSpec
    seconds: float
    cost: float
    kept: bool
    command: tuple[str, ...] = ()
    given: frozenset[str] = field(default=frozenset())
    waits_for: tuple[str, ...] = ()
    stored: RunState | None = None
    ignored: tuple[str, ...] = ()
    waits: tuple[Waiting, ...] = ()
    answers: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def state(self) -> RunState:
        """How the run stands now."""
        if self.stored is RunState.CANCELLED:  # by somebody else's `surefoot runs cancel`
            return RunState.CANCELLED
        if self.result.paused_at is not None:
            return RunState.PAUSED
        return RunState.COMPLETED if self.result.success else RunState.FAILED

    @property
    def code(self) -> int:
        """The exit code that says so."""
        return {RunState.PAUSED: Exit.PAUSED, RunState.COMPLETED: Exit.DONE}.get(self.state, Exit.FAILED)

    @property
    def resume_command(self) -> str | None:
        """What to type to go on with the run; ``None`` when it is completed or was not kept."""
        if not self.kept or self.state is RunState.COMPLETED or self.result.run_id is None:
            return None
        asked = self.asked_for() if self.state is RunState.PAUSED else []
        answer = ["-i", answer_form(asked)] if asked else []
        return command_line(*self.command, answer)

    @property
    def is_suspended(self) -> bool:
        """Whether a node is in the middle of its calls and waits, rather than for input."""
        return any(each.kind not in ("input", "approval") for each in self.waits)

    def asked_for(self) -> list[str]:
        """Keys of the answer to a pause: those a person's node is to give, else those that the node paused at or the
        one after it reads and the state does not have yet."""
        if self.waits_for or self.is_suspended:
            return list(self.waits_for)
        following = self.result.session_state.get("next_node")
        names = [self.result.paused_at, following]
        nodes = [self.graph.get_node(name) for name in names if isinstance(name, str)]
        keys = [key for node in nodes if node is not None for key in node.input_keys]
        return [key for key in dict.fromkeys(keys) if key not in self.result.output]


def short_document(result: ExecutionResult) -> dict[str, Any]:
    """What ``--quiet`` prints and ``--output FILE`` holds: success, steps_executed, output[, error, paused_at]."""
    document: dict[str, Any] = {
        "success": result.success,
        "steps_executed": result.steps_executed,
        "output": result.output,
    }
    if result.error:
        document["error"] = mask(result.error)
    if result.paused_at:
        document["paused_at"] = result.paused_at
    return document


def full_document(outcome: Outcome) -> dict[str, Any]:
    """What ``-o json`` prints. Every field is always there; times are milliseconds, costs USD."""
    result = outcome.result
    return {
        "run_id": result.run_id,
        "status": outcome.state.value,
        "success": result.success,
        "output": result.output,
        "error": mask(result.error) if result.error else None,
        "paused_at": result.paused_at,
        "asks_for": outcome.asked_for() if result.paused_at else [],
        "waits_for": [as_json(each) for each in outcome.waits] if result.paused_at else [],
        "answer_commands": list(outcome.answers),
        "path": result.path,
        "steps_executed": result.steps_executed,
        "steps_recovered": result.steps_recovered,
        "total_tokens": result.total_tokens,
        "total_cost": outcome.cost,
        "total_latency_ms": result.total_latency_ms,
        "checkpoint_id": result.checkpoint_id,
        "resumed_from": result.resumed_from,
        "resume_command": outcome.resume_command,
        "ignored_input": list(outcome.ignored),
        "exit_code": int(outcome.code),
    }


def show(screen: Screen, outcome: Outcome) -> None:
    """Write the summary: how it ended, what it took, its output, and how to go on."""
    result, state = outcome.result, outcome.state
    text = f"paused at {result.paused_at}" if state is RunState.PAUSED else state.value
    steps = counted(result.steps_executed, "step")
    if result.steps_recovered:
        steps += f" ({result.steps_recovered} kept from before)"
    facts = [steps]
    if result.total_tokens:
        facts.append(counted(result.total_tokens, "token"))
    if outcome.cost:
        facts.append(money(outcome.cost))
    facts.append(duration(outcome.seconds))
    pairs: list[tuple[Cell, Cell]] = [("status", screen.state(state.value, text))]
    if result.run_id:
        pairs.append(("run", result.run_id))
    pairs.append(("took", "  ".join(facts)))
    if result.error and state in (RunState.FAILED, RunState.CANCELLED):
        pairs.append(
            ("error" if state is RunState.FAILED else "why", Styled(mask(result.error), style_of(state.value)))
        )
    if state is RunState.PAUSED:
        pairs += [("waits for", waits_in_words(each)) for each in outcome.waits if each.kind != "input"]
    screen.fields(pairs)
    shown = masked_state(_worth_showing(outcome))
    if shown:
        screen.say("")
        screen.say(Styled("output" if state is RunState.COMPLETED else "state so far", "bold"))
        screen.fields([(clean(key), _short(screen, value)) for key, value in shown.items()], indent=2)
    show_answers(screen, outcome.answers, settles=bool(outcome.unknown))
    command = outcome.resume_command
    if command is not None:
        screen.say("")
        asks = state is RunState.PAUSED and not outcome.is_suspended
        screen.say(Styled("answer with" if asks else "go on with", "bold"))
        screen.say(f"  {command}", wrap=False)


def _worth_showing(outcome: Outcome) -> dict[str, Any]:
    """The state without the run's input and without the copy that nodes leave under ``result``; what the last node
    wrote comes first."""
    output = outcome.result.output
    shown = {key: value for key, value in output.items() if key not in outcome.given} or dict(output)
    last = outcome.graph.get_node(outcome.result.path[-1]) if outcome.result.path else None
    first = [key for key in (last.output_keys if last is not None else ()) if key in shown]
    if len(shown) > 1 and not any("result" in node.output_keys for node in outcome.graph.nodes):
        shown.pop("result", None)
    return {key: shown[key] for key in [*first, *(key for key in shown if key not in first)]}


def _short(screen: Screen, value: Any) -> str:
    """A value for the summary: whole in a pipe, its beginning in a terminal."""
    if not screen.is_terminal:
        return mask(preview(value, 10**9))
    lines = mask(preview(value)).split("\n")
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... ({len(lines) - _MOST_LINES} more lines)"]
    return "\n".join(lines)


def write_file(path: Path, result: ExecutionResult) -> None:
    """Write the short document to ``path``, replacing it as a whole. Raises ``CommandError``."""
    text = json.dumps(jsonable(short_document(result)), indent=2, ensure_ascii=False) + "\n"
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout, or a pipe
            path.write_text(text, encoding="utf-8")
            return
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask_bits = os.umask(0)
        os.umask(mask_bits)
        os.chmod(name, 0o666 & ~mask_bits)
        os.replace(name, path)
    except OSError as error:
        raise CommandError(f"The result was not written to {path}: {error.strerror}.") from error
