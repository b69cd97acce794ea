"""The short forms in which checkpoints' bodies and the log's records of steps are stored, and back. Pure.

Each step writes one of both, so what the store knows by other means is not repeated in them. Both stay JSON:

    {"v": 2, "at": "2026-11-23T22:53:59.133109", "digest": "f36f594a9dc13184", "node": "work",
     "ready": [["work", 21, ["n", "messages"]]], "taken": 20}
    ["work", 20, 1795474439.133]

The body is that of a graph run which did its 20th step and goes on with the 21st visit of ``work``, whose input is
``n`` and ``messages`` of the state. The second line is the log row of a commit with one step: node, visit, seconds
since the epoch, and an object with the rest (tokens, error ...) if there is any. Other records are objects, and a
commit with others, or with several, holds a list of them.

In a body, what is absent is: ``executor`` "graph" ("flexible" where there is a ``step`` and no ``node``), ``status``
"in_progress", ``tokens`` and ``latency_ms`` 0, ``step_number`` that of ``taken``, ``next`` the node of the first ready
step. ``ready``, ``taken``, ``inputs`` and ``rest`` are the position of a graph; each other one is stored whole.

``long_body(short_body(body)) == body`` and ``long_records(short_records(records)) == records``, whatever they hold.
Bodies of format 1 have no short form; records before it were all objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from framework.errors import CorruptData

SHORT_FORMAT = 2
"""The format version from which on bodies are short."""

_STEP = "step"
_NAMED = 4
"""Fields of a step's record that have a place in its short form, ``kind`` included."""

_PLACED = 3
"""Parts of a position that are fields of the body: ``ready``, ``steps_taken`` and ``inputs``, which it always has."""

_MISSING: Any = object()


def short_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body as it is stored. Needs its executor, at, status, step_number, tokens and latency_ms."""
    short = dict(body)
    at = short["at"]
    if type(at) is datetime and at.tzinfo is None and not at.fold:
        short["at"] = at.isoformat()
    if short["executor"] == _executor_of(short):
        del short["executor"]
    if short["status"] == "in_progress":
        del short["status"]
    for name in ("tokens", "latency_ms"):
        if type(short[name]) is int and not short[name]:
            del short[name]
    position = _short_position(short.get("position"))
    if position is None:
        return short
    del short["position"]
    short.update(position)
    number = short["step_number"]
    if type(number) is int and number == short["taken"]:
        del short["step_number"]
    if short["ready"]:
        following = short.pop("next", None)
        if following != short["ready"][0][0]:
            short["next"] = following
    return short


def long_body(short: Mapping[str, Any]) -> dict[str, Any]:
    """The body that ``short_body`` made short. Raises ``CorruptData`` for what it cannot have made."""
    try:
        body = dict(short)
        if type(body["at"]) is str:
            body["at"] = datetime.fromisoformat(body["at"])
        body.setdefault("executor", _executor_of(body))
        body.setdefault("status", "in_progress")
        body.setdefault("tokens", 0)
        body.setdefault("latency_ms", 0)
        if "ready" not in body:
            return body
        ready = body["ready"]
        body["position"] = _long_position(body)
        body.setdefault("step_number", body["position"]["steps_taken"])
        if ready and body.setdefault("next", ready[0][0]) is None:
            del body["next"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptData(f"A checkpoint's body is not one that this library writes: {error!r:.200}") from None
    return body


def _executor_of(body: Mapping[str, Any]) -> str:
    return "flexible" if "step" in body and "node" not in body else "graph"


def _short_position(position: Any) -> dict[str, Any] | None:
    """A graph's position as fields of the body; ``None`` for any other, which these fields could not tell whole."""
    if type(position) is not dict or type(position.get("steps_taken")) is not int:
        return None
    ready, inputs = position.get("ready"), position.get("inputs")
    if type(ready) is not list or type(inputs) is not dict:
        return None
    left = dict(inputs)
    rows = []
    for row in ready:
        if type(row) is not list or len(row) != 3 or type(row[0]) is not str or type(row[2]) is not str:
            return None
        node, visit, branch = row
        short = [node, visit, branch] if branch else [node, visit]
        if left:
            key = _key_of(node, visit, branch)
            if (names := _only_names(left.get(key), branch)) is not None:
                short.append(names)
                del left[key]
        rows.append(short)
    made: dict[str, Any] = {"ready": rows, "taken": position["steps_taken"]}
    if left:
        made["inputs"] = left
    if len(position) > _PLACED:
        made["rest"] = {key: item for key, item in position.items() if key not in ("ready", "steps_taken", "inputs")}
    return made


def _long_position(body: dict[str, Any]) -> dict[str, Any]:
    """The position that ``_short_position`` made into fields of ``body``, which are taken out of it."""
    ready = []
    inputs: dict[str, Any] = {}
    for node, visit, *more in body.pop("ready"):
        branch = more.pop(0) if more and type(more[0]) is str else ""
        ready.append([node, visit, branch])
        if more:
            inputs[_key_of(node, visit, branch)] = {"branch": branch, "same": more[0]}
    position = {"ready": ready, "steps_taken": body.pop("taken")}
    position.update(body.pop("rest", {}))
    position["inputs"] = {**inputs, **body.pop("inputs", {})}
    return position


def _key_of(node: str, visit: Any, branch: str) -> str:
    return f"{branch}:{node}#{visit}" if branch else f"{node}#{visit}"


def _only_names(given: Any, branch: str) -> list[Any] | None:
    """The names in a step's stored input that is made of values of the state, and of nothing else."""
    if type(given) is dict and len(given) == 2 and given.get("branch", _MISSING) == branch:
        names = given.get("same")
        return names if type(names) is list else None
    return None


def short_records(records: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The records of a commit as its log row holds them."""
    short = [_short_record(record) for record in records]
    return short[0] if len(short) == 1 and type(short[0]) is list else short


def long_records(stored: Any) -> list[dict[str, Any]]:
    """The records that ``short_records`` made short. Raises ``CorruptData`` for what it cannot have made."""
    if type(stored) is not list:
        raise CorruptData("It does not hold records.")
    if stored and type(stored[0]) is str:
        return [_long_record(stored)]
    return [_long_record(each) for each in stored]


def _short_record(record: Mapping[str, Any]) -> list[Any] | Mapping[str, Any]:
    node = record.get("node")
    if record.get("kind") != _STEP or "visit" not in record or "at" not in record:
        return record
    if type(node) is not str or not node.isprintable():  # the codec has forms for others that are no text
        return record
    short = [node, record["visit"], record["at"]]
    if len(record) > _NAMED:
        short.append({key: item for key, item in record.items() if key not in ("kind", "node", "visit", "at")})
    return short


def _long_record(stored: Any) -> dict[str, Any]:
    if type(stored) is dict:
        return stored
    if type(stored) is list and len(stored) in (_NAMED - 1, _NAMED):
        node, visit, at, *rest = stored
        record = {"kind": _STEP, "node": node, "visit": visit, "at": at}
        if not rest:
            return record
        if type(rest[0]) is dict:
            record.update(rest[0])
            return record
    raise CorruptData("It does not hold records.")
