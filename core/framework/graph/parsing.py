"""Python's parser, as the checks of conditions and of code steps use it.

CPython before 3.11.9 and 3.12.3 counts the depth of all syntax trees under construction in one place: a tree that is
made meanwhile, in another thread or by a finalizer, makes it raise SystemError for text that is in order. Such a text
is parsed again here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TypeVar

_TRIES = 10

T = TypeVar("T")


def parse_code(text: str) -> ast.Module:
    """The tree of a program. Raises SyntaxError, or ValueError, RecursionError or MemoryError for what the parser
    itself cannot take."""
    return _settled(lambda: ast.parse(text))


def parse_expression(text: str) -> ast.Expression:
    """The tree of one expression. Raises as ``parse_code``."""
    return _settled(lambda: ast.parse(text, mode="eval"))


def _settled(parse: Callable[[], T]) -> T:
    for _ in range(_TRIES):
        try:
            return parse()
        except SystemError as error:
            miscounted = error
    raise RecursionError(str(miscounted)) from miscounted
