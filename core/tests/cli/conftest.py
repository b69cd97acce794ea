"""A site with the agent for each test, and an end for every command it started."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework import _secrets
from framework.runner.cli.app import run_command_line
from tests.cli.cli_kit import Done, Site, Started
from tests.cli.runs_kit import Command, fill


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A store with a run in each state; tests that change something make their own."""
    folder = tmp_path_factory.mktemp("filled")
    url = f"sqlite:///{folder}/runs.db"
    fill(url)
    return Command(url, folder)


@pytest.fixture
def own(tmp_path: Path, filled: Command) -> Command:
    """A copy of that store."""
    for file in filled.folder.glob("runs.db*"):
        shutil.copy(file, tmp_path)
    return Command(f"sqlite:///{tmp_path}/runs.db", tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.make_agent()
    return made


@pytest.fixture
def started(site: Site) -> Iterator[Callable[..., Started]]:
    """Starts commands and ends those that a failing test leaves behind."""
    running: list[Started] = []

    def start(*words: object, **variables: str) -> Started:
        running.append(site.start(*words, **variables))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def here(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs a command in this process, which is faster; for what needs no process of its own."""
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(site.folder)
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("framework").level

    def call(*words: object) -> Done:
        code = run_command_line([str(word) for word in words])
        told = capsys.readouterr()
        return Done(code, told.out, told.err)

    yield call
    root.handlers = handlers
    logging.getLogger("framework").setLevel(level)
    _secrets.forget_secrets()
