"""What is ``FileStorage``'s own: its layout, readable files, torn and edited ones, its indexes, kills between files."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.errors import CorruptData, StoreTooNew
from framework.schemas.checkpoint import Checkpoint, ExecutorType
from framework.schemas.run import Run, RunState, RunStatus
from framework.storage.chunks import Chunk
from framework.storage.contract import ODD_IDS, Writer, accept, commit, growing_states, journal, new_run, state_at
from framework.storage.file_io import FORMAT, dump_checked, file_name, load_checked, show, text_of, unshow, write_atomic
from framework.storage.file_journal import RunJournal
from framework.storage.files import FileStorage
from framework.storage.records import Retention


class Python(Protocol):
    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


@pytest.fixture
def store(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path / "store")


def saved(store: FileStorage, *checkpoint_ids: str, run_id: str = "run_1") -> None:
    for number, checkpoint_id in enumerate(checkpoint_ids):
        store.save_checkpoint(
            Checkpoint(
                id=checkpoint_id,
                run_id=run_id,
                executor_type=ExecutorType.GRAPH,
                current_node_id="node",
                memory_snapshot={"messages": [{"n": n} for n in range(number + 1)], "text": "a" * number},
            )
        )


def latest(store: FileStorage, run_id: str = "run_1") -> str | None:
    newest = store.load_latest_checkpoint(run_id)
    return None if newest is None else newest.id


# --- layout ---------------------------------------------------------------------------------------------------------


def test_the_layout_is_made_on_opening(store: FileStorage) -> None:
    base = store.base_path
    assert isinstance(base, Path)
    for folder in (
        "runs",
        "summaries",
        "indexes/by_goal",
        "indexes/by_status",
        "indexes/by_node",
        "checkpoints/by_run",
        "checkpoint_indexes",
    ):
        assert (base / folder).is_dir()
    assert store.get_stats() == {"total_runs": 0, "total_goals": 0, "storage_path": str(base)}


def test_files_have_the_names_of_what_they_hold(store: FileStorage) -> None:
    saved(store, "ckpt_test_0", "ckpt_test_1")
    store.save_run(Run(id="run_1", goal_id="goal_1"))
    base = store.base_path
    assert {path.name for path in (base / "checkpoints/by_run/run_1").iterdir()} == {
        "ckpt_test_0.json",
        "ckpt_test_1.json",
    }
    assert (base / "checkpoint_indexes/latest_run_1.txt").read_text() == "ckpt_test_1"
    assert json.loads((base / "runs/run_1.json").read_text())["duration_ms"] == 0
    assert json.loads((base / "summaries/run_1.json").read_text())["run_id"] == "run_1"
    assert json.loads((base / "indexes/by_goal/goal_1.json").read_text()) == ["run_1"]
    assert json.loads((base / "indexes/by_status/running.json").read_text()) == ["run_1"]
    assert json.loads((base / "history/run_1/0.json").read_text())["sequence"] == 0


def test_values_are_shown_as_json(store: FileStorage) -> None:
    saved(store, "a", "b")
    content = json.loads((store.base_path / "checkpoints/by_run/run_1/b.json").read_text())
    assert content["chunks"] == [
        {"key": "messages", "op": "append", "items": [{"n": 1}]},
        {"key": "text", "op": "append", "text": "a"},
    ]
    assert content["checkpoint"]["node"] == "node"
    assert content["record"] == [{"kind": "save", "node": "node"}]


def test_nothing_is_written_outside(store: FileStorage, tmp_path: Path) -> None:
    for odd in ODD_IDS:
        saved(store, odd, run_id=odd)
        store.save_run(Run(id=odd, goal_id=odd))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    for folder, _, names in os.walk(store.base_path):
        assert all(len(name.encode()) <= 255 and not name.startswith("..") for name in names), folder
    for odd in ODD_IDS:
        assert store.delete_run(odd)
    assert not list((store.base_path / "checkpoints/by_run").iterdir())
    assert not list((store.base_path / "history").iterdir())
    locks = sorted(path.name for path in (store.base_path / "locks").iterdir())
    assert locks == ["~definition-%.lock", "~indexes.lock"]


@settings(max_examples=200, deadline=None, database=None)
@given(st.sets(st.text(max_size=12) | st.text(min_size=60, max_size=300), min_size=2, max_size=4))
def test_names_are_safe_and_differ(texts: set[str]) -> None:
    names = {file_name(text) for text in texts}
    assert len(names) == len(texts)
    for text in texts:
        name = file_name(text)
        assert 0 < len(name) <= 150
        assert name.isascii()
        assert not set(name) & set("/\\\x00")
        assert not name.startswith(".")
        assert text_of(name) in (text, None)


@pytest.mark.parametrize("plain", ["ckpt_test_0", "run_20260101-1.2", "x" * 150])
def test_ordinary_ids_are_their_own_names(plain: str) -> None:
    assert file_name(plain) == plain


@settings(max_examples=200, deadline=None, database=None)
@given(st.binary(max_size=12) | st.text(max_size=5).map(lambda text: json.dumps(text).encode()))
def test_bytes_are_shown_and_read_back(data: bytes) -> None:
    assert unshow(json.loads(json.dumps(show(data)))) == data


# --- torn, lost and edited files ------------------------------------------------------------------------------------


def test_reformatting_is_not_damage(store: FileStorage) -> None:
    saved(store, "a", "b", "c")
    for path in store.base_path.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7, ensure_ascii=True) + "\n\n")
    with FileStorage(store.base_path) as again:
        assert again.verify().ok
        assert latest(again) == "c"
        saved(again, "d")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"[]", b"\x00" * 100, b"null"])
def test_a_torn_newest_checkpoint_leads_to_the_one_before(store: FileStorage, content: bytes) -> None:
    saved(store, "a", "b", "c")
    path = store.base_path / "checkpoints/by_run/run_1/c.json"
    path.write_bytes(content)
    damage: list[str] = []
    newest = store.load_latest_checkpoint("run_1", lambda found: damage.append(found.where))
    assert newest is not None
    assert newest.id == "b"
    assert newest.memory_snapshot == {"messages": [{"n": 0}, {"n": 1}], "text": "a"}
    assert damage == [str(path)]
    assert store.load_checkpoint("run_1", "c") is None
    assert [entry.id for entry in store.list_checkpoints("run_1")] == ["a", "b"]
    assert [found.where for found in store.verify().damage] == [str(path)]
    record = store.find_run("run_1")
    assert record is not None
    assert record.sequence == 3, "the lost commit's sequence is not given twice"


def test_an_owner_goes_on_from_before_the_damage(store: FileStorage) -> None:
    writer = Writer(store, state={"a": [0]})
    states = growing_states()
    for _ in range(4):
        writer.write(next(states))
    (store.base_path / "checkpoints/by_run/run_1/ckpt_4.json").write_text("torn")
    token = store.claim_run("run_1", "me", 60).token
    assert store.rewind("run_1", token, 3) == 1
    assert store.verify().ok
    assert [path.name for path in store.base_path.rglob("*.damaged")] == ["ckpt_4.json.damaged"]
    writer.states[4] = writer.states[3]
    writer.write(next(states), token=token)
    writer.check(store, [1, 2, 3, 5], "after going on")


@pytest.mark.parametrize("content", [None, "", "nonsense\n", "../../x", "b"])
def test_the_latest_pointer_is_only_a_hint(store: FileStorage, content: str | None) -> None:
    saved(store, "a", "b", "c")
    pointer = store.base_path / "checkpoint_indexes/latest_run_1.txt"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_text(content)
    assert latest(store) == "c"
    saved(store, "d")
    assert pointer.read_text() == "d"


def test_a_lost_file_is_noticed(store: FileStorage) -> None:
    writer = Writer(store)
    writer.write({"a": [1]}, retention=Retention(1))
    writer.write({"a": [1, 2]}, retention=Retention(1))
    writer.write({"a": [1, 2, 3]}, retention=Retention(1))
    writer.check(store, [3], "before")
    (store.base_path / "history/run_1/1.json").unlink()
    with pytest.raises(CorruptData, match="missing"):
        state_at(store, 3)
    assert not store.verify().ok


def test_a_lost_file_without_state_costs_only_its_log(store: FileStorage) -> None:
    writer = Writer(store)
    for number in range(4):
        writer.write({"a": number}, retention=Retention(1))
    (store.base_path / "history/run_1/2.json").write_text("torn")
    writer.check(store, [4], "with a damaged log row")
    damage: list[int | None] = []
    rows = store.read_log("run_1", on_damage=lambda found: damage.append(found.sequence))
    assert [row.sequence for row in rows] == [1, 3, 4]
    assert damage == [2]


@pytest.mark.parametrize(
    "pattern", ["checkpoints/by_run/run_1/a.json", "history/run_1/0.json", "executions/run_1.json"]
)
def test_a_file_of_another_run_is_not_taken(store: FileStorage, pattern: str) -> None:
    for run_id in ("run_1", "run_2"):
        saved(store, "a", "b", run_id=run_id)
    foreign = store.base_path / pattern.replace("run_1", "run_2")
    (store.base_path / pattern).write_bytes(foreign.read_bytes())
    assert not store.verify("run_1").ok
    assert store.verify("run_2").ok
    if pattern.startswith("checkpoints"):
        assert store.load_checkpoint("run_1", "a") is None


def test_a_renamed_checkpoint_is_not_taken(store: FileStorage) -> None:
    saved(store, "a", "b")
    folder = store.base_path / "checkpoints/by_run/run_1"
    (folder / "copy of b.json").write_bytes((folder / "b.json").read_bytes())
    assert [entry.id for entry in store.list_checkpoints("run_1")] == ["a", "b"]
    assert not store.verify().ok


def test_a_newer_store_is_refused(store: FileStorage) -> None:
    marker = store.base_path / "store.json"
    content = load_checked(marker)
    marker.write_bytes(dump_checked(content).replace(b'"format": %d' % FORMAT, b'"format": %d' % (FORMAT + 1)))
    with pytest.raises(CorruptData):
        FileStorage(store.base_path)
    content["format"] = FORMAT + 1
    marker.write_bytes(dump_checked(content))
    with pytest.raises(StoreTooNew, match=f"format version {FORMAT + 1}"):
        FileStorage(store.base_path)


def test_files_of_the_first_format_are_read(store: FileStorage) -> None:
    writer = Writer(store, state={"a": 1})
    writer.write({"a": 2})
    for path in [*store.base_path.glob("history/*/*.json"), *store.base_path.glob("executions/*.json")]:
        _as_format_1(path)
    for path in store.base_path.glob("checkpoints/by_run/*/*.json"):
        _as_format_1(path)
    with FileStorage(store.base_path) as older:
        record = older.find_run("run_1")
        assert record is not None
        assert (record.wake_at, older.read_journal("run_1"), older.list_due()) == (None, [], [])
        writer.check(older, [1], "a store of format 1")
        accept(older, journal(("s", 1, b"1")), commit(2, journal_done=["s"]))
        assert older.read_journal("run_1") == []
        assert older.verify().ok


def _as_format_1(path: Path) -> None:
    content = load_checked(path)
    for name in ("wake_at", "journal_done"):
        content.pop(name, None)
    path.write_bytes(dump_checked({**content, "format": 1}))


def test_commits_say_what_of_the_journal_is_left(store: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a crash, or a full disk, comes between a commit and what follows from it."""
    store.open_run(new_run(), "me", 60)
    accept(store, journal(("s", 1, b"1"), ("t", 1, b"2"), token=1), journal(("s", 2, b"3"), token=1))
    with monkeypatch.context() as patch:
        patch.setattr(RunJournal, "remove_done", fail_to_remove)
        accept(store, commit(1, token=1, journal_done=["s"]))
    folder = store.base_path / "journal" / "run_1"
    assert len(list(folder.iterdir())) == 2
    assert [row.record for row in store.read_journal("run_1")] == [b"2"]
    accept(store, journal(("s", 1, b"again"), token=1))
    assert [row.record for row in store.read_journal("run_1")] == [b"again", b"2"]
    accept(store, commit(2, token=1, journal_done=["unknown"]))
    assert [row.record for row in store.read_journal("run_1")] == [b"again", b"2"]
    assert len(list(folder.iterdir())) == 2, "what the first commit took is gone by now"
    accept(store, commit(3, token=1, journal_done=["s", "t"]))
    assert list(folder.iterdir()) == []


def fail_to_remove(*_: object) -> None:
    raise OSError("disk full")


def test_left_over_temporary_files_are_ignored_and_cleaned_when_old(store: FileStorage) -> None:
    saved(store, "a")
    folder = store.base_path / "checkpoints/by_run/run_1"
    young, old = folder / ".b.json.1-x.tmp", folder / ".c.json.1-x.tmp"
    for path in (young, old):
        path.write_text('{"half')
    os.utime(old, (time.time() - 7_200,) * 2)
    with FileStorage(store.base_path) as again:
        assert [entry.id for entry in again.list_checkpoints("run_1")] == ["a"]
        assert again.verify().ok
    assert (young.exists(), old.exists()) == (True, False)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(OSError, match="directory"):
        write_atomic(path, b"data")
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


# --- indexes of run documents ---------------------------------------------------------------------------------------


def test_indexes_are_rebuilt_from_the_documents(store: FileStorage) -> None:
    for number in range(5):
        status = RunStatus.COMPLETED if number % 2 else RunStatus.STUCK
        store.save_run(Run(id=f"run_{number}", goal_id="g", status=status))
    for path in store.base_path.glob("indexes/**/*.json"):
        path.unlink()
    (store.base_path / "indexes/by_goal/wrong.json").write_text('["run_1"]')
    store.rebuild_indexes()
    assert store.list_all_runs() == [f"run_{number}" for number in range(5)]
    assert store.get_runs_by_status("completed") == ["run_1", "run_3"]
    assert store.list_all_goals() == ["g"]


@pytest.mark.parametrize("content", ["{", "{}", '["run_0", 1]'])
def test_a_damaged_index_is_rebuilt_when_it_is_read(store: FileStorage, content: str) -> None:
    for number in range(3):
        store.save_run(Run(id=f"run_{number}", goal_id="g"))
    for name in ("by_goal/g.json", "all_runs.json"):
        (store.base_path / "indexes" / name).write_text(content)
        assert store.get_runs_by_goal("g") == store.list_all_runs() == ["run_0", "run_1", "run_2"]


def test_a_corrupt_document_hides_no_other(store: FileStorage) -> None:
    for number in range(3):
        store.save_run(Run(id=f"run_{number}", goal_id="g"))
    path = store.base_path / "runs/run_1.json"
    path.write_text('{"torn')
    with pytest.raises(CorruptData, match="run_1"):
        store.load_run("run_1")
    for _ in range(2):
        assert store.list_all_runs() == store.get_runs_by_goal("g") == ["run_0", "run_1", "run_2"]
        store.rebuild_indexes()
    assert [found.run_id for found in store.verify().damage] == ["run_1"]
    store.save_run(Run(id="run_1", goal_id="h"))
    assert (store.get_runs_by_goal("g"), store.get_runs_by_goal("h")) == (["run_0", "run_2"], ["run_1"])
    path.write_text("{}")
    assert store.delete_run("run_1")
    assert (store.list_all_runs(), store.get_runs_by_goal("h")) == (["run_0", "run_2"], [])


def test_an_edited_document_is_noticed_unless_its_checksum_is_removed(store: FileStorage) -> None:
    store.save_run(Run(id="run_1", goal_id="g", narrative="as it was"))
    path = store.base_path / "runs/run_1.json"
    content = json.loads(path.read_text())
    content["narrative"] = "as it should have been"
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptData, match=r"\$checksum"):
        store.load_run("run_1")
    del content["$checksum"]
    path.write_text(json.dumps(content))
    run = store.load_run("run_1")
    assert run is not None
    assert run.narrative == "as it should have been"


def test_documents_of_another_writer_are_adopted(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for number in range(2):
        run = Run(id=f"run_{number}", goal_id="g")
        (tmp_path / f"runs/run_{number}.json").write_text(run.model_dump_json())
    with FileStorage(tmp_path) as store:
        assert store.list_all_runs() == store.get_runs_by_goal("g") == ["run_0", "run_1"]


def test_processes_lose_no_index_entry(store: FileStorage, python: Python) -> None:
    program = """
        import sys
        from framework.schemas.run import Run
        from framework.storage.files import FileStorage

        with FileStorage(sys.argv[1]) as store:
            for number in range(10):
                store.save_run(Run(id=f"run_{sys.argv[2]}_{number}", goal_id="g"))
    """
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda worker: python(program, store.base_path, worker), range(3)))
    expected = sorted(f"run_{worker}_{number}" for worker in range(3) for number in range(10))
    assert sorted(store.get_runs_by_goal("g")) == sorted(store.list_all_runs()) == expected


# --- a kill between any two file operations -------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    from framework.storage import file_io
    from framework.storage.chunks import Chunk
    from framework.storage.contract import commit, new_run
    from framework.storage.files import FileStorage
    from framework.schemas.run import Run, RunState
    from framework.storage.records import Retention

    folder, action, fatal = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = FileStorage(folder)
    count = 0

    def count_down(name, *rest):
        global count
        if name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (name == "open" and ".tmp" in str(rest[0][0])):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)
    if action == "open":
        store.open_run(new_run("run_2", {"a": [1]}), "me", 0)
    elif action == "commit":
        chunks = [Chunk("a", "set", b"[9]"), Chunk("b", "append", b"5"), Chunk("gone", "delete", b"")]
        one = commit(5, checkpoint_id="ckpt_4", replaces=4, chunks=chunks, state=RunState.FAILED, error="e",
                     retention=Retention(2))
        assert store.commit([one]) == [None]
    elif action == "claim":
        store.claim_run("run_1", "you", 0)
    elif action == "prune":
        store.prune("run_1", Retention(1))
    elif action == "rewind":
        store.rewind("run_1", 1, 2)
    elif action == "delete_checkpoints":
        store.delete_checkpoints("run_1")
    elif action == "delete_run":
        store.delete_run("run_1")
    elif action == "document":
        store.save_run(Run(id="run_1", goal_id="new"))
    print("survived", count)
"""

ACTIONS = ["open", "commit", "claim", "prune", "rewind", "delete_checkpoints", "delete_run", "document"]


def prepare(folder: Path) -> Writer:
    """A run with four checkpoints, an initial state, appends, sets and a deletion."""
    with FileStorage(folder) as store:
        writer = Writer(store, state={"a": [0], "input": 1})
        writer.write({"a": [0, 1], "input": 1, "b": [1]})
        writer.write({"a": [0, 1, 2], "b": [2], "gone": "x"})
        writer.write({"a": [0, 1, 2, 3], "b": [2, 3], "gone": "xy"})
        writer.write({"a": [0, 1, 2, 3, 4], "b": [2, 3, 4], "gone": "xyz"})
        store.claim_run("run_1", "owner", 0)
        store.save_run(Run(id="run_1", goal_id="old"))
    return writer


def check_after_kill(folder: Path, action: str, writer: Writer) -> None:
    """The store is whole, shows the run as before or after the action, and goes on."""
    with FileStorage(folder) as store:
        damage = store.verify().damage
        assert not damage
        record = store.find_run("run_1")
        if record is None:
            assert action == "delete_run"
            Writer(store).write({"new": 1})
            return
        retained = {row.sequence: row.checkpoint_id for row in store.read_checkpoint_rows("run_1")}
        after = dict(writer.states[-1])
        del after["gone"]
        states = {**dict(enumerate(writer.states)), 5: {**after, "a": b"[9]", "b": b"[2,3,4,5]"}}
        for sequence in retained:
            assert state_at(store, sequence) == states[sequence], f"the state at {sequence}"
        assert state_at(store, 0) == states[0]
        assert [row.sequence for row in store.read_log("run_1")] == list(range(1, record.sequence + 1))
        committed = record.sequence == 5
        assert (record.state, record.error) == ((RunState.FAILED, "e") if committed else (RunState.CRASHED, None)), (
            "state and commit go together"
        )
        if action == "commit":
            assert retained.get(5 if committed else 4) == "ckpt_4"
        elif action == "claim":
            assert record.token in (1, 2)
        elif action not in ("rewind", "delete_checkpoints", "delete_run"):
            assert 4 in retained, "the newest checkpoint stays"
        run = store.load_run("run_1")
        if action == "document" and run is not None:
            assert store.get_runs_by_goal(run.goal_id) == ["run_1"]
            assert len(store.list_all_goals()) == 1
        if action == "open" and store.find_run("run_2") is None:
            store.open_run(new_run("run_2"))
        newest = state_at(store, record.sequence)
        token = store.claim_run("run_1", "next", 60).token
        chunks = [Chunk("z", "set", b"1")]
        accept(store, commit(record.sequence + 1, token=token, chunks=chunks, retention=Retention(1)))
        assert state_at(store, record.sequence + 1) == {**newest, "z": b"1"}
        assert store.verify().ok


def run_killed(python: Python, folder: Path, action: str, fatal: int) -> bool:
    """Whether the process got to the end, because it has fewer operations than ``fatal``."""
    try:
        python(KILLED, folder, action, fatal, code=-9)
    except AssertionError as error:
        assert "survived" in str(error), error
        return True
    return False


@pytest.mark.parametrize(("action", "fatal"), [("commit", 1), ("commit", 4), ("commit", 8), ("prune", 3), ("open", 3)])
def test_a_kill_leaves_a_whole_store(action: str, fatal: int, tmp_path: Path, python: Python) -> None:
    writer = prepare(tmp_path)
    run_killed(python, tmp_path, action, fatal)
    check_after_kill(tmp_path, action, writer)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_every_operation_leaves_a_whole_store(action: str, tmp_path: Path, python: Python) -> None:
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        writer = prepare(folder)
        survived = run_killed(python, folder, action, fatal)
        check_after_kill(folder, action, writer)
        if survived:
            assert fatal > 2
            return
    raise AssertionError("200 operations and no end")
