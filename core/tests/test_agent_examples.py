"""The example agents do what their pages say: through the real command, killed and resumed, and with a real model
when a key is set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
KEYS = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY")
LATE = {"message": "My touring bicycle, order A-18, came late. I want a refund."}
INPUTS: dict[str, dict[str, Any]] = {
    "researcher": {"question": "Are trees cool in a dry summer?"},
    "support_agent": {"message": "The bell of order A-17 is broken. I want my money back."},
    "document_pipeline": {},
}


class Shop:
    """A directory of its own in which a user runs one example."""

    def __init__(self, name: str, folder: Path, *, with_keys: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.agent = folder / name
        self.work = folder / "work"
        self.ledger = folder / "ledger.jsonl"
        self.patience_seconds = 250 if with_keys else 50
        self.work.mkdir()
        shutil.copytree(EXAMPLES / name, self.agent, ignore=shutil.ignore_patterns("__pycache__"))
        dropped = {"COLUMNS", "FORCE_COLOR", "SUREFOOT_STORAGE", "NO_COLOR", *(() if with_keys else KEYS)}
        self.environment = {key: value for key, value in os.environ.items() if key not in dropped} | {
            "PYTHONPATH": str(ROOT / "core"),
            "PYTHONUTF8": "1",
            "XDG_DATA_HOME": str(folder / "data"),
            "EXAMPLE_LEDGER": str(self.ledger),
            "EXAMPLE_PACE": "0",
        }

    def surefoot(self, *arguments: str | Path, code: int = 0, **environment: str) -> Any:
        """Run the command; what it printed as JSON."""
        done = forks.run(
            [sys.executable, "-m", "framework", *map(str, arguments), "-o", "json"],
            cwd=self.work,
            env=self.environment | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=self.patience_seconds,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def run(self, given: dict[str, Any], code: int = 0) -> Any:
        return self.surefoot("run", self.agent, "-i", json.dumps(given), code=code)

    def _slowly(self, given: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "framework", "run", str(self.agent), "-i", json.dumps(given)]
        return command, self.environment | {"EXAMPLE_PACE": "0.05", "TERM": "xterm"}

    def killed_in_a_pipe(self, steps: int, given: dict[str, Any]) -> None:
        """Start a run and SIGKILL it once it has told of so many finished steps."""
        command, environment = self._slowly(given)
        running = forks.Popen(
            command,
            cwd=self.work,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert running.stderr is not None
        seen = 0
        for line in running.stderr:
            seen += "✓" in line
            if seen == steps:
                break
        running.kill()
        assert running.wait(10) == -signal.SIGKILL, "it ended before it could be killed"
        running.stderr.close()

    def killed_in_a_terminal(self, steps: int, given: dict[str, Any]) -> None:
        """As in a pipe, but the command writes to a terminal of 24 lines."""
        (program, *arguments), environment = self._slowly(given)
        child = pexpect.spawn(
            program, arguments, cwd=str(self.work), env=environment, dimensions=(24, 80), encoding="utf-8", timeout=30
        )
        for _ in range(steps):
            child.expect("✓")
        child.kill(signal.SIGKILL)
        child.expect(pexpect.EOF)
        child.close()
        assert child.signalstatus == signal.SIGKILL, "it ended before it could be killed"

    def paid(self) -> Counter[str]:
        """How often each kind of model call was answered, in all processes."""
        if not self.ledger.exists():
            return Counter()
        return Counter(json.loads(line)["llm"] for line in self.ledger.read_text().splitlines())

    def written(self) -> dict[str, str]:
        """The files the agent left, by name."""
        files = (path for path in sorted(self.work.rglob("*")) if path.is_file())
        return {str(path.relative_to(self.work)): path.read_text(encoding="utf-8") for path in files}


def state(result: Any) -> dict[str, Any]:
    """The output without the paths that differ from directory to directory."""
    return {key: value for key, value in result["output"].items() if key != "folder"}


def test_the_researcher_answers_with_sources(tmp_path: Path) -> None:
    shop = Shop("researcher", tmp_path)
    result = shop.run(INPUTS["researcher"])
    assert result["path"] == ["intake", "plan", "search", "write", "check", "publish"]
    assert result["output"]["sources"] == ["water"]
    [(name, report)] = shop.written().items()
    assert name == result["output"]["published"]
    assert "it closes its leaves" in report
    assert "- water" in report
    assert shop.paid() == {"You plan a search": 1, "You search notes": 3, "You write reports": 1}


def test_the_researcher_refuses_what_is_no_question_and_says_when_nothing_was_found(tmp_path: Path) -> None:
    shop = Shop("researcher", tmp_path)
    refused = shop.run({}, code=1)
    assert "Give the question as input" in refused["error"]
    assert not shop.paid()
    nothing = shop.run({"question": "Quantum chromodynamics on lattices?"})
    assert nothing["output"]["report"] == "The notes say nothing of it."


def test_the_support_agent_pays_small_sums_by_itself_and_asks_a_person_for_large_ones(tmp_path: Path) -> None:
    shop = Shop("support_agent", tmp_path)
    small = shop.run(INPUTS["support_agent"])
    assert small["path"] == ["look_up", "triage", "propose", "pay_back", "answer", "reply"]
    asked = shop.run(LATE, code=3)
    assert (asked["status"], asked["paused_at"]) == ("paused", "ask_person")
    assert "refund-A-18.json" not in "".join(shop.written())
    answer = ("-i", '{"approved": true}')
    granted = shop.surefoot("resume", "latest", *answer)
    assert granted["path"] == ["look_up", "triage", "propose", "ask_person", "pay_back", "answer", "reply"]
    # The same answer again executes nothing: the run is completed.
    assert shop.surefoot("resume", asked["run_id"], *answer)["output"] == granted["output"]
    assert shop.written()["outbox/payments.log"] == "refund-A-17 12.5\nrefund-A-18 119.0\n"
    shop.run(LATE, code=3)
    refused = shop.surefoot("resume", "latest", "-i", '{"approved": false}')
    assert "We cannot pay anything back." in refused["output"]["draft"]
    assert "pay_back" not in refused["path"]
    shop.run(LATE, code=3)
    unclear = shop.surefoot("resume", "latest", "-i", '{"approved": "no"}')
    assert "pay_back" not in unclear["path"], "only true is a yes"
    question = shop.run({"message": "Where is my lamp, order A-19?"})
    assert question["path"] == ["look_up", "triage", "answer", "reply"]


def test_the_pipeline_files_every_document_once(tmp_path: Path) -> None:
    shop = Shop("document_pipeline", tmp_path)
    result = shop.run({})
    assert result["output"]["summary"] == "11 invoices, 1739.44 euros in all; to look at: 11.txt"
    table = shop.written()["invoices.csv"].splitlines()
    assert [line.split(",")[0] for line in table[1:]] == [f"{n:02}.txt" for n in (*range(1, 11), 12)]
    assert shop.paid() == {"You read invoices": 12}
    missing = shop.run({"folder": "no/such/folder"}, code=1)
    assert "There is no folder no/such/folder" in missing["error"]


@pytest.mark.parametrize(
    ("name", "after", "place"),
    [
        *(("researcher", 3, place) for place in ("pipe", "terminal")),
        ("support_agent", 3, "pipe"),
        ("document_pipeline", 17, "pipe"),
        *(
            pytest.param(*of, "terminal", marks=pytest.mark.slow)
            for of in (("support_agent", 3), ("document_pipeline", 17))
        ),
    ],
)
def test_killed_in_the_middle_and_resumed_it_comes_to_the_same(
    name: str, after: int, place: str, tmp_path: Path
) -> None:
    undisturbed, shop = Shop(name, tmp_path / "one"), Shop(name, tmp_path / "two")
    whole = undisturbed.run(INPUTS[name])
    (shop.killed_in_a_pipe if place == "pipe" else shop.killed_in_a_terminal)(after, INPUTS[name])
    [crashed] = shop.surefoot("runs", "list")["runs"]
    assert crashed["state"] == "crashed"
    resumed = shop.surefoot("resume", "latest")
    assert resumed["steps_recovered"] >= after
    assert (resumed["path"], state(resumed)) == (whole["path"], state(whole))
    assert shop.written() == undisturbed.written()
    again = shop.paid() - undisturbed.paid()
    assert sum(again.values()) <= 3, f"only the calls of the step in flight may be paid again, not {again}"
    assert not undisturbed.paid() - shop.paid()


def test_a_fork_goes_another_way_and_leaves_the_original_alone(tmp_path: Path) -> None:
    shop = Shop("support_agent", tmp_path)
    original = shop.run(INPUTS["support_agent"])
    shown = shop.surefoot("runs", "show", original["run_id"])
    fork = shop.surefoot("fork", original["run_id"], "--at", "3", "--set", "refund=5.0")
    resumed = shop.surefoot("resume", fork["run_id"])
    assert resumed["output"]["decision"] == "We pay 5.0 euros back."
    again = shop.surefoot("runs", "show", original["run_id"])
    assert (again["state"], again["steps"]) == (shown["state"], shown["steps"])


REAL_MODELS = {"ANTHROPIC_API_KEY": "claude-haiku-4-5-20251001", "OPENAI_API_KEY": "gpt-4o-mini"}

if with_key := [variable for variable in KEYS if os.environ.get(variable)]:
    # Only collected where a key is set: there is nothing to leave out elsewhere.
    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("variable", with_key)
    @pytest.mark.parametrize("name", INPUTS)
    def test_with_a_real_model(name: str, variable: str, tmp_path: Path) -> None:
        shop = Shop(name, tmp_path, with_keys=True)
        given = json.dumps(INPUTS[name])
        output = shop.surefoot("run", shop.agent, "--model", REAL_MODELS[variable], "-i", given)["output"]
        if name == "researcher":
            assert set(output["sources"]) <= {note.stem for note in (shop.agent / "notes").glob("*.md")}
        elif name == "support_agent":
            assert output["sent"] == "reply-A-17.txt"
            assert "outbox/payments.log" in shop.written()
        else:
            assert len(output["rows"]) + len(output["unclear"]) == 12
