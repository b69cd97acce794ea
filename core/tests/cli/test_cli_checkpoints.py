"""``surefoot checkpoints``, as a user types it."""

from __future__ import annotations

import re
import sqlite3
from datetime import datetime

import pexpect
import pytest

from tests.cli.runs_kit import CANCELLED, DONE, FAILED, PAUSED, PLAN, Command


def test_list_shows_the_kept_checkpoints_oldest_first(filled: Command) -> None:
    lines = filled("checkpoints", "list", DONE).out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["1", "draft"], ["2", "ask"], ["3", "send"]]
    assert "completed" in lines[3]
    listed = filled("checkpoints", "list", DONE, "-o", "json").json
    assert [(each["sequence"], each["next"]) for each in listed["checkpoints"]] == [
        (1, ["ask#1"]),
        (2, ["send#1"]),
        (3, []),
    ]
    assert all(datetime.fromisoformat(each["at"]).timestamp() > 1e9 for each in listed["checkpoints"])


def test_show_by_number_by_id_and_the_latest(filled: Command) -> None:
    listed = filled("checkpoints", "list", DONE, "-o", "json").json["checkpoints"]
    by_number = filled("checkpoints", "show", DONE, "2", "-o", "json").json
    assert by_number == filled("checkpoints", "show", DONE, listed[1]["id"], "-o", "json").json
    assert by_number["position"]["next"] == ["send#1"]
    assert "sent" not in by_number["state"]
    latest = filled("checkpoints", "show", DONE, "-o", "json").json
    assert (latest["sequence"], latest["state"]["sent"]) == (3, "sent")
    start = filled("checkpoints", "show", DONE, "0", "-o", "json").json
    assert start["state"] == {"to": "reader", "approved": True, "by": "me"}
    text = filled("checkpoints", "show", DONE, "2").out
    assert "after        ask" in text
    assert "Dear reader" in text


def test_one_key_is_printed_as_it_is(filled: Command) -> None:
    assert filled("checkpoints", "show", DONE, "--key", "text").out == "Dear reader\n"
    assert filled("checkpoints", "show", PAUSED, "-k", "note").out == '["a", "b"]\n'
    missing = filled("checkpoints", "show", DONE, "-k", "nothing")
    assert missing.code == 4
    assert "text" in missing.err


def test_a_checkpoint_that_is_not_kept_is_not_found(filled: Command) -> None:
    for words in (["show", DONE, "9"], ["diff", DONE, "1", "9"], ["show", DONE, "ckpt_of_nobody"]):
        done = filled("checkpoints", *words)
        assert done.code == 4
        assert "1 to 3" in done.err
    assert filled("checkpoints", "show", "nobody").code == 4


def test_diff_names_what_changed(filled: Command) -> None:
    done = filled("checkpoints", "diff", DONE, "2")
    assert done.code == 0
    assert re.search(r"^\+ +sent +sent$", done.out, re.MULTILINE)
    assert re.search(r"^~ +status +in_progress +completed$", done.out, re.MULTILINE)
    changes = filled("checkpoints", "diff", DONE, "0", "1", "-o", "json").json["changes"]
    assert {
        "where": "state",
        "key": "text",
        "path": "text",
        "kind": "added",
        "old": None,
        "new": "Dear reader",
    } in changes
    assert "+ Dear reader" in filled("checkpoints", "diff", DONE, "0", "1", "--full").out
    assert "the same" in filled("checkpoints", "diff", DONE, "2", "2").out


def test_verify_is_silent_about_a_whole_store_and_says_what_is_damaged(own: Command) -> None:
    whole = own("checkpoints", "verify")
    assert (whole.code, "nothing is damaged" in whole.out) == (0, True)
    with sqlite3.connect(own.folder / "runs.db") as db:
        changed = db.execute(
            "UPDATE checkpoints SET body = CAST(body AS BLOB) || x'20' WHERE sequence = 2 AND run_pk = "
            "(SELECT pk FROM runs WHERE run_id = ?)",
            [DONE],
        ).rowcount
    db.close()
    assert changed == 1
    damaged = own("checkpoints", "verify")
    assert damaged.code == 1
    assert DONE in damaged.out
    assert own("checkpoints", "verify", FAILED).code == 0
    report = own("checkpoints", "verify", DONE, "-o", "json")
    assert (report.code, report.json["ok"], report.json["damage"][0]["sequence"]) == (1, False, 2)
    listed = own("checkpoints", "list", DONE)
    assert listed.code == 0
    assert "damaged" in listed.err
    broken = own("checkpoints", "show", DONE, "2")
    assert broken.code == 1
    assert "damaged" in broken.err


def test_prune_shows_asks_and_keeps_the_newest(own: Command) -> None:
    unasked = own("checkpoints", "prune", DONE, "--keep", "1")
    assert unasked.code == 2
    assert "2 checkpoints of 1 run would go" in unasked.out
    assert own("checkpoints", "prune", DONE, "--keep", "1", "--dry-run").code == 0
    assert len(own("checkpoints", "list", DONE, "-o", "json").json["checkpoints"]) == 3
    assert own("checkpoints", "prune", DONE, "--keep", "1", "-y", "-o", "json").json["removed"] == 2
    assert [each["sequence"] for each in own("checkpoints", "list", DONE, "-o", "json").json["checkpoints"]] == [3]
    assert "nothing to prune" in own("checkpoints", "prune", DONE, "--keep", "1", "-y").out


def test_prune_of_all_runs(own: Command) -> None:
    done = own("checkpoints", "prune", "--all", "--keep", "1", "--yes", "-o", "json").json
    assert done["removed"] == done["would_remove"] > 4
    for run_id in (DONE, FAILED, PAUSED, PLAN, CANCELLED):
        assert len(own("checkpoints", "list", run_id, "-o", "json").json["checkpoints"]) == 1
    assert own("checkpoints", "verify").code == 0


@pytest.mark.parametrize("words", [["--keep", "1"], [DONE, "--all", "--keep", "1"], [DONE, "--keep", "0"], [DONE]])
def test_prune_refuses_what_it_cannot_understand(filled: Command, words: list[str]) -> None:
    assert filled("checkpoints", "prune", *words, "--yes").code == 2


def test_in_a_terminal_of_50_columns(filled: Command) -> None:
    environment = {**filled.environment(), "TERM": "xterm-256color", "COLUMNS": "50"}
    for words in (["list", DONE], ["show", DONE, "1"], ["diff", DONE, "1"]):
        program, *arguments = filled.words("checkpoints", *words)
        child = pexpect.spawn(program, arguments, env=environment, dimensions=(40, 50), encoding="utf-8", timeout=30)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", str(child.before)).replace("\r", "").split("\n")
        assert max(map(len, lines)) <= 50, lines
