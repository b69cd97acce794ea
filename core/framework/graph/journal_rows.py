"""The rows of a step's journal: what each says, and what all of them together say of the step's calls. Pure.

A row is JSON of the codec with ``kind`` "call", "sleep", "wait", "ask" or "mark". All but marks name a call: ``n`` its
number in the step, ``name``, ``request`` (a hash) and ``occ`` its key, ``quiet`` and ``in`` (the call around it) how it
was made; ``state`` what is known of it; ``at`` when (seconds since the epoch). ``begun`` lists calls without a row of
their own, as ``[n, name, request, occ, quiet, in]``, so that a resume knows what was in flight. ``void`` are numbers
that no longer count, because the step took another way, and ``settled`` numbers of lost effects that this row takes the
place of. A mark says that the attempt before it failed by itself: calls with smaller numbers count no more
(``cleared``), or they do but their tokens are in the attempt's record already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from framework.graph.replay import Begun, CallKey
from framework.graph.spending import NOTHING, Spent
from framework.storage import codec
from framework.storage.records import JournalRow

Row = dict[str, Any]
Policy = Literal["rerun", "ask", "fail"]
POLICIES = ("rerun", "ask", "fail")

CallState = Literal["done", "failed", "begun", "unknown", "running", "waiting", "timed_out"]
"""``begun``: it was in flight and will run again. ``unknown``: an effect without an outcome. ``running``: an effect of
a run that is running now."""

ANSWERED = ("done", "timed_out")


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call inside an unfinished step, as its run's journal knows it.

    ``id`` is ``"<step>/<number>"``. ``key`` is its idempotency key. ``at`` is when it was recorded, ``until`` when a
    sleep or a wait ends, both in seconds since the epoch. ``answers_to`` is what ``CheckpointManager.send`` takes as
    the name: of a signal, or the id of a question. ``tokens`` and ``cost`` (US dollars) are a model's.
    """

    id: str
    step: str
    number: int
    kind: str
    name: str
    state: CallState
    policy: str = "rerun"
    key: str = ""
    at: float | None = None
    answer: Any = None
    tokens: int = 0
    cost: float = 0.0
    until: float | None = None
    answers_to: str | None = None
    question: str | None = None
    schema: Any = None


@dataclass(frozen=True, slots=True)
class Journaled:
    """What a step's rows come to.

    ``calls`` are to be replayed; ``rows`` are their rows by number. ``lost`` are effects without an outcome that do not
    belong to the recorded way of the step any more, by what they ask. ``spent`` is what all questions to models took
    that no attempt's record counts; ``counted`` are the numbers of calls whose tokens one does.
    """

    calls: Sequence[Begun[Row]] = ()
    rows: Mapping[int, Row] = field(default_factory=dict)
    lost: Mapping[CallKey, Row] = field(default_factory=dict)
    last: int = 0
    spent: Spent = NOTHING
    counted: frozenset[int] = frozenset()


def key_of(row: Mapping[str, Any]) -> CallKey:
    """The key of the call that a row is about."""
    return CallKey(row["name"], row["request"], row["occ"])


def spent_of(row: Mapping[str, Any]) -> Spent:
    """What a question to a model took."""
    if "tokens" not in row and "cost" not in row:
        return NOTHING
    return Spent(row.get("tokens", 0), 0, row.get("output_tokens", 0), row.get("cost", 0.0))


def parse(rows: Iterable[JournalRow]) -> list[Row]:
    """Stored rows as data, in their order. Raises ``CodecError``, ``CorruptData``."""
    parsed = []
    for stored in rows:
        row = codec.decode(stored.record)
        row["n"] = stored.number
        parsed.append(row)
    return parsed


def is_lost_effect(row: Mapping[str, Any]) -> bool:
    """Whether a row says that an effect may have begun, and not what came of it."""
    return row.get("state") == "intent"


def fold(rows: Sequence[Row]) -> Journaled:
    """What the rows of one step come to."""
    cleared = max((row["n"] for row in rows if row["kind"] == "mark" and row["cleared"]), default=0)
    counted_below = max((row["n"] for row in rows if row["kind"] == "mark"), default=0)
    void: set[int] = set()
    settled: set[int] = set()
    listed: dict[int, list[Any]] = {}
    for row in rows:
        void.update(row.get("void", ()))
        settled.update(row.get("settled", ()))
        listed.update((each[0], each) for each in row.get("begun", ()))
    live: dict[int, Row] = {}
    lost: dict[CallKey, Row] = {}
    spent = NOTHING
    for row in rows:
        number = row["n"]
        if row["kind"] == "mark" or number in settled:
            continue
        if number >= counted_below:
            spent += spent_of(row)
        if number >= cleared and number not in void:
            live[number] = row
        elif is_lost_effect(row):
            lost[key_of(row)] = row
    around = {number: row.get("in") for number, row in live.items()} | {
        number: each[5] for number, each in listed.items() if number not in live
    }
    calls = [
        Begun(number, key_of(row), row["quiet"], (row,) if row["state"] in ANSWERED else None)
        for number, row in live.items()
        if not _is_inside_a_finished_one(number, around, live)
    ]
    calls += [
        Begun(number, CallKey(*each[1:4]), each[4])
        for number, each in listed.items()
        if number not in live
        and number >= cleared
        and number not in void
        and number not in settled
        and not _is_inside_a_finished_one(number, around, live)
    ]
    last = max([row["n"] for row in rows] + list(listed), default=0)
    counted = frozenset(number for number in live if number < counted_below)
    return Journaled(calls, live, lost, last, spent, counted)


def _is_inside_a_finished_one(number: int, around: Mapping[int, int | None], live: Mapping[int, Row]) -> bool:
    """Whether a call around it is answered as a whole, so that it will not be made again."""
    outer = around.get(number)
    while outer is not None:
        if outer in live and live[outer]["state"] in ANSWERED:
            return True
        outer = around.get(outer)
    return False


def call_id(step: str, number: int) -> str:
    """The id of a call within its run."""
    return f"{step}/{number}"


def settle_message(step: str, row: Mapping[str, Any]) -> str:
    """The name of the message that settles an effect: of this time it was begun, not of an earlier or later one."""
    return f"settle:{call_id(step, row['n'])}:{round(row['at'] * 1_000_000)}"


def describe(step: str, rows: Sequence[Row], *, running: bool) -> list[CallRecord]:
    """The calls of one step, by number. ``running`` says that somebody works on the run now."""
    folded = fold(rows)
    shown = dict(folded.rows) | {row["n"]: row for row in folded.lost.values()}
    records = [_described(step, row, running) for row in shown.values()]
    records += [
        CallRecord(call_id(step, each.number), step, each.number, "call", each.key.name, "begun")
        for each in folded.calls
        if each.number not in shown
    ]
    return sorted(records, key=lambda each: each.number)


def _described(step: str, row: Row, running: bool) -> CallRecord:
    state = row["state"]
    if state == "intent":
        state = "running" if running else "unknown"
    spent = spent_of(row)
    return CallRecord(
        id=call_id(step, row["n"]),
        step=step,
        number=row["n"],
        kind=row["kind"],
        name=row["name"],
        state=state,
        policy=row.get("policy", "rerun"),
        key=row.get("key", ""),
        at=row.get("at"),
        answer=row.get("answer"),
        tokens=spent.tokens,
        cost=spent.cost,
        until=row.get("until"),
        answers_to=row.get("to"),
        question=row.get("question"),
        schema=row.get("schema"),
    )
