"""Files that survive a kill: ids as file names, atomic replacement, checked JSON.

A file is replaced, never changed: written beside its place under a temporary name, synced, renamed, and its directory
synced. So a reader, and a process after a crash, sees the old file or the new one.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import secrets
import time
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import orjson

from framework import _faults
from framework.errors import CorruptData, StoreTooNew

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the layout and of each file's form; a reader refuses a newer one.

2 has journals and times to wake at, 3 the short forms of what each step writes (``short_forms.py``).
"""

MAX_NAME_BYTES = 150
STALE_SECONDS = 3_600.0

_TEMPORARY = ".tmp"
_RAW, _BASE64 = "$raw", "$base64"
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
