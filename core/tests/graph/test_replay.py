"""Which calls of a step are answered from its journal: all of an unchanged step, none after another way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.graph.replay import ROOT, Arrival, Begun, CallKey, Lane, Replay


def record(*calls: tuple[str, str | None]) -> list[Begun[str]]:
    """Records of calls of the step's own task, given as (request, answer)."""
    seen: dict[str, int] = {}
    made = []
    for number, (request, answer) in enumerate(calls, 1):
        seen[request] = seen.get(request, 0) + 1
        key = CallKey("tool", request, seen[request])
        answered = None if answer is None else (answer,)
        made.append(Begun(number, key, ROOT, number - 1, answered, number if answered else 0, number - 1))
    return made


def meet(replay: Replay[str], request: str, lane: Lane | None = None) -> str | None:
    """What a call is answered that is made alone; ``None`` when it is made."""
    call = replay.arrive(lane or replay.root, "tool", request, 99)
    if replay.turn(call) == "wait":
        replay.relax([call])
    if replay.turn(call) == "answer":
        return replay.give(call)
    assert replay.turn(call) == "make"
    replay.make(call, 99)
    replay.ended(call)
    return None


def test_calls_that_come_again_are_answered_and_the_next_one_is_new() -> None:
    replay = Replay(record(("a", "A"), ("b", "B")))
    assert [meet(replay, "a"), meet(replay, "b"), meet(replay, "c")] == ["A", "B", None]
    assert (replay.used, replay.left, replay.unused) == (2, False, [])


def test_equal_calls_are_told_apart_by_their_place() -> None:
    replay = Replay(record(("roll", "3"), ("roll", "5")))
    assert [meet(replay, "roll"), meet(replay, "roll"), meet(replay, "roll")] == ["3", "5", None]


@pytest.mark.parametrize(
    ("recorded", "made"),
    [
        (["write 1", "read"], ["write 2", "read"]),
        (["write 1", "read"], ["read"]),
        (["a", "read"], ["a", "write", "read"]),
    ],
    ids=["another", "left out", "put in"],
)
def test_a_call_that_differs_ends_the_replay_for_those_after_it(recorded: list[str], made: list[str]) -> None:
    replay = Replay(record(*((each, "old") for each in recorded)))
    answers = [meet(replay, each) for each in made]
    assert answers == [None if each != "a" else "old" for each in made]
    assert replay.left


def test_a_call_made_anew_on_another_way_has_the_key_it_had() -> None:
    replay = Replay(record(("pay", "1"), ("look", "2"), ("pay", "3")))
    assert meet(replay, "pay") == "1"
    assert meet(replay, "other") is None
    call = replay.arrive(replay.root, "tool", "pay", 99)
    assert call.key == CallKey("tool", "pay", 2)


@pytest.mark.parametrize("tokens", [("token", "token"), ("token 1", "token 2")], ids=["one answer", "two answers"])
def test_lanes_that_begin_alike_are_exchanged_when_they_come_in_another_order(tokens: tuple[str, str]) -> None:
    """Two threads log in and then fetch each its own thing; the second is first this time."""
    before = Replay[str]()
    recorded = []
    for number, what in enumerate(("A", "B")):
        lane = before.branch(before.root, 0, "tool", "login")
        for index, request in enumerate(("login", f"fetch {what}")):
            at, end = number * 2 + index + 1, index * 2 + number + 1
            answer = tokens[number] if index == 0 else f"got {what}"
            recorded.append(
                Begun(at, CallKey("tool", request, 1 + number * (1 - index)), lane.id, index, (answer,), end, index * 2)
            )
    replay = Replay(recorded)
    lanes = [replay.branch(replay.root, 0, "tool", "login") for _ in range(2)]
    logins = [replay.arrive(lane, "tool", "login", 90) for lane in lanes]
    assert [replay.turn(each) for each in logins] == ["answer", "wait"]
    assert [replay.give(each) for each in logins] == list(tokens)
    fetched = [replay.arrive(lanes[0], "tool", "fetch B", 91), replay.arrive(lanes[1], "tool", "fetch A", 92)]
    assert [replay.turn(each) for each in fetched] == ["wait", "answer"]
    assert [replay.give(fetched[1]), replay.give(fetched[0])] == ["got A", "got B"]
    assert not replay.left
    # What follows is recorded beside what it follows there.
    later = [replay.arrive(lane, "tool", "later", 93 + each) for each, lane in enumerate(lanes)]
    assert [(each.lane, each.index) for each in later] == [(recorded[2].lane, 2), (recorded[0].lane, 2)]


def login(number: int, lane: str, answer: str | None = None, end: int = 0) -> Begun[str]:
    return Begun(number, CallKey("tool", "login", number), lane, 0, (answer,) if answer else None, end, 0)


def fetch(number: int, lane: str, what: str, answer: str | None = None, end: int = 0) -> Begun[str]:
    return Begun(number, CallKey("tool", f"fetch {what}", 1), lane, 1, (answer,) if answer else None, end, 1)


def two_lanes() -> tuple[str, str]:
    before = Replay[str]()
    one, two = (before.branch(before.root, 0, "tool", "login") for _ in range(2))
    return one.id, two.id


def test_a_lane_gives_way_to_one_that_has_not_come_and_takes_its_place() -> None:
    """Only A had logged in when the process ended. B comes first now and is told that answer; what A had fetched is
    A's all the same, which logs in anew at once, and B's rows are those of the second lane."""
    one, two = two_lanes()
    replay = Replay([login(1, one, "token 1", 1), fetch(2, one, "A", "got A", 2)])
    b = replay.branch(replay.root, 0, "tool", "login")
    first = replay.arrive(b, "tool", "login", 90)
    assert (replay.turn(first), replay.give(first)) == ("answer", "token 1")
    fetched_b = replay.arrive(b, "tool", "fetch B", 3)
    assert replay.turn(fetched_b) == "wait", "nothing is made before all is given out"
    a = replay.branch(replay.root, 0, "tool", "login")
    again = replay.arrive(a, "tool", "login", 4)
    assert (again.key.occurrence, again.lane, again.index) == (2, two, 0)
    assert replay.turn(again) == "make"
    replay.make(again, 4)
    replay.ended(again)
    fetched_a = replay.arrive(a, "tool", "fetch A", 90)
    assert (replay.turn(fetched_a), replay.give(fetched_a)) == ("answer", "got A")
    assert replay.turn(fetched_b) == "make"
    assert (fetched_b.lane, fetched_b.index) == (two, 1)
    assert replay.dropped == []


def test_a_call_that_was_in_flight_is_found_by_the_lane_that_makes_it() -> None:
    """B's fetch had begun, as an effect of which nobody knows what came of it: B meets it, though it came first."""
    one, two = two_lanes()
    recorded = [login(1, one, "token 1", 1), login(2, two, "token 2", 2), fetch(3, two, "B")]
    replay = Replay(recorded)
    b, a = (replay.branch(replay.root, 0, "tool", "login") for _ in range(2))
    logins = [replay.arrive(each, "tool", "login", 90) for each in (b, a)]
    assert (replay.turn(logins[0]), replay.give(logins[0])) == ("answer", "token 1")
    fetched = replay.arrive(b, "tool", "fetch B", 90)
    assert fetched.found is recorded[2]
    assert replay.turn(fetched) == "wait"
    assert (replay.turn(logins[1]), replay.give(logins[1])) == ("answer", "token 2")
    assert replay.turn(fetched) == "make"
    other = replay.arrive(a, "tool", "fetch A", 4)
    assert (other.found, other.lane, other.index) == (None, one, 1)


def test_a_lane_that_gave_way_in_vain_has_left_the_recorded_way() -> None:
    """No other task comes that fetches A: then it was this one that does so no more, and all that followed is old."""
    one, _ = two_lanes()
    root = Begun(3, CallKey("tool", "read", 1), ROOT, 0, ("old",), 3, 2, steady=True)
    replay = Replay([login(1, one, "token 1", 1), replace(fetch(2, one, "A", "got A", 2), steady=True), root])
    lane = replay.branch(replay.root, 0, "tool", "login")
    replay.give(replay.arrive(lane, "tool", "login", 90))
    other = replay.arrive(lane, "tool", "fetch B", 4)
    while replay.turn(other) == "wait":
        replay.relax([other])
    assert [each.key.request for each in replay.dropped] == ["fetch A", "read"]
    assert meet(replay, "read") is None


def test_a_call_of_a_task_that_only_may_be_a_recorded_one_makes_answers_old() -> None:
    """It logs in beside one that is slow to go on, and does not turn out to be it: what that one had read may have
    changed since."""
    one, _ = two_lanes()
    replay = Replay([login(1, one, "token 1", 1), fetch(2, one, "A", "got A", 2)])
    slow, other = (replay.branch(replay.root, 0, "tool", "login") for _ in range(2))
    replay.give(replay.arrive(slow, "tool", "login", 90))
    new = replay.arrive(other, "tool", "login", 3)
    while replay.turn(new) == "wait":
        replay.relax([new])
    replay.make(new, 3)
    replay.ended(new)
    assert not replay.live
    assert replay.arrive(slow, "tool", "fetch A", 4).found is None


def test_a_call_around_recorded_ones_is_made_first_and_told_last() -> None:
    before = Replay[str]()
    key = CallKey("tool", "outer", 1)
    inner = before.inside(key)
    recorded: list[Begun[str]] = [
        Begun(1, key, ROOT, 0),
        Begun(2, CallKey("tool", "in", 1), inner.id, 0, ("I",), 1, 0, inside=1),
        Begun(3, CallKey("tool", "side", 1), before.branch(before.root, 0, "tool", "side").id, 0, ("S",), 2, 1),
    ]
    replay = Replay(recorded)
    outer = replay.arrive(replay.root, "tool", "outer", 9)
    assert replay.turn(outer) == "make"
    replay.make(outer, 9)
    within = replay.arrive(replay.inside(key), "tool", "in", 10)
    assert (replay.turn(within), replay.give(within)) == ("answer", "I")
    replay.close(outer)
    assert replay.turn(outer) == "wait", "another lane's answer comes before"
    side = replay.arrive(replay.branch(replay.root, 0, "tool", "side"), "tool", "side", 11)
    assert (replay.turn(side), replay.give(side), replay.turn(outer)) == ("answer", "S", "make")


def test_a_loose_call_is_not_missed_and_used_when_it_comes() -> None:
    lane = Replay[str]().alone("tool", "x").id
    recorded = [*record(("a", "A")), Begun(2, CallKey("tool", "x", 1), lane, 0, ("X",), 2, 1, loose=True)]
    replay = Replay(recorded)
    assert [meet(replay, "a"), meet(replay, "b")] == ["A", None]
    assert replay.dropped == recorded[1:], "what is made may have changed what it would be told"
    replay = Replay(recorded)
    late = replay.arrive(replay.alone("tool", "x"), "tool", "x", 9)
    assert replay.turn(late) == "wait", "it began after another had ended"
    assert meet(replay, "a") == "A"
    assert (replay.turn(late), replay.give(late)) == ("answer", "X")


def test_a_steady_record_outlives_what_was_made_since_but_not_a_call_that_differs() -> None:
    def recorded() -> list[Begun[str]]:
        first, second = record(("look", "L"), ("pay", "P"))
        return [replace(first, lane="x.1"), replace(second, lane="y.1", index=0, after=0, steady=True)]

    replay = Replay(recorded())
    new = replay.arrive(replay.root, "tool", "new", 9)
    assert replay.turn(new) == "wait"
    replay.relax([new])
    assert replay.turn(new) == "make"
    replay.make(new, 9)
    replay.ended(new)
    assert [each.key.request for each in replay.dropped] == ["look"]
    pay = replay.arrive(Lane("y.1"), "tool", "pay", 10)
    assert (replay.turn(pay), replay.give(pay)) == ("answer", "P")

    replay = Replay(recorded())
    replay.arrive(Lane("x.1"), "tool", "another", 9)
    late = replay.arrive(Lane("y.1"), "tool", "pay", 10)
    assert replay.turn(late) == "answer", "nothing had ended before it began"
    replay = Replay([recorded()[0], replace(recorded()[1], after=1)])
    replay.arrive(Lane("x.1"), "tool", "another", 9)
    assert [each.key.request for each in replay.dropped] == ["look", "pay"]


# --- any program -----------------------------------------------------------------------------------------------------
# A program is a tree of tasks: they make calls, begin others, wait for those, and tell each other of things. It is run
# to a crash after any number of events, and then again, each time in an order by chance.


@dataclass(frozen=True)
class Task:
    """What it does, in order: ("call", request), ("spawn", Task), ("join", n) with the n-th last one begun,
    ("tell", n), ("hear", n) or ("gone",), where a call was that is left out."""

    actions: tuple[tuple[Any, ...], ...]


def task_of(chance: random.Random, depth: int = 0) -> Task:
    actions: list[tuple[Any, ...]] = []
    for _ in range(chance.randrange(1, 5)):
        what = chance.choice(["call", "call", "call", "tell", "hear", "join", "spawn", "await", "await"])
        if what == "call" or (depth == 3 and what in ("spawn", "await")):
            actions.append(("call", chance.choice("abc")))
        elif what in ("spawn", "await"):
            actions.append(("spawn", task_of(chance, depth + 1)))
            actions += [("join", 0)] if what == "await" else []
        else:
            actions.append((what, chance.randrange(2)))
    return Task(tuple(actions))


any_program = st.integers(0, 2**32).map(lambda seed: task_of(random.Random(seed)))


@dataclass
class World:
    """What counts calls that really happen; each is answered something else, or by what it asks alone."""

    made: list[str] = field(default_factory=list)
    pure: bool = False

    def do(self, request: str) -> str:
        self.made.append(request)
        return request if self.pure else f"{request}@{len(self.made)}"


@dataclass
class Live:
    """A task as it runs. ``place`` is its lane, or the place it was begun from; ``past`` all that happened before."""

    work: Iterator[None]
    place: tuple[Lane, int, object]
    past: set[object]
    waits_for: Live | None = None
    over: bool = False
    call: Arrival[str] | None = None


@dataclass
class Life:
    """One attempt. ``rows`` is the journal it leaves, ``told`` each answer with whether it was recorded, the call's
    request and what happened before it."""

    before: list[Begun[str]]
    world: World
    chance: random.Random
    rows: dict[int, Begun[str]] = field(default_factory=dict)
    told: list[tuple[str, bool, str, set[object]]] = field(default_factory=list)
    relaxed: int = 0
    numbers: list[tuple[int, bool]] = field(default_factory=list)

    def run(self, program: Task, stop_after: int = -1) -> None:
        self.replay = Replay(self.before)
        self.rows = {each.number: each for each in self.before}
        self.unlisted: dict[int, Begun[str]] = {}
        self.number = max(self.rows, default=0)
        self.ended = max((each.end for each in self.before), default=0)
        self.told_of: dict[int, set[object]] = {}
        self.all: list[Live] = []
        self._begin(program, (self.replay.root, 0, None), set())
        self.all[0].place = (self.replay.root, 0, self.all[0])
        while stop_after != 0:
            stop_after -= 1
            ready = [each for each in self.all if not each.over and self._can(each)]
            if not ready:
                held = [each.call for each in self.all if not each.over and each.call is not None]
                if not held:
                    return  # all is done, or waits for what nobody tells
                self.replay.relax(held)
                self.relaxed += 1
                continue
            live = self.chance.choice(ready)
            try:
                next(live.work)
            except StopIteration:
                live.over = True

    def _can(self, live: Live) -> bool:
        if live.call is not None and not live.call.made and self.replay.turn(live.call) == "wait":
            return False
        return live.waits_for is None or live.waits_for.over

    def _begin(self, task: Task, place: tuple[Lane, int, object], past: set[object]) -> Live:
        live = Live(iter(()), place, set(past))
        live.work = self._work(live, task)
        self.all.append(live)
        return live

    def _work(self, live: Live, task: Task) -> Iterator[None]:
        children: list[Live] = []
        for action in task.actions:
            match action[0]:
                case "call":
                    yield from self._call(live, action[1])
                case "spawn":
                    children.append(self._begin(action[1], live.place, live.past))
                case "join" if action[1] < len(children):
                    child = live.waits_for = children[-1 - action[1]]
                    yield
                    live.past |= child.past
                case "tell":
                    self.told_of.setdefault(action[1], set()).update(live.past)
                    self.told_of[action[1]].add("told")
                case "hear":
                    # Not told yet: it goes on without, which happens in any order and so changes nothing but the past.
                    live.past |= self.told_of.get(action[1], set())
                case "gone":
                    live.past.add("changed")
            yield

    def _call(self, live: Live, request: str) -> Iterator[None]:
        lane, at, owner = live.place
        if owner is not live:
            lane = self.replay.branch(lane, at, "tool", request)
        call = live.call = self.replay.arrive(lane, "tool", request, self.number + 1)
        if call.found is None:
            self.number += 1
        live.place = (lane, lane.count, live)
        after = self.replay.after(self.ended)
        past = set(live.past)
        yield
        if self.replay.turn(call) == "answer":
            answer = self.replay.give(call)
            self.numbers.append((call.number, True))
            self.told.append((answer, True, request, past))
        else:
            self.replay.make(call, self.number + 1)
            self.number = max(self.number, call.number)
            begun: Begun[str] = Begun(call.number, call.key, call.lane, call.index, None, 0, after)
            self.unlisted[call.number] = begun
            yield
            answer = self.world.do(request)
            self.ended += 1
            for each in self.replay.dropped:
                self.rows.pop(each.number, None)
            self.rows |= self.unlisted
            self.unlisted.clear()
            self.rows[call.number] = Begun(call.number, call.key, call.lane, call.index, (answer,), self.ended, after)
            self.numbers.append((call.number, False))
            self.told.append((answer, False, request, past))
            self.replay.ended(call)
        live.call = None
        live.past.add((request, answer))
        if request == "changed":
            live.past.add("changed")


def calls_of(task: Task) -> list[str]:
    found: list[str] = []
    for action in task.actions:
        found += [action[1]] if action[0] == "call" else calls_of(action[1]) if action[0] == "spawn" else []
    return found


crashes = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(any_program, st.integers(0, 2**32), crashes)
def test_an_unchanged_program_is_told_each_recorded_answer_once_in_whatever_order_it_comes(
    program: Task, seed: int, stops: list[int]
) -> None:
    program = named(program, iter(range(1000)))
    chance, world, rows = random.Random(seed), World(), list[Begun[str]]()
    for stop in [*stops, -1]:
        life = Life(rows, world, chance)
        life.run(program, stop)
        assert (life.relaxed, life.replay.dropped) == (0, [])
        known = {each.answer[0] for each in rows if each.answer is not None}
        recorded = [answer for answer, was, *_ in life.told if was]
        assert len(recorded) == len(set(recorded))
        assert set(recorded) <= known
        if stop == -1:
            assert set(recorded) == known, "a finished call was not answered from its record"
        rows = sorted(life.rows.values(), key=lambda each: each.number)
    assert len(life.told) == len(calls_of(program))
    answered = sorted(answer.partition("@")[0] for answer, *_ in life.told)
    assert answered == sorted(calls_of(program))
    finished = {each.answer[0] for each in rows if each.answer is not None}
    assert {answer for answer, *_ in life.told} == finished
    assert len(world.made) == len(finished), "each call was made once"


@settings(max_examples=300, deadline=None)
@given(any_program, st.integers(0, 2**32), crashes)
def test_tasks_that_ask_alike_are_not_mistaken_for_each_other(program: Task, seed: int, stops: list[int]) -> None:
    """They ask the same, are answered the same and begin tasks of their own, at any depth, in an order by chance."""
    chance, world, rows = random.Random(seed), World(pure=True), list[Begun[str]]()
    given_up = 0
    for stop in [*stops, -1]:
        life = Life(rows, world, chance)
        life.run(program, stop)
        used = [number for number, was in life.numbers if was]
        assert len(used) == len(set(used)), "one answer for two calls"
        given_up += sum(each.answer is not None for each in life.replay.dropped)
        rows = sorted(life.rows.values(), key=lambda each: each.number)
    # An answer was given up only where a task took the place of one that the others had not yet been told apart from.
    assert len(world.made) == len(calls_of(program)) + given_up
    assert sorted(request for *_, request, _ in life.told) == sorted(calls_of(program))


def rows_of(chance: random.Random) -> Task:
    """Tasks that begin by the same calls and then go on each its own way, between two calls of the step's own."""
    same = [("call", "hello")] * chance.randrange(1, 3)
    tasks = [
        Task((*same, *(("call", f"{task}.{each}") for each in range(chance.randrange(1, 4)))))
        for task in range(chance.randrange(2, 5))
    ]
    spawned = [("spawn", task) for task in tasks]
    joined = [("join", each) for each in range(len(tasks))]
    return Task((("call", "first"), *spawned, *joined, ("call", "last")))


@pytest.mark.parametrize("steady", [False, True], ids=["reads", "effects"])
@pytest.mark.parametrize("pure", [True, False], ids=["one answer", "many answers"])
@pytest.mark.parametrize("shape", [task_of, rows_of], ids=lambda shape: shape.__name__)
def test_tasks_that_ask_alike_repeat_next_to_nothing(
    shape: Callable[[random.Random], Task], pure: bool, steady: bool
) -> None:
    """Of such programs, in any order, one in a hundred at most makes a call again; no row takes another one's place."""
    again = 0
    for seed in range(150):
        program, chance = shape(random.Random(seed)), random.Random(seed)
        world, rows = World(pure=pure), list[Begun[str]]()
        for stop in [chance.randrange(1, 40), chance.randrange(1, 40), -1]:
            life = Life(rows, world, chance)
            life.run(program, stop)
            used = [number for number, was in life.numbers if was]
            assert len(used) == len(set(used)), "one answer for two calls"
            rows = sorted((replace(each, steady=steady) for each in life.rows.values()), key=lambda e: e.number)
            assert len({(each.lane, each.index) for each in rows}) == len(rows)
            assert len({each.key for each in rows}) == len(rows)
        again += len(world.made) > len(calls_of(program))
    assert again <= 1


def test_lanes_are_exchanged_with_the_tasks_that_they_have_begun() -> None:
    """Two agents log in and then let two tasks each fetch things of their own: the second agent is first this time."""
    before, recorded = Replay[str](), list[Begun[str]]()
    agents = [before.branch(before.root, 0, "tool", "login") for _ in range(2)]
    for number, agent in enumerate(agents, 1):
        key = CallKey("tool", "login", number)
        recorded.append(Begun(number, key, agent.id, 0, ("token",), number, 0))
    for agent, what in zip(agents, "AB", strict=True):
        for each in "12":
            number = len(recorded) + 1
            lane = before.branch(agent, 1, "tool", f"fetch {what}{each}")
            key = CallKey("tool", f"fetch {what}{each}", 1)
            recorded.append(Begun(number, key, lane.id, 0, (f"got {what}{each}",), number, 2))
    replay = Replay(recorded)
    lanes = [replay.branch(replay.root, 0, "tool", "login") for _ in range(2)]
    for lane in lanes:
        replay.give(replay.arrive(lane, "tool", "login", 90))
    wanted = [(lanes[0], "B1"), (lanes[1], "A1"), (lanes[0], "B2"), (lanes[1], "A2")]
    calls = []
    for lane, what in wanted:
        request = f"fetch {what}"
        calls.append(replay.arrive(replay.branch(lane, 1, "tool", request), "tool", request, 99))
    for call in sorted(calls, key=lambda each: each.number):
        assert replay.turn(call) == "answer"
        assert replay.give(call) == call.key.request.replace("fetch", "got")
    assert replay.dropped == []


def named(task: Task, names: Iterator[int]) -> Task:
    """The same with another request in each call."""
    return Task(
        tuple(
            (action[0], f"{action[1]}{next(names)}")
            if action[0] == "call"
            else (action[0], named(action[1], names))
            if action[0] == "spawn"
            else action
            for action in task.actions
        )
    )


def changed(task: Task, request: str, how: str) -> Task:
    made: list[tuple[Any, ...]] = []
    for action in task.actions:
        if action[0] == "call" and action[1] == request:
            own = ("spawn", Task((("call", "changed"),)))
            instead: dict[str, list[tuple[Any, ...]]] = {
                "another": [("call", "changed")],
                "out": [("gone",)],
                "in": [("call", "changed"), action],
                "in a task": [own, ("join", 0), action],
            }
            made += instead[how]
        else:
            made.append(("spawn", changed(action[1], request, how)) if action[0] == "spawn" else action)
    return Task(tuple(made))


@settings(max_examples=500, deadline=None)
@given(any_program, st.integers(0, 2**32), st.integers(1, 60), st.sampled_from(["another", "out", "in", "in a task"]))
def test_nothing_after_a_changed_call_is_told_what_followed_the_old_one(
    program: Task, seed: int, stop: int, how: str
) -> None:
    program = named(program, iter(range(1000)))
    chance, world = random.Random(seed), World()
    requests = calls_of(program)
    if not requests:
        return
    first = Life([], world, chance)
    first.run(program, stop)
    finished = [each.key.request for each in first.rows.values() if each.answer is not None]
    request = chance.choice(finished or requests)
    rows = sorted(first.rows.values(), key=lambda each: each.number)
    again = Life(rows, world, chance)
    again.run(changed(program, request, how))
    after = [(answer, past) for answer, was, _, past in again.told if was]
    assert [answer for answer, past in after if "changed" in past] == []
    # What had ended before the changed call began is told all the same.
    old = next((each for each in rows if each.key.request == request), None)
    if old is not None and finished and not how.startswith("in"):
        before = {each.answer[0] for each in rows if each.answer is not None and each.end <= old.after}
        assert before <= {answer for answer, _ in after}
