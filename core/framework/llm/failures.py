"""What an exception of a vendor's client means: which `LLMError`, and how long to wait. No client is imported here.

The clients for OpenAI and Anthropic name their exceptions alike (APITimeoutError, APIConnectionError, APIStatusError),
and both may let those of the HTTP library below them through; LiteLLM's derive from OpenAI's.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from framework._secrets import mask
from framework.errors import LLMError, LLMRateLimited, LLMRefused, LLMTimeout, LLMUnavailable

# Names of classes, subclasses included: httpx exists under two names, and a client need not be installed.
_TIMEOUTS = {"APITimeoutError", "TimeoutException", "Timeout"}
_CONNECTIONS = {"APIConnectionError", "TransportError", "APIResponseValidationError", "StreamError"}
_NOT_JSON = {"JSONDecodeError", "UnicodeDecodeError"}
_BY_STATUS: dict[int, type[LLMError]] = {
    408: LLMTimeout,
    409: LLMUnavailable,  # a conflict with another request: the clients themselves try again
    425: LLMUnavailable,
    429: LLMRateLimited,
    504: LLMTimeout,
    529: LLMRateLimited,
}
# What an error inside a stream says, where the HTTP status was 200 already; codes of OpenAI, types of Anthropic.
_BY_WORD: dict[str, type[LLMError]] = {
    "rate_limit_exceeded": LLMRateLimited,
    "rate_limit_error": LLMRateLimited,
    "overloaded_error": LLMRateLimited,
    "timeout_error": LLMTimeout,
    "invalid_request_error": LLMRefused,
    "authentication_error": LLMRefused,
    "billing_error": LLMRefused,
    "permission_error": LLMRefused,
    "not_found_error": LLMRefused,
    "request_too_large": LLMRefused,
}
# A 429 that no waiting helps against: the account has no money left.
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}
_MAX_TEXT = 500


def translate(
    error: Exception, who: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> LLMError | None:
    """The `LLMError` that an exception of a client means; None when it is none of a client's (a bug, then).

    ``who`` names provider and model. Known secrets are masked. A Retry-After that is a date is counted from ``now``.
    """
    if isinstance(error, LLMError):
        return error
    names = {cls.__name__ for cls in type(error).__mro__}
    text, status, words = _text(error), _status(error), _words(error)
    if names & _TIMEOUTS or isinstance(error, TimeoutError):
        return LLMTimeout(f"{who} did not answer in time ({text}).", status=status)
    if status is not None and status >= 400:
        kind = _BY_STATUS.get(status, LLMUnavailable if status >= 500 else LLMRefused)
        kind = LLMRefused if words & _SPENT else kind
        after = retry_after(_headers(error), now())
        return kind(f"{who} answered {status}: {text}", status=status, retry_after=after)
    if names & _CONNECTIONS or isinstance(error, OSError):
        return LLMUnavailable(f"{who} cannot be reached, or broke off its reply ({text}).")
    if names & _NOT_JSON:
        return LLMUnavailable(f"{who} sent a reply that cannot be read ({text}).")
    if "APIError" not in names:
        return None
    kind = next((_BY_WORD[word] for word in sorted(words) if word in _BY_WORD), LLMUnavailable)
    kind = LLMRefused if words & _SPENT else kind
    return kind(f"{who} reported an error in the middle of its reply: {text}")


def reported(error: Any, who: str) -> LLMError:
    """The `LLMError` that the ``error`` of a body means which came with the status 200."""
    said = error if isinstance(error, dict) else {"message": str(error)}
    words = {word for word in (said.get("type"), said.get("code")) if isinstance(word, str)}
    kind = next((_BY_WORD[word] for word in sorted(words) if word in _BY_WORD), LLMUnavailable)
    text = " ".join(mask(str(said.get("message") or said)).split())[:_MAX_TEXT]
    return (LLMRefused if words & _SPENT else kind)(f"{who} reported an error instead of a reply: {text}")


def retry_after(headers: Any, now: datetime) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds, or an HTTP date); None without either."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or not isinstance(value, str):
        return seconds
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - now).total_seconds())


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _status(error: Exception) -> int | None:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def _headers(error: Exception) -> Any:
    headers = getattr(getattr(error, "response", None), "headers", None)
    return headers if headers is not None and hasattr(headers, "get") else {}


def _words(error: Exception) -> set[str]:
    """The words by which the error's body says what it is."""
    body = getattr(error, "body", None)
    parts = [body, body.get("error")] if isinstance(body, dict) else []
    found = [part.get(key) for part in parts if isinstance(part, dict) for key in ("type", "code")]
    return {word for word in found if isinstance(word, str)}


def _text(error: Exception) -> str:
    """What the provider says, without the client's wrapping, in one line of bounded length."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else None
    said = inner.get("message") if isinstance(inner, dict) else None
    cause = error.__cause__
    reason = type(cause).__name__ if cause is not None else ""
    text = said if isinstance(said, str) and said else str(error) or type(error).__name__
    line = " ".join(mask(f"{text} [{reason}]" if reason and not said else text).split())
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 1] + "…"
