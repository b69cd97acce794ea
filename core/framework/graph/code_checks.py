"""What a code step may say: the check of its syntax tree before anything runs, and the names it uses and makes. Pure.

This check gives clear refusals; it is not the boundary. Code that passes it still runs in another process, in an
interpreter that has no files, no network and no host objects (see ``code_sandbox``).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from framework.graph.parsing import parse_code, parse_expression

MAX_CODE_CHARS = 10_000
MAX_NAMES = 256
"""Of variables that one piece of code assigns at top level, since each is read back."""

SAFE_BUILTINS = frozenset(
    """
    abs all any bool bytes chr dict divmod enumerate filter float frozenset hash hex int isinstance len list map max min
    next iter oct ord pow range repr reversed round set slice sorted str sum tuple type zip
    True False None Ellipsis NotImplemented
    ArithmeticError AssertionError AttributeError BaseException Exception IndexError KeyError LookupError NameError
    NotImplementedError OverflowError RecursionError RuntimeError StopIteration TimeoutError TypeError
    UnicodeDecodeError UnicodeEncodeError UnicodeError ValueError ZeroDivisionError MemoryError
    """.split()
)
_SUSPECT = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Attribute, ast.Call, ast.Name)
_OWN_NAMES = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
_REFUSED_CALLS = frozenset({"exec", "eval", "compile", "__import__"})
_BUILTINS = frozenset(dir(builtins))


@dataclass(slots=True)
class CheckedCode:
    """What was found: names that occur, those of them that may be read before the code assigns them, names assigned at
    top level (no functions or classes), and what is refused; ``problems`` is empty when the code may run."""

    used: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_syntax_error: bool = False


def check_code(
    code: str, *, is_expression: bool = False, inputs: Iterable[str] = (), allowed: frozenset[str]
) -> CheckedCode:
    """Check ``code``; ``allowed`` are the builtins it may use, ``inputs`` the names it is given."""
    checked = CheckedCode()
    if len(code) > MAX_CODE_CHARS:
        checked.problems.append(f"the code has {len(code)} characters; at most {MAX_CODE_CHARS} are allowed")
        return checked
    try:
        tree = parse_expression(code.strip()) if is_expression else parse_code(code)
    except SyntaxError as error:
        checked.problems.append(f"SyntaxError: {error.msg} (line {error.lineno})")
        checked.is_syntax_error = True
        return checked
    except (ValueError, RecursionError, MemoryError) as error:
        checked.problems.append(f"SyntaxError: the code cannot be parsed: {str(error) or 'it is nested too deeply'}")
        checked.is_syntax_error = True
        return checked
    statements = [list(_walk(part)) for part in (tree.body if isinstance(tree, ast.Module) else [tree])]
    nodes = [node for statement in statements for node in statement]
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    known = bound | set(inputs) | allowed
    for node in nodes:
        problem = _problem(node, known) if type(node) in _SUSPECT else None
        if problem is not None:
            checked.problems.append(f"{problem} (line {getattr(node, 'lineno', 1)})")
    checked.used = {node.id for node in nodes if isinstance(node, ast.Name)}
    if isinstance(tree, ast.Module):
        checked.made = list(dict.fromkeys(_made(tree.body)))
        checked.needed = _needed(statements)
        if len(checked.made) > MAX_NAMES:
            checked.problems.append(f"the code assigns {len(checked.made)} variables; at most {MAX_NAMES} are allowed")
    else:
        checked.needed = checked.used
    return checked


def needed_names(code: str) -> set[str]:
    """Names that ``code`` may read before it sets them: what it takes from the plan's context. Whatever it may not say
    makes no difference; code that cannot be parsed needs nothing."""
    return check_code(code, allowed=SAFE_BUILTINS).needed


def _walk(root: ast.AST, leave_out: tuple[type[ast.AST], ...] = ()) -> Iterator[ast.AST]:
    """The nodes in the order of the source, without load and store marks: a faster ``ast.walk``."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if type(node) in leave_out:
            continue
        yield node
        children: list[ast.AST] = []
        for name in node._fields:
            value = getattr(node, name, None)
            if type(value) is list:
                children += [child for child in value if isinstance(child, ast.AST)]
            elif isinstance(value, ast.AST) and name != "ctx":
                children.append(value)
        children.reverse()
        waiting += children


def _needed(statements: list[list[ast.AST]]) -> set[str]:
    """Names that may be read before they are assigned: all but those that a plain assignment sets first."""
    assigned: set[str] = set()
    needed: set[str] = set()
    for nodes in statements:
        statement = nodes[0]
        targets: set[str] = set()
        if isinstance(statement, ast.Assign):
            targets = {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.AnnAssign) and statement.value and isinstance(statement.target, ast.Name):
            targets = {statement.target.id}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        read = {node.id for node in names if not (isinstance(node.ctx, ast.Store) and node.id in targets)}
        needed |= read - assigned
        assigned |= targets
    return needed


def _problem(node: ast.AST, known: set[str]) -> str | None:
    match node:
        case ast.Import() | ast.ImportFrom():
            return "import is blocked"
        case ast.Global():
            return "global is blocked"
        case ast.Nonlocal():
            return "nonlocal is blocked"
        case ast.Attribute(attr=name) if name.startswith("_"):
            return f"access to the private attribute {name!r} is blocked"
        case ast.Call(func=ast.Name(id=name)) if name in _REFUSED_CALLS:
            return f"calling {name!r} is blocked"
        case ast.Name(id=name) if name.startswith("__") and name.endswith("__"):
            return f"the name {name!r} is blocked"
        case ast.Name(id=name, ctx=ast.Load()) if name in _BUILTINS and name not in known:
            return f"the builtin {name!r} is blocked"
    return None


def _made(body: list[ast.stmt]) -> list[str]:
    """Names assigned at top level, in ``if``, ``for``, ``with`` and ``try`` as well; no functions or classes."""
    return [
        node.id
        for statement in body
        for node in _walk(statement, _OWN_NAMES)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
