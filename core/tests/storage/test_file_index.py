"""What ``FileStorage`` keeps in memory of a run's files: its cost follows the change, and it is never believed when
another process, or a hand, was at the files."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from framework.storage import codec, file_io
from framework.storage.chunks import Chunk
from framework.storage.contract import accept, commit, journal, new_run, state_at
from framework.storage.files import FileStorage
from framework.storage.records import Commit, JournalWrite, Retention


class Python(Protocol):
    def __call__(self, program: str, *arguments: object, env: dict[str, str] | None = None, code: int = 0) -> str: ...


class Model:
    """What one run holds, as plain values; it makes random writes and says what they come to."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.sequence = 0
        self.state: dict[str, Any] = {}
        self.rows: dict[tuple[str, int], bytes] = {}

    def journal(self) -> JournalWrite:
        key = self.source.choice("stu"), self.source.randrange(3)
        self.rows[key] = b"%d" % self.source.randrange(1_000)
        return journal((*key, self.rows[key]), token=1)

    def commit(self) -> Commit:
        self.sequence += 1
        chunks = []
        for key in self.source.sample("abc", 2):
            grows = key in self.state and self.source.random() < 0.6
            self.state[key] = [*self.state[key], self.sequence] if grows else [self.sequence]
            number = b"%d" % self.sequence
            chunks.append(Chunk(key, "append", number) if grows else Chunk(key, "set", b"[" + number + b"]"))
        done = self.source.sample("stuv", self.source.randrange(3))
        self.rows = {key: row for key, row in self.rows.items() if key[0] not in done}
        keep = self.source.choice([None, 1, 2, 5])
        checkpoint: dict[str, Any] = {} if self.source.random() < 0.8 else {"checkpoint_id": None}
        return commit(
            self.sequence,
            token=1,
            chunks=chunks,
            journal_done=done,
            retention=None if keep is None else Retention(keep),
            **checkpoint,
        )

    def check(self, store: FileStorage) -> None:
        record = store.find_run("run_1")
        assert record is not None
        assert record.sequence == self.sequence
        assert {(row.step, row.number): row.record for row in store.read_journal("run_1")} == self.rows
        of_s = {key: row for key, row in self.rows.items() if key[0] == "s"}
        assert {(row.step, row.number): row.record for row in store.read_journal("run_1", "s")} == of_s
        assert state_at(store, self.sequence) == {key: codec.encode(value) for key, value in self.state.items()}


@pytest.mark.parametrize("seed", range(4))
def test_stores_that_write_in_turn_see_each_others_writes(seed: int, tmp_path: Path) -> None:
    stores = [FileStorage(tmp_path) for _ in range(3)]
    model = Model(seed)
    stores[0].open_run(new_run(), "me", 600)
    store = stores[0]
    for _ in range(60):
        if model.source.random() < 0.4:
            store = model.source.choice(stores)
        accept(store, model.journal() if model.source.random() < 0.6 else model.commit())
        if model.source.random() < 0.2:
            model.check(model.source.choice(stores))
    for store in stores:
        model.check(store)
        assert [row.sequence for row in store.read_log("run_1")] == list(range(1, model.sequence + 1))
        assert store.verify().ok
        store.close()


KILLED = """
    import os, signal, sys
    from framework.storage.chunks import Chunk
    from framework.storage.contract import commit, journal
    from framework.storage.files import FileStorage
    from framework.storage.records import Retention

    folder, sequence, fatal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store, count = FileStorage(folder), 0

    def count_down(name, *rest):
        global count
        if name in ("os.rename", "os.remove") or (name == "open" and ".tmp" in str(rest[0][0])):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)
    store.commit([
        journal(("s", 5, b"5"), token=1),
        commit(sequence, token=1, chunks=[Chunk("a", "set", b"[0]")], journal_done=["t"], retention=Retention(1)),
        journal(("u", 5, b"5"), token=1),
    ])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("fatal", [1, 2, 3, 4, 5, 6, 8, 9, 12, 99])
def test_a_store_goes_on_beside_one_that_was_killed(fatal: int, tmp_path: Path, python: Python) -> None:
    """It knows the files of the run when the other one comes, writes, and is killed between two of its files."""
    model = Model(7)
    with FileStorage(tmp_path) as store:
        store.open_run(new_run(), "me", 600)
        for _ in range(4):
            accept(store, model.commit(), model.journal())
        accept(store, journal(("t", 9, b"9"), token=1))
        model.rows["t", 9] = b"9"
        python(KILLED, tmp_path, model.sequence + 1, fatal, code=-9)
        accept(store, journal(("v", 1, b"1"), token=1))  # the first thing done is a write, by what is in memory
        record = store.find_run("run_1")
        assert record is not None
        keys = {(row.step, row.number) for row in store.read_journal("run_1")}
        assert ("v", 1) in keys
        if record.sequence > model.sequence:
            model.sequence, model.state["a"] = record.sequence, [0]
            model.rows = {key: row for key, row in model.rows.items() if key[0] != "t"}
        model.rows["v", 1] = b"1"
        for step in "su":
            if (step, 5) in keys:
                model.rows[step, 5] = b"5"
        assert (("u", 5) in keys) <= (("t", 9) not in keys) <= (("s", 5) in keys), "in the order they were written"
        model.check(store)
        for _ in range(4):
            accept(store, model.commit(), model.journal())
        model.check(store)
        assert store.verify().ok
    with FileStorage(tmp_path) as again:
        model.check(again)


def test_a_refused_write_and_a_failing_one_leave_a_true_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(11)
    with FileStorage(tmp_path) as store:
        store.open_run(new_run(), "me", 600)
        for turn in range(30):
            accept(store, model.commit(), model.journal())
            [refused] = store.commit([commit(model.sequence, token=1)])
            assert refused is not None
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", failing_at(turn % 2))
                [failed] = store.commit([commit(model.sequence + 1, token=1, chunks=[Chunk("z", "set", b"1")])])
            if failed is None:  # the commit's own file was in its place before the disk was full
                model.sequence += 1
                model.state["z"] = 1
        model.check(store)
        assert store.verify().ok


def failing_at(turn: int) -> Callable[..., None]:
    replace, count = os.replace, Counter[str]()

    def fail(*paths: Any) -> None:
        count["replace"] += 1
        if count["replace"] > turn:
            raise OSError(28, "No space left on device")
        replace(*paths)

    return fail


@pytest.mark.parametrize("kind", ["journal", "latest only", "all kept", "messages", "journal kept"])
def test_what_a_write_looks_at_does_not_follow_the_history(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: folders listed and files read, for the last writes of a short and of a longer history."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    counted = Counter[str]()
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, counting(counted, name, getattr(os, name)))
    monkeypatch.setattr(Path, "read_bytes", counting(counted, "read_bytes", Path.read_bytes))
    with FileStorage(tmp_path) as store:
        store.open_run(new_run(), "me", 600)

        def write(number: int) -> None:
            rows = journal((f"s{number}", 1, b"1"), token=1)
            done = [f"s{number}"] if kind in ("latest only", "all kept") else ["none"]
            chunks = [Chunk("a", "append" if number > 1 else "set", b"1" if number > 1 else b"[1]")]
            chunks.append(Chunk("n", "set", b"%d" % number))
            retention = None if kind == "all kept" else Retention(1)
            if kind == "messages":
                store.send("run_1", f"m{number}", b"1")
            elif kind == "journal":
                accept(store, rows)
            else:
                accept(store, rows, commit(number, token=1, chunks=chunks, journal_done=done, retention=retention))

        seen = []
        for upto in (20, 120):
            for number in range(upto - 19, upto):
                write(number)
            counted.clear()
            write(upto)
            seen.append(dict(counted))
            if upto == 20:
                for number in range(21, 101):
                    write(number)
    assert seen[0] == seen[1]
    assert not {"listdir", "scandir"} & seen[1].keys(), "no folder is listed again"
    assert seen[1]["read_bytes"] <= 6, "the run's record, before and after, and what retention moves"


def counting(counted: Counter[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        counted[name] += 1
        return real(*arguments)

    return call


def test_a_row_that_was_put_there_by_hand_is_not_written_over(tmp_path: Path) -> None:
    with FileStorage(tmp_path) as store:
        store.open_run(new_run(), "me", 600)
        accept(store, journal(("s", 1, b"1"), token=1))
        folder = tmp_path / "journal" / "run_1"
        content = file_io.load_checked(folder / "1.json")
        content |= {"write": 2, "rows": [{"step": "s", "number": 2, "record": 2}]}
        (folder / "2.json").write_bytes(file_io.dump_checked(content))
        accept(store, journal(("s", 3, b"3"), token=1))
        assert [(row.number, row.record) for row in store.read_journal("run_1")] == [(1, b"1"), (2, b"2"), (3, b"3")]


@pytest.mark.parametrize("quietly", [False, True], ids=["written", "flipped"])
def test_a_checkpoint_that_is_damaged_while_the_store_is_open_stops_no_commit(quietly: bool, tmp_path: Path) -> None:
    """Also when nothing shows that the file changed, as when a disk loses a bit."""
    with FileStorage(tmp_path) as store:
        store.open_run(new_run(state={"a": 0}), "me", 600)
        accept(store, *(commit(number, token=1, chunks=[Chunk("a", "set", b"%d" % number)]) for number in (1, 2, 3)))
        path = tmp_path / "checkpoints/by_run/run_1/ckpt_1.json"
        torn = path.read_bytes().replace(b'"at"', b'"AT"')
        if quietly:
            files = store._files["run_1"]
            path.write_bytes(torn)
            found = path.stat()
            entry = files._files[str(path)]
            object.__setattr__(entry, "stamp", (found.st_ino, found.st_ctime_ns, found.st_size))
        else:
            path.write_bytes(torn)
        for number in (4, 5, 6):
            one = commit(number, token=1, chunks=[Chunk("a", "set", b"%d" % number)], retention=Retention(1))
            accept(store, one)
        assert [row.checkpoint_id for row in store.read_checkpoint_rows("run_1")] == ["ckpt_6"]
        assert state_at(store, 6) == {"a": b"6"}
        assert [item.where for item in store.verify().damage] == [str(path)]
