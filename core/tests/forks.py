"""``Popen`` and ``run`` for Python programs that use this library, forked from a process that has imported it.

A new interpreter takes 0.4 s to import the library, a fork 0.02 s, and the tests start many hundred processes. All else
is as ever: each is a process of its own, with its own pipes, environment and folder, and can be killed. Tests marked
``slow`` start new interpreters.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.forks_server import ANSWER, HEADER

CORE = Path(__file__).parents[1]

is_on = True
"""Whether programs are forked; set for each test by the conftest."""

_SHIM = """#!{python} -IS
import json, os, signal, socket, struct, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    words = ["-m", "framework", *sys.argv[1:]]
    asked = {{"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "tied": True}}
    asked = json.dumps(asked).encode()
    socket.send_fds(server, [struct.pack({header!r}, len(asked))], [0, 1, 2])
    server.sendall(asked)
    size = struct.calcsize({answer!r})
    server.recv(size)
    code = os.waitstatus_to_exitcode(struct.unpack({answer!r}, server.recv(size))[0])
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def _server(pid: int) -> Path:
    """The socket of this process's server, which is started by the first who asks and goes when this process does."""
    folder = Path(tempfile.mkdtemp(prefix="surefoot-forks-"))
    path = folder / "socket"
    process = subprocess.Popen(
        [sys.executable, str(CORE / "tests" / "forks_server.py"), str(path)],
        env={**os.environ, "PYTHONPATH": "", "PYTHONUTF8": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def end() -> None:
        process.communicate()
        shutil.rmtree(folder)

    atexit.register(end)
    return path


class Popen(subprocess.Popen[Any]):
    """A process of ``[sys.executable, ...]``; options are those of ``subprocess.Popen`` that tests use.

    Its parent is the server, which tells its end: the two ways in which ``subprocess`` asks for it are replaced here.
    """

    _server: socket.socket | None = None

    def _execute_child(self, *given: Any) -> None:
        words, cwd, env = given[0], given[5], given[6]
        pipes = given[10:16]
        if not is_on or words[0] != sys.executable:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        assert given[2] is None
        assert not any((given[4], given[9], given[21])), "preexec_fn, pass_fds, shell and sessions are not for forks"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(_server(os.getpid())))
        request = {
            "words": [str(word) for word in words[1:]],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "tied": False,
        }
        asked = json.dumps(request).encode()
        ends = (pipes[0], pipes[3], pipes[5])
        descriptors = [number if end == -1 else end for number, end in enumerate(ends)]
        socket.send_fds(self._server, [HEADER.pack(len(asked))], descriptors)
        self._server.sendall(asked)
        [self.pid] = ANSWER.unpack(self._server.recv(ANSWER.size))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            found: tuple[int, int] = super()._try_wait(wait_flags)  # type: ignore[misc]
            return found
        try:
            told = self._server.recv(ANSWER.size, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        self._server.close()
        return self.pid, ANSWER.unpack(told)[0]

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._server is None:
            found: int | None = super()._internal_poll(*given, **named)  # type: ignore[misc]
            return found
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(
    args: Sequence[str],
    *,
    input: str | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``, for texts."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with Popen(args, **options) as process:
        try:
            out, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, errors)
    return subprocess.CompletedProcess(args, process.returncode, out, errors)


def make_command(folder: Path) -> None:
    """Put a ``surefoot`` into ``folder`` that is forked, for shells that find it there."""
    if not is_on:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / "surefoot"
    path = str(_server(os.getpid()))
    shim.write_text(_SHIM.format(python=sys.executable, path=path, header=HEADER.format, answer=ANSWER.format))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
