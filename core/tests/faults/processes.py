"""Workers as forked processes: ready in milliseconds, as all that they import is loaded already, and really killed.

A process that forks workers must have no threads and no open store; whatever opens a store is done in a worker.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

PATIENCE_SECONDS = 60.0
"""After this long without an end a worker hangs, which is a finding of its own."""


class WorkerFailed(Exception):
    """A worker ended in a way that nothing asked of it explains."""


@dataclass(slots=True)
class Worker:
    """A forked process. ``wait`` for its end, once, before anything is read of it."""

    pid: int
    pidfd: int
    pipe: int
    errors: Path
    status: int | None = None

    def wait(self, seconds: float = PATIENCE_SECONDS) -> bool:
        """Whether it ended within this time."""
        if self.status is not None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        self._reap()
        return True

    def wait_stopped(self) -> bool:
        """Wait until it has stopped itself (SIGSTOP); ``False`` when it ended instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self._ended(status)
        return False

    def signal(self, number: signal.Signals) -> None:
        if self.status is None:
            os.kill(self.pid, number)  # not yet reaped, so the number is still its own

    def kill(self) -> None:
        """End it by SIGKILL and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait()

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status is not None and os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def result(self) -> Any:
        """What its function returned; ``None`` when it was killed. Raises ``WorkerFailed``."""
        if not self.wait():
            self.kill()
            self.close()
            raise WorkerFailed(f"A worker did not end within {PATIENCE_SECONDS:.0f} s. {self._said()}")
        data = _read_all(self.pipe)
        self.close()
        if self.killed:
            return None
        if self.status != 0:
            raise WorkerFailed(f"A worker ended with status {self.status}. {self._said()}")
        return orjson.loads(data)

    def close(self) -> None:
        for descriptor in (self.pipe, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)
        self.pipe = self.pidfd = -1

    def _reap(self) -> None:
        self._ended(os.waitpid(self.pid, 0)[1])

    def _ended(self, status: int) -> None:
        self.status = status

    def _said(self) -> str:
        return self.errors.read_text(errors="replace")[-4000:] if self.errors.exists() else ""


def spawn(function: Callable[[], Any], errors: Path) -> Worker:
    """Fork a process that calls ``function`` and ends; what it returns (JSON) is the worker's ``result``.

    What it writes to standard error is appended to the file ``errors``.
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid:
        os.close(send)
        return Worker(pid, os.pidfd_open(pid), receive, errors)
    status = 70
    try:
        os.close(receive)
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        data = orjson.dumps(function())
        while data:
            data = data[os.write(send, data) :]
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # nothing that the parent meant for its own end is run


def run_apart(function: Callable[[], Any], errors: Path) -> Any:
    """Call a function in a worker and wait for its result: for whatever opens a store."""
    worker = spawn(function, errors)
    data = _read_all(worker.pipe)  # before its end: a long result is more than a pipe holds
    worker.wait()
    worker.close()
    if worker.status != 0:
        raise WorkerFailed(f"A checking process ended with status {worker.status}. {worker._said()}")
    return orjson.loads(data)


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def prepare_to_fork() -> None:
    """Keep the garbage collector of the workers away from what they share with this process."""
    gc.collect()
    gc.freeze()
