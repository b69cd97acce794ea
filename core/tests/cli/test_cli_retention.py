"""Retention on the command line: policies, pins, and the store made small."""

from __future__ import annotations

import io
import re
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from framework.runner.cli.exits import CommandError
from framework.runner.cli.output import Screen
from framework.runner.cli.pruning import _preview
from framework.runner.cli.retention_options import RETENTION_VARIABLE, chosen_policy, swept
from framework.runner.cli.running import Stopped
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import RunState
from framework.storage.contract import Writer
from framework.storage.contract_retention import ended
from framework.storage.memory import MemoryStorage
from framework.storage.retention_records import Removed, SweepReport
from framework.storage.sqlite import SQLiteStorage
from tests.cli.cli_kit import Done, Site
from tests.cli.runs_kit import Command

Here = Callable[..., Done]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')


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
def command(store: str, tmp_path: Path) -> Command:
    return Command(store, tmp_path)


def test_a_policy_is_shown_and_carried_out(command: Command) -> None:
    words = ("checkpoints", "prune", "--keep-completed", "1", "--keep-failed", "0")
    shown = command(*words, "--dry-run")
    assert shown.code == 0, shown.err
    assert shown.out.splitlines()[:2] == [
        "3 runs: not among the newest 1",
        "RUN      STATE        PARTS  LAST CHANGE     SIZE",
    ]
    assert "1 run: none of its kind is kept" in shown.out
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


def test_runs_can_be_told_apart_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", shown := Terminal())
    rule = "the store holds more than 2,147,483,648 bytes"
    names = [f"tenant-17/customer-onboarding-2026-11-23-europe-{number:06}" for number in range(12)]
    report = SweepReport(now=1e9, runs=12, checkpoints=3, rules={rule: 12})
    report.removed += [Removed(name, RunState.COMPLETED, 9e8, 2, 5_000_000, rule) for name in names]
    _preview(Screen(no_color=True), report, RetentionPolicy(max_age=timedelta(days=30)))
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.getvalue().splitlines()]
    assert lines[0] == f"12 runs: {rule}"
    assert [line.split()[0][-17:] for line in lines[2:12]] == [name[-17:] for name in names[:10]]
    assert lines[12:] == ["and 2 more", "", "3 checkpoints of runs that stay: older than 30 d"]
    assert max(map(len, lines)) <= 80
    assert rule not in "".join(lines[1:])


def test_old_checkpoints_are_shown_and_asked_about(command: Command, tmp_path: Path) -> None:
    command("checkpoints", "pin", "many", "2")
    words = ("checkpoints", "prune", "--max-age", "0s", "--keep-completed", "99")
    shown = command(*words, "--dry-run")
    assert "2 checkpoints of runs that stay: older than 0 s" in shown.out
    assert "2 old checkpoints" in shown.out
    unasked = command(*words)
    assert (unasked.code, "--yes" in unasked.err) == (2, True)
    with SQLiteStorage(tmp_path / "kept.db") as storage:
        assert [row.sequence for row in storage.read_checkpoint_rows("many")] == [4, 3, 2, 1]
    done = command(*words, "--yes", "-o", "json").json
    assert (done["checkpoints"], done["dry_run"]) == (2, False)


def test_nothing_but_what_is_left_over_goes_unasked(
    store: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sweep left that was killed is removed by the next, though there is nothing to ask about."""
    with SQLiteStorage(tmp_path / "kept.db") as storage:
        big = ended(storage, "big", size=500_000)
        storage.retire_runs([big], [RunState.COMPLETED])
        assert storage._db.execute("SELECT count(*) FROM retired").fetchone()[0] == 1
    sweep = SQLiteStorage.sweep
    policies: list[RetentionPolicy] = []

    def seen(storage: SQLiteStorage, policy: RetentionPolicy, **options: Any) -> SweepReport:
        policies.append(policy)
        return sweep(storage, policy, **options)

    monkeypatch.setattr(SQLiteStorage, "sweep", seen)
    done = here("checkpoints", "prune", "--storage", store, "--max-age", "9d", "-o", "json").document
    assert (done["runs"], done["checkpoints"], done["dry_run"]) == (0, 0, False)
    assert done["given_back_bytes"] > 400_000
    # Between the two something may have become old enough, which nobody has seen.
    assert [each.is_empty for each in policies] == [False, True]


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


# --- sweeps beside commands -----------------------------------------------------------------------------------------


def keep_some(site: Site, count: int = 3) -> None:
    """Completed runs in the site's store, older than what a command makes."""
    with SQLiteStorage(site.folder / "runs.db") as storage:
        for number in range(count):
            ended(storage, f"old-{number}")


def ids_in(site: Site) -> list[str]:
    with SQLiteStorage(site.folder / "runs.db") as storage:
        return sorted(run.run_id for run in storage.list_runs())


def test_a_run_that_ends_before_a_sweep_makes_one(site: Site, here: Here) -> None:
    keep_some(site)
    done = here("run", site.agent, *INPUT, "--run-id", "new", "--retention", "keep_completed=1", "-q")
    assert done.code == 0, done.err
    assert done.document["success"] is True
    assert ids_in(site) == ["new"]


def test_the_environment_has_a_policy_for_recovery(site: Site, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_some(site)
    monkeypatch.setenv(RETENTION_VARIABLE, "keep_completed=1")
    assert here("recover", "--dry-run").code == 0
    assert len(ids_in(site)) == 3, "a look removes nothing"
    assert here("recover").out == "No run has crashed, and none is due.\n"
    assert ids_in(site) == ["old-2"]
    assert here("recover", "--retention", "keep_completed=0").code == 0
    assert ids_in(site) == []


@pytest.fixture
def swept_soon(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a sweep was made; the first begins at once."""
    made = threading.Event()
    sweep = SQLiteStorage.sweep

    def seen(storage: SQLiteStorage, *arguments: Any, **options: Any) -> SweepReport:
        report = sweep(storage, *arguments, **options)
        made.set()
        return report

    monkeypatch.setattr(SQLiteStorage, "sweep", seen)
    monkeypatch.setattr("framework.storage.sweeping_background._LONGEST_FIRST_WAIT", 0.0)
    return made


def test_a_shell_sweeps_while_it_is_open(
    site: Site, here: Here, swept_soon: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_some(site)
    monkeypatch.setattr("sys.stdin", _Waits(swept_soon))
    assert here("shell", site.agent, "--retention", "keep_completed=1").code == 0
    assert ids_in(site) == ["old-2"]


def test_a_worker_sweeps_and_says_what_it_removes(
    site: Site, here: Here, swept_soon: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        assert swept_soon.wait(30)
        raise Stopped(signal.SIGTERM)

    keep_some(site)
    monkeypatch.setattr("framework.runner.cli.recovering.run_to_end", work)
    done = here("recover", "--watch", "--retention", "keep_completed=1")
    assert done.code == 128 + signal.SIGTERM
    assert "Finished runs are removed by keep_completed=1." in done.err
    assert "Retention removed 2 runs." in done.err
    assert ids_in(site) == ["old-2"]


class _Waits:
    """An input that ends when something has happened."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        assert self._event.wait(30)
        return ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "agent", "--retention", "max_age"), "--retention: 'max_age' is not name=value"),
        (("run", "agent", "--retention", "max_age=1d", "--no-checkpoints"), "--no-checkpoints does not use"),
        (("shell", "agent", "--retention", "keep=3"), "--retention: there is no keep"),
        (("recover", "--watch", "--retention", ""), "--retention is empty"),
    ],
)
def test_a_policy_beside_a_command_is_checked_first(here: Here, words: tuple[str, ...], message: str) -> None:
    done = here(*words)
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_last_sweep_that_fails_is_no_failure_of_the_command(caplog: pytest.LogCaptureFixture) -> None:
    with MemoryStorage() as storage, swept(storage, RetentionPolicy(keep_completed=0)) as sweeps:
        assert sweeps is not None
        storage.close()
        sweeps.at_least_once()
    assert "The store was not swept" in caplog.text


# --- by number ------------------------------------------------------------------------------------------------------


def test_pruning_by_number_does_what_it_said_and_gives_room_back(here: Here, tmp_path: Path) -> None:
    with SQLiteStorage(tmp_path / "kept.db") as storage:
        for run_id in ("whole", "damaged", "newest damaged", "states damaged", "pinned", "short"):
            writer = Writer(storage, run_id)
            for number in range(2 if run_id == "short" else 8):
                writer.write({"a": f"{number}" * 50_000})
        storage.pin("pinned", "ckpt_4")
        for run_id, sequence in (("damaged", 6), ("newest damaged", 8), ("newest damaged", 7)):
            where = "run_pk = (SELECT pk FROM runs WHERE run_id = ?) AND sequence = ?"
            storage._db.execute(f"UPDATE checkpoints SET crc = 0 WHERE {where}", (run_id, sequence))
        # Their rows can be read, and what they are of cannot: the fifth is the newest that can, and stays.
        where = "run_pk = (SELECT pk FROM runs WHERE run_id = 'states damaged') AND sequence > 5"
        storage._db.execute(f"UPDATE chunks SET checksum = x'00' WHERE {where}")
        url = storage.url
    words = ("checkpoints", "prune", "--all", "--keep", "3", "--storage", url, "-o", "json")
    foretold = here(*words, "--dry-run").document
    assert foretold == {"keep": 3, "would_remove": 5 + 5 + 5 + 4 + 4, "removed": 0, "runs": 5}
    done = here(*words, "--yes").document
    assert (done["removed"], done["would_remove"], done["runs"]) == (23, 23, 5)
    assert done["used_bytes_before"] - done["used_bytes_after"] > 15 * 50_000
    assert done["given_back_bytes"] > 15 * 50_000
    assert here(*words, "--dry-run").document["would_remove"] == 0


@pytest.mark.parametrize(
    ("words", "step", "said"),
    [
        (("--all", "--keep", "1"), "prune", "Removed 1 checkpoint until now. The same command goes on."),
        (("--keep-completed", "0"), "purge", "Removed 4 runs until now. The same command goes on."),
    ],
)
def test_an_interrupted_prune_says_what_is_gone(
    words: tuple[str, ...], step: str, said: str, store: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    carry_out = getattr(SQLiteStorage, step)

    def interrupted(*arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return carry_out(*arguments)

    monkeypatch.setattr(SQLiteStorage, step, interrupted)
    monkeypatch.setattr("framework.storage.sweeping._FIRST_AT_ONCE", 1)
    monkeypatch.setattr("framework.storage.sweeping._STEP_SECONDS", 60.0)
    done = here("checkpoints", "prune", "--storage", store, *words, "--yes")
    assert (done.code, said in done.err) == (130, True), done.err
