"""The command ``surefoot``. Nothing is imported here before ``main`` is called."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with ``arguments`` (default: those of the process) and exit with its code."""
    from framework.runner.cli.app import end_process, run_command_line  # noqa: PLC0415 - nothing before it is called

    end_process(run_command_line(arguments))
