"""From a Python function to what a model is told of it: the JSON schema of its parameters, and back to a call."""

from __future__ import annotations

import enum
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from framework.errors import ToolError

_SIMPLE: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    dict: {"type": "object"},
    list: {"type": "array"},
}
_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


class InvalidArguments(ValueError):
    """What a model passed does not fit the tool's parameters; the message tells it what to correct."""


@dataclass(frozen=True)
class Signature:
    """A function's parameters: ``schema`` is their JSON schema, ``adapters`` check and convert one value each.

    A parameter without an adapter takes any value as it is.
    """

    function: Callable[..., Any]
    schema: dict[str, Any]
    adapters: Mapping[str, TypeAdapter[Any]]
    parameters: Mapping[str, inspect.Parameter]

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Signature:
        """Read the signature. Raises `ToolError` for a function a model cannot call: annotations that do not resolve,
        parameters that have no JSON form and no default.
        """
        hints = _type_hints(function, name)
        parameters = {
            each.name: each
            for each in inspect.signature(function).parameters.values()
            if each.kind is not inspect.Parameter.VAR_POSITIONAL
        }
        named = {key: each for key, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
        adapters: dict[str, TypeAdapter[Any]] = {}
        for key in named:
            adapter = _adapter(hints[key]) if key in hints else None
            if adapter is not None:
                adapters[key] = adapter
        schema = _object_schema(named, hints, adapters)
        if len(named) != len(parameters):
            schema["additionalProperties"] = True
        return cls(function, schema, adapters, parameters)

    def bind(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and the named arguments of a call. Raises `InvalidArguments`, naming every argument that is
        missing, unknown or of the wrong kind.
        """
        problems = []
        values: dict[str, Any] = {}
        variable = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self.parameters.values())
        for key, value in arguments.items():
            known = self.parameters.get(key)
            if known is None or known.kind is inspect.Parameter.VAR_KEYWORD:
                if variable:
                    values[key] = value
                else:
                    problems.append(f"there is no parameter {key!r} (known: {', '.join(self.parameters) or 'none'})")
                continue
            try:
                values[key] = self.adapters[key].validate_python(value) if key in self.adapters else value
            except ValidationError as error:
                problems += [_said(key, each) for each in error.errors(include_url=False)]
        required = [key for key in self.schema.get("required", []) if key not in arguments]
        problems += [f"{key!r} is missing" for key in required]
        if problems:
            raise InvalidArguments("; ".join(problems))
        return self._call(values)

    def _call(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        positional = []
        for key, each in self.parameters.items():
            if each.kind is not inspect.Parameter.POSITIONAL_ONLY or key not in values:
                break
            positional.append(values.pop(key))
        return positional, values


def check_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments against a JSON schema given as such: what is required, what is known when nothing else is
    allowed, and the type of each value at the top. Raises `InvalidArguments`. What lies deeper is the tool's to check.
    """
    properties = schema.get("properties") or {}
    problems = [f"{key!r} is missing" for key in schema.get("required") or () if key not in arguments]
    if schema.get("additionalProperties") is False:
        known = ", ".join(properties) or "none"
        problems += [f"there is no parameter {key!r} (known: {known})" for key in arguments if key not in properties]
    for key, value in arguments.items():
        declared = properties.get(key)
        wanted = declared.get("type") if isinstance(declared, dict) else None
        kinds = [wanted] if isinstance(wanted, str) else wanted
        if isinstance(kinds, list) and not any(_is_of(value, kind) for kind in kinds):
            problems.append(f"{key!r} must be of the type {' or '.join(map(str, kinds))}, not {json_text(value, 60)}")
        elif isinstance(declared, dict) and isinstance(declared.get("enum"), list) and value not in declared["enum"]:
            allowed = ", ".join(json_text(each, 60) for each in declared["enum"])
            problems.append(f"{key!r} must be one of {allowed}, not {json_text(value, 60)}")
    if problems:
        raise InvalidArguments("; ".join(problems))


def to_json(value: Any) -> str:
    """``value`` as JSON text. Dataclasses, pydantic models, dates, enums, sets and the like take their JSON form; a
    number that is not finite becomes null. Raises ``ValueError`` for anything else.
    """
    try:
        return json.dumps(to_jsonable_python(value, inf_nan_mode="null"), ensure_ascii=False, allow_nan=False)
    except (PydanticSerializationError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def json_text(value: Any, longest: int) -> str:
    """``value`` for a message, at most ``longest`` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _type_hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    if isinstance(function, functools.partial):
        function = function.func
    target = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
    try:
        return get_type_hints(inspect.unwrap(target), include_extras=True)
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        raise ToolError(
            f"Tool {name!r}{where(function)}: an annotation cannot be read ({error}). Import the type where the module "
            "runs, not only under TYPE_CHECKING, or leave the annotation out."
        ) from error


def where(function: Callable[..., Any]) -> str:
    """`` (file, line n)`` of a function, for messages; empty when it is unknown."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        adapter = TypeAdapter(hint)
        adapter.json_schema()
    except PydanticUserError:  # a class pydantic knows nothing of, or one that has no JSON form
        return None
    return adapter


def _object_schema(
    parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any], adapters: Mapping[str, TypeAdapter[Any]]
) -> dict[str, Any]:
    inputs = [(key, "validation", adapter) for key, adapter in adapters.items() if _simple(hints[key]) is None]
    made, definitions = TypeAdapter.json_schemas(inputs) if inputs else ({}, {})  # type: ignore[arg-type] # literal
    properties: dict[str, Any] = {}
    for key, each in parameters.items():
        ready = made.get((key, "validation"))
        schema = dict(ready if ready is not None else _simple(hints.get(key)) or {"type": "string"})
        described = _description(hints.get(key))
        if described and "description" not in schema:
            schema["description"] = described
        # A plain type is told as just that; a default is part of what a richer annotation says.
        if ready is not None and each.default is not each.empty and "default" not in schema:
            default = _json_default(each.default)
            if default is not None:
                schema["default"] = default
        properties[key] = schema
    result: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": [key for key, each in parameters.items() if each.default is each.empty],
    }
    if "$defs" in definitions:
        result["$defs"] = definitions["$defs"]
    return result


def _simple(hint: Any) -> dict[str, Any] | None:
    return next((schema for kind, schema in _SIMPLE.items() if hint is kind), None)


def _description(hint: Any) -> str | None:
    """The plain text of ``Annotated[str, "what it is"]``."""
    if get_origin(hint) is not Annotated:
        return None
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, str)), None)


def _json_default(default: Any) -> Any:
    value = default.value if isinstance(default, enum.Enum) else default
    return value if isinstance(value, str | int | float | bool | list | dict) and _is_json(value) else None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is_of(value: Any, kind: Any) -> bool:
    types = _JSON_TYPES.get(kind)
    if types is None:
        return True
    if isinstance(value, bool):
        return bool in types
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, types)


def _said(key: str, error: Any) -> str:
    place = ".".join([key, *map(str, error["loc"])])
    return f"{place!r}: {error['msg']} (given: {json_text(error['input'], 60)})"
