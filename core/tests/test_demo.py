"""``make demo`` and the other examples do what they say, and the demo notices when a claim is not true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "examples" / "research_agent"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the examples as a user would, with its output in a pipe."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "TERM")}
    return forks.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT / "core"), "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
    )


def entries(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines() if line]


# --- the demo as it is run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("demo")
    options = ["--fast", "--storage", "sqlite:///demo.db", "--ledger", "ledger.jsonl"]
    done = run(AGENT / "demo.py", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done, entries(folder / "ledger.jsonl")


def row(output: str, label: str) -> list[float]:
    """The four numbers of a line of the table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(label))
    return [float(cell.strip("$").replace(",", "")) for cell in line.split()[-4:]]


def test_the_demo_tells_what_happened(demo: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    output = demo[0].stdout
    assert re.search(r"kill -9 \d+\n   The process is gone \(signal 9\), in the middle of \w+", output)
    assert output.count("✔ ") >= 7
    assert "NOT TRUE" not in output
    assert "Answer: Build a cable-stayed bridge." in output
    assert "run.py" in output.splitlines()[-1]


def test_it_fits_in_80_columns_of_plain_text(demo: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    lines = demo[0].stdout.splitlines()
    assert "\x1b" not in demo[0].stdout
    assert [line for line in lines[:-1] if len(line) > 80 or line != line.rstrip()] == []


def test_its_table_adds_up(demo: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    output = demo[0].stdout
    for label in ("steps done", "LLM calls paid", "tokens paid", "tool calls"):
        before, recovered, after, undisturbed = row(output, label)
        assert 0 < recovered <= before
        assert recovered + after == undisturbed
    assert row(output, "steps done")[3] == 20


def test_the_ledger_agrees(demo: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]) -> None:
    done, ledger = demo
    first, second = dict.fromkeys(entry["pid"] for entry in ledger)
    bodies = Counter(entry["step"] for entry in ledger if entry["kind"] == "body")
    assert len(bodies) == 20
    assert set(bodies.values()) <= {1, 2}
    twice = {step for step, count in bodies.items() if count == 2}
    assert 1 <= len(twice) <= 4
    for pid, column in ((first, 0), (second, 2)):
        calls = [entry for entry in ledger if entry["kind"] == "llm" and entry["pid"] == pid]
        assert len(calls) == row(done.stdout, "LLM calls paid")[column]
        assert sum(call["tokens"] for call in calls) == row(done.stdout, "tokens paid")[column]
    for step in twice:
        assert len({entry["key"] for entry in ledger if entry["kind"] == "body" and entry["step"] == step}) == 1


def test_it_may_be_killed_elsewhere_and_keep_its_runs_in_files(tmp_path: Path) -> None:
    options = ["--fast", "--kill-after", "13", "--storage", "file:runs"]
    done = run(AGENT / "demo.py", *options, cwd=tmp_path, NO_COLOR="1", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kill-after", "20"], "from 1 to 19"),
        (["--storage", "memory://"], "does not outlive a process"),
        (["--storage", "sqlite:///missing?x=1"], "options after"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    done = run(AGENT / "demo.py", "--fast", *options, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# --- the other programs ---------------------------------------------------------------------------------------------


def test_the_agent_by_hand(tmp_path: Path) -> None:
    options = ["--storage", "sqlite:///mine.db", "--pace", "0"]
    first = run(AGENT / "run.py", *options, cwd=tmp_path)
    again = run(AGENT / "run.py", *options, cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "20 steps, of which 0 were recovered" in first.stdout
    assert "20 steps, of which 20 were recovered" in again.stdout
    assert first.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]


def test_the_quickstart(tmp_path: Path) -> None:
    first = run(ROOT / "examples" / "quickstart.py", cwd=tmp_path)
    again = run(ROOT / "examples" / "quickstart.py", cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert (first.stdout.count("charging"), again.stdout.count("charging")) == (2, 1)
    assert "order-42: shipped" in again.stdout
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 40


# --- the claims -----------------------------------------------------------------------------------------------------


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demo's module of checks, which lies beside the programs."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(AGENT))
    import claims as module  # type: ignore[import-not-found]

    yield module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and AGENT in Path(str(sys.modules[name].__file__)).parents:
            del sys.modules[name]


def _body(step: str, key: str | None = None) -> dict[str, Any]:
    return {"kind": "body", "step": step, "key": key or step}


def _call(step: str) -> dict[str, Any]:
    return {"kind": "llm", "step": step, "tokens": 10, "usd": 0.1}


def facts_of_a_good_run(claims: ModuleType) -> Any:
    """``a#1`` was committed, ``b#1`` in flight with one call made."""
    first = [_body("a#1"), _call("a#1"), _body("b#1"), _call("b#1")]
    second = [_body("b#1"), _call("b#1"), _call("b#1")]
    result = {"success": True, "output": {"x": 1}, "path": ["a", "b"], "total_tokens": 30, "steps_recovered": 1}
    after = claims.View(["a#1", "b#1"], first + second)
    return claims.Facts(
        exit_code=claims.KILLED,
        before=claims.View(["a#1"], first),
        after=after,
        asked_again=after,
        reference=claims.View(["a#1", "b#1"], [*first, _call("b#1")]),
        result=result,
        result_again=result,
        reference_result={**result, "steps_recovered": 0},
    )


def test_a_good_run_passes(claims: ModuleType) -> None:
    facts = facts_of_a_good_run(claims)
    assert all(holds for _, holds in claims.verdicts(facts)), claims.verdicts(facts)
    assert (facts.kept.calls, facts.repeated.calls, facts.ran_twice) == (1, 1, ["b#1"])


def test_each_claim_can_fail(claims: ModuleType) -> None:
    good = facts_of_a_good_run(claims)
    View = claims.View
    ended = replace(good, exit_code=0)
    ran_again = replace(good, after=View(good.after.committed, [*good.after.entries, _body("a#1")]))
    other_key = replace(good, after=View(good.after.committed, [*good.before.entries, _body("b#1", "another")]))
    recovered_nothing = replace(good, result={**good.result, "steps_recovered": 0})
    paid_again = replace(good, after=View(good.after.committed, [*good.after.entries, _call("a#1")]))
    other_state = replace(good, result={**good.result, "output": {"x": 2}})
    not_stored = replace(good, asked_again=View(good.after.committed, [*good.after.entries, _body("b#1")]))
    bad = [ended, ran_again, other_key, recovered_nothing, paid_again, other_state, not_stored]
    for number, facts in enumerate(bad):
        claim, holds = claims.verdicts(facts)[number]
        assert not holds, claim
