"""A worker's system calls under this process's eyes: killed at the n-th one, or told that the disk is full or broken.

Linux lets a process ask for its own chosen calls to be handed to a supervisor first (seccomp user notification, Linux
5.5), without any privilege. So a fault can be put exactly before each write, sync, rename or send of a worker, be it
made by Python, by SQLite or by a database driver. Only calls that change something outside the process are watched.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.faults.processes import PATIENCE_SECONDS, Worker, spawn

_NUMBERS: dict[str, tuple[int, int, dict[str, int]]] = {
    # audit architecture, number of seccomp(2), and the calls that are watched
    "x86_64": (
        0xC000003E,
        317,
        {
            "write": 1, "pwrite64": 18, "writev": 20, "sendto": 44, "fsync": 74, "fdatasync": 75, "ftruncate": 77,
            "rename": 82, "mkdir": 83, "unlink": 87, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
            "renameat2": 316,
        },
    ),
    "aarch64": (
        0xC00000B7,
        277,
        {
            "mkdirat": 34, "unlinkat": 35, "renameat": 38, "ftruncate": 46, "write": 64, "writev": 66, "pwrite64": 68,
            "fsync": 82, "fdatasync": 83, "sendto": 206, "renameat2": 276,
        },
    ),
}  # fmt: skip
WRITES = frozenset(("write", "pwrite64", "writev", "ftruncate"))
SYNCS = frozenset(("fsync", "fdatasync"))
NAMES = frozenset(("rename", "renameat", "renameat2", "mkdir", "mkdirat"))
"""Calls that make a name, which needs room as a write does."""

_SET_MODE_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 1, 8, 38
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NOTICE = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")

Verdict = int | Literal["kill"] | None
"""What becomes of a call: an ``errno`` it fails with, the end of its process, or ``None``: it is made."""


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is about to be made. ``path`` is of the file it writes to or syncs, where it has one."""

    name: str
    number: int
    pid: int
    path: str | None
    descriptor: int


Decide = Callable[[Call], Verdict]


class NotSupported(Exception):
    """This system cannot watch system calls."""


def _machine() -> tuple[int, int, dict[str, int]]:
    found = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or found is None:
        raise NotSupported("Faults at system calls need Linux 5.5 or newer on x86-64 or ARM64.")
    return found


def _filter() -> bytes:
    """A program of the kernel's packet filter: a watched call is handed over, any other is made."""
    arch, _, numbers = _machine()

    def op(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    count = len(numbers)
    program = [op(0x20, 0, 0, 4), op(0x15, 0, count + 1, arch), op(0x20, 0, 0, 0)]
    program += [op(0x15, count - index, 0, number) for index, number in enumerate(numbers.values())]
    return b"".join([*program, op(0x06, 0, 0, _ALLOW), op(0x06, 0, 0, _NOTIFY)])


def _watch_me() -> int:
    """Have this process, and the threads it will have, watched; the descriptor by which that is done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise NotSupported(f"prctl failed: {os.strerror(ctypes.get_errno())}.")
    code = ctypes.create_string_buffer(_filter())
    program = struct.pack("@HP", len(code.raw) // 8, ctypes.addressof(code))
    descriptor = libc.syscall(_machine()[1], _SET_MODE_FILTER, _NEW_LISTENER, program)
    if descriptor < 0:
        raise NotSupported(f"seccomp failed: {os.strerror(ctypes.get_errno())}. It needs Linux 5.5 or newer.")
    return int(descriptor)


def spawn_watched(function: Callable[[], Any], errors: Path) -> tuple[Worker, int]:
    """As ``spawn``, with the descriptor to ``supervise`` the worker by."""
    _machine()
    ours, theirs = socket.socketpair()

    def watched() -> Any:
        ours.close()
        listener = _watch_me()
        theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
        os.close(listener)
        theirs.close()
        return function()

    with ours:
        worker = spawn(watched, errors)
        theirs.close()
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    if not ancillary:
        worker.result()  # raises, and says why
        raise NotSupported("The worker ended before it could be watched.")
    return worker, int(array.array("i", ancillary[0][2])[0])


def supervise(worker: Worker, listener: int, decide: Decide) -> int:
    """Ask ``decide`` about each watched call until the worker ends; how many there were. Closes ``listener``."""
    names = {number: name for name, number in _machine()[2].items()}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(worker.pidfd, select.POLLIN)
    count = 0
    try:
        while True:
            ready = dict(poll.poll(PATIENCE_SECONDS * 1000))
            if not ready:
                worker.kill()
                return count
            if ready.get(listener, 0) & select.POLLIN:
                buffer = bytearray(_NOTICE.size)
                try:
                    fcntl.ioctl(listener, _RECEIVE, buffer)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR):  # its process was killed meanwhile
                        continue
                    raise
                notice, pid, _, number, _, _, *arguments = _NOTICE.unpack(buffer)
                count += 1
                verdict = decide(_call(names[number], count, pid, arguments))
                if verdict == "kill":
                    worker.signal(signal.SIGKILL)
                else:
                    _answer(listener, notice, verdict)
            elif worker.pidfd in ready:
                worker.wait()
                return count
            else:
                poll.unregister(listener)  # nobody is left to be watched
    finally:
        os.close(listener)


def _call(name: str, count: int, pid: int, arguments: list[int]) -> Call:
    path = None
    descriptor = -1
    if name in WRITES or name in SYNCS:
        descriptor = arguments[0]
        try:
            path = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:  # it was killed, or another thread closed the file
            path = None
    elif name in ("rename", "mkdir", "unlink"):
        path = _text_at(pid, arguments[0])
    return Call(name, count, pid, path, descriptor)


def _text_at(pid: int, address: int) -> str | None:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return os.fsdecode(memory.read(4096).split(b"\0")[0])
    except (OSError, ValueError, OverflowError):  # it was killed, or this user may not look
        return None


def _answer(listener: int, notice: int, verdict: int | None) -> None:
    answer = (notice, 0, 0, _CONTINUE) if verdict is None else (notice, 0, -verdict, 0)
    try:
        fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(*answer)))
    except OSError as error:
        if error.errno != errno.ENOENT:  # killed while it waited for the answer
            raise


def run_watched(function: Callable[[], Any], errors: Path, decide: Decide) -> tuple[Worker, int]:
    """Run a function in a worker whose calls ``decide`` rules on; the ended worker and how many calls it made."""
    worker, listener = spawn_watched(function, errors)
    count = supervise(worker, listener, decide)
    return worker, count


def kill_at(number: int) -> Decide:
    """End the worker when it is about to make its ``number``-th watched call."""
    return lambda call: "kill" if call.number == number else None
