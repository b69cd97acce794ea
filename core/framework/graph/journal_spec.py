"""What a step's journal is made of: its store, what its attempts share, and how a call is recorded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from framework.errors import UnstorableValue
from framework.graph import journal_rows as rows_of
from framework.graph.budget import BudgetGate
from framework.graph.journal_rows import Policy, Row
from framework.graph.replay import Arrival, CallKey
from framework.graph.spending import NOTHING, Spent
from framework.storage import codec
from framework.storage.interface import MAX_VALUE_BYTES
from framework.storage.records import JournalRow, Message

PATIENCE_SECONDS = 1.0
"""How long calls of a step that runs again wait for recorded ones that do not come, with nothing else happening."""


def request_hash(request: Any, path: str) -> str:
    """A hash of what a call asks; of equal requests the same, in whatever order their dicts were filled.

    Raises ``UnstorableValue`` naming the path, which begins with ``path``.
    """
    data = codec.encode(request, path)
    if b"{" in data:
        data = orjson.dumps(_in_order(orjson.loads(data)), option=orjson.OPT_SORT_KEYS)
    return hash_of(data)


def _in_order(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_in_order(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    items = {key: _in_order(item) for key, item in plain.items()}
    if items.get(codec.TAG) == "dict":  # one with other keys than text is stored as a list of pairs
        items["v"] = sorted(items["v"], key=lambda pair: orjson.dumps(pair, option=orjson.OPT_SORT_KEYS))
    return items


def hash_of(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:32]


class JournalStore(Protocol):
    """The run's side: where rows go and messages come from. Futures are done when it is durable, or hold the error."""

    @property
    def run_id(self) -> str: ...

    @property
    def stops_on_error(self) -> bool:
        """Whether a refused row ends the run; otherwise it is reported and the run goes on without it."""

    def write_journal(self, rows: Sequence[JournalRow], *, progress: bool = False) -> Future[None]:
        """``progress`` says that the step got further than any process before had brought it."""

    def read_journal(self, step: str) -> Future[list[JournalRow]]:
        """A step's rows. One that is damaged is there with an empty record."""

    def read_messages(self) -> Future[list[Message]]: ...

    def leave_message(self, name: str, body: bytes) -> Future[None]:
        """Leave the run a message itself; the future may hold ``MessageRefused``."""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """How a call is recorded: its policy, its value as data and back, and what a model's reply took.

    ``settled`` makes the data of a call that a person settled, of "done" or "skip" and the value given. ``before`` lets
    the call out when it is really made, not when it is answered from the journal: given whether it is made inside
    another call that was let out, it yields futures to be waited for, may raise, and returns what is called once the
    call is over and counted. ``key`` is its idempotency key where that is not one of its own.
    """

    policy: Policy = "rerun"
    to_plain: Callable[[Any], Any] = lambda value: value
    from_plain: Callable[[Any], Any] = lambda plain: plain
    spent: Callable[[Any], Spent] | None = None
    settled: Callable[[str, Any], Any] = lambda action, value: value
    before: Callable[[bool], Generator[Future[None], None, Callable[[], None]]] | None = None
    key: str | None = None


@dataclass(eq=False, slots=True)
class Call:
    """A call that is being made. ``after`` is how many answers of the step had come when it began."""

    step: str
    arrival: Arrival[Row]
    kind: str
    policy: Policy
    idempotency_key: str
    after: int
    outer: Call | None = None
    loose: bool = False
    row: Row | None = None
    answered: bool = False
    settles: int | None = None
    assumed: bool = False
    """Whether it may be the effect that a damaged row was of."""
    turn: Future[BaseException | None] | None = None
    """Done when it may go on; of one that waited for recorded ones."""
    begun: list[list[Any]] = field(default_factory=list)
    void: list[int] = field(default_factory=list)
    """What its row tells of other calls; the row that takes the place of an intent has to tell it again."""

    @property
    def number(self) -> int:
        """Its number in the step."""
        return self.arrival.number

    @property
    def key(self) -> CallKey:
        """What it asks."""
        return self.arrival.key

    @property
    def id(self) -> str:
        """Its id within the run; of a lost effect that one's."""
        number = self.number if self.settles is None else self.settles
        return rows_of.call_id(self.step, number)

    def listed(self) -> list[Any]:
        """Its entry in another call's row."""
        key, at = self.key, self.arrival
        outer = self.outer.number if self.outer is not None else None
        return [self.number, key.name, key.request, key.occurrence, at.lane, at.index, self.after, outer, self.loose]


@dataclass(slots=True)
class StepJournal:
    """What all attempts of one visit share.

    ``key`` is the step's idempotency key. ``must_load`` says that the store may have rows of it. ``before_model`` lets
    each question to a model out that is really asked. ``given`` makes a hash of what the step
    is given; where that is not committed (``unsure``), rows carry it, and count only where it is the same. ``rewound``
    says that rows without it may be of a state that is gone. Calls up to number ``counted`` are in the run's totals.
    """

    step: str
    key: str
    store: JournalStore | None = None
    must_load: bool = False
    keep_on_retry: bool = False
    sleep_in_process_seconds: float = 5.0
    patience_seconds: float = PATIENCE_SECONDS
    before_model: BudgetGate | None = None
    clock: Callable[[], float] = field(default_factory=lambda: time.time)
    given: Callable[[], str] | None = None
    unsure: bool = False
    rewound: bool = False
    counted: int = 0
    last: int = 0
    ended: int = 0
    """How many answers of the step were recorded."""
    written: bool = False
    """Whether the store may have rows of the step."""
    spent: Spent = NOTHING
    """What questions to models took that no record of the run counts yet."""

    @property
    def run_id(self) -> str:
        """The run's id, empty when it has no store."""
        return self.store.run_id if self.store is not None else ""


def encoded(row: Row, name: str) -> bytes:
    """A row's stored form. Raises ``UnstorableValue`` naming the part of the answer of call ``name``."""
    what = f"the answer of call {name!r}"
    try:
        data = codec.encode(row, "row")
    except UnstorableValue as error:
        raise UnstorableValue(error.path.replace("row.answer", what, 1), error.problem) from None
    if len(data) > MAX_VALUE_BYTES:
        problem = (
            f"has {len(data):,} bytes; a store takes at most {MAX_VALUE_BYTES:,} (MAX_VALUE_BYTES) in one value. Keep "
            "such data in a file or an object store, and return its name"
        )
        raise UnstorableValue(what, problem)
    return data
