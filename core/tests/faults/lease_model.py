"""A small model of lease, fencing token and commit, and a checker that goes through all of its states.

One run, a store, and workers that may do anything at any time: read the run, claim it, renew, run a step and send its
commit, be told or not be told what came of it, release, crash. A commit or a release that was sent is on its way until
the store takes it or it is lost, whatever has become of its sender: so a worker that is stalled in the middle of a
commit, a connection that is cut, and a message that arrives late are all the same thing here. Time passes in ticks of
the store's clock, at any moment, which makes every stall past a lease a case among others.

The model is finite: ``Limits`` bounds the workers, the tokens and the steps, not the length of what happens. `explore`
visits every state that can be reached (breadth first, so a counterexample is one of the shortest) and checks, at each
transition, what must hold; and at the end that from every state the run can still be completed.

``Rules`` are what the real stores do. Each can be broken, one at a time (`BROKEN`): the tests show that the checker
finds every one of these mistakes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Rules:
    """What the store does. All true: as it is."""

    commit_checks_token: bool = True
    """A commit whose token is not the run's is refused, in the transaction that would make it."""
    token_grows: bool = True
    """Each claim gives a token that no claim gave before."""
    store_clock: bool = True
    """The store's clock says whether a lease has passed, not the clock of the worker that asks."""
    commit_checks_sequence: bool = True
    """A commit must be the next one, so one that was sent twice is made once."""
    claim_is_atomic: bool = True
    """A claim looks at the lease and takes it in one transaction."""
    claim_checks_sequence: bool = True
    """A claim is refused when the run went on since the claimer read it."""
    release_checks_token: bool = True
    """A release by a stale owner changes nothing."""
    renew_checks_token: bool = True
    """A renewal by a stale owner is refused."""
    durable_before_answer: bool = True
    """A commit is confirmed only when a power failure cannot take it back."""


BROKEN: dict[str, Rules] = {name: replace(Rules(), **{name: False}) for name in Rules.__dataclass_fields__}
"""The rules with one of them broken."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large the model is. ``skew`` is how many ticks the last worker's clock is ahead of the store's."""

    workers: int = 2
    steps: int = 2
    tokens: int = 3
    lease: int = 2
    skew: int = 2


Phase = Literal["idle", "read", "claiming", "own", "sent"]


class Worker(NamedTuple):
    """``sequence`` is the last commit it knows of; ``base`` (of a claim) how many there were when it claimed."""

    phase: Phase = "idle"
    token: int = 0
    sequence: int = 0
    base: int = 0


class Message(NamedTuple):
    """On its way to the store: the commit of a step, or a release."""

    kind: Literal["commit", "release"]
    sender: int
    token: int
    sequence: int


class Action(NamedTuple):
    """What happens: its name, by which worker, or to which message."""

    name: str
    worker: int = NOBODY
    message: Message | None = None

    def __str__(self) -> str:
        if self.message is not None:
            message = self.message
            what = "release" if message.kind == "release" else f"commit of step {message.sequence}"
            return f"{self.name}: the {what} by worker {message.sender} with token {message.token}"
        return self.name if self.worker == NOBODY else f"worker {self.worker}: {self.name}"


class State(NamedTuple):
    """``log`` has the token and the number of each committed step; ``durable`` of them no power failure takes back.

    The last three are the checker's own memory, which no rule looks at: ``granted`` is the greatest token that was ever
    given, ``confirmed`` the greatest sequence that a worker was told is durable, and ``promised`` how many ticks the
    owner of that token may still rely on the lease.
    """

    token: int = 0
    owner: int = NOBODY
    lease: int = 0
    log: tuple[tuple[int, int], ...] = ()
    durable: int = 0
    workers: tuple[Worker, ...] = ()
    network: frozenset[Message] = frozenset()
    granted: int = 0
    confirmed: int = 0
    promised: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A transition: what happened, the state after it, and what was wrong with it, if anything."""

    action: Action
    after: State
    wrong: str | None = None


def initial(limits: Limits) -> State:
    return State(workers=(Worker(),) * limits.workers)


def complete(state: State, limits: Limits) -> bool:
    return len(state.log) >= limits.steps


# --- what can happen ------------------------------------------------------------------------------------------------


def steps(state: State, rules: Rules, limits: Limits) -> Iterator[Step]:
    """Everything that can happen next."""
    if state.lease > 0 or state.promised > 0:
        lease, promised = max(0, state.lease - 1), max(0, state.promised - 1)
        yield Step(Action("tick"), state._replace(lease=lease, promised=promised))
    if state.durable < len(state.log):
        yield Step(Action("written"), state._replace(durable=len(state.log)))
        lost = state.log[: state.durable]
        wrong = "a confirmed commit is lost" if len(lost) < state.confirmed else None
        yield Step(Action("power failure"), state._replace(log=lost), wrong)
    for number in range(limits.workers):
        yield from _worker_steps(state, number, rules, limits)
    for message in sorted(state.network):
        rest = state._replace(network=state.network - {message})
        yield Step(Action("lost", message=message), rest)
        if message.kind == "release":
            yield _release(rest, message, rules)
        else:
            yield from _commit(rest, message, rules)


def _worker_steps(state: State, number: int, rules: Rules, limits: Limits) -> Iterator[Step]:
    worker = state.workers[number]
    if worker.phase != "idle":
        yield Step(Action("crash", number), _with(state, number, Worker()))
    match worker.phase:
        case "idle":
            if not complete(state, limits):
                yield Step(Action("read", number), _with(state, number, Worker("read", sequence=len(state.log))))
        case "read":
            yield from _claim(state, number, rules, limits)
        case "claiming":
            yield _take(state, number, worker.token, rules, limits)
        case "own":
            yield _renew(state, number, rules, limits)
            if worker.sequence < limits.steps:
                yield _send(state, number)
            yield _leave(state, number)
        case "sent":
            yield _renew(state, number, rules, limits)
            message = Message("commit", number, worker.token, worker.sequence + 1)
            if message not in state.network:  # cut off before the answer: it cannot know, and sends again
                again = state._replace(network=state.network | {message})
                yield Step(Action("send again", number), again)


def _claim(state: State, number: int, rules: Rules, limits: Limits) -> Iterator[Step]:
    worker = state.workers[number]
    ahead = limits.skew if number == limits.workers - 1 and not rules.store_clock else 0
    if state.owner != NOBODY and state.lease > ahead:
        yield Step(Action("busy", number), state)
        return
    if state.token >= limits.tokens:
        return
    if rules.claim_checks_sequence and worker.sequence != len(state.log):
        yield Step(Action("moved on", number), _with(state, number, Worker()))
        return
    if rules.claim_is_atomic:
        yield _take(state, number, state.token, rules, limits)
    else:
        looked = _with(state, number, worker._replace(phase="claiming", token=state.token))
        yield Step(Action("find free", number), looked)


def _take(state: State, number: int, found: int, rules: Rules, limits: Limits) -> Step:
    """Make a worker the owner, by a token that follows the one it found."""
    worker = state.workers[number]
    token = found + 1 if rules.token_grows or found == 0 else found
    wrong = None
    if token <= state.granted:
        wrong = f"token {token} is given a second time"
    elif state.promised > 0:
        wrong = "a run is taken from an owner whose lease has not passed"
    after = state._replace(
        token=token,
        owner=number,
        lease=limits.lease,
        granted=max(state.granted, token),
        promised=limits.lease,
    )
    owned = Worker("own", token, worker.sequence, len(state.log))
    return Step(Action("claim", number), _with(after, number, owned), wrong)


def _renew(state: State, number: int, rules: Rules, limits: Limits) -> Step:
    worker = state.workers[number]
    current = state.token == worker.token and state.owner != NOBODY
    if not current and rules.renew_checks_token:
        return Step(Action("lease lost", number), _with(state, number, Worker()))
    promised = limits.lease if worker.token == state.granted else state.promised
    wrong = None if promised == limits.lease else "a stale owner keeps the run from others"
    return Step(Action("renew", number), state._replace(lease=limits.lease, promised=promised), wrong)


def _send(state: State, number: int) -> Step:
    """Run the next step and send its commit."""
    worker = state.workers[number]
    sequence = worker.sequence + 1
    wrong = None
    if sequence <= worker.base:
        wrong = f"step {sequence} runs again, which was committed when its worker claimed the run"
    message = Message("commit", number, worker.token, sequence)
    after = state._replace(network=state.network | {message})
    return Step(Action("run and send", number), _with(after, number, worker._replace(phase="sent")), wrong)


def _leave(state: State, number: int) -> Step:
    worker = state.workers[number]
    message = Message("release", number, worker.token, 0)
    after = state._replace(network=state.network | {message})
    return Step(Action("send release", number), _with(after, number, Worker()))


def _release(state: State, message: Message, rules: Rules) -> Step:
    if rules.release_checks_token and message.token != state.token:
        return Step(Action("ignored", message=message), state)
    promised = 0 if message.token == state.granted else state.promised
    return Step(Action("taken", message=message), state._replace(owner=NOBODY, lease=0, promised=promised))


def _commit(state: State, message: Message, rules: Rules) -> Iterator[Step]:
    """The store takes a commit, or refuses it; its sender is told, or is not."""
    worker = state.workers[message.sender]
    waits = worker.phase == "sent" and (worker.token, worker.sequence + 1) == (message.token, message.sequence)
    stale = rules.commit_checks_token and message.token != state.token
    next_one = message.sequence == len(state.log) + 1
    if stale or (rules.commit_checks_sequence and not next_one):
        if waits:
            yield Step(Action("refused", message=message), _with(state, message.sender, Worker()))
        else:
            yield Step(Action("refused unheard", message=message), state)
        return
    wrong = None
    if message.token != state.granted:
        wrong = f"a commit by token {message.token} is made although token {state.granted} was given since"
    elif not next_one:
        wrong = f"step {message.sequence} is committed after {len(state.log)} steps"
    log = (*state.log, (message.token, message.sequence))
    made = state._replace(log=log, durable=len(log) if rules.durable_before_answer else state.durable)
    yield Step(Action("made unheard", message=message), made, wrong)
    if waits:
        told = _with(made, message.sender, worker._replace(phase="own", sequence=message.sequence))
        yield Step(Action("made", message=message), told._replace(confirmed=max(state.confirmed, len(log))), wrong)


def _with(state: State, number: int, worker: Worker) -> State:
    workers = state.workers
    return state._replace(workers=(*workers[:number], worker, *workers[number + 1 :]))


# --- every state ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Explored:
    """What came of it. ``counterexample`` has the actions that lead to what is ``wrong``."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    wrong: str | None = None
    counterexample: list[str] = field(default_factory=list)
    stuck: list[State] = field(default_factory=list)
    """States from which the run cannot be completed although tokens are left."""


def explore(rules: Rules, limits: Limits) -> Explored:
    """Visit every reachable state; stop at the first transition that is wrong."""
    start = initial(limits)
    came: dict[State, tuple[State, Action] | None] = {start: None}
    before: dict[State, list[State]] = {}
    queue = deque([(start, 0)])
    found = Explored()
    while queue:
        state, found.depth = queue.popleft()
        for step in steps(state, rules, limits):
            found.transitions += 1
            if step.wrong is not None:
                found.wrong = step.wrong
                found.counterexample = [*map(str, _path(came, state)), str(step.action)]
                found.states = len(came)
                return found
            before.setdefault(step.after, []).append(state)
            if step.after not in came:
                came[step.after] = (state, step.action)
                queue.append((step.after, found.depth + 1))
    found.states = len(came)
    found.stuck = _stuck(came, before, limits)
    return found


def _path(came: dict[State, tuple[State, Action] | None], state: State) -> list[Action]:
    actions: list[Action] = []
    step = came[state]
    while step is not None:
        actions.append(step[1])
        step = came[step[0]]
    return actions[::-1]


def _stuck(
    came: dict[State, tuple[State, Action] | None], before: dict[State, list[State]], limits: Limits
) -> list[State]:
    """From every state with a token left to give, some way must lead to a completed run."""
    can = {state for state in came if complete(state, limits)}
    queue = deque(can)
    while queue:
        for earlier in before.get(queue.popleft(), ()):
            if earlier not in can:
                can.add(earlier)
                queue.append(earlier)
    return [state for state in came if state not in can and state.token < limits.tokens]
