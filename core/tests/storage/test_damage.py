"""Damaged bytes are reported, never believed: the newest readable checkpoint is used and no other row is hidden."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.errors import CorruptData, MessageRefused, StorageError
from framework.schemas.checkpoint import Checkpoint, ExecutorType
from framework.schemas.run import Run
from framework.storage import codec
from framework.storage.backend import FileStorage, Storage
from framework.storage.contract import Writer, accept, journal, new_run
from framework.storage.postgres import PostgresStorage
from framework.storage.records import Damage, JournalRow, LogRow, Retention, RunRecord
from framework.storage.sqlite import SQLiteStorage
from framework.testing import StorageUnderTest

Opener = Callable[[Path], Storage]
OPENERS: dict[str, Opener] = {"sqlite": lambda folder: SQLiteStorage(folder / "runs.db"), "files": FileStorage}


def fill(store: Storage) -> None:
    """Two runs with checkpoints, one pruned, and documents."""
    for run_id in ("run_1", "run_2"):
        messages: list[str] = []
        for number in range(6):
            messages.append(f"message {number} of {run_id} " + "m" * 300)
            store.save_checkpoint(
                Checkpoint(
                    id=f"ckpt_{number}",
                    run_id=run_id,
                    executor_type=ExecutorType.GRAPH,
                    current_node_id=f"node_{number}",
                    memory_snapshot={"messages": messages, "number": number, "text": "t" * number},
                    execution_path=[f"node_{n}" for n in range(number + 1)],
                    step_number=number,
                )
            )
        store.save_run(Run(id=run_id, goal_id="goal", narrative="n" * 300))
        accept(store, *(journal((f"step {number}", 1, b"r" * 300), run_id=run_id) for number in range(3)))
    store.prune("run_2", Retention(2))


class Truth:
    """What an undamaged store says; ``compare`` raises when a damaged one says something else."""

    def __init__(self, store: Storage) -> None:
        self.records = {record.run_id: record for record in store.list_runs()}
        self.logs = {run_id: store.read_log(run_id) for run_id in self.records}
        self.journals = {run_id: store.read_journal(run_id) for run_id in self.records}
        self.documents = {run_id: store.load_run(run_id) for run_id in self.records}
        self.definition = store.definition("")
        self.checkpoints = {
            run_id: {entry.id: store.load_checkpoint(run_id, entry.id) for entry in store.list_checkpoints(run_id)}
            for run_id in self.records
        }

    def compare(self, store: Storage) -> int:
        """How many things could not be read. None of those that could may differ."""
        failures = 0

        def attempt(call: Callable[..., Any], *arguments: str) -> Any:
            nonlocal failures
            try:
                return call(*arguments)
            except StorageError:
                failures += 1
                return None

        for run_id, record in self.records.items():
            found = attempt(store.find_run, run_id)
            assert found is None or facts(found) == facts(record)
            rows: list[LogRow] = attempt(store.read_log, run_id) or []
            assert [row for row in rows if row not in self.logs[run_id]] == []
            failures += len(rows) < len(self.logs[run_id])
            calls: list[JournalRow] = attempt(store.read_journal, run_id) or []
            assert [row for row in calls if row not in self.journals[run_id]] == []
            failures += len(calls) < len(self.journals[run_id])
            newest = attempt(store.load_latest_checkpoint, run_id)
            assert newest is None or newest == self.checkpoints[run_id][newest.id]
            failures += newest is None or newest.id != "ckpt_5"
            for checkpoint_id, expected in self.checkpoints[run_id].items():
                loaded = attempt(store.load_checkpoint, run_id, checkpoint_id)
                assert loaded is None or loaded == expected
                failures += loaded is None
            document = attempt(store.load_run, run_id)
            assert document is None or document == self.documents[run_id]
            failures += document is None
        assert attempt(store.definition, "") in (None, self.definition)
        attempt(store.list_all_runs)
        return failures


def facts(record: RunRecord) -> tuple[object, ...]:
    """What never changes about a run."""
    return (
        record.run_id,
        record.executor_type,
        record.goal_id,
        record.fingerprint,
        record.header,
        record.parent_run_id,
        record.created_at,
    )


def flip_and_compare(name: str, folder: Path, seed: int, truth: Truth) -> bool:
    """Whether flipping one bit of a copy of the store made something unreadable."""
    source = random.Random(seed)
    copy = folder.with_name(f"copy {seed}")
    shutil.copytree(folder, copy)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size]
    path = source.choices(files, [found.stat().st_size for found in files])[0]
    data = bytearray(path.read_bytes())
    position = source.randrange(len(data))
    data[position] ^= 1 << source.randrange(8)
    path.write_bytes(data)
    try:
        store = OPENERS[name](copy)
    except StorageError:
        return True  # refused as a whole, with a reason
    try:
        failures = truth.compare(store)
        if failures and name == "files":
            assert not store.verify().ok, f"verify does not see what {path.name} lost"
    finally:
        store.close()
        shutil.rmtree(copy)
    return failures > 0


def flip_many(name: str, folder: Path, count: int) -> None:
    folder.mkdir()
    with OPENERS[name](folder) as store:
        fill(store)
        truth = Truth(store)
        assert truth.compare(store) == 0
    noticed = sum(flip_and_compare(name, folder, seed, truth) for seed in range(count))
    assert noticed, "not one flipped bit was noticed; is anything read at all?"


@pytest.mark.parametrize("name", ["sqlite", "files"])
def test_a_flipped_bit_is_never_believed(name: str, tmp_path: Path) -> None:
    flip_many(name, tmp_path / "store", 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["sqlite", "files"])
def test_many_flipped_bits_are_never_believed(name: str, tmp_path: Path) -> None:
    flip_many(name, tmp_path / "store", 2_000)


# --- rows of SQLite, one by one -------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> SQLiteStorage:
    store = SQLiteStorage(tmp_path / "runs.db")
    fill(store)
    return store


def run_key(store: SQLiteStorage, run_id: str = "run_1") -> int:
    row = store._db.execute("SELECT pk FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    return int(row[0])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE checkpoints SET body = x'7b7d' WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET body = CAST(body AS TEXT) || ' ' WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET body = CAST(x'ff' AS TEXT) WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET body = 7 WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET crc = crc + 1 WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET crc = 'x' WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET checkpoint_id = CAST(x'ff' AS TEXT) WHERE run_pk = :run AND sequence = 6",
        "UPDATE checkpoints SET sequence = 99 WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET data = x'5b5d' WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET data = CAST(data AS TEXT) || 'x' WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET op = 2 WHERE run_pk = :run AND sequence = 6 AND op = 1",
        "UPDATE chunks SET op = 9 WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET op = 'x' WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET key = 'other' WHERE run_pk = :run AND sequence = 6 AND op = 1",
        "UPDATE chunks SET checksum = x'00' WHERE run_pk = :run AND sequence = 6",
        "UPDATE chunks SET checksum = 'text' WHERE run_pk = :run AND sequence = 6",
        "DELETE FROM chunks WHERE run_pk = :run AND sequence = 6",
        "DELETE FROM chunks WHERE run_pk = :run AND sequence = 6 AND op = 0",
    ],
)
def test_a_damaged_newest_checkpoint_leads_to_the_one_before(sqlite: SQLiteStorage, statement: str) -> None:
    sqlite._db.execute(statement, {"run": run_key(sqlite)})
    damage: list[str] = []
    newest = sqlite.load_latest_checkpoint("run_1", lambda found: damage.append(found.problem))
    assert newest is not None
    assert newest.id == "ckpt_4"
    assert newest.memory_snapshot["number"] == 4
    assert len(damage) == 1
    assert sqlite.load_checkpoint("run_1", "ckpt_5") is None
    assert not sqlite.verify("run_1").ok
    assert sqlite.verify("run_2").ok
    assert sqlite.prune("run_1", Retention(1)) == 4, "the newest that can be read stays, and the damaged one"
    again = sqlite.load_latest_checkpoint("run_1")
    assert again is not None
    assert again.memory_snapshot == newest.memory_snapshot


@pytest.mark.parametrize(
    ("statement", "call"),
    [
        ("UPDATE definitions SET body = x'00'", lambda store: store.definition("")),
        ("UPDATE documents SET body = x'00'", lambda store: store.load_run("run_1")),
        ("UPDATE documents SET body = CAST('text' AS TEXT)", lambda store: store.load_run("run_1")),
        ("UPDATE chunks SET data = x'00' WHERE sequence = 1", lambda store: store.read_chunks("run_1", 1)),
        ("UPDATE checkpoints SET body = x'00'", lambda store: store.find_checkpoint_row("run_1", "ckpt_0")),
    ],
)
def test_reading_damage_by_name_raises(
    sqlite: SQLiteStorage, statement: str, call: Callable[[Storage], object]
) -> None:
    sqlite._db.execute(statement)
    with pytest.raises(CorruptData):
        call(sqlite)
    assert not sqlite.verify().ok


@pytest.mark.parametrize("column", ["record", "log", "crc", "sequence"])
def test_a_damaged_log_row_is_left_out_and_told(sqlite: SQLiteStorage, column: str) -> None:
    value = {"record": "x'00'", "log": "x'00'", "crc": "0", "sequence": "30"}[column]
    values = {"run": run_key(sqlite)}
    sqlite._db.execute(f"UPDATE steps SET {column} = {value} WHERE run_pk = :run AND sequence = 3", values)
    damage: list[int | None] = []
    rows = sqlite.read_log("run_1", on_damage=lambda found: damage.append(found.sequence))
    assert [row.sequence for row in rows] == [1, 2, 4, 5, 6]
    assert damage == [30 if column == "sequence" else 3]
    assert not sqlite.verify().ok


def test_a_path_with_a_damaged_step_is_told(durable: StorageUnderTest) -> None:
    store = durable.new()
    writer = Writer(store)
    for number in range(3):
        writer.write({"a": number}, retention=Retention(1))
    if isinstance(store, SQLiteStorage):
        store._db.execute("UPDATE steps SET crc = 0 WHERE sequence = 2")
    elif isinstance(store, PostgresStorage):
        store._database.query("damage it", "UPDATE {schema}.steps SET crc = 0 WHERE sequence = 2 RETURNING 1")
    else:
        assert isinstance(store, FileStorage)
        (store.base_path / "history/run_1/2.json").write_text("torn")
    damage: list[int | None] = []
    rows = store.read_log("run_1", on_damage=lambda found: damage.append(found.sequence))
    assert [row.sequence for row in rows] == [1, 3]
    assert damage == [2]
    assert not store.verify().ok
    writer.check(store, [3], "the state needs no log")


def test_a_type_this_program_does_not_know_is_no_damage(durable: StorageUnderTest) -> None:
    class Secret:
        pass

    name = f"{__name__}.Secret"
    codec.register(Secret, name=name, to_plain=lambda secret: 1, from_plain=lambda plain: Secret())
    store = durable.new()
    store.open_run(new_run())
    secret = {"s": Secret()}
    given = Checkpoint(id="c", run_id="run_1", executor_type=ExecutorType.GRAPH, memory_snapshot=secret, context=secret)
    store.save_checkpoint(given)
    codec._by_name.pop(name)
    assert store.verify().ok
    with pytest.raises(Exception, match="register"):
        store.load_latest_checkpoint("run_1")


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_a_damaged_journal_row_is_reported_and_hides_no_other(kind: str, tmp_path: Path) -> None:
    with OPENERS[kind](tmp_path) as store:
        store.open_run(new_run())
        for number in (1, 2, 3):
            accept(store, journal(("s", number, f"the record of {number}".encode())))
        assert store.verify().ok
        if isinstance(store, SQLiteStorage):
            store._db.execute("UPDATE journal SET record = replace(record, 'record', 'RECORD') WHERE number = 2")
        else:
            path = tmp_path / "journal" / "run_1" / "2.json"
            path.write_bytes(path.read_bytes().replace(b"record of", b"RECORD of"))
        damage: list[str] = []
        rows = store.read_journal("run_1", "s", lambda found: damage.append(found.where))
        assert [row.number for row in rows] == [1, 3]
        [found] = store.verify("run_1").damage
        assert [found.where] == damage
        assert "2" in found.where
        assert "checksum" in found.problem
        accept(store, journal(("s", 2, b"again")))
        assert [row.record for row in store.read_journal("run_1")][1] == b"again"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE journal SET crc = 'x' WHERE number = 2",
        "UPDATE journal SET number = 9 WHERE number = 2",
        "UPDATE journal SET number = 'x' WHERE number = 2",
        "UPDATE journal SET step = 's2' WHERE number = 2",
        "UPDATE journal SET step = CAST(x'ff' AS TEXT) WHERE number = 2",
        "UPDATE journal SET record = CAST(record AS TEXT) || ' ' WHERE number = 2",
        "UPDATE journal SET record = 7 WHERE number = 2",
    ],
)
def test_any_damage_to_a_journal_row_is_noticed(sqlite: SQLiteStorage, statement: str) -> None:
    accept(sqlite, *(journal(("s", number, b"r")) for number in (1, 2, 3)))
    sqlite._db.execute(f"{statement} AND step = 's'")
    rows = [(row.step, row.number) for row in sqlite.read_journal("run_1") if row.record == b"r"]
    assert rows == [("s", 1), ("s", 3)]
    assert len(sqlite.verify("run_1").damage) == 1


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_a_damaged_message_is_reported_and_hides_no_other(kind: str, tmp_path: Path) -> None:
    with OPENERS[kind](tmp_path) as store:
        store.open_run(new_run())
        for name in ("one", "two", "three"):
            store.send("run_1", name, f"the body of {name}".encode())
        assert store.verify().ok
        if isinstance(store, SQLiteStorage):
            store._db.execute("UPDATE messages SET body = replace(body, 'body', 'BODY') WHERE name = 'two'")
        else:
            path = tmp_path / "messages" / "run_1" / "two.json"
            path.write_bytes(path.read_bytes().replace(b"body of", b"BODY of"))
        assert [message.name for message in store.read_messages("run_1")] == ["one", "three"]
        assert store.count_messages(["run_1"]) == {"run_1": 3}
        [found] = store.verify("run_1").damage
        assert "two" in found.where
        assert "checksum" in found.problem
        with pytest.raises(MessageRefused):
            store.send("run_1", "two", b"another")


def damage_of(store: Storage, step: str | None = None) -> list[Damage]:
    found: list[Damage] = []
    store.read_journal("run_1", step, found.append)
    return found


@pytest.mark.parametrize("kind", sorted(OPENERS))
def test_no_flipped_bit_takes_a_journal_row_away_untold(kind: str, tmp_path: Path) -> None:
    """Bits of a stored row, one after another: either the row is as it was, or damage is told, with the row's key."""
    with OPENERS[kind](tmp_path / "store") as store:
        store.open_run(new_run())
        accept(store, journal(("node:2", 7, b'{"intent": "send"}')), journal(("other", 7, b"{}")))
        before = store.read_journal("run_1")
        if isinstance(store, SQLiteStorage):
            store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            path, key, row_bytes = store.path, b'node:2\x07{"intent"', len(b'node:2\x07{"intent": "send"}') + 4
        else:
            path, key, row_bytes = tmp_path / "store" / "journal" / "run_1" / "1.json", b"", 0
    whole = path.read_bytes()
    first = whole.index(key)
    positions = range(first, first + (row_bytes or len(whole)))
    named = lost = 0
    for position in random.Random(5).sample(positions, 25):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with OPENERS[kind](tmp_path / "store") as store:
            damage: list[Damage] = []
            rows = store.read_journal("run_1", on_damage=damage.append)
            assert [row for row in rows if row in before] == rows, "what was never written is believed"
            assert before[1] in rows, "another row is hidden"
            assert (rows == before) == (not damage), "a row vanished without a word"
            assert [item.run_id for item in damage] in ([], ["run_1"])
            lost += len(damage)
            named += [(item.step, item.number) for item in damage] == [("node:2", 7)]
    assert lost > 15
    assert named > lost // 3, "most often the key can still be read"


def test_a_damaged_file_names_each_of_its_rows(tmp_path: Path) -> None:
    with FileStorage(tmp_path) as store:
        store.open_run(new_run())
        accept(store, journal(("s", 1, b"1"), ("t", 2, b"2")), journal(("u", 3, b"3")))
        path = tmp_path / "journal" / "run_1" / "1.json"
        path.write_bytes(path.read_bytes().replace(b'"record": 2', b'"record": 3'))
        damage: list[Damage] = []
        assert [row.step for row in store.read_journal("run_1", on_damage=damage.append)] == ["u"]
        assert [(item.step, item.number, item.where) for item in damage] == [("s", 1, str(path)), ("t", 2, str(path))]
        damage.clear()
        assert store.read_journal("run_1", "t", damage.append) == []
        assert len(damage) == 2
        path.write_bytes(b"torn")
        damage.clear()
        store.read_journal("run_1", "u", damage.append)
        assert [(item.run_id, item.step, item.number) for item in damage] == [("run_1", None, None)]
