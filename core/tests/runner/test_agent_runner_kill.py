"""A folder's run killed by SIGKILL goes on in another process, and no finished step runs again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.runner.agent_kit import chain, function, write_agent

CORE = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("runner_program.py")
PATIENCE_SECONDS = 40

GRAPH = chain(
    function("collect", "topic", "facts"),
    {"id": "write", "node_type": "llm_generate", "input_keys": ["facts"], "output_keys": ["text"]},
    function("check", "text", "checked"),
    function("publish", "checked", "link"),
)
NODES = """
import os
import sys
from pathlib import Path
from framework.runner import node_function
from paper import line

LEDGER = Path(__file__).with_name("ledger")

def done(step):
    with LEDGER.open("a") as ledger:
        ledger.write(step + "\\n")
        ledger.flush()
        os.fsync(ledger.fileno())
    if os.environ.get("HOLD") == step:
        print("held", flush=True)
        sys.stdin.readline()

@node_function()
def collect(topic):
    done("collect")
    return [line(topic)]

@node_function()
def check(text):
    done("check")
    return text

@node_function()
async def publish(checked):
    done("publish")
    return "/" + str(len(checked))
"""


def start(folder: Path, command: str, hold: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(CORE), "PYTHONWARNINGS": "error", "HOLD": hold}
    environment["XDG_DATA_HOME"] = str(folder / "data")
    return forks.Popen(
        [sys.executable, str(PROGRAM), str(folder), f"sqlite:///{folder}/runs.db", command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_in(folder: Path, command: str, step: str) -> None:
    """Run until the body of ``step`` has begun, and kill the process there."""
    process = start(folder, command, hold=step)
    assert process.stdout is not None
    said = process.stdout.readline()
    if said.strip() != "held":
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        pytest.fail(f"the program said {said!r}:\n{errors}")
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL


def finish(folder: Path, command: str) -> list[dict[str, Any]]:
    process = start(folder, command)
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    results: list[dict[str, Any]] = json.loads(output)
    return results


def test_a_killed_run_is_resumed_as_the_latest_by_another_process(tmp_path: Path) -> None:
    folder = write_agent(
        tmp_path / "paper-agent", GRAPH, nodes=NODES, paper="def line(topic):\n    return f'on {topic}'\n"
    )
    kill_in(folder, "run", "check")
    kill_in(folder, "resume", "publish")
    [result] = finish(folder, "resume")
    assert result["success"], result["error"]
    assert (result["run_id"], result["path"]) == ("report-1", ["collect", "write", "check", "publish"])
    assert result["steps_recovered"] == 3
    assert result["output"]["facts"] == ["on rivers"]
    assert result["output"]["link"] == f"/{len(result['output']['text'])}"
    # Each body that was in flight at a kill ran again, once; nothing that was finished did.
    assert (folder / "ledger").read_text().split() == ["collect", "check", "check", "publish", "publish"]


def test_a_killed_run_is_recovered_by_another_process_and_only_once(tmp_path: Path) -> None:
    folder = write_agent(tmp_path / "paper-agent", GRAPH, nodes=NODES, paper="def line(topic):\n    return topic\n")
    kill_in(folder, "run", "check")
    # Deployed to another place meanwhile: an agent is known by the name of its folder, not by where that is.
    (tmp_path / "deployed").mkdir()
    folder = folder.rename(tmp_path / "deployed" / folder.name)
    [result] = finish(folder, "recover")
    assert result["success"], result["error"]
    assert result["steps_recovered"] == 2
    assert finish(folder, "recover") == []
    assert (folder / "ledger").read_text().split() == ["collect", "check", "check", "publish"]
