"""``info``, ``validate``, ``list``, ``dispatch``, ``shell`` and ``doctor``: what they show and what they exit with."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable

import pytest

from framework.storage.backend import open_storage
from tests.cli.cli_kit import Done, Site

Here = Callable[..., Done]

INPUT = ("-i", '{"place": "hill", "buyer": "Ada"}')
KEYS = "keys of house by plan of hill for Ada"


# --- agents -----------------------------------------------------------------------------------------------------------


def test_info_shows_the_agent_as_text_and_as_json(here: Here, site: Site) -> None:
    shown = here("info", site.agent)
    assert shown.code == 0
    for text in (
        "builder",
        "A house for everybody",
        "hand_over",
        "house, buyer",
        "on_success",
        "It keeps the rain out",
    ):
        assert text in shown.out
    for words in (
        ("info", site.agent, "--json"),
        ("info", site.agent, "-o", "json"),
        ("-o", "json", "info", site.agent),
    ):
        document = here(*words).document
        assert document["entry_node"] == "survey"
        assert [node["id"] for node in document["nodes"]] == ["survey", "build", "hand_over"]


def test_validate_exits_0_for_an_agent_that_can_run_and_1_for_one_that_cannot(here: Here, site: Site) -> None:
    good = here("validate", site.agent)
    assert (good.code, good.out) == (0, "✓ builder can run.\n")
    site.make_agent(nodes="NODES = {}", entry_node="nowhere")
    bad = here("validate", site.agent, "-o", "json")
    assert bad.code == 1
    assert bad.document["valid"] is False
    assert any("nowhere" in text for text in bad.document["errors"])
    assert any("'build'" in text for text in bad.document["errors"])
    assert "cannot run" in here("validate", site.agent).out


def test_list_shows_the_agents_of_a_folder_also_those_that_cannot_be_read(here: Here, site: Site) -> None:
    (site.make_agent("broken") / "agent.json").write_text("{")
    shown = here("list", site.folder)
    assert shown.code == 0
    assert "Builds houses" in shown.out
    assert "broken" in shown.out
    listed = here("list", site.folder, "-o", "json").document["agents"]
    assert [(each["name"], each["error"] is None) for each in listed] == [("broken", False), ("builder", True)]
    (site.folder / "exports").mkdir()
    assert here("list").out.startswith("There are no agents in exports")


def test_dispatch_gives_the_request_to_the_agent_that_fits(here: Here, site: Site) -> None:
    agents = site.folder / "agents"
    agents.mkdir()
    site.agent.rename(agents / "builder")
    painter = agents / "painter"
    painter.mkdir()
    described = json.loads((agents / "builder" / "agent.json").read_text())
    described["graph"] |= {"id": "painter", "description": "Paints pictures"}
    described["goal"]["description"] = "Pictures of animals"
    described["graph"]["nodes"][0]["input_keys"] = ["animal"]
    (painter / "agent.json").write_text(json.dumps(described))
    (painter / "nodes.py").write_text(
        "NODES = {'survey': lambda animal: animal, 'build': lambda plan: plan, 'hand_over': lambda house: house}"
    )
    done = here("dispatch", agents, "-i", '{"animal": "owl"}', "-o", "json")
    assert done.code == 0
    assert done.document["handled_by"] == "painter"
    assert done.document["output"]["keys"] == "owl"
    named = here("dispatch", agents, "-i", '{"place": "hill"}', "-a", "builder", "-q")
    assert named.document["handled_by"] == "builder"
    assert here("dispatch", agents).code == 2
    assert here("dispatch", agents, "-i", "{}", "-a", "plumber").code == 4


def test_the_shell_takes_text_pairs_json_and_answers_pauses(site: Site) -> None:
    site.make_agent(pause_nodes=["build"])
    told = ["hill", "Ada", "/nodes", "/what", '{"place": "dale"}', "/reset", "place=moor", 'buyer="two words"']
    told += ['{"broken', "/info", "/quit", "never read", ""]
    done = site.call("shell", site.agent, given="\n".join(told))
    assert done.code == 0
    assert KEYS in done.out
    assert "keys of house by plan of moor for two words" in done.out
    assert "plain text goes to  place" in done.out
    assert "There is no /what here" in done.err
    assert "The line is not JSON" in done.err
    assert site.ledger() == ["survey", "build", "hand_over", "survey", "build", "survey", "build", "hand_over"]
    with open_storage(site.url) as storage:
        assert [run.state.value for run in storage.list_runs()] == ["completed", "paused", "completed"]


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_and_never_shows_a_key(
    here: Here, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-2")
    new = here("doctor")
    assert new.code == 0
    assert "nothing yet" in new.out
    here("run", site.agent, *INPUT)
    done = here("doctor", "-o", "json")
    assert done.code == 0
    assert done.document["ok"] is True
    checks = {
        check["name"]: check for section in ("installation", "store", "environment") for check in done.document[section]
    }
    assert checks["journal"]["text"] == "WAL"
    assert checks["writing"]["verdict"] == "ok"
    assert checks["runs"]["facts"] == {"runs": {"completed": 1}}
    assert "all sound" in checks["verify"]["text"]
    assert checks["OPENAI_API_KEY"]["facts"] == {"set": True}
    assert checks["ANTHROPIC_API_KEY"]["facts"] == {"set": False}
    assert "sk-very-secret-2" not in done.out


def test_doctor_finds_a_damaged_store(here: Here, site: Site) -> None:
    here("run", site.agent, *INPUT, "--run-id", "house-1")
    with sqlite3.connect(site.folder / "runs.db") as connection:
        connection.execute("UPDATE chunks SET data = x'00' WHERE sequence = 2")
    connection.close()
    done = here("doctor")
    assert done.code == 1
    assert "damaged" in done.out
    (site.folder / "runs.db").write_bytes(b"this is no database at all" * 1000)
    broken = here("doctor")
    assert broken.code == 1
    assert "Traceback" not in broken.err


def test_doctor_finds_a_store_that_cannot_be_written(here: Here, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    here("run", site.agent, *INPUT)
    # Asked of the system in this one place; as root, whom no mode stops, there is no real such file.
    monkeypatch.setattr("framework.runner.cli.doctor.os.access", lambda path, mode: False)
    done = here("doctor")
    assert done.code == 1
    assert "cannot be written" in done.out
