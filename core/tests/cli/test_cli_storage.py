"""``surefoot storage`` and ``--key-file``, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.runner.runner import AgentRunner
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.contract import new_run
from framework.storage.encryption import EncryptedStorage, KeyRing
from framework.storage.encryption_keys import write_key_file
from tests.cli.cli_kit import Site
from tests.cli.runs_kit import DONE, PAUSED, Command

MARKER = b"Dear reader"


@pytest.fixture
def key_file(own: Command) -> Path:
    file = own.folder / "keys"
    made = own("storage", "new-key", str(file), "first")
    assert made.code == 0
    assert "only you can read it" in made.out
    assert file.stat().st_mode & 0o777 == 0o600
    return file


@pytest.fixture
def idle(own: Command) -> Command:
    """A store in which nobody holds a run."""
    with open_storage(own.url) as store:
        for record in store.list_runs([RunState.RUNNING]):
            store.release_lease(record.run_id, record.token)
    return own


@pytest.fixture
def encrypted(idle: Command, key_file: Path) -> Command:
    done = idle("storage", "encrypt", "--key-file", str(key_file), "--yes")
    assert done.code == 0, done.err
    return idle


def files_of(command: Command) -> bytes:
    return b"".join(path.read_bytes() for path in command.folder.glob("runs.db*"))


def test_a_store_in_use_is_not_encrypted(own: Command, key_file: Path) -> None:
    with open_storage(own.url) as store:
        store.open_run(new_run("held"), "another machine", 600)
    done = own("storage", "encrypt", "--key-file", str(key_file), "--yes")
    assert (done.code, "'held' is running" in done.err) == (1, True)


def test_a_store_is_encrypted_and_used(idle: Command, key_file: Path) -> None:
    before = idle("runs", "list", "-o", "json").json
    assert MARKER in files_of(idle)
    asked = idle("storage", "encrypt", "--key-file", str(key_file))
    assert (asked.code, "--yes" in asked.err) == (2, True)
    dry = idle("storage", "encrypt", "--key-file", str(key_file), "--dry-run", "-o", "json")
    assert (dry.code, dry.json["replaced"], dry.json["would_encrypt"] > 10) == (0, 0, True)
    refused = idle("runs", "list", "--key-file", str(key_file))
    assert refused.code == 1
    assert "surefoot storage encrypt" in refused.err
    done = idle("storage", "encrypt", "--key-file", str(key_file), "--yes", "-o", "json")
    assert (done.code, done.json["replaced"], done.json["left"]) == (0, dry.json["would_encrypt"], {})
    assert idle("runs", "list", "--key-file", str(key_file), "-o", "json").json == before
    without = idle("runs", "list")
    assert without.code == 1
    assert "SUREFOOT_ENCRYPTION_KEYS" in without.err
    shown = idle("checkpoints", "show", DONE, "-k", "text", env={"SUREFOOT_ENCRYPTION_KEY_FILE": str(key_file)})
    assert shown.out == "Dear reader\n"
    by_variable = idle("runs", "show", PAUSED, env={"SUREFOOT_ENCRYPTION_KEYS": key_file.read_text()})
    assert by_variable.code == 0
    again = idle("storage", "encrypt", "--key-file", str(key_file), "--yes")
    assert (again.code, "nothing to encrypt" in again.out) == (0, True)


def test_keys_are_changed(encrypted: Command, key_file: Path) -> None:
    file = ["--key-file", str(key_file)]
    listed = encrypted("storage", "keys", *file, "-o", "json").json["keys"]
    assert [(each["id"], each["encrypts"]) for each in listed] == [("first", True)]
    count = listed[0]["contents"]
    added = encrypted("storage", "new-key", str(key_file), "second")
    assert "rotate-keys" in added.err
    kept = encrypted("storage", "drop-key", str(key_file), "first")
    assert kept.code == 1
    assert f"still needed: {count:,} contents" in kept.err
    done = encrypted("storage", "rotate-keys", *file)
    assert done.code == 0
    assert f"{count:,} contents" in done.out
    assert "may be dropped" in done.err
    listed = encrypted("storage", "keys", *file, "-o", "json").json["keys"]
    assert [(each["id"], each["contents"]) for each in listed] == [("first", 0), ("second", count)]
    table = encrypted("storage", "keys", *file).out
    assert "not needed any more" in table
    assert encrypted("storage", "drop-key", str(key_file), "first").code == 0
    assert KeyRing.from_file(key_file).ids == ("second",)
    assert encrypted("checkpoints", "verify", *file).code == 0


def test_with_another_key_nothing_is_taken_for_broken(encrypted: Command) -> None:
    other = encrypted.folder / "other"
    encrypted("storage", "new-key", str(other), "other")
    for words in (["runs", "list"], ["checkpoints", "verify"], ["runs", "show", DONE], ["storage", "rotate-keys"]):
        done = encrypted(*words, "--key-file", str(other))
        assert done.code == 1
        assert "'first'" in done.err
        assert "damage" not in done.err


def test_mistakes_are_told(own: Command, key_file: Path, tmp_path: Path) -> None:
    assert own("storage", "keys").code == 2
    key_file.chmod(0o644)
    opened = own("runs", "list", "--key-file", str(key_file))
    assert (opened.code, "chmod 600" in opened.err) == (1, True)
    missing = own("runs", "list", "--key-file", str(tmp_path / "none"))
    assert (missing.code, "cannot be read" in missing.err) == (1, True)
    bad = own("runs", "list", env={"SUREFOOT_ENCRYPTION_KEYS": "a:c2VjcmV0LXZhbHVl"})
    assert (bad.code, "$SUREFOOT_ENCRYPTION_KEYS cannot be read" in bad.err) == (1, True)
    assert "c2VjcmV0LXZhbHVl" not in bad.err
    twice = own("storage", "new-key", str(key_file), "first")
    assert twice.code == 1


def test_two_new_keys_on_one_day_have_names_of_their_own(own: Command, tmp_path: Path) -> None:
    keys = tmp_path / "some.keys"
    for _ in range(3):
        assert own("storage", "new-key", str(keys)).code == 0
    first, second, third = KeyRing.from_file(keys).ids
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_a_new_store_is_encrypted_from_the_start(own: Command, key_file: Path) -> None:
    url = f"sqlite:///{own.folder}/new.db"
    with open_storage(url, KeyRing.from_file(key_file)) as store:
        assert isinstance(store, EncryptedStorage)
    listed = own("runs", "list", "--storage", url, "--key-file", str(key_file), "-o", "json")
    assert (listed.code, listed.json["runs"]) == (0, [])


def test_an_agent_runs_on_an_encrypted_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    file, url = site.folder / "keys", f"sqlite:///{site.folder}/secret.db"
    write_key_file(file, KeyRing([("k1", b"1" * 32)]))
    words = ["run", site.agent, "-i", '{"place": "Utrecht", "buyer": "Ann"}', "--run-id", "house", "--storage", url]
    failed = site.call(*words, FAIL="build", SUREFOOT_ENCRYPTION_KEY_FILE=str(file))
    assert failed.code == 1
    assert "no bricks left" in failed.out + failed.err
    resumed = site.call("resume", "house", "--storage", url, "--key-file", file)
    assert resumed.code == 0, resumed.err
    found = b"".join(path.read_bytes() for path in site.folder.glob("secret.db*"))
    assert b"house" in found  # the run's id
    assert b"Utrecht" not in found
    assert b"no bricks" not in found
    monkeypatch.setenv("SUREFOOT_ENCRYPTION_KEY_FILE", str(file))
    with AgentRunner.load(site.agent, storage=url) as runner:
        assert isinstance(runner.storage, EncryptedStorage)
