"""What an answer to a question has to be: a JSON schema, or a Python type that pydantic knows. Pure.

Whoever sends an answer knows the JSON schema only and checks it by ``problem_of``; the node checks once more, by the
same function or, when it gave a type, by that type, whose own validators no schema tells of. JSON schemas are checked
by the package jsonschema, so all their words count; nothing is fetched for a ``$ref``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, time, timedelta
from typing import Any
from urllib.parse import urlsplit

from pydantic import PydanticInvalidForJsonSchema, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

_NO_SUBSCHEMAS = frozenset({"const", "enum", "default", "examples"})
"""Words of a schema whose values are data."""


class Expected:
    """What ``ctx.ask`` expects. ``given`` is ``None`` (anything), a JSON schema, or a type that pydantic knows.

    ``schema`` is the JSON schema, ``None`` for anything, and for a type that has none that can be
    checked. Raises ``ValueError`` for a JSON schema that is not valid.
    """

    def __init__(self, given: Any) -> None:
        self._adapter: TypeAdapter[Any] | None = None
        self.schema: dict[str, Any] | None = None
        if isinstance(given, Mapping):
            self.schema = dict(given)
            problem = _problem_with(self.schema)
            if problem is not None:
                raise ValueError(f"The schema of a question is no JSON schema that can be used: {problem}.")
        elif given is not None:
            self._adapter = TypeAdapter(given)
            try:
                made = self._adapter.json_schema()
            except PydanticInvalidForJsonSchema:
                made = None  # a type of its own kind: only the node can tell
            if made is not None and _problem_with(made) is None:  # a pattern, say, that only pydantic understands
                self.schema = made

    def taken(self, answer: Any, name: str) -> Any:
        """The answer as the node gets it: of its type when a type was given. Raises ``ValueError`` when it does not
        fit."""
        problem: str | None = None
        if self._adapter is None:
            problem = problem_of(self.schema, answer)
            if problem is None:
                return answer
        else:
            try:
                return _validated(self._adapter, answer)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "the answer"
                problem = f"{where}: {first['msg']}"
            except Exception as error:  # a validator of the node's own may raise anything
                problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"The answer to {name!r} does not fit: {problem}.")


def _validated(adapter: TypeAdapter[Any], answer: Any) -> Any:
    try:
        return adapter.validate_python(answer)
    except ValidationError as error:
        # A strict type takes a date, say, from JSON's text, which is what a sender has; not from a Python text.
        try:
            plain = to_json(answer)
        except PydanticSerializationError:
            raise error from None
        return adapter.validate_json(plain)


def problem_of(schema: Any, answer: Any) -> str | None:
    """Why ``answer`` does not fit a JSON schema, ``None`` when it does or there is no schema.

    A value that JSON does not have, such as a date or a model, counts as what it is written as.
    """
    if not isinstance(schema, Mapping):
        return None
    try:
        plain = to_jsonable_python(answer)
    except PydanticSerializationError as error:
        return f"the answer cannot be told as JSON ({error})"
    try:
        errors = list(_validator(schema).iter_errors(plain))
    except Exception as error:  # what a schema recorded by another version, or a pattern, may lead to
        return f"its schema cannot be checked ({type(error).__name__}: {error})"
    if not errors:
        return None
    from jsonschema.exceptions import best_match  # type: ignore[import-untyped]  # noqa: PLC0415 - see _validator

    worst: Any = best_match(errors)
    return _in_words(worst, worst.instance, _path(worst.absolute_path))


def _in_words(error: Any, value: Any, where: str) -> str:
    wanted = error.validator_value
    match error.validator:
        case "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            return f"{where} is {_kind(value)}, not {' or '.join(kinds)}"
        case "required":
            missing = next((name for name in wanted if name not in value), "")
            return f"{where} has no {missing!r}"
        case "enum":
            return f"{where} is {value!r:.60}, not one of {', '.join(map(repr, wanted))}"
        case "const":
            return f"{where} is {value!r:.60}, not {wanted!r}"
        case _:
            return f"{where}: {error.message:.300}"


def _path(parts: Sequence[Any]) -> str:
    return "the answer" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case dict():
            return "object"
        case list():
            return "array"
        case _:
            return "integer" if isinstance(value, int) else "number"


def _problem_with(schema: Mapping[str, Any]) -> str | None:
    """Why nothing can be checked by a schema."""
    from jsonschema.exceptions import SchemaError  # noqa: PLC0415 - see _validator

    try:
        made = _validator(schema)
        type(made).check_schema(schema)
    except SchemaError as error:
        return f"{_path(error.absolute_path).replace('the answer', 'the schema', 1)}: {error.message:.300}"
    if "$id" in schema:
        return None  # its references are relative to that
    for reference in _references(schema):
        try:
            made._resolver.lookup(reference)
        except Exception as error:  # whatever it is, such a reference would never be found
            return f"its $ref {reference!r} leads nowhere ({type(error).__name__})"
    return None


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [found for each in schema for found in _references(each)]
    if not isinstance(schema, dict) or "$id" in schema:
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [found for key, each in schema.items() if key not in _NO_SUBSCHEMAS for found in _references(each)]


def _validator(schema: Mapping[str, Any]) -> Any:
    # Imported when first used: most programs ask nobody, and it takes as long as all else.
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # noqa: PLC0415
    from jsonschema.validators import validator_for  # type: ignore[import-untyped]  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415

    kind = validator_for(schema, default=Draft202012Validator)
    return kind(schema, registry=Registry(), format_checker=_formats())


@functools.cache
def _formats() -> Any:
    """The formats that are checked: those of jsonschema without further packages, and the commonest that need one."""
    from jsonschema import FormatChecker  # noqa: PLC0415

    checker = FormatChecker()
    duration = TypeAdapter(timedelta)
    more: dict[str, Callable[[str], Any]] = {
        "date-time": lambda text: "T" in text.upper() and datetime.fromisoformat(text),
        "time": lambda text: time.fromisoformat(text) is not None,
        "duration": lambda text: text.lstrip("-+").startswith("P") and duration.validate_python(text) is not None,
        "uri": lambda text: urlsplit(text).scheme,
    }
    for name, check in more.items():

        def checked(value: object, check: Callable[[str], Any] = check) -> bool:
            return not isinstance(value, str) or bool(check(value))

        checker.checks(name, raises=ValueError)(checked)
    return checker
