"""Faults at named points: counted, installed from inside or through the environment, and deadly by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from framework import _faults
from framework.storage.backend import open_storage
from framework.storage.contract import Writer, accept, commit, journal, new_run, state_at
from framework.storage.contract_forks import first
from framework.storage.memory import MemoryStorage
from framework.storage.records import Retention
from framework.storage.sqlite import SQLiteStorage
from framework.testing import (
    FAULT_POINTS,
    StorageUnderTest,
    clear_faults,
    install_fault,
    install_faults_from_environment,
)


class Python(Protocol):
    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    clear_faults()
    yield
    clear_faults()


def test_a_fault_happens_the_nth_time_and_once() -> None:
    seen: list[str] = []
    install_fault("commit.before", 2, lambda: seen.append("second"))
    install_fault("commit.before", 3, lambda: seen.append("third"))
    install_fault("routing", 1, lambda: seen.append("routing"))
    for expected in ([], ["second"], ["second", "third"], ["second", "third"]):
        _faults.reach("commit.before")
        assert seen == expected
    install_fault("commit.before", 1, lambda: seen.append("from now"))
    _faults.reach("commit.before")
    assert seen[-1] == "from now"
    clear_faults()
    _faults.reach("routing")
    assert "routing" not in seen


@pytest.mark.parametrize(("point", "nth"), [("commit", 1), ("", 1), ("commit.before", 0), ("commit.before", -1)])
def test_faults_that_cannot_happen_are_refused(point: str, nth: int) -> None:
    with pytest.raises(ValueError, match="fault"):
        install_fault(point, nth)


@pytest.mark.parametrize("text", ["commit.before:x", "nowhere:1", "routing:0"])
def test_the_environment_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_FAULT", text)
    with pytest.raises(ValueError, match=r"fault|SUREFOOT_FAULT"):
        install_faults_from_environment()


def test_without_the_variable_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUREFOOT_FAULT", raising=False)
    install_faults_from_environment()
    for point in FAULT_POINTS:
        _faults.reach(point)


def test_the_store_reaches_its_points(backend: StorageUnderTest) -> None:
    store = backend.new()
    writer = Writer(store)
    seen: list[str] = []
    install_fault("commit.inside", 2, lambda: seen.append("commit.inside"))
    install_fault("retention", 1, lambda: seen.append("retention"))
    writer.write({"a": 1})
    assert seen == []
    writer.write({"a": 2}, retention=Retention(1))
    assert seen == ["commit.inside", "retention"]


def test_an_exception_at_a_point_undoes_the_commit() -> None:
    def fail() -> None:
        raise RuntimeError("at the point")

    with MemoryStorage() as store:
        store.open_run(new_run())
        install_fault("commit.inside", 1, fail)
        with pytest.raises(RuntimeError, match="at the point"):
            store.commit([commit(1)])
        assert store.read_log("run_1") == []
        accept(store, commit(1))


KILLED = """
    import sys
    from framework.storage.backend import open_storage
    from framework.storage.contract import Writer
    from framework.storage.records import Retention
    from framework.testing import install_faults_from_environment

    install_faults_from_environment()
    with open_storage(sys.argv[1]) as store:
        writer = Writer(store, state={"a": [0]})
        for number in range(1, 6):
            writer.write({"a": list(range(number + 1)), "n": number}, retention=Retention(1))
            print(number, flush=True)
"""


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
@pytest.mark.parametrize(("fault", "at_least"), [("commit.inside:3", 2), ("retention:2", 2)])
def test_a_kill_inside_a_commit_leaves_the_last_one(
    scheme: str, fault: str, at_least: int, tmp_path: Path, python: Python
) -> None:
    url = f"{scheme}://{'/' if scheme == 'sqlite' else ''}{tmp_path}/store"
    python(KILLED, url, env={"SUREFOOT_FAULT": fault}, code=-9)
    again = """
        import sys
        from framework.storage.backend import open_storage
        from framework.storage.contract import state_at

        with open_storage(sys.argv[1]) as store:
            assert store.verify().ok, store.verify()
            record = store.find_run("run_1")
            state = state_at(store, record.sequence)
            assert state["n"] == b"%d" % record.sequence
            assert [row.sequence for row in store.read_checkpoint_rows("run_1", limit=1)] == [record.sequence]
            print(record.sequence)
    """
    assert int(python(again, url)) in (at_least, at_least + 1)


JOURNALED = """
    import sys
    from framework.storage.backend import open_storage
    from framework.storage.contract import accept, commit, journal, new_run
    from framework.testing import install_faults_from_environment

    install_faults_from_environment()
    with open_storage(sys.argv[1]) as store:
        store.open_run(new_run(), "me", 60)
        accept(store, journal(("s", 1, b"1"), ("s", 2, b"intent"), token=1))
        accept(store, journal(("s", 2, b"outcome"), ("t", 1, b"t"), token=1))
        accept(store, commit(1, token=1, journal_done=["s"]))
        accept(store, journal(("s", 1, b"again"), token=1))
"""


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_kill_leaves_a_journal_as_it_was(scheme: str, nth: int, tmp_path: Path, python: Python) -> None:
    url = f"{scheme}://{'/' if scheme == 'sqlite' else ''}{tmp_path}/store"
    python(JOURNALED, url, env={"SUREFOOT_FAULT": f"commit.inside:{nth}"}, code=-9)
    kept = [
        [],
        [("s", 1, b"1"), ("s", 2, b"intent")],
        [("s", 1, b"1"), ("s", 2, b"outcome"), ("t", 1, b"t")],
        [("t", 1, b"t")],
    ]
    with open_storage(url) as store:
        rows = [(row.step, row.number, row.record) for row in store.read_journal("run_1")]
        record = store.find_run("run_1")
        assert record is not None
        assert (rows, record.sequence) == (kept[nth - 1], 1 if nth == 4 else 0)
        assert store.verify().ok
        accept(store, journal(("s", 9, b"goes on"), token=1))
        assert len(store.read_journal("run_1")) == len(rows) + 1


def test_a_kill_at_the_first_commit_leaves_an_accepted_run(tmp_path: Path, python: Python) -> None:
    path = tmp_path / "runs.db"
    python(KILLED, f"sqlite:///{path}", env={"SUREFOOT_FAULT": "commit.inside:1"}, code=-9)
    with SQLiteStorage(path) as store:
        record = store.find_run("run_1")
        assert record is not None
        assert (record.state.value, record.sequence) == ("crashed", 0)


FORKED = """
    import sys
    from framework.storage.backend import open_storage
    from framework.storage.contract import Writer
    from framework.storage.contract_forks import first
    from framework.testing import install_faults_from_environment

    with open_storage(sys.argv[1]) as store:
        writer = Writer(store, state={"a": [0]})
        for number in range(1, 6):
            writer.write({"a": list(range(number + 1)), "n": number})
        install_faults_from_environment()
        store.fork_run("run_1", 4, b"{}", first(4))
"""


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_a_kill_inside_a_fork_leaves_none(scheme: str, tmp_path: Path, python: Python) -> None:
    url = f"{scheme}://{'/' if scheme == 'sqlite' else ''}{tmp_path}/store"
    python(FORKED, url, env={"SUREFOOT_FAULT": "commit.inside:1"}, code=-9)
    with open_storage(url) as store:
        assert store.find_run("fork") is None
        assert [record.run_id for record in store.list_runs()] == ["run_1"]
        assert store.verify().ok
        record = store.fork_run("run_1", 3, b"{}", first(3))
        assert [row.sequence for row in store.read_checkpoint_rows("fork")] == [4, 3]
        assert state_at(store, record.sequence, "fork") == state_at(store, 3)
        assert len(store.read_log("fork")) == 4
        assert store.verify().ok
