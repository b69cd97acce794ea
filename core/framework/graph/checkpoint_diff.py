"""The difference of two checkpoints of a run, down to the entries of dicts and lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from framework.errors import CheckpointNotFound, CorruptData, RunNotFound
from framework.graph.readable import holds_secret, masked_state, plain_json, readable_state
from framework.graph.stored_run import readable_body
from framework.graph.text import shorten, text_of
from framework.storage import checkpoints as stored
from framework.storage.checkpoints import SCOPE_MARK
from framework.storage.interface import Storage
from framework.storage.records import CheckpointRow

_NAMES = re.compile(r"[^.\[\]']+")
_REFERENCE = b'{"$t":"ref"'

Kind = Literal["added", "removed", "changed", "appended"]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``where`` is ``state`` or ``position``; ``path`` such as ``report.sections[3].title``.

    ``old`` and ``new`` are in readable form: ``None`` where there is nothing. Of ``appended``, ``new`` holds only what
    came at the end.
    """

    where: Literal["state", "position"]
    key: str
    path: str
    kind: Kind
    old: Any = None
    new: Any = None

    def line(self, limit: int = 60) -> str:
        """The change in one line, its values shortened to ``limit`` characters each."""
        old, new = shorten(text_of(self.old), limit), shorten(text_of(self.new), limit)
        match self.kind:
            case "added":
                return f"{self.path}: added {new}"
            case "removed":
                return f"{self.path}: removed {old}"
            case "appended":
                return f"{self.path}: appended {new}"
            case _:
                return f"{self.path}: {old} -> {new}"


def diff_values(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Kind, Any, Any]]:
    """How JSON values differ: path, kind, old and new of each difference; nothing when they are equal. Pure.

    Lists that only grew are ``appended``; of others a common beginning and end are left out, and what is between is
    compared entry by entry.
    """
    if type(old) is dict and type(new) is dict:
        for key in [*old, *(key for key in new if key not in old)]:
            place = _entry(path, key)
            if key not in new:
                yield place, "removed", old[key], None
            elif key not in old:
                yield place, "added", None, new[key]
            else:
                yield from diff_values(old[key], new[key], place)
    elif type(old) is list and type(new) is list:
        yield from _diff_lists(old, new, path)
    elif type(old) is not type(new) or old != new:
        if type(old) is str and type(new) is str and old and new.startswith(old):
            yield path, "appended", None, new[len(old) :]
        else:
            yield path, "changed", old, new


def _entry(path: str, key: str) -> str:
    if not path:
        return key
    return f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"


def _same(one: Any, other: Any) -> bool:
    return next(diff_values(one, other), None) is None


def _diff_lists(old: Sequence[Any], new: Sequence[Any], path: str) -> Iterator[tuple[str, Kind, Any, Any]]:
    shorter = min(len(old), len(new))
    start = next((index for index in range(shorter) if not _same(old[index], new[index])), shorter)
    if start == len(old) < len(new):
        yield path, "appended", None, list(new[start:])
        return
    rest = shorter - start
    end = next((index for index in range(rest) if not _same(old[-1 - index], new[-1 - index])), rest)
    before, after = old[start : len(old) - end], new[start : len(new) - end]
    for index in range(max(len(before), len(after))):
        place = f"{path}[{start + index}]"
        if index >= len(after):
            yield place, "removed", before[index], None
        elif index >= len(before):
            yield place, "added", None, after[index]
        else:
            yield from diff_values(before[index], after[index], place)


def find_checkpoint(storage: Storage, run_id: str, which: int | str | None = None) -> CheckpointRow | None:
    """A kept checkpoint by sequence, by id, or the newest (``None``, ``"latest"``); ``None`` when there is none.

    A text of digits is a sequence, unless a checkpoint has it as its id. Raises ``CorruptData`` when it is there and
    cannot be read, ``RunNotFound``.
    """
    if storage.find_run(run_id) is None:
        raise RunNotFound(run_id)
    if isinstance(which, str) and which != "latest":
        row = storage.find_checkpoint_row(run_id, which)
        if row is not None or not which.isascii() or not which.isdigit():
            return row
        which = int(which)
    damaged: list[tuple[int | None, str]] = []
    for row in storage.read_checkpoint_rows(run_id, lambda item: damaged.append((item.sequence, item.problem))):
        if which in (None, "latest") or row.sequence == which:
            return row
    for sequence, problem in damaged:
        if which in (None, "latest") or sequence == which:
            raise CorruptData(f"Checkpoint {sequence} of run {run_id!r} is damaged: {problem}")
    return None


def state_at(storage: Storage, run_id: str, sequence: int, digest: str | None = None) -> dict[str, bytes]:
    """The run's own state at ``sequence`` as encoded values; keys of branches and of a plan's steps are left out.

    0 is what the run began with. Raises ``CorruptData``.
    """
    values = stored.load_state(storage, run_id, sequence, digest).values
    return {key: data for key, data in values.items() if SCOPE_MARK not in key}


def diff_checkpoints(storage: Storage, run_id: str, a: int | str | None, b: int | str | None) -> list[Change]:
    """What changed from checkpoint ``a`` to ``b``: the state key by key, then where the run stands.

    Each is a sequence, an id, ``"latest"`` or ``None`` (the newest); 0 is the run's start. Values whose bytes are the
    same are not looked into, and texts under secret names (``password``) are ``***``. Raises ``RunNotFound``,
    ``CheckpointNotFound``, ``CorruptData``.
    """
    first, before = _side(storage, run_id, a)
    second, after = _side(storage, run_id, b)
    # A key that refers to another one changes with that, though its own bytes stay as they are.
    looked_at = {key for key in (*first, *second) if first.get(key) != second.get(key)}
    looked_at |= {key for state in (first, second) for key, data in state.items() if _REFERENCE in data}
    old, new = readable_state(first), readable_state(second)
    changes = []
    for key in [*first, *(key for key in second if key not in first)]:
        if key not in looked_at:
            continue
        one = {key: old[key]} if key in old else {}
        other = {key: new[key]} if key in new else {}
        found = list(diff_values(one, other))
        if not found and not any(_REFERENCE in state[key] for state in (first, second)):
            # The same to read, and not of the same type.
            found = [(key, "changed", plain_json(first[key]), plain_json(second[key]))]
        changes += [Change("state", key, *each) for each in found]
    stood, stands = _in_line(before), _in_line(after)
    for path, kind, was, now in diff_values(stood, stands):
        if kind == "appended":  # of two texts, which to read whole says more
            kind, was, now = "changed", stood[path], stands[path]
        changes.append(Change("position", path, path, kind, was, now))
    return [_masked(change) if change.where == "state" else change for change in changes]


def _masked(change: Change) -> Change:
    """Without the texts under secret names, those on the way to the change among them."""
    secret = next((name for name in _NAMES.findall(change.path) if holds_secret(name)), None)
    if secret is None:
        return replace(change, old=masked_state(change.old), new=masked_state(change.new))
    old, new = (masked_state({secret: value})[secret] for value in (change.old, change.new))
    return replace(change, old=old, new=new)


def _side(storage: Storage, run_id: str, which: int | str | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    if which in (0, "0"):
        if storage.find_run(run_id) is None:
            raise RunNotFound(run_id)
        return state_at(storage, run_id, 0), {}
    row = find_checkpoint(storage, run_id, which)
    if row is None:
        kept = [each.sequence for each in storage.read_checkpoint_rows(run_id)]
        raise CheckpointNotFound(run_id, which if which is not None else "latest", kept)
    body = readable_body(row)
    return state_at(storage, run_id, row.sequence, body.get("digest")), position_in_words(body)


def _in_line(position: Mapping[str, Any]) -> dict[str, Any]:
    return {name: ", ".join(value) if isinstance(value, list) else value for name, value in position.items()}


def position_in_words(body: Mapping[str, Any]) -> dict[str, Any]:
    """Where a checkpoint says the run stands, by names that people know."""
    position = body.get("position") or {}
    words: dict[str, Any] = {
        "status": body.get("status"),
        "after": body.get("node") or body.get("step"),
        "next": [_step(row) for row in position.get("ready", ())] or ([body["next"]] if body.get("next") else []),
        "waiting": [_step(row) for row in position.get("held", ())],
        "paused_at": position.get("paused_at"),
        "branches": [f"{row[0]} ({row[7]})" for row in position.get("branches", ())],
        "steps_taken": position.get("steps_taken", body.get("step_number")),
        "tokens": body.get("tokens"),
        "latency_ms": body.get("latency_ms"),
        "revision": position.get("revision"),
    }
    return {name: value for name, value in words.items() if value not in (None, [])}


def _step(row: Sequence[Any]) -> str:
    node, visit, branch = row
    return f"{branch}:{node}#{visit}" if branch else f"{node}#{visit}"
