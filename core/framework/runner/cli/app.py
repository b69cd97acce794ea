"""The command ``surefoot``: its commands, imported when they are called, and what becomes of their errors."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, TextIO, TypeVar

import click

from framework import __version__
from framework._secrets import SecretFilter, register_environment
from framework.runner.cli.exits import CommandEnds, CommandError, Exit, code_of, message_of
from framework.runner.cli.settings import Settings, global_options

_PACKAGE = "framework.runner.cli"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("commands_agent", "run", "Run an agent; its finished steps are kept."),
    "resume": ("commands_agent", "resume", "Go on with a run after its last finished step."),
    "recover": ("recovering", "recover", "Resume the runs whose process died, and those that are due."),
    "info": ("commands_folders", "info", "Show an agent: its nodes, edges, goal and tools."),
    "validate": ("commands_folders", "validate", "Check an agent without running it."),
    "list": ("commands_folders", "list_agents", "List the agents in a folder."),
    "runs": ("commands_runs", "runs", "List, show, watch, answer, cancel, fork and delete runs."),
    "checkpoints": ("commands_checkpoints", "checkpoints", "List, show, compare, verify, pin and prune checkpoints."),
    "fork": ("forking", "fork", "Start a new run from a checkpoint of another."),
    "shell": ("shell", "shell", "Talk to an agent line by line."),
    "dispatch": ("dispatching", "dispatch", "Give a request to the agent that can handle it."),
    "storage": ("commands_storage", "storage", "Care for the store: compact it, encrypt it, change its keys."),
    "doctor": ("doctor", "doctor", "Check the installation, the store and the environment."),
}
"""Each command: its module, the name in it, and its line in the help. Kept here so that ``--help`` imports none."""

_F = TypeVar("_F", bound=Callable[..., Any])

_EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 paused, 4 not found, 5 busy (running elsewhere); 130 and 143 after "
    "Ctrl-C and SIGTERM."
)


class _ReaderGone(Exception):
    """Nobody reads what the command writes any more."""


class Command(click.Command):
    """A command that also takes the global options. Use it as ``cls`` of every command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_global_options(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        settings = ctx.find_object(Settings)
        if settings is not None:
            log_to(settings)
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGone from error  # click would exit with 1, as if the command had failed


class Group(click.Group):
    """A group whose commands take the global options, and that suggests names for one it does not have."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_global_options(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=3)
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise click.UsageError(f"There is no command {name!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)


class _LazyGroup(Group):
    """The top of the command line: imports the module of a command when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command = getattr(import_module(f"{_PACKAGE}.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return (args[0] if command is not None else name), command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


def _add_global_options(command: click.Command) -> None:
    taken = {name for param in command.params for name in param.opts}
    command.params += [option for option in global_options() if not taken & set(option.opts)]


def _format_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The command's own options first, then those that every command has."""
    everywhere = {option.name for option in global_options()}
    own: list[tuple[str, str]] = []
    common: list[tuple[str, str]] = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            (common if param.name in everywhere and not param.expose_value else own).append(record)
    if own:
        with formatter.section("Options"):
            formatter.write_dl(own)
    if common:
        with formatter.section("Options of every command"):
            formatter.write_dl(common)


def _keep_model(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).model = value


def model_option() -> Callable[[_F], _F]:
    """``--model``, which stands before a command as well as after it."""
    return click.option(
        "--model", metavar="MODEL", callback=_keep_model, expose_value=False, help="The language model to ask."
    )


@click.group("surefoot", cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="surefoot")
@model_option()
def surefoot() -> None:
    """Run AI agents so that no finished step is ever lost, repeated or paid for twice."""


def run_command_line(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Every error becomes one message on stderr, with its secrets masked."""
    _make_streams_lenient()
    settings = Settings()
    try:
        code = _invoke(settings, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of(sys.stdout)  # who read it has seen enough, as `head` does
        return 128 + 13
    return code


def end_process(code: int) -> NoReturn:
    """Exit with ``code``. After a signal this does not wait for threads that are in the middle of a model call."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _let_go_of(stream)
    left = any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate())
    if code > 128 and left:
        os._exit(code)
    raise SystemExit(code)


def _invoke(settings: Settings, arguments: Sequence[str] | None) -> int:
    register_environment()
    try:
        returned = surefoot.main(arguments, prog_name="surefoot", standalone_mode=False, obj=settings)
        return returned if isinstance(returned, int) else Exit.DONE
    except CommandEnds as end:
        return end.code
    except _ReaderGone:
        raise BrokenPipeError from None
    except (KeyboardInterrupt, click.Abort):
        settings.screen.note("Interrupted.")
        return 130
    except click.exceptions.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            click.echo(error.format_message(), err=True)
            return Exit.USAGE
        return _tell(settings, error)
    except Exception as error:
        return _tell(settings, error)


def _tell(settings: Settings, error: Exception) -> int:
    code = code_of(error)
    trace = settings.debug and not isinstance(error, click.ClickException | CommandError)
    settings.screen.error(message_of(error), error if trace else None, kind=type(error).__name__, code=code)
    return code


class _ScreenHandler(logging.Handler):
    """Shows log records as notes: one line each, with tracebacks only when errors come with theirs."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self.addFilter(SecretFilter())
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._settings.debug:
                self._settings.screen.note(self.format(record))
            else:
                self._settings.screen.warning(record.getMessage())
        except Exception:
            self.handleError(record)


def log_to(settings: Settings) -> None:
    """Show the program's log on the screen: warnings, and with ``--verbose`` everything the library says."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _ScreenHandler)]:
        root.removeHandler(handler)
    root.addHandler(_ScreenHandler(settings))
    logging.getLogger("framework").setLevel(logging.INFO if settings.debug else logging.WARNING)


def _make_streams_lenient() -> None:
    """A character that the terminal's encoding lacks is shown as an escape; it never ends a command."""
    # A process that was started with a stream closed has none.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _let_go_of(stream: TextIO) -> None:
    """Lead what is still buffered nowhere: Python would complain about it, and change the exit code, at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
