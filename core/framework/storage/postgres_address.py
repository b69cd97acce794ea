"""Where a PostgreSQL store is: a URL taken apart into what libpq gets, what is shown, and our own options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from framework import _secrets
from framework.errors import StorageError

SCHEMES = ("postgresql", "postgres")
DEFAULT_SCHEMA = "surefoot"
POOL_SIZE = 4
PATIENCE_SECONDS = 30.0

_OPTIONS = ("schema", "pool_size", "patience_seconds", "listen", "prepare")
_SECRET_OPTIONS = ("password", "sslpassword")
_MAX_SCHEMA = 63
"""Bytes of a name in PostgreSQL; a longer one would be cut short."""


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """``conninfo`` is for libpq and holds the password; ``shown`` is a URL that does not.

    ``listen_conninfo`` is where notices are waited for, ``None`` for nowhere. ``pool_size`` is how many connections
    there are at most for the rest, ``patience_seconds`` how long a database that is away is waited for, ``prepare``
    whether the server is to keep statements that are made often.
    """

    conninfo: str
    shown: str
    schema: str
    pool_size: int
    patience_seconds: float
    listen_conninfo: str | None
    prepare: bool

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"


def parse(url: str) -> Address:
    """Take ``postgresql://user:password@host:port/database?option=value&...`` apart.

    Our options are ``schema``, ``pool_size``, ``patience_seconds``, ``listen`` and ``prepare``; others are libpq's.
    Registers the password as a secret. Raises ``StorageError``, whose text never holds what the URL said.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _wrong("it is no URL") from None
    if parts.scheme not in SCHEMES or parts.fragment:
        raise _wrong(f"it begins with {SCHEMES[0]}:// and has no #; write # in a name or password as %23")
    ours, libpq, shown_options = _split_options(parts.query)
    user_part, at, place = parts.netloc.rpartition("@")
    user, _, password = user_part.partition(":")
    for text in (password, unquote(password), *(unquote(value) for name, value in libpq if name in _SECRET_OPTIONS)):
        _secrets.register_secret(text)
    for part in (user_part, place, parts.path, parts.query):
        if re.search(r"%(?![0-9A-Fa-f]{2})", part):
            raise _wrong("a % in it is not followed by two hexadecimal digits; write % itself as %25")
    query = "&".join(f"{name}={value}" for name, value in libpq)
    path = parts.path or "/"
    conninfo = f"postgresql://{parts.netloc}{path}" + (f"?{query}" if query else "")
    shown_query = "&".join(f"{name}={value}" for name, value in shown_options)
    shown = f"postgresql://{user}{at}{place}{path}" + (f"?{shown_query}" if shown_query else "")
    listen = unquote(ours.get("listen", ""))
    prepare = ours.get("prepare", "no" if listen else "yes")
    if prepare not in ("yes", "no"):
        raise _wrong("prepare is yes or no")
    return Address(
        conninfo,
        shown,
        _schema(unquote(ours.get("schema", DEFAULT_SCHEMA))),
        int(_number(ours, "pool_size", POOL_SIZE, 1, 1_000)),
        _number(ours, "patience_seconds", PATIENCE_SECONDS, 0, 86_400),
        None if listen == "no" else _elsewhere(conninfo, user_part + at, listen, path, query),
        prepare == "yes",
    )


def without_password(url: str) -> str:
    """``url``, of whatever kind, for an error message."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    secrets = [value for name, _, value in map(_split_pair, parts.query.split("&")) if _secrets.is_secret_name(name)]
    secrets.append(parts.netloc.rpartition("@")[0].partition(":")[2])
    for secret in filter(None, secrets):
        url = url.replace(secret, _secrets.MASK)
    return url


def _split_pair(pair: str) -> tuple[str, str, str]:
    name, sign, value = pair.partition("=")
    return unquote(name), sign, value


def _split_options(query: str) -> tuple[dict[str, str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Ours, libpq's, and those of both that may be shown; values as they are written."""
    ours: dict[str, str] = {}
    libpq, shown = [], []
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        name = unquote(name)
        if name in _OPTIONS:
            if name in ours:
                raise _wrong(f"it gives {name} twice")
            ours[name] = value
        else:
            libpq.append((name, value))
        if name not in _SECRET_OPTIONS:
            shown.append((name, value))
    return ours, libpq, shown


def _elsewhere(conninfo: str, user_part: str, listen: str, path: str, query: str) -> str:
    """``conninfo`` with another host and port, unless ``listen`` is empty."""
    if not listen:
        return conninfo
    if not re.fullmatch(r"[\w.:\[\]-]+", listen):
        raise _wrong("listen is a host:port for a connection of its own, or no")
    others = "&".join(pair for pair in query.split("&") if pair and pair.partition("=")[0] not in ("host", "port"))
    return f"postgresql://{user_part}{listen}{path}" + (f"?{others}" if others else "")


def _schema(name: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*", name) or len(name.encode()) > _MAX_SCHEMA or name.lower().startswith("pg_"):
        raise _wrong(f"schema is a name of letters, digits and _, at most {_MAX_SCHEMA} bytes, and not one of pg_...")
    return name


def _number(options: dict[str, str], name: str, default: float, least: float, most: float) -> float:
    try:
        value = float(options.get(name, default))
        fits = least <= value <= most and (name != "pool_size" or value == int(value))
    except ValueError:
        fits = False
    if not fits:
        raise _wrong(f"{name} is a number from {least:g} to {most:g}")
    return value


def _wrong(problem: str) -> StorageError:
    return StorageError(
        f"The URL of a PostgreSQL store cannot be used: {problem}. "
        "It looks like postgresql://user:password@host:5432/database?schema=surefoot."
    )
