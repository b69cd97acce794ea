"""Locks of a ``FileStorage`` between processes: ``flock`` on files that have nothing but marks in them."""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

from framework.errors import StorageError

if sys.platform != "win32":
    import fcntl

BUSY_SECONDS = 30.0
"""How long another process is waited for when nothing else is said."""

_MARK_BYTES = 16
_FIRST_PAUSE_SECONDS = 0.000_2
_LONGEST_PAUSE_SECONDS = 0.01


class HeldUp(StorageError):
    """Other processes have kept a lock for longer than there was patience. What was asked was not begun."""


class Want(NamedTuple):
    """A lock to take: the file, and whether others may have it ``shared`` at the same time."""

    path: Path
    shared: bool = False


class HeldLock:
    """A lock that is held; without a ``descriptor``, one that was gone without.

    Its file has room for marks, by which a process sees whether another one changed something since it held the lock
    itself: writing nothing but random bytes to a file that is open, and never synced, costs next to nothing, and a
    machine that stops takes everyone with it who remembered a mark. ``is_held_up``: another process has the lock.
    """

    def __init__(self, descriptor: int | None, *, is_held_up: bool = False) -> None:
        self._descriptor = descriptor
        self.is_held_up = is_held_up

    def mark(self, place: int) -> bytes | None:
        """The mark at a place, ``None`` when nobody wrote one."""
        if self._descriptor is None:
            return None
        found = os.pread(self._descriptor, _MARK_BYTES, place * _MARK_BYTES)
        return found if found.strip(b"\0") else None

    def new_mark(self, place: int) -> bytes:
        """Leave a mark that was never there; only for who holds the lock alone."""
        mark = os.urandom(_MARK_BYTES)
        if self._descriptor is None or os.pwrite(self._descriptor, mark, place * _MARK_BYTES) != _MARK_BYTES:
            raise OSError(errno.EIO, "a lock's mark was not written whole")
        return mark

    def release(self) -> None:
        """Let others have it; nothing when it is released already."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or sys.platform == "win32":
            return
        try:
            # Said aloud: a child forked meanwhile has the descriptor too, and would keep the lock by it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def try_lock(want: Want) -> HeldLock | None:
    """Hold a lock file against other processes, unless it is taken: then ``None``. It never waits.

    The system releases it when a process dies. A lock file may be removed by who holds it exclusively: whoever comes
    then takes the new one.
    """
    if sys.platform == "win32":
        raise StorageError("FileStorage needs the file locks of POSIX systems; use SQLiteStorage here.")
    while True:
        try:
            descriptor = os.open(want.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if not want.shared or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            # A store this process may only read: there is no lock to take, and replaced files are whole anyway.
            return HeldLock(None)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if want.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            is_current = _is_at(descriptor, want.path)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        lock = HeldLock(descriptor)
        if is_current:
            return lock
        lock.release()


class Patience:
    """How long to go on asking for locks that others have, ever less often."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self) -> bool:
        """Wait a little before asking again; ``False``, at once, when patience is over."""
        left = self._until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, self._pause * random.uniform(0.5, 1.0)))  # several that wait do not ask in step
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        return True

    def over(self, want: Want) -> HeldUp:
        """What to raise when it is over, and another has what was wanted."""
        path, seconds = want.path, f"{self._seconds:g} s"
        if not want.shared and _is_shared(path):
            return HeldUp(
                f"For {seconds} there was always another process that reads under {path}, so it was never free to be "
                f"written: several take turns, or one is stopped. Call again when there is less going on, or look "
                f"whether one of them hangs (`fuser {path}` names them) and let it go on, or end it."
            )
        return HeldUp(
            f"Another process has held {path} for {seconds}: it is stopped, or hangs in the middle of a write. Let it "
            f"go on, or end it (`fuser {path}` names it), and call again: its lock goes with it, and what it had not "
            "finished counts as not done."
        )


def _is_shared(path: Path) -> bool:
    """Whether those who have a lock, if any, let others share it."""
    try:
        lock = try_lock(Want(path, shared=True))
    except OSError:
        return False
    if lock is not None:
        lock.release()
    return lock is not None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
