"""Reading the write-ahead log of an SQLite file as it is, to notice commits in it that SQLite passes over in silence.

SQLite takes the first frame that does not match its checksum for the end of the log, as it must: a crash may leave half
a frame there. Commits after a damaged frame are dropped for good when the file is opened by the next process. The form
of the log is in https://www.sqlite.org/fileformat2.html#the_write_ahead_log.
"""

from __future__ import annotations

import struct
import sys
import time
from array import array
from pathlib import Path

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682
_WORD = 0xFFFFFFFF
_LOOKS, _PAUSE_SECONDS = 3, 0.05


def lost_commits(store: Path) -> str | None:
    """What is wrong with the log of the SQLite file ``store``, or ``None``. Opens, locks and changes nothing.

    Somebody may be writing to it: only what several looks find alike is told.
    """
    path = Path(f"{store}-wal")
    told: str | None = None
    for look in range(_LOOKS):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"the log {path} cannot be read: {error.strerror}"
        problem = examine(data)
        if problem is None or (look and problem != told):
            return None
        told = problem
        if look < _LOOKS - 1:
            time.sleep(_PAUSE_SECONDS)
    return told


def examine(data: bytes) -> str | None:
    """What is wrong with the bytes of a log, or ``None``."""
    if len(data) < _HEADER.size:
        return None  # made, and nothing written yet
    magic, _, page_bytes, _, *salt, first, second = _HEADER.unpack_from(data)
    if magic & ~1 != _MAGIC or not 512 <= page_bytes <= 65_536:
        return "its header is damaged" if any(data) else None
    big = bool(magic & 1)
    sums = _checksum(data[:24], (0, 0), big)
    if sums != (first, second):
        return "its header does not match its checksum"
    frame_bytes = _FRAME.size + page_bytes
    commits = 0
    bad: int | None = None
    for number, start in enumerate(range(_HEADER.size, len(data) - frame_bytes + 1, frame_bytes), 1):
        _, pages, *rest = _FRAME.unpack_from(data, start)
        if rest[:2] != salt:
            break  # of an earlier round of the log
        if bad is None:
            sums = _checksum(data[start : start + 8], sums, big)
            sums = _checksum(data[start + _FRAME.size : start + frame_bytes], sums, big)
            if sums != tuple(rest[2:]):
                bad = number
        if bad is not None and pages:
            commits += 1
    if bad is None or not commits:
        return None
    return f"frame {bad} of its log does not match its checksum, and {commits} commit(s) from there on cannot be read"


def _checksum(data: bytes, sums: tuple[int, int], big: bool) -> tuple[int, int]:
    words = array("I")
    words.frombytes(data)
    if big != (sys.byteorder == "big"):
        words.byteswap()
    first, second = sums
    pairs = iter(words)
    for one, other in zip(pairs, pairs, strict=True):
        first = (first + one + second) & _WORD
        second = (second + other + first) & _WORD
    return first, second
