"""What kind of error a failed call is, by the exception's type and status code, never by words of its message. Pure."""

from __future__ import annotations

import errno

from framework._secrets import mask_error
from framework.errors import LLMError

RATE_LIMIT = "rate_limit"
TIMEOUT = "timeout"
CONNECTION = "connection_error"

_BY_STATUS = {408: TIMEOUT, 429: RATE_LIMIT, 502: CONNECTION, 503: CONNECTION, 504: TIMEOUT, 529: RATE_LIMIT}
# Names of exceptions of the common clients, whose packages are not imported for this; subclasses count.
_BY_NAME = {
    "RateLimitError": RATE_LIMIT,
    "TooManyRequests": RATE_LIMIT,
    "ResourceExhausted": RATE_LIMIT,
    "APITimeoutError": TIMEOUT,
    "TimeoutException": TIMEOUT,
    "Timeout": TIMEOUT,
    "ReadTimeout": TIMEOUT,
    "ConnectTimeout": TIMEOUT,
    "DeadlineExceeded": TIMEOUT,
    "APIConnectionError": CONNECTION,
    "ConnectError": CONNECTION,
    "NetworkError": CONNECTION,
    "ServiceUnavailableError": CONNECTION,
    "ServiceUnavailable": CONNECTION,
    "ChunkedEncodingError": CONNECTION,
    "ClientConnectionError": CONNECTION,
    "ClientPayloadError": CONNECTION,
    "ConnectTimeoutError": TIMEOUT,
    "ConnectionError": CONNECTION,
    "IncompleteRead": CONNECTION,
    "NewConnectionError": CONNECTION,
    "ReadTimeoutError": TIMEOUT,
    "RemoteProtocolError": CONNECTION,
    "TimeoutError": TIMEOUT,
}
# Of which others have a class of the same name that means something else: with the package.
_BY_PACKAGE = {("urllib3", "ProtocolError"): CONNECTION, ("urllib3", "MaxRetryError"): CONNECTION}
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})


def transient_kind(error: BaseException) -> str | None:
    """``timeout``, ``rate_limit`` or ``connection_error`` when ``error`` is likely to pass by itself, else ``None``."""
    if isinstance(error, LLMError):
        return error.kind if error.transient else None
    response = getattr(error, "response", None)
    for holder in (error, response):
        for attribute in ("status_code", "status", "code"):
            status = getattr(holder, attribute, None)
            if isinstance(status, int) and status in _BY_STATUS:
                return _BY_STATUS[status]
    if isinstance(error, TimeoutError):
        return TIMEOUT
    if isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno in _UNREACHABLE):
        return CONNECTION
    for cls in type(error).__mro__:
        if cls.__name__ in _BY_NAME:
            return _BY_NAME[cls.__name__]
        kind = _BY_PACKAGE.get((cls.__module__.partition(".")[0], cls.__name__))
        if kind is not None:
            return kind
    return None


def error_text(error: BaseException) -> str:
    """The error's message, or its type when it has none, with known secrets masked."""
    return mask_error(error)
