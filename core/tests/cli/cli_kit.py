"""An agent in a folder, and the real command run on it in processes of its own. The agent tells a ledger what it does.

By the variable HOLD one of its nodes waits for ever (after saying so), by FAIL one raises, by FLAKY one raises at its
first attempt: a process can be killed at a known moment, and the next one has none of these set. PACE is how many
seconds each node takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import forks

CORE = Path(__file__).parents[2]
PATIENCE_SECONDS = 40

NODES = """
import asyncio, os

attempts = {}

def ledger(text):
    with open(os.environ["LEDGER"], "a") as file:
        file.write(text + "\\n")

async def work(node, value):
    ledger(node)
    attempts[node] = attempts.get(node, 0) + 1
    if os.environ.get("HOLD") == node:
        print("holding", node, flush=True)
        await asyncio.Event().wait()
    await asyncio.sleep(float(os.environ.get("PACE", 0)))
    if os.environ.get("FAIL") == node:
        raise ValueError(os.environ.get("FAIL_WITH", "no bricks left"))
    if os.environ.get("FLAKY") == node and attempts[node] == 1:
        raise ConnectionError("the quarry did not answer")
    return value

async def survey(place): return await work("survey", f"plan of {place}")
async def build(plan): return await work("build", f"house by {plan}")
async def hand_over(house, buyer=None): return await work("hand_over", f"keys of {house} for {buyer}")

NODES = {"survey": survey, "build": build, "hand_over": hand_over}
"""


def _node(node_id: str, reads: list[str], writes: str) -> dict[str, Any]:
    return {
        "id": node_id,
        "name": node_id,
        "description": f"does {node_id}",
        "node_type": "function",
        "input_keys": reads,
        "output_keys": [writes],
        "retry_delay_seconds": 0,
    }


def agent_file(**graph: Any) -> dict[str, Any]:
    """The ``agent.json`` of the builder: survey, build, hand_over. ``graph`` replaces keys of its graph."""
    return {
        "graph": {
            "id": "builder",
            "description": "Builds houses",
            "entry_node": "survey",
            "terminal_nodes": ["hand_over"],
            "nodes": [
                _node("survey", ["place"], "plan"),
                _node("build", ["plan"], "house"),
                _node("hand_over", ["house", "buyer"], "keys"),
            ],
            "edges": [
                {"id": "to-build", "source": "survey", "target": "build"},
                {"id": "to-buyer", "source": "build", "target": "hand_over"},
            ],
            **graph,
        },
        "goal": {
            "id": "shelter",
            "name": "Shelter",
            "description": "A house for everybody",
            "success_criteria": [{"id": "dry", "description": "It keeps the rain out"}],
        },
    }


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@dataclass
class Site:
    """A folder with the agent, a store and a ledger, and the command to work on them."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def agent(self) -> Path:
        return self.folder / "builder"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'runs.db'}"

    def make_agent(self, name: str = "builder", nodes: str = NODES, **graph: Any) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        (path / "agent.json").write_text(json.dumps(agent_file(**graph)))
        (path / "nodes.py").write_text(nodes)
        return path

    def environment(self, **variables: str) -> dict[str, str]:
        """That of the command: nothing of the user's, so that no test writes to a home."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(CORE),
            "HOME": str(self.folder / "home"),
            "XDG_DATA_HOME": str(self.folder / "data"),
            "SUREFOOT_STORAGE": self.url,
            "LEDGER": str(self.folder / "ledger"),
            "PYTHONUTF8": "1",
            "SUREFOOT_GRACE_SECONDS": "0",
            **self.variables,
            **variables,
        }

    def ledger(self) -> list[str]:
        """The nodes whose bodies were started, in order, over all processes."""
        path = self.folder / "ledger"
        return path.read_text().split() if path.exists() else []

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "framework", *map(str, words)]

    def call(self, *words: object, given: str | None = None, **variables: str) -> Done:
        """Run a command to its end, in a pipe."""
        done = forks.run(
            self.command(*words),
            input=given if given is not None else "",
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=self.folder,
            env=self.environment(**variables),
            timeout=PATIENCE_SECONDS,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *words: object, **variables: str) -> Started:
        """Start a command in a pipe."""
        return Started(
            forks.Popen(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                cwd=self.folder,
                env=self.environment(**variables),
            )
        )


@dataclass
class Started:
    """A command under way."""

    process: subprocess.Popen[str]
    told: list[str] = field(default_factory=list)

    def wait_for(self, text: str) -> str:
        """Read stderr until a line with ``text``; that line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came: {''.join(self.told)}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> int:
        """Kill it as a power cut would; its exit code."""
        self.process.kill()
        return self.end().code

    def end(self) -> Done:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return Done(self.process.returncode, out, "".join(self.told) + err)

    def close(self) -> None:
        """End it if a failing test left it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait()


def plain(text: str) -> bool:
    """Whether a text has no control codes but newlines."""
    return all(character == "\n" or character >= " " for character in text)


def lines_of(text: str) -> Iterator[str]:
    yield from (line for line in text.splitlines() if line.strip())


def first_words(rows: Sequence[str]) -> list[str]:
    return [row.split()[0] for row in rows]
