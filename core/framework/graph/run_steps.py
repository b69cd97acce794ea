"""The steps of a stored run: which are done and what they took, which failed, and which come next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from framework.errors import SurefootError
from framework.graph import planner
from framework.graph.plan import ApprovalResult, PlanStep, StepStatus
from framework.graph.plan_answers import request_of
from framework.graph.plan_planner import ready_steps
from framework.graph.plan_state import PlanState, has_plan
from framework.graph.planner import Position, Step
from framework.graph.readable import lenient_state
from framework.graph.stored_run import StoredRun
from framework.schemas.run import RunState

StepStanding = Literal[
    "done", "handled", "failed", "running", "interrupted", "waiting", "next", "later", "skipped", "rejected"
]
"""``handled``: it failed, and an edge for failures was followed. ``interrupted``: it may have been in flight when the
process ended. ``waiting``: for a person. ``later``: other steps of the plan come first."""

STEP_LIMIT = "Stopped at the limit of max_steps"
"""How the error of a run begins that used up its steps."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt that failed; ``sequence`` is that of its commit."""

    number: int
    error: str
    sequence: int


@dataclass(frozen=True, slots=True)
class StepView:
    """One visit of a node, or one step of a plan.

    ``key`` is its identity within the run. ``attempts`` counts all that ended, failed ones included. ``latency_ms``,
    ``tokens`` and ``cost`` (USD) are 0 while nothing is known. ``goes_to`` are the nodes that followed, and ``edge``
    the one taken, when only one leads there. ``finished_at`` is seconds since the epoch, ``sequence`` the commit that
    made it durable. ``needs`` are the steps of the plan it depends on.
    """

    key: str
    node_id: str
    visit: int
    status: StepStanding
    branch: str = ""
    attempts: int = 0
    tokens: int = 0
    cost: float = 0.0
    latency_ms: int = 0
    error: str | None = None
    goes_to: tuple[str, ...] = ()
    edge: str | None = None
    finished_at: float | None = None
    sequence: int | None = None
    description: str | None = None
    needs: tuple[str, ...] = ()
    failed_attempts: tuple[FailedAttempt, ...] = field(default=())

    @property
    def journal_key(self) -> str:
        """The step's key in the run's journal: of a plan's step always with its visit."""
        return self.key if self.key != self.node_id else f"{self.node_id}#{self.visit}"


def total_cost(run: StoredRun) -> float:
    """What the run has cost so far in USD, failed attempts included, as far as prices are known."""
    later = [each for each in run.later if each.get("kind") == "attempt"]
    return float(run.body.get("cost") or 0.0) + float(sum(each.get("cost") or 0.0 for each in later))


# --- graphs ---------------------------------------------------------------------------------------------------------


def position_of(run: StoredRun) -> Position:
    """Where a resume would begin. Of a run that committed nothing: at its start."""
    plain = run.body.get("position") or {}
    if plain:
        return planner.from_json(plain)
    if run.checkpoint is not None or run.state is RunState.COMPLETED:
        return Position()
    start = run.header.get("start") or (run.definition or {}).get("entry_node")
    return planner.start(start) if start else Position()


def graph_steps(run: StoredRun) -> list[StepView]:
    """The visits of a graph's run: committed ones in that order, then those that are ready or held."""
    position = position_of(run)
    attempts = _attempts(run.log)
    following = _following(run, position)
    done = [record for record in run.log if record.get("kind") == "step"]
    views = [
        _finished(run, record, key, attempts.get(key, ()), following.get(key, ()))
        for record in done
        if (key := _key(record))
    ]
    lost = {view.key for view in views}  # a step after a checkpoint that cannot be read is done, and runs again
    used = _attempts_in_this_life(run)
    pending = [(step, False) for step in position.ready] + [(step, True) for step in position.held]
    views += [
        _unfinished(run, step, held, attempts.get(step.key, ()), used)
        for step, held in pending
        if step.key not in lost and run.state is not RunState.COMPLETED
    ]
    return views


def _key(record: Mapping[str, Any]) -> str:
    return Step(str(record.get("node")), int(record.get("visit") or 1), str(record.get("branch") or "")).key


def _attempts(records: Iterable[Mapping[str, Any]]) -> dict[str, list[FailedAttempt]]:
    found: dict[str, list[FailedAttempt]] = {}
    for record in records:
        if record.get("kind") == "attempt":
            failed = FailedAttempt(int(record["attempt"]), str(record.get("error") or ""), int(record["sequence"]))
            found.setdefault(str(record["step"]), []).append(failed)
    return found


def _attempts_in_this_life(run: StoredRun) -> dict[str, int]:
    """Attempts that count against the present budget, by step: a run that failed starts its steps afresh."""
    used: dict[str, int] = {}
    before: dict[str, int] = {}
    for record in run.log:
        if record.get("kind") == "attempt":
            used[str(record["step"])] = int(record["attempt"])
        elif record.get("kind") == "end" and record.get("state") == RunState.FAILED.value:
            before, used = used, {}
    # Of a run that is failed now the last life is the one that failed.
    return before if run.state is RunState.FAILED and not used else used


def _following(run: StoredRun, position: Position) -> dict[str, tuple[str, ...]]:
    """The nodes that each committed step was followed by, as the log and the position tell."""
    by_branch: dict[str, list[Mapping[str, Any]]] = {}
    for record in run.log:
        if record.get("kind") == "step":
            by_branch.setdefault(str(record.get("branch") or ""), []).append(record)
    waiting: dict[str, list[str]] = {}
    for step in (*position.ready, *position.held):
        waiting.setdefault(step.branch, []).append(step.node_id)
    heads = {branch.id: branch.head for branch in position.branches.values()}
    heads |= {branch: str(records[0].get("node")) for branch, records in by_branch.items() if branch}
    heads |= {branch: nodes[0] for branch, nodes in waiting.items() if branch and branch not in heads}
    found: dict[str, tuple[str, ...]] = {}
    for branch, records in by_branch.items():
        for index, record in enumerate(records):
            if record.get("branches"):
                nodes = [heads.get(each) for each in record["branches"]]
                found[_key(record)] = tuple(node for node in nodes if node is not None)
            elif index + 1 < len(records):
                found[_key(record)] = (str(records[index + 1].get("node")),)
            elif branch:
                found[_key(record)] = tuple(waiting.get(branch, ())[:1]) or _join_after(run, branch, record)
            else:
                found[_key(record)] = tuple(waiting.get("", ())[:1])
    return found


def _join_after(run: StoredRun, branch: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The join that a branch's last step led to, when the definition has an edge there."""
    source = branch.rpartition("/")[2].rpartition("#")[0]
    node = _nodes(run).get(source) or {}
    join = node.get("join_node")
    return (str(join),) if join and _edges(run, str(record.get("node")), str(join)) else ()


def _nodes(run: StoredRun) -> Mapping[str, Any]:
    nodes = (run.definition or {}).get("nodes")
    return nodes if isinstance(nodes, Mapping) else {}


def _edges(run: StoredRun, source: str, target: str) -> list[str]:
    edges = (run.definition or {}).get("edges")
    items = edges.items() if isinstance(edges, Mapping) else ()
    return [key for key, edge in items if edge.get("source") == source and edge.get("target") == target]


def _finished(
    run: StoredRun,
    record: Mapping[str, Any],
    key: str,
    attempts: Sequence[FailedAttempt],
    goes_to: tuple[str, ...],
) -> StepView:
    error = record.get("error")
    edges = _edges(run, str(record.get("node")), goes_to[0]) if len(goes_to) == 1 else []
    return StepView(
        key=key,
        node_id=str(record.get("node")),
        visit=int(record.get("visit") or 1),
        status="handled" if error else "done",
        branch=str(record.get("branch") or ""),
        attempts=int(record.get("attempts") or 1),
        tokens=int(record.get("tokens") or 0),
        cost=float(record.get("cost") or 0.0),
        latency_ms=int(record.get("latency_ms") or 0),
        error=str(error) if error else None,
        goes_to=goes_to,
        edge=edges[0] if len(edges) == 1 else None,
        finished_at=record.get("at"),
        sequence=int(record["sequence"]),
        failed_attempts=tuple(attempts),
    )


def _unfinished(
    run: StoredRun, step: Step, held: bool, attempts: Sequence[FailedAttempt], used: Mapping[str, int]
) -> StepView:
    mine = [record for record in run.log if record.get("kind") == "attempt" and record.get("step") == step.key]
    count = used.get(step.key, 0)
    return StepView(
        key=step.key,
        node_id=step.node_id,
        visit=step.visit,
        status=_standing(run, step, held, count),
        branch=step.branch,
        attempts=count,
        tokens=sum(int(record.get("tokens") or 0) for record in mine),
        cost=sum(float(record.get("cost") or 0.0) for record in mine),
        latency_ms=sum(int(record.get("latency_ms") or 0) for record in mine),
        error=attempts[-1].error if attempts and count else None,
        failed_attempts=tuple(attempts),
    )


def _standing(run: StoredRun, step: Step, held: bool, attempts: int) -> StepStanding:
    if held:
        asked = any(record.get("kind") == "wait" and record.get("step") == step.key for record in run.log)
        return "waiting" if asked else "next"
    match run.state:
        case RunState.RUNNING:
            return "running"
        case RunState.FAILED if attempts:
            return "failed"
        case RunState.FAILED if (run.record.error or "").startswith(STEP_LIMIT):
            return "next"
        case RunState.CRASHED | RunState.CANCELLED | RunState.FAILED:
            return "interrupted"
        case _:
            return "next"


# --- plans ----------------------------------------------------------------------------------------------------------

_FINAL: dict[StepStatus, StepStanding] = {
    StepStatus.COMPLETED: "done",
    StepStatus.FAILED: "failed",
    StepStatus.SKIPPED: "skipped",
    StepStatus.REJECTED: "rejected",
    StepStatus.AWAITING_APPROVAL: "waiting",
}


def plan_state(run: StoredRun) -> PlanState | None:
    """Where the plan stands, attempts after the last checkpoint included; ``None`` when it cannot be read."""
    try:
        values = lenient_state(run.values)
        if not has_plan(values):
            return None
        state = PlanState.restore(values, run.body, None)
    except (SurefootError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what is damaged is told with the damage
    for record in run.later:
        if record.get("kind") == "attempt":
            state.take_attempt(record)
    _take_answers(run, state)
    return state


def _take_answers(run: StoredRun, state: PlanState) -> None:
    """Answers that were left for the run, which it has not used yet."""
    left = {request: message for message in run.messages if (request := request_of(message)) is not None}
    for step in state.plan.steps:
        asked = state.standing(step.id).approval
        if asked is None or asked.answer is not None or asked.request_id not in left:
            continue
        try:
            plain = lenient_state({"": left[asked.request_id].body})[""]
            asked.answer = ApprovalResult.model_validate(plain["answer"])
        except (SurefootError, ValueError, KeyError, TypeError):
            continue  # no answer that the run could use: the step still waits


def plan_steps(run: StoredRun) -> list[StepView]:
    """All steps of the plan, in its order."""
    state = plan_state(run)
    if state is None:
        return []
    ready = {step.id for step in ready_steps(state.plan, state.earlier)}
    attempts = _attempts(run.log)
    suspended = (run.body.get("position") or {}).get("waits") or {}
    commits = {str(each.get("node")): each for each in run.log if each.get("kind") == "step"}
    views = []
    for step in state.plan.steps:
        standing = state.standing(step.id)
        commit = commits.get(step.id, {})
        done = step.status is StepStatus.COMPLETED
        records = [each for each in run.log if each.get("step") == step.id or each.get("node") == step.id]
        views.append(
            StepView(
                key=step.id if standing.visit == 1 else f"{step.id}#{standing.visit}",
                node_id=step.id,
                visit=standing.visit,
                status="waiting"
                if f"{step.id}#{standing.visit}" in suspended and run.state is RunState.PAUSED
                else _plan_standing(run, state, step, step.id in ready),
                attempts=step.attempts,
                tokens=standing.tokens,
                cost=sum(float(each.get("cost") or 0.0) for each in records),
                latency_ms=standing.latency_ms,
                error=step.error if not done else None,
                finished_at=commit.get("at") if done else None,
                sequence=commit.get("sequence") if done else None,
                description=step.description,
                needs=tuple(step.dependencies),
                failed_attempts=tuple(attempts.get(step.id, ())),
            )
        )
    return views


def _plan_standing(run: StoredRun, state: PlanState, step: PlanStep, is_ready: bool) -> StepStanding:
    asked = state.standing(step.id).approval
    if step.status is StepStatus.AWAITING_APPROVAL and asked is not None and asked.answer is not None:
        return "next"  # answered from outside; the run has not gone on yet
    final = _FINAL.get(step.status)
    if final is not None:
        return final
    if not is_ready:
        return "later"
    if step.requires_approval and (asked is None or asked.answer is None or asked.used):
        return "next"  # nobody has allowed it yet, so nothing of it ran
    match run.state:
        case RunState.RUNNING:
            return "running"
        case RunState.CRASHED | RunState.CANCELLED:
            return "interrupted"
        case _:
            return "next"
