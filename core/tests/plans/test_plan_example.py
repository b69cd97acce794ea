"""The example plan with approvals and a new revision does what it says, each part in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests import forks

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "examples" / "plan_with_approvals" / "campaign.py"


def run(folder: Path, *arguments: str) -> str:
    done = forks.run(
        [sys.executable, "-W", "error", str(PROGRAM), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "core"), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_process_by_process(tmp_path: Path) -> None:
    first = run(tmp_path, "run")
    assert first.count("asking the model") == 1
    assert "Waiting for approval of 'send'" in first
    assert "price=800" in run(tmp_path, "pending")
    assert "send: reject" in run(tmp_path, "answer", "reject", "--reason", "too expensive")
    rejected = run(tmp_path, "run")
    assert "Rejected steps: 'send'; skipped, because they need them: 'archive'" in rejected
    revised = run(tmp_path, "replan")
    assert "awaiting_approval, revision 2" in revised
    assert "asking the model" not in revised, "the draft did not change and is kept"
    assert "price=720" in run(tmp_path, "pending")
    run(tmp_path, "answer", "approve")
    final = run(tmp_path, "run")
    assert "completed, revision 2" in final
    assert final.count("sending") == 1
    again = run(tmp_path, "run")
    assert "sending" not in again
    assert "found done: 4" in again


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    output = run(tmp_path, "demo")
    assert output.count("asking the model") == output.count("sending") == 1
    assert "archived (offer: A garden for you, 720 EUR, to Ada)" in output
