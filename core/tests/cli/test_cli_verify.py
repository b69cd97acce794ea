"""``surefoot checkpoints verify --repair`` and what ``surefoot doctor`` says of a store, as a user types them."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.contract import accept, commit, new_run
from framework.storage.encryption import KeyRing
from framework.storage.encryption_keys import write_key_file
from framework.storage.ownership import new_owner, retire
from framework.storage.sqlite import SQLiteStorage
from tests import forks
from tests.cli.cli_kit import CORE, Done, Site
from tests.cli.runs_kit import DONE, Command

Here = Callable[..., Done]


def owner_that_is_gone() -> str:
    program = "from framework.storage.ownership import new_owner; print(new_owner())"
    environment = {**os.environ, "PYTHONPATH": str(CORE)}
    ended = forks.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def change(own: Command, statement: str) -> None:
    with sqlite3.connect(own.folder / "runs.db") as db:
        assert db.execute(statement).rowcount > 0
    db.close()


@pytest.fixture
def strays(own: Command) -> Command:
    change(own, f"DELETE FROM runs WHERE run_id = '{DONE}'")
    return own


def test_repair_says_what_it_will_do_and_did(strays: Command) -> None:
    found = strays("checkpoints", "verify")
    assert found.code == 1
    assert "nothing is damaged" in found.out
    assert "commits in the log of no run that is recorded" in found.out
    assert "--repair: remove it" in found.out
    assert "surefoot checkpoints verify --repair" in found.err
    asked = strays("checkpoints", "verify", "--repair")
    assert (asked.code, "--yes" in asked.err) == (2, True)
    dry = strays("checkpoints", "verify", "--repair", "--dry-run")
    assert (dry.code, "Nothing was changed" in dry.err) == (1, True)
    assert strays("checkpoints", "verify", "-o", "json").json["findings"]
    done = strays("checkpoints", "verify", "--repair", "--yes", "-o", "json")
    assert done.code == 0
    assert done.json["ok"] is True
    assert {each["where"] for each in done.json["repaired"]} >= {"steps", "checkpoints", "chunks"}
    assert all(each["done"] for each in done.json["repaired"])
    again = strays("checkpoints", "verify", "--repair")
    assert (again.code, "nothing that can be mended" in again.out) == (0, True)


def test_what_is_damaged_is_kept(own: Command) -> None:
    change(own, "UPDATE steps SET crc = 0 WHERE sequence = 2")
    done = own("checkpoints", "verify", "--repair", "--yes", "-o", "json")
    assert (done.code, done.json["ok"]) == (1, False)
    assert {each["kind"] for each in done.json["repaired"]} <= {"lease"}
    assert any("kept" in each["advice"] for each in done.json["findings"])
    assert own("checkpoints", "verify", "--evidence").code == 2


def test_leases(own: Command) -> None:
    with open_storage(own.url) as store:
        store.open_run(new_run("held"), owner_that_is_gone(), 60)
        store.open_run(new_run("far"), "another machine", 90 * 86_400)
    found = own("checkpoints", "verify", "-o", "json")
    assert found.code == 1
    by_run = {each["run_id"]: each for each in found.json["findings"]}
    assert "its process is gone" in by_run["held"]["problem"]
    assert (by_run["held"]["serious"], by_run["far"]["serious"]) == (False, True)
    assert by_run["far"]["repair"] is None
    doctor = own("doctor")
    assert doctor.code == 1
    assert "far: its lease lasts 90 days more" in doctor.out
    mended = own("checkpoints", "verify", "held", "--repair", "--yes")
    assert mended.code == 0
    assert "held: its lease was released" in mended.out


def flat(text: str) -> str:
    return " ".join(text.split())


def test_doctor_tells_of_runs_whose_processes_are_gone(here: Here, site: Site) -> None:
    owner = new_owner()
    retire(owner)
    with open_storage(site.url) as store:
        store.open_run(new_run("held"), owner, 600)
    one = here("doctor")
    assert one.code == 0
    said = flat(one.out)
    assert "! leases 1 run is held by a process that is gone, for 10 minutes more `surefoot recover` takes it" in said
    assert "it over at once on this machine; others wait for the lease, or release it: `surefoot checkpoints" in said
    assert "! crashed 1 run has lost its process `surefoot recover` resumes it." in said
    assert "No problems, 2 warnings." in one.out
    with open_storage(site.url) as store:
        store.open_run(new_run("again"), owner, 10_800)
    two = flat(here("doctor").out)
    assert "! leases 2 runs are held by processes that are gone, for up to 3 hours more" in two
    assert "takes them over at once on this machine; others wait for the leases, or release them:" in two
    assert "! crashed 2 runs have lost their processes `surefoot recover` resumes them." in two
    with open_storage(site.url) as store:
        for run_id in ("held", "again"):
            accept(store, commit(1, run_id, token=1, state=RunState.PAUSED))
    paused = flat(here("doctor").out)
    assert "A resume takes them over at once on this machine" in paused
    assert "crashed" not in paused


def test_doctor_tells_of_strays(strays: Command) -> None:
    done = strays("doctor")
    assert done.code == 1
    assert "of no run that is recorded" in done.out
    assert "verify --repair" in done.out


def test_a_damaged_log_is_told_before_the_store_is_opened(own: Command, tmp_path: Path) -> None:
    source = tmp_path / "source.db"
    with SQLiteStorage(source) as store:
        for number in range(5):
            store.open_run(new_run(f"run_{number}"))
        database, log = source.read_bytes(), bytearray(Path(f"{source}-wal").read_bytes())
    log[-5_000] ^= 1
    path = tmp_path / "torn.db"
    path.write_bytes(database)
    Path(f"{path}-wal").write_bytes(log)
    for words in (["checkpoints", "verify"], ["doctor"]):
        done = own(*words, "--storage", f"sqlite:///{path}")
        assert done.code == 1
        assert "does not match its checksum, and 1 commit" in done.out
    document = own("checkpoints", "verify", "--storage", f"sqlite:///{path}", "-o", "json")
    assert (document.code, document.json["ok"]) == (1, False)
    assert Path(f"{path}-wal").read_bytes() == bytes(log)  # what could be saved by hand still is


def test_doctor_says_how_a_store_is_encrypted(own: Command) -> None:
    plain = {check["name"]: check for check in own("doctor", "-o", "json").json["store"]}
    assert (plain["encryption"]["verdict"], plain["encryption"]["text"]) == ("off", "none")
    url, file = f"sqlite:///{own.folder}/new.db", own.folder / "keys"
    ring = KeyRing([("k1", b"1" * 32), ("k2", b"2" * 32)])
    write_key_file(file, ring)
    with open_storage(url, ring) as store:
        store.open_run(new_run())
    done = own("doctor", "--storage", url, "--key-file", str(file), "-o", "json")
    said = {check["name"]: check for check in done.json["store"]}
    assert said["encryption"]["text"] == "AES-256-GCM, key k2; to decrypt: k1"
    assert said["verify"]["verdict"] == "ok"
    refused = own("doctor", "--storage", url)
    assert refused.code == 1
    assert "SUREFOOT_ENCRYPTION_KEYS" in refused.out
    keyed = own("doctor", env={"SUREFOOT_ENCRYPTION_KEYS": ring.lines()})
    assert ring.lines().split(":")[1][:20] not in keyed.out
