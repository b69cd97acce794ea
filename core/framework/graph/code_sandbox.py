"""``CodeSandbox``: runs code of a plan in another process, where it can reach nothing and is stopped in time.

The code is first checked (``code_checks``), then interpreted by `pydantic-monty <https://github.com/pydantic/monty>`_:
a Python interpreter written in Rust, in a worker process of its own, which knows no files, no network, no environment
and no object of this process. A third process stands between (``sandbox_host``), since even reading a value can take
all memory. Time and memory of both are limited, and what does not stop is killed; this process only decodes a small
reply. Any thread may use a sandbox. See docs/adr/0008-code-sandbox.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import CodecError, StorageError, UnstorableValue
from framework.graph import sandbox_host
from framework.graph.code_checks import SAFE_BUILTINS, CheckedCode, check_code
from framework.storage import codec

MAX_MEMORY_BYTES = 256 * 1024 * 1024
START_SECONDS = 30.0
"""How long the other process may take to start, before the time of the code begins."""

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from framework.graph.sandbox_host import main; main()"
)
_ENVIRONMENT = frozenset({"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "LANG"})
"""All that the other process sees of the environment: no key and no password."""

_OWN_FOLDER = str(Path(__file__).parents[2])
"""Where this package is, should it have been found otherwise than by ``sys.path``. The other process starts without the
module ``site``, so it looks for everything where this one does, and runs no ``.pth`` file."""


@dataclass
class SandboxResult:
    """What came of a piece of code.

    ``result`` is the value of the variable ``result`` (of the expression, for an expression); ``variables`` are the
    new top-level names with values that can be stored. ``error_type`` of a failure is ``security`` (refused, never
    run), ``code_error`` (it failed, or hit a limit) or ``configuration`` (no sandbox installed).
    """

    success: bool
    result: Any = None
    error: str | None = None
    stdout: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    execution_time_ms: int = 0
    error_type: str | None = None


class CodeSandbox:
    """Runs untrusted code. Holds no state between executions; each has a fresh process.

    ``timeout_seconds`` limits the time the code computes, ``max_memory_bytes`` its heap. ``safe_builtins`` names the
    builtins it may use (a mapping's keys count); add ``print`` and what it prints comes back as ``stdout``. Imports are
    refused whatever ``allowed_modules`` says. Needs the extra ``sandbox``; without it every execution fails with what
    to install.
    """

    def __init__(
        self,
        timeout_seconds: float = 10,
        allowed_modules: Iterable[str] | None = None,
        safe_builtins: Iterable[str] | None = None,
        *,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.allowed_modules = list(allowed_modules or ())
        self.safe_builtins = SAFE_BUILTINS if safe_builtins is None else frozenset(safe_builtins)
        self.max_memory_bytes = max_memory_bytes

    def execute(
        self, code: str, inputs: Mapping[str, Any] | None = None, extract_vars: Iterable[str] | None = None
    ) -> SandboxResult:
        """Run ``code`` with ``inputs`` as its variables; blocks until it ends or is stopped.

        ``extract_vars`` limits ``variables`` to these names, inputs included. Whatever the code does is a result,
        never an exception.
        """
        given = dict(inputs or {})
        checked = check_code(code, inputs=given, allowed=self.safe_builtins)
        if checked.problems:
            return _refused(checked)
        wanted = [name for name in checked.made if name not in given and not name.startswith("_")]
        if extract_vars is not None:
            wanted = [name for name in dict.fromkeys(extract_vars) if name in checked.made or name in given]
        if "result" in checked.made and "result" not in wanted:
            wanted.append("result")
        result = self._run(code, _used(given, checked, wanted), wanted, is_expression=False)
        result.result = result.variables.get("result")
        return result

    def check(self, code: str, inputs: Iterable[str] = ()) -> list[str]:
        """Why ``code`` would be refused before it runs, a line each; empty when it would run. Nothing is run.

        ``inputs`` are the names it would be given: those hide builtins that it may not use.
        """
        return check_code(code, inputs=inputs, allowed=self.safe_builtins).problems

    def execute_expression(self, expression: str, inputs: Mapping[str, Any] | None = None) -> SandboxResult:
        """The value of one expression, as ``result``; checked and run like code."""
        given = dict(inputs or {})
        checked = check_code(expression, is_expression=True, inputs=given, allowed=self.safe_builtins)
        if checked.problems:
            return _refused(checked)
        result = self._run(expression.strip(), _used(given, checked, ()), [], is_expression=True)
        result.result, result.variables = result.variables.get("result"), {}
        return result

    def _run(self, code: str, inputs: dict[str, Any], wanted: list[str], *, is_expression: bool) -> SandboxResult:
        if importlib.util.find_spec("pydantic_monty") is None:  # the other process imports it, this one need not
            problem = "Code cannot be run: no sandbox is installed. Install it with: pip install 'surefoot[sandbox]'"
            return SandboxResult(False, error=problem, error_type="configuration")
        started = time.perf_counter()
        request = {
            "code": code,
            "wanted": wanted,
            "is_expression": is_expression,
            "timeout_seconds": float(self.timeout_seconds),
            "max_memory_bytes": self.max_memory_bytes,
            "interpreter": _interpreter(),
        }
        try:
            result = _parsed(self._ask(codec.encode(request | {"inputs": _plain(inputs)}, "code")))
        except (UnstorableValue, RecursionError) as error:
            result = _failed(f"TypeError: an input cannot be given to code: {error}")
        except TimeoutError as error:
            result = _failed(f"TimeoutError: {error}")
        except _Died as error:
            result = _failed(f"MemoryError: {error}")
        except OSError as error:
            problem = f"The sandbox cannot be started: {error}"
            result = SandboxResult(False, error=problem, error_type="configuration")
        result.execution_time_ms = int((time.perf_counter() - started) * 1000)
        return result

    def _ask(self, request: bytes) -> bytes:
        """The reply of a new process to the request; ``_Died`` without one, ``TimeoutError`` when it is killed."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps([*sys.path, _OWN_FOLDER])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name in _ENVIRONMENT} | {"MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        seconds = self.timeout_seconds + 2 * sandbox_host.GRACE_SECONDS
        try:
            with _killed_after(process, START_SECONDS) as late:
                ready = process.stdout.read(1)
            if ready != sandbox_host.READY:
                raise OSError(f"its process {'did not start in time' if late.is_set() else 'failed to start'}")
            with _killed_after(process, seconds) as late:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(request)
                    process.stdin.close()
                data = process.stdout.read(sandbox_host.MAX_REPLY_BYTES + 1)
            if late.is_set():
                raise TimeoutError(f"stopped after {seconds:g} s")
            if len(data) > sandbox_host.MAX_REPLY_BYTES:
                raise _Died(f"the sandbox sent more than {sandbox_host.MAX_REPLY_BYTES} bytes")
        finally:
            _kill(process)
            code = process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
        if not data:
            size = (self.max_memory_bytes + sandbox_host.OWN_MEMORY_BYTES) // 2**20
            raise _Died(f"the sandbox died (exit code {code}); its memory is limited to {size} MB")
        return data


class _Died(Exception):
    """The process ended without a reply, or with one that is none."""


def safe_exec(code: str, inputs: Mapping[str, Any] | None = None, timeout_seconds: float = 10) -> SandboxResult:
    """Run ``code`` in a sandbox: see ``CodeSandbox.execute``."""
    return CodeSandbox(timeout_seconds=timeout_seconds).execute(code, inputs)


def safe_eval(expression: str, inputs: Mapping[str, Any] | None = None, timeout_seconds: float = 5) -> SandboxResult:
    """The value of an expression in a sandbox: see ``CodeSandbox.execute_expression``."""
    return CodeSandbox(timeout_seconds=timeout_seconds).execute_expression(expression, inputs)


@functools.cache
def _interpreter() -> str | None:
    """The program of the interpreter, where this Python has its scripts; ``None`` leaves it to the search path."""
    name = "monty.exe" if sys.platform == "win32" else "monty"
    for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")):
        path = Path(sysconfig.get_path("scripts", scheme), name)
        if path.is_file():
            return str(path)
    return None


def _used(given: dict[str, Any], checked: CheckedCode, wanted: Iterable[str]) -> dict[str, Any]:
    """Only what the code mentions crosses to the worker: the rest may be large, or of types it cannot take."""
    mentioned = checked.used | set(wanted)
    return {name: value for name, value in given.items() if name in mentioned}


def _plain(value: Any) -> Any:
    """``value`` with plain texts, numbers and containers for instances of their subclasses, enums among them."""
    match value:
        case bool() | None:
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case dict():
            return {_plain(key): _plain(item) for key, item in dict.items(value)}
        case list():
            return [_plain(item) for item in value]
        case tuple():
            return tuple(_plain(item) for item in value)
        case frozenset():
            return frozenset(_plain(item) for item in value)
        case set():
            return {_plain(item) for item in value}
    return value


def _refused(checked: CheckedCode) -> SandboxResult:
    error_type = "code_error" if checked.is_syntax_error else "security"
    prefix = "" if checked.is_syntax_error else "Refused: "
    return SandboxResult(False, error=prefix + "; ".join(checked.problems[:5]), error_type=error_type)


def _failed(text: str, stdout: str = "") -> SandboxResult:
    return SandboxResult(False, error=text, stdout=stdout, error_type="code_error")


def _parsed(data: bytes) -> SandboxResult:
    head, _, rest = data.partition(b"\n")
    try:
        reply = json.loads(head)
        if reply["error"] is not None:
            return SandboxResult(False, error=reply["error"], stdout=reply["stdout"], error_type=reply["error_type"])
        result = SandboxResult(True, stdout=reply["stdout"])
        start = 0
        for name, length in reply["values"]:
            result.variables[name] = codec.decode(rest[start : start + length])
            start += length
    except (ValueError, KeyError, TypeError, CodecError, StorageError) as error:  # it died while it wrote
        raise _Died(f"the sandbox sent no whole reply: {error}") from error
    return result


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the process unless the block ends in time; the event tells whether that was needed."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the interpreter that it started. It is not waited for before, so its id is its own."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
