"""Exit codes, the errors that carry one, and what an error of the library becomes on the command line."""

from __future__ import annotations

from enum import IntEnum

import click

from framework.errors import (
    AgentNotFound,
    CheckpointNotFound,
    DefinitionChanged,
    InvalidId,
    LeaseLost,
    RunBusy,
    RunNotFound,
    SurefootError,
)


class Exit(IntEnum):
    """What the process's exit code says. A signal's is 128 plus its number: 130 for Ctrl-C, 143 for SIGTERM."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PAUSED = 3
    NOT_FOUND = 4
    BUSY = 5


class CommandError(SurefootError):
    """What a command cannot do, in one line that says what, where and what to do. Ends it with ``code``."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


class CommandEnds(Exception):
    """Ends the command with an exit code; everything there was to say has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def usage_error(message: str) -> CommandError:
    """A ``CommandError`` about how the command was called (exit code 2)."""
    return CommandError(message, Exit.USAGE)


def not_found(message: str) -> CommandError:
    """A ``CommandError`` about something that does not exist (exit code 4)."""
    return CommandError(message, Exit.NOT_FOUND)


def code_of(error: BaseException) -> int:
    """The exit code that says what ``error`` means."""
    if isinstance(error, CommandError):
        return error.code
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, RunNotFound | CheckpointNotFound | AgentNotFound):
        return Exit.NOT_FOUND
    if isinstance(error, RunBusy | LeaseLost):
        return Exit.BUSY
    if isinstance(error, InvalidId):
        return Exit.USAGE
    return Exit.FAILED


def message_of(error: BaseException) -> str:
    """What ``error`` says on the command line: the library's message, with its advice in the command line's words."""
    if isinstance(error, click.UsageError):
        hint = f" See `{error.ctx.command_path} --help`." if error.ctx is not None else ""
        return f"{error.format_message().rstrip()}{hint}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, DefinitionChanged):
        changes = "\n".join(f"  {line}" for line in error.changes)
        return (
            f"Run {error.run_id!r} was started with another version of its agent; resume it with that one, or add "
            f"--allow-change to go on with what is in the folder now. What changed:\n{changes}"
        )
    if isinstance(error, SurefootError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} (this should not happen; --verbose shows where it came from)"
