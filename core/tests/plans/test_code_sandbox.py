"""The sandbox: what code may do, what of it comes back, and that published ways out of Python sandboxes lead nowhere.

Each escape is tried twice: as it is, where the check of the code refuses it, and with that check switched off, where
the interpreter it runs in has to hold.
"""

from __future__ import annotations

import builtins
import sys
import threading
import time
from typing import Any
from unittest.mock import patch

import pytest

from framework.graph import code_sandbox
from framework.graph.code_checks import CheckedCode
from framework.graph.code_sandbox import CodeSandbox, SandboxResult, safe_eval, safe_exec

ESCAPES = {
    "attribute chain": "result = ().__class__.__base__.__subclasses__()",
    "format string": "result = '{0.__class__.__mro__}'.format(())",
    "format string by map": "result = '{a.__class__}'.format_map({'a': 1})",
    "generator frame": "def g():\n    yield 1\nresult = g().gi_frame.f_back.f_globals",
    "coroutine frame": "async def c():\n    pass\nresult = c().cr_frame.f_globals",
    "exception traceback": "try:\n    1/0\nexcept Exception as e:\n    result = e.__traceback__.tb_frame.f_globals",
    "traceback without dunders": "try:\n    1/0\nexcept Exception as e:\n    result = e.tb_frame.f_back",
    "import": "import os\nresult = os.system('id')",
    "import from": "from subprocess import run\nresult = run('id')",
    "import by name": "result = __import__('os').environ",
    "import by alias": 'f = eval\nresult = f(\'__import__("os").environ["PATH"]\')',
    "function globals": "result = (lambda: 0).__globals__",
    "builtins of a function": "result = print.__self__",
    "getattr with a built name": "result = getattr((), '__cl' + 'ass__')",
    "type with three arguments": "result = type('X', (object,), {'__init__': 1}).__mro__",
    "files": "result = open('/etc/passwd').read()",
    "environment": "import os\nresult = os.environ['PATH']",
    "network": "import socket\nresult = socket.create_connection(('127.0.0.1', 1))",
    "ctypes": "import ctypes\nresult = ctypes.string_at(0)",
    "code object": "result = (lambda: 0).__code__.replace(co_consts=(1,))",
    "decorated class": "@exec\n@input\nclass X:\n    pass\nresult = X",
    "match class pattern": "match ():\n    case object(__class__=c):\n        result = c.__base__",
}
BOMBS = {
    "endless loop": "while True:\n    pass",
    "loop that catches everything": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
    ),
    "memory by repetition": "x = 'a' * 10**12",
    "memory by doubling": "x = [0]\nwhile True:\n    x = x + x",
    "memory by dict": "x = {}\ni = 0\nwhile True:\n    x[i] = 'a' * 1000\n    i += 1",
    "huge power": "x = 10 ** 10 ** 10",
    "power of power": "x = (10 ** 4000) ** 4000",
    "huge range": "x = sum(range(10 ** 12))",
    "recursion": "def f():\n    return f()\nf()",
    "nested list": "x = []\nfor i in range(10 ** 7):\n    x = [x]\nresult = x",
    "format width": "result = f'{1:>{10 ** 11}}'",
    "output": "while True:\n    print('a' * 1000)",
}


@pytest.mark.parametrize("code", ESCAPES.values(), ids=ESCAPES.keys())
def test_published_escapes_are_refused_or_fail(code: str) -> None:
    result = CodeSandbox().execute(code)
    assert not result.success, result.result
    assert result.error_type in ("security", "code_error")


@pytest.mark.parametrize("code", ESCAPES.values(), ids=ESCAPES.keys())
def test_published_escapes_fail_even_where_nothing_refuses_them(code: str) -> None:
    unchecked = CheckedCode(made=["result"], used=set())
    with patch.object(code_sandbox, "check_code", lambda *_, **__: unchecked):
        result = CodeSandbox().execute(code)
    found = repr(result.result) + repr(result.variables)
    assert not result.success or not any(word in found for word in ("os.", "root:", "posix", "subprocess", "/bin"))
    assert result.error_type in (None, "code_error")


@pytest.mark.parametrize("code", BOMBS.values(), ids=BOMBS.keys())
def test_code_that_uses_too_much_is_stopped(code: str) -> None:
    sandbox = CodeSandbox(timeout_seconds=0.3, safe_builtins={"print", "range", "sum", "BaseException"})
    sandbox.max_memory_bytes = 32 * 1024 * 1024
    started = time.monotonic()
    result = sandbox.execute(code)
    assert not result.success
    assert result.error_type == "code_error"
    assert any(
        name in str(result.error)
        for name in (
            "TimeoutError",
            "MemoryError",
            "RecursionError",
            "UnstorableValue",
            "TypeError",
            "ValueError",
            "OverflowError",
        )
    ), result.error
    assert time.monotonic() - started < 5


def test_results_and_variables() -> None:
    result = CodeSandbox().execute("x = 1 + 2\n_hidden = 1\nresult = x * 3\ngiven = given + 1", {"given": 1})
    assert (result.success, result.result) == (True, 9)
    assert result.variables == {"x": 3, "result": 9}, "inputs and private names are not exported"
    assert result.execution_time_ms >= 0
    only = CodeSandbox().execute("a = 1\nb = 2", extract_vars=["b"])
    assert only.variables == {"b": 2}


def test_values_keep_their_types() -> None:
    code = "t = (1, 2)\ns = {1, 2}\nb = b'x'\nn = None\nd = {1: [2.5]}\nresult = given"
    result = CodeSandbox().execute(code, {"given": {"k": [1, (2,)]}})
    assert result.variables == {
        "t": (1, 2),
        "s": {1, 2},
        "b": b"x",
        "n": None,
        "d": {1: [2.5]},
        "result": {"k": [1, (2,)]},
    }


def test_functions_and_classes_stay_inside() -> None:
    code = "def f(x):\n    return x + 1\nclass C:\n    pass\ng = f\nh = lambda: 1\n"
    code += "c = C()\nn = len\nresult = f(1)\nt = '<function x'"
    result = CodeSandbox().execute(code)
    assert result.variables == {"result": 2, "t": "<function x"}
    assert not CodeSandbox().execute("class C:\n    pass\nresult = [C()]").success


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os", "import"),
        ("from os import path", "import"),
        ("import json", "blocked"),
        ("x = [].__class__", "__class__"),
        ("def f():\n    global y\n    y = 1", "global"),
        ("def f():\n    y = 1\n    def g():\n        nonlocal y", "nonlocal"),
        ("exec('x = 1')", "exec"),
        ("eval('1')", "eval"),
        ("compile('1', 'x', 'eval')", "compile"),
        ("__import__('os')", "__import__"),
        ("print('x')", "print"),
        ("open('x')", "open"),
        ("getattr(1, 'real')", "getattr"),
    ],
)
def test_refused_code_says_what_and_where(code: str, word: str) -> None:
    result = CodeSandbox(allowed_modules=["os", "json"]).execute(code)
    assert (result.success, result.error_type) == (False, "security")
    assert word in str(result.error)
    assert "line" in str(result.error)


def test_errors_of_the_code_say_their_type() -> None:
    assert safe_exec("x = 1 / 0").error == "ZeroDivisionError: division by zero"
    assert "KeyError" in str(safe_exec("x = {}['a']").error)
    syntax = safe_exec("def f(:")
    assert str(syntax.error).startswith("SyntaxError")
    assert syntax.error_type == "code_error"
    assert "TypeError: an input" in str(safe_exec("result = client", {"client": object()}).error)


def test_printing_when_it_is_allowed() -> None:
    sandbox = CodeSandbox(safe_builtins={"print"})
    assert sandbox.execute("print('hello')").stdout == "hello\n"
    assert CodeSandbox(safe_builtins={"print": print}).execute("print(1)").stdout == "1\n"


def test_expressions() -> None:
    assert safe_eval("sum(x * 2 for x in items) + n", {"items": [1, 2], "n": 1}).result == 7
    assert safe_eval("[x for x in range(3)]").result == [0, 1, 2]
    refused = safe_eval("().__class__.__base__.__subclasses__()")
    assert (refused.success, refused.error_type) == (False, "security")
    assert not safe_eval("lambda: 1").success
    assert safe_eval("x = 1").error_type == "code_error"
    assert "TimeoutError" in str(safe_eval("sum(range(10**12))", timeout_seconds=0.2).error)


def test_limits_hold_in_any_thread() -> None:
    results: list[SandboxResult] = []
    thread = threading.Thread(target=lambda: results.append(safe_exec("while True:\n    pass", timeout_seconds=0.2)))
    thread.start()
    thread.join(timeout=20)
    assert "TimeoutError" in str(results[0].error)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    real = builtins.__import__

    def no_monty(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pydantic_monty":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with patch.object(builtins, "__import__", no_monty), patch.dict(sys.modules):
        sys.modules.pop("pydantic_monty", None)
        result = safe_exec("x = 1")
    assert result.error_type == "configuration"
    assert "surefoot[sandbox]" in str(result.error)
