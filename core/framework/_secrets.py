"""The secrets this process knows, and how they are kept out of every text that is shown or stored.

Whoever takes a key into the program calls ``register_secret``; every place that shows or stores a text of foreign
origin (an exception's message, a tool's answer, a log record) passes it through ``mask``. Nothing is ever written from
here: the secrets live in this process's memory only, and are not part of a ``repr``.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit, urlunsplit

MASK = "***"
MIN_LENGTH = 8
"""Shorter values are not registered: replacing them would damage texts that have nothing to do with them."""

_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|PASSCODE|PGPASS|CREDENTIAL|CREDS|AUTHORIZATION|BEARER|COOKIE|JWT"
    # Short ones only as words of their own: PATH, AUTHOR and PWD, the working directory, are other things.
    r"|(?:^|[_-])(?:PAT|DSN)(?:$|[_-])|(?:^|[_-])O?AUTH$|(?:^|[_-])(?-i:PASS)$|[_-]PWD$|CONNECTION_?STRING",
    re.IGNORECASE,
)
# Variables such as AWS_KEY_FILE name a place, not a secret; masking a path would hide where something went wrong.
_PLACE_NAME = re.compile(r"(FILE|PATH|DIR|HOME)$", re.IGNORECASE)
# What a setting such as KEY_ROTATION may say; masking these words would damage every text.
_NO_SECRETS = frozenset(
    "automatic development disabled localhost optional production readonly required staging undefined".split()
)
# Headers that say what is sent and how, never who sends it.
_PLAIN_HEADER = re.compile(
    r"(accept|content|cache|sec|x-forwarded|access-control)-.*|accept|host|user-agent|connection|origin|referer|range|te"
    r"|prefer|date|from|via|upgrade|expect|if-.*|mcp-protocol-version|anthropic-version|traceparent",
    re.IGNORECASE,
)


class _Known:
    """The registered values and one compiled pattern of all their spellings, longest first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: set[str] = set()
        self.pattern: re.Pattern[str] | None = None


_known = _Known()


def register_secret(value: str | None) -> None:
    """Make ``mask`` replace ``value`` from now on, also where it is JSON-escaped, URL-quoted or base64-encoded.

    Surrounding white space does not count. None and values of fewer than 8 characters are not registered. May be called
    from any thread, and again with the same value.
    """
    secret = (value or "").strip()
    if len(secret) < MIN_LENGTH or secret in _known.values:
        return
    with _known.lock:
        _known.values.add(secret)
        spellings = {spelling for known in _known.values for spelling in _spellings(known)}
        # Longest first: an alternative that is the beginning of another one must not win and leave the rest behind.
        _known.pattern = re.compile("|".join(re.escape(text) for text in sorted(spellings, key=len, reverse=True)))


def register_named(name: str, value: str | None) -> None:
    """Register ``value`` if the setting's ``name`` says that it is a secret (``*KEY*``, ``*TOKEN*``, ``*SECRET*``,
    ``*PASSWORD*`` and the like, in any case), and in any case what a URL has of them: ``scheme://user:password@host``,
    ``?api_key=...``.
    """
    if is_secret_name(name) and not _is_plain_word(value):
        register_secret(value)
    if value and "://" in value:
        _register_url(value, is_secret_name)


def register_url(url: str | None) -> None:
    """Register what a service's URL holds beside its place: the password, also as a client sends it (the base64 of
    ``user:password``), a user's name that stands alone, and the value of every parameter of the query.
    """
    if url:
        _register_url(url, lambda _: True)


def place_of(url: str) -> str | None:
    """``url`` without user, password, query and fragment, as it may be stored. None for what is no URL."""
    parts = _split(url)
    if parts is None or not parts.scheme or not parts.netloc:
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def register_environment(environment: Mapping[str, str] | None = None) -> None:
    """Register the secrets among the environment variables (of this process unless others are given)."""
    for name, value in (os.environ if environment is None else environment).items():
        register_named(name, value)


def register_server_setting(name: str, value: str | None) -> None:
    """Register an environment variable that somebody chose to give to one service, whatever its name: it is a secret
    unless the name says that it is a place (``*_DIR``, ``*_PATH``, ...) or the value is a plain word.
    """
    register_url(value)
    if _PLACE_NAME.search(name) is None and not _is_plain_word(value):
        register_secret(value)


def register_server_header(name: str, value: str | None) -> None:
    """Register an HTTP header that somebody chose to send to one service, unless it only says what is sent and how.

    Of ``Bearer abc...`` the part after the scheme is registered too, and of ``Basic abc...`` the password in it.
    """
    if not value or _PLAIN_HEADER.fullmatch(name.strip()) or _is_plain_word(value):
        return
    register_header(name, value)
    register_secret(value)
    scheme, _, rest = value.strip().partition(" ")
    if scheme.lower() in ("basic", "bearer", "token", "apikey", "digest", "negotiate"):
        register_secret(rest)
    if scheme.lower() == "basic":
        register_secret(_password_in(rest))


def register_header(name: str, value: str | None) -> None:
    """Register an HTTP header's value if its name says that it is a secret: ``X-Api-Key``, ``Authorization``, ...

    Of ``Bearer abc...`` the part after the scheme is registered too, since that is what servers repeat.
    """
    if value and (is_secret_name(name) or "auth" in name.lower()):
        register_secret(value)
        register_secret(value.strip().partition(" ")[2])


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None and _PLACE_NAME.search(name) is None


def mask(text: str) -> str:
    """``text`` with every known secret replaced by ``***``. Without known secrets this returns ``text`` itself."""
    pattern = _known.pattern
    return text if pattern is None else pattern.sub(MASK, text)


def mask_value(value: Any) -> Any:
    """``value`` with every known secret masked in its texts: in strings, and in the keys and items of lists, tuples and
    dicts at any depth. A number that contains a secret becomes ``***``. The value itself is never changed; without
    anything to mask it is returned as it is. Objects of other types are not looked into.
    """
    if _known.pattern is None:
        return value
    if isinstance(value, str):
        masked = mask(value)
        return value if masked == value else masked
    if isinstance(value, dict):
        pairs = {mask_value(key): mask_value(item) for key, item in value.items()}
        return value if _same(pairs.keys(), value.keys()) and _same(pairs.values(), value.values()) else pairs
    if type(value) in (list, tuple):
        items = [mask_value(item) for item in value]
        return value if _same(items, value) else type(value)(items)
    if type(value) in (int, float) and mask(str(value)) != str(value):
        return MASK
    return value


def mask_error(error: BaseException) -> str:
    """An exception's message, or the name of its type when it has none, masked."""
    return mask(str(error) or type(error).__name__)


def masked_traceback(error: BaseException) -> str:
    """An exception's traceback as text, with those of its causes, masked: for a log record whose handlers need no
    filter. Give it as an argument of the message, and no ``exc_info``, which every handler would print as it is."""
    return mask("".join(traceback.format_exception(error)).rstrip("\n"))


def known_secrets() -> int:
    """How many secrets are registered."""
    return len(_known.values)


def forget_secrets() -> None:
    """Forget every registered secret. For tests."""
    with _known.lock:
        _known.values.clear()
        _known.pattern = None


class SecretFilter(logging.Filter):
    """Masks log records: message, traceback, stack and extra attributes. Add it to a *handler*, not to a logger: a
    logger's filter does not see the records of the loggers below it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Mask ``record`` in place. Always True: no record is dropped."""
        if _known.pattern is None:
            return True
        try:
            message = record.getMessage()
        except Exception:
            # Arguments that do not fit the message: `logging` reports that itself when the handler formats the record.
            # What it prints are the message and the arguments, so these are masked one by one.
            record.msg, record.args = mask_value(record.msg), mask_value(record.args)
        else:
            if (masked := mask(message)) != message:
                record.msg, record.args = masked, None
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
            if (masked := mask(text)) != text:
                # A formatter prints `exc_text` when it is set; without `exc_info` none makes the text anew.
                record.exc_text, record.exc_info = masked, None
        if record.exc_text:
            record.exc_text = mask(record.exc_text)
        if record.stack_info:
            record.stack_info = mask(record.stack_info)
        for name, value in list(record.__dict__.items()):
            if name not in _OWN_ATTRIBUTES:
                record.__dict__[name] = mask_value(value)
        return True


_OWN_ATTRIBUTES = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__)


def _spellings(secret: str) -> Iterator[str]:
    """The ways in which a text may contain ``secret``."""
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield quote(secret)
    yield quote(secret, safe="")
    yield base64.b64encode(secret.encode("utf-8", "surrogateescape")).decode("ascii")


def _is_plain_word(value: str | None) -> bool:
    return (value or "").strip().lower() in _NO_SECRETS


def _split(url: str) -> SplitResult | None:
    try:
        return urlsplit(url.strip())
    except ValueError:  # not a URL after all
        return None


def _register_url(url: str, is_secret: Callable[[str], bool]) -> None:
    """Register user and password of ``url``, and those values of its query whose names are secret."""
    parts = _split(url)
    if parts is None:
        return
    user, password = parts.username or "", parts.password or ""
    # In the URL characters may be written as %40; the program and the other side have them as they are.
    for text in (password, unquote(password)):
        register_secret(text)
    if password:
        for name, word in ((user, password), (unquote(user), unquote(password))):
            register_secret(base64.b64encode(f"{name}:{word}".encode("utf-8", "surrogateescape")).decode("ascii"))
        if len(password) < MIN_LENGTH:
            register_secret(parts.netloc)
    elif parts.scheme.lower() in ("http", "https"):
        # A name alone is a key, as in https://KEY@host; databases have harmless names there, such as "postgres".
        register_secret(user)
        register_secret(unquote(user))
    for pair in parts.query.split("&"):
        raw = pair.partition("=")[2]
        for name, value in parse_qsl(pair):
            if is_secret(name) and not _is_plain_word(value):
                register_secret(value)
                register_secret(raw)
                if len(value) < MIN_LENGTH and is_secret_name(name):
                    register_secret(pair)


def _password_in(encoded: str) -> str | None:
    """The password in the base64 of ``user:password``."""
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:  # neither that nor text
        return None


def _same(left: Collection[Any], right: Collection[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
