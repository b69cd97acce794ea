"""Whether an owner lives: certain about this machine's processes, silent about others'."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from framework.errors import RunBusy
from framework.storage import ownership
from framework.storage.contract import new_run
from framework.storage.memory import MemoryStorage
from framework.storage.ownership import is_alive, new_owner, retire


class Python(Protocol):
    def __call__(self, program: str, *arguments: object) -> str: ...


@pytest.fixture
def process() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Another process that named an owner, says which, and waits."""
    program = "from framework.storage.ownership import new_owner; print(new_owner(), flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        yield running.stdout.readline().strip(), running
        running.kill()


def with_part(owner: str, index: int, value: str) -> str:
    parts = owner.split("/")
    parts[index] = value
    return "/".join(parts)


def test_owners_of_this_process_live_until_retired() -> None:
    first, second = new_owner(), new_owner()
    assert first != second
    assert (is_alive(first), is_alive(second)) == (True, True)
    retire(first)
    retire(first)
    assert (is_alive(first), is_alive(second)) == (False, True)
    retire(second)


def test_a_name_of_this_process_that_nobody_gave_is_dead() -> None:
    owner = new_owner()
    assert is_alive(with_part(owner, 5, "0" * 12)) is False
    retire(owner)


def test_another_process_is_seen_to_live_and_to_die(process: tuple[str, subprocess.Popen[str]]) -> None:
    owner, running = process
    assert is_alive(owner) is True
    running.kill()
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(owner) is False, "a zombie has ended"
    running.wait()
    assert is_alive(owner) is False


def test_a_reused_process_number_is_another_process(process: tuple[str, subprocess.Popen[str]]) -> None:
    owner, _ = process
    start = owner.split("/")[4]
    assert is_alive(with_part(owner, 4, str(int(start) - 1))) is False
    assert is_alive(with_part(owner, 4, "-")) is True


@pytest.mark.parametrize("index", [0, 1, 2], ids=["host", "boot", "namespace"])
def test_nothing_is_said_of_other_places(index: int) -> None:
    owner = new_owner()
    assert is_alive(with_part(owner, index, "elsewhere")) is None
    retire(owner)


@pytest.mark.parametrize("owner", ["", "me", "a/b/c/d/e/f", "////", "host/boot/ns/1/2/3/4", "x" * 300])
def test_other_names_are_unknown(owner: str) -> None:
    assert is_alive(owner) is None


def test_a_process_that_may_not_be_looked_at_is_unknown(
    process: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, running = process
    monkeypatch.setattr(ownership, "_process_start", lambda pid: None)
    assert is_alive(owner) is None
    assert is_alive(with_part(owner, 4, "-")) is True
    running.kill()
    running.wait()
    assert is_alive(owner) is False
    assert is_alive(with_part(owner, 3, str(2**70))) is None


def test_a_forked_child_sees_its_parent(python: Python) -> None:
    program = """
        import os
        from framework.storage.ownership import is_alive, new_owner

        owner = new_owner()
        child = os.fork()
        if not child:
            own = new_owner()
            assert is_alive(owner) and is_alive(own) and own != owner
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert is_alive(owner)
        orphan = os.fork()
        if not orphan:
            os.write(1, new_owner().encode())
            os._exit(0)
        os.waitpid(orphan, 0)
    """
    assert is_alive(python(program)) is False


def test_a_process_that_became_another_program_owns_nothing(python: Python) -> None:
    program = """
        import os, sys
        from framework.storage.ownership import is_alive, new_owner

        if len(sys.argv) == 1:
            code = "import sys; from framework.storage.ownership import is_alive; print(is_alive(sys.argv[1]))"
            os.execv(sys.executable, [sys.executable, "-c", code, new_owner()])
    """
    assert python(program) == "False\n"


def test_a_dead_owners_run_is_claimed_at_once(process: tuple[str, subprocess.Popen[str]]) -> None:
    owner, running = process
    with MemoryStorage() as store:
        store.open_run(new_run(), owner, 3_600)
        with pytest.raises(RunBusy):
            store.claim_run("run_1", "me", 60, is_alive)
        running.kill()
        running.wait()
        assert store.claim_run("run_1", "me", 60, is_alive).recovery_attempts == 1
