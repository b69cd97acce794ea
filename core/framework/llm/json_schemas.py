"""JSON schemas of replies: the one that a node's output keys mean, and which ones an endpoint can enforce. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any


def schema_of_keys(keys: Sequence[str], optional: Container[str] = ()) -> dict[str, Any]:
    """An object with these keys, whose values may be anything; the ``optional`` ones may be missing."""
    properties: dict[str, Any] = {key: {"description": f"The value of {key}; any JSON value."} for key in keys}
    required = [key for key in keys if key not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def is_strict(schema: Any) -> bool:
    """Whether decoding can be bound to ``schema``: each part has a type, and each object lists all of its keys.

    That is what OpenAI and Anthropic ask of a schema that they enforce.
    """
    if not isinstance(schema, Mapping):
        return False
    parts = [*schema.get("$defs", {}).values(), *schema.get("definitions", {}).values()]
    if not all(is_strict(part) for part in parts):
        return False
    if "$ref" in schema or "enum" in schema or "const" in schema:
        return True
    if "anyOf" in schema:
        return all(is_strict(part) for part in schema["anyOf"])
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds:
        return False
    if "object" in kinds:
        properties = schema.get("properties", {})
        listed = set(schema.get("required", ())) == set(properties)
        if schema.get("additionalProperties") is not False or not listed:
            return False
        if not all(is_strict(part) for part in properties.values()):
            return False
    return "array" not in kinds or is_strict(schema.get("items"))
