"""What a call raised, as a row of the journal and raised again; which exceptions leave an effect unknown. Pure."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
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

# What was never sent has no effect: these say that there was no connection to send it over.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "ConnectionRefusedError", "gaierror", "PoolTimeout"})


def is_recorded(error: BaseException) -> bool:
    """Whether an exception is an outcome of the call that raised it; not one about the run, its store or journal."""
    about_the_run = (StorageError, LeaseLost, BudgetExceeded, UnknownEffect, UnstorableValue)
    return isinstance(error, Exception) and not isinstance(error, about_the_run)


def leaves_unknown(error: BaseException) -> bool:
    """Whether a call that raised this may have had its effect all the same: no answer came in time, or the connection
    was lost on the way. One that never came about, such as a refused connection, proves that nothing happened."""
    if any(cls.__name__ in _NOT_SENT for cls in type(error).__mro__):
        return False
    if isinstance(error, (EOFError, ToolOutcomeUnknown)):
        return True
    if any(cls.__name__ == "RemoteProtocolError" for cls in type(error).__mro__):
        return True
    return transient_kind(error) in (TIMEOUT, CONNECTION)


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
