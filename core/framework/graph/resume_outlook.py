"""What a resume would do with a stored run: what it keeps and runs again, waits for, and is refused for. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from framework.graph import definition as graphs
from framework.graph import plan_planner as plans
from framework.graph import planner, suspension
from framework.graph.cancelling import was_let_go
from framework.graph.edge import GraphSpec
from framework.graph.journal_rows import ANSWERED
from framework.graph.plan import Plan, StepStatus
from framework.graph.plan_state import PlanState
from framework.graph.readable import readable_state
from framework.graph.run_export import iso_time
from framework.graph.run_steps import STEP_LIMIT, StepView, plan_state, position_of
from framework.graph.stored_run import StoredRun
from framework.schemas.run import RunState
from framework.storage.checkpoints import SCOPE_MARK

Verdict = Literal["goes_on", "waits", "nothing", "busy", "refused"]


@dataclass(frozen=True, slots=True)
class Again:
    """A step that a resume runs though it had begun, or may have. ``certain``: it is recorded that it had begun."""

    step: str
    node_id: str
    certain: bool
    why: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """What has to come first: ``input`` of a person for ``keys`` of the state, an ``approval`` of a plan's step, or
    what a node waits for: the end of a ``sleep``, a ``signal`` called ``name``, the ``answer`` to its ``question``,
    whose id is ``name``, or that somebody ``settle`` the effect of the call ``name``.

    ``step`` is the node's id, or the key of a step that is in the middle of its calls. ``until`` is when the wait ends
    by itself, in seconds since the epoch. ``schema`` is what an answer must fit; ``refused`` says why the node did not
    take the last one. ``occurrence`` counts the run's waits for the signal, from 1. ``run`` is the id of the run of a
    plan's sub-graph whose wait it is, ``None`` for the run's own.
    """

    kind: Literal["input", "approval", "sleep", "signal", "answer", "settle"]
    step: str
    keys: tuple[str, ...] = ()
    question: str | None = None
    request_id: str | None = None
    name: str | None = None
    until: float | None = None
    schema: Any = None
    occurrence: int = 1
    refused: str | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True)
class ResumeOutlook:
    """What the next resume would do.

    ``kept`` are finished steps that do not run again, ``again`` those that had begun or may have, ``first`` those that
    run for the first time; what follows them is not known yet. ``lost`` are finished steps that must run again because
    the checkpoints after them are damaged. ``refusals`` say why a resume is refused, ``changes`` how the definition
    differs, ``notes`` what else there is to know. ``checkpoint_id`` is where it begins, ``None`` at the run's start.
    ``unknown`` are calls whose effects nobody knows and nobody has settled: a resume pauses, or fails, when it comes to
    one.
    """

    verdict: Verdict
    summary: str
    checkpoint_id: str | None = None
    sequence: int = 0
    kept: tuple[str, ...] = ()
    again: tuple[Again, ...] = ()
    first: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    unknown: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def outlook(
    run: StoredRun, steps: Sequence[StepView], definition: GraphSpec | Plan | None, now: float
) -> ResumeOutlook:
    """What a resume at ``now`` (seconds since the epoch) would do; ``definition`` is the one it would be given."""
    changes = _changes(run, definition)
    lost = _lost(run)
    refusals = tuple(_refusals(run, definition, changes, lost))
    at = run.checkpoint.checkpoint_id if run.checkpoint is not None else None
    sequence = run.checkpoint.sequence if run.checkpoint is not None else 0
    kept = _kept(steps, lost)
    if run.state is RunState.COMPLETED and not refusals:
        text = "Nothing is left to do: the run is completed. The same call returns its stored result and runs nothing."
        return ResumeOutlook("nothing", text, at, sequence, kept, changes=tuple(changes))
    if run.state is RunState.RUNNING and run.record.owner is not None:
        left = max(0.0, run.record.lease_until - now)
        text = (
            f"Not now: it is running ({owner_in_words(run.record.owner)}). "
            f"Its lease ends in {left:.0f} s unless it is renewed."
        )
        if run.asked_to_stop:
            text += " It was asked to stop."
        return ResumeOutlook("busy", text, at, sequence, kept, changes=tuple(changes))
    if run.blocked is not None or run.state is RunState.COMPLETED:
        # Nothing can be said of what a resume would do once that is mended.
        return ResumeOutlook(
            "refused",
            "It would be refused: " + " ".join(refusals),
            refusals=refusals,
            changes=tuple(changes),
            notes=tuple(_notes(run, steps)),
        )
    again = tuple(_again(run, steps, lost, now))
    waiting = tuple(_waiting(run, now))
    first = tuple(view.key for view in steps if view.status == "next")
    if refusals:
        verdict: Verdict = "refused"
        text = "It would be refused: " + " ".join(refusals)
    elif waiting and not again and not first:
        verdict = "waits"
        person = " for a person" if any(each.kind in _OF_A_PERSON for each in waiting) else ""
        text = f"It waits{person}: " + "; ".join(map(asked, waiting)) + "."
    else:
        verdict = "goes_on"
        text = _summary(sequence, kept, again, first, waiting)
    return ResumeOutlook(
        verdict,
        text,
        at,
        sequence,
        kept,
        again=again,
        first=first,
        lost=lost,
        waiting=waiting,
        unknown=tuple(_unknown(run)),
        refusals=refusals,
        changes=tuple(changes),
        notes=tuple(_notes(run, steps)),
    )


def owner_in_words(owner: str) -> str:
    """An owner's name (see ``framework.storage.ownership``) as ``process 4711 on host``; others as they are."""
    parts = owner.split("/")
    return f"process {parts[3]} on {parts[0]}" if len(parts) == 6 else f"owner {owner}"


def _counted(count: int, noun: str = "step") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _summary(
    sequence: int, kept: Sequence[str], again: Sequence[Again], first: Sequence[str], waiting: Sequence[Waiting]
) -> str:
    begins = f"It goes on after checkpoint {sequence}" if sequence else "It begins at its start, since nothing is saved"
    parts = [f"{_counted(len(kept), 'finished step')} kept"]
    if again:
        parts.append(f"{_counted(len(again))} again")
    if first:
        parts.append(f"next {', '.join(first)}")
    if waiting:
        parts.append(f"{_counted(len({each.step for each in waiting}))} waiting")
    return f"{begins}: {', '.join(parts)}."


_OF_A_PERSON = ("input", "approval", "answer", "settle")


def asked(waiting: Waiting) -> str:
    """What a run waits for, in words."""
    text = _asked(waiting)
    return f"{text} (run {waiting.run!r})" if waiting.run is not None else text


def _asked(waiting: Waiting) -> str:
    until = f" until {iso_time(waiting.until)}" if waiting.until is not None else ""
    match waiting.kind:
        case "approval":
            return f"step {waiting.step!r} needs an approval"
        case "input" if waiting.question is not None:
            return f"{waiting.step!r} {waiting.question}"
        case "input":
            return f"{waiting.step!r} asks for {', '.join(waiting.keys) if waiting.keys else 'an answer'}"
        case "sleep":
            return f"{waiting.step!r} sleeps{until}"
        case "signal":
            return f"{waiting.step!r} waits for the signal {waiting.name!r}{until}"
        case "answer":
            again = f" (the last answer was refused: {waiting.refused})" if waiting.refused else ""
            return f"{waiting.step!r} asks: {waiting.question}{again}"
        case _:
            return f"the effect of the call {waiting.name!r} is unknown"


def _kept(steps: Sequence[StepView], lost: Sequence[str]) -> tuple[str, ...]:
    return tuple(view.key for view in steps if view.status in ("done", "handled") and view.key not in lost)


def _lost(run: StoredRun) -> tuple[str, ...]:
    """Finished steps whose checkpoints cannot be read: a resume rewinds to before them."""
    found = []
    for record in run.later:
        if record.get("kind") == "step":
            step = planner.Step(str(record["node"]), int(record.get("visit") or 1), str(record.get("branch") or ""))
            found.append(str(record["node"]) if run.is_plan else step.key)
    return tuple(found)


# --- what refuses it ------------------------------------------------------------------------------------------------


def _changes(run: StoredRun, definition: GraphSpec | Plan | None) -> list[str]:
    """How the definition differs from the run's own, a line each."""
    if definition is None or run.definition is None:
        return []
    if isinstance(definition, Plan) != run.is_plan:
        return [f"the run executes a {'plan' if run.is_plan else 'graph'}, this is {type(definition).__name__}"]
    if isinstance(definition, GraphSpec):
        if graphs.fingerprint(definition) == run.record.fingerprint:
            return []
        changed = graphs.describe_changes(run.definition, graphs.canonical(definition))
        return changed or ["the recorded definition cannot be compared"]
    state = plan_state(run)  # a revised plan is in the state, not in the definition that the run began with
    old = plans.canonical(state.plan) if state is not None else dict(run.definition)
    return plans.describe_changes(old, plans.canonical(definition))


def _refusals(
    run: StoredRun, definition: GraphSpec | Plan | None, changes: Sequence[str], lost: Sequence[str]
) -> list[str]:
    found = []
    if run.blocked is not None:
        found.append(f"{run.blocked[:1].upper()}{run.blocked[1:].rstrip('.')}.")
    if not run.record.fingerprint:
        found.append(
            "It was not started by an executor, so what it executes is not recorded; read its checkpoints instead."
        )
    same_graph = definition is not None and definition.id == run.header.get("definition_id")
    if changes and not (run.state is RunState.COMPLETED and same_graph):
        found.append(
            "The definition has changed. Resume with the original one, or allow it with "
            'CheckpointConfig(definition_change="allow").'
        )
    if isinstance(definition, GraphSpec) and not run.is_plan and run.state is not RunState.COMPLETED:
        missing = planner.missing_nodes(definition, position_of(run))
        if missing:
            found.append(f"It stands at {', '.join(map(repr, missing))}, which the graph no longer has.")
    if run.is_plan and run.blocked is None and plan_state(run) is None:
        found.append("Its plan cannot be read from the store.")
    if run.state is RunState.COMPLETED and lost:
        found.append("It is completed, but its last checkpoint cannot be read, so its result is not known.")
    return found


# --- what runs ------------------------------------------------------------------------------------------------------


def _again(run: StoredRun, steps: Sequence[StepView], lost: Sequence[str], now: float) -> list[Again]:
    found = [Again(key, key, True, "finished, but its checkpoint is damaged; runs again") for key in lost]
    stopped = {RunState.CANCELLED: "the run was cancelled", RunState.FAILED: "the run failed"}.get(
        run.state, "its process left the run to the next one" if _left(run) else "its process ended"
    )
    waits = waits_of(run.body)
    for view in steps:
        if view.key in lost:
            continue
        if view.status == "failed":
            why = f"failed ({_counted(view.attempts, 'attempt')}); {_from_its_start(run, view)}"
            if run.is_plan and run.state is not RunState.FAILED:
                continue  # a plan's failed step is tried afresh only once the run itself has failed
            found.append(Again(view.key, view.node_id, True, why))
        elif view.status in ("interrupted", "running"):
            began = view.attempts > 0
            what = "was" if began else "may have been"
            why = f"{what} in flight when {stopped}; {_from_its_start(run, view)}"
            found.append(Again(view.key, view.node_id, began, why))
        elif view.journal_key in waits and _is_over(run, waits[view.journal_key], now):
            why = f"what it waited for has come; {_from_its_start(run, view)}"
            found.append(Again(view.key, view.node_id, True, why))
    return found


def _from_its_start(run: StoredRun, view: StepView) -> str:
    """What becomes of the calls of a step that runs again."""
    states = [call.state for call in run.calls if call.step == view.journal_key]
    done = sum(1 for state in states if state in ANSWERED)
    begun = sum(1 for state in states if state in ("begun", "running"))
    unknown = sum(1 for state in states if state == "unknown")
    settled = sum(1 for state in states if state == "settled")
    parts = [f"{_counted(done, 'recorded call')} answered from the journal"] if done else []
    parts += [f"{_counted(begun, 'call')} in flight made again, with the same idempotency key"] if begun else []
    parts += [f"the effect of {_counted(unknown, 'call')} unknown"] if unknown else []
    parts += [f"{_counted(settled, 'call')} taken as settled"] if settled else []
    return f"runs again, from its start; {', '.join(parts) or 'no call of it is recorded'}"


def _unknown(run: StoredRun) -> list[str]:
    """Calls whose effects are unknown and have not been settled."""
    return [call.id for call in run.calls if call.state == "unknown"]


def waits_of(body: Mapping[str, Any]) -> dict[str, list[suspension.Waiting]]:
    """What held steps wait for, by step key, as a checkpoint's ``body`` has it; those for input are not in it."""
    waits = (body.get("position") or {}).get("waits") or {}
    return {step: [suspension.Waiting.from_json(each) for each in listed] for step, listed in waits.items()}


def _is_over(run: StoredRun, waits: Sequence[suspension.Waiting], now: float) -> bool:
    return any(each.is_over(run.left.get(each.run or run.record.run_id, ()), now) for each in waits)


def _left(run: StoredRun) -> bool:
    return run.record.owner is None and was_let_go(run.log)


def _waiting(run: StoredRun, now: float) -> list[Waiting]:
    people = _waiting_for_approval(run) if run.is_plan else _waiting_for_input(run)
    return people + [
        Waiting(
            each.kind,
            step,
            question=each.question,
            name=each.name or None,
            until=each.until,
            schema=each.schema,
            occurrence=each.occurrence,
            refused=each.refused,
            run=each.run or None,
        )
        for step, waits in waits_of(run.body).items()
        if not _is_over(run, waits, now)
        for each in waits
    ]


def _waiting_for_input(run: StoredRun) -> list[Waiting]:
    position = position_of(run)
    # One that was in the middle of its calls says what "for".
    asked = {record.get("step") for record in run.log if record.get("kind") == "wait" and not record.get("for")}
    nodes = (run.definition or {}).get("nodes") or {}
    found = []
    suspended = waits_of(run.body)
    for step in position.held:
        if step.key not in asked or step.key in suspended:
            continue
        values = _values_of(run, step.branch)
        keys = [str(key) for key in (nodes.get(step.node_id) or {}).get("output_keys", ())]
        found.append(Waiting("input", step.node_id, tuple(key for key in keys if values.get(key) is None)))
    return found


def _values_of(run: StoredRun, branch: str) -> Mapping[str, Any]:
    """The state as a branch sees it."""
    seen = {}
    for key, data in run.values.items():
        scope, mark, name = key.rpartition(SCOPE_MARK)
        if not mark or scope == branch:
            seen[name if mark else key] = data
    return readable_state(seen)


def _waiting_for_approval(run: StoredRun) -> list[Waiting]:
    state = plan_state(run)
    return [] if state is None else list(open_requests(state))


def open_requests(state: PlanState) -> list[Waiting]:
    """The approvals that a plan's steps wait for, in its order."""
    found = []
    for step in state.plan.steps:
        asked = state.standing(step.id).approval
        if asked is None or asked.answer is not None:
            continue
        if step.status in (StepStatus.AWAITING_APPROVAL, StepStatus.PENDING):
            question = asked.request.approval_message or asked.request.preview or asked.request.step_description
            found.append(Waiting("approval", step.id, question=question, request_id=asked.request_id))
    return found


def _notes(run: StoredRun, steps: Sequence[StepView]) -> list[str]:
    notes = []
    if run.checkpoint is not None and run.damage:
        notes.append("Damaged rows were passed over; see the damage listed.")
    if not run.is_plan:
        position = position_of(run)
        if position.paused_at is not None and not any(view.status == "waiting" for view in steps):
            notes.append(f"It is paused after {position.paused_at!r}; input given with the resume goes over the state.")
    elif run.state is not RunState.FAILED:
        failed = [view.node_id for view in steps if view.status == "failed"]
        if failed:
            notes.append(
                f"Failed steps ({', '.join(failed)}) are tried again once the run has failed, or with a new plan."
            )
    if run.asked_to_stop and run.state is RunState.CRASHED:
        notes.append("It was asked to stop before its process ended; `surefoot recover` cancels it.")
    if any(view.status == "next" for view in steps) and (run.record.error or "").startswith(STEP_LIMIT):
        notes.append("Steps count over all processes: without a higher max_steps it stops again at once.")
    if run.record.recovery_attempts:
        notes.append(f"It has been recovered {_counted(run.record.recovery_attempts, 'time')} after a crash.")
    return notes
