"""What a call raised, as a row of the journal and raised again; which exceptions leave an effect unknown. Pure."""

from __future__ import annotations

import asyncio
import builtins
import socket
import ssl
import sys
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor
from typing import Any

from framework import errors
from framework._secrets import mask, mask_value
from framework.errors import (
    BudgetExceeded,
    CallFailed,
    LeaseLost,
    StorageError,
    ToolOutcomeUnknown,
    UnknownEffect,
    UnstorableValue,
)
from framework.graph.worker_errors import CONNECTION, TIMEOUT, transient_kind
from framework.storage import codec

_LONGEST_TEXT = 10_000

# What was never sent has no effect: these say that there was no connection to send it over, or that none was opened to
# this host. Names of classes of the common clients, subclasses included; none of them is imported for this.
_NOT_SENT = frozenset(
    {
        "ClientConnectorError",  # aiohttp, of names and certificates too
        "ConnectError",  # httpx, httpcore
        "ConnectTimeout",  # httpx, requests
        "ConnectTimeoutError",  # urllib3, botocore
        "ConnectionTimeoutError",  # aiohttp
        "EndpointConnectionError",  # botocore
        "NewConnectionError",  # urllib3, of names too
        "PoolTimeout",  # httpx
    }
)
# The same, as the system or the TLS library says it; the clients' exceptions above are made from these and others.
_NEVER_OPENED = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
# What says by itself that an answer was waited for, or that a connection was lost which had been there.
_CUT_OFF = (
    asyncio.CancelledError,
    BrokenExecutor,
    BrokenPipeError,
    ConnectionAbortedError,
    ConnectionResetError,
    EOFError,
    ToolOutcomeUnknown,
    ssl.SSLError,
)
_GOES_ON = (ssl.SSLWantReadError, ssl.SSLWantWriteError)  # no errors, but met behind those of a TLS connection
_CUT_OFF_NAMES = frozenset(
    {
        "BrokenResourceError",  # anyio, trio
        "ChunkedEncodingError",  # requests
        "ClientPayloadError",  # aiohttp
        "ConnectionClosed",  # websockets
        "ConnectionClosedError",  # botocore
        "EndOfStream",  # anyio
        "IncompleteRead",  # http.client, urllib3
        "ReadTimeout",  # httpx, requests
        "ReadTimeoutError",  # urllib3, botocore
        "RemoteProtocolError",  # httpx, h11
        "SMTPServerDisconnected",  # smtplib
        "ServerDisconnectedError",  # aiohttp
        "TimeoutExpired",  # subprocess
        "WriteTimeout",  # httpx
    }
)
_MOST_LOOKED_AT = 200
"""Exceptions behind one that are looked at."""


def is_recorded(error: BaseException) -> bool:
    """Whether an exception is an outcome of the call that raised it; not one about the run, its store or journal."""
    about_the_run = (StorageError, LeaseLost, BudgetExceeded, UnknownEffect, UnstorableValue)
    return isinstance(error, Exception) and not isinstance(error, about_the_run)


def leaves_unknown(error: BaseException, handled: BaseException | None = None) -> bool:
    """Whether a call that raised this may have had its effect all the same: no answer came in time, the connection was
    lost on the way, or it was cut off. One that never came about, such as a refused connection, proves that nothing
    happened.

    Looked at is also what stands behind ``error``: the members of a group, what it was raised from, what it names as
    its reason, and what was being handled when it was raised; but not ``handled``, which the caller of the call was
    handling when that began. Only what an exception says itself to be made from can prove that nothing was sent: what
    was merely being handled may be an earlier try.
    """
    known: set[int] = set() if handled is None or handled is error else {id(handled)}
    roots = [error]
    while roots:
        root = roots.pop()
        if id(root) in known:
            continue
        tree = _made_from(root, known)
        if len(known) > _MOST_LOOKED_AT or _fate(root, {id(each) for each in tree}) == "unknown":
            return True
        for each in tree:
            before = each.__context__
            if before is not None and _is_translated(each, before):
                known.add(id(before))
                before = before.__context__
            if before is not None:
                roots.append(before)
    return False


def _made_from(root: BaseException, known: set[int]) -> list[BaseException]:
    """The exception and what it and those say they are made from, each once; all of it is known then."""
    found, todo = list[BaseException](), [root]
    while todo and len(known) <= _MOST_LOOKED_AT:
        each = todo.pop()
        if id(each) not in known:
            known.add(id(each))
            found.append(each)
            todo += _parts(each)
    return found


def _parts(error: BaseException) -> list[BaseException]:
    """What an exception says it is made from."""
    named: list[object] = [error.__cause__, getattr(error, "reason", None), *error.args]
    if isinstance(error, BaseExceptionGroup):
        named += error.exceptions
    return [each for each in named if isinstance(each, BaseException)]


def _fate(error: BaseException, within: set[int]) -> str | None:
    """What an exception says of the request: "unknown", "not sent", or nothing. Each of ``within`` is asked once."""
    within.discard(id(error))
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _NOT_SENT or isinstance(error, _NEVER_OPENED):
        return "not sent"
    if names & _CUT_OFF_NAMES or (isinstance(error, _CUT_OFF) and not isinstance(error, _GOES_ON)):
        return "unknown"
    fates = {_fate(each, within) for each in _parts(error) if id(each) in within}
    if "unknown" in fates:
        return "unknown"
    if "not sent" in fates:
        return "not sent"
    return "unknown" if transient_kind(error) in (TIMEOUT, CONNECTION) else None


def _is_translated(error: BaseException, before: BaseException) -> bool:
    """Whether a client's word for no connection was put in place of the system's error, without saying so."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & _NOT_SENT) and error.__cause__ is None and type(before) in (OSError, TimeoutError)


def plain_error(error: Exception) -> dict[str, Any]:
    """An exception as data: its class, what it says, and its arguments and attributes as far as they can be stored.
    Known secrets are masked."""
    kind = type(error)
    if isinstance(error, CallFailed):  # raised again, and passed on by a call around it
        name, module = error.type.rpartition(".")[2], error.type.rpartition(".")[0]
    else:
        name, module = kind.__qualname__, kind.__module__
    plain: dict[str, Any] = {"type": name, "module": module, "text": mask(str(error))[:_LONGEST_TEXT]}
    args = mask_value(list(error.args))
    if _is_storable(args):
        plain["args"] = args
    more = {key: value for key, value in vars(error).items() if not key.startswith("_") and _is_storable(value)}
    if more:
        plain["more"] = mask_value(more)
    return plain


def error_of(plain: Mapping[str, Any]) -> Exception:
    """The exception again: of Python's own classes and this library's as it was; of another one a ``CallFailed`` that
    is also of that class, where the program has imported it."""
    name, module, text = plain["type"], plain["module"], plain["text"]
    cls = _class_of(module, name)
    args = tuple(plain["args"]) if "args" in plain else (text,)
    more = dict(plain.get("more", {}))
    if cls is not None and cls.__module__ in ("builtins", errors.__name__):
        made = _made(cls, args)
        if made is not None:
            return _with(made, more)
    full = f"{module}.{name}"
    if cls is not None:
        try:
            known = type(cls.__name__, (CallFailed, cls), {"__module__": cls.__module__})
            return _with(_filled(known, args), {**more, "type": full, "text": text})
        except (TypeError, ValueError):  # a class that cannot be derived from, or made so
            pass
    return CallFailed(full, text)


def _class_of(module: str, name: str) -> type[Exception] | None:
    """The class of this name, of what is imported already: nothing is imported for it."""
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _made(cls: type[Exception], args: tuple[Any, ...]) -> Exception | None:
    if cls.__module__ != "builtins":
        return _filled(cls, args)  # the classes of this library take other things than they pass on
    try:
        return cls(*args)
    except (TypeError, ValueError):
        return None


def _filled(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    """An instance with these arguments, of which no code of the class ran."""
    made: Exception = cls.__new__(cls, *args)
    made.args = args
    return made


def _with(error: Exception, more: Mapping[str, Any]) -> Exception:
    for name, value in more.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):  # read-only, as the class has it from its arguments
            continue
    return error


def _is_storable(value: Any) -> bool:
    try:
        codec.encode(value)
    except UnstorableValue:
        return False
    return True
