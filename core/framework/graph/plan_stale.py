"""Which completed steps of a revised plan were made from something that is no longer so. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any

from framework.graph.code_checks import needed_names
from framework.graph.plan import ActionType, Plan, PlanStep, StepStatus
from framework.graph.references import MissingReference, resolve


class _Watched(Mapping[str, None]):
    """Names without values, that notes which of them are looked up."""

    def __init__(self, names: Set[str]) -> None:
        self._names = names
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> None:
        if name not in self._names:
            raise KeyError(name)
        self.read.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stale_steps(
    plan: Plan,
    gone: Collection[str],
    brought: Collection[str],
    made: Mapping[str, Collection[str]],
    order: Mapping[str, int],
) -> list[str]:
    """Completed steps that need, or have read, something that changed, directly or through others, in list order.

    ``gone`` are the ids of steps that changed, were dropped or run again, and ``brought`` names of the context with
    another value. ``made`` are the names each step has put into the context, and ``order`` is the order in which the
    steps ran, which says from which of them a name was read.
    """
    names = {name for each in made.values() for name in each} | set(brought)
    read = {step.id: _read(step, names, {*made, *order}) for step in plan.steps}
    stale: set[str] = set()
    grew = True
    while grew:
        changed = {*gone, *stale}
        new = {
            step.id
            for step in plan.steps
            if step.status is StepStatus.COMPLETED
            and step.id not in stale
            and _is_touched(step, read[step.id], changed, brought, made, order)
        }
        grew = bool(new)
        stale |= new
    return [step.id for step in plan.steps if step.id in stale]


def _is_touched(
    step: PlanStep,
    read: tuple[set[str], set[str]],
    changed: Set[str],
    brought: Collection[str],
    made: Mapping[str, Collection[str]],
    order: Mapping[str, int],
) -> bool:
    names, ids = read
    if not changed.isdisjoint(step.dependencies) or not changed.isdisjoint(ids):
        return True
    for name in names:
        place = order.get(step.id, len(order))
        makers = [each for each in made if name in made[each] and order.get(each, -1) < place and each != step.id]
        if not makers:
            if name in brought:
                return True
        elif max(makers, key=lambda each: order.get(each, -1)) in changed:
            return True
    return False


def _read(step: PlanStep, names: Set[str], ids: Set[str]) -> tuple[set[str], set[str]]:
    """The names of the context and the ids of steps that the step's arguments refer to."""
    context, outputs = _Watched(names), _Watched(ids)
    _look(step.inputs, context, outputs)
    read = set(context.read)
    action = step.action
    declared = {ActionType.TOOL_USE: action.tool_args, ActionType.FUNCTION: action.function_args}
    arguments = declared.get(action.action_type, {})
    own = {*step.inputs, *(name for name, value in arguments.items() if not _is_reference(value))}
    rest = _Watched(names - own)
    _look({name: value for name, value in arguments.items() if name not in step.inputs}, rest, outputs)
    read |= rest.read
    if action.action_type is ActionType.CODE_EXECUTION and action.code:
        read |= (needed_names(action.code) & names) - set(step.inputs)
    return read, outputs.read


def _look(value: Any, context: _Watched, outputs: _Watched) -> None:
    if isinstance(value, Mapping):
        for item in value.values():
            _look(item, context, outputs)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _look(item, context, outputs)
    elif _is_reference(value):
        try:
            resolve(value, context, outputs)
        except MissingReference:
            return  # what its parts lead to is not looked at, and what does not exist cannot have changed


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("$")
