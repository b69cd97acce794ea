"""Files that survive a kill: ids as file names, atomic replacement, locks between processes, checked JSON.

A file is replaced, never changed: written beside its place under a temporary name, synced, renamed, and its directory
synced. So a reader, and a process after a crash, sees the old file or the new one.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import orjson

from framework import _faults
from framework.errors import CorruptData, StorageError, StoreTooNew

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the layout and of each file's form; a reader refuses a newer one.

2 has journals and times to wake at, 3 the short forms of what each step writes (``short_forms.py``).
"""

MAX_NAME_BYTES = 150
STALE_SECONDS = 3_600.0

_TEMPORARY = ".tmp"
_RAW, _BASE64 = "$raw", "$base64"
_MARK_BYTES = 16
_MARGIN = 6
"""Levels of JSON that a file may put around a value: orjson writes at most 254."""


# --- names ----------------------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    """``text`` as one file name: ordinary ids as they are, anything else percent-encoded, long ones cut and hashed.

    Never empty, never ``.`` or ``..``, never hidden, and two texts never share one. (On a file system that ignores
    case, ids that differ only in case would; such a file is then reported as belonging to another run.)
    """
    # quote() leaves "~" alone; here it marks a name that was cut, or a second file of one id.
    encoded = quote(text, safe="", errors="surrogatepass").replace("~", "%7E") or "%"
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) <= MAX_NAME_BYTES:
        return encoded
    head = encoded[:100]
    if "%" in head[-2:]:  # not through the middle of an escape
        head = head[: head.rindex("%")]
    return f"{head}~{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:40]}"


def text_of(name: str) -> str | None:
    """The text that ``file_name`` encoded, or ``None`` when the name was cut."""
    if "~" in name:
        return None
    return "" if name == "%" else unquote(name, errors="surrogatepass")


# --- writing --------------------------------------------------------------------------------------------------------


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably; nothing when it exists."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def write_atomic(path: Path, data: bytes, *, durable: bool = True, point: str | None = None) -> None:
    """Put ``data`` at ``path`` in one step. ``durable=False``, for hints, leaves the time of the sync to the system.

    ``point`` names a fault point reached when all is written and nothing visible yet.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if point is not None:
            _faults.reach(point)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error counts; a left-over is ignored and cleaned later
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def remove_stale(root: Path) -> None:
    """Remove temporary files that a crash left behind. Younger ones may be another process's work in progress."""
    oldest = time.time() - STALE_SECONDS
    for directory, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(_TEMPORARY):
                path = Path(directory, name)
                try:
                    if path.stat().st_mtime < oldest:
                        path.unlink()
                except OSError as error:  # gone by itself, or not ours to remove: harmless either way
                    logger.info("Left-over file %s stays: %s", path, error)


# --- locks ----------------------------------------------------------------------------------------------------------


class HeldLock:
    """A lock that is held. Its file has room for marks, by which a process sees whether another one changed something
    since it held the lock itself: writing nothing but random bytes to a file that is open, and never synced, costs
    next to nothing, and a machine that stops takes everyone with it who remembered a mark."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

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


BUSY_SECONDS = 30.0
"""How long another process is waited for when nothing else is said."""
_FIRST_PAUSE_SECONDS = 0.000_2
_LONGEST_PAUSE_SECONDS = 0.01


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, busy_seconds: float = BUSY_SECONDS) -> Iterator[HeldLock]:
    """Hold the lock file at ``path`` against other processes; the system releases it when a process dies.

    A lock file may be removed by who holds it exclusively: whoever waited on it notices and takes the new one. Raises
    ``StorageError`` when somebody has held it for ``busy_seconds``: a process that is stopped would for ever.
    """
    if sys.platform == "win32":
        raise StorageError("FileStorage needs the file locks of POSIX systems; use SQLiteStorage here.")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if not shared or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            # A store this process may only read: there is no lock to take, and replaced files are whole anyway.
            yield HeldLock(None)
            return
        try:
            _take(descriptor, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, busy_seconds)
            if _is_at(descriptor, path):
                try:
                    yield HeldLock(descriptor)
                finally:
                    # Said aloud: a child forked meanwhile has the descriptor too, and would keep the lock by it.
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                return
        finally:
            os.close(descriptor)


def _take(descriptor: int, path: Path, kind: int, busy_seconds: float) -> None:
    """Lock a file, asking ever less often while somebody else has it. Raises ``StorageError``."""
    until = time.monotonic() + busy_seconds
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise StorageError(
                    f"Another process has held {path} for {busy_seconds:g} s: it is stopped, or hangs in the middle of "
                    f"a write. Let it go on, or end it (`fuser {path}` names it), and call again: its lock goes with "
                    "it, and what it had not finished counts as not done."
                ) from None
        else:
            return
        time.sleep(pause * random.uniform(0.5, 1.0))  # several that wait do not ask in step
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# --- checked JSON ---------------------------------------------------------------------------------------------------


def show(data: bytes) -> Any:
    """Bytes as they appear in a file: as JSON where that gives the very bytes back, else as text or base64."""
    try:
        value = orjson.loads(data)
        wrapped = b"[" * _MARGIN + data + b"]" * _MARGIN
        stable = orjson.dumps([[[[[[value]]]]]]) == wrapped
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        stable = False
    if stable and not (isinstance(value, dict) and (_RAW in value or _BASE64 in value)):
        return value
    try:
        return {_RAW: data.decode()}
    except UnicodeDecodeError:
        return {_BASE64: base64.b64encode(data).decode("ascii")}


def unshow(value: Any) -> bytes:
    """The bytes that ``show`` made ``value`` of. Raises ``ValueError``, ``TypeError`` on anything else."""
    if isinstance(value, dict):
        if _RAW in value:
            return str(value[_RAW]).encode()
        if _BASE64 in value:
            return base64.b64decode(value[_BASE64], validate=True)
    return orjson.dumps(value)


def _digest(content: dict[str, Any]) -> str:
    return blake2b(orjson.dumps(content), digest_size=16).hexdigest()


def dump_checked(content: dict[str, Any]) -> bytes:
    """``content`` as a readable file with its format version and checksum."""
    whole = {"format": FORMAT, **content}
    whole["checksum"] = _digest(whole)
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def load_checked(path: Path) -> dict[str, Any]:
    """The content of a file that ``dump_checked`` made. White space does not count, everything else does.

    Raises ``CorruptData``, ``StoreTooNew``, ``OSError``.
    """
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise CorruptData(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CorruptData(f"{path} is not a file of this store.")
    expected = content.pop("checksum", None)
    try:
        matches = expected == _digest(content)
    except orjson.JSONEncodeError:  # nested deeper than anything written here
        matches = False
    if not matches:
        raise CorruptData(f"{path} does not match its checksum: it was damaged or edited.")
    version = content.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise StoreTooNew(f"{path} has format version {version!r}; this library knows {FORMAT}. Upgrade surefoot.")
    return content
