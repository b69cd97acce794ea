"""Who owns a run: owner names that can be checked for life, so a dead process on this machine is replaced at once.

An owner's name carries the machine, its boot, the process-number namespace, the process, that process's start and a
random part: ``host/boot/namespace/pid/start/unique``. From the same machine, boot and namespace anybody can tell
whether that very process still exists (a reused process number has another start). From elsewhere only the lease
tells. Where the system has no ``/proc``, the start is ``-`` and only the process number is checked.
"""

from __future__ import annotations

import os
import socket
import uuid
from functools import cache
from pathlib import Path

from framework.schemas.run import RunState
from framework.storage.records import RunRecord

_local: set[str] = set()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _process_start(pid: int) -> tuple[str, str] | None:
    """State letter and start time (clock ticks since boot) of a process from ``/proc``, or ``None``.

    The command's name may hold spaces and brackets, so fields are counted after its last closing bracket (proc(5)).
    """
    stat = _read(f"/proc/{pid}/stat")
    if stat is None or ")" not in stat:
        return None
    fields = stat.rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else None


@cache
def _place() -> str:
    """This machine, boot and process namespace, as the first three parts of an owner's name."""
    host = socket.gethostname().replace("/", "_") or "localhost"
    boot = (_read("/proc/sys/kernel/random/boot_id") or "-").replace("/", "_")
    try:
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        namespace = "-"
    return f"{host}/{boot}/{namespace}"


def new_owner() -> str:
    """A name for a new owner in this process. Call ``retire`` when it owns nothing any more."""
    pid = os.getpid()
    started = _process_start(pid)
    owner = f"{_place()}/{pid}/{started[1] if started else '-'}/{uuid.uuid4().hex[:12]}"
    _local.add(owner)
    return owner


def retire(owner: str) -> None:
    """Say that ``owner``, named in this process, is gone."""
    _local.discard(owner)


def is_alive(owner: str) -> bool | None:
    """Whether the process of ``owner`` exists: ``None`` when that cannot be told from this process."""
    parts = owner.split("/")
    if len(parts) != 6 or "/".join(parts[:3]) != _place() or not parts[3].isdigit():
        return None
    pid, start = int(parts[3]), parts[4]
    if pid == os.getpid():
        # Our own process number: alive only if this very process named it (not a parent before a fork or an exec).
        return owner in _local
    found = _process_start(pid)
    if found is not None:
        # A zombie has ended; it only waits for its parent to notice.
        return found[0] not in "ZX" and start in ("-", found[1])
    # No entry in /proc: no such process, or one that this user may not see (hidepid), or a system without /proc.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True if start == "-" else None


def effective_state(record: RunRecord) -> RunState:
    """The state of a run as an executor called now would find it.

    A store shows a killed run as running until its lease ends, as it knows no processes. Where its owner certainly is
    gone, as on this machine, it is ``crashed`` already, and whoever claims it succeeds at once.
    """
    if record.state is RunState.RUNNING and record.owner is not None and is_alive(record.owner) is False:
        return RunState.CRASHED
    return record.state
