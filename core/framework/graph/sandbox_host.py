"""The process between a program and a code step: it drives the interpreter, and may die in the program's place.

Values leave the interpreter as trees: ten names for one list come out as ten lists, so a few lines can make a value
that no memory holds. This process takes that risk. Its memory and time are limited by the operating system, and what
it hands on is encoded, measured and small (``MAX_RESULT_BYTES``). ``code_sandbox`` starts one for each piece of code.

A request is a stored value on standard input. On standard output come ``READY``, once everything is imported, a line
of JSON (``error``, ``error_type``, ``stdout`` and the ``values`` as pairs of name and length), then these values.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from types import ModuleType
from typing import Any

from framework.errors import CodecError, StorageError, UnstorableValue

if sys.platform != "win32":
    import resource

READY = b"+"
MAX_RESULT_BYTES = 8 * 1024 * 1024
"""Of all values together, encoded."""

MAX_STDOUT_BYTES = 1024 * 1024
MAX_REPLY_BYTES = MAX_RESULT_BYTES + 6 * MAX_STDOUT_BYTES + 1024 * 1024
MAX_ERROR_CHARS = 4000
GRACE_SECONDS = 1.0
OWN_MEMORY_BYTES = 768 * 1024 * 1024
"""Address space of this process and of the interpreter's, each, beyond the heap that the code may use."""

_LOOKS_LIKE_CODE = ("<function ", "<class ")


class Refused(Exception):
    """The code ran, and what came of it cannot be handed on."""


def main() -> None:
    """Serve one request and end."""
    import_codec()  # this and the next are imported before the time runs
    import pydantic_monty  # noqa: F401 - only this process needs it

    from framework.storage import codec  # noqa: PLC0415 - after the stand-in

    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no part of the reply
    _write(out, READY)
    request = sys.stdin.buffer.read()
    try:
        _write(out, _serve(codec.decode(request)))
    except (CodecError, StorageError, RecursionError) as error:
        _write(out, reply(f"TypeError: an input cannot be given to code: {error}", "code_error"))
    except MemoryError:
        _write(out, reply("MemoryError: the value of the code, or what it was given, is too large", "code_error"))
    os._exit(0)  # nothing here is worth the time of an orderly end


def import_codec() -> None:
    """Import the codec without pydantic, which takes longer than all else that this process imports.

    The codec only asks whether a value is a pydantic model, and no value here is: the program's classes are not known
    in this process. The stand-in is gone again when this returns.
    """
    if "pydantic" in sys.modules:
        return
    stand_in = ModuleType("pydantic")
    stand_in.__dict__["BaseModel"] = type("BaseModel", (), {})
    sys.modules["pydantic"] = stand_in
    try:
        import framework.storage.codec  # noqa: F401, PLC0415 - for the two functions that use it
    finally:
        del sys.modules["pydantic"]


def reply(
    error: str | None = None, error_type: str | None = None, stdout: str = "", values: dict[str, bytes] | None = None
) -> bytes:
    """The bytes of a reply."""
    values = values or {}
    head = {
        "error": error if error is None or len(error) <= MAX_ERROR_CHARS else error[:MAX_ERROR_CHARS] + "...",
        "error_type": error_type,
        "stdout": stdout,
        "values": [(name, len(data)) for name, data in values.items()],
    }
    return json.dumps(head).encode() + b"\n" + b"".join(values.values())


def _serve(request: dict[str, Any]) -> bytes:
    import pydantic_monty as monty

    seconds: float = request["timeout_seconds"]
    _limit(request["max_memory_bytes"], seconds)
    printed = monty.CollectString(MAX_STDOUT_BYTES)
    try:
        with (
            monty.Monty(
                binary_path=request["interpreter"], max_processes=1, request_timeout=seconds + GRACE_SECONDS
            ) as pool,
            pool.checkout(
                limits={
                    "max_feed_duration_secs": seconds,
                    "max_memory": request["max_memory_bytes"],
                    "max_total_sleep_secs": seconds,
                }
            ) as session,
        ):
            value = session.feed_run(request["code"], inputs=request["inputs"], print_callback=printed)
            if request["is_expression"]:
                if isinstance(value, str) and value.startswith(_LOOKS_LIKE_CODE):
                    raise Refused(f"TypeError: the value cannot be returned: {value}")
                values = {"result": value}
            else:
                values = _read(session, request["wanted"])
            return reply(stdout=printed.output, values=_encoded(values))
    except (monty.MontyRuntimeError, monty.MontySyntaxError) as error:
        return reply(error.display("type-msg"), "code_error", printed.output)
    except monty.MontyCrashedError as error:
        text = f"TimeoutError: stopped after {seconds:g} s" if error.timed_out else f"MemoryError or crash: {error}"
        return reply(text, "code_error", printed.output)
    except monty.MontyConversionError as error:
        return reply(f"TypeError: an input cannot be given to code: {error}", "code_error", printed.output)
    except Refused as error:
        return reply(str(error), "code_error", printed.output)
    except (monty.MontyError, ValueError, TypeError, RecursionError, OverflowError, TimeoutError) as error:
        return reply(f"{type(error).__name__}: {error}", "code_error", printed.output)
    except (OSError, RuntimeError) as error:  # the interpreter's program cannot be started or is gone
        return reply(f"The sandbox cannot be started: {error}", "configuration")


def _read(session: Any, names: list[str]) -> dict[str, Any]:
    """The values of the variables, all at once; without those never assigned, and without functions and classes."""
    if not names:
        return {}
    found = f"_found_{os.urandom(8).hex()}"  # a name that the code, which has run, cannot have guessed
    lines = [f"try:\n    {found}[{name!r}] = {name}\nexcept NameError:\n    pass" for name in names]
    values: dict[str, Any] = session.feed_run("\n".join([f"{found} = {{}}", *lines, found]))
    # A function comes out as its text. Asked from inside, text is text and a function is not.
    doubtful = [name for name, value in values.items() if isinstance(value, str) and value.startswith(_LOOKS_LIKE_CODE)]
    if doubtful:
        is_text = session.feed_run("[" + ", ".join(f"{name} == {values[name]!r}" for name in doubtful) + "]")
        for name, answer in zip(doubtful, is_text, strict=True):
            if answer is not True:
                del values[name]
    return values


def _encoded(values: dict[str, Any]) -> dict[str, bytes]:
    """What can be stored of the values, such as no instances of the code's own classes, as bytes."""
    from framework.storage import codec  # noqa: PLC0415 - see import_codec

    encoded: dict[str, bytes] = {}
    room = MAX_RESULT_BYTES
    for name, value in values.items():
        try:
            encoded[name] = codec.encode(value)
        except (UnstorableValue, RecursionError) as error:
            if name == "result":
                text = str(error) or type(error).__name__
                raise Refused(f"TypeError: the variable 'result' cannot be returned: {text}") from error
            continue
        room -= len(encoded[name])
        if room < 0:
            raise Refused(
                f"MemoryError: the variables of the code, {name!r} among them, take more than the "
                f"{MAX_RESULT_BYTES // 2**20} MB that may leave the sandbox; names with a leading _ stay inside"
            )
    return encoded


def _limit(heap_bytes: int, seconds: float) -> None:
    """Limit this process and the interpreter, which inherits the limits. Where the system has none, a timer is left."""
    if sys.platform == "win32":
        return
    whole = math.ceil(seconds + 3 * GRACE_SECONDS)
    size = heap_bytes + OWN_MEMORY_BYTES
    for kind, limit in ((resource.RLIMIT_AS, size), (resource.RLIMIT_CPU, whole), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS knows no limit of the address space
            continue
    signal.alarm(whole)  # ends this process even when the program that started it is gone


def _write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]
