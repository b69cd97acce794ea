"""A run's metadata: small facts about it, for whoever lists runs, as JSON values by name. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from framework.errors import UnstorableValue

_MAX_DEPTH = 20


def json_facts(metadata: object) -> dict[str, Any]:
    """A copy of ``metadata`` as plain JSON values. Raises ``UnstorableValue`` naming the path of what is none."""
    if not isinstance(metadata, Mapping):
        problem = f"metadata is a dict of named JSON values, not {type(metadata).__name__}"
        raise UnstorableValue("metadata", problem)
    facts: dict[str, Any] = _plain(metadata, "metadata", 0)
    return facts


def _plain(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UnstorableValue(path, f"metadata is nested deeper than {_MAX_DEPTH} levels; keep it small and flat")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UnstorableValue(path, f"a key of metadata is a str, not {type(key).__name__} ({key!r:.60})")
        return {
            key: _plain(item, f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UnstorableValue(path, f"metadata holds JSON values, and JSON knows no {value!r}")
    if value is not None and type(value) not in (str, int, float, bool):
        raise UnstorableValue(
            path,
            f"metadata holds JSON values (text, numbers, true, false, null, lists, dicts), not {type(value).__name__}; "
            "give its text instead, or put it in the run's input",
        )
    return value
