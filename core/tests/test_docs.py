"""The documentation is true: its Python blocks run, their output is as printed, and its links lead somewhere.

In README.md, the tutorial and the how-to guides,

- the ``python`` blocks of a file run one after the other in one namespace and an empty working directory; ``await``
  is allowed at the top level;
- a block that begins with a comment such as ``# agent.py`` is saved under that name instead;
- a ``text`` block right after a ``python`` block is what it prints; ``...`` stands for anything;
- ``<!-- not run: reason -->`` before a block leaves it out.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*$")
_SAVED = re.compile(r"# (\w+\.py)\n")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CHECKER = doctest.OutputChecker()


@dataclass(frozen=True, slots=True)
class Block:
    """A ``python`` block, the line it begins on, and what it is said to print (``None``: nothing is said)."""

    line: int
    code: str
    printed: str | None


def python_blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are to be run, in order."""
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "python" or _NOT_RUN.search(text, 0, fence.start()):
            continue
        printed = None
        if following is not None and following[1] == "text" and not text[fence.end() : following.start()].strip():
            printed = following[2]
        yield Block(text.count("\n", 0, fence.start()) + 1, fence[2], printed)


def test_every_guide_has_something_to_run() -> None:
    assert len(GUIDES) >= 9
    assert all(any(python_blocks(page)) for page in GUIDES)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_the_code_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "core"))  # for the processes that a page starts
    namespace: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for block in python_blocks(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
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
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert _CHECKER.check_output(block.printed, got, flags), f"{where} printed:\n{got}"


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
