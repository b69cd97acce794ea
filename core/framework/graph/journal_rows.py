"""The rows of a step's journal: what each says, and what all of them together say of the step's calls. Pure.

A row is JSON of the codec with ``kind`` "call", "sleep", "wait", "ask" or "mark". All but marks name a call: ``n`` its
number in the step, ``name``, ``request`` (a hash) and ``occ`` its key, ``lane``, ``idx``, ``after``, ``in`` (the call
around it) and ``loose`` how it was made (see ``replay.Begun``; what is empty or zero is left out); ``state`` what is
known of it, of answered ones with ``end``; ``at`` when (seconds since the epoch). ``got`` is how many answers the way
of the step had then, where that is not ``end``, which counts those that were dropped too. ``begun`` lists calls without
a row of their own, as ``[n, name, request, occ, lane, idx, after, in, loose]``, so that a resume knows what was in
flight. ``void`` are numbers that no longer count, because the step took another way, and ``settled`` numbers of lost
effects that this row takes the place of. ``given`` is a hash of what the step was given, where that was not committed.
``assumed`` says that this may be the effect that a damaged row was of. A mark says that the attempt before it failed by
itself: calls with smaller numbers count no more (``cleared``), or they do but those that raised are made again.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from framework.errors import CorruptData
from framework.graph.replay import ALONE, ROOT, Begun, CallKey
from framework.graph.spending import NOTHING, Spent
from framework.storage import codec
from framework.storage.records import JournalRow

Row = dict[str, Any]
Policy = Literal["rerun", "ask", "fail"]
POLICIES = ("rerun", "ask", "fail")

CallState = Literal["done", "failed", "begun", "unknown", "settled", "running", "waiting", "timed_out"]
"""``begun``: it was in flight and will run again. ``unknown``: an effect without an outcome. ``settled``: one of which
somebody has said what became of it, and whose step has not gone on yet. ``running``: an effect of a run that is running
now. ``waiting``: a wait, a question or a sleep that is not over."""

ANSWERED = ("done", "timed_out", "failed")


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call inside an unfinished step, as its run's journal knows it.

    ``id`` is ``"<step>/<number>"``. ``key`` is its idempotency key. ``at`` is when it was recorded, ``until`` when a
    sleep or a wait ends, both in seconds since the epoch. ``error`` is what a failed one raised. ``answers_to`` is what
    ``CheckpointManager.send`` takes as the name: of a signal, or the id of a question. ``tokens`` and ``cost`` (US
    dollars) are a model's.
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
    error: str | None = None
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
    belong to the recorded way of the step any more, by what they ask. ``last`` is the highest number, ``ended`` how
    many answers had come. ``spent`` is what all questions to models took that no attempt's record counts; ``counted``
    are the numbers of calls whose tokens one does. ``stale`` are the numbers of calls that were made for something else
    that the step was given. ``damaged`` is how many rows cannot be read and may have been intents of effects.
    ``furthest`` is how many answers any process had on its way through this attempt.
    """

    calls: Sequence[Begun[Row]] = ()
    rows: Mapping[int, Row] = field(default_factory=dict)
    lost: Mapping[CallKey, Row] = field(default_factory=dict)
    last: int = 0
    spent: Spent = NOTHING
    counted: frozenset[int] = frozenset()
    ended: int = 0
    stale: frozenset[int] = frozenset()
    damaged: int = 0
    furthest: int = 0


def key_of(row: Mapping[str, Any]) -> CallKey:
    """The key of the call that a row is about."""
    return CallKey(row["name"], row["request"], row["occ"])


def spent_of(row: Mapping[str, Any]) -> Spent:
    """What a question to a model took."""
    if "tokens" not in row and "cost" not in row:
        return NOTHING
    return Spent(row.get("tokens", 0), 0, row.get("output_tokens", 0), row.get("cost", 0.0))


def unpriced_of(rows: Iterable[Row]) -> str | None:
    """The model of a reply among these rows whose cost is not known."""
    for row in rows:
        answer = row.get("answer")
        reply = answer.get("reply", answer) if isinstance(answer, dict) else None
        if "tokens" in row and "cost" not in row and isinstance(reply, dict) and reply.get("cost", 0) is None:
            return str(reply.get("model") or "unknown")
    return None


def parse(rows: Iterable[JournalRow], *, lenient: bool = False) -> list[Row]:
    """Stored rows as data, in their order. A ``lenient`` reading has one that cannot be read as of the kind "damaged".

    Raises ``UnknownType``, ``CorruptData``.
    """
    return [_parsed(stored, lenient) for stored in rows]


def _parsed(stored: JournalRow, lenient: bool) -> Row:
    try:
        row = codec.decode(stored.record)
        if not isinstance(row, dict) or not _NEEDED.get(row.get("kind", ""), _CALL) <= row.keys():
            raise CorruptData(f"The journal row {stored.step}/{stored.number} is no row of a call.")
    except CorruptData:
        if not lenient:
            raise
        row = {"kind": "damaged"}
    row["n"] = stored.number
    return row


_CALL = frozenset({"name", "request", "occ", "state"})
_NEEDED = {"mark": frozenset({"cleared"})}


def is_lost_effect(row: Mapping[str, Any]) -> bool:
    """Whether a row says that an effect may have begun, and not what came of it."""
    return row.get("state") == "intent"


def fold(rows: Sequence[Row], counted: int = 0, stale: Container[int] = ()) -> Journaled:
    """What the rows of one step come to. ``counted`` is the number up to which a record of the run counts what calls
    took, ``stale`` are the numbers of rows that were made for something else that the step was given."""
    marks = [row for row in rows if row["kind"] == "mark"]
    cleared = max((row["n"] for row in marks if row["cleared"]), default=0)
    tried_again = max((row["n"] for row in marks if not row["cleared"]), default=0)
    told = [row for row in rows if row["kind"] not in ("mark", "damaged")]
    void = {number for row in told for number in row.get("void", ())}
    settled = {number for row in told for number in row.get("settled", ())}
    listed = {each[0]: each for row in told if row["n"] not in stale for each in row.get("begun", ())}
    old = {row["n"] for row in told if row["n"] in stale}
    old |= {each[0] for row in told if row["n"] in stale for each in row.get("begun", ())} - {row["n"] for row in told}
    live: dict[int, Row] = {}
    lost: dict[CallKey, Row] = {}
    spent = NOTHING
    for row in told:
        number = row["n"]
        if number in settled:
            continue
        if number > counted:
            spent += spent_of(row)
        if number >= cleared and number not in void and number not in old:
            live[number] = row
        elif is_lost_effect(row):
            lost[key_of(row)] = row
    around = {number: row.get("in") for number, row in live.items()} | {
        number: each[7] for number, each in listed.items() if number not in live
    }
    gone = void | settled | old
    calls = [_begun(row, tried_again) for row in live.values()]
    calls += [
        Begun(number, CallKey(*each[1:4]), each[4], each[5], None, 0, each[6], each[7], each[8])
        for number, each in listed.items()
        if number not in live and number >= cleared and number not in gone
    ]
    calls = [each for each in calls if not _is_inside_a_finished_one(each.number, around, live, tried_again)]
    return Journaled(
        calls=_with_loose(calls, live),
        rows=live,
        lost=lost,
        last=max([row["n"] for row in rows] + list(listed) + [counted], default=0),
        spent=spent,
        counted=frozenset(number for number in live if number <= counted),
        ended=max((row.get("end", 0) for row in told), default=0),
        stale=frozenset(old),
        damaged=max(0, sum(row["kind"] == "damaged" for row in rows) - sum("assumed" in row for row in told)),
        furthest=max((got_of(row) for row in told if row["n"] >= cleared), default=0),
    )


def got_of(row: Mapping[str, Any]) -> int:
    """How many answers the way of the step had with the one that a row is of; 0 for one that is not answered."""
    got: int = row.get("got", row.get("end", 0))
    return got


def _begun(row: Row, tried_again: int) -> Begun[Row]:
    answered = _is_answered(row, tried_again)
    return Begun(
        row["n"],
        key_of(row),
        row.get("lane", ROOT),
        row.get("idx", 0),
        (row,) if answered else None,
        row.get("end", 0) if answered else 0,
        row.get("after", 0),
        row.get("in"),
        row.get("loose", False),
        _is_steady(row),
    )


def _is_steady(row: Row) -> bool:
    """Whether an answer stays right whatever was made since: a person's, a model's, what an effect came to.

    Another call's, with the policy ``rerun``, may have read what has changed.
    """
    return row["kind"] != "call" or "tokens" in row or row.get("policy", "rerun") != "rerun"


def _is_answered(row: Row, tried_again: int) -> bool:
    """Whether a row's outcome counts; what a call raised does no more in the attempts after the one it made fail."""
    return row["state"] in ANSWERED and not (row["state"] == "failed" and row["n"] < tried_again)


def _with_loose(calls: list[Begun[Row]], live: Mapping[int, Row]) -> list[Begun[Row]]:
    """Calls of threads of which nothing is known may have been made inside any call that went on meanwhile. Where that
    one is answered as a whole, they do not come again, so nobody is to miss them."""
    outer = [each for each in calls if each.answer is not None and live[each.number]["kind"] == "call"]
    return [
        replace(each, loose=True)
        if each.lane.startswith(ALONE)
        and any(other.number < each.number and each.end < other.end for other in outer if each.answer is not None)
        else each
        for each in calls
    ]


def _is_inside_a_finished_one(
    number: int, around: Mapping[int, int | None], live: Mapping[int, Row], tried_again: int
) -> bool:
    """Whether a call around it is answered as a whole, so that it will not be made again."""
    outer = around.get(number)
    while outer is not None:
        if outer in live and _is_answered(live[outer], tried_again):
            return True
        outer = around.get(outer)
    return False


def call_id(step: str, number: int) -> str:
    """The id of a call within its run."""
    return f"{step}/{number}"


def settle_message(step: str, row: Mapping[str, Any]) -> str:
    """The name of the message that settles an effect: of this time it was begun, not of an earlier or later one."""
    return f"settle:{call_id(step, row['n'])}:{round(row['at'] * 1_000_000)}"


def describe(
    step: str, rows: Sequence[Row], *, running: bool, messages: Container[str] = (), now: float = math.inf
) -> list[CallRecord]:
    """The calls of one step, by number. ``running`` says that somebody works on the run now, ``messages`` are the names
    of those left for it, ``now`` is the time in seconds since the epoch."""
    folded = fold(rows)
    shown = dict(folded.rows) | {row["n"]: row for row in folded.lost.values()}
    records = [_described(step, row, running, messages, now) for row in shown.values()]
    records += [
        CallRecord(call_id(step, each.number), step, each.number, "call", each.key.name, "begun")
        for each in folded.calls
        if each.number not in shown
    ]
    return sorted(records, key=lambda each: each.number)


def _error_text(error: Any) -> str | None:
    if isinstance(error, Mapping):
        return f"{error.get('type')}: {error.get('text')}"
    return str(error) if error is not None else None


def _described(step: str, row: Row, running: bool, messages: Container[str], now: float) -> CallRecord:
    state = row["state"]
    if state == "intent":
        is_settled = settle_message(step, row) in messages
        state = "settled" if is_settled else "running" if running else "unknown"
    elif row["kind"] == "sleep" and row.get("until", 0.0) > now:
        state = "waiting"
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
        error=_error_text(row.get("error")),
        tokens=spent.tokens,
        cost=spent.cost,
        until=row.get("until"),
        answers_to=row.get("to"),
        question=row.get("question"),
        schema=row.get("schema"),
    )
