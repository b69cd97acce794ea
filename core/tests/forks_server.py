"""Starts Python programs by forking: each is as ``python PROGRAM``, ``python -m`` or ``python -c`` would start it, in a
process of its own, but with this library imported already. ``tests.forks`` starts this program and talks to it.

A request comes over a connection of its own, with three descriptors: what to run, its environment and its folder. The
answer is the number of the process and, when it has ended, its status as ``waitpid`` gives it. A process that is
``tied`` is killed when the connection is closed, that is when who asked for it was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = (
    "framework.graph.executor framework.graph.flexible_executor framework.runtime framework.runner.recovery "
    "framework.runner.runner framework.runner.cli.app framework.runner.cli.agents framework.runner.cli.commands_agent "
    "framework.runner.cli.commands_checkpoints framework.runner.cli.commands_folders "
    "framework.runner.cli.commands_runs framework.runner.cli.commands_storage framework.runner.cli.shell "
    "framework.storage.sqlite framework.storage.files framework.storage.memory framework.storage.postgres "
    "framework.storage.encryption framework.testing http.client http.server psycopg zoneinfo"
)
HEADER = struct.Struct("!Q")
ANSWER = struct.Struct("!q")


def _request_of(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 3)
    with connection.makefile("rb") as stream:
        return json.loads(stream.read(HEADER.unpack(header)[0])), descriptors


def next_program(listener: socket.socket) -> dict[str, Any]:
    """Serve; returns only in the processes that are to run something, with what that is."""
    running: dict[int, socket.socket] = {}
    woken, waker = socket.socketpair()
    for end in (listener, woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        for source in (listener, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready: list[Any] = [key.fileobj for key, _ in selector.select()]
            if sys.stdin in ready:
                sys.exit()  # whoever started this is gone
            if woken in ready:
                woken.recv(4096)
                _report_ends(running, selector)
            for pid in [pid for pid, connection in running.items() if connection in ready]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                selector.unregister(running[pid])
                running.pop(pid).close()
            if listener not in ready:
                continue
            connection, _ = listener.accept()
            connection.setblocking(True)
            request, descriptors = _request_of(connection)
            pid = os.fork()
            if pid == 0:
                break
            connection.sendall(ANSWER.pack(pid))
            running[pid] = connection
            if request.pop("tied"):
                selector.register(connection, selectors.EVENT_READ)
            for descriptor in descriptors:
                os.close(descriptor)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in (listener, woken, waker, connection, *running.values()):
        end.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    return request


def _report_ends(running: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as connection:
            if connection in selector.get_map():
                selector.unregister(connection)
            try:
                connection.sendall(ANSWER.pack(status))
            except BrokenPipeError:
                continue  # nobody waits for it any more


def run(words: list[str], environment: dict[str, str], folder: str, **_: Any) -> None:
    """What the interpreter does between its start and its end."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream: Any = open(number, mode, 1 if number == 2 else -1, encoding=encoding, closefd=False)  # noqa: SIM115
        if number == 1 and stream.isatty():
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[:0] = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
    if environment.get("PYTHONWARNINGS"):
        warnings.simplefilter(environment["PYTHONWARNINGS"])  # type: ignore[arg-type]
    if words[0] == "-W":
        warnings.simplefilter(words[1])  # type: ignore[arg-type]
        words = words[2:]
    if words[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def outcome_of(request: dict[str, Any]) -> int:
    """Run it; the code it ends with, below 0 for a signal."""
    try:
        run(**request)
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(code: int) -> NoReturn:
    """As the interpreter ends, but without taking down, object by object, what was imported: that takes 0.1 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def main() -> None:
    """Import, listen at the path that is the only argument, say so, and serve."""
    del sys.path[0]
    for name in PRELOADED.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(100)
        print("ready", flush=True)
        request = next_program(listener)
    end(outcome_of(request))


if __name__ == "__main__":
    main()
