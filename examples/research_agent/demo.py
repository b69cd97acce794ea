"""``make demo``: an agent is killed in the middle of its work, and a new process goes on where it was.

Everything it prints is checked against a ledger outside the agent and against a run that nobody disturbed. Exit code
0: every claim holds; 1: one does not, or a process failed; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 20
"""Steps of the whole run: the nodes on its path, each visit counted."""

BRANCH_STEPS = range(5, 11)
"""Numbers of committed steps after which branches are still in flight."""

FAST_PACE = 0.1
PROCESS_SECONDS = 60.0
MAX_TRIES = 3


class DemoFailed(Exception):
    """A process did not do its part; the message says what happened."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where and how the agent runs."""

    storage_url: str
    ledger_file: Path
    run_id: str
    seed: int
    pace: float

    def call(self) -> str:
        """The call that does so, as ``run.py`` makes it."""
        return f'await executor.execute(graph, goal, input_data, run_id="{self.run_id}")'

    def command(self) -> list[str]:
        """The command that starts, resumes or returns the run."""
        return [
            *(sys.executable, str(HERE / "run.py"), "--json", "--storage", self.storage_url, "--run-id", self.run_id),
            *("--ledger", str(self.ledger_file), "--seed", str(self.seed), "--pace", str(self.pace)),
        ]


def main() -> int:
    """Parse the arguments, run the demo, clean up."""
    options = _arguments()
    try:
        from show import Screen
    except ModuleNotFoundError as error:
        print(f"The demo needs {error.name}, which `make demo` installs. Or: pip install ./core", file=sys.stderr)
        return 2
    screen = Screen()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surefoot-demo-")))
        try:
            return _demo(screen, options, folder)
        except DemoFailed as error:
            screen.error(str(error))
            return 1
        except KeyboardInterrupt:
            screen.error("Interrupted.")
            return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An agent killed in the middle of its work, and resumed.")
    parser.add_argument("--seed", type=int, default=17, help="how long each model call takes, and when the kill comes")
    parser.add_argument("--kill-after", type=int, metavar="N", help=f"kill after N committed steps, 1 to {STEPS - 1}")
    parser.add_argument("--fast", action="store_true", help="model calls that take almost no time")
    parser.add_argument("--storage", metavar="URL", help="keep the runs in this store; default: a temporary one")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="keep the ledger in this file")
    options = parser.parse_args()
    if options.kill_after is None:
        options.kill_after = random.Random(options.seed).choice(BRANCH_STEPS)
    if not 1 <= options.kill_after < STEPS:
        parser.error(f"--kill-after is a number from 1 to {STEPS - 1}: the run has {STEPS} steps")
    if (options.storage or "").startswith("memory:"):
        parser.error("--storage memory:// does not outlive a process, which is the point here; use sqlite:///demo.db")
    return options


def _demo(screen: Any, options: argparse.Namespace, folder: Path) -> int:
    from claims import Facts, verdicts

    from framework.errors import StorageError
    from framework.storage.backend import open_storage

    plan = Plan(
        storage_url=options.storage or f"sqlite:///{folder / 'demo.db'}",
        ledger_file=options.ledger or folder / "ledger.jsonl",
        run_id=f"demo-{uuid.uuid4().hex[:6]}",
        seed=options.seed,
        pace=FAST_PACE if options.fast else 1.0,
    )
    aside = Plan(f"sqlite:///{folder / 'reference.db'}", folder / "reference.jsonl", "reference", 0, 0.0)
    try:
        with open_storage(plan.storage_url) as storage, open_storage(aside.storage_url) as reference_storage:
            screen.title("A research agent is killed in the middle of its work, and resumed.")
            plan, exit_code, before = _run_and_kill(screen, storage, plan, options.kill_after)
            result, after = _resume(screen, storage, plan, before)
            (result_again, asked_again), (reference_result, reference) = _finish(
                (storage, plan), (reference_storage, aside)
            )
    except StorageError as error:
        raise DemoFailed(str(error)) from error
    facts = Facts(exit_code, before, after, asked_again, reference, result, result_again, reference_result)
    screen.phase("What it came to, by a ledger outside the agent")
    screen.table(facts)
    screen.account(facts)
    screen.say(f"Answer: {result['output']['answer']}")
    screen.phase("Checked, also against a run that nobody disturbed")
    checked = verdicts(facts)
    screen.verdicts(checked)
    screen.phase("Do it yourself: stop this whenever you like, and start it again")
    screen.code(f"{_python()} {_shown(HERE / 'run.py')}")
    if not all(holds for _, holds in checked):
        screen.error("A claim is not true.")
        return 1
    return 0


def _run_and_kill(screen: Any, storage: Any, plan: Plan, kill_after: int) -> tuple[Plan, int, Any]:
    """Start the agent and kill its process once ``kill_after`` steps are committed and others are in flight."""
    from observe import View, look, visit_of

    for _ in range(MAX_TRIES):
        view = View()
        with _Child(plan) as child:
            screen.phase(f"Process {child.pid} starts a run")
            screen.code(plan.call())
            with screen.board() as board:
                while child.is_running():
                    view = look(storage, plan.ledger_file, plan.run_id)
                    board.update(view)
                    if len(view.committed) >= kill_after and view.in_flight:
                        break
                exit_code = child.kill()
                view = look(storage, plan.ledger_file, plan.run_id)
                board.close(view, cut=True)
        if exit_code > 0 or (exit_code == 0 and len(view.committed) < STEPS):
            raise DemoFailed(f"Process {child.pid} ended by itself with code {exit_code}.\n{child.errors}")
        if exit_code != 0 and view.in_flight:
            cut = ", ".join(visit_of(step) for step in view.in_flight)
            screen.phase(f"kill -9 {child.pid}")
            screen.say(f"The process is gone (signal {-exit_code}), in the middle of {cut}.")
            screen.say(f"The store has the {len(view.committed)} steps it had committed.")
            return plan, exit_code, view
        # Nothing was in flight between the last look and the kill: a busy machine. Once more, slower.
        screen.say("It was faster than the kill; once more, slower.")
        plan = Plan(plan.storage_url, plan.ledger_file, f"demo-{uuid.uuid4().hex[:6]}", plan.seed, plan.pace * 3)
    raise DemoFailed(f"The agent could not be killed in the middle in {MAX_TRIES} tries; give a smaller --kill-after.")


def _resume(screen: Any, storage: Any, plan: Plan, before: Any) -> tuple[dict[str, Any], Any]:
    """Make the same call in a new process and wait for its result."""
    from observe import look

    since = len(before.entries)
    with _Child(plan) as child:
        screen.phase(f"Process {child.pid} makes the same call")
        screen.code(plan.call())
        with screen.board(recovered=before.committed) as board:
            while child.is_running():
                board.update(look(storage, plan.ledger_file, plan.run_id), since=since)
            view = look(storage, plan.ledger_file, plan.run_id)
            board.close(view, since=since)
        return child.result(), view


def _finish(*runs: tuple[Any, Plan]) -> list[tuple[dict[str, Any], Any]]:
    """Run the agent to its end in a process for each of ``runs``, at the same time, without showing it."""
    from observe import look

    with ExitStack() as stack:
        children = [stack.enter_context(_Child(plan)) for _, plan in runs]
        while any(child.is_running() for child in children):
            pass
        return [
            (child.result(), look(storage, plan.ledger_file, plan.run_id))
            for child, (storage, plan) in zip(children, runs, strict=True)
        ]


class _Child:
    """A process that runs the agent; never left behind."""

    def __init__(self, plan: Plan) -> None:
        self._deadline = time.monotonic() + PROCESS_SECONDS
        # Files and not pipes, which nobody would read while the process runs; closed by __exit__.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(plan.command(), stdout=self._output, stderr=self._errors)
        self.pid = self._process.pid
        self.errors = ""

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._output.close()
        self._errors.close()

    def is_running(self, seconds: float = 0.01) -> bool:
        """Whether it still runs, after waiting up to ``seconds`` for its end."""
        if time.monotonic() > self._deadline:
            raise DemoFailed(f"Process {self.pid} did not end within {PROCESS_SECONDS:g} s.")
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self) -> int:
        """End it with SIGKILL unless it has ended; its exit code, as ``subprocess`` shows it."""
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if not self._errors.closed:
            self.errors = _text(self._errors)
        return code

    def result(self) -> dict[str, Any]:
        """What the ended process printed. Raises ``DemoFailed`` when it did not succeed."""
        code = self.kill()
        if code != 0:
            raise DemoFailed(f"Process {self.pid} failed with code {code}.\n{_text(self._output)}\n{self.errors}")
        printed: dict[str, Any] = json.loads(_text(self._output))
        return printed


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def _python() -> str:
    """How to start this Python from here, without the path of this machine where that is avoidable."""
    executable = Path(sys.executable)
    return _shown(executable) if executable.is_relative_to(Path.cwd()) else "python"


def _shown(path: Path) -> str:
    """A path as a command needs it, relative to the working directory when it is below it."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


if __name__ == "__main__":
    sys.exit(main())
