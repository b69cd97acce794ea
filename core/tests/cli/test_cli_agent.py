"""``run``, ``resume``, ``fork`` and ``recover``: what they do, what they say, and what they exit with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from tests.cli.cli_kit import Done, Site, lines_of, plain

Here = Callable[..., Done]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')
KEYS = "keys of house by plan of hill for Ada"


# --- run and resume ---------------------------------------------------------------------------------------------------


def test_a_run_in_a_pipe_says_what_it_does_in_plain_lines_and_keeps_its_run(site: Site) -> None:
    done = site.call("run", site.agent, *INPUT, FLAKY="build")
    assert done.code == 0
    assert plain(done.out)
    assert plain(done.err)
    assert KEYS in done.out
    assert "completed" in done.out
    progress = list(lines_of(done.err))
    assert [line.split()[1] for line in progress[1:]] == ["survey", "build", "build", "hand_over"]
    assert "attempt 1 failed: the quarry did not answer" in progress[2]
    assert "attempt 2" in progress[3]
    assert site.ledger() == ["survey", "build", "build", "hand_over"]
    run_id = progress[0].split()[-1]
    assert run_id in done.out
    again = site.call("run", site.agent, "--run-id", run_id, "-o", "json")
    assert again.code == 0
    assert again.document["output"]["keys"] == KEYS
    assert len(site.ledger()) == 4


def test_a_failed_run_exits_1_and_says_how_to_go_on_and_going_on_repeats_nothing(site: Site) -> None:
    failed = site.call("run", site.agent, *INPUT, "--run-id", "house-1", FAIL="build")
    assert failed.code == 1
    assert "no bricks left" in failed.out
    assert "Traceback" not in failed.err
    assert "surefoot resume house-1" in failed.out
    resumed = site.call("resume", "latest")
    assert resumed.code == 0
    assert KEYS in resumed.out
    assert "1 step kept: survey" in resumed.err
    assert site.ledger() == ["survey", *["build"] * 3, "build", "hand_over"]


def test_a_paused_run_exits_3_and_the_command_that_it_shows_goes_on_with_it(here: Here, site: Site) -> None:
    site.make_agent(pause_nodes=["build"])
    paused = here("run", site.agent, "-i", '{"place": "hill"}', "-o", "json")
    assert paused.code == 3
    document = paused.document
    assert (document["status"], document["paused_at"], document["asks_for"]) == ("paused", "build", ["buyer"])
    assert document["resume_command"].startswith(f'surefoot resume {document["run_id"]} -i \'{{"buyer"')
    resumed = here("resume", document["run_id"][:-2], "-i", '{"buyer": "Bo"}', "-q")
    assert resumed.code == 0
    assert resumed.document["output"]["keys"] == "keys of house by plan of hill for Bo"
    assert resumed.err == ""


def test_quiet_prints_exactly_the_short_document(here: Here, site: Site) -> None:
    done = here("run", site.agent, *INPUT, "-q")
    assert set(done.document) == {"success", "steps_executed", "output"}
    assert (done.document["success"], done.document["steps_executed"]) == (True, 3)
    assert done.err == ""
    site.make_agent(pause_nodes=["build"])
    assert set(here("run", site.agent, *INPUT, "-q").document) == {"success", "steps_executed", "output", "paused_at"}


def test_a_failure_in_quiet_and_json_mode_is_a_document_too(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "survey")
    quiet = here("run", site.agent, *INPUT, "-q")
    assert quiet.code == 1
    assert "no bricks left" in quiet.document["error"]
    full = here("run", site.agent, *INPUT, "-o", "json")
    assert full.code == 1
    assert (full.document["status"], full.document["success"]) == ("failed", False)
    assert full.document["exit_code"] == 1


def test_the_result_goes_to_a_file_when_asked_by_either_option(here: Here, site: Site) -> None:
    for option in ("-o", "-O", "--output-file"):
        target = site.folder / f"result{option}.json"
        done = here("run", site.agent, *INPUT, option, target)
        assert done.code == 0
        assert KEYS in done.out
        assert json.loads(target.read_text())["output"]["keys"] == KEYS
    nowhere = here("run", site.agent, *INPUT, "-O", site.folder / "none" / "x.json")
    assert nowhere.code == 2
    assert "there is no folder" in nowhere.err
    assert len(site.ledger()) == 9  # nothing ran for a result that could not be written


def test_the_input_comes_from_an_option_a_file_or_stdin(site: Site, here: Here) -> None:
    (site.folder / "in.json").write_text('{"place": "dale", "buyer": "Cy"}')
    expected = "keys of house by plan of dale for Cy"
    assert here("run", site.agent, "-f", "in.json", "-q").document["output"]["keys"] == expected
    piped = site.call("run", site.agent, "-i", "-", "-q", given='{"place": "dale", "buyer": "Cy"}')
    assert piped.document["output"]["keys"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-i", "{place: hill}"], "--input is not JSON"),
        (["-i", "[1]"], "--input is a JSON object"),
        (["-f", "none.json"], "--input-file none.json: No such file"),
        (["-i", "{}", "-f", "x"], "were both given"),
        (["--run-id", "x", "--no-checkpoints"], "give one of them"),
        (["--storage", "memory://"], "--no-checkpoints"),
        (["--colour"], "No such option"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(here: Here, site: Site, words: list[str], message: str) -> None:
    done = here("run", site.agent, *words)
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert site.ledger() == []


def test_what_does_not_exist_exits_4_and_says_what_is_near(here: Here, site: Site) -> None:
    here("run", site.agent, *INPUT, "--run-id", "house-on-the-hill")
    assert here("run", site.folder / "bulider").err == (
        f"error: There is no agent at {site.folder / 'bulider'}: no such folder. Did you mean {site.agent}? "
        "`surefoot list DIR` shows agents.\n"
    )
    for words, message in [
        (("run", "nowhere"), "There is no agent at nowhere"),
        (("run", site.folder), "is no agent: it has no agent.json. It has folders with agents: builder."),
        (("resume", "hoose-on-the-hill"), "Did you mean house-on-the-hill?"),
        (("resume", "latest"), "No run waits to go on: all are completed"),
        (("list", "nowhere"), "There is no folder nowhere"),
        (("resume", "x", "--storage", "sqlite:///none.db"), "There is no store at sqlite:///none.db"),
    ]:
        done = here(*words)
        assert done.code == 4
        assert message in done.err
        assert len(done.err.splitlines()) == 1
    assert not (site.folder / "none.db").exists()


def test_an_ambiguous_beginning_lists_the_candidates_and_exits_2(here: Here, site: Site) -> None:
    for name in ("house-1", "house-2"):
        here("run", site.agent, *INPUT, "--run-id", name)
    done = here("resume", "house")
    assert done.code == 2
    assert "'house' is the beginning of 2 run ids" in done.err
    assert "house-1  completed" in done.err
    assert "house-2  completed" in done.err


def test_a_changed_agent_is_refused_until_the_change_is_allowed(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "build")
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    monkeypatch.delenv("FAIL")
    site.make_agent(max_steps=50, terminal_nodes=[])
    refused = here("resume", "house-1")
    assert refused.code == 1
    assert "add --allow-change" in refused.err
    assert "terminal_nodes" in refused.err
    assert "CheckpointConfig" not in refused.err
    assert here("resume", "house-1", "--allow-change").code == 0


def test_a_run_whose_agent_moved_goes_on_with_the_folder_that_is_named(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.make_agent(pause_nodes=["build"])
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    site.agent.rename(site.folder / "moved")
    lost = here("resume", "house-1")
    assert lost.code == 4
    assert f"is not at {site.agent} any more; say where it is now: --agent PATH" in lost.err
    assert here("resume", "house-1", "--agent", "moved").code == 0


def test_what_an_agent_lacks_is_one_line_and_nothing_is_recorded(here: Here, site: Site) -> None:
    site.make_agent(nodes="NODES = {}")
    done = here("run", site.agent, *INPUT)
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: Node 'survey' is a function node")
    assert here("runs", "list", "-o", "json").document["runs"] == []
    assert here("run", site.agent, *INPUT, "-q").document["success"] is False


def test_tokens_of_a_model_are_shown_as_they_are_spent(here: Here, site: Site) -> None:
    described = json.loads((site.agent / "agent.json").read_text())
    for node in described["graph"]["nodes"]:
        node |= {"node_type": "llm_generate", "system_prompt": "Write about {place}."}
    (site.agent / "agent.json").write_text(json.dumps(described))
    (site.agent / "nodes.py").unlink()
    shown = here("run", site.agent, "--mock", *INPUT)
    assert shown.code == 0
    assert shown.err.count(" tokens") == 3
    answered = here("run", site.agent, "--mock", *INPUT, "-o", "json").document
    assert f"{answered['total_tokens']} tokens" in shown.out


def test_a_run_without_checkpoints_leaves_no_store(here: Here, site: Site) -> None:
    done = here("run", site.agent, *INPUT, "--no-checkpoints", "-o", "json")
    assert done.code == 0
    assert done.document["checkpoint_id"] is None
    assert not (site.folder / "runs.db").exists()


def test_the_users_own_store_is_used_when_none_is_named_and_is_private(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUREFOOT_STORAGE")
    assert here("run", site.agent, *INPUT).code == 0
    place = site.folder / "data" / "surefoot"
    assert (place / "runs.db").exists()
    assert place.stat().st_mode & 0o077 == 0


def test_what_the_agent_prints_never_reaches_the_document(site: Site) -> None:
    site.make_agent(
        nodes="print('loaded')\n"
        "NODES = {n: (lambda **k: print('working') or 'x') for n in ('survey', 'build', 'hand_over')}"
    )
    done = site.call("run", site.agent, *INPUT, "-o", "json")
    assert done.document["success"] is True
    assert "loaded" in done.err
    assert done.err.count("working") == 3


def test_the_user_id_comes_from_the_environment_when_the_first_node_wants_it(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "ada")
    site.make_agent(
        nodes="NODES = {'survey': lambda user_id: user_id, 'build': lambda plan: plan, 'hand_over': lambda house: house"
        "}"
    )
    described = json.loads((site.agent / "agent.json").read_text())
    described["graph"]["nodes"][0]["input_keys"] = ["user_id"]
    (site.agent / "agent.json").write_text(json.dumps(described))
    assert here("run", site.agent, "-q").document["output"]["keys"] == "ada"
    assert here("run", site.agent, "-q", "-i", '{"user_id": "bo"}').document["output"]["keys"] == "bo"


def test_input_that_the_first_node_reads_and_that_is_not_given_is_named(here: Here, site: Site) -> None:
    done = here("run", site.agent, "-i", '{"buyer": "Ada"}')
    assert "warning: The first node reads place, which the input does not have.\n" in done.err
    assert "warning" not in here("run", site.agent, *INPUT).err


def test_a_run_needs_neither_stdout_nor_stderr(site: Site) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" >&- 2>&-', "bash", *site.command("run", site.agent, *INPUT)],
        cwd=site.folder,
        env=site.environment(),
        check=False,
    )
    assert done.returncode == 0
    assert site.ledger() == ["survey", "build", "hand_over"]


def test_a_secret_in_an_error_is_masked_everywhere(site: Site) -> None:
    done = site.call(
        "run",
        site.agent,
        *INPUT,
        "--run-id",
        "h",
        FAIL="build",
        FAIL_WITH="401 for sk-very-secret-1",
        MY_API_KEY="sk-very-secret-1",
    )
    assert done.code == 1
    assert "401 for ***" in done.out
    assert "sk-very-secret-1" not in done.out + done.err
    assert b"sk-very-secret-1" not in (site.folder / "runs.db").read_bytes()


# --- fork, recover ----------------------------------------------------------------------------------------------------


def test_a_fork_begins_at_a_checkpoint_with_changed_values_and_leaves_the_original_alone(
    here: Here, site: Site
) -> None:
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    before = here("resume", "house-1", "-q").document
    made = here("fork", "house-1", "--at", "1", "--set", 'plan="cave"', "--set", "buyer=Bo", "--run-id", "cave-1")
    assert made.code == 0
    assert "surefoot resume cave-1" in made.out
    result = here("resume", "cave-1", "-o", "json")
    assert result.code == 0
    assert result.document["output"]["keys"] == "keys of house by cave for Bo"
    assert site.ledger() == ["survey", "build", "hand_over", "build", "hand_over"]
    assert here("resume", "house-1", "-q").document == before
    at_once = here("fork", "house-1", "--at", "2", "--set", "buyer=Cy", "--resume", "-o", "json")
    assert at_once.document["output"]["keys"] == "keys of house by plan of hill for Cy"
    unknown = here("fork", "house-1", "--at", "77")
    assert unknown.code == 4
    assert here("fork", "house-1", "--set", "plan").code == 2


def test_recover_has_nothing_to_do_when_no_process_died(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "build")
    here("run", site.agent, *INPUT)
    done = here("recover", "-o", "json")
    assert done.code == 0
    assert done.document == {"recovered": []}


# --- what agents and places do wrong ----------------------------------------------------------------------------------


def test_an_agent_that_ends_the_process_fails_and_is_not_taken_for_done(here: Here, site: Site) -> None:
    site.make_agent(
        nodes="import sys\nNODES = {n: (lambda **k: sys.exit(0)) for n in ('survey', 'build', 'hand_over')}"
    )
    for words in (("run", site.agent, *INPUT, "--run-id", "house-1"), ("resume", "house-1")):
        done = here(*words)
        assert done.code == 1
        assert done.err.endswith("error: The agent's own code ended the process: sys.exit(0).\n")
    site.make_agent()
    again = here("resume", "house-1")
    assert again.code == 0
    assert "no step was finished: it goes on from its start" in again.err


def test_a_place_where_no_store_can_be_made_is_named_with_what_to_do(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "file").write_text("")
    monkeypatch.delenv("SUREFOOT_STORAGE")
    monkeypatch.setenv("XDG_DATA_HOME", str(site.folder / "file"))
    done = here("run", site.agent, *INPUT)
    assert done.code == 1
    assert "cannot be made: Not a directory. Name another place: --storage URL" in done.err
    assert len(done.err.splitlines()) == 1
