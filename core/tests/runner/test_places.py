"""The default places, by the XDG rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.runner.places import data_dir, default_storage_url, documents_dir, sqlite_url
from framework.storage.backend import open_storage


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("SUREFOOT_STORAGE", raising=False)


def test_without_the_variable_data_is_in_the_home_directory(tmp_path: Path) -> None:
    assert data_dir() == tmp_path / "home" / ".local" / "share" / "surefoot"
    assert documents_dir("mail") == data_dir() / "storage" / "mail"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("value", "expected"), [("/data", "/data/surefoot"), ("data", None), ("", None)])
def test_only_an_absolute_xdg_data_home_counts(
    value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", value)
    assert data_dir() == (Path(expected) if expected else Path.home() / ".local" / "share" / "surefoot")


def test_the_environment_names_another_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_STORAGE", " file:///elsewhere ")
    assert default_storage_url() == "file:///elsewhere"
    monkeypatch.setenv("SUREFOOT_STORAGE", "")
    assert default_storage_url() == sqlite_url(data_dir() / "runs.db")


@pytest.mark.parametrize("name", ["plain", "with space", "100% #1?", "größe"])
def test_the_default_store_opens_wherever_the_data_directory_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / name))
    with open_storage(default_storage_url()) as storage:
        assert storage.list_runs() == []
    assert (tmp_path / name / "surefoot" / "runs.db").is_file()
