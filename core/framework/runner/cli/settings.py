"""The options that every command knows, wherever on the command line they stand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import click

from framework._secrets import register_url
from framework.runner.cli.output import Screen

STORAGE_VARIABLE = "SUREFOOT_STORAGE"
DEBUG_VARIABLE = "SUREFOOT_DEBUG"

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the global options say. A command gets it with ``@click.pass_obj``."""

    storage: str | None = None
    """The storage URL given with ``--storage``; ``stores.storage_url`` fills in the rest."""
    key_file: str | None = None
    """The file of encryption keys given with ``--key-file``; ``stores.keys_of`` fills in the rest."""
    output: str = "table"
    no_color: bool = False
    verbose: bool = False
    model: str | None = None
    quiet: bool = False
    """Whether the answer is the short JSON of ``--quiet``."""

    @property
    def json(self) -> bool:
        """Whether the answer is one JSON document on stdout."""
        return self.output == "json"

    @property
    def debug(self) -> bool:
        """Whether errors come with their traceback."""
        return self.verbose or bool(os.environ.get(DEBUG_VARIABLE))

    @cached_property
    def screen(self) -> Screen:
        """Where commands write. Made when first used: by then all options have been read."""
        return Screen(json=self.json, no_color=self.no_color, short=self.quiet)


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    # The same option may be given to the group and to the command; one that was not given must not undo the other's.
    if value not in (None, False) and param.name is not None:
        setattr(ctx.ensure_object(Settings), param.name, value)
        if param.name == "storage":
            register_url(value)
    return value


def quiet_option(help_text: str) -> Callable[[_F], _F]:
    """``-q``/``--quiet``, for commands that run an agent. Errors are a short document on stdout then, too."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        ctx.ensure_object(Settings).quiet = value
        return value

    return click.option("-q", "--quiet", is_flag=True, callback=keep, help=help_text)


def global_options() -> list[click.Option]:
    """New option objects for one command; their values go to the context's ``Settings``."""
    common: dict[str, Any] = {"callback": _store, "expose_value": False}
    return [
        click.Option(
            ["--storage"],
            metavar="URL",
            help=f"Where runs are kept, such as sqlite:///runs.db. Default: ${STORAGE_VARIABLE}, else runs.db in the "
            "user's data directory.",
            **common,
        ),
        click.Option(
            ["--key-file"],
            metavar="FILE",
            help="The keys of a store whose content is encrypted. Default: $SUREFOOT_ENCRYPTION_KEYS, else the file "
            "that $SUREFOOT_ENCRYPTION_KEY_FILE names.",
            **common,
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(["table", "json"]),
            help="A table to read, or one JSON document on stdout.",
            **common,
        ),
        click.Option(["--no-color"], is_flag=True, help="No colours. Also: the variable NO_COLOR.", **common),
        click.Option(
            ["-v", "--verbose"], is_flag=True, help="Log what happens, and show where an error came from.", **common
        ),
    ]
