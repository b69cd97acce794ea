"""The one safe evaluator of conditions: a small part of Python's expressions, interpreted and never executed.

A text is parsed with `ast`, every part of it is checked against a closed list, and the tree is then interpreted here:
no `eval`, no `exec`, no code object. What a name means is looked up in the mapping given to `Expression.evaluate`.

Allowed: comparisons (chained), ``and or not``, arithmetic, ``in``, ``is None``, literals and list, tuple, set and dict
displays, ``a if c else b``, subscripts and slices, ``a.b`` (a key of a mapping, or a declared field of a pydantic model
or dataclass), the functions in `FUNCTIONS`, a few methods of text, and ``dict.get``. ``true``, ``false``, ``null`` and
``none`` may be written in lower case. An evaluation has a budget of work and of result sizes, so that a hostile text
costs neither much time nor much memory.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NoReturn

from framework.errors import ExpressionError
from framework.graph import expression_values as values
from framework.graph.expression_values import Budget, Refused
from framework.graph.parsing import parse_expression

MAX_TEXT_CHARS = 4096
MAX_DEPTH = 64

_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
_LITERALS = (str, bytes, int, float, bool, type(None))
FUNCTIONS = frozenset(values.FUNCTIONS)

_BINARY: dict[type[ast.operator], Callable[[Budget, Any, Any], Any]] = {
    ast.Add: values.add,
    ast.Sub: values.arithmetic("-", operator.sub),
    ast.Mult: values.multiply,
    ast.Div: values.arithmetic("/", operator.truediv),
    ast.FloorDiv: values.arithmetic("//", operator.floordiv),
    ast.Mod: values.arithmetic("%", operator.mod),
    ast.Pow: values.power,
    ast.LShift: values.shift_left,
    ast.RShift: values.bitwise(">>", operator.rshift),
    ast.BitAnd: values.bitwise("&", operator.and_),
    ast.BitOr: values.bitwise("|", operator.or_),
    ast.BitXor: values.bitwise("^", operator.xor),
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Budget, Any, Any], Any]] = {
    ast.Eq: values.comparison(operator.eq),
    ast.NotEq: values.comparison(operator.ne),
    ast.Lt: values.comparison(operator.lt),
    ast.LtE: values.comparison(operator.le),
    ast.Gt: values.comparison(operator.gt),
    ast.GtE: values.comparison(operator.ge),
    ast.In: values.contains,
    ast.NotIn: lambda budget, left, right: not values.contains(budget, left, right),
    ast.Is: lambda budget, left, right: left is right,
    ast.IsNot: lambda budget, left, right: left is not right,
}
_KEYWORDS: dict[str, frozenset[str]] = {
    "sorted": frozenset({"reverse"}),
    "min": frozenset({"default"}),
    "max": frozenset({"default"}),
    "round": frozenset({"ndigits"}),
    "sum": frozenset({"start"}),
}


class Expression:
    """A checked expression. ``text`` is its source; ``names`` are the names it looks up, constants left out.

    Made by `compile_expression`. It holds no state of an evaluation, so threads may share it.
    """

    __slots__ = ("_body", "_where", "names", "text")

    def __init__(self, text: str, body: ast.expr, where: Callable[[ast.AST], str], names: frozenset[str]) -> None:
        self.text = text
        self.names = names
        self._body = body
        self._where = where

    def evaluate(self, names: Mapping[str, Any]) -> Any:
        """The value of the expression when its names mean what ``names`` says. Changes nothing.

        Raises ExpressionError, with the column, for an unknown name or key, operands that do not fit, an error of the
        operation itself, and work or results above the limits.
        """
        return _Evaluation(names, self._where).value(self._body)

    def test(self, names: Mapping[str, Any]) -> bool:
        """Whether the value counts as true. Raises ExpressionError as `evaluate` does."""
        return _Evaluation(names, self._where).truth(self._body)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def compile_expression(text: str) -> Expression:
    """Check ``text`` and return it ready to evaluate. Results are cached.

    Raises ExpressionError, saying what and at which column, when it is not in the language.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"A condition must be text, not {type(text).__name__}.")
    if len(text) > MAX_TEXT_CHARS:
        raise ExpressionError(f"The condition has {len(text)} characters; at most {MAX_TEXT_CHARS} are allowed.")
    return _compile(text)


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """``compile_expression(text).evaluate(names)``."""
    return compile_expression(text).evaluate(names)


@lru_cache(maxsize=1024)
def _compile(text: str) -> Expression:
    stripped = text.strip()
    if not stripped:
        raise ExpressionError("The condition is empty.")
    indent = len(text) - len(text.lstrip())
    try:
        tree = parse_expression(stripped)
    except SyntaxError as error:
        column = (error.offset or 1) + (indent if (error.lineno or 1) == 1 else 0)
        hint = next((f" Write {word!r} for {sign!r}." for sign, word in _FOREIGN.items() if sign in text), "")
        raise ExpressionError(f"Not an expression: {error.msg} (column {max(column, 1)}).{hint}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        # Null bytes, digits beyond Python's limit, or nesting that the parser itself refuses.
        raise ExpressionError(f"The condition cannot be parsed: {str(error) or 'it is nested too deeply'}.") from None
    where = _Locator(stripped, indent)
    check = _Check(where)
    check.visit(tree.body, 1)
    return Expression(text, tree.body, where, frozenset(check.names))


_FOREIGN = {"&&": "and", "||": "or", "===": "=="}


class _Locator:
    """Says where a node is. `ast` counts UTF-8 bytes; people count characters."""

    def __init__(self, text: str, indent: int) -> None:
        self._lines = [line.encode("utf-8", "replace") for line in text.split("\n")]
        self._indent = indent

    def __call__(self, node: ast.AST) -> str:
        line = getattr(node, "lineno", 1)
        offset = getattr(node, "col_offset", 0)
        before = self._lines[line - 1][:offset] if line <= len(self._lines) else b""
        column = len(before.decode("utf-8", "replace")) + 1 + (self._indent if line == 1 else 0)
        return f"column {column}" if line == 1 else f"line {line}, column {column}"


class _Check:
    """Walks a tree once and refuses whatever is not on the list."""

    def __init__(self, where: Callable[[ast.AST], str]) -> None:
        self.names: set[str] = set()
        self._where = where

    def visit(self, node: ast.expr, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._refuse(node, f"more than {MAX_DEPTH} levels of nesting")
        match node:
            case ast.Constant(value=value):
                if type(value) not in _LITERALS:
                    self._refuse(node, f"the literal {value!r}")
            case ast.Name(id=name):
                self._check_name(node, name)
                if name not in _CONSTANTS:
                    self.names.add(name)
            case ast.Attribute(attr=name):
                self._check_name(node, name)
            case ast.Call():
                self._check_call(node, depth)
                return
            case ast.Dict(keys=keys):
                if None in keys:
                    self._refuse(node, "unpacking with '**'")
            case ast.BinOp(op=op):
                if type(op) not in _BINARY:
                    self._refuse(node, "the operator '@'")
            case ast.Compare():
                self._check_identity(node)
            case ast.BoolOp() | ast.UnaryOp() | ast.IfExp() | ast.Subscript() | ast.Slice():
                pass
            case ast.List() | ast.Tuple() | ast.Set():
                pass
            case _:
                self._refuse(node, _REFUSED.get(type(node).__name__, f"{type(node).__name__} expressions"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.visit(child, depth + 1)

    def _check_name(self, node: ast.expr, name: str) -> None:
        if name.startswith("_"):
            self._refuse(node, f"the name {name!r}, as it starts with '_',")

    def _check_call(self, node: ast.Call, depth: int) -> None:
        match node.func:
            case ast.Name(id=name) if name in FUNCTIONS:
                allowed = _KEYWORDS.get(name, frozenset())
            case ast.Attribute(attr=name, value=receiver) if name in values.METHODS:
                allowed = frozenset()
                self.visit(receiver, depth + 1)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                self._refuse(node, f"calling {name!r}; allowed are {', '.join(sorted(FUNCTIONS | values.METHODS))}:")
            case _:
                self._refuse(node, "calling anything but a named function")
        for keyword in node.keywords:
            if keyword.arg not in allowed:
                self._refuse(node, f"the argument {keyword.arg or '**'!r} of {name!r}")
            self.visit(keyword.value, depth + 1)
        for argument in node.args:
            self.visit(argument, depth + 1)

    def _check_identity(self, node: ast.Compare) -> None:
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, (ast.Is, ast.IsNot)):
                constant = isinstance(right, ast.Constant) and (right.value is None or isinstance(right.value, bool))
                if not constant and not (isinstance(right, ast.Name) and right.id in _CONSTANTS):
                    self._refuse(right, "'is' with anything but None, true or false (use '==')")

    def _refuse(self, node: ast.AST, what: str) -> NoReturn:
        raise ExpressionError(f"A condition must not use {what} ({self._where(node)}).")


_REFUSED = {
    "Lambda": "lambda",
    "ListComp": "comprehensions",
    "SetComp": "comprehensions",
    "DictComp": "comprehensions",
    "GeneratorExp": "comprehensions",
    "JoinedStr": "f-strings",
    "TemplateStr": "template strings",
    "NamedExpr": "':='",
    "Starred": "unpacking with '*'",
    "Await": "await",
    "Yield": "yield",
    "YieldFrom": "yield",
}


class _Evaluation:
    """One evaluation: the meaning of the names, and what is left of the budget."""

    def __init__(self, names: Mapping[str, Any], where: Callable[[ast.AST], str]) -> None:
        self._names = names
        self._where = where
        self._budget = Budget()

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.BoolOp(op=op, values=parts):
                wanted = isinstance(op, ast.Or)
                for part in parts[:-1]:
                    result = self.value(part)
                    if self._is_true(part, result) is wanted:
                        return result
                return self.value(parts[-1])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self.truth(operand)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.truth(test) else orelse)
            case ast.Compare():
                return self._compare(node)
        return self._translated(node, partial(self._operation, node))

    def truth(self, node: ast.expr) -> bool:
        return self._is_true(node, self.value(node))

    def _is_true(self, node: ast.expr, value: Any) -> bool:
        if type(value) is bool:
            return value
        return bool(self._translated(node, partial(bool, value)))

    def _name(self, node: ast.expr, name: str) -> Any:
        if name in self._names:
            return self._names[name]
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        raise ExpressionError(f"There is no value named {name!r} ({self._where(node)}).")

    def _compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        result: Any = True
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.value(comparator)
            result = self._translated(comparator, partial(_COMPARE[type(op)], self._budget, left, right))
            if not self._is_true(comparator, result):
                return result
            left = right
        return result

    def _translated(self, node: ast.expr, operation: Callable[[], Any]) -> Any:
        """Run one operation and turn whatever it raises into an ExpressionError that says where."""
        try:
            return operation()
        except ExpressionError:
            raise
        except Refused as error:
            raise ExpressionError(f"{error} ({self._where(node)}).") from None
        except Exception as error:
            # Operands are values of the state, so their operators may raise anything.
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise ExpressionError(f"The condition failed with {problem} ({self._where(node)}).") from error

    def _operation(self, node: ast.expr) -> Any:
        budget = self._budget
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                return _BINARY[type(op)](budget, self.value(left), self.value(right))
            case ast.UnaryOp(op=unary, operand=operand):
                return _UNARY[type(unary)](values.number(self.value(operand)))
            case ast.Attribute(value=receiver, attr=name):
                return values.field_of(self.value(receiver), name)
            case ast.Subscript(value=receiver, slice=ast.Slice(lower=lower, upper=upper, step=step)):
                bounds = slice(*(None if part is None else self.value(part) for part in (lower, upper, step)))
                return values.part_of(budget, self.value(receiver), bounds)
            case ast.Subscript(value=receiver, slice=index):
                return values.item_of(self.value(receiver), self.value(index))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                named = {str(keyword.arg): self.value(keyword.value) for keyword in keywords}
                return values.FUNCTIONS[name](budget, *(self.value(arg) for arg in args), **named)
            case ast.Call(func=ast.Attribute(value=receiver, attr=name), args=args):
                return values.call_method(budget, self.value(receiver), name, [self.value(arg) for arg in args])
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Set(elts=items):
                return {values.hashable(budget, self.value(item)) for item in items}
            case ast.Dict(keys=keys, values=items):
                pairs = [(self.value(key), self.value(item)) for key, item in zip(keys, items, strict=True) if key]
                return {values.hashable(budget, key): item for key, item in pairs}
        raise Refused(f"{type(node).__name__} is not part of the language")
