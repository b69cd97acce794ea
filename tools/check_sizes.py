"""Checks that every module says its subject in a docstring and is no longer than a reader can hold.

Usage: ``python tools/check_sizes.py [PATH ...]``, by default the package, its tests and the programs of this
repository. A file of more than 700 lines fails, one of more than 400 is noted. Exit code 0: all good; 1: something
fails; 2: a path does not exist.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NOTE_LINES = 400
MAX_LINES = 700

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PATHS = ("core/framework", "core/tests", "examples", "benchmarks", "tools")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to say about a file; ``fails`` when it must be put right."""

    path: Path
    text: str
    fails: bool


def check_source(path: Path, source: str) -> Iterator[Finding]:
    """What there is to say about one module. ``path`` is only for the messages. An empty module needs no docstring."""
    lines = source.count("\n") + (not source.endswith("\n") and bool(source))
    if lines > MAX_LINES:
        yield Finding(path, f"{lines} lines; at most {MAX_LINES} are allowed. Split it by subject.", fails=True)
    elif lines > NOTE_LINES:
        yield Finding(path, f"{lines} lines; aim for {NOTE_LINES}.", fails=False)
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield Finding(path, f"line {error.lineno}: cannot be parsed: {error.msg}.", fails=True)
        return
    if tree.body and not (ast.get_docstring(tree) or "").strip():
        yield Finding(path, "does not start with a docstring that says what the file is about.", fails=True)


def python_files(paths: Sequence[Path]) -> list[Path]:
    """The Python files at or below ``paths``, sorted, without caches and hidden folders."""
    found: set[Path] = set()
    for path in paths:
        below = [path] if path.is_file() else path.rglob("*.py")
        for file in below:
            parts = file.relative_to(path).parts
            if "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
                found.add(file)
    return sorted(found)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Check ``arguments``, or the default paths that exist below ``root``; print the findings; the exit code."""
    if arguments:
        paths = [Path(argument) for argument in arguments]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            print(f"No such file or folder: {', '.join(missing)}", file=sys.stderr)
            return 2
    else:
        paths = [root / name for name in DEFAULT_PATHS if (root / name).exists()]
    files = python_files(paths)
    failed = 0
    for file in files:
        shown = file.relative_to(root) if file.is_relative_to(root) else file
        for finding in check_source(shown, file.read_text(encoding="utf-8")):
            failed += finding.fails
            print(f"{'error' if finding.fails else 'note'}: {finding.path.as_posix()}: {finding.text}")
    problems = "1 problem" if failed == 1 else f"{failed} problems"
    print(f"{len(files)} files checked, {problems}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
