"""Values, times and amounts as short texts for people. Pure."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from framework._secrets import MASK, is_secret_name

# A value, an id or an error may hold anything, also sequences that move the cursor or rename the terminal's window.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """``text`` with control characters other than newline and tab written as escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n")).expandtabs(4)


def width_of(text: str) -> int:
    """How many cells ``text`` takes in a terminal."""
    text = clean(text)
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def shortened(text: str, limit: int) -> str:
    """``text`` in one line of at most ``limit`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def preview(value: Any, limit: int = 2000) -> str:
    """A value of the state for reading: texts as they are, others as JSON; at most ``limit`` characters."""
    if isinstance(value, str):
        text = value
    else:
        from framework.runner.cli.output import jsonable  # noqa: PLC0415 - it imports this module

        data = jsonable(value)
        text = json.dumps(data, ensure_ascii=False)
        if len(text) > 70:
            text = json.dumps(data, ensure_ascii=False, indent=2)
    if len(text) > limit:
        return f"{text[:limit]}... ({len(text):,} characters)"
    return text


def duration(seconds: float) -> str:
    """``0.8 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for unit, size, below, small in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if whole < {"min": 3600, "h": 86400, "d": 10**12}[unit]:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def ago(seconds: float) -> str:
    """How long ago something was, roughly: ``now``, ``40 s ago``, ``3 min ago``, ``5 h ago``, ``2 d ago``."""
    if seconds < 1:
        return "now"
    for unit, size, limit in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 36 * 3600)):
        if seconds < limit:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds // 86400)} d ago"


def timestamp(epoch_seconds: float) -> str:
    """A moment as in JSON output: ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock_time(epoch_seconds: float) -> str:
    """A moment as in tables: local date and time to the second."""
    return datetime.fromtimestamp(epoch_seconds).strftime("%Y-%m-%d %H:%M:%S")


def money(dollars: float) -> str:
    """An amount of USD: ``$0.0042``, ``$1.25``."""
    return f"${dollars:.4f}" if dollars < 1 else f"${dollars:,.2f}"


def tokens(count: int) -> str:
    """``1 token``, ``1,234 tokens``."""
    return counted(count, "token")


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where needed."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(byte_count: int) -> str:
    """``512 B``, ``1.5 KB``, ``3.2 MB`` (powers of 1024)."""
    amount = float(byte_count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1024 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{byte_count} B"


def shown_url(url: str) -> str:
    """``url`` with its password, a user's name that stands alone in a web address, and secret values of its query
    as ``***``."""
    try:
        parts = urlsplit(url)
        password, user = parts.password, parts.username
    except ValueError:  # not a URL
        return url
    place = parts.netloc
    if password is not None:
        place = f"{place.partition(':')[0]}:{MASK}@{place.rpartition('@')[2]}"
    elif user and parts.scheme in ("http", "https"):
        place = f"{MASK}@{place.rpartition('@')[2]}"
    pairs = [pair.partition("=") for pair in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}{mark}{MASK if value and is_secret_name(name) else value}" for name, mark, value in pairs)
    if (place, query) == (parts.netloc, parts.query):
        return url
    return urlunsplit((parts.scheme, place, parts.path, query, parts.fragment))


def answer_form(keys: Sequence[str]) -> str:
    """What to answer a pause with, to be filled in: ``{"approved": <answer>}``. No JSON, so that it cannot be sent as
    it is: a text such as ``...`` would count as a yes."""
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: <answer>" for key in keys) + "}"


def command_line(*words: str | Sequence[str]) -> str:
    """Words of a command as they are typed in a shell."""
    flat: list[str] = []
    for word in words:
        flat += [word] if isinstance(word, str) else word
    return shlex.join(flat)
