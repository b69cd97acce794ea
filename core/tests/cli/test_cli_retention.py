"""Retention on the command line: policies, pins, and the store made small."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from framework.runner.cli.exits import CommandError
from framework.runner.cli.retention_options import RETENTION_VARIABLE, chosen_policy, swept
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.contract import Writer
from framework.storage.contract_retention import ended
from framework.storage.memory import MemoryStorage
from framework.storage.sqlite import SQLiteStorage
from tests.cli.runs_kit import Command, Forks


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store of five finished runs, one with a part, a paused and a running one."""
    with SQLiteStorage(tmp_path / "kept.db") as storage:
        for number in range(4):
            ended(storage, f"order-{number}", size=50_000)
        ended(storage, "order-0-part", parent="order-0")
        ended(storage, "lost", RunState.FAILED)
        ended(storage, "waiting", RunState.PAUSED)
        writer = Writer(storage, "many")
        for number in range(4):
            writer.write({"a": number})
        return storage.url


@pytest.fixture
def command(store: str, tmp_path: Path, forks: Forks) -> Command:
    return Command(store, tmp_path, forks)


def test_a_policy_is_shown_and_carried_out(command: Command) -> None:
    words = ("checkpoints", "prune", "--keep-completed", "1", "--keep-failed", "0")
    shown = command(*words, "--dry-run")
    assert shown.code == 0, shown.err
    assert "order-0 (+1 part)" in shown.out
    assert "not among the newest 1" in shown.out
    assert "Would remove 4 runs, with 1 part." in shown.out
    foretold = command(*words, "--dry-run", "-o", "json").json
    assert (foretold["runs"], foretold["dry_run"], foretold["policy"]) == (
        4,
        True,
        {"keep_completed": 1, "keep_failed": 0},
    )
    unasked = command(*words)
    assert unasked.code == 2
    assert "--yes" in unasked.err
    done = command(*words, "--yes", "-o", "json").json
    assert [each["run_id"] for each in done["removed"]] == [each["run_id"] for each in foretold["removed"]]
    assert (done["runs"], done["parts"], done["dry_run"], done["complete"]) == (4, 1, False, True)
    assert "nothing to prune by these rules" in command(*words, "--yes").out
    left = {each["run_id"] for each in command("runs", "list", "-o", "json").json["runs"]}
    assert left == {"order-3", "waiting", "many"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Say what stays"),
        (("many",), "--keep N"),
        (("--all",), "--keep N"),
        (("--keep", "1"), "Name a RUN"),
        (("--keep", "1", "--all", "--max-age", "1d"), "--max-age"),
        (("--max-age", "30"), "--max-age: '30' is no age; write a number and s, m, h, d or w"),
        (("--max-total-bytes", "lots"), "--max-total-bytes: 'lots' is no size"),
        (("--keep-failed", "-3"), "--keep-failed"),
    ],
)
def test_a_policy_that_is_none_says_what_to_write(command: Command, words: tuple[str, ...], message: str) -> None:
    done = command("checkpoints", "prune", *words, "--yes")
    assert done.code == 2
    assert message in done.err


def test_the_policy_of_the_environment(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("checkpoints", "prune", "--yes", "-o", "json", env={RETENTION_VARIABLE: "keep_completed=0"}).json
    assert (done["runs"], done["parts"]) == (4, 1)
    assert chosen_policy("max_age=1d") == RetentionPolicy(max_age=timedelta(days=1))
    monkeypatch.setenv(RETENTION_VARIABLE, "keep=0")
    with pytest.raises(CommandError, match=r"\$SUREFOOT_RETENTION: there is no keep"):
        chosen_policy(None)
    with pytest.raises(CommandError, match="--retention is empty"):
        chosen_policy("")
    monkeypatch.delenv(RETENTION_VARIABLE)
    assert chosen_policy(None) is None


def test_sweeps_beside_a_command() -> None:
    with MemoryStorage() as storage, swept(storage, None), swept(storage, RetentionPolicy(max_age=timedelta(days=1))):
        assert storage.list_runs() == []


def test_pins_are_set_shown_and_honoured(command: Command) -> None:
    def call(*words: str) -> str:
        done = command(*words)
        assert done.code == 0, done.err
        return done.out

    assert "Run order-1 is pinned." in call("runs", "pin", "order-1", "--note", "audit 17")
    assert "Checkpoint 2 of run many is pinned." in call("checkpoints", "pin", "many", "2")
    assert "audit 17" in call("runs", "show", "order-1")
    assert "checkpoint 2" in call("runs", "show", "many")
    shown = command("runs", "show", "many", "-o", "json").json
    assert [(pin["sequence"], pin["checkpoint_id"]) for pin in shown["pins"]] == [(2, "ckpt_2")]
    assert "PINNED" in call("runs", "list")
    listed = command("checkpoints", "list", "many", "-o", "json").json["checkpoints"]
    assert [each["pinned"] for each in listed] == [False, True, False, False]
    assert "Removed 2 checkpoints." in call("checkpoints", "prune", "many", "--keep", "1", "--yes")
    pruned = call("checkpoints", "prune", "--keep-completed", "0", "--yes")
    assert "1 run: it is pinned" in pruned
    refused = command("runs", "delete", "order-1", "--yes")
    assert (refused.code, "--force" in refused.err) == (5, True)
    assert "is no longer pinned" in call("checkpoints", "unpin", "many", "2")
    assert "was not pinned" in call("checkpoints", "unpin", "many", "2")
    assert command("checkpoints", "pin", "many", "3").code == 4
    assert "Deleted 1 run." in call("runs", "delete", "order-1", "--force", "--yes")
    assert "Run waiting was not pinned." in call("runs", "unpin", "waiting")


def test_a_store_is_compacted(command: Command, tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "kept.db") as storage:
        ended(storage, "big", size=2_000_000)
        storage.delete_run("big")
    assert "are free" in command("storage", "compact", "--dry-run").err
    done = command("storage", "compact", "--yes", "-o", "json").json
    assert done["freed_bytes"] > 1_900_000
    assert done["can_shrink"] is True
