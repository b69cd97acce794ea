"""The records that a graph run's log holds of its steps and attempts: made, and read again on a resume. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from framework.graph.attempts import Visit
from framework.graph.memory import SharedMemory, isolated
from framework.graph.planner import Position, Step
from framework.graph.spending import Spent
from framework.schemas.run import RunState


def step_record(step: Step, visit: Visit, error: str | None, position: Position) -> dict[str, Any]:
    """The record of a finished step, and in ``position`` the branches it started. What is empty or zero is left out."""
    record: dict[str, Any] = {"node": step.node_id, "visit": step.visit, "at": round(time.time(), 3)}
    if step.branch:
        record["branch"] = step.branch
    if visit.attempts > 1:
        record["attempts"] = visit.attempts
    record.update(visit.spent.record())
    if error:
        record["error"] = error
    if started := [branch.id for branch in position.branches.values() if branch.group == step.key]:
        record["branches"] = started
    return record


def attempt_record(step: Step, attempt: int, error: str, spent: Spent) -> dict[str, Any]:
    """The record of a failed attempt."""
    return {"step": step.key, "node": step.node_id, "attempt": attempt, "error": error, **spent.record()}


def attempts_used(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many attempts of each step failed, by step key.

    Looked up in the whole log: a sibling's checkpoint may have followed an attempt, and a step may be ready only once
    branches have met. A crash or a cancellation goes on with what is left of the budget; a run that had failed starts
    its step afresh.
    """
    used: dict[str, int] = {}
    for record in records:
        if record.get("kind") == "attempt":
            used[record["step"]] = record["attempt"]
        elif record.get("kind") == "end" and record.get("state") == RunState.FAILED.value:
            used.clear()
    return used


def finished_steps(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys of the steps that a log tells of as finished."""
    done = [record for record in records if record.get("kind") == "step"]
    return {Step(record["node"], record["visit"], record.get("branch", "")).key for record in done}


def stored_input(step: Step, given: Mapping[str, Any], view: Mapping[str, Any]) -> dict[str, Any]:
    """A step's input as stored: names of values that the state (``view``) holds as well, and the values it does not."""
    same = [key for key, value in given.items() if key in view and view[key] is value]
    own = {key: value for key, value in given.items() if key not in same}
    return {"branch": step.branch, "same": same, **({"own": own} if own else {})}


def given_input(step: Step, given: Mapping[str, Any], memory: SharedMemory) -> dict[str, Any]:
    """A step's input as its node may have it: inside a branch, nothing that another branch can touch."""
    view = memory.view()
    return {
        # What the state holds as well is handed out by it, so that it knows, and a branch gets its own copy.
        key: memory.peek(key)
        if key in view and view[key] is value
        else isolated(value, f"the input {key!r} of {step.node_id}")
        if step.branch
        else value
        for key, value in given.items()
    }
