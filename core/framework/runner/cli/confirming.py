"""Commands that take something away: shown first, then asked about, and never done unasked without ``--yes``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import click

from framework.runner.cli.exits import CommandEnds, Exit, usage_error
from framework.runner.cli.settings import Settings

_AGE = re.compile(r"(\d+)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def consent_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--yes`` and ``--dry-run``."""
    command = click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")(command)
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(command)


def agreed(settings: Settings, question: str, *, yes: bool, dry_run: bool) -> bool:
    """Whether to do what was just shown; ``False`` for a dry run, which says that nothing was changed.

    Asks on the terminal. Raises ``CommandError`` (usage) when nobody can be asked, ``CommandEnds`` for a no.
    """
    screen = settings.screen
    if dry_run:
        screen.note("Nothing was changed (--dry-run).")
        return False
    if yes:
        return True
    if not (_stdin_is_terminal() and screen.errors_to_terminal):
        raise usage_error("Nothing was changed: there is no terminal to ask on. Add --yes to do it, or --dry-run.")
    if not screen.confirm(question):
        screen.note("Nothing was changed.")
        raise CommandEnds(Exit.FAILED)
    return True


def _stdin_is_terminal() -> bool:
    try:
        return sys.stdin.isatty()
    except (ValueError, AttributeError):  # closed, or not there at all
        return False


def age_in_seconds(text: str) -> float:
    """``90s``, ``30m``, ``12h``, ``30d``, ``2w`` in seconds. Raises ``CommandError`` (usage)."""
    found = _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise usage_error(f"--older-than {text!r} is no age; write a number and s, m, h, d or w, such as 30d or 12h.")
    return int(found[1]) * float(_SECONDS[found[2]])
