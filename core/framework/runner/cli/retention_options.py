"""What the command line says of retention: the options of a policy, ``--retention``, and sweeps beside a command."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from framework.errors import SurefootError
from framework.runner.cli.exits import usage_error
from framework.runner.cli.text import counted
from framework.schemas.retention import RetentionPolicy
from framework.storage.backend import Storage
from framework.storage.retention_records import SweepReport

if TYPE_CHECKING:
    from framework.storage.sweeping_background import Sweeping

logger = logging.getLogger(__name__)

RETENTION_VARIABLE = "SUREFOOT_RETENTION"
"""Environment variable with the policy that commands use when they are told no other."""

OPTIONS: dict[str, tuple[str, str]] = {
    "max_age": ("AGE", "Finished runs, and checkpoints but a run's newest, older than AGE go: 30d, 12h, 90m."),
    "max_total_bytes": ("SIZE", "Finished runs go, the oldest first, until the store holds SIZE: 500MB, 2GB."),
    "keep_completed": ("N", "Of the completed runs the newest N stay."),
    "keep_failed": ("N", "Of the failed and cancelled runs the newest N stay."),
    "completed_max_age": ("AGE", "For completed runs, in place of --max-age."),
    "failed_max_age": ("AGE", "For failed and cancelled runs, in place of --max-age."),
    "unfinished_max_age": ("AGE", "Paused and crashed runs without any change for AGE go, too."),
}
"""The options of a policy: what they are given, and their help."""

LAST_SWEEP_SECONDS = 5.0
"""How long a command that ended before its first sweep sweeps at its end, at most; the next one goes on."""

_F = TypeVar("_F", bound=Callable[..., Any])


def policy_options(command: _F) -> _F:
    """``--max-age``, ``--keep-completed`` and the others, each passed on as a text or ``None``."""
    for name, (metavar, text) in reversed(OPTIONS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)(command)
    return command


def policy_of(given: dict[str, str | None]) -> RetentionPolicy | None:
    """The policy that these options say, ``None`` when none of them was given. Raises ``CommandError`` (usage)."""
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        try:
            RetentionPolicy.from_options({name: value})
        except ValueError as error:
            problem = str(error).split(": ", 2)[-1]
            raise usage_error(f"--{name.replace('_', '-')}: {problem}") from None
    return RetentionPolicy.from_options(options) if options else None


def retention_option(command: _F) -> _F:
    """``--retention TEXT``, for commands that run for long; see ``chosen_policy`` and ``swept``."""
    return click.option(
        "--retention",
        metavar="POLICY",
        help="Meanwhile remove finished runs from the store, such as max_age=30d,max_total_bytes=2GB,"
        f"keep_completed=100. Default: ${RETENTION_VARIABLE}, else nothing is removed.",
    )(command)


def chosen_policy(text: str | None) -> RetentionPolicy | None:
    """The policy of ``--retention``, else of the environment, else ``None``. Raises ``CommandError`` (usage)."""
    where = "--retention" if text is not None else f"${RETENTION_VARIABLE}"
    chosen = policy_text(text)
    if text is None and not chosen:
        return None
    try:
        return RetentionPolicy.parse(chosen, where)
    except ValueError as error:
        raise usage_error(str(error)) from None


def policy_text(text: str | None) -> str:
    """What was written for the policy: ``--retention``, else the environment's; ``""`` for neither."""
    return text if text is not None else os.environ.get(RETENTION_VARIABLE, "").strip()


class Swept:
    """The sweeps beside a command; see ``swept``."""

    def __init__(self, storage: Storage, policy: RetentionPolicy, sweeping: Sweeping) -> None:
        self._storage = storage
        self._policy = policy
        self._sweeping = sweeping

    def at_least_once(self) -> None:
        """Sweep now, for ``LAST_SWEEP_SECONDS`` at most, unless it was done: a command that is called again and again
        and ends each time before its first sweep would never make one. A failure is logged."""
        if not self._sweeping.stop() or self._sweeping.last is not None:
            return
        stop = threading.Event()
        timer = threading.Timer(LAST_SWEEP_SECONDS, stop.set)
        timer.daemon = True
        timer.start()
        try:
            self._storage.sweep(self._policy, stop=stop)
        except SurefootError as error:
            logger.warning("The store was not swept: %s", error)
        finally:
            timer.cancel()


@contextmanager
def swept(
    storage: Storage, policy: RetentionPolicy | None, on_sweep: Callable[[SweepReport], None] | None = None
) -> Iterator[Swept | None]:
    """Sweep ``storage`` in the background while the block runs, telling ``on_sweep``; nothing without a policy."""
    if policy is None or policy.is_empty:
        yield None
        return
    from framework.storage.sweeping_background import start_sweeping  # noqa: PLC0415 - only for who sweeps

    with start_sweeping(storage, policy, on_sweep=on_sweep) as sweeping:
        yield Swept(storage, policy, sweeping)


def removed(report: SweepReport) -> str:
    """What a sweep removed, in words; ``""`` for nothing."""
    parts = [counted(report.runs, "run")] if report.runs else []
    parts += [counted(report.checkpoints, "old checkpoint")] if report.checkpoints else []
    return " and ".join(parts)
