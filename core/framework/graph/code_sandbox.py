"""``CodeSandbox``: runs code of a plan in another process, where it can reach nothing and is stopped in time.

The code is first checked (``code_checks``), then interpreted by `pydantic-monty <https://github.com/pydantic/monty>`_:
a Python interpreter written in Rust, in a worker process of its own, which knows no files, no network, no environment
and no object of this process. Time and memory are limited inside the worker, and a worker that does not stop is
killed. Nothing of it runs in this process, so any thread may use a sandbox. See docs/adr/0008-code-sandbox.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.errors import UnstorableValue
from framework.graph.code_checks import SAFE_BUILTINS, CheckedCode, check_code
from framework.storage import codec

logger = logging.getLogger(__name__)

MAX_MEMORY_BYTES = 256 * 1024 * 1024
MAX_STDOUT_BYTES = 1024 * 1024
GRACE_SECONDS = 1.0
"""How long after its time limit a worker that does not stop by itself is killed."""

_LOOKS_LIKE_CODE = ("<function ", "<class ")


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
        return self._run(code, _used(given, checked, wanted), wanted, is_expression=False)

    def execute_expression(self, expression: str, inputs: Mapping[str, Any] | None = None) -> SandboxResult:
        """The value of one expression, as ``result``; checked and run like code."""
        given = dict(inputs or {})
        checked = check_code(expression, is_expression=True, inputs=given, allowed=self.safe_builtins)
        if checked.problems:
            return _refused(checked)
        return self._run(expression.strip(), _used(given, checked, ()), [], is_expression=True)

    def _run(self, code: str, inputs: dict[str, Any], wanted: list[str], *, is_expression: bool) -> SandboxResult:
        try:
            import pydantic_monty as monty
        except ImportError:
            problem = "Code cannot be run: no sandbox is installed. Install it with: pip install 'surefoot[sandbox]'"
            return SandboxResult(False, error=problem, error_type="configuration")
        started = time.perf_counter()
        printed = monty.CollectString(MAX_STDOUT_BYTES)
        try:
            with (
                monty.Monty(max_processes=1, request_timeout=self.timeout_seconds + 2 * GRACE_SECONDS) as pool,
                pool.checkout(
                    limits={
                        "max_feed_duration_secs": self.timeout_seconds,
                        "max_memory": self.max_memory_bytes,
                        "max_total_sleep_secs": self.timeout_seconds,
                    }
                ) as session,
            ):
                value = session.feed_run(code, inputs=inputs, print_callback=printed)
                if is_expression:
                    result = _one_value(value, SandboxResult(True, stdout=printed.output))
                else:
                    found = {name: value for name in wanted for value in _read(session, name)}
                    result = _values(found, SandboxResult(True, stdout=printed.output))
        except monty.MontyRuntimeError as error:
            result = _failed(error.display("type-msg"), printed.output)
        except monty.MontySyntaxError as error:
            result = _failed(error.display("type-msg"), printed.output)
        except monty.MontyCrashedError as error:
            text = f"TimeoutError: stopped after {self.timeout_seconds:g} s" if error.timed_out else f"crashed: {error}"
            result = _failed(text, printed.output)
        except monty.MontyConversionError as error:
            result = _failed(f"TypeError: an input cannot be given to code: {error}", printed.output)
        except (monty.MontyError, ValueError, TypeError, RecursionError, OverflowError, TimeoutError) as error:
            result = _failed(f"{type(error).__name__}: {error}", printed.output)
        except (OSError, RuntimeError) as error:  # the worker program cannot be started or is gone
            problem = f"The sandbox cannot be started: {error}"
            result = SandboxResult(False, error=problem, error_type="configuration")
        result.execution_time_ms = int((time.perf_counter() - started) * 1000)
        return result


def safe_exec(code: str, inputs: Mapping[str, Any] | None = None, timeout_seconds: float = 10) -> SandboxResult:
    """Run ``code`` in a sandbox: see ``CodeSandbox.execute``."""
    return CodeSandbox(timeout_seconds=timeout_seconds).execute(code, inputs)


def safe_eval(expression: str, inputs: Mapping[str, Any] | None = None, timeout_seconds: float = 5) -> SandboxResult:
    """The value of an expression in a sandbox: see ``CodeSandbox.execute_expression``."""
    return CodeSandbox(timeout_seconds=timeout_seconds).execute_expression(expression, inputs)


def _used(given: dict[str, Any], checked: CheckedCode, wanted: Iterable[str]) -> dict[str, Any]:
    """Only what the code mentions crosses to the worker: the rest may be large, or of types it cannot take."""
    mentioned = checked.used | set(wanted)
    return {name: value for name, value in given.items() if name in mentioned}


def _refused(checked: CheckedCode) -> SandboxResult:
    error_type = "code_error" if checked.is_syntax_error else "security"
    prefix = "" if checked.is_syntax_error else "Refused: "
    return SandboxResult(False, error=prefix + "; ".join(checked.problems[:5]), error_type=error_type)


def _failed(text: str, stdout: str) -> SandboxResult:
    return SandboxResult(False, error=text, stdout=stdout, error_type="code_error")


def _read(session: Any, name: str) -> list[Any]:
    """The value of a variable as a list of one; empty when it was never assigned, or is a function or class."""
    value = _feed(session, name)
    if value is _UNBOUND:
        return []
    if isinstance(value, str) and value.startswith(_LOOKS_LIKE_CODE):
        # A function comes out as its text. Asked from inside, text is text and a function is not.
        return [value] if session.feed_run(f"{name} == {value!r}") is True else []
    return [value]


_UNBOUND = object()


def _feed(session: Any, name: str) -> Any:
    import pydantic_monty as monty

    try:
        return session.feed_run(name)
    except monty.MontyRuntimeError as error:
        if error.display("type-msg").startswith("NameError"):  # assigned on a path that was not taken
            return _UNBOUND
        raise


def _values(found: dict[str, Any], result: SandboxResult) -> SandboxResult:
    """Fill in variables. Values that no step could store, such as instances of the code's own classes, stay out."""
    for name, value in found.items():
        problem = _storable(value)
        if problem is None:
            result.variables[name] = value
        elif name == "result":
            return _failed(f"TypeError: the variable 'result' cannot be returned: {problem}", result.stdout)
        else:
            logger.debug("variable %r of a code step stays in the sandbox: %s", name, problem)
    result.result = result.variables.get("result")
    return result


def _one_value(value: Any, result: SandboxResult) -> SandboxResult:
    problem = _storable(value)
    if problem is not None or (isinstance(value, str) and value.startswith(_LOOKS_LIKE_CODE)):
        return _failed(f"TypeError: the value cannot be returned: {problem or value}", result.stdout)
    result.result = value
    return result


def _storable(value: Any) -> str | None:
    try:
        codec.encode(value)
    except (UnstorableValue, RecursionError) as error:
        return str(error) or type(error).__name__
    return None
