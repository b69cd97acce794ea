"""The driver, psycopg, imported when it is first needed; its connections with a time limit; what its errors mean."""

from __future__ import annotations

import contextlib
import math
import select
import time
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from framework import _secrets
from framework.errors import StorageError

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]
    Cursor = psycopg.Cursor[tuple[Any, ...]]

OLDEST_SERVER = 14
APPLICATION = "surefoot"
CONNECT_SECONDS = 10
PREPARE_AFTER = 5
"""How often a statement is made before the server is asked to keep it."""

_PASSING = ("08", "40001", "40P01", "25006", "25P03", "53300", "57P01", "57P02", "57P03", "57P05")
"""SQLSTATEs after which the same call may succeed: connection lost, serialization, deadlock, read-only (as during a
failover), a transaction that slept too long, too many connections, server going down or coming up."""

_HOPELESS = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "certificate",
    "invalid ",
    "not supported",
)
"""In the message of a refused connection, for which there is no SQLSTATE: waiting does not help."""

_ADVICE: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("53100",), (), "Free space on the server's disk; what was committed is intact"),
    (
        ("53",),
        ("too many ", "remaining connection slots"),
        "The server is out of memory or connections; what was committed is intact",
    ),
    (("42501",), (), "Grant its role CREATE on the database, or on the schema named by ?schema=, and what is in it"),
    (("42P01", "3F000", "42883"), (), "Its tables or functions are gone: open it again, or restore it from a backup"),
    (("28",), ("password",), "Check user and password: they are taken from the URL, PGPASSWORD or a password file"),
    (("3D000",), ("database",), "Check the database's name in the URL"),
    (("XX001", "XX002"), (), "The server found damage in its files; restore the database from a backup"),
    ((), ("connection failed", "refused", "resolve"), "Check that the server runs and that the URL names it"),
)
"""What to do, by how the SQLSTATE begins, or by a word of the message, since a refused connection has no SQLSTATE."""


@cache
def load() -> ModuleType:
    """The module ``psycopg``. Raises ``StorageError`` when it is not installed."""
    try:
        import psycopg
    except ImportError as error:
        raise StorageError(
            "PostgreSQL needs the package psycopg, which is not installed or does not load "
            f"({error}). Install it with: pip install 'surefoot[postgres]'"
        ) from None
    return psycopg


@cache
def _limited() -> type[Connection]:
    psycopg = load()

    class LimitedConnection(psycopg.Connection):  # type: ignore[misc,name-defined]  # the base is known at run time only
        """A connection whose calls end at ``deadline`` (``time.monotonic``), by the loss of the connection."""

        deadline = math.inf

        def wait(self, gen: Any, *_: Any, **__: Any) -> Any:
            """Run a driver's generator: it says what it waits for, and is told what is ready."""
            poller = select.poll()
            try:
                wanted = next(gen)
                while True:
                    poller.register(self.pgconn.socket, _EVENTS[int(wanted)])
                    left = self.deadline - time.monotonic()
                    events = poller.poll(None if left == math.inf else max(0, math.ceil(left * 1000)))
                    if not events:
                        raise self._give_up()
                    happened = events[0][1]
                    ready = (1 if happened & ~select.POLLOUT else 0) | (2 if happened & ~select.POLLIN else 0)
                    wanted = gen.send(psycopg.waiting.Ready(ready & int(wanted) or int(wanted)))
            except StopIteration as done:
                return done.value

        def _give_up(self) -> Exception:
            # So that the server does not do it after all, long after this call was given up. If it can be told.
            with contextlib.suppress(psycopg.Error):
                self.cancel_safe(timeout=1)
            self.close()
            error: Exception = psycopg.errors.ConnectionTimeout("the server did not answer in time")
            return error

    return LimitedConnection


_EVENTS = {1: select.POLLIN, 2: select.POLLOUT, 3: select.POLLIN | select.POLLOUT}


def connect(conninfo: str, seconds: float = CONNECT_SECONDS, prepare: bool = False) -> Connection:
    """A connection that commits each statement. Raises the driver's errors.

    With ``prepare`` the server keeps statements that are made often. Poolers of transactions may hand each one to
    another connection, where it is not known.
    """
    connection = _limited().connect(
        conninfo,
        autocommit=True,
        prepare_threshold=PREPARE_AFTER if prepare else None,
        **_defaults(conninfo, seconds),
    )
    # Notices of the server are for its administrator, not for this program's log.
    connection.add_notice_handler(_ignore)
    return connection


def _defaults(conninfo: str, seconds: float) -> dict[str, Any]:
    """What is set where the URL does not: a name, and limits by which a dead host is noticed."""
    given = load().conninfo.conninfo_to_dict(conninfo)
    defaults = {
        "application_name": APPLICATION,
        "connect_timeout": max(2, math.ceil(seconds)),
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "client_encoding": "UTF8",
    }
    return {name: value for name, value in defaults.items() if name not in given}


def _ignore(notice: object) -> None:
    return None


def is_lost(connection: Connection) -> bool:
    """Whether the connection is of no use any more."""
    return connection.closed or connection.broken


def is_stale(connection: Connection) -> bool:
    """Whether an idle connection was closed from the other side: seen without a question to the server."""
    if is_lost(connection):
        return True
    poller = select.poll()
    poller.register(connection.pgconn.socket, select.POLLIN)
    # An idle server says nothing, except good-bye.
    return bool(poller.poll(0))


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    psycopg = load()
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_PASSING)
    if not isinstance(error, psycopg.OperationalError):
        return False
    text = str(error).lower()
    return not any(mark in text for mark in _HOPELESS)


def is_misunderstood(error: Exception) -> bool:
    """Whether the server found no sense in a statement: it names what is not there, or not of that type."""
    state = str(getattr(error, "sqlstate", None) or "")
    return state.startswith("42") and state != "42501"  # that one is of rights


def is_away(error: BaseException) -> bool:
    """Whether the error says that the server cannot be used at all, not that it refused one call."""
    return isinstance(error, load().OperationalError) and not (getattr(error, "sqlstate", None) or "").startswith("40")


def translate(error: Exception, where: str, doing: str, unknown: bool = False) -> StorageError:
    """The driver's error as ours: what could not be done, to which store, and what to do about it.

    ``unknown`` when the call may have been carried out although its answer was lost.
    """
    text = _secrets.mask(" ".join(str(error).split())) or type(error).__name__
    state = getattr(error, "sqlstate", None) or ""
    lower = text.lower()
    advice = next(
        (said for states, words, said in _ADVICE if state.startswith(states) or any(word in lower for word in words)),
        "",
    )
    outcome = (
        "The connection broke in the middle, and whether it was done is not known: read the run to find out"
        if unknown
        else "Nothing of this call was written"
    )
    return StorageError(f"Store {where}: cannot {doing}: {text}. {outcome}.{f' {advice}.' if advice else ''}")
