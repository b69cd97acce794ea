"""The file-size and docstring check of tools/check_sizes.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "check_sizes.py"


@pytest.fixture(scope="module")
def check_sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_sizes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "core" / "framework").mkdir(parents=True)
    return tmp_path


def write(root: Path, name: str, lines: int, first: str = '"""A subject."""') -> None:
    (root / "core" / "framework" / name).write_text(first + "\n" + "x = 1\n" * (lines - 1))


def test_good_files_pass(check_sizes: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "good.py", 400)
    (root / "core" / "framework" / "__init__.py").write_text("")
    assert check_sizes.main([], root) == 0
    assert capsys.readouterr().out == "2 files checked, 0 problems.\n"


def test_a_long_file_is_noted_and_passes(
    check_sizes: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "long.py", 700)
    assert check_sizes.main([], root) == 0
    assert "note: core/framework/long.py: 700 lines; aim for 400." in capsys.readouterr().out


def test_a_file_too_long_fails(check_sizes: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "huge.py", 701)
    assert check_sizes.main([], root) == 1
    assert "error: core/framework/huge.py: 701 lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    "first", ["import os", "# only a comment\nx = 0", '""" """', '__all__ = []\n"""Too late."""', "def broken(:"]
)
def test_a_file_without_a_docstring_first_fails(check_sizes: ModuleType, root: Path, first: str) -> None:
    write(root, "mute.py", 3, first)
    assert check_sizes.main([], root) == 1


def test_a_path_that_does_not_exist_is_an_error(
    check_sizes: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_sizes.main([str(root / "nowhere")], root) == 2
    assert "nowhere" in capsys.readouterr().err
