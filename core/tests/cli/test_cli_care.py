"""What commands take care of: secrets, answers of people, streams, ids, damage, and users without a home."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from framework._secrets import register_secret
from framework.graph.readable import holds_secret, masked_state, plain_json, readable
from framework.graph.run_view import diff_checkpoints, state_at
from framework.runner.cli.dispatching import _one_by_one
from framework.runner.cli.output import Screen, Styled, jsonable
from framework.runner.cli.shell import parse_answer
from framework.runner.cli.text import answer_form, shown_url
from framework.storage import codec
from framework.storage.backend import open_storage
from tests.cli.cli_kit import Done, Site, agent_file

Here = Callable[..., Done]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')
KEYS = "keys of house by plan of hill for Ada"


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgres://u:pw@h/db", "postgres://u:***@h/db"),
        ("postgres://u:p:w@h:5432/db?sslmode=on&password=x", "postgres://u:***@h:5432/db?sslmode=on&password=***"),
        ("http://abc@host/v1?api_key=k&n=1", "http://***@host/v1?api_key=***&n=1"),
        ("sqlite:///runs.db", "sqlite:///runs.db"),
        ("file:///a%20b", "file:///a%20b"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize("words", [("runs", "list"), ("resume", "latest"), ("doctor",)])
def test_the_password_of_a_storage_url_is_never_shown(here: Here, words: tuple[str, ...]) -> None:
    done = here(*words, "--storage", "postgres://me:pw7@host/db?patience_seconds=0")
    assert done.code == 1
    assert "pw7" not in done.out + done.err
    assert "@host" in done.out + done.err


def test_the_command_to_go_on_shows_no_password_of_an_endpoint(here: Here, site: Site) -> None:
    site.make_agent(pause_nodes=["build"])
    url = "http://bob:sesame-open@127.0.0.1:9/v1?token=abcdefgh12"
    done = here("run", site.agent, "-i", '{"place": "hill"}', "--base-url", url, "-o", "json")
    assert done.document["status"] == "paused"
    assert "--base-url 'http://bob:***@127.0.0.1:9/v1?token=***'" in done.document["resume_command"]
    shown = here("runs", "export", done.document["run_id"])
    assert "sesame" not in done.out + done.err + shown.out
    assert "abcdefgh12" not in done.out + done.err + shown.out


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("password", True),
        ("dbPassword", True),
        ("api-key", True),
        ("OPENAI_API_KEY", True),
        ("access_token", True),
        ("auth.token", True),
        ("credentials", True),
        ("keys", False),
        ("key", False),
        ("tokens", False),
        ("token_count", False),
        ("monkey", False),
        ("secretary", False),
        ("place", False),
    ],
)
def test_which_names_of_the_state_are_secret(key: str, expected: bool) -> None:
    assert holds_secret(key) is expected


def test_texts_under_secret_names_are_masked_at_any_depth() -> None:
    state = {"user": "Ada", "login": [{"password": "a", "tries": 2}], "credentials": {"who": "b", "n": 1}, "token": ""}
    masked = {"user": "Ada", "login": [{"password": "***", "tries": 2}], "credentials": {"who": "***", "n": 1}}
    assert masked_state(state) == {**masked, "token": ""}
    plain = {"user": ["Ada"], "n": {"a": 1}}
    assert masked_state(plain) is plain


def test_what_a_run_was_given_under_a_secret_name_is_not_shown(here: Here, site: Site) -> None:
    given = '{"place": "hill", "buyer": "Ada", "password": "hunter2", "login": {"api_key": "hunter3"}}'
    ran = here("run", site.agent, "-i", given, "--run-id", "house-1")
    shown = [ran.out + ran.err]
    for words in (
        ("runs", "show", "house-1", "--full"),
        ("runs", "show", "house-1", "-o", "json"),
        ("runs", "export", "house-1"),
        ("checkpoints", "show", "house-1", "1", "--full"),
        ("checkpoints", "show", "house-1", "-o", "json"),
        ("checkpoints", "diff", "house-1", "0", "2", "--full"),
    ):
        done = here(*words)
        assert done.code == 0, done.err
        shown.append(done.out + done.err)
    assert "***" in shown[1]
    assert not [text for text in shown if "hunter" in text]
    # A key that is asked for by its name is for a program; and the state itself is the run's own.
    assert here("checkpoints", "show", "house-1", "-k", "password").out == "hunter2\n"
    with open_storage(site.url) as storage:
        assert b"hunter2" in state_at(storage, "house-1", 1)["password"]
        forked = here("fork", "house-1", "--at", "1", "--set", 'password="hunter4"', "-o", "json").document["run_id"]
        changes = diff_checkpoints(storage, forked, 0, "latest")
        assert all("hunter" not in str(change) for change in changes)


NOISY = """
import os, subprocess, sys
async def survey(place):
    print("the key is", os.environ["QUARRY_API_KEY"])
    print("again", os.environ["QUARRY_API_KEY"], file=sys.stderr)
    os.write(1, b"straight to the file\\n")
    subprocess.run([sys.executable, "-c", "print('from a process of its own')"], check=True)
    sys.stdout.buffer.write(b"")
    sys.stdout.reconfigure(line_buffering=True)
    return "plan"
NODES = {"survey": survey, "build": lambda plan: plan, "hand_over": lambda house, buyer: buyer}
"""


def test_whatever_writes_to_stdout_stdout_is_one_document_and_prints_are_masked(site: Site) -> None:
    site.make_agent(nodes=NOISY)
    done = site.call("run", site.agent, *INPUT, "-o", "json", QUARRY_API_KEY="quarry-8-stones")
    assert done.code == 0, done.err
    assert done.document["success"] is True
    assert "quarry-8-stones" not in done.out + done.err
    for text in ("the key is ***", "again ***", "straight to the file", "from a process of its own"):
        assert text in done.err
    piped = site.call("run", site.agent, *INPUT, QUARRY_API_KEY="quarry-8-stones")
    assert "straight" not in piped.out
    assert piped.out.startswith("status")


def test_parts_of_a_line_are_masked_together(capsys: pytest.CaptureFixture[str]) -> None:
    register_secret("open-sesame-42")
    with Screen().agent_prints_aside():
        print("say open-", end="")
        print("sesame-42", "now")
        print("half a line", end="")
    assert capsys.readouterr().err == "say *** now\nhalf a line"


# --- answers of people ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "asked", "expected"),
    [
        ("no", ["approved"], {"approved": False}),
        ("Yes", ["approved"], {"approved": True}),
        ("false", ["approved"], {"approved": False}),
        ('"no"', ["comment"], {"comment": "no"}),
        ("approved=no by=me", ["approved", "by"], {"approved": False, "by": "me"}),
        ('{"approved": "no"}', ["approved"], {"approved": "no"}),
        ("not today", ["comment"], {"comment": "not today"}),
        ("no", [], {"input": "no"}),
    ],
)
def test_a_plain_no_is_no_text_that_counts_as_yes(line: str, asked: list[str], expected: dict[str, Any]) -> None:
    assert parse_answer(line, asked) == expected


def careful(site: Site) -> Path:
    """An agent that asks a person before it pays."""

    def node(node_id: str, kind: str, reads: str, writes: str) -> dict[str, Any]:
        named = {"id": node_id, "name": node_id, "description": node_id, "node_type": kind}
        return {**named, "input_keys": [reads], "output_keys": [writes]}

    path = site.make_agent(
        "careful", "NODES = {'offer': lambda place: f'house on the {place}', 'pay': lambda approved: bool(approved)}"
    )
    described = agent_file(id="careful", entry_node="offer", terminal_nodes=["pay"])
    described["graph"]["nodes"] = [
        node("offer", "function", "place", "house"),
        node("ask", "human_input", "house", "approved"),
        node("pay", "function", "approved", "paid"),
    ]
    described["graph"]["edges"] = [
        {"id": "to-ask", "source": "offer", "target": "ask"},
        {"id": "to-pay", "source": "ask", "target": "pay"},
    ]
    (path / "agent.json").write_text(json.dumps(described))
    return path


def test_the_command_to_answer_with_is_the_same_everywhere_and_no_answer_itself(here: Here, site: Site) -> None:
    agent = careful(site)
    paused = here("run", agent, "-i", '{"place": "hill"}', "--run-id", "house-1", "-o", "json")
    assert paused.code == 3
    command = paused.document["resume_command"]
    assert command == """surefoot resume house-1 -i '{"approved": <answer>}'"""
    assert here("runs", "show", "house-1", "-o", "json").document["next_command"] == command
    pasted = here("resume", "house-1", "-i", answer_form(["approved"]))
    assert pasted.code == 2
    assert "is not JSON" in pasted.err


def test_a_key_that_nobody_asked_for_is_warned_of(here: Here, site: Site) -> None:
    agent = careful(site)
    here("run", agent, "-i", '{"place": "hill"}', "--run-id", "house-1")
    done = here("resume", "house-1", "-i", '{"aproved": true}')
    assert done.code == 3
    assert "warning: The run waits for approved; it did not ask for aproved" in done.err
    done = here("resume", "house-1", "-i", '{"approved": true}')
    assert done.code == 0
    assert "warning" not in done.err


def test_no_in_the_shell_pays_nothing(site: Site) -> None:
    agent = careful(site)
    done = site.call("shell", agent, given="hill\nno\n")
    assert done.code == 0
    assert "  paid      false\n" in done.out


# --- completed runs, ids ----------------------------------------------------------------------------------------------


def test_input_that_a_completed_run_does_not_use_is_said(here: Here, site: Site) -> None:
    first = here("run", site.agent, *INPUT, "--run-id", "house-1", "-o", "json")
    assert first.document["ignored_input"] == []
    same = here("run", site.agent, *INPUT, "--run-id", "house-1", "-o", "json")
    assert (same.document["ignored_input"], same.err) == ([], "")
    for words in (("run", site.agent, "--run-id", "house-1"), ("resume", "house-1")):
        other = here(*words, "-i", '{"place": "dale"}', "-o", "json")
        assert other.document["ignored_input"] == ["place"]
        assert other.document["output"]["keys"] == KEYS
        assert "the input place is not used" in other.err


@pytest.mark.parametrize("run_id", ["latest", "", "  ", "a\nb", "\x1b[31m", " x", "-x"])
def test_ids_that_no_command_could_name_again_are_refused(here: Here, site: Site, run_id: str) -> None:
    done = here("run", site.agent, *INPUT, f"--run-id={run_id}")
    assert done.code == 2
    assert "cannot be an id" in done.err
    assert here("fork", "house-1", f"--run-id={run_id}").code == 2
    assert site.ledger() == []


def test_a_run_of_another_agent_is_refused_in_one_line(here: Here, site: Site) -> None:
    here("run", careful(site), "-i", '{"place": "hill"}', "--run-id", "house-1")
    for words in (("run", site.agent, "--run-id", "house-1"), ("resume", "house-1", "--agent", site.agent)):
        done = here(*words)
        assert done.code == 1
        assert "belongs to agent 'careful'" in done.err
        assert "--allow-change" not in done.err


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["-a", "x", "y", "-q"], ["-a", "x", "-a", "y", "-q"]),
        (["--agents", "x", "y"], ["--agents", "x", "-a", "y"]),
        (["dir", "-i", "{}", "-a", "x"], ["dir", "-i", "{}", "-a", "x"]),
        (["-a", "x", "-i", "{}", "dir"], ["-a", "x", "-i", "{}", "dir"]),
        (["-ax", "dir"], ["-ax", "dir"]),
    ],
)
def test_several_names_may_follow_one_option(given: list[str], expected: list[str]) -> None:
    assert list(_one_by_one(given)) == expected


def test_dispatch_takes_several_names_and_the_folder_last(here: Here, site: Site) -> None:
    agents = site.folder / "agents"
    agents.mkdir()
    for name in ("builder", "mason", "painter"):
        site.make_agent(f"agents/{name}")
    request = ("-i", '{"place": "hill", "buyer": "Ada"}')
    done = here("dispatch", agents, *request, "-a", "mason", "painter", "-o", "json")
    assert done.document["handled_by"] in ("mason", "painter")
    assert here("dispatch", *request, "-a", "mason", agents, "-o", "json").document["handled_by"] == "mason"
    assert here("dispatch", agents, *request, "-a", "mason", "plumber").code == 4


@pytest.mark.parametrize(
    "words",
    [("run", "nowhere"), ("run", "builder", "-f", "nowhere.json"), ("resume", "no-such-run"), ("dispatch", "nowhere")],
)
def test_an_error_in_quiet_mode_is_the_short_document(here: Here, words: tuple[str, ...]) -> None:
    here("runs", "list")  # makes the store
    done = here(*words, "-q", *(("-i", "{}") if words[0] == "dispatch" else ()))
    assert done.code in (2, 4)
    assert done.document["success"] is False
    assert done.document["error"] in done.err.replace("\n", " ")


def test_a_fork_that_runs_at_once_takes_the_options_of_resume(here: Here, site: Site) -> None:
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    for command in (("fork",), ("runs", "fork")):
        forked = here(*command, "house-1", "--at", "1", "--resume", "-q", "--mock", "--allow-change")
        assert forked.code == 0
        assert (forked.document["success"], forked.err) == (True, "")
    unused = here("fork", "house-1", "--mock")
    assert unused.code == 2
    assert "add --resume" in unused.err
    edges = [
        {"id": f"to-{to}", "source": start, "target": to} for start, to in pairwise(("survey", "build", "hand_over"))
    ]
    site.make_agent(edges=edges)
    assert here("fork", "house-1", "--at", "1", "--resume", "-q").code == 1
    assert here("fork", "house-1", "--at", "1", "--resume", "-q", "--allow-change").code == 0


# --- damage, places ---------------------------------------------------------------------------------------------------


def test_a_damaged_run_can_be_deleted_and_verify_says_how(here: Here, site: Site) -> None:
    for run_id in ("house-1", "house-2"):
        here("run", site.agent, *INPUT, "--run-id", run_id)
    db = sqlite3.connect(site.folder / "runs.db")
    with db:
        assert db.execute("UPDATE runs SET header_crc = 1 WHERE run_id = 'house-1'").rowcount == 1
    db.close()
    damaged = here("checkpoints", "verify")
    assert damaged.code == 1
    assert "  surefoot runs delete house-1\n" in damaged.err
    assert here("checkpoints", "verify", "house-1").code == 1
    assert here("runs", "delete", "house-1", "--dry-run", "-o", "json").document["would_delete"] == ["house-1"]
    assert here("runs", "delete", "house-1", "--yes", "-o", "json").document["deleted"] == ["house-1"]
    assert here("checkpoints", "verify").code == 0
    assert here("doctor").code == 0


def test_doctor_finds_a_folder_where_no_store_can_be_made(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUREFOOT_STORAGE")
    assert here("doctor").code == 0
    assert not (site.folder / "data").exists()
    (site.folder / "file").write_text("no folder")
    for place in ("/proc", str(site.folder / "file")):
        monkeypatch.setenv("XDG_DATA_HOME", place)
        done = here("doctor")
        assert done.code == 1
        assert "the store cannot be made" in done.out


def test_a_user_without_a_home_is_told_and_needs_none_to_keep_nothing(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    for name in ("HOME", "XDG_DATA_HOME", "SUREFOOT_STORAGE"):
        monkeypatch.delenv(name)
    for words in (("runs", "list"), ("run", site.agent, *INPUT)):
        done = here(*words)
        assert done.code == 1
        assert "Set HOME or XDG_DATA_HOME, or name a store" in done.err
    checked = here("doctor")
    assert checked.code == 1
    assert "There is no place to keep runs" in checked.out
    assert here("run", site.agent, *INPUT, "--no-checkpoints").code == 0
    assert here("run", site.agent, *INPUT, "--storage", site.url).code == 0


def test_a_blank_variable_names_no_store(here: Here, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_STORAGE", " ")
    assert here("run", site.agent, *INPUT).code == 0
    assert (site.folder / "data" / "surefoot" / "runs.db").exists()
    assert "(the default)" in here("doctor").out


# --- JSON and terminals -----------------------------------------------------------------------------------------------


def times_in(value: Any, found: list[Any]) -> list[Any]:
    """What stands under names of moments, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("at", "created_at", "updated_at", "finished_at", "exported_at", "started_at", "timestamp"):
                found.append(item)
            elif key not in ("log", "document", "body"):  # as they are stored
                times_in(item, found)
    elif isinstance(value, list):
        for item in value:
            times_in(item, found)
    return found


def test_moments_are_iso_8601_in_every_document(here: Here, site: Site) -> None:
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    for words in (
        ("runs", "list"),
        ("runs", "show", "house-1"),
        ("runs", "steps", "house-1"),
        ("runs", "watch", "house-1"),
        ("runs", "export", "house-1"),
        ("checkpoints", "list", "house-1"),
        ("checkpoints", "show", "house-1"),
    ):
        found = times_in(here(*words, "-o", "json").document, [])
        assert found, words
        assert all(datetime.fromisoformat(each).tzinfo is not None for each in found), words


def test_values_without_a_json_form_are_the_same_texts_everywhere() -> None:
    for value in (float("nan"), float("inf"), -float("inf"), datetime(2026, 3, 4, 5, tzinfo=UTC)):
        assert readable(plain_json(codec.encode(value))) == jsonable(value)


@pytest.mark.parametrize("width", range(20, 60, 3))
def test_a_command_to_copy_is_never_broken(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", out)
    screen = Screen(no_color=True)
    screen.say(
        "There are runs that nobody works on. `surefoot recover --parallel 4` resumes ", Styled("them", "bold"), "."
    )
    screen.fields([("crashed", "One lost its process. `surefoot recover --parallel 4` resumes it at once.")])
    screen.hanging(("  ",), "It did not end. `surefoot recover --parallel 4` resumes it.")
    screen.error("It waits. Answer it with:\n  surefoot resume house-1 --input-file answer.json --allow-change")
    written = out.getvalue()
    assert written.count("`surefoot recover --parallel 4`") == 3
    assert "  surefoot resume house-1 --input-file answer.json --allow-change\n" in written
    assert "\ue000" not in written
    assert max(len(line) for line in written.splitlines()) <= max(width, 66)
