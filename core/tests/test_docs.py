"""The documentation is true: its Python blocks run, their output is as printed, and its links lead somewhere.

In README.md, the tutorial, the how-to guides and the pages of the example agents,

- the ``python`` blocks of a file run one after the other in one namespace and an empty working directory; ``await``
  is allowed at the top level;
- a block that begins with a comment such as ``# agent.py`` is saved under that name instead;
- a ``text`` block right after a ``python`` block is what it prints; ``...`` stands for anything;
- a ``console`` block with a ``surefoot`` command in it is run by bash, in the same directory, where ``examples`` is a
  copy of the repository's. With ``$ `` before its commands each is run by itself and the lines that follow are what it
  prints, in a pipe; ``# exit code 3`` after a command says that it does not end with 0. Otherwise the block is one
  script;
- ``<!-- not run: reason -->`` before a block leaves it out.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
AGENTS = sorted(page.parent / "README.md" for page in (ROOT / "examples").glob("*/agent.json"))
GUIDES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md")), *AGENTS]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*$")
_SAVED = re.compile(r"# (\w+\.py)\n")
_COMMAND = re.compile(r"^[^#\n]*\bsurefoot [a-z]", re.MULTILINE)
_EXIT_CODE = re.compile(r"# exit code (\d+)$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CHECKER = doctest.OutputChecker()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    """A block to run, the line it begins on, and what it is said to print (``None``: nothing is said)."""

    language: str
    line: int
    code: str
    printed: str | None


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a ``console`` block, the code it ends with, and what it prints (``None``: nothing is said)."""

    text: str
    exit_code: int
    printed: str | None


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are to be run, in order."""
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        runs = fence[1] == "python" or (fence[1] == "console" and _COMMAND.search(fence[2]))
        if not runs or _NOT_RUN.search(text, 0, fence.start()):
            continue
        printed = None
        if following is not None and following[1] == "text" and not text[fence.end() : following.start()].strip():
            printed = following[2]
        yield Block(fence[1], text.count("\n", 0, fence.start()) + 1, fence[2], printed)


def commands(block: Block) -> Iterator[Command]:
    """The commands of a ``console`` block."""
    if not re.search(r"^\$ ", block.code, re.MULTILINE):
        yield Command(f"set -e\n{block.code}", 0, None)
        return
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(index for index, line in enumerate(lines) if not line.endswith("\\"))
        code = _EXIT_CODE.search(lines[end])
        printed = "\n".join(lines[end + 1 :])
        yield Command("\n".join(lines[: end + 1]), int(code[1]) if code else 0, printed if printed.strip() else None)


def run_commands(block: Block, where: str, environment: dict[str, str]) -> None:
    """Run a ``console`` block and compare what it prints and how it ends."""
    for command in commands(block):
        done = subprocess.run(
            ["bash", "-c", command.text], env=environment, capture_output=True, encoding="utf-8", timeout=50
        )
        said = f"{where}: {command.text}\n{done.stdout}{done.stderr}"
        # A command that a signal ended is told by bash as 128 plus the signal, unless bash became that command.
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        assert code == command.exit_code, said
        if command.printed is not None:
            assert _CHECKER.check_output(command.printed + "\n", done.stdout, _FLAGS), said


def test_every_guide_has_something_to_run() -> None:
    assert len(GUIDES) >= 9
    assert all(any(blocks(page)) for page in GUIDES)


@pytest.mark.timeout(180)  # some pages start a process for each of a dozen commands
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_code_runs_and_prints_what_it_says(
    page: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    commands_first = tmp_path_factory.mktemp("bin")
    forks.make_command(commands_first)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "core"))  # for the processes that a page starts
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folders = [str(commands_first), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    for name in ("SUREFOOT_STORAGE", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if any(block.language == "console" for block in blocks(page)):
        shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if block.language == "console":
                run_commands(block, where, dict(os.environ))
                continue
            saved = _SAVED.match(block.code)
            if saved is not None:
                Path(saved[1]).write_text(block.code, encoding="utf-8")
                continue
            # Empty lines before it, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            capfd.readouterr()
            value = eval(code, namespace)  # the text is this repository's own
            if inspect.iscoroutine(value):
                runner.run(value)
            got = capfd.readouterr().out
            if block.printed is not None:
                assert _CHECKER.check_output(block.printed, got, _FLAGS), f"{where} printed:\n{got}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    missing = [target for target in targets if not _exists(page, target)]
    assert not missing, f"{page.relative_to(ROOT)} links to what does not exist: {missing}"


def _exists(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path) if path else page
    if not file.resolve().is_relative_to(ROOT) or not file.exists():
        return False
    return not anchor or anchor in _anchors(file)


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_tests_that_prove_the_guarantees_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 8
    for file, name in named:
        source = ROOT / "core" / "tests" / file
        assert source.exists(), f"docs/guarantees.md names {file}, which does not exist"
        assert f"def {name}(" in source.read_text(encoding="utf-8"), f"docs/guarantees.md names {name}, not in {file}"


def test_what_is_left_out_says_why() -> None:
    for page in GUIDES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("<!-- not run"):
                assert _NOT_RUN.match(line.strip()), f"{page.relative_to(ROOT)}: {line}"
