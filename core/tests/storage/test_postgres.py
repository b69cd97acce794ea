"""``PostgresStorage`` beyond the contract: its URL, its secrets, its round trips, odd texts, damage."""

from __future__ import annotations

import builtins
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import CorruptData, StorageError
from framework.schemas.run import Run, RunState
from framework.storage import postgres_driver
from framework.storage.backend import open_storage
from framework.storage.chunks import Chunk
from framework.storage.contract import accept, commit, journal, new_run, state_at
from framework.storage.postgres import PostgresStorage
from framework.storage.postgres_address import parse
from framework.storage.postgres_rows import escaped, indexed, text_of, unescaped
from framework.storage.records import Damage, Retention, Stray
from tests.postgres_proxy import PostgresProxy
from tests.postgres_server import PostgresServer

ODD = st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00\x10012"), max_size=600)


@pytest.fixture
def store(postgres_url: str) -> Iterator[PostgresStorage]:
    with PostgresStorage(postgres_url) as made:
        yield made


def run_sql(postgres: PostgresServer, store: PostgresStorage, statement: str) -> list[tuple[Any, ...]]:
    database = store.url.rpartition("/")[2].partition("?")[0]
    return postgres.execute(statement.replace("{s}", store._database.address.schema), database)


# --- the URL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "conninfo"),
    [
        ("postgresql://h/db", "postgresql://h/db", "postgresql://h/db"),
        ("postgres://u:p%40ss@h:1/db", "postgresql://u@h:1/db", "postgresql://u:p%40ss@h:1/db"),
        ("postgresql:///db?host=/run/pg", "postgresql:///db?host=/run/pg", "postgresql:///db?host=/run/pg"),
        (
            "postgresql://a:1,b:2/db?schema=x&pool_size=9&target_session_attrs=read-write&password=longsecret",
            "postgresql://a:1,b:2/db?schema=x&pool_size=9&target_session_attrs=read-write",
            "postgresql://a:1,b:2/db?target_session_attrs=read-write&password=longsecret",
        ),
    ],
)
def test_urls_are_taken_apart(url: str, shown: str, conninfo: str) -> None:
    address = parse(url)
    assert (address.shown, address.conninfo) == (shown, conninfo)
    assert parse(address.shown).schema == address.schema


def test_notices_may_be_waited_for_elsewhere() -> None:
    base = "postgresql://u:secret@pooler:6432/db?sslmode=require"
    assert parse(base).listen_conninfo == base
    assert parse(f"{base}&listen=no").listen_conninfo is None
    listen = parse(f"{base}&listen=direct:5432").listen_conninfo
    assert listen == "postgresql://u:secret@direct:5432/db?sslmode=require"


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("?schema=", "schema is a name"),
        ("?schema=a-b", "schema is a name"),
        ("?schema=pg_x", "schema is a name"),
        ("?schema=" + "x" * 64, "schema is a name"),
        ("?pool_size=0", "pool_size is a number from 1"),
        ("?pool_size=1.5", "pool_size is a number from 1"),
        ("?pool_size=x", "pool_size is a number from 1"),
        ("?patience_seconds=-1", "patience_seconds is a number from 0"),
        ("?patience_seconds=nan", "patience_seconds is a number from 0"),
        ("?schema=a&schema=b", "gives schema twice"),
        ("?listen=a%20b", "listen is a host:port"),
        ("?prepare=maybe", "prepare is yes or no"),
        ("?x=%zz", "not followed by two hexadecimal digits"),
        ("#x", "has no #"),
        ("?nonsense=1", "nonsense"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(rest: str, problem: str) -> None:
    with pytest.raises(StorageError, match=re.escape(problem)) as caught:
        open_storage(f"postgresql://user:pssst-secret@127.0.0.1:1/db{rest}")
    assert "pssst" not in f"{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!r}"


@pytest.mark.parametrize("url", ["postgres+x://u:pssst-secret@h/db", "mysql://u:pssst-secret@h/db?password=pssst"])
def test_unknown_kinds_of_urls_keep_their_password(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(url)
    assert "pssst" not in str(caught.value)
    assert "postgresql://host/database" in str(caught.value)


def test_a_store_opens_by_its_url(
    store: PostgresStorage, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.open_run(new_run())
    assert postgres.password not in store.url
    with pytest.raises(StorageError, match="password"):
        open_storage(store.url)
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    with open_storage(store.url) as again:
        assert again.url == store.url
        assert again.find_run("run_1") is not None
    with open_storage(postgres.with_password(store.url).replace("postgresql:", "postgres:")) as again:
        assert again.find_run("run_1") is not None
    by_socket = postgres.socket_url_of(store.url.rpartition("/")[2].replace("?", "%3F")).replace("%3F", "?")
    database, _, options = store.url.rpartition("/")[2].partition("?")
    with open_storage(f"{postgres.socket_url_of(database)}&{options}") as again:
        assert again.find_run("run_1") is not None, by_socket


def test_the_password_is_nowhere(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture, store: PostgresStorage
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = [store.url, repr(store), repr(store._database.address), str(store.get_stats())]
    for url in (postgres.url_of("absent"), postgres.url_of("postgres", user="nobody"), f"{store.url}x"):
        with pytest.raises(StorageError) as caught:
            open_storage(url)
        texts += [str(caught.value), repr(caught.value), str(caught.value.__cause__)]
    assert postgres.password not in "\n".join([*texts, caplog.text])


def test_a_wrong_password_fails_at_once(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.storage.postgres_database.FIRST_PAUSE_SECONDS", 1e9)
    with pytest.raises(StorageError, match="Check user and password"):
        PostgresStorage(postgres.url_of("postgres", password="wrong-password"))
    with pytest.raises(StorageError, match="Check the database's name"):
        PostgresStorage(postgres.url_of("absent"))


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ('port 25328 failed: FATAL: database "absent" does not exist', "Check the database's name"),
        ("port 25328 failed: FATAL: sorry, too many clients already", "out of memory or connections"),
        ("port 53028 failed: Connection refused", "Check that the server runs"),
    ],
)
def test_a_port_is_not_taken_for_a_code(said: str, advice: str) -> None:
    error = postgres_driver.load().OperationalError(f"connection failed: connection to server at 127.0.0.1, {said}")
    assert advice in str(postgres_driver.translate(error, "store", "open it"))


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "psycopg":
            raise ImportError("No module named 'psycopg'")
        return real(name, *arguments, **options)

    postgres_driver.load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    try:
        with pytest.raises(StorageError, match=re.escape("pip install 'surefoot[postgres]'")):
            PostgresStorage("postgresql://h/db")
    finally:
        monkeypatch.undo()
        postgres_driver.load.cache_clear()


def test_a_role_without_rights_is_told_what_it_lacks(postgres: PostgresServer, postgres_database: str) -> None:
    database = postgres_database.rpartition("/")[2]
    postgres.execute("DROP ROLE IF EXISTS reader")
    postgres.execute("CREATE ROLE reader LOGIN PASSWORD 'reader-secret'")
    url = postgres.url_of(database, user="reader", password="reader-secret")
    with pytest.raises(StorageError, match="Grant its role CREATE on the database"):
        PostgresStorage(f"{url}?schema=not_there")
    postgres.execute("CREATE SCHEMA given AUTHORIZATION reader", database)
    with PostgresStorage(f"{url}?schema=given") as store:  # a schema of its own is enough
        accept_one(store)
        assert store.verify().ok


def test_a_database_that_cannot_hold_every_text_is_refused(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StorageError, match="encoding is LATIN1.*ENCODING 'UTF8'"):
        PostgresStorage(postgres.url_of("latin"))
    monkeypatch.setattr(postgres_driver, "OLDEST_SERVER", 99)
    with pytest.raises(StorageError, match="needs 99 or newer"):
        PostgresStorage(postgres_url)


def accept_one(store: PostgresStorage) -> None:
    store.open_run(new_run(), "me", 600)
    accept(store, commit(1, token=1, chunks=[Chunk("a", "set", b"1")]))


# --- round trips ----------------------------------------------------------------------------------------------------


def many(store: PostgresStorage) -> None:
    accept(store, *(commit(1, f"r{number}", 1, chunks=[Chunk("a", "set", b"1")]) for number in range(50)))


CALLS: dict[str, tuple[int, Callable[[PostgresStorage], object]]] = {
    "commit": (1, lambda store: accept(store, commit(2, token=1, retention=Retention(1), state=RunState.PAUSED))),
    "commit 50": (1, many),
    "journal": (1, lambda store: accept(store, journal(("s", 1, b"x"), token=1))),
    "both": (1, lambda store: accept(store, journal(("s", 1, b"x"), token=1), commit(2, token=1, journal_done=["s"]))),
    "renew": (1, lambda store: store.renew_leases([("run_1", 1), ("r0", 1)], 600)),
    "release": (1, lambda store: store.release_lease("run_1", 1)),
    "send": (1, lambda store: store.send("run_1", "m", b"")),
    "find": (1, lambda store: store.find_run("run_1")),
    "chunks": (1, lambda store: store.read_chunks("run_1", 1)),
    "open": (2, lambda store: store.open_run(new_run("new"), "me", 600)),
    "claim": (4, lambda store: store.claim_run("run_1", "you", 600, lambda owner: False)),
}


@pytest.mark.parametrize("call", CALLS)
def test_round_trips(call: str, postgres_url: str) -> None:
    """How often a call waits for the server: a commit once, however many writes it has."""
    expected, function = CALLS[call]
    with PostgresProxy(postgres_url) as proxy, PostgresStorage(proxy.url) as store:
        accept_one(store)
        for number in range(50):
            store.open_run(new_run(f"r{number}"), "me", 600)
        before = proxy.round_trips
        function(store)
        assert proxy.round_trips - before == expected


@pytest.mark.parametrize(("options", "kept"), [("", True), ("&listen=no", False), ("&listen=no&prepare=yes", True)])
def test_statements_are_prepared_unless_there_is_a_pooler(options: str, kept: bool, postgres_url: str) -> None:
    with PostgresStorage(f"{postgres_url}&pool_size=1{options}") as store:
        store.open_run(new_run(), "me", 600)
        for sequence in range(1, 11):
            accept(store, commit(sequence, token=sequence))
            store.claim_run("run_1", "me", 600, lambda owner: False)

        def count(connection: Any, again: bool) -> Any:
            return connection.execute(b"SELECT count(*) FROM pg_prepared_statements").fetchone()[0]

        assert (store._database.run("look", count) > 0) == kept


def test_more_writes_than_one_statement_takes(store: PostgresStorage) -> None:
    store.open_run(new_run(), "me", 600)
    writes = [commit(sequence, token=1, chunks=[Chunk("n", "set", b"%d" % sequence)]) for sequence in range(1, 701)]
    accept(store, *writes)
    assert state_at(store, 700) == {"n": b"700"}


# --- odd texts ------------------------------------------------------------------------------------------------------


@given(ODD, ODD)
def test_texts_are_kept_and_kept_apart(one: str, other: str) -> None:
    assert unescaped(escaped(one)) == one
    assert "\x00" not in escaped(one)
    for text in (one, one * 4):
        entry, whole = indexed(text)
        assert text_of(entry, whole) == text
        assert len(entry.encode()) <= 1_000
    assert (indexed(one * 3)[0] == indexed(other * 3)[0]) == (one == other)


LONG = "ключ\x00" * 2_000


def test_long_names_with_nul_are_kept(store: PostgresStorage) -> None:
    """Longer than an index entry may be, which is about 2,700 bytes."""
    new = new_run(fingerprint=LONG, goal_id=LONG, executor_type=LONG, state={LONG: 1})
    store.open_run(new, "me", 600)
    accept(store, commit(1, token=1, chunks=[Chunk(LONG + "x", "set", b"2")], error=LONG, state=RunState.PAUSED))
    accept(store, journal((LONG, 1, b"1"), (LONG + "x", 1, b"2"), token=1))
    store.send("run_1", "☃" * 1_000, b"m")
    store.save_run(Run(id="run_1", goal_id=LONG))
    found = store.find_run("run_1")
    assert found is not None
    assert (found.fingerprint, found.goal_id, found.executor_type, found.error) == (LONG, LONG, LONG, LONG)
    assert store.definition(LONG) == new.definition
    assert state_at(store, 1) == {LONG: b"1", LONG + "x": b"2"}
    assert [row.step for row in store.read_journal("run_1")] == [LONG, LONG + "x"]
    assert [row.record for row in store.read_journal("run_1", LONG + "x")] == [b"2"]
    assert [message.name for message in store.read_messages("run_1")] == ["☃" * 1_000]
    assert store.list_all_goals() == [LONG]
    assert store.get_runs_by_goal("goal") == []
    assert {content.place.key for content in store.read_contents(None)} == {LONG}
    accept(store, commit(2, token=1, chunks=[Chunk(LONG, "set", b"3")], journal_done=[LONG], retention=Retention(1)))
    assert state_at(store, 2) == {LONG: b"3", LONG + "x": b"2"}
    assert [row.step for row in store.read_journal("run_1")] == [LONG + "x"]
    assert store.verify().ok


# --- messages that wait ---------------------------------------------------------------------------------------------


def test_paused_runs_with_messages_are_listed(store: PostgresStorage) -> None:
    for number in range(6):
        store.open_run(new_run(f"run_{number}"), "me", 600)
        state = RunState.PAUSED if number != 3 else RunState.FAILED
        accept(store, commit(1, f"run_{number}", 1, state=state, release=True))
        if number != 1:
            store.send(f"run_{number}", "a", b"1")
            store.send(f"run_{number}", "b", b"2")
    assert [record.run_id for record in store.list_messaged()] == ["run_0", "run_2", "run_4", "run_5"]
    assert [record.run_id for record in store.list_messaged(2)] == ["run_0", "run_2"]
    assert [record.run_id for record in store.list_messaged(2, "run_2")] == ["run_4", "run_5"]
    assert store.list_messaged(after="run_5") == []
    store.claim_run("run_4", "me", 600)
    store.delete_run("run_5")
    assert [record.run_id for record in store.list_messaged()] == ["run_0", "run_2"]


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGE = {
    "header": "UPDATE {s}.runs SET header = 'x'",
    "state": "UPDATE {s}.runs SET state = 'nonsense'",
    "counted": "UPDATE {s}.runs SET sequence = 7",
    "record": "UPDATE {s}.steps SET record = '[]'",
    "body": "UPDATE {s}.checkpoints SET body = '{}'",
    "data": "UPDATE {s}.chunks SET data = '2'",
    "op": "UPDATE {s}.chunks SET op = 9",
    "key": "UPDATE {s}.chunks SET key = 'b'",
    "journal": "UPDATE {s}.journal SET step = 't'",
    "message": "UPDATE {s}.messages SET body = 'x'",
    "document": "UPDATE {s}.documents SET body = 'x'",
    "definition": "DELETE FROM {s}.definitions",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_finds_damage(what: str, store: PostgresStorage, postgres: PostgresServer) -> None:
    accept_one(store)
    accept(store, journal(("s", 1, b"x"), token=1))
    store.send("run_1", "m", b"b")
    store.save_run(Run(id="run_1", goal_id="g"))
    assert store.verify().ok
    run_sql(postgres, store, DAMAGE[what])
    assert not store.verify().ok
    assert not store.verify("run_1").ok


def test_rows_of_no_run_are_found_and_removed(store: PostgresStorage, postgres: PostgresServer) -> None:
    accept_one(store)
    accept(store, journal(("s", 1, b"x"), token=1))
    store.send("run_1", "m", b"b")
    store.save_run(Run(id="run_1", goal_id="g"))
    run_sql(postgres, store, "INSERT INTO {s}.run_nodes VALUES ('n', 'run_1')")
    assert store.find_strays() == []
    run_sql(postgres, store, "DELETE FROM {s}.runs; DELETE FROM {s}.documents")
    found = store.find_strays()
    tables = ["steps", "checkpoints", "chunks", "journal", "messages", "definitions", "run_nodes"]
    assert [stray.name for stray in found] == tables
    assert found[0].problem == "1 commit in the log of no run that is recorded"
    store.open_run(new_run("run_2"))  # with the same definition, which is needed again
    assert [store.remove_stray(stray) for stray in found] == [True] * 5 + [False, True]
    assert store.find_strays() == []
    assert not store.remove_stray(Stray("runs", ""))
    assert store.verify().ok


def test_damaged_runs_hide_no_others(store: PostgresStorage, postgres: PostgresServer) -> None:
    accept_one(store)
    store.open_run(new_run("run_2"))
    run_sql(postgres, store, "UPDATE {s}.runs SET header = 'x' WHERE run_id = 'run_1'")
    assert [record.run_id for record in store.list_runs()] == ["run_2"]
    with pytest.raises(CorruptData, match="run_1"):
        store.find_run("run_1")
    damage: list[Damage] = []
    run_sql(postgres, store, "UPDATE {s}.steps SET crc = 0")
    assert store.read_log("run_1", on_damage=damage.append) == []
    assert [one.where for one in damage] == ["log row 1"]


# --- how it is stored -----------------------------------------------------------------------------------------------


def test_commits_are_durable_whatever_the_role_is_set_to(
    postgres: PostgresServer, store: PostgresStorage, postgres_url: str
) -> None:
    """``synchronous_commit`` that is off for a role or database is on for the transactions of a store."""
    rows = run_sql(
        postgres, store, "BEGIN; SET LOCAL synchronous_commit = off; SELECT {s}.durably(); SHOW synchronous_commit"
    )
    assert rows == [] or rows
    with PostgresStorage(f"{postgres_url}&options=-csynchronous_commit%3Doff") as lax:
        lax.open_run(new_run(), "me", 600)

        def shown(connection: Any, again: bool) -> Any:
            return connection.execute(b"SHOW synchronous_commit").fetchone()[0]

        assert lax._database.run("look", shown) == "off"
        assert lax._database.transaction("look", shown) == "on"


def test_ordinary_commits_update_no_index(store: PostgresStorage, postgres: PostgresServer) -> None:
    store.open_run(new_run(), "me", 600)
    for sequence in range(1, 21):
        accept(store, commit(sequence, token=1))
    store._database.pool.close()  # a session reports its statistics when it ends
    schema = store._database.address.schema
    question = (
        f"SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE schemaname = '{schema}' AND relname = 'runs'"
    )
    for _ in range(500):
        updated, hot = run_sql(postgres, store, question)[0]
        if updated == 20:
            break
    assert (updated, hot) == (20, 20)


def test_many_runs_are_listed_by_index(store: PostgresStorage, postgres: PostgresServer) -> None:
    """What workers ask every second reads only what it finds, however many runs are done."""
    store.open_run(new_run(), "me", 600)
    run_sql(
        postgres,
        store,
        "INSERT INTO {s}.runs (run_id, executor_type, goal_id, fingerprint, header, facts_crc, state, created_at, "
        "updated_at, token, lease_until, made_key) SELECT 'done_' || n, '', '', '', '', 0, 'completed', n, n, 1, 0, 0 "
        "FROM generate_series(1, 20000) AS n; ANALYZE {s}.runs",
    )
    conditions = {
        "runs_by_lease": "state = 'running' AND lease_until <= 5",
        "runs_by_waking": "state = 'paused' AND wake_at <= 5 ORDER BY wake_at, run_id LIMIT 10",
        "runs_messaged": "state = 'paused' AND messaged AND run_id > 'a' ORDER BY run_id LIMIT 10",
        "runs_by_state": "state = 'failed' ORDER BY created_at DESC, run_id DESC LIMIT 10",
        "runs_run_id_key": "run_id LIKE 'done\\_77%' ORDER BY run_id LIMIT 10",
        "runs_by_creation": "true ORDER BY created_at DESC, run_id DESC LIMIT 10",
    }
    for index, condition in conditions.items():
        plan = "\n".join(
            row[0] for row in run_sql(postgres, store, f"EXPLAIN SELECT * FROM {{s}}.runs WHERE {condition}")
        )
        assert index in plan, plan
