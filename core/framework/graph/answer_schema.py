"""What an answer to a question has to be: a JSON schema's commonest words, or a Python type. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

_KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


class Expected:
    """What ``ctx.ask`` expects. ``given`` is ``None`` (anything), a JSON schema, or a type that pydantic knows.

    ``schema`` is the JSON schema, ``None`` for anything.
    """

    def __init__(self, given: Any) -> None:
        self._adapter = None if given is None or isinstance(given, Mapping) else TypeAdapter(given)
        if self._adapter is not None:
            self.schema: dict[str, Any] | None = self._adapter.json_schema()
        else:
            self.schema = dict(given) if given is not None else None

    def taken(self, answer: Any, name: str) -> Any:
        """The answer as the node gets it: of its type when a type was given. Raises ``ValueError``."""
        if self._adapter is None:
            problem = problem_of(self.schema, answer)
            if problem is not None:
                raise ValueError(f"The answer to {name!r} does not fit: {problem}.")
            return answer
        try:
            return self._adapter.validate_python(answer)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise ValueError(f"The answer to {name!r} does not fit: {where}: {first['msg']}.") from None


def problem_of(schema: Any, answer: Any, where: str = "the answer") -> str | None:
    """Why ``answer`` does not fit a JSON schema, as far as types, enums, properties, items and choices tell."""
    return _problem(schema, answer, where, schema)


def _problem(schema: Any, answer: Any, where: str, root: Any) -> str | None:
    if not isinstance(schema, Mapping):
        return None
    if "$ref" in schema:
        return _problem(_referred(str(schema["$ref"]), root), answer, where, root)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            problems = [_problem(each, answer, where, root) for each in schema[choice]]
            return None if None in problems or not problems else problems[0]
    if "const" in schema and answer != schema["const"]:
        return f"{where} is {answer!r:.60}, not {schema['const']!r}"
    if "enum" in schema and answer not in schema["enum"]:
        return f"{where} is {answer!r:.60}, not one of {', '.join(map(repr, schema['enum']))}"
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    if kinds and not any(_is_of(answer, kind) for kind in kinds):
        return f"{where} is {type(answer).__name__}, not {' or '.join(kinds)}"
    if isinstance(answer, dict):
        missing = [name for name in schema.get("required", ()) if name not in answer]
        if missing:
            return f"{where} has no {missing[0]!r}"
        parts = [(name, schema.get("properties", {}).get(name), value) for name, value in answer.items()]
        problems = [_problem(part, value, f"{where}.{name}", root) for name, part, value in parts]
    elif isinstance(answer, list):
        problems = [_problem(schema.get("items"), item, f"{where}[{index}]", root) for index, item in enumerate(answer)]
    else:
        problems = []
    return next((problem for problem in problems if problem is not None), None)


def _is_of(answer: Any, kind: str) -> bool:
    if isinstance(answer, bool):
        return kind == "boolean"
    if isinstance(answer, float) and answer.is_integer() and kind == "integer":
        return True
    return isinstance(answer, _KINDS.get(kind, (object,)))


def _referred(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part, {}) if isinstance(found, Mapping) else {}
    return found
