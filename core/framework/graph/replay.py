"""Which calls of a step are answered from its journal, and when; pure: no clock, no store.

A step that starts again makes its calls again. Three rules make sure that each finished call is answered from its
record, and that none is told what followed another way (docs/adr/0013-journal.md has the reasons):

*Lanes.* Calls that follow each other in one task or thread are a lane. A lane is known by where it was begun (its
parent lane and how many calls that had begun) and by what its first call asks; equal ones are counted. Call ``k`` of a
lane is record ``k`` of that lane, if it asks the same. If not, the step has left its recorded way there: that record
and everything that may depend on it (what began after it had ended) is dropped. But equal lanes are counted as they
come, which may be another order than before. So lanes that have asked the same so far are told apart only by what they
ask next: one that asks what follows in another one is exchanged with it. What both were answered stays as it is: they
asked the same, so it is as if the outside had answered one before the other.

*Replay first.* Which lane waited for which cannot be seen: a task may be awaited, or told by a queue. But nothing that
had ended before can depend on what had not. So records are given out in the order in which they had ended, and nothing
is really made before all of them are given out: a call without an answer waits until then. In an unchanged step all
come, for whatever a finished call depends on had finished too; and where a call differs, nothing made in its place has
happened yet when the others are answered. This also lets a step take the same way where the first to finish decides;
so that it does, an answer also waits for all calls to come that had begun before it: they did not need it.

*An end.* Where the next record does not come, since the step takes another way or its tasks take turns by chance,
somebody has to say so: ``relax``. Then the order of beginnings counts no more; if that is not enough, calls are made. A
record is still used if all that had ended before it was given out, and nothing made since has come to an end. A
*steady* record is used in any case, until a call differs: a model's reply does not age, and an effect that has happened
must not happen again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Answer = TypeVar("Answer")
Turn = Literal["answer", "make", "wait"]

ROOT = ""
"""The lane of the step's own task."""

ALONE = "-"
"""How the lanes of calls begin that are made in threads of which nothing is known."""


@dataclass(frozen=True, slots=True)
class CallKey:
    """What a call asks: ``name``, a hash of its ``request``, and its ``occurrence`` (from 1) among equal ones."""

    name: str
    request: str
    occurrence: int

    @property
    def asks(self) -> tuple[str, str]:
        """Without the occurrence."""
        return self.name, self.request


@dataclass(frozen=True, slots=True)
class Begun(Generic[Answer]):
    """A call of the attempts before.

    ``number`` counts calls as they began, from 1. ``lane`` and ``index`` (from 0) are its place. ``answer`` is ``None``
    for one that had not finished, else a one-tuple, and ``end`` then counts answers as they came, from 1. ``after`` is
    how many had come when it began; ``inside`` the number of the call around it. A ``loose`` one is not missed when it
    does not come again. The answer of a ``steady`` one stays right whatever else was made meanwhile.
    """

    number: int
    key: CallKey
    lane: str = ROOT
    index: int = 0
    answer: tuple[Answer] | None = None
    end: int = 0
    after: int = 0
    inside: int | None = None
    loose: bool = False
    steady: bool = False


@dataclass(eq=False, slots=True)
class Lane:
    """A task or thread of this attempt: what its calls are known by, and how many it has begun.

    ``begun`` is after how many calls of its ``parent`` it was, and what it asked first; ``children`` are those that it
    is the parent of. ``asked`` is what each of its calls asked.
    """

    id: str
    count: int = 0
    parent: Lane | None = None
    begun: tuple[int, str, str] = (0, "", "")
    children: list[Lane] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Arrival(Generic[Answer]):
    """A call that is being made. ``found`` is its record, ``number`` that of the record or its own new one.

    ``lane`` and ``index`` are its place in the records, which it keeps. ``by`` is the lane that makes it: another one
    where that was exchanged since. A ``kin`` one asks what was recorded of a lane that its own may turn out to be.
    """

    lane: str
    index: int
    key: CallKey
    number: int
    found: Begun[Answer] | None
    by: Lane
    kin: bool = False
    allowed: bool = False
    made: bool = False
    over: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether its record has an answer."""
        return self.found is not None and self.found.answer is not None


class Replay(Generic[Answer]):
    """The recorded calls of a step, used up as the step makes them again."""

    def __init__(self, recorded: Iterable[Begun[Answer]] = ()) -> None:
        known = sorted(recorded, key=lambda each: each.number)
        self._unused = {each.number: each for each in known}
        self._all = {(each.lane, each.index): each for each in known}
        self._order = sorted((each for each in known if each.answer is not None), key=lambda each: each.end)
        self._next = 0
        # What had begun outside other calls, which may be made late.
        self._begun = sorted((each for each in known if not each.loose and each.inside is None), key=lambda e: e.after)
        self._came = 0
        self._in_order = True
        self._told = 0
        self._made = False
        self._arrived: set[int] = set()
        self._inside: dict[int, list[Begun[Answer]]] = {}
        for each in known:
            if each.inside is not None:
                self._inside.setdefault(each.inside, []).append(each)
        self._siblings: dict[str, list[str]] = {}
        for lane in dict.fromkeys(each.lane for each in known):
            self._siblings.setdefault(_base(lane), []).append(lane)
        self._lanes: dict[str, Lane] = {}
        self._opened: dict[str, int] = {}
        # Where a lane's call is recorded that was asked before the lane was exchanged: in that of the other one.
        self._places: dict[tuple[str, int], str] = {}
        self._gone: set[int] = set()
        self._passed: list[Begun[Answer]] = []
        # Calls that were made for their lane may be a recorded one; that answers have aged by, if it is not.
        self._unsure: list[Arrival[Answer]] = []
        self._taken: dict[Hashable, set[int]] = {}
        self._lowest: dict[Hashable, int] = {}
        self._asking: dict[Hashable, list[int]] = {}
        for each in known:
            self._taken.setdefault(each.key.asks, set()).add(each.key.occurrence)
            self._asking.setdefault(each.key.asks, []).append(each.number)
        self.root = self._open(ROOT)
        self.live = False
        """Whether calls are made although records are left."""
        self.used = 0
        """How many calls were answered from the journal."""
        self.dropped: list[Begun[Answer]] = []
        """Records that are not used because the step took another way, as they were given up."""

    @property
    def left(self) -> bool:
        """Whether the step took another way than recorded."""
        return bool(self.dropped)

    @property
    def unused(self) -> list[Begun[Answer]]:
        """Recorded calls that were not made again, in the order they had begun."""
        return list(self._unused.values())

    @property
    def has_unused(self) -> bool:
        """Whether there are any such."""
        return bool(self._unused)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded in the first place."""
        return not self._all

    @property
    def is_over(self) -> bool:
        """Whether every answer that has to be given out was."""
        return self._first() is None

    def after(self, ended: int) -> int:
        """How many answers a call may know of that begins now, when ``ended`` of the step have been recorded: as long
        as nothing is made, only those that were given out."""
        return ended if self.live or self._made or self.is_over else self._told

    # --- lanes --------------------------------------------------------------------------------------------------

    def branch(self, parent: Lane, at: int, name: str, request: str) -> Lane:
        """The lane of a task or thread that lane ``parent`` began after ``at`` of its calls, at its first call."""
        lane = self._numbered(_id("in", parent.id, at, name, request))
        lane.parent, lane.begun = parent, (at, name, request)
        parent.children.append(lane)
        return lane

    def inside(self, key: CallKey) -> Lane:
        """The lane of what runs inside the call ``key``."""
        return self._numbered(_id("of", *key.asks, key.occurrence))

    def alone(self, name: str, request: str) -> Lane:
        """A lane for one call of a thread of which nothing is known."""
        return self._numbered(ALONE + _id(name, request))

    def _numbered(self, base: str) -> Lane:
        siblings = self._siblings.get(base, ())
        recorded = (each for each in siblings if each not in self._lanes and self._recorded(each, 0) is not None)
        if (lane := next(recorded, None)) is not None:
            return self._open(lane)
        number = self._opened.get(base, 1)
        while f"{base}.{number}" in self._lanes:
            number += 1
        if not siblings:  # lanes that may be exchanged free their numbers
            self._opened[base] = number + 1
        return self._open(f"{base}.{number}")

    def _further(self, base: str) -> str:
        """A lane that neither is recorded nor has come."""
        number = 1
        while (lane := f"{base}.{number}") in self._lanes or lane in self._siblings.get(base, ()):
            number += 1
        return lane

    def _open(self, lane_id: str) -> Lane:
        lane = self._lanes[lane_id] = Lane(lane_id)
        return lane

    # --- calls --------------------------------------------------------------------------------------------------

    def arrive(self, lane: Lane, name: str, request: str, number: int) -> Arrival[Answer]:
        """A call begins; it has ``number`` when it has no record. See ``turn`` for what to do with it."""
        index = lane.count
        found = self._recorded(lane.id, index)
        if found is None or found.key.asks != (name, request):
            other = self._exchanged(lane, index, (name, request))
            if other is None and found is not None and not self._stands_aside(lane, index, found):
                self._drop([found])
            found = other
        at = self._places.get((lane.id, index), lane.id)
        lane.count += 1
        lane.asked.append((name, request))
        if found is not None and not all(map(_is_moved, self._unsure)):
            self._age()
            found = found if found.number in self._unused else None
        if found is not None and found.answer and not found.steady and self.live and not self._follows(found):
            self._drop([found], aged=True)
            found = None
        if found is None:
            return Arrival(at, index, self._new_key(name, request), number, None, lane)
        if found.answer is None:
            del self._unused[found.number]
        self._arrived.add(found.number)
        return Arrival(at, index, found.key, found.number, found, lane)

    def turn(self, call: Arrival[Answer]) -> Turn:
        """What is to be done with a call now: give it the answer of its record, make it, or wait."""
        found = call.found
        if found is not None and found.answer is not None:
            if found.number in self._unused:
                first = self._first()
                fits = self.live or call.allowed or first is None or (first is found and self._have_come(found.end))
                fits = fits or self._is_due(call) or (found.loose and self._follows(found))
                return "answer" if fits else "wait"
            call.found, call.number = None, 0  # dropped while it waited
        if self.live or call.allowed or self._first() is None or (not call.over and self.holds_answers(call)):
            return "make"
        if self._is_due(call):
            return "make"
        return "wait"

    def give(self, call: Arrival[Answer]) -> Answer:
        """The answer of a call whose turn it is to be given it; used up by this."""
        assert call.found is not None
        assert call.found.answer is not None
        del self._unused[call.found.number]
        self.used += 1
        self._told = max(self._told, call.found.end)
        return call.found.answer[0]

    def make(self, call: Arrival[Answer], number: int) -> None:
        """A call whose turn it is to be made is; one that lost its record meanwhile has the new ``number``."""
        call.made = True
        call.number = call.number or number

    def holds_answers(self, call: Arrival[Answer]) -> bool:
        """Whether answers are recorded inside a call, so that it has to be made for them to be given out."""
        return any(each.answer is not None and not each.loose for each in self._within(call.number))

    def close(self, call: Arrival[Answer]) -> None:
        """A call that is made has done its work, and is to wait for its ``turn`` once more before that is known: what
        was recorded inside it and has not come again will not."""
        call.over = True
        self._drop(self._within(call.number))

    def ended(self, call: Arrival[Answer]) -> None:
        """A call is over. What it came to, if it was made, may change whatever comes now: no answer fits any more."""
        self._made = self._made or call.made
        if call.made and call.found is None:  # one that was in flight before is nothing that others can have known of
            if call.kin:
                self._unsure.append(call)
            elif not _is_moved(call):
                self._age()
        elif call.is_answered:  # given up while it waited, so its task knows something else now
            self._drop(each for each in (call.found,) if each is not None)

    def relax(self, waiting: Iterable[Arrival[Answer]]) -> None:
        """Nothing more comes by itself: let one of the calls that wait go on, or all.

        First the one whose turn it is, from now on without what had only begun before. Then one that only another's
        answer was to come before, which it did not depend on. Then, where a lane gave way to one that has not come, one
        of a lane that may be that one, as long as nothing was made. Then those that were in flight before: no recorded
        answer can depend on them; and new ones of lanes that may be recorded ones. If there is none, the step takes
        another way: from now on calls are made.
        """
        waiting = list(waiting)
        first = self._first()
        if self._in_order and first is not None:
            self._in_order = False
            if any(call.found is first for call in waiting):
                return
        held = [call for call in waiting if call.is_answered and call.found.number in self._unused]  # type: ignore[union-attr]
        fit = [call for call in held if call.found is not None and self._follows(call.found)]
        if fit:
            min(fit, key=lambda call: call.found.end if call.found is not None else 0).allowed = True
            return
        passed = [each for each in self._passed if each.number in self._unused and each.number not in self._arrived]
        if passed and not self._made:
            like = [call for call in held if not call.allowed and self._is_kin(call)]
            if like:
                min(like, key=lambda call: call.found.end if call.found is not None else 0).allowed = True
                return
        flying = [call for call in waiting if call.found is not None and not call.is_answered and not call.allowed]
        kin = [call for call in waiting if call.found is None and not call.allowed and self._is_kin(call)]
        if flying or kin:
            for call in (*flying, *kin):
                call.allowed = True
            for call in kin:
                call.kin = True
            return
        self.live = True
        self._drop(passed)
        self._drop((call.found for call in held if call.found is not None and not call.found.steady), aged=True)

    def give_up(self) -> None:
        """Use none of the records."""
        self._drop(self._unused.values())

    # --- inside -------------------------------------------------------------------------------------------------

    def _at(self, lane: str, index: int) -> Begun[Answer] | None:
        """What is recorded of a call of a lane, used or not."""
        found = self._all.get((self._places.get((lane, index), lane), index))
        return found if found is not None and found.number not in self._gone else None

    def _age(self) -> None:
        """Give up the answers that what was made now may have changed."""
        self._drop((each for each in self._unused.values() if each.answer and not each.steady), aged=True)

    def _recorded(self, lane: str, index: int) -> Begun[Answer] | None:
        found = self._at(lane, index)
        return found if found is not None and found.number in self._unused else None

    def _exchanged(self, lane: Lane, index: int, asks: tuple[str, str]) -> Begun[Answer] | None:
        """The record of a lane like this one, which has asked the same so far, and then asked this.

        Tasks and threads that begin alike are numbered as they come, which may be in another order than before. The two
        lanes are exchanged then, with the tasks that each has begun; or those that they were begun by are.
        """
        if not any(number in self._unused for number in self._asking.get(asks, ())):
            return None

        def fits(other: str) -> bool:
            found = self._recorded(other, index)
            return found is not None and found.key.asks == asks and found.number not in self._arrived

        return self._recorded(lane.id, index) if self._exchange_with(lane, fits) else None

    def _stands_aside(self, lane: Lane, index: int, found: Begun[Answer]) -> bool:
        """Exchange a lane, which asks another thing than ``found``, with one like it of which nothing further is
        recorded; that may be one that has not come yet. If none comes, the step has taken another way."""
        if not index or lane.parent is None:
            return False
        if self._exchange_with(lane, lambda other: self._at(other, index) is None):
            self._passed.append(found)
            return True
        if self.live:
            return False
        base = _base(lane.id)
        for other in [*(each.id for each in lane.parent.children if _base(each.id) == base), self._further(base)]:
            pairs = self._pairs(lane.id, other, {}) if other != lane.id and self._at(other, index) is None else None
            if pairs is not None:
                self._exchange(pairs)
                self._passed.append(found)
                return True
        return False

    def _exchange_with(self, lane: Lane, fits: Callable[[str], bool]) -> bool:
        mine = _line(lane)
        ids = [each.id for each in mine]
        for line in self._like(mine):
            if line == ids or not fits(line[-1]):
                continue
            differ = next(at for at, (each, other) in enumerate(zip(ids, line, strict=True)) if each != other)
            pairs = self._pairs(ids[differ], line[differ], dict(zip(ids, line, strict=True)))
            if pairs is not None:
                self._exchange(pairs)
                return True
        return False

    def _like(self, line: list[Lane], upto: int = -1) -> Iterator[list[str]]:
        """Recorded lanes, each with those that it comes from, that were begun at such places as a live one was."""
        upto = len(line) - 1 if upto < 0 else upto
        if upto == 0:
            yield [line[0].id]
            return
        for before in self._like(line, upto - 1):
            for each in self._siblings.get(_id("in", before[-1], *line[upto].begun), ()):
                yield [*before, each]

    def _pairs(self, mine: str, other: str, known: Mapping[str, str]) -> list[tuple[str, str]] | None:
        """Which lanes have to be exchanged for two to be, with those begun by them; ``None`` if they differ.

        ``known`` says of some lanes with which one they have to be.
        """
        one, two = self._lanes.get(mine), self._lanes.get(other)
        count = max(each.count if each is not None else 0 for each in (one, two))
        if not all(self._ask_alike(mine, other, index) for index in range(count)):
            return None
        pairs, taken = [(mine, other)], set[str]()
        for owner, its in ((one, other), (two, mine)):
            for child in owner.children if owner is not None else ():
                if child.id in taken:
                    continue
                found = self._pair(child, _id("in", its, *child.begun), known, taken)
                if found is None:
                    return None
                pairs += found
                taken |= {each for pair in found for each in pair}
        return pairs

    def _pair(self, child: Lane, base: str, known: Mapping[str, str], taken: set[str]) -> list[tuple[str, str]] | None:
        wanted = known.get(child.id)
        number = child.id.rpartition(".")[2]
        likely = [f"{base}.{number}", *self._siblings.get(base, ()), self._further(base)]
        others = [wanted] if wanted is not None else likely
        for other in others:
            found = self._pairs(child.id, other, known) if other not in taken and _base(other) == base else None
            if found is not None:
                return found
        return None

    def _exchange(self, pairs: Iterable[tuple[str, str]]) -> None:
        for mine, other in pairs:
            one, two = self._lanes.pop(mine, None), self._lanes.pop(other, None)
            for index in range(max(each.count if each is not None else 0 for each in (one, two))):
                here, there = (mine, index), (other, index)
                at = self._places.get(here, mine)
                self._places[here], self._places[there] = self._places.get(there, other), at
            for lane, lane_id in ((one, other), (two, mine)):
                if lane is not None:
                    lane.id, self._lanes[lane_id] = lane_id, lane

    def _ask_alike(self, one: str, other: str, index: int) -> bool:
        """Whether nothing is known of a call of two lanes by which they differ: neither recorded nor asked now."""
        found = (self._at(one, index), self._at(other, index))
        asked = {each.key.asks for each in found if each is not None}
        lanes = (self._lanes.get(one), self._lanes.get(other))
        return len(asked | {each.asked[index] for each in lanes if each is not None and index < each.count}) <= 1

    def _is_due(self, call: Arrival[Answer]) -> bool:
        """Whether the call of a lane that was exchanged is late: its answer takes the place of one that was given to
        the other lane, and that one's turn is over."""
        if not _is_moved(call):
            return False
        other = self._all.get((call.by.id, call.index))
        return other is None or other.number not in self._unused

    def _is_kin(self, call: Arrival[Answer]) -> bool:
        """Whether its lane may turn out to be a recorded one, which asked the same there."""
        mine = _line(call.by)
        lines = (line[-1] for line in self._like(mine) if line[-1] != call.by.id)
        found = (self._all.get((other, call.index)) for other in lines)
        asked = (each.key.asks for each in found if each is not None and each.number not in self._gone)
        return call.key.asks in asked

    def _first(self) -> Begun[Answer] | None:
        """The record that is to be given out next."""
        while self._next < len(self._order):
            first = self._order[self._next]
            if first.number in self._unused and not first.loose:
                return first
            self._next += 1
        return None

    def _have_come(self, end: int) -> bool:
        """Whether all calls have come, or will not, that had begun before that answer."""
        while self._in_order and self._came < len(self._begun) and self._begun[self._came].after < end:
            number = self._begun[self._came].number
            if number in self._unused and number not in self._arrived:
                return False
            self._came += 1
        return True

    def _follows(self, found: Begun[Answer]) -> bool:
        """Whether all that had ended when this call began was given out."""
        first = self._first()
        return first is None or first.end > found.after

    def _within(self, number: int) -> list[Begun[Answer]]:
        """The unused records inside a call, at any depth."""
        found: list[Begun[Answer]] = []
        outer = [number]
        while outer:
            for each in self._inside.get(outer.pop(), ()):
                outer.append(each.number)
                if each.number in self._unused:
                    found.append(each)
        return found

    def _drop(self, which: Iterable[Begun[Answer]], aged: bool = False) -> None:
        """Give up records, and all that may depend on them: what began after one had ended, and what is inside one.

        Steady ones stay where records are given up only because they have ``aged``.
        """
        gone = {each.number: each for each in which if each.number in self._unused}
        size = 0
        while len(gone) > size:
            size = len(gone)
            ends = [each.end for each in gone.values() if each.answer is not None]
            if ends:
                later = ((number, each) for number, each in self._unused.items() if each.after >= min(ends))
                gone |= {number: each for number, each in later if not (aged and each.steady and each.answer)}
            for number in list(gone):
                gone |= {each.number: each for each in self._within(number)}
        self.dropped += sorted(gone.values(), key=lambda each: each.number)
        self._gone |= gone.keys()
        for number, each in gone.items():
            del self._unused[number]
            if number not in self._arrived:  # whose call keeps its key
                self._taken[each.key.asks].discard(each.key.occurrence)
                self._lowest.pop(each.key.asks, None)

    def _new_key(self, name: str, request: str) -> CallKey:
        """The key of a call without a record: the lowest occurrence that no other call has, nor a record that may come.
        So what is made anew on another way has the keys it had."""
        asks = (name, request)
        taken = self._taken.setdefault(asks, set())
        occurrence = self._lowest.get(asks, 1)
        while occurrence in taken:
            occurrence += 1
        taken.add(occurrence)
        self._lowest[asks] = occurrence + 1
        return CallKey(name, request, occurrence)


def _line(lane: Lane) -> list[Lane]:
    """A lane after those that it was begun by."""
    return [lane] if lane.parent is None else [*_line(lane.parent), lane]


def _is_moved(call: Arrival[Answer]) -> bool:
    """Whether its lane was exchanged since, or before for the calls up to this."""
    return call.lane != call.by.id


def _base(lane: str) -> str:
    return lane.rpartition(".")[0]


def _id(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


__all__ = ["ALONE", "ROOT", "Arrival", "Begun", "CallKey", "Lane", "Replay", "Turn"]
