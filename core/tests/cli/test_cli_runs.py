"""``surefoot runs``, as a user types it: the real command in a pipe, and once in a terminal."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from framework.storage.backend import open_storage
from tests import forks
from tests.cli.runs_kit import (
    CANCELLED,
    CRASHED,
    DONE,
    FAILED,
    PAUSED,
    PLAN,
    Command,
    go_on_with_plan,
    start_plan_with_own_type,
)
from tests.graph.executor_kit import GOAL, graph_of
from tests.graph.run_view_kit import RUN_ID, executor_for, kill, start_and_wait_inside


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Command, subprocess.Popen[bytes]]]:
    """A run that another process runs."""
    url = f"sqlite:///{tmp_path}/runs.db"
    process = start_and_wait_inside(url, "letter")
    yield Command(url, tmp_path), process
    kill(process)


STATES = {
    DONE: "completed",
    FAILED: "failed",
    PAUSED: "paused",
    CRASHED: "crashed",
    CANCELLED: "cancelled",
    PLAN: "paused",
}


# --- list -----------------------------------------------------------------------------------------------------------


def test_list_shows_every_run_newest_first(filled: Command) -> None:
    done = filled("runs", "list")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "AGENT", "STEPS", "CHANGED", "STARTED"]
    assert {line.split()[0]: line.split()[2] for line in lines[1:]} == STATES
    assert lines[1].startswith(CRASHED)
    assert "\x1b" not in done.out


def test_list_filters_by_state_and_pages(filled: Command) -> None:
    crashed = filled("runs", "list", "--state", "crashed", "-o", "json").json
    assert [run["run_id"] for run in crashed["runs"]] == [CRASHED]
    assert filled("runs", "list", "--state", "running", "-o", "json").json == {"runs": [], "next_before": None}
    both = filled("runs", "list", "-s", "paused", "-s", "failed", "-o", "json").json
    assert {run["run_id"] for run in both["runs"]} == {PAUSED, PLAN, FAILED}
    seen: list[str] = []
    before: list[str] = []
    while True:
        page = filled("runs", "list", "-n", "4", "-o", "json", *before).json
        seen += [run["run_id"] for run in page["runs"]]
        if page["next_before"] is None:
            break
        before = ["--before", page["next_before"]]
    assert sorted(seen) == sorted(STATES)
    assert "--before" in filled("runs", "list", "-n", "2").err


def test_list_filters_by_agent(filled: Command) -> None:
    listed = filled("runs", "list", "--agent", "campaign", "-o", "json").json
    assert [run["run_id"] for run in listed["runs"]] == [PLAN]
    assert listed["runs"][0]["kind"] == "plan"
    nobody = filled("runs", "list", "--agent", "nobody")
    assert (nobody.code, nobody.out) == (0, "")
    assert "no runs that match" in nobody.err


# --- show and steps -------------------------------------------------------------------------------------------------


def test_show_says_what_a_resume_would_do(filled: Command) -> None:
    done = filled("runs", "show", FAILED)
    assert done.code == 0
    for words in (
        "the line is down",
        "What a resume would do",
        "kept        draft#1, ask#1",
        "runs again  send#1: failed (2 attempts); runs again, from its start",
        "no call of it is recorded",
        f"surefoot resume {FAILED}",
    ):
        assert words in done.out


@pytest.mark.parametrize(
    ("run_id", "words"),
    [
        (DONE, "Nothing is left to do"),
        (PAUSED, "'ask' asks for approved, by"),
        (PAUSED, f'surefoot resume {PAUSED} -i \'{{"approved": <answer>, "by": <answer>}}\''),
        (CRASHED, "may have been in flight when its process ended"),
        (CANCELLED, "may have been in flight when the run was cancelled"),
        (PLAN, "approval of publish: publish it?"),
        (PLAN, f"surefoot runs approve {PLAN}"),
    ],
)
def test_show_knows_each_state(filled: Command, run_id: str, words: str) -> None:
    done = filled("runs", "show", run_id)
    assert done.code == 0
    assert words in done.out


def test_show_in_json_is_the_whole_view(filled: Command) -> None:
    view = filled("runs", "show", CRASHED, "-o", "json").json
    assert (view["state"], view["resume"]["verdict"]) == ("crashed", "goes_on")
    assert view["resume"]["again"][0]["node_id"] == "send"
    assert [step["status"] for step in view["steps"]] == ["done", "done", "interrupted"]
    assert view["next_command"] == f"surefoot resume {CRASHED}"


def test_a_run_is_named_by_its_beginning_or_as_the_latest(filled: Command) -> None:
    assert filled("runs", "show", "camp", "-o", "json").json["run_id"] == PLAN
    assert filled("runs", "show", "latest", "-o", "json").json["run_id"] == CRASHED
    several = filled("runs", "show", "order")
    assert several.code == 2
    assert FAILED in several.err
    unknown = filled("runs", "show", "order-fialed")
    assert unknown.code == 4
    assert f"Did you mean {FAILED}" in unknown.err


def test_show_compares_the_agents_folder_with_what_the_run_was_started_with(filled: Command, tmp_path: Path) -> None:
    node = {"id": "other", "name": "Other", "description": "", "node_type": "function"}
    graph = {"id": "graph", "goal_id": "goal", "entry_node": "other", "nodes": [node], "edges": []}
    agent = {"graph": graph, "goal": {"id": "goal", "name": "Goal", "description": ""}}
    (tmp_path / "agent.json").write_text(json.dumps(agent))
    done = filled("runs", "show", FAILED, "--agent", str(tmp_path))
    assert done.code == 0
    assert "It would be refused" in done.out
    assert "node 'send' was removed" in done.out
    assert filled("runs", "show", FAILED, "--agent", str(tmp_path / "nowhere")).code == 4


def test_steps_lists_visits(filled: Command) -> None:
    lines = filled("runs", "steps", FAILED).out.splitlines()
    assert [line.split()[0] for line in lines] == ["STEP", "draft#1", "ask#1", "send#1"]
    assert "the line is down" in lines[3]
    plan = filled("runs", "steps", PLAN, "-o", "json").json
    assert [(step["key"], step["status"]) for step in plan["steps"]] == [
        ("draft", "done"),
        ("publish", "waiting"),
        ("tell", "later"),
    ]


# --- watch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run_id", "code"), [(DONE, 0), (FAILED, 1), (PAUSED, 3), (CRASHED, 1), (CANCELLED, 1)])
def test_watch_of_a_run_that_is_over_tells_its_steps_and_how_it_ended(filled: Command, run_id: str, code: int) -> None:
    done = filled("runs", "watch", run_id)
    assert done.code == code
    first = "begin#1" if run_id == CANCELLED else "draft#1"
    assert first in done.out.splitlines()[0]
    assert f"{run_id} {STATES[run_id]}" in done.out
    assert filled("runs", "watch", run_id, "-o", "json").json["state"] == STATES[run_id]


def test_watch_follows_a_run_of_another_process_until_it_ends(
    running: tuple[Command, subprocess.Popen[bytes]],
) -> None:
    command, process = running
    watcher = forks.Popen(
        command.words("runs", "watch", RUN_ID, "--interval", "0.05"),
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with watcher:
        assert watcher.stdout is not None
        assert "draft#1" in watcher.stdout.readline()
        assert "ask#1" in watcher.stdout.readline()
        kill(process)
        assert f"{RUN_ID} crashed" in watcher.stdout.read()
    assert watcher.returncode == 1


def test_ctrl_c_stops_the_watching_and_not_the_run(running: tuple[Command, subprocess.Popen[bytes]]) -> None:
    command, process = running
    watcher = forks.Popen(
        command.words("runs", "watch", RUN_ID),
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        watcher.send_signal(signal.SIGINT)
        _, errors = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert "Stopped watching" in errors
    assert process.poll() is None
    assert command("runs", "show", RUN_ID, "-o", "json").json["state"] == "running"


# --- cancel, approve, reject ----------------------------------------------------------------------------------------


def test_cancel_of_a_run_that_nobody_runs(own: Command) -> None:
    assert own("runs", "cancel", FAILED, "--dry-run").code == 0
    assert own("runs", "show", FAILED, "-o", "json").json["state"] == "failed"
    unasked = own("runs", "cancel", FAILED)
    assert unasked.code == 2
    assert f"Run {FAILED} is failed; it would be cancelled" in unasked.err
    assert own("runs", "show", FAILED, "-o", "json").json["state"] == "failed"
    assert own("runs", "cancel", FAILED, "--yes").code == 0
    assert own("runs", "show", FAILED, "-o", "json").json["state"] == "cancelled"
    assert own("runs", "cancel", FAILED, "-o", "json").json == {"run_id": FAILED, "outcome": "cancelled"}
    completed = own("runs", "cancel", DONE)
    assert completed.code == 1
    assert "completed" in completed.err


def test_cancel_of_a_running_run_asks_first(running: tuple[Command, subprocess.Popen[bytes]]) -> None:
    command, _ = running
    unasked = command("runs", "cancel", RUN_ID)
    assert unasked.code == 2
    assert "--yes" in unasked.err
    assert not command("runs", "show", RUN_ID, "-o", "json").json["asked_to_stop"]
    assert command("runs", "cancel", RUN_ID, "--yes", "-o", "json").json["outcome"] == "asked"
    assert command("runs", "show", RUN_ID, "-o", "json").json["asked_to_stop"]


def test_an_approved_step_runs_when_its_program_goes_on(own: Command) -> None:
    done = own("runs", "approve", PLAN, "--reason", "looks good")
    assert done.code == 0
    assert "publish it?" in done.out
    assert own("runs", "approve", PLAN).code == 4  # nothing waits any more
    view = own("runs", "show", PLAN, "-o", "json").json
    assert view["resume"]["first"] == ["publish"]
    before = own("checkpoints", "list", PLAN, "-o", "json").json["checkpoints"]
    assert len(before) >= 2  # an answer does not thin out what is kept
    assert go_on_with_plan(own.url) == "completed"


def test_a_step_is_approved_with_changes(own: Command) -> None:
    assert own("runs", "approve", PLAN, "publish", "--modify", '{"function_args": {"x": "better"}}').code == 0
    assert go_on_with_plan(own.url) == "completed"
    state = own("checkpoints", "show", PLAN, "-k", "result", "-o", "json").json
    assert state["value"] in ("better", "tell")
    assert "better" in own("runs", "export", PLAN).out


def test_a_step_is_rejected_or_the_run_aborted(own: Command) -> None:
    assert own("runs", "reject", PLAN, "--reason", "no", "-o", "json").json["decision"] == "reject"
    assert go_on_with_plan(own.url) == "rejected"
    statuses = {step["key"]: step["status"] for step in own("runs", "steps", PLAN, "-o", "json").json["steps"]}
    assert statuses == {"draft": "done", "publish": "rejected", "tell": "skipped"}


def test_a_plan_with_values_of_its_programs_own_types_is_shown_and_answered(own: Command) -> None:
    start_plan_with_own_type(own.url, "campaign-2")
    shown = own("runs", "show", "campaign-2")
    assert shown.code == 0
    assert "campaign.Draft" in shown.out
    assert own("runs", "approve", "campaign-2", "--modify", '{"prompt": "x"}').code == 1  # it has no prompt
    assert own("runs", "approve", "campaign-2").code == 0
    again = own("runs", "approve", "campaign-2")
    assert again.code == 4
    assert go_on_with_plan(own.url, "campaign-2") == "completed"


def test_abort_ends_the_run(own: Command) -> None:
    assert own("runs", "reject", PLAN, "--abort").code == 0
    assert go_on_with_plan(own.url) == "aborted"


def test_answers_that_fit_nothing_are_refused(filled: Command) -> None:
    graph = filled("runs", "approve", PAUSED)
    assert graph.code == 2
    assert f"surefoot resume {PAUSED} -i" in graph.err
    other = filled("runs", "approve", PLAN, "tell")
    assert other.code == 4
    assert "publish" in other.err
    assert filled("runs", "approve", PLAN, "--modify", "{not json").code == 2


# --- fork, export, delete -------------------------------------------------------------------------------------------


def test_fork_starts_a_new_run(own: Command) -> None:
    made = own("runs", "fork", DONE, "--at", "1", "--set", 'text="Hello"', "--run-id", "order-again", "-o", "json").json
    assert made["run_id"] == "order-again"
    view = own("runs", "show", "order-again", "-o", "json").json
    assert (view["forked_from"]["run_id"], view["resume"]["kept"]) == (DONE, ["draft#1"])


def test_export_writes_one_document(filled: Command, tmp_path: Path) -> None:
    out = filled("runs", "export", FAILED, env={"MY_API_KEY": "Dear reader"})
    exported = json.loads(out.out)
    assert exported["run"]["run_id"] == FAILED
    assert exported["state"]["text"] == "***"  # the value of a secret variable
    file = tmp_path / "run.json"
    assert filled("runs", "export", FAILED, "-f", str(file), "--no-values").code == 0
    text = file.read_text(encoding="utf-8")
    assert "Dear reader" not in text
    assert json.loads(text)["with_values"] is False
    assert filled("runs", "export", FAILED, "-f", str(tmp_path / "no" / "where.json")).code == 2


def test_a_value_that_is_a_secret_of_the_environment_is_never_shown(filled: Command) -> None:
    secret = {"MY_API_KEY": "Dear reader"}
    for words in (
        ["runs", "show", FAILED],
        ["runs", "show", FAILED, "-o", "json"],
        ["checkpoints", "show", FAILED],
        ["checkpoints", "show", FAILED, "-o", "json"],
        ["checkpoints", "show", FAILED, "-k", "text"],
        ["checkpoints", "diff", FAILED, "0", "-o", "json"],
        ["checkpoints", "diff", FAILED, "0", "--full"],
    ):
        done = filled(*words, env=secret)
        assert done.code == 0
        assert "Dear reader" not in done.out, words
        assert "***" in done.out, words


def test_delete_shows_asks_and_deletes(own: Command) -> None:
    unasked = own("runs", "delete", DONE, FAILED)
    assert unasked.code == 2
    assert DONE in unasked.out
    assert "--yes" in unasked.err
    assert own("runs", "delete", DONE, "--dry-run", "-o", "json").json == {
        "deleted": [],
        "kept": [],
        "would_delete": [DONE],
    }
    assert own("runs", "show", DONE).code == 0
    done = own("runs", "delete", DONE, FAILED, "--yes", "-o", "json")
    assert (done.code, sorted(done.json["deleted"])) == (0, sorted([DONE, FAILED]))
    assert own("runs", "show", DONE).code == 4


def test_delete_chooses_by_state_and_age(own: Command) -> None:
    assert own("runs", "delete", "--state", "completed", "--older-than", "1h", "--yes").out == (
        "There is nothing to delete.\n"
    )
    done = own("runs", "delete", "-s", "crashed", "-s", "completed", "--older-than", "0s", "--yes", "-o", "json").json
    assert sorted(done["deleted"]) == sorted([DONE, CRASHED])  # a crashed run's lease is nobody's
    left = own("runs", "list", "-o", "json").json["runs"]
    assert {run["run_id"] for run in left} == set(STATES) - {DONE, CRASHED}


def test_the_parts_of_a_run_go_with_it_and_not_without_it(own: Command) -> None:
    part = f"{PAUSED}/draft#1"
    with open_storage(own.url) as storage:
        executor = executor_for(storage, {"only": lambda **_: 1})
        asyncio.run(executor.execute(graph_of("only"), GOAL, {}, run_id=part, parent_run_id=PAUSED))
    chosen = own("runs", "delete", "--state", "completed", "--dry-run", "-o", "json").json
    assert chosen["would_delete"] == [DONE]  # the part is completed, and its whole is not
    assert sorted(own("runs", "delete", PAUSED, "--yes", "-o", "json").json["deleted"]) == [PAUSED, part]


@pytest.mark.parametrize("words", [[], [DONE, "--state", "failed"], ["--older-than", "soon"]])
def test_delete_refuses_what_it_cannot_understand(filled: Command, words: list[str]) -> None:
    assert filled("runs", "delete", *words, "--yes").code == 2


def test_a_running_run_is_not_deleted(running: tuple[Command, subprocess.Popen[bytes]]) -> None:
    command, _ = running
    done = command("runs", "delete", RUN_ID, "--yes")
    assert done.code == 5
    assert "Cancel it first" in done.err
    with open_storage(command.url) as storage:
        assert storage.find_run(RUN_ID) is not None


# --- in a terminal --------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_in_a_terminal_of_60_columns_nothing_is_wider_and_a_no_changes_nothing(filled: Command) -> None:
    environment = {**filled.environment(), "TERM": "xterm-256color", "COLUMNS": "60"}
    for words in (["runs", "list"], ["runs", "show", FAILED], ["runs", "steps", CANCELLED]):
        program, *arguments = filled.words(*words)
        child = pexpect.spawn(program, arguments, env=environment, dimensions=(50, 60), encoding="utf-8", timeout=30)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        text = str(child.before)
        assert "\x1b[" in text  # colours
        lines = _CONTROL.sub("", text).replace("\r", "").split("\n")
        assert max(map(len, lines)) <= 60, lines
    program, *arguments = filled.words("runs", "delete", DONE)
    child = pexpect.spawn(program, arguments, env=environment, dimensions=(50, 60), encoding="utf-8", timeout=30)
    child.expect(r"Delete 1 run for good\? \[y/N\]")
    child.sendline("n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1
    assert "Nothing was changed" in str(child.before)
    assert filled("runs", "show", DONE).code == 0
