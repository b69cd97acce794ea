"""``python -m framework`` and the command ``surefoot``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; exits the process with its code."""
    from framework.runner.cli import main as run  # noqa: PLC0415 - the module itself must import nothing

    run()


if __name__ == "__main__":
    main()
